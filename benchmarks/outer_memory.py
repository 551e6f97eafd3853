"""What an outer loop needs beside model and inner optimizer: peak of resident memory (VmHWM), beside the formula.

Each row is a process of its own: one peer, a coordinator, a model of equal layers, a few periods; what was resident
before the loop was made is taken off. In units of the model's size n (float32), for P fragments:

    state 1 + s     s: vectors of the outer optimizer (Nesterov: 1)
    before (1 + s)/P     the last round's fragment of it, for joiners
    round 2/P     contribution and result;   results K/P     the last K = keep_results

    python -m benchmarks.outer_memory --json memory.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch

import elastic
from benchmarks import common
from benchmarks.common import MIB, Report

LAYERS = 16
KEPT = 2
LOOPS: dict[str, tuple[type[elastic.OuterLoop], dict[str, Any]]] = {
    "DiLoCo": (elastic.DiLoCo, {}),
    "Streaming, P=4": (elastic.StreamingDiLoCo, {"fragments": 4, "sync_delay": 2}),
    "Streaming, P=16": (elastic.StreamingDiLoCo, {"fragments": 16, "sync_delay": 1}),
    "Streaming, P=16, int4": (elastic.StreamingDiLoCo, {"fragments": 16, "sync_delay": 1, "wire": "int4"}),
    "delayed": (elastic.DelayedDiLoCo, {}),
    "eager": (elastic.DelayedDiLoCo, {"eager": True}),
}
PRIVATE = {"eager": 3.0}
"""Vectors that a peer has to itself: of eager updates offset, its momentum, and the pending contribution."""


def expected(name: str) -> float:
    """Of the model's size, by the formula above."""
    fragments = LOOPS[name][1].get("fragments", 1)
    return 2 + (2 + 2 + KEPT) / fragments + PRIVATE.get(name, 0.0)


class Layers(torch.nn.Module):
    def __init__(self, elements: int) -> None:
        super().__init__()
        sizes = [elements // LAYERS] * LAYERS
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.full((size,), 0.5)) for size in sizes)

    def forward(self) -> torch.Tensor:
        return torch.stack([layer[:1].sum() for layer in self.layers]).sum()


def memory(field: str) -> int:
    """Bytes, of this process, from /proc/self/status."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith(field + ":")]
    return int(line.split()[1]) << 10


def measure(name: str, elements: int, steps: int) -> dict[str, int]:
    """One row, in this process."""
    torch.set_num_threads(1)
    make, options = LOOPS[name]
    model = Layers(elements)
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    for _ in range(2):
        model().backward()
        inner.step()
    with elastic.Coordinator("tcp://127.0.0.1:0", run="memory") as coordinator:
        with elastic.Peer(coordinator.address, run="memory", name="a") as peer:
            before = memory("VmRSS")
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
            with make(model, inner, peer, sync_every=16, keep_results=KEPT, **options) as loop:
                for _ in range(steps):
                    inner.step()
                rounds = loop.version.number
                peak, after = memory("VmHWM"), memory("VmRSS")
    return {"peak": peak - before, "kept": after - before, "rounds": rounds}


def row(name: str, elements: int, steps: int) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.outer_memory", "--only", name]
    command += ["--elements", str(elements), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answer: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return answer


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--elements", type=int, default=32 << 20, help="numbers in the model")
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--only", choices=[*LOOPS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(arguments.only, arguments.elements, arguments.steps)))
        return
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    size = 4 * arguments.elements
    columns = ("loop", "rounds", "peak, MiB", "peak / model", "kept / model", "formula / model")
    report = Report("outer_memory", f"Memory of an outer loop beside a model of {size // MIB} MiB", columns)
    for name in LOOPS:
        rows = [row(name, arguments.elements, arguments.steps) for _ in range(arguments.repeat)]
        peaks, kept = ([each[key] for each in rows] for key in ("peak", "kept"))
        numbers = (common.spread(peaks, 1 / MIB), common.spread(peaks, 1 / size), common.spread(kept, 1 / size))
        report.add((name, str(rows[0]["rounds"]), *numbers, f"{expected(name):.2f}"), peak_bytes=peaks, kept_bytes=kept)
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

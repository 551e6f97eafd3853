"""What it costs a peer to be watched: processor time and bytes of what collects, sends and witnesses, by accounting.

Peers train in this process with steps of a given length (a timed wait that stands in for a GPU) and exchange a model
every few of them. Each part counts its own processor time: collecting (steps, operations, and the products of each
contribution), heartbeats (made and packed, with all that they carry, the status of links included), the witness beside
each peer. What is marked at each step is timed by itself. Accounting leaves no doubt about noise: nothing is compared.

    python -m benchmarks.telemetry --json telemetry.json
    python -m benchmarks.telemetry --quick

Ends with 1 if the gate fails: all of it less than 2 % of a step.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
import timeit
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import BenchmarkError, Report
from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.outer.diloco import DiLoCo
from elastic.peer import Peer
from elastic.telemetry import Activity, TelemetryStatistics

GATE = 0.02
MARKED = 20_000


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one peer, while it was measured. seconds of processor time: collecting, heartbeats, witness."""

    steps: int
    wall: float
    collecting: float
    beating: float
    witness: float
    beats: int
    beat_bytes: int
    begun: float
    resident: int
    private: int


def train(peer: Peer, arguments: argparse.Namespace) -> Cost:
    """Half of the steps to warm up; then what the rest cost."""
    model = torch.nn.Linear(1, arguments.size, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    with DiLoCo(model, inner, peer, sync_every=arguments.every):
        _steps(model, inner, arguments, arguments.steps // 2)
        before, began = peer.statistics().telemetry, time.monotonic()
        _steps(model, inner, arguments, arguments.steps)
        return _cost(peer, before, arguments.steps, time.monotonic() - began)


def _steps(model: torch.nn.Module, inner: torch.optim.Optimizer, arguments: argparse.Namespace, count: int) -> None:
    pause = threading.Event()
    for _ in range(count):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        pause.wait(arguments.step)
        inner.step()


def _cost(peer: Peer, before: TelemetryStatistics, steps: int, wall: float) -> Cost:
    after, witness = peer.statistics().telemetry, peer._witness
    if witness is None or witness.ended:
        raise BenchmarkError(f"{peer.name} has no witness: see its events")
    resident, private = memory_of(witness.pid)
    return Cost(
        steps,
        wall,
        after.seconds - before.seconds,
        after.beat_seconds - before.beat_seconds,
        after.witness_seconds - before.witness_seconds,
        after.beats - before.beats,
        after.beat_bytes - before.beat_bytes,
        before.witness_seconds,
        resident,
        private,
    )


def memory_of(pid: int) -> tuple[int, int]:
    """Bytes: resident, and those of them that no other process shares."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    sizes = {line[0]: int(line[1]) << 10 for line in lines if line[0] in ("Rss:", "Private_Clean:", "Private_Dirty:")}
    return sizes["Rss:"], sizes["Private_Clean:"] + sizes["Private_Dirty:"]


def marking() -> float:
    """Seconds of what an outer loop marks at a step, beside what counts itself."""
    activity = Activity()
    activity.begin()

    def mark() -> None:
        with activity.waiting():
            pass

    return timeit.timeit(mark, number=MARKED) / MARKED


def main() -> None:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("--peers", type=int, default=3)
    parser.add_argument("--step", type=float, default=0.05, help="seconds of a step")
    parser.add_argument("--steps", type=int, default=600, help="that are measured; half as many go before")
    parser.add_argument("--every", type=int, default=20, help="steps from one exchange to the next")
    parser.add_argument("--size", type=common.sizes, default=common.sizes("16"), help="MiB of the model")
    parser.add_argument("--quick", action="store_true", help="few steps: the figures say little")
    arguments = parser.parse_args()
    arguments.size = arguments.size[0]
    arguments.steps = 60 if arguments.quick else arguments.steps
    with common.one_line_errors():
        sys.exit(1 if run(arguments) else 0)


def run(arguments: argparse.Namespace) -> bool:
    """Prints the report; returns whether the gate failed."""
    columns = ("part", "us per step", "share of a step", "us per heartbeat")
    title = f"Watching a peer: {arguments.peers} peers, steps of {1000 * arguments.step:g} ms, "
    title += f"{common.mib(arguments.size)} exchanged every {arguments.every}"
    report = Report("telemetry", title, columns)
    costs = measure(arguments)
    total = 0.0
    steps, beats = sum(cost.steps for cost in costs), sum(cost.beats for cost in costs)
    parts = {name: sum(getattr(cost, name) for cost in costs) for name in ("collecting", "beating", "witness")}
    for name, seconds in (parts | {"marks": marking() * steps}).items():
        share = seconds / steps / arguments.step
        total += share
        cells = (name, f"{1e6 * seconds / steps:.1f}", f"{share:.4%}", f"{1e6 * seconds / beats:.0f}")
        report.add(cells, seconds=seconds, steps=steps, beats=beats)
    report.add(("all", f"{1e6 * total * arguments.step:.1f}", f"{total:.4%}", ""), share=total)
    report.notes += _notes(costs)
    if total >= GATE:
        report.notes.append(f"FAILED: {total:.2%} of a step")
    common.publish(report, arguments)
    return total >= GATE


def _notes(costs: list[Cost]) -> list[str]:
    beats, size = sum(cost.beats for cost in costs), sum(cost.beat_bytes for cost in costs)
    wall = sum(cost.wall for cost in costs)
    return [
        f"A heartbeat has {size / beats:.0f} bytes: {size / wall:.0f} bytes a second of each peer.",
        f"A witness has {max(cost.resident for cost in costs) / common.MIB:.1f} MiB resident, of which "
        f"{max(cost.private for cost in costs) / common.MIB:.1f} MiB are its own; its beginning "
        f"takes {1000 * max(cost.begun for cost in costs):.0f} ms of processor time, and is not in the table.",
        "Of collecting, most is the products of each contribution, which grow with the model.",
    ]


def measure(arguments: argparse.Namespace) -> list[Cost]:
    costs, errors = list[Cost](), list[BaseException]()
    policy, timeouts = RunPolicy(min_peers=arguments.peers, quorum=1.0), Timeouts()
    with tempfile.TemporaryDirectory() as folder, Coordinator(run="bench", policy=policy, timeouts=timeouts) as served:

        def work(index: int) -> None:
            try:
                name = f"p{index}"
                with Peer(served.address, run="bench", name=name, events_dir=folder, witness=True) as peer:
                    peer.wait_for(arguments.peers)
                    costs.append(train(peer, arguments))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(arguments.peers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise BenchmarkError(f"a peer failed: {errors[0]!r}")
    common.progress(f"{len(costs)} peers: {[astuple(cost) for cost in costs]}")
    return costs


if __name__ == "__main__":
    main()

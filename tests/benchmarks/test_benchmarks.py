"""The loopback benchmarks run as they are documented, with tiny sizes: complete JSON, and only right results.

A worker compares every result with the exact sum, and the benchmark fails if one is wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def report(name: str, *arguments: str) -> dict[str, Any]:
    """What `python -m benchmarks.NAME ... --json -` prints, after a look at what every report has."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["name"] == name and found["command"].startswith(f"python -m benchmarks.{name} ")
    assert {"cores", "kernel", "torch", "system_congestion_control", "date"} <= found["machine"].keys()
    for sample in found["samples"]:
        assert list(sample["cells"]) == found["columns"]
    return found


def test_allreduce() -> None:
    found = report("allreduce", "--sizes", "0.0625,0.5", "--repeat", "2", "--warm", "1", "--cc", "reno")
    sides = {(sample["side"], sample["elements"]): sample for sample in found["samples"]}
    for elements in (16384, 131072):
        for side in ("gloo", "gloo-cc", "group", "peer"):
            assert len(sides[side, elements]["seconds"]) == 2
            assert min(sides[side, elements]["seconds"]) > 0
    assert {sides[side, 16384]["cc"] for side in ("gloo-cc", "group", "peer")} == {"reno"}
    assert sides["gloo", 16384]["cc"] == found["machine"]["system_congestion_control"]
    assert sum("round protocol adds" in note for note in found["notes"]) == 2


def test_recovery() -> None:
    (sample,) = report("recovery", "--size", "32", "--repeat", "1", "--faults", "SIGKILL")["samples"]
    assert len(sample["recovered"]) == len(sample["undisturbed"]) == 1
    assert min(sample["recovered"] + sample["undisturbed"]) > 0


def test_memory() -> None:
    samples = report("memory", "--sizes", "32", "--repeat", "1", "--wires", "f32,int8")["samples"]
    cells = [sample["cells"] for sample in samples]
    assert {(cell["side"], cell["wire"]) for cell in cells} == {
        (side, wire) for side in ("group", "peer") for wire in ("f32", "int8")
    }
    for sample in samples:
        assert len(sample["extra_bytes"]) == 2
        assert 0 < max(sample["extra_bytes"]) < 64 << 20


def test_membership() -> None:
    churn = ("--between", "10", "--crashes", "10", "--leaves", "10")
    found = report("membership", "--peers", "40", "--seconds", "60", *churn, "--sockets", "12", "--turns", "2")
    joined, training, real = found["samples"]
    assert len(real["views"]) == 4 and real["beats"] > 0
    assert len(joined["views"]) == 39, "each but the first is told of by a view"
    ends = int(training["cells"]["crashes"]) + int(training["cells"]["leaves"])
    assert ends > 3 and len(training["views"]) > ends, "all heard of each end, and of those who came back"
    assert training["sent"]["Begin"] > 40 and training["sent"]["Commit"] > 40
    assert any(" rounds committed" in note and not note.startswith("0 ") for note in found["notes"])


def test_a_wrong_sum_fails_the_benchmark() -> None:
    from benchmarks.common import BenchmarkError, gather

    class Liar:
        name = "w0"

        def hear(self) -> dict[str, Any]:
            return {"began": 0.0, "ended": 1.0, "right": False}

    with pytest.raises(BenchmarkError, match="w0 has a wrong result"):
        gather([Liar()])  # type: ignore[list-item]

"""`benchmarks.faults` runs as documented on sites of the emulated WAN, and what it cuts and slows down is felt."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.wan


@pytest.mark.timeout(420)  # a cut is believed for half a minute, and a link is slowed once a plan has held
def test_the_benchmark_of_faults() -> None:
    tiny = "--size 1 --step-ms 50 --sync-every 12 --cc reno --repeat 1"
    kinds = ("cut pair", "cut off", "slow link")
    command = [sys.executable, "-m", "benchmarks.faults", *tiny.split(), "--kinds", ",".join(kinds), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["machine"]["cc"] == "reno"
    *rows, whole = found["samples"]
    named = {row["cells"]["fault"]: row["injections"][0]["named"] for row in rows}
    assert tuple(named) == kinds
    assert [named[kind] for kind in kinds[:2]] == ["cut", "silent"]
    assert whole["rounds"] > 10 and whole["lost"] == whole["twice"] == whole["missing"] == 0

"""`benchmarks.overlap` runs as it is documented, with tiny sizes: complete JSON, all rounds, the bytes of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.wan


def test_the_benchmark_of_overlap() -> None:
    tiny = "--rates 200 --size 1 --step-ms 20 --rtt-ms 2 --sync-every 16 --delay 2 --periods 1 --settle 1 --cc reno"
    command = [sys.executable, "-m", "benchmarks.overlap", *tiny.split(), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert any("200 Mbit/s: reno," in note for note in found["notes"])
    rows = {sample["algorithm"]["title"]: sample for sample in found["samples"]}
    assert len(rows) == 7
    for title, row in rows.items():
        exchanges = 12 if title == "data-parallel" else row["algorithm"]["fragments"]
        period = 12 if title == "data-parallel" else 16
        for answer in row["answers"]:
            assert len(answer["ends"]) == period + 1 and len(answer["waited"]) == period
            assert len(answer["exchanges"]) == exchanges, title
            if title != "data-parallel":
                assert answer["rounds"] == answer["contributed"] == exchanges
    sent = {title: sum(answer["sent"] for answer in row["answers"]) for title, row in rows.items()}
    assert sent["Streaming"] == pytest.approx(2 * 2**20, rel=0.05)
    assert sent["Streaming int4"] == pytest.approx(2 * 2**20 * (4.25 + 8.25) / 64, rel=0.1)

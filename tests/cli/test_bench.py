"""`elastic bench` runs the benchmarks as they are, from wherever it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import bench
from cli.main import main

ROOT = Path(__file__).parents[2]


def elastic(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cli.main", "bench", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=110)


def test_join_writes_its_samples_where_it_is_told(tmp_path: Path) -> None:
    done = elastic("join", "--size", "4", "--repeat", "1", "--json", "join.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "join.json").read_text())
    assert [sample["cells"]["side"] for sample in found["samples"]] == ["elastic", "plain", "gloo"]
    assert all(len(sample["seconds"]) == 1 and min(sample["seconds"]) > 0 for sample in found["samples"])
    joined = found["samples"][0]
    assert joined["answers"][0]["bytes"] == 2 * 4 << 20 and joined["quiet"]["steps"]
    assert any("waited 0 s for joiners" in note for note in found["notes"])
    assert "elastic" in done.stdout


def test_every_measurement_explains_itself() -> None:
    for words in ([], ["join"], ["recovery"], ["overlap"], ["faults"]):
        shown = CliRunner().invoke(main, ["bench", *words, "--help"])
        assert shown.exit_code == 0 and "Example: elastic bench " in shown.output


def test_what_is_unknown_is_a_usage_error(tmp_path: Path) -> None:
    assert CliRunner().invoke(main, ["bench", "join", "--size", "0"]).exit_code == 2
    assert CliRunner().invoke(main, ["bench", "sleep"]).exit_code == 2


def test_without_the_benchmarks_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "HERE", tmp_path)
    shown = CliRunner().invoke(main, ["bench", "join"])
    assert shown.exit_code == 1
    assert "the folder 'benchmarks' is missing" in shown.output


def test_a_measurement_that_fails_says_why_and_ends_with_1(tmp_path: Path) -> None:
    done = elastic("join", "--size", "4", "--repeat", "1", "--cc", "no-such-control", folder=tmp_path)
    assert done.returncode == 1
    assert "no-such-control" in done.stderr and "Traceback" not in done.stderr

"""The Hugging Face example as it is run: alone, and by two peers that join a run; nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from elastic.config import RunPolicy
from elastic.coordinator import Coordinator

SCRIPT = Path(__file__).parents[2] / "examples" / "huggingface" / "train.py"


def start(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Offline, and with an empty cache."""
    usual = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.Popen(command, env=usual | environment, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 0
    facts: dict[str, Any] = json.loads(output.splitlines()[-1])
    return facts


def test_two_peers_that_join_a_run_train_one_model(tmp_path: Path) -> None:
    policy = RunPolicy(min_peers=2, quorum=1.0, rounds=6)
    with Coordinator(run="llama", policy=policy, journal=tmp_path / "journal.sqlite") as coordinator:
        token = coordinator.address.replace("tcp://", "elastic://") + "/llama"
        peers = [start(tmp_path, ELASTIC_JOIN=token, ELASTIC_NAME=f"p{i}") for i in range(2)]
        ends = [outcome(peer) for peer in peers]
        assert coordinator.status().progress.rounds == 6 and coordinator.audit().passed
    assert [end["peer"] for end in ends] == ["p0", "p1"] and ends[0]["state"] == ends[1]["state"]
    assert all(end["last"] < end["first"] - 1.0 for end in ends), ends


def test_alone_it_is_a_short_demo(tmp_path: Path) -> None:
    end = outcome(start(tmp_path, "--rounds", "4", str(SCRIPT)))
    assert end["peer"] == "alone" and end["last"] < end["first"] - 1.0

"""The FSDP2 example as it is run: as one peer that torchrun starts, and as two that Ray does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunPolicy
from elastic.coordinator import Coordinator

pytestmark = pytest.mark.timeout(400)

SCRIPT = Path(__file__).parents[2] / "examples" / "fsdp" / "train.py"


def facts(*command: str, **environment: str) -> list[dict[str, Any]]:
    """What it prints, one line for each peer."""
    usual = {**os.environ, "OMP_NUM_THREADS": "1"} | environment
    ended = subprocess.run([sys.executable, *command], env=usual, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]


def test_torchrun_starts_one_peer_of_two_ranks(tmp_path: Path) -> None:
    with Coordinator(run="fsdp", policy=RunPolicy(rounds=4), journal=tmp_path / "journal.sqlite") as coordinator:
        token = coordinator.address.replace("tcp://", "elastic://") + "/fsdp"
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2")
        (end,) = facts(*torchrun, str(SCRIPT), ELASTIC_JOIN=token, ELASTIC_NAME="site", GLOO_SOCKET_IFNAME="lo")
        assert coordinator.status().progress.rounds == 4 and coordinator.audit().passed
    assert end["peer"] == "site" and end["last"] < end["first"] - 1.0


def test_two_peers_of_two_ranks_train_one_model_in_a_ray(tmp_path: Path) -> None:
    first, second = facts(str(SCRIPT), "--rounds", "4", "--name", "short", "--storage", str(tmp_path))
    assert first["peer"] != second["peer"] and first["state"] == second["state"]
    assert all(end["last"] < end["first"] - 1.0 for end in (first, second))

"""examples/ray_job, by both ways to submit it, on a Ray where elastic is installed; and stopped on the way."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_head import START, Head, ray_head

from elastic.events import EventReader

pytestmark = pytest.mark.timeout(600)

HERE = Path(__file__).parents[2]
EXAMPLE = HERE / "examples" / "ray_job"


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with ray_head(Path(sys.executable), sees=HERE) as started:
        yield started


def environment(head: Head) -> dict[str, str]:
    return {**os.environ, **head.environment, "PYTHONPATH": str(HERE)}


def test_it_runs_by_ray_job_submit_unchanged(head: Head, tmp_path: Path) -> None:
    words = ["--address", head.address, "--working-dir", ".", "--", "python", "train.py"]
    done = subprocess.run(
        [sys.executable, "-c", START, "job", "submit", *words, "--rounds", "12", "--storage", str(tmp_path)],
        cwd=EXAMPLE, env=environment(head), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy, checkpoint = re.findall(r"^accuracy (\S+); checkpoint (\S+)$", done.stdout, re.MULTILINE)[0]
    assert float(accuracy) > 0.6 and Path(checkpoint).name.startswith("v00000012")


def test_elastic_submit_stops_it_with_a_checkpoint_of_its_last_round(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "submit", "--address", head.address, "train.py"]
    words = ["--", "--rounds", "1000000", "--storage", str(tmp_path)]
    process = subprocess.Popen(
        [*command, *words], cwd=EXAMPLE, env=environment(head), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 200
        while not any(version >= 10 for version in checkpoints(tmp_path)):
            assert time.monotonic() < deadline and process.poll() is None, "it never wrote a checkpoint of a round"
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 143 and "was stopped\n" in said, said
    noted = list(EventReader(tmp_path / "spirals" / "events" / "coordinator.jsonl").read())
    assert {event["peer"] for event in noted if event["event"] == "peer.left"} == {"local-0", "local-1"}
    last = max(event["version"] for event in noted if event["event"] == "round.committed")
    assert max(checkpoints(tmp_path)) == last


def checkpoints(storage: Path) -> list[int]:
    """Their versions."""
    found = (storage / "spirals" / "checkpoints").glob("*/*/v????????-*")
    return [int(path.name[1:9]) for path in found]

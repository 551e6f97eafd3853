"""The fixture of the tests over real sockets: a run in this process that leaves no thread behind.

It also puts the data plane's test helpers (`forked`) on the path.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Run

sys.path.insert(0, str(Path(__file__).parents[1] / "collectives"))


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    before = set(threading.enumerate())
    run = Run(tmp_path)
    yield run
    run.close()
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("elastic")]
    assert not left, f"threads left behind: {left}"
    log = tmp_path / "coordinator.jsonl"
    assert not log.exists() or "message.refused" not in log.read_text() or run.garbage, log.read_text()

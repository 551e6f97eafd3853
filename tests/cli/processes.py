"""What a command under test has started, and whether anything of it is left."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def processes_of(session: int, words: str = "") -> dict[int, str]:
    """Command lines, with `words` in them, of the living processes of a session."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(sid) == session and state != "Z":
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):
            continue
    return {pid: line for pid, line in found.items() if words in line}


def left_folders() -> set[Path]:
    """Of Rays of our own."""
    return set(Path("/tmp").glob("elastic-*"))


def wait_for(true: Callable[[], Any], process: subprocess.Popen[str], seconds: float = 180.0) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not true():
        assert process.poll() is None and time.monotonic() < deadline, "it never came that far"
        pause.wait(0.05)

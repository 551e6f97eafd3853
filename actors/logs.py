"""What the process of one life prints, kept in a file of its own whatever ends it, and the end of that file.

Standard output and error themselves go to the file, so that nothing stands between a last word and the disk: not that
of a segmentation fault either. A thread copies the file to where they went before.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import re
import threading
from pathlib import Path

LINES = 20
WIDTH = 200
KEPT_BYTES = 4 << 20
_COPY_SECONDS = 0.25
_TAIL_BYTES = 256 << 10
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# what Ray tells its own log monitor by; and lists and repetitions that take the place of what matters
_NOISE = re.compile(r":(job_id|actor_name|task_name):|Extension modules: |\[[^]]+\] logging\.cc:\d+: ")


class KeptLog:
    """From here on, all that this process prints is in the file `path` too: the last `kept` bytes of it at least.

    At most twice as many are on disk: a full file is renamed to PATH.1, and a new one begun. For one process; what its
    children print after that goes to the old file.
    """

    def __init__(self, path: Path, *, kept: int = KEPT_BYTES) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._kept = path, kept
        self._lock = threading.Lock()
        self._before = os.dup(1)
        self._reader = self._begin()
        faulthandler.enable(file=2, all_threads=False)  # the thread that has failed; many others only wait
        threading.Thread(target=self._follow, name="elastic-log", daemon=True).start()

    def _begin(self) -> int:
        writer = os.open(self._path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        reader = os.open(self._path, os.O_RDONLY)
        os.lseek(reader, 0, os.SEEK_END)
        for stream in (1, 2):
            os.dup2(writer, stream)
        os.close(writer)
        return reader

    def _follow(self) -> None:
        pause = threading.Event()
        while not pause.wait(_COPY_SECONDS):
            self.flush()

    def flush(self) -> None:
        """What has been printed so far is where it would have gone without this log."""
        with self._lock:
            self._copy(self._reader)
            if os.fstat(self._reader).st_size > self._kept:
                self._turn_over()

    def _copy(self, reader: int) -> None:
        while data := os.read(reader, 1 << 16):
            with contextlib.suppress(OSError):  # nobody there to read it, or a full disk: the log itself is elsewhere
                while data:
                    data = data[os.write(self._before, data) :]

    def _turn_over(self) -> None:
        full = self._reader
        os.replace(self._path, self._path.with_name(self._path.name + ".1"))
        self._reader = self._begin()
        self._copy(full)  # what came in between
        os.close(full)


def tail(path: str, lines: int = LINES) -> tuple[str, ...]:
    """The last lines that are not empty, each cut to WIDTH characters; nothing if there is no such file."""
    data = b"".join(_end_of(Path(path + suffix)) for suffix in (".1", ""))
    said = (_readable(line) for line in data.decode(errors="replace").split("\n"))
    return tuple([line for line in said if line.strip() and not _NOISE.match(line)][-lines:])


def _end_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except OSError:
        return b""


def _readable(line: str) -> str:
    """As a terminal would leave it: a progress bar's last state, without colours or other control characters."""
    shown = _COLOURS.sub("", line.rstrip("\r").rpartition("\r")[2])
    return "".join(char if char.isprintable() else " " for char in shown)[:WIDTH].rstrip()

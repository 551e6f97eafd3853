"""Events: JSON lines in the words of the metrics, dotted and in the past tense.

One file per writer, one line per event, each line whole: a reader may follow the file while it grows.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from fault.orders import Lines

from .errors import ConfigurationError

INJECTED = "fault.injected"


class EventLog:
    """Appends events to a JSONL file; without a path, drops them. Safe to use from several threads.

    Nothing ends for want of an event: what cannot be written, on a full disk for instance, is `dropped`, and counted.
    check: told before each write; what it raises is a failed one (faults on purpose, whose own events are exempt).
    on_failure: is called with the error of a write that failed.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        run: str,
        peer: str = "",
        on_failure: Callable[[OSError], None] = lambda error: None,
    ) -> None:
        self.path, self._on_failure = path, on_failure
        self._common = {"run": run} | ({"peer": peer} if peer else {})
        self._lock = threading.Lock()
        self.dropped = 0
        self.check: Callable[[str], None] | None = None
        self._file: TextIO | None = _open(path) if path else None

    def emit(self, event: str, /, **fields: Any) -> None:
        """Writes one line: event, time_unix, monotonic, run, peer, then `fields` (plain JSON values)."""
        if self._file is None:
            return
        head = {"event": event, "time_unix": time.time(), "monotonic": time.monotonic()}
        line = json.dumps(head | self._common | fields) + "\n"
        try:
            if self.check is not None and event != INJECTED:
                self.check("events")
            with self._lock:
                if not self._file.closed:
                    self._file.write(line)
                    self._file.flush()
        except OSError as error:  # what does not fit stays in the file's buffer, and is tried with the next
            self.dropped += 1
            self._on_failure(error)

    def close(self) -> None:
        if self._file is not None:
            with self._lock, suppress(OSError):  # what is left goes the way of what was dropped
                self._file.close()


def _open(path: Path) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write events to {path}: {error.strerror}") from None


class EventReader(Lines):
    """Follows an event log: each call returns the whole lines that were added since the last.

    A life that is killed in mid write leaves half a line, to which the next life appends: what is no event is skipped.
    """

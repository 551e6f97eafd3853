"""A thread that writes while training goes on, so that neither slow nor broken storage ever reaches training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import ConfigurationError

Job = Callable[[], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterStatistics:
    """superseded: jobs that a newer one replaced before they began. seconds, bytes: of the last that was written."""

    written: int = 0
    superseded: int = 0
    failed: int = 0
    last_error: str = ""
    seconds: float = 0.0
    bytes: int = 0


class Writer:
    """Runs one job at a time; of those that come meanwhile, the newest waits and the others are given up.

    on_error: is called, in the writer's thread, with what a job raised. `last_error` stays until the next one.
    """

    def __init__(self, on_error: Callable[[Exception], object] | None = None) -> None:
        self._on_error = on_error
        self._changed = threading.Condition()
        self._waiting: Job | None = None
        self._running = False
        self._closed = False
        self._statistics = WriterStatistics()
        self._thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Returns at once. job: returns how many bytes it has written. Raises ConfigurationError after `close`."""
        with self._changed:
            if self._closed:
                raise ConfigurationError("the writer of checkpoints is closed")
            if self._waiting is not None:
                self._count(superseded=1)
            self._waiting = job
            if self._thread is None:  # daemon: what it leaves behind when the process ends is no checkpoint
                self._thread = threading.Thread(target=self._run, name="elastic-checkpoints", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> bool:
        """Waits, `timeout` seconds at most, until nothing is waiting or being written; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._waiting is None and not self._running, timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Takes no more jobs, and flushes. What is not written by then is given up: False."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        flushed = self.flush(timeout)
        with self._changed:
            if self._waiting is not None:
                self._waiting = None
                self._count(superseded=1)
        if flushed and self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        return flushed

    def statistics(self) -> WriterStatistics:
        with self._changed:
            return self._statistics

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                self._work(job)
            finally:
                with self._changed:
                    self._running = False
                    self._changed.notify_all()

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed)
            job, self._waiting = self._waiting, None
            self._running = job is not None
            return job

    def _work(self, job: Job) -> None:
        began = time.monotonic()
        try:
            size = job()
        except Exception as error:
            self._fail(error)
        else:
            with self._changed:
                self._count(written=1)
                self._statistics = replace(self._statistics, seconds=time.monotonic() - began, bytes=size)

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._count(failed=1)
            self._statistics = replace(self._statistics, last_error=f"{type(error).__name__}: {error}")
        try:
            if self._on_error is not None:
                self._on_error(error)
        except Exception as second:  # the thread has to go on, and this is worth knowing, too
            with self._changed:
                self._statistics = replace(self._statistics, last_error=f"on_error: {type(second).__name__}: {second}")

    def _count(self, **more: int) -> None:
        sums = {name: getattr(self._statistics, name) + n for name, n in more.items()}
        self._statistics = replace(self._statistics, **sums)

"""How long a loop's steps, waits and rounds take: lately, and in all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

SMOOTHING = 0.1  # the part that the newest value has


class Pace:
    """step_seconds, sync_seconds, round_seconds: of an inner step, from sending to the commit, from one round to the
    next; lately, 0 before the first. last_step: seconds of the newest. training, stalled, working: seconds in all,
    between hooks, waiting for exchanges, and for all else in hooks.
    """

    def __init__(self) -> None:
        self.last_step = self.step_seconds = self.sync_seconds = self.round_seconds = 0.0
        self.training = self.stalled = self.working = 0.0
        self.begin()

    def begin(self) -> None:
        """The loop is entered now."""
        self._clock = self._launched_at = self._round_at = time.monotonic()

    def resume(self) -> None:
        """Training goes on now: what was since the last hook was none."""
        self._clock = time.monotonic()

    @property
    def stepping(self) -> float:
        """Seconds since the last hook: of the step that is just over, before `in_hook`."""
        return time.monotonic() - self._clock

    @property
    def steps_per_second(self) -> float:
        return 1.0 / max(self.step_seconds, 1e-9)

    @contextmanager
    def in_hook(self) -> Iterator[None]:
        """An inner step is over, and what the loop does after it is about to begin."""
        began, stalled = time.monotonic(), self.stalled
        self.last_step = began - self._clock
        self.training += self.last_step
        self.step_seconds = _smoothed(self.step_seconds, self.last_step)
        yield
        self.resume()
        self.working += self._clock - began - (self.stalled - stalled)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """For an exchange."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.stalled += time.monotonic() - began

    def launched(self) -> None:
        self._launched_at = time.monotonic()

    @property
    def since_launch(self) -> float:
        return time.monotonic() - self._launched_at

    def exchanged(self, seconds: float) -> None:
        """An exchange took so long."""
        self.sync_seconds = _smoothed(self.sync_seconds, seconds)

    def round_over(self) -> None:
        now = time.monotonic()
        self.round_seconds, self._round_at = _smoothed(self.round_seconds, now - self._round_at), now


def _smoothed(before: float, now: float) -> float:
    return now if before == 0 else before + SMOOTHING * (now - before)

"""A disk that is full, and a wall clock that was set: told from what a peer reports of its own machine."""

from __future__ import annotations

import math

from .records import Health

LEAST_FREE = 64 << 20
"""Bytes: fewer, or less than 1 % of the disk, are too few."""
_PART_FREE = 0.01
_ENOUGH = 2.0  # times as much must be free again
JUMP = 1.0
"""Seconds by which a wall clock that was set has moved."""
_SLEW = 0.001  # seconds a second that a clock may be slowed down or sped up by, to set it right


def needed(disk_bytes: int) -> float:
    """How many bytes of a disk of this size must be free."""
    return max(LEAST_FREE, _PART_FREE * disk_bytes)


class Disks:
    """Which peers' disks are full. Full is where little is left, or a write has failed; until twice as much is free.

    A disk on which a write failed although there is room (a quota, or no inodes left) is full until `lasting` seconds
    have passed without another.
    """

    def __init__(self, lasting: float = 60.0) -> None:
        self._lasting = lasting
        self._refused: dict[str, tuple[int, float]] = {}
        self._full: set[str] = set()

    def full(self, peer: str, health: Health, at: float) -> bool:
        count, last = self._refused.get(peer, (0, at - self._lasting))
        if health.disk_refused > count:
            last = at
        self._refused[peer] = health.disk_refused, last
        limit = needed(health.disk_bytes) * (_ENOUGH if peer in self._full else 1.0)
        short = health.disk_bytes > 0 and health.disk_free < limit
        full = short or at - last < self._lasting
        (self._full.add if full else self._full.discard)(peer)
        return full

    def forget(self, peer: str) -> None:
        self._full.discard(peer)
        self._refused.pop(peer, None)


class Clocks:
    """By how much each peer's wall clock stands apart from the monotonic clock of the same machine.

    Both run at the same rate but for what a time server corrects, so a difference that changes is a clock that was set
    (or a machine that slept). Nothing is compared between machines.
    """

    def __init__(self) -> None:
        self._apart: dict[str, tuple[float, float]] = {}

    def moved(self, peer: str, health: Health, at: float) -> float:
        """By how many seconds it was set since the last report; 0.0 if it was not."""
        if not math.isfinite(health.clock) or health.clock == 0:
            return 0.0
        before, when = self._apart.get(peer, (health.clock, at))
        self._apart[peer] = health.clock, at
        moved = health.clock - before
        return moved if abs(moved) > JUMP + _SLEW * (at - when) else 0.0

    def forget(self, peer: str) -> None:
        self._apart.pop(peer, None)

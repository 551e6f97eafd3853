"""Hysteresis: what is found again and again is confirmed, what stays away is cleared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """windows: how many confirm a suspicion, or running clear it. lasting_seconds: and how long after the first of them
    the last must have begun: a burst of traffic, or a pause, is over by then. history: how many of its past a pair, or
    a peer, is judged by; needed: how many it must have. window_seconds: how long one lasts at least, and for many pairs
    longer, so that not more than `pairs_per_second` are judged: about a twentieth of a core. least_bytes: what a
    measurement must have carried: of less, latency and chance are most of the delay.
    """

    windows: int = 3
    lasting_seconds: float = 4.0
    history: int = 30
    needed: int = 5
    window_seconds: float = 1.0
    pairs_per_second: int = 6_000
    least_bytes: int = 64 << 10


@dataclass(slots=True)
class _Streak:
    """found: in so many of so many looks. gone: looks running in which it was missing, or unseen."""

    since: float
    found: int = 0
    looks: int = 0
    gone: int = 0


class Persisting(Generic[Key, Value]):
    """Found in `windows` looks running: confirmed. Missing in as many: cleared. If it must last, a single look may have
    missed it, as long as three of four have found it. unseen: how many looks running may show nothing of it, either
    way; by default, fewer than `windows`.

    confirmed: by key, what was found last, and when it was first found, in that streak.
    """

    def __init__(self, windows: int, lasting: float = 0.0, *, unseen: int | None = None) -> None:
        self._windows, self._lasting = windows, lasting
        self._most_unseen = windows - 1 if unseen is None else unseen
        self._streaks: dict[Key, _Streak] = {}
        self._missing: dict[Key, int] = {}
        self.confirmed: dict[Key, tuple[Value, float]] = {}

    def window(self, found: Mapping[Key, Value], at: float, unseen: Callable[[Key], bool] = lambda key: False) -> None:
        """One more look. at: when what was looked at began. unseen: whether nothing was to be seen of this key: that is
        no look at it, but not for ever."""
        for key, value in found.items():
            streak = self._streaks.setdefault(key, _Streak(at))
            streak.found, streak.looks, streak.gone = streak.found + 1, streak.looks + 1, 0
            if key in self.confirmed or self._enough(streak, at):
                self.confirmed[key] = value, self.confirmed[key][1] if key in self.confirmed else streak.since
        for key in self._streaks.keys() - found.keys():
            self._miss(key, unseen(key))
        missing = self.confirmed.keys() - found.keys()
        waiting = {key for key in missing & self._streaks.keys() if unseen(key)}
        self._missing = {key: self._missing.get(key, 0) + (key not in waiting) for key in missing}
        for key, count in self._missing.items():
            if count >= self._windows:
                del self.confirmed[key]

    def _enough(self, streak: _Streak, at: float) -> bool:
        often = streak.found >= max(self._windows, 0.75 * streak.looks)
        return often and at - streak.since >= self._lasting

    def _miss(self, key: Key, unseen: bool) -> None:
        streak = self._streaks[key]
        streak.looks, streak.gone = streak.looks + (not unseen), streak.gone + 1
        most = self._most_unseen if unseen else 1 if self._lasting else 0
        if streak.gone > most:
            del self._streaks[key]

    @property
    def unsure(self) -> bool:
        """Whether something has been found that is not confirmed."""
        return not self._streaks.keys() <= self.confirmed.keys()

    @property
    def suspects(self) -> set[Key]:
        """Found in the last look, or confirmed."""
        return {*self._streaks, *self.confirmed}

    def running(self, key: Key) -> int:
        """In how many looks it has been found by now, in this streak."""
        return self._streaks[key].found if key in self._streaks else 0

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Nothing is known of these any more."""
        for key in filter(gone, self.suspects):
            self._streaks.pop(key, None)
            self._missing.pop(key, None)
            self.confirmed.pop(key, None)

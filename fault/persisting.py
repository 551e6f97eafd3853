"""Hysteresis: what is found again and again is confirmed, what stays away is cleared."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """windows: how many running confirm a suspicion, or clear it. lasting_seconds: and how long after the first of them
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


class Persisting(Generic[Key, Value]):
    """Found in `windows` looks running, for `lasting` seconds: confirmed; missing in as many: cleared. unseen: how many
    running may show nothing of it, either way; by default, fewer than `windows`.

    confirmed: by key, what was found last, and when it was first found, in that streak.
    """

    def __init__(self, windows: int, lasting: float = 0.0, *, unseen: int | None = None) -> None:
        self._windows, self._lasting = windows, lasting
        self._most_unseen = windows - 1 if unseen is None else unseen
        self._streaks: dict[Key, tuple[int, float]] = {}
        self._missing: dict[Key, int] = {}
        self._unseen: dict[Key, int] = {}
        self.confirmed: dict[Key, tuple[Value, float]] = {}

    def window(self, found: Mapping[Key, Value], at: float, unseen: Callable[[Key], bool] = lambda key: False) -> None:
        """One more look. at: when what was looked at began. unseen: whether nothing was to be seen of this key: then
        nothing changes for it, for a while."""
        before = self._streaks
        waiting = {key: self._unseen.get(key, 0) + 1 for key in before.keys() - found.keys() if unseen(key)}
        self._unseen = {key: times for key, times in waiting.items() if times <= self._most_unseen}
        self._streaks = {key: (before[key][0] + 1, before[key][1]) if key in before else (1, at) for key in found}
        self._streaks |= {key: before[key] for key in self._unseen}
        for key, (count, since) in self._streaks.items():
            if key in found and (key in self.confirmed or (count >= self._windows and at - since >= self._lasting)):
                self.confirmed[key] = found[key], self.confirmed[key][1] if key in self.confirmed else since
        missing = self.confirmed.keys() - found.keys()
        self._missing = {key: self._missing.get(key, 0) + (key not in self._unseen) for key in missing}
        for key, count in self._missing.items():
            if count >= self._windows:
                del self.confirmed[key]

    @property
    def suspects(self) -> set[Key]:
        """Found in the last look, or confirmed."""
        return {*self._streaks, *self.confirmed}

    def running(self, key: Key) -> int:
        """In how many looks running it has been found by now."""
        return self._streaks[key][0] if key in self._streaks else 0

    def forget(self, gone: Callable[[Key], bool]) -> None:
        """Nothing is known of these any more."""
        for key in filter(gone, self.suspects):
            self._streaks.pop(key, None)
            self._missing.pop(key, None)
            self._unseen.pop(key, None)
            self.confirmed.pop(key, None)

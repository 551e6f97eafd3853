"""Hysteresis: what is found again and again is confirmed, what stays away is cleared."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class Persisting(Generic[Key]):
    """Found in `windows` looks running: confirmed; missing in as many: cleared.

    confirmed: by key, when it was first found, in that streak.
    """

    def __init__(self, windows: int) -> None:
        self._windows = windows
        self._streaks: dict[Key, tuple[int, float]] = {}
        self._missing: dict[Key, int] = {}
        self.confirmed: dict[Key, float] = {}

    def window(self, found: Iterable[Key], at: float) -> None:
        """One more look. at: when what was looked at began."""
        keys, before = set(found), self._streaks
        self._streaks = {key: (before[key][0] + 1, before[key][1]) if key in before else (1, at) for key in keys}
        for key, (count, since) in self._streaks.items():
            if count >= self._windows:
                self.confirmed.setdefault(key, since)
        self._missing = {key: self._missing.get(key, 0) + 1 for key in self.confirmed.keys() - keys}
        for key, count in self._missing.items():
            if count >= self._windows:
                del self.confirmed[key]

    @property
    def suspected(self) -> set[Key]:
        """Found in the last look, confirmed or not."""
        return set(self._streaks)

    def forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._streaks.pop(key, None)
            self.confirmed.pop(key, None)
            self._missing.pop(key, None)

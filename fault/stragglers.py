"""Peers whose inner steps have become slow, each against its own past and what happens to the others meanwhile.

Machines differ, so a peer that has always been slower is no fault; and what slows everybody (another phase of the
training, say) is nobody's. Steps are timed by the peer itself, on its own clock.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from .persisting import Persisting

FACTOR = 1.5
DEVIATIONS = 4.0
_LEAST_NOISE = 0.02
_NORMAL_MAD = 1.4826


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """factor: times its own usual step. seconds, usual: of a step. deviations: from what is usual for it."""

    peer: str
    factor: float
    seconds: float
    usual: float
    deviations: float


class Stragglers:
    """slow: what is confirmed, by peer, with since when."""

    def __init__(self, *, windows: int = 3, history: int = 30, needed: int = 5) -> None:
        self._history, self._needed = history, needed
        self._past: dict[str, deque[float]] = {}
        self._persisting: Persisting[str] = Persisting(windows)
        self.slow: dict[str, tuple[Straggler, float]] = {}

    def window(self, seconds: Mapping[str, float], at: float) -> None:
        """Medians of step durations of this window, of all peers that made any. at: when it began."""
        ratios = {
            name: math.log(value) - statistics.median(self._past[name])
            for name, value in seconds.items()
            if value > 0 and len(self._past.get(name, ())) >= self._needed
        }
        common = max(0.0, statistics.median_low(ratios.values())) if len(ratios) > 1 else 0.0
        found = {name: self._judged(name, seconds[name], ratio - common) for name, ratio in ratios.items()}
        hot = {name: each for name, each in found.items() if each.factor > FACTOR and each.deviations > DEVIATIONS}
        self._persisting.window(hot, at)
        before = {name: straggler for name, (straggler, _) in self.slow.items()}
        self.slow = {name: (hot.get(name) or before[name], t) for name, t in self._persisting.confirmed.items()}
        for name, value in seconds.items():
            if value > 0 and name not in self._persisting.suspected and name not in self.slow:
                self._past.setdefault(name, deque(maxlen=self._history)).append(math.log(value) - common)

    def _judged(self, name: str, seconds: float, ratio: float) -> Straggler:
        past = self._past[name]
        usual = statistics.median(past)
        noise = max(_LEAST_NOISE, _NORMAL_MAD * statistics.median(abs(value - usual) for value in past))
        factor, usual_seconds = math.exp(ratio), math.exp(usual)
        return Straggler(peer=name, factor=factor, seconds=seconds, usual=usual_seconds, deviations=ratio / noise)

    def forget(self, name: str) -> None:
        """This peer has gone: its next life is measured anew."""
        self._past.pop(name, None)
        self.slow.pop(name, None)
        self._persisting.forget([name])

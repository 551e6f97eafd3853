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

from .persisting import Patience, Persisting
from .robust import DEVIATIONS, FACTOR, deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Straggler:
    """factor: times its own usual step. seconds, usual: of a step. deviations: from what is usual for it."""

    peer: str
    factor: float
    seconds: float
    usual: float
    deviations: float


class Stragglers:
    """Pure: time comes with what is observed."""

    def __init__(self, patience: Patience | None = None) -> None:
        self._patience = patience or Patience()
        self._past: dict[str, deque[float]] = {}
        windows, lasting = self._patience.windows, self._patience.lasting_seconds
        self._persisting: Persisting[str, Straggler] = Persisting(windows, lasting)

    @property
    def slow(self) -> Mapping[str, tuple[Straggler, float]]:
        """What is confirmed, by peer, with since when."""
        return self._persisting.confirmed

    def window(self, seconds: Mapping[str, float], at: float) -> None:
        """Medians of step durations of this window, of all peers that made any. at: when it began."""
        ratios = {
            name: math.log(value) - statistics.median(self._past[name])
            for name, value in seconds.items()
            if value > 0 and len(self._past.get(name, ())) >= self._patience.needed
        }
        common = max(0.0, statistics.median_low(ratios.values())) if len(ratios) > 1 else 0.0
        found = {name: self._judged(name, seconds[name], ratio - common) for name, ratio in ratios.items()}
        hot = {name: each for name, each in found.items() if each.factor > FACTOR and each.deviations > DEVIATIONS}
        self._persisting.window(hot, at)
        suspects = self._persisting.suspects
        for name, value in seconds.items():
            if value > 0 and name not in suspects:
                self._past.setdefault(name, deque(maxlen=self._patience.history)).append(math.log(value) - common)

    def _judged(self, name: str, seconds: float, ratio: float) -> Straggler:
        past = self._past[name]
        usual = statistics.median(past)
        factor, off = math.exp(ratio), ratio / deviation(past)
        return Straggler(peer=name, factor=factor, seconds=seconds, usual=math.exp(usual), deviations=off)

    def forget(self, name: str) -> None:
        """This peer has gone: its next life is measured anew."""
        self._past.pop(name, None)
        self._persisting.forget(lambda key: key == name)

"""Slow senders, receivers and links over time: windows of measured delays in, what persists out.

One window is what came in since the last: often one operation per pair. A cell is judged against its own past, because
links over a WAN differ by nature; what it was while it was suspected does not become its past. How much an operation
carries over a link changes with its plan, and nobody knows which part of a delay is latency and which goes with the
bytes. So what was to be expected lies between as long as before and in proportion to the bytes; within these bounds, a
cell is taken to be as all are in the middle. What `delays.slow_parts`
finds in several windows running is confirmed, and cleared when it has not been found for as many.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from .delays import Matrix, Slow, slow_parts
from .persisting import Patience, Persisting

Pair = tuple[str, str]
Culprit = tuple[str, tuple[str, ...]]
Measured = tuple[float, float]
"""Logarithms of bytes and of seconds."""


@dataclass(slots=True)
class Slowness:
    """Pure: time comes with what is observed."""

    patience: Patience = field(default_factory=Patience)
    windows: int = 0
    _now: dict[Pair, list[Measured]] = field(default_factory=lambda: defaultdict(list))
    _past: dict[Pair, deque[Measured]] = field(default_factory=dict)
    _began: float | None = None
    _persisting: Persisting[Culprit, Slow] = field(init=False)

    def __post_init__(self) -> None:
        self._persisting = Persisting(self.patience.windows)

    @property
    def slow(self) -> Mapping[Culprit, tuple[Slow, float]]:
        """What is confirmed, with its newest numbers and since when."""
        return self._persisting.confirmed

    def observe(self, sender: str, receiver: str, carried: int, seconds: float, at: float) -> None:
        """So many bytes came from one to the other in so many seconds, measured by the receiver alone."""
        if carried >= self.patience.least_bytes and 0 < seconds < math.inf:
            self._now[sender, receiver].append((math.log(carried), math.log(seconds)))
            self._began = at if self._began is None else self._began

    def look(self, at: float) -> None:
        """Closes the window, if it has lasted."""
        lasting = max(self.patience.window_seconds, len(self._now) / self.patience.pairs_per_second)
        if self._began is None or at - self._began < lasting:
            return
        logs = {pair: _middle(values) for pair, values in self._now.items()}
        self._persisting.window({(slow.kind, slow.culprits): slow for slow in self._judge(logs)}, self._began)
        self._learn(logs)
        self.windows += 1
        self._now.clear()
        self._began = None

    def _judge(self, logs: Mapping[Pair, Measured]) -> tuple[Slow, ...]:
        names = sorted({name for pair in logs for name in pair})
        index = {name: i for i, name in enumerate(names)}
        low, high = np.full((2, len(names), len(names)), np.nan)
        for (sender, receiver), (carried, seconds) in logs.items():
            past = self._past.get((sender, receiver), ())
            if len(past) >= self.patience.needed:
                before, took = _middle(past)
                bounds = sorted((seconds - took, seconds - took - (carried - before)))
                low[index[sender], index[receiver]], high[index[sender], index[receiver]] = bounds
        return slow_parts(np.clip(_level((low + high) / 2), low, high), names)

    def _learn(self, logs: Mapping[Pair, Measured]) -> None:
        """What is suspected of being slow is not what is usual."""
        suspects = self._persisting.suspects
        peers = {culprits[0] for _, culprits in suspects if len(culprits) == 1}
        links = {culprits for _, culprits in suspects if len(culprits) == 2}
        for pair, value in logs.items():
            if pair not in links and peers.isdisjoint(pair):
                self._past.setdefault(pair, deque(maxlen=self.patience.history)).append(value)

    def forget(self, name: str) -> None:
        """This peer has gone: its next life is measured anew."""
        for pair in [pair for pair in (*self._past, *self._now) if name in pair]:
            self._past.pop(pair, None)
            self._now.pop(pair, None)
        self._persisting.forget(lambda key: name in key[1])


def _middle(values: Iterable[Measured]) -> Measured:
    carried, seconds = zip(*values, strict=True)
    return statistics.median(carried), statistics.median(seconds)


def _level(logs: Matrix) -> float:
    seen = logs[np.isfinite(logs)]
    return float(np.median(seen)) if seen.size else 0.0

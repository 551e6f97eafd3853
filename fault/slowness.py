"""Slow senders, receivers and links over time: windows of measured delays in, what persists out.

One window is what came in since the last: often one operation per pair. A cell is judged against its own past, because
links over a WAN differ by nature; what it was while it was known to be slow does not become its past. What
`delays.slow_parts` finds in several windows running is confirmed, and cleared when it has not been found for as many.

How much an operation carries over a link changes with its plan, and so does what else is on its way. So a window is
judged by those of the past in which the peers' shares were about the same; while too few are known, nothing is said,
and plans should not change while something is suspected (`judging`). Nobody knows which part of a delay is latency and
which goes with the bytes: what was to be expected lies between as long as before and in proportion to the bytes; within
these bounds, a cell is taken to be as all are in the middle.

What slows everybody is nobody's, whether it makes all delays so many times as long, or longer by about as many seconds
(busy machines do, and then the shortest seem to be hit most). Nor is it slow to be as before while all others become
faster, which they do when that is over. So what is named must stand out in proportion, and also in what is left of its
delay without those seconds, where nothing counts as faster than usual.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .delays import Slow, slow_parts
from .persisting import Patience, Persisting
from .robust import FACTOR

Pair = tuple[str, str]
Culprit = tuple[str, tuple[str, ...]]
Measured = tuple[float, float]
"""Logarithms of bytes and of seconds."""
_ALIKE = 0.1
"""Of two windows: the part of all bytes that went to other peers."""


@dataclass(slots=True)
class Slowness:
    """Pure: time comes with what is observed."""

    patience: Patience = field(default_factory=Patience)
    windows: int = 0
    _now: dict[Pair, list[Measured]] = field(default_factory=lambda: defaultdict(list))
    _past: dict[Pair, deque[tuple[int, Measured]]] = field(default_factory=dict)
    _plans: dict[int, dict[str, float]] = field(default_factory=dict)
    _began: float | None = None
    _persisting: Persisting[Culprit, Slow] = field(init=False)

    def __post_init__(self) -> None:
        self._persisting = Persisting(self.patience.windows, self.patience.lasting_seconds)

    @property
    def slow(self) -> Mapping[Culprit, tuple[Slow, float]]:
        """What is confirmed, with its newest numbers and since when."""
        return self._persisting.confirmed

    @property
    def judging(self) -> bool:
        """Whether more is to be seen under the same plan: a window is open, or something is suspected."""
        return self._began is not None or self._persisting.unsure

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
        self._plans[self.windows] = shares = _shares(logs)
        usual = self._usual(logs.keys(), shares)
        found = {(slow.kind, slow.culprits): slow for slow in self._judge(logs, usual)}
        self._persisting.window(found, self._began, unseen=lambda key: _unseen(key, usual, found))
        self._learn(logs)
        self.windows += 1
        self._now.clear()
        self._began = None

    def _usual(self, pairs: Iterable[Pair], shares: Mapping[str, float]) -> dict[Pair, Measured]:
        """Of each pair that has been seen often enough under about these shares."""
        alike = {window for window, then in self._plans.items() if _apart(then, shares) <= _ALIKE}
        past = {pair: [value for at, value in self._past.get(pair, ()) if at in alike] for pair in pairs}
        return {pair: _middle(values) for pair, values in past.items() if len(values) >= self.patience.needed}

    def _judge(self, logs: Mapping[Pair, Measured], usual: Mapping[Pair, Measured]) -> tuple[Slow, ...]:
        judged = {pair: (logs[pair], usual[pair]) for pair in usual}
        names = sorted({name for pair in logs for name in pair})
        found = _slow(judged, names)
        if not found:
            return ()
        more = sorted(_more(*each) for each in judged.values())
        allowed = FACTOR * max(0.0, more[len(more) // 4])  # what three in four have; two slow peers of four are half
        less = {pair: ((b, _less(s, allowed)), before) for pair, ((b, s), before) in judged.items()}
        still = {(slow.kind, slow.culprits) for slow in _slow(less, names, least=0.0)}
        return tuple(slow for slow in found if (slow.kind, slow.culprits) in still)

    def _learn(self, logs: Mapping[Pair, Measured]) -> None:
        """What is known to be slow is not what is usual. What is only suspected is: when all become slower and that
        becomes usual, one that was suspected for a moment must not stay behind, or it will be suspected for ever."""
        known = self._persisting.confirmed
        peers = {culprits[0] for _, culprits in known if len(culprits) == 1}
        links = {culprits for _, culprits in known if len(culprits) == 2}
        for pair, value in logs.items():
            if pair not in links and peers.isdisjoint(pair):
                self._past.setdefault(pair, deque(maxlen=self.patience.history)).append((self.windows, value))
        kept = {at for past in self._past.values() for at, _ in past}
        self._plans = {window: shares for window, shares in self._plans.items() if window in kept}

    def forget(self, name: str) -> None:
        """This peer has gone: its next life is measured anew."""
        for pair in [pair for pair in (*self._past, *self._now) if name in pair]:
            self._past.pop(pair, None)
            self._now.pop(pair, None)
        self._persisting.forget(lambda key: name in key[1])


def _unseen(key: Culprit, usual: Mapping[Pair, Measured], found: Mapping[Culprit, Slow]) -> bool:
    """Whether the window says nothing of this peer or link: it was not used, or not yet under this plan; or the link
    stood out with no other beside it."""
    _, culprits = key
    if len(culprits) == 1:
        return not any(culprits[0] in pair for pair in usual)
    return culprits not in usual or ("ambiguous", culprits) in found


def _shares(logs: Mapping[Pair, Measured]) -> dict[str, float]:
    """Which part of the bytes of a middle sender went to whom: the plan, as it was seen."""
    came: dict[str, list[float]] = defaultdict(list)
    for (_, receiver), (carried, _) in logs.items():
        came[receiver].append(math.exp(carried))
    middles = {receiver: statistics.median(carried) for receiver, carried in came.items()}
    whole = sum(middles.values())
    return {receiver: middle / whole for receiver, middle in middles.items()}


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    return sum(abs(one.get(name, 0.0) - other.get(name, 0.0)) for name in one.keys() | other.keys()) / 2


def _slow(
    judged: Mapping[Pair, tuple[Measured, Measured]], names: Sequence[str], least: float = -math.inf
) -> tuple[Slow, ...]:
    """Of what was measured, beside what is usual. least: below which nothing counts."""
    index = {name: i for i, name in enumerate(names)}
    low, high = np.full((2, len(names), len(names)), np.nan)
    for (sender, receiver), ((carried, seconds), (before, took)) in judged.items():
        bounds = sorted((seconds - took, seconds - took - (carried - before)))
        low[index[sender], index[receiver]], high[index[sender], index[receiver]] = bounds
    seen = np.isfinite(low)
    level = float(np.median((low + high)[seen] / 2)) if seen.any() else 0.0
    return slow_parts(np.maximum(np.clip(level, low, high), least), names)


def _middle(values: Iterable[Measured]) -> Measured:
    carried, seconds = zip(*values, strict=True)
    return statistics.median(carried), statistics.median(seconds)


def _more(measured: Measured, usual: Measured) -> float:
    """Seconds beyond what can be expected of so many bytes."""
    (carried, seconds), (before, took) = measured, usual
    return math.exp(seconds) - math.exp(took + max(0.0, carried - before))


def _less(log: float, seconds: float) -> float:
    """The logarithm of so many seconds less."""
    return math.log(max(math.exp(log) - seconds, 1e-6))

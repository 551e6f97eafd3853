"""Slow senders, receivers and links over time: windows of measured delays in, what persists out.

One window is what came in since the last: often one operation per pair. A cell is judged against its own past, because
links over a WAN differ by nature; what it was while it was known to be slow does not become its past. What
`delays.slow_parts` finds in several windows running is confirmed, and cleared when it has not been found for as many.

How much an operation carries over a link changes with its plan, and nobody knows exactly which part of a delay is
latency and which goes with the bytes. Latency is at least nothing, and at most two round trips and a little, where that
time is known, else all of it. So what was to be expected lies between in proportion to the bytes, and that for all
beyond the latency; within these bounds, a cell is taken to be as all are in the middle. All that go to one peer have
got the same change of plan: where their round trips are known, the part of the latency that explains the middle one of
them is about what explains the others.

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
Measured = tuple[float, float, float]
"""Logarithms of bytes and of seconds, and the most of these seconds that can be latency."""
_TRIPS, _LITTLE = 2.0, 0.01  # of latency: round trips until all has begun to come, and seconds of anything else
_ALIKE = 0.35  # by so much of it, the latencies of what goes to one peer may differ
_CHANGED = 0.1  # in the logarithm of the bytes: by less, it makes no difference what is latency
_PARTS = tuple(step / 8 for step in range(9))


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
        self._persisting = Persisting(self.patience.windows, self.patience.lasting_seconds)

    @property
    def slow(self) -> Mapping[Culprit, tuple[Slow, float]]:
        """What is confirmed, with its newest numbers and since when."""
        return self._persisting.confirmed

    def observe(self, sender: str, receiver: str, carried: int, seconds: float, at: float, *, rtt: float = 0.0) -> None:
        """So many bytes came from one to the other in so many seconds, measured by the receiver alone. rtt: 0.0: not
        known."""
        if carried >= self.patience.least_bytes and 0 < seconds < math.inf:
            latency = min(seconds, _TRIPS * rtt + _LITTLE) if rtt > 0 else seconds
            self._now[sender, receiver].append((math.log(carried), math.log(seconds), latency))
            self._began = at if self._began is None else self._began

    def look(self, at: float) -> None:
        """Closes the window, if it has lasted."""
        lasting = max(self.patience.window_seconds, len(self._now) / self.patience.pairs_per_second)
        if self._began is None or at - self._began < lasting:
            return
        logs = {pair: _middle(values) for pair, values in self._now.items()}
        found = {(slow.kind, slow.culprits): slow for slow in self._judge(logs)}
        self._persisting.window(found, self._began, unseen=lambda key: _unseen(key, logs, found))
        self._learn(logs)
        self.windows += 1
        self._now.clear()
        self._began = None

    def _judge(self, logs: Mapping[Pair, Measured]) -> tuple[Slow, ...]:
        usual = {pair: _middle(past) for pair, past in self._past.items() if len(past) >= self.patience.needed}
        judged = {pair: (logs[pair], usual[pair]) for pair in logs.keys() & usual.keys()}
        names = sorted({name for pair in logs for name in pair})
        found = _slow(judged, names)
        if not found:
            return ()
        more = sorted(_more(*each) for each in judged.values())
        allowed = FACTOR * max(0.0, more[len(more) // 4])  # what three in four have; two slow peers of four are half
        less = {pair: ((b, _less(s, allowed), wait), before) for pair, ((b, s, wait), before) in judged.items()}
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
                self._past.setdefault(pair, deque(maxlen=self.patience.history)).append(value)

    def forget(self, name: str) -> None:
        """This peer has gone: its next life is measured anew."""
        for pair in [pair for pair in (*self._past, *self._now) if name in pair]:
            self._past.pop(pair, None)
            self._now.pop(pair, None)
        self._persisting.forget(lambda key: name in key[1])


def _unseen(key: Culprit, logs: Mapping[Pair, Measured], found: Mapping[Culprit, Slow]) -> bool:
    """Whether the window says nothing of this link: it was not used, or stood out with no other beside it."""
    _, culprits = key
    return len(culprits) == 2 and (culprits not in logs or ("ambiguous", culprits) in found)


def _slow(
    judged: Mapping[Pair, tuple[Measured, Measured]], names: Sequence[str], least: float = -math.inf
) -> tuple[Slow, ...]:
    """Of what was measured, beside what is usual. least: below which nothing counts."""
    index = {name: i for i, name in enumerate(names)}
    low, high = np.full((2, len(names), len(names)), np.nan)
    level = _level(map(_bounds, judged.values()))
    parts = _parts(judged, level)
    for (sender, receiver), cell in judged.items():
        part = parts.get(receiver, 0.5) if _tells(cell) else None
        bounds = _bounds(cell) if part is None else _bounds(cell, max(0.0, part - _ALIKE), min(1.0, part + _ALIKE))
        low[index[sender], index[receiver]], high[index[sender], index[receiver]] = bounds
    seen = np.isfinite(low)
    level = _level(zip(low[seen], high[seen], strict=True))
    return slow_parts(np.maximum(np.clip(level, low, high), least), names)


def _parts(judged: Mapping[Pair, tuple[Measured, Measured]], level: float) -> dict[str, float]:
    """By receiver: the part of the latency with which the middle one of what came there is nearest to the level."""
    cells: dict[str, list[tuple[Measured, Measured]]] = defaultdict(list)
    for (_, receiver), cell in judged.items():
        if _tells(cell):
            cells[receiver].append(cell)

    def distance(receiver: str, part: float) -> tuple[float, float]:
        middle = statistics.median_low(_beyond(cell, part) for cell in cells[receiver])
        return round(abs(middle - level), 9), abs(part - 0.5)

    return {name: min(_PARTS, key=lambda part: distance(name, part)) for name in cells}


def _tells(cell: tuple[Measured, Measured]) -> bool:
    """Whether the plan has changed for it, and its round trip is known."""
    (carried, _, _), (before, took, latency) = cell
    return abs(carried - before) > _CHANGED and latency < 0.999 * math.exp(took)


def _level(bounds: Iterable[tuple[float, float]]) -> float:
    middles = [(low + high) / 2 for low, high in bounds]
    return float(np.median(middles)) if middles else 0.0


def _bounds(cell: tuple[Measured, Measured], least: float = 0.0, most: float = 1.0) -> tuple[float, float]:
    """Between what parts of the latency, how far it is beyond what was to be expected."""
    one, other = _beyond(cell, least), _beyond(cell, most)
    return min(one, other), max(one, other)


def _beyond(cell: tuple[Measured, Measured], part: float) -> float:
    """The logarithm of its seconds over those that were to be expected with this part of the latency."""
    (carried, seconds, _), usual = cell
    return seconds - _expected(carried, usual, part)


def _expected(carried: float, usual: Measured, part: float) -> float:
    """The logarithm of the seconds that so many bytes take, if this part of the most that can be latency was."""
    before, took, latency = usual
    whole = math.exp(took)
    waits = part * min(latency, whole)
    return math.log(waits + (whole - waits) * math.exp(carried - before))


def _middle(values: Iterable[Measured]) -> Measured:
    carried, seconds, latency = zip(*values, strict=True)
    return statistics.median(carried), statistics.median(seconds), statistics.median(latency)


def _more(measured: Measured, usual: Measured) -> float:
    """Seconds beyond what can be expected of so many bytes."""
    return math.exp(measured[1]) - math.exp(max(_expected(measured[0], usual, part) for part in (0.0, 1.0)))


def _less(log: float, seconds: float) -> float:
    """The logarithm of so many seconds less."""
    return math.log(max(math.exp(log) - seconds, 1e-6))

"""Contributions that are not like the others: no numbers, far too long or short, or the other way.

What a peer says of its own contribution is its norm, and its cosine to the mean of the others' (`cosine_to_others`: of
the mean of all it is a part itself, and of few a large one). Pseudo-gradients of different data differ: the thresholds
are wide, and what is not plainly wrong must be seen in several rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .persisting import Persisting

LENGTH = 4.0
"""Times as long, or as short, as the median of the others."""
DEVIATIONS = 6.0
AGAINST, GAP = -0.2, 0.4
"""A cosine below the first points the other way, if those of the others, in the median, are above it by the second. (Of
three, the two good ones have a bad one in the mean of their others: their cosines are about 0.)"""
ENOUGH = 3
"""Fewer cannot outvote one."""
_LEAST_NOISE = 0.1
_NORMAL_MAD = 1.4826


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """norm: of the pseudo-gradient, NaN if it is not finite. cosine: to the mean of the others'."""

    norm: float
    cosine: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """why: "not finite", "norm" or "direction". value: of the norm or the cosine. others: the median of the others'."""

    peer: str
    why: str
    value: float
    others: float


def cosine_to_others(norm: float, mean_norm: float, product: float, share: float) -> float:
    """A contribution's cosine to the mean of the others', from what its peer knows once the mean of all is there.

    product: of the contribution and that mean. share: which part of that mean's weight it had, below 1.
    """
    others = product - share * norm**2
    squared = mean_norm**2 - 2 * share * product + (share * norm) ** 2
    return others / (norm * math.sqrt(squared)) if norm > 0 and squared > 0 else 0.0


def bad_contributions(given: Mapping[str, Contribution]) -> tuple[Bad, ...]:
    """Of one round. Only what is not finite is told of fewer than three peers: nobody knows which of two is right."""
    lost = [Bad(peer=p, why="not finite", value=c.norm, others=0.0) for p, c in given.items() if not _finite(c)]
    fine = {peer: contribution for peer, contribution in given.items() if _finite(contribution)}
    if len(fine) < ENOUGH:
        return tuple(lost)
    found = [_judged(peer, mine, [c for p, c in fine.items() if p != peer]) for peer, mine in fine.items()]
    return (*lost, *(bad for bad in found if bad is not None))


def _finite(contribution: Contribution) -> bool:
    return math.isfinite(contribution.norm)


def _judged(peer: str, mine: Contribution, others: Sequence[Contribution]) -> Bad | None:
    logs = [math.log(max(other.norm, 1e-300)) for other in others]
    usual = statistics.median(logs)
    noise = max(_LEAST_NOISE, _NORMAL_MAD * statistics.median(abs(each - usual) for each in logs))
    off = abs(math.log(max(mine.norm, 1e-300)) - usual)
    if off > math.log(LENGTH) and off > DEVIATIONS * noise:
        return Bad(peer=peer, why="norm", value=mine.norm, others=math.exp(usual))
    along = statistics.median(other.cosine for other in others)
    if mine.cosine < AGAINST and along - mine.cosine > GAP:
        return Bad(peer=peer, why="direction", value=mine.cosine, others=along)
    return None


class Gradients:
    """Rounds in, what is confirmed out. bad: by peer, with since when; numbers that are none at once."""

    def __init__(self, *, rounds: int = 2) -> None:
        self._persisting: Persisting[tuple[str, str]] = Persisting(rounds)
        self.bad: dict[str, tuple[Bad, float]] = {}

    def round(self, given: Mapping[str, Contribution], at: float) -> None:
        """The contributions to one committed round, and what was refused because it is no number."""
        found = {(bad.peer, bad.why): bad for bad in bad_contributions(given)}
        self._persisting.window(found, at)
        before = self.bad
        self.bad = {
            peer: (found.get((peer, why)) or before[peer][0], since)
            for (peer, why), since in self._persisting.confirmed.items()
        }
        self.bad |= {peer: (bad, at) for (peer, why), bad in found.items() if why == "not finite"}

    def forget(self, name: str) -> None:
        self.bad.pop(name, None)
        self._persisting.forget([key for key in self._persisting.suspected if key[0] == name])

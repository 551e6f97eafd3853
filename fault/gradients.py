"""Contributions that are not like the others: no numbers, far too long or short, or the other way.

What a peer says of its own contribution is its norm, and its cosine to the mean of the others' (`cosine_to_others`: of
the mean of all it is a part itself, and of few a large one). Pseudo-gradients of different data differ: the thresholds
are wide, and what is not plainly wrong must be seen in several rounds.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .persisting import Persisting
from .robust import deviation

LONG, SHORT = 4.0, 100.0
"""Times as long, or as short, as the median of the others. Who has few steps behind it, or a learning rate that still
grows after joining, is short for a good reason, and the others are long beside it: hence `USUAL`."""
USUAL = 2.0
"""Who is within this factor of its own past is as it always was, whatever the others are. Without a past it is judged
by those of the others who have one, if all have."""
PAST, NEEDED = 30, 3
DEVIATIONS = 6.0
AGAINST, AGREED = -0.2, 0.2
"""A cosine below the first points the other way, if the others agree: theirs, in the median, are above the second. With
data that differ, contributions point against each other near the end, and nobody is wrong. (Of three, the two good ones
have a bad one in the mean of their others, and their cosines are about 0: a flipped one among three is not named.)"""
BEHIND = 2.0
"""Who has more than so many times the steps of the others behind it was not waited for: they have moved on meanwhile,
and it may well point back. Its direction says nothing."""
ENOUGH = 3
"""Fewer cannot outvote one."""
_LEAST_NOISE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """norm: of the pseudo-gradient, NaN if it is not finite. cosine: to the mean of the others'. steps: behind it; 0:
    not known."""

    norm: float
    cosine: float
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bad:
    """why: "not finite", "norm" or "direction". value: of the norm or the cosine. others: the median of the others'.
    rounds: in which it was so, running.
    """

    peer: str
    why: str
    value: float
    others: float
    rounds: int = 1


def cosine_to_others(norm: float, mean_norm: float, product: float, share: float) -> float:
    """A contribution's cosine to the mean of the others', from what its peer knows once the mean of all is there.

    product: of the contribution and that mean. share: which part of that mean's weight it had, below 1.
    """
    others = product - share * norm**2
    squared = mean_norm**2 - 2 * share * product + (share * norm) ** 2
    return others / (norm * math.sqrt(squared)) if norm > 0 and squared > 0 else 0.0


def bad_contributions(
    given: Mapping[str, Contribution], usual: Callable[[str], float | None] = lambda peer: None
) -> tuple[Bad, ...]:
    """Of one round. Only what is not finite is told of fewer than three peers: nobody knows which of two is right.

    usual: the norm that a peer has had lately, None if that is not known.
    """
    lost = [Bad(peer=p, why="not finite", value=c.norm, others=0.0) for p, c in given.items() if not _finite(c)]
    fine = {peer: contribution for peer, contribution in given.items() if _finite(contribution)}
    if len(fine) < ENOUGH:
        return tuple(lost)
    known = {peer: usual(peer) for peer in fine}
    for peer, mine in fine.items():
        others = {other: contribution for other, contribution in fine.items() if other != peer}
        bad = _off_length(peer, mine, others, known) or _off_direction(peer, mine, others)
        lost += [bad] if bad else []
    return tuple(lost)


def _finite(contribution: Contribution) -> bool:
    return math.isfinite(contribution.norm)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-300))


def _off_length(
    peer: str, mine: Contribution, others: Mapping[str, Contribution], usual: Mapping[str, float | None]
) -> Bad | None:
    own = usual[peer]
    as_ever = own is not None and abs(_log(mine.norm) - _log(own)) < math.log(USUAL)
    if as_ever or (own is None and any(usual[other] is None for other in others)):
        return None
    logs = [_log(other.norm) for other in others.values()]
    middle = statistics.median(logs)
    off = _log(mine.norm) - middle
    long, short = math.log(LONG * _longer(mine, others)), math.log(SHORT)
    if (off > long or off < -short) and abs(off) > DEVIATIONS * deviation(logs, _LEAST_NOISE):
        return Bad(peer=peer, why="norm", value=mine.norm, others=math.exp(middle))
    return None


def _longer(mine: Contribution, others: Mapping[str, Contribution]) -> float:
    """Times as many steps as the others have behind theirs: who was not waited for goes so much further, at most."""
    theirs = statistics.median(other.steps for other in others.values())
    return max(1.0, mine.steps / theirs) if theirs else 1.0


def _off_direction(peer: str, mine: Contribution, others: Mapping[str, Contribution]) -> Bad | None:
    if _longer(mine, others) > BEHIND:
        return None
    along = statistics.median(other.cosine for other in others.values())
    if mine.cosine < AGAINST and along > AGREED:
        return Bad(peer=peer, why="direction", value=mine.cosine, others=along)
    return None


class Gradients:
    """Rounds in, what is confirmed out. bad: by peer, with since when; numbers that are none at once."""

    def __init__(self, *, rounds: int = 2) -> None:
        self._persisting: Persisting[tuple[str, str], Bad] = Persisting(rounds, unseen=PAST)
        self.bad: dict[str, tuple[Bad, float]] = {}
        self._past: dict[str, deque[float]] = {}

    def round(self, given: Mapping[str, Contribution], at: float) -> None:
        """The contributions to one committed round, and what was refused because it is no number."""
        found = {(bad.peer, bad.why): bad for bad in bad_contributions(given, self._usual)}
        running = {key: self._persisting.running(key) + 1 for key in found}
        found = {key: replace(bad, rounds=running[key]) for key, bad in found.items()}
        self._persisting.window(found, at, unseen=lambda key: key[0] not in given)
        once = {peer: each for peer, each in self.bad.items() if peer not in given}
        self.bad = once | {peer: each for (peer, _), each in self._persisting.confirmed.items()}
        first = {bad.peer: bad for (_, why), bad in found.items() if why == "not finite"}
        self.bad |= {peer: (bad, at) for peer, bad in first.items() if peer not in self.bad}

        suspects = self.bad.keys() | {peer for peer, _ in found}
        for peer, contribution in given.items():
            if peer not in suspects:
                self._past.setdefault(peer, deque(maxlen=PAST)).append(contribution.norm)

    def _usual(self, peer: str) -> float | None:
        past = self._past.get(peer, ())
        return statistics.median(past) if len(past) >= NEEDED else None

    def forget(self, name: str) -> None:
        """It has gone; a later life is another. Who was suspected beside it was compared with it, too: that is over.
        But what is no number is so by itself."""
        self.bad = {peer: each for peer, each in self.bad.items() if peer != name and each[0].why == "not finite"}
        self._past.pop(name, None)
        self._persisting.forget(lambda key: key[0] == name or key[1] != "not finite")

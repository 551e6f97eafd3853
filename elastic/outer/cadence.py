"""When a fragment is exchanged: how many inner steps, or seconds, lie between two exchanges of the same fragment (H).

With P fragments one of them is exchanged every H / P steps, each once in H. A peer starts at the next fragment whenever
a quorum of the others has, so cadences need not agree between peers; what they give is weighted by their tokens.

| cadence | H |
|---|---|
| `Steps(100)`, or 100 | constant (DiLoCo: 500, Streaming: 100, best loss at 30) |
| `Seconds(30)`, or "30s" | of wall time: fast peers make more steps |
| `Ramp(first=20, last=200, rounds=50)` | grows or shrinks geometrically with the rounds committed, then stays |
| `Late(sparse=1000, dense=50, after=0.8)` | sparse until so much of the run's target is reached, then dense |
| `Final()` | no exchange before the last one, when the loop is left: one merging (arXiv 2507.06542) |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from ..errors import ConfigurationError

WHOLE_ROUND = -1
"""As the inner steps between sending and applying: until the next fragment is to be sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """What a cadence may look at. round: committed rounds of the loop. steps, seconds: since the last exchange began.

    pace: this peer's speed against the fastest one's, above 0, at most 1. progress: of the run towards its target.
    """

    round: int
    fragments: int
    steps: int
    seconds: float
    pace: float = 1.0
    progress: float = 0.0


class Cadence(Protocol):
    def due(self, moment: Moment) -> bool:
        """Whether the next fragment should be exchanged now. A pure function."""

    @property
    def shortest(self) -> float:
        """The least H, in steps; 0 if steps do not decide."""


def _interval(h: int, moment: Moment) -> int:
    """Steps before this round: H spread over its P fragments, each of them once in H; the first round has all of H.

    Streaming DiLoCo (arXiv 2501.18512) begins fragment p at H + its offset p H / P, so that its first round is not
    shorter than the others. Slower peers make fewer steps (DyLU, arXiv 2401.09135), at least one (as in HALoS).
    """
    index, p = moment.round % moment.fragments, moment.fragments
    steps = h if moment.round == 0 else max(1, (index * h) // p - ((index - 1) * h) // p)
    return max(1, math.ceil(steps * moment.pace))


def _check_steps(name: str, value: object) -> None:
    if not (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        raise ConfigurationError(f"{name} is {value!r}: it must be a whole number of at least 1")


@dataclass(frozen=True, slots=True)
class Steps:
    h: int

    def __post_init__(self) -> None:
        _check_steps("sync_every", self.h)

    def due(self, moment: Moment) -> bool:
        return moment.steps >= _interval(self.h, moment)

    @property
    def shortest(self) -> float:
        return self.h


@dataclass(frozen=True, slots=True)
class Seconds:
    seconds: float

    def __post_init__(self) -> None:
        if not (self.seconds > 0 and math.isfinite(self.seconds)):
            raise ConfigurationError(f"sync_every is {self.seconds} s: it must be above 0")

    def due(self, moment: Moment) -> bool:
        return moment.steps >= 1 and moment.seconds >= self.seconds / (moment.fragments if moment.round else 1)

    @property
    def shortest(self) -> float:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    first: int
    last: int
    rounds: int

    def __post_init__(self) -> None:
        for name in ("first", "last", "rounds"):
            _check_steps(f"{name} of sync_every", getattr(self, name))

    def due(self, moment: Moment) -> bool:
        part = min(1.0, moment.round / self.rounds)
        return moment.steps >= _interval(max(1, round(self.first ** (1 - part) * self.last**part)), moment)

    @property
    def shortest(self) -> float:
        return min(self.first, self.last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Late:
    """after: part of the run's target (tokens, rounds or seconds, see `Peer.run_until`) from which on H is `dense`."""

    sparse: int
    dense: int
    after: float = 0.8

    def __post_init__(self) -> None:
        _check_steps("sparse of sync_every", self.sparse)
        _check_steps("dense of sync_every", self.dense)
        if not 0 <= self.after <= 1:
            raise ConfigurationError(f"after is {self.after}: it must be a part of the run, from 0 to 1")

    def due(self, moment: Moment) -> bool:
        h = self.dense if moment.progress >= self.after else self.sparse
        return moment.steps >= _interval(h, moment)

    @property
    def shortest(self) -> float:
        return min(self.sparse, self.dense)


@dataclass(frozen=True, slots=True)
class Final:
    def due(self, moment: Moment) -> bool:
        return False

    @property
    def shortest(self) -> float:
        return math.inf


def cadence_of(value: object) -> Cadence:
    """What `sync_every` stands for: steps, "30s", or a cadence. Raises ConfigurationError for anything else."""
    if isinstance(value, (Steps, Seconds, Ramp, Late, Final)):
        return value
    if isinstance(value, str) and value.endswith("s"):
        try:
            return Seconds(float(value[:-1]))
        except ValueError:
            pass
    if isinstance(value, int) and not isinstance(value, bool):
        return Steps(value)
    raise ConfigurationError(
        f"sync_every is {value!r}: it must be a whole number of at least 1, of inner steps; or a time such as '30s'; "
        "or Steps, Seconds, Ramp, Late or Final of elastic"
    )

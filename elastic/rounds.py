"""One operation on its way from the first proposal to a commit, and the pure rules of a round.

An operation gathers proposals, runs attempts, and, when an attempt fails, waits until every member of it has answered
or is lost before the next begins. `Operation` is the account; what to do next is decided in `deciding`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from collectives.records import LinkFailure, Member, Start

from .messages import OperationSpec, Propose

Pair = frozenset[str]
KEPT_COMMITS = 64  # of each tag, to be told again; as many versions behind, a result may still be asked for


class Phase(Enum):
    GATHERING = "gathering"
    RUNNING = "running"
    ABORTING = "aborting"


@dataclass
class Operation:
    """The open round under one tag.

    proposals: by peer name, kept until the commit. opened_at: when a quorum had proposed.
    lives: in the current attempt, the incarnation of each contributor, by name and in order.
    done, answered: in the current attempt, who holds a result (with its digest) and who has ended it.
    failures: link failures of the current attempt, by the peer that reported them.
    first_attempt: attempts below this one belonged to an earlier operation with the same round number.
    lost: everybody that earlier attempts went on without. short: of what it has too few, as it was last told.
    """

    tag: str
    round: int
    spec: OperationSpec
    fragment: int
    base_version: int
    attempt: int = -1
    first_attempt: int = 0
    phase: Phase = Phase.GATHERING
    proposals: dict[str, Propose] = field(default_factory=dict)
    late: dict[str, Propose] = field(default_factory=dict)
    opened_at: float | None = None
    changed_at: float = 0.0
    start: Start | None = None
    lives: dict[str, int] = field(default_factory=dict)
    segments: tuple[int, ...] = ()
    done: dict[str, str] = field(default_factory=dict)
    answered: set[str] = field(default_factory=set)
    failures: dict[str, tuple[LinkFailure, ...]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    withdrawn: set[str] = field(default_factory=set)
    short: str = ""

    @property
    def outer(self) -> bool:
        """Whether this is a round of an outer loop: journaled, and applied by peers that did not contribute."""
        return self.base_version >= 0

    def contributors(self) -> tuple[str, ...]:
        return tuple(self.lives)

    def in_attempt(self, name: str) -> bool:
        return self.phase is not Phase.GATHERING and name in self.lives

    def is_current(self, round: int, attempt: int) -> bool:
        return self.round == round and self.attempt == attempt and self.phase is not Phase.GATHERING

    def reported_lost(self, name: str) -> set[str]:
        """Who saw the link to `name` fail in this attempt."""
        return {who for who, lost in self.failures.items() if any(failure.peer == name for failure in lost)}

    def refused(self, name: str) -> bool:
        """Whether somebody proved that `name`'s process is gone: nobody holds its port any more."""
        return any(f.peer == name and f.evidence == "refused" for lost in self.failures.values() for f in lost)


def quorum_count(expected: int, quorum: float, min_peers: int) -> int:
    """How many of `expected` peers open a round: more than the part `quorum` of them, and never below min_peers."""
    return max(min_peers, min(expected, int(quorum * expected) + 1))


def float32(value: float) -> float:
    """The nearest float32: so that every peer computes with the same scalar, however it arrived."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded


def scalars(op: str, weights: Iterable[float], dtype: str = "float32") -> tuple[tuple[float, ...], float]:
    """Multipliers and divisor of a reduction, as numbers of that type: so that every peer computes with the same.

    Equal weights give exactly 1.0 each, so that the sum stays exact.
    """
    weights = tuple(weights)
    if op != "mean":
        return (1.0,) * len(weights), 1.0
    rounded = float if dtype == "float64" else float32
    heaviest = max(weights)
    multipliers = tuple(rounded(weight / heaviest) for weight in weights)
    return multipliers, rounded(sum(multipliers))


def mean_length(lengths: Iterable[tuple[float, float]]) -> float:
    """Of (weight, length) of what was sent as directions, the weighted mean length, as a float32; 1 of nothing."""
    pairs = [(weight, length) for weight, length in lengths if length > 0]
    total = sum(weight for weight, _ in pairs)
    return float32(sum(weight * length for weight, length in pairs) / total) if total else 1.0


def compared(spec: OperationSpec) -> tuple[str, ...]:
    """The fields of a spec in which all members of its operation must agree."""
    fields: tuple[str, ...] = ("algorithm", "fragments", "op", "root", "dtype", "elements", "shape")
    fields += ("wire", "gather_wire", "carried", "fingerprint", "needs")
    free = (spec.op == "all_gather" and not spec.fingerprint) or spec.fragments > 1
    return tuple(field for field in fields if not (field == "elements" and free))


def difference(tag: str, name: str, ours: OperationSpec, theirs: OperationSpec) -> str:
    """Rule 10: the first difference between what the run does and what this peer wants; "" if there is none."""
    for what in compared(ours):
        if getattr(ours, what) != getattr(theirs, what):
            values = f"{getattr(ours, what)!r} in the run, {getattr(theirs, what)!r} on peer {name}"
            return f"{tag}: {what} differs: {values}"
    return ""


def executed(spec: OperationSpec) -> str:
    """What the data plane is told to do. A mean is a sum whose weights travel as scalars."""
    if spec.algorithm == "reduce_scatter":
        return "reduce_scatter"
    return "sum" if spec.op == "mean" else spec.op


def extent(spec: OperationSpec, given: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Elements of the whole, and who owns how many of them where that must be exact; given: what each one offers."""
    if spec.op == "all_gather":
        return sum(given), given
    if spec.algorithm != "reduce_scatter":
        return spec.elements, ()
    even, more = divmod(spec.elements, len(given))
    return spec.elements, tuple(even + (index < more) for index in range(len(given)))


def lasting_cuts(
    failures: Mapping[str, tuple[LinkFailure, ...]], alive: set[str], seen: Mapping[Pair, int]
) -> set[Pair]:
    """Pairs of living peers that should be kept apart.

    A connection that merely broke (eof, reset, corrupt) is redialled first; a pair that broke before in this round,
    or could not be dialled at all, is taken as cut.
    """
    pairs = set()
    for who, lost in failures.items():
        for failure in lost:
            pair = frozenset((who, failure.peer))
            if pair <= alive and (failure.evidence in ("timeout", "unreachable", "refused") or seen.get(pair, 0) > 1):
                pairs.add(pair)
    return pairs


def members_of(names: Iterable[str], members: Mapping[str, Member]) -> tuple[Member, ...]:
    return tuple(members[name] for name in sorted(names) if name in members)

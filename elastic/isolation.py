"""What follows from a verdict, graded: observed, avoided, left out of rounds, in quarantine, evicted.

Pure, as all parts of the membership: verdicts and the time in, `Measure`s out. It knows who is set aside and whose name
is barred; `membership` carries the measures out, journals removals and tells of each with its reason.

A name that was in quarantine comes back after a self-test, on probation: what is found of it then bars it for twice as
long; once it has been as long without a verdict, it is trusted as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from fault.verdicts import (
    AMBIGUOUS,
    CORRUPT,
    DRIFTED,
    FLAPPING,
    GRADIENT,
    HANG,
    LINK,
    NODE,
    RECEIVER,
    SENDER,
    STALLED,
    STRAGGLER,
    Verdict,
)

from .config import ACTIONS, FaultPolicy
from .journal import Barred

AVOID, LEAVE_OUT, QUARANTINE, EVICT = ACTIONS[1:]
END = "end"  # this life, for being stuck: no stain on the name
SPARE = "spare"  # a removal that the run cannot do with

Key = TypeVar("Key", bound=Hashable)
_CLASSES = {
    **dict.fromkeys((SENDER, RECEIVER, NODE, LINK, AMBIGUOUS), "slow"),
    **dict.fromkeys((HANG, STALLED), "hang"),
    STRAGGLER: "straggler",
    GRADIENT: "gradient",
    CORRUPT: "corrupt",
    DRIFTED: "drifted",
    FLAPPING: "flapping",
}
_DRIFTS = 3  # within the time for which such an incident is told
_BAD_ROUNDS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """begins: or it is over. seconds: of a quarantine; infinite for an eviction."""

    action: str
    culprits: tuple[str, ...]
    verdict: Verdict
    begins: bool = True
    seconds: float = 0.0


@dataclass(slots=True)
class _Name:
    """strikes: how often it was in quarantine. seconds, until: of the last time. back: it has been admitted since, and
    is on probation until `trusted_at`."""

    strikes: int
    seconds: float
    reason: str
    back: bool = False
    until: float = math.inf
    trusted_at: float = math.inf


@dataclass(frozen=True, slots=True)
class _Stall:
    """Who caused it is set aside for so many seconds; it is remembered for as long again."""

    verdict: Verdict
    seconds: float
    began: float

    @property
    def until(self) -> float:
        return self.began + self.seconds


@dataclass(slots=True)
class Isolation:
    """min_peers: that a run needs. evict_after: seconds for which a life that hangs is left out before it ends.

    left_out: whom rounds do not wait for. spurned: whose contributions are not taken. avoided: slow peers, links that
    are slow or bring nothing, and rings whose fault is not clear. Each with the verdict that it follows from.
    """

    policy: FaultPolicy
    min_peers: int
    evict_after: float
    left_out: dict[str, Verdict] = field(default_factory=dict)
    spurned: dict[str, Verdict] = field(default_factory=dict)
    avoided: dict[tuple[str, ...], Verdict] = field(default_factory=dict)
    _names: dict[str, _Name] = field(default_factory=dict)
    _calm_until: float = -math.inf
    _aside: dict[str, float] = field(default_factory=dict)
    _stalls: dict[tuple[str, tuple[str, ...]], _Stall] = field(default_factory=dict)
    _spared: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)

    # --- what is to be done -------------------------------------------------------------------------------------------

    def decide(self, verdicts: Iterable[Verdict], awake: Collection[str], now: float) -> Iterator[Measure]:
        """awake: members that are heard of. One removal at the most, and it comes last."""
        sure = sorted((v for v in verdicts if v.confidence >= self.policy.confidence), key=_gravest_first)
        aside = [*sure, *self._kept(sure, now)]
        yield from self._avoid([v for v in aside if self._allows(v, AVOID) and (v.kind in _SLOW or _cuts(v))])
        yield from self._set_aside(aside, awake)
        self._aside = {name: self._aside.get(name, now) for name in self.left_out}
        yield from self._remove([v for v in sure if len(v.culprits) == 1 and self._removes(v, now)], awake, now)

    def _allows(self, verdict: Verdict, action: str) -> bool:
        furthest = getattr(self.policy, _CLASSES[verdict.kind]) if verdict.kind in _CLASSES else "observe"
        return ACTIONS.index(action) <= ACTIONS.index(furthest)

    def _kept(self, sure: Iterable[Verdict], now: float) -> list[Verdict]:
        """A stall is over with the attempt that stood still, and the next attempt would stand still, too: whoever
        caused it is set aside for a while all the same, and each further time for twice as long."""
        stalled = {verdict.key: verdict for verdict in sure if verdict.kind == STALLED}
        for key, verdict in stalled.items():
            known = self._stalls.get(key)
            if known is None or now >= known.until:
                seconds = self.policy.quarantine_seconds if known is None else 2 * known.seconds
                self._stalls[key] = _Stall(verdict, min(seconds, self.policy.longest_seconds), now)
        self._stalls = {key: stall for key, stall in self._stalls.items() if now < stall.until + stall.seconds}
        return [stall.verdict for key, stall in self._stalls.items() if key not in stalled and now < stall.until]

    def _avoid(self, blamed: Iterable[Verdict]) -> Iterator[Measure]:
        wanted = {verdict.culprits: verdict for verdict in blamed}
        yield from _changes(AVOID, self.avoided, wanted, lambda culprits: culprits)
        self.avoided = wanted

    def _set_aside(self, sure: Iterable[Verdict], awake: Collection[str]) -> Iterator[Measure]:
        """Who is set aside stays so before another is, if not all may be."""
        wanted: dict[str, Verdict] = {}
        blamed = [v for v in sure if len(v.culprits) == 1 and self._allows(v, LEAVE_OUT) and _lasts(v)]
        for verdict in sorted(blamed, key=lambda v: v.culprits[0] not in self.left_out):
            (name,) = verdict.culprits
            if name in awake and name not in wanted and self._spares(awake, {*wanted, name}):
                wanted[name] = verdict
        yield from _changes(LEAVE_OUT, self.left_out, wanted, lambda name: (name,))
        self.left_out = wanted
        self.spurned = {name: verdict for name, verdict in wanted.items() if verdict.kind in (GRADIENT, STALLED)}

    def _remove(self, blamed: Iterable[Verdict], awake: Collection[str], now: float) -> Iterator[Measure]:
        spared = set()
        for verdict in blamed if now >= self._calm_until else ():
            (name,) = verdict.culprits
            if self.barred(name, now) or (_CLASSES[verdict.kind] == "hang" and name not in awake):
                continue
            if name not in awake or self._spares(awake, {*self.left_out, name}):
                yield self._removal(name, verdict)
                break
            spared.add(verdict.key)
            if verdict.key not in self._spared:
                yield Measure(action=SPARE, culprits=(name,), verdict=verdict)
        self._spared = spared

    def _removal(self, name: str, verdict: Verdict) -> Measure:
        if _CLASSES[verdict.kind] == "hang":
            return Measure(action=END, culprits=(name,), verdict=verdict)
        seconds = math.inf if self._allows(verdict, EVICT) else self._sentence(name)
        action = EVICT if math.isinf(seconds) else QUARANTINE
        return Measure(action=action, culprits=(name,), verdict=verdict, seconds=seconds)

    def _removes(self, verdict: Verdict, now: float) -> bool:
        if _CLASSES.get(verdict.kind) == "hang":
            return now - self._aside.get(verdict.culprits[0], now) > self.evict_after
        if verdict.kind == DRIFTED and verdict.evidence.get("times", 0) < _DRIFTS:
            return False
        return self._allows(verdict, QUARANTINE) and (verdict.kind != GRADIENT or _lasts(verdict))

    def _spares(self, awake: Collection[str], aside: Collection[str]) -> bool:
        """Whether the run can do without these."""
        left = len([name for name in awake if name not in aside])
        return left >= max(1, self.min_peers) and len(awake) - left <= self.policy.most_out * len(awake)

    def _sentence(self, name: str) -> float:
        """Seconds for which the name is to be barred."""
        strikes = self.strikes(name)
        if strikes >= self.policy.strikes:
            return math.inf
        return min(self.policy.longest_seconds, self.policy.quarantine_seconds * 2.0**strikes)

    # --- names --------------------------------------------------------------------------------------------------------

    def apply(self, record: Barred) -> None:
        """Of the durable state. When it begins, `bar` says."""
        seconds = record.seconds if record.seconds > 0 else math.inf
        self._names[record.name] = _Name(record.strikes, seconds, record.reason)

    def apply_admitted(self, name: str) -> None:
        if name in self._names:
            self._names[name].back = True

    def begin(self, now: float) -> None:
        """After a replay: what is not over begins anew."""
        for name, known in self._names.items():
            self.admitted(name, now) if known.back else self.bar(name, now)
        self._calm_until = -math.inf

    def bar(self, name: str, now: float) -> None:
        """It is removed now."""
        known = self._names[name]
        known.until = now + known.seconds
        self._calm_until = now + self.policy.calm_seconds

    def admitted(self, name: str, now: float) -> None:
        if name in self._names:
            known = self._names[name]
            known.trusted_at = now + min(known.seconds, self.policy.longest_seconds)

    def again(self, name: str, reason: str) -> Barred:
        """It has not passed its self-test."""
        strikes = self._names[name].strikes + 1
        seconds = self._sentence(name)
        return Barred(name=name, seconds=0.0 if math.isinf(seconds) else seconds, strikes=strikes, reason=reason)

    def barred(self, name: str, now: float) -> float:
        """For how many seconds; 0: it may come."""
        known = self._names.get(name)
        return 0.0 if known is None or known.back else max(0.0, known.until - now)

    def reason(self, name: str) -> str:
        return self._names[name].reason if name in self._names else ""

    def strikes(self, name: str) -> int:
        return self._names[name].strikes if name in self._names else 0

    def must_test(self, name: str) -> bool:
        """Whether it has to pass a self-test before it comes back."""
        return name in self._names and not self._names[name].back

    def on_probation(self, name: str) -> bool:
        return name in self._names and self._names[name].back

    def trusted(self, now: float) -> list[str]:
        """Whose probation is over; they are as any other."""
        over = [name for name, known in self._names.items() if known.back and now >= known.trusted_at]
        for name in over:
            del self._names[name]
        return over

    def in_quarantine(self, now: float) -> dict[str, float]:
        """For how many seconds yet, by name."""
        return {name: seconds for name in self._names if (seconds := self.barred(name, now))}


_SLOW = frozenset({SENDER, RECEIVER, NODE, LINK, AMBIGUOUS})
_INCIDENTS = frozenset({CORRUPT, DRIFTED, FLAPPING})  # over as soon as they happened: nothing to leave out for
_GRAVITY = {GRADIENT: 0, CORRUPT: 1, FLAPPING: 2, DRIFTED: 3}


def _lasts(verdict: Verdict) -> bool:
    """Whether it is more than something that happened once: a loss can overflow on any peer, and then it sends none."""
    once = verdict.kind == GRADIENT and verdict.evidence.get("rounds", 0) < _BAD_ROUNDS
    return verdict.kind not in _INCIDENTS and not once


def _cuts(verdict: Verdict) -> bool:
    """Whether this link is to be planned around."""
    return verdict.kind in (CORRUPT, STALLED) and len(verdict.culprits) > 1


def _gravest_first(verdict: Verdict) -> tuple[int, float, float]:
    return _GRAVITY.get(verdict.kind, len(_GRAVITY)), -verdict.confidence, verdict.since


def _changes(
    action: str,
    before: Mapping[Key, Verdict],
    after: Mapping[Key, Verdict],
    culprits: Callable[[Key], tuple[str, ...]],
) -> Iterator[Measure]:
    for key in before.keys() - after.keys():
        yield Measure(action=action, culprits=culprits(key), verdict=before[key], begins=False)
    for key in after.keys() - before.keys():
        yield Measure(action=action, culprits=culprits(key), verdict=after[key])

"""Who stands still: a peer that makes no step, one that has not entered an operation, a link on which nothing moves.

Both ends are heard of: silence is another matter. How long something has not happened is the hysteresis: it takes long
to begin, and is over with the next step or byte.

In an operation, peers wait for each other, and most of those that wait are no cause. So what is awaited of a peer
counts only if that peer has all that it needs for it: for a result everybody's own numbers, and to send its own,
everybody's word that they have begun. What is left is read as a matrix of senders and receivers (algorithms.md,
section 6.2, rule 2): a peer that all others wait for is the cause, and so is one that waits for all others; else it is
the link between two.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from collectives.records import Underway

from .records import Trainer
from .verdicts import HANG, STALLED, Verdict

ENOUGH = 5
"""Steps that make a usual one."""
TIMES = 10.0
"""Times as long as a usual step is a hang, if that is more than `hang_seconds`."""
MANY = 2
"""Peers that wait for the same one, or that one waits for, make it the cause."""
_NEARLY = 0.5  # of `hang_seconds`: what has stood still so long belongs to what has stood still for all of it

Attempt = tuple[str, int, int]
Blamed = tuple[str, tuple[str, ...], list["Waits"]]
_SURE, _LIKELY = 0.9, 0.5


@dataclass(frozen=True, slots=True)
class Waits:
    """One cell: this receiver has got nothing from that sender for so long."""

    sender: str
    receiver: str
    what: str
    seconds: float


@dataclass(slots=True)
class Hangs:
    """Pure: time comes with what is reported. hang_seconds: without a step, or a byte that is awaited.

    Nothing depends on how long an operation usually takes: what is measured is how long a link brings nothing at all.
    """

    hang_seconds: float = 30.0
    _trainers: dict[str, tuple[Trainer, float]] = field(default_factory=dict)
    _underway: dict[str, tuple[Underway, ...]] = field(default_factory=dict)
    _since: dict[tuple[str, tuple[str, ...]], float] = field(default_factory=dict)

    def reported(self, peer: str, trainer: Trainer, underway: tuple[Underway, ...], at: float) -> None:
        """What its newest heartbeat says."""
        self._trainers[peer] = trainer, at
        self._underway[peer] = underway

    def forget(self, peer: str) -> None:
        self._trainers.pop(peer, None)
        self._underway.pop(peer, None)

    def look(self, at: float, silent: Collection[str] = ()) -> tuple[Verdict, ...]:
        """What stands still now. silent: peers that are not heard of: of those, nothing is said here."""
        found = {verdict.key: verdict for verdict in (*self._stalls(at, silent), *self._idle(silent))}
        self._since = {key: self._since.get(key, verdict.since) for key, verdict in found.items()}
        return tuple(found.values())

    # --- outside communication ----------------------------------------------------------------------------------------

    def _idle(self, silent: Collection[str]) -> Iterator[Verdict]:
        for peer, (trainer, at) in self._trainers.items():
            if peer not in silent and stands_still(trainer, self.hang_seconds):
                evidence = {"seconds": trainer.idle_seconds, "usual_seconds": trainer.usual_seconds}
                yield self._verdict(HANG, (peer,), at - trainer.idle_seconds, _SURE, evidence)

    # --- in communication ---------------------------------------------------------------------------------------------

    def _stalls(self, at: float, silent: Collection[str]) -> Iterator[Verdict]:
        attempts: dict[Attempt, dict[str, Underway]] = defaultdict(dict)
        for peer, underway in self._underway.items():
            for each in underway if peer not in silent else ():
                attempts[each.tag, each.round, each.attempt][peer] = each
        for entered in attempts.values():
            waits = [wait for wait in _waits(entered) if wait.seconds > _NEARLY * self.hang_seconds]
            told = [wait for wait in waits if wait.sender not in silent]
            yield from self._blamed(entered, waits, told, at)

    def _blamed(
        self, entered: Mapping[str, Underway], waits: list[Waits], told: list[Waits], at: float
    ) -> Iterator[Verdict]:
        causes = [wait for wait in told if not _waits_itself(wait, entered.get(wait.sender))]
        sure = _SURE if causes else _LIKELY
        if told and not causes and len(told) == len(waits):  # they wait for each other all around: it began somewhere
            causes = [max(told, key=lambda wait: wait.seconds)]
        absent = {wait.sender for wait in causes if wait.what == "ready" and wait.sender not in entered}
        blamed: list[Blamed] = [
            (HANG, (peer,), [wait for wait in causes if wait.sender == peer]) for peer in sorted(absent)
        ]
        members = {*entered, *(wait.sender for wait in waits)}
        rest = [wait for wait in causes if wait.sender not in absent]
        blamed += [(STALLED, culprits, links) for culprits, links in _attributed(rest, members)]
        for kind, culprits, links in blamed:
            seconds = max(wait.seconds for wait in links)
            if seconds > self.hang_seconds:
                evidence = {"seconds": seconds, "links": float(len(links))}
                yield self._verdict(kind, culprits, at - seconds, sure, evidence)

    def _verdict(
        self, kind: str, culprits: tuple[str, ...], since: float, sure: float, evidence: dict[str, float]
    ) -> Verdict:
        since = self._since.get((kind, culprits), since)
        return Verdict(kind=kind, culprits=culprits, since=since, confidence=sure, evidence=evidence)


def stands_still(trainer: Trainer, hang_seconds: float) -> bool:
    """Whether it has made no step for far too long, waits for nobody, and has made enough to know what is usual."""
    if trainer.waiting or trainer.steps < ENOUGH:
        return False
    if not (math.isfinite(trainer.idle_seconds) and math.isfinite(trainer.usual_seconds)):
        return False
    return trainer.idle_seconds > max(hang_seconds, TIMES * trainer.usual_seconds)


def _waits(entered: Mapping[str, Underway]) -> Iterator[Waits]:
    for receiver, underway in entered.items():
        for each in underway.awaited:
            if math.isfinite(each.seconds):
                yield Waits(each.peer, receiver, each.what, each.seconds)


def _waits_itself(wait: Waits, sender: Underway | None) -> bool:
    """Whether the sender cannot go on before others do. One that is not in the attempt has no such excuse."""
    if sender is None:
        return False
    return sender.stage == "ready" or (wait.what == "result" and sender.stage == "own")


def _attributed(causes: Iterable[Waits], members: Collection[str]) -> Iterator[tuple[tuple[str, ...], list[Waits]]]:
    """Rows, then columns, then what is left of cells."""
    cells = {(wait.sender, wait.receiver): wait for wait in causes}
    for axis in (0, 1):
        for peer in sorted({pair[axis] for pair in cells}):
            pairs = [pair for pair in cells if pair[axis] == peer]
            others = {pair[1 - axis] for pair in pairs}
            alone = all(pair[axis] == peer for pair in cells if pair[1 - axis] in others)
            if len(others) >= MANY and others == {*members} - {peer} and alone:
                yield (peer,), [cells.pop(pair) for pair in pairs]
    yield from ((pair, [wait]) for pair, wait in cells.items())

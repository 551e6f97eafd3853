"""Rounds: what becomes of what peers propose under a tag, from the first proposal to the commit, or to failure.

`rounds` has the account of one operation and its pure rules; here it is decided when it begins, who is in an attempt,
when the next attempt may follow, and what is committed (docs/design.md, "A round"; numbers in comments refer to its
rules). The last commits are kept, to be told again to whoever asks.

Pure, like all parts of the membership: it touches operations, their outcomes and routes, speaks through the Roster,
asks the outer loops about the state that a proposal was measured from, and the leases about its shards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from typing import Any

from collectives import topology
from collectives.records import Abort, LinkFailure, Start
from collectives.topology import Plan

from . import planning, rounds
from .config import RunPolicy, Timeouts
from .journal import Committed
from .leases import Leasing
from .loops import OuterLoops
from .messages import (
    Begin,
    Cancel,
    Commit,
    CommitNote,
    DoneReport,
    FailedReport,
    Message,
    Open,
    OperationSpec,
    Propose,
    RoundFailed,
    RunProgress,
    Short,
    Withdraw,
)
from .planning import Routes
from .roster import MemberState, Roster
from .rounds import KEPT_COMMITS, Operation, Pair, Phase

MAX_WEIGHT = 1e15  # sums of it stay finite, and nearly exact
MAX_ELEMENTS = 1 << 48  # sums of it stay within a message's integers
CUT_RETRY_SECONDS = 30.0
TOO_LATE_ONCE_TOO_OFTEN = 8  # so many proposals that came while their round was running


class Rounds:
    """All operations under way, by tag, and the last commits of each tag.

    progress: how far the run is. evict: ends the membership of a name, for a reason, at a time.
    cuts: pairs of members that cannot talk, and until when that is believed. left_out: members that no round waits for.
    spurned: whose contributions are not taken; stuck: those of them for whom an exchange would stand still.
    """

    def __init__(
        self,
        roster: Roster,
        policy: RunPolicy,
        timeouts: Timeouts,
        *,
        outer: OuterLoops,
        leasing: Leasing,
        progress: Callable[[], RunProgress],
        evict: Callable[[str, str, float], None],
    ) -> None:
        self._roster, self._policy, self._timeouts = roster, policy, timeouts
        self._outer, self._leasing = outer, leasing
        self._progress, self._evict = progress, evict
        self.operations: dict[str, Operation] = {}
        self.commits: dict[str, deque[Commit]] = {}
        self.cuts: dict[Pair, float] = {}
        self.left_out: Collection[str] = ()
        self.spurned: Collection[str] = ()
        self.stuck: Collection[str] = ()
        self.routes = Routes()
        self._told: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._link_breaks: dict[Pair, int] = {}
        self._told_cut: dict[Pair, dict[str, float]] = {}
        self._unheard: dict[str, float] = {}
        self._rounds: dict[str, int] = {}
        self._attempts: dict[str, tuple[int, int]] = {}
        self._decided: dict[tuple[str, str], tuple[int, int, Message]] = {}
        self._absent: dict[str, set[str]] = {}
        self._too_late: dict[tuple[str, str], int] = {}

    # --- as time goes by --------------------------------------------------------------------------------------------

    def proposals(self) -> Iterable[tuple[str, Propose]]:
        """All that are open, with the names of those who made them."""
        return (each for operation in self.operations.values() for each in operation.proposals.items())

    def tick(self, now: float) -> None:
        """Time has passed: graces are over, attempts take too long, cut pairs may try again."""
        for operation in list(self.operations.values()):
            self.consider(operation, now)
        self._drop_old_cuts(now)

    def postpone(self, seconds: float) -> None:
        """The coordinator itself stood still for so long: nobody's time ran."""
        for operation in self.operations.values():
            operation.changed_at += seconds
            if operation.opened_at is not None:
                operation.opened_at += seconds

    # --- proposals --------------------------------------------------------------------------------------------------

    def propose(self, name: str, message: Propose, now: float) -> None:
        """The peer offers its numbers for the next round under the tag, or asks again what became of them."""
        if self._already_decided(name, message) or not self._acceptable(name, message, now):
            return
        operation = self.operations.get(message.tag)
        if operation is None:
            operation = self._open_operation(message, now)
        elif self._mismatch(name, message, operation.spec):
            return
        if message.fragment != operation.fragment:
            operation.late[name] = message
            return
        self._absent.get(message.tag, set()).discard(name)
        before = operation.proposals.get(name)
        if operation.phase is Phase.GATHERING:
            operation.proposals[name] = message
        elif before is None or before.incarnation != message.incarnation:
            self._note_late(name, message)
            operation.late[name] = message
        elif before.sequence < message.sequence:
            self._replace(operation, name, message, now)
            return
        elif operation.phase is Phase.RUNNING and operation.start and name in _names(operation.start):
            self._roster.send(name, self._begin_of(operation))
        self.consider(operation, now)

    def _replace(self, operation: Operation, name: str, message: Propose, now: float) -> None:
        """The peer offers something else than the running attempt was started with: that attempt cannot count."""
        self._take_back(operation, name, now)
        if self.operations.get(operation.tag) is operation and name in operation.proposals:
            operation.late[name] = message
        else:
            self.propose(name, message, now)

    def _already_decided(self, name: str, message: Propose) -> bool:
        incarnation, sequence, reply = self._decided.get((message.tag, name), (0, -1, None))
        if reply is not None and incarnation == message.incarnation and message.sequence <= sequence:
            self._roster.send(name, self._renewed(reply) if isinstance(reply, Commit) else reply)
            return True
        if message.base_version >= 0 or not 0 <= message.round < self._rounds.get(message.tag, 0):
            return False
        self._roster.send(name, self._outcome(message.tag, message.round))
        return True

    def _outcome(self, tag: str, round: int) -> Message:
        """What became of a plain operation that is over."""
        for commit in self.commits.get(tag, ()):
            if commit.round == round:
                return self._renewed(commit)
        failed: RoundFailed = self._roster.stamp(
            RoundFailed, tag=tag, round=round, reason="the round went on without this peer"
        )
        return failed

    def _acceptable(self, name: str, message: Propose, now: float) -> bool:
        if not 0 <= message.weight <= MAX_WEIGHT:
            reason = f"weight {message.weight} of peer {name} is not a number from 0 to {MAX_WEIGHT:.0e}"
            self._roster.refuse(name, message, "ConfigurationError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if not 0 <= message.spec.elements <= MAX_ELEMENTS:
            reason = f"there is no tensor of {message.spec.elements} elements on peer {name}"
            self._roster.refuse(name, message, "ConfigurationError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if message.base_version < 0 and message.tag not in self._outer.loops:
            return True
        if message.base_version < 0 or (message.tag in self.operations and not self.operations[message.tag].outer):
            reason = f"tag {message.tag} belongs to an outer loop and to a plain operation: rename one"
            self._roster.refuse(name, message, "ParityError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if not self._fresh_enough(name, message, now):
            return False
        if self._progress().finished:
            reason = "the run has reached its target"
            failed = self._roster.stamp(RoundFailed, tag=message.tag, round=message.round, reason=reason)
            self._roster.send(name, failed)
        return not self._progress().finished

    def _fresh_enough(self, name: str, message: Propose, now: float) -> bool:
        """Whether it may count in the loop's next round; if not, the peer is told what to do instead."""
        if not self._outer.is_current(name, message):
            self._note_late(name, message)
            return False
        if self._leasing.has_read_others(name, message):
            self._outer.send_base(name, message.tag, message.fragment)
            return False
        return self._outer.same_base(name, message, now)

    def _mismatch(self, name: str, message: Propose, ours: OperationSpec) -> bool:
        reason = rounds.difference(message.tag, name, ours, message.spec)
        if reason:
            self._roster.refuse(name, message, "ParityError", reason, tag=message.tag, sequence=message.sequence)
        return bool(reason)

    def _open_operation(self, message: Propose, now: float) -> Operation:
        outer = message.base_version >= 0
        number = self._outer.loops[message.tag].rounds if outer else self._rounds.get(message.tag, 0)
        last_round, last_attempt = self._attempts.get(message.tag, (-1, -1))
        attempt = last_attempt if last_round == number else -1  # rule 1: no two attempts share an identity
        operation = Operation(
            tag=message.tag,
            round=number,
            attempt=attempt,
            first_attempt=attempt + 1,
            spec=message.spec,
            fragment=message.fragment,
            base_version=message.base_version,
            changed_at=now,
        )
        self.operations[message.tag] = operation
        return operation

    # --- what next --------------------------------------------------------------------------------------------------

    def consider(self, operation: Operation, now: float) -> None:
        """Moves the operation on as far as what is known allows."""
        if self.operations.get(operation.tag) is not operation:
            return
        if operation.phase is Phase.GATHERING:
            self._consider_start(operation, now)
        elif operation.phase is Phase.RUNNING:
            self._consider_running(operation, now)
        else:
            self._consider_retry(operation, now)

    def _expected(self, operation: Operation, now: float) -> set[str]:
        awaited = self._awaited(operation, now)
        return awaited.difference(self.left_out if operation.outer else self.stuck)

    def _awaited(self, operation: Operation, now: float) -> set[str]:
        awake = self._roster.awake()
        if not operation.outer:
            return (awake - self._absent.get(operation.tag, set())) | (awake & {operation.spec.root})
        if now - operation.changed_at <= self._timeouts.grace:
            return {n for n in awake if operation.tag in self._roster.members[n].trains or n in self._roster.returning}
        # who is still behind cannot propose: fetching the state anew stops nobody
        holders = self._outer.holders(operation.tag, operation.fragment)
        return {name for name in holders if operation.tag in self._roster.members[name].trains}

    def _consider_start(self, operation: Operation, now: float) -> None:
        expected = self._expected(operation, now)
        here = {name for name in operation.proposals if not self._roster.members[name].silent}
        present = here.difference(self._not_taken(operation))
        disputed = operation.outer and self._outer.disputed(operation.tag, operation.fragment)
        if self._too_few(operation, present) or disputed:
            operation.opened_at = None
            return
        missing = expected - present - self._stood_in_for(operation, present)
        count = len(self._teams(operation, expected))
        needed, grace = self._terms(operation, count, missing)
        draining = any(proposal.leaving for proposal in operation.proposals.values())
        if operation.opened_at is None and (draining or len(self._teams(operation, present)) >= min(needed, count)):
            operation.opened_at = now
            for name in missing:
                self._roster.send(name, self._roster.stamp(Open, tag=operation.tag, round=operation.round))
        grace_over = operation.opened_at is not None and now - operation.opened_at >= grace
        if not missing or grace_over:
            self._absent.setdefault(operation.tag, set()).update(missing)
            self._waited_for(operation, missing | present)
            self._begin_attempt(operation, here, now)

    def _not_taken(self, operation: Operation) -> Collection[str]:
        """Whose numbers are not wanted: outside of outer loops, those of whoever sends wrong ones to a loop are."""
        return self.spurned if operation.outer else self.stuck

    def _giving(self, operation: Operation, names: Iterable[str]) -> list[str]:
        """Who of these has numbers for the others that are taken."""
        proposals = operation.proposals
        taken = sorted(set(names).difference(self._not_taken(operation)))
        return [name for name in taken if proposals[name].weight > 0 and not proposals[name].receiver]

    def _teams(self, operation: Operation, names: Iterable[str]) -> set[str]:
        """What counts as one peer each: in rounds of an outer loop, twins do."""
        return {self._leasing.team(name) for name in names} if operation.outer else {*names}

    def _stood_in_for(self, operation: Operation, present: set[str]) -> set[str]:
        """Who need not be waited for, since a twin gives what it would."""
        paired = operation.outer and self._leasing.twins.teams
        return self._leasing.mates(self._giving(operation, present)) if paired else set()

    def _one_of_each(self, operation: Operation, giving: list[str]) -> tuple[str, ...]:
        """Of twins the one that has read furthest; their samples are the same ones."""
        if not operation.outer:
            return tuple(giving)
        furthest: dict[str, str] = {}
        for name in sorted(giving, key=lambda name: (-operation.proposals[name].counts, name)):
            furthest.setdefault(self._leasing.team(name), name)
        return tuple(sorted(furthest.values()))

    def _too_few(self, operation: Operation, present: set[str]) -> bool:
        """Whether fewer peers are here than the run needs. Who has no data left, and follows, is one (rule 11); so is
        who trains beside a twin."""
        members = self._roster.members
        twins = self._stood_in_for(operation, present)
        here = present | {n for n in twins if operation.tag in members[n].trains and not members[n].silent}
        if operation.outer and self._leasing.exhausted:
            here |= {*self._outer.holders(operation.tag, operation.fragment)}
        return not present or len(here) < self._policy.min_peers

    def _terms(self, operation: Operation, expected: int, missing: set[str]) -> tuple[int, float]:
        """How many open the round, and for how many seconds it then waits: as the loop says, if it does.

        Who has come too late again and again is waited for once, as long as the run's own grace: else a loop that waits
        for nobody would never hear of a peer whose steps take longer than its rounds.
        """
        asked = operation.proposals.values()
        quorum, graces = max((each.quorum for each in asked), default=0), [p.grace for p in asked if p.grace >= 0]
        usual = rounds.quorum_count(expected, self._policy.quorum, self._policy.min_peers)
        needed = max(quorum, self._policy.min_peers) if quorum else usual
        if any(self._too_late.get((operation.tag, name), 0) >= TOO_LATE_ONCE_TOO_OFTEN for name in missing):
            graces = []
        return needed, min(graces, default=self._timeouts.grace)

    def _begin_attempt(self, operation: Operation, names: set[str], now: float) -> None:
        """Starts the next attempt with these peers' proposals; a round without any weight is skipped (rule 6)."""
        weights = {name: operation.proposals[name].weight for name in sorted(names)}
        giving = self._one_of_each(operation, self._giving(operation, names))
        if not giving:
            self._decide(operation, digest="", contributors=(), now=now)
            return
        if operation.spec.root and operation.spec.root not in giving:
            self._fail(operation, f"its root {operation.spec.root} is not there; there are: {', '.join(giving)}")
            return
        plan = self._plan(operation, giving)
        if len(plan.names) < operation.spec.needs:
            self._tell_short(operation, plan.names)
            return
        operation.short = ""
        receivers = tuple(sorted(names - set(giving)))
        operation.attempt += 1
        self._attempts[operation.tag] = (operation.round, operation.attempt)
        self._order(operation, plan, receivers, weights)
        operation.lost.extend(name for name in giving if name not in plan.names)
        operation.phase, operation.changed_at = Phase.RUNNING, now
        operation.done, operation.answered, operation.failures = {}, set(), {}
        begin = self._begin_of(operation)
        for name in (*plan.names, *receivers):
            self._roster.send(name, begin)
        self._emit_start(operation, plan.names)

    def _tell_short(self, operation: Operation, names: tuple[str, ...]) -> None:
        """The round would begin, but what combines these contributions means nothing with so few: it waits for more."""
        spec = operation.spec
        reason = f"{len(names)} can contribute to the round, and {spec.algorithm} needs {spec.needs}"
        if reason == operation.short:
            return
        if not operation.short:
            fields = {"tag": operation.tag, "round": operation.round, "contributors": list(names)}
            self._roster.emit("round.short", **fields, needs=spec.needs, algorithm=spec.algorithm)
        operation.short = reason
        for name in operation.proposals:
            short = self._roster.stamp(Short, tag=operation.tag, round=operation.round, reason=reason)
            self._roster.send(name, short)

    def _plan(self, operation: Operation, giving: tuple[str, ...]) -> Plan:
        """The way that this attempt goes; told when it is another than the last time."""
        cuts = {*self.cuts, *topology.cannot_meet(rounds.members_of(giving, self._roster.identities()))}
        plan = self.routes.find(operation.spec, giving, cuts)
        kind = (operation.spec.algorithm, operation.spec.wire, operation.spec.elements.bit_length())
        told = planning.described(plan)
        if self._told.pop(kind, {}) != told:
            self._roster.emit("plan.changed", tag=operation.tag, **(told or {"pattern": "direct", "shares": "equal"}))
        if told:
            self._told[kind] = told
        return plan

    def _order(self, operation: Operation, plan: Plan, receivers: tuple[str, ...], weights: dict[str, float]) -> None:
        """Writes the orders for the attempt that begins."""
        spec, names = operation.spec, plan.names
        given = tuple(operation.proposals[name].spec.elements for name in names)
        offered = [operation.proposals[name].wires for name in names]
        fields, operation.segments = planning.orders(spec, plan, given, offered)
        multipliers, divisor = rounds.scalars(spec.op, (weights[name] for name in names), fields["dtype"])
        operation.start = Start(
            run=self._roster.run,
            generation=self._roster.generation,
            epoch=self._roster.epoch,
            tag=operation.tag,
            round=operation.round,
            attempt=operation.attempt,
            fragment=operation.fragment,
            base_version=operation.base_version,
            contributors=rounds.members_of(names, self._roster.identities()),
            receivers=rounds.members_of(receivers, self._roster.identities()),
            sequences=tuple(operation.proposals[name].sequence for name in (*names, *receivers)),
            chunk_bytes=self.routes.chunk_bytes(names, fields["wire"]),
            multipliers=multipliers,
            divisor=divisor,
            **fields,
        )
        operation.lives = {member.name: member.incarnation for member in operation.start.contributors}

    def _begin_of(self, operation: Operation) -> Message:
        giving = [operation.proposals.get(name) for name in operation.lives]
        digests = tuple(each.digest if each else "" for each in giving)
        begin: Begin = self._roster.stamp(
            Begin, start=operation.start, segments=operation.segments, digests=digests if any(digests) else ()
        )
        return begin

    def _emit_start(self, operation: Operation, names: tuple[str, ...]) -> None:
        if operation.outer:
            fields = {"tag": operation.tag, "round": operation.round, "attempt": operation.attempt}
            self._roster.emit("round.started", **fields, contributors=list(names))

    # --- attempts ---------------------------------------------------------------------------------------------------

    def done(self, name: str, message: DoneReport, now: float) -> None:
        """The peer holds the result of this attempt."""
        operation = self.operations.get(message.tag)
        if operation is None or not operation.is_current(message.round, message.attempt):
            self._tell_end(name, message)
            return
        if not self._roster.is_life(name, operation.lives.get(name)):
            return  # a receiver's success is its own
        operation.answered.add(name)
        if operation.phase is Phase.RUNNING:
            operation.done[name] = message.digest
            if len(operation.done) < len(operation.lives):
                return  # whoever is lost or silent meanwhile is found when that happens
        self.consider(operation, now)

    def _tell_end(self, name: str, message: DoneReport) -> None:
        """The attempt is over, and word of that did not arrive: who holds a result would wait for it."""
        for commit in self.commits.get(message.tag, ()):
            if commit.round == message.round:
                self._roster.send(name, self._renewed(commit))
                return
        reason = "the round went on without this peer"
        number = {"tag": message.tag, "round": message.round, "attempt": message.attempt}
        abort = self._roster.stamp(Abort, **number, reason=reason)
        self._roster.send(name, self._roster.stamp(Cancel, abort=abort))

    def failed(self, name: str, message: FailedReport, now: float) -> None:
        """The peer has ended this attempt without a result, which may be the answer to an abort."""
        operation = self.operations.get(message.tag)
        if operation is None or not operation.is_current(message.round, message.attempt):
            return
        if not self._roster.is_life(name, operation.lives.get(name)):
            return  # a receiver's trouble is its own
        operation.answered.add(name)
        operation.done.pop(name, None)
        if message.lost:
            operation.failures[name] = message.lost
        if operation.phase is Phase.RUNNING:
            self._abort(operation, message.reason or "a member failed", now)
        self.consider(operation, now)

    def withdrawn(self, name: str, message: Withdraw, now: float) -> None:
        """The peer no longer waits for what it has proposed."""
        operation = self.operations.get(message.tag)
        if operation is None:
            return
        if name in operation.late and operation.late[name].sequence <= message.sequence:
            del operation.late[name]
        proposal = operation.proposals.get(name)
        if proposal is None or proposal.sequence != message.sequence:
            return
        self._take_back(operation, name, now)

    def _take_back(self, operation: Operation, name: str, now: float) -> None:
        if operation.in_attempt(name):
            operation.withdrawn.add(name)
            operation.answered.add(name)
            operation.done.pop(name, None)
            if operation.phase is Phase.RUNNING:
                self._abort(operation, f"{name} no longer waits", now)
        self._withdraw(operation, name, now)

    def leave(self, name: str, tag: str, now: float) -> None:
        """The peer has left the loop of this tag."""
        operation = self.operations.get(tag)
        if operation is not None:
            self._withdraw(operation, name, now)

    def _withdraw(self, operation: Operation, name: str, now: float) -> None:
        self.take_out(operation, name)
        self.consider(operation, now)

    def take_out(self, operation: Operation, name: str) -> None:
        """The peer has left the view or the loop. What it contributed to a running attempt may still count (rule 8)."""
        operation.late.pop(name, None)
        if not operation.in_attempt(name):
            operation.proposals.pop(name, None)
        if not operation.proposals:
            self.operations.pop(operation.tag, None)

    def _consider_running(self, operation: Operation, now: float) -> None:
        contributors = operation.contributors()
        pending = [name for name in contributors if name not in operation.done]
        living = [name for name in contributors if self._roster.is_life(name, operation.lives.get(name))]
        if not living:
            self._fail(operation, "every contributor is gone")
        elif not [name for name in pending if name in living]:
            self._settle(operation, living, now)
        elif any(name not in living or self._roster.members[name].silent for name in pending):
            lost = [name for name in pending if name not in living or self._roster.members[name].silent]
            self._abort(operation, f"lost {', '.join(lost)}", now, lost=tuple(lost))
            self.consider(operation, now)
        elif now - operation.changed_at > self._timeouts.operation:
            self._abort(operation, f"no result within {self._timeouts.operation} s", now)

    def _settle(self, operation: Operation, living: list[str], now: float) -> None:
        digests = {operation.done[name] for name in living}
        if len(digests) == 1:
            self._decide(operation, digest=digests.pop(), contributors=operation.contributors(), now=now)
            return
        held = {name: operation.done[name] for name in living}
        self._roster.emit("parity.mismatch", tag=operation.tag, round=operation.round, digests=held)
        self._abort(operation, f"results differ: {held}", now)

    def _abort(self, operation: Operation, reason: str, now: float, lost: tuple[str, ...] = ()) -> None:
        assert operation.start is not None
        operation.phase, operation.changed_at = Phase.ABORTING, now
        if operation.done:
            operation.answered -= operation.done.keys()  # they hold a result that will not count: they must say so
        abort = Abort(
            run=self._roster.run,
            generation=self._roster.generation,
            epoch=operation.start.epoch,
            tag=operation.tag,
            round=operation.round,
            attempt=operation.attempt,
            reason=reason,
            lost=lost,
        )
        for name in _names(operation.start):
            if name not in operation.answered:
                self._roster.send(name, self._roster.stamp(Cancel, abort=abort))

    def _consider_retry(self, operation: Operation, now: float) -> None:
        """The next attempt begins once every member of the last has answered, or is known to be lost."""
        waited = now - operation.changed_at
        living = [name for name in operation.contributors() if self._roster.is_life(name, operation.lives.get(name))]
        silent = [name for name in living if name not in operation.answered]
        if any(not self._given_up(operation, name, living, waited) for name in silent):
            return
        for name in silent:
            if operation.refused(name):
                self._evict(name, "its listener is gone: connection refused", now)
        if self.operations.get(operation.tag) is operation and operation.phase is Phase.ABORTING:
            self._retry(operation, now)

    def _given_up(self, operation: Operation, name: str, living: list[str], waited: float) -> bool:
        if self._roster.members[name].silent or waited > self._timeouts.chunk:
            return True
        others = [other for other in living if other != name and other in operation.answered]
        reporters = operation.reported_lost(name)
        return operation.refused(name) or (len(others) >= 2 and reporters >= set(others))

    def _retry(self, operation: Operation, now: float) -> None:
        answered = {
            name for name, incarnation in operation.lives.items()
            if name in operation.answered - operation.withdrawn and self._roster.is_life(name, incarnation)
        }  # fmt: skip
        lost = [name for name in operation.contributors() if name not in answered]
        self._note_cuts(operation, answered, now)
        operation.lost.extend(lost)
        operation.withdrawn.clear()
        for name in lost:
            operation.proposals.pop(name, None)
        self._roster.emit("round.shrunk" if lost else "round.aborted", tag=operation.tag, round=operation.round,
                   attempt=operation.attempt, lost=lost, links=_links(operation))  # fmt: skip
        attempts = operation.attempt + 1 - operation.first_attempt
        if attempts >= self._policy.max_attempts:
            self._fail(operation, f"gave up after {attempts} attempts")
            return
        operation.phase, operation.opened_at = Phase.GATHERING, None
        present = {name for name in operation.proposals if not self._roster.members[name].silent}
        if not operation.proposals:
            self._fail(operation, "nobody is left")
        elif not self._too_few(operation, present):
            self._begin_attempt(operation, present, now)

    def go_on_without(self, culprits: Collection[str], reason: str, now: float) -> None:
        """Ends the attempts that stand still for these: a peer, or both ends of a link. What follows goes on without
        the peer, or around the link, as far as it is left out, spurned or avoided by now."""
        for operation in list(self.operations.values()):
            if operation.phase is Phase.RUNNING and all(operation.in_attempt(name) for name in culprits):
                self._abort(operation, reason, now)
                self.consider(operation, now)

    def _note_cuts(self, operation: Operation, alive: set[str], now: float) -> None:
        # both ends report the same break: it counts once
        for pair in {frozenset((who, f.peer)) for who, lost in operation.failures.items() for f in lost}:
            self._link_breaks[pair] = self._link_breaks.get(pair, 0) + 1
        for pair in rounds.lasting_cuts(operation.failures, alive, self._link_breaks):
            self._cut(pair, now)

    def broke(self, name: str, failure: LinkFailure, now: float) -> None:
        """A link of this member has failed, in an attempt or between them. If both ends say within `chunk` that nothing
        gets through, and neither was silent here meanwhile, their path is cut, though no attempt may need it now."""
        pair = frozenset((name, failure.peer))
        if failure.evidence not in ("timeout", "unreachable") or any(self._was_unheard(each, now) for each in pair):
            return
        told = self._told_cut.setdefault(pair, {})
        told[name] = now
        if len(told) == 2 and now - min(told.values()) <= self._timeouts.chunk:
            self._cut(pair, now)

    def unheard(self, name: str, now: float) -> None:
        """This member is silent, or was until now: what is cut may be all of its paths, and is no fault of one."""
        self._told_cut = {pair: told for pair, told in self._told_cut.items() if name not in pair}
        self._unheard[name] = now

    def _was_unheard(self, name: str, now: float) -> bool:
        return self._roster.members[name].silent or now - self._unheard.get(name, -math.inf) <= self._timeouts.chunk

    def _cut(self, pair: Pair, now: float) -> None:
        if pair not in self.cuts:
            self._roster.emit("link.cut", peers=sorted(pair))
        self.cuts[pair] = now + CUT_RETRY_SECONDS

    def _drop_old_cuts(self, now: float) -> None:
        self._unheard = {name: at for name, at in self._unheard.items() if now - at <= self._timeouts.chunk}
        for pair in [pair for pair, until in self.cuts.items() if until < now]:
            del self.cuts[pair]
            self._link_breaks.pop(pair, None)

    # --- the final word ---------------------------------------------------------------------------------------------

    def _decide(self, operation: Operation, *, digest: str, contributors: tuple[str, ...], now: float) -> None:
        """Commits. Durable first; then everybody concerned is told, and can ask again (rule 2)."""
        skipped = not contributors
        giving = [operation.proposals[name] for name in contributors if name in operation.proposals]
        training = self._training(operation, contributors)
        version = operation.base_version + (0 if skipped else 1) if operation.outer else -1
        merged = _merged(giving)
        record = Committed(
            tag=operation.tag,
            round=operation.round,
            attempt=max(operation.attempt, 0),
            fragment=operation.fragment,
            version=version,
            contributors=contributors,
            **merged,
            tokens=sum(proposal.counts for proposal in giving),
            scale=rounds.mean_length((each.weight, each.length) for each in giving),
            share=rounds.float32(len(contributors) / training),
            mass=rounds.float32(sum(each.weight for each in giving) / training),
            digest=digest,
            skipped=skipped,
            elapsed=self._progress().elapsed,
            covers=self._leasing.covers(contributors, merged["cursors"]) if operation.outer else (),
        )
        if operation.outer:
            self._roster.record(record)
            self._emit_commit(operation, record)
        else:
            self.note_commit(record)
        self._publish(operation, self.commits[operation.tag][-1])
        self._close(operation, now)

    def _training(self, operation: Operation, contributors: tuple[str, ...]) -> int:
        """How many train in the loop, contributors that have died since among them; at least 1. Twins are one."""
        training = {name for name, state in self._roster.members.items() if operation.tag in state.trains}
        return max(1, len(self._teams(operation, training | {*contributors})))

    def _publish(self, operation: Operation, commit: Commit) -> None:
        commit = self._renewed(commit)
        told = set(operation.proposals)
        if operation.outer:
            told |= {name for name, state in self._roster.members.items() if operation.tag in state.entered}
        for name in sorted(told):
            proposal = operation.proposals.get(name)
            if proposal is not None:
                self._decided[operation.tag, name] = (proposal.incarnation, proposal.sequence, commit)
            self._roster.send(name, commit)
        for pair in [pair for pair in self._link_breaks if pair not in self.cuts]:
            del self._link_breaks[pair]  # the round went through: what broke has been redialled

    def _emit_commit(self, operation: Operation, record: Committed) -> None:
        giving = {name: operation.proposals[name] for name in record.contributors if name in operation.proposals}
        self._roster.emit(
            "round.committed",
            tag=record.tag,
            round=record.round,
            attempt=record.attempt,
            contributors=list(record.contributors),
            tokens={name: int(proposal.counts) for name, proposal in giving.items()},
            cursors={name: proposal.cursors for name, proposal in giving.items()},
            version=record.version,
            digest=record.digest,
            skipped=record.skipped,
            **({"covers": list(record.covers)} if record.covers else {}),
        )

    def _fail(self, operation: Operation, reason: str) -> None:
        failed = self._roster.stamp(RoundFailed, tag=operation.tag, round=operation.round, reason=reason)
        for name, proposal in operation.proposals.items():
            self._decided[operation.tag, name] = (proposal.incarnation, proposal.sequence, failed)
            self._roster.send(name, failed)
        self._roster.emit("round.failed", tag=operation.tag, round=operation.round, reason=reason)
        if not operation.outer:
            self._rounds[operation.tag] = operation.round + 1
        self._close(operation, operation.changed_at)

    def _note_late(self, name: str, message: Propose) -> None:
        """The round that it was made for has begun, or is over."""
        self._too_late[message.tag, name] = self._too_late.get((message.tag, name), 0) + 1

    def _waited_for(self, operation: Operation, names: set[str]) -> None:
        """Whoever was waited for, in vain or not, is on time as far as anybody knows."""
        for name in names:
            if self._too_late.get((operation.tag, name), 0) >= TOO_LATE_ONCE_TOO_OFTEN or name in operation.proposals:
                self._too_late.pop((operation.tag, name), None)

    def _close(self, operation: Operation, now: float) -> None:
        if self.operations.get(operation.tag) is operation:
            del self.operations[operation.tag]
        for name, proposal in operation.late.items():
            if name in self._roster.members:
                self.propose(name, proposal, now)

    # --- for the outer loops: OpenRounds ----------------------------------------------------------------------------

    def disqualify(self, name: str, tag: str, fragment: int, now: float) -> None:
        operation = self.operations.get(tag)
        if operation is None or operation.fragment != fragment:
            return
        if operation.in_attempt(name):
            operation.withdrawn.add(name)
            if operation.phase is Phase.RUNNING:
                self._abort(operation, f"{name} does not hold what the run holds", now)
        self._withdraw(operation, name, now)

    def reconsider(self, tag: str, now: float) -> None:
        if tag in self.operations:
            self.consider(self.operations[tag], now)

    def discard(self, tag: str) -> None:
        self.operations.pop(tag, None)

    def result_for(self, tag: str, fragment: int, version: int) -> Commit | None:
        for commit in self.commits.get(tag, ()):
            if (commit.fragment, commit.version) == (fragment, version) and not commit.skipped:
                return self._renewed(commit)
        return None

    # --- what is kept of it -----------------------------------------------------------------------------------------

    def learn_commits(self, notes: tuple[CommitNote, ...]) -> None:
        """After a restart: plain operations that a peer saw committed are committed (rule 2)."""
        for note in notes:
            known = any(commit.round == note.round for commit in self.commits.get(note.tag, ()))
            operation = self.operations.get(note.tag)
            begun = operation is not None and operation.phase is not Phase.GATHERING  # too late: it is decided here
            if known or begun or note.tag in self._outer.loops or note.round < self._rounds.get(note.tag, 0):
                continue
            self.note_commit(
                Committed(
                    tag=note.tag,
                    round=note.round,
                    attempt=note.attempt,
                    fragment=0,
                    version=-1,
                    contributors=note.contributors,
                    cursors={},
                    tokens=0.0,
                    digest=note.digest,
                )
            )
            self._resolve_doubts(note)

    def _resolve_doubts(self, note: CommitNote) -> None:
        operation = self.operations.get(note.tag)
        if operation is None or operation.phase is not Phase.GATHERING:
            return
        for name, proposal in list(operation.proposals.items()):
            if proposal.round == note.round:
                del operation.proposals[name]
                self._roster.send(name, self._renewed(self.commits[note.tag][-1]))
        operation.round = max(operation.round, note.round + 1)
        if not operation.proposals:
            del self.operations[note.tag]

    def note_commit(self, record: Committed, state: bytes = b"") -> None:
        """Remembers what is final. state: the run state as of then, which goes with a commit of an outer loop."""
        base = record.version - (not record.skipped)
        loop = self._outer.loops.get(record.tag) if record.version >= 0 else None
        commit = self._roster.stamp(
            Commit,
            tag=record.tag,
            round=record.round,
            attempt=record.attempt,
            fragment=record.fragment,
            version=record.version,
            contributors=record.contributors,
            sources=rounds.members_of(record.contributors, self._roster.identities()),
            digest=record.digest,
            skipped=record.skipped,
            progress=self._progress(),
            base_hash=loop.hashes.get((record.fragment, base), "") if loop else "",
            state=state,
            scale=record.scale,
            share=record.share,
            mass=record.mass,
            covers=record.covers,
        )
        self.commits.setdefault(record.tag, deque(maxlen=KEPT_COMMITS)).append(commit)
        self._rounds[record.tag] = max(self._rounds.get(record.tag, 0), record.round + 1)

    def add_state(self, state: bytes) -> None:
        """After a replay: the newest commit of each loop carries the run state again."""
        for tag in self._outer.loops.keys() & self.commits.keys():
            self.commits[tag][-1] = replace(self.commits[tag][-1], state=state)

    def restart(self, tags: Iterable[str]) -> None:
        """These loops have gone back to a checkpoint: what was decided and under way is void, round numbers are not."""
        for tag in tags:
            self.commits.pop(tag, None)
            self.operations.pop(tag, None)
            self._rounds[tag] = self._outer.loops[tag].rounds
        self._decided = {key: value for key, value in self._decided.items() if key[0] not in self._outer.loops}

    def _renewed(self, commit: Commit) -> Commit:
        """The commit as of now: this generation's stamp, and who can still give its result to others."""
        sources = {member.incarnation for member in commit.sources}
        holders = [
            name
            for name, state in self._roster.members.items()
            if not state.silent and (state.member.incarnation in sources or self._has_applied(state, commit))
        ]
        return replace(
            commit,
            generation=self._roster.generation,
            epoch=self._roster.epoch,
            progress=self._progress(),
            sources=rounds.members_of(holders, self._roster.identities()),
        )

    def _has_applied(self, state: MemberState, commit: Commit) -> bool:
        version, _ = state.held.get((commit.tag, commit.fragment), (-1, ""))
        return 0 <= commit.version <= version < commit.version + KEPT_COMMITS


def _names(start: Start) -> tuple[str, ...]:
    return tuple(member.name for member in (*start.contributors, *start.receivers))


def _merged(proposals: list[Propose]) -> dict[str, dict[int, int]]:
    """The cursors of all, and starts such that the difference is what they claim together: so that the audit sees it
    if two claim the same."""
    cursors: dict[int, int] = {}
    claimed: dict[int, int] = {}
    for proposal in proposals:
        for shard, stop in proposal.cursors.items():
            cursors[shard] = max(stop, cursors.get(shard, stop))
            if shard in proposal.starts:
                claimed[shard] = claimed.get(shard, 0) + stop - proposal.starts[shard]
    return {"cursors": cursors, "starts": {shard: cursors[shard] - count for shard, count in claimed.items()}}


def _links(operation: Operation) -> list[str]:
    return [
        f"{who}->{failure.peer}: {failure.evidence}" + (f" ({failure.detail})" if failure.detail else "")
        for who, lost in sorted(operation.failures.items())
        for failure in lost
    ]

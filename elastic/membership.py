"""Who is in, what is durable, and how far the run is: the face of the coordinator's state machine.

A pure state machine. `receive` and `tick` take a message or the time and return effects; nothing here opens a socket,
reads a clock or starts a thread, so that thousands of random schedules run in a second. Durable state changes only
through journal records (`Roster.record`): replaying them gives the same state in the next generation.

Only here peers are admitted and evicted. The rest lies with the parts, each of which touches its own state alone:
`loops` (which state an outer loop stands at), `leases` (who may read which shard), `deciding` (what becomes of
proposals), `watching` (what is wrong with whom), `isolation` (what follows from that), `leaving` (who is asked to);
all speak through the `roster`.

The rules are those of docs/design.md, "Rules of a round"; numbers in comments refer to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from collectives.records import LinkFailure
from fault.verdicts import HANG, STALLED

from .audit import Account, summary
from .config import TARGETS, RunPolicy, Timeouts
from .deciding import Rounds
from .isolation import AVOID, END, EVICT, LEAVE_OUT, QUARANTINE, SPARE, Isolation, Measure
from .journal import (
    Admitted,
    Barred,
    Committed,
    DatasetRegistered,
    Departed,
    Halted,
    Leased,
    LoopFounded,
    Opened,
    Paired,
    Reached,
    Record,
    Released,
    Restored,
    StreamEnded,
    Targeted,
)
from .leases import Leasing
from .leaving import Leaving
from .loops import OuterLoops
from .messages import (
    PROTOCOL,
    SUPERSEDED,
    Applied,
    AuditReport,
    AuditRequest,
    BarredReport,
    DoneReport,
    Enter,
    Exit,
    Expelled,
    FailedReport,
    GivenUp,
    Gone,
    Heartbeat,
    Join,
    LeaseRequest,
    Leave,
    LeaveRequest,
    LinkLost,
    MemberReport,
    Message,
    Pong,
    Propose,
    Recomputed,
    Represent,
    RunProgress,
    SelfTest,
    SetTarget,
    SiteReport,
    StatusReport,
    StatusRequest,
    View,
    Welcome,
    Withdraw,
    Witnessed,
)
from .roster import Effect, MemberState, Roster
from .runstate import RunState
from .shards import ShardTable
from .vacancies import Vacancies
from .watching import Watching, told, why

_EVENTS = {
    AVOID: ("link.avoided", "link.trusted"),
    LEAVE_OUT: ("peer.left_out", "peer.taken_back"),
    QUARANTINE: ("peer.quarantined", ""),
    EVICT: ("peer.banned", ""),
    SPARE: ("peer.spared", ""),
    END: ("peer.stuck", ""),
}
"""How each measure is told of: when it begins, and when it is over."""


class Membership:
    """One run, as its coordinator knows it.

    generation grows with each life of the coordinator, epoch with each change of the view. All times are seconds of
    the caller's clock, passed in; they decide only how long to wait, never what is true.
    """

    rounds: Rounds

    def __init__(self, run: str, policy: RunPolicy, timeouts: Timeouts) -> None:
        self._policy, self._timeouts = policy, timeouts
        self._roster = Roster(run, self._apply)
        self._leasing = Leasing(self._roster, timeouts, lambda: self.rounds.proposals(), policy.redundancy)
        self.outer = OuterLoops(self._roster, timeouts, run=self)
        self.rounds = self.outer.rounds = Rounds(
            self._roster,
            policy,
            timeouts,
            outer=self.outer,
            leasing=self._leasing,
            progress=lambda: self.progress,
            evict=self._end_proven,
        )
        self.watching = Watching(self._roster, timeouts)
        self.isolation = Isolation(policy.faults, policy.min_peers, timeouts.evict_after)
        self._vacancies = Vacancies(self._roster, timeouts, release=self._leasing.release)
        self._leaving = Leaving(self._roster, self._vacancies)
        self.members, self.loops, self.operations = self._roster.members, self.outer.loops, self.rounds.operations
        self.lives: dict[str, int] = {}
        self.latest: dict[str, int] = {}
        self.retired: dict[int, str] = {}
        self.account = Account()
        self.tokens = self.elapsed = 0.0
        self.serial = 0
        self.targets: dict[str, float] = {name: getattr(policy, name) for name in TARGETS}
        self.reached = ""
        self.last_contributors: tuple[str, ...] = ()
        self._live = False
        self._last_tick: float | None = None
        self._now = 0.0

    @property
    def generation(self) -> int:
        return self._roster.generation

    @property
    def epoch(self) -> int:
        return self._roster.epoch

    @property
    def table(self) -> ShardTable | None:
        return self._leasing.table

    # --- life of the coordinator ------------------------------------------------------------------------------------

    def begin(self, records: Iterable[Record], now: float) -> list[Effect]:
        """Replays a journal and opens the next generation. Everybody known gets a full deadline (rule 3)."""
        self._now = now
        for record in records:
            self._apply(record)
        self._live = True
        self.isolation.begin(now)
        self._roster.record(Opened(generation=self.generation + 1))
        self.rounds.add_state(self.state().to_bytes())
        for member in self.members.values():
            member.last_heard = now
        self._last_tick = now
        self._roster.returning = dict.fromkeys(self.members, math.inf)
        for name in self.members:  # who came by without a place among twins: the policy may be new
            self._leasing.admitted(name)
        self._leasing.find_orphans(now)
        self._roster.emit("coordinator.started", generation=self.generation, members=len(self.members))
        return self._roster.take()

    def receive(self, name: str, message: Message, now: float) -> list[Effect]:
        """One message from the peer that presented itself as `name`. What is stale changes nothing (rule 1)."""
        self._now = now
        if message.run != self._roster.run:
            reason = f"this coordinator serves run {self._roster.run!r}"
            self._roster.refuse(name, message, "ConfigurationError", reason)
        elif isinstance(message, Join):
            self._join(name, message, now)
        elif isinstance(message, StatusRequest):
            self._roster.send_to(name, message.incarnation, self.status(now))
        elif isinstance(message, AuditRequest):
            self._roster.send_to(name, message.incarnation, self.audit())
        elif isinstance(message, LeaveRequest):
            self._leaving.ask(name, message)
        elif isinstance(message, Gone):
            self._gone(message, now)
        elif isinstance(message, SiteReport):
            self._site_report(name, message, now)
        elif isinstance(message, Witnessed):
            if self._roster.is_life(message.name, message.watched):
                self.watching.witnessed(message, now)
        elif self._is_current(name, message):
            self._heard(name, now)
            self._dispatch(name, message, now)
        return self._roster.take()

    def tick(self, now: float) -> list[Effect]:
        """Time passes: finds silence, opens rounds whose grace is over, gives up what takes too long."""
        self._now = now
        self._renew_after_gap(now)
        for name, state in list(self.members.items()):
            self._watch(name, state, now)
        self.outer.judge_all(now)
        self.rounds.tick(now)
        self._leasing.tick(now)
        self._vacancies.tick(now)
        self.watching.tick(self.rounds.cuts, now)
        self._isolate(now)
        self.rounds.routes.refresh(now, judging=self.watching.judging)
        self._roster.returning = {name: until for name, until in self._roster.returning.items() if now <= until}
        return self._roster.take()

    def _renew_after_gap(self, now: float) -> None:
        # rule 3: a coordinator that was frozen itself must not blame others for its own silence
        last, self._last_tick = self._last_tick, now
        self._grow_older(0.0 if last is None else now - last)
        if last is None or now - last <= self._timeouts.heartbeat:
            return
        for state in self.members.values():
            state.last_heard = now
        for part in (self.rounds, self._leasing, self.outer, self._vacancies):
            part.postpone(now - last)

    # --- members ----------------------------------------------------------------------------------------------------

    def _is_current(self, name: str, message: Message) -> bool:
        state = self.members.get(name)
        if message.incarnation in self.retired:
            self._expel(name, message.incarnation)
            return False
        known = state is not None and state.member.incarnation == message.incarnation
        if not known or message.generation != self.generation:
            self._roster.send_to(name, message.incarnation, self._roster.stamp(Represent))
            return False
        return True

    def _join(self, name: str, message: Join, now: float) -> None:
        incarnation = message.member.incarnation
        if message.protocol != PROTOCOL:
            reason = f"the coordinator speaks protocol {PROTOCOL}, peer {name} speaks {message.protocol}"
            self._roster.refuse(name, message, "VersionMismatch", reason)
            return
        if (message.member.name, incarnation) != (name, message.incarnation):
            self._roster.refuse(name, message, "ConfigurationError", f"peer {name} presents itself as {message.member}")
            return
        if incarnation in self.retired:
            self._expel(name, incarnation)
            return
        state = self.members.get(name)
        if state is None and not self._may_come(name, message, now):
            return
        if state is not None and state.member.incarnation != incarnation:
            if message.generation:  # a successor follows nobody yet: an old life, known to a journal that is lost
                return
            self._depart(name, SUPERSEDED, now)
            state = None
        if state is None:
            self._admit(message, now)
        elif name in self._roster.returning:  # what it holds and proposes is about to follow
            self._roster.returning[name] = min(self._roster.returning[name], now + self._timeouts.chunk)
        self._heard(name, now)
        self.rounds.learn_commits(message.commits)
        self._welcome(name)

    def _admit(self, message: Join, now: float) -> None:
        member = message.member
        life = self.lives.get(member.name, 0) + 1
        self._roster.record(Admitted(member=member, site=message.site, life=life))
        self.members[member.name].last_heard = self.members[member.name].since = now
        self._leasing.admitted(member.name)
        self.isolation.admitted(member.name, now)
        self._vacancies.admitted(member.name, message.site)
        view = self._roster.stamp(View, added=(member,), reason="joined")
        self._roster.broadcast(view, but=member.name)
        self._roster.emit("peer.joined", peer=member.name, incarnation=member.incarnation, life=life, epoch=self.epoch)

    def _welcome(self, name: str) -> None:
        members = tuple(state.member for state in self.members.values())
        life = self.members[name].life
        self._roster.send(name, self._roster.stamp(Welcome, life=life, members=members, progress=self.progress))

    def _depart(
        self, name: str, reason: str, now: float, *, event: str = "peer.evicted", release: bool = False
    ) -> None:
        """release: its shards go to others at once, instead of waiting for its next life."""
        state = self.members.get(name)
        if state is None:
            return
        self._roster.returning.pop(name, None)
        self.rounds.routes.forget(name)
        self.rounds.unheard(name, now)
        self.watching.forget(name)
        if event == "peer.evicted":
            self.watching.ended(name, now - state.since, now)
        self._roster.record(Departed(name=name, incarnation=state.member.incarnation, reason=reason))
        self._expel(name, state.member.incarnation)
        self._roster.broadcast(self._roster.stamp(View, removed=(name,), reason=reason))
        self._roster.emit(event, peer=name, evidence=reason, epoch=self.epoch)
        if release:
            self._leasing.release(name)
        else:
            self._leasing.departed(name, now)
        self.outer.forget(name)
        operations = list(self.rounds.operations.values())
        for operation in operations:
            self.rounds.take_out(operation, name)
        self.outer.judge_all(now)  # with one side gone, a dispute can be over
        for operation in operations:  # one of them may find that others are gone too: all must know of this one first
            self.rounds.consider(operation, now)

    def _expel(self, name: str, incarnation: int) -> None:
        expelled = self._roster.stamp(
            Expelled, reason=self.retired[incarnation], retry_after=self.isolation.barred(name, self._now)
        )
        self._roster.send_to(name, incarnation, expelled)

    def _end_proven(self, name: str, evidence: str, now: float) -> None:
        """There is proof that its process is gone."""
        if name in self.members:
            self.watching.crashed(name, now)
            self._depart(name, evidence, now)

    def _gone(self, message: Gone, now: float) -> None:
        state = self.members.get(message.name)
        if state is not None and state.member.incarnation == message.ended:
            self._end_proven(message.name, message.evidence, now)

    def _site_report(self, supervisor: str, report: SiteReport, now: float) -> None:
        for gone in report.given_up:
            self._given_up(gone, report, now)
        self._vacancies.hear(supervisor, report, now)
        self._leaving.reported(supervisor, report.incarnation)
        self._roster.send_to(supervisor, report.incarnation, self._roster.stamp(Pong, progress=self.progress))

    def _given_up(self, gone: GivenUp, report: SiteReport, now: float) -> None:
        if self.latest.get(gone.name, 0) == gone.ended:  # else another life of this name has joined since
            self._end_proven(gone.name, gone.reason, now)
            self._vacancies.open(gone, report, now, wanted=not self.progress.finished)

    def _link_lost(self, name: str, failure: LinkFailure, now: float) -> None:
        """Rule 3: a refused reconnection is proof. Whatever else broke is for the next attempt to find out."""
        state = self.members.get(failure.peer)
        if state is None or state.member.incarnation != failure.incarnation:
            return
        self._roster.emit("link.lost", peer=name, other=failure.peer, evidence=failure.evidence, detail=failure.detail)
        self.watching.failed(name, [failure], now)
        self.rounds.broke(name, failure, now)
        if failure.evidence == "refused":
            self._end_proven(failure.peer, "its listener is gone: connection refused", now)

    def _heard(self, name: str, now: float) -> None:
        state = self.members[name]
        state.last_heard = now
        if state.silent:
            state.silent = False
            self.rounds.unheard(name, now)
            self._roster.emit("peer.recovered", peer=name)
            self.watching.back(name, now)

    def _watch(self, name: str, state: MemberState, now: float) -> None:
        silence = now - state.last_heard
        if silence > self._timeouts.evict_after:
            self._depart(name, f"silent for {silence:.0f} s", now)
        elif silence > self._timeouts.chunk and not state.silent:
            # rule 3: silence costs the round, not the membership
            state.silent = True
            self._roster.emit("peer.suspected", peer=name, silence_seconds=round(silence, 3))
            self.rounds.unheard(name, now)
            self.watching.silent(name, silence, now)

    # --- what follows from verdicts -----------------------------------------------------------------------------------

    def _isolate(self, now: float) -> None:
        stuck: list[Measure] = []
        for measure in self.isolation.decide(self.watching.verdicts, self._roster.awake(), now):
            self._tell_of(measure, now)
            if measure.action == END:
                self._depart(measure.culprits[0], f"{measure.verdict.kind} for too long", now, event="peer.ended")
            elif measure.seconds:
                self._bar(measure, now)
            elif measure.begins and measure.verdict.kind in (STALLED, HANG) and "links" in measure.verdict.evidence:
                stuck.append(measure)
        self.rounds.left_out = self.isolation.left_out.keys()
        self.rounds.spurned = spurned = self.isolation.spurned
        self.rounds.stuck = [name for name, verdict in spurned.items() if verdict.kind == STALLED]
        self.rounds.routes.avoid(self.isolation.avoided)
        for measure in stuck:
            self.rounds.go_on_without(measure.culprits, why(measure.verdict), now)
        for name in self.isolation.trusted(now):
            self._roster.emit("peer.trusted", peer=name)

    def _bar(self, measure: Measure, now: float) -> None:
        (name,) = measure.culprits
        reason = why(measure.verdict)
        strikes = self.isolation.strikes(name) + 1
        seconds = 0.0 if measure.action == EVICT else measure.seconds
        self._roster.record(Barred(name=name, seconds=seconds, strikes=strikes, reason=reason))
        self.isolation.bar(name, now)
        self.watching.dealt_with(name)
        self._depart(name, reason, now, event="peer.removed", release=True)

    def _tell_of(self, measure: Measure, now: float) -> None:
        """Each step with its reason."""
        began, ended = _EVENTS[measure.action]
        fields = told(measure.verdict, now) | {"reason": why(measure.verdict)}
        extra = {"seconds": measure.seconds} if 0 < measure.seconds < math.inf else {}
        self._roster.emit(began if measure.begins else ended, **fields, **extra)

    def _may_come(self, name: str, message: Join, now: float) -> bool:
        """Whether it is in no quarantine, or has served it and is well."""
        if message.tested and message.flaw and self.isolation.must_test(name) and not self.isolation.barred(name, now):
            self._roster.emit("peer.unfit", peer=name, flaw=message.flaw)
            self._roster.record(self.isolation.again(name, f"its self-test found: {message.flaw}"))
            self.isolation.bar(name, now)
        seconds = self.isolation.barred(name, now)
        if seconds:
            self._refuse_barred(name, message, seconds)
        elif self.isolation.must_test(name) and not message.tested:
            self._roster.send_to(name, message.incarnation, self._roster.stamp(SelfTest))
        else:
            return True
        return False

    def _refuse_barred(self, name: str, message: Join, seconds: float) -> None:
        wait = "for good: come under another name" if math.isinf(seconds) else f"for {seconds:.0f} s yet"
        reason = f"peer {name} is barred {wait} ({self.isolation.reason(name)})"
        self._roster.refuse(name, message, "Quarantined", reason, retry_after=seconds)

    # --- messages of members ----------------------------------------------------------------------------------------

    def _dispatch(self, name: str, message: Message, now: float) -> None:
        match message:
            case Heartbeat():
                self.members[name].status = message.status
                self._compare_loss(name, message.status.held_out_loss)
                self.rounds.routes.learn(name, message.status.links, self.members)
                self.watching.heard(name, message, now)
                self._roster.send(name, self._roster.stamp(Pong, progress=self.progress))
                self._leaving.heard(name)
            case Propose():
                self.rounds.propose(name, message, now)
            case DoneReport():
                self.rounds.done(name, message, now)
            case FailedReport():
                self.watching.failed(name, message.lost, now)
                self.rounds.failed(name, message, now)
            case Withdraw():
                self.rounds.withdrawn(name, message, now)
            case LinkLost():
                self._link_lost(name, message.failure, now)
            case Enter():
                if self._suits_twins(name, message):
                    self.outer.enter(name, message, now)
                self._leasing.find_orphans(now)  # a checkpoint brings its own leases
            case Applied():
                if self.outer.applied(name, message, now):
                    self._tell_if_over()
            case Recomputed():
                self.outer.recomputed(name, message, now)
            case SetTarget():
                self._set_target(name, message)
            case Exit():
                self.outer.exit(name, message.tag)
                self.rounds.leave(name, message.tag, now)
            case LeaseRequest():
                self._leasing.lease(name, message)
            case Leave():
                self._depart(name, message.reason, now, event="peer.left", release=True)

    def _suits_twins(self, name: str, message: Enter) -> bool:
        """Twins stand in for one another in all that their samples have taught them: that is one loop's round."""
        if self._policy.redundancy == 1 or (message.spec.fragments == 1 and self.loops.keys() <= {message.tag}):
            return True
        reason = f"{message.tag}: this run has redundancy {self._policy.redundancy}, for which a peer may be in one"
        reason += " outer loop, of one fragment: use fragments=1 and one tag, or a coordinator without --redundancy"
        self._roster.refuse(name, message, "ConfigurationError", reason, tag=message.tag)
        return False

    def _tell_if_over(self) -> None:
        progress = self.progress
        if progress.finished and not progress.behind:
            self._roster.broadcast(self._roster.stamp(Pong, progress=progress))  # the holders need not stay any longer

    # --- durable state: the fold over the journal -------------------------------------------------------------------

    def _apply(self, record: Record) -> None:
        self.account.take(record)
        match record:
            case Opened():
                self._roster.generation = record.generation
            case Admitted():
                self._apply_admitted(record)
            case Departed():
                self.members.pop(record.name, None)
                self.retired[record.incarnation] = record.reason
                self._roster.epoch += 1
            case DatasetRegistered() | StreamEnded() | Leased() | Released() | Paired():
                self._leasing.apply(record)
            case LoopFounded():
                self.outer.apply_founded(record)
            case Committed():
                self._apply_committed(record)
            case Halted():
                self.outer.apply_halted(record)
            case Restored():
                self._apply_restored(record)
            case Targeted():
                self.targets = {name: getattr(record, name) for name in TARGETS}
            case Reached():
                self.reached = record.target
            case Barred():
                self.isolation.apply(record)

    def _apply_admitted(self, record: Admitted) -> None:
        name = record.member.name
        self.members[name] = MemberState(record.member, record.site, record.life, last_heard=0.0)
        self.isolation.apply_admitted(name)
        self.lives[name], self.latest[name] = record.life, record.member.incarnation
        self._roster.epoch += 1

    def _apply_committed(self, record: Committed) -> None:
        self.outer.apply_committed(record)
        self._leasing.apply_committed(record.cursors)
        self.tokens += record.tokens
        self.elapsed = max(self.elapsed, record.elapsed)
        self.serial += 1
        self.last_contributors = record.contributors
        self.rounds.note_commit(record, self.state().to_bytes() if self._live else b"")

    def _apply_restored(self, record: Restored) -> None:
        state = record.state
        self._roster.generation = max(self.generation, record.generation)
        self._roster.epoch = max(self.epoch, state.epoch)
        self.serial = max(self.serial, state.serial) + 1
        self.tokens, self.elapsed = state.tokens, max(self.elapsed, state.elapsed)
        self._leasing.apply_restored(state.data, state.teams)
        self.outer.apply_restored(state.loops)
        self.rounds.restart(loop.tag for loop in state.loops)

    def state(self) -> RunState:
        """The small run state, as of now."""
        data = {"data": self.table.state()} if self.table else {}
        return RunState(
            run=self._roster.run,
            generation=self.generation,
            epoch=self.epoch,
            serial=self.serial,
            tokens=self.tokens,
            elapsed=self.elapsed,
            loops=self.outer.states(),
            teams=dict(sorted(self._leasing.twins.teams.items())),
            **data,
        )

    # --- how far the run is -----------------------------------------------------------------------------------------

    @property
    def progress(self) -> RunProgress:
        done = sum(loop.rounds for loop in self.loops.values())
        enough_rounds = 0 < self.targets["rounds"] <= done
        enough_tokens = 0 < self.targets["tokens"] <= self.tokens
        spent = self.table is not None and self.table.spent  # rule 11
        finished = enough_rounds or enough_tokens or bool(self.reached) or spent
        behind = self.outer.behind() if finished else 0
        return RunProgress(
            rounds=done,
            tokens=int(self.tokens),
            finished=finished,
            behind=behind,
            targets=dict(self.targets),
            elapsed=self.elapsed,
            fastest=max((m.status.steps_per_second for m in self.members.values() if not m.silent), default=0.0),
        )

    def _grow_older(self, seconds: float) -> None:
        """The time of a run counts while a coordinator serves it and there is something to train."""
        self.elapsed += seconds if self.loops else 0.0
        if 0 < self.targets["seconds"] <= self.elapsed:
            self._reach(f"{self.targets['seconds']:g} s")

    def _compare_loss(self, name: str, loss: float) -> None:
        if loss <= self.targets["loss"] and self.targets["loss"] > 0:
            self._reach(f"held-out loss {loss:g} on {name}")

    def _reach(self, target: str) -> None:
        if not self.reached:
            self._roster.record(Reached(target=target))
            self._roster.emit("run.target_reached", target=target)

    def _set_target(self, name: str, message: SetTarget) -> None:
        wanted: dict[str, Any] = {each: getattr(message, each) or self.targets[each] for each in TARGETS}
        if wanted != self.targets and all(value >= 0 for value in wanted.values()):
            self._roster.record(Targeted(**wanted))
            self._roster.emit("run.target_set", peer=name, **wanted)

    def status(self, now: float) -> StatusReport:
        reports = tuple(self._report(name, state, now) for name, state in sorted(self.members.items()))
        samples = self.table.committed if self.table else 0
        report: StatusReport = self._roster.stamp(
            StatusReport,
            members=reports,
            progress=self.progress,
            contributors=self.last_contributors,
            samples=samples,
            verdicts=self.watching.reports(now),
            barred=tuple(self._barred_report(*each) for each in sorted(self.isolation.in_quarantine(now).items())),
            protocol=PROTOCOL,
        )
        return report

    def _barred_report(self, name: str, seconds: float) -> BarredReport:
        seconds = -1.0 if math.isinf(seconds) else seconds
        strikes, reason = self.isolation.strikes(name), self.isolation.reason(name)
        return BarredReport(name=name, seconds=seconds, strikes=strikes, reason=reason)

    def audit(self) -> AuditReport:
        """The account of the data, as of now."""
        return summary(self._roster.run, self.account.report(), generation=self.generation, epoch=self.epoch)

    def _report(self, name: str, state: MemberState, now: float) -> MemberReport:
        version, state_hash = max(state.held.values(), default=(-1, ""))
        return MemberReport(
            name=name,
            site=state.site,
            life=state.life,
            state=self._state_of(name, state),
            version=version,
            state_hash=state_hash,
            silence=now - state.last_heard,
            status=state.status,
            repaired=state.repaired,
        )

    def _state_of(self, name: str, state: MemberState) -> str:
        if state.silent:
            return "suspect"
        if name in self.isolation.left_out:
            return "left out"
        return "probation" if self.isolation.on_probation(name) else "active" if state.trains else "joining"

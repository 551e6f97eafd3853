"""Who is in, what is committed, where the data stands: the one place that admits, evicts and commits.

A pure state machine. `receive` and `tick` take a message or the time and return effects; nothing here opens a socket,
reads a clock or starts a thread, so that thousands of random schedules run in a second. Durable state changes only
through journal records (`_record`): replaying them gives the same state in the next generation.

The rules are those of docs/design.md, "Rules of a round"; numbers in comments refer to them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from collectives import topology
from collectives.records import Abort, LinkFailure, Member, Start
from collectives.topology import Plan

from . import planning, rounds
from .audit import Account, summary
from .config import TARGETS, RunPolicy, Timeouts
from .errors import CheckpointMismatch
from .journal import (
    Admitted,
    Committed,
    DatasetRegistered,
    Departed,
    Leased,
    LoopFounded,
    Opened,
    Reached,
    Record,
    Released,
    Restored,
    StreamEnded,
    Targeted,
)
from .messages import (
    PROTOCOL,
    STREAM,
    Applied,
    AuditReport,
    AuditRequest,
    Base,
    Begin,
    Cancel,
    Commit,
    CommitNote,
    DoneReport,
    Enter,
    Exit,
    Expelled,
    FailedReport,
    Gone,
    Heartbeat,
    Join,
    LeaseRequest,
    Leases,
    Leave,
    LinkLost,
    MemberReport,
    Message,
    Open,
    OperationSpec,
    PeerStatus,
    Pong,
    Propose,
    Recompute,
    Recomputed,
    Refused,
    Represent,
    RoundFailed,
    RunProgress,
    SetTarget,
    StatusReport,
    StatusRequest,
    View,
    Welcome,
    Withdraw,
)
from .parity import Claims
from .planning import Routes
from .rounds import Operation, Pair, Phase
from .runstate import LINEAGE, LoopState, RunState, above
from .shards import ShardTable

KEPT_COMMITS = 8
MAX_WEIGHT = 1e15  # sums of it stay finite, and nearly exact
MAX_ELEMENTS = 1 << 48  # sums of it stay within a message's integers
CUT_RETRY_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver `message` to this life of this peer, if it is connected."""

    name: str
    incarnation: int
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the record durable before any Send that follows."""

    record: Record


@dataclass(frozen=True, slots=True)
class Emit:
    """Write an event."""

    event: str
    fields: dict[str, Any]


Effect = Send | Persist | Emit


@dataclass
class MemberState:
    """A member and what is known of it now. Only member, site and life are durable.

    repaired: how often it held other bits than the run, and had to fetch the state anew. wrong: those bits, until it
    has said what it holds instead: messages that still speak of them are on their way.
    """

    member: Member
    site: str
    life: int
    last_heard: float
    silent: bool = False
    status: PeerStatus = field(default_factory=PeerStatus)
    held: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    trains: set[str] = field(default_factory=set)
    exited: set[str] = field(default_factory=set)
    repaired: int = 0
    wrong: dict[tuple[str, int], str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a peer that enters has from a checkpoint."""

    name: str
    incarnation: int
    version: int
    state_hash: str
    state: RunState


@dataclass
class Loop:
    """An outer loop: its contract and how far each fragment is (durable), and what is open about its state.

    digests: of the results that led to the latest versions. claims: of what the newest ones are.
    founders: lives that were told to begin with what they have. halted: why the loop cannot go on.
    """

    spec: OperationSpec
    versions: dict[int, int] = field(default_factory=dict)
    hashes: dict[tuple[int, int], str] = field(default_factory=dict)
    digests: dict[tuple[int, int], str] = field(default_factory=dict)
    rounds: int = 0
    founders: set[int] = field(default_factory=set)
    claims: dict[int, Claims] = field(default_factory=dict)
    halted: str = ""


class Membership:
    """One run, as its coordinator knows it.

    generation grows with each life of the coordinator, epoch with each change of the view. All times are seconds of
    the caller's clock, passed in; they decide only how long to wait, never what is true.
    """

    def __init__(self, run: str, policy: RunPolicy, timeouts: Timeouts) -> None:
        self.run, self.policy, self.timeouts = run, policy, timeouts
        self.generation = 0
        self.epoch = 0
        self.members: dict[str, MemberState] = {}
        self.lives: dict[str, int] = {}
        self.retired: dict[int, str] = {}
        self.loops: dict[str, Loop] = {}
        self.table: ShardTable | None = None
        self.account = Account()
        self.tokens = self.elapsed = 0.0
        self.serial = 0
        self.targets: dict[str, float] = {name: getattr(policy, name) for name in TARGETS}
        self.reached = ""
        self.operations: dict[str, Operation] = {}
        self.commits: dict[str, deque[Commit]] = {}
        self.last_contributors: tuple[str, ...] = ()
        self.cuts: dict[Pair, float] = {}
        self.routes = Routes()
        self._told: dict[tuple[str, str, int], dict[str, Any]] = {}
        self._link_breaks: dict[Pair, int] = {}
        self._rounds: dict[str, int] = {}
        self._attempts: dict[str, tuple[int, int]] = {}
        self._decided: dict[tuple[str, str], tuple[int, int, Message]] = {}
        self._absent: dict[str, set[str]] = {}
        self._orphaned: dict[str, float] = {}
        self._vacant: dict[str, float] = {}
        self._entering: dict[str, set[str]] = {}
        self._offers: dict[str, dict[str, Offer]] = {}
        self._live = False
        self._last_tick: float | None = None
        self._returning: dict[str, float] = {}
        self._effects: list[Effect] = []

    # --- life of the coordinator ------------------------------------------------------------------------------------

    def begin(self, records: Iterable[Record], now: float) -> list[Effect]:
        """Replays a journal and opens the next generation. Everybody known gets a full deadline (rule 3)."""
        for record in records:
            self._apply(record)
        self._live = True
        self._record(Opened(generation=self.generation + 1))
        for tag in self.loops.keys() & self.commits.keys():
            self.commits[tag][-1] = replace(self.commits[tag][-1], state=self.state().to_bytes())
        for member in self.members.values():
            member.last_heard = now
        self._last_tick = now
        self._returning = dict.fromkeys(self.members, math.inf)
        for name in self._holders_without_member():
            self._orphaned[name] = now
        self._emit("coordinator.started", generation=self.generation, members=len(self.members))
        return self._take()

    def receive(self, name: str, message: Message, now: float) -> list[Effect]:
        """One message from the peer that presented itself as `name`. What is stale changes nothing (rule 1)."""
        if message.run != self.run:
            self._refuse(name, message, "ConfigurationError", f"this coordinator serves run {self.run!r}")
        elif isinstance(message, Join):
            self._join(name, message, now)
        elif isinstance(message, StatusRequest):
            self._send_to(name, message.incarnation, self.status(now))
        elif isinstance(message, AuditRequest):
            self._send_to(name, message.incarnation, self.audit())
        elif isinstance(message, Gone):
            self._gone(message, now)
        elif self._is_current(name, message):
            self._heard(name, now)
            self._dispatch(name, message, now)
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Time passes: finds silence, opens rounds whose grace is over, gives up what takes too long."""
        self._renew_after_gap(now)
        for name, state in list(self.members.items()):
            self._watch(name, state, now)
        for tag, loop in self.loops.items():
            for fragment in loop.claims:
                self._judge(tag, fragment, now)
        for operation in list(self.operations.values()):
            self._consider(operation, now)
        for name, since in list(self._orphaned.items()):
            if now - since > self.timeouts.evict_after:
                self._release(name)
        self._returning = {name: until for name, until in self._returning.items() if now <= until}
        self._drop_old_cuts(now)
        self.routes.refresh(now)
        return self._take()

    def _renew_after_gap(self, now: float) -> None:
        # rule 3: a coordinator that was frozen itself must not blame others for its own silence
        last, self._last_tick = self._last_tick, now
        self._grow_older(0.0 if last is None else now - last)
        if last is None or now - last <= self.timeouts.heartbeat:
            return
        gap = now - last
        for state in self.members.values():
            state.last_heard = now
        for operation in self.operations.values():
            operation.changed_at += gap
            if operation.opened_at is not None:
                operation.opened_at += gap
        for since in (self._orphaned, self._vacant):
            for name in since:
                since[name] += gap

    # --- members ----------------------------------------------------------------------------------------------------

    def _is_current(self, name: str, message: Message) -> bool:
        state = self.members.get(name)
        if message.incarnation in self.retired:
            self._send_to(name, message.incarnation, self._stamp(Expelled, reason=self.retired[message.incarnation]))
            return False
        known = state is not None and state.member.incarnation == message.incarnation
        if not known or message.generation != self.generation:
            self._send_to(name, message.incarnation, self._stamp(Represent))
            return False
        return True

    def _join(self, name: str, message: Join, now: float) -> None:
        incarnation = message.member.incarnation
        if message.protocol != PROTOCOL:
            reason = f"the coordinator speaks protocol {PROTOCOL}, peer {name} speaks {message.protocol}"
            self._refuse(name, message, "VersionMismatch", reason)
            return
        if (message.member.name, incarnation) != (name, message.incarnation):
            self._refuse(name, message, "ConfigurationError", f"peer {name} presents itself as {message.member}")
            return
        if incarnation in self.retired:
            self._send_to(name, incarnation, self._stamp(Expelled, reason=self.retired[incarnation]))
            return
        state = self.members.get(name)
        if state is not None and state.member.incarnation != incarnation:
            if message.generation:  # a successor follows nobody yet: an old life, known to a journal that is lost
                return
            self._depart(name, "another life of this name has joined", now)
            state = None
        if state is None:
            self._admit(message, now)
        elif name in self._returning:  # what it holds and proposes is about to follow
            self._returning[name] = min(self._returning[name], now + self.timeouts.chunk)
        self._heard(name, now)
        self._learn_commits(message.commits)
        self._welcome(name)

    def _admit(self, message: Join, now: float) -> None:
        member = message.member
        life = self.lives.get(member.name, 0) + 1
        self._record(Admitted(member=member, site=message.site, life=life))
        self.members[member.name].last_heard = now
        self._orphaned.pop(member.name, None)
        view = self._stamp(View, added=(member,), reason="joined")
        self._broadcast(view, but=member.name)
        self._emit("peer.joined", peer=member.name, incarnation=member.incarnation, life=life, epoch=self.epoch)

    def _welcome(self, name: str) -> None:
        members = tuple(state.member for state in self.members.values())
        life = self.members[name].life
        self._send(name, self._stamp(Welcome, life=life, members=members, progress=self.progress))

    def _depart(self, name: str, reason: str, now: float, *, release: bool = False) -> None:
        state = self.members.get(name)
        if state is None:
            return
        self._returning.pop(name, None)
        self.routes.forget(name)
        self._record(Departed(name=name, incarnation=state.member.incarnation, reason=reason))
        self._send_to(name, state.member.incarnation, self._stamp(Expelled, reason=reason))
        self._broadcast(self._stamp(View, removed=(name,), reason=reason))
        self._emit("peer.left" if release else "peer.evicted", peer=name, evidence=reason, epoch=self.epoch)
        if release:
            self._release(name)
        elif self.table and self.table.held_by(name):
            self._orphaned[name] = now
        for offers in self._offers.values():
            offers.pop(name, None)
        self._forget_claims(name)
        operations = list(self.operations.values())
        for operation in operations:
            self._take_out(operation, name)
        for tag, loop in self.loops.items():  # with one side gone, a dispute can be over
            for fragment in loop.claims:
                self._judge(tag, fragment, now)
        for operation in operations:  # one of them may find that others are gone too: all must know of this one first
            self._consider(operation, now)

    def _gone(self, message: Gone, now: float) -> None:
        state = self.members.get(message.name)
        if state is not None and state.member.incarnation == message.ended:
            self._depart(message.name, message.evidence, now)

    def _link_lost(self, name: str, failure: LinkFailure, now: float) -> None:
        """Rule 3: a refused reconnection is proof. Whatever else broke is for the next attempt to find out."""
        state = self.members.get(failure.peer)
        if state is None or state.member.incarnation != failure.incarnation:
            return
        self._emit("link.lost", peer=name, other=failure.peer, evidence=failure.evidence, detail=failure.detail)
        if failure.evidence == "refused":
            self._depart(failure.peer, "its listener is gone: connection refused", now)

    def _heard(self, name: str, now: float) -> None:
        state = self.members[name]
        state.last_heard = now
        if state.silent:
            state.silent = False
            self._emit("peer.recovered", peer=name)

    def _watch(self, name: str, state: MemberState, now: float) -> None:
        silence = now - state.last_heard
        if silence > self.timeouts.evict_after:
            self._depart(name, f"silent for {silence:.0f} s", now)
        elif silence > self.timeouts.chunk and not state.silent:
            # rule 3: silence costs the round, not the membership
            state.silent = True
            self._emit("peer.suspected", peer=name, silence_seconds=round(silence, 3))

    # --- messages of members ----------------------------------------------------------------------------------------

    def _dispatch(self, name: str, message: Message, now: float) -> None:
        match message:
            case Heartbeat():
                self.members[name].status = message.status
                self._compare_loss(name, message.status.held_out_loss)
                self.routes.learn(name, message.status.links, self.members)
                self._send(name, self._stamp(Pong, progress=self.progress))
            case Propose():
                self._propose(name, message, now)
            case DoneReport():
                self._done(name, message, now)
            case FailedReport():
                self._failed(name, message, now)
            case Withdraw():
                self._withdrawn(name, message, now)
            case LinkLost():
                self._link_lost(name, message.failure, now)
            case Enter():
                self._enter(name, message, now)
            case Applied():
                self._applied(name, message, now)
            case Recomputed():
                self._recomputed(name, message, now)
            case SetTarget():
                self._set_target(name, message)
            case Exit():
                self._exit(name, message.tag, now)
            case LeaseRequest():
                self._lease(name, message)
            case Leave():
                self._depart(name, message.reason, now, release=True)

    # --- outer loops: founding, joining, parity -----------------------------------------------------------------------

    def _enter(self, name: str, message: Enter, now: float) -> None:
        loop = self.loops.get(message.tag)
        if loop is not None and self._mismatch(name, message, loop.spec, message.spec):
            return
        if loop is not None and message.fragment not in loop.versions:
            reason = f"{message.tag} has no fragment {message.fragment}; it has {sorted(loop.versions)}"
            self._refuse(name, message, "ParityError", reason, tag=message.tag)
            return
        if loop is not None and loop.halted:
            self._refuse(name, message, "ParityError", loop.halted, tag=message.tag)
            return
        self.members[name].entered.add(message.tag)
        self.members[name].exited.discard(message.tag)
        self.members[name].trains.discard(message.tag)  # who asks has nothing to train from
        self.members[name].held.pop((message.tag, message.fragment), None)
        if loop is not None:
            loop.founders.discard(message.incarnation)
        if not self._take_offer(name, message):
            return
        if loop is None or not self._begun(message.tag):
            self._enter_new(name, message, now)
        elif self._holders(message.tag, message.fragment):
            self._send(name, self._base(message.tag, message.fragment))
        elif self._nobody_will_hold(name, message.tag, loop):
            self._enter_unheld(name, message, now)
        else:  # whoever holds it is about to say so
            self._entering.setdefault(message.tag, set()).add(name)

    def _begun(self, tag: str) -> bool:
        """Whether a round of the loop has changed anything."""
        return any(self.loops[tag].versions.values())

    def _enter_new(self, name: str, message: Enter, now: float) -> None:
        """Nothing is committed yet: a checkpoint is gone on from, if one is offered; else the first peer founds."""
        if self._offers.get(message.tag):
            self._wait_for_offers(name, message, now)
        elif message.tag in self.loops and self._holders(message.tag, message.fragment):
            self._send(name, self._base(message.tag, message.fragment))
        elif message.tag not in self.loops or self._nobody_will_hold(name, message.tag, self.loops[message.tag]):
            self._found(name, message)  # no founder, or it went away before anybody had its state: nothing is lost

    def _nobody_will_hold(self, asker: str, tag: str, loop: Loop) -> bool:
        """Whether no member holds the state or is about to. After a restart, any that has not yet said so may.

        The asker itself would not ask if it could have it, whatever it was before.
        """
        others = [state for name, state in self.members.items() if name != asker]
        busy = any(state.member.incarnation in loop.founders or tag in state.trains for state in others)
        return not busy and not self._returning

    def _enter_unheld(self, name: str, message: Enter, now: float) -> None:
        """The committed state died with its last holder: a checkpoint takes its place, or there is nothing left."""
        if self._wait_for_offers(name, message, now):
            return
        version = self.loops[message.tag].versions[message.fragment]
        reason = f"no living peer holds version {version} of {message.tag}, and no checkpoint was offered"
        self._refuse(name, message, "NoSource", reason, tag=message.tag)

    def _take_offer(self, name: str, message: Enter) -> bool:
        """Remembers what the peer has from a checkpoint; False if that is refused."""
        offers = self._offers.setdefault(message.tag, {})
        offers.pop(name, None)
        if message.offered < 0:
            return True
        try:
            state = RunState.from_bytes(message.state)
            loop = state.loop(message.tag)
            if state.run != self.run or loop is None or loop.versions.get(message.fragment) != message.offered:
                raise CheckpointMismatch(f"its run state is not that of version {message.offered} of {message.tag}")
        except CheckpointMismatch as error:
            reason = f"the checkpoint that peer {name} offers cannot be used: {error}"
            self._refuse(name, message, "CheckpointMismatch", reason, tag=message.tag)
            return False
        if not self._mismatch(name, message, loop.spec, message.spec):
            offers[name] = Offer(name, message.incarnation, message.offered, message.offered_hash, state)
        return name in offers

    def _wait_for_offers(self, name: str, message: Enter, now: float) -> bool:
        """Goes on from the newest checkpoint that is offered; False if there is none after waiting for the others'."""
        tag = message.tag
        since = self._vacant.setdefault(tag, now)
        best = self._best_offer(tag, message.fragment)
        if not (best and self._is_newest(best, tag, message.fragment)) and now - since < self.timeouts.grace:
            return True
        del self._vacant[tag]
        if best is None:
            return False
        self._restore(best, tag, message.fragment, now)
        return True

    def _best_offer(self, tag: str, fragment: int) -> Offer | None:
        """Of the latest decision; if its checkpoints differ, as the run held it, or as most of them say."""
        offers = self._offers[tag].values()
        votes = Counter((offer.state.generation, offer.state.serial, offer.state_hash) for offer in offers)
        agreed = self.loops[tag].hashes if tag in self.loops else {}

        def rank(offer: Offer) -> tuple[int, int, bool, int, str]:
            order = (offer.state.generation, offer.state.serial)
            held = self._is_newest(offer, tag, fragment) and agreed.get((fragment, offer.version)) == offer.state_hash
            return (*order, held, votes[(*order, offer.state_hash)], offer.name)

        return max(offers, key=rank, default=None)

    def _is_newest(self, offer: Offer, tag: str, fragment: int) -> bool:
        """Whether it is of the run's last decision: nothing that is committed is missing, and nothing else is in it."""
        loop = self.loops.get(tag)
        theirs = offer.state.generation // LINEAGE, offer.state.serial, offer.version, offer.state.tokens
        ours = self.generation // LINEAGE, self.serial, loop.versions[fragment] if loop else -1, self.tokens
        return theirs == ours

    def _restore(self, offer: Offer, tag: str, fragment: int, now: float) -> None:
        """The run goes on from this checkpoint. Of what was committed later nothing is left: that is said."""
        if not self._is_newest(offer, tag, fragment):
            self._roll_back(offer, tag, fragment)
        loop = self.loops[tag]
        loop.hashes[fragment, offer.version] = offer.state_hash
        loop.claims.pop(fragment, None)
        for holder in self._holders_without_member():
            self._orphaned.setdefault(holder, now)
        for state in self.members.values():
            state.held.pop((tag, fragment), None)
            state.trains.discard(tag)
        for name, each in self._offers.pop(tag).items():
            if (each.version, each.state_hash) == (offer.version, offer.state_hash):
                loop.founders.add(each.incarnation)
                self._send(name, self._base(tag, fragment))

    def _roll_back(self, offer: Offer, tag: str, fragment: int) -> None:
        loop = self.loops.get(tag)
        before, tokens = loop.versions.get(fragment, 0) if loop else 0, self.tokens
        theirs = (offer.state.generation, offer.state.serial)
        foreign = theirs > (self.generation, self.serial)  # of a journal that this coordinator does not have
        generation = above(offer.state.generation) if foreign else self.generation
        reason = f"checkpoint of version {offer.version} offered by {offer.name}"
        self._record(Restored(state=offer.state, generation=generation, reason=reason))
        self._emit(
            "run.rolled_back" if before > offer.version else "run.resumed",
            tag=tag,
            version=offer.version,
            peer=offer.name,
            versions_lost=max(0, before - offer.version),
            tokens_lost=max(0, int(tokens - offer.state.tokens)),
        )
        if foreign:
            self._record(Opened(generation=self.generation + 1))
            self._broadcast(self._stamp(Represent))

    def _found(self, name: str, message: Enter) -> None:
        if not message.state_hash:  # it has not looked at its own yet, since most who come find one to fetch
            nothing: Base = self._stamp(
                Base, tag=message.tag, fragment=message.fragment, version=0, state_hash="", sources=()
            )
            self._send(name, nothing)
            return
        record = LoopFounded(
            tag=message.tag, spec=message.spec, fragment=message.fragment, state_hash=message.state_hash
        )
        self._record(record)
        self.loops[message.tag].founders.add(message.incarnation)
        self._emit("loop.founded", peer=name, tag=message.tag, state_hash=message.state_hash)
        self._send(name, self._base(message.tag, message.fragment, found=True))

    def _base(self, tag: str, fragment: int, *, found: bool = False) -> Message:
        loop = self.loops[tag]
        version = loop.versions[fragment]
        sources = () if found else rounds.members_of(self._holders(tag, fragment), self._members())
        state_hash = loop.hashes.get((fragment, version), "")
        base: Base = self._stamp(
            Base,
            tag=tag,
            fragment=fragment,
            version=version,
            state_hash=state_hash,
            sources=sources,
            state=self.state().to_bytes(),
            digest=loop.digests.get((fragment, version), ""),
        )
        return base

    def _holders(self, tag: str, fragment: int) -> list[str]:
        """Living members that hold the current version of the fragment."""
        version = self.loops[tag].versions.get(fragment)
        return [
            name
            for name, state in self.members.items()
            if not state.silent and state.held.get((tag, fragment), (-1, ""))[0] == version
        ]

    def _applied(self, name: str, message: Applied, now: float) -> None:
        loop = self.loops.get(message.tag)
        newest = loop.versions.get(message.fragment, -1) if loop else -1
        if loop is None or message.version < 0 or newest < 0:
            return
        if loop.halted:
            self._refuse(name, message, "ParityError", loop.halted, tag=message.tag)
            return
        if self._is_void(loop, message, newest):
            self._lead_back(name, message.tag, message.fragment, now)
            return
        state = self.members[name]
        if self._known_wrong(name, message, message.state_hash):
            return
        if not self._agrees(name, message, loop, newest, now):
            return
        state.wrong.pop((message.tag, message.fragment), None)
        state.held[message.tag, message.fragment] = (message.version, message.state_hash)
        state.entered.add(message.tag)
        (state.trains.discard if message.receiving else state.trains.add)(message.tag)
        self._vacant.pop(message.tag, None)
        if message.version < newest:
            self._catch_up(name, message.tag, message.fragment, message.version)
            return
        self._judge(message.tag, message.fragment, now)
        for waiting in self._entering.pop(message.tag, set()) - {name}:
            self._send(waiting, self._base(message.tag, message.fragment))
        progress = self.progress
        if progress.finished and not progress.behind:
            self._broadcast(self._stamp(Pong, progress=progress))  # the holders need not stay any longer

    def _is_void(self, loop: Loop, message: Applied, newest: int) -> bool:
        """Whether what the peer holds belongs to rounds that the run has left behind, or never knew."""
        led_to = loop.digests.get((message.fragment, message.version), "")
        return message.version > newest or ("" not in (message.digest, led_to) and message.digest != led_to)

    def _lead_back(self, name: str, tag: str, fragment: int, now: float) -> None:
        """The peer is to take the state that the run holds; if nobody holds it, to say what it has instead."""
        state = self.members[name]
        state.held.pop((tag, fragment), None)
        state.trains.discard(tag)
        operation = self.operations.get(tag)
        if operation is not None and operation.fragment == fragment:
            self._disqualify(operation, name, now)
        self._emit("peer.led_back", peer=name, tag=tag, version=self.loops[tag].versions[fragment])
        self._send(name, self._base(tag, fragment))

    def _disqualify(self, operation: Operation, name: str, now: float) -> None:
        """What this peer has proposed must not count, not even in a running attempt."""
        if operation.in_attempt(name):
            operation.withdrawn.add(name)
            if operation.phase is Phase.RUNNING:
                self._abort(operation, f"{name} does not hold what the run holds", now)
        self._withdraw(operation, name, now)

    # --- parity -----------------------------------------------------------------------------------------------------

    def _forget_claims(self, name: str) -> None:
        for loop in self.loops.values():
            for claims in loop.claims.values():
                claims.forget(name)

    def _agrees(self, name: str, message: Applied, loop: Loop, newest: int, now: float) -> bool:
        """Takes note of what the peer holds; False if that is not what the run holds, and is decided."""
        key = (message.fragment, message.version)
        claims = loop.claims.get(message.fragment)
        if claims is None or claims.version != newest:
            claims = loop.claims[message.fragment] = Claims(newest)
        agreed = loop.hashes.setdefault(key, message.state_hash)
        loop.hashes.pop((message.fragment, message.version - KEPT_COMMITS), None)
        if message.computed and message.version == newest:
            claims.claim(name, message.state_hash, now)
        elif agreed != message.state_hash and not (claims.disputed and message.version == newest):
            self._repair(name, message.tag, message.fragment, message.version, message.state_hash, now)
            return False
        return True

    def _known_wrong(self, name: str, message: Applied | Propose, held: str) -> bool:
        """Whether these bits are what the peer was told to drop: that is decided, and it is told again."""
        known = self.members[name].wrong.get((message.tag, message.fragment), "") == held != ""
        if known:
            self._send(name, self._base(message.tag, message.fragment))
        return known

    def _judge(self, tag: str, fragment: int, now: float) -> None:
        """Finds out which of several claims about the newest version is right, and repairs whoever holds another.

        Whoever has computed it decides over those who have fetched it from somebody.
        """
        loop = self.loops[tag]
        claims = loop.claims[fragment]
        key = (fragment, claims.version)
        if loop.halted or not (claims.disputed or claims.unanimous not in ("", loop.hashes.get(key))):
            return
        awake = {name for name, state in self.members.items() if not state.silent}
        voters = claims.claimed.keys() | {name for name in awake if tag in self.members[name].trains}
        right = claims.unanimous or claims.majority(voters) or self._proven(tag, fragment, voters, now)
        if not right:
            return
        loop.hashes[key] = right
        claims.settle(right)
        for name, state in list(self.members.items()):
            version, held = state.held.get((tag, fragment), (-1, ""))
            if version == claims.version and held != right:
                self._repair(name, tag, fragment, version, held, now)
        if tag in self.operations:
            self._consider(self.operations[tag], now)

    def _proven(self, tag: str, fragment: int, voters: set[str], now: float) -> str:
        """Rule 9: without a majority, each side works it out again."""
        claims = self.loops[tag].claims[fragment]
        assert claims.since is not None, "a dispute has begun"
        if claims.asked is None and (claims.all_heard(voters) or now - claims.since > self.timeouts.chunk):
            claims.asked = now
            for name in claims.claimed:
                self._send(name, self._stamp(Recompute, tag=tag, fragment=fragment, version=claims.version))
        if claims.asked is None:
            return ""
        waited = now - claims.asked
        awake = {name for name in claims.claimed if not self.members[name].silent}
        if not claims.recomputed(awake) and waited <= self.timeouts.operation:
            return ""
        right = claims.proven()
        if not right:
            self._halt(tag, claims)
        return right

    def _recomputed(self, name: str, message: Recomputed, now: float) -> None:
        loop = self.loops.get(message.tag)
        claims = loop.claims.get(message.fragment) if loop else None
        if claims and claims.version == message.version and claims.asked is not None and name in claims.claimed:
            claims.reproduced[name] = message.state_hash
            self._judge(message.tag, message.fragment, now)

    def _repair(self, name: str, tag: str, fragment: int, version: int, held: str, now: float) -> None:
        """The peer holds other bits than the run: it fetches the state anew, and reads its samples again."""
        state, loop = self.members[name], self.loops[tag]
        if state.wrong.get((tag, fragment)) != held:
            state.wrong[tag, fragment] = held
            state.repaired += 1
            agreed = loop.hashes.get((fragment, version), "")
            self._emit("parity.mismatch", peer=name, tag=tag, version=version, held=held, agreed=agreed)
        state.held.pop((tag, fragment), None)
        state.trains.discard(tag)
        operation = self.operations.get(tag)
        if operation is not None and operation.fragment == fragment:
            self._disqualify(operation, name, now)
        self._send(name, self._base(tag, fragment))

    def _halt(self, tag: str, claims: Claims) -> None:
        """Nobody can say what the state is: better to stop than to train on."""
        loop = self.loops[tag]
        held = ", ".join(f"{name} holds {state_hash}" for name, state_hash in sorted(claims.claimed.items()))
        loop.halted = f"{tag}: no majority and no proof for version {claims.version}: {held}; resume from a checkpoint"
        self._emit("parity.undecided", tag=tag, version=claims.version, held=dict(claims.claimed))
        self.operations.pop(tag, None)
        for name, state in self.members.items():
            if tag in state.entered:
                self._send(name, self._stamp(Refused, error="ParityError", reason=loop.halted, tag=tag))

    def _catch_up(self, name: str, tag: str, fragment: int, version: int) -> None:
        """Rule 5: sends the next commit that the peer missed, or, if nobody gives its result, the state itself."""
        missed = [
            commit
            for commit in self.commits.get(tag, ())
            if commit.fragment == fragment and commit.version == version + 1 and not commit.skipped
        ]
        commit = self._renewed(missed[0]) if missed else None
        held = self._holders(tag, fragment)
        if commit and (commit.sources or not held):  # without sources, the peer itself may still have the result
            self._send(name, commit)
        elif held or not self._returning:  # nobody has it: the peer is to say what it has itself
            self._send(name, self._base(tag, fragment))

    def _exit(self, name: str, tag: str, now: float) -> None:
        self.members[name].trains.discard(tag)
        self.members[name].entered.discard(tag)
        self.members[name].exited.add(tag)
        operation = self.operations.get(tag)
        if operation is not None:
            self._withdraw(operation, name, now)

    # --- data -------------------------------------------------------------------------------------------------------

    def _lease(self, name: str, message: LeaseRequest) -> None:
        if message.samples == 0:
            self._release(name)
            self._send(name, self._stamp(Leases, shards={}, sequence=message.sequence))
            return
        if message.samples < STREAM or message.shard_size < 1 or message.epochs < 0:
            self._refuse(name, message, "ConfigurationError", f"there is no such data: {message}")
            return
        if self.table is None:
            self._record(
                DatasetRegistered(
                    samples=message.samples,
                    shard_size=message.shard_size,
                    seed=message.seed,
                    epochs=message.epochs,
                )
            )
        table = self.table
        assert table is not None
        ours = (table.layout.samples, table.layout.shard_size, table.layout.seed, table.epochs)
        theirs = (message.samples, message.shard_size, message.seed, message.epochs)
        if ours != theirs:
            reason = f"the run's data has (samples, shard_size, seed, epochs) = {ours}, peer {name} has {theirs}"
            self._refuse(name, message, "ParityError", reason)
        elif self._ended(name, table, message):
            self._send(name, self._leases(name, table, message))

    def _leases(self, name: str, table: ShardTable, message: LeaseRequest) -> Message:
        doubt = self._in_doubt(table)
        self._lease_one(name, table, doubt | {*message.holding}, doubt)
        shards = {shard: table.cursors[shard] for shard in table.held_by(name) if shard not in doubt}
        spent = not doubt and not shards.keys() - {*message.holding}
        epochs = {table.layout.epoch(shard) for shard in (*message.holding, *shards)}
        ends = {epoch: samples for epoch, samples in table.ends.items() if epoch in epochs}
        leases: Leases = self._stamp(Leases, shards=shards, spent=spent, sequence=message.sequence, ends=ends)
        return leases

    def _ended(self, name: str, table: ShardTable, message: LeaseRequest) -> bool:
        """Takes note of the ends of a stream's epochs that a peer has reached; False if it is another stream's."""
        for epoch, samples in message.ends.items():
            if epoch not in table.ends and table.can_end(epoch, samples):
                self._record(StreamEnded(epoch=epoch, samples=samples))
                self._emit("stream.ended", peer=name, stream_epoch=epoch, samples=samples)
            if table.ends.get(epoch) != samples:
                known = f"{table.ends[epoch]} samples" if epoch in table.ends else "more or fewer"
                reason = f"epoch {epoch} of the stream has {known} in the run, {samples} on peer {name}"
                self._refuse(name, message, "ParityError", f"{reason}: it must be the same on all peers")
                return False
        return True

    def _lease_one(self, name: str, table: ShardTable, holding: set[int], doubt: set[int]) -> None:
        shard = table.offer(doubt)
        if shard is not None and not set(table.held_by(name)) - holding:
            self._record(Leased(name=name, shards=(shard,)))

    def _in_doubt(self, table: ShardTable) -> set[int]:
        """Shards that the contribution of a life gone by may yet move (rule 8): not read until that is decided.

        What a member proposes about shards that it holds itself concerns nobody else.
        """
        proposals = [each for operation in self.operations.values() for each in operation.proposals.items()]
        return {
            shard
            for name, proposal in proposals
            for shard in proposal.cursors
            if not (self._lives(name, proposal.incarnation) and table.holders.get(shard) == name)
        }

    def _lives(self, name: str, incarnation: int) -> bool:
        state = self.members.get(name)
        return state is not None and state.member.incarnation == incarnation

    def _release(self, name: str) -> None:
        self._orphaned.pop(name, None)
        if self.table and self.table.held_by(name):
            self._emit("shard.released", peer=name, shards=self.table.held_by(name))
            self._record(Released(name=name))

    def _holders_without_member(self) -> set[str]:
        return set(self.table.holders.values()) - self.members.keys() if self.table else set()

    # --- rounds: proposals ------------------------------------------------------------------------------------------

    def _propose(self, name: str, message: Propose, now: float) -> None:
        if self._already_decided(name, message) or not self._acceptable(name, message, now):
            return
        operation = self.operations.get(message.tag)
        if operation is None:
            operation = self._open_operation(message, now)
        elif self._mismatch(name, message, operation.spec, message.spec):
            return
        if message.fragment != operation.fragment:
            operation.late[name] = message
            return
        self._absent.get(message.tag, set()).discard(name)
        before = operation.proposals.get(name)
        if operation.phase is Phase.GATHERING:
            operation.proposals[name] = message
        elif before is None or before.incarnation != message.incarnation:
            operation.late[name] = message
        elif before.sequence < message.sequence:
            self._replace(operation, name, message, now)
            return
        elif operation.phase is Phase.RUNNING and operation.start and name in _names(operation.start):
            self._send(name, self._begin_of(operation))
        self._consider(operation, now)

    def _replace(self, operation: Operation, name: str, message: Propose, now: float) -> None:
        """The peer offers something else than the running attempt was started with: that attempt cannot count."""
        self._take_back(operation, name, now)
        if self.operations.get(operation.tag) is operation and name in operation.proposals:
            operation.late[name] = message
        else:
            self._propose(name, message, now)

    def _already_decided(self, name: str, message: Propose) -> bool:
        incarnation, sequence, reply = self._decided.get((message.tag, name), (0, -1, None))
        if reply is not None and incarnation == message.incarnation and message.sequence <= sequence:
            self._send(name, self._renewed(reply) if isinstance(reply, Commit) else reply)
            return True
        if message.base_version >= 0 or not 0 <= message.round < self._rounds.get(message.tag, 0):
            return False
        self._send(name, self._outcome(message.tag, message.round))
        return True

    def _outcome(self, tag: str, round: int) -> Message:
        """What became of a plain operation that is over."""
        for commit in self.commits.get(tag, ()):
            if commit.round == round:
                return self._renewed(commit)
        failed: RoundFailed = self._stamp(
            RoundFailed, tag=tag, round=round, reason="the round went on without this peer"
        )
        return failed

    def _acceptable(self, name: str, message: Propose, now: float) -> bool:
        if not 0 <= message.weight <= MAX_WEIGHT:
            reason = f"weight {message.weight} of peer {name} is not a number from 0 to {MAX_WEIGHT:.0e}"
            self._refuse(name, message, "ConfigurationError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if not 0 <= message.spec.elements <= MAX_ELEMENTS:
            reason = f"there is no tensor of {message.spec.elements} elements on peer {name}"
            self._refuse(name, message, "ConfigurationError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if message.base_version < 0 and message.tag not in self.loops:
            return True
        if message.base_version < 0 or (message.tag in self.operations and not self.operations[message.tag].outer):
            reason = f"tag {message.tag} belongs to an outer loop and to a plain operation: rename one"
            self._refuse(name, message, "ParityError", reason, tag=message.tag, sequence=message.sequence)
            return False
        if not self._fresh_enough(name, message, now):
            return False
        if self.progress.finished:
            reason = "the run has reached its target"
            self._send(name, self._stamp(RoundFailed, tag=message.tag, round=message.round, reason=reason))
        return not self.progress.finished

    def _fresh_enough(self, name: str, message: Propose, now: float) -> bool:
        loop = self.loops.get(message.tag)
        if loop is None or message.fragment not in loop.versions:
            self._send(name, self._stamp(Represent))
            return False
        if message.base_version != loop.versions[message.fragment]:
            self._catch_up(name, message.tag, message.fragment, message.base_version)
            return False
        if loop.halted:
            self._refuse(name, message, "ParityError", loop.halted, tag=message.tag, sequence=message.sequence)
            return False
        if self._mismatch(name, message, loop.spec, message.spec):
            return False
        if self._holds_others_shards(name, message):
            self._send(name, self._base(message.tag, message.fragment))
            return False
        return self._same_base(name, message, loop, now)

    def _same_base(self, name: str, message: Propose, loop: Loop, now: float) -> bool:
        """Whether it was measured from what the run holds; if that is disputed, the round waits for the decision."""
        agreed = loop.hashes.get((message.fragment, message.base_version), "")
        claims = loop.claims.get(message.fragment)
        disputed = claims is not None and claims.disputed
        said = self.members[name].held.get((message.tag, message.fragment))
        if self._known_wrong(name, message, message.base_hash):
            return False
        if message.base_hash and said != (message.base_version, message.base_hash):
            self._send(name, self._stamp(Represent))  # it has not said what it holds, or is being led back
            return False
        if agreed and message.base_hash not in ("", agreed) and not disputed:
            self._repair(name, message.tag, message.fragment, message.base_version, message.base_hash, now)
            return False
        return True

    def _holds_others_shards(self, name: str, message: Propose) -> bool:
        """Whether it has read what the run does not know it to hold: leases can be lost with a journal."""
        holders = self.table.holders if self.table else {}
        return any(holders.get(shard) != name for shard in message.cursors)

    def _mismatch(self, name: str, message: Propose | Enter, ours: OperationSpec, theirs: OperationSpec) -> bool:
        """Rule 10: names the first difference between what the run does and what the peer wants."""
        for what in rounds.compared(ours):
            if getattr(ours, what) != getattr(theirs, what):
                values = f"{getattr(ours, what)!r} in the run, {getattr(theirs, what)!r} on peer {name}"
                reason = f"{message.tag}: {what} differs: {values}"
                sequence = message.sequence if isinstance(message, Propose) else -1
                self._refuse(name, message, "ParityError", reason, tag=message.tag, sequence=sequence)
                return True
        return False

    def _open_operation(self, message: Propose, now: float) -> Operation:
        outer = message.base_version >= 0
        number = self.loops[message.tag].rounds if outer else self._rounds.get(message.tag, 0)
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

    # --- rounds: what next --------------------------------------------------------------------------------------------

    def _consider(self, operation: Operation, now: float) -> None:
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
        awake = {name for name, state in self.members.items() if not state.silent}
        if not operation.outer:
            return (awake - self._absent.get(operation.tag, set())) | (awake & {operation.spec.root})
        if now - operation.changed_at <= self.timeouts.grace:
            return {n for n in awake if operation.tag in self.members[n].trains or n in self._returning}
        # who is still behind cannot propose: fetching the state anew stops nobody
        holders = self._holders(operation.tag, operation.fragment)
        return {name for name in holders if operation.tag in self.members[name].trains}

    def _consider_start(self, operation: Operation, now: float) -> None:
        expected = self._expected(operation, now)
        present = {name for name in operation.proposals if not self.members[name].silent}
        if len(present) < self.policy.min_peers or self._disputed(operation):
            operation.opened_at = None
            return
        missing = expected - present
        needed = rounds.quorum_count(len(expected), self.policy.quorum, self.policy.min_peers)
        draining = any(proposal.leaving for proposal in operation.proposals.values())
        if operation.opened_at is None and (draining or len(present) >= min(needed, len(expected))):
            operation.opened_at = now
            for name in missing:
                self._send(name, self._stamp(Open, tag=operation.tag, round=operation.round))
        grace_over = operation.opened_at is not None and now - operation.opened_at >= self.timeouts.grace
        if not missing or grace_over:
            self._absent.setdefault(operation.tag, set()).update(missing)
            self._begin_attempt(operation, present, now)

    def _disputed(self, operation: Operation) -> bool:
        loop = self.loops.get(operation.tag)
        claims = loop.claims.get(operation.fragment) if loop and operation.outer else None
        return claims is not None and claims.disputed

    def _begin_attempt(self, operation: Operation, names: set[str], now: float) -> None:
        """Starts the next attempt with these peers' proposals; a round without any weight is skipped (rule 6)."""
        weights = {name: operation.proposals[name].weight for name in sorted(names)}
        giving = tuple(n for n, w in weights.items() if w > 0 and not operation.proposals[n].receiver)
        if not giving:
            self._decide(operation, digest="", contributors=(), now=now)
            return
        if operation.spec.root and operation.spec.root not in giving:
            self._fail(operation, f"its root {operation.spec.root} is not there; there are: {', '.join(giving)}")
            return
        plan = self._plan(operation, giving)
        receivers = tuple(sorted(names - set(giving)))
        operation.attempt += 1
        self._attempts[operation.tag] = (operation.round, operation.attempt)
        self._order(operation, plan, receivers, weights)
        operation.lost.extend(name for name in giving if name not in plan.names)
        operation.phase, operation.changed_at = Phase.RUNNING, now
        operation.done, operation.answered, operation.failures = {}, set(), {}
        begin = self._begin_of(operation)
        for name in (*plan.names, *receivers):
            self._send(name, begin)
        self._emit_start(operation, plan.names)

    def _plan(self, operation: Operation, giving: tuple[str, ...]) -> Plan:
        """The way that this attempt goes; told when it is another than the last time."""
        cuts = {*self.cuts, *topology.cannot_meet(rounds.members_of(giving, self._members()))}
        plan = self.routes.find(operation.spec, giving, cuts)
        kind = (operation.spec.algorithm, operation.spec.wire, operation.spec.elements.bit_length())
        told = planning.described(plan)
        if self._told.pop(kind, {}) != told:
            self._emit("plan.changed", tag=operation.tag, **(told or {"pattern": "direct", "shares": "equal"}))
        if told:
            self._told[kind] = told
        return plan

    def _order(self, operation: Operation, plan: Plan, receivers: tuple[str, ...], weights: dict[str, float]) -> None:
        """Writes the orders for the attempt that begins."""
        spec, names = operation.spec, plan.names
        given = tuple(operation.proposals[name].spec.elements for name in names)
        fields, operation.segments = planning.orders(spec, plan, given)
        multipliers, divisor = rounds.scalars(spec.op, (weights[name] for name in names), fields["dtype"])
        operation.start = Start(
            run=self.run,
            generation=self.generation,
            epoch=self.epoch,
            tag=operation.tag,
            round=operation.round,
            attempt=operation.attempt,
            fragment=operation.fragment,
            base_version=operation.base_version,
            contributors=rounds.members_of(names, self._members()),
            receivers=rounds.members_of(receivers, self._members()),
            sequences=tuple(operation.proposals[name].sequence for name in (*names, *receivers)),
            chunk_bytes=self.routes.chunk_bytes(names, fields["wire"]),
            multipliers=multipliers,
            divisor=divisor,
            **fields,
        )
        operation.lives = {member.name: member.incarnation for member in operation.start.contributors}

    def _begin_of(self, operation: Operation) -> Message:
        begin: Begin = self._stamp(Begin, start=operation.start, segments=operation.segments)
        return begin

    def _emit_start(self, operation: Operation, names: tuple[str, ...]) -> None:
        if operation.outer:
            fields = {"tag": operation.tag, "round": operation.round, "attempt": operation.attempt}
            self._emit("round.started", **fields, contributors=list(names))

    # --- rounds: attempts -------------------------------------------------------------------------------------------

    def _done(self, name: str, message: DoneReport, now: float) -> None:
        operation = self.operations.get(message.tag)
        if operation is None or not operation.is_current(message.round, message.attempt):
            self._tell_end(name, message)
            return
        if not self._in_attempt_alive(operation, name):
            return  # a receiver's success is its own
        operation.answered.add(name)
        if operation.phase is Phase.RUNNING:
            operation.done[name] = message.digest
            if len(operation.done) < len(operation.lives):
                return  # whoever is lost or silent meanwhile is found when that happens
        self._consider(operation, now)

    def _tell_end(self, name: str, message: DoneReport) -> None:
        """The attempt is over, and word of that did not arrive: who holds a result would wait for it."""
        for commit in self.commits.get(message.tag, ()):
            if commit.round == message.round:
                self._send(name, self._renewed(commit))
                return
        abort = Abort(
            run=self.run,
            generation=self.generation,
            epoch=self.epoch,
            tag=message.tag,
            round=message.round,
            attempt=message.attempt,
            reason="the round went on without this peer",
        )
        self._send(name, self._stamp(Cancel, abort=abort))

    def _failed(self, name: str, message: FailedReport, now: float) -> None:
        operation = self.operations.get(message.tag)
        if operation is None or not operation.is_current(message.round, message.attempt):
            return
        if not self._in_attempt_alive(operation, name):
            return  # a receiver's trouble is its own
        operation.answered.add(name)
        operation.done.pop(name, None)
        if message.lost:
            operation.failures[name] = message.lost
        if operation.phase is Phase.RUNNING:
            self._abort(operation, message.reason or "a member failed", now)
        self._consider(operation, now)

    def _withdrawn(self, name: str, message: Withdraw, now: float) -> None:
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

    def _withdraw(self, operation: Operation, name: str, now: float) -> None:
        self._take_out(operation, name)
        self._consider(operation, now)

    def _take_out(self, operation: Operation, name: str) -> None:
        """The peer has left the view or the loop. What it contributed to a running attempt may still count (rule 8)."""
        operation.late.pop(name, None)
        if not operation.in_attempt(name):
            operation.proposals.pop(name, None)
        if not operation.proposals:
            self.operations.pop(operation.tag, None)

    def _consider_running(self, operation: Operation, now: float) -> None:
        contributors = operation.contributors()
        pending = [name for name in contributors if name not in operation.done]
        living = [name for name in contributors if self._in_attempt_alive(operation, name)]
        if not living:
            self._fail(operation, "every contributor is gone")
        elif not [name for name in pending if name in living]:
            self._settle(operation, living, now)
        elif any(name not in living or self.members[name].silent for name in pending):
            lost = [name for name in pending if name not in living or self.members[name].silent]
            self._abort(operation, f"lost {', '.join(lost)}", now, lost=tuple(lost))
            self._consider(operation, now)
        elif now - operation.changed_at > self.timeouts.operation:
            self._abort(operation, f"no result within {self.timeouts.operation} s", now)

    def _in_attempt_alive(self, operation: Operation, name: str) -> bool:
        """Whether the very life that the attempt was started with is still in the view."""
        state = self.members.get(name)
        return state is not None and state.member.incarnation == operation.lives.get(name)

    def _settle(self, operation: Operation, living: list[str], now: float) -> None:
        digests = {operation.done[name] for name in living}
        if len(digests) == 1:
            self._decide(operation, digest=digests.pop(), contributors=operation.contributors(), now=now)
            return
        held = {name: operation.done[name] for name in living}
        self._emit("parity.mismatch", tag=operation.tag, round=operation.round, digests=held)
        self._abort(operation, f"results differ: {held}", now)

    def _abort(self, operation: Operation, reason: str, now: float, lost: tuple[str, ...] = ()) -> None:
        assert operation.start is not None
        operation.phase, operation.changed_at = Phase.ABORTING, now
        if operation.done:
            operation.answered -= operation.done.keys()  # they hold a result that will not count: they must say so
        abort = Abort(
            run=self.run,
            generation=self.generation,
            epoch=operation.start.epoch,
            tag=operation.tag,
            round=operation.round,
            attempt=operation.attempt,
            reason=reason,
            lost=lost,
        )
        for name in _names(operation.start):
            if name not in operation.answered:
                self._send(name, self._stamp(Cancel, abort=abort))

    def _consider_retry(self, operation: Operation, now: float) -> None:
        """The next attempt begins once every member of the last has answered, or is known to be lost."""
        waited = now - operation.changed_at
        living = [name for name in operation.contributors() if self._in_attempt_alive(operation, name)]
        silent = [name for name in living if name not in operation.answered]
        if any(not self._given_up(operation, name, living, waited) for name in silent):
            return
        for name in silent:
            if operation.refused(name):
                self._depart(name, "its listener is gone: connection refused", now)
        if self.operations.get(operation.tag) is operation and operation.phase is Phase.ABORTING:
            self._retry(operation, now)

    def _given_up(self, operation: Operation, name: str, living: list[str], waited: float) -> bool:
        if self.members[name].silent or waited > self.timeouts.chunk:
            return True
        others = [other for other in living if other != name and other in operation.answered]
        reporters = operation.reported_lost(name)
        return operation.refused(name) or (len(others) >= 2 and reporters >= set(others))

    def _retry(self, operation: Operation, now: float) -> None:
        answered = {
            name for name in operation.contributors()
            if name in operation.answered - operation.withdrawn and self._in_attempt_alive(operation, name)
        }  # fmt: skip
        lost = [name for name in operation.contributors() if name not in answered]
        self._note_cuts(operation, answered, now)
        operation.lost.extend(lost)
        operation.withdrawn.clear()
        for name in lost:
            operation.proposals.pop(name, None)
        self._emit("round.shrunk" if lost else "round.aborted", tag=operation.tag, round=operation.round,
                   attempt=operation.attempt, lost=lost, links=_links(operation))  # fmt: skip
        attempts = operation.attempt + 1 - operation.first_attempt
        if attempts >= self.policy.max_attempts:
            self._fail(operation, f"gave up after {attempts} attempts")
            return
        operation.phase, operation.opened_at = Phase.GATHERING, None
        present = {name for name in operation.proposals if not self.members[name].silent}
        if not operation.proposals:
            self._fail(operation, "nobody is left")
        elif len(present) >= self.policy.min_peers:
            self._begin_attempt(operation, present, now)

    def _note_cuts(self, operation: Operation, alive: set[str], now: float) -> None:
        # both ends report the same break: it counts once
        for pair in {frozenset((who, f.peer)) for who, lost in operation.failures.items() for f in lost}:
            self._link_breaks[pair] = self._link_breaks.get(pair, 0) + 1
        for pair in rounds.lasting_cuts(operation.failures, alive, self._link_breaks):
            self.cuts[pair] = now + CUT_RETRY_SECONDS
            self._emit("link.cut", peers=sorted(pair))

    def _drop_old_cuts(self, now: float) -> None:
        for pair in [pair for pair, until in self.cuts.items() if until < now]:
            del self.cuts[pair]
            self._link_breaks.pop(pair, None)

    # --- rounds: the final word -------------------------------------------------------------------------------------

    def _decide(self, operation: Operation, *, digest: str, contributors: tuple[str, ...], now: float) -> None:
        """Commits. Durable first; then everybody concerned is told, and can ask again (rule 2)."""
        skipped = not contributors
        giving = [operation.proposals[name] for name in contributors if name in operation.proposals]
        version = operation.base_version + (0 if skipped else 1) if operation.outer else -1
        record = Committed(
            tag=operation.tag,
            round=operation.round,
            attempt=max(operation.attempt, 0),
            fragment=operation.fragment,
            version=version,
            contributors=contributors,
            **_merged(giving),
            tokens=sum(proposal.weight for proposal in giving),
            digest=digest,
            skipped=skipped,
            elapsed=self.elapsed,
        )
        if operation.outer:
            self._record(record)
            self._emit_commit(operation, record)
        else:
            self._note_commit(record)
        self._publish(operation, self.commits[operation.tag][-1])
        self._close(operation, now)

    def _publish(self, operation: Operation, commit: Commit) -> None:
        commit = self._renewed(commit)
        told = set(operation.proposals)
        if operation.outer:
            told |= {name for name, state in self.members.items() if operation.tag in state.entered}
        for name in sorted(told):
            proposal = operation.proposals.get(name)
            if proposal is not None:
                self._decided[operation.tag, name] = (proposal.incarnation, proposal.sequence, commit)
            self._send(name, commit)
        for pair in [pair for pair in self._link_breaks if pair not in self.cuts]:
            del self._link_breaks[pair]  # the round went through: what broke has been redialled

    def _emit_commit(self, operation: Operation, record: Committed) -> None:
        self._emit(
            "round.committed",
            tag=record.tag,
            round=record.round,
            attempt=record.attempt,
            contributors=list(record.contributors),
            tokens={n: int(operation.proposals[n].weight) for n in record.contributors if n in operation.proposals},
            version=record.version,
            digest=record.digest,
            skipped=record.skipped,
        )

    def _fail(self, operation: Operation, reason: str) -> None:
        failed = self._stamp(RoundFailed, tag=operation.tag, round=operation.round, reason=reason)
        for name, proposal in operation.proposals.items():
            self._decided[operation.tag, name] = (proposal.incarnation, proposal.sequence, failed)
            self._send(name, failed)
        self._emit("round.failed", tag=operation.tag, round=operation.round, reason=reason)
        if not operation.outer:
            self._rounds[operation.tag] = operation.round + 1
        self._close(operation, operation.changed_at)

    def _close(self, operation: Operation, now: float) -> None:
        if self.operations.get(operation.tag) is operation:
            del self.operations[operation.tag]
        for name, proposal in operation.late.items():
            if name in self.members:
                self._propose(name, proposal, now)

    def _learn_commits(self, notes: tuple[CommitNote, ...]) -> None:
        """After a restart: plain operations that a peer saw committed are committed (rule 2)."""
        for note in notes:
            known = any(commit.round == note.round for commit in self.commits.get(note.tag, ()))
            operation = self.operations.get(note.tag)
            begun = operation is not None and operation.phase is not Phase.GATHERING  # too late: it is decided here
            if known or begun or note.tag in self.loops or note.round < self._rounds.get(note.tag, 0):
                continue
            self._note_commit(
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
                self._send(name, self._renewed(self.commits[note.tag][-1]))
        operation.round = max(operation.round, note.round + 1)
        if not operation.proposals:
            del self.operations[note.tag]

    # --- durable state: the fold over the journal -------------------------------------------------------------------

    def _record(self, record: Record) -> None:
        self._effects.append(Persist(record))
        self._apply(record)

    def _apply(self, record: Record) -> None:
        self.account.take(record)
        match record:
            case Opened():
                self.generation = record.generation
            case Admitted():
                self._apply_admitted(record)
            case Departed():
                self.members.pop(record.name, None)
                self.retired[record.incarnation] = record.reason
                self.epoch += 1
            case DatasetRegistered():
                self.table = ShardTable.of(record)
            case StreamEnded() if self.table:
                self.table.end(record.epoch, record.samples)
            case Leased() if self.table:
                self.table.lease(record.name, record.shards)
            case Released() if self.table:
                self.table.release(record.name)
            case LoopFounded():
                before = self.loops.get(record.tag)
                loop = self.loops[record.tag] = Loop(record.spec, rounds=before.rounds if before else 0)
                loop.versions[record.fragment] = 0
                loop.hashes[record.fragment, 0] = record.state_hash
            case Committed():
                self._apply_committed(record)
            case Restored():
                self._apply_restored(record)
            case Targeted():
                self.targets = {name: getattr(record, name) for name in TARGETS}
            case Reached():
                self.reached = record.target

    def _apply_admitted(self, record: Admitted) -> None:
        name = record.member.name
        self.members[name] = MemberState(record.member, record.site, record.life, last_heard=0.0)
        self.lives[name] = record.life
        self.epoch += 1

    def _apply_committed(self, record: Committed) -> None:
        loop = self.loops[record.tag]
        loop.versions[record.fragment] = record.version
        loop.rounds = record.round + 1
        self.tokens += record.tokens
        self.elapsed = max(self.elapsed, record.elapsed)
        self.serial += 1
        if self.table:
            self.table.commit(record.cursors)
        if not record.skipped:
            loop.founders.clear()
            loop.digests[record.fragment, record.version] = record.digest
            loop.digests.pop((record.fragment, record.version - KEPT_COMMITS), None)
        self.last_contributors = record.contributors
        self._note_commit(record)

    def _apply_restored(self, record: Restored) -> None:
        state = record.state
        self.generation = max(self.generation, record.generation)
        self.epoch = max(self.epoch, state.epoch)
        self.serial = max(self.serial, state.serial) + 1
        self.tokens, self.elapsed = state.tokens, max(self.elapsed, state.elapsed)
        self.table = ShardTable.restored(state.data)
        for each in state.loops:
            before = self.loops.get(each.tag)
            loop = self.loops[each.tag] = Loop(each.spec, rounds=max(each.rounds, before.rounds if before else 0))
            loop.versions.update(each.versions)
            loop.hashes.update({(f, each.versions[f]): held for f, held in each.hashes.items() if held})
            loop.digests.update({(f, each.versions[f]): led_to for f, led_to in each.digests.items()})
            self.commits.pop(each.tag, None)
            self.operations.pop(each.tag, None)
            self._rounds[each.tag] = loop.rounds
        self._decided = {key: value for key, value in self._decided.items() if key[0] not in self.loops}

    def state(self) -> RunState:
        """The small run state, as of now."""
        loops = (
            LoopState(
                tag=tag,
                spec=loop.spec,
                rounds=loop.rounds,
                versions=dict(loop.versions),
                hashes={fragment: loop.hashes.get((fragment, v), "") for fragment, v in loop.versions.items()},
                digests={fragment: loop.digests.get((fragment, v), "") for fragment, v in loop.versions.items()},
            )
            for tag, loop in self.loops.items()
        )
        data = {"data": self.table.state()} if self.table else {}
        return RunState(
            run=self.run,
            generation=self.generation,
            epoch=self.epoch,
            serial=self.serial,
            tokens=self.tokens,
            elapsed=self.elapsed,
            loops=tuple(loops),
            **data,
        )

    def _note_commit(self, record: Committed) -> None:
        loop = self.loops.get(record.tag)
        base = record.version - (not record.skipped)
        outer = record.version >= 0
        commit = self._stamp(
            Commit,
            tag=record.tag,
            round=record.round,
            attempt=record.attempt,
            fragment=record.fragment,
            version=record.version,
            contributors=record.contributors,
            sources=rounds.members_of(record.contributors, self._members()),
            digest=record.digest,
            skipped=record.skipped,
            progress=self.progress,
            base_hash=loop.hashes.get((record.fragment, base), "") if loop and outer else "",
            state=self.state().to_bytes() if outer and self._live else b"",
        )
        self.commits.setdefault(record.tag, deque(maxlen=KEPT_COMMITS)).append(commit)
        self._rounds[record.tag] = max(self._rounds.get(record.tag, 0), record.round + 1)

    # --- reports and plumbing ---------------------------------------------------------------------------------------

    @property
    def progress(self) -> RunProgress:
        done = sum(loop.rounds for loop in self.loops.values())
        enough_rounds = 0 < self.targets["rounds"] <= done
        enough_tokens = 0 < self.targets["tokens"] <= self.tokens
        spent = self.table is not None and self.table.spent  # rule 11
        finished = enough_rounds or enough_tokens or bool(self.reached) or spent
        behind = self._behind() if finished else 0
        return RunProgress(
            rounds=done,
            tokens=int(self.tokens),
            finished=finished,
            behind=behind,
            targets=dict(self.targets),
            elapsed=self.elapsed,
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
            self._record(Reached(target=target))
            self._emit("run.target_reached", target=target)

    def _set_target(self, name: str, message: SetTarget) -> None:
        wanted: dict[str, Any] = {each: getattr(message, each) or self.targets[each] for each in TARGETS}
        if wanted != self.targets and all(value >= 0 for value in wanted.values()):
            self._record(Targeted(**wanted))
            self._emit("run.target_set", peer=name, **wanted)

    def _behind(self) -> int:
        """How many members of a loop do not hold its newest version; later lives are on their way into it."""
        return sum(
            state.held.get((tag, fragment), (-1, ""))[0] < version
            for tag, loop in self.loops.items()
            for fragment, version in loop.versions.items()
            for state in self.members.values()
            if tag in state.entered or (state.life > 1 and tag not in state.exited)
        )

    def status(self, now: float) -> StatusReport:
        reports = tuple(self._report(name, state, now) for name, state in sorted(self.members.items()))
        samples = self.table.committed if self.table else 0
        report: StatusReport = self._stamp(
            StatusReport,
            members=reports,
            progress=self.progress,
            contributors=self.last_contributors,
            samples=samples,
        )
        return report

    def audit(self) -> AuditReport:
        """The account of the data, as of now."""
        return summary(self.run, self.account.report(), generation=self.generation, epoch=self.epoch)

    def _report(self, name: str, state: MemberState, now: float) -> MemberReport:
        version, state_hash = max(state.held.values(), default=(-1, ""))
        training = "active" if state.trains else "joining"
        return MemberReport(
            name=name,
            site=state.site,
            life=state.life,
            state="suspect" if state.silent else training,
            version=version,
            state_hash=state_hash,
            silence=now - state.last_heard,
            status=state.status,
            repaired=state.repaired,
        )

    def _members(self) -> dict[str, Member]:
        return {name: state.member for name, state in self.members.items()}

    def _renewed(self, commit: Commit) -> Commit:
        """The commit as of now: this generation's stamp, and who can still give its result to others."""
        sources = {member.incarnation for member in commit.sources}
        holders = [
            name
            for name, state in self.members.items()
            if not state.silent and (state.member.incarnation in sources or self._has_applied(state, commit))
        ]
        return replace(
            commit,
            generation=self.generation,
            epoch=self.epoch,
            progress=self.progress,
            sources=rounds.members_of(holders, self._members()),
        )

    def _has_applied(self, state: MemberState, commit: Commit) -> bool:
        version, _ = state.held.get((commit.tag, commit.fragment), (-1, ""))
        return 0 <= commit.version <= version < commit.version + KEPT_COMMITS

    def _stamp(self, kind: type[Any], **fields: Any) -> Any:
        return kind(run=self.run, generation=self.generation, epoch=self.epoch, **fields)

    def _send(self, name: str, message: Message) -> None:
        state = self.members.get(name)
        if state is not None:
            self._send_to(name, state.member.incarnation, message)

    def _send_to(self, name: str, incarnation: int, message: Message) -> None:
        self._effects.append(Send(name, incarnation, message))

    def _broadcast(self, message: Message, but: str = "") -> None:
        for name in self.members:
            if name != but:
                self._send(name, message)

    def _refuse(
        self, name: str, message: Message, error: str, reason: str, *, tag: str = "", sequence: int = -1
    ) -> None:
        refused = self._stamp(Refused, error=error, reason=reason, tag=tag, sequence=sequence)
        self._send_to(name, message.incarnation, refused)

    def _emit(self, event: str, **fields: Any) -> None:
        self._effects.append(Emit(event, fields))

    def _take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects


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

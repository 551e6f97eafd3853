"""A whole run in one thread: the real Membership, simulated peers, and a network and clock that a test drives.

Nothing here waits, opens a socket or reads a clock. Every step of a coordinator is compared with an independent
account (`Ledger`) of what may be committed; a difference is an AssertionError.

A coordinator lives on a `Host`. Hosts can be lost with their journals; a new one then brings the run together from what
peers know, while the old one may live on and go on deciding with whoever still talks to it. Each host has a line of its
own: the ledger holds for that line, and what one line commits after the other has forked off is void in the other.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from collectives.records import Identity, LinkFailure, Member, Start
from elastic.audit import audit
from elastic.config import RunPolicy, Timeouts
from elastic.journal import Barred, Committed, Departed, Halted, LoopFounded, Opened, Record, Restored
from elastic.membership import Membership
from elastic.messages import (
    STREAM,
    Applied,
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
    GivenUp,
    Gone,
    Heartbeat,
    Join,
    LeaseRequest,
    Leases,
    Leave,
    LinkLost,
    LinkReport,
    Message,
    OperationSpec,
    PeerStatus,
    Propose,
    Recompute,
    Recomputed,
    Refused,
    Represent,
    RoundFailed,
    SelfTest,
    SiteReport,
    View,
    Welcome,
    Withdraw,
)
from elastic.recovery import Recovery
from elastic.roster import Emit, Persist, Send
from elastic.runstate import LINEAGE, RunState
from elastic.shards import Layout, ShardReader, Stretch
from fault.records import Gave

RUN, OUTER, PLAIN, SPREAD, GATHER = "run", "outer", "grads", "news", "parts"
ROOT = "a"
HIDDEN = "de"  # names of peers that can only dial out
TIMES = Timeouts(heartbeat=1.0, chunk=3.0, operation=12.0, round=60.0, grace=4.0, evict_after=15.0)
LAYOUT = Layout(samples=60, shard_size=6, seed=3)
OUTER_SPEC = OperationSpec(op="mean", dtype="float32", elements=1 << 20, wire="f32", algorithm="diloco")
PLAIN_SPEC = OperationSpec(op="mean", dtype="float32", elements=8, wire="f32", algorithm="all_reduce")
SPREAD_SPEC = OperationSpec(op="broadcast", dtype="int64", elements=8, wire="raw", root=ROOT, algorithm="broadcast")
GATHER_SPEC = OperationSpec(op="all_gather", dtype="int64", elements=8, wire="raw", algorithm="all_gather")
SPECS = {PLAIN: PLAIN_SPEC, SPREAD: SPREAD_SPEC, GATHER: GATHER_SPEC}
KEPT = 3  # versions and results that a peer still serves


def digest_of(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=6).hexdigest()


@cache
def run_state(data: bytes) -> RunState:
    return RunState.from_bytes(data)


def order_of(state: RunState) -> tuple[int, int]:
    """Later decisions of a run have higher ones, in whichever line."""
    return (state.generation, state.serial)


def timeless(state: RunState) -> str:
    """A run state without what a restart may change, as comparable text."""
    loops = sorted((loop.tag, loop.spec, loop.rounds, sorted(loop.versions.items())) for loop in state.loops)
    data = replace(state.data, cursors={}, holders={})
    shards = (sorted(state.data.cursors.items()), sorted(state.data.holders.items()), sorted(state.teams.items()))
    return repr((state.run, state.serial, state.tokens, loops, data, shards))


def key_of(state: RunState) -> bytes:
    """Which decision of which line this run state is as of."""
    return replace(state, epoch=0).to_bytes()


class Checkpoint(NamedTuple):
    """What a peer keeps of one version: state hash, run state, digest of the result that made it."""

    version: int
    state_hash: str
    state: bytes
    digest: str

    @property
    def order(self) -> tuple[int, int]:
        return order_of(run_state(self.state))


def durable(membership: Membership) -> str:
    """Everything that a journal must give back, as one comparable text."""
    table = membership.table
    return repr((
        sorted((name, state.member, state.site, state.life) for name, state in membership.members.items()),
        sorted(membership.lives.items()), sorted(membership.latest.items()),
        sorted(membership.retired.items()),
        sorted((tag, loop.spec, loop.versions, loop.rounds, loop.halted, loop.void)
               for tag, loop in membership.loops.items()),
        table and (sorted(table.holders.items()), sorted(table.cursors.items()), sorted(table.free), table.next,
                   table.committed),
        sorted(membership.state().teams.items()), membership.tokens, membership.epoch, membership.serial,
    ))  # fmt: skip


@dataclass
class Slot:
    """A peer's one operation under a tag.

    begun: the last attempt that it took part in; a Begin that was on its way when the proposal was withdrawn must not
    be taken for one of the next.
    """

    tag: str
    proposal: Propose | None = None
    start: Start | None = None
    began: float = 0.0
    report: DoneReport | FailedReport | None = None
    result: str = ""
    started_round: int = -1
    last_round: int = -1
    begun: tuple[int, int, int] = (0, -1, -1)

    def close(self) -> None:
        self.proposal = self.start = self.report = None
        self.result, self.started_round = "", -1


@dataclass(frozen=True)
class SimData:
    """stream: how many samples each epoch turns out to have, where that is not known beforehand."""

    epochs: int = 0
    stream: int = 0

    @property
    def layout(self) -> Layout:
        return replace(LAYOUT, samples=STREAM) if self.stream else LAYOUT


class SimPeer:
    """One life of a peer. Speaks the protocol as elastic.Peer does; what it says collects in `outbox`.

    data: what it reads. ahead: how many batches its loader has in flight before the oldest of them is stepped.
    learned: which samples are in its displacement from the outer state; offered: and in that of each proposal.
    quorum, grace: what its loop asks for.
    """

    def __init__(
        self,
        name: str,
        incarnation: int,
        *,
        host: Host | None = None,
        hidden: bool = False,
        disk: Checkpoint | None = None,
        data: SimData | None = None,
        ahead: int = 0,
        twinned: bool = False,
        site: str = "here",
    ) -> None:
        self.host, self.hidden, self.disk, self.twinned, self.site = host, hidden, disk, twinned, site
        self.data, self.ahead = data or SimData(), ahead
        self.sole = True  # there was one coordinator only, with its journal, and it has gone back to no checkpoint
        self.name, self.incarnation, self.generation = name, incarnation, 0
        self.quorum, self.grace = 0, -1.0
        self.alive, self.frozen, self.joined, self.stuck = True, False, False, False
        self.expelled, self.tested, self.spoiled = "", False, 0
        self.mode = "out"
        self.version = -1
        self.computed = self.corrupt = self.defective = False
        self.before = self.last = ""
        self.knows = b""
        self.view, self.epoch = dict[str, int](), 0
        self.saved: dict[int, Checkpoint] = {}
        self.states: dict[int, str] = {}
        self.results: dict[int, str] = {}
        self.fetching: Base | None = None
        self.wanted: dict[int, Commit] = {}
        self.reader, self.questions, self.rewinds_to = ShardReader(self.data.layout), 0, 0
        self.ends: dict[int, int] = {}
        self.in_flight: deque[Stretch] = deque()
        self.learned: Counter[tuple[int, int]] = Counter()
        self.offered: dict[int, Counter[tuple[int, int]]] = {}
        self.sequence = 0
        self.slots = {tag: Slot(tag) for tag in (OUTER, *SPECS)}
        self.doubts: dict[str, Propose] = {}
        self.notes: deque[CommitNote] = deque(maxlen=4)
        self.outbox: list[Message] = []
        self.plain_outcomes: list[Commit | None] = []
        self.refusals: list[Refused] = []

    def __repr__(self) -> str:
        return f"{self.name}#{self.incarnation}"

    @property
    def running(self) -> bool:
        return self.alive and not self.frozen and not self.expelled

    @property
    def member(self) -> Member:
        addresses = () if self.hidden else (f"{self.name}:{self.incarnation}",)
        return Member(name=self.name, incarnation=self.incarnation, addresses=addresses)

    @property
    def own_state(self) -> str:
        return digest_of("founder", self.name, self.incarnation)

    def say(self, kind: type[Any], **fields: Any) -> None:
        common = {"run": RUN, "generation": self.generation, "incarnation": self.incarnation, "epoch": self.epoch}
        self.outbox.append(kind(**common | fields))

    # --- what the training script does ------------------------------------------------------------------------------

    def join(self, *, recall: bool = False) -> None:
        memory = {"view": self.view, "state": self.knows, "holding": self.reader.holding} if recall else {}
        self.say(Join, member=self.member, site=self.site, commits=tuple(self.notes), tested=self.tested, **memory)

    def enter(self) -> None:
        if self.mode == "out":
            self.mode = "entering"
        if self.mode == "entering" and self.fetching is None:
            has = self.newest()
            offer = {"offered": has.version, "offered_hash": has.state_hash, "state": has.state} if has else {}
            self.say(Enter, tag=OUTER, spec=OUTER_SPEC, state_hash=self.own_state, **offer)

    def newest(self) -> Checkpoint | None:
        """The latest decision that it has the state of, in memory or from a checkpoint."""
        held = [each for each in (self.disk, self.saved.get(self.version)) if each]
        return max(held, key=lambda each: each.order, default=None)

    def lease(self, *, more: bool = True) -> None:
        self.questions += 1
        layout = self.data.layout
        self.say(LeaseRequest, samples=layout.samples, shard_size=layout.shard_size, seed=layout.seed, ends=self.ends,
                 epochs=self.data.epochs, holding=self.reader.holding, sequence=self.questions, more=more)  # fmt: skip

    def read(self, count: int) -> None:
        """Hands out a batch, and steps the oldest if the loader is far enough ahead, or the end of the data is near."""
        if self.rewinds_to or not count:
            return
        handed = self.reader.take(count)
        if handed:
            self.in_flight.append(handed)
            self._look_for_the_end(handed)
        if self.in_flight and (self.reader.in_flight > self.ahead or handed is None):
            self.reader.stepped(1)
            shard, start, stop = self.in_flight.popleft()
            self.learned.update((shard, position) for position in range(start, stop))
            self._drop_what_is_spoiled()

    def _look_for_the_end(self, handed: Stretch) -> None:
        layout, epoch = self.data.layout, self.data.layout.epoch(handed.shard)
        over = layout.start(handed.shard) + handed.stop - self.data.stream
        if self.data.stream and over > 0:
            self.ends = self.ends | {epoch: self.data.stream}
            assert self.reader.end(epoch, self.data.stream)
            self.in_flight.pop()
            if over < handed.stop - handed.start:
                self.in_flight.append(handed._replace(stop=handed.stop - over))
            self.lease()

    def propose(self) -> None:
        slot = self.slots[OUTER]
        if self.mode != "training" or slot.proposal is not None or self.rewinds_to or not self.reader.whole:
            return
        cursors, starts = self.reader.cursors, self.reader.starts
        self._offer(slot, weight=float(self.learned.total()), cursors=cursors, starts=starts, spec=OUTER_SPEC,
                    base_version=self.version, base_hash=self.states[self.version],
                    quorum=self.quorum, grace=self.grace)  # fmt: skip
        self.offered[self.sequence] = self.learned.copy()

    def reduce(self, tag: str = PLAIN) -> None:
        if self.slots[tag].proposal is None:
            spec = replace(SPECS[tag], elements=self.incarnation) if tag == GATHER else SPECS[tag]
            self._offer(self.slots[tag], weight=1.0, cursors={}, spec=spec)

    def _offer(self, slot: Slot, **fields: Any) -> None:
        self.sequence += 1
        common = {"run": RUN, "incarnation": self.incarnation, "tag": slot.tag, "sequence": self.sequence}
        slot.proposal = Propose(**common | fields)
        self._say_proposal(slot)

    def _say_proposal(self, slot: Slot) -> None:
        assert slot.proposal is not None
        self.outbox.append(replace(slot.proposal, generation=self.generation, round=slot.started_round))

    def leave(self) -> None:
        self.say(Leave)

    def give_up(self, tag: str) -> None:
        """The caller no longer waits; what an outer loop has learned stays."""
        slot = self.slots[tag]
        if slot.proposal is not None:
            self.say(Withdraw, tag=tag, sequence=slot.proposal.sequence)
            if slot.result:  # rule 2: in doubt, so it must be remembered what this result stands for
                self.doubts[slot.result] = slot.proposal
            slot.close()

    def beat(self) -> None:
        if self.joined:
            self.say(Heartbeat, status=PeerStatus())
        else:
            self.join()

    def measure(self, number: int) -> None:
        """Reports links that are far from equal: good ones around a ring, or now and then to one peer alone."""
        near = (1, 3) if number % 4 else (number % 3,)
        links = tuple(
            LinkReport(peer=name, goodput=1e8 if abs(ord(name) - ord(self.name)) in near else 1e4, rtt=0.001)
            for name in "abcdez"
        )
        self.say(Heartbeat, status=PeerStatus(links=links))

    def spoil(self, number: int) -> None:
        """Says of its contributions to the next rounds that they are no numbers, or so long that nobody's can be."""
        self.spoiled += 1
        norm = -1.0 if number % 2 else 1e12
        gave = tuple(Gave(tag=OUTER, version=1000 * self.spoiled + i, norm=norm, cosine=0.0) for i in range(3))
        if self.joined:
            self.say(Heartbeat, status=PeerStatus(), gave=gave, step_seconds=0.1 * (1 + number % 7))

    def ask_again(self) -> None:
        """Whatever is unanswered is said again."""
        if not self.joined:
            self.join()
        if self.mode == "entering":
            self.enter()
        if self.rewinds_to:
            self._ask_where()
        if self.mode == "training" and (self.wanted or self.slots[OUTER].proposal):
            self.announce()
        for slot in self.slots.values():
            if slot.report is not None:
                self.outbox.append(slot.report)
            if slot.proposal is not None and not isinstance(slot.report, DoneReport):
                self._say_proposal(slot)

    # --- what the coordinator says ----------------------------------------------------------------------------------

    def receive(self, message: Message, now: float) -> None:
        if message.generation < self.generation:
            return
        if message.generation > self.generation:
            self._new_generation(message.generation)
        if isinstance(message, Expelled):
            self.expelled = message.reason
        match message:
            case Represent():
                self.joined = False
                self.join(recall=message.recall)
            case Welcome():
                self._welcomed(message)
            case View():
                self._viewed(message)
            case Begin():
                self._begin(message.start, now)
            case Cancel():
                self._cancel(message)
            case Commit():
                self._outer_commit(message) if message.tag == OUTER else self._plain_commit(message)
            case RoundFailed():
                self._round_failed(message)
            case Base():
                self._base(message)
            case Recompute():
                self._recompute(message)
            case SelfTest():
                self.tested = True
                self.join()
            case Leases():
                self._leases(message)
            case Refused():
                self._refused(message)

    def _new_generation(self, generation: int) -> None:
        if generation // LINEAGE != self.generation // LINEAGE:  # another line numbers its rounds by itself
            self.slots[OUTER].last_round = -1
        self.generation, self.epoch, self.joined = generation, 0, False
        for slot in self.slots.values():
            slot.start = slot.report = None

    def _welcomed(self, message: Welcome) -> None:
        fresh = not self.joined
        self.joined = True
        assert message.epoch >= self.epoch, "the epoch went back"
        self.epoch, self.view = message.epoch, {member.name: member.incarnation for member in message.members}
        if fresh and self.mode == "training":
            self.announce()
        for slot in self.slots.values() if fresh else ():
            if slot.proposal is not None:
                self._say_proposal(slot)

    def _viewed(self, message: View) -> None:
        if message.epoch == self.epoch + 1:
            self.epoch = message.epoch
            self.view = {name: each for name, each in self.view.items() if name not in message.removed}
            self.view |= {member.name: member.incarnation for member in message.added}
        elif message.epoch > self.epoch:
            self.join()

    def _learn(self, state: bytes) -> None:
        if state and (not self.knows or order_of(run_state(state)) >= order_of(run_state(self.knows))):
            self.knows = state

    def _begin(self, start: Start, now: float) -> None:
        slot = self.slots[start.tag]
        if slot.start is not None and slot.start.identity == start.identity:
            if slot.report is not None:
                self.outbox.append(slot.report)
            return
        key = (start.generation, start.round, start.attempt)
        if slot.proposal is None or start.base_version not in (-1, self.version) or key <= slot.begun:
            self._report(start, FailedReport, reason="nothing to give")
            return
        slot.start, slot.began, slot.report, slot.result = start, now, None, ""
        slot.started_round, slot.begun = start.round, key

    def _report(self, start: Any, kind: type[Any], **fields: Any) -> Any:
        common = {"run": RUN, "incarnation": self.incarnation, "generation": start.generation}
        report = kind(**common | {"tag": start.tag, "round": start.round, "attempt": start.attempt} | fields)
        self.outbox.append(report)
        return report

    def done(self, slot: Slot, digest: str) -> None:
        slot.result = digest
        slot.report = self._report(slot.start, DoneReport, digest=digest)

    def failed(self, slot: Slot, lost: tuple[LinkFailure, ...]) -> None:
        slot.report = self._report(slot.start, FailedReport, reason="a link failed", lost=lost)

    def _cancel(self, message: Cancel) -> None:
        slot = self.slots[message.abort.tag]
        if slot.start is None or slot.start.identity != message.abort.identity:
            self._report(message.abort, FailedReport, reason="not under way here")
        elif isinstance(slot.report, FailedReport):
            self.outbox.append(slot.report)
        else:
            slot.result = ""
            slot.report = self._report(message.abort, FailedReport, reason="aborted")

    def _plain_commit(self, commit: Commit) -> None:
        slot = self.slots[commit.tag]
        if slot.proposal is None or commit.round <= slot.last_round:
            return
        counted = self.name in commit.contributors and slot.result == commit.digest
        if counted:
            note = {field: getattr(commit, field) for field in ("tag", "round", "attempt", "digest", "contributors")}
            self.notes.append(CommitNote(**note))
        self.plain_outcomes.append(commit if counted else None)
        slot.last_round = commit.round
        slot.close()

    def _round_failed(self, message: RoundFailed) -> None:
        slot = self.slots[message.tag]
        if slot.proposal is None or (message.tag != OUTER and message.round <= slot.last_round):
            return
        slot.close()
        if message.tag != OUTER:
            slot.last_round = max(slot.last_round, message.round)
            self.plain_outcomes.append(None)

    def _outer_commit(self, commit: Commit) -> None:
        slot = self.slots[OUTER]
        self._learn(commit.state)
        if commit.skipped:  # what was proposed was not counted: it goes into the next proposal
            if commit.round > slot.last_round and commit.version == self.version:
                slot.last_round = commit.round
                slot.close()
        elif commit.version > self.version and self.mode != "out":
            self.wanted[commit.version] = commit
            self.advance(lambda _: False)

    def advance(self, pull: Callable[[Commit], bool]) -> None:
        """Applies what was committed, as far as the results are here or can be pulled."""
        while self.mode == "training" and (commit := self.wanted.get(self.version + 1)) is not None:
            if commit.base_hash not in ("", self.states[self.version]):
                self.mode = "entering"  # it leads on from something else than what this peer holds
                return
            if self.slots[OUTER].result != commit.digest and not pull(commit):
                return
            self._apply(commit)

    def _apply(self, commit: Commit) -> None:
        slot = self.slots[OUTER]
        if slot.proposal is not None and slot.result:
            self.doubts[slot.result] = slot.proposal
        slot.close()
        if self.name in commit.contributors and commit.digest in self.doubts:
            self._consume(self.doubts[commit.digest])
        self.doubts.clear()
        if self.name in commit.covers:  # what its twin has read counts for both
            assert self.name not in commit.contributors
            self.learned.clear()
            self._ask_where()
        self.before, self.last = self.states[self.version], commit.digest
        state = digest_of(self.before, commit.digest)
        if self.corrupt:
            self.corrupt, state = False, digest_of("bits fell over", state)
        self.results[commit.version] = commit.digest
        self.results.pop(commit.version - KEPT, None)
        self._adopt(commit.version, state, commit.state, commit.digest, computed=True)

    def _adopt(self, version: int, state: str, run: bytes, digest: str, *, computed: bool = False) -> None:
        self.version, self.states[version], self.computed = version, state, computed
        self.digest = digest
        self.saved = {version: Checkpoint(version, state, run, digest)} if run else {}
        self.states.pop(version - KEPT, None)
        for old in [old for old in self.wanted if old <= version]:
            del self.wanted[old]
        self.announce()

    def announce(self) -> None:
        state = self.states[self.version]
        self.say(Applied, tag=OUTER, fragment=0, version=self.version, state_hash=state, computed=self.computed,
                 digest=self.digest)  # fmt: skip

    def _consume(self, proposal: Propose) -> None:
        self.reader.forget(proposal.cursors)
        self.learned -= self.offered[proposal.sequence]

    def _base(self, base: Base) -> None:
        """What to begin from. Without sources, nobody else has it: it is this peer's own, or not to be had."""
        self._learn(base.state)
        if self.mode == "entering":
            self._take_base(base)
        elif self.mode == "training" and (base.version, base.state_hash) == (self.version, self.states[self.version]):
            if self.slots[OUTER].proposal is not None:  # what it proposed cannot count: it reads anew
                self.start_over()
        elif self.mode == "training":
            self.mode, self.fetching = "entering", base if base.sources else None

    def _take_base(self, base: Base) -> None:
        key, has = (base.version, base.state_hash), self.newest()
        if self.version >= 0 and key == (self.version, self.states.get(self.version)):
            self.mode, self.wanted = "training", {}
            self.start_over()
            self.announce()
        elif has and key == (has.version, has.state_hash) and not base.sources:
            self.fetched(base, has.state_hash)
        elif base.sources:
            self.fetching = base
        elif base.state_hash == self.own_state:
            self.fetched(base, self.own_state)

    def _recompute(self, message: Recompute) -> None:
        able = self.mode == "training" and self.computed and message.version == self.version
        again = digest_of(self.before, self.last) if able else ""
        if able and self.defective:
            again = self.states[self.version]
        self.say(Recomputed, tag=OUTER, fragment=0, version=message.version, state_hash=again)

    def fetched(self, base: Base, state: str) -> None:
        """The whole state is here; what was read and not committed is read again."""
        self.start_over()
        self.mode, self.fetching, self.states, self.results, self.wanted = "training", None, {}, {}, {}
        self._adopt(base.version, state, base.state, base.digest)

    def start_over(self) -> None:
        """What it has learned and not given is dropped; its samples are read again, from what is committed."""
        slot = self.slots[OUTER]
        if slot.proposal is not None:
            self.say(Withdraw, tag=OUTER, sequence=slot.proposal.sequence)
        slot.close()
        self.doubts.clear()
        self.learned.clear()
        if self.reader.holding:
            self._ask_where()

    def reset(self) -> None:
        """It has missed too many rounds: back to the outer parameters, and its samples are read again."""
        if self.mode == "training":
            self.give_up(OUTER)
        if self.mode == "training" and not self.doubts:
            self.learned.clear()
            self._ask_where()

    def _ask_where(self) -> None:
        """Nothing is read until it is known from where."""
        self.lease(more=False)
        self.rewinds_to = self.questions

    def _leases(self, message: Leases) -> None:
        if message.sequence != self.questions:
            return
        assert all(self.reader.end(epoch, samples) for epoch, samples in message.ends.items())
        lost = self.reader.unfinished() - message.shards.keys()
        assert not (lost and self.sole) or self._are_read(lost), "a living peer has lost a shard"
        self.reader.retain(message.shards.keys() | (set(self.reader) - self.reader.unfinished()))
        if self.rewinds_to:
            self.rewinds_to = 0
            self.reader.rewind(message.shards)
        self.reader.add(message.shards)
        self._drop_what_is_spoiled()

    def _are_read(self, shards: set[int]) -> bool:
        """Whether a twin has read them to their end, and the run has counted that."""
        assert self.host is not None
        sizes = {shard: self.reader.layout.size(shard, self.reader.ends) for shard in shards}
        return self.twinned and all(self.host.ledger.cursors[shard] == size for shard, size in sizes.items())

    def _drop_what_is_spoiled(self) -> None:
        """What it has learned from others' samples is not its to give."""
        if self.reader.spoiled and not self.rewinds_to:
            self.start_over()

    def _refused(self, message: Refused) -> None:
        self.refusals.append(message)
        if message.error == "ParityError" and message.tag == OUTER:  # raised in the script, which leaves the loop
            self.start_over()
            self.mode, self.fetching = "stopped", None
            self.say(Exit, tag=OUTER)
        elif message.error == "CheckpointMismatch":
            self.disk, self.saved = None, {}


def links_of(start: Start) -> set[frozenset[str]]:
    """The pairs of contributors between which numbers move."""
    names = [member.name for member in start.contributors]
    if start.pattern == "tree":
        pairs = [(name, names[parent]) for name, parent in zip(names, start.parents, strict=True) if parent >= 0]
    elif start.pattern == "ring":
        around = [names[index] for index in start.order]
        pairs = list(zip(around, (*around[1:], around[0]), strict=True))
    else:
        parts = start.segments or start.shares
        owners = [name for name, part in zip(names, parts, strict=True) if part > 0]
        pairs = [(owner, name) for owner in owners for name in names if name != owner]
    return {frozenset(pair) for pair in pairs}


class Account(NamedTuple):
    """What is committed as of one version: positions by shard, samples, and the state that it should come to."""

    version: int
    tokens: float
    cursors: dict[int, int]
    samples: frozenset[tuple[int, int]]
    truth: str


NOTHING = Account(-1, 0.0, {}, frozenset(), "")


@dataclass
class Ledger:
    """What one line of a run may commit, worked out apart from its coordinator.

    truth: the state that the newest version comes to when every peer computes it right. history: the account as of each
    durable decision, by its serial. offers: checkpoints that members have offered. recalled: what peers told a
    coordinator that rebuilds the run. halted: nobody could say what the state is. void: the digests that led to such.
    """

    version: int = -1
    round: int = 0
    serial: int = 0
    tokens: float = 0.0
    epoch: int = 0
    generation: int = 0
    truth: str = ""
    halted: bool = False
    void: set[str] = field(default_factory=set)
    cursors: Counter[int] = field(default_factory=Counter)
    samples: Counter[tuple[int, int]] = field(default_factory=Counter)
    history: dict[int, Account] = field(default_factory=dict)
    offers: dict[int, Checkpoint] = field(default_factory=dict)
    recalled: dict[int, Join] = field(default_factory=dict)
    claims: dict[int, tuple[int, str]] = field(default_factory=dict)
    digests: dict[int, str] = field(default_factory=dict)
    starts: dict[Identity, Start] = field(default_factory=dict)
    given: dict[Identity, dict[str, Propose]] = field(default_factory=dict)
    learned: dict[tuple[int, int], Counter[tuple[int, int]]] = field(default_factory=dict)
    dones: dict[tuple[int, str, int, int, int], str] = field(default_factory=dict)
    plain_commits: dict[tuple[str, int, int], tuple[str, tuple[str, ...]]] = field(default_factory=dict)
    plain_values: dict[int, set[tuple[int, int]]] = field(default_factory=dict)
    heard: dict[int, float] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    proved: set[int] = field(default_factory=set)
    barred: set[str] = field(default_factory=set)
    skipped: int = 0

    def fork(self) -> Ledger:
        """The account of another line, in which numbers are given and lives end as in this one."""
        shared = {name: getattr(self, name) for name in ("starts", "given", "learned", "dones", "dead", "proved")}
        return Ledger(**shared)

    def digest(self, identity: Identity) -> str:
        """The exact result of an attempt: a function of whose numbers are in it, and of nothing else."""
        given = self.given[identity]
        names = [member.name for member in self.starts[identity].contributors]
        return digest_of(identity.tag, [(given[n].incarnation, given[n].sequence) for n in names])

    def started(self, start: Start) -> None:
        known = self.starts.setdefault(start.identity, start)
        assert known == start, f"two different attempts are both called {start.identity}"
        assert len({member.name for member in start.contributors}) == len(start.contributors) > 0
        assert list(start.contributors) == sorted(start.contributors, key=lambda member: member.name)
        assert abs(sum(start.shares) - 1) < 1e-6 and len(start.shares) == len(start.contributors)
        if start.tag == SPREAD:
            assert start.shares == tuple(float(member.name == ROOT) for member in start.contributors)
        if start.tag == GATHER:
            assert start.elements == sum(member.incarnation for member in start.contributors)
        if start.pattern == "tree":
            assert start.shares == tuple(float(parent < 0) for parent in start.parents)
        if start.tag == OUTER:
            assert start.round == self.round and start.base_version == self.version

    def deposit(self, start: Start, slot: Slot, learned: Counter[tuple[int, int]] | None) -> None:
        assert slot.proposal is not None
        self.learned[slot.proposal.incarnation, slot.proposal.sequence] = learned or Counter()
        given = self.given.setdefault(start.identity, {})
        assert slot.proposal.incarnation not in {p.incarnation for p in given.values()}
        names = {member.incarnation: member.name for member in start.contributors}
        if slot.proposal.incarnation in names:
            given[names[slot.proposal.incarnation]] = slot.proposal

    def attempt(self, generation: int, tag: str, round: int, attempt: int) -> Start:
        (start,) = (
            start
            for i, start in self.starts.items()
            if (i.generation, i.tag, i.round, i.attempt) == (generation, tag, round, attempt)
        )
        return start

    def committed(self, record: Committed, members: set[int]) -> None:
        assert not self.halted, "a round was committed although nobody can say what the state is"
        assert record.round == self.round, f"round {record.round} is committed, {self.round} was due"
        self.round += 1
        self.serial += 1
        if record.skipped:
            assert record.version == self.version and not record.contributors and not record.tokens
            self.skipped += 1
            self.note()
            return
        assert record.version == self.version + 1
        start = self.attempt(self.generation, record.tag, record.round, record.attempt)
        self._check_votes(start, record.digest, members)
        assert record.contributors == tuple(member.name for member in start.contributors)
        base = self._count(record, start)
        self.version, self.digests[record.version] = record.version, record.digest
        self.truth = digest_of(base, record.digest)
        self.claims.clear()
        self.note()

    def _check_votes(self, start: Start, digest: str, members: set[int]) -> None:
        assert digest == self.digest(start.identity), "the digest is not that of the contributors' numbers"
        votes = [self.dones.get((start.generation, start.tag, start.round, start.attempt, m.incarnation))
                 for m in start.contributors if m.incarnation in members]  # fmt: skip
        assert votes and set(votes) == {digest}, f"committed with the votes {votes}"

    def _count(self, record: Committed, start: Start) -> str:
        """Adds what the round counts; returns the state that it was measured from."""
        proposals = [self.given[start.identity][member.name] for member in start.contributors]
        assert record.tokens == sum(proposal.weight for proposal in proposals)
        for proposal in proposals:
            learned = self.learned[proposal.incarnation, proposal.sequence]
            self.samples.update(learned)
            for shard, begin in proposal.starts.items():
                end = proposal.cursors[shard]
                assert end == begin or begin == self.cursors[shard], f"shard {shard}: counted from {begin} again"
                learned = learned - Counter((shard, position) for position in range(begin, end))
                self.cursors[shard] = max(end, self.cursors[shard])
            assert not learned, f"trained on and not counted: {learned}"
        self.tokens += record.tokens
        assert max(self.samples.values(), default=1) == 1, "a sample was counted twice"
        assert self.tokens == sum(self.cursors.values())
        bases = {proposal.base_hash for proposal in proposals}
        assert len(bases) == 1, f"contributions were measured from different states: {bases}"
        return bases.pop()

    def note(self) -> None:
        samples, cursors = frozenset(self.samples), dict(self.cursors)
        self.history[self.serial] = Account(self.version, self.tokens, cursors, samples, self.truth)

    def is_void(self, offer: Checkpoint) -> bool:
        loop = run_state(offer.state).loop(OUTER)
        return loop is not None and loop.digests[0] in self.void

    def check(self, state: RunState) -> Account:
        """Whether this run state says exactly what the account says; returns the account as of then."""
        account = self.history[state.serial]
        loop = state.loop(OUTER)
        assert loop is not None and loop.versions == {0: account.version}
        assert state.tokens == account.tokens == state.data.committed
        for shard, position in account.cursors.items():
            layout = Layout(state.data.samples, state.data.shard_size, state.data.seed)
            assert state.data.cursors.get(shard, layout.size(shard, state.data.ends)) == position
        return account

    def restored(self, record: Restored, account: Account) -> None:
        """What was committed after it is void: its samples count again, its rounds keep their numbers."""
        state = record.state
        loop = state.loop(OUTER)
        assert not (loop and loop.digests[0] in self.void), "the run goes on from what nobody could say what it is"
        self.serial = max(self.serial, state.serial) + 1
        self.round = max(self.round, loop.rounds if loop else 0)
        self.version, self.tokens, self.truth = account.version, account.tokens, account.truth
        self.cursors, self.samples = Counter(account.cursors), Counter(account.samples)
        self.generation = max(self.generation, record.generation)
        self.halted = False
        self.claims.clear()
        self.note()

    def halt(self, record: Halted) -> None:
        assert record.version == self.version and not self.halted
        self.halted = True
        self.void.add(self.digests[record.version])
        self.offers.clear()

    def founded(self, record: LoopFounded) -> None:
        assert self.version <= 0, "committed rounds were thrown away"
        self.version, self.truth = 0, record.state_hash
        self.note()

    def departed(self, record: Departed, now: float) -> None:
        proof = record.incarnation in self.proved
        if "refused" in record.reason:
            assert record.incarnation in self.dead, "a living process was declared gone"
        elif not proof and record.name not in self.barred:
            silence = now - self.heard[record.incarnation]
            assert silence > TIMES.evict_after, f"evicted after {silence} s of silence: {record.reason}"

    def plain(self, commit: Commit) -> None:
        """A plain commit seen by a peer: one meaning per round, and within a generation no number counts twice."""
        key = (commit.tag, commit.generation, commit.round)
        seen = (commit.digest, commit.contributors)
        assert self.plain_commits.setdefault(key, seen) == seen, f"plain round {commit.round} has two outcomes"


@dataclass
class Host:
    """Where a coordinator runs, with its journal and the channels of the peers that talk to it.

    lost: it never comes back. accepted: a person has told it to go on without a majority. crash: what is to happen in
    the turn that comes, see `World._obey`.
    """

    ledger: Ledger
    journal: list[Record] = field(default_factory=list)
    membership: Membership | None = None
    recovery: Recovery | None = None
    lost: bool = False
    accepted: bool = False
    crash: str = ""
    up: dict[int, deque[Message]] = field(default_factory=dict)
    down: dict[int, deque[Message]] = field(default_factory=dict)


class World:
    """Coordinators, peers, channels and time. Each method is one thing that can happen.

    host: where peers look for the coordinator first; the newest one. disk: checkpoints by peer name, which outlive it.
    accounts: what each run state stands for. voided: how often a line was left for a higher one.
    """

    def __init__(
        self, policy: RunPolicy | None = None, *, hide: bool = False, data: SimData | None = None, ahead: int = 0
    ) -> None:
        self.policy = policy or RunPolicy()
        self.hide, self.data, self.ahead = hide, data, ahead
        self.now = 100.0
        self.hosts: list[Host] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.peers: dict[int, SimPeer] = {}
        self.given_up: dict[str, GivenUp] = {}
        self.disk: dict[str, Checkpoint] = {}
        self.accounts: dict[bytes, Account] = {}
        self.cuts: set[frozenset[str]] = set()
        self.drifted = False
        self.seen: set[str] = set()
        self.steps = 0
        self.evidence = 0
        self.serve(Ledger())
        self.restart()

    # --- the coordinator --------------------------------------------------------------------------------------------

    @property
    def host(self) -> Host:
        return self.hosts[-1]

    @property
    def membership(self) -> Membership | None:
        return self.host.membership

    @property
    def ledger(self) -> Ledger:
        return self.host.ledger

    @property
    def journal(self) -> list[Record]:
        return self.host.journal

    @property
    def down(self) -> dict[int, deque[Message]]:
        return self.host.down

    @property
    def crash(self) -> str:
        return self.host.crash

    @crash.setter
    def crash(self, when: str) -> None:
        self.host.crash = when

    def serve(self, ledger: Ledger) -> Host:
        """A coordinator's place that peers can find from now on."""
        host = Host(ledger)
        host.up, host.down = ({incarnation: deque() for incarnation in self.peers} for _ in range(2))
        self.hosts.append(host)
        for peer in self.peers.values():
            peer.sole = len(self.hosts) == 1
        return host

    def restart(self, host: Host | None = None) -> None:
        """The next life of the coordinator, from what its journal holds."""
        host = host or self.host
        if host.membership is None and host.recovery is None and not host.lost:
            self._open(host, list(host.journal))

    def _open(self, host: Host, records: list[Record]) -> None:
        host.membership = Membership(RUN, self.policy, TIMES)
        host.ledger.offers.clear()
        for incarnation in host.ledger.heard:
            host.ledger.heard[incarnation] = self.now
        self._obey(host.membership.begin(records, self.now), host)
        for state in host.membership.members.values() if host.membership else ():
            host.ledger.heard[state.member.incarnation] = self.now

    def kill_coordinator(self, keep: int = 0, host: Host | None = None) -> None:
        """keep: how many of the messages under way to each peer still arrive."""
        host = host or self.host
        if host.membership is None:
            return
        if not host.crash:
            self.check_replay(host)
        host.membership, host.crash = None, ""
        for incarnation, queue in host.down.items():
            host.down[incarnation] = deque(list(queue)[:keep])

    def lose(self, host: Host) -> None:
        """The host burns down, with the journal."""
        self.kill_coordinator(host=host)
        host.lost, host.recovery = True, None

    def recover(self) -> None:
        """A new host, for when the others are believed to be lost: it asks the peers that find it what they know."""
        host = self.serve(self.ledger.fork())
        host.recovery = Recovery(RUN, skipped=len(self.hosts))  # they would draw different ones, too

    def black_out(self, *, journal: bool) -> None:
        """The whole run dies; peers keep their checkpoints, and the coordinator its journal or nothing."""
        for peer in self.peers.values():
            self.die(peer, keep=False)
        if journal:
            self.kill_coordinator()
            self.restart()
            return
        self.start_anew()

    def start_anew(self) -> None:
        """With an empty journal; what there is are checkpoints."""
        for host in self.hosts:
            self.lose(host)
        self.serve(Ledger())
        self.restart()
        for peer in self.peers.values():
            self.move(peer, self.host)

    def check_replay(self, host: Host | None = None) -> None:
        """The journal gives back everything that lasts, and so does the small run state."""
        membership = (host or self.host).membership
        assert membership is not None
        replayed = Membership(RUN, self.policy, TIMES)
        replayed.begin(list((host or self.host).journal), self.now)
        assert durable(replayed) == durable(membership)
        state = membership.state()
        assert timeless(replayed.state()) == timeless(state)
        rebuilt = Membership(RUN, self.policy, TIMES)
        rebuilt.begin([Restored(state=state, generation=state.generation, reason="")], self.now)
        assert timeless(replace(rebuilt.state(), serial=state.serial)) == timeless(state)
        assert rebuilt.epoch >= membership.epoch and rebuilt.generation > membership.generation

    def _obey(self, effects: list[Any], host: Host | None = None) -> None:
        """crash "before": the turn's records are lost with it; "after": they are durable, but nothing was sent."""
        host = host or self.host
        membership, ledger, crash = host.membership, host.ledger, host.crash
        assert membership is not None
        for effect in effects if crash != "before" else ():
            if isinstance(effect, Persist):
                self._persist(effect.record, host)
            elif isinstance(effect, Emit):
                self._emitted(effect, host)
            elif isinstance(effect, Send) and not crash:
                self._sent(effect, host)
        if not crash:
            assert membership.epoch >= ledger.epoch and membership.tokens == ledger.tokens
            assert membership.serial == ledger.serial
            ledger.epoch = membership.epoch
        elif effects:
            self.kill_coordinator(host=host)

    def _persist(self, record: Record, host: Host) -> None:
        assert host.membership is not None
        host.journal.append(record)
        ledger = host.ledger
        match record:
            case Opened():
                assert record.generation == ledger.generation + 1
                ledger.generation = record.generation
            case Committed():
                if any(not other.lost and other.ledger.generation > ledger.generation for other in self.hosts):
                    self.seen.add("went on beside a higher line")
                ledger.committed(record, {s.member.incarnation for s in host.membership.members.values()})
                self._look_at_twins(record, host)
            case Departed():
                ledger.departed(record, self.now)
                ledger.offers.pop(record.incarnation, None)
            case Barred():
                ledger.barred.add(record.name)
            case LoopFounded():
                ledger.founded(record)
            case Halted():
                ledger.halt(record)
            case Restored():
                self._restored(record, host)

    def _look_at_twins(self, record: Committed, host: Host) -> None:
        assert host.membership is not None
        assert not {*record.covers} & {*record.contributors}
        if record.covers:
            start = host.ledger.attempt(host.ledger.generation, record.tag, record.round, record.attempt)
            both = {member.name for member in start.receivers} & {*record.covers}
            self.seen.add("both twins had proposed" if both else "one twin had proposed")

    def _restored(self, record: Restored, host: Host) -> None:
        order = order_of(record.state)
        if host.ledger.offers:
            assert order == max(offer.order for offer in host.ledger.offers.values()), "something newer was offered"
        account = self.accounts[key_of(record.state)] if record.state.loops else NOTHING
        host.ledger.restored(record, account)
        for peer in self.peers.values():
            peer.sole = False

    def _emitted(self, effect: Emit, host: Host) -> None:
        self.events.append((effect.event, effect.fields))
        if effect.event == "parity.mismatch" and "held" in effect.fields:
            self._check_repair(effect.fields, host)

    def _check_repair(self, fields: dict[str, Any], host: Host) -> None:
        """Nobody who is right is repaired while more than half of those who have computed the version are right."""
        ledger = host.ledger
        assert host.membership is not None
        assert self.drifted or not fields["version"], f"{fields['peer']} is named although no bit fell over"
        if fields["held"] != ledger.truth or fields["version"] != ledger.version:
            return
        members = {state.member.incarnation for state in host.membership.members.values()}
        claims = [held for i, (version, held) in ledger.claims.items() if i in members and version == ledger.version]
        right = claims.count(ledger.truth)
        assert 2 * right <= len(claims), f"{fields['peer']} is right, and so are {right} of {len(claims)}"

    def _sent(self, effect: Send, host: Host) -> None:
        message = effect.message
        if isinstance(message, Begin):
            host.ledger.started(message.start)
            self._check_one_of_twins(message.start, host)
        if isinstance(message, Commit) and message.tag != OUTER:
            host.ledger.plain(message)
        if isinstance(message, (Commit, Base)) and message.state:
            state = run_state(message.state)
            self.accounts.setdefault(key_of(state), host.ledger.check(state))
        peer = self.peers.get(effect.incarnation)
        if peer is not None and peer.host is host:
            host.down[effect.incarnation].append(message)

    def _check_one_of_twins(self, start: Start, host: Host) -> None:
        """No two peers that read the same shards contribute to one round."""
        assert host.membership is not None
        if start.tag == OUTER and host.membership.table:
            names = [member.name for member in start.contributors]
            teams = host.membership.state().teams
            assert len({teams.get(name, name) for name in names}) == len(names), f"twins are both in {names}: {teams}"

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes; longer than a heartbeat means that the coordinators themselves stood still."""
        self.now += seconds
        for host in self.hosts:
            self._tick(host, gap=seconds > TIMES.heartbeat)

    def _tick(self, host: Host, *, gap: bool) -> None:
        before = len(self.events)
        if gap or host.membership is None:
            for incarnation in host.ledger.heard:
                host.ledger.heard[incarnation] = self.now
        if host.membership is not None:
            self._obey(host.membership.tick(self.now), host)
            blamed = {event for event, _ in self.events[before:]} & {"peer.suspected", "peer.evicted"}
            assert not (gap and blamed), "others were blamed for the coordinator's own silence"
        elif host.recovery is not None and host.recovery.ready:
            self._rebuild(host, host.recovery)

    def _rebuild(self, host: Host, recovery: Recovery) -> None:
        """The new line begins."""
        host.recovery = None
        records = recovery.records()
        restored = records[0]
        assert isinstance(restored, Restored)
        self.seen.add("rebuilt by a person's word" if host.accepted else "rebuilt by a majority")
        if not host.accepted:
            self._check_majority(host, restored, recovery.view)
        host.membership = Membership(RUN, self.policy, TIMES)
        for record in records:
            self._persist(record, host)
        self._open(host, records)

    def _check_majority(self, host: Host, restored: Restored, view: dict[str, int]) -> None:
        """A majority of the last view obeys nobody else any more; what a majority had heard of is not lost."""
        told = host.ledger.recalled
        there = [i for i in view.values() if i in told and told[i].generation == restored.generation]
        assert 2 * len(there) > len(view), f"rebuilt from {there} of {view}"
        assert all(self.peers[i].generation >= restored.generation for i in there)
        known = sorted((order_of(run_state(self.peers[i].knows)) if self.peers[i].knows else (0, 0)
                        for i in view.values()), reverse=True)  # fmt: skip
        assert order_of(restored.state) >= known[len(view) // 2], "most had heard of a commit that is lost"

    def to_coordinator(self, name: str, message: Message, host: Host | None = None) -> None:
        """One message arrives. What comes from an old life must change nothing that lasts."""
        host = host or self.host
        membership = host.membership
        if host.recovery is not None:
            if isinstance(message, Join) and message.view:
                host.ledger.recalled[message.incarnation] = message
            for effect in host.recovery.receive(name, message):
                assert isinstance(effect, Send)
                self._sent(effect, host)
        if membership is None:
            return
        state = membership.members.get(name)
        known = state is not None and state.member.incarnation == message.incarnation
        current = known and message.generation == membership.generation
        stale = message.incarnation in membership.retired or not (
            isinstance(message, (Join, Gone, SiteReport)) or current
        )
        before = durable(membership) if stale else ""
        if not stale:
            self._note(name, message, state, host.ledger)
        effects = membership.receive(name, message, self.now)
        assert not stale or durable(membership) == before, "a message of an old life changed the run"
        self._obey(effects, host)

    def _note(self, name: str, message: Message, state: Any, ledger: Ledger) -> None:
        ledger.heard[message.incarnation] = self.now
        if isinstance(message, DoneReport):
            key = (message.generation, message.tag, message.round, message.attempt, message.incarnation)
            ledger.dones[key] = message.digest
        elif isinstance(message, (Leave, Gone)):
            ledger.proved.add(message.ended if isinstance(message, Gone) else message.incarnation)
        elif isinstance(message, SiteReport):
            ledger.proved.update(gone.ended for gone in message.given_up)
        elif isinstance(message, Join) and state is not None and state.member.incarnation != message.incarnation:
            ledger.proved.add(state.member.incarnation)
        elif isinstance(message, Applied) and message.computed:
            ledger.claims[message.incarnation] = (message.version, message.state_hash)
        elif isinstance(message, Enter):
            ledger.offers.pop(message.incarnation, None)
            if message.offered >= 0:
                offer = Checkpoint(message.offered, message.offered_hash, message.state, "")
                if not ledger.is_void(offer):
                    ledger.offers[message.incarnation] = offer

    # --- peers ------------------------------------------------------------------------------------------------------

    def start(self, name: str, site: str = "here") -> SimPeer:
        """A new life of this name; an older one may still be running."""
        hidden = self.hide and name in HIDDEN
        peer = SimPeer(
            name, 1000 + len(self.peers), host=self.host, hidden=hidden, disk=self.disk.get(name), data=self.data,
            ahead=self.ahead, twinned=self.policy.redundancy > 1, site=site,
        )  # fmt: skip
        self.peers[peer.incarnation] = peer
        peer.sole = len(self.hosts) == 1
        for host in self.hosts:
            host.up[peer.incarnation], host.down[peer.incarnation] = deque(), deque()
        peer.join()
        self.flush(peer)
        return peer

    def flush(self, peer: SimPeer) -> None:
        for message in peer.outbox:
            if isinstance(message, Applied) and message.version > 0 and not self.drifted and len(self.hosts) == 1:
                self._check_true(message)
        assert peer.host is not None
        peer.host.up[peer.incarnation].extend(peer.outbox)
        peer.outbox = []

    def _check_true(self, message: Applied) -> None:
        """As long as no bit falls over, whoever holds a version of the run's only line holds the true one."""
        truths = {account.truth for account in self.ledger.history.values() if account.version == message.version}
        assert message.state_hash in truths, f"this is no version {message.version}: {message.state_hash}"

    def move(self, peer: SimPeer, host: Host) -> None:
        """The peer has not heard its coordinator for a while, and tries another address."""
        if peer.running and peer.host is not host:
            assert peer.host is not None
            peer.host.down[peer.incarnation].clear()
            peer.host = host

    def save(self, peer: SimPeer) -> None:
        """Writes a checkpoint of what it holds."""
        if peer.running and peer.mode == "training" and peer.version in peer.saved:
            self.disk[peer.name] = peer.saved[peer.version]

    def corrupt(self, peer: SimPeer, *, lasting: bool = False) -> None:
        """The peer's next outer step gives other bits. lasting: whenever it is done again, too."""
        peer.corrupt = self.drifted = True
        peer.defective = lasting

    def act(self, peer: SimPeer, name: str, *arguments: Any) -> None:
        """The peer's script calls one of its methods."""
        if peer.running:
            getattr(peer, name)(*arguments)
            self.flush(peer)

    def die(self, peer: SimPeer, *, keep: bool = True) -> None:
        """The process ends; what it had sent may still arrive."""
        peer.alive = False
        self.ledger.dead.add(peer.incarnation)
        for host in self.hosts:
            host.down[peer.incarnation].clear()
            if not keep:
                host.up[peer.incarnation].clear()

    def prove(self, peer: SimPeer) -> None:
        if not peer.alive:
            gone = Gone(run=RUN, incarnation=1, name=peer.name, ended=peer.incarnation, evidence="killed by signal 9")
            for host in self.hosts:
                self.to_coordinator("supervisor", gone, host)

    def hand_over(self, peer: SimPeer, *, room: int) -> None:
        """The supervisor starts no further life of it, nor of those that it gave up before. Another site has room."""
        if not peer.alive:
            self.given_up[peer.name] = GivenUp(name=peer.name, ended=peer.incarnation, reason="it dies")
        for host in self.hosts:
            self.to_coordinator("supervisor", SiteReport(run=RUN, incarnation=2, site="there", room=room), host)
            given_up = tuple(self.given_up.values())
            self.to_coordinator("supervisor", SiteReport(run=RUN, incarnation=1, site="here", given_up=given_up), host)

    def lose_link(self, peer: SimPeer, other: SimPeer) -> None:
        """An idle link breaks; if the other process is gone, its port says so."""
        if peer is other or (other.alive and self.linked(peer.name, other.name)):
            return
        evidence = "eof" if other.alive or other.hidden else "refused"
        failure = LinkFailure(peer=other.name, incarnation=other.incarnation, evidence=evidence)
        if peer.running:
            peer.say(LinkLost, failure=failure)
            self.flush(peer)

    def deliver_up(self, peer: SimPeer, count: int = 1) -> None:
        """What it said before it moved arrives, too, where it was said."""
        for host in self.hosts:
            queue = host.up[peer.incarnation]
            for _ in range(min(count, len(queue))):
                if host.membership is not None or host.recovery is not None:
                    self.to_coordinator(peer.name, queue.popleft(), host)

    def deliver_down(self, peer: SimPeer, count: int = 1) -> None:
        assert peer.host is not None
        queue = peer.host.down[peer.incarnation]
        for _ in range(min(count, len(queue)) if peer.running else 0):
            message, generation = queue.popleft(), peer.generation
            before = [slot.start for slot in peer.slots.values()]
            peer.receive(message, self.now)
            assert peer.generation == max(generation, message.generation), "it obeys a lower generation"
            for slot, old in zip(peer.slots.values(), before, strict=True):
                if slot.start is not None and slot.start is not old:
                    assert slot.proposal is not None
                    peer.host.ledger.deposit(slot.start, slot, peer.offered.get(slot.proposal.sequence))
            self.flush(peer)

    def lives(self, member: Member) -> SimPeer | None:
        peer = self.peers.get(member.incarnation)
        return peer if peer is not None and peer.running else None

    def linked(self, one: str, other: str) -> bool:
        hidden = self.hide and one in HIDDEN and other in HIDDEN
        return frozenset((one, other)) not in self.cuts and not hidden

    # --- the data plane ---------------------------------------------------------------------------------------------

    def exchange(self, peer: SimPeer, tag: str) -> None:
        """The peer's attempt goes on until it has the result, has failed, or can only wait."""
        slot = peer.slots[tag]
        start = slot.start
        if not peer.running or start is None or slot.report is not None:
            return
        lost = self._lost(peer, slot, start)
        if lost:
            peer.failed(slot, tuple(lost))
        elif self._complete(start):
            peer.done(slot, self.ledger.digest(start.identity))
        self.flush(peer)

    def _lost(self, peer: SimPeer, slot: Slot, start: Start) -> list[LinkFailure]:
        given = self.ledger.given[start.identity]
        used = links_of(start)
        lost = []
        for member in start.contributors:
            if member.incarnation == peer.incarnation or frozenset((member.name, peer.name)) not in used:
                continue
            evidence = self._trouble(peer, member, slot, member.name in given)
            if evidence:
                lost.append(LinkFailure(peer=member.name, incarnation=member.incarnation, evidence=evidence))
        return lost

    def _trouble(self, peer: SimPeer, member: Member, slot: Slot, given: bool) -> str:
        self.evidence += 1
        other = self.peers[member.incarnation]
        if not self.linked(peer.name, member.name):
            return ("timeout", "unreachable", "eof", "reset")[self.evidence % 4]
        if not other.alive and not (given and self.evidence % 2):
            return ("refused", "eof")[self.evidence // 2 % 2] if not other.hidden else "eof"
        if not given and other.alive and self.now - slot.began > TIMES.chunk:
            return "timeout"
        return ""

    def _complete(self, start: Start) -> bool:
        if len(self.ledger.given[start.identity]) < len(start.contributors):
            return False
        return all(self.linked(*pair) for pair in links_of(start))

    def transfer(self, peer: SimPeer) -> None:
        """Fetches the state, or pulls missed results, from whoever still serves them."""
        if not peer.running or peer.stuck:
            return
        if peer.fetching is not None:
            self._fetch(peer, peer.fetching)
        peer.advance(lambda commit: self._pull(peer, commit))
        if peer.mode == "training" and peer.wanted:  # nobody gives the result any more: take the state itself
            peer.mode = "entering"
        self.flush(peer)

    def _fetch(self, peer: SimPeer, base: Base) -> None:
        for source in self._reachable(peer, base.sources):
            state = source.states.get(base.version, "")
            if state and base.state_hash in ("", state):
                peer.fetched(base, state)
                return
        peer.fetching = None

    def _pull(self, peer: SimPeer, commit: Commit) -> bool:
        return any(
            commit.digest in (source.results.get(commit.version), source.slots[OUTER].result)
            for source in self._reachable(peer, commit.sources)
        )

    def _reachable(self, peer: SimPeer, members: tuple[Member, ...]) -> list[SimPeer]:
        sources = [self.lives(member) for member in members if self.linked(peer.name, member.name)]
        return [source for source in sources if source is not None and source is not peer]

    # --- when nothing is in the way any more ------------------------------------------------------------------------

    def heal(self) -> None:
        """Everything works again, and one coordinator is left: the one that peers follow, or a new one."""
        self.cuts.clear()
        for peer in self.peers.values():
            peer.frozen = False
        host = self._leading()
        for other in self.hosts:
            other.crash = ""
            if other is not host:
                self.lose(other)
        self.hosts.remove(host)
        self.hosts.append(host)
        self.restart()
        for peer in self.peers.values():
            self.move(peer, host)

    def _leading(self) -> Host:
        """The coordinator that nobody has left for a higher one; a new one if there is none."""
        followed = max((peer.generation for peer in self.peers.values() if peer.running), default=0)
        host = max(self.hosts, key=lambda host: -1 if host.lost else host.ledger.generation)
        if host.lost or host.ledger.generation < followed:
            self.recover()
            host = self.host
        return host

    def turn(self, *, read: int = 2, seconds: float = 0.5) -> None:
        """Everybody does what is next; all that is said arrives."""
        for peer in list(self.peers.values()):
            if peer.running:
                self._live(peer, read)
        for _ in range(3):
            for peer in list(self.peers.values()):
                self.deliver_up(peer, 100)
            for peer in list(self.peers.values()):
                self.deliver_down(peer, 100)
                for tag in (OUTER, *SPECS):
                    self.exchange(peer, tag)
        self.tick(seconds)

    def _live(self, peer: SimPeer, read: int) -> None:
        peer.beat()
        peer.ask_again()
        if peer.joined:
            if peer.mode == "out":
                peer.enter()
            if not peer.reader.left() and peer.mode == "training":
                peer.lease()
            peer.read(read)
            peer.propose()
        self.flush(peer)
        self.transfer(peer)

    def run_until(self, ready: Callable[[], bool], *, turns: int = 200, read: int = 2) -> bool:
        for _ in range(turns):
            if ready():
                return True
            self.turn(read=read)
        return ready()

    def accept(self) -> None:
        """A person decides to go on with those that are there."""
        if self.host.recovery is not None:
            self.host.recovery.accept()
            self.host.accepted = True

    def check_audit(self) -> None:
        """The account of the journal says of itself what the ledger has seen."""
        assert self.membership is not None
        epochs = audit(self.journal)
        assert epochs == self.membership.account.report()
        assert sum(epoch.committed for epoch in epochs) == self.ledger.tokens
        assert all((epoch.twice, epoch.missing, epoch.partial) == (0, 0, 0) for epoch in epochs)
        if self.membership.progress.finished and self.data:
            assert len(epochs) == self.data.epochs and all(epoch.complete for epoch in epochs)

    def over(self, target: int) -> bool:
        """Whether the run has come to that version, or cannot: nobody has a state that it could go on from, or nobody
        can say what the state is."""
        members = self.membership.members if self.membership else {}
        able = [
            peer for peer in self.peers.values() if peer.running and not peer.stuck and peer.mode != "stopped"
            and (peer.name not in members or members[peer.name].member.incarnation == peer.incarnation)
        ]  # fmt: skip
        offers = [offer for peer in able if (offer := peer.newest()) and not self.ledger.is_void(offer)]
        if self.ledger.halted:
            training = [peer for peer in able if peer.mode == "training" and peer.name in members]
            return not offers and not training
        nothing = not offers
        refused = any(refused.error == "NoSource" for peer in self.peers.values() for refused in peer.refusals)
        return self.ledger.version >= target or (self.ledger.version > 0 and nothing and refused)

    def agreed(self) -> bool:
        """Whether all that train hold one state of each version; until somebody is repaired they may not."""
        training = [peer for peer in self.peers.values() if peer.running and peer.mode == "training"]
        held = {(peer.version, peer.states[peer.version]) for peer in training}
        versions = [version for version, _ in held]
        return len(versions) == len(set(versions)) or self.ledger.halted

    def happened(self) -> set[str]:
        """What this world has seen, in words."""
        starts = {f"{start.pattern} {start.op}" for start in self.ledger.starts.values()}
        return {event for event, _ in self.events} | starts | self.seen

    def check_truth(self) -> None:
        """As long as no bit falls over, the newest version is the true one."""
        if not self.drifted:
            newest = [peer for peer in self.peers.values() if peer.running and peer.mode == "training"
                      and peer.version == self.ledger.version > 0]  # fmt: skip
            assert {peer.states[peer.version] for peer in newest} <= {self.ledger.truth}

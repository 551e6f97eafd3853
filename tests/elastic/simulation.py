"""A whole run in one thread: the real Membership, simulated peers, and a network and clock that a test drives.

Nothing here waits, opens a socket or reads a clock. Every step of the coordinator is compared with an independent
account (`Ledger`) of what may be committed; a difference is an AssertionError.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from collectives.records import Identity, LinkFailure, Member, Start
from elastic.audit import audit
from elastic.config import RunPolicy, Timeouts
from elastic.journal import Committed, Departed, LoopFounded, Opened, Record
from elastic.membership import Emit, Membership, Persist, Send
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
    Expelled,
    FailedReport,
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
    Welcome,
    Withdraw,
)
from elastic.runstate import RunState
from elastic.shards import Layout, ShardReader, Stretch

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


def durable(membership: Membership) -> str:
    """Everything that a journal must give back, as one comparable text."""
    table = membership.table
    return repr((
        sorted((name, state.member, state.site, state.life) for name, state in membership.members.items()),
        sorted(membership.lives.items()),
        sorted(membership.retired.items()),
        sorted((tag, loop.spec, loop.versions, loop.rounds) for tag, loop in membership.loops.items()),
        table and (sorted(table.holders.items()), sorted(table.cursors.items()), sorted(table.free), table.next,
                   table.committed),
        membership.tokens, membership.epoch,
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
    """

    def __init__(
        self, name: str, incarnation: int, *, hidden: bool = False, data: SimData | None = None, ahead: int = 0
    ) -> None:
        self.hidden, self.data, self.ahead = hidden, data or SimData(), ahead
        self.name, self.incarnation, self.generation = name, incarnation, 0
        self.alive, self.frozen, self.joined, self.stuck = True, False, False, False
        self.expelled = ""
        self.mode = "out"
        self.version = -1
        self.computed = self.corrupt = False
        self.before = ""
        self.knows: RunState | None = None
        self.members: dict[str, int] = {}
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
        common = {"run": RUN, "generation": self.generation, "incarnation": self.incarnation}
        self.outbox.append(kind(**common | fields))

    # --- what the training script does ------------------------------------------------------------------------------

    def join(self) -> None:
        self.say(Join, member=self.member, site="here", commits=tuple(self.notes))

    def enter(self) -> None:
        if self.mode == "out":
            self.mode = "entering"
        if self.mode == "entering" and self.fetching is None:
            self.say(Enter, tag=OUTER, spec=OUTER_SPEC, state_hash=self.own_state)

    def lease(self) -> None:
        self.questions += 1
        layout = self.data.layout
        self.say(LeaseRequest, samples=layout.samples, shard_size=layout.shard_size, seed=layout.seed, ends=self.ends,
                 epochs=self.data.epochs, holding=self.reader.holding, sequence=self.questions)  # fmt: skip

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
                    base_version=self.version, base_hash=self.states[self.version])  # fmt: skip
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
        if isinstance(message, Expelled):
            self.expelled = message.reason
            return
        if message.generation < self.generation:
            return
        if message.generation > self.generation:
            self._new_generation(message.generation)
        match message:
            case Represent():
                self.joined = False
                self.join()
            case Welcome():
                self._welcomed()
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
            case Leases():
                self._leases(message)
            case Refused():
                self._refused(message)

    def _new_generation(self, generation: int) -> None:
        self.generation, self.joined = generation, False
        for slot in self.slots.values():
            slot.start = slot.report = None

    def _welcomed(self) -> None:
        fresh = not self.joined
        self.joined = True
        if fresh and self.mode == "training":
            self.announce()
        for slot in self.slots.values() if fresh else ():
            if slot.proposal is not None:
                self._say_proposal(slot)

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
        if commit.skipped:  # what was proposed was not counted: it goes into the next proposal
            if commit.round > slot.last_round:
                slot.last_round = commit.round
                slot.close()
        elif commit.version > self.version and self.mode != "out":
            self.wanted[commit.version] = commit
            self.advance(lambda _: False)

    def advance(self, pull: Callable[[Commit], bool]) -> None:
        """Applies what was committed, as far as the results are here or can be pulled."""
        while self.mode == "training" and (commit := self.wanted.get(self.version + 1)) is not None:
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
        self.before, self.last = self.states[self.version], commit.digest
        state = digest_of(self.before, commit.digest)
        if self.corrupt:
            self.corrupt, state = False, digest_of("bits fell over", state)
        self.results[commit.version] = commit.digest
        self.results.pop(commit.version - KEPT, None)
        self._adopt(commit.version, state, computed=True)

    def _adopt(self, version: int, state: str, *, computed: bool = False) -> None:
        self.version, self.states[version], self.computed = version, state, computed
        self.states.pop(version - KEPT, None)
        for old in [old for old in self.wanted if old <= version]:
            del self.wanted[old]
        self.announce()

    def announce(self) -> None:
        state = self.states[self.version]
        self.say(Applied, tag=OUTER, fragment=0, version=self.version, state_hash=state, computed=self.computed)

    def _consume(self, proposal: Propose) -> None:
        self.reader.forget(proposal.cursors)
        self.learned -= self.offered[proposal.sequence]

    def _base(self, base: Base) -> None:
        if self.mode == "entering" and not base.sources and base.state_hash == self.own_state:
            self.mode = "training"
            self._adopt(base.version, base.state_hash)
        elif base.sources and (self.mode == "entering" or self._differs(base)):
            self.mode, self.fetching = "entering", base

    def _differs(self, base: Base) -> bool:
        other = (base.version, base.state_hash) != (self.version, self.states.get(self.version))
        return self.mode == "training" and other and base.version >= self.version

    def _recompute(self, message: Recompute) -> None:
        able = self.mode == "training" and self.computed and message.version == self.version
        again = digest_of(self.before, self.last) if able else ""
        self.say(Recomputed, tag=OUTER, fragment=0, version=message.version, state_hash=again)

    def fetched(self, base: Base, state: str) -> None:
        """The whole state is here; what was read and not committed is read again, if this is not the first time."""
        if self.version >= 0:
            self.start_over()
        self.mode, self.fetching, self.states, self.results = "training", None, {}, {}
        self._adopt(base.version, state)

    def start_over(self) -> None:
        self.slots[OUTER].close()
        self.version = -1
        self.doubts.clear()
        self.learned.clear()
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
        self.lease()
        self.rewinds_to = self.questions

    def _leases(self, message: Leases) -> None:
        if message.sequence != self.questions:
            return
        assert all(self.reader.end(epoch, samples) for epoch, samples in message.ends.items())
        assert self.reader.unfinished() <= message.shards.keys(), "a living peer has lost a shard"
        if self.rewinds_to:
            self.rewinds_to = 0
            self.reader.rewind(message.shards)
        self.reader.add(message.shards)

    def _refused(self, message: Refused) -> None:
        self.refusals.append(message)
        if message.error == "ParityError":
            self.start_over()
            self.mode, self.fetching = "entering", None


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


@dataclass
class Ledger:
    """What may be committed, worked out apart from the coordinator."""

    version: int = -1
    round: int = 0
    tokens: float = 0.0
    epoch: int = 0
    generation: int = 0
    cursors: Counter[int] = field(default_factory=Counter)
    samples: Counter[tuple[int, int]] = field(default_factory=Counter)
    states: dict[int, str] = field(default_factory=dict)
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
    skipped: int = 0

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
        assert record.round == self.round, f"round {record.round} is committed, {self.round} was due"
        self.round += 1
        if record.skipped:
            assert record.version == self.version and not record.contributors and not record.tokens
            self.skipped += 1
            return
        assert record.version == self.version + 1
        start = self.attempt(self.generation, record.tag, record.round, record.attempt)
        self._check_votes(start, record.digest, members)
        assert record.contributors == tuple(member.name for member in start.contributors)
        self._count(record, start)
        self.version, self.digests[record.version] = record.version, record.digest

    def _check_votes(self, start: Start, digest: str, members: set[int]) -> None:
        assert digest == self.digest(start.identity), "the digest is not that of the contributors' numbers"
        votes = [self.dones.get((start.generation, start.tag, start.round, start.attempt, m.incarnation))
                 for m in start.contributors if m.incarnation in members]  # fmt: skip
        assert votes and set(votes) == {digest}, f"committed with the votes {votes}"

    def _count(self, record: Committed, start: Start) -> None:
        proposals = [self.given[start.identity][member.name] for member in start.contributors]
        assert record.tokens == sum(proposal.weight for proposal in proposals)
        for proposal in proposals:
            assert proposal.base_hash == self.states[self.version], "a contribution was measured from another state"
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

    def applied(self, version: int, state: str) -> None:
        if version > 0:  # before the first commit a loop can be founded anew
            assert self.states.setdefault(version, state) == state, f"two states are both version {version}"

    def founded(self, record: LoopFounded) -> None:
        assert self.version <= 0, "committed rounds were thrown away"
        self.version, self.states = 0, {0: record.state_hash}

    def departed(self, record: Departed, now: float) -> None:
        proof = record.incarnation in self.proved
        if "refused" in record.reason:
            assert record.incarnation in self.dead, "a living process was declared gone"
        elif not proof:
            silence = now - self.heard[record.incarnation]
            assert silence > TIMES.evict_after, f"evicted after {silence} s of silence: {record.reason}"

    def plain(self, commit: Commit) -> None:
        """A plain commit seen by a peer: one meaning per round, and within a generation no number counts twice."""
        key = (commit.tag, commit.generation, commit.round)
        seen = (commit.digest, commit.contributors)
        assert self.plain_commits.setdefault(key, seen) == seen, f"plain round {commit.round} has two outcomes"


class World:
    """Coordinator, peers, channels and time. Each method is one thing that can happen."""

    def __init__(
        self, policy: RunPolicy | None = None, *, hide: bool = False, data: SimData | None = None, ahead: int = 0
    ) -> None:
        self.policy = policy or RunPolicy()
        self.hide, self.data, self.ahead = hide, data, ahead
        self.now = 100.0
        self.journal: list[Record] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.ledger = Ledger()
        self.peers: dict[int, SimPeer] = {}
        self.up: dict[int, deque[Message]] = {}
        self.down: dict[int, deque[Message]] = {}
        self.cuts: set[frozenset[str]] = set()
        self.crash = ""
        self.steps = 0
        self.evidence = 0
        self.membership: Membership | None = None
        self.restart()

    # --- the coordinator --------------------------------------------------------------------------------------------

    def restart(self) -> None:
        """The next life of the coordinator, from what its journal holds."""
        if self.membership is not None:
            return
        self.membership = Membership(RUN, self.policy, TIMES)
        for incarnation in self.ledger.heard:
            self.ledger.heard[incarnation] = self.now
        self._obey(self.membership.begin(list(self.journal), self.now))

    def kill_coordinator(self, keep: int = 0) -> None:
        """keep: how many of the messages under way to each peer still arrive."""
        if self.membership is None:
            return
        if not self.crash:
            self.check_replay()
        self.membership, self.crash = None, ""
        for incarnation, queue in self.down.items():
            self.down[incarnation] = deque(list(queue)[:keep])

    def check_replay(self) -> None:
        assert self.membership is not None
        replayed = Membership(RUN, self.policy, TIMES)
        replayed.begin(list(self.journal), self.now)
        assert durable(replayed) == durable(self.membership)

    def _obey(self, effects: list[Any]) -> None:
        """crash "before": the turn's records are lost with it; "after": they are durable, but nothing was sent."""
        membership = self.membership
        assert membership is not None
        crash = self.crash
        for effect in effects if crash != "before" else ():
            if isinstance(effect, Persist):
                self._persist(effect.record)
            elif isinstance(effect, Emit):
                self.events.append((effect.event, effect.fields))
            elif isinstance(effect, Send) and not crash:
                self._sent(effect)
        if not crash:
            assert membership.epoch >= self.ledger.epoch and membership.tokens == self.ledger.tokens
            self.ledger.epoch = membership.epoch
        elif effects:
            self.kill_coordinator()

    def _persist(self, record: Record) -> None:
        assert self.membership is not None
        self.journal.append(record)
        match record:
            case Opened():
                assert record.generation == self.ledger.generation + 1
                self.ledger.generation = record.generation
            case Committed():
                self.ledger.committed(record, {s.member.incarnation for s in self.membership.members.values()})
            case Departed():
                self.ledger.departed(record, self.now)
            case LoopFounded():
                self.ledger.founded(record)

    def _sent(self, effect: Send) -> None:
        message = effect.message
        if isinstance(message, Begin):
            self.ledger.started(message.start)
        if isinstance(message, Commit) and message.tag != OUTER:
            self.ledger.plain(message)
        if effect.incarnation in self.down:
            self.down[effect.incarnation].append(message)

    def tick(self, seconds: float = 1.0) -> None:
        """Time passes; longer than a heartbeat means that the coordinator itself stood still."""
        self.now += seconds
        before = len(self.events)
        if self.membership is not None:
            gap = seconds > TIMES.heartbeat
            if gap:
                self._renew()
            self._obey(self.membership.tick(self.now))
            blamed = {event for event, _ in self.events[before:]} & {"peer.suspected", "peer.evicted"}
            assert not (gap and blamed), "others were blamed for the coordinator's own silence"
        else:
            self._renew()

    def _renew(self) -> None:
        for incarnation in self.ledger.heard:
            self.ledger.heard[incarnation] = self.now

    def to_coordinator(self, name: str, message: Message) -> None:
        """One message arrives. What comes from an old life must change nothing that lasts."""
        membership = self.membership
        if membership is None:
            return
        state = membership.members.get(name)
        known = state is not None and state.member.incarnation == message.incarnation
        current = known and message.generation == membership.generation
        stale = message.incarnation in membership.retired or not (isinstance(message, (Join, Gone)) or current)
        before = durable(membership) if stale else ""
        if not stale:
            self._note(name, message, state)
        effects = membership.receive(name, message, self.now)
        assert not stale or durable(membership) == before, "a message of an old life changed the run"
        self._obey(effects)

    def _note(self, name: str, message: Message, state: Any) -> None:
        ledger = self.ledger
        ledger.heard[message.incarnation] = self.now
        if isinstance(message, DoneReport):
            key = (message.generation, message.tag, message.round, message.attempt, message.incarnation)
            ledger.dones[key] = message.digest
        elif isinstance(message, (Leave, Gone)):
            ledger.proved.add(message.ended if isinstance(message, Gone) else message.incarnation)
        elif isinstance(message, Join) and state is not None and state.member.incarnation != message.incarnation:
            ledger.proved.add(state.member.incarnation)

    # --- peers ------------------------------------------------------------------------------------------------------

    def start(self, name: str) -> SimPeer:
        """A new life of this name; an older one may still be running."""
        hidden = self.hide and name in HIDDEN
        peer = SimPeer(name, 1000 + len(self.peers), hidden=hidden, data=self.data, ahead=self.ahead)
        self.peers[peer.incarnation] = peer
        self.up[peer.incarnation], self.down[peer.incarnation] = deque(), deque()
        peer.join()
        self.flush(peer)
        return peer

    def flush(self, peer: SimPeer) -> None:
        for message in peer.outbox:
            if isinstance(message, Applied):
                self.ledger.applied(message.version, message.state_hash)
        self.up[peer.incarnation].extend(peer.outbox)
        peer.outbox = []

    def act(self, peer: SimPeer, name: str, *arguments: Any) -> None:
        """The peer's script calls one of its methods."""
        if peer.running:
            getattr(peer, name)(*arguments)
            self.flush(peer)

    def die(self, peer: SimPeer, *, keep: bool = True) -> None:
        """The process ends; what it had sent may still arrive."""
        peer.alive = False
        self.ledger.dead.add(peer.incarnation)
        self.down[peer.incarnation].clear()
        if not keep:
            self.up[peer.incarnation].clear()

    def prove(self, peer: SimPeer) -> None:
        if not peer.alive:
            gone = Gone(run=RUN, incarnation=1, name=peer.name, ended=peer.incarnation, evidence="killed by signal 9")
            self.to_coordinator("supervisor", gone)

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
        queue = self.up[peer.incarnation]
        for _ in range(min(count, len(queue))):
            if self.membership is not None:
                self.to_coordinator(peer.name, queue.popleft())

    def deliver_down(self, peer: SimPeer, count: int = 1) -> None:
        queue = self.down[peer.incarnation]
        for _ in range(min(count, len(queue)) if peer.running else 0):
            message = queue.popleft()
            before = [slot.start for slot in peer.slots.values()]
            peer.receive(message, self.now)
            for slot, old in zip(peer.slots.values(), before, strict=True):
                if slot.start is not None and slot.start is not old:
                    assert slot.proposal is not None
                    self.ledger.deposit(slot.start, slot, peer.offered.get(slot.proposal.sequence))
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
        self.cuts.clear()
        self.crash = ""
        self.restart()
        for peer in self.peers.values():
            peer.frozen = False

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

    def obtainable(self) -> bool:
        """Whether the committed state can still be had: somebody lives who holds it, or can work it out."""
        living = [peer for peer in self.peers.values() if peer.alive and not peer.expelled and peer.mode == "training"]
        if self.ledger.version <= 0:
            return True
        held = max((version for peer in living for version in peer.states), default=-1)
        kept = {digest for peer in living for digest in (*peer.results.values(), peer.slots[OUTER].result)}
        return held >= 0 and all(self.ledger.digests[v] in kept for v in range(held + 1, self.ledger.version + 1))

    def check_audit(self) -> None:
        """The account of the journal says of itself what the ledger has seen."""
        assert self.membership is not None
        epochs = audit(self.journal)
        assert epochs == self.membership.account.report()
        assert sum(epoch.committed for epoch in epochs) == self.ledger.tokens
        assert all((epoch.twice, epoch.missing, epoch.partial) == (0, 0, 0) for epoch in epochs)
        if self.membership.progress.finished and self.data:
            assert len(epochs) == self.data.epochs and all(epoch.complete for epoch in epochs)

    def check_agreement(self) -> None:
        """Those that hold the same version hold the same state."""
        for peer in self.peers.values():
            if not peer.expelled and peer.mode == "training" and peer.version > 0:
                assert self.ledger.states[peer.version] == peer.states[peer.version]

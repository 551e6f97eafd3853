"""The control plane's words, and how they become bytes.

Every message is a frozen dataclass that carries run, generation, incarnation and epoch. On the wire it is one msgpack
map with the class name under "type". Decoding is by schema: unknown fields are ignored, missing or mistyped ones are
refused, sizes are bounded; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import msgpack

from collectives.records import Abort, LinkFailure, Member, Start, Underway, WireRun
from fault.records import Crossing, Exchanged, Gave, Health, Trainer

PROTOCOL = 1
MAX_MESSAGE_BYTES = 4 << 20
MAX_INTEGER = (1 << 63) - 1
SUPERSEDED = "another life of this name has joined"
STREAM = -1  # in place of a dataset's samples: their number is not known before its end
_SCALARS = (str, int, float, bool, bytes)
_Read = Callable[[Any], Any]


class MessageError(ValueError):
    """Bytes that are no valid message. The sender is ignored; nothing changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What each message carries. 0 means that the sender does not know it yet."""

    run: str
    generation: int = 0
    incarnation: int = 0
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationSpec:
    """What is reduced or moved. Members of one operation must agree on every field, or ParityError names both values;
    only the elements of an all-gather may differ.

    algorithm: the call (all_reduce, reduce_scatter, broadcast, all_gather, barrier), or the outer loop and its options.
    fragments: of an outer loop's state; each round moves one of them, so that the elements of proposals may differ.
    op: sum, mean, min, max; broadcast (from peer `root`), all_gather. gather_wire: "" for the same as wire.
    dtype, shape: of the callers' tensors. carried: the dtype in which they travel; "" for the same.
    needs: with fewer contributors a round means nothing, and waits for more; 0: any number will do.
    """

    op: str
    dtype: str
    elements: int
    wire: str
    gather_wire: str = ""
    carried: str = ""
    shape: str = ""
    root: str = ""
    algorithm: str = ""
    fingerprint: str = ""
    fragments: int = 1
    needs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitNote:
    """A plain operation that a peer saw committed: told to a restarted coordinator, which did not journal it."""

    tag: str
    round: int
    attempt: int
    digest: str
    contributors: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkReport:
    """One link as its peer measures it now. goodput: bytes/s sent while busy; rtt: seconds; 0.0: not known yet.

    slowest, fastest: of its stripes, bytes/s that they can carry; known of long paths only. redialled: stripes that
    were replaced because they were slow.
    """

    peer: str
    goodput: float = 0.0
    rtt: float = 0.0
    retransmits: int = 0
    stripes: int = 0
    slowest: float = 0.0
    fastest: float = 0.0
    redialled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerStatus:
    """How a peer is doing; rides on its heartbeats. Seconds and bytes; losses are NaN until there is one.

    held_out_loss: of the outer parameters on data that nobody trains on; a run may have a target for it.
    steps_per_second: of inner steps, without waiting for rounds. trainer, exchanged, health: see there.
    """

    state: str = "idle"
    step: int = 0
    loss: float = float("nan")
    held_out_loss: float = float("nan")
    tokens_per_second: float = 0.0
    steps_per_second: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    links: tuple[LinkReport, ...] = ()
    trainer: Trainer = field(default_factory=Trainer)
    exchanged: Exchanged = field(default_factory=Exchanged)
    health: Health = field(default_factory=Health)


# --- from peers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Join(Message):
    """Asks for membership; the same incarnation asks again to re-present itself to a new generation.

    view, state, holding: if they were asked for, the incarnations in the last view by name, the last run state that it
    got, and the shards that it works on.
    tested: it has made the self-test that it was asked for. flaw: what that found; "": all is well.
    """

    protocol: int = PROTOCOL
    member: Member
    site: str
    commits: tuple[CommitNote, ...] = ()
    view: dict[str, int] = field(default_factory=dict)
    state: bytes = b""
    holding: tuple[int, ...] = ()
    tested: bool = False
    flaw: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat(Message):
    """crossings, gave: since the last one. step_seconds: the median of the inner steps since then; 0.0 if none.
    underway: attempts that this peer has entered and that have not ended, a few at most.
    """

    status: PeerStatus
    crossings: tuple[Crossing, ...] = ()
    step_seconds: float = 0.0
    gave: tuple[Gave, ...] = ()
    underway: tuple[Underway, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose(Message):
    """Offers a contribution to the operation that is open, or next, under `tag`.

    sequence: this incarnation's own count of operations under the tag; a repeated message keeps it.
    round: the round that this proposal was already started in, after a coordinator's restart; else -1.
    base_version, base_hash: the version that the numbers were measured from (-1: not an outer round).
    cursors: for each shard, how many of its samples stand behind this contribution or earlier ones.
    leaving: this peer drains: the round opens at once, so that what it has learned is not lost with it.
    starts: for each shard, how many of them stood behind earlier ones: for the audit.
    tokens: trained since this peer's last contribution, of whatever fragment: what the run counts; -1: the weight.
    length: of what is sent as a direction. quorum, grace: how many peers open this round, and how many seconds it
    then waits for the others; 0 and -1: as the run's policy and timeouts say.
    wires: how ranges of a sum of float32 should travel; an attempt takes the wires of its first contributor that has
    some (planning.valid_wires). Empty: as the spec says.
    digest: SHA-256 of what this peer gives, where others must be able to tell that it reaches them unchanged.
    """

    tag: str
    sequence: int
    round: int = -1
    fragment: int = 0
    base_version: int = -1
    base_hash: str = ""
    weight: float
    cursors: dict[int, int]
    spec: OperationSpec
    receiver: bool = False
    leaving: bool = False
    starts: dict[int, int] = field(default_factory=dict)
    tokens: float = -1.0
    length: float = 0.0
    quorum: int = 0
    grace: float = -1.0
    wires: tuple[WireRun, ...] = ()
    digest: str = ""

    @property
    def counts(self) -> float:
        """Tokens that a commit of it adds to the run."""
        return self.weight if self.tokens < 0 else self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class DoneReport(Message):
    tag: str
    round: int
    attempt: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedReport(Message):
    """The attempt ended here without a result; also the answer to an Abort."""

    tag: str
    round: int
    attempt: int
    reason: str
    lost: tuple[LinkFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Withdraw(Message):
    """The caller no longer waits for the operation that it proposed as `sequence`: go on without it."""

    tag: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave(Message):
    reason: str = "left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enter(Message):
    """Asks for the outer state to train from. state_hash: of this peer's own, should it be the first ("": not known).

    parameters: what the model's state consists of, a line for each tensor, so that a difference can be named.
    offered, offered_hash, state: version and hash of what this peer has from a checkpoint (-1: nothing), and the run
    state that belongs to it; it is taken if no living peer holds anything newer.
    """

    tag: str
    spec: OperationSpec
    fragment: int = 0
    state_hash: str
    parameters: tuple[str, ...] = ()
    offered: int = -1
    offered_hash: str = ""
    state: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit(Message):
    """This peer stays a member but takes no further part in the loop."""

    tag: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied(Message):
    """This peer holds `version` of the fragment, with this hash, and serves it to others.

    receiving: it has nothing to train on for now, and only follows: no round needs to wait for it (rule 11).
    computed: it is the outcome of an outer step of its own, not of a transfer: it counts when hashes differ.
    digest: of the result that led to this version, from the Commit, or as the Base said ("": not known). A version
    that another result led to was committed by a coordinator that the run does not follow any more.
    moments: of what this peer serves of its inner optimizer, the hash ("": nothing).
    """

    tag: str
    fragment: int
    version: int
    state_hash: str
    receiving: bool = False
    computed: bool = False
    digest: str = ""
    moments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recomputed(Message):
    """Answers Recompute. state_hash: what came out; "" if this peer no longer holds what it would need."""

    tag: str
    fragment: int
    version: int
    state_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetTarget(Message):
    """The run is over at this many rounds, tokens, seconds, or this held-out loss; 0 leaves a target as it is."""

    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest(Message):
    """Asks for shards of a dataset of `samples`, cut into shards of `shard_size`; what is held already comes too.

    samples: STREAM if nobody knows; 0: hand all back. holding: shards that this incarnation still works on.
    ends: of a stream, how many samples each epoch had whose end this incarnation has reached.
    sequence: this incarnation's own count of such questions; the answer carries it. more: whether it should get one
    more, if it has begun on all that it has; else it only asks where those stand.
    """

    samples: int
    shard_size: int
    seed: int
    epochs: int
    holding: tuple[int, ...] = ()
    sequence: int = 0
    ends: dict[int, int] = field(default_factory=dict)
    more: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLost(Message):
    """A link of this peer has died, whether or not an attempt was using it."""

    failure: LinkFailure


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone(Message):
    """The proof of a witness, or a site's supervisor, that a process has ended. ended: the incarnation of peer `name`
    that it held.
    """

    name: str
    ended: int
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenUp:
    """A peer of which its supervisor starts no further life. ended: its last incarnation; 0: it never joined."""

    name: str
    ended: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport(Message):
    """What the supervisor of a site has to say, the whole of it each time; the answer is a Pong.

    room: how many peers it can host beyond those that it has and that it takes up. taking: peers whose places it was
    offered, and whose lives it is about to start. declined: offers that it cannot take; said once to each.
    """

    site: str
    room: int = 0
    given_up: tuple[GivenUp, ...] = ()
    taking: tuple[str, ...] = ()
    declined: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnessed(Message):
    """A witness sees a peer's process stand still. watched: the incarnation of peer `name` that it holds.

    state: the letter of its main thread in /proc ("T": stopped). beat_seconds: since its heart last beat; step_seconds:
    since its last inner step (-1: none). exchanging: an exchange is under way. cpu_seconds: of processor time that it
    has used since it stood still.
    """

    name: str
    watched: int
    state: str = ""
    beat_seconds: float = 0.0
    step_seconds: float = -1.0
    exchanging: bool = False
    cpu_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest(Message):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRequest(Message):
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveRequest(Message):
    """By nobody in particular: this peer, or else all peers of this site, should leave. seconds: that each of them has
    for one last exchange. Answered by LeaveAsked; asked again, it changes nothing.
    """

    name: str
    seconds: float


# --- from the coordinator -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """How far the run is: committed outer rounds and tokens, and whether its target is reached.

    behind: once it is, how many members of a loop still need its newest version from those who hold it.
    targets: rounds, tokens, seconds, loss at which it is; 0 means no such target. elapsed: seconds.
    fastest: inner steps per second of the fastest peer, as of now; 0.0: not known.
    """

    rounds: int = 0
    tokens: int = 0
    finished: bool = False
    behind: int = 0
    targets: dict[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    fastest: float = 0.0

    @property
    def part(self) -> float:
        """How much of the nearest target is reached, from 0 to 1; 0 without one that can be measured so."""
        done = {"rounds": self.rounds, "tokens": self.tokens, "seconds": self.elapsed}
        parts = [value / self.targets[name] for name, value in done.items() if self.targets.get(name, 0) > 0]
        return min(1.0, max(parts, default=0.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome(Message):
    """Admission. life: the how-manieth incarnation of this name it is, for people."""

    life: int
    members: tuple[Member, ...]
    progress: RunProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class View(Message):
    """A membership view: what changed since epoch - 1."""

    added: tuple[Member, ...] = ()
    removed: tuple[str, ...] = ()
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open(Message):
    """A quorum has proposed for this round: propose at the next step boundary."""

    tag: str
    round: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Short(Message):
    """The round could begin, but for the contributors that it needs: it waits, and `reason` says for what."""

    tag: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin(Message):
    """Carries a Start to its members. segments: of an all-gather or reduce-scatter, how long each contributor's is.

    digests: of what each contributor gives, as it has proposed; empty if none has said any.
    """

    start: Start
    segments: tuple[int, ...] = ()
    digests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel(Message):
    """Carries an Abort to the members of that attempt."""

    abort: Abort


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit(Message):
    """The final word on a round. sources: who holds the result (by its digest), for those who do not.

    skipped: nobody contributed; nothing changes. version: of the fragment once this is applied (-1: plain operation).
    base_hash: of the version that it leads on from. state: the run state as of this commit, encoded (RunState).
    scale: mean length of the contributions, where they were sent as directions. share: which part of those who train
    has contributed. mass: the contributors' weights, over the number of those who train; twins are one of them.
    covers: twins of contributors. They have read the same samples, and the round counts as theirs, too.
    """

    tag: str
    round: int
    attempt: int
    fragment: int
    version: int
    contributors: tuple[str, ...]
    sources: tuple[Member, ...] = ()
    digest: str
    skipped: bool = False
    progress: RunProgress
    base_hash: str = ""
    state: bytes = b""
    scale: float = 1.0
    share: float = 1.0
    mass: float = 1.0
    covers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundFailed(Message):
    """The round is given up; every input is untouched."""

    tag: str
    round: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Base(Message):
    """The outer state to begin from. state: the run state (RunState), encoded. digest: of the result that led to it.

    No sources: this peer has it itself, and may found the run if there is no hash either; if it does not have it,
    nobody has, and it should enter again with what it has.
    donors, moments: who serves the newest moments of an inner optimizer, and their hash.
    """

    tag: str
    fragment: int
    version: int
    state_hash: str
    sources: tuple[Member, ...]
    state: bytes = b""
    digest: str = ""
    donors: tuple[Member, ...] = ()
    moments: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leases(Message):
    """Shards held by this peer, with the committed cursor of each. spent: there is no data left to lease.

    sequence: of the question. An answer to an earlier one is old news: its cursors may have been passed since.
    ends: of a stream, how many samples there are in the epochs whose end is known and that the peer works on.
    """

    shards: dict[int, int]
    spent: bool = False
    sequence: int = 0
    ends: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused(Message):
    """A request that cannot be granted. error: name of the exception that the caller sees; tag: of the operation.

    retry_after: seconds after which it may be granted; 0.0: not known.
    """

    error: str
    reason: str
    tag: str = ""
    sequence: int = -1
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Represent(Message):
    """The coordinator does not know this incarnation in its generation: join again with the same one.

    recall: it has lost its journal, and asks for what this peer knows of the run (Join.view, state, holding).
    """

    recall: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute(Message):
    """Peers hold different bits as this version: work it out again from the one before, and say what came out."""

    tag: str
    fragment: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expelled(Message):
    """This incarnation is no member any more. retry_after: its name is barred for so many seconds; 0.0: it is not."""

    reason: str
    retry_after: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest(Message):
    """Answers a Join after a quarantine: come again with what a self-test has found (Join.tested)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveAsked(Message):
    """Answers a LeaveRequest. lives: of each member that has been asked, the life that it is in. supervisors: how many
    have been asked, too, to start no further life at this site.
    """

    lives: dict[str, int]
    supervisors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain(Message):
    """To a peer: leave, after one last exchange within so many seconds. To a supervisor: let all of its peers do so,
    and start none again.
    """

    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Vacancy(Message):
    """To a supervisor: the place of peer `name` is free, and it may start its next life. Not free: not any more."""

    name: str
    free: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong(Message):
    """Answers a heartbeat, or a site's report: the coordinator lives."""

    progress: RunProgress


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberReport:
    """One member in a status report. silence: seconds since it was last heard. repaired: times its bits were wrong."""

    name: str
    site: str
    life: int
    state: str
    version: int
    state_hash: str
    silence: float
    status: PeerStatus
    repaired: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictReport:
    """What the detector has confirmed; see `fault.verdicts.Verdict`. lasting_seconds: since it began."""

    kind: str
    culprits: tuple[str, ...]
    lasting_seconds: float
    confidence: float
    evidence: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class BarredReport:
    """A name in quarantine. seconds: for so long yet; -1: for good. strikes: the how-manieth time."""

    name: str
    seconds: float
    strikes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport(Message):
    """contributors: of the last round. samples: committed. verdicts: what is wrong now. barred: names in quarantine.

    protocol: that the coordinator speaks; those that do not say speak the first.
    """

    members: tuple[MemberReport, ...]
    progress: RunProgress
    contributors: tuple[str, ...]
    samples: int
    verdicts: tuple[VerdictReport, ...] = ()
    barred: tuple[BarredReport, ...] = ()
    protocol: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardReport:
    """A leased shard: who holds it ("": nobody now; of twins, the name of their team) and how many of its samples are
    committed."""

    shard: int
    holder: str
    cursor: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochReport:
    """What the journal says of one epoch's samples. samples: in it, or STREAM while that is not known.

    committed: each counted by the run. twice: counted more often than once, or not in the data. missing: skipped, and
    never to be read. partial: counted, and without effect on some fragments, since their peer was lost before those
    were exchanged (samples times fragments; with one fragment it is always 0). open: the shards that are not committed
    to their end.
    """

    epoch: int
    samples: int
    committed: int
    twice: int
    missing: int
    partial: int
    open: tuple[ShardReport, ...] = ()

    @property
    def complete(self) -> bool:
        return self.committed == self.samples and not self.missing


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport(Message):
    """epochs: those under way and the newest complete ones. The sums are over all epochs; fields as in EpochReport."""

    epochs: tuple[EpochReport, ...]
    committed: int
    twice: int
    missing: int
    partial: int

    @property
    def passed(self) -> bool:
        """Whether every sample that the run went past counts exactly once."""
        return not self.twice and not self.missing


def identity(name: str, incarnation: int) -> bytes:
    """The ZeroMQ identity of one life of a peer."""
    return f"{name}/{incarnation:016x}".encode()


# --- codec ----------------------------------------------------------------------------------------------------------


def encode(message: Any) -> bytes:
    """Packs a message or journal record (any dataclass of plain values) into msgpack."""
    body = {"type": type(message).__name__} | _plain(message)
    packed: bytes = msgpack.packb(body, use_bin_type=True)
    return packed


def decode(data: bytes, kinds: dict[str, type]) -> Any:
    """Unpacks one of `kinds` by its schema. Raises MessageError with one line that says what is wrong."""
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes; at most {MAX_MESSAGE_BYTES} are allowed")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=False, max_ext_len=0)
    except Exception as error:  # msgpack raises many kinds, ValueError and RecursionError among them
        raise MessageError(f"not msgpack: {type(error).__name__}") from None
    if not isinstance(body, dict) or not isinstance(body.get("type"), str):
        raise MessageError("not a map with a type")
    kind = kinds.get(body["type"])
    if kind is None:
        raise MessageError(f"unknown message type {body['type'][:40]!r}")
    return _build(kind, body, kind.__name__)


def _plain(value: Any) -> Any:
    kind: type = type(value)
    if kind in _SCALARS:
        return value
    if kind is tuple:
        return [_plain(item) for item in value]
    if kind is dict:
        return {key: _plain(item) for key, item in value.items()}
    return {name: _plain(getattr(value, name)) for name in _names(kind)}


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(kind))


@cache
def _schema(kind: type) -> dict[str, tuple[_Read, bool]]:
    """Field name -> (how to read it, whether it must be there)."""
    hints = typing.get_type_hints(kind)
    return {
        field.name: (
            _reader(hints[field.name], f"{kind.__name__}.{field.name}"),
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    }


def _build(kind: type, body: Any, where: str) -> Any:
    if type(body) is not dict:
        raise MessageError(f"{where} is no map")
    values = {}
    for name, (read, required) in _schema(kind).items():
        if name in body:
            values[name] = read(body[name])
        elif required:
            raise MessageError(f"{where}.{name} is missing")
    try:
        return kind(**values)
    except ValueError as error:
        raise MessageError(f"{where}: {error}") from None


def _reader(hint: Any, where: str) -> _Read:
    """What turns an unpacked value into one of type `hint`, or raises MessageError: made once for each field."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        item = _reader(typing.get_args(hint)[0], where)
        return lambda value: tuple([item(entry) for entry in _expect(value, list, where)])
    if origin is dict:
        key, entry = (_reader(each, where) for each in typing.get_args(hint))
        return lambda value: {key(k): entry(v) for k, v in _expect(value, dict, where).items()}
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(type, hint)
        return lambda value: _build(kind, value, where)
    if hint not in _SCALARS:
        raise TypeError(f"{where}: {hint} has no place in a message")
    if hint is float:
        return lambda value: float(value) if type(value) is int else _expect(value, float, where)
    if hint is int:
        return lambda value: _bounded(_expect(value, int, where), where)
    return lambda value: _expect(value, hint, where)


def _expect(value: Any, kind: type, where: str) -> Any:
    # bool is an int to isinstance, and must not pass for one here
    if type(value) is not kind:
        raise MessageError(f"{where} is {type(value).__name__}, not {kind.__name__}")
    return value


def _bounded(value: int, where: str) -> int:
    if not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise MessageError(f"{where} is larger than {MAX_INTEGER}")
    return value


FROM_PEERS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Join, Heartbeat, Propose, DoneReport, FailedReport, Withdraw, Leave, Enter, Exit, Applied, LeaseRequest,
        LinkLost, Gone, SiteReport, Witnessed, StatusRequest, Recomputed, SetTarget, AuditRequest,
        LeaveRequest,
    )
}  # fmt: skip
FROM_COORDINATOR: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        Welcome, View, Open, Begin, Cancel, Commit, RoundFailed, Base, Leases, Refused, Represent, Expelled, Pong,
        StatusReport, Recompute, AuditReport, SelfTest, Short, Vacancy, LeaveAsked, Drain,
    )
}  # fmt: skip

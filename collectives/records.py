"""What crosses the border of the data plane: one attempt's orders, its outcome, and what was observed.

Nothing here decides anything. A `Start` is self-contained: whoever holds one can execute the attempt without any
earlier message. All records are frozen, compare by value, and hold only plain values, so that the control plane can
send them as they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# Numbers that share one step in a quantised wire; ranges and chunks of such begin at multiples of it. An int4 of normal
# numbers is a tenth more exact than with 256, for 3 % more bytes.
BLOCK = 128


class Identity(NamedTuple):
    """Names one attempt of one operation. Frames and messages whose identity is not the current one are dropped.

    `run` and `tag` are names; `generation` is the coordinator's life, `epoch` the membership view, `round` the number
    of the operation under its tag, `attempt` counts retries of the round from 0.
    """

    run: str
    generation: int
    epoch: int
    tag: str
    round: int
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One peer as the others see it during an attempt.

    incarnation: 63-bit number of this life of the peer, unique in the run.
    addresses: "host:port" of its data listeners, best first; empty if it can only dial out.
    fingerprint: of its certificate, hexadecimal; empty on links without TLS.
    lanes: of a peer of several processes, the addresses of each that has links beside those of the leader.
    """

    name: str
    incarnation: int
    addresses: tuple[str, ...] = ()
    fingerprint: str = ""
    lanes: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WireRun:
    """How the next so many elements of an operation travel. gather_wire: of their sums; "" for the same as `wire`."""

    elements: int
    wire: str
    gather_wire: str = ""


def fits(runs: Iterable[WireRun], elements: int) -> bool:
    """Whether the runs, end to end, cover so many elements; none is empty, and all but the last are whole blocks."""
    lengths = [run.elements for run in runs]
    return sum(lengths) == elements and min(lengths, default=1) > 0 and not any(each % BLOCK for each in lengths[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The orders for one attempt, equal on every member of it.

    contributors: who sends numbers, sorted by name; sums are formed in this order.
    receivers: who gets the result without contributing.
    shares: for each contributor, the part of the elements that it owns (reduces); non-negative, sums to 1.
        0 keeps a contributor from owning anything: so a pair that cannot talk never needs to.
    multipliers, divisor: float32 scalars; the result is (sum over i of multipliers[i] * x[i]) / divisor.
    pattern: "direct" (every contributor sends to each owner), "ring" (sums and results travel along `order`), or
        "tree" (along `parents`, for graphs of reachable pairs in which no owner reaches everybody).
    order: ring only; indices of the contributors around it. parents: tree only; for each contributor the index of the
        one above it, -1 for the root.
    op: "sum", "min", "max"; "broadcast" (the numbers of the one contributor with share 1), "all_gather" (the sources
        one after the other), "reduce_scatter" (a sum of which each contributor keeps what it owns).
    segments: for each contributor, how many elements it owns; given instead of shares where they must be exact.
    gather_wire: how results travel back; "" for the same as `wire`.
    chunk_bytes: largest piece that travels alone, a multiple of 64 up to what the group's options allow; 0 for that.
    sequences: for each contributor, then each receiver, which of its own proposals under the tag this attempt takes:
        so that a member that has given one up does not answer for it with the next.
    elements: length of the flat tensor. dtype: of source and result. wire: how numbers travel.
    wires: of a sum of float32, for ranges of their own, one after the other; `wire` and `gather_wire` then say nothing.
        They cover all elements, each but the last a multiple of BLOCK. Empty: all travel alike.
    """

    run: str
    generation: int
    epoch: int
    tag: str
    round: int
    attempt: int
    fragment: int
    base_version: int
    contributors: tuple[Member, ...]
    receivers: tuple[Member, ...] = ()
    sequences: tuple[int, ...] = ()
    pattern: str = "direct"
    order: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    shares: tuple[float, ...]
    segments: tuple[int, ...] = ()
    op: str = "sum"
    wire: str = "f32"
    gather_wire: str = ""
    wires: tuple[WireRun, ...] = ()
    chunk_bytes: int = 0
    dtype: str = "float32"
    elements: int
    multipliers: tuple[float, ...]
    divisor: float = 1.0

    @property
    def identity(self) -> Identity:
        return Identity(self.run, self.generation, self.epoch, self.tag, self.round, self.attempt)

    def sequence_of(self, name: str) -> int:
        """Which of that member's proposals this attempt takes; -1 if it is no member or none is given."""
        names = [member.name for member in (*self.contributors, *self.receivers)]
        known = dict(zip(names, self.sequences, strict=False))
        return known.get(name, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Ends one attempt wherever it is. lost: names of the members that the next attempt leaves out."""

    run: str
    generation: int
    epoch: int
    tag: str
    round: int
    attempt: int
    reason: str
    lost: tuple[str, ...] = ()

    @property
    def identity(self) -> Identity:
        return Identity(self.run, self.generation, self.epoch, self.tag, self.round, self.attempt)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFailure:
    """One link that failed, as one of its ends saw it.

    evidence: "eof" (orderly end), "reset", "timeout", "refused" (its listener is gone: nobody holds the port),
    "unreachable", or "corrupt" (checksum or frame).
    """

    peer: str
    incarnation: int
    evidence: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRecord:
    """What one link carried during one operation. Bytes include frame headers.

    send_blocked_seconds: spent sending, most of it waiting for the kernel. waited_seconds: from when everyone was ready
    until the last chunk had come from there (0.0 if none was to come): who is slow has the largest. retransmits:
    packets that were sent again meanwhile, for whatever the link carried. rtt: seconds, the shortest lately; 0.0 until
    known. stripes: at its end. own_bytes, own_seconds: of what came, that peer's own numbers, and from when everyone
    was ready until the last of them was here: unlike results, which wait for everybody, they depend on that peer, this
    one and the link alone. 0.0 but in the direct pattern.
    """

    peer: str
    bytes_sent: int
    bytes_received: int
    send_blocked_seconds: float
    stripes: int
    waited_seconds: float = 0.0
    retransmits: int = 0
    rtt: float = 0.0
    own_bytes: int = 0
    own_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationRecord:
    """What one attempt cost on this peer. Seconds are wall time on this host alone."""

    seconds: float
    wait_ready_seconds: float
    reduce_seconds: float
    links: tuple[LinkRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """This peer holds the whole result. digest: xxh3-128 of the result's bytes, hexadecimal; equal on all peers."""

    identity: Identity
    digest: str
    record: OperationRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The attempt ended without a result here; the source is untouched. lost: the links that failed, if any did."""

    identity: Identity
    reason: str
    lost: tuple[LinkFailure, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far an attempt has come on this peer: passed to the group's `observe` hook after each received chunk."""

    identity: Identity
    chunks_received: int
    chunks_expected: int


class Interference(NamedTuple):
    """What befalls a frame on purpose. hold: seconds until it may leave. corrupt: one of its bits is flipped after the
    checksum was made. broken: the connection ends in the middle of it.
    """

    hold: float = 0.0
    corrupt: bool = False
    broken: bool = False


class LinkFaults(Protocol):
    """Faults on purpose between this peer and others, by name (`fault.inject`). Called from the group's threads."""

    def cut(self, peer: str) -> bool:
        """Whether there is no path to this peer: connections break, and none come up, from either side."""

    def sending(self, peer: str, nbytes: int) -> Interference | None:
        """What befalls the next frame to this peer, that carries so many bytes of numbers (0: it is no such frame)."""

    def sent(self, peer: str, seconds: float) -> None:
        """A frame has left; it took so long, without what it was held back."""

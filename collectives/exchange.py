"""The direct pattern: one attempt of an all-reduce, as one of its members executes it.

The flat tensor is cut into chunks; each chunk has one owner among the contributors. Contributors scatter their part of
a chunk to its owner, the owner adds the parts in the order of the contributors' names, and gathers the sum to everyone
else. Every addition, multiplication and division is one single-rounded float32 operation, so that the result is a
function of the inputs and the Start alone.

Nobody sends numbers before every contributor that it works with has said READY, and an owner says READY to those that
own nothing last, when all others have said it. So when numbers flow to an owner, every contributor has begun, and the
first contributor's parts arrive without waiting for anything. That is why parts that arrive before their turn may make
a stripe wait (when the pool of early parts is full): a stripe waits only for a contributor with a smaller name, whose
own stripes wait only for smaller names still, and the smallest never waits, whatever overtakes what.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from collectives import frames
from collectives.frames import FrameError, Header, Kind
from collectives.links import Link, Outgoing, Scratch
from collectives.records import Abort, LinkFailure, LinkRecord, Member, OperationRecord, Progress, Start
from collectives.sockets import Lease, LinkOptions
from collectives.wires import WIRES, Floats, round_trip

_ALIGN = 16  # elements: one cache line
_REDIALS = 2
_LOOK_AFTER = 0.1  # seconds without a link after which to look whether the peer is there at all


class Chunk(NamedTuple):
    """Elements [start, stop), owned (reduced) by the contributor of index `owner`."""

    owner: int
    start: int
    stop: int


def partition(elements: int, shares: tuple[float, ...], limit: int) -> tuple[Chunk, ...]:
    """Cut `elements` into contiguous runs in proportion to `shares`, and these into even chunks of <= `limit` elements.

    Every element lies in exactly one chunk; an owner with share 0 owns nothing; the same arguments give the same
    chunks on every machine.
    """
    last = max(index for index, share in enumerate(shares) if share > 0)
    ends = [min(elements, round(part * elements / _ALIGN) * _ALIGN) for part in accumulate(shares)]
    ends[last:] = [elements] * (len(shares) - last)
    chunks: list[Chunk] = []
    for owner, (start, stop) in enumerate(pairwise((0, *ends))):
        pieces = math.ceil((stop - start) / limit)
        step = math.ceil((stop - start) / pieces / _ALIGN) * _ALIGN if pieces else 1
        chunks += [Chunk(owner, at, min(at + step, stop)) for at in range(start, stop, step)]
    return tuple(chunks)


def check(start: Start, me: Member, run: str) -> None:
    """ValueError, in one line, for a Start that nobody could execute."""
    names = [member.name for member in start.contributors]
    if start.run != run:
        raise ValueError(f"start is for run {start.run!r}, this group belongs to {run!r}")
    if start.pattern != "direct" or start.op != "sum" or start.dtype != "float32" or start.wire not in WIRES:
        raise ValueError(
            f"pattern={start.pattern!r}, op={start.op!r}, dtype={start.dtype!r}, wire={start.wire!r} is not supported: "
            f"use pattern='direct', op='sum', dtype='float32' and a wire of {sorted(WIRES)}"
        )
    if not names or names != sorted(set(names)):
        raise ValueError(f"contributors must be sorted by name and distinct, got {names}")
    _check_numbers(start)
    if me.incarnation not in {member.incarnation for member in (*start.contributors, *start.receivers)}:
        raise ValueError(f"{me.name} (incarnation {me.incarnation}) is no member of this start")


def _check_numbers(start: Start) -> None:
    count = len(start.contributors)
    if len(start.shares) != count or len(start.multipliers) != count:
        raise ValueError(f"shares and multipliers must have one entry for each of the {count} contributors")
    if min(start.shares) < 0 or not math.isclose(math.fsum(start.shares), 1.0, rel_tol=1e-6):
        raise ValueError(f"shares must be non-negative and sum to 1, got {start.shares}")
    if not all(map(math.isfinite, (*start.multipliers, start.divisor))) or np.float32(start.divisor) == 0:
        raise ValueError("multipliers must be finite, and the divisor finite and not 0")
    if min(start.elements, start.generation, start.epoch, start.round, start.attempt) < 0:
        raise ValueError("elements, generation, epoch, round and attempt must be non-negative")


class Pool:
    """Chunk buffers that several attempts take in turn; keeps up to `capacity` of them, so that pages stay warm."""

    def __init__(self, chunk_bytes: int, capacity: int) -> None:
        self._free: deque[memoryview] = deque(maxlen=capacity)
        self._chunk_bytes = chunk_bytes

    def take(self) -> memoryview:
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(bytearray(self._chunk_bytes))

    def give(self, buffer: memoryview) -> None:
        self._free.append(buffer)


class Host(Protocol):
    """What an attempt needs from its group."""

    options: LinkOptions
    pool: Pool

    def observe(self, progress: Progress) -> None:
        """Report progress."""


@dataclass(slots=True, eq=False)
class Peer:
    """Another member of the attempt with which there is work. index: among the contributors, -1 for a receiver.

    expected: chunks still to come from it. owed: frames it must get that the kernel has not taken yet.
    unlinked_since, look_at (time.monotonic()): since when it has no link, and when to look for it next.
    """

    member: Member
    index: int
    expected: int
    owed: int
    touched: bool = False
    ready: bool = False
    link: Link | None = None
    redials: int = 0
    unlinked_since: float = 0.0
    look_at: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_sending: float = 0.0

    @property
    def contributor(self) -> bool:
        return self.index >= 0

    @property
    def working(self) -> bool:
        """Something is still to come from it or to go to it."""
        return self.expected > 0 or self.owed > 0


class Part:
    """The place of one chunk's payload while it arrives (a links.Sink)."""

    def __init__(self, attempt: Attempt, peer: Peer, header: Header, scratch: Scratch, size: int) -> None:
        self.lease = attempt.lease
        self.peer, self.header, self.scratch = peer, header, scratch
        self.buffer: memoryview | None = None
        self.view = scratch.raw[:size]
        self._attempt = attempt

    def finish(self, nbytes: int) -> None:
        self._attempt.arrived(self, nbytes)

    def cancel(self) -> None:
        if self.buffer is not None:
            self._attempt.give_back(self.buffer)


class Attempt:
    """One attempt on one member. Threads of links drive it; `run()` waits on `condition` for `settled`."""

    def __init__(self, start: Start, me: Member, source: Floats | None, result: Floats, host: Host) -> None:
        self.start, self.host = start, host
        self.key = frames.key_of(start.identity)
        self.lease = Lease()
        self.condition = threading.Condition()
        self.failures: dict[int, LinkFailure] = {}
        self.reason: str | None = None
        self.begun = time.monotonic()
        self.finished = False
        self.me = next((i for i, each in enumerate(start.contributors) if each.incarnation == me.incarnation), -1)
        self._source, self._result = source, result
        self._wire = WIRES[start.wire]
        self._multipliers = [np.float32(each) for each in start.multipliers]
        self._divisor = np.float32(start.divisor)
        self.chunks = partition(start.elements, start.shares, host.options.chunk_bytes // 4)
        self.peers = {each.member.incarnation: each for each in self._others(me)}
        for peer in self.peers.values():
            peer.unlinked_since, peer.look_at = self.begun, self.begun + _LOOK_AFTER
        self._contributors = [peer for peer in self.peers.values() if peer.contributor]
        self._turn = [1 if self.me == 0 else 0] * len(self.chunks)
        self._claimed: set[tuple[int, int]] = set()
        self._parked: dict[tuple[int, int], memoryview] = {}
        self._buffers = max(0, host.options.pool_bytes // host.options.chunk_bytes)
        self._reduced: list[int] = []
        self._scattered = False
        self._expected = sum(peer.expected for peer in self.peers.values())
        self._received = 0
        self._ready_at: float | None = None
        self._reduce_seconds = 0.0

    def _others(self, me: Member) -> list[Peer]:
        owned = [0] * len(self.start.contributors)
        for chunk in self.chunks:
            owned[chunk.owner] += 1
        mine = owned[self.me] if self.me >= 0 else 0
        peers = []
        for index, member in enumerate(self.start.contributors):
            work = owned[index] + mine
            if index != self.me and work:
                peers.append(Peer(member, index, expected=work, owed=work if self.me >= 0 else 0))
        if mine:
            peers += [Peer(member, -1, expected=0, owed=mine) for member in self.start.receivers]
        return peers

    # What run() does and asks. Its caller does not hold the condition.

    def begin(self) -> None:
        """Reduce at once what needs nobody else."""
        if self.me == 0 and len(self.start.contributors) == 1:
            scratch = Scratch(self.host.options.chunk_bytes)
            for index in range(len(self.chunks)):
                self._add_own(index, scratch)
                self._complete(index, scratch)

    @property
    def settled(self) -> bool:
        """Is there anything for run() to do: the result is whole, or the attempt has failed."""
        return self.reason is not None or bool(self.failures) or self.whole

    @property
    def whole(self) -> bool:
        """The result is complete, and whatever other contributors need has left."""
        return not any(peer.working for peer in self._contributors)

    @property
    def serving(self) -> bool:
        """Receivers still wait for chunks from here."""
        return any(peer.owed for peer in self.peers.values())

    def unlinked(self) -> list[Peer]:
        """Contributors without a link, although there is work with them."""
        return [peer for peer in self._contributors if peer.link is None and peer.working]

    def lives_of(self, names: Iterable[str]) -> frozenset[int]:
        """The incarnations of those members of the attempt that have one of these names."""
        members = (*self.start.contributors, *self.start.receivers)
        return frozenset(member.incarnation for member in members if member.name in names)

    def stop(self, reason: str) -> None:
        """End the attempt as failed, from any thread."""
        with self.condition:
            if not self.finished:
                self.reason = self.reason or reason
            self.condition.notify_all()

    def release(self) -> None:
        """Take source and result back from every thread; returns when no one uses them."""
        self.lease.revoke()
        with self.condition:
            self.condition.notify_all()
            links = [peer.link for peer in self.peers.values() if peer.link is not None]
        for link in links:
            link.discard(self.lease)
        self.lease.wait_unused()
        with self.condition:
            for buffer in self._parked.values():
                self.host.pool.give(buffer)
            self._parked.clear()

    def record(self) -> OperationRecord:
        """What it cost so far."""
        links = tuple(
            LinkRecord(
                peer=peer.member.name,
                bytes_sent=peer.bytes_sent,
                bytes_received=peer.bytes_received,
                send_blocked_seconds=peer.seconds_sending,
                stripes=len(peer.link.stripes) if peer.link is not None else 0,
            )
            for peer in self.peers.values()
        )
        now = time.monotonic()
        return OperationRecord(
            seconds=now - self.begun,
            wait_ready_seconds=(self._ready_at or now) - self.begun if self.peers else 0.0,
            reduce_seconds=self._reduce_seconds,
            links=links,
        )

    # What the group reports, from any thread.

    def linked(self, link: Link) -> None:
        """A link to a peer is up: greet on it, unless it is the one that is in use already."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or peer.link is link:
                return
            peer.link = link
            if peer.contributor and (self.me < 0 or self._owns(peer.index)):
                self._greet(peer)
            if self.key in link.ready:
                self._peer_ready(peer)
            elif self._everyone_ready():
                self._all_ready()

    def ready(self, link: Link) -> None:
        """A peer's READY for this attempt has come."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is not None and peer.link is link:
                self._peer_ready(peer)

    def unlink(self, link: Link) -> bool:
        """A link died. True if it should be built again; else its peer is noted as lost, if there was work with it."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or peer.link is not link or link.failure is None or not peer.working:
                return False
            peer.link, peer.ready = None, False
            peer.unlinked_since = peer.look_at = time.monotonic()
            self.condition.notify_all()
            if not peer.contributor:
                peer.owed = sum(chunk.owner == self.me for chunk in self.chunks)
                return False
            if self._may_redial(peer, link.failure):
                peer.redials += 1
                return True
            self._lose(link.failure)
            return False

    def _may_redial(self, peer: Peer, failure: LinkFailure) -> bool:
        """A connection that had died while it was idle is no failure of this attempt: no number has travelled on it."""
        fresh = not peer.touched and not self._scattered and peer.redials < _REDIALS
        return fresh and failure.evidence in ("eof", "reset")

    def unreachable(self, failure: LinkFailure) -> None:
        """No link to this peer could be built."""
        with self.condition:
            peer = self.peers.get(failure.incarnation)
            if peer is not None and peer.contributor and peer.link is None and peer.working:
                self._lose(failure)

    def _lose(self, failure: LinkFailure) -> None:
        if not self.finished and self.reason is None:  # what an abort cuts is no observation
            self.failures.setdefault(failure.incarnation, failure)
        self.condition.notify_all()

    # READY. Under the condition.

    def _owns(self, index: int) -> bool:
        return any(chunk.owner == index for chunk in self.chunks)

    def _greet(self, peer: Peer) -> None:
        if peer.link is not None:
            peer.link.send(Outgoing(Kind.READY, self.key))

    def _everyone_ready(self) -> bool:
        return all(peer.ready for peer in self._contributors)

    def _peer_ready(self, peer: Peer) -> None:
        if peer.ready:
            return
        peer.ready = True
        if not peer.contributor:
            self._send(peer, Kind.GATHER, self._reduced)
        elif self._everyone_ready():
            self._all_ready()

    def _all_ready(self) -> None:
        """Everyone has begun: those that own nothing may know it now, and numbers may flow."""
        if self.me < 0 or self._scattered:
            return
        self._scattered = True
        self._ready_at = time.monotonic()
        for peer in self._contributors:
            if not self._owns(peer.index):
                self._greet(peer)
        for peer in self._contributors:
            self._send(peer, Kind.SCATTER, [i for i, chunk in enumerate(self.chunks) if chunk.owner == peer.index])

    def _send(self, peer: Peer, kind: Kind, indices: list[int]) -> None:
        numbers = self._source if kind is Kind.SCATTER else self._result
        if peer.link is None or numbers is None:
            return
        link = peer.link

        def sent(nbytes: int, seconds: float) -> None:
            self._sent(peer, link, nbytes, seconds)

        spans = [(index, self.chunks[index]) for index in indices]
        link.send(
            *(
                Outgoing(kind, self.key, index, numbers[chunk.start : chunk.stop], self._wire, self.lease, sent)
                for index, chunk in spans
            )
        )

    def _sent(self, peer: Peer, link: Link, nbytes: int, seconds: float) -> None:
        with self.condition:
            if peer.link is not link:
                return  # it was counted as lost together with its link
            peer.owed -= 1
            peer.bytes_sent += nbytes
            peer.seconds_sending += seconds
            if not peer.owed:
                self.condition.notify_all()

    # Receiving. Called by the stripes' threads.

    def place(self, link: Link, header: Header, scratch: Scratch) -> Part | None:
        """Where a chunk's payload goes; waits for its turn when too many came early. None: it is stale."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or not 0 <= header.chunk < len(self.chunks):
                raise FrameError(f"no chunk {header.chunk} is expected from {link.member.name}")
            chunk = self.chunks[header.chunk]
            size = self._wire.size(chunk.stop - chunk.start)
            if chunk.owner != (self.me if header.kind is Kind.SCATTER else peer.index) or header.length != size:
                raise FrameError(f"chunk {header.chunk} from {link.member.name} has the wrong owner or length")
            if peer.link is not link or not self._claim(peer, header):
                return None
            part = Part(self, peer, header, scratch, size)
            if header.kind is Kind.GATHER:
                if self._wire.lossless:
                    part.view = self._bytes_of(chunk)
            elif not self._place_scatter(part, chunk, size):
                return None
        if self.lease.acquire():
            return part
        part.cancel()
        return None

    def _claim(self, peer: Peer, header: Header) -> bool:
        """Every (chunk, sender) counts once. A second sum does no harm; a second contribution would."""
        claim = (header.chunk, peer.index)
        if claim in self._claimed:
            if header.kind is Kind.SCATTER:
                raise FrameError(f"chunk {header.chunk} came twice from {peer.member.name}")
            return False
        self._claimed.add(claim)
        peer.touched = True
        return True

    def _place_scatter(self, part: Part, chunk: Chunk, size: int) -> bool:
        index, who = part.header.chunk, part.peer.index
        while self._turn[index] != who and not self._buffers and not self.lease.revoked:
            self.condition.wait()
        if self.lease.revoked:
            return False
        if self._turn[index] != who:
            self._buffers -= 1
            part.buffer = self.host.pool.take()
            part.view = part.buffer[:size]
        elif who == 0 and self._wire.lossless:
            part.view = self._bytes_of(chunk)
        return True

    def give_back(self, buffer: memoryview) -> None:
        """A pool buffer is free again."""
        self.host.pool.give(buffer)
        with self.condition:
            self._buffers += 1
            self.condition.notify_all()

    def _bytes_of(self, chunk: Chunk) -> memoryview:
        return self._result[chunk.start : chunk.stop].data.cast("B")

    def arrived(self, part: Part, nbytes: int) -> None:
        """A verified payload: use it, or keep it until its turn."""
        index = part.header.chunk
        if part.header.kind is Kind.GATHER:
            if not self._wire.lossless:
                chunk = self.chunks[index]
                self._wire.decode(part.view, self._result[chunk.start : chunk.stop])
        elif not self._park(part):
            self._add(index, part.peer.index, part.view, part.scratch)
            if part.buffer is not None:
                self.give_back(part.buffer)
            self._advance(index, part.scratch)
        self._count(part.peer, nbytes)

    def _park(self, part: Part) -> bool:
        with self.condition:
            if part.buffer is None or self._turn[part.header.chunk] == part.peer.index:
                return False
            self._parked[part.header.chunk, part.peer.index] = part.buffer
            return True

    def _count(self, peer: Peer, nbytes: int) -> None:
        with self.condition:
            self._received += 1
            received = self._received
        try:
            self.host.observe(
                Progress(identity=self.start.identity, chunks_received=received, chunks_expected=self._expected)
            )
        except Exception as error:
            self.stop(f"the observe hook raised {type(error).__name__}: {error}")
        with self.condition:
            peer.expected -= 1
            peer.bytes_received += nbytes
            if not peer.expected:
                self.condition.notify_all()

    # Reducing. Whoever holds a chunk's turn is alone with it.

    def _advance(self, index: int, scratch: Scratch) -> None:
        """Pass the turn on, through everything that is here already."""
        while True:
            with self.condition:
                self._turn[index] += 1
                turn = self._turn[index]
                buffer = self._parked.pop((index, turn), None)
                if not self._buffers:
                    self.condition.notify_all()
            if turn == len(self.start.contributors):
                self._complete(index, scratch)
                return
            if turn == self.me:
                self._add_own(index, scratch)
            elif buffer is not None:
                chunk = self.chunks[index]
                self._add(index, turn, buffer[: self._wire.size(chunk.stop - chunk.start)], scratch)
                self.give_back(buffer)
            else:
                return

    def _add(self, index: int, who: int, data: memoryview, scratch: Scratch) -> None:
        """Add a contribution that arrived."""
        chunk = self.chunks[index]
        if self._wire.lossless:
            numbers: Floats = np.frombuffer(data, dtype=np.float32)
        else:
            numbers = scratch.numbers[: chunk.stop - chunk.start]
            self._wire.decode(data, numbers)
        if who == 1 and self.me == 0 and not self._own_is_plain:
            self._add_own(index, scratch)
        self._accumulate(chunk, who, numbers, scratch)

    @property
    def _own_is_plain(self) -> bool:
        """The first term is the source itself: the second may be added to it without a copy."""
        return self._wire.lossless and self.me == 0 and self._multipliers[0] == 1

    def _add_own(self, index: int, scratch: Scratch) -> None:
        chunk = self.chunks[index]
        assert self._source is not None, "only contributors own chunks"
        numbers = self._source[chunk.start : chunk.stop]
        if not self._wire.lossless:
            own = scratch.term[: chunk.stop - chunk.start]
            # scratch.raw may hold the very contribution that comes next, decoded already into scratch.numbers
            round_trip(self._wire, numbers, scratch.raw, own)
            numbers = own
        self._accumulate(chunk, self.me, numbers, scratch)

    def _accumulate(self, chunk: Chunk, who: int, numbers: Floats, scratch: Scratch) -> None:
        """result = multiplier * numbers for the first, result += multiplier * numbers for the others."""
        begun = time.perf_counter()
        with np.errstate(all="ignore"):  # infinities and NaN are values like any other here
            self._accumulate_quietly(chunk, who, numbers, scratch)
        self._reduce_seconds += time.perf_counter() - begun

    def _accumulate_quietly(self, chunk: Chunk, who: int, numbers: Floats, scratch: Scratch) -> None:
        out = self._result[chunk.start : chunk.stop]
        multiplier = self._multipliers[who]
        if who == 0:
            if multiplier != 1:
                np.multiply(numbers, multiplier, out=out)
            elif numbers.ctypes.data != out.ctypes.data:
                np.copyto(out, numbers)
        else:
            term = numbers
            if multiplier != 1:
                term = np.multiply(numbers, multiplier, out=scratch.term[: numbers.size])
            base = out
            if who == 1 and self._own_is_plain:
                assert self._source is not None, "the first contributor has a source"
                base = self._source[chunk.start : chunk.stop]
            np.add(base, term, out=out)

    def _complete(self, index: int, scratch: Scratch) -> None:
        """All contributions are in: divide, quantise once, and let everyone have it."""
        chunk = self.chunks[index]
        out = self._result[chunk.start : chunk.stop]
        if self._divisor != 1:
            with np.errstate(all="ignore"):
                np.divide(out, self._divisor, out=out)
        if not self._wire.lossless:
            round_trip(self._wire, out, scratch.raw, out)
        with self.condition:
            self._reduced.append(index)
            for peer in self.peers.values():
                if peer.contributor or peer.ready:
                    self._send(peer, Kind.GATHER, [index])
            self.condition.notify_all()


def aborted_reason(abort: Abort) -> str:
    """How a Failed names the abort that ended it."""
    lost = f" (left out next: {', '.join(abort.lost)})" if abort.lost else ""
    return f"aborted: {abort.reason}{lost}"


Observer = Callable[[Progress], None]

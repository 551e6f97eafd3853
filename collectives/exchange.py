"""One attempt of one operation, as one of its members executes it.

Every addition, multiplication and division is one single-rounded operation of the tensor's type, and terms are added in
the order of the contributors' names, so that the result is a function of the inputs and the Start alone.

Nobody sends numbers before the contributors that it works with have said READY. In the direct pattern an owner says
READY to those that own nothing last, when all others have said it: so when numbers flow to an owner, every
contributor has begun. Parts that arrive before their turn are kept. How many there can be is bounded by credit: an
owner lets each contributor send so many chunks, in ascending order, and more as they are added up; the lowest chunk
that is not complete lies within everyone's credit, so that it always gets on. No thread ever waits for another peer:
several operations over the same links cannot block each other. (In a ring each sum has one part to come, in its turn.
In a tree early parts are not bounded.)
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from xxhash import xxh3_64, xxh3_128_hexdigest

from collectives import frames
from collectives.frames import FrameError, Header, Kind
from collectives.links import PIECE, Array, Link, Outgoing, Pool
from collectives.patterns import LOSSLESS, Chunk, chunks_of, result_span, route, source_span
from collectives.records import (
    Abort,
    Awaited,
    LinkFailure,
    LinkRecord,
    Member,
    OperationRecord,
    Progress,
    Start,
    Underway,
)
from collectives.sockets import Lease, LinkOptions
from collectives.wires import WIRES, NonFinite, Wire

_REDIALS = 2
_LOOK_AFTER = 0.1  # seconds without a link after which to look whether the peer is there at all
_ABSENT = object()
_AWAITED = 32  # links that an attempt under way names
_ENCODED_BYTES = 8 << 20  # of results that are kept as they travel, for all who get them; others are encoded for each
_PIECE = 1 << 15  # numbers that are scaled at once: what they pass through stays in cache
_UFUNCS: dict[str, Any] = {"min": np.minimum, "max": np.maximum}


Observer = Callable[[Progress], None]


class Host(Protocol):
    """What an attempt needs from its group."""

    options: LinkOptions
    pool: Pool
    observer: Observer | None


@dataclass(slots=True, eq=False)
class Peer:
    """Another member of the attempt with which there is work. index: among the contributors, -1 for a receiver.

    expected: chunks still to come from it; terms: those of them that are added to a sum here. owed: frames it must get
    that the kernel has not taken yet.
    waiting: what it gets as soon as it has said READY. unsent: chunks that it gets as soon as it gives credit for more;
    credit, credited: how many that is now, and how many came after the first. added: of its parts, here.
    touched: numbers have travelled between us.
    own_bytes, own_chunks: received of its own numbers.
    unlinked_since, look_at, finished_at, own_at, moved_at (time.monotonic()): since when it has no link, when to look
    for it next, and when the last of its chunks, of its own numbers, and anything at all, came.
    """

    member: Member
    index: int
    expected: int = 0
    terms: int = 0
    owed: int = 0
    owner: bool = False
    touched: bool = False
    ready: bool = False
    link: Link | None = None
    redials: int = 0
    waiting: list[tuple[Kind, int]] = field(default_factory=list)
    unsent: deque[int] = field(default_factory=deque)
    credit: int = 0
    credited: int = 0
    added: int = 0
    unlinked_since: float = 0.0
    look_at: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_sending: float = 0.0
    finished_at: float = 0.0
    own_bytes: int = 0
    own_at: float = 0.0
    moved_at: float = 0.0
    own_chunks: int = 0
    retransmits_before: int = 0

    @property
    def contributor(self) -> bool:
        return self.index >= 0

    @property
    def working(self) -> bool:
        """Something is still to come from it or to go to it."""
        return self.expected > 0 or self.owed > 0


class Part:
    """The place of one chunk's payload while it arrives (a links.Sink).

    early: it came before its turn, and is kept whole. streamed: it is added piece by piece as it comes, and `hasher`
    takes in the sums; if the part's checksum turns out wrong, the attempt fails, and with it what was added.
    """

    __slots__ = ("_attempt", "buffer", "early", "hasher", "header", "lease", "peer", "streamed", "view")

    def __init__(
        self,
        attempt: Attempt,
        peer: Peer,
        header: Header,
        view: memoryview | None,
        *,
        early: bool = False,
        streamed: bool = False,
    ) -> None:
        self.lease = attempt.lease
        self.peer, self.header, self.early, self.streamed = peer, header, early, streamed
        self.hasher = xxh3_64() if streamed and attempt.host.options.checksum else None
        self.buffer: memoryview | None = None
        if view is None:
            self.buffer = attempt.host.pool.take(header.length)
            view = self.buffer[: header.length]
        self.view = view
        self._attempt = attempt

    def room(self, got: int) -> memoryview:
        if not self.streamed:
            return self.view[got : got + PIECE]
        return self.view[got % PIECE : min(PIECE, self.header.length - got + got % PIECE)]

    def filled(self, stop: int) -> None:
        self.peer.moved_at = time.monotonic()
        if self.streamed and (not stop % PIECE or stop == self.header.length):
            self._attempt.absorb(self, (stop - 1) // PIECE * PIECE, stop)

    def accept(self, payload: memoryview, start: int, stop: int) -> None:
        """Added from there, or decoded from there in the end; what is to stay is copied."""
        if not self.streamed and (self.early or self.buffer is None):
            into = np.frombuffer(self.view[start:stop], dtype=np.uint8)
            np.copyto(into, np.frombuffer(payload[start:stop], dtype=np.uint8))
            return
        self._attempt.dispose(self)
        self.view = payload[start:stop] if self.streamed else payload
        if self.streamed:
            self._attempt.absorb(self, start, stop)

    def finish(self, nbytes: int, digest: int) -> None:
        self._attempt.arrived(self, nbytes, digest)

    def cancel(self) -> None:
        self._attempt.dispose(self)


class Attempt:
    """One attempt on one member. Threads of links drive it; `run()` waits on `condition` for `settled`."""

    def __init__(self, start: Start, me: Member, source: Array | None, result: Array, host: Host) -> None:
        self.start, self.host = start, host
        self.key = frames.key_of(start.identity)
        self.lease = Lease()
        self.condition = threading.Condition()
        self.failures: dict[int, LinkFailure] = {}
        self.reason: str | None = None
        self.begun = time.monotonic()
        self.finished = False
        self.me = next((i for i, each in enumerate(start.contributors) if each.incarnation == me.incarnation), -1)
        self._name = me.name
        self._source, self._result = source, result
        self._read_from = (source_span(start, self.me) or (0, 0))[0]
        self._write_from = result_span(start, self.me)[0]
        self._direct = start.pattern == "direct"
        self._plan_arithmetic(start)
        self.chunks = chunks_of(start, host.options.chunk_bytes)
        self.routes = {owner: route(start, self.me, owner) for owner in {chunk.owner for chunk in self.chunks}}
        self.peers = self._others(me)
        self._owned = sum(chunk.owner == self.me for chunk in self.chunks)
        self._contributors = [peer for peer in self.peers.values() if peer.contributor]
        self._turn = [int(self._own_first(chunk)) for chunk in self.chunks]
        self._claimed: set[tuple[Kind, int, int]] = set()
        self._parked: dict[tuple[int, int], Part] = {}
        self._window = self._credit_each(start)
        self._step = max(self._window // 8, min(self._window // 2, 4))  # a credit may be long on its way
        self._reduced: list[int] = []
        self._encoded: WeakValueDictionary[int, Array] = WeakValueDictionary()
        self._letters: list[tuple[Link, list[Outgoing]]] = []
        self._digests = np.zeros(len(self.chunks), dtype=np.uint64)
        self._hashed = [False] * len(self.chunks)
        self._scattered = False
        self._expected = sum(peer.expected for peer in self.peers.values())
        self._received = 0
        self._ready_at: float | None = None
        self._reduce_seconds = 0.0

    def _credit_each(self, start: Start) -> int:
        """How many chunks each contributor may send to an owner before the owner has added any."""
        limit = self.host.options.chunk_bytes
        size = min(start.chunk_bytes or limit, limit)
        kept = size if start.wire in LOSSLESS else WIRES[start.wire].size(size // 4)
        if start.wires:
            kept = max(self._size(chunk, chunk.wire) for chunk in self.chunks)
        return max(2, self.host.options.pool_bytes // kept // max(1, len(start.contributors) - 1))

    def _plan_arithmetic(self, start: Start) -> None:
        kind = np.dtype(start.dtype).type
        self._combine = _UFUNCS.get(start.op, np.add)
        self._multipliers = [kind(each) for each in start.multipliers]
        self._divisor = kind(start.divisor)
        # what travels up a ring or a tree has been multiplied already
        self._own_multiplier = self._multipliers[self.me] if self.me >= 0 else kind(1)

    def _others(self, me: Member) -> dict[int, Peer]:
        """Everybody with whom there is work, and how much."""
        peers = [Peer(member, index) for index, member in enumerate(self.start.contributors)]
        receivers = [Peer(member, -1) for member in self.start.receivers if member.incarnation != me.incarnation]
        for chunk in self.chunks:
            way = self.routes[chunk.owner]
            peers[chunk.owner].owner = True
            for term in way.terms:
                peers[term].expected += term != self.me
                peers[term].terms += term != self.me
            if way.above >= 0:
                peers[way.above].expected += 1
            for index in (way.up, *way.down):
                if index >= 0:
                    peers[index].owed += 1
            for receiver in receivers if chunk.owner == self.me and self.start.op != "reduce_scatter" else ():
                receiver.owed += 1
        for peer in (*peers, *receivers):
            peer.unlinked_since, peer.look_at = self.begun, self.begun + _LOOK_AFTER
        return {each.member.incarnation: each for each in (*peers, *receivers) if each.working}

    # What run() does and asks. Its caller does not hold the condition.

    def begin(self) -> None:
        """Reduce at once what needs nobody else."""
        for index, chunk in enumerate(self.chunks):
            if self.routes[chunk.owner].terms == (self.me,) and chunk.owner == self.me:
                self._add_own(index)
                self._complete(index)
        self._post()

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
            parked = list(self._parked.values())
            self._parked.clear()
        for part in parked:
            self.dispose(part)

    def digest(self) -> str:
        """What Done says of the result: equal bits, equal digest.

        For a round of an outer loop it is the xxh3-128 of the result's bytes, by which those who missed it fetch it.
        For other operations it is that of the checksums of the chunks as they travelled, which costs nothing; a
        reduce_scatter, which leaves each member with other bits, is named by its identity.
        """
        start = self.start
        if start.op == "reduce_scatter":
            return xxh3_128_hexdigest(repr(start.identity).encode())
        if start.base_version >= 0 or not self.host.options.checksum:
            return xxh3_128_hexdigest(self._result.data.cast("B") if self._result.size else b"")
        return xxh3_128_hexdigest(self._digests.tobytes())

    def record(self) -> OperationRecord:
        """What it cost so far."""
        links = tuple(
            LinkRecord(
                peer=peer.member.name,
                bytes_sent=peer.bytes_sent,
                bytes_received=peer.bytes_received,
                send_blocked_seconds=peer.seconds_sending,
                stripes=len(peer.link.stripes) if peer.link is not None else 0,
                waited_seconds=max(0.0, peer.finished_at - (self._ready_at or self.begun)),
                retransmits=peer.link.retransmits - peer.retransmits_before if peer.link is not None else 0,
                rtt=peer.link.care.gauge.rtt if peer.link is not None else 0.0,
                own_bytes=peer.own_bytes if self._direct else 0,
                own_seconds=max(0.0, peer.own_at - (self._ready_at or self.begun)) if self._direct else 0.0,
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

    def underway(self) -> Underway:
        """How it stands, from any thread: of whom something is awaited, and for how long nothing has come from there.

        Where sums travel on, as in a ring, nobody's own numbers can be told from the others': all is "result" there.
        """
        start, now = self.start, time.monotonic()
        with self.condition:
            awaited = [each for peer in self._contributors if (each := self._awaited(peer, now)) is not None]
            awaited.sort(key=lambda each: -each.seconds)
            stage = "own" if any(peer.terms for peer in self._contributors) else "result"
            return Underway(
                tag=start.tag,
                round=start.round,
                attempt=start.attempt,
                stage=stage if self._everyone_ready() else "ready",
                seconds=now - self.begun,
                awaited=tuple(awaited[:_AWAITED]),
            )

    def _awaited(self, peer: Peer, now: float) -> Awaited | None:
        if not (peer.expected or not peer.ready):
            return None
        own = self._direct and peer.terms > 0
        if peer.ready and own and peer.own_chunks >= self._allowed(peer):
            return None
        what = "ready" if not peer.ready else "own" if own else "result"
        since = max(peer.moved_at, self._ready_at or self.begun)
        return Awaited(peer=peer.member.name, what=what, seconds=now - since)

    def _allowed(self, peer: Peer) -> float:
        """How many chunks of its own numbers this peer may have sent here by now: see `_credit`."""
        return self._window + peer.added // self._step * self._step if self._owned > self._window else np.inf

    # What the group reports, from any thread.

    def linked(self, link: Link) -> None:
        """A link to a peer is up: greet on it, unless it is the one that is in use already."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or peer.link is link or link.failure is not None:
                return
            if peer.link is not None and not self._replaced(peer):
                return
            peer.link, peer.retransmits_before = link, link.retransmits
            if peer.contributor and not self._greets_late(peer):
                self._greet(peer)
            if link.ready.pop(self.key, _ABSENT) is None:
                self._peer_ready(peer)
            elif self._everyone_ready():
                self._all_ready()
        self._post()

    def _replaced(self, peer: Peer) -> bool:
        """A new link has come before the end of the former one was told. False if too much was lost with that."""
        if not peer.working:
            return False
        failure = LinkFailure(
            peer=peer.member.name, incarnation=peer.member.incarnation, evidence="reset", detail="the link was replaced"
        )
        return self._take_link(peer, failure) or not peer.contributor

    def _take_link(self, peer: Peer, failure: LinkFailure) -> bool:
        """The peer's link is gone. True if a contributor may have another (a receiver asks); else it is lost."""
        peer.link, peer.ready = None, False
        peer.unlinked_since = peer.look_at = time.monotonic()
        self.condition.notify_all()
        if not peer.contributor:
            peer.owed = self._owned
            return False
        if self._may_redial(peer, failure):
            return True
        self._lose(failure)
        return False

    def ready(self, link: Link) -> None:
        """A peer's READY for this attempt has come."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is not None and peer.link is link:
                link.ready.pop(self.key, None)
                self._peer_ready(peer)
        self._post()

    def unlink(self, link: Link) -> bool:
        """A link died. True if it should be built again; else its peer is noted as lost, if there was work with it."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or peer.link is not link or link.failure is None or not peer.working:
                return False
            again = self._take_link(peer, link.failure)
            peer.redials += again
            return again

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

    def _greets_late(self, peer: Peer) -> bool:
        return self._direct and self.me >= 0 and not peer.owner

    def _greet(self, peer: Peer) -> None:
        if peer.link is not None:
            self._letters.append((peer.link, [Outgoing(Kind.READY, self.key)]))

    def _everyone_ready(self) -> bool:
        return all(peer.ready for peer in self._contributors)

    def _peer_ready(self, peer: Peer) -> None:
        if peer.ready:
            return
        peer.ready, peer.moved_at = True, time.monotonic()
        waiting, peer.waiting = peer.waiting, []
        for kind, index in waiting:
            self._give(kind, [index], (peer,))
        if not peer.contributor:
            self._give(Kind.GATHER, self._reduced, (peer,))
        elif self._everyone_ready():
            self._all_ready()

    def _all_ready(self) -> None:
        """Everyone has begun: those that own nothing may know it now, and numbers may flow."""
        if self.me < 0 or self._scattered or self.lease.revoked:
            return
        self._scattered = True
        self._ready_at = time.monotonic()
        for peer in self._contributors:
            if self._greets_late(peer):
                self._greet(peer)
        self._scatter()

    def _scatter(self) -> None:
        """Send up what consists of this member's numbers alone, to each peer in turn."""
        mine: dict[int, list[int]] = {}
        for index, chunk in enumerate(self.chunks):
            way = self.routes[chunk.owner]
            if way.up >= 0 and way.terms == (self.me,):
                mine.setdefault(way.up, []).append(index)
                if not self._is_source(chunk):
                    self._add_own(index)
        for peer in self._contributors:
            indices = mine.get(peer.index, [])
            if self._direct:
                peer.unsent, peer.credit = deque(indices), self._window
                self._spend(peer)
            else:
                self._give(Kind.SCATTER, indices, (peer,))

    def _spend(self, peer: Peer) -> None:
        """Send as many chunks as there is credit for."""
        count = min(peer.credit, len(peer.unsent))
        peer.credit -= count
        self._give(Kind.SCATTER, [peer.unsent.popleft() for _ in range(count)], (peer,))

    def credited(self, link: Link, added: int) -> None:
        """An owner has added so many of the chunks that it got from here."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is not None and peer.link is link and added > peer.credited:
                peer.credit += added - peer.credited
                peer.credited = added
                self._spend(peer)
        self._post()

    def _credit(self, peer: Peer) -> None:
        """A part of this peer has been added: it may send more, if there is more."""
        if not self._direct or self._owned <= self._window:
            return
        with self.condition:
            peer.added += 1
            if peer.link is not None and not peer.added % self._step:
                self._letters.append((peer.link, [Outgoing(Kind.CREDIT, self.key, peer.added)]))

    def _below(self, owner: int) -> list[Peer]:
        """Who gets the result of this owner's chunks from here."""
        down = self.routes[owner].down if owner in self.routes else ()
        served = [peer for peer in self._contributors if peer.index in down]
        if owner == self.me:
            served += [peer for peer in self.peers.values() if not peer.contributor and peer.ready]
        return served

    def _give(self, kind: Kind, indices: list[int], peers: Iterable[Peer]) -> None:
        """Send these chunks to these peers, as soon as `_post` is called, or as soon as they have begun."""
        for peer in peers:
            if peer.link is None or not peer.ready:
                peer.waiting.extend((kind, index) for index in indices)
            elif indices:
                peer.touched = True
                sent, owed = partial(self._sent, peer, peer.link), partial(getattr, peer, "owed")
                self._letters.append((peer.link, [self._outgoing(kind, index, sent, owed) for index in indices]))

    def _post(self) -> None:
        """Hand over what is to be sent. Not under the condition: others need not wait for the kernel."""
        with self.condition:
            letters, self._letters = self._letters, []
        for link, items in letters:
            link.send(*items)

    def _outgoing(
        self, kind: Kind, index: int, sent: Callable[[int, float], None], owed: Callable[[], int]
    ) -> Outgoing:
        chunk, gather = self.chunks[index], kind is Kind.GATHER
        numbers = self._own(chunk) if not gather and self._is_source(chunk) else self._place(chunk)
        wire = chunk.gather_wire if gather else chunk.wire
        if gather and (encoded := self._encoded.get(index)) is not None:
            numbers, wire = encoded, None
        return Outgoing(
            kind=kind,
            key=self.key,
            chunk=index,
            numbers=numbers,
            wire=wire,
            lease=self.lease,
            digest=int(self._digests[index]) if self._is_hashed(kind, index) else None,
            sent=sent,
            owed=owed,
            refused=partial(self._refused, chunk.start),
        )

    def _is_hashed(self, kind: Kind, index: int) -> bool:
        """The checksum of what is to be sent is known."""
        return self.host.options.checksum and (kind is Kind.GATHER or self._hashed[index])

    def _is_source(self, chunk: Chunk) -> bool:
        """What goes up is the source itself: nothing was added to it here, nor was it multiplied."""
        return self.routes[chunk.owner].terms == (self.me,) and (self._direct or self._own_multiplier == 1)

    def _refused(self, at: int, error: Exception) -> None:
        """A wire cannot carry what this member would send: numbers that begin at element `at`."""
        if isinstance(error, NonFinite):
            error = NonFinite(error.wire, at + error.offset, error.value)
        self.stop(f"{self._name}: {error}")

    def _sent(self, peer: Peer, link: Link, nbytes: int, seconds: float) -> None:
        with self.condition:
            if peer.link is not link:
                return  # it was counted as lost together with its link
            peer.owed -= 1
            peer.bytes_sent += nbytes
            peer.seconds_sending += seconds
            if not peer.owed:
                self.condition.notify_all()

    # Receiving. Called by the links' threads.

    def place(self, link: Link, header: Header) -> Part | None:
        """Where a chunk's payload goes. None: it is stale."""
        with self.condition:
            peer = self.peers.get(link.member.incarnation)
            if peer is None or not 0 <= header.chunk < len(self.chunks):
                raise FrameError(f"no chunk {header.chunk} is expected from {link.member.name}")
            chunk = self.chunks[header.chunk]
            self._check_frame(header, peer, chunk)
            if peer.link is not link or not self._claim(peer, header):
                return None
            if header.kind is Kind.GATHER:
                part = Part(self, peer, header, self._room(chunk, chunk.gather_wire))
            else:
                part = self._place_term(peer, header, chunk)
        if self.lease.acquire():
            return part
        part.cancel()
        return None

    def _check_frame(self, header: Header, peer: Peer, chunk: Chunk) -> None:
        way, gather = self.routes[chunk.owner], header.kind is Kind.GATHER
        right = way.above == peer.index if gather else peer.index in way.terms
        size = self._size(chunk, chunk.gather_wire if gather else chunk.wire)
        if not right or peer.index < 0 or header.length != size:
            raise FrameError(f"chunk {header.chunk} from {peer.member.name} has the wrong owner or length")

    def _size(self, chunk: Chunk, wire: Wire | None) -> int:
        count = chunk.stop - chunk.start
        return wire.size(count) if wire is not None else count * self._result.itemsize

    def _room(self, chunk: Chunk, wire: Wire | None) -> memoryview | None:
        """The chunk's own place in the result, if what comes needs no decoding."""
        return self._place(chunk).data.cast("B") if wire is None else None

    def _claim(self, peer: Peer, header: Header) -> bool:
        """Every (chunk, sender) counts once. A second sum does no harm; a second contribution would."""
        claim = (header.kind, header.chunk, peer.index)
        if claim in self._claimed:
            if header.kind is Kind.SCATTER:
                raise FrameError(f"chunk {header.chunk} came twice from {peer.member.name}")
            return False
        self._claimed.add(claim)
        peer.touched = True
        return True

    def _place_term(self, peer: Peer, header: Header, chunk: Chunk) -> Part:
        index, position = header.chunk, self.routes[chunk.owner].terms.index(peer.index)
        early = self._turn[index] != position
        streamed = not early and chunk.wire is None and (position > 0 or self._own_next(chunk, position))
        in_place = position == 0 and not early and not streamed
        view = self._room(chunk, chunk.wire) if in_place else None
        return Part(self, peer, header, view, early=early, streamed=streamed)

    def _own_next(self, chunk: Chunk, position: int) -> bool:
        """The term after this one is this member's own: both are added in one pass."""
        terms = self.routes[chunk.owner].terms
        return position + 1 < len(terms) and terms[position + 1] == self.me

    def _own_first(self, chunk: Chunk) -> bool:
        """The first term is this member's own: it is added together with the second."""
        terms = self.routes[chunk.owner].terms
        return len(terms) > 1 and terms[0] == self.me

    def _own_is_plain(self, chunk: Chunk) -> bool:
        """A first term that is the source itself needs no copy: the second is added to it."""
        return chunk.wire is None and self._own_multiplier == 1

    def dispose(self, part: Part) -> None:
        """A part's buffer is free again."""
        if part.buffer is None:
            return
        self.host.pool.give(part.buffer)
        part.buffer = None

    def _place(self, chunk: Chunk) -> Array:
        """A chunk's place in the result."""
        return self._result[chunk.start - self._write_from : chunk.stop - self._write_from]

    def _own(self, chunk: Chunk) -> Array:
        assert self._source is not None, "only who has a source adds to a chunk"
        return self._source[chunk.start - self._read_from : chunk.stop - self._read_from]

    def arrived(self, part: Part, nbytes: int, digest: int) -> None:
        """A verified payload: use it, or keep it until its turn. The observer hears of it before anything follows."""
        part.peer.moved_at = time.monotonic()
        if self.host.observer is not None:
            self._tell(self.host.observer)
        index = part.header.chunk
        if part.header.kind is Kind.GATHER:
            self._take_result(index, part, digest)
        elif part.streamed:
            self._absorbed(index, part)
        elif not self._park(part):
            self._add(index, part)
            self._advance(index)
        self._post()
        self._count(part.peer, nbytes, own=part.header.kind is Kind.SCATTER)

    def _take_result(self, index: int, part: Part, digest: int) -> None:
        chunk = self.chunks[index]
        self._digests[index] = digest
        if chunk.gather_wire is not None:
            chunk.gather_wire.decode(part.view, self._place(chunk))
            self.dispose(part)
        if self.routes[chunk.owner].down:
            with self.condition:
                self._give(Kind.GATHER, [index], self._below(chunk.owner))

    def _park(self, part: Part) -> bool:
        index = part.header.chunk
        with self.condition:
            position = self._position(index, part.peer.index)
            if not part.early or self._turn[index] == position:
                return False
            self._parked[index, position] = part
            return True

    def _position(self, index: int, who: int) -> int:
        return self.routes[self.chunks[index].owner].terms.index(who)

    def _count(self, peer: Peer, nbytes: int, *, own: bool) -> None:
        with self.condition:
            peer.expected -= 1
            peer.bytes_received += nbytes
            if own:
                peer.terms -= 1
                peer.own_chunks += 1
                peer.own_bytes += nbytes
                peer.own_at = time.monotonic()
            if not peer.expected:
                peer.finished_at = time.monotonic()
                self.condition.notify_all()

    def _tell(self, observer: Observer) -> None:
        with self.condition:
            self._received += 1
            received = self._received
        try:
            observer(Progress(identity=self.start.identity, chunks_received=received, chunks_expected=self._expected))
        except Exception as error:
            self.stop(f"the observe hook raised {type(error).__name__}: {error}")

    # Reducing. Whoever holds a chunk's turn is alone with it.

    def _advance(self, index: int) -> None:
        """Pass the turn on, through everything that is here already."""
        terms = self.routes[self.chunks[index].owner].terms
        while True:
            with self.condition:
                self._turn[index] += 1
                turn = self._turn[index]
                part = self._parked.pop((index, turn), None)
            if turn == len(terms):
                self._complete(index)
                return
            self._hashed[index] = False
            if terms[turn] == self.me:
                self._add_own(index)
            elif part is not None:
                self._add(index, part)
            else:
                return

    def absorb(self, part: Part, start: int, stop: int) -> None:
        """Add the bytes [start, stop) of a part that arrives in its turn, and this member's own if that is next."""
        chunk, position = self.chunks[part.header.chunk], self._position(part.header.chunk, part.peer.index)
        size = self._result.itemsize
        piece = slice(start // size, stop // size)
        numbers: Array = np.frombuffer(part.view[: stop - start], dtype=self._result.dtype)
        out, multiplier = self._place(chunk)[piece], self._multipliers[part.peer.index] if self._direct else None
        if position == 1 and self._own_first(chunk):
            base = self._own(chunk)[piece]
            if not self._own_is_plain(chunk):
                self._accumulate(0, base, out, out, self._own_multiplier)
                base = out
            self._accumulate(1, numbers, base, out, multiplier)
        elif position == 0 and self._own_is_plain(chunk) and (multiplier is None or multiplier == 1):
            self._accumulate(1, self._own(chunk)[piece], numbers, out, None)
        else:
            self._accumulate(position, numbers, out, out, multiplier)
            if self._own_next(chunk, position):
                self._accumulate(position + 1, self._own(chunk)[piece], out, out, self._own_multiplier)
        if part.hasher is not None:
            part.hasher.update(out.data.cast("B"))

    def _absorbed(self, index: int, part: Part) -> None:
        """The whole part has been added and verified."""
        self.dispose(part)
        self._credit(part.peer)
        if part.hasher is not None:
            self._digests[index] = part.hasher.intdigest()
            self._hashed[index] = True
        if self._own_next(self.chunks[index], self._position(index, part.peer.index)):
            with self.condition:
                self._turn[index] += 1
        self._advance(index)

    def _add(self, index: int, part: Part) -> None:
        """Add a contribution that arrived, or a sum of some."""
        chunk, position = self.chunks[index], self._position(index, part.peer.index)
        multiplier = self._multipliers[part.peer.index] if self._direct else None
        second = position == 1 and self._own_first(chunk)
        if second and not self._own_is_plain(chunk):
            self._add_own(index)
        if chunk.wire is None:
            numbers: Array = np.frombuffer(part.view, dtype=self._result.dtype)
            base = self._own(chunk) if second and self._own_is_plain(chunk) else self._place(chunk)
            self._accumulate(position, numbers, base, self._place(chunk), multiplier)
        else:
            self._add_encoded(chunk, position, part.view, chunk.wire, multiplier)
        self.dispose(part)
        self._credit(part.peer)

    def _add_encoded(self, chunk: Chunk, position: int, view: memoryview, wire: Wire, multiplier: Any) -> None:
        buffer = self.host.pool.take()
        numbers = np.frombuffer(buffer, dtype=np.float32)[: chunk.stop - chunk.start]
        wire.decode(view, numbers)
        self._accumulate(position, numbers, self._place(chunk), self._place(chunk), multiplier)
        self.host.pool.give(buffer)

    def _add_own(self, index: int) -> None:
        chunk = self.chunks[index]
        out, position = self._place(chunk), self._position(index, self.me)
        if chunk.wire is None or self.start.op in ("broadcast", "all_gather"):
            self._accumulate(position, self._own(chunk), out, out, self._own_multiplier)
            return
        buffer = self.host.pool.take()
        try:
            encoded = chunk.wire.encode(self._own(chunk), buffer)
            self._add_encoded(chunk, position, encoded, chunk.wire, self._own_multiplier)
        except ValueError as error:
            self._refused(chunk.start, error)
        self.host.pool.give(buffer)

    def _accumulate(self, position: int, numbers: Array, base: Array, out: Array, multiplier: Any) -> None:
        """out = multiplier * numbers for the first term, out = base + multiplier * numbers for the others."""
        begun = time.perf_counter()
        scale = multiplier is not None and multiplier != 1
        with np.errstate(all="ignore"):  # infinities and NaN are values like any other here
            if position == 0 and scale:
                np.multiply(numbers, multiplier, out=out)
            elif position == 0:
                if numbers.ctypes.data != out.ctypes.data:
                    np.copyto(out, numbers)
            elif not scale:
                self._combine(base, numbers, out=out)
            else:
                for at in range(0, out.size, _PIECE):
                    piece = slice(at, at + _PIECE)
                    self._combine(base[piece], numbers[piece] * multiplier, out=out[piece])
        self._reduce_seconds += time.perf_counter() - begun

    def _complete(self, index: int) -> None:
        """All terms are in: pass the sum on, or if it is whole, finish it and let everyone have it."""
        chunk = self.chunks[index]
        if self.routes[chunk.owner].up >= 0:
            with self.condition:
                up = [peer for peer in self._contributors if peer.index == self.routes[chunk.owner].up]
                self._give(Kind.SCATTER, [index], up)
            return
        encoded = self._finish(chunk, index)
        if encoded is None:
            return
        with self.condition:
            self._reduced.append(index)
            self._give(Kind.GATHER, [index], self._below(chunk.owner))
            self.condition.notify_all()

    def _finish(self, chunk: Chunk, index: int) -> Array | None:
        """Divide, quantise once, and note the checksum. Returns what travels; None if the wire refuses the numbers.

        The result as it travels is kept by the frames that it leaves with, and forgotten with the last of them.
        """
        out = self._place(chunk)
        if self._divisor != 1:
            with np.errstate(all="ignore"):
                np.divide(out, self._divisor, out=out)
            self._hashed[index] = False
        if chunk.gather_wire is None:
            if self.host.options.checksum and not self._hashed[index]:
                self._digests[index] = frames.checksum(out.data.cast("B"))
            return out
        buffer = self.host.pool.take()
        try:
            encoded = chunk.gather_wire.encode(out, buffer)
            chunk.gather_wire.decode(encoded, out)
            self._digests[index] = frames.checksum(encoded) if self.host.options.checksum else 0
            return self._keep(index, encoded)
        except ValueError as error:
            self._refused(chunk.start, error)
            return None
        finally:
            self.host.pool.give(buffer)

    def _keep(self, index: int, encoded: memoryview) -> Array:
        """A copy that the frames share, and `_outgoing` finds, unless many are still on their way."""
        kept = np.frombuffer(encoded, dtype=np.uint8).copy()
        if len(self._encoded) * kept.nbytes < _ENCODED_BYTES:
            self._encoded[index] = kept
        return kept


def aborted_reason(abort: Abort) -> str:
    """How a Failed names the abort that ended it."""
    lost = f" (left out next: {', '.join(abort.lost)})" if abort.lost else ""
    return f"aborted: {abort.reason}{lost}"

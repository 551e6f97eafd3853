"""A link joins two incarnations by K stripes. Frames queue per link; whichever stripe is free takes the next one.

A thread that has something to send sends it itself for as long as the kernel takes it without waiting; what is left
goes to the link's sender thread. One receiver thread per link reads all stripes. With one stripe, both threads use
blocking calls on whole frames, which costs the least; with several, they wait for whichever stripe is ready. Any stripe
that fails fails its link; whoever needs the link hears of it through the hooks. A link outlives attempts and rounds,
and carries several at once.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import select
import socket
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Key, Kind
from collectives.records import LinkFailure, LinkFaults, Member
from collectives.shared import ANNOUNCEMENT_BYTES, WORTHWHILE, Sharing
from collectives.sockets import (
    FAR,
    SLICE,
    EndOfStream,
    Lease,
    LinkOptions,
    Vitals,
    congestion_control,
    evidence_of,
    path_silence,
    shut,
    shut_writing,
    skip,
    vitals,
)
from collectives.tuning import Care, worth_it
from collectives.wires import Wire

Array = NDArray[Any]

_GOODBYE_SECONDS = 0.5
_REMEMBERED_READY = 256
PIECE = 1 << 19  # bytes that are received, hashed and added while they are in cache
_MANY = 2  # frames for each stripe: where more wait, none needs to be chosen with care
_RATED_SECONDS = 0.05
_BURST = 8  # frames that one stripe may deliver before the others are looked at
_AT_ONCE = 64 << 10  # bytes of a payload on a long path that are worth waking up for


class Pool:
    """Chunk buffers that links and attempts take in turn; the last one given back, still in cache, goes out first."""

    def __init__(self, chunk_bytes: int, capacity: int) -> None:
        self._free: deque[memoryview] = deque(maxlen=capacity)
        self._chunk_bytes = chunk_bytes

    def take(self, nbytes: int | None = None) -> memoryview:
        """A whole chunk's buffer, or at least so many bytes: where less than half is needed, it is made to measure."""
        if nbytes is not None and 2 * nbytes < self._chunk_bytes:
            return memoryview(bytearray(nbytes))
        try:
            return self._free.pop()
        except IndexError:
            return memoryview(bytearray(self._chunk_bytes))

    def give(self, buffer: memoryview) -> None:
        if len(buffer) == self._chunk_bytes:
            self._free.append(buffer)


class Sink(Protocol):
    """Where one frame's payload goes. The lease has been acquired; the link releases it."""

    lease: Lease

    def room(self, got: int) -> memoryview:
        """Where the bytes from offset `got` on go: PIECE of them at most."""

    def filled(self, stop: int) -> None:
        """The bytes up to offset `stop` are there, not verified yet."""

    def accept(self, payload: memoryview, start: int, stop: int) -> None:
        """All of it lies here already, and until `finish` or `cancel` has returned: take this piece, not verified yet.

        Called for one piece after the other.
        """

    def finish(self, nbytes: int, digest: int) -> None:
        """The payload is whole and verified; nbytes counts its header too, digest is its checksum."""

    def cancel(self) -> None:
        """It did not arrive, or was not wanted any more."""


class Hooks(Protocol):
    """What a link tells the group, from its own threads."""

    def route(self, link: Link, header: Header) -> Sink | None:
        """Where to put this frame's payload; None drops it as stale. FrameError if it can only be corrupt."""

    def lost(self, link: Link) -> None:
        """The link is dead; link.failure says why."""

    def slots(self) -> int:
        """How many chunks may lie in the memory that one link shares with a peer on this host, in one direction."""


def _nothing(nbytes: int, seconds: float) -> None:
    return None


def _ignore(error: Exception) -> None:
    return None


@dataclass(slots=True)
class Outgoing:
    """A frame that waits for a stripe. `numbers` are encoded, and their memory is read, only when its turn comes.

    wire: None sends the bits as they are. digest: of the encoded payload, if it is known. sent: called with the frame's
    bytes and the seconds that it took. owed: how many such frames will still come to this link, with those that wait.
    refused: called instead if the wire cannot carry these numbers.
    """

    kind: Kind
    key: Key
    chunk: int = 0
    numbers: Array | None = None
    wire: Wire | None = None
    lease: Lease | None = None
    digest: int | None = None
    sent: Callable[[int, float], None] = _nothing
    owed: Callable[[], int] = int
    refused: Callable[[Exception], None] = _ignore

    @property
    def bulk(self) -> bool:
        """Numbers that are worth a slot of shared memory."""
        return self.numbers is not None and self.numbers.nbytes >= WORTHWHILE

    @property
    def priority(self) -> tuple[int, int, int]:
        """Control frames first, then older rounds; in a round, what others have to wait for first."""
        return (int(self.numbers is not None), self.key.round, int(self.kind is Kind.GATHER))


_RELEASING = threading.Lock()


class _Frame:
    """A frame on its way into the kernel; its payload may go into a slot instead, whose memory is `room`."""

    __slots__ = ("begun", "buffer", "due", "item", "lease", "nbytes", "pending", "room", "slot")

    def __init__(self, item: Outgoing, *pending: bytes) -> None:
        self.item, self.lease = item, item.lease
        self.pending: list[bytes | memoryview] = [*pending]
        self.nbytes = sum(map(len, pending))
        self.buffer: memoryview | None = None
        self.slot, self.room = -1, memoryview(b"")
        self.begun = time.perf_counter()
        self.due = 0.0  # when it may leave, if it is held back on purpose

    def advance(self, sock: socket.socket, flags: int) -> None:
        """Send the rest of the frame. BlockingIOError when the socket takes no more now."""
        while self.pending:
            if self.wanted_back:
                self.detach()
            skip(self.pending, sock.sendmsg(self.pending, [], flags | socket.MSG_NOSIGNAL))

    @property
    def wanted_back(self) -> bool:
        """The memory that it reads is to be given back. Another thread may do that at any moment."""
        lease = self.lease
        return lease is not None and lease.revoked

    def detach(self) -> None:
        """The memory is wanted back: go on from a copy, so that the stream stays whole."""
        self.pending = [b"".join(self.pending)]
        self.release()

    def spoil(self) -> None:
        """Flip a high bit of a number in the middle of the payload: of what travels, since the source is others'."""
        nbytes = self.nbytes - HEADER_BYTES
        at = min(nbytes // 2 | 3, nbytes - 1)
        if self.slot >= 0:
            self.room[at] ^= 0x40
        elif len(self.pending) > 1:
            payload = bytearray(self.pending[1])
            payload[at] ^= 0x40
            self.pending[1] = memoryview(payload)

    def release(self) -> None:
        """Once, whoever comes first: the thread that sends, or the one that finds the link dead."""
        with _RELEASING:
            lease, self.lease = self.lease, None
        if lease is not None:
            lease.release()


class _Inbound:
    """What a stripe is receiving: a header, then its payload into a sink, or into nothing."""

    __slots__ = ("data", "drain", "got", "hasher", "header", "sink")

    def __init__(self) -> None:
        self.data = memoryview(bytearray(HEADER_BYTES))
        self.got = 0
        self.header: Header | None = None
        self.sink: Sink | None = None
        self.hasher = xxh3_64()
        self.drain = 0


@dataclass(slots=True, eq=False)
class Stripe:
    """One TCP connection of a link, and what it has carried.

    rate: bytes/s that it can carry at the moment, on long paths; rated_at: time.perf_counter() of that.
    frame: what a sender has begun and not finished. busy: it is taken, by the thread that sends on it, or by the sender
    thread once it was handed over. finished: nothing more comes in. retiring: it takes no more frames; parting: but its
    BYE, that has left when goodbye is set. unproven: the other side dialled it late, and has not said anything yet.
    """

    socket: socket.socket
    rate: float = 0.0
    rated_at: float = 0.0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_sending: float = 0.0
    frame: _Frame | None = None
    busy: bool = False
    handed: bool = False
    finished: bool = False
    retiring: bool = False
    parting: bool = False
    goodbye: bool = False
    unproven: bool = False
    wake_at: int = 1
    retransmits: int = 0
    inbound: _Inbound = field(default_factory=_Inbound)


class Link:
    """K stripes to one incarnation of a peer. `failure` is None while it works."""

    def __init__(
        self,
        member: Member,
        sockets: list[socket.socket],
        *,
        run: int,
        me: int,
        options: LinkOptions,
        hooks: Hooks,
        pool: Pool,
        ident: int = 0,
        dialler: bool = False,
        faults: LinkFaults | None = None,
    ) -> None:
        self.member, self.ident, self._faults = member, ident, faults
        rtt = min(each.shortest_rtt for each in map(vitals, sockets))
        self.care = Care(dialler=dialler, fixed=options.fixed_stripes, rtt=rtt, stripes=len(sockets))
        self._far = rtt > FAR
        self.failure: LinkFailure | None = None
        self.ready: OrderedDict[Key, None] = OrderedDict()
        self.stale_frames = 0
        self.corrupt_frames = 0
        self.stripes = [Stripe(each) for each in sockets]
        self.retired: list[Stripe] = []
        self.sharing = Sharing(options.shared_memory)
        self._run, self._me, self._options, self._hooks, self._pool = run, me, options, hooks, pool
        self._lock = threading.Lock()
        self._queue: list[tuple[tuple[int, int, int], int, Outgoing]] = []
        self._order = count()
        self._closing = False
        self._end: OSError | None = None
        self._writable, self._readable = select.epoll(), select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._by_fd: dict[int, Stripe] = {}
        self._threads: list[threading.Thread] = []
        self._writable.register(self._bell, select.EPOLLIN)
        self._readable.register(self._bell, select.EPOLLIN | select.EPOLLET)  # only the sender thread reads it

    def start(self) -> None:
        """Start the threads. Call once."""
        for stripe in self.stripes:
            self._watch(stripe)
        for loop, role in ((self._send_loop, "send"), (self._receive_loop, "receive")):
            name = f"link-{self.member.name}-{role}"
            thread = threading.Thread(target=self._guarded, args=(loop,), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def _watch(self, stripe: Stripe) -> None:
        fd = stripe.socket.fileno()
        self._by_fd[fd] = stripe
        self._writable.register(fd, select.EPOLLONESHOT)
        self._readable.register(fd, select.EPOLLIN)

    def add(self, sock: socket.socket, *, dialled: bool = False) -> None:
        """One more stripe. On a dead link the socket is closed.

        Who dialled it says something on it; the other side waits for that, since until then the dialler may give it up.
        """
        stripe = Stripe(sock, busy=True, unproven=not dialled)
        with self._lock:
            alive = self.failure is None and not self._closing
            if alive:
                self.stripes = [*self.stripes, stripe]
                self._watch(stripe)
        if not alive:
            sock.close()
        elif dialled:
            self._say(stripe, Kind.STRIPES)
            self._pump(1)

    def retire(self, stripe: Stripe, *, last: bool = False) -> None:
        """Send no more on this stripe, and let it end in good order; without `last`, one stays."""
        with self._lock:
            if stripe.retiring or (not last and sum(not each.retiring for each in self.stripes) < 2):
                return
            stripe.retiring = True
            idle, stripe.busy = not stripe.busy, True
        if idle:
            self._free(stripe)

    # Sending, from any thread.

    def send(self, *items: Outgoing) -> None:
        """Queue frames, and send what leaves at once; on a dead link they vanish: the hooks have told everyone."""
        with self._lock:
            if self.failure is not None or self._closing:
                return
            for item in (*self._memory_for(items), *items):
                heapq.heappush(self._queue, (item.priority, next(self._order), item))
        self._pump(len(items))

    def discard(self, lease: Lease) -> None:
        """Take back the queued frames of one attempt."""
        with self._lock:
            self._queue = [entry for entry in self._queue if entry[2].lease is not lease]
            heapq.heapify(self._queue)
        self._ring()

    def remember_ready(self, key: Key) -> None:
        """The peer began an attempt that has not begun here."""
        self.ready[key] = None
        if len(self.ready) > _REMEMBERED_READY:
            self.ready.popitem(last=False)

    def _pump(self, limit: int) -> None:
        """Send up to so many frames from this thread; a stripe that blocks, or more work, goes to the sender thread."""
        for _ in range(limit):
            stripe = self._claim()
            if stripe is None:
                return
            try:
                self._transmit(stripe, fresh=True, flags=socket.MSG_DONTWAIT)
            except BlockingIOError:
                self._hand_over(stripe)
            except OSError as error:
                self._abandon(stripe)
                self.fail(evidence_of(error), str(error))
                return
            except BaseException:  # this may be the user's thread, and Ctrl-C: nobody would finish the frame
                self._abandon(stripe)
                self.fail("reset", "interrupted in the middle of a frame")
                raise
        with self._lock:
            stuck = bool(self._queue) and self._queue[0][2].bulk and self.sharing.waiting
            more = bool(self._queue) and self._idle() is not None and not stuck
        if more:
            self._ring()

    def _idle(self) -> Stripe | None:
        """A stripe that is free for the next frame."""
        if self._far and len(self.stripes) > 1 and self._queue and len(self._queue) < _MANY * len(self.stripes):
            return self._best_idle(self._queue[0][2])
        return next((each for each in self.stripes if not each.busy), None)

    def _best_idle(self, item: Outgoing) -> Stripe | None:
        """The fastest that is free, unless it is better to wait for one that is not."""
        idle = [each for each in self.stripes if not each.busy]
        if item.numbers is None or len(idle) == len(self.stripes):
            return max(idle, key=lambda each: each.rate, default=None)
        size = item.numbers.nbytes
        rates = [each.rate for each in self.stripes if not each.retiring]
        best = max(idle, key=lambda each: each.rate, default=None)
        waiting = max(len(self._queue), item.owed())
        return best if best and worth_it(best.rate, rates, size, size * waiting) else None

    def _claim(self) -> Stripe | None:
        """An idle stripe, now busy with the first frame of the queue."""
        with self._lock:
            while self._queue and self.failure is None:
                stripe = self._idle()
                if stripe is None:
                    return None
                slot = self._slot_for(self._queue[0][2])
                if slot is None:
                    return None
                frame = self._open(heapq.heappop(self._queue)[2])
                if slot >= 0:
                    self._lend(slot, frame)
                if frame is not None:
                    stripe.busy, stripe.frame = True, frame
                    return stripe
            return None

    def _open(self, item: Outgoing) -> _Frame | None:
        """Take the item's memory; None if its attempt is over, and nothing of it has left."""
        return _Frame(item) if item.lease is None or item.lease.acquire() else None

    # Shared memory. The first three under the lock.

    def _memory_for(self, items: tuple[Outgoing, ...]) -> tuple[Outgoing, ...]:
        """Before the first numbers that are worth it, the other side is told of memory for them."""
        if self.sharing.announced or not any(item.bulk for item in items):
            return ()
        announcement = self.sharing.announce(self._hooks.slots(), self._options.chunk_bytes)
        numbers = np.frombuffer(announcement, dtype=np.uint8)
        return (Outgoing(Kind.MEMORY, frames.NO_KEY, numbers=numbers),) if announcement else ()

    def _slot_for(self, item: Outgoing) -> int | None:
        """A slot for this item's numbers; -1 if they go with their header; None if they wait for a slot."""
        outbox = self.sharing.outbox
        return outbox.take() if outbox is not None and outbox.usable and item.bulk else -1

    def _lend(self, slot: int, frame: _Frame | None) -> None:
        outbox = self.sharing.outbox
        assert outbox is not None, "who gives slots out is there"
        if frame is None:
            outbox.give(slot)
        else:
            frame.slot, frame.room = slot, outbox.view(slot)

    def _share(self, frame: _Frame, payload: memoryview) -> memoryview:
        """The payload, in its slot: the memory that it came from is free again."""
        target = frame.room[: len(payload)]
        if frame.item.wire is not None:
            return target  # it was encoded there
        hasher = xxh3_64() if self._options.checksum and frame.item.digest is None else None
        into, source = np.frombuffer(target, dtype=np.uint8), np.frombuffer(payload, dtype=np.uint8)
        for start in range(0, len(payload), PIECE):
            piece = slice(start, start + PIECE)
            np.copyto(into[piece], source[piece])
            if hasher is not None:
                hasher.update(target[piece])
        if hasher is not None:
            frame.item.digest = hasher.intdigest()
        frame.release()
        return target

    def _about_memory(self, header: Header) -> Sink | None:
        """What the other side says about its memory, or this side's."""
        if header.length != (ANNOUNCEMENT_BYTES if header.kind is Kind.MEMORY else 0):
            raise FrameError(f"a {header.kind.name} frame with {header.length} bytes")
        if header.kind is Kind.MEMORY:
            return _Announced(self)
        if header.kind is Kind.MAPPED:
            self.sharing.answered(bool(header.chunk))
        self._pump(self._hooks.slots())
        return None

    def _use_shared(self, inbound: _Inbound, header: Header) -> None:
        """A payload that lies in the other side's memory."""
        payload, sink = self.sharing.view(header.slot, header.length), inbound.sink
        if sink is not None:
            for start in range(0, header.length, PIECE):
                stop = min(start + PIECE, header.length)
                if header.checked:
                    inbound.hasher.update(payload[start:stop])
                sink.accept(payload, start, stop)
        inbound.got, inbound.drain = header.length, 0

    def _give_back(self, slot: int) -> None:
        if self.sharing.give_back(slot):
            self.send(Outgoing(Kind.SLOTS, frames.NO_KEY))

    # Frames.

    def _transmit(self, stripe: Stripe, *, fresh: bool, flags: int) -> None:
        """Send a claimed stripe's frame: from its beginning, or what BlockingIOError has left of it."""
        frame = stripe.frame
        assert frame is not None, "a claimed stripe has a frame"
        last = self._is_last(frame.item)
        if not fresh or self._encode(frame):
            if self._faults is not None:
                self._interfere(self._faults, stripe, frame, fresh=fresh)
            frame.advance(stripe.socket, flags | socket.MSG_EOR if last else flags)
        self._finish(stripe, frame, trail=last)

    # Faults on purpose.

    def _interfere(self, faults: LinkFaults, stripe: Stripe, frame: _Frame, *, fresh: bool) -> None:
        nbytes = frame.nbytes - HEADER_BYTES if frame.item.kind in (Kind.SCATTER, Kind.GATHER) else 0
        found = faults.sending(self.member.name, nbytes) if fresh else None
        if found is not None and found.corrupt:
            frame.spoil()
        if found is not None and found.broken:
            _break(stripe.socket, frame)
        if found is not None and found.hold > 0:
            frame.due = time.perf_counter() + found.hold
        if frame.due:
            self._hold_back(frame)

    def _hold_back(self, frame: _Frame) -> None:
        """In the sender thread, so that nobody else waits; and no longer than the link lives."""
        if threading.current_thread() is not self._threads[0]:
            raise BlockingIOError(errno.EAGAIN, "held back on purpose")
        while self.failure is None and not self._closing and (left := frame.due - time.perf_counter()) > 0:
            if frame.wanted_back:
                frame.detach()
            for stripe in self.stripes:
                self._give_up_memory(stripe)
            time.sleep(min(left, SLICE / 10))
        frame.due, frame.begun = 0.0, time.perf_counter()

    def _is_last(self, item: Outgoing) -> bool:
        """One of an operation's last frames, on a long path. A small packet of its own goes behind it.

        If the end of the frame is lost, the acknowledgement of that packet tells so after one round trip (RACK, RFC
        8985, section 6.2); without it, a timeout would, after two or three.
        """
        return self._far and item.numbers is not None and item.owed() <= len(self.stripes)

    def _encode(self, frame: _Frame) -> bool:
        """Header and payload of a frame; False if its wire refuses the numbers."""
        item, payload = frame.item, memoryview(b"")
        if item.numbers is not None and item.wire is None:
            payload = item.numbers.data.cast("B")
        elif item.numbers is not None and item.wire is not None:
            if frame.slot < 0:
                frame.buffer = frame.room = self._pool.take()
            try:
                payload = item.wire.encode(item.numbers, frame.room)
            except ValueError as error:
                item.refused(error)
                self.sharing.unused(frame.slot)
                return False
            frame.release()
        if frame.slot >= 0:
            payload = self._share(frame, payload)
        checked = self._options.checksum or item.numbers is None
        digest = item.digest if item.digest is not None else frames.checksum(payload) if checked else 0
        header = self._header(item.kind, item.key, item.chunk, len(payload), digest, checked, frame.slot)
        frame.pending = [header, payload] if len(payload) and frame.slot < 0 else [header]
        frame.nbytes = len(header) + len(payload)
        return True

    def _header(
        self, kind: Kind, key: Key, chunk: int, length: int, digest: int, checked: bool = True, slot: int = -1
    ) -> bytes:
        return frames.encode(
            kind,
            run=self._run,
            incarnation=self._me,
            key=key,
            chunk=chunk,
            length=length,
            digest=digest,
            checked=checked,
            slot=slot,
        )

    def _finish(self, stripe: Stripe, frame: _Frame, *, trail: bool = False) -> None:
        """The frame has left, or was refused."""
        frame.release()
        if frame.buffer is not None:
            self._pool.give(frame.buffer)
        seconds = time.perf_counter() - frame.begun
        stripe.seconds_sending += seconds
        stripe.bytes_sent += frame.nbytes
        stripe.frame = None
        if self._faults is not None:
            self._faults.sent(self.member.name, seconds)
        if self._far:
            self._rate(stripe)
        if trail and frame.nbytes:
            self._say(stripe, Kind.TRAIL)
        else:
            self._free(stripe)
        if frame.nbytes:
            frame.item.sent(frame.nbytes, seconds)

    def _rate(self, stripe: Stripe) -> None:
        now = time.perf_counter()
        if now - stripe.rated_at > _RATED_SECONDS:
            stripe.rate, stripe.rated_at = vitals(stripe.socket).rate, now

    def _free(self, stripe: Stripe) -> None:
        """The stripe is idle, unless it is to end."""
        with self._lock:
            stripe.busy = stripe.retiring
        if stripe.retiring and not stripe.parting:
            stripe.parting = True
            self._say(stripe, Kind.BYE)
        elif stripe.retiring:
            self._said_goodbye(stripe)

    def _say(self, stripe: Stripe, kind: Kind) -> None:
        """A frame on this very stripe, that is taken."""
        header = self._header(kind, frames.NO_KEY, 0, 0, frames.checksum(b""))
        frame = stripe.frame = _Frame(Outgoing(kind, frames.NO_KEY), header)
        try:
            frame.advance(stripe.socket, socket.MSG_DONTWAIT)
            self._finish(stripe, frame)
        except BlockingIOError:
            self._hand_over(stripe)
        except OSError:  # it broke: the receiver has seen that too
            stripe.frame, stripe.goodbye = None, True

    def _said_goodbye(self, stripe: Stripe) -> None:
        stripe.goodbye = True
        shut_writing(stripe.socket)
        self._bury(stripe)
        self._ring()

    def _send_loop(self) -> None:
        """Go on with what would have blocked others."""
        while self.failure is None and not self._closing:
            handed = [each for each in self.stripes if each.handed]
            for fd, _ in self._writable.poll(SLICE if handed else None):
                if fd == self._bell:
                    self._hear()
                elif (stripe := self._by_fd.get(fd)) is not None and stripe.handed:
                    stripe.handed = False
                    self._drive(stripe, fresh=False)
            for stripe in handed:
                self._give_up_memory(stripe)
        if self._closing:
            self._part()

    def _give_up_memory(self, stripe: Stripe) -> None:
        frame = stripe.frame
        if stripe.handed and frame is not None and frame.wanted_back:
            frame.detach()

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while (stripe := self._claim()) is not None:
            self._drive(stripe, fresh=True)

    def _drive(self, stripe: Stripe, *, fresh: bool) -> None:
        """Send this stripe's frame and what follows; wait for the socket only if there is no other stripe to serve."""
        while self.failure is None:
            alone = len(self.stripes) == 1
            try:
                self._transmit(stripe, fresh=fresh, flags=0 if alone else socket.MSG_DONTWAIT)
            except BlockingIOError:
                fresh = False
                if alone:
                    continue
                self._hand_over(stripe)
            except BaseException:
                self._abandon(stripe)
                raise
            fresh, following = True, self._claim()
            if following is None:
                return
            stripe = following
        self._abandon(stripe)

    def _hand_over(self, stripe: Stripe) -> None:
        """The sender thread goes on as soon as the socket takes more."""
        stripe.handed = True
        with contextlib.suppress(OSError, ValueError):  # closed, together with the link
            self._writable.modify(stripe.socket, select.EPOLLOUT | select.EPOLLONESHOT)
        if self.failure is not None:
            self._abandon(stripe)
        frame = stripe.frame
        if frame is not None and frame.wanted_back:
            self._ring()  # the sender thread may have looked just before

    def _ring(self) -> None:
        with self._lock:
            if self._bell >= 0:
                os.eventfd_write(self._bell, 1)

    # Receiving, in the receiver thread.

    def _receive_loop(self) -> None:
        while self.failure is None:
            filling = [each for each in self.stripes if each.inbound.sink is not None]
            for fd, _ in self._readable.poll(SLICE if filling else None):
                stripe = self._by_fd.get(fd)
                if stripe is not None:
                    self._serve(stripe)
            for stripe in filling:
                self._let_go(stripe.inbound)

    def _serve(self, stripe: Stripe) -> None:
        """Receive what is here, and with a single stripe the rest of its frame."""
        flags = socket.MSG_WAITALL if len(self.stripes) == 1 else socket.MSG_DONTWAIT
        inbound = stripe.inbound
        with contextlib.suppress(BlockingIOError):
            for _ in range(_BURST):
                if inbound.header is None and not self._receive_header(stripe):
                    return
                self._receive_payload(stripe, flags)
        if self._far and not stripe.finished:
            self._wait_for_more(stripe)

    def _wait_for_more(self, stripe: Stripe) -> None:
        """The packets of a long path come one by one: the thread is woken when there is enough to be worth it."""
        inbound = stripe.inbound
        missing = 1 if inbound.header is None else inbound.drain or inbound.header.length - inbound.got
        if stripe.wake_at != (wake_at := min(missing, _AT_ONCE)):
            stripe.wake_at = wake_at
            stripe.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_at)

    def _receive_header(self, stripe: Stripe) -> bool:
        """False if the stripe has ended."""
        inbound = stripe.inbound
        try:
            while inbound.got < HEADER_BYTES:
                inbound.got += _read(stripe.socket, inbound.data[inbound.got :], socket.MSG_DONTWAIT)
        except BlockingIOError:
            raise
        except OSError as error:
            self._stripe_ended(stripe, error)
            return False
        header = frames.decode(inbound.data)
        if header.kind in (Kind.SCATTER, Kind.GATHER) and header.checked != self._options.checksum:
            raise FrameError(f"checksum is {self._options.checksum} here: use the same on all members")
        if header.run != self._run or header.incarnation != self.member.incarnation:
            raise FrameError("a frame of another run or another incarnation")
        if stripe.unproven:
            stripe.unproven = False
            self._free(stripe)
        if header.kind is Kind.BYE:
            self._stripe_ended(stripe, None)
            return False
        own = header.kind in (Kind.MEMORY, Kind.MAPPED, Kind.SLOTS)
        inbound.sink = self._about_memory(header) if own else self._hooks.route(self, header)
        inbound.got, inbound.header = 0, header
        inbound.hasher = xxh3_64()
        if inbound.sink is None:
            inbound.drain = header.length
            self.stale_frames += header.kind in (Kind.SCATTER, Kind.GATHER)
        return True

    def _receive_payload(self, stripe: Stripe, flags: int) -> None:
        inbound = stripe.inbound
        header = inbound.header
        assert header is not None, "the header comes first"
        if header.slot >= 0:
            self._use_shared(inbound, header)
        while inbound.sink is not None and inbound.got < header.length:
            if inbound.sink.lease.revoked:
                self._let_go(inbound)
            else:
                _fill(stripe.socket, inbound, inbound.sink, flags)
        while inbound.drain:
            inbound.drain -= _read(stripe.socket, memoryview(bytearray(min(inbound.drain, 1 << 16))), flags)
        sink, inbound.sink, inbound.header, inbound.got = inbound.sink, None, None, 0
        stripe.bytes_received += HEADER_BYTES + header.length
        if sink is not None:
            _deliver(sink, header, inbound.hasher.intdigest())
        if header.slot >= 0:
            self._give_back(header.slot)

    def _let_go(self, inbound: _Inbound) -> None:
        """The memory is wanted back: the rest of this frame goes nowhere."""
        sink, header = inbound.sink, inbound.header
        if sink is not None and header is not None and sink.lease.revoked:
            inbound.sink, inbound.drain = None, header.length - inbound.got
            self.stale_frames += 1
            sink.cancel()
            sink.lease.release()

    def _stripe_ended(self, stripe: Stripe, error: OSError | None) -> None:
        """A stripe ended between two frames. The link dies with the last one: what has arrived on the others counts.

        After a BYE the others may still carry frames. After an error they are read to the end of what is here already,
        so that a peer that dies when it is done takes nothing with it.
        """
        stripe.finished = True
        self._readable.unregister(stripe.socket)
        if stripe.unproven:
            stripe.retiring = stripe.goodbye = True
            self._bury(stripe)
            return
        self._end = self._end or error
        if all(each.finished for each in self.stripes):
            raise self._end or EndOfStream("closed by the peer in good order")
        if error is None:
            self.retire(stripe)
            self._bury(stripe)
            return
        for each in self.stripes:
            with contextlib.suppress(OSError):
                each.socket.shutdown(socket.SHUT_RD)

    def _bury(self, stripe: Stripe) -> None:
        """Close a stripe on which both sides have said goodbye."""
        with self._lock:
            if not (stripe.finished and stripe.goodbye and stripe.frame is None) or stripe not in self.stripes:
                return
            self.stripes = [each for each in self.stripes if each is not stripe]
            self.retired.append(stripe)
            del self._by_fd[stripe.socket.fileno()]
            self._writable.unregister(stripe.socket)
        stripe.socket.close()

    # The end.

    def fail(self, evidence: str, detail: str) -> None:
        """Kill the link from any thread; the first evidence stays. Its threads end by themselves."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = LinkFailure(
                peer=self.member.name, incarnation=self.member.incarnation, evidence=evidence, detail=detail
            )
            self._queue.clear()
            stripes = self.stripes
        for stripe in stripes:
            shut(stripe.socket)
        self._ring()
        self._hooks.lost(self)

    def close(self) -> None:
        """Say goodbye on every stripe, then end. Queued frames are dropped; a frame half sent is finished if it can."""
        with self._lock:
            self._closing = True
            self._queue.clear()
        self._ring()
        if self._threads:
            self._threads[0].join(_GOODBYE_SECONDS)
        self.fail("eof", "closed by this side")
        self.reap()

    def _part(self) -> None:
        """Finish the frames that are half sent, and say goodbye on every stripe."""
        deadline = time.monotonic() + _GOODBYE_SECONDS
        while self.failure is None and time.monotonic() < deadline:
            for stripe in self.stripes:
                if stripe.handed and stripe.frame is not None:
                    with contextlib.suppress(BlockingIOError):
                        stripe.frame.advance(stripe.socket, 0)
                        stripe.handed = False
                        self._finish(stripe, stripe.frame)
                self.retire(stripe, last=True)
            if all(each.goodbye for each in self.stripes):
                return
            time.sleep(0.001)

    def reap(self) -> None:
        """Join the threads of a dead link and close its sockets. Not from one of those threads."""
        for thread in self._threads:
            thread.join()
        self._abandon_all()
        for stripe in self.stripes:
            stripe.socket.close()
        for poller in (self._writable, self._readable):
            poller.close()
        with self._lock:
            self.sharing.close()
            bell, self._bell = self._bell, -1
        if bell >= 0:
            os.close(bell)

    def _abandon(self, stripe: Stripe) -> None:
        """Give back what a frame that will not leave still holds."""
        with self._lock:
            frame, stripe.frame = stripe.frame, None
        if frame is not None:
            frame.release()

    def _abandon_all(self) -> None:
        """The link is dead, and its threads hold nothing any more but what has been handed to them."""
        for stripe in self.stripes:
            if stripe.handed:
                self._abandon(stripe)
            with self._lock:
                sink, stripe.inbound.sink = stripe.inbound.sink, None
            if sink is not None:
                sink.cancel()
                sink.lease.release()

    @property
    def ended(self) -> bool:
        """None of its threads runs any more: `reap` will not wait."""
        return not any(thread.is_alive() for thread in self._threads)

    def vitals(self) -> dict[Hashable, Vitals]:
        """What TCP says of each stripe that is in use."""
        found: dict[Hashable, Vitals] = {}
        for stripe in self.stripes:
            if not stripe.retiring and not stripe.finished:
                with contextlib.suppress(OSError):  # closed just now
                    found[stripe] = vitals(stripe.socket)
                    stripe.retransmits = found[stripe].retransmits
        return found

    @property
    def retransmits(self) -> int:
        """Packets that were sent again on all stripes."""
        if self.failure is None:
            self.vitals()
        return sum(stripe.retransmits for stripe in (*self.stripes, *self.retired))

    @property
    def congestion_control(self) -> str:
        """What its sockets use, "" when they are closed."""
        found = set()
        for stripe in self.stripes:
            with contextlib.suppress(OSError):
                found.add(congestion_control(stripe.socket))
        return "/".join(sorted(found))

    def check_path(self) -> None:
        """Fail the link if it keeps retransmitting and nothing is acknowledged: the path is cut.

        A peer that is alive and does not read (a frozen process) still acknowledges, and is not failed by this.
        """
        if self.sharing.waiting:  # should it have missed what it waits for
            self._pump(self._hooks.slots())
        silent = path_silence(stripe.socket for stripe in self.stripes)
        if silent > self._options.path_timeout:
            self.fail("timeout", f"nothing acknowledged for {silent:.1f} s while retransmitting")

    def _guarded(self, loop: Callable[[], None]) -> None:
        try:
            loop()
        except FrameError as error:
            self.corrupt_frames += 1
            self.fail("corrupt", str(error))
        except OSError as error:
            self.fail(evidence_of(error), str(error))
        except Exception as error:
            self.fail("corrupt", f"unexpected {type(error).__name__} in this peer's data plane: {error}")
        finally:
            if self.failure is not None and threading.current_thread() is self._threads[-1]:
                self._abandon_all()


class _Announced:
    """Where a MEMORY frame goes."""

    def __init__(self, link: Link) -> None:
        self.lease = Lease()
        self.lease.acquire()
        self._link, self._data = link, memoryview(bytearray(ANNOUNCEMENT_BYTES))

    def room(self, got: int) -> memoryview:
        return self._data[got:]

    def filled(self, stop: int) -> None:
        return None

    def accept(self, payload: memoryview, start: int, stop: int) -> None:
        raise FrameError("memory is announced in a frame of its own")

    def finish(self, nbytes: int, digest: int) -> None:
        mapped = self._link.sharing.accept(self._data)
        self._link.send(Outgoing(Kind.MAPPED, frames.NO_KEY, int(mapped)))

    def cancel(self) -> None:
        return None


def _break(sock: socket.socket, frame: _Frame) -> None:
    """On purpose, in the middle of a frame."""
    whole = b"".join(frame.pending)
    with contextlib.suppress(OSError):  # it is broken already
        sock.send(whole[: len(whole) // 2], socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    raise ConnectionResetError(errno.ECONNRESET, "broken on purpose")


def _read(sock: socket.socket, view: memoryview, flags: int) -> int:
    count = sock.recv_into(view, 0, flags)
    if not count:
        raise EndOfStream("the peer closed the connection")
    return count


def _fill(sock: socket.socket, inbound: _Inbound, sink: Sink, flags: int) -> None:
    """Receive into the sink, and hash what came while it is in cache."""
    room = sink.room(inbound.got)
    count = _read(sock, room, flags)
    inbound.got += count
    assert inbound.header is not None, "the header comes first"
    if inbound.header.checked:
        inbound.hasher.update(room[:count])
    sink.filled(inbound.got)


def _deliver(sink: Sink, header: Header, digest: int) -> None:
    """Verify a payload and hand it on."""
    arrived = False
    try:
        if header.checked and digest != header.checksum:
            raise FrameError(f"payload checksum mismatch in chunk {header.chunk}")
        sink.finish(HEADER_BYTES + header.length, header.checksum)
        arrived = True
    finally:
        if not arrived:
            sink.cancel()
        sink.lease.release()

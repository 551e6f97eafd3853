"""A link joins two incarnations by K stripes. Frames queue per link; whichever stripe is free takes the next one.

One sender and one receiver thread per stripe, over blocking sockets. Any stripe that fails fails its link; whoever
needs the link hears of it through the hooks. A link outlives attempts and rounds, and carries several at once.
"""

from __future__ import annotations

import contextlib
import heapq
import select
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import numpy as np

from collectives import frames
from collectives.frames import FrameError, Header, Key, Kind
from collectives.records import LinkFailure, Member
from collectives.sockets import EndOfStream, Lease, LinkOptions, drain, evidence_of, receive_into, send_all, shut
from collectives.wires import Floats, Wire

_GOODBYE_SECONDS = 0.5
_REMEMBERED_READY = 256


class Scratch:
    """One thread's working memory: bytes of one chunk on the wire, and two chunks of numbers. Stays in cache."""

    def __init__(self, chunk_bytes: int) -> None:
        self.raw = memoryview(bytearray(chunk_bytes))
        self.term: Floats = np.empty(chunk_bytes // 4, dtype=np.float32)
        self.numbers: Floats = np.empty(chunk_bytes // 4, dtype=np.float32)


class Sink(Protocol):
    """Where one frame's payload goes. The lease has been acquired; the link releases it."""

    view: memoryview
    lease: Lease

    def finish(self, nbytes: int) -> None:
        """The payload is whole and verified."""

    def cancel(self) -> None:
        """It did not arrive, or was not wanted any more."""


class Hooks(Protocol):
    """What a link tells the group, from its own threads."""

    def route(self, link: Link, header: Header, scratch: Scratch) -> Sink | None:
        """Where to put this frame's payload; None drops it as stale. FrameError if it can only be corrupt."""

    def lost(self, link: Link) -> None:
        """The link is dead; link.failure says why."""


def _nothing(nbytes: int, seconds: float) -> None:
    return None


@dataclass(slots=True)
class Outgoing:
    """A frame that waits for a stripe. `numbers` are encoded, and their memory is read, only when its turn comes."""

    kind: Kind
    key: Key
    chunk: int = 0
    numbers: Floats | None = None
    wire: Wire | None = None
    lease: Lease | None = None
    sent: Callable[[int, float], None] = _nothing

    @property
    def priority(self) -> tuple[int, int]:
        """Control frames first, then older rounds."""
        return (0 if self.numbers is None else 1, self.key.round)


@dataclass(slots=True, eq=False)
class Stripe:
    """One TCP connection of a link, and what it has carried."""

    socket: socket.socket
    threads: list[threading.Thread] = field(default_factory=list)
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds_sending: float = 0.0


class Link:
    """K stripes to one incarnation of a peer. `failure` is None while it works."""

    def __init__(
        self, member: Member, sockets: list[socket.socket], *, run: int, me: int, options: LinkOptions, hooks: Hooks
    ) -> None:
        self.member = member
        self.failure: LinkFailure | None = None
        self.ready: OrderedDict[Key, None] = OrderedDict()
        self.stale_frames = 0
        self.corrupt_frames = 0
        self.stripes = [Stripe(each) for each in sockets]
        self._run, self._me, self._options, self._hooks = run, me, options, hooks
        self._condition = threading.Condition()
        self._queue: list[tuple[tuple[int, int], int, Outgoing]] = []
        self._order = count()
        self._closing = False
        self._ended = 0
        self._end: OSError | None = None

    def start(self) -> None:
        """Start the stripes' threads. Call once."""
        for index, stripe in enumerate(self.stripes):
            for loop, role in ((self._send_loop, "send"), (self._receive_loop, "receive")):
                name = f"link-{self.member.name}-{index}-{role}"
                thread = threading.Thread(target=self._guarded, args=(loop, stripe), name=name, daemon=True)
                stripe.threads.append(thread)
                thread.start()

    def send(self, *items: Outgoing) -> None:
        """Queue frames; on a dead link they vanish, since the hooks have told everyone already."""
        with self._condition:
            if self.failure is not None or self._closing:
                return
            for item in items:
                heapq.heappush(self._queue, (item.priority, next(self._order), item))
            self._condition.notify(len(items))

    def discard(self, lease: Lease) -> None:
        """Take back the queued frames of one attempt."""
        with self._condition:
            self._queue = [entry for entry in self._queue if entry[2].lease is not lease]
            heapq.heapify(self._queue)

    def remember_ready(self, key: Key) -> None:
        """The peer began an attempt that has not begun here."""
        self.ready[key] = None
        if len(self.ready) > _REMEMBERED_READY:
            self.ready.popitem(last=False)

    def fail(self, evidence: str, detail: str) -> None:
        """Kill the link from any thread; the first evidence stays. Its threads end by themselves."""
        with self._condition:
            if self.failure is not None:
                return
            self.failure = LinkFailure(
                peer=self.member.name, incarnation=self.member.incarnation, evidence=evidence, detail=detail
            )
            self._queue.clear()
            self._condition.notify_all()
        for stripe in self.stripes:
            shut(stripe.socket)
        self._hooks.lost(self)

    def close(self) -> None:
        """Say goodbye on every stripe, then end. Queued frames are dropped; a frame half sent is finished if it can."""
        with self._condition:
            self._closing = True
            self._queue.clear()
            self._condition.notify_all()
        deadline = time.monotonic() + _GOODBYE_SECONDS
        for stripe in self.stripes:
            stripe.threads[0].join(max(0.0, deadline - time.monotonic()))
        self.fail("eof", "closed by this side")
        self.reap()

    def reap(self) -> None:
        """Join the threads of a dead link and close its sockets. Not from one of those threads."""
        for stripe in self.stripes:
            for thread in stripe.threads:
                thread.join()
            stripe.socket.close()

    @property
    def ended(self) -> bool:
        """None of its threads runs any more: `reap` will not wait."""
        return not any(thread.is_alive() for stripe in self.stripes for thread in stripe.threads)

    def check_path(self) -> None:
        """Fail the link if it keeps retransmitting and nothing is acknowledged: the path is cut.

        A peer that is alive and does not read (a frozen process) still acknowledges, and is not failed by this.
        """
        for stripe in self.stripes:
            try:
                info = stripe.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
            except OSError:
                return
            silent = int.from_bytes(info[56:60], "little") / 1000
            if info[2] >= 3 and silent > self._options.path_timeout:
                self.fail("timeout", f"nothing acknowledged for {silent:.1f} s while retransmitting")
                return

    def _guarded(self, loop: Callable[[Stripe], None], stripe: Stripe) -> None:
        try:
            loop(stripe)
        except FrameError as error:
            self.corrupt_frames += 1
            self.fail("corrupt", str(error))
        except OSError as error:
            self.fail(evidence_of(error), str(error))
        except Exception as error:
            self.fail("corrupt", f"unexpected {type(error).__name__} in this peer's data plane: {error}")

    def _take(self) -> Outgoing | None:
        with self._condition:
            while not self._queue:
                if self.failure is not None or self._closing:
                    return None
                self._condition.wait()
            return heapq.heappop(self._queue)[2]

    def _send_loop(self, stripe: Stripe) -> None:
        scratch: memoryview | None = None
        while (item := self._take()) is not None:
            if item.wire is not None and not item.wire.lossless and scratch is None:
                scratch = memoryview(bytearray(self._options.chunk_bytes))
            self._send(stripe, item, scratch if scratch is not None else memoryview(b""))
        if self._closing:
            self._transmit(stripe, Outgoing(Kind.BYE, frames.NO_KEY), memoryview(b""), None)
            stripe.socket.shutdown(socket.SHUT_WR)

    def _send(self, stripe: Stripe, item: Outgoing, scratch: memoryview) -> None:
        lease = item.lease
        if lease is not None and not lease.acquire():
            return  # its attempt is over, and nothing of this frame has left
        payload = memoryview(b"")
        if item.numbers is not None and item.wire is not None:
            payload = item.wire.encode(item.numbers, scratch)
            if not item.wire.lossless and lease is not None:
                lease.release()
                lease = None
        started = time.perf_counter()
        self._transmit(stripe, item, payload, lease)
        seconds = time.perf_counter() - started
        stripe.seconds_sending += seconds
        item.sent(frames.HEADER_BYTES + len(payload), seconds)

    def _transmit(self, stripe: Stripe, item: Outgoing, payload: memoryview, lease: Lease | None) -> None:
        header = frames.encode(
            item.kind,
            run=self._run,
            incarnation=self._me,
            key=item.key,
            chunk=item.chunk,
            length=len(payload),
            digest=frames.checksum(payload),
        )
        send_all(stripe.socket, (header, payload), lease)
        stripe.bytes_sent += len(header) + len(payload)

    def _receive_loop(self, stripe: Stripe) -> None:
        scratch = Scratch(self._options.chunk_bytes)
        poll = select.poll()
        poll.register(stripe.socket, select.POLLIN)
        data = memoryview(bytearray(frames.HEADER_BYTES))
        while self.failure is None:
            poll.poll()  # an idle stripe sleeps here; receiving comes back every SLICE
            try:
                receive_into(stripe.socket, data)
            except OSError as error:
                self._stripe_ended(error)
                return
            header = frames.decode(data)
            if header.run != self._run or header.incarnation != self.member.incarnation:
                raise FrameError("a frame of another run or another incarnation")
            if header.kind is Kind.BYE:
                self._stripe_ended(None)
                return
            self._receive(stripe, header, scratch)
            stripe.bytes_received += frames.HEADER_BYTES + header.length

    def _stripe_ended(self, error: OSError | None) -> None:
        """A stripe ended between two frames. The link dies with the last one: what has arrived on the others counts.

        After a BYE the others may still carry frames. After an error they are read to the end of what is here already,
        so that a peer that dies when it is done takes nothing with it.
        """
        with self._condition:
            self._ended += 1
            self._end = self._end or error
            last = self._ended == len(self.stripes)
        if last:
            raise self._end or EndOfStream("closed by the peer in good order")
        for stripe in self.stripes if error is not None else []:
            with contextlib.suppress(OSError):
                stripe.socket.shutdown(socket.SHUT_RD)

    def _receive(self, stripe: Stripe, header: Header, scratch: Scratch) -> None:
        sink = self._hooks.route(self, header, scratch)
        if sink is None:
            self.stale_frames += header.kind in (Kind.SCATTER, Kind.GATHER)
            drain(stripe.socket, header.length, scratch.raw)
            return
        arrived = False
        try:
            got = receive_into(stripe.socket, sink.view, sink.lease)
            if got == header.length:
                if frames.checksum(sink.view) != header.checksum:
                    raise FrameError(f"payload checksum mismatch in chunk {header.chunk}")
                sink.finish(frames.HEADER_BYTES + got)
                arrived = True
        finally:
            if not arrived:
                sink.cancel()
            sink.lease.release()
        if not arrived:  # taken back while it arrived: the stream goes on after it
            self.stale_frames += 1
            drain(stripe.socket, header.length - got, scratch.raw)

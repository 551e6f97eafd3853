"""Immutable blobs that a peer serves to whoever fetches them: one thread, however many come.

Serving stands back behind training: connections are shared out fairly among those who fetch, and while an exchange runs
here only one connection sends at a time, so that it takes little of what the peer's links carry. Memory can be taken
back at any time; what was being sent then goes on from a copy.
"""

from __future__ import annotations

import contextlib
import math
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from xxhash import xxh3_64

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Kind
from collectives.handshake import Self
from collectives.ranges import Span
from collectives.sockets import FAR, shut_writing, skip, vitals

RANGE = struct.Struct("<QI")
SIZE = struct.Struct("<Q")
COUNT = struct.Struct("<I")
MOST_SUMS = 1024
_SUM = struct.Struct("<Q")
_MAX_KEY = 4096
_MAX_ASKED = COUNT.size + MOST_SUMS * RANGE.size + _MAX_KEY
_UNSENT = 256 << 10  # bytes that wait in the kernel: enough for few turns, little enough for an exchange to pass
_QUEUED = 64  # requests that wait on one connection
_IDLE_SECONDS = 60.0
_STUCK_SECONDS = 20.0  # in which a fetcher takes nothing of what it asked for
_LINGER_SECONDS = 5.0
_TURN_SECONDS = 0.2
_NARROW_SECONDS = 0.02
_WANTED_SECONDS = 10.0


def as_bytes(part: memoryview | bytes | bytearray | torch.Tensor) -> memoryview:
    """The bytes of one part, without a copy; ValueError if its memory is not contiguous or not on the CPU."""
    if isinstance(part, torch.Tensor):
        if part.device.type != "cpu" or not part.is_contiguous():
            raise ValueError("published tensors must be contiguous and on the CPU: pass tensor.cpu().contiguous()")
        flat = part.detach().reshape(-1).view(torch.uint8)
        return flat.numpy().data if part.numel() else memoryview(b"")
    view = memoryview(part)
    if not view.contiguous:
        raise ValueError("published memory must be contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


class Blob:
    """What is served under one key."""

    def __init__(self, parts: Sequence[memoryview | torch.Tensor], digest: str) -> None:
        self.digest = digest
        self.asked_at = -math.inf
        self._parts = [as_bytes(part) for part in parts]
        self._ends = list(accumulate(len(part) for part in self._parts))
        self.size = self._ends[-1] if self._ends else 0

    def views(self, offset: int, length: int) -> list[memoryview]:
        """The pieces that make up [offset, offset + length)."""
        pieces: list[memoryview] = []
        for part, end in zip(self._parts, self._ends, strict=True):
            start = end - len(part)
            if start < offset + length and end > offset:
                pieces.append(part[max(0, offset - start) : offset + length - start])
        return pieces

    def sum(self, offset: int, length: int) -> int:
        """xxh3-64 of [offset, offset + length)."""
        hasher = xxh3_64()
        for view in self.views(offset, length):
            hasher.update(view)
        return int(hasher.intdigest())


@dataclass(slots=True, eq=False)
class _Guest:
    """One connection. blob: whose memory `pending` points to. moved: when the guest last asked or took something."""

    socket: socket.socket
    incarnation: int
    moved: float
    inbox: bytearray = field(default_factory=bytearray)
    asked: deque[tuple[Header, bytes]] = field(default_factory=deque)
    pending: list[bytes | memoryview] = field(default_factory=list)
    blob: Blob | None = None
    leaving: bool = False
    interest: int = selectors.EVENT_READ

    @property
    def owed(self) -> bool:
        """Whether it waits for an answer."""
        return bool(self.pending or (self.asked and not self.leaving))

    @property
    def patience(self) -> float:
        """Seconds after which a guest that does not move is shown out."""
        return _LINGER_SECONDS if self.leaving else _STUCK_SECONDS if self.owed else _IDLE_SECONDS


class Library:
    """Serves blobs from one thread, which lives while somebody fetches.

    busy: whether an exchange is running here.
    """

    def __init__(self, me: Self, busy: Callable[[], bool] = lambda: False) -> None:
        self._me, self._busy = me, busy
        self._lock = threading.Lock()
        self._blobs: dict[str, Blob] = {}
        self._guests: dict[socket.socket, _Guest] = {}
        self._thread: threading.Thread | None = None
        self._bell, self._rope = socket.socketpair()
        for each in (self._bell, self._rope):
            each.setblocking(False)
        self._turn: _Guest | None = None
        self._turn_ends = 0.0
        self._open = True
        self.bytes_served = self.turned_away = 0

    def publish(self, key: str, blob: Blob) -> None:
        """Serve a blob; one of the same key is withdrawn first."""
        if not 0 < len(key.encode()) <= _MAX_KEY:
            raise ValueError(f"a key has 1 to {_MAX_KEY} bytes")
        with self._lock:
            self._take_back(self._blobs.get(key))
            self._blobs[key] = blob

    def withdraw(self, key: str) -> None:
        """Serve it no more; on return nobody reads its memory. An unknown key is no error."""
        with self._lock:
            self._take_back(self._blobs.pop(key, None))

    def wanted(self, key: str) -> bool:
        """Whether it is being fetched: a part of it is on its way, or was asked for in the last seconds."""
        with self._lock:
            blob = self._blobs.get(key)
            if blob is None:
                return False
            lately = time.monotonic() - blob.asked_at < _WANTED_SECONDS
            return lately or any(guest.blob is blob for guest in self._guests.values())

    def _take_back(self, blob: Blob | None) -> None:
        for guest in self._guests.values():
            if blob is not None and guest.blob is blob:
                guest.pending, guest.blob = [b"".join(guest.pending)], None

    @property
    def fetchers(self) -> int:
        """Connections on which somebody fetches now."""
        with self._lock:
            return sum(not guest.leaving for guest in self._guests.values())

    def serve(self, incarnation: int, sock: socket.socket) -> None:
        """Take over a greeted connection. Where there is no room it is told so, and comes again."""
        sock.setblocking(False)
        if vitals(sock).shortest_rtt > FAR:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        guest = _Guest(sock, incarnation, time.monotonic())
        with self._lock:
            if not self._open or len(self._guests) >= 2 * self._me.options.servers:
                sock.close()
                return
            if not self._has_room(incarnation):
                self._see_off(guest)
            self._guests[sock] = guest
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="library", daemon=True)
                self._thread.start()
        self._ring()

    def _has_room(self, incarnation: int) -> bool:
        """There is, or whoever has most connections gives one up for a fetcher that would still have fewer."""
        staying = [guest for guest in self._guests.values() if not guest.leaving]
        if len(staying) < self._me.options.servers:
            return True
        shares = Counter(guest.incarnation for guest in staying)
        [(greedy, most)] = shares.most_common(1)
        if shares[incarnation] + 1 >= most:
            return False
        self._see_off(next(guest for guest in staying if guest.incarnation == greedy))
        return True

    def _see_off(self, guest: _Guest) -> None:
        """It is told to leave once it has what is being sent, and closes first: so nothing on its way to it is lost."""
        self.turned_away += 1
        guest.leaving, guest.moved = True, time.monotonic()
        guest.asked.clear()
        guest.pending.append(self._header(Kind.BUSY))

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it has been rung already; closed: nobody is left to hear it
            self._rope.send(b"!")

    def close(self) -> None:
        with self._lock:
            self._open = False
            thread = self._thread
        self._ring()
        if thread is not None:
            thread.join()
        for key in list(self._blobs):
            self.withdraw(key)
        self._bell.close()
        self._rope.close()

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._bell, selectors.EVENT_READ)
            try:
                while self._arrange(selector):
                    self._attend(selector)
            finally:
                self._end()

    def _end(self) -> None:
        with self._lock:
            for guest in self._guests.values():
                guest.socket.close()
            self._guests.clear()
            if self._thread is threading.current_thread():
                self._thread = None

    def _arrange(self, selector: selectors.BaseSelector) -> bool:
        """Who is listened to, and who may be sent to; False once nobody is left."""
        now, known = time.monotonic(), selector.get_map()
        with self._lock:
            for guest in [guest for guest in self._guests.values() if now - guest.moved > guest.patience]:
                self._show_out(selector, guest)
            if not self._open or not self._guests:
                self._thread = None
                return False
            turn = self._whose_turn(now)
            for sock, guest in self._guests.items():
                sends = guest.owed and turn in (None, guest)
                interest = selectors.EVENT_READ | (selectors.EVENT_WRITE if sends else 0)
                if sock not in known:
                    selector.register(sock, interest, guest)
                elif interest != guest.interest:
                    selector.modify(sock, interest, guest)
                guest.interest = interest
        return True

    def _whose_turn(self, now: float) -> _Guest | None:
        """While an exchange runs: the one guest that may be sent to, each for a frame or a moment; else None."""
        if not self._busy():
            self._turn = None
            return None
        turn = self._turn
        if turn is None or not turn.owed or now > self._turn_ends or turn.socket not in self._guests:
            waiting = [guest for guest in self._guests.values() if guest.owed and guest is not turn]
            self._turn = min(waiting, key=lambda guest: guest.moved, default=turn)
            self._turn_ends = now + _TURN_SECONDS
        return self._turn

    def _attend(self, selector: selectors.BaseSelector) -> None:
        for key, events in selector.select(_NARROW_SECONDS if self._turn is not None else 1.0):
            guest: _Guest | None = key.data
            if guest is None:
                self._bell.recv(4096)
                continue
            try:
                if events & selectors.EVENT_READ:
                    self._hear(guest)
                if guest.interest & selectors.EVENT_WRITE or (self._turn is None and guest.owed):
                    self._answer(guest)
            except BlockingIOError:
                continue
            except (OSError, FrameError):  # it has gone, or is none of ours: it knows what it misses
                with self._lock:
                    self._show_out(selector, guest)

    def _show_out(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        if self._guests.pop(guest.socket, None) is not None:
            if guest.socket in selector.get_map():
                selector.unregister(guest.socket)
            guest.socket.close()

    # --- one guest ----------------------------------------------------------------------------------------------------

    def _hear(self, guest: _Guest) -> None:
        data = guest.socket.recv(1 << 16)
        if not data:
            raise OSError("the fetcher has left")
        if guest.leaving:
            return
        guest.moved = time.monotonic()
        guest.inbox += data
        while (request := _cut_off(guest.inbox)) is not None:
            guest.asked.append(request)
        if len(guest.asked) > _QUEUED:
            raise FrameError("too many requests at once")

    def _answer(self, guest: _Guest) -> None:
        """Sends as much as the kernel takes of one frame."""
        with self._lock:
            if not guest.pending and guest.asked:
                guest.pending = self._reply(guest, *guest.asked.popleft())
            if not guest.pending:
                return
            sent = guest.socket.sendmsg(guest.pending, [], socket.MSG_NOSIGNAL)
            skip(guest.pending, sent)
            guest.moved = time.monotonic()
            self.bytes_served += sent
            if guest.pending:
                return
            guest.blob = None
            if guest is self._turn:
                self._turn_ends = 0.0
        if guest.leaving:
            shut_writing(guest.socket)

    def _reply(self, guest: _Guest, header: Header, payload: bytes) -> list[bytes | memoryview]:
        spans, key = parse(header.kind, payload)
        blob = self._blobs.get(key)
        if blob is None or any(offset + length > blob.size for offset, length in spans):
            return [self._header(Kind.MISSING)]
        if header.kind is Kind.SUMS:
            sums = b"".join(_SUM.pack(blob.sum(*span)) for span in spans)
            return [self._header(Kind.SUMS, sums), sums]
        if header.kind is Kind.STAT:
            facts = SIZE.pack(blob.size) + blob.digest.encode()
            return [self._header(Kind.SIZE, facts), facts]
        [(offset, length)] = spans
        guest.blob, blob.asked_at = blob, time.monotonic()
        part = self._encode(Kind.PART, length, blob.sum(offset, length), header.chunk)
        return [part, *blob.views(offset, length)]

    def _header(self, kind: Kind, payload: bytes = b"") -> bytes:
        return self._encode(kind, len(payload), frames.checksum(payload))

    def _encode(self, kind: Kind, length: int, digest: int, chunk: int = 0) -> bytes:
        me = self._me
        return frames.encode(kind, run=me.run, incarnation=me.incarnation, chunk=chunk, length=length, digest=digest)


def _cut_off(inbox: bytearray) -> tuple[Header, bytes] | None:
    """The first whole request is taken off, verified; None while there is none. FrameError if it cannot be one."""
    if len(inbox) < HEADER_BYTES:
        return None
    header = frames.decode(inbox[:HEADER_BYTES])
    if header.kind not in (Kind.STAT, Kind.GET, Kind.SUMS) or header.length > _MAX_ASKED:
        raise FrameError("only STAT, GET and SUMS are answered here")
    end = HEADER_BYTES + header.length
    if len(inbox) < end:
        return None
    payload = bytes(inbox[HEADER_BYTES:end])
    del inbox[:end]
    if frames.checksum(payload) != header.checksum:
        raise FrameError("payload checksum mismatch")
    return header, payload


def request(kind: Kind, key: str, spans: Sequence[Span] = ()) -> bytes:
    """The payload that asks for these spans of `key`: one for a GET, up to MOST_SUMS for SUMS, none for a STAT."""
    count = COUNT.pack(len(spans)) if kind is Kind.SUMS else b""
    return count + b"".join(RANGE.pack(begin, end - begin) for begin, end in spans) + key.encode()


def parse(kind: Kind, payload: bytes) -> tuple[list[tuple[int, int]], str]:
    """Offsets with lengths, and the key, of what `request` made. FrameError if it is no such thing."""
    try:
        at = COUNT.size if kind is Kind.SUMS else 0
        count = COUNT.unpack_from(payload)[0] if at else int(kind is Kind.GET)
        if count > MOST_SUMS:
            raise FrameError(f"more than {MOST_SUMS} ranges")
        spans = [RANGE.unpack_from(payload, at + index * RANGE.size) for index in range(count)]
    except struct.error:
        raise FrameError("a request without its ranges") from None
    if kind is Kind.GET and spans[0][1] > frames.MAX_PAYLOAD:
        raise FrameError("a range that does not fit one frame")
    key = payload[at + count * RANGE.size :]
    return [(int(offset), int(length)) for offset, length in spans], key.decode(errors="replace")

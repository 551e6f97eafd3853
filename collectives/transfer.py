"""Immutable blobs: published by some peers, fetched by others in ranges, from several sources at once.

Fetching has connections of its own, so that it never stands in the way of an exchange. Ranges go to whichever source
is free; those of a source that dies go to the others; when nothing else is left to ask for, idle sources ask again for
what the slow ones still owe. Every range is checked on arrival, and the whole at the end.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from xxhash import xxh3_64, xxh3_128_hexdigest

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Kind, Purpose
from collectives.handshake import Dialling, Self
from collectives.records import Member
from collectives.sockets import Lease, receive_into, remaining, send_all, shut

_RANGE = struct.Struct("<QI")
_SIZE = struct.Struct("<Q")
_IDLE_SECONDS = 60.0
_AHEAD = 2  # requests in flight per connection: the next one travels while this one arrives
_MAX_KEY = 4096


class FetchError(OSError):
    """A blob could not be fetched; the message says what each source answered."""


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
        self.lease = Lease()
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


class Library:
    """Serves blobs: one thread per connection, a bounded number of them."""

    def __init__(self, me: Self) -> None:
        self._me = me
        self._lock = threading.Lock()
        self._blobs: dict[str, Blob] = {}
        self._servers: dict[threading.Thread, socket.socket] = {}
        self._open = True
        self.bytes_served = 0

    def publish(self, key: str, blob: Blob) -> None:
        """Serve a blob; one of the same key is withdrawn first."""
        if not 0 < len(key.encode()) <= _MAX_KEY:
            raise ValueError(f"a key has 1 to {_MAX_KEY} bytes")
        self.withdraw(key)
        with self._lock:
            self._blobs[key] = blob

    def withdraw(self, key: str) -> None:
        """Serve it no more; on return nobody reads its memory. An unknown key is no error."""
        with self._lock:
            blob = self._blobs.pop(key, None)
        if blob is not None:
            blob.lease.revoke()
            blob.lease.wait_unused()

    def serve(self, sock: socket.socket) -> bool:
        """Take over a greeted connection; False if there is no room."""
        with self._lock:
            if not self._open or len(self._servers) >= self._me.options.servers:
                return False
            thread = threading.Thread(target=self._work, args=(sock,), name="library", daemon=True)
            self._servers[thread] = sock
        thread.start()
        return True

    def close(self) -> None:
        with self._lock:
            self._open = False
            servers = dict(self._servers)
        for sock in servers.values():
            shut(sock)
        for thread in servers:
            thread.join()
        for key in list(self._blobs):
            self.withdraw(key)

    def _work(self, sock: socket.socket) -> None:
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        try:
            while poll.poll(_IDLE_SECONDS * 1000):
                self._answer(sock)
        except (OSError, FrameError):
            return  # the fetcher has gone, or is none: it knows what it misses
        finally:
            with self._lock:
                self._servers.pop(threading.current_thread(), None)
                sock.close()

    def _answer(self, sock: socket.socket) -> None:
        header, payload = read_frame(sock, _RANGE.size + _MAX_KEY)
        if header.kind not in (Kind.STAT, Kind.GET):
            raise FrameError("only STAT and GET are answered here")
        asked = header.kind is Kind.GET
        if asked and len(payload) < _RANGE.size:
            raise FrameError("a GET without a range")
        offset, length = _RANGE.unpack_from(payload) if asked else (0, 0)
        key = bytes(payload[_RANGE.size if asked else 0 :]).decode(errors="replace")
        with self._lock:
            blob = self._blobs.get(key)
        if blob is None or offset + length > blob.size or not blob.lease.acquire():
            self._send(sock, Kind.MISSING, [])
        elif asked:
            self._send(sock, Kind.PART, blob.views(offset, length), header.chunk, blob.lease)
        else:
            blob.lease.release()
            self._send(sock, Kind.SIZE, [memoryview(_SIZE.pack(blob.size) + blob.digest.encode())])

    def _send(
        self, sock: socket.socket, kind: Kind, views: list[memoryview], chunk: int = 0, lease: Lease | None = None
    ) -> None:
        hasher = xxh3_64()
        for view in views:
            hasher.update(view)
        length = sum(map(len, views))
        me = self._me
        header = frames.encode(
            kind, run=me.run, incarnation=me.incarnation, chunk=chunk, length=length, digest=hasher.intdigest()
        )
        send_all(sock, [header, *views], lease)
        with self._lock:
            self.bytes_served += len(header) + length


def read_frame(sock: socket.socket, limit: int) -> tuple[Header, memoryview]:
    """A small frame, whole and verified."""
    data = memoryview(bytearray(HEADER_BYTES))
    receive_into(sock, data)
    header = frames.decode(data)
    if header.length > limit:
        raise FrameError(f"a payload of {header.length} bytes where at most {limit} make sense")
    payload = memoryview(bytearray(header.length))
    receive_into(sock, payload)
    if frames.checksum(payload) != header.checksum:
        raise FrameError("payload checksum mismatch")
    return header, payload


class Fetch:
    """One blob on its way here."""

    def __init__(
        self, me: Self, key: str, sources: Sequence[Member], digest: str, timeout: float, connections: int
    ) -> None:
        self._me, self._key, self._digest = me, key, digest
        self._deadline = time.monotonic() + timeout
        self._condition = threading.Condition()
        self._data: bytearray | None = None
        self._step = 0
        self._todo: deque[int] = deque()
        self._takers: dict[int, int] = {}
        self._done = 0
        self._reasons: dict[str, str] = {}
        self._over = False
        self._sockets: list[socket.socket] = []
        self._dials = [
            Dialling(me, source, Purpose.FETCH, 1, timeout) for source in sources for _ in range(max(1, connections))
        ]
        names = [source.name for source in sources for _ in range(max(1, connections))]
        self._alive = len(self._dials)
        self._threads = [
            threading.Thread(target=self._work, args=(dial, name), name=f"fetch-{name}", daemon=True)
            for dial, name in zip(self._dials, names, strict=True)
        ]

    def run(self, progress: Callable[[int, int], None] | None) -> bytearray:
        """The whole blob, verified; FetchError otherwise."""
        for thread in self._threads:
            thread.start()
        try:
            self._wait(progress)
        finally:
            self.stop()
            for thread in self._threads:
                thread.join()
        if self._data is None or self._takers:
            raise FetchError(f"{self._key!r} could not be fetched: {self._why()}")
        if xxh3_128_hexdigest(self._data) != self._digest:
            raise FetchError(
                f"{self._key!r} arrived, but its xxh3-128 is not {self._digest}: a source serves wrong bytes"
            )
        return self._data

    def stop(self) -> None:
        """End it from any thread."""
        with self._condition:
            self._over = True
            self._condition.notify_all()
            for sock in self._sockets:
                shut(sock)
        for dial in self._dials:
            dial.stop()

    def _why(self) -> str:
        reasons = [f"{name}: {reason}" for name, reason in sorted(self._reasons.items())]
        if time.monotonic() >= self._deadline:
            reasons.append("the time is up")
        return "; ".join(reasons) or "there is no source"

    def _wait(self, progress: Callable[[int, int], None] | None) -> None:
        shown = -1
        while True:
            with self._condition:
                while not (ended := self._ended()) and self._done == shown:
                    self._condition.wait(min(1.0, max(0.01, self._deadline - time.monotonic())))
                shown, total = self._done, len(self._data) if self._data is not None else 0
            if progress is not None and self._data is not None:
                progress(shown, total)
            if ended:
                return

    def _ended(self) -> bool:
        complete = self._data is not None and not self._takers
        return complete or self._over or not self._alive or time.monotonic() >= self._deadline

    def _work(self, dial: Dialling, name: str) -> None:
        mine: deque[tuple[int, bool]] = deque()
        try:
            [sock] = dial.connect()
            with sock:
                with self._condition:
                    self._sockets.append(sock)
                try:
                    self._open_source(sock)
                    self._pull(sock, mine)
                finally:
                    with self._condition:
                        self._sockets.remove(sock)
        except (OSError, FrameError) as error:
            self._gone(name, str(error) or type(error).__name__, mine)
        else:
            self._gone(name, "", mine)

    def _gone(self, name: str, reason: str, mine: deque[tuple[int, bool]]) -> None:
        with self._condition:
            self._alive -= 1
            if reason and not self._over:
                self._reasons[name] = reason
            for index, _ in mine:
                if index in self._takers:
                    self._takers[index] -= 1
                    if not self._takers[index]:
                        self._todo.appendleft(index)
            self._condition.notify_all()

    def _send(self, sock: socket.socket, kind: Kind, payload: bytes, chunk: int = 0) -> None:
        me = self._me
        header = frames.encode(
            kind,
            run=me.run,
            incarnation=me.incarnation,
            chunk=chunk,
            length=len(payload),
            digest=frames.checksum(payload),
        )
        send_all(sock, [header, payload])

    def _open_source(self, sock: socket.socket) -> None:
        """Ask for the size; refuse a source that holds something else under this key."""
        self._send(sock, Kind.STAT, self._key.encode())
        header, payload = read_frame(sock, 4096)
        if header.kind is not Kind.SIZE or len(payload) < _SIZE.size:
            raise FrameError("it has no such key")
        [size] = _SIZE.unpack_from(payload)
        digest = bytes(payload[_SIZE.size :]).decode(errors="replace")
        if digest != self._digest:
            raise FrameError(f"it holds another version, {digest}")
        with self._condition:
            if self._data is None:
                self._plan(size)
            if self._data is not None and len(self._data) != size:
                raise FrameError(f"its size {size} differs from what another source said")
            self._condition.notify_all()

    def _plan(self, size: int) -> None:
        """Ranges large enough to be efficient, and enough of them to share out. Under the condition."""
        self._step = min(4 << 20, max(64 << 10, -(-size // (8 * len(self._dials)))))
        self._data = bytearray(size)
        self._todo.extend(range(-(-size // self._step)))
        self._takers = dict.fromkeys(self._todo, 0)

    def _pull(self, sock: socket.socket, mine: deque[tuple[int, bool]]) -> None:
        while True:
            while len(mine) < _AHEAD and (job := self._next(mine)) is not None:
                mine.append(job)
                offset, length = self._span(job[0])
                self._send(sock, Kind.GET, _RANGE.pack(offset, length) + self._key.encode(), job[0])
            if not mine:
                return
            self._receive(sock, *mine[0])
            mine.popleft()

    def _span(self, index: int) -> tuple[int, int]:
        assert self._data is not None, "ranges exist once the size is known"
        offset = index * self._step
        return offset, min(self._step, len(self._data) - offset)

    def _next(self, mine: deque[tuple[int, bool]]) -> tuple[int, bool] | None:
        """A range that nobody has asked for; an idle source waits, or repeats what another one still owes."""
        with self._condition:
            while not self._over and self._takers:
                if self._todo:
                    index = self._todo.popleft()
                    if index not in self._takers:
                        continue  # it came back from a dead source after another had brought it
                    self._takers[index] += 1
                    return index, True
                if mine:
                    return None
                index = min(self._takers, key=self._takers.__getitem__)
                if self._takers[index] < 2:
                    self._takers[index] += 1
                    return index, False
                self._condition.wait(1.0)
            return None

    def _receive(self, sock: socket.socket, index: int, first: bool) -> None:
        """One range. Only the first to ask for it may receive in place."""
        header = self._part_header(sock, index)
        offset, length = self._span(index)
        if header.length != length:
            raise FrameError("a range of the wrong length")
        assert self._data is not None, "ranges exist once the size is known"
        place = memoryview(self._data)[offset : offset + length]
        view = place if first else memoryview(bytearray(length))
        receive_into(sock, view)
        if frames.checksum(view) != header.checksum:
            raise FrameError(f"checksum mismatch in bytes {offset} to {offset + length}")
        with self._condition:
            if self._takers.pop(index, None) is not None:
                if not first:
                    place[:] = view
                self._done += length
                self._condition.notify_all()

    def _part_header(self, sock: socket.socket, index: int) -> Header:
        remaining(self._deadline)
        data = memoryview(bytearray(HEADER_BYTES))
        receive_into(sock, data)
        header = frames.decode(data)
        if header.kind is not Kind.PART or header.chunk != index:
            raise FrameError("it no longer has this key")
        return header

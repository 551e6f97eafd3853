"""How two sides find each other: dialling, probing, and the porter that answers the door.

Every connection begins with a HELLO from the dialler and a WELCOME or REFUSE from the other side. Both name the run and
both incarnations, so nobody talks to another run, or to a former life of a peer. Whatever else arrives on the port is
closed, in bounded time and number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Hello, Kind, Purpose, Refusal
from collectives.records import LinkFailure, Member
from collectives.sockets import (
    LinkOptions,
    evidence_of,
    listen_on,
    parse_address,
    receive_into,
    remaining,
    shut,
    tune_data,
    tune_early,
)

_GREETING = HEADER_BYTES + Hello.SIZE
_SWEEP_SECONDS = 0.5


class Refused(OSError):
    """The other side answered REFUSE."""

    def __init__(self, refusal: int, reason: str) -> None:
        gone = refusal == Refusal.GONE
        super().__init__(errno.ECONNREFUSED if gone else errno.EHOSTUNREACH, f"refused by the other side: {reason}")


@dataclass(frozen=True, slots=True)
class Self:
    """Who dials: the run's hash, this peer's incarnation, and its options."""

    run: int
    incarnation: int
    options: LinkOptions


class Dialling:
    """Builds the connections to one peer; may be stopped from another thread."""

    def __init__(self, me: Self, member: Member, purpose: Purpose, stripes: int, timeout: float) -> None:
        self._me, self._member, self._purpose, self._stripes = me, member, purpose, stripes
        self._deadline = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._stopped = False

    def stop(self) -> None:
        """Make connect() fail promptly."""
        with self._lock:
            self._stopped = True
            for sock in self._sockets:
                shut(sock)

    def connect(self) -> list[socket.socket]:
        """Connected, greeted sockets, tuned for data. OSError if no address of the peer gives them in time."""
        error: OSError = OSError(errno.EHOSTUNREACH, f"{self._member.name} has no address")
        for address in self._member.addresses:
            try:
                return self._connect(address)
            except (OSError, FrameError) as caught:
                self._close()
                error = caught if isinstance(caught, OSError) else OSError(errno.EHOSTUNREACH, f"{address}: {caught}")
        raise error

    def _connect(self, address: str) -> list[socket.socket]:
        host, port = parse_address(address)
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        for _ in range(self._stripes):
            self._start(socket.socket(family, kind, protocol), where)
        link = secrets.randbits(63)
        for index, sock in enumerate(self._sockets):  # all were started at once: the round trips overlap
            self._finish_connect(sock)
            sock.sendall(self._hello(index, link))
        for sock in self._sockets:
            self._welcome(sock)
            tune_data(sock, self._me.options)
        with self._lock:
            if self._stopped:
                raise OSError(errno.ECONNABORTED, "stopped")
            done, self._sockets = self._sockets, []
        return done

    def _start(self, sock: socket.socket, where: object) -> None:
        with self._lock:
            self._sockets.append(sock)
            if self._stopped:
                raise OSError(errno.ECONNABORTED, "stopped")
        tune_early(sock, self._me.options)
        sock.setblocking(False)
        code = sock.connect_ex(where)  # type: ignore[arg-type]
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))

    def _finish_connect(self, sock: socket.socket) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_WRITE)
            if not selector.select(remaining(self._deadline)):
                raise TimeoutError(errno.ETIMEDOUT, "no answer to connect")
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        sock.settimeout(remaining(self._deadline))

    def _hello(self, index: int, link: int) -> bytes:
        hello = Hello(
            expected=self._member.incarnation,
            link=link,
            chunk_bytes=self._me.options.chunk_bytes,
            stripe=index,
            stripes=self._stripes,
            purpose=self._purpose,
        ).pack()
        header = frames.encode(
            Kind.HELLO,
            run=self._me.run,
            incarnation=self._me.incarnation,
            length=len(hello),
            digest=frames.checksum(hello),
        )
        return header + hello

    def _welcome(self, sock: socket.socket) -> None:
        header = read_header(sock, self._deadline)
        if header.kind is Kind.REFUSE:
            reason = bytearray(min(header.length, 1024))
            receive_into(sock, memoryview(reason))
            raise Refused(header.chunk, reason.decode(errors="replace"))
        if header.kind is not Kind.WELCOME or header.run != self._me.run:
            raise FrameError("the other side does not answer like a peer of this run")
        if header.incarnation != self._member.incarnation:
            raise Refused(Refusal.GONE, "another incarnation answered")

    def _close(self) -> None:
        with self._lock:
            for sock in self._sockets:
                sock.close()
            self._sockets = []


def read_header(sock: socket.socket, deadline: float) -> Header:
    """One header from a socket, before a time.monotonic() deadline."""
    sock.settimeout(remaining(deadline))
    data = memoryview(bytearray(HEADER_BYTES))
    receive_into(sock, data)
    return frames.decode(data)


def probe(me: Self, member: Member, failure: LinkFailure) -> LinkFailure:
    """Look whether the peer's port still answers, and improve the evidence: "refused" means that the process is gone.

    Takes at most `probe_timeout` seconds. A process that is just dying may still accept: then it is asked once more.
    """
    if not member.addresses or failure.evidence in ("refused", "corrupt"):
        return failure
    deadline = time.monotonic() + me.options.probe_timeout
    evidence, detail = failure.evidence, "its port did not answer"
    while time.monotonic() < deadline:
        try:
            for sock in Dialling(me, member, Purpose.PROBE, 1, deadline - time.monotonic()).connect():
                sock.close()
            detail = "its port still answers"
            break
        except OSError as error:
            word = evidence_of(error)
            if word == "refused":
                evidence, detail = "refused", f"nobody answers at {', '.join(member.addresses)}: {error}"
                break
            if word not in ("eof", "reset"):
                break
    return LinkFailure(
        peer=failure.peer,
        incarnation=failure.incarnation,
        evidence=evidence,
        detail="; ".join(part for part in (failure.detail, detail) if part),
    )


class House(Protocol):
    """Who the porter works for. Called from the porter's thread."""

    def examine(self, header: Header, hello: Hello) -> tuple[Refusal, str] | None:
        """Why this HELLO is refused, or None."""

    def arrived(self, incarnation: int, sockets: list[socket.socket]) -> None:
        """All stripes of a link are here."""

    def fetcher(self, sock: socket.socket) -> bool:
        """Somebody wants to fetch; False if there is no room."""

    def sweep(self) -> None:
        """Twice a second, and when woken."""


@dataclass(slots=True, eq=False)
class _Visitor:
    """A connection in its handshake."""

    socket: socket.socket
    deadline: float
    data: bytearray = field(default_factory=bytearray)


@dataclass(slots=True)
class _Arrival:
    """A link of which some stripes have come."""

    stripes: dict[int, socket.socket]
    deadline: float


class Porter:
    """One thread: accepts, checks HELLOs, puts stripes together, and keeps the bounds."""

    def __init__(self, listen: str, me: Self, house: House) -> None:
        self._me, self._house = me, house
        self._listener = listen_on(listen) if listen else None
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._arrivals: dict[tuple[int, int], _Arrival] = {}
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, self._hear)
        if self._listener is not None:
            self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._open = True
        self._thread = threading.Thread(target=self._work, name="porter", daemon=True)

    @property
    def port(self) -> tuple[str, int] | None:
        """Where it listens."""
        if self._listener is None:
            return None
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """Ask for a sweep soon, from any thread."""
        with contextlib.suppress(OSError):  # full: it has been asked already; closed: nobody is left to ask
            self._rope.send(b"!")

    def stop(self) -> None:
        """End the thread and close every socket that it holds."""
        self._open = False
        self.ring()
        if self._thread.ident is not None:
            self._thread.join()
        for sock in list(self._visitors):
            self._dismiss(sock)
        for arrival in self._arrivals.values():
            for sock in arrival.stripes.values():
                sock.close()
        self._arrivals.clear()
        self._selector.close()
        for each in (self._bell, self._rope, self._listener):
            if each is not None:
                each.close()

    def _work(self) -> None:
        while self._open:
            for key, _ in self._selector.select(_SWEEP_SECONDS):
                callback: Callable[[socket.socket], None] = key.data
                callback(key.fileobj)  # type: ignore[arg-type]
            self._expire()
            self._house.sweep()

    def _hear(self, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            sock.recv(4096)

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return  # it left before we came to the door, or no descriptor is free: the next may have more luck
        sock.setblocking(False)
        if len(self._visitors) >= self._me.options.half_open:
            self._dismiss(next(iter(self._visitors)))
        self._visitors[sock] = _Visitor(sock, time.monotonic() + self._me.options.connect_timeout)
        self._selector.register(sock, selectors.EVENT_READ, self._listen_to)

    def _dismiss(self, sock: socket.socket) -> None:
        self._forget(sock)
        sock.close()

    def _forget(self, sock: socket.socket) -> None:
        if self._visitors.pop(sock, None) is not None:
            self._selector.unregister(sock)

    def _listen_to(self, sock: socket.socket) -> None:
        visitor = self._visitors.get(sock)
        if visitor is None:
            return  # dismissed earlier in this very turn
        try:
            data = sock.recv(_GREETING - len(visitor.data))
            visitor.data += data
            if not data:
                self._dismiss(sock)
            elif len(visitor.data) >= HEADER_BYTES:
                self._greeted(visitor)
        except BlockingIOError:
            return
        except (OSError, FrameError):
            self._dismiss(sock)

    def _greeted(self, visitor: _Visitor) -> None:
        header = frames.decode(memoryview(visitor.data)[:HEADER_BYTES])
        if header.kind is not Kind.HELLO or header.length != Hello.SIZE:
            raise FrameError("the first frame must be a HELLO")
        if len(visitor.data) < _GREETING:
            return
        payload = memoryview(visitor.data)[HEADER_BYTES:]
        if frames.checksum(payload) != header.checksum:
            raise FrameError("HELLO checksum mismatch")
        hello = Hello.unpack(payload)
        refusal = self._house.examine(header, hello)
        if refusal is None and hello.purpose is Purpose.LINK and hello.stripes > 64:
            refusal = (Refusal.DENIED, "more than 64 stripes")
        if refusal is not None:
            self._answer(visitor.socket, Kind.REFUSE, refusal[0], refusal[1].encode())
            self._dismiss(visitor.socket)
            return
        self._admit(visitor.socket, header.incarnation, hello)

    def _answer(self, sock: socket.socket, kind: Kind, code: int = 0, payload: bytes = b"") -> None:
        header = frames.encode(
            kind,
            run=self._me.run,
            incarnation=self._me.incarnation,
            chunk=code,
            length=len(payload),
            digest=frames.checksum(payload),
        )
        sock.send(header + payload)  # fits any socket buffer

    def _admit(self, sock: socket.socket, incarnation: int, hello: Hello) -> None:
        self._answer(sock, Kind.WELCOME)
        self._forget(sock)
        if hello.purpose is Purpose.PROBE:
            sock.close()
            return
        tune_early(sock, self._me.options)
        tune_data(sock, self._me.options)
        if hello.purpose is Purpose.FETCH:
            if not self._house.fetcher(sock):
                sock.close()
            return
        self._collect(sock, incarnation, hello)

    def _collect(self, sock: socket.socket, incarnation: int, hello: Hello) -> None:
        key = (incarnation, hello.link)
        fresh = _Arrival({}, time.monotonic() + self._me.options.connect_timeout)
        arrival = self._arrivals.setdefault(key, fresh)
        if (former := arrival.stripes.pop(hello.stripe, None)) is not None:
            former.close()
        arrival.stripes[hello.stripe] = sock
        if len(arrival.stripes) == hello.stripes:
            del self._arrivals[key]
            self._house.arrived(incarnation, [arrival.stripes[index] for index in sorted(arrival.stripes)])
        elif len(self._arrivals) > self._me.options.parked_links:
            self._drop(next(iter(self._arrivals)))

    def _drop(self, key: tuple[int, int]) -> None:
        for sock in self._arrivals.pop(key).stripes.values():
            sock.close()

    def _expire(self) -> None:
        now = time.monotonic()
        for visitor in [each for each in self._visitors.values() if each.deadline < now]:
            self._dismiss(visitor.socket)
        for key in [key for key, arrival in self._arrivals.items() if arrival.deadline < now]:
            self._drop(key)

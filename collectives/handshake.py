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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Hello, Kind, Purpose, Refusal
from collectives.records import LinkFailure, LinkFaults, Member
from collectives.sockets import (
    MOST_STRIPES,
    LinkOptions,
    evidence_of,
    kept_from_children,
    listen_on,
    parse_address,
    receive_into,
    remaining,
    shut,
    tune_data,
    tune_early,
    vitals,
)
from collectives.tuning import first_count

_GREETING = HEADER_BYTES + Hello.SIZE
_SWEEP_SECONDS = 0.5
_STAGGER_SECONDS = 0.25
_STRIPES = (Purpose.LINK, Purpose.STRIPE)
CUT = "the path is cut on purpose"


class Refused(OSError):
    """The other side answered REFUSE."""

    def __init__(self, refusal: int, reason: str) -> None:
        gone = refusal == Refusal.GONE
        super().__init__(errno.ECONNREFUSED if gone else errno.EHOSTUNREACH, f"refused by the other side: {reason}")


@dataclass(frozen=True, slots=True)
class Self:
    """Who dials: the run's hash, this peer's incarnation, its options, and faults on purpose."""

    run: int
    incarnation: int
    options: LinkOptions
    faults: LinkFaults | None = None


@dataclass(slots=True, eq=False)
class _Try:
    """One connection that is being built. where: family, kind, protocol and address, as getaddrinfo gives them."""

    order: int
    address: str
    where: tuple[Any, ...]
    begin_at: float
    socket: socket.socket | None = None


class Dialling:
    """Builds the connections to one peer; may be stopped from another thread.

    stripes: how many, None for as many as suit the path. link: the link that they are added to, None for a new one.
    All addresses of the peer are tried at once, and where a name has several, the others a moment later each ("happy
    eyeballs", RFC 8305). The first that answers like the peer is used, and one that accepts and says nothing costs its
    part of the time; if more connect in time, stripes are spread.
    """

    def __init__(
        self, me: Self, member: Member, purpose: Purpose, stripes: int | None, timeout: float, link: int | None = None
    ) -> None:
        self._me, self._member, self._purpose, self._stripes = me, member, purpose, stripes
        self.link = secrets.randbits(63) if link is None else link
        self._deadline = self._until = time.monotonic() + timeout
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._tries: list[_Try] = []
        self._errors: list[OSError] = []
        self._stopped = False

    def stop(self) -> None:
        """Make connect() fail promptly."""
        with self._lock:
            self._stopped = True
            for sock in self._sockets:
                shut(sock)

    def connect(self, each: Callable[[socket.socket], None] | None = None) -> list[socket.socket]:
        """Connected, greeted sockets, tuned for data. OSError if no address of the peer gives them in time.

        It says "refused" only if every address has: one of them may be a stranger's. each: is given every socket as
        soon as the other side has answered on it, and owns it from then on, whatever becomes of the others.
        """
        try:
            if self._me.faults is not None and self._me.faults.cut(self._member.name):
                raise OSError(errno.EHOSTUNREACH, CUT)
            self._resolve()
            while True:
                winner = self._race()
                self._until = time.monotonic() + remaining(self._deadline) / len(self._tries)
                try:
                    return self._hand_over(self._join(winner, each))
                except (OSError, FrameError) as error:
                    self._note(winner, error)
        finally:
            self._close()

    def _resolve(self) -> None:
        now = time.monotonic()
        for address in self._member.addresses:
            host, port = parse_address(address)
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            except OSError as error:
                self._errors.append(error)
                continue
            for later, (family, kind, protocol, _, where) in enumerate(found):
                begin_at = now + later * _STAGGER_SECONDS
                self._tries.append(_Try(len(self._tries), address, (family, kind, protocol, where), begin_at))

    def _race(self) -> _Try:
        """The first of the tries that connects; the others go on."""
        while self._tries:
            self._begin_due()
            pending = [each for each in self._tries if each.socket is not None]
            if not pending:
                continue  # what was due failed at once: there is nothing to wait for
            for each in self._connected(pending, self._patience()):
                assert each.socket is not None, "only what was begun connects"
                code = each.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if not code:
                    return each
                self._note(each, OSError(code, os.strerror(code)))
        raise self._verdict()

    def _begin_due(self) -> None:
        """Begin what is due, and what comes next if nothing else is on its way."""
        now = time.monotonic()
        for each in list(self._tries):
            idle = all(other.socket is None for other in self._tries)
            if each.socket is None and (each.begin_at <= now or idle):
                try:
                    each.socket = self._open(each.where)
                except OSError as error:
                    self._note(each, error)

    def _patience(self) -> float:
        """Seconds until the next try begins; TimeoutError when the time is up."""
        coming = [each.begin_at - time.monotonic() for each in self._tries if each.socket is None]
        return max(0.0, min([remaining(self._deadline), *coming]))

    def _connected(self, pending: list[_Try], patience: float) -> list[_Try]:
        """Those that have connected, or failed to, the best first."""
        with selectors.DefaultSelector() as selector:
            for each in pending:
                if each.socket is not None:
                    selector.register(each.socket, selectors.EVENT_WRITE, each)
            return sorted((key.data for key, _ in selector.select(patience)), key=lambda each: each.order)

    def _note(self, failed: _Try, error: Exception) -> None:
        """This one will not do."""
        self._tries.remove(failed)
        known = isinstance(error, OSError)
        self._errors.append(error if known else OSError(errno.EHOSTUNREACH, f"{failed.address}: {error}"))  # type: ignore[arg-type]

    def _verdict(self) -> OSError:
        if not self._errors:
            return OSError(errno.EHOSTUNREACH, f"{self._member.name} has no address")
        return next((each for each in reversed(self._errors) if evidence_of(each) != "refused"), self._errors[-1])

    def _open(self, where: tuple[Any, ...]) -> socket.socket:
        family, kind, protocol, address = where
        sock = kept_from_children(socket.socket(family, kind, protocol))
        with self._lock:
            self._sockets.append(sock)
            if self._stopped:
                raise OSError(errno.ECONNABORTED, "stopped")
        tune_early(sock, self._me.options)
        sock.setblocking(False)
        code = sock.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        return sock

    def _join(self, winner: _Try, each: Callable[[socket.socket], None] | None) -> list[socket.socket]:
        """Greets on the winner, and builds the other stripes: over every address that has connected by then."""
        first = winner.socket
        assert first is not None, "the winner has connected"
        count = self._stripes or first_count(vitals(first).rtt)
        alone = len(self._member.addresses) == 1
        others = [self._open(winner.where) for _ in range(count - 1)] if alone else []
        self._greet(first, 0, count)
        if not alone:
            self._welcome(first)
            ways = self._ways(winner)
            others = [self._open(ways[index % len(ways)]) for index in range(1, count)]
            self._give(first, each)
        stripes = [first, *others]
        for sock in self._answered(stripes, waiting=alone):
            self._give(sock, each)
        return stripes

    def _ways(self, winner: _Try) -> list[tuple[Any, ...]]:
        """Where stripes can go: each of the peer's addresses that works now."""
        found = {winner.address: winner.where}
        pending = [each for each in self._tries if each.socket is not None and each is not winner]
        for each in self._connected(pending, 0.0):
            if each.socket is not None and not each.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                found.setdefault(each.address, each.where)
        return list(found.values())

    def _give(self, sock: socket.socket, each: Callable[[socket.socket], None] | None) -> None:
        if each is not None:
            each(*self._hand_over([sock]))

    def _answered(self, stripes: list[socket.socket], waiting: bool) -> Iterator[socket.socket]:
        """Each once the other side has answered on it; the first, too, if it is `waiting` for that.

        All were begun at once: their round trips overlap, and a packet that gets lost holds up one of them.
        """
        with selectors.DefaultSelector() as selector:
            if waiting:
                selector.register(stripes[0], selectors.EVENT_READ, 0)
            for index, sock in enumerate(stripes[1:], 1):
                selector.register(sock, selectors.EVENT_WRITE, index)
            while selector.get_map():
                for key, events in self._ready(selector):
                    sock = stripes[key.data]
                    selector.unregister(sock)
                    if events & selectors.EVENT_WRITE:
                        self._greet_connected(sock, key.data, len(stripes))
                        selector.register(sock, selectors.EVENT_READ, key.data)
                    else:
                        self._welcome(sock)
                        yield sock

    def _ready(self, selector: selectors.BaseSelector) -> list[tuple[selectors.SelectorKey, int]]:
        if not (found := selector.select(remaining(self._until))):
            raise TimeoutError(errno.ETIMEDOUT, "no answer to connect")
        return found

    def _greet_connected(self, sock: socket.socket, index: int, count: int) -> None:
        if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            raise OSError(code, os.strerror(code))
        self._greet(sock, index, count)

    def _greet(self, sock: socket.socket, index: int, count: int) -> None:
        hello = Hello(
            expected=self._member.incarnation,
            link=self.link,
            chunk_bytes=self._me.options.chunk_bytes,
            stripe=index,
            stripes=count,
            purpose=self._purpose,
        ).pack()
        header = frames.encode(
            Kind.HELLO,
            run=self._me.run,
            incarnation=self._me.incarnation,
            length=len(hello),
            digest=frames.checksum(hello),
        )
        sock.settimeout(remaining(self._until))
        sock.sendall(header + hello)

    def _welcome(self, sock: socket.socket) -> None:
        header = read_header(sock, self._until)
        if header.kind is Kind.REFUSE:
            reason = bytearray(min(header.length, 1024))
            receive_into(sock, memoryview(reason))
            raise Refused(header.chunk, reason.decode(errors="replace"))
        if header.kind is not Kind.WELCOME or header.run != self._me.run:
            raise FrameError("the other side does not answer like a peer of this run")
        if header.incarnation != self._member.incarnation:
            raise Refused(Refusal.GONE, "another incarnation answered")
        tune_data(sock, self._me.options, stripe=self._purpose in _STRIPES)

    def _hand_over(self, done: list[socket.socket]) -> list[socket.socket]:
        with self._lock:
            if self._stopped:
                raise OSError(errno.ECONNABORTED, "stopped")
            self._sockets = [sock for sock in self._sockets if sock not in done]
        return done

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

    def arrived(self, incarnation: int, link: int, sockets: list[socket.socket]) -> None:
        """All stripes of a link are here."""

    def joined(self, incarnation: int, link: int, sock: socket.socket) -> None:
        """One more stripe for a link that is there."""

    def fetcher(self, incarnation: int, sock: socket.socket) -> None:
        """Somebody wants to fetch; the house now owns the socket."""

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


def _listen(addresses: str, options: LinkOptions) -> list[socket.socket]:
    listeners: list[socket.socket] = []
    try:
        for address in filter(None, addresses.split(",")):
            listeners.append(listen_on(address.strip(), options))
    except BaseException:
        for listener in listeners:
            listener.close()
        raise
    return listeners


class Porter:
    """One thread: accepts, checks HELLOs, puts stripes together, and keeps the bounds."""

    def __init__(self, listen: str, me: Self, house: House) -> None:
        self._me, self._house = me, house
        self._listeners = _listen(listen, me.options)
        self._visitors: dict[socket.socket, _Visitor] = {}
        self._arrivals: dict[tuple[int, int], _Arrival] = {}
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._bell.setblocking(False)
        self._rope.setblocking(False)
        self._selector.register(self._bell, selectors.EVENT_READ, self._hear)
        for listener in self._listeners:
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._open = True
        self._thread = threading.Thread(target=self._work, name="porter", daemon=True)

    @property
    def ports(self) -> tuple[tuple[str, int], ...]:
        """Where it listens."""
        names = (listener.getsockname() for listener in self._listeners)
        return tuple((str(name[0]), int(name[1])) for name in names)

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
        for each in (self._bell, self._rope, *self._listeners):
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
        kept_from_children(sock).setblocking(False)
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
        if refusal is None and hello.purpose is Purpose.LINK and hello.stripes > MOST_STRIPES:
            refusal = (Refusal.DENIED, f"more than {MOST_STRIPES} stripes")
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
        tune_data(sock, self._me.options, stripe=hello.purpose in _STRIPES)
        if hello.purpose is Purpose.FETCH:
            self._house.fetcher(incarnation, sock)
            return
        if hello.purpose is Purpose.STRIPE:
            self._house.joined(incarnation, hello.link, sock)
        else:
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
            sockets = [arrival.stripes[index] for index in sorted(arrival.stripes)]
            self._house.arrived(incarnation, hello.link, sockets)
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

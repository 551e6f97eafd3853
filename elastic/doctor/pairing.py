"""What two doctors say to each other, and how: a greeting of fixed size, then small messages with deadlines.

    visitor                                       host
    Greeting(VISIT) ----------------------------> Welcome, or Sorry: one visitor at a time
    Hello, Ping ... ----------------------------> Pong ...
    DialBack -----------------------------------> (dials, with Greeting(KNOCK)) DialledBack
    Measure, and connections, Greeting(DATA) ---> Ready, Begin, Tally; data one way or the other meanwhile
    Bye

The host says Alive twice a second, so that the visitor can tell which direction is lost when answers fail to come.
Nothing that arrives is unpickled, and every size and every wait has a bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from collectives.sockets import EndOfStream, LinkOptions, remaining, tune_data, tune_early

from ..messages import MessageError, decode, encode
from .facts import Side

MAGIC, EDITION = b"ELDOCTOR", 1
VISIT, DATA, KNOCK = 0, 1, 2
KEY_BYTES = 16
MOST_CONNECTIONS, MOST_SECONDS, MOST_DIALLED = 64, 30.0, 8
MOST_ADDRESS = 300
GREETING_SECONDS, ANSWER_SECONDS, DIAL_SECONDS = 3.0, 10.0, 4.0
BEAT_SECONDS, SILENCE_SECONDS = 0.5, 4.0
_MOST_BYTES = 1 << 16
_GREETING = struct.Struct("<8sBBI16s")
_LENGTH = struct.Struct("<I")
GREETING_BYTES = _GREETING.size

Heard = TypeVar("Heard")


class Refused(OSError):
    """The host said Sorry."""


class Greeting(NamedTuple):
    """First on every connection. key: of the visit that it belongs to. number: of the test."""

    purpose: int
    key: bytes = bytes(KEY_BYTES)
    number: int = 0

    def pack(self) -> bytes:
        return _GREETING.pack(MAGIC, EDITION, self.purpose, self.number, self.key)

    @classmethod
    def unpack(cls, data: bytes) -> Greeting:
        """Raises MessageError."""
        magic, edition, purpose, number, key = _GREETING.unpack(data)
        if magic != MAGIC or purpose not in (VISIT, DATA, KNOCK):
            raise MessageError("no greeting of a doctor")
        if edition != EDITION:
            raise MessageError(f"a doctor of edition {edition}, this one is of {EDITION}: install the same release")
        return cls(purpose, key, number)


def proof(key: bytes) -> bytes:
    """What who has made the key says when it is knocked with: no stranger's port does."""
    return hashlib.blake2b(key, digest_size=KEY_BYTES).digest()


# --- messages ---------------------------------------------------------------------------------------------------------


def _check_numbers(*numbers: float) -> None:
    if not all(math.isfinite(each) and each >= 0 for each in numbers):
        raise ValueError("a number is negative or not finite")


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """key: of this visit. seen: the visitor's address, as it is seen here."""

    key: bytes
    seen: str
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorry:
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    side: Side


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Is passed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """By the clock of the host."""

    received: float
    answered: float

    def __post_init__(self) -> None:
        _check_numbers(self.received, self.answered)


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """Dial this address, and knock with this key."""

    address: str
    key: bytes

    def __post_init__(self) -> None:
        if len(self.address) > MOST_ADDRESS or len(self.key) != KEY_BYTES:
            raise ValueError(f"an address has at most {MOST_ADDRESS} letters, a key {KEY_BYTES} bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class DialBack:
    doors: tuple[Door, ...]

    def __post_init__(self) -> None:
        if len(self.doors) > MOST_DIALLED:
            raise ValueError(f"{len(self.doors)} addresses to dial; at most {MOST_DIALLED} are")


@dataclass(frozen=True, slots=True, kw_only=True)
class DialledBack:
    """For each door, in order: "" if the visitor was behind it, else why not, as a word of LinkFailure.evidence."""

    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Data for so many seconds, over so many connections that greet with this number. up: from the visitor."""

    number: int
    up: bool
    connections: int
    seconds: float
    control: str

    def __post_init__(self) -> None:
        _check_numbers(self.number, self.seconds)
        if not (1 <= self.connections <= MOST_CONNECTIONS and self.seconds <= MOST_SECONDS):
            raise ValueError(f"at most {MOST_CONNECTIONS} connections and {MOST_SECONDS:g} seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The connections may come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """They have come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What the host has received (a rate in bytes/s), or sent."""

    rate: float = 0.0
    sent: int = 0
    resent: int = 0
    mtu: int = 0

    def __post_init__(self) -> None:
        _check_numbers(self.rate, self.sent, self.resent, self.mtu)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    pass


KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (Welcome, Sorry, Hello, Alive, Ping, Pong, DialBack, DialledBack, Measure, Ready, Begin, Tally, Bye)
}


# --- connections ------------------------------------------------------------------------------------------------------


class Line:
    """Messages over a connection. `say` is for any thread, `hear` for one.

    beaten: the other side says Alive, so that silence means something.
    """

    def __init__(self, sock: socket.socket, *, beaten: bool) -> None:
        self._sock, self._beaten = sock, beaten
        self._lock = threading.Lock()
        self._heard_at = 0.0
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def say(self, message: object, seconds: float = ANSWER_SECONDS) -> None:
        """OSError if it cannot be said in time."""
        body = encode(message)
        self.say_bytes(_LENGTH.pack(len(body)) + body, seconds)

    def say_bytes(self, data: bytes, seconds: float = ANSWER_SECONDS) -> None:
        deadline, view = time.monotonic() + seconds, memoryview(data)
        with self._lock:
            while view:
                _wait(self._sock, select.POLLOUT, remaining(deadline))
                with contextlib.suppress(BlockingIOError):
                    view = view[self._sock.send(view, socket.MSG_NOSIGNAL) :]

    def hear(self, kind: type[Heard], seconds: float = ANSWER_SECONDS) -> Heard:
        """The next message, which must be of this kind.

        OSError if none comes in time (TimeoutError), or a Sorry (Refused); MessageError for anything else.
        """
        message = self.hear_any((kind,), seconds)
        assert isinstance(message, kind)
        return message

    def hear_any(self, kinds: tuple[type, ...], seconds: float) -> object:
        deadline = time.monotonic() + seconds
        self._heard_at = time.monotonic()
        while True:
            message = self._next(deadline)
            if isinstance(message, Sorry):
                raise Refused(message.reason)
            if isinstance(message, kinds):
                return message
            if not isinstance(message, Alive):
                raise MessageError(f"a {type(message).__name__} has no place here")

    def _next(self, deadline: float) -> object:
        (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if size > _MOST_BYTES:
            raise MessageError(f"a message of {size} bytes from a doctor")
        return decode(self._read(size, deadline), KINDS)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            until = min(deadline, self._heard_at + SILENCE_SECONDS) if self._beaten else deadline
            _wait(self._sock, select.POLLIN, remaining(until))
            with contextlib.suppress(BlockingIOError):
                part = self._sock.recv(size - len(data))
                if not part:
                    raise EndOfStream("the other side hung up")
                data += part
                self._heard_at = time.monotonic()
        return bytes(data)


def _wait(sock: socket.socket, event: int, seconds: float) -> None:
    poll = select.poll()
    poll.register(sock, event)
    poll.poll(math.ceil(seconds * 1000))


@contextlib.contextmanager
def beating(line: Line) -> Iterator[None]:
    """Says Alive until the context ends."""
    over = threading.Event()

    def beat() -> None:
        with contextlib.suppress(OSError):  # it is gone: who uses the line will see
            while not over.wait(BEAT_SECONDS):
                line.say(Alive())

    thread = threading.Thread(target=beat, name="elastic-doctor-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def options_for(control: str) -> LinkOptions:
    return LinkOptions(congestion_control=control or None)


def dial(host: str, port: int, greeting: Greeting, options: LinkOptions, seconds: float) -> socket.socket:
    """A connection as links have them, with the greeting said. OSError."""
    error: OSError | None = None
    for family, kind, protocol, _, where in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            tune_early(sock, options)
            sock.settimeout(seconds)
            sock.connect(where)
            sock.sendall(greeting.pack())
            return sock
        except OSError as failure:
            sock.close()
            error = failure
        except BaseException:
            sock.close()
            raise
    raise error or OSError("the name has no address")


def made_ready(sock: socket.socket, options: LinkOptions) -> socket.socket:
    """As links tune it for data; only that nothing blocks."""
    tune_early(sock, options)
    tune_data(sock, options, stripe=False)
    sock.setblocking(False)
    return sock

"""How the leader of a peer's ranks has another rank execute one attempt: the errand, and the connection for it.

Each errand has a connection of its own within the site, from the leader to a door that the rank keeps open: greeting,
errand, source; then, from the rank, how it ended, and the result. Meanwhile the leader may say Stop, and if the
connection ends, that says the same; the rank says that it is Alive. Both sides prove that they know a secret that only
the ranks of this peer have, and nothing that comes is unpickled.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from collectives.records import Abort, LinkFailure, Member, OperationRecord, Start
from collectives.sockets import EndOfStream, kept_from_children, receive_into, shut
from collectives.transfer import as_bytes

from .messages import MAX_MESSAGE_BYTES, MessageError, decode, encode

GREETING_SECONDS = 5.0
PIECE = 1 << 20  # bytes
MOST_VISITORS = 256  # connections at a door: one for each operation under way, and some that are no rank's
_LENGTH = struct.Struct("<I")
_NONCE, _PROOF = 16, 32
_LEADER, _RANK = b"leader", b"rank"

Door = tuple[str, int]  # host and port
Received = TypeVar("Received")

NOTHING = OperationRecord(seconds=0.0, wait_ready_seconds=0.0, reduce_seconds=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """Run this; the source follows, if the peer gives any."""

    start: Start
    gives: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Abort it."""

    abort: Abort


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """The view, as this rank's lane sees its members. number: what is older than another that came is dropped."""

    number: int
    members: tuple[Member, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What came of an errand; if it is done, the result follows. unable: the rank cannot execute such a thing.

    bytes_sent, bytes_received: by the rank's links since they were made.
    """

    done: bool
    reason: str = ""
    unable: bool = False
    lost: tuple[LinkFailure, ...] = ()
    record: OperationRecord = NOTHING
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alive:
    """Said by a rank now and then while it runs an errand."""


_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Errand, Stop, Known, Ended, Alive)}


# --- bytes ------------------------------------------------------------------------------------------------------------


def packed(message: Any) -> bytes:
    body = encode(message)
    return _LENGTH.pack(len(body)) + body


def receive(sock: socket.socket, kind: type[Received]) -> Received:
    """The next message, which must be of that kind. OSError if none comes, MessageError for anything else."""
    (size,) = _LENGTH.unpack(_read(sock, _LENGTH.size))
    if size > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {size} bytes from a rank of this peer")
    message = decode(bytes(_read(sock, size)), _KINDS)
    if not isinstance(message, kind):
        raise MessageError(f"a {type(message).__name__} from a rank of this peer has no place here")
    return message


def receive_ended(sock: socket.socket) -> Ended:
    """How an errand ended, however long it takes a rank that is alive. TimeoutError if it is silent."""
    while True:
        message = receive(sock, object)
        if isinstance(message, Ended):
            return message


def give(sock: socket.socket, tensor: torch.Tensor) -> None:
    """TimeoutError only if nothing gets on: the time that a socket allows is that of one call."""
    view = as_bytes(tensor)
    for at in range(0, len(view), PIECE):
        sock.sendall(view[at : at + PIECE])


def fill(sock: socket.socket, tensor: torch.Tensor) -> None:
    receive_into(sock, as_bytes(tensor))


def _read(sock: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    receive_into(sock, memoryview(data))
    return data


# --- doors ------------------------------------------------------------------------------------------------------------


def machine() -> tuple[str, ...]:
    """What two processes have in common if they reach each other by loopback."""
    try:
        boot, network = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/net")
    except OSError:
        return (secrets.token_hex(),)  # who knows
    return socket.gethostname(), boot, network


def hosts() -> list[str]:
    """Addresses by which other machines of the site may know this one."""
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(where[0]) for *_, where in found))


def hosts_towards(others: Iterable[str]) -> list[str]:
    """This machine's addresses on the way to those; the best guess first."""
    found = []
    for other in others:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                with socket.socket(family, socket.SOCK_DGRAM) as sock:
                    sock.connect((other, 9))  # sends nothing
                    found.append(str(sock.getsockname()[0]))
            except OSError:
                continue
    return list(dict.fromkeys([*found, *hosts()]))


def listening(near: bool) -> socket.socket:
    """A door: to this machine alone, or to the site."""
    if near:
        return kept_from_children(socket.create_server(("127.0.0.1", 0), backlog=MOST_VISITORS))
    if socket.has_dualstack_ipv6():
        options: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True}
        return kept_from_children(socket.create_server(("", 0), backlog=MOST_VISITORS, **options))
    return kept_from_children(socket.create_server(("", 0), backlog=MOST_VISITORS))


def knock(door: Door, secret: bytes, patience: float = GREETING_SECONDS) -> socket.socket:
    """A connection to a rank that has proved to be one. OSError if there is nobody, or a stranger.

    patience: seconds of silence after which this and whatever is done with it is a TimeoutError.
    """
    sock = kept_from_children(socket.create_connection(door, patience))
    try:
        greet(sock, secret, _LEADER, _RANK)
    except BaseException:
        sock.close()
        raise
    return sock


def welcome(sock: socket.socket, secret: bytes) -> None:
    """The other side of `knock`."""
    sock.settimeout(GREETING_SECONDS)
    greet(sock, secret, _RANK, _LEADER)
    sock.settimeout(None)


def greet(sock: socket.socket, secret: bytes, mine: bytes, theirs: bytes) -> None:
    """Each proves to the other that it knows the secret, and in which role. OSError if the other does not."""
    nonce = secrets.token_bytes(_NONCE)
    sock.sendall(nonce)
    sock.sendall(hmac.digest(secret, mine + _read(sock, _NONCE), "sha256"))
    if not hmac.compare_digest(_read(sock, _PROOF), hmac.digest(secret, theirs + nonce, "sha256")):
        raise ConnectionRefusedError("who is there is no rank of this peer")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


# --- the leader's side ------------------------------------------------------------------------------------------------


class Call:
    """One errand as the leader lives it. `stop` and `cut` are for other threads, and never block."""

    def __init__(self, dial: Callable[[], socket.socket]) -> None:
        self._dial = dial
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._told = False
        self._stopped: Abort | None = None

    def make(self, errand: Errand, source: torch.Tensor | None, result: torch.Tensor) -> Ended:
        """Sends it off, and returns when the rank has ended it.

        TimeoutError if the rank is silent, another OSError if it is lost, or was stopped too early.
        """
        sock = self._dial()
        try:
            self._take(sock)
            sock.sendall(packed(errand))
            if source is not None:
                give(sock, source)
            self._all_told()
            ended = receive_ended(sock)
            if ended.done:
                fill(sock, result)
            return ended
        finally:
            with self._lock:
                self._socket = None
            sock.close()

    def _take(self, sock: socket.socket) -> None:
        with self._lock:
            if self._stopped is not None:
                raise ConnectionAbortedError("stopped before it began")
            self._socket = sock

    def _all_told(self) -> None:
        with self._lock:
            self._told = True

    def stop(self, abort: Abort) -> None:
        """The rank is to end it, and to say so."""
        with self._lock:
            first, self._stopped = self._stopped is None, self._stopped or abort
            if first and self._socket is not None:
                self._tell(abort)

    def _tell(self, abort: Abort) -> None:
        """Not while the source is under way: then the end of the connection says it."""
        assert self._socket is not None
        words = packed(Stop(abort=abort))
        try:
            ready = self._told and writable(self._socket)
            if not ready or self._socket.send(words) < len(words):
                self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            shut(self._socket)

    def cut(self) -> None:
        """Gives the rank up."""
        with self._lock:
            if self._socket is not None:
                shut(self._socket)


def writable(sock: socket.socket) -> bool:
    """Whether it takes something now: one that has a timeout would wait for that, even if it is told not to."""
    poll = select.poll()
    poll.register(sock, select.POLLOUT)
    return bool(poll.poll(0))


def reach(doors: Iterable[Door], secret: bytes) -> Door:
    """The first of a rank's doors behind which it is. OSError if it is behind none of them."""
    errors: list[OSError] = []
    for door in doors:
        try:
            knock(door, secret).close()
            return door
        except OSError as error:
            errors.append(error)
    raise errors[0] if errors else EndOfStream("it has no door")

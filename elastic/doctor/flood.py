"""Bulk data over many connections in one thread: how much gets through, and what it cost."""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from collectives.sockets import vitals

BLOCK = 256 << 10
PATIENCE = 5.0  # seconds for the first byte
_LOOK = 0.05
_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: what was not sent is dropped
_IP_MTU, _IPV6_MTU = 14, 24


class Poured(NamedTuple):
    """sent, resent: bytes. mtu: of the path, as it is known by now."""

    sent: int
    resent: int
    mtu: int


def pour(sockets: Sequence[socket.socket], seconds: float) -> Poured:
    """Sends as much as they take, and closes them at once. Non-blocking sockets."""
    block = memoryview(os.urandom(BLOCK))  # what can be compressed might be, on the way
    deadline = time.monotonic() + seconds
    with _watched(sockets, selectors.EVENT_WRITE) as selector:
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(min(left, _LOOK)):
                _send(selector, key, block)
        poured = [_poured(sock) for sock in sockets]
    return Poured(
        sum(each.sent for each in poured),
        sum(each.resent for each in poured),
        min((each.mtu for each in poured if each.mtu), default=0),
    )


def drink(sockets: Sequence[socket.socket], seconds: float) -> float:
    """Receives for so many seconds from the first byte on: bytes/s in the second half of that, when it flows evenly."""
    scratch, gauge = bytearray(BLOCK), _Gauge(seconds)
    with _watched(sockets, selectors.EVENT_READ) as selector:
        while selector.get_map() and not gauge.over(time.monotonic()):
            for key, _ in selector.select(_LOOK):
                gauge.count(_receive(selector, key, scratch), time.monotonic())
    return gauge.rate(time.monotonic())


class _Gauge:
    def __init__(self, seconds: float) -> None:
        self._seconds, self._waits_until = seconds, time.monotonic() + PATIENCE
        self._first: float | None = None
        self._bytes = 0

    def count(self, size: int, now: float) -> None:
        if size and self._first is None:
            self._first = now
        if self._first is not None and now >= self._first + self._seconds / 2:
            self._bytes += size

    def over(self, now: float) -> bool:
        return now >= (self._waits_until if self._first is None else self._first + self._seconds)

    def rate(self, now: float) -> float:
        if self._first is None:
            return 0.0
        half = self._first + self._seconds / 2
        lasted = min(now, self._first + self._seconds) - half
        return self._bytes / lasted if lasted > 0 else 0.0


@contextlib.contextmanager
def _watched(sockets: Sequence[socket.socket], event: int) -> Iterator[selectors.BaseSelector]:
    """Closes them in the end, without waiting for what is under way."""
    with selectors.DefaultSelector() as selector:
        try:
            for sock in sockets:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                selector.register(sock, event)
            yield selector
        finally:
            for sock in sockets:
                sock.close()


def _send(selector: selectors.BaseSelector, key: selectors.SelectorKey, block: memoryview) -> None:
    sock = key.fileobj
    assert isinstance(sock, socket.socket)
    try:
        sock.send(block, socket.MSG_NOSIGNAL)
    except BlockingIOError:
        return
    except OSError:  # the other side has had enough
        selector.unregister(sock)


def _receive(selector: selectors.BaseSelector, key: selectors.SelectorKey, scratch: bytearray) -> int:
    sock = key.fileobj
    assert isinstance(sock, socket.socket)
    try:
        size = sock.recv_into(scratch)
    except BlockingIOError:
        return 0
    except OSError:
        size = 0
    if not size:
        selector.unregister(sock)
    return size


def _poured(sock: socket.socket) -> Poured:
    try:
        said = vitals(sock)
        return Poured(said.sent, said.resent, path_mtu(sock))
    except OSError:
        return Poured(0, 0, 0)


def path_mtu(sock: socket.socket) -> int:
    """As the kernel has it, of a connected socket: the interface's, until it has learned better. 0: it is not told."""
    where = (socket.IPPROTO_IPV6, _IPV6_MTU) if sock.family == socket.AF_INET6 else (socket.IPPROTO_IP, _IP_MTU)
    try:
        return sock.getsockopt(*where)
    except OSError:
        return 0

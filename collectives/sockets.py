"""Sockets that can be stopped: options, addresses, leases on memory, and whole-buffer sends and receives.

Data sockets are blocking with a kernel timeout of SLICE on each call. So a thread in send or receive comes back at
least that often, and can see that the memory it works on has been taken back (`Lease.revoke`). A sender then copies
the rest of its frame and goes on from the copy; a receiver sends the rest into scratch memory. The stream stays whole,
and the owner of the memory gets it back within about one SLICE, whatever the peer does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SLICE = 0.1
AUTO = "auto"
MOST_STRIPES = 64
FAR = 2e-3  # seconds of round trip from which a path is a long one
NEAR = 1e-3  # and up to which hosts are in one room
UNPACED = ("cubic", "reno")
UNSENT = 32 << 10  # bytes that a stripe of a long path takes before their turn: others may be free earlier
_STRIPE_PROBES, _ALONE = 12, 15
# struct tcp_info of Linux 4.19 and later, as far as it is read here: of 8 bytes, 24 numbers of 32 bits, 4 of 64 bits, 6
# of 32, 4 of 64, 2 of 32 and 2 of 64
_INFO = struct.Struct("=2x2B4x 8xI36xI8xI8xI16xI 16xQ8x 12xI8x 8xQ16x 8x 2Q")
_SO_MAX_PACING_RATE, _UNLIMITED = 47, struct.pack("=Q", 1 << 40)  # any limit makes the kernel pace
_TIMEVAL = struct.pack("ll", 0, int(SLICE * 1e6))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How links are built. All members of a run must use the same chunk_bytes.

    stripes: TCP connections per link, 1 to 64, or "auto": as many as carry more than fewer would (see tuning.py); what
    the dialler is set to holds. chunk_bytes: largest piece that travels alone, a multiple of 64.
    connect_timeout: seconds for a link to come up before the peer counts as unreachable.
    probe_timeout: seconds to look whether a peer's port still answers after its link failed.
    path_timeout: seconds in which nothing is acknowledged, though it was asked for repeatedly, after which a path is
    cut. A peer that does not read still acknowledges, and so does the kernel of one that is frozen.
    congestion_control: per socket; a name that the kernel lacks is a ValueError. None is the system's, but for paths of
    less than 1 ms where the system's is bbr: they get cubic, or reno where that is not to be had, since the pacing of
    bbr costs half as much CPU time again there.
    send_buffer, receive_buffer: bytes, None for the kernel's own tuning (up to the third number of net.ipv4.tcp_wmem
    and tcp_rmem; a set size is capped by net.core.wmem_max and rmem_max). Where these bind, more stripes help.
    keepalive: idle seconds, interval, probes (of a link, 12 or more). They also keep the entries of NATs on the way
    alive, on each stripe: these forget after 30 s or more.
    checksum: xxh3 of every payload, made by the sender and verified by the receiver; headers always have one.
    shared_memory: payloads between peers on one host go through memory that both map, if both sides have this on.
    pool_bytes: early contributions kept per attempt before their turn. parked_links, parked_seconds: bounds on links
    from peers that this one has not been told of yet. half_open: connections that may be in their handshake at once.
    """

    stripes: int | str = AUTO
    chunk_bytes: int = 2 << 20
    connect_timeout: float = 5.0
    probe_timeout: float = 0.3
    path_timeout: float = 2.0
    congestion_control: str | None = None
    send_buffer: int | None = None
    receive_buffer: int | None = None
    keepalive: tuple[int, int, int] = (1, 1, 3)
    pool_bytes: int = 32 << 20
    checksum: bool = True
    shared_memory: bool = True
    parked_links: int = 64
    parked_seconds: float = 60.0
    half_open: int = 64
    servers: int = 32

    def __post_init__(self) -> None:
        if self.stripes != AUTO and not (isinstance(self.stripes, int) and 1 <= self.stripes <= MOST_STRIPES):
            raise ValueError(f"stripes is {self.stripes!r}: choose 1 to {MOST_STRIPES}, or {AUTO!r}")
        if self.chunk_bytes % 64 or not 64 <= self.chunk_bytes <= 16 << 20:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}: choose a multiple of 64 up to 16 MiB")
        if min(self.connect_timeout, self.probe_timeout, self.path_timeout, self.parked_seconds) <= 0:
            raise ValueError("timeouts of a link must be positive")
        if min(self.parked_links, self.half_open, self.servers) < 1 or self.pool_bytes < 0:
            raise ValueError("bounds of a group must be at least 1")

    @property
    def fixed_stripes(self) -> int | None:
        """None for auto."""
        return self.stripes if isinstance(self.stripes, int) else None


class Vitals(NamedTuple):
    """What the kernel says of a connection (TCP_INFO): bytes and seconds, counted since it was made.

    busy: seconds with something unacknowledged or unsent. unanswered: probes, or repetitions of the same data, that
    nothing has come back for. silent: seconds since the last acknowledgement.
    """

    rtt: float
    shortest_rtt: float
    window: int
    acked: int
    sent: int
    resent: int
    retransmits: int
    busy: float
    unanswered: int
    silent: float

    @property
    def rate(self) -> float:
        """Bytes/s that its congestion window lets through."""
        return self.window / max(self.rtt, 1e-5)


def vitals(sock: socket.socket) -> Vitals:
    """Takes about 10 us. OSError if the socket is closed, or no TCP."""
    data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    repeated, probes, mss, silent, rtt, window, retransmits, acked, shortest, busy, sent, resent = _INFO.unpack(data)
    return Vitals(
        rtt=rtt / 1e6,
        shortest_rtt=min(shortest, rtt) / 1e6,
        window=window * mss,
        acked=acked,
        sent=sent,
        resent=resent,
        retransmits=retransmits,
        busy=busy / 1e6,
        unanswered=max(repeated, probes),
        silent=silent / 1e3,
    )


class Lease:
    """Shared use of memory that its owner can take back: count of users, and a flag that stops new ones."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._users = 0
        self.revoked = False

    def acquire(self) -> bool:
        """Become a user; False if the memory has been taken back."""
        with self._condition:
            if self.revoked:
                return False
            self._users += 1
            return True

    def release(self) -> None:
        with self._condition:
            self._users -= 1
            if not self._users:
                self._condition.notify_all()

    def revoke(self) -> None:
        with self._condition:
            self.revoked = True

    def wait_unused(self) -> None:
        """Return once nobody uses the memory. After `revoke` that takes about one SLICE at most."""
        with self._condition:
            while self._users:
                self._condition.wait(1.0)


class EndOfStream(OSError):
    """The other side closed the connection."""


def evidence_of(error: OSError) -> str:
    """The word of LinkFailure.evidence for an operating system's error."""
    if isinstance(error, EndOfStream):
        return "eof"
    if isinstance(error, TimeoutError) or error.errno == errno.ETIMEDOUT:
        return "timeout"
    if error.errno == errno.ECONNREFUSED:
        return "refused"
    if error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH) or isinstance(error, socket.gaierror):
        return "unreachable"
    return "reset"


def parse_address(address: str) -> tuple[str, int]:
    """("host", port) of "host:port" or "[v6]:port"; ValueError otherwise."""
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"address {address!r} is not host:port: write for example 127.0.0.1:29500 or [::1]:29500")
    return host, int(port)


def format_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


_OURS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def kept_from_children(sock: socket.socket) -> socket.socket:
    """Closes the socket in processes forked from this one (a DataLoader's workers): as long as one of them held it,
    nobody would see that this process has died."""
    _OURS.add(sock)
    return sock


def _close_in_child() -> None:
    for sock in list(_OURS):
        sock.close()


os.register_at_fork(after_in_child=_close_in_child)


def listen_on(address: str, options: LinkOptions) -> socket.socket:
    """A non-blocking listener; port 0: any. What it accepts has its buffers and congestion control."""
    host, port = parse_address(address)
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = kept_from_children(socket.socket(family, kind, protocol))
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tune_early(listener, options)
        listener.bind(where)
        listener.listen(256)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def check_congestion_control(name: str | None) -> None:
    """ValueError if the kernel has no such congestion control."""
    with socket.socket() as probe:
        try:
            if name is not None:
                probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
        except OSError as error:
            raise ValueError(
                f"congestion_control {name!r} is not available here ({error.strerror}): see "
                "/proc/sys/net/ipv4/tcp_available_congestion_control, or pass None"
            ) from None


def tune_early(sock: socket.socket, options: LinkOptions) -> None:
    """What must be set before connecting, and on a listener: buffers decide the window that is offered."""
    if options.send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)
    if options.receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.receive_buffer)
    if options.congestion_control is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options.congestion_control.encode())
    elif congestion_control(sock) == "bbr":  # a socket that had it goes on pacing when it is given another one later
        _use_one_of(sock, *UNPACED)


def _use_one_of(sock: socket.socket, *names: str) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # the kernel has no such, or does not let us have it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())
            return


def tune_data(sock: socket.socket, options: LinkOptions, *, stripe: bool) -> None:
    """Blocking with SLICE-long calls, no delay, dead paths noticed when idle, and what suits the length of the path.

    stripe: it is one of a link's, whose path is judged by all of them (`path_silence`) long before the kernel does.
    """
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, probes = options.keepalive
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(probes, _STRIPE_PROBES) if stripe else probes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)
    rtt = vitals(sock).shortest_rtt
    if rtt > FAR:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT)
        sock.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, _UNLIMITED)  # bursts overflow the queues on the way
    if rtt >= NEAR and options.congestion_control is None:
        with socket.socket() as fresh:
            _use_one_of(sock, congestion_control(fresh))


def congestion_control(sock: socket.socket) -> str:
    """The name of what the socket uses."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0").decode()


def path_silence(sockets: Iterable[socket.socket]) -> float:
    """Seconds since anything was acknowledged on any of a link's sockets, if it was asked for repeatedly; else 0.

    One socket of several may be silent for longer: where the path is full, all its packets may be crowded out by those
    of the others. A part of its time counts, since it may also be cut off alone.
    """
    found = []
    for sock in sockets:
        with contextlib.suppress(OSError):  # closed just now
            found.append(vitals(sock))
    waiting = [each.silent for each in found if each.unanswered >= 2]
    return max(min(each.silent for each in found), max(waiting) / _ALONE) if waiting else 0.0


def shut(sock: socket.socket) -> None:
    """Wake whoever blocks on this socket, from any thread. The descriptor stays open until its owner closes it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # never connected, or gone already: nobody blocks on it


def shut_writing(sock: socket.socket) -> None:
    """The other side reads to the end of what was sent."""
    with contextlib.suppress(OSError):  # gone already
        sock.shutdown(socket.SHUT_WR)


def send_all(sock: socket.socket, buffers: Sequence[bytes | memoryview], lease: Lease | None = None) -> None:
    """Send everything. A lease must have been acquired; it is released as soon as the memory is no longer read."""
    pending: list[bytes | memoryview] = [buffer for buffer in buffers if len(buffer)]
    try:
        while pending:
            if lease is not None and lease.revoked:
                pending = [b"".join(pending)]
                lease.release()
                lease = None
            try:
                skip(pending, sock.sendmsg(pending, [], socket.MSG_NOSIGNAL))
            except BlockingIOError:
                continue
    finally:
        if lease is not None:
            lease.release()


def skip(pending: list[bytes | memoryview], sent: int) -> None:
    """Take what has been sent off the front of a list of buffers."""
    while pending and sent >= len(pending[0]):
        sent -= len(pending.pop(0))
    if sent:
        pending[0] = memoryview(pending[0])[sent:]


def receive_into(sock: socket.socket, view: memoryview, lease: Lease | None = None) -> int:
    """Fill `view`, or stop early when the lease is revoked; returns the number of bytes that were read."""
    got = 0
    while got < len(view) and not (lease is not None and lease.revoked):
        try:
            count = sock.recv_into(view[got:] if got else view, 0, socket.MSG_WAITALL)
        except BlockingIOError:
            continue
        if not count:
            raise EndOfStream("the peer closed the connection")
        got += count
    return got


def remaining(deadline: float) -> float:
    """Seconds until a time.monotonic() deadline; TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return left

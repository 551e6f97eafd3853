"""Sockets that can be stopped: options, addresses, leases on memory, and whole-buffer sends and receives.

Data sockets are blocking with a kernel timeout of SLICE on each call. So a thread in send or receive comes back at
least that often, and can see that the memory it works on has been taken back (`Lease.revoke`). A sender then copies
the rest of its frame and goes on from the copy; a receiver sends the rest into scratch memory. The stream stays whole,
and the owner of the memory gets it back within about one SLICE, whatever the peer does.
"""

from __future__ import annotations

import errno
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

SLICE = 0.1
_TIMEVAL = struct.pack("ll", 0, int(SLICE * 1e6))


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkOptions:
    """How links are built. All members of a run must use the same chunk_bytes.

    stripes: TCP connections per link (what the dialler asks for holds). chunk_bytes: largest piece that travels alone,
    a multiple of 64. connect_timeout: seconds for a link to come up before the peer counts as unreachable.
    probe_timeout: seconds to look whether a peer's port still answers after its link failed.
    path_timeout: seconds without any acknowledgement, while data is being retransmitted, after which a path is cut.
    congestion_control: per socket, None for the system's; a name that the kernel lacks is a ValueError.
    send_buffer, receive_buffer: bytes, None for the kernel's own tuning. keepalive: idle seconds, interval, probes.
    checksum: xxh3 of every payload, made by the sender and verified by the receiver; headers always have one.
    shared_memory: payloads between peers on one host go through memory that both map, if both sides have this on.
    pool_bytes: early contributions kept per attempt before their turn. parked_links, parked_seconds: bounds on links
    from peers that this one has not been told of yet. half_open: connections that may be in their handshake at once.
    """

    stripes: int = 2
    chunk_bytes: int = 1 << 20
    connect_timeout: float = 5.0
    probe_timeout: float = 0.3
    path_timeout: float = 3.0
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
        if not 1 <= self.stripes <= 64:
            raise ValueError(f"stripes is {self.stripes}: choose 1 to 64")
        if self.chunk_bytes % 64 or not 64 <= self.chunk_bytes <= 16 << 20:
            raise ValueError(f"chunk_bytes is {self.chunk_bytes}: choose a multiple of 64 up to 16 MiB")
        if min(self.connect_timeout, self.probe_timeout, self.path_timeout, self.parked_seconds) <= 0:
            raise ValueError("timeouts of a link must be positive")
        if min(self.parked_links, self.half_open, self.servers) < 1 or self.pool_bytes < 0:
            raise ValueError("bounds of a group must be at least 1")


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


def listen_on(address: str) -> socket.socket:
    """A non-blocking listener; port 0 lets the kernel choose."""
    host, port = parse_address(address)
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
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
    """What must be set before connecting: buffers decide the window that is offered."""
    if options.send_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer)
    if options.receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.receive_buffer)
    if options.congestion_control is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, options.congestion_control.encode())


def tune_data(sock: socket.socket, options: LinkOptions) -> None:
    """Blocking with SLICE-long calls, no delay, dead paths noticed when idle."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle, interval, probes = options.keepalive
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL)


def path_silence(sock: socket.socket) -> float:
    """Seconds since the other side last acknowledged anything, if data is being retransmitted in vain; else 0."""
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    except OSError:
        return 0.0
    return int.from_bytes(info[56:60], "little") / 1000 if info[2] >= 3 else 0.0


def shut(sock: socket.socket) -> None:
    """Wake whoever blocks on this socket, from any thread. The descriptor stays open until its owner closes it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # never connected, or gone already: nobody blocks on it


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
                _skip(pending, sock.sendmsg(pending, [], socket.MSG_NOSIGNAL))
            except BlockingIOError:
                continue
    finally:
        if lease is not None:
            lease.release()


def _skip(pending: list[bytes | memoryview], sent: int) -> None:
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


def drain(sock: socket.socket, count: int, scratch: memoryview) -> None:
    """Read and forget so many bytes."""
    while count:
        count -= receive_into(sock, scratch[: min(count, len(scratch))])


def remaining(deadline: float) -> float:
    """Seconds until a time.monotonic() deadline; TimeoutError when it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("deadline passed")
    return left

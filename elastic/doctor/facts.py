"""What a doctor finds out, as plain values; what could not be found out is None, "" or missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

IDLE, RECEIVE, SEND = "net.ipv4.tcp_slow_start_after_idle", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem"
CONTROL, PROBING, BACKLOG = "net.ipv4.tcp_congestion_control", "net.ipv4.tcp_mtu_probing", "net.core.somaxconn"
AVAILABLE, RECEIVE_SET, SEND_SET = (
    "net.ipv4.tcp_available_congestion_control",
    "net.core.rmem_max",
    "net.core.wmem_max",
)
SYSCTLS = (IDLE, RECEIVE, SEND, CONTROL, AVAILABLE, PROBING, BACKLOG, RECEIVE_SET, SEND_SET)


def last_number(text: str) -> int:
    """Of a list as sysctl has it; 0 if there is none."""
    last = text.split()[-1:]
    return int(last[0]) if last and last[0].isdecimal() else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    name: str
    mtu: int = 0
    up: bool = False
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """synchronised: the kernel has been told so by whoever keeps its time. error: seconds, at the most."""

    synchronised: bool
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    folder: str
    free: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """packages: versions; "" for what is not installed. sysctl: as the kernel writes them. usable: the congestion
    controls that this process may choose. flaws: of ELASTIC_* variables, what is wrong with which. listen, advertise:
    of those that are set. pidfd, memfd: what a witness needs. gpus: None if nobody looked.
    """

    system: str
    python: str
    protocol: int
    packages: Mapping[str, str] = field(default_factory=dict)
    variables: tuple[str, ...] = ()
    flaws: Mapping[str, str] = field(default_factory=dict)
    listen: str | None = None
    advertise: str | None = None
    interfaces: tuple[Interface, ...] = ()
    sysctl: Mapping[str, str] = field(default_factory=dict)
    usable: tuple[str, ...] = ()
    open_files: int = 0
    shm_free: int | None = None
    disk: Disk | None = None
    clock: Clock | None = None
    pidfd: bool = False
    memfd: bool = False
    gpus: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """One address of a coordinator. found: what its name resolves to. local: of this machine, on the way there.

    looked_up, connected: seconds that it took; a connection takes one round trip. error: why it cannot be reached.
    """

    address: str
    found: tuple[str, ...] = ()
    looked_up: float = 0.0
    connected: float = 0.0
    local: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What came of asking a coordinator. silent: it did not answer. refused: what it said instead of an answer.

    answered: seconds until it did, its greeting included.
    """

    run: str
    addresses: tuple[Address, ...]
    silent: str = ""
    refused: str = ""
    answered: float = 0.0
    protocol: int = 0
    generation: int = 0
    members: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What two doctors tell each other of themselves. receive, send: the most bytes of a socket's buffer (the third
    number of net.ipv4.tcp_rmem and tcp_wmem). control: the system's congestion control."""

    version: str
    protocol: int
    control: str
    usable: tuple[str, ...]
    receive: int
    send: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """seconds: until the answer was here. sent (by the clock here), received, answered (by the clock there)."""

    seconds: float
    sent: float
    received: float
    answered: float

    @property
    def round_trip(self) -> float:
        return max(0.0, self.seconds - (self.answered - self.received))

    @property
    def offset(self) -> float:
        """Of the clock there against the one here, wrong by half the round trip at the most."""
        return ((self.received - self.sent) + (self.answered - self.sent - self.seconds)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Bulk data for some seconds. up: from here to there. control: of the sender's sockets; "" for the system's.

    rate: bytes/s that arrived in the second half. sent, resent: bytes. mtu: of the path, as the sender's kernel has it.
    """

    up: bool
    control: str
    connections: int
    rate: float
    sent: int = 0
    resent: int = 0
    mtu: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialled:
    """An address of this machine that the other one has dialled. evidence: why it is not reached; "" if it is."""

    address: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two machines. seen: this machine's address, as the other one sees it; local: as it sees itself.

    listening: what became of the port to be dialled: "" if it is open here, else why not; None: it is not wanted.
    promised: by which address this machine is dialled has been set already (ELASTIC_ADVERTISE).
    refused: measurements that could not be made, and why. broken: how the visit ended early, and `cut`: which direction
    is lost: "to", "from", or "" if that cannot be told.
    """

    address: str
    here: Side
    there: Side
    local: str
    seen: str
    pings: tuple[Ping, ...] = ()
    listening: str | None = None
    promised: bool = False
    dialled: tuple[Dialled, ...] = ()
    samples: tuple[Sample, ...] = ()
    refused: tuple[str, ...] = ()
    broken: str = ""
    cut: str = ""

"""Configuration: small frozen values that refuse what cannot work, and the environment variables that fill them.

Arguments win over the environment. An unknown `ELASTIC_*` variable is an error, since it is most often a typing
mistake in a known one.
"""

from __future__ import annotations

import difflib
import ipaddress
import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from .errors import ConfigurationError

ENVIRONMENT = {
    "ELASTIC_JOIN": "where the run is: elastic://HOST:PORT/RUN, or @FILE that holds it",
    "ELASTIC_RUN": "name of the run, when ELASTIC_JOIN does not say",
    "ELASTIC_NAME": "name of this peer",
    "ELASTIC_SITE": "name of the site that this peer belongs to",
    "ELASTIC_LISTEN": "HOST:PORT that the data listener binds; PORT 0 picks one",
    "ELASTIC_ADVERTISE": "HOST:PORT that other peers dial, when it differs from the listener's",
    "ELASTIC_STRIPES": "TCP connections per link",
    "ELASTIC_LANES": "of a peer of several ranks: 1 (each has links of its own to other peers) or 0 (the leader alone)",
    "ELASTIC_EVENTS_DIR": "folder for this peer's event log",
    "ELASTIC_RECORD": "of how many rounds the results are kept beside the event log, for elastic replay --verify",
    "ELASTIC_CHAOS": "folder from which this process takes orders for faults on purpose (elastic chaos)",
    "ELASTIC_WITNESS": "1 (a small process beside the peer tells if that ends or stands still) or 0 (there is none)",
}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Returns the ELASTIC_* variables that are set. Raises ConfigurationError for one that does not exist."""
    found = {key: value for key, value in environ.items() if key.startswith("ELASTIC_")}
    known = [key.removeprefix("ELASTIC_") for key in ENVIRONMENT]
    for key in sorted(found.keys() - ENVIRONMENT.keys()):
        near = difflib.get_close_matches(key.removeprefix("ELASTIC_"), known, n=1)
        hint = f"did you mean ELASTIC_{near[0]}?" if near else "known: " + ", ".join(sorted(ENVIRONMENT))
        raise ConfigurationError(f"unknown environment variable {key}: {hint}")
    return found


def switched(variable: str, env: Mapping[str, str]) -> bool:
    """Whether this variable is 1, which it is by default. Raises ConfigurationError unless it is 0 or 1."""
    wanted = env.get(variable, "1")
    if wanted not in ("0", "1"):
        raise ConfigurationError(f"{variable} is {wanted!r}: it must be 0 or 1")
    return wanted == "1"


def check_name(what: str, name: str) -> str:
    """Returns `name` if it can stand for a run, peer or site, else raises ConfigurationError."""
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{what} {name!r} is not a name: use 1 to 63 letters, digits, '.', '_' or '-', the first a letter or digit"
        )
    return name


def check_endpoint(what: str, text: str) -> tuple[str, int]:
    """Splits "HOST:PORT" ("[v6]:PORT" too). Raises ConfigurationError naming `what`."""
    try:
        parts = urlsplit(f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or port is None or parts.path:
        raise ConfigurationError(f"{what} {text!r} is not HOST:PORT, for example 0.0.0.0:29401")
    return host, port


def addresses(coordinator: str) -> list[str]:
    """Each address of a coordinator, as ZeroMQ wants it: tcp://HOST:PORT, several with commas between.

    Raises ConfigurationError.
    """
    return [_zmq_address(address.strip()) for address in coordinator.split(",")]


def check_coordinator(coordinator: str) -> str:
    """As `addresses`, in one string again."""
    return ",".join(addresses(coordinator))


def _zmq_address(address: str) -> str:
    if not address.startswith("tcp://"):
        raise ConfigurationError(f"coordinator address {address!r} must look like tcp://HOST:29400")
    host, port = check_endpoint("coordinator address", address.removeprefix("tcp://"))
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def endpoints(
    coordinator: str, listen: str | None, advertise: str | None, env: Mapping[str, str]
) -> tuple[str, str | None]:
    """Where a data plane listens, and what others dial if that differs. Raises ConfigurationError."""
    listen = env.get("ELASTIC_LISTEN", "127.0.0.1:0") if listen is None else listen
    advertise = advertise or env.get("ELASTIC_ADVERTISE")
    for what, named in (("listen", listen), ("advertise", advertise)):
        for endpoint in named.split(",") if named else ():
            check_endpoint(what, endpoint)
    _check_reachable(coordinator, (advertise or listen).split(",")[0])
    return listen, advertise


def _check_reachable(coordinator: str, advertised: str) -> None:
    """Peers of other machines cannot dial a loopback address; who joins from afar must say what they can dial."""
    hosts = [check_endpoint("coordinator", each.removeprefix("tcp://"))[0] for each in addresses(coordinator)]
    far = not all(map(is_loopback, hosts))
    if far and advertised and is_loopback(check_endpoint("listen", advertised)[0]):
        raise ConfigurationError(
            f"the coordinator is at {coordinator}, but other peers could not dial {advertised}: "
            "say listen='0.0.0.0:0' and advertise='ADDRESS-OF-THIS-MACHINE:0', or listen='' to dial out only"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine is reached there."""
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True)
class JoinToken:
    """Where a run is: what `elastic coordinator` prints and ELASTIC_JOIN holds.

    coordinator: tcp://HOST:PORT; several with commas between, where another host may take the run over.
    """

    coordinator: str
    run: str

    @classmethod
    def parse(cls, text: str) -> JoinToken:
        """Reads elastic://HOST:PORT/RUN (HOST:PORT,HOST:PORT/RUN), or @FILE that holds it. ConfigurationError else."""
        if text.startswith("@"):
            text = _read_token_file(text[1:])
        try:
            url = urlsplit(text.strip())
        except ValueError:  # e.g. an unfinished [v6] address
            url = urlsplit("")
        if url.scheme != "elastic" or not url.path.strip("/"):
            raise ConfigurationError("a join token looks like elastic://HOST:PORT/RUN; this one does not")
        hosts = ",".join(f"tcp://{host}" for host in url.netloc.split(","))
        return cls(check_coordinator(hosts), check_name("run", url.path.strip("/")))

    def __str__(self) -> str:
        return f"elastic://{self.coordinator.replace('tcp://', '')}/{self.run}"


def _read_token_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the join token in {path}: {error}") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for what, in seconds. Each is shorter than the next, so that the inner one fires first.

    heartbeat: how often a peer says that it lives.
    chunk: silence of a member (or of its path) after which a round goes on without it.
    operation: how long one attempt may take altogether.
    round: how long a caller waits for a round, and how long one with too few peers waits for more.

    grace: how long a round waits for the rest once a quorum has proposed.
    evict_after: silence after which a member that nobody proved dead loses its membership and its shards.
    hang: without an inner step, or without a byte of what is awaited, after which a living peer or a link is named.
    """

    heartbeat: float = 0.5
    chunk: float = 2.5
    operation: float = 300.0
    round: float = 1800.0
    grace: float = 5.0
    evict_after: float = 60.0
    hang: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigurationError(f"timeout {field.name} must be above 0 seconds")
        order = ("heartbeat", "chunk", "operation", "round")
        for low, high in itertools.pairwise(order):
            _check_order(self, low, high)
        _check_order(self, "chunk", "evict_after")


def _check_order(timeouts: Timeouts, low: str, high: str) -> None:
    if not getattr(timeouts, low) < getattr(timeouts, high):
        raise ConfigurationError(
            f"timeout {low} ({getattr(timeouts, low)} s) must be below {high} ({getattr(timeouts, high)} s)"
        )


ACTIONS = ("observe", "avoid", "leave out", "quarantine", "evict")
"""What may follow from a verdict, from the mildest on."""
_MOST = {"slow": "leave out", "straggler": "leave out", "hang": "leave out"}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPolicy:
    """What follows from a verdict of the detector: for each class, the furthest that may.

    observe: it is told, nothing else. avoid: links are planned as slow as they were found, and where only a ring was
    seen, other links are used until it is clear whose fault it is. leave out: rounds do not wait for the peer; of a bad
    gradient, nothing is taken of it. quarantine: it leaves the view, its shards go to others, and its name is refused
    for `quarantine_seconds`, twice as long with every time (`longest_seconds` at most); it comes back after a
    self-test, and is trusted again after as long without a verdict. Quarantine `strikes` + 1 does not end: evict.

    slow: of senders, receivers and links. straggler: slow steps. hang: in and outside communication; slow or stuck
    alone condemns nobody, so these go no further than "leave out": a life that hangs ends when it has been left out for
    `Timeouts.evict_after`, and its next one is welcome. gradient, corrupt (frames that two others could not read),
    drifted (three times within a minute), flapping: by peer.

    Nobody is set aside or removed if fewer than `RunPolicy.min_peers` would be left, nor more than `most_out` of all.
    After a removal, none follows for `calm_seconds`: what remains of the same fault must have cleared by then.
    confidence: below it, verdicts are only observed.
    """

    slow: str = "avoid"
    straggler: str = "leave out"
    hang: str = "leave out"
    gradient: str = "quarantine"
    corrupt: str = "quarantine"
    drifted: str = "quarantine"
    flapping: str = "quarantine"
    confidence: float = 0.5
    quarantine_seconds: float = 30.0
    longest_seconds: float = 3600.0
    strikes: int = 5
    calm_seconds: float = 10.0
    most_out: float = 0.5

    def __post_init__(self) -> None:
        for name in FAULT_CLASSES:
            _check_action(name, getattr(self, name))
        for name in ("quarantine_seconds", "longest_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("confidence", "most_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be from 0 to 1")
        if self.strikes < 0 or not self.calm_seconds >= 0:
            raise ConfigurationError("strikes and calm_seconds must be 0 or more")


FAULT_CLASSES = ("slow", "straggler", "hang", "gradient", "corrupt", "drifted", "flapping")


def _check_action(name: str, action: str) -> None:
    if action not in ACTIONS:
        raise ConfigurationError(f"{name} is {action!r}: it must be one of {', '.join(ACTIONS)}")
    most = _MOST.get(name, "evict")
    if ACTIONS.index(action) > ACTIONS.index(most):
        raise ConfigurationError(f"{name} is {action!r}: being slow or stuck alone condemns nobody; at most {most!r}")


TARGETS = ("rounds", "tokens", "seconds", "loss")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPolicy:
    """What a coordinator decides by.

    min_peers: rounds wait while fewer members are there.
    quorum: part of the members that must have proposed before a round opens; at least one more than
        half of them by default. 1.0 waits for all that are not silent.
    redundancy: how many peers read each shard. With 2, twins stand in for one another: a round waits for the faster
        one, and loses nothing with either. They count as one peer in quorum, as two in min_peers.
    max_attempts: an operation that failed this often is given up, and its callers see RoundAborted.
    rounds, tokens: the run is over once this many outer rounds or tokens are committed; 0 means no such target.
    seconds: or this time after the first outer loop began, while a coordinator served it; 0 means no such target.
    loss: or a peer reports a held-out loss of this or less (`peer.report(held_out_loss=...)`); 0 means no such target.
    faults: what follows from what the detector finds.
    """

    min_peers: int = 1
    quorum: float = 0.5
    redundancy: int = 1
    max_attempts: int = 16
    rounds: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0
    faults: FaultPolicy = FaultPolicy()

    def __post_init__(self) -> None:
        if self.min_peers < 1:
            raise ConfigurationError(f"min_peers is {self.min_peers}: a run needs at least 1 peer")
        if not 0 < self.quorum <= 1:
            raise ConfigurationError(f"quorum is {self.quorum}: it must be above 0 and at most 1")
        if self.redundancy < 1:
            raise ConfigurationError(f"redundancy is {self.redundancy}: each shard is read by 1 peer at least")
        if self.max_attempts < 1:
            raise ConfigurationError(f"max_attempts is {self.max_attempts}: it must be at least 1")
        for name in TARGETS:
            if not getattr(self, name) >= 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be 0 (no target) or more")

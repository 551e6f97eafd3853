"""One life of one peer inside a Ray: joins the run, and runs a training function as long as that takes."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ray
import torch.distributed as dist
from ray import cloudpickle
from torch._C._distributed_c10d import TCPStore

from elastic.config import Timeouts
from elastic.errors import ConfigurationError, ElasticError, Evicted, TransportError
from elastic.peer import Peer
from elastic.reports import Reported
from fault.inject import Injection, strike

from .local_ray import error_line
from .logs import KeptLog
from .rendezvous import Seat, gpus_of, meet, open_store, take_seat


@dataclass(frozen=True, kw_only=True)
class PeerSpec:
    """What a supervisor needs to start a life of a peer.

    script: Python file with the training function `function(peer, config)`; or pickled: that function itself, as
    cloudpickle's bytes, which only the peer's own process reads. fault: injected into the first life.
    listen: of its data plane; None: on the address that Ray has for its node.
    logs_dir: folder for what each life prints; by default `logs` in events_dir, and without either nothing is kept.
    storage_path: the run's folder, for the training function. ranks: processes that are this one peer, on one node.
    cpus, gpus, resources: what it takes of a node, all ranks together; labels: of the nodes that will do. spread:
    rather on a node of its own.
    """

    coordinator: str
    run: str
    name: str
    site: str
    script: str = ""
    function: str = "train"
    pickled: bytes = b""
    config: dict[str, Any] = field(default_factory=dict)
    stripes: int | str | None = None
    listen: str | None = "127.0.0.1:0"
    advertise: str | None = None
    timeouts: Timeouts = field(default_factory=Timeouts)
    events_dir: str | None = None
    logs_dir: str | None = None
    fault: Injection | None = None
    fault_log: str | None = None
    storage_path: str | None = None
    ranks: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    resources: dict[str, float] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    spread: bool = False

    def log(self, life: int) -> str | None:
        """The file for what this life prints. life: as its supervisor counts."""
        folder = self.logs_dir or (self.events_dir and str(Path(self.events_dir) / "logs"))
        return str(Path(folder) / f"{self.name}.{life}.log") if folder else None


@dataclass(frozen=True, kw_only=True)
class Process:
    """Where a life runs. node: as Ray knows it. pid: the leader's; pids: of all ranks.

    address: what Ray has for the node. expelled: why the run goes on without it, if it does. reported: for the run's
    history, what has not been heard yet.
    """

    node: str
    pid: int
    address: str = ""
    expelled: Evicted | None = None
    pids: tuple[int, ...] = ()
    reported: tuple[Reported, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Life:
    """Which life of a peer an actor holds, as the run counts."""

    name: str
    incarnation: int
    life: int


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a life that ran to its end leaves behind. pickled: what its training function returned, as cloudpickle's
    bytes: whoever wants it reads it, and the supervisor need not know its class."""

    pickled: bytes
    bytes_sent: int

    @property
    def result(self) -> Any:
        """What the training function returned."""
        return cloudpickle.loads(self.pickled)


@dataclass(frozen=True, kw_only=True)
class Raised:
    """How a training function has ended that raised something of its own.

    line: class and words, and of several ranks, which. pickled: the exception as cloudpickle's bytes, for a process
    that knows its class to read; empty if it cannot be pickled. retryable, retry_after: what it says of itself.
    """

    line: str
    traceback: str
    pickled: bytes = b""
    retryable: bool = False
    retry_after: float | None = None

    @classmethod
    def of(cls, error: BaseException, traceback: str, where: str = "") -> Raised:
        after = getattr(error, "retry_after", None)
        return cls(
            line=where + error_line(error),
            traceback=traceback,
            pickled=_pickled(error),
            retryable=bool(getattr(error, "retryable", False)),
            retry_after=float(after) if isinstance(after, (int, float)) and after >= 0 else None,
        )


class PeerHost:
    """First `join`, then `train`: they have a concurrency group of their own, so that `process` is answered meanwhile.

    That group is one thread: a peer of several ranks is used in no other than that which made it. log: file that keeps
    what this process prints. rank: which of the peer's processes this is.
    """

    def __init__(self, spec: PeerSpec, log: str | None = None, rank: int = 0) -> None:
        self._log = KeptLog(Path(log)) if log else None
        self._spec, self._rank = spec, rank
        self._store: TCPStore | None = None
        self._peer: Peer | None = None
        self._function: Callable[..., Any] | None = None

    @ray.method(concurrency_group="control")
    def process(self, heard: int = 0) -> Process:
        """heard: the number of the last entry for the run's history that has arrived."""
        return Process(
            node=ray.get_runtime_context().get_node_id(),
            pid=os.getpid(),
            address=own_address(),
            expelled=self._peer.expulsion if self._peer else None,
            reported=self._peer.reports.after(heard) if self._peer else (),
        )

    @ray.method(concurrency_group="control")
    def drain(self, seconds: float) -> None:
        """Asks the training to end: one last exchange within so many seconds, then the peer leaves."""
        if self._peer is not None:
            self._peer.drain(seconds)

    @ray.method(concurrency_group="train")
    def sit(self) -> Seat:
        """Of a peer of several ranks, before it joins: what this one tells the others."""
        gpus = gpus_of(os.environ) if self._spec.gpus else ()
        if self._rank:
            return Seat(gpus=gpus)
        self._store = open_store(self._spec.ranks)
        return Seat(port=self._store.port, gpus=gpus)

    @ray.method(concurrency_group="train")
    def join(self, *seats: Seat) -> Life:
        """Returns once the run has admitted this life; raises what `Peer` and `load` do. seats: of all ranks."""
        with self._last_words():
            group = self._prepare(seats)
            self._peer = peer = self._joined(self._spec, group)
            peer.storage_path = Path(self._spec.storage_path) if self._spec.storage_path else None
            return Life(name=peer.name, incarnation=peer.incarnation, life=peer.life)

    def _prepare(self, seats: tuple[Seat, ...]) -> dist.ProcessGroup | None:
        """Everything that can go wrong here before the run knows of it: the function is there, and the other ranks."""
        try:
            if seats:
                take_seat(self._rank, seats)
            self._function = load(self._spec)
            return meet(self._rank, seats, self._store) if seats else None
        except Exception as error:
            kind = type(error) if isinstance(error, ElasticError) else TransportError
            # what the script itself has said is to be near the end of the log
            raise kind(f"{self._who}: {error_line(error)}", peer=self._spec.name) from error.__cause__ or error

    @property
    def _who(self) -> str:
        return f"peer {self._spec.name}" + (f", rank {self._rank}" if self._spec.ranks > 1 else "")

    def _joined(self, spec: PeerSpec, group: dist.ProcessGroup | None) -> Peer:
        return Peer(
            spec.coordinator,
            run=spec.run,
            name=spec.name,
            site=spec.site,
            listen=spec.listen or f"{own_address()}:0",
            advertise=spec.advertise,
            stripes=spec.stripes,
            timeouts=spec.timeouts,
            events_dir=spec.events_dir,
            observe=_observer(spec),
            process_group=group,
        )

    @ray.method(concurrency_group="train")
    def train(self) -> Trained | Raised:
        """Runs the training function to its end and leaves the run. Raises this library's own errors only: any other
        is a `Raised`, for whoever asks may not know its class."""
        try:
            with self._last_words():
                return self._trained()
        except Exception as error:
            if type(error).__module__ == ElasticError.__module__:
                raise
            where = f"rank {self._rank}: " if self._spec.ranks > 1 else ""
            return Raised.of(error, "".join(traceback.format_exception(error)), where)

    def _trained(self) -> Trained:
        assert self._peer is not None and self._function is not None, "join first"
        with self._peer as peer:
            result = self._function(peer, self._spec.config)
            carried = peer.statistics().group
        pickled: bytes = cloudpickle.dumps(result)  # type: ignore[no-untyped-call]
        return Trained(pickled=pickled, bytes_sent=carried.bytes_sent + carried.bytes_served)

    @contextlib.contextmanager
    def _last_words(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            traceback.print_exc()
            raise
        finally:
            if self._log:
                self._log.flush()


_OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "concurrency_groups": {"train": 1, "control": 2},
}
PeerActor: Any = ray.remote(**_OPTIONS)(PeerHost)
"""`PeerHost` as a Ray actor. Ray restarts nothing: a supervisor starts the next life, under another name."""


def _observer(spec: PeerSpec) -> Callable[[Any], None] | None:
    if spec.fault is None or spec.fault_log is None:
        return None
    return strike(spec.fault, spec.name, Path(spec.fault_log))


def load(spec: PeerSpec) -> Callable[..., Any]:
    """The training function. Raises ConfigurationError, with the reason, if there is none."""
    if not spec.pickled:
        return load_function(Path(spec.script), spec.function)
    try:
        function: Callable[..., Any] = cloudpickle.loads(spec.pickled)
        return function
    except Exception as error:
        raise ConfigurationError(f"the training function cannot be loaded here: {error_line(error)}") from error


def load_function(script: Path, function: str) -> Callable[..., Any]:
    """Imports `script` as Python would run it, its own folder first on the path, and returns its function."""
    sys.path.insert(0, str(script.absolute().parent))
    try:
        module = importlib.import_module(script.stem)
    except Exception as error:
        raise ConfigurationError(f"script {script} cannot be loaded: {error_line(error)}") from error
    if not module.__file__ or not script.exists() or not script.samefile(module.__file__):
        raise ConfigurationError(f"script {script} has the name of a module that is loaded already: rename it")
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigurationError(f"script {script} has no function {function!r}: it needs one, of (peer, config)")
    return cast(Callable[..., Any], found)


def own_address() -> str:
    """What Ray has for this node."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _pickled(error: BaseException) -> bytes:
    try:
        data: bytes = cloudpickle.dumps(error)  # type: ignore[no-untyped-call]
        return data
    except Exception:  # it holds something that does not travel; its words do
        return b""

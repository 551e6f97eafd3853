"""`elastic.Trainer`: a run from its first peer to its result, on a Ray that is there or on one of its own.

    def train(peer, config):
        with elastic.DiLoCo(model, inner, peer, checkpoints=str(peer.storage_path / "checkpoints")):
            for batch in peer.shards(dataset, batch_size=config["batch_size"]):
                ...
                peer.report(loss=loss, metrics={"accuracy": accuracy})

    result = elastic.Trainer(
        train,
        config={"batch_size": 32},
        scaling_config=elastic.ScalingConfig(num_peers=(2, 8)),
        run_config=elastic.RunConfig(name="demo", storage_path="/shared/runs"),
    ).fit()

The driver only starts a run and watches it: a detached supervisor actor, named RUN.supervisor in the namespace
"elastic", makes the coordinator and the peers. All of ours is gone once `fit` has returned.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from elastic.errors import ConfigurationError, ElasticError, TrainingFailed

from .local_ray import NAMESPACE, error_line, local_ray, undisturbed
from .settings import FailureConfig, RunConfig, ScalingConfig

if TYPE_CHECKING:
    from .charge import ChargeReport
    from .run import Left, Outcome

LOOK_SECONDS = 0.25
STOP_SECONDS = 10.0
LATE_SECONDS = 15.0  # for a supervisor to end a run that drains, beyond the time that it was given


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run has come to.

    metrics: the newest entry of metrics_history, which holds all that peers have reported with
    `peer.report(metrics=...)`, in order: peer, life, round, step, loss, time_unix, metrics. checkpoint: the newest
    whole one in `path`/checkpoints. path: the run's folder. error: of the first peer that failed, if the run went on
    without it. peers: what became of each; `peers[0].trained.result` is what the function returned there.
    """

    metrics: dict[str, Any] | None
    metrics_history: list[dict[str, Any]]
    checkpoint: Path | None
    path: Path
    error: TrainingFailed | None
    peers: tuple[ChargeReport, ...]


class Trainer:
    """Trains with `train_fn(peer, config)` on as many peers as there is room for.

    train_fn: ordinary torch; it gets an `elastic.Peer` and `config`. Both travel to the peers as cloudpickle's bytes;
    what it returns, or raises, comes back in the same way.
    """

    def __init__(
        self,
        train_fn: Callable[[Any, Any], Any],
        *,
        config: Any = None,
        scaling_config: ScalingConfig | None = None,
        failure_config: FailureConfig | None = None,
        run_config: RunConfig | None = None,
    ) -> None:
        if not callable(train_fn):
            raise ConfigurationError(f"train_fn is {train_fn!r}: it must be a function of (peer, config)")
        self._train_fn, self._config = train_fn, {} if config is None else config
        self._scaling = scaling_config or ScalingConfig()
        self._failure = failure_config or FailureConfig()
        self._run = run_config or RunConfig()

    def fit(self) -> Result:
        """Runs to the end.

        Where: on the Ray that this process is connected to; else on that of RAY_ADDRESS, as inside `ray job submit`;
        else on a Ray of its own on this machine, which ends with this process (whatever is printed meanwhile is in
        ray.log, in the run's folder).

        If a run of this name is under way there, or has ended since its driver died, this attaches to it, whatever the
        arguments: a driver may die, and the run goes on. A run that was interrupted goes on from its newest checkpoint.

        A peer that dies, hangs or loses its node is started again, alone; the loss of a node does not count against
        `max_restarts`. There are more peers when nodes appear, and fewer when they go. Once the function of one peer
        has returned, no other peer begins.

        SIGINT and SIGTERM, if this is the main thread: every peer makes one last exchange and leaves, within
        `drain_seconds`; then raises KeyboardInterrupt, or SystemExit(143). A second SIGINT ends the run at once.

        Raises TrainingFailed if fewer peers than the run needs can go on, of the first that failed; NotEnoughPeers
        without room for so many; CoordinatorUnavailable; ConfigurationError.
        """
        pickled = _pickled(self._train_fn, self._config)
        with _connected(self._scaling, self._run.path), contextlib.closing(_Attached(self._run)) as attached:
            with _asked_to_end() as asked:
                attached.begin(lambda: self._orders(pickled))
                outcome = attached.to_the_end(asked)
            asked.obey()
            return _result(outcome, attached.left())

    def _orders(self, pickled: bytes) -> dict[str, Any]:
        """What a supervisor is made with."""
        from .coordinator import CoordinatorSpec
        from .folder import RunFolder
        from .run import FleetSpec
        from .supervisor import EventLogSpec

        run, fewest, folder = self._run, self._scaling.fewest, RunFolder(self._run.path)
        coordinator = CoordinatorSpec(
            run=run.name,
            bind=run.bind or "",
            policy=replace(run.policy, min_peers=max(run.policy.min_peers, fewest)),
            timeouts=run.timeouts,
            journal=folder.journal,
            events=folder.events / "coordinator.jsonl",
        )
        return {
            "specs": [self._spec(f"{run.site}-{i}", pickled, folder) for i in range(self._scaling.most)],
            "policy": self._failure,
            "events": EventLogSpec(run=run.name, path=folder.events / "supervisor.jsonl"),
            "fleet": FleetSpec(coordinator=coordinator, fewest=fewest, start_seconds=run.start_seconds, folder=folder),
        }

    def _spec(self, name: str, pickled: bytes, folder: Any) -> Any:
        from .peer import PeerSpec

        run, scaling = self._run, self._scaling
        return PeerSpec(
            coordinator="",
            run=run.name,
            name=name,
            site=run.site,
            pickled=pickled,
            stripes=run.stripes,
            timeouts=run.timeouts,
            events_dir=str(folder.events),
            logs_dir=str(folder.logs),
            storage_path=str(folder.path),
            ranks=scaling.ranks_per_peer,
            cpus=scaling.cpus_per_peer,
            gpus=scaling.gpus_per_peer,
            resources=dict(scaling.resources),
            labels=dict(scaling.labels),
            spread=scaling.placement == "spread",
        )


class _Attached:
    """The driver's hold on a run."""

    def __init__(self, run: RunConfig) -> None:
        self._run = run
        self._supervisor: Any = None  # nowhere else: Ray takes a name for taken as long as its creator holds a handle

    def begin(self, orders: Callable[[], dict[str, Any]]) -> None:
        """Starts the run, unless it is under way."""
        import ray

        name = f"{self._run.name}.supervisor"
        try:
            self._supervisor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            self._supervisor = self._made(name, orders())
        self._get("start")

    def _made(self, name: str, orders: dict[str, Any]) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from .supervisor import SiteSupervisor

        actor: Any = SiteSupervisor
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options = {"name": name, "namespace": NAMESPACE, "lifetime": "detached", "get_if_exists": True}
        return actor.options(scheduling_strategy=here, **options).remote(**orders)

    def to_the_end(self, asked: _Asked) -> Outcome:
        import ray

        ended, deadline = self._supervisor.ended.remote(), math.inf
        while not ray.wait([ended], timeout=LOOK_SECONDS)[0]:
            if asked.number and deadline == math.inf:
                self._get("drain", self._run.drain_seconds)
                deadline = time.monotonic() + self._run.drain_seconds + LATE_SECONDS
            if time.monotonic() > deadline:
                asked.obey()
        outcome: Outcome = self._value(ended)
        return outcome

    def left(self) -> Left:
        left: Left = self._get("left")
        return left

    def _get(self, method: str, *args: Any) -> Any:
        return self._value(getattr(self._supervisor, method).remote(*args))

    def _value(self, call: Any) -> Any:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return ray.get(call)
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, ElasticError) else error from None
        except RayActorError as error:
            reason = error_line(error)
            raise ElasticError(f"the supervisor of run {self._run.name!r} has ended, and its peers: {reason}") from None

    def close(self) -> None:
        """Ends whatever is left of the run."""
        import ray

        supervisor, self._supervisor = self._supervisor, None
        if supervisor is None:
            return
        with undisturbed():
            with contextlib.suppress(Exception):  # it may be dead, and its children with it
                ray.get(supervisor.stop.remote(), timeout=STOP_SECONDS)
            with contextlib.suppress(Exception):
                ray.kill(supervisor)


# --- where ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _connected(scaling: ScalingConfig, folder: Path) -> Iterator[None]:
    """This process is connected to a Ray."""
    import ray

    if ray.is_initialized():
        yield
    elif os.environ.get("RAY_ADDRESS"):
        _connect()
        try:
            yield
        finally:
            with undisturbed():
                ray.shutdown()
    else:
        folder.mkdir(parents=True, exist_ok=True)
        with local_ray(num_cpus=_room(scaling), log=folder / "ray.log"):
            yield


def _connect() -> None:
    import ray

    try:
        ray.init(namespace=NAMESPACE)
    except Exception as error:  # of many kinds: nobody there, another version, a token that is missing or wrong
        raise ConfigurationError(
            f"cannot connect to the Ray at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {error_line(error)}; is it "
            "running, and are RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH as there?"
        ) from error


def _room(scaling: ScalingConfig) -> int:
    """CPUs of a Ray of our own: this machine's, but enough for the fewest peers."""
    return max(os.cpu_count() or 1, math.ceil(scaling.fewest * scaling.cpus_per_peer))


# --- what -----------------------------------------------------------------------------------------------------------


def _pickled(train_fn: Callable[[Any, Any], Any], config: Any) -> bytes:
    from ray import cloudpickle

    def train(peer: Any, _: Any) -> Any:
        return train_fn(peer, config)

    try:
        data: bytes = cloudpickle.dumps(train)  # type: ignore[no-untyped-call]
        return data
    except Exception as error:  # whatever it holds may raise anything
        raise ConfigurationError(f"train_fn and config cannot be sent to peers: {error_line(error)}") from error


def _result(outcome: Outcome, left: Left) -> Result:
    """Raises what the run has failed of."""
    if outcome.trouble is not None:
        raise outcome.trouble
    reports = {report.name: report for report in outcome.peers}
    error = failure_of(reports[outcome.failed[0]]) if outcome.failed else None
    if outcome.lost and error is not None:
        raise error
    return Result(
        metrics=left.history[-1] if left.history else None,
        metrics_history=left.history,
        checkpoint=left.checkpoint,
        path=left.path,
        error=error,
        peers=outcome.peers,
    )


def failure_of(report: ChargeReport) -> TrainingFailed:
    """What a caller is told of a peer that has failed."""
    line, _, said = report.error.partition("\n")
    raised = report.raised
    words, trace = (raised.line, raised.traceback) if raised else (line, said)
    error = TrainingFailed(f"peer {report.name}: {words}", peer=report.name, traceback=trace.rstrip())
    if raised and raised.pickled:
        from ray import cloudpickle

        with contextlib.suppress(Exception):  # its class is not known here
            error.__cause__ = cloudpickle.loads(raised.pickled)
    return error


# --- until when -----------------------------------------------------------------------------------------------------


class _Asked:
    """Whether a signal has asked to end, and which."""

    number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    def obey(self) -> None:
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number:
            raise SystemExit(128 + self.number)


@contextlib.contextmanager
def _asked_to_end() -> Iterator[_Asked]:
    """SIGINT and SIGTERM only say so; where they can be heard at all."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = [(number, signal.signal(number, asked)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield asked
    finally:
        for number, handler in before:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

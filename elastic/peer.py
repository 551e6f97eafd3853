"""A member of a run: what a training script talks to.

    with elastic.Peer("tcp://host:29400", run="c4-1b", name="eu-1") as peer:
        result = peer.all_reduce(tensor, op="mean")

A peer owns one control connection, one `collectives.Group`, and its place in the data. All public calls may be made
from any thread; those that wait take a timeout in seconds and obey Ctrl-C.
"""

from __future__ import annotations

import dataclasses
import math
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from collectives import Group, GroupStatistics, LinkOptions, LinkStatistics
from collectives.records import Member, OperationRecord, Progress, Start
from fault.inject import Firing, Injector
from fault.orders import Station

from .chaos import asked_for, tainted, take_orders
from .config import (
    TARGETS,
    JoinToken,
    RunPolicy,
    Timeouts,
    check_coordinator,
    check_name,
    endpoints,
    environment,
    switched,
)
from .control import Control
from .data import Data, ShardSampler, layout_of
from .errors import (
    CheckpointMismatch,
    ConfigurationError,
    CoordinatorUnavailable,
    ElasticError,
    Evicted,
    NotEnoughPeers,
    Quarantined,
    RoundAborted,
)
from .events import INJECTED, EventLog
from .messages import (
    Applied,
    Base,
    Begin,
    Cancel,
    Commit,
    CommitNote,
    DoneReport,
    Drain,
    Expelled,
    FailedReport,
    Heartbeat,
    Join,
    Leases,
    Leave,
    LinkLost,
    LinkReport,
    Message,
    Open,
    OperationSpec,
    PeerStatus,
    Pong,
    Propose,
    Recompute,
    Refused,
    Represent,
    RoundFailed,
    RunProgress,
    SelfTest,
    SetTarget,
    Short,
    View,
    Welcome,
    Withdraw,
)
from .operations import ASK_AGAIN_SECONDS, Executor, Inbox, Operation, Outcome, Renewed, refusal, segment_of
from .ranks import ALONE, Alone
from .reports import Reports, plain
from .runstate import LINEAGE, RunState
from .telemetry import Telemetry, TelemetryStatistics
from .tensors import Reserve, Staged, Tensors, check_finite, check_weight, settle, spec_of, stage, wires_of
from .witness import Witness

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch.utils.data import Dataset

KEPT_NOTES = 256
MOST_UNDERWAY = 16  # attempts that a heartbeat tells of
SIGTERM_SECONDS = 25.0
GOOD_BYE_SECONDS = 1.0  # for the coordinator to hear that this peer leaves
OPS = ("sum", "mean", "min", "max")
REPORTED: dict[str, Callable[[Any], Any]] = {
    "state": str,
    "step": int,
    **dict.fromkeys(("loss", "held_out_loss", "tokens_per_second", "steps_per_second"), float),
}

Result = TypeVar("Result")
AnyGroup = TypeVar("AnyGroup", bound=Group)
Buffers = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class PeerView:
    """The membership as this peer last heard it. members are sorted by name."""

    epoch: int
    members: tuple[Member, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """What every collective says of itself.

    contributors: whose part is in the result, sorted by name. round: its number under the tag. attempts: how many it
    took. record: what the last of them cost on this peer.
    """

    contributors: tuple[str, ...]
    round: int
    attempts: int
    record: OperationRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduced(Finished):
    """Result of an all-reduce or a broadcast, of the dtype and on the device of the input.

    tensor: the shape of the input; of a list, all of it as one flat tensor. tensors: each in the shape of the input,
    as views of `tensor`.
    """

    tensor: torch.Tensor
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scattered(Finished):
    """Result of a reduce-scatter: this peer's segment, flat. start, stop: where in the flat whole it lies."""

    tensor: torch.Tensor
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gathered(Finished):
    """Result of an all-gather: tensors[i] is what contributors[i] gave."""

    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class PeerStatistics:
    """epoch, life, members: as last heard. rounds, tokens: committed by the run. coordinator_silence: seconds.
    telemetry: what it costs to know all this.
    """

    epoch: int
    life: int
    members: int
    rounds: int
    tokens: int
    operations_waiting: int
    coordinator_silence: float
    group: GroupStatistics
    telemetry: TelemetryStatistics


class Work(Generic[Result]):
    """A running collective. `wait` returns its result or raises what went wrong."""

    def __init__(
        self, call: Callable[[], Result], waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._waiting = waiting
        self._result: Result | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), name="elastic-work", daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Result]) -> None:
        try:
            self._result = call()
        except BaseException as error:
            self._error = error

    def wait(self, timeout: float | None = None) -> Result:
        """Raises TimeoutError if it still runs after `timeout` seconds; it goes on, and can be waited for again."""
        with self._waiting():
            self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"the operation is still running after {timeout} s")
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def done(self) -> bool:
        return not self._thread.is_alive()


@dataclass(slots=True)
class _Call:
    """One call of a collective. The room for its result is kept from one attempt to the next, if its length fits."""

    staged: Staged
    spec: OperationSpec
    weight: float
    tag: str
    timeout: float | None
    _room: torch.Tensor | None = None

    def room(self, elements: int, reserve: Reserve) -> torch.Tensor:
        if self._room is None or self._room.numel() != elements:
            self._room = None  # let go of it before there is another
            self._room = self.staged.buffer(elements, reserve)
        return self._room


class Peer:
    """Joins the run `run` at `coordinator` (tcp://HOST:PORT) as `name`, and returns once admitted.

    coordinator: several addresses, with commas between, are tried in turn when the one in use falls silent: another
    host can take the run over (`elastic coordinator --recover`).
    token: elastic://HOST:PORT/RUN or @FILE instead of coordinator and run; so is ELASTIC_JOIN.
    listen, advertise: HOST:PORT of the data listener, and what others dial if that differs; listen="" only dials out.
    Several interfaces: with commas between.
    stripes: TCP connections per link, or "auto" (the default). options: everything else about links (LinkOptions); the
    peers of a run need the same chunk_bytes. events_dir: folder for this peer's event log.
    observe: called with a `Progress` for each chunk received (fault injection, progress bars); must not block.
    sigterm_deadline: on SIGTERM, `drain` within so many seconds; 0, or a handler of the script's own, and nothing is
    done about it.
    process_group: of torch.distributed; its processes are this one peer, and all make it, at once (`RankedPeer` says
    what that means). Parameters may be replicated among them (DDP) or sharded (fully_shard, DTensor).
    lanes: whether each of those processes has links of its own to other peers (the default), or the leader alone.
    faults: what is to go wrong here on purpose (`fault.inject`), for tests and drills; of several processes, on the
    leader. With ELASTIC_CHAOS, whoever may write to that folder decides.
    witness: whether a small process beside this one tells the coordinator should this one end, or stand still (the
    default; see `witness`). If it cannot be started, the event `witness.failed` says why, and all else goes on.

    A name that is in use is taken over: the other life is expelled. Raises ConfigurationError, CoordinatorUnavailable
    (no answer within join_timeout seconds), VersionMismatch, Quarantined (the name is barred for `retry_after` s).
    If the coordinator dies later, nothing happens until it is back; if this peer is expelled, every waiting and later
    call raises Evicted, or Quarantined.
    """

    ranks: Alone = ALONE
    faults: Injector | None = None
    storage_path: Path | None = None  # of the run's folder, if a `Trainer` or a supervisor has made this peer

    def __new__(cls, *args: Any, process_group: dist.ProcessGroup | None = None, **options: Any) -> Peer:
        if cls is Peer and process_group is not None and process_group.size() > 1:
            from .ranked import RankedPeer

            cls = RankedPeer
        return super().__new__(cls)

    def __init__(
        self,
        coordinator: str | None = None,
        *,
        run: str | None = None,
        name: str | None = None,
        token: str | None = None,
        site: str | None = None,
        listen: str | None = None,
        advertise: str | None = None,
        stripes: int | str | None = None,
        options: LinkOptions | None = None,
        timeouts: Timeouts | None = None,
        events_dir: Path | str | None = None,
        observe: Callable[[Progress], None] | None = None,
        join_timeout: float = 30.0,
        sigterm_deadline: float = SIGTERM_SECONDS,
        process_group: dist.ProcessGroup | None = None,
        lanes: bool | None = None,
        faults: Injector | None = None,
        witness: bool | None = None,
    ) -> None:
        env = environment()
        witness = switched("ELASTIC_WITNESS", env) if witness is None else witness
        where = _where(coordinator, run, token, env)
        self.run = where.run
        self.name = check_name("peer", name or env.get("ELASTIC_NAME") or _own_name())
        self.site = check_name("site", site or env.get("ELASTIC_SITE") or "local")
        self.timeouts = timeouts or Timeouts()
        self.incarnation = secrets.randbits(63) | 1
        self.life = 0
        self._progress = RunProgress()
        self._status = PeerStatus()
        self.reports = Reports()
        self._changed = threading.Condition()
        self._members: dict[str, Member] = {}
        self._generation = self._generation_welcomed = self._epoch = 0
        self._fatal: ElasticError | None = None
        self._inboxes: dict[str, Inbox] = {}
        self.data = Data(self)
        self.telemetry = Telemetry()
        self._sequence = 0
        self._finished: dict[str, tuple[int, int]] = {}
        self.when_idle: list[Callable[[], None]] = []
        self.when_leaving: list[tuple[threading.Thread, Callable[[], None]]] = []
        self.recomputes: dict[str, Callable[[Recompute], None]] = {}
        self.run_state: RunState | None = None
        self._target: SetTarget | None = None
        self._drain_until: float | None = None
        self._sigterm: Any = None
        self._leaving = self._closed = False
        self._witness: Witness | None = None
        self._witness_lost = False
        self._notes: OrderedDict[str, CommitNote] = OrderedDict()
        self._held: dict[tuple[str, int], Applied] = {}
        self._testing, self._tested = False, dict[str, Any]()
        events_dir = events_dir or env.get("ELASTIC_EVENTS_DIR")
        self._events_dir = Path(events_dir) if events_dir else None
        self.events = self._event_log(events_dir, self.name)
        self._reserve = Reserve()
        self._station: Station | None = None
        self.faults = asked_for(env, faults, self.name)
        listen, advertise = endpoints(where.coordinator, listen, advertise, env)
        self.group = self._open_group(
            laned(lanes, env),
            where.coordinator,
            run=self.run,
            name=self.name,
            incarnation=self.incarnation,
            listen=listen,
            advertise=advertise,
            options=_link_options(options, stripes, env),
            observe=observe,
            on_lost=lambda failure: self.send(LinkLost(run=self.run, failure=failure)),
            faults=self.faults,
        )
        self._control = self._connect(where.coordinator)
        self._join(where.coordinator, join_timeout)
        self._take_faults(env)
        if witness:
            self._start_witness(where.coordinator)
        self._drain_on_sigterm(sigterm_deadline)

    def _take_faults(self, env: dict[str, str]) -> None:
        """From orders, if the environment says so; all that fire are events."""
        if self.faults is None:
            return
        self.faults.listen(self._struck)
        self.events.check = self.faults.check_disk
        try:
            self._station = take_orders(env, self.faults, name=self.name, run=self.run, incarnation=self.incarnation)
        except ConfigurationError:
            self.close()
            raise

    def _struck(self, firing: Firing) -> None:
        self.events.emit(INJECTED, **firing.told)

    def _open_group(self, lanes: bool, coordinator: str, **options: Any) -> Group:
        """lanes: whether the ranks of this peer have links, too."""
        return open_group(Group, **options)

    def _event_log(self, folder: Path | str | None, writer: str) -> EventLog:
        path = Path(folder) / f"{writer}.jsonl" if folder else None
        log = EventLog(path, run=self.run, peer=self.name, on_failure=self.telemetry.vitals.refused)
        if path:
            self.telemetry.vitals.writes(path.parent)
        return log

    def _start_witness(self, coordinator: str) -> None:
        """Without one, a death is found out by others, and of a silent peer nobody knows whether it stands still."""
        try:
            self._witness = Witness(coordinator, self.run, self.name, self.incarnation, self.timeouts.heartbeat)
            self.telemetry.activity.marked_in(self._witness.page)
        except (OSError, AttributeError, subprocess.SubprocessError) as error:  # a system without pidfd or memfd, too
            self.events.emit("witness.failed", reason=f"{type(error).__name__}: {error}")

    def _connect(self, coordinator: str) -> Control:
        return Control(
            coordinator,
            self.name,
            self.incarnation,
            heartbeat=self.timeouts.heartbeat,
            patience=2 * self.timeouts.chunk,
            on_message=self._receive,
            on_beat=self._beat,
            on_failure=lambda error: self._fail(ElasticError(f"the control thread failed: {error!r}", peer=self.name)),
        )

    # --- membership -------------------------------------------------------------------------------------------------

    @property
    def view(self) -> PeerView:
        with self._changed:
            return PeerView(self._epoch, tuple(self._members[name] for name in sorted(self._members)))

    @property
    def expulsion(self) -> Evicted | None:
        """Why the run goes on without this life, if it does: every call raises it, should the script make one."""
        expelled = isinstance(self._fatal, Evicted) and not (self._leaving or self._closed)
        return self._fatal if expelled else None  # type: ignore[return-value]

    def wait_for(self, n: int, timeout: float = 60.0) -> PeerView:
        """Returns the view once at least `n` peers are in it; raises NotEnoughPeers after `timeout` seconds."""
        self._wait(lambda: len(self._members) >= n, timeout, lambda: NotEnoughPeers(
            f"{len(self._members)} of {n} peers were there after {timeout:.0f} s", peer=self.name, epoch=self._epoch
        ))  # fmt: skip
        return self.view

    def leave(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """Leaves the run and closes; its shards go to others at once. Calling it again does nothing.

        With drain, the round in flight is finished first, within `timeout` seconds: an outer loop of this thread makes
        one last exchange and ends; one of another thread does so at its next step, since its data ends. Raises
        NotEnoughPeers if that takes longer, having left all the same. The same name can come back later.
        """
        try:
            if drain and self._fatal is None:
                self.drain(timeout)
                self._end_own_loops()
                self._wait(lambda: not self._inboxes, timeout, lambda: NotEnoughPeers(
                    f"operations still waiting after {timeout:.0f} s: {', '.join(self._inboxes)}", peer=self.name
                ))  # fmt: skip
        finally:
            if self._fatal is None:
                self._say_good_bye()
            self.close()

    def _say_good_bye(self) -> None:
        """The coordinator hears of it before the others find a closed port, which would be proof of a death."""
        self._leaving = True
        self.send(Leave(run=self.run))
        with self._changed:
            self._changed.wait_for(lambda: self._fatal is not None, GOOD_BYE_SECONDS)

    def drain(self, timeout: float = 30.0) -> None:
        """Asks the training loop to end: its data ends, and the outer loop makes one last exchange on its way out.

        Returns at once. What has been learned by then is given to the others in a round that opens at once; if it is
        not committed within `timeout` seconds, the peer leaves without, and its samples are read by others. The
        coordinator may ask for it, too (`elastic leave`).
        """
        with self._changed:
            if self._drain_until is None:
                self._drain_until = time.monotonic() + timeout
                self.events.emit("peer.draining", timeout=timeout)
            self._changed.notify_all()

    @property
    def draining(self) -> bool:
        return self._drain_until is not None

    @property
    def stopping(self) -> bool:
        """Whether the training loop should end: the run has reached its target, or this peer drains."""
        return self.ending

    @property
    def over(self) -> bool:
        """Whether the run has reached its target, as of now."""
        return self._progress.finished

    @property
    def ending(self) -> bool:
        """`stopping` as of now; to the script of several ranks it changes between two calls, on all ranks at once."""
        return self.over or self.draining

    @property
    def progress(self) -> RunProgress:
        """How far the run is, as the coordinator last said."""
        return self._progress

    def patience(self, timeout: float | None) -> float:
        """Seconds to wait for a round: `timeout`, by default `timeouts.round`; less while this peer drains."""
        return max(0.1, min(timeout or self.timeouts.round, self.drain_left()))

    def drain_left(self) -> float:
        """Seconds until this peer leaves, should it drain."""
        return math.inf if self._drain_until is None else self._drain_until - time.monotonic()

    def run_until(self, *, rounds: int = 0, tokens: int = 0, seconds: float = 0.0, loss: float = 0.0) -> None:
        """Sets the run's targets: it is over at this many outer rounds or tokens, this time, or this held-out loss.

        0 leaves a target as it is; targets hold for all peers, and outlive the coordinator. Returns once the
        coordinator has taken them; raises CoordinatorUnavailable if it does not answer, ConfigurationError for a value
        below 0.
        """
        RunPolicy(rounds=rounds, tokens=tokens, seconds=seconds, loss=loss)
        self._target = SetTarget(run=self.run, rounds=rounds, tokens=tokens, seconds=float(seconds), loss=float(loss))
        self.send(self._target)
        self._wait(lambda: self._target is None, self.timeouts.chunk * 10, lambda: CoordinatorUnavailable(
            "the coordinator has not taken the run's targets", peer=self.name
        ))  # fmt: skip

    def _end_own_loops(self) -> None:
        for thread, end in list(self.when_leaving):
            if thread is threading.current_thread():
                end()

    def _drain_on_sigterm(self, deadline: float) -> None:
        """Only the main thread may set a handler; one that is there already is left alone."""
        main = threading.current_thread() is threading.main_thread()
        if deadline > 0 and main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._sigterm = lambda *_: self._told_to_end(deadline)
            signal.signal(signal.SIGTERM, self._sigterm)

    def _told_to_end(self, deadline: float) -> None:
        if self._fatal is not None:  # closed, by another thread: nothing of this peer stands in the way any more
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.draining:
            return
        self.drain(deadline)
        timer = threading.Timer(deadline, self._end_now)
        timer.daemon = True
        timer.start()

    def _end_now(self) -> None:
        """The deadline of SIGTERM is over: the others are told, and the process ends."""
        if self._fatal is None:
            self.send(Leave(run=self.run, reason="ended by SIGTERM"))
            self.close()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + signal.SIGTERM)

    def close(self) -> None:
        """Closes every socket and thread at once, without leaving: to the others this peer falls silent."""
        self._undo_sigterm()
        self._closed = True
        if self._witness is not None:
            self._witness.close()
        self._fail(Evicted("this Peer is closed", peer=self.name))
        if self._station is not None:
            self._station.close()
        self._control.close()
        self.group.close()
        self.events.close()
        self._reserve.clear()

    def _undo_sigterm(self) -> None:
        if self._sigterm and threading.current_thread() is threading.main_thread():
            if signal.getsignal(signal.SIGTERM) is self._sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._sigterm = None

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(drain=kind is None)

    def statistics(self) -> PeerStatistics:
        """What this peer knows and carries, as of now."""
        return PeerStatistics(
            epoch=self._epoch,
            life=self.life,
            members=len(self._members),
            rounds=self._progress.rounds,
            tokens=self._progress.tokens,
            operations_waiting=len(self._inboxes),
            coordinator_silence=self.silent_for(),
            group=self.group.statistics(),
            telemetry=self._telemetry_statistics(),
        )

    def _telemetry_statistics(self) -> TelemetryStatistics:
        control = self._control
        return dataclasses.replace(
            self.telemetry.statistics(),
            beats=control.beats,
            beat_bytes=control.beat_bytes,
            beat_seconds=control.beat_seconds,
            witness_seconds=self._witness.seconds if self._witness is not None else 0.0,
        )

    def not_training(self) -> AbstractContextManager[None]:
        """What this thread does within the context is no inner step, however long it takes: nobody takes it for a hang.

        An outer loop says so itself of its rounds and of `evaluating()`; for instance for a long validation of yours.
        """
        return self.telemetry.activity.waiting()

    def report(self, *, metrics: Mapping[str, Any] | None = None, **status: Any) -> None:
        """Sets fields of the status that rides on heartbeats: state, step, loss, held_out_loss, tokens_per_second,
        steps_per_second (an outer loop reports that itself).

        held_out_loss: of the outer parameters (`outer.evaluating()`); a run may have a target for it. Numbers may be of
        any kind that float() takes, tensors of one element too. An unknown field, or a value of another kind, is a
        ConfigurationError.
        metrics: numbers of your own by name, which become one entry of the run's history where a `Trainer` runs this
        peer (`Result.metrics_history`), with the step, the loss and the round that it is at.
        """
        try:
            known = {name: REPORTED[name](value) for name, value in status.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigurationError(f"cannot report {status}: {error!r}; known are {', '.join(REPORTED)}") from None
        entry = None if metrics is None else plain(metrics)
        self._status = now = dataclasses.replace(self._status, **known)
        if entry is not None:
            where = {"round": self.progress.rounds, "step": now.step, "loss": now.loss}
            self.reports.add(time_unix=time.time(), metrics=entry, **where)

    # --- collectives ------------------------------------------------------------------------------------------------

    def all_reduce(
        self,
        tensor: Tensors,
        *,
        op: str = "sum",
        wire: str | None = None,
        gather_wire: str | None = None,
        weight: float = 1.0,
        tag: str = "default",
        timeout: float | None = None,
    ) -> Reduced:
        """Reduces `tensor` over the peers that call it under the same tag; the result is the same bytes on all of them.

        tensor: any shape, contiguous or not, on the CPU or a CUDA device; float32, float64, bfloat16, float16, int8,
        uint8, int16, int32, int64. A list of tensors of one dtype goes as one operation.
        op: "sum", "mean" (weighted by `weight`, floating point only), "min", "max". Sums of integers wrap around.
        wire: how numbers travel; float32 and halves take "f32", "bf16", "f16", "int8", "int4", "e3m0" (by default the
        tensor's own width), all else travels as it is. Halves are summed in float32 and rounded once.
        gather_wire: how results travel back; by default as `wire`, but "int8" after "int4" and "e3m0". Results of lossy
        wires are rounded; the same on all peers. If no peer can reach all others, they travel as f32 for once.
        timeout: seconds to wait for the result, by default `timeouts.round`.

        Numbers are added in the order of the peers' names; on rings and trees, along those. A peer that dies meanwhile
        is left out: `contributors` says whose numbers are in the result. Members that do not call are waited for
        `timeouts.grace` seconds once a quorum has called, and then left out. Memory: one result; no copy of a
        contiguous CPU tensor, one copy of anything else.

        Raises ConfigurationError (an argument cannot be; NaN or infinity for a quantised wire), RoundAborted (the round
        ended without this peer), ParityError (another shape, dtype, op or wire under this tag), CollectiveError,
        NotEnoughPeers, CoordinatorUnavailable, Evicted; `tensor` is untouched in any case.
        """
        call = self._reduction("all_reduce", tensor, op, wire, gather_wire, weight, tag, timeout)
        return self._all_reduce(call, call.staged.flat)

    def all_reduce_async(
        self,
        tensor: Tensors,
        *,
        op: str = "sum",
        wire: str | None = None,
        gather_wire: str | None = None,
        weight: float = 1.0,
        tag: str = "default",
        timeout: float | None = None,
        donate: bool = False,
    ) -> Work[Reduced]:
        """As `all_reduce`, in the background. A snapshot is taken first unless `donate`: then leave `tensor` alone."""
        call = self._reduction("all_reduce", tensor, op, wire, gather_wire, weight, tag, timeout)
        source = call.staged.flat if donate else call.staged.snapshot()

        def reduce() -> Reduced:
            reduced = self._all_reduce(call, source)
            settle(call.staged.device)
            return reduced

        return Work(reduce, self.telemetry.activity.waiting)

    def reduce_scatter(
        self,
        tensor: Tensors,
        *,
        op: str = "sum",
        wire: str | None = None,
        weight: float = 1.0,
        tag: str = "default",
        timeout: float | None = None,
    ) -> Scattered:
        """Reduces as `all_reduce` does, and gives each contributor one segment of the flat result.

        op: "sum" or "mean". The segments follow the order of the contributors' names and differ in length by one at the
        most; who is lost has none, so the bounds are known only afterwards: `start`, `stop`. Nobody holds the whole:
        after a commit, the segment of a peer that died is gone with it. Errors: as for `all_reduce`.
        """
        if op not in ("sum", "mean"):
            raise ConfigurationError(f"op {op!r} is not one of sum, mean, the operations of a reduce-scatter")
        call = self._reduction("reduce_scatter", tensor, op, wire, None, weight, tag, timeout)

        def buffers(begin: Begin) -> Buffers:
            low, high = segment_of(begin, self.name)
            whole = begin.start.op != "reduce_scatter"
            return call.staged.flat, call.room(begin.start.elements if whole else high - low, self._reserve)

        finished, begin, flat = self._collect(call, buffers)
        low, high = segment_of(begin, self.name)
        flat = flat[low:high] if begin.start.op != "reduce_scatter" else flat
        return Scattered(**finished, tensor=call.staged.like(flat), start=low, stop=high)

    def broadcast(self, tensor: Tensors, *, root: str, tag: str = "default", timeout: float | None = None) -> Reduced:
        """The tensor of peer `root`, bit for bit, on every peer that calls this under the same tag.

        tensor: as for `all_reduce`, bool too; on the others it only says shape and dtype, which must be the root's.
        If the root does not call, leaves or dies before all others have its tensor, everybody sees RoundAborted: there
        is nobody to take its place. Other errors: as for `all_reduce`.
        """
        staged = stage(tensor, reduced=False)
        spec = spec_of("broadcast", "broadcast", staged, "raw", root=check_name("root", root))
        return self._all_reduce(_Call(staged, spec, 1.0, tag, timeout), staged.flat)

    def all_gather(self, tensor: torch.Tensor, *, tag: str = "default", timeout: float | None = None) -> Gathered:
        """The tensors of all peers that call this under the same tag, bit for bit, on each of them.

        tensor: as for `broadcast`; its first dimension may differ from peer to peer. Who dies meanwhile is left out.
        Errors: as for `all_reduce`.
        """
        staged = stage(tensor, reduced=False)
        trailing = tuple(tensor.shape[1:])
        spec = spec_of("all_gather", "all_gather", staged, "raw", shape=f"{tensor.dim()}-d, rows {trailing}")
        call = _Call(staged, spec, 1.0, tag, timeout)

        def buffers(begin: Begin) -> Buffers:
            whole = call.room(begin.start.elements, self._reserve)
            if begin.start.op == "all_gather":
                return staged.flat, whole
            low, high = segment_of(begin, self.name)
            among_zeros = torch.zeros_like(whole)
            among_zeros[low:high] = staged.flat
            return among_zeros, whole

        finished, begin, flat = self._collect(call, buffers)
        parts = torch.split(staged.like(flat), list(begin.segments))
        return Gathered(**finished, tensors=tuple(_rows(part, tensor.dim(), trailing) for part in parts))

    def barrier(self, *, tag: str = "default", timeout: float | None = None) -> Finished:
        """Returns when every member has called this under the same tag, or is left out as in `all_reduce`.

        `contributors` says who met. Errors: as for `all_reduce`.
        """
        call = self._reduction("barrier", torch.empty(0), "sum", None, None, 1.0, tag, timeout)
        finished, _, _ = self._collect(call, lambda _: (call.staged.flat, call.room(0, self._reserve)))
        return Finished(**finished)

    def _reduction(
        self,
        algorithm: str,
        tensor: Tensors,
        op: str,
        wire: str | None,
        gather_wire: str | None,
        weight: float,
        tag: str,
        timeout: float | None,
    ) -> _Call:
        if op not in OPS:
            raise ConfigurationError(f"op {op!r} is not one of {', '.join(OPS)}")
        staged = stage(tensor, reduced=True)
        weight = check_weight(op, weight, staged.dtype)
        wire, gather_wire = wires_of(staged, wire, gather_wire)
        check_finite(staged.flat, wire, self.name)
        return _Call(staged, spec_of(algorithm, op, staged, wire, gather_wire=gather_wire), weight, tag, timeout)

    def _all_reduce(self, call: _Call, source: torch.Tensor) -> Reduced:
        source = tainted(self.faults, source)

        def buffers(begin: Begin) -> Buffers:
            return source, call.room(begin.start.elements, self._reserve)

        finished, _, flat = self._collect(call, buffers)
        flat = call.staged.like(flat)
        tensors = call.staged.pieces(flat)
        return Reduced(**finished, tensor=tensors[0] if call.staged.single else flat, tensors=tensors)

    def _collect(self, call: _Call, buffers: Callable[[Begin], Buffers]) -> tuple[dict[str, Any], Begin, torch.Tensor]:
        """One operation from the proposal to its commit: the fields of `Finished`, the last orders, the flat result."""
        if self.faults is not None:
            self.faults.entered()
        with self.inbox(call.tag) as inbox, self.telemetry.activity.waiting():
            proposal = self.proposal(call.tag, call.spec, weight=call.weight)
            outcome = self.operation(proposal, buffers, inbox).run(call.timeout or self.timeouts.round)
        commit = self._settle(call.tag, outcome)
        assert outcome.begin is not None and outcome.result is not None, "what is counted has a result"
        finished = {
            "contributors": commit.contributors,
            "round": commit.round,
            "attempts": outcome.attempts,
            "record": outcome.record,
        }
        return finished, outcome.begin, outcome.result

    def _settle(self, tag: str, outcome: Outcome) -> Commit:
        commit = outcome.commit
        assert commit is not None, "a plain operation has no base"
        self.finish(tag, commit.round)
        self._take_note(commit)
        if not outcome.counted:
            names = ", ".join(commit.contributors) or "nobody"
            reason = f"{tag}: round {commit.round} went on without this peer; in it were: {names}"
            raise RoundAborted(reason, peer=self.name, round=commit.round, epoch=commit.epoch)
        return commit

    def _take_note(self, commit: Commit) -> None:
        """For the coordinator's next life: without it, that would number a round again that is over for this peer."""
        note = CommitNote(
            tag=commit.tag,
            round=commit.round,
            attempt=commit.attempt,
            digest=commit.digest,
            contributors=commit.contributors,
        )
        with self._changed:
            self._notes[commit.tag] = note
            self._notes.move_to_end(commit.tag)
            while len(self._notes) > KEPT_NOTES:
                self._notes.popitem(last=False)

    # --- data -------------------------------------------------------------------------------------------------------

    def shards(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        shard_size: int | None = None,
        seed: int = 0,
        epochs: int = 0,
    ) -> Iterator[Any]:
        """Batches of `dataset` from the shards that this peer holds; an optimizer step counts all that was handed out.

        dataset: map-style, equal on all peers; its order is a permutation of each epoch, by `seed`. Or iterable: then
        the stream must be the same on all peers, in each epoch, and is cut into shards as it comes; a peer reads over
        what others hold, so reading must be cheap against training. `set_epoch(e)` is called if it has that, and
        `skip(n)` is used to go back. shard_size: samples per shard; by default 16 batches. epochs: passes over the
        data, 0: without end. Batches are collated as torch's DataLoader would; `dataset.tokens_per_sample` (by default
        1) gives the weight of a sample. With several ranks, batch_size is that of each of them; where samples are fewer
        than ranks, some train on the same one, which counts once.

        A sample is read by one peer; its cursor is committed with the round that its step contributes to. Ends when
        the run has reached its target or the data is spent. Within an outer loop, spent means committed: a peer that
        finds no shard left gives what it has learned, follows the others' rounds, and takes over what a peer that is
        lost has not committed; but it ends at once while something that it handed out is not stepped. If this peer is
        lost, its next life, or others after `timeouts.evict_after`, go on from the committed cursors.

        Raises ConfigurationError (arguments; other data than before on this peer), ParityError (other data than the
        run's), CoordinatorUnavailable, Evicted.
        """
        layout = layout_of(dataset, batch_size * self.ranks.size, shard_size, seed)
        self.data.open(dataset, layout, epochs)
        return (self.data.streamed if layout.stream else self.data.collated)(dataset, batch_size)

    def sampler(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shard_size: int | None = None,
        seed: int = 0,
        epochs: int = 0,
        batches_per_step: int = 1,
    ) -> ShardSampler:
        """`shards` for a DataLoader with workers: `DataLoader(dataset, batch_sampler=peer.sampler(dataset, 32), ...)`.

        dataset: map-style. Batches arrive in the order in which the sampler gave them out (leave `in_order` as it is);
        each optimizer step counts the oldest `batches_per_step` of them. So the cursor is the last batch *stepped*,
        however far the DataLoader has run ahead. What it had prefetched when the peer had to go back to the committed
        positions still arrives and counts; the peer contributes again once there is no gap before it.

        A pass over the loader ends when the run is over, or when no shard is to be had and all that was handed out has
        been delivered. The next pass waits until a shard that somebody lost comes free, or the run is over; so go on to
        the end of the data with

            while not peer.progress.finished:
                for batch in loader: ...

        Step at the end of a pass, too, if `batches_per_step` batches did not come together. What was handed out in a
        pass that is broken off and not stepped is handed out again in the next. One pass at a time: a second one, begun
        meanwhile, ends the first with ConfigurationError. Other arguments, errors, and what holds when this peer is
        lost: as for `shards`. The sampler has `state_dict()` and `load_state_dict()`.
        """
        layout = layout_of(dataset, batch_size * self.ranks.size, shard_size, seed)
        if layout.stream:
            raise ConfigurationError("a stream has no indices to sample: use peer.shards(dataset, batch_size=...)")
        if batches_per_step < 1:
            raise ConfigurationError(f"batches_per_step is {batches_per_step}: it must be at least 1")
        self.data.open(dataset, layout, epochs)
        return ShardSampler(self.data, batch_size, batches_per_step)

    def stepped(self) -> float:
        """Called after each inner step: counts the batches behind it. Returns the tokens that this adds."""
        return self.data.stepped()

    @property
    def whole(self) -> bool:
        """Whether what was stepped reaches from the committed positions to the cursors without a gap: else, propose
        nothing."""
        return self.data.whole

    @property
    def spoiled(self) -> bool:
        """Whether what was stepped holds samples that are not this peer's to count: start over, and `rewind`."""
        return self.data.spoiled

    @property
    def cursors(self) -> dict[int, int]:
        """For each shard held, how many of its samples have been stepped (if `whole`)."""
        return self.data.cursors

    @property
    def starts(self) -> dict[int, int]:
        """For each shard held, how many of its samples the run has committed."""
        return self.data.starts

    def committed(self, cursors: dict[int, int]) -> None:
        """The run has committed these positions."""
        self.data.committed(cursors)

    def rewind(self) -> None:
        """Goes back to the committed positions: what was stepped since is handed out again."""
        self.data.rewind()

    def pause(self) -> None:
        """Waits until something changes in the run, or a moment."""
        with self._changed, self.telemetry.activity.waiting(whoever=True):
            self._check()
            self._changed.wait(min(self.timeouts.heartbeat, ASK_AGAIN_SECONDS))

    # --- for outer loops --------------------------------------------------------------------------------------------

    def proposal(self, tag: str, spec: OperationSpec, *, weight: float, **fields: Any) -> Propose:
        """A proposal with the next sequence number; cursors only where the run accounts for them."""
        with self._changed:
            self._sequence += 1
            sequence = self._sequence
        fields.setdefault("cursors", {})
        return Propose(
            run=self.run, incarnation=self.incarnation, tag=tag, sequence=sequence, weight=weight, spec=spec, **fields
        )

    def operation(
        self, proposal: Propose, buffers: Callable[[Begin], Buffers], inbox: Inbox, group: Executor | None = None
    ) -> Operation:
        """One proposal on its way to a commit; see `Operation`. group: what executes attempts, by default its own."""
        return Operation(
            proposal,
            buffers,
            name=self.name,
            inbox=inbox,
            group=self.group if group is None else group,
            send=self.send,
            finished=self._finished.get(proposal.tag, (0, -1)),
            silent_for=self.silent_for,
            operated=self.telemetry.operated,
            exchanging=self.telemetry.activity.exchanging,
        )

    def inbox(self, tag: str) -> _OpenInbox:
        """Opens the inbox of a tag, for as long as the context lasts. One at a time, or ConfigurationError."""
        return _OpenInbox(self, tag)

    def ask(self, request: Message, inbox: Inbox, answer: type[Message], timeout: float) -> Message:
        """Sends `request` until a message of the kind `answer` comes; raises what the coordinator refuses with."""
        with self.telemetry.activity.waiting(whoever=True):
            return self._ask(request, inbox, answer, timeout)

    def _ask(self, request: Message, inbox: Inbox, answer: type[Message], timeout: float) -> Message:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._check()
            self.send(request)
            patience = min(ASK_AGAIN_SECONDS, max(0.001, deadline - time.monotonic()))
            message = _next_of(inbox, answer, getattr(request, "sequence", 0), patience)
            if isinstance(message, answer):
                return message
            if isinstance(message, Refused):
                raise refusal(message, self.name)
            if isinstance(message, ElasticError):
                raise message
        raise CoordinatorUnavailable(f"no answer to {type(request).__name__} within {timeout:.0f} s", peer=self.name)

    def hold(self, applied: Applied) -> None:
        """Tells the coordinator which version this peer holds; told again to each new generation."""
        with self._changed:  # in order: what is told again must not come behind what has taken its place
            self._held[applied.tag, applied.fragment] = applied
            self.send(applied)

    def send(self, message: Message) -> None:
        """Sends with the current generation; reports about an attempt keep the one that the attempt was started in."""
        fields: dict[str, Any] = {"incarnation": self.incarnation, "epoch": self._epoch}
        if not isinstance(message, (DoneReport, FailedReport)):
            fields["generation"] = self._generation
        self._control.send(dataclasses.replace(message, **fields))

    def decline(self, start: Start) -> None:
        """Takes back the proposal that this attempt takes: its caller waits no longer."""
        self.send(Withdraw(run=self.run, tag=start.tag, sequence=start.sequence_of(self.name)))

    def finish(self, tag: str, round: int) -> None:
        """Messages about this round of the tag, or earlier ones, are old news from now on."""
        self._finished[tag] = max(self._finished.get(tag, (0, -1)), (self.lineage, round))

    @property
    def lineage(self) -> int:
        """Changes when a run whose journal was lost is brought together again: numbers begin lower then."""
        return self._generation // LINEAGE

    def see_off(self, timeout: float) -> None:
        """Stays until no member of the finished run needs the state that this peer holds; `timeout` at the most."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while self._fatal is None and self.over and self._progress.behind:
                if not self._changed.wait(deadline - time.monotonic()):
                    return

    def silent_for(self) -> float:
        """Seconds since the coordinator was last heard."""
        return time.monotonic() - self._control.heard_at

    # --- messages, on the control thread ----------------------------------------------------------------------------

    def _beat(self) -> Message | None:
        in_time = self.telemetry.activity.beat(self.timeouts.chunk)
        self._look_at_witness()
        if self._fatal is not None:
            return None
        if not self._generation or self.life == 0:
            return self._join_message()
        carried = self.group.statistics()
        status = dataclasses.replace(
            self._status,
            bytes_sent=carried.bytes_sent + carried.bytes_served,
            bytes_received=carried.bytes_received,
            links=tuple(_measured(link) for link in carried.links if link.state == "up"),
            trainer=self.telemetry.activity.trainer(),
            exchanged=self.telemetry.exchanged,
            health=self.telemetry.vitals.look(),
        )
        return Heartbeat(
            run=self.run,
            generation=self._generation,
            incarnation=self.incarnation,
            epoch=self._epoch,
            status=status,
            underway=self.group.underway()[:MOST_UNDERWAY] if in_time else (),
            **self.telemetry.take(),
        )

    def _look_at_witness(self) -> None:
        if self._witness is not None and self._fatal is None and self._witness.ended and not self._witness_lost:
            self._witness_lost = True
            self.events.emit("witness.lost", reason="its process has ended; this peer goes on without")

    def _join_message(self, **memory: Any) -> Join:
        return Join(
            run=self.run,
            generation=self._generation,
            incarnation=self.incarnation,
            member=self.group.member,
            site=self.site,
            commits=tuple(self._notes.values()),
            **self._tested,
            **memory,
        )

    def _memory(self) -> dict[str, Any]:
        """What this peer knows of the run, for a coordinator that has lost its journal."""
        with self._changed:
            view = {member.name: member.incarnation for member in self._members.values()}
        state = self.run_state.to_bytes() if self.run_state else b""
        return {"view": view, "state": state, "holding": self.data.holding}

    def _receive(self, message: Message) -> bool:
        """False for what an old generation of the coordinator says."""
        if isinstance(message, Refused) and self.life == 0:
            self._fail(refusal(message, self.name))  # a coordinator of another run names its own
        if message.run != self.run or message.generation < self._generation:
            return False
        self._act_on(message)
        return True

    def _act_on(self, message: Message) -> None:
        match message:
            case Welcome():
                self._welcomed(message)
            case View():
                self._viewed(message)
            case Pong():
                self._progressed(message.progress)
            case Represent():
                self._generation = message.generation
                self.send(self._join_message(**self._memory() if message.recall else {}))
            case Recompute():
                self._recompute(message)
            case Drain():
                self.drain(message.seconds)
            case Expelled() if self._leaving:
                self._fail(Evicted("this Peer is closed", peer=self.name))
            case Expelled():
                self._fail(self._expulsion(message))
            case SelfTest() if not self._testing:
                self._testing = True
                threading.Thread(target=self._test_itself, name="elastic-self-test", daemon=True).start()
            case Leases():
                self.data.inbox.put(message)
            case Refused() if not message.tag:
                self.data.inbox.put(message)
            case Begin() | Cancel() | Commit() | RoundFailed() | Base() | Open() | Short() | Refused():
                self._deliver(message)

    def _expulsion(self, message: Expelled) -> Evicted:
        where: dict[str, Any] = {"peer": self.name, "epoch": self._epoch}
        if not message.retry_after:
            return Evicted(f"peer {self.name} was expelled: {message.reason}", **where)
        until = f"back in {message.retry_after:.0f} s" if math.isfinite(message.retry_after) else "for good"
        reason = f"peer {self.name} is in quarantine, {until}: {message.reason}"
        return Quarantined(reason, retry_after=message.retry_after, **where)

    def _test_itself(self) -> None:
        """The coordinator asks for it before it takes in who was in quarantine."""
        from .selftest import self_test

        flaw = self_test(self._events_dir)
        self.events.emit("peer.tested", flaw=flaw)
        self._tested = {"tested": True, "flaw": flaw}
        self.send(self._join_message())

    def _welcomed(self, message: Welcome) -> None:
        with self._changed:
            known = self.life > 0 and message.generation > self._generation_welcomed
            self._generation = self._generation_welcomed = message.generation
            self._epoch, self.life = message.epoch, message.life
            self._members = {member.name: member for member in message.members}
            self._progress = message.progress
            inboxes = list(self._inboxes.values())
            for again in (*self._held.values(), *([self._target] if self._target else ())):
                self.send(again)
            self._changed.notify_all()
        self.group.connect(message.members)
        for inbox in inboxes if known else ():
            inbox.put(Renewed())

    def _viewed(self, message: View) -> None:
        with self._changed:
            in_order = message.epoch == self._epoch + 1
            if in_order:
                self._epoch = message.epoch
                for name in message.removed:
                    self._members.pop(name, None)
                self._members |= {member.name: member for member in message.added}
            members = list(self._members.values())
            self._changed.notify_all()
        if in_order:
            self.group.connect(members)
        elif message.epoch > self._epoch:
            self.send(self._join_message())  # a delta was missed: ask for the whole view

    def _deliver(self, message: Any) -> None:
        tag = message.start.tag if isinstance(message, Begin) else None
        tag = message.abort.tag if isinstance(message, Cancel) else tag or message.tag
        if isinstance(message, (Commit, Base)) and message.state:
            self._learn(message.state)
        inbox = self._inboxes.get(tag)
        if inbox is not None:
            inbox.put(message)
        elif isinstance(message, Begin):  # nobody waits here any more, and the others should not have to wait for it
            self.decline(message.start)
        if isinstance(message, Cancel):  # after it is in the inbox: who sees its attempt fail finds there why
            self.group.abort(message.abort)
        if isinstance(message, Commit):  # last: who sees that the run is finished finds the commit in its inbox
            self._progressed(message.progress)

    def _learn(self, data: bytes) -> None:
        """Keeps the newest run state: commits come again, and older ones later."""
        try:
            state = RunState.from_bytes(data)
        except CheckpointMismatch:
            return
        known = self.run_state
        if known is None or (state.generation, state.serial) >= (known.generation, known.serial):
            self.run_state = state

    def _recompute(self, message: Recompute) -> None:
        """An outer step takes too long for this thread: the heart must go on beating."""
        answer = self.recomputes.get(message.tag)
        if answer is not None:
            threading.Thread(target=answer, args=(message,), name="elastic-recompute", daemon=True).start()

    def _progressed(self, progress: RunProgress) -> None:
        with self._changed:
            self._progress = progress
            target = self._target
            if target and all(progress.targets.get(n) == v for n in TARGETS if (v := getattr(target, n))):
                self._target = None
            self._changed.notify_all()

    def _fail(self, error: ElasticError) -> None:
        with self._changed:
            self._fatal = self._fatal or error
            waiting = [*self._inboxes.values(), self.data.inbox]
            self._changed.notify_all()
        for inbox in waiting:
            inbox.put(error)

    # --- waiting ----------------------------------------------------------------------------------------------------

    def _join(self, coordinator: str, timeout: float) -> None:
        try:
            self._wait(lambda: self.life > 0, timeout, lambda: CoordinatorUnavailable(
                f"no answer from the coordinator at {coordinator} within {timeout:.0f} s: is it running, "
                "and does a firewall let the port through?", peer=self.name
            ))  # fmt: skip
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _wait(self, ready: Callable[[], bool], timeout: float, too_late: Callable[[], ElasticError]) -> None:
        deadline = time.monotonic() + timeout
        with self._changed, self.telemetry.activity.waiting():
            while not ready():
                self._check()
                left = deadline - time.monotonic()
                if left <= 0:
                    raise too_late()
                self._changed.wait(min(left, ASK_AGAIN_SECONDS))


class _OpenInbox:
    """Messages for one tag go to one place while the context lasts."""

    def __init__(self, peer: Peer, tag: str) -> None:
        self._peer, self._tag = peer, tag

    def __enter__(self) -> Inbox:
        peer = self._peer
        with peer._changed:
            peer._check()
            if self._tag in peer._inboxes:
                raise ConfigurationError(
                    f"an operation with tag {self._tag!r} is under way on this peer: use another tag"
                )
            inbox = peer._inboxes[self._tag] = queue.SimpleQueue()
        return inbox

    def __exit__(self, *_: object) -> None:
        with self._peer._changed:
            self._peer._inboxes.pop(self._tag, None)
            self._peer._changed.notify_all()


def _measured(link: LinkStatistics) -> LinkReport:
    return LinkReport(
        peer=link.peer,
        goodput=link.goodput,
        rtt=link.rtt,
        retransmits=link.retransmits,
        stripes=link.stripes,
        slowest=link.slowest,
        fastest=link.fastest,
        redialled=link.redialled,
    )


def _next_of(inbox: Inbox, answer: type[Message], sequence: int, seconds: float) -> Any:
    """The next message that answers or refuses; None after `seconds`. Others are dropped: they are asked for again."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        try:
            message = inbox.get(timeout=left)
        except queue.Empty:
            return None
        answers = isinstance(message, answer) and getattr(message, "sequence", sequence) == sequence
        if answers or isinstance(message, (Refused, ElasticError)):
            return message
    return None


def _where(coordinator: str | None, run: str | None, token: str | None, env: dict[str, str]) -> JoinToken:
    if coordinator:
        name = run or env.get("ELASTIC_RUN")
        if not name:
            raise ConfigurationError("give the run's name: Peer(coordinator, run=...), or set ELASTIC_RUN")
        return JoinToken(check_coordinator(coordinator), check_name("run", name))
    text = token or env.get("ELASTIC_JOIN")
    if not text:
        raise ConfigurationError("say where the run is: Peer('tcp://HOST:29400', run=...), token=..., or ELASTIC_JOIN")
    return JoinToken.parse(text)


def _own_name() -> str:
    return f"{socket.gethostname().split('.')[0][:40]}-{os.getpid()}"


def _link_options(options: LinkOptions | None, stripes: int | str | None, env: dict[str, str]) -> LinkOptions:
    """`options` as they are, but for the stripes if those are named beside them; arguments win over environment."""
    wanted = stripes if stripes is not None else None if options is not None else env.get("ELASTIC_STRIPES")
    options = options or LinkOptions()
    if wanted is None:
        return options
    try:
        return dataclasses.replace(options, stripes=int(wanted) if str(wanted).isdecimal() else wanted)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def laned(lanes: bool | None, env: dict[str, str]) -> bool:
    """Whether ranks have links of their own, by argument or environment."""
    wanted = env.get("ELASTIC_LANES", "1")
    if wanted not in ("0", "1"):
        raise ConfigurationError(f"ELASTIC_LANES is {wanted!r}: it must be 0 or 1")
    return wanted == "1" if lanes is None else lanes


def open_group(kind: type[AnyGroup], listen: str, **options: Any) -> AnyGroup:
    """Raises ConfigurationError."""
    try:
        return kind(listen=listen, **options)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {listen}: {error.strerror or error}; choose another port") from None
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def _rows(part: torch.Tensor, dimensions: int, trailing: tuple[int, ...]) -> torch.Tensor:
    """A flat part in the shape that its giver had."""
    size = math.prod(trailing)
    rows = (part.numel() // size if size else 0,) if dimensions else ()
    return part.view((*rows, *trailing))

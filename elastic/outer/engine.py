"""The engine under all outer loops: when a fragment is exchanged, with whom, and how the result is applied.

Its hands are optimizer hooks: after each inner step it counts, applies what others committed meanwhile, and, when it
is time, begins an exchange, or ends one. An algorithm (`diloco.py` and its sisters) is a `Rule`; what that does to this
peer's copy of the model is the `Replica`'s. Everything that goes wrong surfaces in the training script's own call of
`inner.step()`.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from collectives.records import WireRun

from ..chaos import tainted
from ..checkpoints import Checkpoints
from ..checkpoints.entries import Outer
from ..config import environment
from ..errors import (
    CheckpointMismatch,
    ConfigurationError,
    CoordinatorUnavailable,
    ElasticError,
    NoSource,
    NotEnoughPeers,
    RoundAborted,
    TransferInterrupted,
)
from ..messages import (
    Applied,
    Base,
    Begin,
    Commit,
    Enter,
    Exit,
    Open,
    OperationSpec,
    Propose,
    Recompute,
    Recomputed,
    Refused,
)
from ..operations import Inbox, Operation, Outcome, refusal
from ..runstate import LINEAGE
from ..telemetry import share_of
from ..tensors import check_wire, gathered_in
from .budget import Allotting
from .cadence import Cadence, Moment, cadence_of
from .compression import Compression
from .feedback import Feedback, NoFeedback
from .flight import Exchange
from .joining import Joining
from .local import Local
from .pace import Pace
from .recorder import Recorder
from .replica import Flight, Replica
from .robust import Combining, Robust, encoded, encoded_size, sealed
from .rule import Facts, Rule, check_delay, check_robust
from .saving import Saver
from .serving import Shelf
from .state import Layout, Part, State
from .weighting import Equal, Weighting

if TYPE_CHECKING:
    from ..peer import Peer

ENTER_AGAIN_SECONDS = 0.1
SEE_OFF_SECONDS = 15.0
HAND_OVER_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Doubt:
    """A contribution that was given up while its attempt was running: it may have been committed all the same.

    digest: of the result that this peer held by then. All doubts of a loop are about the next version.
    """

    digest: str
    proposal: Propose
    flight: Flight
    result: torch.Tensor
    travelled: Compression


@dataclass(frozen=True, slots=True)
class Offer:
    """What the run can go on from. state: the run state as of this version. saved: the checkpoint that it is from."""

    version: State
    state: bytes
    saved: Outer | None = None


@dataclass(frozen=True, slots=True)
class OuterStatistics:
    """rounds: applied here; contributed: of those, with this peer's numbers; refused: contributions that were no
    numbers. step_seconds: of an inner step, lately; sync_seconds: from sending to the commit, lately.
    training_seconds, stalled_seconds, working_seconds: in all, between hooks, waiting for exchanges, and for all else
    in hooks (copies, outer steps, hashes); the first over their sum is the compute utilisation. bytes_offered: of
    contributions, as they travel.
    """

    rounds: int
    contributed: int
    refused: int
    step_seconds: float
    sync_seconds: float
    training_seconds: float
    stalled_seconds: float
    working_seconds: float
    bytes_offered: int


class OuterLoop:
    """Base of the outer loops; use one of its subclasses, as a context around the training loop.

    model: its trainable parameters are trained, float32 or bfloat16, on any device. inner: the optimizer that the
    script steps; its state stays local. sync_every: inner steps between exchanges (H); or a time ("30s"), or a cadence
    (`elastic.outer.cadence`). fragments: into how many parts the model is cut, exchanged in turn, each once in H;
    fragment_cut: "strided", "sequential" or "balanced". make: the algorithm. wire: how numbers travel;
    gather_wire: how results do, by default int8 after 4 bits, else as `wire`. rotate: a Hadamard rotation before
    quantising. feedback: what becomes of its errors (`ErrorFeedback`, `EF21`, `EControl`). error_budget: to choose a
    format for each layer, such that their error is at most so many times that of `wire` everywhere (L-GreCo); one peer
    decides, anew every few rounds. weighting: how much contributions count; by default by tokens. buffers: "local", or
    "average" to exchange floating point buffers, too. combine: a rule for runs with peers that cannot be trusted
    (`robust.py`), in place of the mean: every contribution goes to every peer, all count alike, and a round waits until
    as many contribute as the rule needs.
    speed_matched: slower peers make fewer steps, so that all are ready at once (DyLU).
    max_staleness: a peer that missed more rounds of a fragment than this starts again from the outer parameters, and
    its samples are read again. keep_results: results of how many rounds are kept for peers that were left out of
    them, and more if they are small (16 MiB in all).
    timeout: seconds to wait for a round, with too few peers too; by default the peer's `timeouts.round`.
    checkpoints: where the outer state and this peer's own are written to while training goes on, and read from when no
    living peer has them; a URL, or `Checkpoints`.
    joining, rewarm_steps: how the inner optimizer begins when this peer comes into a run that has begun: "rewarm",
    "donor" or "fresh" (`joining.py`); a checkpoint of this peer's own goes before. outer_device: where the outer
    state is and the outer step is made, for instance "cuda": the same bits as on the CPU. Peers need not agree in it.
    record: of so many rounds, results are kept beside the peer's event log, for `elastic replay --verify`
    (`recorder.py`); 0: of none. By default as ELASTIC_RECORD says.

    On entering, the peer fetches the run's outer state into the model, goes on from its newest checkpoint if nobody has
    anything newer, or founds the run with its own. When a round
    goes on without this peer it applies the result itself and keeps what it has learned for the next; a round that
    fails leaves everything as it was. A contribution that is not finite is never sent: this peer starts again from the
    outer parameters, follows the round as a receiver, and reports it (`contribution.refused`).
    Memory, float32, for n parameters of which a fragment has n/P: outer parameters and the outer optimizer's vectors;
    the last round's fragment of them once more, for joiners; one contribution and result, 2 n/P; `keep_results`
    results of n/P; while somebody fetches an older version, up to 8 of its fragments and results. With another
    `outer_device`, state and contribution are there, too: what is served and sent is in the host's memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        make: Callable[..., Rule],
        sync_every: int | str | Cadence = 100,
        fragments: int = 1,
        fragment_cut: str = "strided",
        wire: str = "f32",
        gather_wire: str | None = None,
        rotate: bool = False,
        feedback: Feedback | None = None,
        weighting: Weighting | None = None,
        error_budget: float | None = None,
        buffers: str = "local",
        combine: Robust | None = None,
        speed_matched: bool = False,
        max_staleness: int = 4,
        keep_results: int = 2,
        timeout: float | None = None,
        tag: str = "outer",
        checkpoints: Checkpoints | str | None = None,
        joining: str = "rewarm",
        rewarm_steps: int = 100,
        outer_device: str | torch.device = "cpu",
        record: int | None = None,
    ) -> None:
        _check_whole(max_staleness=max_staleness, keep_results=keep_results, fragments=fragments)
        if buffers not in ("local", "average"):
            raise ConfigurationError(f"buffers is {buffers!r}: choose 'local' or 'average'")
        self.cadence = cadence_of(sync_every)
        rule = _ruled(
            make, Compression(wire=check_wire(wire), rotate=rotate), feedback or NoFeedback(), weighting, combine
        )
        check_delay(rule.delay, self.cadence, fragments)
        check_robust(rule, buffers=buffers == "average", gather_wire=gather_wire)
        self.model, self.inner, self.peer, self.tag = model, inner, peer, tag
        self.speed_matched, self.wire = speed_matched, wire
        self.max_staleness, self.keep_results, self.timeout = max_staleness, keep_results, timeout
        self.layout = Layout(
            model,
            peer.ranks,
            tag,
            fragments=fragments,
            how=fragment_cut,
            buffers=buffers == "average",
            device=_device(outer_device),
        )
        self.replica = Replica(self.layout, rule, taint=partial(tainted, peer.faults) if peer.faults else None)
        self.joining = Joining(joining, rewarm_steps, inner, peer, tag, self.layout)
        self.spec = _specified(rule, self.layout, gathered_in(wire) if gather_wire is None else check_wire(gather_wire))
        where = Checkpoints(checkpoints) if isinstance(checkpoints, str) else checkpoints
        self.saver = Saver(where, peer, tag, self.spec, self.layout, Local(inner, peer.ranks, tag)) if where else None
        self.recorder = _recorder(record, peer, tag, rule, self.layout)
        self.steps = 0
        self.last_commit: Commit | None = None
        self.pace = Pace()
        if combine and error_budget is not None:
            raise ConfigurationError(
                f"{combine.description} does not go with error_budget: one peer would decide for all"
            )
        self._allotting = Allotting(wire, error_budget) if error_budget is not None else None
        self._counts = dict.fromkeys(("rounds", "contributed", "refused", "bytes_offered"), 0)
        self._seen: State | None = None
        self._stepped_from: tuple[State, torch.Tensor, Facts] | None = None
        self._shelf = Shelf(peer.group, tag) if peer.ranks.leads else None
        self._uncounted = 0.0
        self._opened = self._receiving = False
        self._sitting_out = -1
        self._doubts: list[Doubt] = []
        self._exchange: Exchange | None = None
        self._kept_back: deque[Any] = deque()
        self._state, self._led_by = b"", ""
        self._inbox: Inbox | None = None
        self._context: Any = None
        self._hook: Any = None

    quorum = 0
    """How many peers open a round; 0: as the run's policy says."""

    @property
    def grace(self) -> float:
        """Seconds that a round waits for the others once a quorum is there; -1: as the run's timeouts say."""
        return -1.0

    @property
    def algorithm(self) -> str:
        return self.replica.rule.name

    @property
    def replicated(self) -> bool:
        """Whether the outer state is bit-identical on all peers."""
        return self.replica.rule.replicated

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> State:
        """The outer state that this peer holds. Raises ConfigurationError outside the context.

        On ranks that do not lead, its number and hash without the values.
        """
        if self._seen is None:
            raise ConfigurationError(f"enter the loop first: with {self.algorithm}(...) as outer: ...")
        return self._seen

    @property
    def finished(self) -> bool:
        """Whether the training loop should end: the run has reached its target, or this peer drains."""
        return self.peer.stopping

    def statistics(self) -> OuterStatistics:
        """What this peer has done in the loop, as of now; zeros on ranks that do not lead."""
        return OuterStatistics(
            **self._counts,
            step_seconds=self.pace.step_seconds,
            sync_seconds=self.pace.sync_seconds,
            training_seconds=self.pace.training,
            stalled_seconds=self.pace.stalled,
            working_seconds=self.pace.working,
        )

    def __enter__(self) -> Self:
        ranks = self.peer.ranks
        try:
            ranks.mirror(self.tag, self._now, self._see)
            ranks.teach(f"{self.tag}/mend", self._mend)
            self.joining.attach()
            self._together("enter", self._enter)
            self._hook = self.inner.register_step_post_hook(lambda inner, *_: self._stepped(inner))
            self._ending = threading.current_thread(), self.finish if ranks.leads else self._leave
            self.peer.when_leaving.append(self._ending)
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self) -> None:
        self._context = self.peer.inbox(self.tag)
        self._inbox = self._context.__enter__()
        self.peer.telemetry.activity.begin()
        with self._no_step():
            self._fetch_base(self._from_disk())
        self.replica.share = 1.0 / max(1, len(self.peer.view.members))
        self.replica.reset()
        self.joining.entered(self.version.number)
        self.peer.when_idle.append(self._idle)
        self.peer.recomputes[self.tag] = self._recompute
        self.pace.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the loop with `finish`; after an error, only leaves."""
        if self._hook is None:
            return
        if kind is None:
            self.finish()
        else:
            self._leave()

    def finish(self) -> None:
        """Makes one last full exchange and loads the outer parameters into the model. The context ends here.

        Once the run is finished, those who hold its last version stay until the stragglers have it, too. A peer that
        drains gives what it has learned if that is committed in time, and goes without if not.
        """
        try:
            with self._no_step():
                self._together("finish", self._finish)
        finally:
            self._leave()

    def _finish(self) -> None:
        self._give_all()
        self.replica.load_outer()
        if self.saver:
            self.saver.save_last(self._own_part())
        self.peer.see_off(SEE_OFF_SECONDS)
        self._hand_over()

    def _hand_over(self) -> None:
        """Who leaves after a round in which it was alone waits a little until somebody has come for the result.

        Otherwise the run would go back to the version before.
        """
        last, shelf = self.last_commit, self._shelf
        alone = last is not None and last.contributors == (self.peer.name,) and len(self.peer.view.names) > 1
        key = shelf.results.get(self.version.number, "") if shelf else ""
        if not (alone and key and self.peer.draining) or self.peer.over:
            return
        deadline = time.monotonic() + min(HAND_OVER_SECONDS, self.peer.drain_left())
        while time.monotonic() < deadline and not self.peer.group.wanted(key):
            time.sleep(HAND_OVER_SECONDS / 100)
        while time.monotonic() < deadline and self.peer.group.statistics().fetchers:
            time.sleep(HAND_OVER_SECONDS / 100)

    def _give_all(self) -> None:
        try:
            self._flush()
        except (NotEnoughPeers, CoordinatorUnavailable) as error:
            if not self.peer.draining:
                raise
            self.peer.events.emit("peer.drained", given=False, reason=str(error))

    def _leave(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            self.peer.when_leaving.remove(self._ending)
        self.joining.detach()
        self.peer.ranks.forget(self.tag)
        if self._context is not None:
            self._leave_run()

    def _leave_run(self) -> None:
        if self._exchange is not None:
            self._exchange.abandon()
            self._exchange = None
        if self._idle in self.peer.when_idle:
            self.peer.when_idle.remove(self._idle)
        self.peer.recomputes.pop(self.tag, None)
        if self.saver:
            self.saver.close()
        self.peer.send(Exit(run=self.peer.run, tag=self.tag))
        self._context.__exit__()
        self._context = self._inbox = None
        self.peer.telemetry.activity.end()

    # --- the ranks of this peer ---------------------------------------------------------------------------------------

    def _together(self, label: str, lead: Callable[[], None]) -> None:
        """The leader does it; what it orders reaches the other ranks."""
        self.peer.ranks.together(f"{self.tag}: {label}", lead)

    def _now(self) -> tuple[int, int, str, Commit | None]:
        state = self._seen
        return self.steps, state.number if state else -1, state.state_hash if state else "", self.last_commit

    def _see(self, now: tuple[int, int, str, Commit | None]) -> None:
        if not self.peer.ranks.leads:
            self.steps, number, state_hash, self.last_commit = now
            self._seen = State((), (number, state_hash)) if number >= 0 else None

    # --- the inner loop's hook ----------------------------------------------------------------------------------------

    def _stepped(self, inner: torch.optim.Optimizer) -> None:
        if not _skipped(inner):
            self._together("step", self._after_step)

    def _after_step(self) -> None:
        if self.peer.faults is not None:
            self.peer.faults.stepped(self.pace.stepping)
        with self.pace.in_hook(), self._no_step():
            self.peer.telemetry.stepped(self.pace.last_step)
            self._work()

    def _no_step(self) -> AbstractContextManager[None]:
        """The thread that trains waits for others, or does what belongs to rounds: it is no hang if that takes long."""
        return self.peer.not_training()

    def _work(self) -> None:
        self.steps += 1
        tokens = self.peer.stepped()
        self._uncounted += tokens
        self.replica.stepped(tokens)
        if self.peer.spoiled:
            self._settle()
            self._drop_spoiled()
        self._receive(not self.peer.whole or self._sitting_out == self.version.number)
        self.peer.report(step=self.steps, state="training", steps_per_second=self.pace.steps_per_second)
        self._listen()
        if self.replica.landing:
            self._settle()
            self._listen()  # to what came behind its commit
        if self._due():
            self._settle()
            if self._can_give and self.replica.learned > 0:
                self._launch()

    def _due(self) -> bool:
        """Whether the next round should begin now; until its samples are whole again, this peer can give nothing."""
        if not self._can_give or self.peer.ending or self.replica.learned <= 0:
            return False
        return self._opened or self._behind or self.cadence.due(self._moment())

    @property
    def _behind(self) -> bool:
        """Whether rounds come and go within a step or two of this peer: it would always be too late for one.

        So it offers what it has for the next one at once, if it need not stand still for that.
        """
        last = self.last_commit
        followed = last is not None and self.peer.name not in (*last.contributors, *last.covers)
        return followed and self.replica.rule.delay != 0 and 2 * self.pace.step_seconds > self.pace.round_seconds

    def _moment(self) -> Moment:
        progress = self.peer.progress
        fastest = progress.fastest if self.speed_matched else 0.0
        return Moment(
            round=self.version.number,
            fragments=len(self.layout.parts),
            steps=self.replica.since,
            seconds=self.pace.since_launch,
            pace=min(1.0, self.pace.steps_per_second / fastest) if fastest > 0 else 1.0,
            progress=progress.part,
        )

    def _idle(self) -> None:
        """There is no data to train on for now: gives what it has learned, then follows the others (rule 11)."""
        with self._no_step():
            self._flush()
            if not (self.replica.learned or self.peer.over):
                self.peer.report(state="receiving")
                self._receive(True)
        self.pace.resume()

    def _receive(self, receiving: bool) -> None:
        if receiving != self._receiving:
            self._receiving = receiving
            self._announce()

    @property
    def _can_give(self) -> bool:
        return self.peer.whole and not self.peer.over

    def _listen(self) -> None:
        """Applies what came while training: rounds that went on without this peer, and the call to a round.

        While a contribution is on its way, its exchange reads what comes; once that has ended, a call to the next
        round says that the others are ahead: then this one is applied at once.
        """
        if self._exchange is not None:
            if not self._exchange.finished:
                return
            self._kept_back.extend(self._arrived())
            if not any(isinstance(message, Open) for message in self._kept_back):
                return
            self._settle()
        self._kept_back.extend(self._arrived())
        while self._kept_back:
            self._take(self._kept_back.popleft())

    def _arrived(self) -> Iterator[Any]:
        assert self._inbox is not None
        while True:
            try:
                yield self._inbox.get_nowait()
            except queue.Empty:
                return

    def _take(self, message: Any) -> None:
        match message:
            case Open():
                self._opened = message.round > self._last_round()
            case Commit():
                self._catch_up(message)
            case Begin():  # of a proposal that this peer has given up
                self.peer.decline(message.start)
            case Base() if (message.version, message.state_hash) != (self.version.number, self.version.state_hash):
                self._start_over(message)
            case Refused():
                raise refusal(message, self.peer.name)
            case ElasticError():
                raise message

    def _last_round(self) -> int:
        """Of what this peer has applied. In a new lineage rounds can have lower numbers."""
        last = self.last_commit
        return last.round if last and last.generation // LINEAGE == self.peer.lineage else -1

    # --- rounds -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Exchanges now what has been learned since the last rounds, of all fragments; returns at once if that is
        nothing.
        """
        with self._no_step():
            self._together("flush", self._flush)

    def _flush(self) -> None:
        """The fragment that was exchanged last comes last: as long as there is anything to give of the next one."""
        self._settle()
        self._listen()
        for _ in self.layout.parts:
            if self.replica.learned > 0 and self._can_give:
                self._launch()
                self._settle()

    def _launch(self) -> None:
        """Begins the next round; one whose result is to be applied at once ends here, too."""
        assert self._inbox is not None
        self.peer.report(state="exchanging")
        self.layout.check_replicas()
        flight = self.replica.launch()
        if not flight.finite:
            self._refuse(flight)
            return
        self._sitting_out = -1
        self._receive(False)
        self.pace.launched()
        result = torch.empty_like(flight.payload)
        proposal = self._proposal(flight)
        group = self._combining(flight)

        def buffers(begin: Begin) -> tuple[torch.Tensor, torch.Tensor]:
            if group is not None:
                group.digests = begin.digests
            return flight.payload, result

        operation = self.peer.operation(proposal, buffers, self._inbox, **({"group": group} if group else {}))
        patience = self.peer.patience(self.timeout)
        assert self._shelf is not None
        self._exchange = Exchange(
            operation,
            proposal,
            result,
            patience,
            at_most=self.peer.drain_left,
            tell=self._inbox.put,
            on_commit=partial(self._committed, flight, operation),
        )
        if self.replica.rule.delay == 0:
            self._settle()
        else:
            self._exchange.start()

    def _combining(self, flight: Flight) -> Combining | None:
        """What executes the attempts, if it is not the group alone."""
        rule, part = self.replica.rule, self.layout.parts[flight.fragment]
        if rule.robust is None:
            return None
        left_out = partial(self._left_out, flight.base.number)
        return Combining(self.peer.group, self.peer.name, rule.robust, rule.compression.wire, part.averaged, left_out)

    def _left_out(self, version: int, names: list[str]) -> None:
        self.peer.events.emit("contribution.left_out", tag=self.tag, version=version, peers=names)

    def _committed(self, flight: Flight, operation: Operation, commit: Commit, mean: torch.Tensor) -> None:
        """With this peer's contribution; in whichever thread the exchange runs."""
        assert self._shelf is not None
        self._shelf.offer_result(commit, mean)
        summed = operation.start_order and self.replica.rule.robust is None
        share = share_of(operation.start_order, self.peer.name) if operation.start_order and summed else 0.0
        self.peer.telemetry.contributed(self.tag, commit.version, flight.payload, mean, share, flight.steps)

    def _proposal(self, flight: Flight) -> Propose:
        rule, part = self.replica.rule, self.layout.parts[flight.fragment]
        spec = replace(self.spec, elements=_extent(rule, part))
        self._counts["bytes_offered"] += rule.compression.size(part.elements)
        return self.peer.proposal(
            self.tag,
            spec,
            weight=flight.weight,
            tokens=self._uncounted,
            length=flight.length,
            cursors=self.peer.cursors,
            starts=self.peer.starts,
            base_version=flight.base.number,
            base_hash=flight.base.state_hash,
            leaving=self.peer.draining,
            quorum=self.quorum,
            grace=self.grace,
            wires=self._wires(flight),
            digest=sealed(encoded(flight.payload, rule.compression.wire)) if rule.robust else "",
        )

    def _wires(self, flight: Flight) -> tuple[WireRun, ...]:
        """Which formats the layers should travel in, if it is this peer that decides: the first of the last round."""
        last = self.last_commit.contributors if self.last_commit else ()
        if self._allotting is None or last[:1] not in ((), (self.peer.name,)):
            return ()
        sizes = [math.prod(shape) for _, shape in self.layout.parts[flight.fragment].named]
        return self._allotting.wires(flight.fragment, flight.payload, sizes)

    def _refuse(self, flight: Flight) -> None:
        """What this peer has learned is no number: it is never sent. Its samples are read again, from the outer state.

        Nobody waits for it in this round.
        """
        self._counts["refused"] += 1
        self.peer.telemetry.refused(self.tag, flight.base.number + 1)
        self.peer.events.emit(
            "contribution.refused",
            version=flight.base.number,
            fragment=flight.fragment,
            parameter=_first_infinite(self.layout.parts[flight.fragment].named, flight.payload),
            refused=self._counts["refused"],
        )
        self.replica.abort()
        self._reset()
        self.peer.ranks.order(f"{self.tag}/mend")
        self._mend()
        self._sitting_out = self.version.number
        self._receive(True)

    def _mend(self) -> None:
        """An inner optimizer that has taken in what is no number would give nothing else: it begins afresh."""
        tensors = [v for kept in self.inner.state.values() for v in kept.values() if isinstance(v, torch.Tensor)]
        if not all(torch.isfinite(each).all() for each in tensors if each.is_floating_point()):
            self.inner.state.clear()

    def _settle(self) -> None:
        """Waits for the round under way, if there is one, and applies it."""
        exchange = self._exchange
        if exchange is None:
            return
        try:
            outcome = self._awaited(exchange)
        except BaseException as error:
            if not exchange.started or exchange.finished:  # else this thread alone was interrupted
                self._give_up(exchange, error)
            if not isinstance(error, RoundAborted):
                raise
        else:
            self._exchange = None
            self.pace.exchanged(exchange.seconds)
            self._conclude(outcome, exchange)

    def _awaited(self, exchange: Exchange) -> Outcome:
        with self.pace.waiting():
            return exchange.wait()

    def _give_up(self, exchange: Exchange, error: BaseException) -> None:
        """Nothing is lost: the contribution stays, and goes into the next round."""
        self._exchange = None
        flight = self.replica.flight
        self.replica.abort()
        if isinstance(error, RoundAborted):
            return
        if exchange.done_digest and flight is not None:
            travelled = self._travelled(exchange)
            self._doubts.append(Doubt(exchange.done_digest, exchange.proposal, flight, exchange.result, travelled))
        if self.saver and isinstance(error, NotEnoughPeers):
            self.saver.save_last(self._own_part())

    def _conclude(self, outcome: Outcome, exchange: Exchange) -> None:
        if outcome.base is not None:
            self.replica.abort()
            self._start_over(outcome.base)
            return
        commit = outcome.commit
        assert commit is not None
        if not outcome.counted:
            flight = self.replica.flight
            self.replica.abort()
            held = exchange.result if exchange.done_digest == commit.digest else None
            self._catch_up(commit, held, flight)
            return
        self._count(exchange.proposal)
        self._counts["contributed"] += 1
        self._advance(commit, exchange.result, counted=True, travelled=self._travelled(exchange))

    def _travelled(self, exchange: Exchange) -> Compression:
        """How the contribution went in the attempt that this peer finished last."""
        start, rule = exchange.start_order, self.replica.rule
        return rule.compression.of(start) if start and rule.robust is None else rule.compression

    def _count(self, proposal: Propose) -> None:
        """The run has counted this contribution."""
        self._uncounted -= proposal.tokens
        self.peer.committed(proposal.cursors)

    def _catch_up(self, commit: Commit, held: torch.Tensor | None = None, offered: Flight | None = None) -> None:
        """A round was committed without this peer's contribution, or while it was not waiting for the outcome.

        held: its result, if this peer has it as a receiver. offered: what it would have contributed.
        """
        if commit.round <= self._last_round():
            return
        if commit.skipped:
            if commit.version == self.version.number:
                self._note(commit)
        elif commit.version == self.version.number + 1 and commit.base_hash in ("", self.version.state_hash):
            self._follow(commit, held, offered)
        elif commit.version > self.version.number:
            self._fetch_and_start_over()

    def _follow(self, commit: Commit, held: torch.Tensor | None = None, offered: Flight | None = None) -> None:
        """Rule 5: applies the result itself; what it has learned and not contributed stays for the next round.

        If the contribution of a twin is in it, that stands for this peer's: what is left is what the twin has left.
        """
        named = self.peer.name in commit.contributors
        doubt = next((each for each in self._doubts if named and each.digest == commit.digest), None)
        mean = doubt.result if doubt else held if held is not None else self._pull(commit)
        if mean is None:
            self._fetch_and_start_over()
            return
        if offered is not None and offered.payload.shape == mean.shape:  # what is not taken is judged all the same
            self.peer.telemetry.contributed(self.tag, commit.version, offered.payload, mean, 0.0, offered.steps)
        if self.peer.name in commit.covers:
            self.peer.rewind()  # first: if it fails, what was learned and what was counted still belong together
        place = self.replica.places[self.version.next]
        self._advance(commit, mean, counted=False)
        if doubt:  # it was counted after all: only what has been learned since is left
            self._count(doubt.proposal)
            self.replica.count_late(doubt.flight, doubt.travelled)
        if place.missed > self.max_staleness:
            self._reset()

    def _advance(
        self, commit: Commit, mean: torch.Tensor, *, counted: bool, travelled: Compression | None = None
    ) -> None:
        self._doubts.clear()
        before, shelf = self.version, self._shelf
        assert shelf is not None
        self._stepped_from = None
        shelf.make_room(commit.version, self.keep_results, len(mean))
        facts = Facts(commit.scale, commit.share, commit.mass)
        self._state, self._led_by = commit.state, commit.digest
        if counted:
            self.replica.land(mean, counted=True, facts=facts, travelled=travelled)
        elif self.peer.name in commit.covers:
            self.replica.cover(mean, facts=facts)
            self._uncounted = 0.0
        else:
            self.replica.follow(mean, facts=facts)
            self.replica.since = 0
        self.replica.share = 1.0 / len(commit.contributors)
        self.joining.committed(commit)
        self._stepped_from = (before, mean, facts)
        self._adopt(self.replica.state)
        shelf.keep_result(commit, mean, self.keep_results)
        if self.recorder:
            self.recorder.committed(commit, before.next, mean, facts, self.version)
        self._counts["rounds"] += 1
        self._note(commit)
        if self.saver:
            self.saver.committed(self.version, commit, self._own_part())

    def _own_part(self) -> dict[str, Any]:
        """What a checkpoint keeps of this peer's place, beside its inner optimizer."""
        return {"steps": self.steps}

    def _reset(self, *, rewarm: bool = True) -> None:
        self.peer.rewind()  # first: if it fails, what was learned and what was counted still belong together
        self.replica.reset()
        if rewarm:
            self.joining.rewarm()
        self._uncounted = 0.0
        self._doubts.clear()

    def _drop_spoiled(self) -> None:
        """Samples that are not this peer's to count were under way when it learned that; or its twin's round was."""
        self._listen()
        if self.peer.spoiled:
            last = self.last_commit
            self._reset(rewarm=last is None or self.peer.name not in last.covers)

    def _note(self, commit: Commit) -> None:
        self.pace.round_over()
        self.last_commit = commit
        self._opened = False
        self.peer.finish(self.tag, commit.round)
        self.peer.events.emit(
            "round.applied",
            tag=self.tag,
            round=commit.round,
            version=self.version.number,
            contributed=self.peer.name in commit.contributors,
            covered=self.peer.name in commit.covers,
            state_hash=self.version.state_hash,
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def _adopt(self, state: State) -> None:
        """Makes `state` the current one: served to joiners, announced to the coordinator."""
        assert self._shelf is not None
        self._seen = self.replica.state = state
        if self.peer.faults is not None:
            self.peer.faults.reached(state.number)
        self._shelf.put(state)
        self._announce()

    def _announce(self) -> None:
        applied = Applied(
            run=self.peer.run,
            tag=self.tag,
            fragment=0,
            version=self.version.number,
            state_hash=self.version.state_hash,
            receiving=self._receiving,
            computed=self._stepped_from is not None,
            digest=self._led_by,
            moments=self.joining.digest,
        )
        self.peer.hold(applied)

    def _recompute(self, message: Recompute) -> None:
        """Rule 9: the outer step again, from the version before and the committed mean. On a thread of its own."""
        state, step = self._seen, self._stepped_from
        again = ""
        if step is not None and state is not None and state.number == message.version == step[0].number + 1:
            before, mean, facts = step
            f = before.next
            version = self.replica.rule.advance(before.parts[f], mean, self.layout.parts[f], facts)
            again = before.with_part(f, version).state_hash
        self.peer.send(
            Recomputed(
                run=self.peer.run,
                tag=self.tag,
                fragment=message.fragment,
                version=message.version,
                state_hash=again,
            )
        )

    def _pull(self, commit: Commit) -> torch.Tensor | None:
        """Rule 5: the committed result, from those who hold it; None if nobody gives it."""
        assert self._shelf is not None
        sources = [member for member in commit.sources if member.name != self.peer.name]
        return self._shelf.pull(commit, sources, self.peer.timeouts)

    def _fetch_and_start_over(self) -> None:
        try:
            self._fetch_base(self._in_hand())
        except NoSource:
            if self.saver is None or (saved := self._from_disk()) is None:
                raise
            self._fetch_base(saved)
        self._reset()

    def _start_over(self, base: Base) -> None:
        """This peer is too far behind, or holds other bits: it takes the state, and its samples are read again."""
        if self._try_base(base):
            self._reset()
        else:
            self._fetch_and_start_over()

    def _in_hand(self) -> Offer | None:
        """The version that this peer holds: should all others be lost, the run goes on from it."""
        return Offer(self._seen, self._state) if self._seen and self._state else None

    def _from_disk(self) -> Offer | None:
        saved = self.saver.newest() if self.saver else None
        if saved is None:
            return None
        return Offer(State(saved.versions).on(self.layout.device), saved.manifest.run_state, saved)

    def _fetch_base(self, offer: Offer | None) -> None:
        """Gets the run's outer state from its holders, goes on from what is offered, or founds the run.

        Raises NoSource, TransferInterrupted.
        """
        own, deadline = None, time.monotonic() + (self.timeout or self.peer.timeouts.round)
        while time.monotonic() < deadline:
            base = self._ask_base(own, offer)
            if not (base.state_hash or base.sources):  # nobody has anything yet: only now is its own looked at
                own = self.replica.begin()
            elif self._try_base(base, own, offer.version if offer else None):
                self._restore_own_part(offer)
                return
            else:
                time.sleep(ENTER_AGAIN_SECONDS)
        raise TransferInterrupted(f"no source lasted long enough to give the outer state of {self.tag}")

    def _restore_own_part(self, offer: Offer | None) -> None:
        if offer and offer.saved and self.saver and self.version is offer.version:
            own = self.saver.restore(offer.saved)
            self.steps, self.joining.restored = own.get("steps", self.steps), bool(own)

    def _ask_base(self, own: State | None, offer: Offer | None) -> Base:
        assert self._inbox is not None
        enter = Enter(
            run=self.peer.run,
            tag=self.tag,
            spec=self.spec,
            state_hash=own.state_hash if own else "",
            parameters=self.layout.described,
        )
        if offer is not None:
            number, state_hash = offer.version.number, offer.version.state_hash
            enter = replace(enter, offered=number, offered_hash=state_hash, state=offer.state)
        base = self.peer.ask(enter, self._inbox, Base, self.timeout or self.peer.timeouts.round)
        assert isinstance(base, Base)
        return base

    def _try_base(self, base: Base, *own: State | None) -> bool:
        """Takes the state that `base` names, from `own` if it is there; False if nobody gives it."""
        self._receiving = base.version > 0  # rule 6: nobody waits for it before it trains from there
        for state in (*own, self._seen):
            if state is not None and (state.number, state.state_hash) == (base.version, base.state_hash):
                self._take_over(state, base)
                return True
        sources = [member for member in base.sources if member.name != self.peer.name]
        return bool(sources) and self._fetch(base, sources)

    def _take_over(self, state: State, base: Base) -> None:
        """A version that this peer has not worked out itself."""
        self._stepped_from = None
        self._state, self._led_by = base.state, base.digest
        self.joining.told(base)
        self._adopt(state)
        if self.recorder:
            self.recorder.began(state)

    def _fetch(self, base: Base, sources: list[Any]) -> bool:
        assert self._shelf is not None
        sizes = [part.elements for part in self.layout.parts]
        fetched = self._shelf.fetch(base, sources, sizes, self._seen, self.peer)
        if fetched is None:
            return False
        slots = self.replica.rule.slots
        if any(len(part.momentum) != slots * n for part, n in zip(fetched.parts, sizes, strict=True)):
            raise CheckpointMismatch(f"the state of {self.tag} has another outer optimizer's momentum")
        self._take_over(fetched.on(self.layout.device), base)
        return True

    # --- for the script -----------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model with the outer parameters in it; the local ones come back afterwards."""
        with self._no_step():
            local = self.layout.keep()
            self._together("evaluate", self.replica.load_outer)
            training = self.model.training
            self.model.eval()
            try:
                yield self.model
            finally:
                self.model.train(training)
                self.layout.put_back(local)
                self.pace.resume()

    def state_dict(self) -> dict[str, Any]:
        """The outer state, this peer's place in the rounds and in its data, defined between any two inner steps.

        A contribution that is on its way counts as not given. With several ranks, a call of all; the leader has it,
        the others get {}.
        """
        state: dict[str, Any] = {}
        self._together("state_dict", lambda: state.update(self._state_dict()))
        return state

    def _state_dict(self) -> dict[str, Any]:
        return self.replica.state_dict() | {
            "algorithm": self.spec.algorithm,
            "fingerprint": self.layout.fingerprint,
            "version": self.version.number,
            "steps": self.steps,
            "uncounted": self._uncounted,
            "data": self.peer.data.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, within the context and between two passes over the data, which must be open again.

        Where the run has gone on since, its version and positions hold, and this peer starts from the outer parameters.
        Raises CheckpointMismatch for another model, algorithm or dataset; then nothing changes. With several ranks, a
        call of all; the leader's state counts.
        """
        with self._no_step():
            self._together("load_state_dict", lambda: self._load_state_dict(state))

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        for what, ours in (("algorithm", self.spec.algorithm), ("fingerprint", self.layout.fingerprint)):
            if state[what] != ours:
                raise CheckpointMismatch(f"the state's {what} is {state[what]!r}, this loop's is {ours!r}")
        self._settle()  # what is on its way was given from what is forgotten now
        if state["data"]:
            self.peer.data.load_state_dict(state["data"])
        self.steps, gone_on = state["steps"], self.version
        self.replica.load_state_dict(state)
        if (gone_on.number, gone_on.state_hash) != (self.replica.state.number, self.replica.state.state_hash):
            self.replica.state = gone_on  # what was counted since must not be given again
            self._reset()
            return
        self._doubts.clear()
        self._uncounted = state["uncounted"]
        self._adopt(self.replica.state)
        if self.recorder:
            self.recorder.began(self.version)


def _recorder(rounds: int | None, peer: Peer, tag: str, rule: Rule, layout: Layout) -> Recorder | None:
    """Raises ConfigurationError if the peer has no event log to keep the record beside."""
    text = environment().get("ELASTIC_RECORD", "0")
    if rounds is None and not text.isdecimal():
        raise ConfigurationError(f"ELASTIC_RECORD is {text!r}: it must be a number of rounds, or 0")
    wanted = int(text) if rounds is None else rounds
    if not wanted or not peer.ranks.leads:
        return None
    if peer.events.path is None:
        raise ConfigurationError("a record is kept beside the event log: set events_dir, or ELASTIC_EVENTS_DIR")
    return Recorder(peer.events.path.parent, wanted, peer, tag, rule, layout)


def _check_whole(**values: Any) -> None:
    for name, value in values.items():
        if not (isinstance(value, int) and value >= 1):
            raise ConfigurationError(f"{name} is {value!r}: it must be a whole number of at least 1")


def _ruled(
    make: Callable[..., Rule],
    compression: Compression,
    feedback: Feedback,
    weighting: Weighting | None,
    robust: Robust | None,
) -> Rule:
    if weighting is None and (feedback.slots or robust):
        weighting = Equal()  # what is kept of every peer adds up only if it counts the same each time
    options: dict[str, Any] = {} if weighting is None else {"weighting": weighting}
    if robust is not None:
        options["robust"] = robust
    return make(compression=compression, feedback=feedback, **options)


def _extent(rule: Rule, part: Part) -> int:
    """Elements of a contribution to this fragment: numbers, or, where every peer gets it as it is, bytes."""
    return encoded_size(part.elements, rule.compression.wire) if rule.robust else part.elements


def _specified(rule: Rule, layout: Layout, gathered: str) -> OperationSpec:
    """What all peers must agree on."""
    wire = "raw" if rule.robust else rule.compression.wire
    return OperationSpec(
        op="all_gather" if rule.robust else rule.combine,
        dtype="float32",
        carried="uint8" if rule.robust else "",
        needs=rule.robust.needs if rule.robust else 0,
        elements=sum(_extent(rule, part) for part in layout.parts),
        wire=wire,
        gather_wire=gathered if gathered != wire and not rule.robust else "",
        algorithm=rule.description,
        fingerprint=layout.fingerprint,
        fragments=len(layout.parts),
    )


def _device(name: str | torch.device) -> torch.device:
    """With its index, as tensors name theirs. ConfigurationError if there is none of this name here."""
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigurationError(f"outer_device is {str(name)!r}: {str(error).splitlines()[0]}") from None


def _skipped(inner: torch.optim.Optimizer) -> bool:
    """Whether this call has changed nothing: GradScaler tells a fused optimizer so, whose hooks run even then."""
    found = getattr(inner, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.item())


def _first_infinite(named: tuple[tuple[str, tuple[int, ...]], ...], flat: torch.Tensor) -> str:
    """The name of the first tensor in it that is not finite."""
    at = 0
    for name, shape in named:
        stop = at + math.prod(shape)
        if not torch.isfinite(flat[at:stop]).all():
            return name
        at = stop
    return ""

"""The engine under all outer loops: when a fragment is exchanged, with whom, and how the result is applied.

Its hands are optimizer hooks: after each inner step it counts, applies what others committed meanwhile, and, when it
is time, exchanges. An algorithm (`diloco.py`) says what is sent, what the result does to the outer state, and what the
local parameters become. Everything that goes wrong surfaces in the training script's own call of `inner.step()`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch

from collectives import FetchError, Partial

from ..checkpoints import Checkpoints
from ..checkpoints.entries import Outer
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
from ..operations import Inbox, Outcome, refusal
from ..runstate import LINEAGE
from ..tensors import check_finite, check_wire, gathered_in
from .local import Local
from .optimizers import OuterOptimizer
from .saving import Saver
from .state import Layout, Version

if TYPE_CHECKING:
    from ..peer import Peer

ENTER_AGAIN_SECONDS = 0.1
SEE_OFF_SECONDS = 15.0
PULL_AGAIN_SECONDS = 0.02
MOST_SERVED = 8  # versions, and results, that are kept for those who are fetching older ones


@dataclass(frozen=True, slots=True)
class Doubt:
    """A contribution that was given up while its attempt was running: it may have been committed all the same.

    digest: of the result that this peer held by then. All doubts of a loop are about the next version.
    """

    digest: str
    proposal: Propose
    source: torch.Tensor
    result: torch.Tensor


@dataclass(frozen=True, slots=True)
class Offer:
    """What the run can go on from. state: the run state as of this version. saved: the checkpoint that it is from."""

    version: Version
    state: bytes
    saved: Outer | None = None


class OuterLoop:
    """Base of the outer loops; use one of its subclasses, as a context around the training loop.

    model: its trainable float32 CPU parameters are trained. inner: the optimizer that the script steps; its state stays
    local. sync_every: inner steps between exchanges (H). outer: the outer optimizer. wire: how numbers travel.
    max_staleness: a peer that missed more rounds than this starts again from the outer parameters, and its samples are
    read again. keep_results: results of how many rounds are kept for peers that were left out of them.
    timeout: seconds to wait for a round, with too few peers too; by default the peer's `timeouts.round`.
    checkpoints: where the outer state and this peer's own are written to while training goes on, and read from when no
    living peer has them; a URL, or `Checkpoints`.

    On entering, the peer fetches the run's outer state into the model, goes on from its newest checkpoint if nobody has
    anything newer, or founds the run with its own. When a round
    goes on without this peer it applies the result itself and keeps what it has learned for the next; a round that
    fails leaves everything as it was. Memory: outer parameters and momentum, twice (two versions are kept for
    joiners), the pseudo-gradient, and `keep_results` results, all float32; while somebody fetches an older version,
    that one and up to 8 results behind it.
    """

    algorithm = ""
    replicated = True
    """Whether the outer state is bit-identical on all peers (gossip loops will say False)."""

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        sync_every: int,
        outer: OuterOptimizer,
        wire: str = "f32",
        max_staleness: int = 4,
        keep_results: int = 2,
        timeout: float | None = None,
        tag: str = "outer",
        checkpoints: Checkpoints | str | None = None,
    ) -> None:
        for name, value in (
            ("sync_every", sync_every),
            ("max_staleness", max_staleness),
            ("keep_results", keep_results),
        ):
            if not (isinstance(value, int) and value >= 1):
                raise ConfigurationError(f"{name} is {value!r}: it must be a whole number of at least 1")
        self.model, self.inner, self.peer, self.tag = model, inner, peer, tag
        self.sync_every, self.outer, self.wire = sync_every, outer, wire
        self.max_staleness, self.keep_results, self.timeout = max_staleness, keep_results, timeout
        self.layout = Layout(model, peer.ranks, tag)
        self.spec = OperationSpec(
            op="mean",
            dtype="float32",
            elements=self.layout.elements,
            wire=check_wire(wire),
            gather_wire=gathered_in(wire),
            algorithm=f"{self.algorithm}({outer.description})",
            fingerprint=self.layout.fingerprint,
        )
        where = Checkpoints(checkpoints) if isinstance(checkpoints, str) else checkpoints
        self.saver = Saver(where, peer, tag, self.spec, self.layout, Local(inner, peer.ranks, tag)) if where else None
        self.steps = 0
        self.last_commit: Commit | None = None
        self._version: Version | None = None
        self._stepped_from: tuple[Version, torch.Tensor] | None = None
        self._published: dict[int, str] = {}
        self._results: dict[int, str] = {}
        self._since_applied = 0
        self._missed = 0
        self._weight = 0.0
        self._opened = False
        self._receiving = False
        self._doubts: list[Doubt] = []
        self._partial = Partial()
        self._state, self._led_by = b"", ""
        self._inbox: Inbox | None = None
        self._context: Any = None
        self._hook: Any = None

    # --- what an algorithm says -------------------------------------------------------------------------------------

    def contribution(self, version: Version, local: torch.Tensor) -> torch.Tensor:
        """What this peer sends: a flat float32 vector. local: a copy of its parameters, which may be written."""
        raise NotImplementedError

    def advance(self, version: Version, mean: torch.Tensor) -> Version:
        """The next version of the outer state, from the committed mean."""
        raise NotImplementedError

    # --- life -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> Version:
        """The outer state that this peer holds. Raises ConfigurationError outside the context.

        On ranks that do not lead, its number and hash without the values.
        """
        if self._version is None:
            raise ConfigurationError(f"enter the loop first: with {self.algorithm}(...) as outer: ...")
        return self._version

    @property
    def finished(self) -> bool:
        """Whether the training loop should end: the run has reached its target, or this peer drains."""
        return self.peer.stopping

    def __enter__(self) -> Self:
        ranks = self.peer.ranks
        try:
            ranks.mirror(self.tag, self._now, self._see)
            self._together("enter", self._enter)
            self._hook = self.inner.register_step_post_hook(lambda *_: self._together("step", self._after_step))
            self._ending = threading.current_thread(), self.finish if ranks.leads else self._leave
            self.peer.when_leaving.append(self._ending)
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self) -> None:
        self._context = self.peer.inbox(self.tag)
        self._inbox = self._context.__enter__()
        self._fetch_base(self._from_disk())
        self.layout.write(self.version.parameters)
        self.peer.when_idle.append(self._idle)
        self.peer.recomputes[self.tag] = self._recompute

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
            self._together("finish", self._finish)
        finally:
            self._leave()

    def _finish(self) -> None:
        self._give_all()
        self.layout.write(self.version.parameters)
        if self.saver:
            self.saver.save_last(self._own_part())
        self.peer.see_off(SEE_OFF_SECONDS)

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
        self.peer.ranks.forget(self.tag)
        if self._context is not None:
            self._leave_run()

    def _leave_run(self) -> None:
        if self._idle in self.peer.when_idle:
            self.peer.when_idle.remove(self._idle)
        self.peer.recomputes.pop(self.tag, None)
        if self.saver:
            self.saver.close()
        self.peer.send(Exit(run=self.peer.run, tag=self.tag))
        self._context.__exit__()
        self._context = self._inbox = None

    # --- the ranks of this peer ---------------------------------------------------------------------------------------

    def _together(self, label: str, lead: Callable[[], None]) -> None:
        """The leader does it; what it orders reaches the other ranks."""
        self.peer.ranks.together(f"{self.tag}: {label}", lead)

    def _now(self) -> tuple[int, int, str, Commit | None]:
        version = self._version
        return self.steps, version.number if version else -1, version.state_hash if version else "", self.last_commit

    def _see(self, now: tuple[int, int, str, Commit | None]) -> None:
        if not self.peer.ranks.leads:
            self.steps, number, state_hash, self.last_commit = now
            self._version = Version.elsewhere(number, state_hash) if number >= 0 else None

    # --- the inner loop's hook ----------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        self.steps += 1
        self._since_applied += 1
        self._weight += self.peer.stepped()
        if self.peer.spoiled:
            self._reset()
        self._receive(not self.peer.whole)  # until its samples are whole again it can give nothing
        self.peer.report(step=self.steps, state="training")
        self._take_messages()
        if self._can_give and not self.peer.ending and (self._since_applied >= self.sync_every or self._opened):
            self._exchange()

    def _idle(self) -> None:
        """There is no data to train on for now: gives what it has learned, then follows the others (rule 11)."""
        self._flush()
        if not (self._weight or self.peer.over):
            self.peer.report(state="receiving")
            self._receive(True)

    def _receive(self, receiving: bool) -> None:
        if receiving != self._receiving:
            self._receiving = receiving
            self._announce()

    @property
    def _can_give(self) -> bool:
        return self.peer.whole and not self.peer.over

    def _take_messages(self) -> None:
        """Applies what came while training: rounds that went on without this peer, and the call to a round."""
        assert self._inbox is not None
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            self._take(message)

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
        """Exchanges now what has been learned since the last round; returns at once if that is nothing."""
        self._together("flush", self._flush)

    def _flush(self) -> None:
        self._take_messages()
        if self._weight > 0 and self._can_give:
            self._exchange()

    def _exchange(self) -> None:
        assert self._inbox is not None
        self.peer.report(state="exchanging")
        self.layout.check_replicas()
        source = self.contribution(self.version, self.layout.read())
        check_finite(source, self.wire, self.peer.name)
        result = torch.empty_like(source)
        proposal = self.peer.proposal(
            self.tag,
            self.spec,
            weight=self._weight,
            cursors=self.peer.cursors,
            starts=self.peer.starts,
            base_version=self.version.number,
            base_hash=self.version.state_hash,
            leaving=self.peer.draining,
        )
        operation = self.peer.operation(proposal, lambda _: (source, result), self._inbox)
        try:
            outcome = operation.run(self.peer.patience(self.timeout))
        except RoundAborted:
            if not self.peer.over:
                self._since_applied = 0  # nothing is lost: the contribution stays and goes into the next round
        except BaseException as error:
            if operation.done_digest:
                self._doubts.append(Doubt(operation.done_digest, proposal, source, result))
            if self.saver and isinstance(error, NotEnoughPeers):
                self.saver.save_last(self._own_part())
            raise
        else:
            self._conclude(outcome, proposal, result)

    def _conclude(self, outcome: Outcome, proposal: Propose, result: torch.Tensor) -> None:
        if outcome.base is not None:
            self._start_over(outcome.base)
            return
        commit = outcome.commit
        assert commit is not None
        if not outcome.counted:
            self._catch_up(commit)
            return
        self._count(proposal)
        self._advance(commit, result)
        self.layout.write(self.version.parameters)

    def _count(self, proposal: Propose) -> None:
        """The run has counted this contribution."""
        self._weight -= proposal.weight
        self._missed = 0
        self.peer.committed(proposal.cursors)

    def _catch_up(self, commit: Commit) -> None:
        """A round was committed without this peer's contribution, or while it was not waiting for the outcome."""
        if commit.round <= self._last_round():
            return
        if commit.skipped:
            if commit.version == self.version.number:
                self._note(commit)
        elif commit.version == self.version.number + 1 and commit.base_hash in ("", self.version.state_hash):
            self._follow(commit)
        elif commit.version > self.version.number:
            self._fetch_and_start_over()

    def _follow(self, commit: Commit) -> None:
        """Rule 5: applies the result itself; what it has learned and not contributed stays for the next round."""
        named = self.peer.name in commit.contributors
        doubt = next((each for each in self._doubts if named and each.digest == commit.digest), None)
        mean = doubt.result if doubt else self._pull(commit)
        if mean is None:
            self._fetch_and_start_over()
            return
        before = self.version
        self._advance(commit, mean)
        self._missed += 1
        if doubt:  # it was counted after all: only what has been learned since is left
            self._count(doubt.proposal)
            self.layout.add(doubt.source)
        if self._missed > self.max_staleness:
            self._reset()
        else:
            self.layout.add(torch.sub(self.version.parameters, before.parameters))

    def _advance(self, commit: Commit, mean: torch.Tensor) -> None:
        self._doubts.clear()
        before = self.version
        self._stepped_from = (before, mean)
        self._state, self._led_by = commit.state, commit.digest
        self._adopt(self.advance(before, mean))
        self._keep_result(commit, mean)
        self._note(commit)
        if self.saver:
            self.saver.committed(self.version, commit, self._own_part())

    def _own_part(self) -> dict[str, Any]:
        """What a checkpoint keeps of this peer's place, beside its inner optimizer."""
        return {"steps": self.steps}

    def _reset(self) -> None:
        self.peer.rewind()  # first: if it fails, what was learned and what was counted still belong together
        self.layout.write(self.version.parameters)
        self._weight, self._missed, self._since_applied = 0.0, 0, 0
        self._doubts.clear()

    def _note(self, commit: Commit) -> None:
        self.last_commit = commit
        self._since_applied, self._opened = 0, False
        self.peer.finish(self.tag, commit.round)
        self.peer.events.emit(
            "round.applied",
            round=commit.round,
            version=self.version.number,
            contributed=self.peer.name in commit.contributors,
            state_hash=self.version.state_hash,
        )

    # --- state --------------------------------------------------------------------------------------------------------

    def _key(self, kind: str, version: int) -> str:
        return f"{kind}/{self.tag}/0/{version}"

    def _adopt(self, version: Version) -> None:
        """Makes `version` the current one: served to joiners, announced to the coordinator."""
        self._version = version
        for served in (self._published, self._results):  # of a line that the run went back from
            for number in [number for number in served if number > version.number]:
                self.peer.group.withdraw(served.pop(number))
        key = self._key("state", version.number)
        self.peer.group.publish(key, [version.parameters, version.momentum], version.state_hash)
        self._published[version.number] = key
        self._withdraw(self._published, version.number - 1)
        self._announce()

    def _withdraw(self, served: dict[int, str], needed: int) -> None:
        """Takes back what is older than `needed`, but not what somebody is fetching, nor what leads on from there."""
        group, newest = self.peer.group, max(served)
        for number in sorted(served):
            if number > newest - MOST_SERVED and (number >= needed or group.wanted(served[number])):
                return
            group.withdraw(served.pop(number))

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
        )
        self.peer.hold(applied)

    def _recompute(self, message: Recompute) -> None:
        """Rule 9: the outer step again, from the version before and the committed mean. On a thread of its own."""
        version, step = self._version, self._stepped_from
        again = ""
        if step is not None and version is not None and version.number == message.version == step[0].number + 1:
            again = self.advance(*step).state_hash
        self.peer.send(
            Recomputed(
                run=self.peer.run,
                tag=self.tag,
                fragment=message.fragment,
                version=message.version,
                state_hash=again,
            )
        )

    def _keep_result(self, commit: Commit, mean: torch.Tensor) -> None:
        key = self._key("result", commit.version)
        self.peer.group.publish(key, [mean], commit.digest)
        self._results[commit.version] = key
        fetched = min(self._published, default=commit.version)  # who is fetching that one needs the results behind it
        self._withdraw(self._results, min(commit.version - self.keep_results + 1, fetched + 1))

    def _pull(self, commit: Commit) -> torch.Tensor | None:
        """Rule 5: the committed result, from those who hold it; None if nobody gives it."""
        sources = [member for member in commit.sources if member.name != self.peer.name]
        deadline = time.monotonic() + self.peer.timeouts.chunk
        while sources:
            try:
                data = self.peer.group.fetch(
                    self._key("result", commit.version),
                    sources,
                    digest=commit.digest,
                    timeout=self.peer.timeouts.operation,
                )
                return torch.frombuffer(data, dtype=torch.float32)
            except FetchError:
                if time.monotonic() > deadline:
                    break
                time.sleep(PULL_AGAIN_SECONDS)  # they publish it when the same commit has reached them
        return None

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
        return Offer(self._version, self._state) if self._version and self._state else None

    def _from_disk(self) -> Offer | None:
        saved = self.saver.newest() if self.saver else None
        return Offer(saved.versions[0], saved.manifest.run_state, saved) if saved else None

    def _fetch_base(self, offer: Offer | None) -> None:
        """Gets the run's outer state from its holders, goes on from what is offered, or founds the run.

        Raises NoSource, TransferInterrupted.
        """
        own, deadline = None, time.monotonic() + (self.timeout or self.peer.timeouts.round)
        while time.monotonic() < deadline:
            base = self._ask_base(own, offer)
            if not (base.state_hash or base.sources):  # nobody has anything yet: only now is its own looked at
                own = Version(0, self.layout.read(), torch.zeros(self.layout.elements))
            elif self._try_base(base, own, offer.version if offer else None):
                self._restore_own_part(offer)
                return
            else:
                time.sleep(ENTER_AGAIN_SECONDS)
        raise TransferInterrupted(f"no source lasted long enough to give the outer state of {self.tag}")

    def _restore_own_part(self, offer: Offer | None) -> None:
        if offer and offer.saved and self.saver and self.version is offer.version:
            self.steps = self.saver.restore(offer.saved).get("steps", self.steps)

    def _ask_base(self, own: Version | None, offer: Offer | None) -> Base:
        assert self._inbox is not None
        state_hash = own.state_hash if own else ""
        enter = Enter(run=self.peer.run, tag=self.tag, spec=self.spec, state_hash=state_hash)
        if offer is not None:
            number, state_hash = offer.version.number, offer.version.state_hash
            enter = replace(enter, offered=number, offered_hash=state_hash, state=offer.state)
        base = self.peer.ask(enter, self._inbox, Base, self.timeout or self.peer.timeouts.round)
        assert isinstance(base, Base)
        return base

    def _try_base(self, base: Base, *own: Version | None) -> bool:
        """Takes the state that `base` names, from `own` if it is there; False if nobody gives it."""
        self._receiving = base.version > 0  # rule 6: nobody waits for it before it trains from there
        for version in (*own, self._version):
            if version is not None and (version.number, version.state_hash) == (base.version, base.state_hash):
                self._take_over(version, base)
                return True
        sources = [member for member in base.sources if member.name != self.peer.name]
        return bool(sources) and self._fetch(base, sources)

    def _take_over(self, version: Version, base: Base) -> None:
        """A version that this peer has not worked out itself."""
        self._stepped_from = None
        self._state, self._led_by = base.state, base.digest
        self._adopt(version)

    def _fetch(self, base: Base, sources: list[Any]) -> bool:
        began = time.monotonic()
        try:
            data = self.peer.group.fetch(
                self._key("state", base.version),
                sources,
                digest=base.state_hash,
                timeout=self.peer.timeouts.operation,
                partial=self._partial,
                progress=lambda here, size: self.peer.report(state=f"fetching {100 * here // max(size, 1)} %"),
            )
        except FetchError as error:  # what has come by now is kept for the next sources of the same version
            self.peer.events.emit("state.interrupted", version=base.version, reason=str(error))
            return False
        if len(data) != 8 * self.layout.elements:
            raise CheckpointMismatch(
                f"fetched {len(data)} bytes of state for a model of {self.layout.elements} numbers"
            )
        self._take_over(Version.from_bytes(base.version, data, base.state_hash), base)
        self.peer.events.emit(
            "state.fetched",
            version=base.version,
            bytes=len(data),
            seconds=round(time.monotonic() - began, 4),
            sources=[member.name for member in sources],
            given={name: each.bytes for name, each in self._partial.sources.items()},
        )
        self._partial = Partial()
        return True

    # --- for the script -----------------------------------------------------------------------------------------------

    @contextmanager
    def evaluating(self) -> Iterator[torch.nn.Module]:
        """The model with the outer parameters in it; the local ones come back afterwards."""
        local = self.layout.keep()
        self._together("evaluate", lambda: self.layout.write(self.version.parameters))
        training = self.model.training
        self.model.eval()
        try:
            yield self.model
        finally:
            self.model.train(training)
            self.layout.put_back(local)

    def state_dict(self) -> dict[str, Any]:
        """The outer state, this peer's place in the round and in its data, defined between any two inner steps.

        With several ranks, a call of all; the leader has it, the others get {}.
        """
        state: dict[str, Any] = {}
        self._together("state_dict", lambda: state.update(self._state_dict()))
        return state

    def _state_dict(self) -> dict[str, Any]:
        return {
            "algorithm": self.spec.algorithm,
            "fingerprint": self.layout.fingerprint,
            "version": self.version.number,
            "parameters": self.version.parameters.clone(),
            "momentum": self.version.momentum.clone(),
            "local": self.layout.read(),
            "steps": self.steps,
            "since_applied": self._since_applied,
            "missed": self._missed,
            "weight": self._weight,
            "data": self.peer.data.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, within the context and between two passes over the data, which must be open again.

        Where the run has gone on since, its versions and positions hold. Raises CheckpointMismatch for another model,
        algorithm or dataset; then nothing changes. With several ranks, a call of all; the leader's state counts.
        """
        self._together("load_state_dict", lambda: self._load_state_dict(state))

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        for what, ours in (("algorithm", self.spec.algorithm), ("fingerprint", self.layout.fingerprint)):
            if state[what] != ours:
                raise CheckpointMismatch(f"the state's {what} is {state[what]!r}, this loop's is {ours!r}")
        if state["data"]:
            self.peer.data.load_state_dict(state["data"])
        self._stepped_from, self._state, self._led_by = None, b"", ""
        self._doubts.clear()
        self._adopt(Version(state["version"], state["parameters"].clone(), state["momentum"].clone()))
        self.layout.write(state["local"])
        self.steps, self._since_applied = state["steps"], state["since_applied"]
        self._missed, self._weight = state["missed"], state["weight"]

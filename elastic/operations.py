"""One operation as its caller lives it: propose, execute attempts, wait for the final word.

`Operation.run` stays in the caller's thread and decides nothing: the coordinator starts, aborts and commits attempts,
the group executes them, and whatever is unanswered is asked again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from collectives.records import Done, Failed, Identity, OperationRecord, Start

from . import errors
from .errors import (
    CollectiveError,
    ConfigurationError,
    CoordinatorUnavailable,
    ElasticError,
    NotEnoughPeers,
    RoundAborted,
)
from .messages import (
    Base,
    Begin,
    Cancel,
    Commit,
    DoneReport,
    FailedReport,
    Message,
    Propose,
    Refused,
    RoundFailed,
    Short,
    Withdraw,
)
from .runstate import LINEAGE

if TYPE_CHECKING:
    import torch

    from collectives.records import Abort

ASK_AGAIN_SECONDS = 1.0

Inbox = queue.SimpleQueue[Any]


class Executor(Protocol):
    """The part of `collectives.Group` that executes attempts."""

    def run(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Done | Failed: ...

    def abort(self, abort: Abort) -> None: ...


@dataclass(frozen=True, slots=True)
class Renewed:
    """Put into every inbox when a new generation of the coordinator has taken this peer in."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an operation ended.

    counted: the committed result holds this operation's numbers, and is in the buffer; a name alone does not say so,
    since another life may have had it.
    begin, result, record: of the attempt that this peer finished last, if any.
    base: set instead of a commit if the peer is so far behind that it must fetch the state anew.
    """

    commit: Commit | None
    counted: bool
    attempts: int
    begin: Begin | None = None
    result: torch.Tensor | None = None
    record: OperationRecord | None = None
    base: Base | None = None


def gives(start: Start, name: str) -> bool:
    """Whether this peer sends numbers of its own in the attempt: in a broadcast, only the root does."""
    names = [member.name for member in start.contributors]
    return name in names and (start.op != "broadcast" or start.shares[names.index(name)] > 0)


def segment_of(begin: Begin, name: str) -> tuple[int, int]:
    """Where this contributor's segment of the whole begins and ends; nowhere, for who is none."""
    names = [member.name for member in begin.start.contributors]
    index = names.index(name) if name in names else len(names)
    low = sum(begin.segments[:index])
    return low, low + sum(begin.segments[index : index + 1])


def refusal(refused: Refused, peer: str) -> ElasticError:
    """The exception that a refusal stands for."""
    if refused.error == "Quarantined":
        return errors.Quarantined(refused.reason, peer=peer, epoch=refused.epoch, retry_after=refused.retry_after)
    kind = getattr(errors, refused.error, ElasticError)
    error: ElasticError = kind(refused.reason, peer=peer, epoch=refused.epoch)
    return error


class Operation:
    """buffers: for an attempt, a flat tensor of what this peer gives, never written, and one for the result, which
    holds it once that is committed. Their length may depend on who takes part.
    """

    def __init__(
        self,
        proposal: Propose,
        buffers: Callable[[Begin], tuple[torch.Tensor, torch.Tensor]],
        *,
        name: str,
        inbox: Inbox,
        group: Executor,
        send: Callable[[Message], None],
        finished: tuple[int, int] = (0, -1),
        silent_for: Callable[[], float] = lambda: 0.0,
        operated: Callable[[OperationRecord], None] = lambda record: None,
        exchanging: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._proposal, self._buffers = proposal, buffers
        self._name, self._inbox, self._group, self._send = name, inbox, group, send
        self._finished, self._silent_for, self._operated = finished, silent_for, operated
        self._exchanging = exchanging
        self._pending: Message = proposal
        self._done: Done | None = None
        self._begin: Begin | None = None
        self._result: torch.Tensor | None = None
        self._ended: Identity | None = None
        self._attempts = 0
        self._short = ""
        self._arrived: deque[Any] = deque()

    def run(self, timeout: float, at_most: Callable[[], float] = lambda: math.inf) -> Outcome:
        """Waits for the commit, taking part in as many attempts as it needs. Obeys Ctrl-C.

        at_most: seconds that are left by now, if that can become fewer meanwhile.

        Raises RoundAborted if the round is given up, ParityError and the like if it is refused, NotEnoughPeers or
        CoordinatorUnavailable after `timeout` seconds, CollectiveError or ConfigurationError if this peer itself cannot
        execute what it is told. In each case the source is untouched and the run goes on without this contribution.
        """
        deadline = time.monotonic() + timeout
        self._send(self._pending)
        try:
            while True:
                outcome = self._handle(self._next(deadline, at_most))
                if outcome is not None:
                    return outcome
        except BaseException:
            self.withdraw()
            raise

    def withdraw(self) -> None:
        """Tells the coordinator that nobody waits for this any more."""
        self._send(self._stamped(Withdraw, sequence=self._proposal.sequence))

    def _next(self, deadline: float, at_most: Callable[[], float]) -> Any:
        if self._arrived:
            return self._arrived.popleft()
        while True:
            left = min(deadline - time.monotonic(), at_most())
            try:
                return self._inbox.get(timeout=max(0.001, min(left, ASK_AGAIN_SECONDS)))
            except queue.Empty:
                if left <= 0:
                    raise self._too_late() from None
                self._send(self._pending)

    def _too_late(self) -> ElasticError:
        if self._silent_for() > ASK_AGAIN_SECONDS * 3:
            return CoordinatorUnavailable(f"the coordinator has not answered for {self._silent_for():.0f} s")
        reason = self._short or "the round did not come together in time; are enough peers there?"
        return NotEnoughPeers(f"{self._proposal.tag}: {reason}", peer=self._name)

    def _handle(self, message: Any) -> Outcome | None:
        match message:
            case Begin() if self._is_news(message, message.start.round):
                self._attempt(message)
            case Cancel() if self._is_news(message, message.abort.round):
                self._acknowledge(message.abort)
            case Commit() if self._is_news(message, message.round):
                return self._judge(message) if not self._is_earlier(message) else None
            case Short() if self._is_news(message, message.round):
                self._short = message.reason
            case Base():
                self.withdraw()
                return Outcome(None, False, self._attempts, base=message)
            case RoundFailed() if message.round < 0 or self._is_news(message, message.round):
                raise RoundAborted(message.reason, peer=self._name, round=message.round, epoch=message.epoch)
            case Refused() if message.sequence in (-1, self._proposal.sequence):
                raise refusal(message, self._name)
            case Renewed():
                self._ask_anew()
            case ElasticError():
                raise message
        return None

    def _is_news(self, message: Message, round: int) -> bool:
        """Whether this is about a round that is not over for this peer: within a lineage, numbers only grow."""
        return (message.generation // LINEAGE, round) > self._finished

    def _attempt(self, begin: Begin) -> None:
        start = begin.start
        if start.sequence_of(self._name) not in (-1, self._proposal.sequence):
            return  # it takes a proposal that was withdrawn, and is about to be aborted for that
        if self._done is not None and self._done.identity == start.identity:
            self._send(self._pending)
            return
        self._attempts += 1
        self._short = ""
        source, result = self._buffers(begin)
        self._done, self._begin, self._result = None, begin, result
        self._proposal = dataclasses.replace(self._proposal, round=start.round)
        try:
            with self._exchanging():
                outcome = self._group.run(start, source if gives(start, self._name) else None, result)
        except ValueError as error:  # numbers that cannot travel, or an attempt that cannot be: nothing to try again
            raise ConfigurationError(str(error), peer=self._name, round=start.round, epoch=start.epoch) from error
        if isinstance(outcome, Done):
            self._done = outcome
            self._pending = self._stamped(
                DoneReport, round=start.round, attempt=start.attempt, digest=outcome.digest, generation=start.generation
            )
            self._send(self._pending)
            self._operated(outcome.record)
        else:
            self._end(start.identity, outcome)
            self._check_own_fault(outcome)

    def _check_own_fault(self, failed: Failed) -> None:
        """No link was lost and nobody called the attempt off: then it would fail here again, and not for the others."""
        if failed.lost:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._arrived.append(self._inbox.get_nowait())
        aborts = (message.abort.identity for message in self._arrived if isinstance(message, Cancel))
        if failed.identity in aborts or any(isinstance(message, ElasticError) for message in self._arrived):
            return
        identity = failed.identity
        reason = f"{identity.tag}: peer {self._name} could not take part in round {identity.round}: {failed.reason}"
        raise CollectiveError(reason, peer=self._name, round=identity.round, epoch=identity.epoch)

    def _end(self, identity: Identity, failed: Failed) -> None:
        self._ended = identity
        self._pending = self._proposal
        report = self._stamped(
            FailedReport,
            round=identity.round,
            attempt=identity.attempt,
            generation=identity.generation,
            reason=failed.reason,
            lost=failed.lost,
        )
        self._send(report)

    def _acknowledge(self, abort: Abort) -> None:
        """The attempt is over everywhere. A result that this peer already holds does not count."""
        if abort.identity == self._ended:
            return
        if self._done is not None and self._done.identity == abort.identity:
            self._done = None
        self._end(abort.identity, Failed(identity=abort.identity, reason="aborted"))

    def _ask_anew(self) -> None:
        # votes are not journaled: the new generation gets the proposal again, and starts or knows the round
        self._pending = self._proposal
        self._send(self._pending)

    def _is_earlier(self, commit: Commit) -> bool:
        """Whether this is the late end of a plain operation that its caller has given up before this one."""
        plain = self._proposal.base_version < 0 and commit.round != self._proposal.round
        if plain and self._name in commit.contributors and self.done_digest != commit.digest:
            self._finished = (commit.generation // LINEAGE, commit.round)
            return True
        return False

    def _judge(self, commit: Commit) -> Outcome:
        counted = self._name in commit.contributors and self.done_digest == commit.digest
        record = self._done.record if self._done else None
        return Outcome(commit, counted, self._attempts, self._begin, self._result, record)

    @property
    def start_order(self) -> Start | None:
        """Of the attempt that this peer has executed last; None before the first."""
        return self._begin.start if self._begin else None

    @property
    def done_digest(self) -> str:
        """Of the result that this peer has reported; "" if none. It may be committed after `run` has raised."""
        return self._done.digest if self._done is not None else ""

    def _stamped(self, kind: type[Any], **fields: Any) -> Any:
        proposal = self._proposal
        common = {"run": proposal.run, "incarnation": proposal.incarnation, "epoch": proposal.epoch}
        return kind(**common | {"generation": proposal.generation, "tag": proposal.tag} | fields)

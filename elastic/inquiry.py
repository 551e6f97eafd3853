"""Questions to a coordinator by somebody who is no member: a command, a monitor."""

from __future__ import annotations

import queue
import secrets
import time
from types import TracebackType
from typing import Any, TypeVar

from .config import JoinToken
from .control import Control
from .errors import CoordinatorUnavailable, ElasticError, VersionMismatch
from .messages import PROTOCOL, Message, Refused, StatusReport, StatusRequest
from .operations import ASK_AGAIN_SECONDS, refusal

Answer = TypeVar("Answer", bound=Message)


def inquire(where: JoinToken, question: type[Message], answer: type[Answer], timeout: float, **fields: Any) -> Answer:
    """Asks until the answer comes; asked again, a question changes nothing in the run. fields: of the question.

    Raises CoordinatorUnavailable after `timeout` seconds, and what the coordinator refuses with: ConfigurationError
    if it serves another run.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    own = secrets.randbits(63) | 1
    asked = question(run=where.run, incarnation=own, **fields)

    def heard(message: Any) -> bool:
        inbox.put(message)
        return True

    control = Control(
        where.coordinator,
        "inquirer",
        own,
        heartbeat=min(ASK_AGAIN_SECONDS, timeout / 4),
        patience=timeout / 4,  # a run can have several addresses
        on_message=heard,
        on_beat=lambda: asked,
        on_failure=lambda error: inbox.put(ElasticError(f"the control thread failed: {error!r}")),
    )
    try:
        return _next_answer(inbox, answer, where, timeout)
    finally:
        control.close()


def check_version(report: StatusReport) -> None:
    """Raises VersionMismatch if this coordinator would refuse a peer of this installation."""
    if report.protocol != PROTOCOL:
        raise VersionMismatch(
            f"the coordinator speaks protocol {report.protocol}, this installation speaks {PROTOCOL}: install the same "
            "version of elastic on both"
        )


class Watch:
    """The state of a run, asked for every so many seconds until `close`. The coordinator may be away for long."""

    def __init__(self, where: JoinToken, *, every: float = 1.0, patience: float = 5.0) -> None:
        self._run = where.run
        self._report: StatusReport | None = None
        own = secrets.randbits(63) | 1
        question = StatusRequest(run=where.run, incarnation=own)
        self._control = Control(
            where.coordinator,
            "inquirer",
            own,
            heartbeat=every,
            patience=patience,
            on_message=self._heard,
            on_beat=lambda: question,
            on_failure=lambda error: None,  # then it is silent
        )

    @property
    def report(self) -> StatusReport | None:
        """As it was last told; None before the first time."""
        return self._report

    @property
    def silence(self) -> float:
        """Seconds since the coordinator was last heard, or since this began."""
        return time.monotonic() - self._control.heard_at

    def _heard(self, message: Any) -> bool:
        """An old life of the coordinator, which nobody follows any more, is no news."""
        known = self._report.generation if self._report else 0
        if not isinstance(message, StatusReport) or message.run != self._run or message.generation < known:
            return False
        self._report = message
        return True

    def close(self) -> None:
        self._control.close()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _next_answer(inbox: queue.SimpleQueue[Any], answer: type[Answer], where: JoinToken, timeout: float) -> Answer:
    deadline = time.monotonic() + timeout
    while True:
        try:
            message = inbox.get(timeout=max(0.001, deadline - time.monotonic()))
        except queue.Empty:
            raise CoordinatorUnavailable(
                f"no answer from the coordinator at {where.coordinator} within {timeout:g} s: is it running, and does "
                "a firewall let the port through?"
            ) from None
        if isinstance(message, answer):
            return message
        if isinstance(message, Refused):
            raise refusal(message, "")
        if isinstance(message, ElasticError):
            raise message

"""Questions to a coordinator by somebody who is no member: a command, a monitor."""

from __future__ import annotations

import queue
import secrets
import time
from typing import Any, TypeVar

from .config import JoinToken
from .control import Control
from .errors import CoordinatorUnavailable, ElasticError
from .messages import Message, Refused
from .operations import ASK_AGAIN_SECONDS, refusal

Answer = TypeVar("Answer", bound=Message)


def inquire(where: JoinToken, question: type[Message], answer: type[Answer], timeout: float) -> Answer:
    """Asks until the answer comes; it changes nothing in the run.

    Raises CoordinatorUnavailable after `timeout` seconds, and what the coordinator refuses with: ConfigurationError
    if it serves another run.
    """
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    own = secrets.randbits(63) | 1
    asked = question(run=where.run, incarnation=own)

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

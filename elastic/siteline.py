"""A site supervisor's line to its coordinator: whom it has lost or given up, and what room it has for others.

What must not get lost is said again and again, each time the whole of it.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import replace

from .config import check_coordinator
from .control import Control
from .messages import Drain, GivenUp, Gone, Message, SiteReport, Vacancy

REASON_LENGTH = 200


class SiteLine:
    """Connects a supervisor of `site` to the run; a thread of its own keeps the line and says what `tell` was told.

    on_vacancy: called with each offer of a place, and with its end, on that thread; must not block. Offers are repeated
    until the place is among those that `tell` was told to be taken, or declined. on_drain: called likewise when the
    site is asked to leave, within so many seconds; more than once. every: seconds.
    """

    def __init__(
        self,
        coordinator: str,
        run: str,
        site: str,
        *,
        on_vacancy: Callable[[Vacancy], None] = lambda vacancy: None,
        on_drain: Callable[[float], None] = lambda seconds: None,
        every: float = 1.0,
        patience: float = 5.0,
    ) -> None:
        self.incarnation = secrets.randbits(63) | 1
        self._report = SiteReport(run=run, incarnation=self.incarnation, site=site)
        self._on_vacancy, self._on_drain = on_vacancy, on_drain
        self._generation = 0
        self._control = Control(
            check_coordinator(coordinator),
            "supervisor",
            self.incarnation,
            heartbeat=every,
            patience=patience,
            on_message=self._receive,
            on_beat=lambda: self._report,
            on_failure=lambda error: None,
        )

    def tell(self, *, room: int = 0, given_up: tuple[GivenUp, ...] = (), taking: tuple[str, ...] = ()) -> None:
        """What holds from now on: peers that there is room for, those given up, and the places that are taken up."""
        given_up = tuple(replace(gone, reason=gone.reason[:REASON_LENGTH]) for gone in given_up)
        self._report = replace(self._report, room=room, given_up=given_up, taking=taking)
        self._control.send(self._report)

    def decline(self, name: str) -> None:
        """This place cannot be taken."""
        self._control.send(replace(self._report, declined=(name,)))

    def prove_gone(self, name: str, incarnation: int, evidence: str) -> None:
        """The process of this life has ended: a supervisor's proof. Returns once it is queued."""
        report = self._report
        gone = Gone(run=report.run, incarnation=self.incarnation, name=name, ended=incarnation, evidence=evidence)
        self._control.send(gone)

    def _receive(self, message: Message) -> bool:
        if message.generation < self._generation:
            return False
        self._generation = message.generation
        if isinstance(message, Vacancy):
            self._on_vacancy(message)
        elif isinstance(message, Drain):
            self._on_drain(message.seconds)
        return True

    def close(self) -> None:
        """Sends what is queued, if it can, and ends the line."""
        self._control.close()

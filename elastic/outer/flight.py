"""One contribution on its way to a commit, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import RoundAborted
from ..messages import Commit, Propose
from ..operations import Operation, Outcome

if TYPE_CHECKING:
    import torch

    from collectives.records import Start

ABANDON_SECONDS = 5.0


class Exchange:
    """Runs an operation in a thread of its own (`start`), or in the caller's (`wait` alone).

    result: where the operation puts the committed numbers. patience: seconds that it may take; at_most: seconds that
    are left for it by now, which may become fewer. tell: puts something into the operation's inbox. on_commit: called
    in whichever thread it runs, with a commit that has this contribution, and the result.
    """

    def __init__(
        self,
        operation: Operation,
        proposal: Propose,
        result: torch.Tensor,
        patience: float,
        at_most: Callable[[], float],
        tell: Callable[[object], None],
        on_commit: Callable[[Commit, torch.Tensor], None],
    ) -> None:
        self.proposal, self.result = proposal, result
        self.seconds = 0.0
        self._operation, self._patience, self._at_most, self._tell = operation, patience, at_most, tell
        self._on_commit = on_commit
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="elastic-exchange", daemon=True)
        self._thread.start()

    @property
    def started(self) -> bool:
        """Whether it has a thread of its own, which goes on if the caller is interrupted."""
        return self._thread is not None

    @property
    def finished(self) -> bool:
        return self._outcome is not None or self._error is not None

    @property
    def done_digest(self) -> str:
        """Of the result that this peer has reported, "" if none: it may be committed after this has failed."""
        return self._operation.done_digest

    @property
    def start_order(self) -> Start | None:
        """Of the attempt that this peer finished last."""
        return self._operation.start_order

    def wait(self) -> Outcome:
        """The outcome, or what `Operation.run` raises. Obeys Ctrl-C; then a thread of its own goes on."""
        if self._thread is not None:
            self._thread.join()
        else:
            self._run()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def abandon(self) -> None:
        """Nobody waits for it any more: it ends as soon as it looks up, or with the peer."""
        if self._thread is not None and not self.finished:
            self._tell(RoundAborted("the loop was left", peer=""))
            self._operation.withdraw()
            self._thread.join(ABANDON_SECONDS)

    def _run(self) -> None:
        began = time.monotonic()
        try:
            outcome = self._operation.run(self._patience, self._at_most)
            if outcome.commit is not None and outcome.counted:
                self._on_commit(outcome.commit, self.result)
            self._outcome = outcome
        except BaseException as error:  # told to whoever waits
            self._error = error
        self.seconds = time.monotonic() - began

"""The coordinator's host inside a Ray: the same class and server as `elastic coordinator`, in an actor."""

from __future__ import annotations

from pathlib import Path

import ray

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.messages import StatusReport


@ray.remote(num_cpus=0, max_restarts=0)
class CoordinatorActor:
    """Serves one run until it is ended. Arguments are those of `elastic.Coordinator`."""

    def __init__(
        self,
        bind: str,
        run: str,
        policy: RunPolicy,
        timeouts: Timeouts,
        journal: Path | None,
        events: Path | None,
    ) -> None:
        self._coordinator = Coordinator(bind, run=run, policy=policy, timeouts=timeouts, journal=journal, events=events)

    def address(self) -> str:
        return self._coordinator.address

    def status(self) -> StatusReport:
        if self._coordinator.error is not None:
            raise RuntimeError(f"the coordinator has failed: {self._coordinator.error}")
        return self._coordinator.status()

    def close(self) -> None:
        self._coordinator.close()

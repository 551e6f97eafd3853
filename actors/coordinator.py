"""The coordinator's host inside a Ray: the same class and server as `elastic coordinator`, in an actor."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError, CoordinatorUnavailable
from elastic.messages import StatusReport

from .local_ray import NAMESPACE, error_line
from .restarts import GiveUp, Restarts

ASK_SECONDS = 0.5
PORT_SECONDS = 15.0  # for the port to be free after the end of a process that held it
CLOSE_SECONDS = 2.0


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

    def process(self) -> int:
        """Its process id; raises if the server has failed."""
        if self._coordinator.error is not None:
            raise RuntimeError(f"the coordinator has failed: {self._coordinator.error}")
        return os.getpid()

    def status(self) -> StatusReport:
        self.process()
        return self._coordinator.status()

    def close(self) -> None:
        self._coordinator.close()


@dataclass(frozen=True, kw_only=True)
class CoordinatorSpec:
    """What it takes to start the coordinator of a run, again and again: bind, with its port from the first time on."""

    run: str
    bind: str
    policy: RunPolicy
    timeouts: Timeouts
    journal: Path
    events: Path


class CoordinatorHost:
    """Keeps a coordinator alive, on the node of the process that makes this; all its lives have one journal and port.

    say: takes events.
    """

    def __init__(self, spec: CoordinatorSpec, restarts: Restarts, hang: float, say: Callable[..., None]) -> None:
        self._spec, self._restarts, self._hang, self._say = spec, restarts, hang, say
        self._actor: Any = None
        self._lives = self.pid = 0

    async def start(self) -> str:
        """The address that it listens on. Raises ConfigurationError, with the reason, if it cannot."""
        try:
            address = await self._begin()
        except RayActorError as error:
            raise ConfigurationError(f"the coordinator cannot begin: {error_line(error)}") from None
        self._spec = replace(self._spec, bind=address)
        return address

    async def keep(self) -> None:
        """Starts it again whenever it ends, fails or hangs. Raises CoordinatorUnavailable once that is of no use."""
        while True:
            await asyncio.sleep(ASK_SECONDS)
            try:
                self.pid = await asyncio.wait_for(_awaited(self._actor.process.remote()), self._hang)
            except (RayActorError, RayTaskError, TimeoutError) as error:
                await self._again(error)

    async def _again(self, error: Exception) -> None:
        evidence = "it hangs" if isinstance(error, TimeoutError) else error_line(error)
        self._say("coordinator.lost", pid=self.pid, evidence=evidence)
        verdict = self._restarts.died("", evidence, time.monotonic())
        if isinstance(verdict, GiveUp):
            raise CoordinatorUnavailable(f"the coordinator cannot be kept: it {verdict.reason}")
        self._end()
        await asyncio.sleep(verdict.after)
        deadline = time.monotonic() + PORT_SECONDS
        while True:
            try:
                await self._begin()
                return
            except RayActorError as refused:  # its port may be held, by a process that takes its time to end
                self._end()
                if time.monotonic() > deadline:
                    raise CoordinatorUnavailable(f"the coordinator cannot begin: {error_line(refused)}") from None
                await asyncio.sleep(ASK_SECONDS)

    async def _begin(self) -> str:
        spec, here = self._spec, ray.get_runtime_context().get_node_id()
        self._lives += 1
        actor: Any = CoordinatorActor
        self._actor = actor.options(
            name=f"{spec.run}.coordinator.i{self._lives}",
            namespace=NAMESPACE,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        ).remote(spec.bind, spec.run, spec.policy, spec.timeouts, spec.journal, spec.events)
        address: str = await _awaited(self._actor.address.remote())
        self.pid = await _awaited(self._actor.process.remote())
        self._say("coordinator.started", pid=self.pid, life=self._lives, address=address)
        return address

    async def close(self) -> None:
        if self._actor is not None:
            with contextlib.suppress(Exception):  # it may be dead, and is ended anyhow
                await asyncio.wait_for(_awaited(self._actor.close.remote()), CLOSE_SECONDS)
            self._end()

    def _end(self) -> None:
        if self._actor is not None:
            ray.kill(self._actor)
            self._actor = None


async def _awaited(call: Any) -> Any:
    return await call

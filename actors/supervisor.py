"""The site's supervisor: starts peers, watches them with deadlines of its own, and starts the next life of a dead one.

Ray reports a crash within milliseconds and a hang never; so the supervisor asks each peer regularly, and ends one that
does not answer for `hang_seconds`. It proves a death to the coordinator, which decides what it means. It moves no
tensors and decides nothing about rounds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from elastic.events import EventLog
from elastic.peer import prove_gone

from .local_ray import error_line
from .peer import Life, PeerActor, PeerSpec, Trained

ASK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """A peer that ended `max_restarts` times within `window_seconds` is given up. hang_seconds: without an answer."""

    max_restarts: int = 3
    window_seconds: float = 600.0
    hang_seconds: float = 30.0


@dataclass
class Charge:
    """One peer in the supervisor's care. state: starting, running, restarting, finished or failed."""

    spec: PeerSpec
    state: str = "starting"
    lives: int = 0
    life: Life | None = None
    actor: Any = None
    trained: Trained | None = None
    error: str = ""
    deaths: deque[float] = field(default_factory=deque)


@dataclass(frozen=True, kw_only=True)
class ChargeReport:
    """A peer's state as its supervisor sees it. trained: what it leaves behind, once finished."""

    name: str
    state: str
    lives: int
    pid: int
    trained: Trained | None
    error: str


@ray.remote(num_cpus=0, max_restarts=0)
class SiteSupervisor:
    """Keeps the peers of one site alive. An async actor: it answers while it watches."""

    def __init__(self, specs: list[PeerSpec], policy: RestartPolicy, events: EventLogSpec) -> None:
        self._charges = {spec.name: Charge(spec) for spec in specs}
        self._policy = policy
        self._events = EventLog(events.path, run=events.run)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts every peer; returns at once."""
        self._tasks = [asyncio.create_task(self._keep(charge)) for charge in self._charges.values()]

    async def report(self) -> list[ChargeReport]:
        return [_report(charge) for charge in self._charges.values()]

    async def stop(self) -> None:
        """Ends every peer at once and starts none again."""
        for task in self._tasks:
            task.cancel()
        for charge in self._charges.values():
            _end(charge)

    async def _keep(self, charge: Charge) -> None:
        while charge.state not in ("finished", "failed"):
            try:
                await self._live_and_die(charge)
            except RayTaskError as error:
                self._give_up(charge, error_line(error.cause if isinstance(error.cause, Exception) else error))
            except Exception as error:  # whatever it is: a peer that nobody keeps must not look as if it ran
                self._give_up(charge, error_line(error))

    async def _live_and_die(self, charge: Charge) -> None:
        try:
            await self._live(charge)
        except (RayActorError, GetTimeoutError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise  # its next life would fail in the same way
            await self._died(charge, error)
        finally:
            _end(charge)

    async def _live(self, charge: Charge) -> None:
        """One life, from its start to the end of its training; raises when it dies or hangs."""
        charge.lives += 1
        options = {"name": f"{charge.spec.name}.i{charge.lives}"}  # a name per life: Ray frees names late
        charge.actor = PeerActor.options(**options).remote(charge.spec)
        charge.life = await charge.actor.life.remote()
        charge.state = "running"
        self._events.emit("peer.started", peer=charge.spec.name, life=charge.lives, pid=charge.life.pid)
        training = asyncio.ensure_future(charge.actor.train.remote())
        await self._watch(charge, training)
        charge.trained = training.result()
        charge.state = "finished"

    async def _watch(self, charge: Charge, training: asyncio.Future[Any]) -> None:
        heard = time.monotonic()
        while not training.done():
            answer = asyncio.ensure_future(charge.actor.life.remote())
            await asyncio.wait({training, answer}, timeout=ASK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if answer.done() and answer.exception() is None:
                heard = time.monotonic()
            elif time.monotonic() - heard > self._policy.hang_seconds:
                raise GetTimeoutError(f"{charge.spec.name} has not answered for {self._policy.hang_seconds:.0f} s")
            await asyncio.wait({training}, timeout=ASK_SECONDS)
        training.result()

    async def _died(self, charge: Charge, error: Exception) -> None:
        name, life = charge.spec.name, charge.life
        evidence = "it hangs" if isinstance(error, GetTimeoutError) else "its process has ended"
        self._events.emit("peer.lost", peer=name, life=charge.lives, evidence=evidence)
        _end(charge)
        if life is not None:
            await asyncio.to_thread(
                prove_gone, charge.spec.coordinator, charge.spec.run, name, life.incarnation, evidence
            )
        charge.life = None
        self._decide_restart(charge, error)

    def _decide_restart(self, charge: Charge, error: Exception) -> None:
        now = time.monotonic()
        charge.deaths.append(now)
        while charge.deaths and now - charge.deaths[0] > self._policy.window_seconds:
            charge.deaths.popleft()
        if len(charge.deaths) > self._policy.max_restarts:
            self._give_up(charge, f"ended {len(charge.deaths)} times: {error_line(error)}")
            return
        charge.state = "restarting"
        charge.spec = replace(charge.spec, fault=None)  # a fault strikes one life only
        self._events.emit("peer.restarted", peer=charge.spec.name, life=charge.lives + 1)

    def _give_up(self, charge: Charge, reason: str) -> None:
        charge.state, charge.error = "failed", reason
        self._events.emit("peer.failed", peer=charge.spec.name, reason=reason)


@dataclass(frozen=True, kw_only=True)
class EventLogSpec:
    """Where an actor writes its events; None: nowhere."""

    run: str
    path: Any


def _report(charge: Charge) -> ChargeReport:
    return ChargeReport(
        name=charge.spec.name,
        state=charge.state,
        lives=charge.lives,
        pid=charge.life.pid if charge.life else 0,
        trained=charge.trained,
        error=charge.error,
    )


def _end(charge: Charge) -> None:
    # a held handle keeps the actor's name taken, and a hung process needs ray.kill to go
    if charge.actor is not None:
        ray.kill(charge.actor)
        charge.actor = None

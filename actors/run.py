"""A run whose supervisor keeps its coordinator, too: how it begins, how long it goes on, and what it leaves behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elastic.errors import ElasticError, NotEnoughPeers
from elastic.events import EventLog

from .charge import Charge, ChargeReport, nodes
from .coordinator import CoordinatorHost, CoordinatorSpec
from .fleet import Need, endpoint, impossible, short, stand
from .folder import History, RunFolder
from .peer import PeerSpec, own_address
from .restarts import FailureConfig, Restarts

WATCH_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class FleetSpec:
    """coordinator: its bind is "" where the supervisor chooses. fewest: peers that the run takes; start_seconds: within
    which they must have found room."""

    coordinator: CoordinatorSpec
    fewest: int
    start_seconds: float
    folder: RunFolder


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run has ended. trouble: why it could not go on, apart from its peers. lost: too few of them could.

    failed: names of those that failed, in order.
    """

    peers: tuple[ChargeReport, ...] = ()
    failed: tuple[str, ...] = ()
    lost: bool = False
    trouble: ElasticError | None = None

    @property
    def well(self) -> bool:
        return not self.lost and self.trouble is None


@dataclass(frozen=True, kw_only=True)
class Left:
    """What a run has left in its folder, `path`. history: all metrics. checkpoint: the newest whole one."""

    path: Path
    history: list[dict[str, Any]]
    checkpoint: Path | None


class Awaited:
    """A value that comes later, once, for any number of waiters."""

    def __init__(self) -> None:
        self._there = asyncio.Event()
        self._value: Outcome | None = None

    def set(self, value: Outcome) -> None:
        self._value = value
        self._there.set()

    async def get(self) -> Outcome:
        await self._there.wait()
        assert self._value is not None
        return self._value


class OwnRun:
    """charges: the peers that the run may have, in their supervisor's care."""

    def __init__(self, spec: FleetSpec, policy: FailureConfig, events: EventLog, charges: Mapping[str, Charge]) -> None:
        self._spec, self._policy, self._events, self._charges = spec, policy, events, charges
        self._host: CoordinatorHost | None = None
        self.history: History | None = None
        self.outcome = Awaited()

    async def found(self, template: PeerSpec) -> dict[str, Any]:
        """Starts the coordinator; returns what its peers need to know of it, as fields of their specs.

        Raises NotEnoughPeers if no node could ever hold a peer, ConfigurationError.
        """
        known = await asyncio.to_thread(nodes)
        self._need = need_of(template)
        if reason := impossible(self._need, known):
            raise NotEnoughPeers(reason)
        if aside := await asyncio.to_thread(self._spec.folder.begin):
            self._events.emit("run.begun_anew", journal=str(aside))
        self.history = History(self._spec.folder.metrics)
        bind, host = endpoint(self._spec.coordinator.bind or None, known, own_address())
        spec = replace(self._spec.coordinator, bind=bind)
        self._host = CoordinatorHost(spec, Restarts(self._policy), self._policy.hang_seconds, self._events.emit)
        address = await self._host.start()
        return {
            "coordinator": f"tcp://{host}:{address.rpartition(':')[2]}",
            "listen": "127.0.0.1:0" if host == "127.0.0.1" else None,
        }

    async def watched(self, draining: Callable[[], bool]) -> Outcome:
        """Until nobody is under way any more, or the run cannot go on. The coordinator is kept meanwhile."""
        assert self._host is not None, "found it first"
        keeping = asyncio.create_task(self._host.keep())
        try:
            return await self._watched(keeping, draining)
        except Exception as error:  # whatever it is: nobody may wait for this in vain
            return Outcome(trouble=ElasticError(f"the supervisor has failed: {error!r}"))
        finally:
            keeping.cancel()

    async def _watched(self, keeping: asyncio.Task[None], draining: Callable[[], bool]) -> Outcome:
        began, spec, charges = time.monotonic(), self._spec, self._charges.values()
        while True:
            await asyncio.wait({keeping}, timeout=WATCH_SECONDS)
            if keeping.done():
                return Outcome(trouble=_of_ours(keeping.exception()))
            found = sum(charge.begun for charge in charges)
            if found < spec.fewest and time.monotonic() - began > spec.start_seconds and not draining():
                return Outcome(trouble=await self._too_few(found))
            if any(charge.state == "finished" for charge in charges):
                self._dismiss_waiting()
            standing = stand([charge.state for charge in charges], spec.fewest)
            if standing.over:
                return Outcome(lost=standing.lost)

    async def _too_few(self, found: int) -> NotEnoughPeers:
        known, spec = await asyncio.to_thread(nodes), self._spec
        return NotEnoughPeers(short(self._need, known, found=found, fewest=spec.fewest, seconds=spec.start_seconds))

    def _dismiss_waiting(self) -> None:
        """Where one has finished, there is nothing left to begin with."""
        for charge in self._charges.values():
            if not charge.done and (charge.state == "waiting" or not charge.begun):
                charge.dismiss(self._events)

    async def conclude(self, outcome: Outcome, *, well: bool) -> None:
        """Whoever waits for the outcome has it, and the coordinator is ended. well: there is nothing to go on with."""
        peers = tuple(charge.report() for charge in self._charges.values())
        failed = sorted((c for c in self._charges.values() if c.state == "failed"), key=lambda c: c.failed_at)
        outcome = replace(outcome, peers=peers, failed=tuple(charge.name for charge in failed))
        self._events.emit("run.ended", well=well, failed=list(outcome.failed), trouble=str(outcome.trouble or ""))
        if well:
            lives = {peer.name: {"state": peer.state, "lives": peer.lives} for peer in peers}
            self._spec.folder.mark_ended(peers=lives)
        self.outcome.set(outcome)
        await self.close()

    async def left(self) -> Left:
        folder = self._spec.folder
        history, checkpoint = await asyncio.to_thread(lambda: (folder.history(), folder.checkpoint()))
        return Left(path=folder.path, history=history, checkpoint=checkpoint)

    async def close(self) -> None:
        if self._host is not None:
            await self._host.close()
        if self.history is not None:
            self.history.close()


def need_of(spec: PeerSpec) -> Need:
    """What a peer takes of its node."""
    amounts = {"CPU": spec.cpus, "GPU": spec.gpus} | spec.resources
    return Need({name: amount for name, amount in amounts.items() if amount > 0}, spec.labels)


def _of_ours(error: BaseException | None) -> ElasticError:
    return error if isinstance(error, ElasticError) else ElasticError(f"the coordinator is not kept: {error!r}")

"""The site's supervisor: starts peers, watches them with deadlines of its own, and starts the next life of a dead one.

Ray reports a crash within milliseconds and a hang never; so the supervisor asks each peer regularly, and ends one that
does not answer for `hang_seconds`. It proves a death to the coordinator, which decides what it means. When and where
the next life begins is for `restarts` to say. A peer that is given up may go on at another site: the coordinator offers
its place to supervisors that have room. It moves no tensors and decides nothing about rounds.
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from elastic.errors import ConfigurationError, ElasticError, Evicted
from elastic.events import EventLog
from elastic.messages import SUPERSEDED, GivenUp, Vacancy
from elastic.siteline import SiteLine

from .local_ray import error_line
from .logs import tail
from .peer import Life, PeerSpec, Process, Raised, Trained
from .restarts import FailureConfig, GiveUp, Place, Restarts
from .unit import Unit

ASK_SECONDS = 1.0
EXPELLED_SECONDS = 5.0  # for a script to notice that its peer is no member any more
MAX_PLACES = 4
TAIL_SECONDS = 15.0  # for another node to say what the end of a log is


class NoRoom(ElasticError):
    """No node has started a life's process in time."""


class Charge:
    """One peer in the supervisor's care. state: starting, running, restarting, finished or failed.

    incarnation: of the last life that has said that the run has admitted it; 0: none. guest: it was another
    supervisor's before. given_up: why no further life begins here, if the coordinator needs to know.
    """

    def __init__(self, spec: PeerSpec, policy: FailureConfig, *, guest: bool = False) -> None:
        self.spec, self.guest = spec, guest
        self.state = "starting"
        self.lives = 0
        self.incarnation = 0
        self.life: Life | None = None
        self.process: Process | None = None
        self.log: str | None = None
        self.log_node = ""
        self.unit: Unit | None = None
        self.trained: Trained | None = None
        self.error = self.given_up = ""
        self.task: asyncio.Task[None] | None = None
        self.restarts = Restarts(policy)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def done(self) -> bool:
        return self.state in ("finished", "failed")

    @property
    def arriving(self) -> bool:
        """A guest that the run has not admitted yet."""
        return self.guest and not self.incarnation and not self.given_up and not self.done


@dataclass(frozen=True, kw_only=True)
class ChargeReport:
    """A peer's state as its supervisor sees it. trained: what it leaves behind, once finished.

    error: why it was given up, in the first line; then the last lines of its log, if it has one.
    """

    name: str
    state: str
    lives: int
    pid: int
    trained: Trained | None
    error: str
    node: str = ""

    @property
    def reason(self) -> str:
        return self.error.partition("\n")[0]


@ray.remote(num_cpus=0, max_restarts=0)
class SiteSupervisor:
    """Keeps the peers of one site alive. An async actor: it answers while it watches.

    room: how many peers it can host beyond its own, should other supervisors give theirs up. template: how such a peer
    is started, but for its name; by default as the first of `specs`. All are of one run and site.
    """

    def __init__(
        self,
        specs: list[PeerSpec],
        policy: FailureConfig,
        events: EventLogSpec,
        *,
        room: int = 0,
        template: PeerSpec | None = None,
    ) -> None:
        self._template = _template(specs, template, room)
        self._charges = {spec.name: Charge(spec, policy) for spec in specs}
        self._policy, self._room = policy, room
        self._events = EventLog(events.path, run=events.run)
        self._line: SiteLine | None = None
        self._draining = False

    async def start(self) -> None:
        """Starts every peer; returns at once."""
        loop, about = asyncio.get_running_loop(), self._template

        def offered(vacancy: Vacancy) -> None:
            loop.call_soon_threadsafe(self._offered, vacancy)

        def asked(seconds: float) -> None:
            asyncio.run_coroutine_threadsafe(self.drain(seconds), loop)

        self._line = SiteLine(
            about.coordinator,
            about.run,
            about.site,
            on_vacancy=offered,
            on_drain=asked,
            every=about.timeouts.heartbeat,
            patience=2 * about.timeouts.chunk,
        )
        self._say()
        for charge in self._charges.values():
            charge.task = asyncio.create_task(self._keep(charge))

    async def report(self) -> list[ChargeReport]:
        return [_report(charge) for charge in self._charges.values()]

    async def drain(self, seconds: float) -> None:
        """Every peer makes one last exchange within so many seconds, and leaves; nobody is started again."""
        if self._draining:
            return
        self._draining, self._room = True, 0
        for charge in self._charges.values():
            if charge.state == "running" and charge.unit is not None:
                charge.unit.drain(seconds)
            elif not charge.done:
                _stop(charge)
                charge.state = "finished"
        self._say()

    async def stop(self) -> None:
        """Ends every peer at once and starts none again."""
        if self._line is not None:
            await asyncio.to_thread(self._line.close)
        for charge in self._charges.values():
            _stop(charge)

    # --- guests -----------------------------------------------------------------------------------------------------

    def _say(self) -> None:
        """What the coordinator is to know of this site, as it is now."""
        charges = self._charges.values()
        hosted = sum(charge.guest and not charge.done for charge in charges)
        given_up = [GivenUp(name=c.name, ended=c.incarnation, reason=c.given_up) for c in charges if c.given_up]
        assert self._line is not None, "start first"
        self._line.tell(
            room=max(0, self._room - hosted),
            given_up=tuple(given_up),
            taking=tuple(charge.name for charge in charges if charge.arriving),
        )

    def _offered(self, vacancy: Vacancy) -> None:
        charge = self._charges.get(vacancy.name)
        if not vacancy.free:
            self._not_free(charge)
        elif charge is None or charge.done:
            self._take(vacancy.name)
        elif not charge.arriving and self._line is not None:
            self._line.decline(vacancy.name)

    def _take(self, name: str) -> None:
        assert self._line is not None, "start first"
        if sum(charge.guest and not charge.done for charge in self._charges.values()) >= self._room:
            self._line.decline(name)
            return
        charge = Charge(replace(self._template, name=name, fault=None), self._policy, guest=True)
        self._charges[name] = charge
        self._events.emit("vacancy.taken", peer=name)
        charge.task = asyncio.create_task(self._keep(charge))
        self._say()

    def _not_free(self, charge: Charge | None) -> None:
        """It took too long here, or another life came first: it must not expel that one."""
        if charge is not None and charge.arriving:
            _stop(charge)
            del self._charges[charge.name]
            self._events.emit("vacancy.left", peer=charge.name)
            self._say()

    # --- lives ------------------------------------------------------------------------------------------------------

    async def _keep(self, charge: Charge) -> None:
        while not charge.done:
            try:
                await self._live_and_die(charge)
            except Exception as error:  # whatever it is: a peer that nobody keeps must not look as if it ran
                await self._give_up(charge, error_line(error), vacant=True)

    async def _live_and_die(self, charge: Charge) -> None:
        try:
            await self._live(charge)
        except RayTaskError as error:
            await self._raised(charge, error.cause if isinstance(error.cause, Exception) else error)
        except Evicted as error:
            await self._raised(charge, error)
        except (RayActorError, GetTimeoutError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise  # its next life would fail in the same way
            await self._died(charge, error)
        except NoRoom as error:
            await self._give_up(charge, error_line(error), vacant=True)
        finally:
            _end(charge)

    async def _live(self, charge: Charge) -> None:
        """One life, from its start to the end of its training; raises when it dies or hangs."""
        charge.lives += 1
        charge.process = await self._placed(charge)
        charge.restarts.began(charge.process.node)
        assert charge.unit is not None
        charge.life = await self._answer(charge, charge.unit, charge.unit.join())
        charge.incarnation, charge.state = charge.life.incarnation, "running"
        self._say()
        where = {"pid": charge.process.pid, "node": charge.process.node}
        self._events.emit("peer.started", peer=charge.name, life=charge.lives, **where)
        ended = await self._answer(charge, charge.unit, charge.unit.train())
        if isinstance(ended, Raised):
            await self._give_up(charge, ended.line)
            return
        charge.state, charge.trained = "finished", ended
        self._say()

    async def _answer(self, charge: Charge, unit: Unit, call: Any) -> Any:
        """What the call returns, or raises; GetTimeoutError if the process says nothing meanwhile, Evicted if the run
        goes on without it and its script does not notice."""
        answer, heard, member = asyncio.ensure_future(call), time.monotonic(), time.monotonic()
        while not answer.done():
            alive = asyncio.ensure_future(unit.process())
            await asyncio.wait({answer, alive}, timeout=ASK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if alive.done() and alive.exception() is None:
                heard = time.monotonic()
                expelled = alive.result().expelled
                member = member if expelled else heard
                if expelled and heard - member > EXPELLED_SECONDS:
                    raise expelled
            elif time.monotonic() - heard > self._policy.hang_seconds:
                raise GetTimeoutError(f"{charge.name} has not answered for {self._policy.hang_seconds:.0f} s")
            await asyncio.wait({answer}, timeout=ASK_SECONDS)
        return answer.result()

    # --- where they live --------------------------------------------------------------------------------------------

    async def _placed(self, charge: Charge) -> Process:
        """Starts the process of the next life, where there is room for it. Raises NoRoom, or how it ended at once."""
        charge.log, charge.log_node = charge.spec.log(charge.lives), ""
        tried: list[Place] = []
        while True:
            places = charge.restarts.places(await asyncio.to_thread(_nodes), time.monotonic())
            tried.append(next(place for place in places if place not in tried))
            try:
                process = await self._start(charge, tried[-1], len(tried))
                charge.log_node = process.node
                return process
            except (RayActorError, NoRoom) as error:
                _end(charge)
                place, last = tried[-1], tried[-1] == Place() or len(tried) == MAX_PLACES
                self._events.emit("peer.unplaced", peer=charge.name, node=place.node, reason=error_line(error))
                if last or getattr(error, "actor_init_failed", False):
                    raise
                # a node that has just died looks alive for some time yet
                charge.restarts.unplaced(place, time.monotonic())

    async def _start(self, charge: Charge, place: Place, attempt: int) -> Process:
        charge.unit = Unit(charge.spec, f"{charge.name}.i{charge.lives}.{attempt}", place, charge.log)
        answer = asyncio.ensure_future(charge.unit.process())
        await asyncio.wait({answer}, timeout=self._policy.place_seconds)
        try:
            if answer.done():
                process: Process = answer.result()
                return process
        except ActorUnschedulableError:
            pass
        raise NoRoom(f"no node has had room for it in {self._policy.place_seconds:g} s")

    # --- deaths -----------------------------------------------------------------------------------------------------

    async def _died(self, charge: Charge, error: Exception) -> None:
        """Without a word: a crash, a hang, or its node has gone with it."""
        node = charge.process.node if charge.process else ""
        evidence = "it hangs" if isinstance(error, GetTimeoutError) else "its process has ended"
        if node and node not in await asyncio.to_thread(_nodes):
            evidence = "its node is gone"
        _end(charge)
        if charge.life is not None and self._line is not None:
            self._line.prove_gone(charge.name, charge.life.incarnation, evidence)
        await self._count(charge, node, evidence, error)

    async def _raised(self, charge: Charge, error: Exception) -> None:
        """With an exception: it may ask for another life; any other would be raised again."""
        after = getattr(error, "retry_after", None)
        expelled = isinstance(error, Evicted) and "was expelled" in str(error) and SUPERSEDED not in str(error)
        if isinstance(after, (int, float)) and after == math.inf:
            await self._give_up(charge, error_line(error))
        elif isinstance(after, (int, float)) and after >= 0:
            await self._restart(charge, after, error_line(error))
        elif getattr(error, "retryable", False) or expelled:
            await self._count(charge, charge.process.node if charge.process else "", error_line(error), error)
        else:
            await self._give_up(charge, error_line(error))

    async def _count(self, charge: Charge, node: str, evidence: str, error: Exception) -> None:
        self._events.emit("peer.lost", peer=charge.name, life=charge.lives, evidence=evidence, node=node)
        verdict = charge.restarts.died(node, evidence, time.monotonic())
        if isinstance(verdict, GiveUp):
            await self._give_up(charge, f"{verdict.reason}: {error_line(error)}", vacant=True)
        else:
            await self._restart(charge, verdict.after, evidence)

    async def _restart(self, charge: Charge, after: float, reason: str) -> None:
        charge.state, charge.life, charge.process = "restarting", None, None
        if self._draining:
            charge.state = "finished"
            return
        charge.spec = replace(charge.spec, fault=None)  # a fault strikes one life only
        _end(charge)
        self._events.emit("peer.restarted", peer=charge.name, life=charge.lives + 1, after=after, reason=reason)
        await asyncio.sleep(after)

    async def _give_up(self, charge: Charge, reason: str, *, vacant: bool = False) -> None:
        """vacant: another site may do better. A life that raised has left the run, and would raise anywhere."""
        if vacant:
            charge.given_up = reason
            self._say()
        lines = await _last_words(charge)
        said = f"\nthe last lines of {charge.log}:" + "".join(f"\n  {line}" for line in lines) if lines else ""
        self._events.emit(
            "peer.failed", peer=charge.name, reason=reason, lives=charge.lives, log=charge.log, said=lines
        )
        charge.state, charge.error = "failed", reason + said
        self._say()


@dataclass(frozen=True, kw_only=True)
class EventLogSpec:
    """Where an actor writes its events; None: nowhere."""

    run: str
    path: Any


def _report(charge: Charge) -> ChargeReport:
    return ChargeReport(
        name=charge.name,
        state=charge.state,
        lives=charge.lives,
        pid=charge.process.pid if charge.process else 0,
        trained=charge.trained,
        error=charge.error,
        node=charge.process.node if charge.process else "",
    )


def _template(specs: list[PeerSpec], template: PeerSpec | None, room: int) -> PeerSpec:
    if not specs and template is None:
        raise ConfigurationError("a supervisor without peers of its own needs a template for those of others")
    if room < 0:
        raise ConfigurationError(f"room is {room}: it must be 0 (none) or more")
    chosen = template or specs[0]
    for spec in specs:
        if (spec.coordinator, spec.run, spec.site) != (chosen.coordinator, chosen.run, chosen.site):
            raise ConfigurationError(f"peers {chosen.name} and {spec.name} are not of the same run and site")
    return chosen


def _stop(charge: Charge) -> None:
    if charge.task is not None:
        charge.task.cancel()
    _end(charge)


def _end(charge: Charge) -> None:
    if charge.unit is not None:
        charge.unit.kill()
        charge.unit = None


def _nodes() -> set[str]:
    known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return {node["NodeID"] for node in known if node["Alive"]}


async def _last_words(charge: Charge) -> tuple[str, ...]:
    """The end of what its last life has printed; nothing if that is not known, or its node does not say."""
    log, node = charge.log, charge.log_node
    if log is None:
        return ()
    if not node or node == ray.get_runtime_context().get_node_id() or Path(log).exists():
        return await asyncio.to_thread(tail, log)
    there = _tail.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
    try:
        lines: tuple[str, ...] = await asyncio.wait_for(_awaited(there.remote(log)), TAIL_SECONDS)
        return lines
    except Exception:  # a report without them is better than none
        return ()


async def _awaited(call: Any) -> Any:
    return await call


_tail: Any = ray.remote(num_cpus=0, max_retries=0)(tail)

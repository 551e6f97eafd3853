"""The site's supervisor: starts peers, watches them with deadlines of its own, and starts the next life of a dead one.

Ray reports a crash within milliseconds and a hang never; so the supervisor asks each peer regularly, and ends one that
does not answer for `hang_seconds`. It proves a death to the coordinator, which decides what it means. When and where
the next life begins is for `restarts` to say. A peer that is given up may go on at another site: the coordinator offers
its place to supervisors that have room. It moves no tensors and decides nothing about rounds.

Of a `Trainer`'s run it also keeps the coordinator, waits for room for as many peers as there may be, and says how the
run has ended, to whoever asks first.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, RayActorError, RayTaskError

from elastic.errors import ConfigurationError, ElasticError, Evicted
from elastic.events import EventLog
from elastic.messages import SUPERSEDED, GivenUp, Vacancy
from elastic.siteline import SiteLine

from .charge import Charge, answers, awaited
from .charge import ChargeReport as ChargeReport
from .local_ray import error_line
from .peer import PeerSpec, Process, Raised, own_address
from .restarts import FailureConfig, GiveUp, Place
from .run import FleetSpec, Left, Outcome, OwnRun
from .unit import Unit, nodes

ASK_SECONDS = 1.0
EXPELLED_SECONDS = 5.0  # for a script to notice that its peer is no member any more
MAX_PLACES = 4
WAITING_SECONDS = 5.0  # without a process, after which a peer is said to wait for room
LAST_SECONDS = 5.0  # for a life that has trained to hand over what it has reported
DRAIN_GRACE = 5.0
NODE_GONE = "its node is gone"


class NoRoom(ElasticError):
    """No node has started a life's process in time."""


@dataclass(frozen=True, kw_only=True)
class EventLogSpec:
    """Where an actor writes its events; None: nowhere."""

    run: str
    path: Any


@ray.remote(num_cpus=0, max_restarts=0)
class SiteSupervisor:
    """Keeps the peers of one site alive. An async actor: it answers while it watches.

    room: how many peers it can host beyond its own, should other supervisors give theirs up. template: how such a peer
    is started, but for its name; by default as the first of `specs`. All are of one run and site. fleet: the run is its
    own; `specs` are as many as there may be, and name no coordinator.
    """

    def __init__(
        self,
        specs: list[PeerSpec],
        policy: FailureConfig,
        events: EventLogSpec,
        *,
        room: int = 0,
        template: PeerSpec | None = None,
        fleet: FleetSpec | None = None,
    ) -> None:
        self._template = _template(specs, template, room)
        self._charges = {spec.name: Charge(spec, policy) for spec in specs}
        self._policy, self._room = policy, room
        self._events = EventLog(events.path, run=events.run)
        self._run = OwnRun(fleet, policy, self._events, self._charges) if fleet else None
        self._line: SiteLine | None = None
        self._started = self._draining = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Starts every peer; returns at once. Again: does nothing. Raises NotEnoughPeers, ConfigurationError."""
        if self._started:
            return
        self._started = True
        if self._run is not None:
            await self._found(self._run)
        self._open_line()
        for charge in self._charges.values():
            charge.task = asyncio.create_task(self._keep(charge))
        if self._run is not None:
            self._tasks.append(asyncio.create_task(self._see_to_its_end(self._run)))

    def _open_line(self) -> None:
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

    async def report(self) -> list[ChargeReport]:
        return [charge.report() for charge in self._charges.values()]

    async def drain(self, seconds: float) -> None:
        """Every peer makes one last exchange and leaves, within so many seconds; nobody is started again. Returns at
        once."""
        if self._draining:
            return
        self._draining, self._room = True, 0
        self._events.emit("site.draining", seconds=seconds)
        for charge in self._charges.values():
            if charge.state == "running" and charge.unit is not None:
                self._tasks.append(asyncio.create_task(_asked(charge.unit.drain(seconds))))
            elif not charge.done:
                charge.dismiss(self._events)
        self._tasks.append(asyncio.create_task(self._end_late(seconds)))
        if self._line is not None:
            self._say()

    async def _end_late(self, seconds: float) -> None:
        await asyncio.sleep(seconds + DRAIN_GRACE)
        for charge in self._charges.values():
            if not charge.done:
                charge.stop()
                await self._give_up(charge, f"it had not ended {seconds:g} s after it was asked to")

    async def stop(self) -> None:
        """Ends every peer at once and starts none again; the coordinator, too, if it is kept here."""
        for task in self._tasks:
            task.cancel()
        await self._close()
        if self._run is not None:
            await self._run.close()

    async def _close(self) -> None:
        if self._line is not None:
            await asyncio.to_thread(self._line.close)
        for charge in self._charges.values():
            charge.stop()

    # --- a run of its own -------------------------------------------------------------------------------------------

    async def _found(self, run: OwnRun) -> None:
        """The run has a coordinator, and every peer knows where."""
        where = await run.found(self._template)
        self._template = replace(self._template, **where)
        for charge in self._charges.values():
            charge.spec = replace(charge.spec, **where)

    async def ended(self) -> Outcome:
        """Returns once the run has ended."""
        assert self._run is not None, "only a run of its own ends"
        return await self._run.outcome.get()

    async def left(self) -> Left:
        """What there is in the run's folder."""
        assert self._run is not None, "only a run of its own has a folder"
        return await self._run.left()

    async def _see_to_its_end(self, run: OwnRun) -> None:
        outcome = await run.watched(lambda: self._draining)
        await self._close()
        await run.conclude(outcome, well=outcome.well and not self._draining)

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
            charge.stop()
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
            cause = error.cause if isinstance(error.cause, Exception) else error
            await self._raised(charge, Raised.of(cause, str(error)), cause)
        except Evicted as error:
            await self._raised(charge, Raised.of(error, ""), error)
        except (RayActorError, GetTimeoutError) as error:
            if isinstance(error, RayActorError) and error.actor_init_failed:
                raise  # its next life would fail in the same way
            await self._died(charge, error)
        except NoRoom as error:
            await self._give_up(charge, error_line(error), vacant=True)
        finally:
            charge.end()

    async def _live(self, charge: Charge) -> None:
        """One life, from its start to the end of its training; raises when it dies or hangs."""
        if charge.ended is not None:
            await charge.ended.gone()  # two lives at once would share the memory of one
        charge.lives += 1
        charge.heard = 0
        charge.process = await self._placed(charge)
        charge.begun = True
        charge.restarts.began(charge.process.node)
        assert charge.unit is not None
        self._check_reach(charge, charge.process)
        charge.life = await self._answer(charge, charge.unit, charge.unit.join())
        charge.incarnation, charge.state = charge.life.incarnation, "running"
        self._say()
        where = {"pid": charge.process.pid, "node": charge.process.node}
        self._events.emit("peer.started", peer=charge.name, life=charge.lives, **where)
        ended = await self._answer(charge, charge.unit, charge.unit.train())
        if isinstance(ended, Raised):
            await self._raised(charge, ended)
            return
        charge.trained, charge.state = ended, "finished"
        self._say()

    def _check_reach(self, charge: Charge, process: Process) -> None:
        """A run that began on one host is not to be reached from another."""
        if self._run is not None and charge.spec.listen is not None:
            here = own_address()
            if process.address != here:
                raise ConfigurationError(
                    f"{process.address} cannot reach the coordinator, which is on loopback since this Ray had one host "
                    f"when the run began: give RunConfig(bind='{here}:0')"
                )

    async def _answer(self, charge: Charge, unit: Unit, call: Any) -> Any:
        """What the call returns, or raises; GetTimeoutError if the process says nothing meanwhile, Evicted if the run
        goes on without it and its script does not notice."""
        answer, heard, member = asyncio.ensure_future(call), time.monotonic(), time.monotonic()
        while not answer.done():
            alive = asyncio.ensure_future(unit.process(charge.heard))
            await asyncio.wait({answer, alive}, timeout=ASK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            if alive.done() and alive.exception() is None:
                heard = time.monotonic()
                self._note(charge, alive.result())
                expelled = alive.result().expelled
                member = member if expelled else heard
                if expelled and heard - member > EXPELLED_SECONDS:
                    raise expelled
            elif time.monotonic() - heard > self._policy.hang_seconds:
                raise GetTimeoutError(f"{charge.name} has not answered for {self._policy.hang_seconds:.0f} s")
            await asyncio.wait({answer}, timeout=ASK_SECONDS)
        if charge.life is not None and not isinstance(answer.exception(), RayActorError):
            await self._take_the_rest(charge, unit)
        return answer.result()

    def _note(self, charge: Charge, process: Process) -> None:
        """What it has reported is part of the run's history; what comes again is not."""
        fresh = [each for each in process.reported if each.number > charge.heard]
        if not fresh:
            return
        if dropped := fresh[0].number - charge.heard - 1:
            self._events.emit("metrics.dropped", peer=charge.name, entries=dropped)
        charge.heard = fresh[-1].number
        if self._run is not None and self._run.history is not None and charge.life is not None:
            self._run.history.add(charge.name, charge.life.life, fresh)

    async def _take_the_rest(self, charge: Charge, unit: Unit) -> None:
        """What it has reported since it was asked last."""
        try:
            self._note(charge, await asyncio.wait_for(awaited(unit.process(charge.heard)), LAST_SECONDS))
        except (RayActorError, RayTaskError, TimeoutError) as error:
            self._events.emit("metrics.missing", peer=charge.name, reason=error_line(error))

    # --- where they live --------------------------------------------------------------------------------------------

    async def _placed(self, charge: Charge) -> Process:
        """Starts the process of the next life, where there is room for it; of a run of its own, once there is.

        Raises NoRoom, or how it ended at once.
        """
        charge.log, charge.log_node = charge.spec.log(charge.lives), ""
        attempt, tried = 0, list[Place]()
        while True:
            places = charge.restarts.places((await asyncio.to_thread(nodes)).keys(), time.monotonic())
            tried.append(next(place for place in places if place not in tried))
            attempt += 1
            try:
                process = await self._start(charge, tried[-1], attempt)
                charge.log_node = process.node
                return process
            except (RayActorError, NoRoom) as error:
                charge.end()
                place, last = tried[-1], tried[-1] == Place() or len(tried) == MAX_PLACES
                self._events.emit("peer.unplaced", peer=charge.name, node=place.node, reason=error_line(error))
                if getattr(error, "actor_init_failed", False) or (last and self._run is None):
                    raise
                # a node that has just died looks alive for some time yet
                charge.restarts.unplaced(place, time.monotonic())
                if last:  # and where there is no room now, there may be later
                    tried.clear()
                    await asyncio.sleep(ASK_SECONDS)

    async def _start(self, charge: Charge, place: Place, attempt: int) -> Process:
        title = f"{charge.spec.run}.{charge.name}.i{charge.lives}.{attempt}"
        charge.unit = Unit(charge.spec, title, place, charge.log)
        answer, patience = asyncio.ensure_future(charge.unit.process()), self._policy.place_seconds
        await asyncio.wait({answer}, timeout=min(WAITING_SECONDS, patience))
        if not answer.done() and self._run is not None and charge.state != "waiting":
            charge.state = "waiting"
            self._events.emit("peer.waiting", peer=charge.name)
        await asyncio.wait({answer}, timeout=max(0.0, patience - WAITING_SECONDS))
        try:
            if answer.done():
                process: Process = answer.result()
                charge.state = "starting" if charge.state == "waiting" else charge.state
                return process
        except ActorUnschedulableError:
            pass
        raise NoRoom(f"no node has had room for it in {patience:g} s")

    # --- deaths -----------------------------------------------------------------------------------------------------

    async def _died(self, charge: Charge, error: Exception) -> None:
        """Without a word: a crash, a hang, or its node has gone with it."""
        node = charge.process.node if charge.process else ""
        evidence = "it hangs" if isinstance(error, GetTimeoutError) else "its process has ended"
        if node and node not in await asyncio.to_thread(nodes):
            evidence = NODE_GONE
        charge.end()
        if charge.life is not None and self._line is not None:
            self._line.prove_gone(charge.name, charge.life.incarnation, evidence)
        await self._count(charge, node, evidence, error_line(error), crashed=isinstance(error, RayActorError))

    async def _raised(self, charge: Charge, raised: Raised, error: Exception | None = None) -> None:
        """With an exception: it may ask for another life; any other would be raised again. error: one of ours."""
        expelled = isinstance(error, Evicted) and "was expelled" in str(error) and SUPERSEDED not in str(error)
        if raised.retry_after is not None and raised.retry_after < math.inf:
            await self._restart(charge, raised.retry_after, raised.line)
        elif raised.retry_after is None and (raised.retryable or expelled):
            node = charge.process.node if charge.process else ""
            await self._count(charge, node, raised.line, raised.line)
        else:
            charge.raised = raised
            await self._give_up(charge, raised.line)

    async def _count(self, charge: Charge, node: str, evidence: str, words: str, *, crashed: bool = False) -> None:
        self._events.emit("peer.lost", peer=charge.name, life=charge.lives, evidence=evidence, node=node)
        if evidence == NODE_GONE:  # that says nothing of the peer
            await self._restart(charge, 0.0, evidence)
            return
        verdict = charge.restarts.died(node, evidence, time.monotonic())
        if not isinstance(verdict, GiveUp):
            await self._restart(charge, verdict.after, evidence)
        elif crashed and node and not await answers(node):  # Ray just did not know yet
            charge.restarts.excuse(node)
            await self._restart(charge, 0.0, NODE_GONE)
        else:
            await self._give_up(charge, f"{verdict.reason}: {words}", vacant=True)

    async def _restart(self, charge: Charge, after: float, reason: str) -> None:
        charge.end()
        if self._draining:
            await self._give_up(charge, f"{reason}, while it was asked to end")
            return
        charge.state, charge.life, charge.process = "restarting", None, None
        charge.spec = replace(charge.spec, fault=None)  # a fault strikes one life only
        self._events.emit("peer.restarted", peer=charge.name, life=charge.lives + 1, after=after, reason=reason)
        await asyncio.sleep(after)

    async def _give_up(self, charge: Charge, reason: str, *, vacant: bool = False) -> None:
        """vacant: another site may do better. A life that raised has left the run, and would raise anywhere."""
        if vacant:
            charge.given_up = reason
            self._say()
        charge.end()
        lines = await charge.last_words()
        said = f"\nthe last lines of {charge.log}:" + "".join(f"\n  {line}" for line in lines) if lines else ""
        self._events.emit(
            "peer.failed", peer=charge.name, reason=reason, lives=charge.lives, log=charge.log, said=lines
        )
        charge.state, charge.error = "failed", reason + said
        charge.failed_at = time.monotonic()
        self._say()


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


async def _asked(call: Any) -> None:
    """Who cannot be asked any more has ended, and is found out to."""
    with contextlib.suppress(Exception):
        await call

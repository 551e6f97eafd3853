"""Carries a schedule out, from outside: signals to processes, orders to all others, and the account of what fired.

An injection counts as fired only on evidence: of a kill, that the process is gone; of a freeze, that the kernel has
stopped it; of all else, that the process has noted it. Whatever happens to the driver but SIGKILL, what it has frozen
is thawed in the end, and what it has ordered and not seen to its end is called off.
"""

from __future__ import annotations

import math
import random
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from .inject import ANY, PROCESS, Fault
from .orders import PEER, Lines, Registered, call_off, order, prepare, registered, send_signal, strike
from .schedule import Due, Schedule

LOOK_SECONDS = 0.02


class Absent(Exception):
    """Targets did not come in time."""


@dataclass(slots=True, kw_only=True)
class Injected:
    """One injection, and what came of it. number: of its entry. target: who, in words.

    at: seconds from the beginning when it was carried out; None if it was not. fired: how often. why: it did not.
    """

    number: int
    kind: str
    target: str
    due: float
    at: float | None = None
    fired: int = 0
    why: str = ""


@dataclass(slots=True, eq=False)
class _Running:
    """What was carried out. to: in whose hands it is. began: when it struck, time.monotonic()."""

    record: Injected
    fault: Fault
    to: tuple[Registered, ...]
    since: float
    began: float | None = None
    over: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def by_signal(self) -> bool:
        return self.fault.about.place == PROCESS and self.fault.round is None


class Driver:
    """One pass through a schedule, once. patience: seconds that an injection waits for its target, and for its firing.

    say: is told each injection as it is carried out. Raises ScheduleError, and OSError if the folder cannot be used.
    """

    def __init__(
        self,
        schedule: Schedule,
        folder: Path,
        *,
        seed: int | None = None,
        seconds: float | None = None,
        patience: float = 30.0,
        say: Callable[[Injected], None] = lambda record: None,
    ) -> None:
        self._waiting = schedule.due(seed=seed, seconds=seconds)
        prepare(folder)
        self._needed = {name for entry in schedule.entries for name in entry.needed}
        self._pairs = any(entry.fault.kind == "partition" and entry.target == ANY for entry in schedule.entries)
        self._folder, self._patience, self._say = folder, patience, say
        self._draw = random.Random(f"{schedule.seed if seed is None else seed} whom")
        self._nonce = secrets.token_hex(4)
        self._lines = {path: Lines(path, from_end=True) for path in folder.glob("*.fired.jsonl")}
        self._running: list[_Running] = []
        self._frozen: dict[Registered, float] = {}
        self._began = 0.0
        self.records: list[Injected] = []

    def wait_for_targets(self, stop: threading.Event, seconds: float) -> None:
        """Until all that the schedule names are registered. Raises Absent, naming those that are not."""
        deadline = time.monotonic() + seconds
        while not stop.is_set() and (missing := self._missing(registered(self._folder))):
            if time.monotonic() > deadline:
                raise Absent(f"{', '.join(missing)} did not register in {self._folder} within {seconds:g} s")
            stop.wait(LOOK_SECONDS)

    def _missing(self, there: dict[str, Registered]) -> list[str]:
        peers = sum(each.role == PEER for each in there.values())
        wanted = (2 if self._pairs else 1) if ANY in self._needed else 0
        some = [f"{wanted - peers} more of any peers"] if peers < wanted else []
        return sorted(self._needed - there.keys() - {ANY}) + some

    def run(self, stop: threading.Event) -> list[Injected]:
        """Returns when every injection has come to its end, or `stop` is set: then all is as before, but the dead."""
        self._began = time.monotonic()
        try:
            while not stop.is_set() and (self._waiting or self._frozen or not all(each.over for each in self._running)):
                self._turn(time.monotonic())
                stop.wait(LOOK_SECONDS)
        finally:
            self._end()
        return self.records

    def _turn(self, now: float) -> None:
        due = [each for each in self._waiting if self._began + each.at <= now]
        begun = [each for each in due if self._begin(each, now)]
        self._waiting = [each for each in self._waiting if each not in begun]
        self._read()
        for each in self._running:
            if not each.over:
                self._look_after(each, now)
        for to, until in list(self._frozen.items()):
            if now >= until:
                self._thaw(to)

    # --- beginning ----------------------------------------------------------------------------------------------------

    def _begin(self, due: Due, now: float) -> bool:
        """False to come again: its target is not there yet."""
        entry = due.entry
        there = registered(self._folder)
        chosen = self._choose(due, there)
        if chosen is None and now < self._began + due.at + self._patience:
            return False
        record = Injected(
            number=entry.number, kind=entry.fault.kind, target=_words(entry.target, entry.fault), due=due.at
        )
        self.records.append(record)
        if chosen is None:
            record.why = "its target was not there"
            return True
        target, fault = chosen
        fault = replace(fault, id=f"{self._nonce}-{len(self.records)}-{fault.kind}")
        both = entry.both_ends or (fault.kind == "partition" and entry.target == ANY)
        to = (there[target], there[fault.peer]) if both else (there[target],)
        record.target, record.at = _words(target, fault), now - self._began
        running = _Running(record, fault, to, now)
        self._running.append(running)
        self._carry_out(running)
        self._say(record)
        return True

    def _choose(self, due: Due, there: dict[str, Registered]) -> tuple[str, Fault] | None:
        entry, fault = due.entry, due.entry.fault
        if entry.target != ANY:
            return (entry.target, fault) if all(name in there for name in entry.needed) else None
        names = [name for name, each in sorted(there.items()) if each.role == PEER and each not in self._frozen]
        if fault.kind == "partition":
            if len(names) < 2:
                return None
            one, other = self._draw.sample(names, 2)
            return one, replace(fault, peer=other)
        return (self._draw.choice(names), fault) if names else None

    def _carry_out(self, running: _Running) -> None:
        first, fault = running.to[0], running.fault
        if running.by_signal:
            if fault.kind == "freeze":  # noted first: it must be thawed whatever happens next
                self._freeze(first, time.monotonic() + (fault.seconds or 0.0))
            if not strike(self._folder, first, fault):
                self._frozen.pop(first, None)
                self._give_up(running, "the process was gone")
            return
        order(self._folder, first, fault)
        for other in running.to[1:]:
            order(self._folder, other, replace(fault, peer=first.name))

    # --- what becomes of it -------------------------------------------------------------------------------------------

    def _read(self) -> None:
        by_id = {each.fault.id: each for each in self._running}
        for path in self._folder.glob("*.fired.jsonl"):
            for line in self._lines.setdefault(path, Lines(path)).read():
                running = by_id.get(str(line.get("id", "")))
                if running is None or running.by_signal:
                    continue
                if line.get("event") == "fault.refused":
                    self._give_up(running, f"refused: {line.get('reason')}")
                else:
                    self._fired(running, path.name, line.get("count"), line.get("monotonic"))

    def _fired(self, running: _Running, where: str, count: object, at: object) -> None:
        running.counts[where] = count if isinstance(count, int) else running.counts.get(where, 0) + 1
        running.record.fired = sum(running.counts.values())
        if running.began is None:
            running.began = at if isinstance(at, float) else time.monotonic()
            if running.fault.kind == "freeze":
                self._freeze(running.to[0], running.began + (running.fault.seconds or 0.0))

    def _look_after(self, running: _Running, now: float) -> None:
        if running.by_signal:
            self._verify(running, now)
            return
        fault, record = running.fault, running.record
        gone = not any(each.alive for each in running.to)
        lasts = fault.lasts if fault.lasts < math.inf else 0.0
        late = now > running.since + lasts + self._patience
        if fault.round is not None:
            late = False  # it comes when it comes; its process is watched
        if record.fired and (
            record.fired >= fault.at_most or now > (running.began or now) + fault.lasts or gone or late
        ):
            running.over = True
        elif gone or late:
            self._read()
            if not record.fired:
                self._give_up(running, "the process ended before it fired" if gone else "it had no occasion to fire")

    def _verify(self, running: _Running, now: float) -> None:
        to = running.to[0]
        struck = not to.alive if running.fault.kind == "kill" else to.state in ("T", "t")
        if struck:
            running.record.fired, running.over, running.began = 1, True, now
        elif now > running.since + self._patience or not to.alive:
            self._give_up(running, "the signal had no effect")

    def _give_up(self, running: _Running, why: str) -> None:
        running.over, running.record.why = True, why
        if not running.by_signal:
            self._call_off(running)

    def _call_off(self, running: _Running) -> None:
        for each in running.to:
            call_off(self._folder, each, running.fault.id)

    # --- the end ------------------------------------------------------------------------------------------------------

    def _freeze(self, to: Registered, until: float) -> None:
        self._frozen[to] = max(until, self._frozen.get(to, 0.0))

    def _thaw(self, to: Registered) -> None:
        send_signal(to, signal.SIGCONT)
        self._frozen.pop(to, None)

    def _end(self) -> None:
        for to in list(self._frozen):
            self._thaw(to)
        self._read()
        for each in self._running:
            if not each.over:
                self._call_off(each)
                each.record.why = each.record.why or ("" if each.record.fired else "stopped before it fired")
        for due in self._waiting:
            fault = due.entry.fault
            words = _words(due.entry.target, fault)
            record = Injected(
                number=due.entry.number, kind=fault.kind, target=words, due=due.at, why="stopped before it"
            )
            self.records.append(record)
        self._waiting = []


def all_fired(records: Iterable[Injected]) -> bool:
    return all(record.fired for record in records)


def _words(target: str, fault: Fault) -> str:
    if fault.peer == ANY:
        return target
    return f"{target} | {fault.peer}" if fault.kind == "partition" else f"{target} -> {fault.peer}"

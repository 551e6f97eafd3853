"""A schedule of faults: a TOML file, checked as a whole before anything is touched, and when each of them is due.

    seed = 7                        # of all that is drawn: who is meant by "any", and jitter

    [[fault]]
    at = 10.0                       # seconds after all targets are there; or
    # every = 30.0                  # again and again, with jitter = SECONDS and count = N; or
    # round = 20                    # once the target's outer loop holds this version
    kind = "freeze"                 # a key of inject.KINDS
    target = "any"                  # a name, "any" (a peer), "coordinator"; of links also ["from", "to"]
    for = 5.0                       # what else a kind needs or takes: for (seconds), times, factor, delay (seconds)

Everything here is a pure function of the file, the seed and the end.
"""

from __future__ import annotations

import difflib
import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .inject import ANY, DISK, KINDS, LINK, PROCESS, Fault
from .orders import COORDINATOR

_WHEN = ("at", "every", "round")
_KEYS = ("kind", "target", *_WHEN, "jitter", "count", "for", "times", "factor", "delay")
MOST = 10_000  # injections of one schedule


class ScheduleError(ValueError):
    """What is wrong with a schedule, in one line: the file, which table, and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One table. number: from 1. fault: what is to happen, of links to `fault.peer`. target: as in the file; with
    `fault.peer`, both ends of a link. at, every: seconds; None if it is not so that it is due, and both None for a
    round. jitter: seconds around each. count: how often, of `every`; None: until the end.
    """

    number: int
    fault: Fault
    target: str
    at: float | None = None
    every: float | None = None
    jitter: float = 0.0
    count: int | None = None

    @property
    def both_ends(self) -> bool:
        """Whether the process at the other end of the link has to do the same."""
        return self.fault.kind == "partition" and self.fault.peer != ANY

    @property
    def needed(self) -> tuple[str, ...]:
        """Names that must be there for it; ANY is any peer."""
        return (self.target, self.fault.peer) if self.both_ends else (self.target,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """One injection of an entry. at: seconds from the beginning."""

    at: float
    entry: Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    entries: tuple[Entry, ...]
    seed: int = 0

    def due(self, *, seed: int | None = None, seconds: float | None = None) -> list[Due]:
        """All injections, in the order in which they are due. seconds: none begins later than that.

        Raises ScheduleError if there is no end to them, or one is due later than the end.
        """
        draw = random.Random(self.seed if seed is None else seed)
        found = [each for entry in self.entries for each in _dues(entry, draw, seconds)]
        if len(found) > MOST:
            raise ScheduleError(f"the schedule has more than {MOST} injections: give a smaller count or an earlier end")
        return sorted(found, key=lambda each: (each.at, each.entry.number))


def _dues(entry: Entry, draw: random.Random, seconds: float | None) -> Iterator[Due]:
    if entry.every is None:
        if seconds is not None and (entry.at or 0.0) > seconds:
            raise ScheduleError(f"[[fault]] {entry.number}: at = {entry.at} comes after the end, {seconds:g} s")
        yield Due(at=entry.at or 0.0, entry=entry)
        return
    if entry.count is None and seconds is None:
        raise ScheduleError(f"[[fault]] {entry.number}: every has no end: give count = N here, or --seconds")
    number = 0
    while number < (entry.count or MOST + 1):
        number += 1
        at = max(0.0, number * entry.every + draw.uniform(-entry.jitter, entry.jitter))
        if seconds is not None and number * entry.every > seconds:
            return
        yield Due(at=at, entry=entry)


def load(path: Path) -> Schedule:
    """Reads and checks a file. Raises ScheduleError."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ScheduleError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError is one, too
        raise ScheduleError(f"{path} is no TOML: {error}") from None
    try:
        return parse(tables)
    except ScheduleError as error:
        raise ScheduleError(f"{path}: {error}") from None


def parse(tables: Mapping[str, Any]) -> Schedule:
    """Checks the tables of a file. Raises ScheduleError."""
    _check_keys(tables, ("seed", "fault"), "the file")
    seed, listed = tables.get("seed", 0), tables.get("fault")
    if type(seed) is not int:
        raise ScheduleError(f"seed is {seed!r}: it must be a whole number")
    if not isinstance(listed, list) or not listed:
        raise ScheduleError("there is no [[fault]] in it: a schedule needs at least one")
    return Schedule(entries=tuple(_entry(number, table) for number, table in enumerate(listed, 1)), seed=seed)


def _check_keys(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "known are " + ", ".join(known)
            raise ScheduleError(f"{where}: {key!r} is no key of it; {hint}")


def _entry(number: int, table: Any) -> Entry:
    where = f"[[fault]] {number}"
    if not isinstance(table, dict):
        raise ScheduleError(f"{where} is no table: begin it with [[fault]]")
    where += f" ({table['kind']})" if isinstance(table.get("kind"), str) else ""
    _check_keys(table, _KEYS, where)
    try:
        target, peer = _ends(table.get("target"))
        fault = _fault(table, peer)
        _check_target(fault, target)
        return Entry(number=number, fault=fault, target=target, **_when(table))
    except ValueError as error:
        raise ScheduleError(f"{where}: {error}") from None


def _fault(table: Mapping[str, Any], peer: str) -> Fault:
    kind = table.get("kind")
    if kind is None:
        raise ValueError("it has no kind")
    if peer != ANY and isinstance(kind, str) and kind in KINDS and KINDS[kind].place != LINK:
        raise ValueError(f"two names are the ends of a link, and a {kind} fault befalls one process")
    given = {key: table[key] for key in ("kind", "round", "times", "factor", "delay") if key in table}
    try:
        return Fault(**given, seconds=table.get("for"), peer=peer)
    except ValueError as error:  # the file's word for it is another
        raise ValueError(re.sub(r"^seconds is|(?<=needs )seconds", _in_words, str(error))) from None


def _in_words(found: re.Match[str]) -> str:
    return found.group().replace("seconds", "for")


def _ends(target: Any) -> tuple[str, str]:
    """Whom it befalls, and the other end of the link."""
    if isinstance(target, str) and target:
        return target, ANY
    pair = isinstance(target, list) and len(target) == 2 and all(isinstance(each, str) and each for each in target)
    if not pair or target[0] == target[1] or {ANY, COORDINATOR} & set(target):
        raise ValueError(
            f"target is {target!r}: it must be a name, {ANY!r} or {COORDINATOR!r}, or two names of peers for a link"
        )
    return target[0], target[1]


def _check_target(fault: Fault, target: str) -> None:
    place = fault.about.place
    if target == COORDINATOR and place not in (PROCESS, DISK):
        raise ValueError("of the coordinator, there are kill, freeze and full-disk")
    if target == COORDINATOR and fault.round is not None:
        raise ValueError("round is of a peer's outer loop; the coordinator needs at or every")


def _when(table: Mapping[str, Any]) -> dict[str, Any]:
    given = [key for key in _WHEN if key in table]
    if len(given) != 1:
        raise ValueError(f"it needs one of at, every and round, and has {' and '.join(given) or 'none'}")
    if "every" not in table and ("jitter" in table or "count" in table):
        raise ValueError("jitter and count belong to every")
    found = {key: _seconds(key, table[key], least) for key, least in (("at", 0.0), ("jitter", 0.0)) if key in table}
    if "every" in table:
        found["every"] = _seconds("every", table["every"], 0.01)
    if "count" in table:
        if type(table["count"]) is not int or table["count"] < 1:
            raise ValueError(f"count is {table['count']!r}: it must be a whole number of at least 1")
        found["count"] = table["count"]
    return found


def _seconds(key: str, value: Any, least: float) -> float:
    if type(value) not in (int, float) or not least <= value < float("inf"):
        raise ValueError(f"{key} is {value!r}: it must be a number of at least {least:g} seconds")
    return float(value)

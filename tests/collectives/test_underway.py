"""What a group says of attempts under way: of whom something is awaited, and for how long nothing has come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from plane import eventually, groups, make_abort, make_start, numbers, run_all, together

from collectives import Failed, Group, LinkOptions, Start
from collectives.frames import Kind
from fault.hangs import Hangs
from fault.records import Trainer
from fault.verdicts import HANG, STALLED

STILL = 0.4
OPTIONS = LinkOptions(chunk_bytes=4096, stripes=1, pool_bytes=16 << 10, shared_memory=False)
ELEMENTS = 60_000


@contextmanager
def exchanging(made: list[Group], start: Start, but: str = "") -> Iterator[None]:
    """An attempt is under way on all groups but one; in the end it is aborted."""
    running = [group for group in made if group.member.name != but]
    outcomes: list[Any] = []

    def run() -> None:
        calls = [lambda group=group: group.run(start, numbers(ELEMENTS, 1), torch.empty(ELEMENTS)) for group in running]
        outcomes.extend(together(*calls))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        for group in running:
            group.abort(make_abort(start))
        thread.join(60)
    assert not thread.is_alive() and all(isinstance(each, Failed) for each in outcomes)


def told(made: list[Group]) -> set[tuple[str, tuple[str, ...]]]:
    hangs = Hangs(STILL)
    for group in made:
        hangs.reported(group.member.name, Trainer(), group.underway(), 0.0)
    return {verdict.key for verdict in hangs.look(0.0)}


def connected(made: list[Group]) -> Start:
    """Orders for groups whose links are up, one operation having gone through."""
    members = [group.member for group in made]
    first = make_start(members, 999)
    run_all(made, first, {member.name: numbers(999, 2) for member in members})
    return make_start(members, ELEMENTS, round=1)


def test_nothing_is_under_way_before_and_after() -> None:
    with groups(3, OPTIONS) as made:
        connected(made)
        assert not any(group.underway() for group in made)


def test_who_has_not_entered_is_named() -> None:
    with groups(3, OPTIONS) as made:
        start = connected(made)
        with exchanging(made, start, but="p2"):
            eventually(lambda: told(made) == {(HANG, ("p2",))})
            for group in made[:2]:
                (underway,) = group.underway()
                assert (underway.tag, underway.round, underway.attempt, underway.stage) == ("grads", 1, 0, "ready")
                whats = {each.peer: each.what for each in underway.awaited}
                assert whats["p2"] == "ready" and underway.awaited[0].seconds <= underway.seconds


def block(made: list[Group], release: threading.Event, fired: list[object]) -> None:
    """What p1 gets is not looked at."""

    def observe(progress: object) -> None:
        fired.append(progress)
        release.wait(60)

    made[1].observer = observe


def drop(made: list[Group], release: threading.Event, fired: list[object]) -> None:
    """What p1 would send of its own numbers does not leave."""
    for link in list(made[1]._links.values()):
        link.send = _without_numbers(link.send, fired)  # type: ignore[method-assign]


def drop_one(made: list[Group], release: threading.Event, fired: list[object]) -> None:
    """What p0 would send to p1 of its own numbers does not leave."""
    (link,) = [link for link in made[0]._links.values() if link.member.name == "p1"]
    link.send = _without_numbers(link.send, fired)  # type: ignore[method-assign]


def _without_numbers(send: Callable[..., None], fired: list[object]) -> Callable[..., None]:
    def kept(*items: Any) -> None:
        fired.extend(item for item in items if item.kind is Kind.SCATTER)
        send(*(item for item in items if item.kind is not Kind.SCATTER))

    return kept


@pytest.mark.parametrize("fault, culprits", [(block, ("p1",)), (drop, ("p1",)), (drop_one, ("p0", "p1"))])
def test_the_one_that_holds_up_the_others_is_named(fault: Any, culprits: tuple[str, ...]) -> None:
    """p2 may send only so much before p0's part is added (pool_bytes): it is not awaited when that does not come."""
    release, fired = threading.Event(), list[object]()
    with groups(3, OPTIONS) as made:
        start = connected(made)
        fault(made, release, fired)
        with exchanging(made, start):
            try:
                eventually(lambda: bool(told(made)))
                eventually(lambda: told(made) == {(STALLED, culprits)})
                assert fired, "the fault did not fire"
            finally:
                release.set()

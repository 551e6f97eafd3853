"""Faults on purpose on bare groups: whatever befalls a link, a result is exact or the attempt fails; and it fired."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from plane import SMALL, Outcome, assert_exact, eventually, make_abort, make_start, numbers, run_all, together

from collectives import Done, Failed, Group
from fault.inject import Fault, Injector

ELEMENTS = 20_000
LARGE = 200_000  # worth shared memory


@contextmanager
def faulty(count: int, shared: bool = False, stripes: int = 1) -> Iterator[tuple[list[Group], list[Injector]]]:
    injectors = [Injector(f"p{i}") for i in range(count)]
    options = replace(SMALL, shared_memory=shared, stripes=stripes, chunk_bytes=65536 if shared else 4096)
    made = [
        Group(run="run", name=f"p{i}", incarnation=100 + i, options=options, faults=injectors[i]) for i in range(count)
    ]
    try:
        for group in made:
            group.connect([each.member for each in made])
        yield made, injectors
    finally:
        for group in made:
            group.close()


class Rounds:
    """All-reduces one after the other; each outcome is checked to be exact or Failed, with the sources as they were."""

    def __init__(self, made: list[Group], elements: int = ELEMENTS) -> None:
        self.made, self.elements, self.round = made, elements, 0

    def one(self) -> list[Outcome]:
        start = make_start([group.member for group in self.made], self.elements, round=self.round)
        self.round += 1
        sources = {group.member.name: numbers(self.elements, i) for i, group in enumerate(self.made)}
        results = [numbers(self.elements, 99) for _ in self.made]
        outcomes = together(*(lambda i=i: self.run(i, start, sources, results) for i in range(len(self.made))))
        for outcome, result in zip(outcomes, results, strict=True):
            assert isinstance(outcome, (Done, Failed)), outcome
            if isinstance(outcome, Done):
                assert_exact(start, sources, [outcome], [result])
        for i, group in enumerate(self.made):
            assert sources[group.member.name].equal(numbers(self.elements, i)), "the source was touched"
        return outcomes

    def run(self, i: int, start, sources, results) -> Outcome:  # type: ignore[no-untyped-def]
        outcome = self.made[i].run(start, sources[self.made[i].member.name], results[i])
        if isinstance(outcome, Failed):  # as a coordinator would
            for group in self.made:
                group.abort(make_abort(start))
        return outcome

    def well(self) -> None:
        assert all(isinstance(outcome, Done) for outcome in self.one())


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stripes", [1, 3])
def test_without_a_fault_nothing_fires(shared: bool, stripes: int) -> None:
    with faulty(3, shared, stripes) as (made, injectors):
        Rounds(made, LARGE if shared else ELEMENTS).well()
        assert not any(injector.statistics() for injector in injectors)


@pytest.mark.parametrize("stripes", [1, 3])
def test_a_delayed_link_is_late_and_exact(stripes: int) -> None:
    with faulty(3, stripes=stripes) as (made, injectors):
        rounds = Rounds(made, 3000)
        rounds.well()
        id = injectors[1].arm(Fault(kind="delay", delay=0.1, times=5, peer="p2"))
        began = time.monotonic()
        while injectors[1].fired[id] < 5:
            rounds.well()
        assert time.monotonic() - began >= (0.5 if stripes == 1 else 0.1), "stripes hold their frames back side by side"
        assert injectors[1].fired == {id: 5} and not injectors[0].fired
        began = time.monotonic()
        rounds.well()
        assert time.monotonic() - began < 0.4, "it is over"


def test_a_long_delay_does_not_hold_up_an_abort() -> None:
    with faulty(2) as (made, injectors):
        rounds = Rounds(made)
        rounds.well()
        injectors[0].arm(Fault(kind="delay", delay=30.0, times=1))
        start = make_start([group.member for group in made], ELEMENTS, round=50)
        sources = {group.member.name: numbers(ELEMENTS, i) for i, group in enumerate(made)}

        def abort() -> None:
            eventually(lambda: sum(injectors[0].fired.values()) == 1)
            for group in made:
                group.abort(make_abort(start, "enough", ("p0", "p1")))

        began = time.monotonic()
        run = (lambda i=i: made[i].run(start, sources[f"p{i}"], numbers(ELEMENTS, 9)) for i in range(2))
        first, second, _ = together(*run, abort)
        assert isinstance(first, Failed) and isinstance(second, Failed)
        assert time.monotonic() - began < 10


def test_a_slow_link_takes_longer_by_its_factor() -> None:
    with faulty(2, stripes=1) as (made, injectors):
        rounds = Rounds(made, 3_000_000)
        rounds.well()
        rounds.well()
        healthy = seconds(rounds)
        id = injectors[0].arm(Fault(kind="slow-link", factor=20.0, seconds=60, peer="p1"))
        slow = seconds(rounds)
        assert injectors[0].fired[id] > 0
        assert slow > 2 * healthy, (healthy, slow)
        injectors[0].disarm(id)


def seconds(rounds: Rounds) -> float:
    began = time.monotonic()
    rounds.well()
    return time.monotonic() - began


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stripes", [1, 3])
def test_a_corrupt_frame_never_enters_a_sum(shared: bool, stripes: int) -> None:
    with faulty(3, shared, stripes) as (made, injectors):
        rounds = Rounds(made, LARGE if shared else ELEMENTS)
        rounds.well()
        id = injectors[2].arm(Fault(kind="corrupt", peer="p0"))
        outcomes = rounds.one()
        assert injectors[2].fired == {id: 1}
        assert isinstance(outcomes[0], Failed) and [
            each.evidence for each in outcomes[0].lost if each.peer == "p2"
        ] == ["corrupt"]
        assert made[0].statistics().corrupt_frames == 1
        rounds.well()
        assert injectors[2].fired == {id: 1}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("stripes", [1, 3])
def test_a_link_that_breaks_in_mid_frame_is_built_again(shared: bool, stripes: int) -> None:
    with faulty(3, shared, stripes) as (made, injectors):
        rounds = Rounds(made, LARGE if shared else ELEMENTS)
        rounds.well()
        id = injectors[0].arm(Fault(kind="drop", times=2))
        while injectors[0].fired[id] < 2:
            outcomes = rounds.one()
            assert any(isinstance(outcome, Failed) for outcome in outcomes)
        rounds.well()


@pytest.mark.parametrize("cutter", ["p0", "p1"])
def test_a_cut_pair_is_named_and_comes_back(cutter: str) -> None:
    """One of the two is enough, whichever of them dials."""
    with faulty(3) as (made, injectors):
        rounds = Rounds(made)
        rounds.well()
        here, other = (0, "p1") if cutter == "p0" else (1, "p0")
        id = injectors[here].arm(Fault(kind="partition", peer=other, seconds=60))
        for _ in range(2):
            lost = {each.peer for outcome in rounds.one() if isinstance(outcome, Failed) for each in outcome.lost}
            assert lost <= {"p0", "p1"} and lost
        fired = injectors[here].fired[id]
        assert fired > 0
        apart = [made[2], made[here]]
        sources = {group.member.name: numbers(ELEMENTS, i) for i, group in enumerate(apart)}
        start = make_start([group.member for group in apart], ELEMENTS, round=100)
        assert_exact(start, sources, *run_all(apart, start, sources))
        injectors[here].disarm(id)
        eventually(lambda: all(isinstance(outcome, Done) for outcome in rounds.one()))
        assert injectors[here].fired[id] >= fired


def test_an_idle_link_is_cut_too() -> None:
    with faulty(2) as (made, injectors):
        Rounds(made).well()
        injectors[0].arm(Fault(kind="partition", peer="p1", times=1))
        eventually(lambda: not any(link.state == "up" for link in made[0].statistics().links))

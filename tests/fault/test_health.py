"""Full disks and clocks that were set, from what peers report of themselves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fault.health import LEAST_FREE, Clocks, Disks, needed
from fault.records import Health

GIB = 1 << 30
fixed = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.parametrize("size, least", [(GIB, LEAST_FREE), (100 * GIB, GIB)])
def test_a_disk_is_full_until_twice_as_much_is_free(size: int, least: int) -> None:
    disks = Disks()
    assert needed(size) == least
    for free, full in ((2 * least, False), (least - 1, True), (least + 1, True), (2 * least, False), (least, False)):
        assert disks.full("a", Health(disk_free=free, disk_bytes=size), 0.0) is full, free
    assert not disks.full("b", Health(), 0.0), "not known is not full"


def test_a_write_that_was_refused_counts_for_a_while() -> None:
    disks, ample = Disks(lasting=60.0), {"disk_free": 50 * GIB, "disk_bytes": 100 * GIB}
    assert not disks.full("a", Health(**ample), 0.0)
    assert disks.full("a", Health(**ample, disk_refused=1), 1.0)
    assert disks.full("a", Health(**ample, disk_refused=1), 60.0)
    assert not disks.full("a", Health(**ample, disk_refused=1), 61.0)
    assert disks.full("a", Health(**ample, disk_refused=2), 62.0)
    disks.forget("a")
    assert not disks.full("a", Health(**ample), 63.0)


@pytest.mark.parametrize("jump, told", [(0.9, False), (1.1, True), (-3600.0, True), (0.0, False)])
def test_a_clock_that_was_set_is_told_once(jump: float, told: bool) -> None:
    clocks = Clocks()
    assert clocks.moved("a", Health(clock=1.7e9), 0.0) == 0.0
    found = clocks.moved("a", Health(clock=1.7e9 + jump), 0.5)
    assert bool(found) is told and (not told or found == pytest.approx(jump))
    assert clocks.moved("a", Health(clock=1.7e9 + jump), 1.0) == 0.0


def test_machines_are_not_compared_and_a_new_life_begins_anew() -> None:
    clocks = Clocks()
    clocks.moved("a", Health(clock=1.7e9), 0.0)
    assert clocks.moved("b", Health(clock=1.6e9), 0.0) == 0.0
    clocks.forget("a")
    assert clocks.moved("a", Health(clock=1.5e9), 1.0) == 0.0
    assert clocks.moved("a", Health(clock=float("nan")), 2.0) == clocks.moved("a", Health(), 3.0) == 0.0


@fixed
@given(seed=st.integers(0, 10**6))
def test_a_clock_that_a_time_server_corrects_is_no_alarm(seed: int) -> None:
    """Sped up or slowed down by 500 parts in a million, as ntpd does at the most; heartbeats get lost meanwhile."""
    chance, clocks, now, clock = random.Random(seed), Clocks(), 0.0, 1.7e9
    for _ in range(300):
        seconds = chance.choice([0.5, 0.5, 0.5, chance.uniform(1, 7200)])
        now += seconds
        clock += seconds * chance.uniform(-5e-4, 5e-4) + chance.uniform(-1e-3, 1e-3)
        assert clocks.moved("a", Health(clock=clock), now) == 0.0

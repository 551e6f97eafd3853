"""Peers whose steps become slow: named against their own past, and against what happens to everybody."""

from __future__ import annotations

import random

import pytest

from fault.stragglers import Stragglers

USUAL = {"a": 0.1, "b": 0.1, "c": 0.3, "d": 0.05}


def feed(stragglers: Stragglers, windows: int, begin: int = 0, sigma: float = 0.05, **factors: float) -> None:
    chance = random.Random(begin)
    for at in range(begin, begin + windows):
        steps = {
            p: s * factors.get(p, factors.get("all", 1.0)) * chance.lognormvariate(0, sigma) for p, s in USUAL.items()
        }
        stragglers.window(steps, 2.0 * at)


def test_machines_that_differ_are_no_fault_and_one_that_slows_down_is_named() -> None:
    stragglers = Stragglers()
    feed(stragglers, 20)
    assert not stragglers.slow
    feed(stragglers, 2, 20, b=2.0)
    assert not stragglers.slow, "two windows may be chance"
    feed(stragglers, 1, 22, b=2.0)
    [(straggler, since)] = stragglers.slow.values()
    assert straggler.peer == "b" and since == 40.0
    assert straggler.factor == pytest.approx(2.0, rel=0.3) and straggler.usual == pytest.approx(0.1, rel=0.1)
    assert straggler.deviations > 4


def test_what_lasts_does_not_become_usual_and_what_ends_is_cleared() -> None:
    stragglers = Stragglers()
    feed(stragglers, 10)
    feed(stragglers, 80, 10, d=3.0)
    assert set(stragglers.slow) == {"d"}
    feed(stragglers, 3, 90)
    assert not stragglers.slow


def test_what_slows_everybody_is_nobodys_fault() -> None:
    stragglers = Stragglers()
    feed(stragglers, 10)
    feed(stragglers, 10, 10, all=3.0)
    assert not stragglers.slow
    feed(stragglers, 3, 20, all=3.0, a=9.0)
    assert set(stragglers.slow) == {"a"}, "but who is slower still is"


def test_of_two_the_one_that_slows_down_alone_is_named_and_both_together_are_not() -> None:
    for slow, named in (({"a": 3.0}, {"a"}), ({"a": 3.0, "b": 3.2}, set())):
        stragglers, chance = Stragglers(), random.Random(1)
        for at in range(20):
            factors = slow if at >= 10 else {}
            steps = {peer: 0.1 * factors.get(peer, 1.0) * chance.lognormvariate(0, 0.05) for peer in "ab"}
            stragglers.window(steps, float(at))
        assert stragglers.slow.keys() == named


def test_a_new_peer_is_not_judged_and_one_that_comes_again_is_measured_anew() -> None:
    stragglers = Stragglers()
    feed(stragglers, 10)
    for at in range(3):
        stragglers.window(dict.fromkeys(USUAL, 0.1) | USUAL | {"new": 9.0}, float(at))
    assert not stragglers.slow
    feed(stragglers, 3, 20, a=4.0)
    stragglers.forget("a")
    feed(stragglers, 20, 23, a=4.0)
    assert not stragglers.slow


def test_no_alarm_in_a_thousand_clean_windows() -> None:
    stragglers = Stragglers()
    for begin in range(0, 1000, 10):
        feed(stragglers, 10, begin, sigma=0.1)
        assert not stragglers.slow

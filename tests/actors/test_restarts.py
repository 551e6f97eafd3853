"""When and where the next life of a peer begins: the decision alone, without Ray."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.restarts import FailureConfig, GiveUp, Place, Restart, Restarts
from elastic.errors import ConfigurationError

NODES = frozenset("abc")


def deaths(restarts: Restarts, *times: float, node: str = "a", evidence: str = "it hangs") -> list[Restart | GiveUp]:
    return [restarts.died(node, evidence, at) for at in times]


def test_the_first_restart_comes_at_once_and_later_ones_after_ever_longer_pauses() -> None:
    restarts = Restarts(FailureConfig(max_restarts=8, pause_seconds=2.0, longest_pause=10.0))
    pauses = [0.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert deaths(restarts, *range(6)) == [Restart(after=pause) for pause in pauses]


def test_too_many_deaths_within_the_window_are_the_end_and_the_reason_says_so() -> None:
    restarts = Restarts(FailureConfig(max_restarts=2, window_seconds=100.0))
    deaths(restarts, 0.0, 5.0)
    assert restarts.died("a", "its process has ended", 12.0) == GiveUp(
        reason="ended 3 times within 12 s (it hangs, then its process has ended)"
    )
    assert deaths(Restarts(FailureConfig(max_restarts=0)), 7.0) == [GiveUp(reason="ended once (it hangs)")]


def test_deaths_that_lie_back_are_forgotten() -> None:
    restarts = Restarts(FailureConfig(max_restarts=1, window_seconds=10.0))
    assert deaths(restarts, 0.0, 10.5, 21.0) == [Restart(after=0.0)] * 3
    assert isinstance(restarts.died("a", "it hangs", 22.0), GiveUp)


def test_the_next_life_goes_to_the_same_node_until_it_has_died_there_repeatedly() -> None:
    restarts = Restarts(FailureConfig(max_restarts=9, deaths_per_node=2, window_seconds=100.0))
    assert restarts.places(NODES, 0.0) == (Place(),), "a first life has no node yet"
    restarts.began("a")
    deaths(restarts, 1.0)
    assert restarts.places(NODES, 1.0) == (Place(node="a"), Place())
    deaths(restarts, 2.0)
    assert restarts.places(NODES, 2.0) == (Place(avoid=frozenset("a")), Place())
    restarts.began("b")
    assert restarts.places(NODES, 3.0)[0] == Place(node="b"), "where it lives now is home"
    restarts.began("a")
    assert restarts.places(NODES, 102.5)[0] == Place(node="a"), "a node gets another chance"


def test_a_node_that_is_dead_or_has_no_room_is_avoided() -> None:
    restarts = Restarts(FailureConfig())
    restarts.began("a")
    deaths(restarts, 0.0)
    assert restarts.places(frozenset("bc"), 0.0) == (Place(),)
    restarts.unplaced(Place(node="a"), 1.0)
    assert restarts.places(NODES, 1.0) == (Place(avoid=frozenset("a")), Place())


def test_who_died_with_its_node_is_not_to_blame() -> None:
    restarts = Restarts(FailureConfig(max_restarts=1))
    restarts.began("a")
    deaths(restarts, 0.0)
    assert restarts.places(frozenset("bc"), 1.0) == (Place(),)
    assert deaths(restarts, 2.0, node="b") == [Restart(after=0.0)], "the death on a is no longer counted"
    assert isinstance(restarts.died("b", "it hangs", 3.0), GiveUp)
    restarts.excuse("b")
    assert restarts.died("c", "it hangs", 4.0) == Restart(after=0.0)


def test_where_there_is_no_other_node_it_goes_back_to_the_one_where_it_died() -> None:
    restarts = Restarts(FailureConfig(max_restarts=9))
    restarts.began("a")
    deaths(restarts, 0.0, 1.0, 2.0)
    assert restarts.places(frozenset("a"), 2.0) == (Place(),)


Story = list[tuple[str, float]]


@settings(derandomize=True, deadline=None)
@given(
    story=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.0, 40.0)), min_size=1, max_size=30),
    limit=st.integers(0, 4),
    per_node=st.integers(1, 3),
    alive=st.sets(st.sampled_from("abc")),
)
def test_whatever_the_story_the_limits_hold(story: Story, limit: int, per_node: int, alive: set[str]) -> None:
    policy = FailureConfig(max_restarts=limit, window_seconds=60.0, deaths_per_node=per_node, longest_pause=5.0)
    restarts, now, past = Restarts(policy), 0.0, Story()
    for node, seconds in story:
        now += seconds
        restarts.began(node)
        verdict = restarts.died(node, "e", now)
        past.append((node, now))
        recent = [where for where, at in past if at >= now - 60.0]
        assert isinstance(verdict, GiveUp) == (len(recent) > limit)
        assert isinstance(verdict, GiveUp) or (0 <= verdict.after <= 5.0 and (verdict.after == 0) == (len(recent) == 1))
        tried = restarts.places(alive, now)
        recent = [where for where in recent if where in alive]
        past = [(where, at) for where, at in past if where in alive]
        bad = {where for where in alive if recent.count(where) >= per_node}
        assert tried[-1] == Place(), "better anywhere than nowhere"
        assert (Place(node=node) in tried) == (node in alive - bad)
        assert all(place.avoid == bad and alive - bad for place in tried if place.avoid)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_restarts": -1}, "max_restarts is -1: it must be 0"),
        ({"deaths_per_node": 0}, "deaths_per_node is 0: it must be at least 1"),
        ({"window_seconds": 0.0}, "window_seconds is 0.0: it must be above 0 seconds"),
        ({"place_seconds": float("nan")}, "place_seconds is nan: it must be above 0"),
        ({"pause_seconds": 61.0}, r"pause_seconds is 61.0: it must be from 0 to longest_pause \(60.0\)"),
    ],
)
def test_a_policy_that_cannot_be_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        FailureConfig(**options)

"""Room for peers, and whether a run can go on: the accounts alone, without Ray."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.fleet import Need, Node, endpoint, impossible, selected, short, stand

SMALL = Node(id="a", total={"CPU": 2.0}, free={"CPU": 0.5}, labels={"site": "us"})
LARGE = Node(id="b", total={"CPU": 8.0, "GPU": 1.0}, free={"CPU": 8.0, "GPU": 0.0}, labels={"site": "eu"})


def test_what_some_node_could_hold_is_possible_however_busy_it_is() -> None:
    assert impossible(Need({"CPU": 2.0}), [SMALL]) == ""
    assert impossible(Need({"CPU": 8.0, "GPU": 1.0}), [SMALL, LARGE]) == ""
    assert impossible(Need({"CPU": 2.0}, {"site": "us"}), [SMALL, LARGE]) == ""


def test_what_no_node_could_hold_is_said_with_what_there_is() -> None:
    assert impossible(Need({"CPU": 4.0, "GPU": 2.0}), [SMALL, LARGE]) == (
        "no node can hold a peer: it needs 4 CPUs, 2 GPUs; the largest of 2 nodes has 8 CPUs (8 free), 1 GPUs (0 free)"
        ", all together 10 CPUs (8.5 free), 1 GPUs (0 free). Add such a node, or ask for less in ScalingConfig "
        "(cpus_per_peer, gpus_per_peer)"
    )
    assert impossible(Need({"CPU": 4.0}, {"site": "us"}), [SMALL, LARGE]).startswith(
        "no node can hold a peer: it needs 4 CPUs on a node with site=us; "
    )
    assert impossible(Need({"tape": 1.0}), []).startswith(
        "no node can hold a peer: it needs 1 tape; there is no node. Add such a node, or ask for less in ScalingConfig "
        "(resources['tape'])"
    )


def test_room_that_was_not_found_in_time_is_one_line() -> None:
    words = short(Need({"CPU": 2.0}), [SMALL], found=1, fewest=3, seconds=60.0)
    assert words.startswith(
        "1 of at least 3 peers have found room within 60 s: each needs 2 CPUs; the only node has 2 CPUs (0.5 free). "
    )
    assert "num_peers" in words and "start_seconds" in words and "\n" not in words


@pytest.mark.parametrize(
    ("label", "wish", "fits"),
    [
        ("us", "us", True),
        ("us", "eu", False),
        (None, "eu", False),
        ("us", "!us", False),
        (None, "!us", True),
        ("us", "in(eu, us)", True),
        ("us", "!in(eu,us)", False),
        ("asia", "!in(eu,us)", True),
    ],
)
def test_labels_are_selected_as_ray_does(label: str | None, wish: str, fits: bool) -> None:
    assert selected(label, wish) == fits


STATES = ("starting", "waiting", "running", "restarting", "finished", "failed")


@settings(derandomize=True, deadline=None)
@given(states=st.lists(st.sampled_from(STATES), min_size=1, max_size=8), fewest=st.integers(1, 8))
def test_a_run_is_over_when_nobody_is_under_way_and_lost_when_too_many_have_failed(
    states: list[str], fewest: int
) -> None:
    fewest = min(fewest, len(states))
    standing = stand(states, fewest)
    assert standing.lost == (sum(state != "failed" for state in states) < fewest)
    assert standing.over == (standing.lost or set(states) <= {"finished", "failed"})
    assert not (standing.over and not standing.lost) or "finished" in states, "who ends well has somebody who did"


def test_a_coordinator_is_on_loopback_only_while_ray_has_one_host() -> None:
    here, there = Node(id="a", address="10.0.0.1"), Node(id="b", address="10.0.0.2")
    assert endpoint(None, [here, here], "10.0.0.1") == ("tcp://127.0.0.1:0", "127.0.0.1")
    assert endpoint(None, [here, there], "10.0.0.1") == ("tcp://10.0.0.1:0", "10.0.0.1")
    assert endpoint("0.0.0.0:29400", [here, there], "10.0.0.1") == ("tcp://0.0.0.0:29400", "10.0.0.1")
    assert endpoint("10.9.9.9:1", [here], "10.0.0.1") == ("tcp://10.9.9.9:1", "10.9.9.9")

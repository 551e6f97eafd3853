"""Peers of several ranks, each of which exchanges its own range: real processes, sharded models, and what is lost."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import QUICK, Run, until
from sites import Site

from elastic.config import RunPolicy
from elastic.journal import Committed, read_copy

PLAIN = {"chunk_bytes": 1 << 15, "shared_memory": False}  # many chunks, each of which counts as bytes on a link
ROUNDS = 6
STREAMING = {"fragments": 2, "sync_delay": 1, "fragment_cut": "balanced", "wire": "int4"}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    """Starts a peer of two ranks in a run that is made with the first of them."""
    made: list[Site] = []
    runs: dict[str, Run] = {}

    def begin(name: str, *, where: str = "run", policy: dict[str, Any] | None = None, **order: Any) -> Site:
        if where not in runs:
            (tmp_path / where).mkdir()
            chosen = {"min_peers": 2, "quorum": 1.0} | (policy or {})
            runs[where] = Run(tmp_path / where, policy=RunPolicy(**chosen), timeouts=replace(QUICK, grace=60))
        order = {"options": PLAIN} | order
        made.append(Site(tmp_path / where / name, runs[where], "laned", name=name, **order))
        return made[-1]

    yield begin
    for site in made:
        site.close()
    for run in runs.values():
        run.close()


def rounds_of(journal: Path) -> list[tuple[str, ...]]:
    """Who is in each committed round."""
    return [tuple(each.contributors) for each in read_copy(journal)[1] if isinstance(each, Committed)]


def events_of(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("loop", [{}, STREAMING], ids=["diloco", "streaming"])
def test_ranks_with_lanes_come_to_the_same_bits_as_without(start: Any, loop: dict[str, Any]) -> None:
    found = {}
    for where, lanes in (("with", True), ("without", False)):
        order = {"where": where, "lanes": lanes, "loop": loop, "policy": {"rounds": ROUNDS}}
        sites = [start(name, **order) for name in ("east", "west")]
        found[where] = [rank for site in sites for rank in site.facts()]
    for rank in found["with"] + found["without"]:
        assert rank["version"] == ROUNDS and rank["joint"] == ROUNDS and not rank["attempts"]
        assert (rank["state_hash"], rank["parameters"]) == (
            found["with"][0]["state_hash"],
            found["with"][0]["parameters"],
        )
    for leader, follower in (found["with"][:2], found["with"][2:]):
        assert leader["sent"] == pytest.approx(leader["total"] / 2, rel=0.1)
        assert follower["sent"] == pytest.approx(leader["total"] / 2, rel=0.1) and follower["received"] > 0
    for leader, follower in (found["without"][:2], found["without"][2:]):
        assert leader["sent"] == leader["total"] and follower["sent"] == 0
        assert leader["sent"] == pytest.approx(found["with"][0]["total"], rel=0.1)


def test_by_a_robust_rule_the_leaders_exchange_and_all_ranks_hold_the_same(start: Any) -> None:
    loop = {"combine": "CoordinateMedian", "wire": "int8"}
    sites = [start("east", loop=loop, policy={"rounds": ROUNDS}), start("west", loop=loop)]
    ranks = [rank for site in sites for rank in site.facts()]
    assert len({(rank["state_hash"], rank["parameters"]) for rank in ranks}) == 1
    assert all(rank["version"] == rank["joint"] == ROUNDS for rank in ranks)
    assert ranks[0]["sent"] > 0 and ranks[1]["sent"] < ranks[0]["sent"] / 100


def test_a_peer_of_one_process_beside_one_of_two(start: Any) -> None:
    sites = [start("east", policy={"rounds": ROUNDS}), start("west", size=1)]
    (first, second), (lone,) = sites[0].facts(), sites[1].facts((0,))
    assert first["state_hash"] == second["state_hash"] == lone["state_hash"] and lone["version"] == ROUNDS
    assert first["sent"] > 0 and second["sent"] < first["sent"] / 100, "the leader alone exchanges"


@pytest.mark.parametrize(("victim", "loop"), [(0, {}), (1, {}), (1, STREAMING)], ids=["leader", "another", "streaming"])
def test_a_rank_is_killed_in_mid_exchange_and_the_others_go_on(
    start: Any, tmp_path: Path, victim: int, loop: dict[str, Any]
) -> None:
    east = start("east", policy={"min_peers": 1}, beside=2, alone=3, loop=loop)
    west = start("west", fate="killed", victim=victim, beside=2, loop=loop)
    codes = [1, 1]
    codes[victim] = -signal.SIGKILL
    west.facts(tuple(codes))
    first, second = east.facts()
    assert first["version"] == second["version"] and first["state_hash"] == second["state_hash"]
    rounds = rounds_of(tmp_path / "run" / "journal.sqlite")
    assert ("east", "west") in rounds and rounds[-3:] == [("east",)] * 3
    shrunk = [each for each in events_of(tmp_path / "run" / "coordinator.jsonl") if each["event"] == "round.shrunk"]
    assert [each["lost"] for each in shrunk] == [["west"]], "it was in the middle of an attempt"


def test_a_rank_that_is_frozen_costs_the_others_a_moment(start: Any, tmp_path: Path) -> None:
    east = start("east", policy={"min_peers": 1}, beside=2, together=6)
    west = start("west", fate="stopped", victim=1, beside=2, together=6)
    until(lambda: (tmp_path / "run" / "west" / "fate").exists())
    journal = tmp_path / "run" / "journal.sqlite"
    until(lambda: rounds_of(journal)[-1:] == [("east",)], seconds=20)
    west.processes[1].send_signal(signal.SIGCONT)
    facts = [rank for site in (east, west) for rank in site.facts()]
    assert len({rank["state_hash"] for rank in facts}) == 1


@pytest.mark.parametrize("loop", [{}, STREAMING], ids=["diloco", "streaming"])
def test_a_peer_of_two_ranks_joins_a_run_that_is_going_on(start: Any, loop: dict[str, Any]) -> None:
    east = start("east", policy={"min_peers": 1, "quorum": 0.6}, together=5, loop=loop)
    east.ready()
    west = start("west", together=5, loop=loop)
    (first, second), others = east.facts(), west.facts()
    assert {rank["state_hash"] for rank in (first, second, *others)} == {first["state_hash"]}
    assert first["version"] > 5 and others[0]["joint"] >= 4
    assert others[1]["sent"] > 0 and second["sent"] > 0, "both ranks of the newcomer have exchanged"


def test_lanes_can_be_switched_off_for_one_peer(start: Any, tmp_path: Path) -> None:
    sites = [start("east", policy={"rounds": 3}), start("west", lanes=False)]
    facts = [rank for site in sites for rank in site.facts()]
    assert len({rank["state_hash"] for rank in facts}) == 1 and facts[3]["sent"] == 0
    events = events_of(tmp_path / "run" / "west" / "west.jsonl")
    assert not [each for each in events if each["event"] == "lanes.refused"]

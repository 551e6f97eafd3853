"""The small run state: round trip, lineages, and that it is worth as much as the journal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from simulation import RUN, TIMES, World, timeless

from elastic.config import RunPolicy
from elastic.errors import CheckpointMismatch
from elastic.journal import Opened, Restored
from elastic.membership import Membership
from elastic.messages import encode
from elastic.runstate import LINEAGE, RunState, above
from elastic.shards import ShardTable


def trained() -> Membership:
    """A run in the middle: shards open, closed, given back; commits; members that have left."""
    world = World()
    for name in "abc":
        world.start(name)
    assert world.run_until(lambda: world.ledger.version >= 6)
    leaver = list(world.peers.values())[-1]
    world.act(leaver, "leave")
    world.deliver_up(leaver, 100)
    assert world.membership is not None and world.membership.table is not None and world.membership.table.free
    return world.membership


def test_a_round_trip_changes_nothing() -> None:
    state = trained().state()
    assert RunState.from_bytes(state.to_bytes()) == state
    assert state.loop("outer") == state.loops[0] and state.loop("another") is None


def test_restoring_it_gives_it_again() -> None:
    before = trained()
    state = before.state()
    after = Membership(RUN, RunPolicy(), TIMES)
    after.begin([Restored(state=state, generation=state.generation, reason="")], 0.0)
    assert timeless(replace(after.state(), serial=state.serial)) == timeless(state)
    assert after.table == before.table and after.tokens == before.tokens
    assert after.generation == state.generation + 1 and after.serial == state.serial + 1


def test_a_run_without_data_has_no_table() -> None:
    state = replace(trained().state(), data=Membership(RUN, RunPolicy(), TIMES).state().data)
    assert ShardTable.restored(state.data) is None


@pytest.mark.parametrize("data", [b"", b"garbage", encode(Opened(generation=1)), encode(RunPolicy())])
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointMismatch, match="no run state"):
        RunState.from_bytes(data)


@pytest.mark.parametrize("generation", [0, 1, LINEAGE - 1, LINEAGE, 5 * LINEAGE + 3])
def test_a_lineage_is_above_all_that_the_one_before_could_count_to(generation: int) -> None:
    assert above(generation) % LINEAGE == 0 and 0 < above(generation) - generation <= LINEAGE
    assert above(generation, 3) == above(generation) + 3 * LINEAGE


def test_the_rounds_of_a_run_that_is_rolled_back_keep_their_numbers() -> None:
    membership = trained()
    early = replace(
        membership.state(), serial=1, loops=tuple(replace(loop, rounds=1) for loop in membership.state().loops)
    )
    rounds, serial = membership.loops["outer"].rounds, membership.serial
    membership._apply(Restored(state=early, generation=1, reason=""))
    assert membership.loops["outer"].rounds == rounds and membership.serial == serial + 1

"""Who is right about a version: claims as a pure value, and what becomes of a loop if nobody can say."""

from __future__ import annotations

import pytest
from simulation import OUTER, Checkpoint, SimPeer, World

from elastic.journal import Halted, Restored
from elastic.loops import Loop
from elastic.parity import Claims


def claims(claimed: dict[str, str], reproduced: dict[str, str] | None = None) -> Claims:
    value = Claims(7)
    for name, held in claimed.items():
        value.claim(name, held, 1.0)
    value.reproduced |= reproduced or {}
    return value


@pytest.mark.parametrize(
    "claimed, disputed, unanimous",
    [({}, False, ""), ({"a": "x"}, False, "x"), ({"a": "x", "b": "x"}, False, "x"), ({"a": "x", "b": "y"}, True, "")],
)
def test_claims_that_differ_are_disputed(claimed: dict[str, str], disputed: bool, unanimous: str) -> None:
    value = claims(claimed)
    assert (value.disputed, value.unanimous) == (disputed, unanimous)


@pytest.mark.parametrize(
    "claimed, electorate, right",
    [
        ({"a": "x", "b": "x", "c": "y"}, "abc", "x"),
        ({"a": "x", "b": "y"}, "ab", ""),  # one against one
        ({"a": "x", "b": "x", "c": "y"}, "abcd", ""),  # half is no majority: d may yet say y
        ({"a": "x", "b": "x", "c": "y"}, "c", "y"),  # only those who could claim count
        ({"a": "x", "b": "x", "c": "y", "d": "y"}, "abcd", ""),
        ({}, "abc", ""),
    ],
)
def test_more_than_half_of_the_electorate_decides(claimed: dict[str, str], electorate: str, right: str) -> None:
    assert claims(claimed).majority(set(electorate)) == right


@pytest.mark.parametrize(
    "claimed, reproduced, right",
    [
        ({"a": "x", "b": "y"}, {"a": "x", "b": "x"}, "x"),  # b gets the other's bits: its own were wrong
        ({"a": "x", "b": "y"}, {"a": "x", "b": ""}, "x"),  # b cannot say
        ({"a": "x", "b": "y"}, {"a": "x"}, "x"),
        ({"a": "x", "b": "y"}, {"a": "x", "b": "y"}, ""),  # both get theirs again
        ({"a": "x", "b": "y"}, {"a": "z", "b": ""}, ""),
        ({"a": "x", "b": "y"}, {}, ""),
        ({"a": "x", "b": "x", "c": "y", "d": "y"}, {"a": "z", "b": "x", "c": "x", "d": "x"}, "x"),
    ],
)
def test_the_only_claim_that_somebody_reproduces_is_proven(
    claimed: dict[str, str], reproduced: dict[str, str], right: str
) -> None:
    assert claims(claimed, reproduced).proven() == right


def test_settling_names_who_was_wrong_and_ends_the_dispute() -> None:
    value = claims({"a": "x", "b": "y", "c": "x", "d": "z"}, {"a": "x"})
    value.asked = 2.0
    assert value.settle("x") == ["b", "d"]
    assert value.claimed == {"a": "x", "c": "x"} and not value.disputed
    assert (value.asked, value.since, value.reproduced) == (None, None, {})


def test_a_dispute_begins_when_claims_come_to_differ() -> None:
    value = Claims(7)
    for when, (name, held) in enumerate((("a", "x"), ("b", "x"), ("c", "y"), ("d", "z"))):
        value.claim(name, held, float(when))
    assert value.since == 2.0


def test_who_has_gone_counts_no_more() -> None:
    value = claims({"a": "x", "b": "y"}, {"b": "y"})
    value.forget("b")
    value.forget("stranger")
    assert value.unanimous == "x" and not value.reproduced


def test_all_are_heard_and_have_recomputed_when_those_who_are_there_have() -> None:
    value = claims({"a": "x", "b": "y"}, {"a": "x"})
    assert value.all_heard({"a", "b"}) and not value.all_heard({"a", "b", "c"})
    assert value.recomputed({"a"}) and not value.recomputed({"a", "b"})


# --- without a decision ---------------------------------------------------------------------------------------------


def undecided(absent: str = "") -> tuple[World, Checkpoint]:
    """Two peers have stepped to different bits, and each gets its own again; and a checkpoint from before that.

    absent: these have trained with them, and are frozen since.
    """
    world = World()
    a, *others = [world.start(name) for name in ("a", "b", *absent)]
    assert world.run_until(lambda: a.version in a.saved and min(p.version for p in others) >= 2)
    kept = a.saved[a.version]
    for peer in others[1:]:
        peer.frozen = True
    world.corrupt(a, lasting=True)
    assert world.run_until(lambda: world.ledger.halted)
    return world, kept


def loop_of(world: World) -> Loop:
    assert world.membership is not None
    return world.membership.loops[OUTER]


def restarted(world: World) -> World:
    world.kill_coordinator()
    world.restart()
    return world


def all_gone(world: World) -> None:
    for peer in list(world.peers.values()):
        if peer.running:
            world.act(peer, "leave")
    world.turn()


def come(world: World, name: str, kept: Checkpoint | None) -> SimPeer:
    """A new life of this name; its script offers the checkpoint, and it hears what becomes of that."""
    if kept is None:
        world.disk.pop(name, None)
    else:
        world.disk[name] = kept
    peer = world.start(name)
    world.run_until(lambda: peer.mode in ("training", "stopped") or bool(peer.refusals), turns=60)
    return peer


def events(world: World, name: str) -> list[dict[str, object]]:
    return [fields for event, fields in world.events if event == name]


def test_a_restarted_coordinator_knows_that_nobody_can_say_what_the_state_is() -> None:
    world, _ = undecided()
    reason = loop_of(world).halted
    restarted(world)  # nothing that it had said arrives
    assert loop_of(world).halted == reason
    assert world.run_until(lambda: {peer.mode for peer in world.peers.values()} == {"stopped"})
    assert {(each.error, each.reason) for peer in world.peers.values() for each in peer.refusals} == {
        ("ParityError", reason)
    }
    assert len(events(world, "parity.undecided")) == 1, "it was judged again"
    assert [record.version for record in world.journal if isinstance(record, Halted)] == [world.ledger.version]


@pytest.mark.parametrize("restart", [False, True])
def test_a_checkpoint_from_before_sets_the_loop_going_once_all_have_left_it(restart: bool) -> None:
    world, kept = undecided(absent="c")
    void = world.ledger.version
    early = come(world, "d", kept)
    assert [each.error for each in early.refusals] == ["ParityError"], "c has not heard yet that it is to stop"
    world.peers[1002].frozen = False
    assert world.run_until(lambda: world.peers[1002].mode == "stopped") and loop_of(world).halted
    all_gone(world)
    if restart:
        restarted(world)
    back = come(world, "a", kept)
    assert (back.mode, back.version) == ("training", kept.version) and not loop_of(world).halted
    (restored,) = [record for record in world.journal if isinstance(record, Restored)]
    assert f"version {void} of {OUTER} is void" in restored.reason
    assert [fields["version"] for fields in events(world, "parity.voided")] == [void]
    restarted(world).check_replay()
    assert world.run_until(lambda: world.ledger.version > void)


def test_what_nobody_could_decide_is_void_for_good() -> None:
    world, kept = undecided()
    void = world.peers[1001].saved[world.ledger.version]
    all_gone(world)
    assert come(world, "b", void).refusals[0].error == "CheckpointMismatch"
    assert come(world, "a", kept).mode == "training"
    assert come(world, "c", void).mode == "training", "it is given what is held, whatever it has"
    all_gone(world)  # before another round is committed
    refused = come(restarted(world), "b", void).refusals[0]
    assert refused.error == "CheckpointMismatch" and f"version {void.version} is void" in refused.reason


def test_who_comes_without_a_checkpoint_hears_what_is_missing() -> None:
    world, _ = undecided()
    all_gone(world)
    (refused,) = come(world, "c", None).refusals
    assert refused.error == "NoSource"
    assert "no majority and no proof" in refused.reason and "no checkpoint was offered" in refused.reason

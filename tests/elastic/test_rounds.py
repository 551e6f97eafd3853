"""The pure rules of a round: quorum, scalars, segments, who is kept apart from whom."""

from __future__ import annotations

import struct
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.records import LinkFailure, Member
from elastic import rounds
from elastic.messages import OperationSpec
from elastic.rounds import Operation, Phase

fixed = settings(derandomize=True, deadline=None)


def failure(peer: str, evidence: str) -> LinkFailure:
    return LinkFailure(peer=peer, incarnation=1, evidence=evidence)


@fixed
@given(expected=st.integers(1, 200), quorum=st.floats(0.01, 1.0), min_peers=st.integers(1, 5))
def test_a_quorum_is_more_than_its_part_and_never_below_min_peers(expected: int, quorum: float, min_peers: int) -> None:
    count = rounds.quorum_count(expected, quorum, min_peers)
    assert min_peers <= count <= max(expected, min_peers)
    assert count in (expected, min_peers) or count > quorum * expected


def test_the_default_quorum_is_more_than_half() -> None:
    assert [rounds.quorum_count(n, 0.5, 1) for n in (1, 2, 3, 4, 5)] == [1, 2, 2, 3, 3]


@fixed
@given(weights=st.lists(st.floats(1e-30, 1e15), min_size=1, max_size=8))
def test_scalars_are_float32_and_weigh_in_proportion(weights: list[float]) -> None:
    multipliers, divisor = rounds.scalars("mean", weights)
    for value in (*multipliers, divisor):
        assert struct.unpack("<f", struct.pack("<f", value))[0] == value
    assert max(multipliers) == 1.0 and divisor >= 1.0
    for weight, multiplier in zip(weights, multipliers, strict=True):
        assert abs(multiplier - weight / max(weights)) < 1e-7


def test_only_the_lengths_of_an_all_gather_may_differ() -> None:
    spec = OperationSpec(op="sum", dtype="float32", elements=7, wire="f32", algorithm="all_reduce")
    assert set(rounds.compared(spec)) == set(OperationSpec.__dataclass_fields__)
    gather = replace(spec, op="all_gather", algorithm="all_gather")
    assert set(rounds.compared(spec)) - set(rounds.compared(gather)) == {"elements"}


def test_what_each_one_owns_where_that_must_be_exact() -> None:
    spec = OperationSpec(op="mean", dtype="float32", elements=7, wire="f32", algorithm="all_reduce")
    assert rounds.executed(spec) == "sum" and rounds.extent(spec, (7, 7, 7)) == (7, ())
    scatter = replace(spec, algorithm="reduce_scatter")
    assert rounds.executed(scatter) == "reduce_scatter" and rounds.extent(scatter, (7, 7, 7)) == (7, (3, 2, 2))
    gather = replace(spec, op="all_gather")
    assert rounds.executed(gather) == "all_gather" and rounds.extent(gather, (7, 0, 9)) == (16, (7, 0, 9))


def test_equal_weights_and_sums_stay_exact() -> None:
    assert rounds.scalars("mean", [7.0] * 3) == ((1.0, 1.0, 1.0), 3.0)
    assert rounds.scalars("mean", [1.0, 3.0], "float64") == ((1 / 3, 1.0), 4 / 3)
    for op in ("sum", "max", "broadcast"):
        assert rounds.scalars(op, [1.0, 5.0]) == ((1.0, 1.0), 1.0)


def test_only_what_could_not_be_dialled_or_broke_again_is_a_cut() -> None:
    pair = frozenset("ab")
    for evidence in ("eof", "reset", "corrupt"):
        failures = {"a": (failure("b", evidence),)}
        assert rounds.lasting_cuts(failures, {"a", "b"}, {pair: 1}) == set()
        assert rounds.lasting_cuts(failures, {"a", "b"}, {pair: 2}) == {pair}
    for evidence in ("timeout", "unreachable", "refused"):
        assert rounds.lasting_cuts({"a": (failure("b", evidence),)}, {"a", "b"}, {}) == {pair}


def test_the_dead_are_not_cut_off_but_gone() -> None:
    assert rounds.lasting_cuts({"a": (failure("b", "timeout"),)}, {"a"}, {}) == set()


def test_an_operation_knows_its_attempt_and_who_accuses_whom() -> None:
    spec = OperationSpec(op="sum", dtype="float32", elements=1, wire="f32")
    operation = Operation(tag="t", round=3, spec=spec, fragment=0, base_version=-1, attempt=1)
    assert not operation.is_current(3, 1) and not operation.outer and operation.contributors() == ()
    operation.phase = Phase.RUNNING
    assert operation.is_current(3, 1) and not operation.is_current(3, 0) and not operation.is_current(2, 1)
    operation.failures = {"a": (failure("c", "eof"),), "b": (failure("c", "refused"), failure("d", "eof"))}
    assert operation.reported_lost("c") == {"a", "b"} and operation.reported_lost("d") == {"b"}
    assert operation.refused("c") and not operation.refused("d")


def test_members_come_sorted_and_the_departed_do_not_come() -> None:
    members = {name: Member(name=name, incarnation=1) for name in "ba"}
    assert rounds.members_of(("b", "gone", "a"), members) == (members["a"], members["b"])

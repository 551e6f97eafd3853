"""Which way an attempt goes: without measurements, by measurements, around pairs that cannot talk."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.patterns import check
from collectives.records import Member, Start, WireRun
from collectives.topology import Plan
from collectives.tuning import FINE, FINEST
from collectives.wires import WIRES
from elastic.messages import LinkReport, OperationSpec
from elastic.planning import (
    KEPT_SECONDS,
    MAX_RUNS,
    PLANNED_AT_ALL,
    WIRE_BYTES,
    Routes,
    described,
    job_of,
    orders,
    simple,
    spread,
    valid_wires,
)
from elastic.rounds import Pair
from fault.verdicts import RECEIVER, Verdict

NAMES = ("a", "b", "c", "d", "e", "f")
SPEC = OperationSpec(op="mean", dtype="float32", elements=1 << 20, wire="f32", algorithm="all_reduce")
pairs = st.sampled_from([frozenset(pair) for pair in itertools.combinations(NAMES, 2)])
groups = st.integers(1, 6).map(lambda count: NAMES[:count])
fixed = settings(derandomize=True, deadline=None)


def reachable(names: tuple[str, ...], cuts: set[Pair], root: str) -> set[str]:
    found = {root}
    while more := {n for n in names for f in found if n not in found and frozenset((n, f)) not in cuts}:
        found |= more
    return found


def check_tree(plan: Plan, cuts: set[Pair]) -> None:
    assert plan.pattern == "tree" and plan.shares == tuple(float(parent < 0) for parent in plan.parents)
    for index, parent in enumerate(plan.parents):
        assert parent < 0 or frozenset((plan.names[index], plan.names[parent])) not in cuts
        steps, at = 0, index
        while plan.parents[at] >= 0:
            steps, at = steps + 1, plan.parents[at]
        assert steps < len(plan.names)


def links(goodput: float, rtt: float = 0.0, names: tuple[str, ...] = NAMES) -> tuple[LinkReport, ...]:
    return tuple(LinkReport(peer=name, goodput=goodput, rtt=rtt) for name in names)


@fixed
@given(names=groups, cuts=st.sets(pairs))
def test_without_measurements_owners_can_talk_to_everybody_and_who_can_be_reached_takes_part(
    names: tuple[str, ...], cuts: set[Pair]
) -> None:
    cuts = {pair for pair in cuts if pair <= set(names)}
    plan = simple(names, cuts)
    assert len(plan.names) == max(len(reachable(names, cuts, root)) for root in names)
    free = [name for name in names if not any(name in pair for pair in cuts)]
    if not free and len(plan.names) > 1 and plan.pattern == "tree":
        check_tree(plan, cuts)
        return
    owners = [name for name, share in zip(plan.names, plan.shares, strict=True) if share > 0]
    assert plan.pattern == "direct" and len({plan.shares[plan.names.index(name)] for name in owners}) == 1
    assert all(frozenset((name, other)) not in cuts for name in owners for other in plan.names)
    assert not free or owners == free


@fixed
@given(names=groups, cuts=st.sets(pairs), root=st.integers(0, 5))
def test_a_broadcast_reaches_whoever_can_be_reached(names: tuple[str, ...], cuts: set[Pair], root: int) -> None:
    name = names[root % len(names)]
    plan = Routes().find(replace(SPEC, op="broadcast", root=name, wire="raw", carried="int32"), names, cuts)
    assert set(plan.names) == reachable(names, cuts, name)
    assert plan.shares == tuple(float(each == name) for each in plan.names)
    if plan.pattern == "tree":
        check_tree(plan, cuts)
    else:
        assert all(frozenset((name, other)) not in cuts for other in plan.names)


@pytest.mark.parametrize("goodput", [0.0, 1e7, 5e9])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_equal_or_unmeasured_links_give_exactly_equal_shares(goodput: float, count: int) -> None:
    routes, names = Routes(), tuple("abcdefg"[:count])
    for name in names:
        routes.learn(name, links(goodput, names=names), names)
    for now in range(3):
        assert routes.find(SPEC, names, ()).shares == (1.0 / count,) * count
        routes.refresh(float(now))


def test_plans_stay_while_it_is_judged_what_is_slow_but_not_for_ever() -> None:
    routes, names = Routes(), ("a", "b", "c")
    for name in names:
        routes.learn(name, links(1e7), names)
    before = routes.find(SPEC, names, ())
    routes.refresh(1.0)
    for name in ("a", "b"):
        routes.learn(name, links(1e5, names=("c",)), names)
    for now in range(2, 20):
        routes.refresh(float(now), judging=True)
        assert routes.find(SPEC, names, ()) is before
    routes.refresh(2.0 + KEPT_SECONDS, judging=True)
    assert routes.find(SPEC, names, ()).shares != before.shares


def test_what_is_found_is_planned_around_at_once_though_more_is_judged() -> None:
    routes, names = Routes(), ("a", "b", "c")
    for name in names:
        routes.learn(name, links(1e7), names)
    routes.refresh(1.0)
    before = routes.find(SPEC, names, ())
    for name in ("a", "b"):
        routes.learn(name, links(1e5, names=("c",)), names)
    routes.refresh(2.0, judging=True)
    assert routes.find(SPEC, names, ()) is before
    slow = Verdict(kind=RECEIVER, culprits=("c",), since=0.0, confidence=1.0, evidence={})
    routes.avoid({("c",): slow})
    routes.refresh(2.5, judging=True)
    assert routes.find(SPEC, names, ()).shares != before.shares


def test_paths_that_are_faster_than_their_hosts_are_equal() -> None:
    routes, names = Routes(), ("a", "b", "c")
    for name, goodput in zip(names, (6e8, 5e9, 2e10), strict=True):
        routes.learn(name, links(goodput), names)
    assert not described(routes.find(SPEC, names, ()))


def test_a_start_only_looks_up_what_was_planned_between_rounds() -> None:
    routes, names = Routes(), ("a", "b", "c")
    before = routes.find(SPEC, names, ())
    for name, fast in (("a", 1e8), ("b", 1e6), ("c", 1e6)):
        routes.learn(name, links(fast), names)
    routes.learn("b", links(1e8, names=("a",)), names)
    routes.learn("c", links(1e8, names=("a",)), names)
    assert routes.find(SPEC, names, ()) is before
    routes.refresh(10.0)
    after = routes.find(SPEC, names, ())
    assert after.shares[0] > 0.9 and described(after)["shares"]["a"] > 0.9 and not described(before)
    routes.learn("a", links(1.1e8), names)
    routes.refresh(20.0)
    assert routes.find(SPEC, names, ()) is after, "what moves by a tenth is noise"
    routes.forget("b")
    assert set(routes.find(SPEC, ("a", "c"), ()).shares) == {0.5}


def test_who_is_no_member_and_what_is_no_measurement_is_not_learned() -> None:
    routes = Routes()
    bad = [LinkReport(peer="stranger", goodput=1e6, rtt=1.0)]
    bad += [LinkReport(peer="b", goodput=goodput, rtt=rtt) for goodput, rtt in ((-1, 0), (float("nan"), 1), (1, 1e300))]
    routes.learn("a", bad, ("a", "b"))
    assert routes.chunk_bytes(("a", "b", "stranger"), "f32") == 0


def test_chunks_are_finer_on_long_ways() -> None:
    for rtt, goodput, chunk in ((0.001, 1e7, 0), (0.1, 1e7, FINEST), (0.1, 2e8, FINE), (0.1, 0.0, FINEST)):
        routes = Routes()
        routes.learn("a", links(goodput, rtt), NAMES)
        assert routes.chunk_bytes(NAMES, "f32") == chunk
        assert routes.chunk_bytes(NAMES, "bf16") == 2 * chunk
        assert routes.chunk_bytes(("b", "c"), "f32") == 0


def test_more_peers_than_can_be_planned_in_a_moment_share_equally_until_they_are() -> None:
    names = tuple(f"p{i:02}" for i in range(12))
    routes = Routes()
    for name in names:
        routes.learn(name, links(1e8 if name == "p00" else 1e6, 0.01, names), names)
        routes.learn(name, links(1e8, 0.01, ("p00",)), names)
    assert set(routes.find(SPEC, names, ()).shares) == {1 / 12}
    routes.refresh(1.0)
    assert routes.find(SPEC, names, ()).shares[0] > 0.5
    many = tuple(f"p{i:03}" for i in range(PLANNED_AT_ALL + 1))
    assert set(routes.find(SPEC, many, ()).shares) == {1 / len(many)}


def test_segments_are_owned_where_all_can_talk_and_summed_where_not() -> None:
    gather = replace(SPEC, op="all_gather", algorithm="all_gather", dtype="bool", carried="uint8", wire="raw")
    scatter = replace(SPEC, algorithm="reduce_scatter", elements=8, wire="int8")
    for spec, given_, cut, expected in (
        (gather, (3, 0, 5), (), ("direct", "all_gather", (3, 0, 5), "raw")),
        (gather, (3, 0, 5), ("ab",), ("direct", "sum", (), "raw")),
        (scatter, (8, 8, 8), (), ("direct", "reduce_scatter", (3, 3, 2), "int8")),
        (scatter, (8, 8, 8), ("ab",), ("direct", "sum", (), "int8")),
        (scatter, (8, 8, 8, 8), ("ac", "bd", "ad"), ("tree", "sum", (), "f32")),
    ):
        names, cuts = NAMES[: len(given_)], [frozenset(pair) for pair in cut]
        fields, segments = orders(spec, Routes().find(spec, names, cuts), given_)
        assert (fields["pattern"], fields["op"], fields["segments"], fields["wire"]) == expected
        assert sum(segments) == fields["elements"] == 8 and fields["dtype"] == (spec.carried or spec.dtype)


def test_results_and_parts_are_weighed_by_their_wires() -> None:
    for name, wire in WIRES.items():
        size = WIRE_BYTES.get(name, 4.0)
        assert name == "raw" or size <= wire.size(1 << 16) / (1 << 16) <= 1.15 * size
    job = job_of(replace(SPEC, wire="int4", gather_wire="int8"), ("a", "b"), [frozenset("ab"), frozenset("bc")])
    assert (job.scatter, job.gather, job.lossless, job.cuts) == (0.125, 0.25, False, {frozenset("ab")})
    assert job.nbytes == 1 << 23 and job_of(replace(SPEC, elements=(1 << 20) + 9), ("a", "b"), []).nbytes == job.nbytes
    assert spread(("a",), (), "a").shares == (1.0,)


@pytest.mark.parametrize("slow", [False, True])
def test_near_hosts_pass_large_sums_around_a_ring(slow: bool) -> None:
    """In one room the hosts set the pace; one link that is no part of the room ends that."""
    routes = Routes()
    for name in NAMES:
        routes.learn(name, links(6e8, rtt=2e-4), NAMES)
    if slow:
        routes.learn(NAMES[0], [LinkReport(peer=NAMES[1], goodput=1e7, rtt=2e-2)], NAMES)
    large, small = (replace(SPEC, elements=elements) for elements in (4 << 20, 1 << 10))
    ring = routes.find(large, NAMES, ())
    assert (ring.pattern == "ring" and ring.order == tuple(range(len(NAMES))) and len(set(ring.shares)) == 1) != slow
    assert routes.find(small, NAMES, ()).pattern == "direct"
    assert routes.find(replace(large, wire="bf16"), NAMES, ()).pattern == "direct"
    assert routes.find(large, NAMES, [frozenset(NAMES[:2])]).pattern == "direct"


def runs(*lengths: int, wire: str = "int4", gather_wire: str = "int8") -> tuple[WireRun, ...]:
    return tuple(WireRun(elements=length, wire=wire, gather_wire=gather_wire) for length in lengths)


@fixed
@given(
    lengths=st.lists(st.sampled_from([-128, 0, 1, 127, 128, 256, 384]), max_size=4),
    wire=st.sampled_from([*WIRES, "raw", "int3", ""]),
    gather_wire=st.sampled_from([*WIRES, "raw", "int3", ""]),
    elements=st.sampled_from([0, 1, 127, 128, 257, 512]),
)
def test_valid_wires_are_those_that_the_data_plane_takes(
    lengths: list[int], wire: str, gather_wire: str, elements: int
) -> None:
    offered, me = runs(*lengths, wire=wire, gather_wire=gather_wire), Member(name="a", incarnation=1)
    plan = simple(("a",), ())
    fields, _ = orders(replace(SPEC, elements=elements), plan, (elements,), [offered])
    numbers = {"generation": 1, "epoch": 1, "round": 0, "attempt": 0, "fragment": 0, "base_version": 0}
    start = Start(run="r", tag="t", contributors=(me,), multipliers=(1.0,), **fields, **numbers)
    check(start, me, "r")
    assert start.wires == (offered if valid_wires(offered, elements) else ())
    if offered and not valid_wires(offered, elements):
        with pytest.raises(ValueError):
            check(replace(start, wires=offered), me, "r")


def test_wires_are_those_of_the_first_contributor_that_has_valid_ones() -> None:
    spec, plan = replace(SPEC, elements=300), simple(("a", "b", "c"), ())
    short, good, other = runs(128, 128), runs(128, 172), runs(256, 44)
    for offered, chosen in (
        ([(), good, other], good),
        ([other, good, ()], other),
        ([short, (), good], good),
        ([short, (), runs(172, 128)], ()),
        ([(), (), ()], ()),
    ):
        assert orders(spec, plan, (300, 300, 300), offered)[0]["wires"] == chosen
    assert orders(spec, plan, (300, 300, 300))[0]["wires"] == ()
    many = runs(*[128] * MAX_RUNS, 1)
    assert not valid_wires(many, 128 * MAX_RUNS + 1) and valid_wires(many[1:], 128 * MAX_RUNS - 127)


@pytest.mark.parametrize("changes", [
    {"op": "max"}, {"algorithm": "reduce_scatter"}, {"dtype": "float64"}, {"dtype": "int32", "wire": "raw"},
    {"op": "all_gather", "dtype": "bool", "carried": "uint8", "wire": "raw"},
])  # fmt: skip
def test_only_sums_of_float32_have_wires_of_their_own(changes: dict[str, str]) -> None:
    spec, names, good = replace(SPEC, elements=300), ("a", "b", "c"), [runs(128, 172)] * 3
    assert orders(replace(spec, dtype="bfloat16", carried="float32"), simple(names, ()), (300,) * 3, good)[0]["wires"]
    assert orders(replace(spec, **changes), simple(names, ()), (300,) * 3, good)[0]["wires"] == ()


def test_a_tree_and_a_ring_have_one_wire_for_all() -> None:
    spec, good = replace(SPEC, elements=300, wire="int4"), [runs(128, 172)] * 4
    tree = simple(NAMES[:4], [frozenset(pair) for pair in ("ac", "bd", "ad")])
    fields, _ = orders(spec, tree, (300,) * 4, good)
    assert (fields["pattern"], fields["wire"], fields["gather_wire"], fields["wires"]) == ("tree", "f32", "", ())
    ring = Plan(names=NAMES[:4], pattern="ring", shares=(0.25,) * 4, order=(0, 1, 2, 3))
    assert orders(replace(spec, wire="f32"), ring, (300,) * 4, good)[0]["wires"] == ()

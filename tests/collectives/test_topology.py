"""The planner: answers known by hand, and what must hold for any measurements."""

from __future__ import annotations

import math
import os
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations, pairwise, permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives import Member, topology
from collectives.topology import Matrix, Pair, Plan, Planner, cannot_meet, estimate, plan, ring_plan

MBIT = 125_000.0
MIB = 1 << 20
# The rates (Mbit/s) and round trips (ms) of shared/wan/asym4.json.
ASYM4 = {
    "ac": (300, 20),
    "cb": (250, 30),
    "bd": (300, 20),
    "da": (200, 40),
    "ca": (150, 20),
    "bc": (120, 30),
    "db": (150, 20),
    "ad": (100, 40),
    "ab": (20, 120),
    "ba": (30, 120),
    "cd": (40, 150),
    "dc": (60, 150),
}


def matrix(
    names: str | Sequence[str],
    rates: dict[str, float] | float = 100.0,
    *,
    rtt: dict[str, float] | float = 0.0,
    cuts: Sequence[str] = (),
    **limits: Any,
) -> Matrix:
    """rates: Mbit/s of a pair "ab" (and of "ba" unless given), "": of all others; rtt: ms likewise."""

    def table(values: dict[str, float] | float, unit: float) -> tuple[tuple[float, ...], ...]:
        known = values if isinstance(values, dict) else {"": values}
        return tuple(
            tuple(0.0 if i == j else unit * known.get(i + j, known.get(j + i, known.get("", 0.0))) for j in names)
            for i in names
        )

    pairs = frozenset(frozenset(pair) for pair in cuts)
    return Matrix(names=tuple(names), bandwidth=table(rates, MBIT), rtt=table(rtt, 1e-3), cuts=pairs, **limits)


def asym4() -> Matrix:
    rates = {pair: float(rate) for pair, (rate, _) in ASYM4.items()}
    return matrix("abcd", rates, rtt={pair: float(ms) for pair, (_, ms) in ASYM4.items()})


def generic(count: int, seed: int) -> Matrix:
    """Measurements of which no two are equal, over three orders of magnitude."""
    rng = random.Random(seed)
    names = "abcdefgh"[:count]
    pairs = [i + j for i, j in permutations(names, 2)]
    return matrix(names, {pair: 10 ** rng.uniform(0, 3) for pair in pairs}, rtt={p: rng.uniform(1, 200) for p in pairs})


# An account of its own of what moves where: every share walks its way.


def flows(plan: Plan, scatter: float, gather: float) -> dict[tuple[int, int], float]:
    """Bytes of each directed pair, per byte of the tensor."""
    moved: defaultdict[tuple[int, int], float] = defaultdict(float)
    everyone = range(len(plan.names))
    for owner, share in enumerate(plan.shares):
        others = [i for i in everyone if i != owner and share]
        if plan.pattern == "direct":
            for i in others:
                moved[i, owner] += scatter * share
                moved[owner, i] += gather * share
        if plan.pattern == "ring":
            at = plan.order.index(owner)
            way = [*plan.order[at:], *plan.order[:at]]
            for i, j in pairwise([*way[1:], owner]):
                moved[i, j] += scatter * share
            for i, j in pairwise(way):
                moved[i, j] += gather * share
        if plan.pattern == "tree":
            for i in others:
                moved[i, plan.parents[i]] += scatter * share
                moved[plan.parents[i], i] += gather * share
    return moved


def seconds_of(matrix: Matrix, plan: Plan, nbytes: int, scatter: float = 1.0, gather: float = 1.0) -> float:
    """Without latency; for a matrix that is fully measured."""
    at = [matrix.names.index(name) for name in plan.names]
    moved = flows(plan, scatter, gather)
    times = [load / matrix.bandwidth[at[i]][at[j]] for (i, j), load in moved.items()]
    for k, each in enumerate(at):
        if matrix.uplinks and matrix.uplinks[each]:
            times.append(sum(load for (i, _), load in moved.items() if i == k) / matrix.uplinks[each])
        if matrix.downlinks and matrix.downlinks[each]:
            times.append(sum(load for (_, j), load in moved.items() if j == k) / matrix.downlinks[each])
    return nbytes * max(times, default=0.0)


def links_of(plan: Plan) -> set[Pair]:
    return {frozenset((plan.names[i], plan.names[j])) for i, j in flows(plan, 1.0, 1.0)}


# Answers by hand.


@pytest.mark.parametrize("count", range(1, 9))
def test_equal_peers_own_exactly_equal_shares(count: int) -> None:
    found = plan(matrix("abcdefgh"[:count], rtt=20.0), nbytes=64 * MIB, lossless=True)
    assert (found.pattern, found.shares) == ("direct", (1.0 / count,) * count)
    latency = 0.02 if count > 1 else 0.0
    moved = 2 / count if count > 1 else 0.0
    assert found.seconds == pytest.approx(moved * 64 * MIB / (100 * MBIT) + latency)


def test_nothing_measured_is_equal_shares() -> None:
    found = plan(matrix("abc", {}), nbytes=MIB, lossless=True)
    assert (found.pattern, found.shares) == ("direct", (1 / 3, 1 / 3, 1 / 3))


def test_unmeasured_pairs_count_as_the_median() -> None:
    measured = {"ab": 100.0, "ac": 300.0, "bc": 200.0, "ad": 100.0, "cd": 300.0, "bd": 200.0}
    gap = {pair: rate for pair, rate in measured.items() if pair != "bd"}
    found = plan(matrix("abcd", measured), nbytes=MIB, lossless=False)
    assert plan(matrix("abcd", gap), nbytes=MIB, lossless=False) == found


@given(st.integers(0, 1000), st.integers(2, 8))
def test_noise_shifts_no_shares(seed: int, count: int) -> None:
    rng = random.Random(seed)
    names = "abcdefgh"[:count]
    noisy = {i + j: rng.uniform(100, 110) for i, j in permutations(names, 2)}
    assert plan(matrix(names, noisy), nbytes=64 * MIB, lossless=False).shares == (1.0 / count,) * count


def test_a_slow_link_carries_little() -> None:
    # y_a + y_b <= 20, y_a + y_c <= 200, y_b + y_c <= 200: at most 10 + 10 + 190.
    found = plan(matrix("abc", {"": 200.0, "ab": 20.0}), nbytes=64 * MIB, lossless=True)
    best = 64 * MIB / (210 * MBIT)
    assert found.pattern == "direct" and best <= found.seconds <= 1.0101 * best
    assert found.shares[0] == pytest.approx(found.shares[1]) == pytest.approx(10 / 206, rel=0.01)


def test_shares_are_as_even_as_the_optimum_allows() -> None:
    # y_a + y_b <= 20, and c and d at most 100 together with each other: c alone could own 180.
    found = plan(matrix("abcd", {"": 200.0, "ab": 20.0}), nbytes=64 * MIB, lossless=False)
    a, b, c, d = found.shares
    assert c == d == pytest.approx(100 / 220, rel=0.03) and a == b == pytest.approx(10 / 220, rel=0.25)


def test_a_peer_with_slow_links_owns_nothing_and_the_others_the_same() -> None:
    rates = {"": 1000.0, "ad": 190.0, "bd": 200.0, "cd": 210.0}
    found = plan(matrix("abcd", rates), nbytes=64 * MIB, lossless=False)
    assert found.shares[0] == found.shares[1] == found.shares[2] > 0.31
    assert found.shares[3] < 0.05


def test_a_peer_that_sends_slowly_owns_little() -> None:
    # It must send its parts in any case: 1 of the tensor at 50; each result that it owns comes on top.
    limited = matrix("abc", uplinks=(50 * MBIT, 0.0, 0.0))
    found = plan(limited, nbytes=MIB, lossless=True)
    assert found.shares[0] < 0.03 and found.shares[1] == found.shares[2]
    assert MIB / (50 * MBIT) <= found.seconds <= 1.0101 * MIB / (50 * MBIT)
    mirrored = matrix("abc", downlinks=(50 * MBIT, 0.0, 0.0))
    assert plan(mirrored, nbytes=MIB, lossless=True).shares == pytest.approx(found.shares)


def test_the_best_ring_of_asym4_is_ten_times_the_worst() -> None:
    found = plan(asym4(), nbytes=64 * MIB, lossless=True)
    assert (found.pattern, found.order) == ("ring", (0, 2, 1, 3))
    rings = {order: ring_plan(asym4(), (0, *order), nbytes=64 * MIB) for order in permutations((1, 2, 3))}
    slowest = {
        order: min(asym4().bandwidth[i][j] / MBIT for i, j in flows(ring, 1, 1)) for order, ring in rings.items()
    }
    assert max(slowest.values()) == slowest[2, 1, 3] == 200
    assert min(slowest.values()) == 20
    assert found.seconds == min(ring.seconds for ring in rings.values())
    equal = replace(found, shares=(0.25,) * 4)
    assert seconds_of(asym4(), equal, 64 * MIB) == pytest.approx(1.5 * 64 * MIB / (200 * MBIT))
    # With 1/Y seconds: 2Y - y_b - y_c <= 250 and 2Y - y_a - y_d <= 200, so Y <= 150.
    assert seconds_of(asym4(), found, 64 * MIB) == pytest.approx(64 * MIB / (150 * MBIT), rel=0.0101)


def test_a_ring_spares_its_slow_link() -> None:
    # Only c-a is slow, and whatever a and c own stays off it: at best all, 1 of the tensor in place of 4/3.
    rates = {"ab": 1000.0, "bc": 1000.0, "ca": 100.0, "ac": 1.0, "ba": 1.0, "cb": 1.0}
    found = plan(matrix("abc", rates), nbytes=MIB, lossless=True)
    assert (found.pattern, found.order) == ("ring", (0, 1, 2)) and found.shares[1] < 0.011
    assert found.seconds == pytest.approx(MIB / (100 * MBIT), rel=0.0101)


def test_what_asym4_does_without_a_ring() -> None:
    # y_a + y_b <= 20 and y_c + y_d <= 40.
    found = plan(asym4(), nbytes=64 * MIB, lossless=False)
    best = 64 * MIB / (60 * MBIT)
    assert found.pattern == "direct" and best <= found.seconds - 0.15 <= 1.0101 * best


def test_lossy_wires_count_their_own_bytes_each_way() -> None:
    # Parts at 1/8 and results at 1/4 of the size: a slow way out of b hurts more than a slow way in.
    found = plan(
        matrix("ab", {"ab": 100.0, "ba": 10.0}), nbytes=MIB, lossless=False, scatter_factor=0.125, gather_factor=0.25
    )
    assert found.shares[0] > 0.9 and found.pattern == "direct"
    assert found.seconds <= 1.0101 * 0.125 * MIB / (10 * MBIT)


def test_small_tensors_are_reduced_near_everybody() -> None:
    rtt = {"": 20.0, "ad": 300.0}
    near = plan(matrix("abcd", rtt=rtt), nbytes=1000, lossless=True)
    assert near.shares == (0.0, 0.5, 0.5, 0.0) and near.seconds < 0.025
    assert plan(matrix("abcd", rtt=rtt), nbytes=1 << 30, lossless=True).shares == (0.25,) * 4


def test_a_cut_pair_owns_nothing() -> None:
    found = plan(matrix("abc", cuts=["ab"]), nbytes=MIB, lossless=False)
    assert (found.pattern, found.names, found.shares) == ("direct", ("a", "b", "c"), (0.0, 0.0, 1.0))


def test_two_that_only_dial_out_meet_through_a_third() -> None:
    members = [
        Member(name=name, incarnation=i, addresses=("h:1",) if name == "c" else ()) for i, name in enumerate("abc")
    ]
    cuts = cannot_meet(members)
    assert cuts == {frozenset("ab")}
    found = plan(replace(matrix("abc"), cuts=cuts), nbytes=MIB, lossless=True)
    assert found.names == ("a", "b", "c") and found.shares == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("lossless", [True, False])
def test_a_path_is_relayed_from_its_middle(lossless: bool) -> None:
    found = plan(matrix("abcd", rtt=10.0, cuts=["ac", "ad", "bd"]), nbytes=MIB, lossless=lossless)
    assert (found.pattern, found.parents, found.shares) == ("tree", (1, -1, 1, 2), (0.0, 1.0, 0.0, 0.0))
    assert found.lossless_only
    assert found.seconds == pytest.approx(MIB / (100 * MBIT) + 0.02)


def test_the_centre_of_a_star_owns_everything() -> None:
    found = plan(matrix("abcd", cuts=["ab", "ad", "bd"]), nbytes=MIB, lossless=True)
    assert (found.pattern, found.shares) == ("direct", (0.0, 0.0, 1.0, 0.0))


def test_a_circle_of_reachable_pairs_is_a_ring() -> None:
    found = plan(matrix("abcd", cuts=["ac", "bd"]), nbytes=MIB, lossless=True)
    assert (found.pattern, found.shares) == ("ring", (0.25,) * 4)
    assert links_of(found) == {frozenset(pair) for pair in ("ab", "bc", "cd", "da")}


def test_few_good_links_make_a_tree_although_all_can_talk() -> None:
    rates = {"": 1.0, "ab": 1000.0, "bc": 1000.0, "cd": 1000.0}
    found = plan(matrix("abcd", rates), nbytes=MIB, lossless=True)
    assert found.pattern == "tree" and links_of(found) == {frozenset(pair) for pair in ("ab", "bc", "cd")}


def test_no_tree_loads_one_peer_for_speed_that_may_not_be_there() -> None:
    # Each is cut from one other. A root of six would be faster only if its links did not share its access.
    found = plan(matrix("abcdefgh", cuts=["ab", "cd", "ef", "gh"]), nbytes=64 * MIB, lossless=True)
    assert (found.pattern, found.shares) == ("ring", (1 / 8,) * 8)


def test_the_tree_takes_the_widest_way_to_each() -> None:
    rates = {"ab": 100.0, "bc": 100.0, "ac": 5.0, "cd": 100.0, "de": 100.0}
    found = plan(matrix("abcde", rates, cuts=["ad", "ae", "bd", "be", "ce"]), nbytes=64 * MIB, lossless=True)
    assert (found.pattern, found.parents) == ("tree", (1, 2, -1, 2, 3))


def test_who_cannot_be_reached_at_all_is_left_out() -> None:
    assert plan(matrix("abc", cuts=["ab", "ac"]), nbytes=MIB, lossless=True).names == ("b", "c")
    halves = plan(matrix("abcd", cuts=["ac", "ad", "bc", "bd"]), nbytes=MIB, lossless=True)
    assert (halves.names, halves.shares) == (("a", "b"), (0.5, 0.5))
    alone = plan(matrix("ab", cuts=["ab"]), nbytes=MIB, lossless=False)
    assert (alone.names, alone.pattern, alone.shares, alone.seconds) == (("a",), "direct", (1.0,), 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": ("a", "a")}, "distinct"),
        ({"names": ()}, "at least one"),
        ({"rtt": ((0.0,),)}, "2 rows"),
        ({"uplinks": (1.0,)}, "2 entries"),
        ({"bandwidth": ((0.0, -1.0), (1.0, 0.0))}, "not negative"),
        ({"rtt": ((0.0, math.nan), (1.0, 0.0))}, "finite"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(matrix("ab"), **changes)


def test_requests_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="nbytes"):
        plan(matrix("ab"), nbytes=-1, lossless=True)
    with pytest.raises(ValueError, match="factors"):
        plan(matrix("ab"), nbytes=1, lossless=False, scatter_factor=0.0)
    with pytest.raises(ValueError, match="once"):
        ring_plan(matrix("abc"), (0, 1, 1), nbytes=1)


# What holds for any measurements.


@st.composite
def matrices(draw: st.DrawFn, least: int = 1, most: int = 6, cut: bool = True) -> Matrix:
    count = draw(st.integers(least, most))
    names = "abcdefghijklmnop"[:count]
    pairs = [i + j for i, j in permutations(names, 2)]
    levels = st.sampled_from([1.0, 2.0, 3.0, 10.0, 90.0, 100.0, 1000.0])
    rates = draw(st.fixed_dictionaries(dict.fromkeys(pairs, levels)))
    rtt = draw(
        st.fixed_dictionaries(
            {pair: st.sampled_from([1.0, 20.0, 21.0, 150.0]) for pair in pairs if pair == "".join(sorted(pair))}
        )
    )
    cuts = draw(st.sets(st.sampled_from(sorted(rtt)))) if cut and rtt else set()
    limits = st.just(()) | st.tuples(*[st.sampled_from([0.0, 20 * MBIT, 300 * MBIT])] * count)
    return matrix(names, rates, rtt=rtt, cuts=sorted(cuts), uplinks=draw(limits), downlinks=draw(limits))


sizes = st.sampled_from([0, 1000, MIB, 1 << 30])
factors = st.sampled_from([(1.0, 1.0), (0.125, 0.25), (0.5, 0.5)])


@settings(max_examples=300)
@given(matrices(), sizes, st.booleans(), factors)
def test_a_plan_can_be_executed(matrix: Matrix, nbytes: int, lossless: bool, factors: tuple[float, float]) -> None:
    scatter, gather = factors
    found = plan(matrix, nbytes=nbytes, lossless=lossless, scatter_factor=scatter, gather_factor=gather)
    count = len(found.names)
    assert min(found.shares) >= 0 and abs(math.fsum(found.shares) - 1) < 1e-9 and len(found.shares) == count
    assert not links_of(found) & matrix.cuts
    assert found.names == tuple(sorted(found.names))
    assert 0 <= found.seconds < math.inf
    if found.pattern == "ring":
        assert sorted(found.order) == list(range(count))
    if found.pattern == "tree":
        assert found.shares[found.parents.index(-1)] == 1.0
        for i in range(count):
            steps = 0
            while found.parents[i] >= 0:
                i, steps = found.parents[i], steps + 1
            assert steps < count
        assert found.parents.count(-1) == 1
    else:
        assert not found.parents


@settings(max_examples=300)
@given(matrices(), st.booleans())
def test_as_many_take_part_as_are_connected(matrix: Matrix, lossless: bool) -> None:
    group = {name: {name} for name in matrix.names}
    for i, j in combinations(matrix.names, 2):
        if frozenset((i, j)) not in matrix.cuts:
            joined = group[i] | group[j]
            group |= dict.fromkeys(joined, joined)
    found = set(plan(matrix, nbytes=MIB, lossless=lossless).names)
    assert found == group[min(found)]
    assert (len(found), matrix.names[0] in found) == max(
        (len(each), matrix.names[0] in each) for each in group.values()
    )


@settings(max_examples=200)
@given(matrices(least=2), st.booleans(), factors)
def test_the_estimate_is_what_flows_over_the_slowest_limit(
    matrix: Matrix, lossless: bool, factors: tuple[float, float]
) -> None:
    found = plan(matrix, nbytes=MIB, lossless=lossless, scatter_factor=factors[0], gather_factor=factors[1])
    scatter, gather = (1.0, 1.0) if found.lossless_only and not lossless else factors
    assert found.seconds == estimate(matrix, found, nbytes=MIB, scatter_factor=scatter, gather_factor=gather)
    latency = estimate(matrix, found, nbytes=0)
    assert found.seconds - latency == pytest.approx(seconds_of(matrix, found, MIB, scatter, gather))


def walk(rtt: Sequence[Sequence[float]], way: Sequence[int]) -> float:
    return sum(rtt[i][j] / 2 for i, j in pairwise(way))


@given(matrices(least=3, cut=False))
def test_latency_is_that_of_the_longest_way(matrix: Matrix) -> None:
    everyone = range(len(matrix.names))
    ring = ring_plan(matrix, tuple(everyone), nbytes=0)
    ways = [[(k + step) % len(everyone) for step in range(1, 2 * len(everyone))] for k in everyone]
    # From the successor of an owner to the owner, and on to its predecessor.
    assert ring.seconds == pytest.approx(max(walk(matrix.rtt, way) for way in ways))
    shares = (1.0, *(0.0 for _ in everyone[1:]))
    direct = estimate(matrix, Plan(names=matrix.names, pattern="direct", shares=shares), nbytes=0)
    assert direct == max(walk(matrix.rtt, (i, 0, j)) for i in everyone[1:] for j in everyone[1:])
    chain = tuple(i - 1 for i in everyone)
    tree = estimate(matrix, Plan(names=matrix.names, pattern="tree", shares=shares, parents=chain), nbytes=0)
    assert tree == pytest.approx(2 * walk(matrix.rtt, everyone))


def optimum(matrix: Matrix, scatter: float, gather: float) -> float:
    """Least seconds per byte of direct shares, by all vertices of the polytope of shares and seconds."""
    count = len(matrix.names)
    rows = [[*(-1.0 if i == k else 0.0 for i in range(count)), 0.0] for k in range(count)]
    for i, j in permutations(range(count), 2):
        load = [gather if k == i else scatter if k == j else 0.0 for k in range(count)]
        rows.append([*load, -matrix.bandwidth[i][j] / MBIT])
    limits = np.array(rows)
    best = math.inf
    for chosen in combinations(range(len(rows)), count):
        system = np.vstack([limits[list(chosen)], [1.0] * count + [0.0]])
        if abs(np.linalg.det(system)) > 1e-9:
            vertex = np.linalg.solve(system, [0.0] * count + [1.0])
            if (limits @ vertex <= 1e-9).all():
                best = min(best, float(vertex[-1]))
    return best / MBIT


@settings(max_examples=60, deadline=None)
@given(matrices(least=2, most=4, cut=False), factors)
def test_direct_shares_reach_the_optimum(matrix: Matrix, factors: tuple[float, float]) -> None:
    free = replace(matrix, uplinks=(), downlinks=())
    best = optimum(free, *factors)
    job = topology._job(free, free.names, 1, *factors)
    shares, least = topology._balanced(topology._direct_rows(job), range(len(free.names)), len(free.names))
    assert least == pytest.approx(best, rel=1e-7)
    found = seconds_of(free, Plan(names=free.names, pattern="direct", shares=shares), 1, *factors)
    assert best * (1 - 1e-7) <= found <= 1.1 * best * (1 + 1e-7)


@settings(max_examples=100, deadline=None)
@given(matrices(least=3), st.integers(0, 1 << 32), factors)
def test_no_shares_are_much_faster(matrix: Matrix, seed: int, factors: tuple[float, float]) -> None:
    rng = random.Random(seed)
    found = plan(matrix, nbytes=1 << 40, lossless=False, scatter_factor=factors[0], gather_factor=factors[1])
    cut = {name for pair in matrix.cuts for name in pair if pair <= set(found.names)}
    if found.pattern == "direct" and found.seconds:
        for _ in range(50):
            # Near what was found, and anywhere.
            spread = rng.choice([0.01, 0.1, 10.0])
            shares = [
                0.0 if name in cut else abs(s + spread * rng.random() ** 4)
                for name, s in zip(found.names, found.shares, strict=True)
            ]
            other = replace(found, shares=tuple(share / sum(shares) for share in shares))
            assert seconds_of(matrix, other, 1 << 40, *factors) >= found.seconds / 1.1001


@settings(max_examples=100, deadline=None)
@given(matrices(least=3), sizes)
def test_the_ring_is_the_best_of_all(matrix: Matrix, nbytes: int) -> None:
    job = topology._job(matrix, matrix.names, nbytes, 1.0, 1.0)
    count = len(matrix.names)
    orders = [(0, *rest) for rest in permutations(range(1, count))]
    equal = Plan(names=matrix.names, pattern="ring", shares=(1.0 / count,) * count)
    best = min(estimate(matrix, replace(equal, order=order), nbytes=nbytes) for order in orders)
    found = topology._order(job)
    if found is None:
        assert best == math.inf
    else:
        assert estimate(matrix, replace(equal, order=found), nbytes=nbytes) == pytest.approx(best, rel=1e-8)


@settings(max_examples=50, deadline=None)
@given(matrices(least=9, most=12))
def test_larger_groups_are_planned_as_well(matrix: Matrix) -> None:
    found = plan(matrix, nbytes=64 * MIB, lossless=True)
    assert not links_of(found) & matrix.cuts and found.seconds < math.inf
    lossy = plan(matrix, nbytes=64 * MIB, lossless=False)
    assert not links_of(lossy) & matrix.cuts and lossy.names == found.names


def test_a_hidden_ring_among_many_is_found() -> None:
    names = "".join(chr(ord("a") + i) for i in range(20))
    hidden = list(names)
    random.Random(1).shuffle(hidden)
    fast = {i + j: 1000.0 for i, j in zip(hidden, [*hidden[1:], hidden[0]], strict=True)}
    slow = {i + j: 1.0 for i, j in permutations(names, 2) if i + j not in fast}
    found = plan(matrix(names, slow | fast), nbytes=64 * MIB, lossless=True)
    assert found.pattern == "ring"
    assert {names[i] + names[j] for i, j in flows(found, 1, 1)} == set(fast)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(2, 6), st.booleans(), sizes, st.randoms(use_true_random=False))
def test_names_do_not_matter(seed: int, count: int, lossless: bool, nbytes: int, rng: random.Random) -> None:
    original = generic(count, seed)
    order = list(range(count))
    rng.shuffle(order)
    shuffled = replace(
        original,
        bandwidth=tuple(tuple(original.bandwidth[i][j] for j in order) for i in order),
        rtt=tuple(tuple(original.rtt[i][j] for j in order) for i in order),
    )
    one, other = (plan(each, nbytes=nbytes, lossless=lossless) for each in (original, shuffled))
    assert one.pattern == other.pattern
    assert one.seconds == pytest.approx(other.seconds, rel=1e-6)
    mapped = replace(  # of equally good plans, which one is found may depend on names
        other,
        shares=tuple(one.shares[i] for i in order),
        order=tuple(order.index(i) for i in one.order),
        parents=tuple(order.index(one.parents[i]) if one.parents[i] >= 0 else -1 for i in order) if one.parents else (),
    )
    assert estimate(shuffled, mapped, nbytes=nbytes) == pytest.approx(other.seconds, rel=1e-6)


def test_every_process_plans_the_same() -> None:
    code = (
        "import random; from collectives.topology import Matrix, plan; r = random.Random(7); names = tuple('abcdef');"
        "table = lambda s: tuple(tuple(s * r.random() for _ in names) for _ in names);"
        "cuts = frozenset({frozenset('ab'), frozenset('cd')});"
        "m = Matrix(names=names, bandwidth=table(1e8), rtt=table(.1), cuts=cuts);"
        "print([plan(m, nbytes=n, lossless=l) for n in (0, 1 << 20, 1 << 30) for l in (True, False)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "Plan" in outputs.pop()


# The planner that remembers.


def test_a_planner_stays_with_its_plan_until_another_is_clearly_faster() -> None:
    planner, rates = Planner(), {"": 200.0, "ab": 20.0}
    first = planner.plan(matrix("abc", rates), nbytes=MIB, lossless=True)
    noisy = planner.plan(matrix("abc", rates | {"ab": 21.0, "ac": 195.0}), nbytes=MIB, lossless=True)
    assert replace(noisy, seconds=first.seconds) == first
    assert noisy.seconds == estimate(matrix("abc", rates | {"ab": 21.0, "ac": 195.0}), first, nbytes=MIB)
    healed = planner.plan(matrix("abc", 200.0), nbytes=MIB, lossless=True)
    assert healed.shares == (1 / 3, 1 / 3, 1 / 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(matrices(least=3, most=4), min_size=2, max_size=4), st.booleans())
def test_a_planner_never_uses_a_cut_pair_and_never_falls_far_behind(seen: list[Matrix], lossless: bool) -> None:
    planner = Planner(capacity=2)
    for each in seen:
        kept = planner.plan(each, nbytes=MIB, lossless=lossless, scatter_factor=0.5, gather_factor=0.5)
        fresh = plan(each, nbytes=MIB, lossless=lossless, scatter_factor=0.5, gather_factor=0.5)
        assert kept == planner.plan(each, nbytes=MIB, lossless=lossless, scatter_factor=0.5, gather_factor=0.5)
        assert not links_of(kept) & each.cuts and kept.names == fresh.names
        assert kept.seconds <= 1.15 * fresh.seconds
        assert lossless or kept.lossless_only == fresh.lossless_only

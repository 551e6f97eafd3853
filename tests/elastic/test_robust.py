"""Robust rules: each against its definition, under anything that a bad peer may give; then in whole runs."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Run, until
from hypothesis import given, settings
from hypothesis import strategies as st
from test_algorithms import Layered, descend, inner_of
from test_streaming import together
from xxhash import xxh3_128_hexdigest

import elastic
from collectives.records import Done, Failed, Member, OperationRecord, Start
from elastic.config import RunPolicy, Timeouts
from elastic.errors import ConfigurationError, NotEnoughPeers, ParityError
from elastic.outer import decoupled, delayed, diloco, streaming
from elastic.outer.compression import Compression
from elastic.outer.engine import OuterLoop
from elastic.outer.optimizers import SGD
from elastic.outer.replica import Flight
from elastic.outer.robust import (
    PIECE,
    Combining,
    Contributions,
    CoordinateMedian,
    FlagAggregator,
    GeometricMedian,
    Krum,
    NormClip,
    Robust,
    TrimmedMean,
    _eigen,
    _exchanges,
    combined,
    encoded,
    encoded_size,
    sealed,
)
from elastic.outer.rule import Rule, check_robust
from elastic.outer.simulator import Simulator
from elastic.outer.weighting import Equal, Tokens
from elastic.peer import Peer

ROBUST: list[Callable[[int], Robust]] = [
    lambda f: CoordinateMedian(byzantine=f),
    lambda f: TrimmedMean(byzantine=f),
    lambda f: Krum(byzantine=f),
    lambda f: Krum(byzantine=f, keep=3),
    lambda f: GeometricMedian(byzantine=f),
    lambda f: FlagAggregator(byzantine=f, iterations=3),
    lambda f: NormClip(),
]
NAMES = ["median", "trimmed", "krum", "multi-krum", "geometric", "flag", "clip"]
every_rule = pytest.mark.parametrize("make", ROBUST, ids=NAMES)
BAD: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: torch.full_like(x, 1e30),
    lambda x: torch.full_like(x, -3e38),
    lambda x: -100 * x,
    lambda x: torch.full_like(x, math.nan),
    lambda x: torch.where(torch.arange(len(x)) == 0, math.inf, x),
    torch.zeros_like,
]


def result(rule: Robust, xs: Sequence[torch.Tensor], wire: str = "f32", averaged: int | None = None) -> torch.Tensor:
    n = len(xs[0])
    out = torch.full((n,), math.nan)
    combined(
        rule, Contributions(tuple(encoded(x, wire) for x in xs), n, wire), n if averaged is None else averaged, out
    )
    return out


def vectors(seed: int, n: int, size: int, spread: float = 0.5) -> list[torch.Tensor]:
    """Contributions that have something in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(size, generator=generator)
    return [common + spread * torch.randn(size, generator=generator) for _ in range(n)]


seeds, sizes, few = st.integers(0, 1 << 30), st.integers(1, 60), st.integers(0, 2)


# --- what holds for each of them --------------------------------------------------------------------------------------


@every_rule
@settings(deadline=None)
@given(seeds, sizes, few, st.integers(0, 3))
def test_contributions_that_agree_give_themselves(
    make: Callable[[int], Robust], seed: int, size: int, f: int, more: int
) -> None:
    (x,) = vectors(seed, 1, size)
    rule = make(f)
    assert torch.equal(result(rule, [x] * (rule.needs + more)), x)


@every_rule
@settings(deadline=None)
@given(seeds, sizes, few, st.integers(0, 3), st.randoms(use_true_random=False), st.sampled_from(BAD))
def test_the_order_of_contributors_changes_no_bit(
    make: Callable[[int], Robust], seed: int, size: int, f: int, more: int, random: Any, bad: Any
) -> None:
    rule = make(f)
    xs = vectors(seed, rule.needs + more, size)
    xs[:f] = [bad(x) for x in xs[:f]]
    shuffled = list(xs)
    random.shuffle(shuffled)
    one, other = result(rule, xs), result(rule, shuffled)
    assert one.numpy().tobytes() == other.numpy().tobytes()


def bound(rule: Robust, honest: torch.Tensor, n: int, f: int, got: torch.Tensor) -> bool:
    """What the rule promises of n contributions, f of them bad; honest: the others, as rows, in double precision."""
    centre = honest.mean(0)
    radius = float((honest - centre).norm(dim=1).max())
    if isinstance(rule, (CoordinateMedian, TrimmedMean)):
        low, high = honest.min(0).values, honest.max(0).values
        return bool(((low - 1e-6 <= got) & (got <= high + 1e-6)).all())
    if isinstance(rule, Krum):
        near = min(float((got - x).norm()) for x in honest)
        return near < 1e-5 if rule.keep == 1 else float((got - centre).norm()) <= radius + 1e-4
    if isinstance(rule, GeometricMedian):
        return float((got - centre).norm()) <= 2 * (n - f) / (n - 2 * f) * radius * 1.001 + 1e-4
    return float(got.norm()) <= float(honest.norm(dim=1).max()) * (1 + 1e-6)


@every_rule
@settings(deadline=None)
@given(seeds, st.integers(2, 60), st.integers(1, 2), st.integers(0, 3), st.lists(st.sampled_from(BAD[:5]), min_size=2))
def test_whatever_f_contributors_give_the_result_stays_with_the_others(
    make: Callable[[int], Robust], seed: int, size: int, f: int, more: int, bad: list[Any]
) -> None:
    rule = make(f)
    n = max(rule.needs, 2 * f + 1) + more
    xs = vectors(seed, n, size)
    xs[:f] = [spoil(x) for spoil, x in zip(bad, xs[:f], strict=False)]
    got = result(rule, xs)
    assert torch.isfinite(got).all()
    assert bound(rule, torch.stack(xs[f:]).double(), n, f, got.double())


def test_a_mean_would_not() -> None:
    xs = vectors(0, 5, 40)
    xs[0] = torch.full_like(xs[0], 1e30)
    got = result(TrimmedMean(byzantine=0), xs).double()
    assert not bound(TrimmedMean(byzantine=1), torch.stack(xs[1:]).double(), 5, 1, got)


@every_rule
def test_where_nothing_is_a_number_the_result_is_zeros_and_everybody_is_left_out(make: Callable[[int], Robust]) -> None:
    data = tuple(encoded(torch.full((7,), math.nan), "f32") for _ in range(5))
    out = torch.full((7,), math.nan)
    assert combined(make(1), Contributions(data, 7), 7, out) == (0, 1, 2, 3, 4)
    assert torch.equal(out, torch.zeros(7))


def test_who_sends_no_numbers_is_one_bad_peer_less_to_expect() -> None:
    xs = vectors(3, 5, 20)
    xs[2] = torch.full((20,), math.inf)
    expected = result(TrimmedMean(byzantine=0), [x for i, x in enumerate(xs) if i != 2])
    assert torch.equal(result(TrimmedMean(byzantine=1), xs), expected)


@pytest.mark.parametrize("make", ROBUST[:5], ids=NAMES[:5])
@settings(deadline=None)
@given(seeds, sizes, few)
def test_what_all_contributions_move_by_the_result_moves_by(
    make: Callable[[int], Robust], seed: int, size: int, f: int
) -> None:
    rule = make(f)
    xs = vectors(seed, rule.needs + 2, size)
    shift = 8 * torch.randn(size, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(result(rule, [x + shift for x in xs]), result(rule, xs) + shift, rtol=1e-4, atol=1e-4)


@every_rule
@pytest.mark.parametrize("wire", ["bf16", "f16", "int8", "int4", "e3m0"])
def test_over_a_lossy_wire_it_is_the_rule_of_what_each_contribution_comes_to(
    make: Callable[[int], Robust], wire: str
) -> None:
    size = PIECE + 77
    xs = vectors(1, 7, size)
    seen = [Compression(wire=wire).approximated(x) for x in xs]
    rule = make(1)
    assert torch.equal(result(rule, xs, wire), result(rule, seen))
    assert encoded(xs[0], wire).numel() == encoded_size(size, wire) <= Compression(wire=wire).size(size) + 3


@every_rule
def test_buffers_get_the_median_and_sway_no_choice(make: Callable[[int], Robust]) -> None:
    xs = vectors(2, 7, 30)
    for i, x in enumerate(xs):
        x[20:] = 1e6 * (i - 2)
    got = result(make(2), xs, averaged=20)
    assert torch.equal(got[:20], result(make(2), [x[:20] for x in xs]))
    assert torch.equal(got[20:], torch.full((10,), 1e6))


# --- each against its definition --------------------------------------------------------------------------------------


def test_the_sorting_network_sorts() -> None:
    """It does so for all numbers if it does for zeros and ones (Knuth)."""
    for n in range(1, 11):
        for bits in itertools.product((0, 1), repeat=n):
            row = list(bits)
            for low, high in _exchanges(n):
                row[low], row[high] = min(row[low], row[high]), max(row[low], row[high])
            assert row == sorted(bits)


@settings(deadline=None)
@given(seeds, st.integers(1, 12), sizes)
def test_the_median_is_numpys(seed: int, n: int, size: int) -> None:
    xs = vectors(seed, n, size)
    expected = np.median(np.stack([x.numpy() for x in xs]).astype(np.float64), axis=0).astype(np.float32)
    assert np.array_equal(result(CoordinateMedian(byzantine=0), xs).numpy(), expected)


@settings(deadline=None)
@given(seeds, st.integers(1, 12), sizes, few)
def test_the_trimmed_mean_is_numpys_and_without_trimming_the_mean(seed: int, n: int, size: int, f: int) -> None:
    xs = vectors(seed, n + 2 * f, size)
    ranked = np.sort(np.stack([x.numpy() for x in xs]).astype(np.float64), axis=0)
    for b, rows in ((f, ranked[f : len(ranked) - f]), (0, ranked)):
        got = result(TrimmedMean(byzantine=b), xs).numpy()
        np.testing.assert_allclose(got, rows.mean(axis=0), rtol=1e-6, atol=1e-12)


@settings(deadline=None)
@given(seeds, st.integers(0, 3), st.integers(0, 4), st.integers(2, 60), st.integers(1, 3))
def test_krum_picks_what_brute_force_picks(seed: int, f: int, more: int, size: int, keep: int) -> None:
    rule = Krum(byzantine=f, keep=keep)
    n = rule.needs + more
    xs = vectors(seed, n, size)
    rows = np.stack([x.numpy() for x in xs]).astype(np.float64)
    apart = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    scores = np.array([np.sort(np.delete(apart[i], i))[: n - f - 2].sum() for i in range(n)])
    best = np.sort(scores)
    got = result(rule, xs).numpy()
    candidates = [
        chosen
        for chosen in itertools.combinations(range(n), keep)  # two that are each other's nearest may have equal scores
        if np.allclose(np.sort(scores[list(chosen)]), best[:keep], rtol=1e-9)
    ]
    assert any(np.allclose(got, rows[list(chosen)].mean(0), rtol=1e-5, atol=1e-6) for chosen in candidates)


def objective(z: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> float:
    return float(np.sqrt(((rows - z) ** 2).sum(-1)).sum())


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(3, 9), st.integers(1, 40), st.booleans())
def test_nothing_has_a_smaller_sum_of_distances_than_the_geometric_median(
    seed: int, n: int, size: int, huge: bool
) -> None:
    xs = vectors(seed, n, size)
    if huge:
        xs[0] = xs[0] + 1e12 * torch.sign(xs[1])
    rows = np.stack([x.numpy() for x in xs]).astype(np.float64)
    got = result(GeometricMedian(byzantine=1), xs).numpy().astype(np.float64)
    near = rows[1:] if huge else rows  # of the huge one only the direction matters: its distance has no digits left
    pull = (rows[0] - got) / np.linalg.norm(rows[0] - got) if huge else np.zeros(size)

    def cost(z: np.ndarray[Any, Any]) -> float:
        return objective(z, near) - float(pull @ (z - got))

    z = near.mean(0)
    for _ in range(1000):  # Weiszfeld's steps once more, on the whole vectors, with another smoothing
        pulls = 1 / np.maximum(np.linalg.norm(near - z, axis=1), 1e-9)
        z = ((pulls[:, None] * near).sum(0) + pull) / pulls.sum()
    rivals = [z, *near, *(got + 0.01 * np.random.default_rng(seed).standard_normal((20, size)))]
    assert all(cost(got) <= cost(rival) * (1 + 1e-4) + 1e-6 for rival in rivals)


def flag(rows: np.ndarray[Any, Any], rank: int, iterations: int, smoothing: float) -> np.ndarray[Any, Any]:
    """Equation by equation, with numpy's singular value decomposition of the whole matrix."""
    lengths = np.linalg.norm(rows, axis=1)
    directions = (rows / lengths[:, None]).T
    weights = np.ones(len(rows))
    for _ in range(iterations + 1):
        basis = np.linalg.svd(directions * weights, full_matrices=False)[0][:, :rank]
        sines = 1 - ((basis.T @ directions) ** 2).sum(0)
        weights = (np.maximum(sines, 0) + smoothing) ** -0.25
    return np.asarray(np.median(lengths) / len(rows) * basis @ (basis.T @ directions.sum(1)))


@pytest.mark.parametrize("iterations", [0, 1, 5])
@settings(deadline=None)
@given(seeds, st.integers(3, 9), st.integers(20, 60), st.integers(0, 3))
def test_the_flag_aggregator_is_its_equation(iterations: int, seed: int, n: int, size: int, rank: int) -> None:
    xs = vectors(seed, n, size, spread=2.0)
    xs = [x * (i + 1) for i, x in enumerate(xs)]
    rule = FlagAggregator(byzantine=1, rank=min(rank, n - 1), iterations=iterations, smoothing=1e-3)
    expected = flag(
        np.stack([x.numpy() for x in xs]).astype(np.float64), rule.rank or math.ceil((n + 1) / 2), iterations, 1e-3
    )
    np.testing.assert_allclose(result(rule, xs).numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@settings(deadline=None)
@given(seeds, st.integers(1, 9), sizes, st.sampled_from([None, 0.1, 5.0]))
def test_clipping_bounds_every_length(seed: int, n: int, size: int, norm: float | None) -> None:
    xs = [x * (i + 1) for i, x in enumerate(vectors(seed, n, size))]
    rows = np.stack([x.numpy() for x in xs]).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    most = np.sort(lengths)[(n - 1) // 2] if norm is None else norm
    expected = (rows * np.minimum(1, most / lengths)[:, None]).mean(0)
    np.testing.assert_allclose(result(NormClip(norm=norm), xs).numpy(), expected, rtol=1e-4, atol=1e-6)


@settings(deadline=None)
@given(seeds, st.integers(1, 12))
def test_eigenvectors_are_numpys(seed: int, n: int) -> None:
    half = np.random.default_rng(seed).standard_normal((n, n))
    matrix = half @ half.T
    values, rows = _eigen(matrix.tolist())
    vectors = np.array(rows)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(matrix), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(vectors.T @ np.diag(values) @ vectors, matrix, rtol=1e-9, atol=1e-9)


# --- the same bits everywhere -----------------------------------------------------------------------------------------

BITS = """
import sys, numpy as np, torch
from xxhash import xxh3_128_hexdigest
from elastic.outer.robust import *

torch.set_num_threads(int(sys.argv[1]))
size = 3 * PIECE + 9001
rng = np.random.default_rng(0)  # torch's own numbers differ from processor to processor
common = rng.standard_normal(size)
xs = [torch.from_numpy((common + 0.2 * i * rng.standard_normal(size)).astype(np.float32)) for i in range(7)]
xs.append(xs[0] * -100)
xs.append(torch.full((size,), 1e30))
digests = []
for rule in (CoordinateMedian(byzantine=2), TrimmedMean(byzantine=2), Krum(byzantine=2, keep=3), NormClip(),
             GeometricMedian(byzantine=2), FlagAggregator(byzantine=2, iterations=3)):
    for wire in ("f32", "int4"):
        out = torch.empty(size)
        combined(rule, Contributions(tuple(encoded(x, wire) for x in xs), size, wire), size - 5000, out)
        digests.append(xxh3_128_hexdigest(out.numpy().tobytes()))
print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), *digests)
"""


def test_the_bits_do_not_depend_on_processor_or_threads() -> None:
    found: dict[tuple[str, str], str] = {}
    for capability, threads in (("default", 1), ("avx2", 2), ("avx512", 2)):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", BITS, str(threads)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        used, count, digests = done.stdout.strip().split(" ", 2)
        found[used, count] = digests
    assert len({used for used, _ in found}) > 1, f"this processor knows no other way to compute than {list(found)}"
    assert len({count for _, count in found}) == 2
    assert len(set(found.values())) == 1, found


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TrimmedMean(byzantine=-1), "byzantine is -1"),
        (lambda: Krum(byzantine=1.5), "byzantine is 1.5"),  # type: ignore[arg-type]
        (lambda: CoordinateMedian(byzantine=True), "byzantine is True"),
        (lambda: TrimmedMean(byzantine=2, peers=4), "needs 5 contributors, and peers is 4"),
        (lambda: Krum(byzantine=1, peers=4), "needs 5 contributors, and peers is 4"),
        (lambda: Krum(keep=0), "keep is 0"),
        (lambda: GeometricMedian(smoothing=0.0), "smoothing is 0"),
        (lambda: FlagAggregator(rank=-1), "rank is -1"),
        (lambda: NormClip(norm=0.0), "norm is 0"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(make: Callable[[], Robust], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_what_they_need_and_how_they_describe_themselves() -> None:
    assert [make(2).needs for make in ROBUST] == [5, 5, 7, 7, 5, 5, 1]
    assert Krum(byzantine=1, keep=7).needs == 8 and FlagAggregator(byzantine=1, rank=6).needs == 6
    assert TrimmedMean(byzantine=2, peers=9).description == "TrimmedMean(byzantine=2)"
    assert Krum(keep=3).description == "Krum(byzantine=1, keep=3)"
    assert len({make(1).description for make in ROBUST}) == len(ROBUST)


@pytest.mark.parametrize(
    "rule, options, message",
    [
        (delayed.rule(eager=True, robust=TrimmedMean(), weighting=Equal()), {}, "eager"),
        (decoupled.rule(rda=True, robust=TrimmedMean(), weighting=Equal()), {}, "rda"),
        (diloco.rule(robust=TrimmedMean(), weighting=Tokens()), {}, "weighting by tokens"),
        (diloco.rule(robust=TrimmedMean(), weighting=Equal(), feedback=elastic.EF21()), {}, "EF21"),
        (diloco.rule(robust=TrimmedMean(), weighting=Equal(), feedback=elastic.EControl()), {}, "EControl"),
        (diloco.rule(robust=TrimmedMean(), weighting=Equal()), {"gather_wire": "f32"}, "gather_wire"),
        (
            diloco.rule(robust=TrimmedMean(), weighting=Equal(), compression=Compression(wire="int4", rotate=True)),
            {"buffers": True},
            "rotate",
        ),
        (diloco.rule(robust="median", weighting=Equal()), {}, "must be a rule"),
    ],
)
def test_what_needs_a_mean_or_trust_is_refused_with_the_reason(
    rule: Rule, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_robust(rule, **options)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (elastic.DelayedDiLoCo, {"eager": True}, "eager"),
        (elastic.DecoupledDiLoCo, {"rda": True, "fragments": 1}, "rda"),
        (elastic.DiLoCo, {"wire": "int4", "error_budget": 1.5}, "error_budget"),
        (elastic.DiLoCo, {"wire": "int4", "gather_wire": "f32"}, "gather_wire"),
        (elastic.DiLoCo, {"weighting": elastic.FedFix()}, "weighting by FedFix"),
    ],
)
def test_a_loop_refuses_it_at_once(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any], message: str
) -> None:
    model = Layered(0)
    with pytest.raises(ConfigurationError, match=message):
        make(model, inner_of(model), run.join("p0"), combine=TrimmedMean(), **options)


# --- how contributions get there --------------------------------------------------------------------------------------


class Others:
    """A group in which the others have given theirs already."""

    def __init__(self, given: torch.Tensor) -> None:
        self.given = given

    def run(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Done | Failed:
        result.copy_(self.given)
        if source is not None and start.op == "sum":
            result.add_(source)
        record = OperationRecord(seconds=0.0, wait_ready_seconds=0.0, reduce_seconds=0.0)
        return Done(identity=start.identity, digest="of all contributions", record=record)

    def abort(self, abort: Any) -> None: ...


def start_of(elements: int, **fields: Any) -> Start:
    members = tuple(Member(name=f"p{i}", incarnation=i + 1, addresses=()) for i in range(3))
    common: dict[str, Any] = {"run": "r", "generation": 1, "epoch": 1, "tag": "t", "round": 0, "attempt": 0}
    common |= {"fragment": 0, "base_version": 0, "contributors": members, "shares": (), "multipliers": (1.0,) * 3}
    return Start(**common | {"elements": elements, "dtype": "uint8", "wire": "raw"} | fields)


@pytest.mark.parametrize("wire", ["f32", "int4"])
def test_contributions_that_came_by_way_of_others_are_found_in_their_places(wire: str) -> None:
    xs = vectors(5, 3, 131)
    size = encoded_size(131, wire)
    others = torch.cat([encoded(xs[0], wire), torch.zeros(size, dtype=torch.uint8), encoded(xs[2], wire)])
    out = torch.empty(131)
    left_out: list[list[str]] = []
    group = Combining(Others(others), "p1", CoordinateMedian(), wire, 131, left_out.append)
    group.digests = tuple(sealed(encoded(x, wire)) for x in xs)
    start = start_of(3 * size, op="sum", shares=(0.0, 0.0, 1.0))
    outcome = group.run(start, xs[1], out)
    assert isinstance(outcome, Done) and outcome.digest == xxh3_128_hexdigest(out.numpy().tobytes())
    assert torch.equal(out, result(CoordinateMedian(), xs, wire)) and not left_out
    others[3] += 1
    failed = group.run(start, xs[1], out)
    assert isinstance(failed, Failed) and "what p0 gave was changed" in failed.reason
    assert [(each.peer, each.evidence) for each in failed.lost] == [("p0", "corrupt"), ("p2", "corrupt")]


def test_who_gives_something_else_is_noticed_and_who_gives_no_numbers_is_named() -> None:
    xs = vectors(5, 3, 8)
    xs[0] = torch.full((8,), math.nan)
    data = torch.cat([encoded(x, "f32") for x in xs])
    left_out: list[list[str]] = []
    group = Combining(Others(data), "p1", CoordinateMedian(), "f32", 8, left_out.append)
    group.run(start_of(96, op="all_gather", segments=(32, 32, 32)), xs[1], torch.empty(8))
    assert left_out == [["p0"]]
    for segments in ((36, 28, 32), (32, 32, 36)):
        with pytest.raises(ValueError, match="gives something else"):
            group.run(start_of(sum(segments), op="all_gather", segments=segments), xs[1], torch.empty(8))


# --- too few ----------------------------------------------------------------------------------------------------------


def test_peers_that_need_different_numbers_do_not_exchange(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, quorum=1.0)

    def loop(peer: Peer) -> str:
        model = Layered(0)
        rule = TrimmedMean(byzantine=1) if peer.name == "p0" else TrimmedMean(byzantine=0)
        try:
            with elastic.DiLoCo(model, inner_of(model), peer, sync_every=2, combine=rule, timeout=5):
                first.wait(20) if peer.name == "p1" else first.set()
                until(lambda: len(refused) == 1)
        except ParityError as error:
            refused.append(str(error))
        return ""

    first, refused = threading.Event(), list[str]()
    run.together(loop, run.several(2))
    assert len(refused) == 1 and "TrimmedMean(byzantine=1)" in refused[0] and "TrimmedMean(byzantine=0)" in refused[0]


# --- whole runs -------------------------------------------------------------------------------------------------------

TIMES = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=60)
LOOPS: list[tuple[Callable[..., OuterLoop], Rule, dict[str, Any]]] = [
    (elastic.DiLoCo, diloco.rule(robust=TrimmedMean(), weighting=Equal()), {}),
    (
        elastic.StreamingDiLoCo,
        streaming.rule(
            sync_delay=1,
            robust=Krum(byzantine=0, keep=2),
            weighting=Equal(),
            compression=Compression(wire="int4", rotate=True),
            feedback=elastic.ErrorFeedback(),
        ),
        {"fragments": 4, "sync_delay": 1, "wire": "int4", "rotate": True, "feedback": elastic.ErrorFeedback()},
    ),
    (
        elastic.DelayedDiLoCo,
        delayed.rule(robust=GeometricMedian(), weighting=Equal(), compression=Compression(wire="bf16")),
        {"wire": "bf16"},
    ),
]  # fmt: skip


def seed_of(peer: Peer) -> int:
    return int(peer.name[1:])


def train(peer: Peer, make: Callable[..., OuterLoop], steps: int, **options: Any) -> OuterLoop:
    model = Layered(seed_of(peer))
    inner = inner_of(model)
    with make(model, inner, peer, **options) as loop:
        for _ in range(steps):
            descend(model, inner)
    return loop


@pytest.mark.parametrize("make, rule, options", LOOPS, ids=["diloco", "streaming", "delayed"])
def test_over_the_network_it_is_what_it_is_in_one_process(
    run: Run, make: Callable[..., OuterLoop], rule: Rule, options: dict[str, Any]
) -> None:
    run.policy, run.timeouts = RunPolicy(min_peers=3, quorum=1.0), TIMES
    models = [Layered(seed) for seed in range(3)]
    inners = [inner_of(model) for model in models]
    simulator = Simulator(models, rule, sync_every=8, fragments=options.get("fragments", 1))
    for _ in range(21):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
    simulator.flush()
    options = options | {"combine": rule.robust, "sync_every": 8}
    loops = run.together(lambda peer: train(peer, make, 21, **options), run.several(3))
    assert {loop.version.state_hash for loop in loops} == {simulator.replicas[0].state.state_hash}
    assert {loop.version.number for loop in loops} == {simulator.number} and simulator.number >= 3
    size = sum(Compression(wire=options.get("wire", "f32")).size(part.elements) for part in loops[0].layout.parts)
    assert loops[0].statistics().bytes_offered * len(loops[0].layout.parts) >= size * simulator.number


def test_a_round_in_one_process_needs_as_many_too() -> None:
    models = [Layered(seed) for seed in range(3)]
    inners = [inner_of(model) for model in models]
    rule = diloco.rule(robust=CoordinateMedian(), weighting=Equal())
    simulator = Simulator(models, rule, sync_every=4, received=lambda turn, i: turn != 1 or i != 2)
    for _ in range(12):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
    assert simulator.number == 2 and [given for _, given in simulator.rounds] == [(0, 1, 2), (0, 1), (0, 1, 2)]


class Regression(torch.nn.Module):
    """Learns a linear map from noisy samples; every peer has its own. The same held-out ones for all."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(24, 6)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
        truth = torch.randn(24, 6, generator=torch.Generator().manual_seed(99))
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(256, 24, generator=generator)
        self.y = self.x @ truth + 0.1 * torch.randn(256, 6, generator=generator)

    def forward(self) -> torch.Tensor:
        return (self.layer(self.x) - self.y).square().mean()


def held_out(loop: OuterLoop) -> float:
    """The loss of the outer parameters on what nobody has trained on."""
    judge = Regression(1000)
    with loop.evaluating() as model, torch.no_grad():
        weight, bias = (each.detach() for each in model.parameters())
        return float((torch.nn.functional.linear(judge.x, weight, bias) - judge.y).square().mean())


def give(loop: OuterLoop, spoil: Callable[[Flight], None]) -> None:
    """This peer gives something else than it has learned."""
    launch = loop.replica.launch

    def spoiled() -> Flight:
        flight = launch()
        spoil(flight)
        return flight

    loop.replica.launch = spoiled  # type: ignore[method-assign]


def attacked(run: Run, fired: list[int], **options: Any) -> tuple[list[float], set[str], list[float]]:
    """Five peers train, and the first gives its contributions flipped, and ten times as long. Their held-out losses,
    the hashes of their outer states, and the lengths of what the first one gave."""
    run.policy, run.timeouts = RunPolicy(min_peers=5, quorum=1.0), TIMES
    given_: list[float] = []

    def spoil(flight: Flight) -> None:
        flight.payload.mul_(-10)
        given_.append(float(flight.payload.norm()))
        fired.append(flight.base.number)

    def learn(peer: Peer) -> tuple[float, str]:
        model = Regression(seed_of(peer))
        inner = torch.optim.SGD(model.parameters(), lr=0.5)
        with elastic.DiLoCo(model, inner, peer, sync_every=5, outer=SGD(lr=1.0), **options) as loop:
            if peer.name == "p0":
                give(loop, spoil)
            for _ in range(40):
                descend(model, inner)
            return held_out(loop), loop.version.state_hash

    results = run.together(learn, run.several(5))
    return [loss for loss, _ in results], {state_hash for _, state_hash in results}, given_


@pytest.mark.parametrize(
    "rule, times",
    [
        (None, math.inf),
        (CoordinateMedian(), 2),
        (TrimmedMean(), 2),
        (Krum(), 2),
        (Krum(keep=3), 2),
        (GeometricMedian(), 2),
        (FlagAggregator(), 10),
        (NormClip(), 10),
    ],
    ids=["mean", "median", "trimmed", "krum", "multi-krum", "geometric", "flag", "clip"],
)
def test_one_of_five_peers_sends_the_opposite_ten_times_over(run: Run, rule: Robust | None, times: float) -> None:
    """times: how many times the loss of a run without it may be had. The last two bound what a bad peer does, and do
    not take it away: what points the other way lies in the same subspace, and is one of five of the same length.
    """
    clean = Simulator(
        models := [Regression(seed) for seed in range(5)], diloco.rule(SGD(lr=1.0), weighting=Equal()), sync_every=5
    )
    inners = [torch.optim.SGD(model.parameters(), lr=0.5) for model in models]
    for _ in range(40):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        clean.stepped()
    clean.flush()
    judge = Regression(1000)
    with torch.no_grad():
        reference = float((models[0].layer(judge.x) - judge.y).square().mean())
        start = float(judge().detach())
    fired: list[int] = []
    losses, hashes, lengths = attacked(run, fired, combine=rule)
    assert len(fired) >= 8 and min(lengths) > 0, "the fault did not fire"
    assert len(hashes) == 1 and len(set(losses)) == 1
    assert start > 1000 * reference
    if rule is None:
        assert losses[0] > start, "the mean was to be spoiled"
    else:
        assert losses[0] < times * reference, (losses[0], reference, start)


def test_who_sends_what_is_no_number_is_left_out_and_named_by_all(run: Run) -> None:
    """It would be refused by the peer itself: here that is passed over, as a bad peer would."""
    run.policy, run.timeouts = RunPolicy(min_peers=3, quorum=1.0), TIMES
    peers = run.several(3)

    def spoil(flight: Flight) -> None:
        assert flight.finite
        flight.payload[5] = math.nan  # `finite` has been looked at by now, and is kept

    def learn(peer: Peer) -> OuterLoop:
        model = Layered(seed_of(peer))
        inner = inner_of(model)
        with elastic.DiLoCo(model, inner, peer, sync_every=4, combine=TrimmedMean()) as loop:
            if peer.name == "p1":
                give(loop, spoil)
            for _ in range(8):
                descend(model, inner)
        return loop

    loops = run.together(learn, peers)
    assert len({loop.version.state_hash for loop in loops}) == 1 and loops[0].version.number == 2
    assert torch.isfinite(loops[0].version.parameters).all()
    for peer in peers:
        log = [json.loads(line) for line in (run.folder / f"{peer.name}.jsonl").read_text().splitlines()]
        assert [e["peers"] for e in log if e["event"] == "contribution.left_out"] == [["p1"]] * 2


@pytest.mark.parametrize("wire", ["f32", "int4"])
def test_it_costs_as_many_contributions_as_there_are_other_peers(run: Run, wire: str) -> None:
    """What each peer sends in a round: its contribution to all others. A mean costs two, but for a part in n."""
    run.policy, run.timeouts = RunPolicy(min_peers=4, quorum=1.0), TIMES
    size, rounds = 200_000, 3

    class Wide(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(size))

        def forward(self) -> torch.Tensor:
            return self.x.sum()

    def sent(peer: Peer, **options: Any) -> int:
        before = peer.group.statistics().bytes_sent
        model = Wide()
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with elastic.DiLoCo(model, inner, peer, sync_every=1, wire=wire, **options):
            for _ in range(rounds):
                descend(model, inner)
        return peer.group.statistics().bytes_sent - before

    peers = run.several(4)
    robust = run.together(lambda peer: sent(peer, combine=CoordinateMedian(), tag="robust"), peers)
    mean = run.together(lambda peer: sent(peer, gather_wire=wire, tag="mean"), peers)
    one = Compression(wire=wire).size(size) * rounds
    assert all(3 * one <= each < 3.1 * one for each in robust), [each / one for each in robust]
    assert all(1.45 * one <= each < 1.6 * one for each in mean), [each / one for each in mean]


def test_with_fewer_peers_than_the_rule_needs_nothing_is_committed_and_the_reason_is_said(run: Run) -> None:
    """Three of three are needed, and one ends in the middle: the others wait, and hear for what."""
    run.policy, run.timeouts = RunPolicy(quorum=1.0), replace(TIMES, round=6, operation=5, grace=1, evict_after=3)
    peers = run.several(3)
    gone = threading.Event()

    def learn(peer: Peer) -> tuple[str, str, int]:
        model = Layered(seed_of(peer))
        inner = inner_of(model)
        loop = elastic.DiLoCo(model, inner, peer, sync_every=2, combine=TrimmedMean(byzantine=1))
        with pytest.raises(NotEnoughPeers) as error, loop:
            for step in range(100):
                if step == 6 and peer.name == "p2":
                    peer.close()
                    gone.set()
                    raise NotEnoughPeers("this one has gone")
                if step == 6:
                    gone.wait(30)
                descend(model, inner)
        return str(error.value), loop._seen.state_hash if loop._seen else "", loop.steps

    (one, held, steps), (other, same, _), _ = run.together(learn, peers)
    assert all("TrimmedMean(byzantine=1)" in text and "needs 3" in text for text in (one, other))
    assert any("2 can contribute" in text for text in (one, other)), "who gives up last may hear that it is alone"
    assert held == same and steps == 8
    assert run.coordinator is not None and run.coordinator.status().progress.rounds == 3
    log = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    shorts = {event["round"]: event["contributors"] for event in log if event["event"] == "round.short"}
    assert shorts[3] == ["p0", "p1"] and max(shorts) == 3  # who was there first may have waited in round 0, too


def test_a_peer_that_comes_late_and_one_that_was_left_out_hold_the_same_bits(run: Run) -> None:
    """p3 joins a run under way and fetches its state; p0 is left out of a round, and applies the combination."""
    run.policy, run.timeouts = RunPolicy(min_peers=3, quorum=0.7), replace(TIMES, grace=0.5)
    peers = run.several(3)
    stop, pausing = threading.Event(), threading.Event()
    loops: dict[str, OuterLoop] = {}

    def learn(peer: Peer) -> str:
        model = Layered(seed_of(peer))
        inner = inner_of(model)
        options: dict[str, Any] = {"combine": CoordinateMedian(byzantine=1), "wire": "int8", "sync_every": 4}
        with elastic.DiLoCo(model, inner, peer, **options) as loop:
            loops[peer.name] = loop
            while not loop.finished:
                stop.wait(0.01)
                while peer.name == "p0" and pausing.is_set() and not stop.is_set():
                    stop.wait(0.01)
                descend(model, inner)
        return loop.version.state_hash

    def act() -> None:
        try:
            until(lambda: peers[0].progress.rounds >= 2)
            late = run.join("p3")
            thread = threading.Thread(target=lambda: results.append(learn(late)))
            threads.append(thread)
            thread.start()
            until(lambda: "p3" in loops and loops["p3"].statistics().contributed >= 2)
            pausing.set()
            before = peers[1].progress.rounds
            until(lambda: peers[1].progress.rounds >= before + 3)
            pausing.clear()
            alone = loops["p0"].statistics()
            until(lambda: loops["p0"].statistics().contributed > alone.contributed)
        finally:
            stop.set()
            peers[1].run_until(rounds=peers[1].progress.rounds + 2)

    results: list[str] = []
    threads: list[threading.Thread] = []
    hashes = together(act, *[lambda peer=peer: learn(peer) for peer in peers])[1:]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
    assert len({*hashes, *results}) == 1 and results
    assert loops["p0"].statistics().contributed < loops["p0"].statistics().rounds, "nobody was left out"


@pytest.mark.parametrize("changes", [0, 1])
def test_around_a_pair_that_cannot_talk_all_contribute_and_who_passes_things_on_cannot_change_them(
    run: Run, changes: int
) -> None:
    """p2 owns all sums then. It adds to what p0 gives, once: that attempt fails everywhere, and the next one counts."""
    run.policy, run.timeouts = RunPolicy(min_peers=3, quorum=1.0), TIMES
    peers = run.several(3)
    assert run.coordinator is not None
    with run.coordinator._lock:
        run.coordinator._membership.rounds.cuts[frozenset(("p0", "p1"))] = float("inf")
    execute, fired = peers[2].group.run, list[int]()

    def changing(start: Start, source: torch.Tensor | None, out: torch.Tensor) -> Done | Failed:
        if len(fired) < changes and start.op == "sum" and source is not None:
            fired.append(start.attempt)
            source = source.clone()
            source[3] += 1
        return execute(start, source, out)

    peers[2].group.run = changing  # type: ignore[method-assign]
    loops = run.together(
        lambda peer: train(peer, elastic.DiLoCo, 9, sync_every=4, combine=CoordinateMedian(), wire="int4"), peers
    )
    assert len(fired) == changes
    assert len({loop.version.state_hash for loop in loops}) == 1 and loops[0].version.number == 3
    assert {loop.last_commit.contributors for loop in loops if loop.last_commit} == {("p0", "p1", "p2")}
    log = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    committed = [event["attempt"] for event in log if event["event"] == "round.committed"]
    aborted = [event for event in log if event["event"] in ("round.aborted", "round.shrunk")]
    assert committed == [changes, 0, 0] and len(aborted) == changes
    assert all("what p0 gave was changed on its way" in str(event["links"]) for event in aborted)

"""Who owns which elements."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plane import make_start

from collectives import Member, WireRun
from collectives.patterns import check, partition

ME = Member(name="a", incarnation=1)
YOU = Member(name="b", incarnation=2)


def wires(*runs: tuple[Any, ...]) -> tuple[WireRun, ...]:
    return tuple(WireRun(**dict(zip(("elements", "wire", "gather_wire"), run, strict=False))) for run in runs)


@given(
    st.integers(0, 100_000),
    st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any),
    st.sampled_from([16, 256, 1024, 262_144]),
)
def test_covers_everything_exactly_once(elements: int, weights: list[int], limit: int) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    chunks = partition(elements, shares, limit)
    at = 0
    for chunk in chunks:
        assert chunk.start == at and chunk.start < chunk.stop <= chunk.start + limit
        assert shares[chunk.owner] > 0
        at = chunk.stop
    assert at == elements
    assert [chunk.owner for chunk in chunks] == sorted(chunk.owner for chunk in chunks)


@given(st.integers(1000, 100_000), st.lists(st.integers(0, 100), min_size=1, max_size=9).filter(any))
def test_follows_the_shares(elements: int, weights: list[int]) -> None:
    shares = tuple(weight / sum(weights) for weight in weights)
    chunks = partition(elements, shares, 1 << 18)
    for index, share in enumerate(shares):
        owned = sum(chunk.stop - chunk.start for chunk in chunks if chunk.owner == index)
        assert abs(owned - share * elements) <= 32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run": "other"}, "other"),
        ({"pattern": "star"}, "pattern of"),
        ({"pattern": "ring"}, "order must name"),
        ({"pattern": "ring", "order": (0, 0)}, "order must name"),
        ({"pattern": "ring", "order": (0, 1), "wire": "bf16"}, "lossless"),
        ({"pattern": "tree", "parents": (-1, -1)}, "the one above it"),
        ({"pattern": "tree", "parents": (1, 0)}, "the one above it"),
        ({"pattern": "tree", "parents": (-1, 0)}, "share must be 1"),
        ({"dtype": "float16"}, "a dtype"),
        ({"dtype": "float64"}, "'raw'"),
        ({"dtype": "int32", "wire": "raw", "divisor": 2.0}, "floating point"),
        ({"op": "max", "multipliers": (2.0, 1.0)}, "only sums"),
        ({"op": "median"}, "an op"),
        ({"op": "all_gather"}, "needs segments"),
        ({"op": "broadcast"}, "share 1"),
        ({"segments": (1, 2)}, "sum to"),
        ({"wire": "int3"}, "bf16"),
        ({"gather_wire": "int3"}, "bf16"),
        ({"chunk_bytes": 100}, "multiple of 64"),
        ({"contributors": (YOU, ME)}, "sorted"),
        ({"contributors": (YOU,), "shares": (1.0,), "multipliers": (1.0,)}, "no member"),
        ({"shares": (1.0,)}, "one entry"),
        ({"shares": (0.5, 0.6)}, "sum to 1"),
        ({"shares": (1.5, -0.5)}, "non-negative"),
        ({"multipliers": (1.0, float("nan"))}, "finite"),
        ({"divisor": 0.0}, "not 0"),
        ({"elements": -1}, "non-negative"),
        ({"wires": wires((9, "f32"))}, "cover 10"),
        ({"wires": wires((0, "f32"), (10, "f32"))}, "above 0"),
        ({"wires": wires((5, "f32"), (5, "int8"))}, "multiples of 128"),
        ({"wires": wires((10, "int3"))}, "bf16"),
        ({"wires": wires((10, "raw"))}, "bf16"),
        ({"wires": wires((10, "f32", "int3"))}, "bf16"),
        ({"wires": wires((10, "f32")), "op": "max"}, "only sums of float32"),
        ({"wires": wires((10, "raw")), "dtype": "float64", "wire": "raw"}, "only sums of float32"),
        ({"wires": wires((10, "f32", "int8")), "pattern": "ring", "order": (0, 1)}, "lossless"),
        ({"wires": wires((10, "f32")), "op": "broadcast", "shares": (1.0, 0.0)}, "only sums of float32"),
        ({"wires": wires((10, "f32")), "op": "reduce_scatter", "segments": (5, 5)}, "only sums of float32"),
        ({"elements": 0, "wires": wires((0, "f32"))}, "above 0"),
    ],
)
def test_orders_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check(replace(make_start([ME, YOU], 10), **changes), ME, "run")
    assert "\n" not in str(caught.value)


def test_ranges_without_loss_may_go_around_a_ring() -> None:
    check(make_start([ME, YOU], 10, wires=wires((10, "f32")), pattern="ring", order=(0, 1)), ME, "run")

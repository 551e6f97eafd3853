"""The choice of formats: never beyond the budget, never larger than one format for all, and the best there is."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.records import BLOCK, WireRun
from collectives.wires import WIRES, NonFinite, approximated
from elastic.outer.budget import FORMATS, choose, errors, plan
from elastic.planning import valid_wires

fixed = settings(derandomize=True, deadline=None)
slacks = st.one_of(st.sampled_from([1.0, 2.0]), st.floats(0, 4))
magnitudes = st.one_of(st.just(0.0), st.floats(5e-324, 1e-300), st.floats(1e-6, 1e6), st.integers(0, 9).map(float))
Table = list[list[float]]
Bits = list[list[int]]


@st.composite
def layers(draw: st.DrawFn) -> tuple[Table, Bits, int]:
    count, formats = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    rows = st.lists(magnitudes, min_size=formats, max_size=formats)
    sizes = st.lists(st.integers(0, 50), min_size=formats, max_size=formats)
    table = draw(st.lists(rows, min_size=count, max_size=count))
    return table, draw(st.lists(sizes, min_size=count, max_size=count)), draw(st.integers(0, formats - 1))


def total(table: Table | Bits, choice: tuple[int, ...]) -> float:
    return math.fsum(row[index] for row, index in zip(table, choice, strict=True))


def every_choice(table: Table) -> list[tuple[int, ...]]:
    return list(itertools.product(range(len(table[0])), repeat=len(table)))


def smallest(table: Table, bits: Bits, static: int, slack: float, steps: int) -> float:
    """Of all choices whose errors fit in whole steps, and of the static one if it fits; inf if none does."""
    uniform = (static,) * len(table)
    budget = slack * total(table, uniform)

    def cost(error: float) -> float:
        if error == 0 or not budget:
            return math.inf if error else 0
        exact = error / budget * steps * (1 + 1e-9)
        return max(1, math.ceil(exact)) if exact <= steps else math.inf

    costs = [[cost(error) for error in row] for row in table]
    fitting = [each for each in every_choice(table) if total(costs, each) <= steps]
    fitting += [uniform] if total(table, uniform) <= budget else []
    return min((total(bits, each) for each in fitting), default=math.inf)


@fixed
@given(case=layers(), slack=slacks, steps=st.sampled_from([1, 3, 10, 100, 10_000]))
def test_equals_brute_force_on_errors_in_whole_steps(case: tuple[Table, Bits, int], slack: float, steps: int) -> None:
    table, bits, static = case
    best = smallest(table, bits, static, slack, steps)
    if best == math.inf:
        with pytest.raises(ValueError, match="raise slack"):
            choose(table, bits, static, slack, steps)
    else:
        assert total(bits, choose(table, bits, static, slack, steps)) == best


@fixed
@given(case=layers(), slack=st.floats(1, 4), steps=st.sampled_from([1, 7, 10_000]))
def test_is_within_the_budget_and_no_larger_than_the_static_choice(
    case: tuple[Table, Bits, int], slack: float, steps: int
) -> None:
    table, bits, static = case
    found, uniform = choose(table, bits, static, slack, steps), (static,) * len(table)
    assert total(table, found) <= slack * total(table, uniform)
    assert total(bits, found) <= total(bits, uniform)


@fixed
@given(case=layers(), low=slacks, more=st.floats(0, 2), steps=st.sampled_from([1, 7, 10_000]))
def test_more_slack_never_costs_more(case: tuple[Table, Bits, int], low: float, more: float, steps: int) -> None:
    table, bits, static = case
    try:
        before = total(bits, choose(table, bits, static, low, steps))
    except ValueError:
        before = math.inf
    high = max(1.0, low + more)  # so that something fits
    assert total(bits, choose(table, bits, static, high, steps)) <= before


@settings(fixed, max_examples=15)
@given(st.integers(0, 2**32), st.floats(1, 2))
def test_many_layers_stay_within_the_budget_and_close_to_the_best(seed: int, slack: float) -> None:
    """No choice can be smaller than that of a program with ever finer steps, whose errors are hardly rounded up."""
    generator = np.random.default_rng(seed)
    table = np.sort(generator.lognormal(0, 2, (40, 4)), axis=1)
    bits = np.sort(generator.integers(1, 10**6, (40, 4)), axis=1)[:, ::-1]
    coarse, fine = (choose(table.tolist(), bits.tolist(), 2, slack, steps) for steps in (2000, 100_000))
    for found in (coarse, fine):
        assert total(table.tolist(), found) <= slack * table[:, 2].sum() * (1 + 1e-12)
    assert total(bits.tolist(), fine) <= total(bits.tolist(), coarse) <= 1.05 * total(bits.tolist(), fine)


def test_of_equal_sizes_the_smaller_error_is_chosen() -> None:
    assert choose([[3.0, 1.0, 2.0]], [[4, 4, 4]], 0) == (1,)
    assert choose([[3.0, 1.0], [1.0, 3.0]], [[4, 4], [4, 4]], 0) == (1, 0)
    assert choose([], [], 0) == ()


def test_without_a_budget_only_what_loses_nothing_is_chosen() -> None:
    assert choose([[0.0, 0.0, 1.0]], [[4, 2, 1]], 0) == (1,)
    assert choose([[0.0, 1e-300], [0.0, 0.0]], [[4, 2], [4, 2]], 1, slack=0.0) == (0, 1)
    with pytest.raises(ValueError, match="raise slack"):
        choose([[1.0, 2.0]], [[4, 2]], 1, slack=0.25)


@pytest.mark.parametrize("change", [
    {"bits": [[1, 2]]}, {"bits": [[1, 2], [1]]}, {"static": 2}, {"static": -1}, {"slack": -1.0}, {"steps": 0},
    {"slack": float("nan")}, {"errors": [[0.0, 1.0], [0.0, float("inf")]]}, {"errors": [[0.0, 1.0], [0.0, -1.0]]},
])  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(change: dict[str, object]) -> None:
    right = {"errors": [[0.0, 1.0], [0.0, 1.0]], "bits": [[2, 1], [2, 1]], "static": 1}
    with pytest.raises(ValueError) as caught:
        choose(**{**right, **change})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_hundreds_of_layers_take_well_under_a_second() -> None:
    generator = np.random.default_rng(0)
    table, bits = generator.random((300, 4)).tolist(), generator.integers(1, 10**9, (300, 4)).tolist()
    begun = time.process_time()
    choose(table, bits, 2)
    assert time.process_time() - begun < 1.0


# --- of what travels ------------------------------------------------------------------------------------------------


def gradients(sizes: list[int], seed: int = 0) -> torch.Tensor:
    """Layers of very different magnitudes; some have most of theirs in a few numbers."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for number, size in enumerate(sizes):
        part = torch.randn(size, generator=generator) * 10.0 ** (number % 5 - 2)
        parts.append(part**5 if number % 3 else part)
    return torch.cat(parts) if parts else torch.empty(0)


def travelled(runs: tuple[WireRun, ...], flat: torch.Tensor) -> torch.Tensor:
    parts = torch.split(flat, [run.elements for run in runs])
    return torch.cat([approximated(run.wire, part) for run, part in zip(runs, parts, strict=True)])


def lost(flat: torch.Tensor, got: torch.Tensor, sizes: list[int]) -> float:
    return math.fsum(float((part.double()).norm()) for part in torch.split(flat - got, sizes))


def nbytes(runs: tuple[WireRun, ...]) -> int:
    return sum(WIRES[name].size(run.elements) for run in runs for name in (run.wire, run.gather_wire))


def test_errors_are_norms_of_what_each_format_loses() -> None:
    sizes = [256, 128, 0, 300]
    flat = gradients(sizes)
    table = errors(flat, sizes, FORMATS)
    for index, name in enumerate(FORMATS):
        parts = torch.split(flat - approximated(name, flat), sizes)
        assert [row[index] for row in table] == pytest.approx([float(part.norm()) for part in parts])
    assert all(row[0] == 0 for row in table)


def test_a_plan_covers_all_in_whole_blocks_and_merges_neighbours() -> None:
    sizes = [40_000, 77, 30_000, 1, 1, 5000, 130, 64, 63, 20_000]
    flat = gradients(sizes)
    for slack in (0.0, 0.3, 1.0, 1.5, 4.0):
        runs = plan(flat, sizes, slack=slack)
        assert valid_wires(runs, flat.numel())
        assert all(one.wire != other.wire for one, other in itertools.pairwise(runs))
        assert all(run.gather_wire == ("f32" if run.wire == "f32" else "int8") for run in runs)
    assert len(plan(flat, sizes)) > 1 and {run.wire for run in plan(flat, sizes, slack=0.0)} == {"f32"}


@fixed
@given(
    sizes=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 3000)), min_size=1, max_size=8),
    seed=st.integers(0, 100),
    slack=st.floats(1, 3),
    static=st.sampled_from(["int8", "int4", "e3m0"]),
)
def test_a_plan_is_within_the_budget_and_no_larger_than_one_wire_for_all(
    sizes: list[int], seed: int, slack: float, static: str
) -> None:
    flat = gradients(sizes, seed)
    runs = plan(flat, sizes, static=static, slack=slack)
    if not flat.numel():
        assert runs == ()
        return
    uniform = (WireRun(elements=flat.numel(), wire=static, gather_wire="int8"),)
    assert valid_wires(runs, flat.numel()) and nbytes(runs) <= nbytes(uniform)
    ends = [min((end + BLOCK // 2) // BLOCK * BLOCK, flat.numel()) for end in itertools.accumulate(sizes[:-1])]
    cut = np.diff([0, *ends, flat.numel()]).tolist()
    allowed = slack * lost(flat, approximated(static, flat), cut)
    assert lost(flat, travelled(runs, flat), cut) <= allowed * (1 + 1e-6)


def test_a_layer_that_loses_little_pays_for_one_that_loses_much() -> None:
    """Flat layers lose nothing in 4 bits; int8 pays where numbers are many and large."""
    sizes = [12_800, 12_800, 1280]
    flat = torch.cat([torch.ones(12_800), torch.randn(12_800, generator=torch.Generator().manual_seed(0)) * 1e-3,
                      torch.randn(1280, generator=torch.Generator().manual_seed(1))])  # fmt: skip
    runs = plan(flat, sizes, static="int8", slack=1.1)
    assert [run.elements for run in runs][-1] == 1280 and runs[-1].wire == "int8" and runs[0].wire in ("int4", "e3m0")
    uniform = (WireRun(elements=flat.numel(), wire="int8", gather_wire="int8"),)
    assert nbytes(runs) < 0.9 * nbytes(uniform)


def test_what_cannot_be_planned_is_said() -> None:
    with pytest.raises(ValueError, match="3 elements together"):
        plan(torch.ones(4), [1, 2])
    with pytest.raises(ValueError, match="'int5' must be one of"):
        plan(torch.ones(4), [4], static="int5")
    with pytest.raises(ValueError, match="these of"):
        plan(torch.ones(4), [4], formats=("int5",), static="int5")
    with pytest.raises(NonFinite):
        plan(torch.tensor([1.0, float("nan")]), [2])

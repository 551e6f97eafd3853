"""Every pattern, operation, type and wire on bare groups: the values are those of the definition, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plane import SMALL, groups, make_abort, together
from plane import make_start as make_outer_start

from collectives import Done, Failed, Group, Member, Start, WireRun
from collectives.frames import HEADER_BYTES
from collectives.patterns import SMALLEST, Chunk, Route, check, chunks_of, route
from collectives.records import BLOCK
from collectives.wires import WIRES, approximated, round_trip

TINY = replace(SMALL, chunk_bytes=256, pool_bytes=512)
SHAPES: list[dict[str, Any]] = [
    {"pattern": "direct"},
    {"pattern": "ring", "order": (0, 1, 2, 3)},
    {"pattern": "ring", "order": (2, 0, 3, 1)},
    {"pattern": "tree", "parents": (1, -1, 1, 2), "shares": (0.0, 1.0, 0.0, 0.0)},
    {"pattern": "tree", "parents": (1, 2, 3, -1), "shares": (0.0, 0.0, 0.0, 1.0)},
]


def make_start(contributors: Sequence[Member], elements: int, **changes: Any) -> Start:
    """A plain operation: its digest is made of the chunks' checksums."""
    return make_outer_start(contributors, elements, base_version=-1, **changes)


def source(index: int, elements: int, dtype: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(index)
    return torch.randint(-50, 50, (elements,), generator=generator).to(getattr(torch, dtype))


def run(made: list[Group], start: Start, sources: list[torch.Tensor | None], sizes: list[int]) -> Any:
    """Outcomes and results; whoever fails ends it for the others, as a coordinator would."""
    results = [torch.zeros(size, dtype=getattr(torch, start.dtype)) for size in sizes]

    def attempt(index: int) -> Done | Failed:
        outcome = made[index].run(start, sources[index], results[index])
        if isinstance(outcome, Failed):
            for group in made:
                group.abort(make_abort(start, outcome.reason))
        return outcome

    return together(*(lambda index=index: attempt(index) for index in range(len(made)))), results


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
@pytest.mark.parametrize(("op", "dtype"), [
    ("sum", "float32"), ("sum", "float64"), ("sum", "int64"), ("sum", "int8"), ("min", "float32"), ("max", "int16"),
])  # fmt: skip
def test_reductions_are_exact_in_every_pattern(shape: dict[str, Any], op: str, dtype: str) -> None:
    """Small whole numbers: every order of additions gives the same bits. Two receivers get the result as well."""
    with groups(6, TINY) as made:
        elements, wire = 1500, "f32" if dtype == "float32" else "raw"
        people = [group.member for group in made]
        start = make_start(people[:4], elements, dtype=dtype, op=op, wire=wire, receivers=tuple(people[4:]), **shape)
        sources = [source(index, elements, dtype) for index in range(4)]
        outcomes, results = run(made, start, [*sources, None, None], [elements] * 6)
        assert all(isinstance(each, Done) for each in outcomes), outcomes
        assert len({each.digest for each in outcomes}) == 1
        stacked = torch.stack(sources)
        wanted = {"sum": stacked.sum(0, dtype=stacked.dtype), "min": stacked.amin(0), "max": stacked.amax(0)}[op]
        for result in results:
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape.values())))
def test_weighted_means_in_every_pattern(shape: dict[str, Any]) -> None:
    with groups(4, TINY) as made:
        elements, weights = 700, (1.0, 0.5, 0.25, 0.25)
        start = make_start([g.member for g in made], elements, multipliers=weights, divisor=2.0, **shape)
        sources = [source(index, elements, "float32") for index in range(4)]
        outcomes, results = run(made, start, list(sources), [elements] * 4)
        assert all(isinstance(each, Done) for each in outcomes), outcomes
        wanted = sum(weight * each for weight, each in zip(weights, sources, strict=True)) / 2.0
        for result in results:
            assert torch.equal(result, wanted)


@pytest.mark.parametrize("pattern", [{"pattern": "direct"}, {"pattern": "ring", "order": (1, 2, 0)}])
def test_all_gather_of_unequal_parts(pattern: dict[str, Any]) -> None:
    segments = (300, 0, 41)
    with groups(3, TINY) as made:
        start = make_start([g.member for g in made], 341, op="all_gather", segments=segments, **pattern)
        sources = [source(index, size, "float32") for index, size in enumerate(segments)]
        outcomes, results = run(made, start, list(sources), [341] * 3)
        assert all(isinstance(each, Done) for each in outcomes) and len({each.digest for each in outcomes}) == 1
        for result in results:
            assert torch.equal(result, torch.cat(sources))


def test_reduce_scatter_leaves_each_its_own_part() -> None:
    segments = (100, 1, 399)
    with groups(3, TINY) as made:
        start = make_start([g.member for g in made], 500, op="reduce_scatter", segments=segments)
        sources = [source(index, 500, "float32") for index in range(3)]
        outcomes, results = run(made, start, list(sources), list(segments))
        assert all(isinstance(each, Done) for each in outcomes) and len({each.digest for each in outcomes}) == 1
        assert torch.equal(torch.cat(results), torch.stack(sources).sum(0))


@pytest.mark.parametrize("shape", [
    {"pattern": "direct"}, {"pattern": "ring", "order": (0, 2, 1)}, {"pattern": "tree", "parents": (1, 2, -1)},
], ids=lambda shape: shape["pattern"])  # fmt: skip
def test_broadcast(shape: dict[str, Any]) -> None:
    with groups(3, TINY) as made:
        start = make_start([g.member for g in made], 900, op="broadcast", shares=(0.0, 0.0, 1.0), **shape)
        numbers = source(7, 900, "float32")
        outcomes, results = run(made, start, [None, None, numbers], [900] * 3)
        assert all(isinstance(each, Done) for each in outcomes), outcomes
        for result in results:
            assert torch.equal(result, numbers)


@pytest.mark.parametrize(("wire", "gather"), [
    ("int8", ""), ("int4", "int8"), ("int4", "int4"), ("e3m0", "int8"), ("e3m0", "e3m0"), ("bf16", "f32"),
    ("f32", "int8"),
])  # fmt: skip
def test_every_wire_quantises_once_each_way(wire: str, gather: str) -> None:
    """Contributions are quantised once, added in float32 in the order of names, and the sum is quantised once."""
    with groups(3) as made:
        elements = 5000
        start = make_start([g.member for g in made], elements, wire=wire, gather_wire=gather)
        sources = [torch.randn(elements, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        outcomes, results = run(made, start, list(sources), [elements] * 3)
        assert all(isinstance(each, Done) for each in outcomes) and len({each.digest for each in outcomes}) == 1
        wanted = np.empty(elements, dtype=np.float32)
        scratch = memoryview(bytearray(8 * elements))
        for chunk in chunks_of(start, made[0].options.chunk_bytes):
            place = slice(chunk.start, chunk.stop)
            total = np.zeros(chunk.stop - chunk.start, dtype=np.float32)
            for each in sources:
                term = np.empty_like(total)
                round_trip(WIRES[wire], each.numpy()[place], scratch, term)
                total += term
            round_trip(WIRES[gather or wire], total, scratch, wanted[place])
        for result in results:
            np.testing.assert_array_equal(result.numpy(), wanted)


RUNS = tuple(
    WireRun(elements=elements, wire=wire, gather_wire="f32")
    for elements, wire in ((128, "f32"), (2560, "int8"), (1152, "int4"), (128, "e3m0"), (3584, "f32"), (777, "int4"))
)


def fixed_order_sum(start: Start, terms: list[torch.Tensor]) -> torch.Tensor:
    """Every operation rounded once."""
    total = terms[0] * start.multipliers[0]
    for term, multiplier in zip(terms[1:], start.multipliers[1:], strict=True):
        total = total + term * multiplier
    return total / start.divisor


def in_ranges(runs: Sequence[WireRun], numbers: torch.Tensor) -> torch.Tensor:
    parts = torch.split(numbers, [run.elements for run in runs])
    return torch.cat([approximated(run.wire, part) for run, part in zip(runs, parts, strict=True)])


@pytest.mark.parametrize("pool_bytes", [0, 32 << 20])
@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.0, 0.9, 0.1), (0.013, 0.487, 0.5)])
@pytest.mark.parametrize("wires", [(), RUNS], ids=["int4", "ranges"])
def test_owners_decode_what_a_peer_finds_that_encodes_its_whole_vector(
    wires: tuple[WireRun, ...], shares: tuple[float, ...], pool_bytes: int
) -> None:
    """So a peer knows, without a word from the owners, what of its contribution the wire has left out."""
    with groups(3, replace(SMALL, pool_bytes=pool_bytes)) as made:
        elements, weights = sum(run.elements for run in RUNS), (0.7, 1.0, 0.3)
        fields = {"wire": "int4", "gather_wire": "f32", "shares": shares, "multipliers": weights, "divisor": 2.0}
        start = make_start([g.member for g in made], elements, wires=wires, **fields)
        sources = [torch.randn(elements, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        outcomes, results = run(made, start, list(sources), [elements] * 3)
        assert all(isinstance(each, Done) for each in outcomes) and len({each.digest for each in outcomes}) == 1
        terms = [in_ranges(wires, each) if wires else approximated("int4", each) for each in sources]
        for result in results:
            assert torch.equal(result, fixed_order_sum(start, terms))


def test_each_range_travels_in_its_own_wires_and_takes_the_bytes_of_these() -> None:
    gathers = ("int8", "", "f32", "int8", "bf16", "e3m0")
    runs = tuple(replace(run, gather_wire=gather) for run, gather in zip(RUNS, gathers, strict=True))
    back = tuple(replace(run, wire=run.gather_wire or run.wire) for run in runs)
    with groups(3) as made:
        elements = sum(run.elements for run in runs)
        start = make_start([g.member for g in made], elements, wires=runs, shares=(0.2, 0.2, 0.6))
        sources = [torch.randn(elements, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        outcomes, results = run(made, start, list(sources), [elements] * 3)
        assert all(isinstance(each, Done) for each in outcomes) and len({each.digest for each in outcomes}) == 1
        wanted = in_ranges(back, fixed_order_sum(start, [in_ranges(runs, each) for each in sources]))
        for result in results:
            assert torch.equal(result, wanted)
        chunks = chunks_of(start, made[0].options.chunk_bytes)
        for me, outcome in enumerate(outcomes):
            for link in outcome.record.links:
                other = int(link.peer[1:])
                assert link.bytes_sent == carried(chunks, runs, to=other, by=me)
                assert link.bytes_received == carried(chunks, runs, to=me, by=other)


def carried(chunks: Sequence[Chunk], runs: Sequence[WireRun], *, to: int, by: int) -> int:
    """Bytes from one peer to another: parts of what the one owns, and sums of what the other does."""
    total, at = 0, 0
    for each in runs:
        inside = [chunk for chunk in chunks if at <= chunk.start < at + each.elements]
        assert inside and inside[-1].stop == at + each.elements
        for name, owner in ((each.wire, to), (each.gather_wire or each.wire, by)):
            sizes = [WIRES[name].size(chunk.stop - chunk.start) for chunk in inside if chunk.owner == owner]
            total += sum(sizes) + HEADER_BYTES * len(sizes)
        at += each.elements
    return total


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    rest=st.integers(1, 300),
    wires=st.lists(st.sampled_from(["f32", "bf16", "int8", "int4", "e3m0"]), min_size=13, max_size=13),
    weights=st.lists(st.integers(0, 100), min_size=1, max_size=7).filter(any),
    chunk_bytes=st.sampled_from([64, 256, 4096, 1 << 20]),
)
def test_chunks_are_cut_where_wires_change_and_nowhere_inside_a_block(
    lengths: list[int], rest: int, wires: list[str], weights: list[int], chunk_bytes: int
) -> None:
    sizes = [*(BLOCK * length for length in lengths), rest]
    runs = tuple(WireRun(elements=size, wire=wire) for size, wire in zip(sizes, wires, strict=False))
    people = [Member(name=f"p{index}", incarnation=index + 1) for index in range(len(weights))]
    shares = tuple(weight / sum(weights) for weight in weights)
    start = make_start(people, sum(sizes), wires=runs, shares=shares)
    check(start, people[0], "run")
    at, quantised = 0, bool({"int8", "int4", "e3m0"} & {run.wire for run in runs})
    ways = [None if run.wire == "f32" else WIRES[run.wire] for run in runs for _ in range(run.elements)]
    for chunk in chunks_of(start, chunk_bytes):
        assert chunk.start == at and 4 * (chunk.stop - at) <= max(chunk_bytes, SMALLEST) and shares[chunk.owner] > 0
        assert not quantised or at % BLOCK == 0
        assert {chunk.wire, chunk.gather_wire, *ways[at : chunk.stop]} == {chunk.wire}
        at = chunk.stop
    assert at == start.elements


def test_numbers_that_a_wire_cannot_carry_fail_the_attempt_and_name_their_peer() -> None:
    with groups(3) as made:
        start = make_start([g.member for g in made], 3000, wire="int8")
        sources = [torch.zeros(3000) for _ in range(3)]
        sources[1][2017] = float("nan")
        outcomes, _ = run(made, start, list(sources), [3000] * 3)
        assert all(isinstance(each, Failed) for each in outcomes), outcomes
        assert any("p1: number 2017 is nan" in each.reason for each in outcomes), outcomes


def test_a_narrow_credit_slows_nothing_to_a_halt() -> None:
    """Hundreds of chunks with room for two early ones each, in several operations over the same links at once."""
    with groups(4, replace(TINY, stripes=3)) as made:
        people = [group.member for group in made]
        starts = [make_start(people, 20_000, tag=f"t{number}") for number in range(3)]
        sources = [source(index, 20_000, "float32") for index in range(4)]
        results = {(i, n): torch.empty(20_000) for i in range(4) for n in range(3)}
        outcomes = together(*(
            lambda i=i, n=n: made[i].run(starts[n], sources[i], results[i, n])
            for i in range(4) for n in ((0, 1, 2) if i % 2 else (2, 1, 0))
        ))  # fmt: skip
        assert all(isinstance(each, Done) for each in outcomes), outcomes
        for result in results.values():
            assert torch.equal(result, torch.stack(sources).sum(0))


@st.composite
def plans(draw: st.DrawFn) -> Start:
    count = draw(st.integers(1, 7))
    people = [Member(name=f"p{index}", incarnation=index + 1) for index in range(count)]
    kind = draw(st.sampled_from(["direct", "ring", "tree"]))
    if kind == "ring":
        return make_start(people, 100, pattern=kind, order=tuple(draw(st.permutations(range(count)))))
    if kind == "tree":
        order = draw(st.permutations(range(count)))
        parents = [-1] * count
        for place in range(1, count):
            parents[order[place]] = order[draw(st.integers(0, place - 1))]
        shares = tuple(float(index == order[0]) for index in range(count))
        return make_start(people, 100, pattern=kind, parents=tuple(parents), shares=shares)
    return make_start(people, 100)


@given(plans())
def test_routes_fit_together(start: Start) -> None:
    """Each contribution reaches the owner exactly once, and the result reaches each member exactly once."""
    count = len(start.contributors)
    owners = {chunk.owner for chunk in chunks_of(start, 1 << 20)}
    for owner in owners:
        ways: list[Route] = [route(start, me, owner) for me in range(count)]

        def summed(me: int, ways: list[Route] = ways) -> list[int]:
            return [me, *(each for term in ways[me].terms if term != me for each in summed(term))]

        assert sorted(summed(owner)) == list(range(count))
        assert all(ways[term].up == me for me in range(count) for term in ways[me].terms if term != me)
        reached = [owner]
        for me in reached:
            assert all(ways[below].above == me for below in ways[me].down)
            reached += ways[me].down
        assert sorted(reached) == list(range(count)) and ways[owner].up == ways[owner].above == -1

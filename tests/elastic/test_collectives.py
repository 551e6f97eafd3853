"""Every collective of a peer, on every dtype and wire, along every pattern; over real sockets, values checked."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from harness import Run, until
from test_peer import number_of

from elastic.config import RunPolicy
from elastic.errors import CollectiveError, ConfigurationError, ParityError, RoundAborted
from elastic.peer import Gathered, Peer, Reduced, Scattered

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUMBERS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.int16]
NUMBERS += [torch.int32, torch.int64]
NAMES = ("p0", "p1", "p2")


def some(seed: int, elements: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(elements, generator=generator, dtype=torch.float64).to(dtype).to(device)
    return torch.randint(0, 200, (elements,), generator=generator).to(dtype).to(device)


def exact(op: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """In the order of the names; halves in float32, rounded once."""
    dtype = parts[0].dtype
    wide = [part.float() if dtype in (torch.bfloat16, torch.float16) else part for part in parts]
    total = wide[0].clone()
    for part in wide[1:]:
        total = {"min": torch.minimum, "max": torch.maximum}.get(op, torch.add)(total, part)
    return (total / len(parts) if op == "mean" else total).to(dtype)


def cut(run: Run, *pairs: str) -> None:
    """The coordinator takes these pairs of peers for cut, for longer than any test."""
    assert run.coordinator is not None
    for pair in pairs:
        run.coordinator._membership.rounds.cuts[frozenset((f"p{pair[0]}", f"p{pair[1]}"))] = float("inf")


# --- reductions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_reduction_of_every_dtype_is_exact(run: Run, device: str) -> None:
    peers = run.several(3)
    for dtype, op in itertools.product(NUMBERS, ("sum", "mean", "min", "max")):
        if op == "mean" and not dtype.is_floating_point:
            continue
        parts = [some(i, 50_001, dtype, device) for i in range(3)]
        results = run.together(lambda peer: peer.all_reduce(parts[number_of(peer)], op=op, tag=f"{dtype}"), peers)  # noqa: B023
        for result in results:
            assert result.tensor.dtype is dtype and result.tensor.device == parts[0].device
            assert torch.equal(result.tensor, exact(op, parts)), (dtype, op)
            assert result.contributors == NAMES


def test_a_weighted_mean_of_doubles_and_sums_of_integers_that_wrap_around(run: Run) -> None:
    peers = run.several(2)
    weights, numbers = (1.0, 3.0), [torch.tensor([1.0], dtype=torch.float64), torch.tensor([5.0], dtype=torch.float64)]
    means = run.together(
        lambda peer: peer.all_reduce(numbers[number_of(peer)], op="mean", weight=weights[number_of(peer)]), peers
    )
    assert [mean.tensor.item() for mean in means] == pytest.approx([4.0, 4.0], rel=1e-14)
    sums = run.together(lambda peer: peer.all_reduce(torch.full((9,), 200, dtype=torch.uint8)), peers)
    assert [reduced.tensor.tolist() for reduced in sums] == [[144] * 9] * 2


@pytest.mark.parametrize(
    "wire, gather_wire, bound",
    [
        ("bf16", None, 2**-8),
        ("f16", None, 2**-10),
        ("int8", None, 0.02),
        ("int4", None, 0.2),
        ("e3m0", None, 0.4),
        ("int4", "int4", 0.4),
        ("int8", "f32", 0.02),
    ],
)
def test_a_lossy_wire_gives_the_same_rounded_bytes_everywhere(
    run: Run, wire: str, gather_wire: str | None, bound: float
) -> None:
    peers = run.several(3)
    parts = [some(i, 300_007) for i in range(3)]
    results = run.together(
        lambda peer: peer.all_reduce(parts[number_of(peer)], wire=wire, gather_wire=gather_wire), peers
    )
    assert all(torch.equal(result.tensor, results[0].tensor) for result in results)
    whole = exact("sum", parts)
    error = (results[0].tensor - whole).norm() / whole.norm()
    assert 0 < error < bound, error


def test_halves_may_travel_in_a_quantised_wire_too(run: Run) -> None:
    peers = run.several(2)
    part = torch.full((1000,), 0.5, dtype=torch.bfloat16)
    for result in run.together(lambda peer: peer.all_reduce(part, wire="int8"), peers):
        assert result.tensor.dtype is torch.bfloat16 and torch.allclose(result.tensor.float(), torch.ones(1000), 0.02)


@pytest.mark.parametrize("wire", ["int8", "int4", "e3m0"])
def test_nan_in_a_quantised_wire_is_refused_before_anybody_hears_of_it(run: Run, wire: str) -> None:
    peers = run.several(2)
    bad = torch.zeros(5000)
    bad[4321] = float("nan")
    with pytest.raises(ConfigurationError, match=f"element 4321 of peer p1 is nan, and wire '{wire}'"):
        peers[1].all_reduce(bad, wire=wire)
    assert not run.coordinator._membership.operations  # type: ignore[union-attr]
    good = run.together(lambda peer: peer.all_reduce(torch.ones(5000), wire=wire), peers)
    assert all(result.round == 0 and result.contributors == ("p0", "p1") for result in good)


def test_whoever_adds_up_to_infinity_steps_back_and_the_others_go_on(run: Run) -> None:
    """Each contribution is finite, the sum in the part that p0 owns is not."""
    peers = run.several(3)
    parts = [torch.zeros(30_000) for _ in range(3)]
    parts[0][5] = parts[1][5] = 2e38
    works = [peer.all_reduce_async(parts[number_of(peer)], wire="int8", timeout=30) for peer in peers]
    with pytest.raises(CollectiveError, match=r"peer p0 could not take part in round 0: .*number 5 is inf"):
        works[0].wait(60)
    for work in works[1:]:
        result = work.wait(60)
        assert (result.contributors, result.attempts) == (("p1", "p2"), 2)
        assert torch.isfinite(result.tensor).all() and 1.9e38 < result.tensor[5] < 2.1e38


# --- along rings and trees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts, pattern", [(("01",), "direct"), (("02", "13", "03"), "tree")])
@pytest.mark.parametrize("wire", ["f32", "int8"])
def test_everything_works_around_pairs_that_cannot_talk(
    run: Run, cuts: tuple[str, ...], pattern: str, wire: str
) -> None:
    peers = run.several(4)
    cut(run, *cuts)
    parts = [some(i, 70_001).round(decimals=0) for i in range(4)]  # whole numbers: any order gives the same sum
    whole = torch.stack(parts).sum(0)
    starts: list[Any] = []
    original = peers[0].group.run
    peers[0].group.run = lambda start, *rest: starts.append(start) or original(start, *rest)  # type: ignore[method-assign, func-returns-value]

    def everything(peer: Peer) -> tuple[Reduced, Scattered, Reduced, Gathered]:
        me = number_of(peer)
        return (
            peer.all_reduce(parts[me], wire=wire),
            peer.reduce_scatter(parts[me]),
            peer.broadcast(parts[me], root="p1"),
            peer.all_gather(parts[me][: 10_000 * me]),
        )

    for reduced, scattered, spread, gathered in run.together(everything, peers):
        lossless = wire == "f32" or pattern == "tree"
        assert torch.equal(reduced.tensor, whole) if lossless else torch.allclose(reduced.tensor, whole, 0.05, 0.2)
        assert torch.equal(scattered.tensor, whole[scattered.start : scattered.stop])
        assert torch.equal(spread.tensor, parts[1])
        assert [torch.equal(got, parts[i][: 10_000 * i]) for i, got in enumerate(gathered.tensors)] == [True] * 4
        assert {len(each.contributors) for each in (reduced, scattered, spread, gathered)} == {4}
    assert starts[0].pattern == pattern and {start.attempt for start in starts} == {0}
    assert (starts[0].wire, starts[3].op) == ("f32" if pattern == "tree" else wire, "sum")


def test_two_peers_that_only_dial_out_reduce_with_a_third(run: Run) -> None:
    run.join("p0")
    run.join("p1", listen="")
    run.join("p2", listen="")
    for peer in run.peers:
        peer.wait_for(3, timeout=30)
    for result in run.together(lambda peer: peer.all_reduce(torch.full((1000,), float(number_of(peer))))):
        assert result.attempts == 1 and torch.equal(result.tensor, torch.full((1000,), 3.0))


# --- moving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_broadcast_gives_the_roots_very_bits(run: Run, device: str) -> None:
    peers = run.several(3)
    for dtype in (*NUMBERS, torch.bool):
        own = [some(i, 12, dtype, device).reshape(3, 4) for i in range(3)]
        if dtype.is_floating_point:
            own[1][0, 0] = float("nan")
        kept = [tensor.clone() for tensor in own]
        results = run.together(lambda peer: peer.broadcast(own[number_of(peer)].t(), root="p1"), peers)  # noqa: B023
        for result in results:
            assert result.tensor.shape == (4, 3) and result.tensor.dtype is dtype
            assert torch.equal(result.tensor.nan_to_num(7), kept[1].t().nan_to_num(7))
        assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(own, kept, strict=True))


def test_a_broadcast_without_its_root_is_over_and_says_so(run: Run) -> None:
    peers = run.several(3)
    works = [threading.Thread(target=failing, args=(peer,), daemon=True) for peer in peers[:2]]
    for work in works:
        work.start()
    operations = run.coordinator._membership.operations  # type: ignore[union-attr]
    until(lambda: any(len(operation.proposals) == 2 for operation in list(operations.values())))
    peers[2].leave()
    for work in works:
        work.join(60)
        assert not work.is_alive()


def failing(peer: Peer) -> None:
    with pytest.raises(RoundAborted, match="its root p2 is not there; there are: p0, p1"):
        peer.broadcast(torch.ones(3), root="p2")


def test_roots_must_be_the_same(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peers = run.several(2)
    thread = threading.Thread(target=peers[0].broadcast, args=(torch.ones(3),), kwargs={"root": "p0"}, daemon=True)
    thread.start()
    operations = run.coordinator._membership.operations  # type: ignore[union-attr]
    until(lambda: any(operation.proposals for operation in list(operations.values())))
    with pytest.raises(ParityError, match="root differs: 'p0' in the run, 'p1' on peer p1"):
        peers[1].broadcast(torch.ones(3), root="p1")
    assert torch.equal(peers[1].broadcast(torch.zeros(3), root="p0").tensor, torch.ones(3))
    thread.join(60)


def test_an_all_gather_takes_tensors_of_different_length(run: Run) -> None:
    peers = run.several(3)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        own = [some(i, 5 * rows, dtype).reshape(rows, 5) for i, rows in enumerate((2, 0, 30_000))]
        for result in run.together(lambda peer: peer.all_gather(own[number_of(peer)]), peers):  # noqa: B023
            assert all(torch.equal(got, tensor) for got, tensor in zip(result.tensors, own, strict=True))
            assert result.contributors == NAMES
    scalars = run.together(lambda peer: peer.all_gather(torch.tensor(float(number_of(peer)))), peers)
    assert [tensor.item() for tensor in scalars[0].tensors] == [0.0, 1.0, 2.0] and scalars[0].tensors[0].shape == ()


@pytest.mark.parametrize("elements", [0, 1, 2, 100_001])
@pytest.mark.parametrize("wire", ["f32", "int8"])
def test_a_reduce_scatter_gives_each_its_segment_of_the_sum(run: Run, elements: int, wire: str) -> None:
    peers = run.several(3)
    parts = [some(i, elements) for i in range(3)]
    whole = exact("mean", parts)
    end = 0
    for result in run.together(lambda peer: peer.reduce_scatter(parts[number_of(peer)], op="mean", wire=wire), peers):
        assert result.start == end and result.tensor.shape == (result.stop - result.start,)
        end, expected = result.stop, whole[result.start : result.stop]
        assert (
            torch.equal(result.tensor, expected) if wire == "f32" else torch.allclose(result.tensor, expected, 0, 0.1)
        )
    assert end == elements

"""The rotation before a lossy wire: orthonormal, linear, the same bits everywhere, and worth it for outliers."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from collectives import wires
from elastic.errors import ConfigurationError
from elastic.outer import compression
from elastic.outer.compression import BLOCK, Compression

ROTATED = Compression(rotate=True)
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 255 * BLOCK, 255 * BLOCK + 300, 3 * 255 * BLOCK + 5]


def normal(elements: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def with_outliers(elements: int) -> torch.Tensor:
    x = normal(elements)
    x[5::BLOCK] *= 100
    return x


def heavy_tailed(elements: int, freedom: float = 2.5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_t(freedom, elements).astype(np.float32))


def relative_error(found: torch.Tensor, x: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(found.double() - x) / torch.linalg.vector_norm(x.double()))


# --- the rotation -----------------------------------------------------------------------------------------------------


def test_the_rotation_keeps_to_the_blocks_of_the_wires() -> None:
    assert wires.BLOCK == BLOCK


@pytest.mark.parametrize("elements", SIZES)
def test_there_and_back_is_the_identity(elements: int) -> None:
    x = normal(elements)
    before = x.clone()
    sent = ROTATED.sent(x)
    assert torch.equal(x, before) and sent.shape == x.shape
    torch.testing.assert_close(ROTATED.received(sent), x, atol=2e-6, rtol=0)


@pytest.mark.parametrize("make", [normal, with_outliers, heavy_tailed])
def test_every_block_keeps_its_length(make: Callable[[int], torch.Tensor]) -> None:
    x = make(300 * BLOCK)
    before, after = (torch.linalg.vector_norm(each.double().view(-1, BLOCK), dim=1) for each in (x, ROTATED.sent(x)))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_it_is_the_hadamard_matrix_with_signs() -> None:
    """By Sylvester's construction, in float64."""
    matrix = np.ones((1, 1))
    while len(matrix) < BLOCK:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x = normal(7 * BLOCK)
    expected = (x.double().numpy().reshape(-1, BLOCK) * compression._SIGNS.numpy()) @ matrix.T / np.sqrt(BLOCK)
    torch.testing.assert_close(ROTATED.sent(x), torch.from_numpy(expected.astype(np.float32).reshape(-1)))


def test_the_signs_are_those_of_every_other_version() -> None:
    signs = "".join("+" if sign > 0 else "-" for sign in compression._SIGNS)
    assert signs[:64] == "+-++-+-+--+---+++----+--+-+-+----+----+++-++-+++-+-++-+--+++---+"
    assert signs[64:] == "+++--+---+-++--++--+-+-+-+-+-++++-++---+-+++++-+++------+-+++---"


def test_a_short_last_block_travels_as_it_is() -> None:
    x = normal(2 * BLOCK + 77)
    assert torch.equal(ROTATED.sent(x)[2 * BLOCK :], x[2 * BLOCK :])
    assert not torch.isclose(ROTATED.sent(x)[: 2 * BLOCK], x[: 2 * BLOCK]).any()
    assert torch.equal(ROTATED.received(x)[2 * BLOCK :], x[2 * BLOCK :])


def test_the_rotation_is_linear() -> None:
    """So that the mean of what peers send stands for the mean of what they had."""
    xs = [normal(1000, seed) for seed in range(4)]
    mean = torch.stack([ROTATED.sent(x) for x in xs]).mean(0)
    torch.testing.assert_close(ROTATED.received(mean), torch.stack(xs).mean(0), atol=1e-6, rtol=0)
    for turn in (ROTATED.sent, ROTATED.received):
        assert torch.equal(turn(xs[0] * 0.25), turn(xs[0]) * 0.25), "powers of two commute exactly"
        torch.testing.assert_close(turn(xs[0] + 3 * xs[1]), turn(xs[0]) + 3 * turn(xs[1]), atol=1e-5, rtol=0)


def test_a_block_has_the_same_bits_wherever_it_stands() -> None:
    x = normal(600 * BLOCK)
    whole = ROTATED.sent(x)
    for first, stop in ((0, 1), (254, 257), (37, 599)):
        part = slice(first * BLOCK, stop * BLOCK)
        assert torch.equal(ROTATED.sent(x[part]), whole[part])


BITS = """
import numpy as np, torch
from xxhash import xxh3_128_hexdigest
from elastic.outer.compression import Compression

rng = np.random.default_rng(0)
scale = np.exp2(rng.integers(-140, 20, 100_003)).astype(np.float32)  # some of these are denormal
x = torch.from_numpy(rng.standard_normal(100_003).astype(np.float32) * scale)
digests = []
for wire in ("f32", "bf16", "int8", "int4", "e3m0"):
    rotated = Compression(wire=wire, rotate=True)
    for turn in (rotated.sent, rotated.received, rotated.approximated, Compression(wire=wire).approximated):
        digests.append(xxh3_128_hexdigest(turn(x).numpy().tobytes()))
print(torch.backends.cpu.get_cpu_capability(), *digests)
"""


def test_the_rotation_has_the_same_bits_on_other_processors() -> None:
    found: dict[str, str] = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True)
        used, _, digests = done.stdout.strip().partition(" ")
        found[used] = digests
    assert len(found) > 1, f"this processor knows no other way to compute than {list(found)}"
    assert len(set(found.values())) == 1, found


# --- what the others get to see ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make, gain", [(with_outliers, 1.8), (heavy_tailed, 2.0)])
def test_with_outliers_int4_is_more_exact_when_rotated(make: Callable[[int], torch.Tensor], gain: float) -> None:
    x = make(1 << 16)
    plain, rotated = (relative_error(Compression(wire="int4", rotate=r).approximated(x), x) for r in (False, True))
    assert rotated * gain < plain


@pytest.mark.parametrize("wire", ["int8", "int4", "e3m0"])
def test_for_normal_numbers_it_makes_no_difference(wire: str) -> None:
    x = normal(1 << 16)
    plain, rotated = (relative_error(Compression(wire=wire, rotate=r).approximated(x), x) for r in (False, True))
    assert rotated == pytest.approx(plain, rel=0.02)


def test_without_rotation_and_loss_nothing_is_copied() -> None:
    x, plain = normal(300), Compression()
    assert plain.sent(x) is x and plain.received(x) is x and plain.approximated(x) is x
    assert Compression(wire="int4").sent(x) is x and Compression(wire="int4").received(x) is x


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("wire", list(wires.WIRES))
def test_approximated_is_what_a_receiver_decodes(wire: str, rotate: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compression, "_PIECE", 4 * BLOCK)
    x, c = normal(9 * BLOCK + 50), Compression(wire=wire, rotate=rotate)
    before, sent = x.clone(), c.sent(x)
    decoded = torch.empty_like(x)
    encoded = wires.WIRES[wire].encode(sent.numpy(), memoryview(bytearray(wires.scratch_bytes(x.numel()))))
    wires.WIRES[wire].decode(memoryview(bytearray(encoded)), decoded.numpy())
    assert torch.equal(c.approximated(x), c.received(decoded)) and torch.equal(x, before)


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("wire, delta", [("int8", 0.99), ("int4", 0.6), ("e3m0", 0.88), ("bf16", 0.99)])
@pytest.mark.parametrize("exponent", [-60, 0, 60])
def test_the_wires_are_contractions(wire: str, delta: float, rotate: bool, exponent: int) -> None:
    worst = torch.full((BLOCK,), 0.999 / 14)  # nearly half an int4 step
    worst[0] = 1
    between = torch.full((BLOCK,), 0.75)  # halfway between two levels of e3m0
    between[0] = 1
    c = Compression(wire=wire, rotate=rotate)
    for x in (normal(4000), heavy_tailed(4000), heavy_tailed(4000, 1.0), worst, between, torch.zeros(200)):
        x = (x * 2.0**exponent).double()
        error = c.approximated(x.float()).double() - x.float()
        assert float(error.square().sum()) <= (1 - delta) * float(x.square().sum())


@pytest.mark.parametrize("rotate", [False, True])
def test_quantised_wires_refuse_what_is_no_number(rotate: bool) -> None:
    x = normal(300)
    x[200] = torch.nan
    with pytest.raises(wires.NonFinite):
        Compression(wire="int4", rotate=rotate).approximated(x)


def test_a_compression_says_what_it_is() -> None:
    assert [Compression(wire="int4", rotate=r).description for r in (False, True)] == ["int4", "int4+hadamard"]
    with pytest.raises(ConfigurationError, match="wire 'int5' is not one of f32"):
        Compression(wire="int5")

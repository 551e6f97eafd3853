"""Wire formats: rounding, bounds, stability under a second encoding; and the import rules of the package."""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from plane import ROOT

from collectives.wires import WIRES, Floats, NonFinite, approximated, round_trip, scratch_bytes

TORCH = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
PEAKS = {"int8": 127, "int4": 7, "e3m0": 64}
MAGNITUDES = {"int8": range(128), "int4": range(8), "e3m0": (0, 1, 2, 4, 8, 16, 32, 64)}
BLOCK = 128
LARGEST = float(np.finfo(np.float32).max)

floats = arrays(np.float32, st.integers(1, 200), elements=st.floats(width=32))
finite = arrays(np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
quantised = pytest.mark.parametrize("name", sorted(PEAKS))


@st.composite
def spreads(draw: st.DrawFn) -> Floats:
    """Normal numbers, each moved by a power of two of its own, from denormals up to the largest float32."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    size, centre, spread = draw(st.integers(1, 700)), draw(st.integers(-150, 130)), draw(st.integers(0, 40))
    exponents = np.clip(centre + generator.integers(-spread, spread + 1, size), -160, 128)
    return np.clip(np.ldexp(generator.standard_normal(size), exponents), -LARGEST, LARGEST).astype(np.float32)


wild = st.one_of(finite, spreads())


def encoded(name: str, values: Floats) -> bytes:
    return bytes(WIRES[name].encode(values, memoryview(bytearray(scratch_bytes(values.size)))))


def decoded(name: str, data: bytes, elements: int) -> Floats:
    out = np.full(elements, np.nan, dtype=np.float32)
    WIRES[name].decode(memoryview(bytearray(data)), out)
    return out


def received(name: str, values: Floats) -> Floats:
    return decoded(name, encoded(name, values), values.size)


def largest(values: Floats) -> Floats:
    """For every number, the largest magnitude of its block."""
    padded = np.pad(np.abs(values), (0, -values.size % BLOCK)).reshape(-1, BLOCK)
    return np.repeat(padded.max(axis=1), BLOCK)[: values.size]


@pytest.mark.parametrize("name", sorted(TORCH))
@given(values=floats)
def test_agrees_with_torch_and_is_stable(name: str, values: Floats) -> None:
    wire, scratch = WIRES[name], memoryview(bytearray(4 * values.size))
    once, twice = np.empty_like(values), np.empty_like(values)
    data = bytes(wire.encode(values, scratch))
    assert len(data) == wire.size(values.size)
    wire.decode(memoryview(bytearray(data)), once)
    wanted = torch.from_numpy(values.copy()).to(TORCH[name]).to(torch.float32).numpy()
    np.testing.assert_array_equal(once, wanted)
    round_trip(wire, once, scratch, twice)
    np.testing.assert_array_equal(once.view(np.uint32), twice.view(np.uint32))


@quantised
@given(values=wild)
def test_a_second_encoding_changes_no_byte(name: str, values: Floats) -> None:
    data = encoded(name, values)
    assert len(data) == WIRES[name].size(values.size)
    assert encoded(name, decoded(name, data, values.size)) == data


@quantised
def test_a_second_encoding_changes_no_byte_for_any_step(name: str) -> None:
    """Blocks of one number and its half, over all exponents and around the bounds."""
    bits = np.random.default_rng(0).integers(0, 0x7F800000, 20_000, dtype=np.uint32)
    for place, edge in enumerate((np.float32(1), np.float32(2.0**-118), np.float32(LARGEST))):
        around = np.arange(-256, 256) + int(edge.view(np.uint32))
        bits[place * 512 : place * 512 + 512] = np.minimum(around, 0x7F7FFFFF)
    blocks = np.zeros((bits.size, BLOCK), dtype=np.float32)
    blocks[:, 5] = bits.view(np.float32)
    blocks[:, 9] = -blocks[:, 5] / 2
    data = encoded(name, blocks.reshape(-1))
    assert encoded(name, decoded(name, data, blocks.size)) == data


@quantised
def test_every_significand_has_a_step_that_returns(name: str) -> None:
    """The lemma that the wires rest on, for all 2^23 significands and the peak that the wire divides by."""
    step = np.frombuffer(encoded(name, np.ones(1, np.float32))[:4], np.float32)[0]
    peak = np.rint(1 / step)
    steps = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(np.float32) / peak
    np.testing.assert_array_equal(steps * peak / peak, steps)


@quantised
@given(values=wild)
def test_every_number_becomes_the_nearest_level(name: str, values: Floats) -> None:
    out, top = received(name, values).astype(np.float64), largest(values).astype(np.float64)
    error, size = np.abs(out - values), np.abs(values).astype(np.float64)
    kept = top >= 2.0**-118
    assert not out[~kept].any()
    levels = np.multiply.outer(top, np.array(MAGNITUDES[name])) / PEAKS[name]
    best = np.abs(levels - size[:, None]).min(axis=1)
    assert np.all(error[kept] <= (best + top * 2.0**-21)[kept])
    bound = top / (2 * PEAKS[name]) if name != "e3m0" else np.where(size >= top / 64, size / 3, top / 128)
    assert np.all(error[kept] <= (bound * (1 + 2.0**-13))[kept])


@quantised
@given(values=wild)
def test_signs_are_symmetric_and_zeros_stay(name: str, values: Floats) -> None:
    plus, minus = received(name, values), received(name, -values)
    np.testing.assert_array_equal(plus, -minus)
    assert not np.signbit(plus[plus == 0]).any()
    assert not plus[values == 0].any()


@quantised
@given(values=wild, power=st.integers(-240, 240))
def test_powers_of_two_commute(name: str, values: Floats, power: int) -> None:
    top = np.ldexp(largest(values).astype(np.float64), power)
    inside = (np.minimum(top, largest(values)) >= 2.0**-118) & (np.maximum(top, largest(values)) < LARGEST)
    values = np.where(inside, values, np.float32(0))
    moved = np.ldexp(values, power)
    np.testing.assert_array_equal(received(name, moved), np.ldexp(received(name, values), power))


@quantised
@given(value=st.floats(2.0**-118, LARGEST, width=32), length=st.integers(1, 300))
def test_equal_numbers_come_back(name: str, value: float, length: int) -> None:
    values = np.full(length, value, dtype=np.float32)
    np.testing.assert_allclose(received(name, values).astype(np.float64), values, rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("name", "limit"), [("int8", 127 / 64), ("int4", 7 / 4), ("e3m0", 2)])
def test_equal_numbers_come_back_exactly(name: str, limit: float) -> None:
    values = np.repeat(np.linspace(1, limit, 20_000, endpoint=False, dtype=np.float32), BLOCK)
    np.testing.assert_array_equal(received(name, values), values)
    tiny = np.float32(2.0**-118) * values
    np.testing.assert_array_equal(received(name, tiny), tiny)


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("int8", [127, 0.5, 1.5, 2.5, -0.5, -1.5], [127, 0, 2, 2, 0, -2]),
        ("int4", [7, 0.5, 1.5, 2.5, -0.5, -6.5], [7, 1, 2, 3, -1, -7]),
        ("e3m0", [64, 0.5, 1.5, 3, 12, -0.5, -48], [64, 1, 2, 4, 16, -1, -64]),
        ("e3m0", [64, 0.499, 0.7, 1.49, 2.99, 47.9], [64, 0, 1, 1, 2, 32]),
    ],
)
def test_ties(name: str, values: list[float], wanted: list[float]) -> None:
    np.testing.assert_array_equal(received(name, np.array(values, np.float32)), np.array(wanted, np.float32))


def test_layout() -> None:
    """The steps of all blocks, then the levels; two nibbles a byte, the first one low, bit 3 the sign."""
    values = np.array([7, -7, 1], dtype=np.float32)
    one = np.float32(1).tobytes()
    assert encoded("int4", values) == one + b"\xf7\x01"
    assert encoded("e3m0", np.array([64, -1, 0], dtype=np.float32)) == one + b"\x97\x00"
    assert encoded("int8", np.array([127, -1], dtype=np.float32)) == one + b"\x7f\xff"
    assert encoded("int8", np.array([127.0] * 128 + [254.0], dtype=np.float32)) == one + bytes(
        np.float32(2).tobytes() + b"\x7f" * 129
    )


@pytest.mark.parametrize("name", sorted(WIRES))
def test_sizes_fit_the_scratch(name: str) -> None:
    wire = WIRES[name]
    assert wire.size(0) == 0
    assert all(wire.size(elements) <= scratch_bytes(elements) for elements in range(2000))
    assert 8 * wire.size(1 << 18) / (1 << 18) == {"f32": 32, "bf16": 16, "f16": 16, "int8": 8.25}.get(name, 4.25)
    assert encoded(name, np.empty(0, np.float32)) == b""
    assert decoded(name, b"", 0).size == 0


@quantised
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("offset", [0, 127, 128, 32_640, 70_000])
def test_what_is_not_finite_is_refused_with_its_place(name: str, value: float, offset: int) -> None:
    values = np.ones(70_001, dtype=np.float32)
    values[offset] = value
    values[70_000:] = value
    with pytest.raises(NonFinite, match=f"number {offset} is {value}: {name} carries") as caught:
        encoded(name, values)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.offset, str(copy.value), str(copy)) == (offset, str(value), str(caught.value))


@pytest.mark.parametrize("name", sorted(TORCH))
def test_other_wires_carry_what_is_not_finite(name: str) -> None:
    values = np.array([np.nan, np.inf, -np.inf, 1], dtype=np.float32)
    np.testing.assert_array_equal(received(name, values), values)


@quantised
def test_blocks_join_without_seams(name: str) -> None:
    values = np.random.default_rng(0).standard_normal(100_001).astype(np.float32)
    apart = [received(name, values[start : start + BLOCK]) for start in range(0, values.size, BLOCK)]
    np.testing.assert_array_equal(received(name, values), np.concatenate(apart))
    scratch = memoryview(bytearray(scratch_bytes(values.size)))
    round_trip(WIRES[name], values, scratch, values)
    np.testing.assert_array_equal(values, np.concatenate(apart))


@quantised
def test_threads_do_not_disturb_each_other(name: str) -> None:
    generator = np.random.default_rng(0)
    arrays_ = [generator.standard_normal(150_000).astype(np.float32) for _ in range(4)]
    wanted = [received(name, values) for values in arrays_]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, want in zip(pool.map(received, [name] * 4, arrays_), wanted, strict=True):
                np.testing.assert_array_equal(got, want)


@quantised
def test_the_mode_of_the_thread_does_not_matter(name: str) -> None:
    """Neither inference mode at the first call, nor denormals flushed to zero."""
    values = np.ldexp(np.random.default_rng(0).standard_normal(3000), np.repeat(np.arange(-150, 150), 10))
    values = np.clip(values, -LARGEST, LARGEST).astype(np.float32)

    def in_modes() -> list[Floats]:
        with torch.inference_mode():
            first = received(name, values)
        torch.set_flush_denormal(True)  # of this thread alone
        return [first, received(name, values)]

    with ThreadPoolExecutor(1) as pool:
        for got in pool.submit(in_modes).result():
            np.testing.assert_array_equal(got, received(name, values))


def test_no_wire_starts_a_thread() -> None:
    code = (
        "import os, numpy as np, torch; from collectives.wires import WIRES, round_trip; torch.set_num_threads(4);"
        "x = np.ones(300_000, np.float32); before = len(os.listdir('/proc/self/task'));"
        "[round_trip(wire, x, memoryview(bytearray(x.nbytes)), x) for wire in WIRES.values()];"
        "assert len(os.listdir('/proc/self/task')) == before;"
        "torch.rand(300_000).round(); assert len(os.listdir('/proc/self/task')) > before"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_pieces_join_without_seams() -> None:
    values = np.random.default_rng(0).standard_normal(100_001).astype(np.float32)
    out = np.empty_like(values)
    round_trip(WIRES["bf16"], values, memoryview(bytearray(values.nbytes)), out)
    np.testing.assert_array_equal(out, torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy())


def test_importing_the_package_and_its_records_is_cheap() -> None:
    code = (
        "import sys, collectives, collectives.records; collectives.Start, collectives.Done;"
        "sys.exit(bool({'torch', 'numpy', 'xxhash', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_public_name_resolves() -> None:
    import collectives

    assert all(getattr(collectives, name) is not None for name in collectives.__all__)
    assert set(collectives.__all__) <= set(dir(collectives))
    with pytest.raises(AttributeError, match="nonsense"):
        collectives.nonsense  # noqa: B018


@pytest.mark.parametrize("name", ["f16", "bf16"])
@pytest.mark.parametrize("count", [1, 7, 16, 31, 33])
def test_every_nan_is_encoded_alike_and_encodes_again_to_the_same_bytes(name: str, count: int) -> None:
    """A result is encoded once for its checksum and again for each destination."""
    wire = WIRES[name]
    bits = np.array([0x7FFFFFFF, 0x7FC00000, 0xFFC00001, 0x7F800001], dtype=np.uint32)
    values = np.resize(bits, count).view(np.float32)
    once = bytes(wire.encode(values, memoryview(bytearray(4 * count))))
    out = np.empty(count, dtype=np.float32)
    wire.decode(memoryview(bytearray(once)), out)
    assert np.isnan(out).all() and len(set(np.frombuffer(once, dtype=np.uint16))) == 1
    assert bytes(wire.encode(out, memoryview(bytearray(4 * count)))) == once


@pytest.mark.parametrize("name", sorted(WIRES))
@pytest.mark.parametrize("elements", [0, 1, 129, 32_640, 100_001])
def test_an_approximation_is_what_a_receiver_holds(name: str, elements: int) -> None:
    values = torch.randn(elements, generator=torch.Generator().manual_seed(0))
    kept, got = values.clone(), approximated(name, values.requires_grad_())
    np.testing.assert_array_equal(got.detach().numpy(), received(name, kept.numpy()))
    assert torch.equal(values, kept) and (got is values) == WIRES[name].lossless
    assert got is values or not got.requires_grad


@quantised
def test_an_approximation_names_the_first_number_that_has_none(name: str) -> None:
    values = torch.ones(70_001)
    values[40_000:] = float("nan")
    with pytest.raises(NonFinite, match="number 40000 is nan"):
        approximated(name, values)

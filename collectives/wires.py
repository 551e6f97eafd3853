"""How numbers travel. A wire turns float32 into bytes and back.

| wire | bits a number  | what comes back, for a number x in a block whose largest magnitude is A                      |
|------|----------------|----------------------------------------------------------------------------------------------|
| f32  | 32             | x, bit for bit                                                                               |
| f16  | 16             | within 2^-11 |x| from 2^-14 up to 65504 (above: infinity), within 2^-25 below; ties to even  |
| bf16 | 16             | within 2^-8 |x| over the range of float32; ties to even                                      |
| int8 | 8.25           | within A/254; 255 evenly spaced levels; ties to even                                         |
| int4 | 4.25           | within A/14; 15 evenly spaced levels; ties away from zero                                    |
| e3m0 | 4.25           | within |x|/3 from A/64 up, within A/128 below; zero and +-A/2^0..2^6; ties away from zero    |

f32, bf16 and f16 carry NaN and infinities as values. int8, int4 and e3m0 refuse them (`NonFinite`): one would spoil its
block. Those three cut the numbers into blocks of 128, the last of which may be short, and give each block one float32
step: every number becomes `level * step`, rounded once, at the level nearest to it. All three are defined by `BLOCK`
and their levels; e3m0 (1 sign bit, 3 exponent bits, no mantissa) is the format of Streaming DiLoCo (arXiv:2501.18512),
which leaves the scale open. On the wire: the steps, then the levels; of two 4-bit numbers in one byte the first has the
low bits; bit 3 is the sign. What holds for these three:

- The bounds above are met to one part in 2^13 (the product x/step is itself rounded to float32).
- The largest magnitude of a block comes back within 2^-22 of itself; so does every number of a block of equal
  magnitudes. With e3m0 it comes back exactly (the largest float32 as its neighbour), and also with int8 and int4 while
  its significand is below 127/64 and 7/4.
- Zeros come back as +0.0, and so does -0.0. Apart from that, -x comes back as minus what x comes back as.
- Multiplying by a power of two commutes with them while A stays below the largest float32 and from 2^-118 (3e-36) up.
  A block with A below that comes back as zeros. So no step, no level and no quotient that matters is denormal, and a
  thread that flushes denormals to zero computes the same; a denormal x always comes back as zero.
- No finite block overflows, up to the largest float32.

`encode(decode(encode(x))) == encode(x)` holds byte for byte for every wire here, so that a reduced chunk that was
quantised once can be encoded again for each destination without changing it. The proof for the blocks is at `_steps`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from collectives.records import BLOCK

Floats = NDArray[np.float32]

# Larger pieces make torch start its own thread pool in every one of our threads; a reduction does so from 32768 on.
_ROWS = 255
_PIECE = _ROWS * BLOCK
# Blocks below are zeros: 2^-118 / 127 > 2^-125, so that half a step is no denormal and no denormal reaches it.
_SMALLEST = np.float32(2.0**-118)
# The largest float32 itself would be infinity after a division by 127 and a multiplication.
_LARGEST = np.nextafter(np.finfo(np.float32).max, np.float32(0))


class NonFinite(ValueError):
    """A number that a quantised wire cannot carry. offset: its place in what was encoded; value: nan, inf or -inf."""

    def __init__(self, wire: str, offset: int, value: float) -> None:
        super().__init__(wire, offset, value)
        self.wire, self.offset, self.value = wire, offset, value

    def __str__(self) -> str:
        return f"number {self.offset} is {self.value}: {self.wire} carries finite numbers only, f32 and bf16 carry any"


class Wire(Protocol):
    """One format. Any thread may use it at any time.

    lossless: decoding gives back the very bits that were encoded. block: ranges that begin at multiples of it are
    encoded as if each were alone.
    """

    name: str
    lossless: bool
    block: int

    def size(self, elements: int) -> int:
        """Bytes that so many float32 numbers take on the wire."""

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        """The bytes of `numbers` (1-d, contiguous); they lie in `scratch`, or in `numbers` if nothing changes.

        scratch: writable, aligned to 4 bytes, not `numbers`, and at least `scratch_bytes(numbers.size)` long.
        NonFinite if a quantised wire meets a NaN or an infinity; scratch may have been written to by then.
        """

    def decode(self, data: memoryview, out: Floats) -> None:
        """Write the numbers that `data` (writable, aligned to 4 bytes) stands for into `out` (1-d, contiguous)."""


def scratch_bytes(elements: int) -> int:
    """Enough memory for so many encoded numbers, or fewer, on any wire: 4 bytes each, rounded up to 64."""
    return -(-4 * elements // 64) * 64


class Float32:
    """Four bytes a number: the bits as they are."""

    name = "f32"
    lossless = True
    block = 1

    def size(self, elements: int) -> int:
        return 4 * elements

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        return numbers.view(np.uint8).data

    def decode(self, data: memoryview, out: Floats) -> None:
        np.copyto(out, np.frombuffer(data, dtype=np.float32))


class HalfWidth:
    """Two bytes a number: bfloat16 (8 bits of precision, range of float32) or float16 (11 bits; above 65504: inf)."""

    lossless = False
    block = 1

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype
        self._infinity, self._nan = (0x7F80, 0x7FC0) if dtype is torch.bfloat16 else (0x7C00, 0x7E00)

    def size(self, elements: int) -> int:
        return 2 * elements

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        data = scratch[: 2 * numbers.size]
        if numbers.size:
            _convert(torch.from_numpy(numbers), torch.frombuffer(data, dtype=self._dtype))
            self._unify(np.frombuffer(data, dtype=np.uint16))
        return data

    def _unify(self, bits: NDArray[np.uint16]) -> None:
        """One pattern for every NaN: the conversions of torch do not agree on one, not even within a tensor."""
        for start in range(0, bits.size, _PIECE):
            piece = bits[start : start + _PIECE]
            magnitudes = piece & np.uint16(0x7FFF)
            if magnitudes.max() > self._infinity:
                piece[magnitudes > self._infinity] = self._nan

    def decode(self, data: memoryview, out: Floats) -> None:
        if out.size:
            _convert(torch.frombuffer(data, dtype=self._dtype), torch.from_numpy(out))


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, source.numel(), _PIECE):
        target[start : start + _PIECE].copy_(source[start : start + _PIECE])


class _Workspace(threading.local):
    """Every thread's own memory for one piece; it stays in the second-level cache."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # what the first caller's mode is must not stay with the memory
            floats = torch.empty(_PIECE, dtype=torch.float32, device="cpu")
            self.index = torch.empty(_PIECE // 2, dtype=torch.int32, device="cpu")
            self.rows, self.pairs = floats.view(-1, BLOCK), floats.view(torch.int64)
        self.floats: Floats = floats.numpy()
        self.indices: NDArray[np.int32] = self.index.numpy()
        self.levels: NDArray[np.int8] = np.empty(_PIECE, dtype=np.int8)

    def like(self, piece: torch.Tensor) -> torch.Tensor:
        """The start of `floats`, in the shape of the piece."""
        return self.rows if piece.shape == self.rows.shape else self.rows[: piece.shape[0], : piece.shape[1]]


_workspace = _Workspace()


class _Blocks:
    """What the quantised wires share: the steps, and the walk over pieces."""

    lossless = False
    block = BLOCK

    def __init__(self, name: str, peak: int, per_step: int) -> None:
        """peak: the largest level. per_step: `_pack` wants numbers in units of step / per_step."""
        self.name = name
        self._peak, self._per_step = np.float32(peak), np.float32(per_step)

    def size(self, elements: int) -> int:
        return 4 * -(-elements // BLOCK) + self._packed(elements)

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        data = scratch[: self.size(numbers.size)]
        steps, levels = _parts(data, numbers.size)
        pieces = _cut(numbers)
        _largest(pieces, steps)
        factors = _columns(self._steps(numbers, steps), pieces)
        for piece, factor, target in zip(pieces, factors, self._split(levels, pieces), strict=True):
            torch.mul(piece, factor, out=_workspace.like(piece))
            self._pack(piece.numel(), target)
        return data

    def decode(self, data: memoryview, out: Floats) -> None:
        steps, levels = _parts(data, out.size)
        pieces = _cut(out)
        factors = _columns(steps, pieces)
        for piece, factor, source in zip(pieces, factors, self._split(levels, pieces), strict=True):
            self._unpack(source, piece.numel())
            torch.mul(_workspace.like(piece), factor, out=piece)

    def _split(self, levels: NDArray[np.uint8], pieces: list[torch.Tensor]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of every piece."""
        start = 0
        for piece in pieces:
            stop = start + self._packed(piece.numel())
            yield levels[start:stop]
            start = stop

    def _steps(self, numbers: Floats, largest: Floats) -> Floats:
        """Turn largest magnitudes into steps; give back what to multiply the numbers with. NonFinite if one is not.

        step = fl(A / peak), where A is the block's largest magnitude. Why encoding what was decoded changes nothing:
        fl(fl(peak * step) / peak) == step for every significand of A and the peaks 127, 7 and 64 (all were tried, see
        the tests), so that the decoded magnitude gives the same step, and with it the same factor. And the levels
        return, since a level times the step times the factor is off by less than 2^-21 of itself, far from where a
        level ends. A power of two comes back exactly, so that a block stays on its side of _SMALLEST.
        """
        if not np.isfinite(largest).all():
            offset = int(np.flatnonzero(~np.isfinite(numbers))[0])
            raise NonFinite(self.name, offset, float(numbers[offset]))
        np.minimum(largest, _LARGEST, out=largest)
        largest[largest < _SMALLEST] = 0
        largest /= self._peak
        return np.divide(self._per_step, largest, out=np.zeros_like(largest), where=largest > 0)

    def _packed(self, elements: int) -> int:
        """Bytes of so many levels."""
        raise NotImplementedError

    def _pack(self, elements: int, target: NDArray[np.uint8]) -> None:
        """Round the start of the workspace's floats to levels and write their bytes."""
        raise NotImplementedError

    def _unpack(self, source: NDArray[np.uint8], elements: int) -> None:
        """The levels of one piece as numbers, into the start of the workspace's floats."""
        raise NotImplementedError


def _parts(data: memoryview, elements: int) -> tuple[Floats, NDArray[np.uint8]]:
    """The steps and the bytes of the levels in an encoding."""
    steps = -(-elements // BLOCK)
    return np.frombuffer(data, np.float32, steps), np.frombuffer(data, np.uint8, offset=4 * steps)


def _cut(numbers: Floats) -> list[torch.Tensor]:
    """One block a row, at most _PIECE numbers a piece; a short last block is a piece of its own."""
    rows, rest = divmod(numbers.size, BLOCK)
    whole = numbers[: rows * BLOCK].reshape(-1, BLOCK)
    pieces = [torch.from_numpy(whole[first : first + _ROWS]) for first in range(0, rows, _ROWS)]
    if rest:
        pieces.append(torch.from_numpy(numbers[-rest:].reshape(1, rest)))
    return pieces


def _columns(values: Floats, pieces: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """One value a block, as a column for every piece."""
    columns, first = values.reshape(-1, 1), 0
    for piece in pieces:
        yield torch.from_numpy(columns[first : first + len(piece)])
        first += len(piece)


def _largest(pieces: list[torch.Tensor], out: Floats) -> None:
    """Every block's largest magnitude; NaN and infinity win."""
    for piece, target in zip(pieces, _columns(out, pieces), strict=True):
        magnitudes = _workspace.like(piece)
        torch.abs(piece, out=magnitudes)
        torch.amax(magnitudes, 1, keepdim=True, out=target)


class Int8(_Blocks):
    """One byte a number: the levels -127 to 127."""

    def __init__(self) -> None:
        super().__init__("int8", peak=127, per_step=1)

    def _packed(self, elements: int) -> int:
        return elements

    def _pack(self, elements: int, target: NDArray[np.uint8]) -> None:
        floats = _workspace.floats[:elements]
        np.rint(floats, out=floats)  # torch's own starts its thread pool from 2048 numbers on
        np.copyto(target.view(np.int8), floats, casting="unsafe")

    def _unpack(self, source: NDArray[np.uint8], elements: int) -> None:
        np.copyto(_workspace.floats[:elements], source.view(np.int8))


class Nibbles(_Blocks):
    """Half a byte a number: eight magnitudes and a sign, looked up two at a time.

    Numbers come to `_pack` in half steps, where the midpoint of two neighbouring levels is a whole number. So they may
    be cut to whole numbers first, which fit a byte; two bytes, read as one number, are the index of the encoded byte.
    """

    def __init__(self, name: str, levels: Sequence[int]) -> None:
        super().__init__(name, peak=levels[-1], per_step=2)
        self._clamp = 2 * levels[-1] > 127
        nibbles = _nibbles(levels)
        low, high = np.meshgrid(nibbles, nibbles)  # the second of two neighbours is the high byte on this machine
        self._bytes = torch.from_numpy((low | high << 4).reshape(-1))
        signed = np.array([*levels, *(-level for level in levels)], dtype=np.float32)
        pairs = np.stack([np.tile(signed, 16), np.repeat(signed, 16)], axis=1)
        self._pairs = torch.from_numpy(pairs.view(np.int64).reshape(-1))

    def _packed(self, elements: int) -> int:
        return (elements + 1) // 2

    def _pack(self, elements: int, target: NDArray[np.uint8]) -> None:
        work, pairs = _workspace, target.size
        if self._clamp:
            torch.from_numpy(work.floats[:elements]).clamp_(-127, 127)
        np.copyto(work.levels[:elements], work.floats[:elements], casting="unsafe")
        work.levels[elements : 2 * pairs] = 0
        np.copyto(work.indices[:pairs], work.levels[: 2 * pairs].view(np.uint16))
        torch.index_select(self._bytes, 0, work.index[:pairs], out=torch.from_numpy(target))

    def _unpack(self, source: NDArray[np.uint8], elements: int) -> None:
        work, pairs = _workspace, source.size
        np.copyto(work.indices[:pairs], source)
        torch.index_select(self._pairs, 0, work.index[:pairs], out=work.pairs[:pairs])


def _nibbles(levels: Sequence[int]) -> NDArray[np.uint8]:
    """The nibble nearest to n half steps, at index n for n = 0..127 and at 256 + n for n = -128..-1."""
    midpoints = np.add(levels[1:], levels[:-1])
    halves = np.arange(256)
    magnitudes = np.searchsorted(midpoints, np.minimum(halves, 256 - halves), side="right")
    return np.where(halves > 127, magnitudes | 8, magnitudes).astype(np.uint8)


WIRES: dict[str, Wire] = {
    "f32": Float32(),
    "bf16": HalfWidth("bf16", torch.bfloat16),
    "f16": HalfWidth("f16", torch.float16),
    "int8": Int8(),
    "int4": Nibbles("int4", range(8)),
    "e3m0": Nibbles("e3m0", (0, 1, 2, 4, 8, 16, 32, 64)),
}


def round_trip(wire: Wire, numbers: Floats, scratch: memoryview, out: Floats) -> None:
    """What a receiver of `numbers` would hold, written into `out`; `out` may be `numbers`."""
    wire.decode(wire.encode(numbers, scratch), out)


def approximated(name: str, numbers: torch.Tensor) -> torch.Tensor:
    """What a receiver of `numbers` (flat float32, on the CPU) would hold: the same if they travel whole or in chunks.

    The tensor is a new one; a wire without loss gives `numbers` itself. NonFinite if the wire cannot carry them.
    """
    wire = WIRES[name]
    if wire.lossless:
        return numbers
    source, out = numbers.detach().contiguous().numpy(), torch.empty(numbers.numel())
    target = out.numpy()
    scratch = memoryview(bytearray(scratch_bytes(min(_PIECE, source.size))))
    for start in range(0, source.size, _PIECE):
        piece = slice(start, start + _PIECE)
        try:
            round_trip(wire, source[piece], scratch, target[piece])
        except NonFinite as error:
            raise NonFinite(name, start + error.offset, error.value) from None
    return out

"""What a lossy wire does to a vector, and the rotation that can go before it.

A quantised wire has one step for 128 numbers, and the largest of them sets it: one outlier, and an int4 rounds most of
its neighbours to zero. A randomised Hadamard transform (HALO, arXiv 2501.02625) makes of every block its sums with
random signs, scaled to keep the length of the vector: an outlier is spread over its whole block, and what comes out is
close to normal. So int4 errs by about an eighth of the vector's length, or less, whatever went in. Without rotation it
does so for normal numbers, by 24 % for Student's t with 2.5 degrees of freedom, but by 7 % for evenly distributed ones.
With e3m0, whose levels are powers of two, the error is in proportion to each number, and rotation is no gain: 19 % with
it, 15 % to 19 % without, and 5 % where a few numbers are most of the length.

The transform is linear, so the mean of rotated vectors is the rotated mean, and one inverse at the end is enough.

Under the bit rule (docs/design.md, "Rules of a round", 9) the transform is a fixed list of single-rounded float32
additions and subtractions, each its own kernel, and one multiplication: never a matrix product, whose order of
summation is the processor's choice. So everyone makes the same bits of the same mean.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from collectives.records import Start, WireRun
from collectives.wires import WIRES, round_trip, scratch_bytes

from ..errors import ConfigurationError

BLOCK = 128  # what the quantised wires give one step, so that an outlier stays within its block
_ROWS = 255  # blocks at a time: the two buffers stay in cache, and torch stays in this thread (32768 numbers are many)
_PIECE = 8192 * BLOCK  # numbers that are encoded at a time: a multiple of the block, so that nothing depends on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """A wire, and whether vectors are rotated before they are handed to it.

    wire: one of `collectives.wires.WIRES`. runs: wires of ranges, end to end, in place of it. rotate: by the transform
    above, in blocks of 128 numbers; a shorter last block travels as it is. It adds up 128 numbers: magnitudes up to
    2^118 cannot overflow, there or back.

    ConfigurationError for a wire that does not exist. f32 may be rotated: it is what a rotated vector travels as when a
    round cannot use its lossy wire.
    """

    wire: str = "f32"
    rotate: bool = False
    runs: tuple[WireRun, ...] = ()

    def __post_init__(self) -> None:
        if self.wire not in WIRES:
            raise ConfigurationError(f"wire {self.wire!r} is not one of {', '.join(WIRES)}")

    @property
    def description(self) -> str:
        return f"{self.wire}+hadamard" if self.rotate else self.wire

    def size(self, elements: int) -> int:
        """Bytes that so many numbers take on the wire."""
        return WIRES[self.wire].size(elements)

    def of(self, start: Start) -> Compression:
        """As this attempt travels: ranges may have wires of their own, and what cannot be lossy goes as f32."""
        return replace(self, wire=start.wire, runs=start.wires)

    def sent(self, x: torch.Tensor) -> torch.Tensor:
        """What is handed to the exchange for x, a flat float32 CPU tensor: x itself, or a new tensor of its length."""
        return _rotated(x) if self.rotate else x

    def received(self, mean: torch.Tensor) -> torch.Tensor:
        """What an exchanged mean stands for: itself, or a new tensor. Linear; of the same bits it makes the same bits.

        The inverse of `sent`, up to rounding (a few parts in 10^7 of the block's largest magnitude).
        """
        return _rotated_back(mean, torch.empty_like(mean)) if self.rotate else mean

    def approximated(self, x: torch.Tensor) -> torch.Tensor:
        """What the others get to see of x; x itself if that is the same. `collectives.wires.NonFinite` as the wire.

        The wire cuts blocks where the exchange cuts chunks: this is exact if the chunks begin at multiples of 128.

        Every wire here is a contraction of finite numbers: ||approximated(x) - x||^2 <= (1 - d) ||x||^2, rotated or
        not, with d = .6 for int4 (a block with one number A and 127 of nearly A/14), .88 for e3m0 and more for the
        others, as long as no block's largest magnitude is below 2^-118 nor, for f16, any number out of its range.
        """
        if not self.rotate:
            exact = WIRES[self.wire].lossless and not self.runs
            return x if exact else self._through(x, torch.empty_like(x))
        mine = _rotated(x)  # in place from here on: fresh memory costs more than the arithmetic
        return _rotated_back(self._through(mine, mine), mine)

    def _through(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        at = 0
        for run in self.runs or (WireRun(elements=x.numel(), wire=self.wire),):
            stop = at + run.elements
            _round_trip(run.wire, x[at:stop], out[at:stop])
            at = stop
        return out


def _round_trip(wire: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """What a receiver of x would hold, written into `out`, which may be x."""
    numbers, results = x.numpy(), out.numpy()
    scratch = memoryview(bytearray(scratch_bytes(min(numbers.size, _PIECE))))
    for at in range(0, numbers.size, _PIECE):
        round_trip(WIRES[wire], numbers[at : at + _PIECE], scratch, results[at : at + _PIECE])
    return out


# --- the rotation -----------------------------------------------------------------------------------------------------


def _signs() -> torch.Tensor:
    """128 random signs, from a hash and not from a generator: the same under every version of every library."""
    digest = hashlib.sha256(b"elastic: signs of the rotation").digest()[: BLOCK // 8]
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


_SIGNS = _signs()
_ONES = torch.ones(BLOCK)
_SCALE = torch.full((BLOCK,), 1 / math.sqrt(BLOCK))
_SIGNED_SCALE = _SIGNS * _SCALE


def _rotated(x: torch.Tensor) -> torch.Tensor:
    return _transformed(x, _SIGNS, _SCALE, torch.empty_like(x))


def _rotated_back(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return _transformed(x, _ONES, _SIGNED_SCALE, out)


def _transformed(x: torch.Tensor, before: torch.Tensor, after: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Writes after * H(before * x) of every block into `out`, which may be x. H: the matrix of +1 and -1.

    before: signs, so that multiplying with them is exact.
    """
    whole = x.numel() // BLOCK * BLOCK
    out[whole:] = x[whole:]
    rows, results = x[:whole].view(-1, BLOCK), out[:whole].view(-1, BLOCK)
    network = _Network(_ROWS)
    for at in range(0, len(rows), _ROWS):
        piece = rows[at : at + _ROWS]
        if len(piece) != network.blocks:
            network = _Network(len(piece))
        torch.mul(piece.t(), before.unsqueeze(1), out=network.first)
        network.run()
        torch.mul(network.last.t(), after, out=results[at : at + _ROWS])
    return out


class _Network:
    """The butterflies of so many blocks at once, in two buffers that are read and written in turn.

    A block is a column: what is added lies in whole rows, so that every kernel runs over memory in order.
    """

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        source, target = torch.empty(BLOCK, blocks), torch.empty(BLOCK, blocks)
        self.first = source
        self._stages: list[tuple[torch.Tensor, ...]] = []
        for level in range(BLOCK.bit_length() - 1):
            (a, b), (total, difference) = _halves(source, 1 << level), _halves(target, 1 << level)
            self._stages.append((a, b, total, difference))
            source, target = target, source
        self.last = source

    def run(self) -> None:
        """From `first` into `last`; the former is overwritten."""
        for a, b, total, difference in self._stages:
            torch.add(a, b, out=total)
            torch.sub(a, b, out=difference)


def _halves(columns: torch.Tensor, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that are combined with the one so far below them, and those."""
    pairs = columns.view(-1, 2, distance, columns.shape[1])
    return pairs[:, 0], pairs[:, 1]

"""How numbers travel. A wire turns float32 into bytes and back; every wire rounds to nearest, ties to even.

`encode(decode(encode(x))) == encode(x)` holds bit for bit for every wire here, so that a reduced chunk that was
quantised once can be encoded again for each destination without changing it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Larger pieces make torch start its own thread pool in every one of our threads.
_PIECE = 32768


class Wire(Protocol):
    """One format. lossless: decoding gives back the very bits that were encoded."""

    name: str
    lossless: bool

    def size(self, elements: int) -> int:
        """Bytes that so many float32 numbers take on the wire."""

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        """The bytes of `numbers` (1-d, contiguous); they lie in `scratch`, or in `numbers` if nothing changes."""

    def decode(self, data: memoryview, out: Floats) -> None:
        """Write the numbers that `data` stands for into `out` (1-d, contiguous)."""


class Float32:
    """Four bytes a number: the bits as they are."""

    name = "f32"
    lossless = True

    def size(self, elements: int) -> int:
        return 4 * elements

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        return numbers.data.cast("B")

    def decode(self, data: memoryview, out: Floats) -> None:
        np.copyto(out, np.frombuffer(data, dtype=np.float32))


class HalfWidth:
    """Two bytes a number: bfloat16 (8 bits of precision, range of float32) or float16 (11 bits; above 65504: inf)."""

    lossless = False

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name = name
        self._dtype = dtype

    def size(self, elements: int) -> int:
        return 2 * elements

    def encode(self, numbers: Floats, scratch: memoryview) -> memoryview:
        data = scratch[: 2 * numbers.size]
        _convert(_readable(numbers), torch.frombuffer(data, dtype=self._dtype)) if numbers.size else None
        return data

    def decode(self, data: memoryview, out: Floats) -> None:
        if out.size:
            _convert(torch.frombuffer(data, dtype=self._dtype), torch.from_numpy(out))


def _readable(numbers: Floats) -> torch.Tensor:
    return torch.frombuffer(numbers.data, dtype=torch.float32)


def _convert(source: torch.Tensor, target: torch.Tensor) -> None:
    for start in range(0, source.numel(), _PIECE):
        target[start : start + _PIECE].copy_(source[start : start + _PIECE])


WIRES: dict[str, Wire] = {
    "f32": Float32(),
    "bf16": HalfWidth("bf16", torch.bfloat16),
    "f16": HalfWidth("f16", torch.float16),
}


def round_trip(wire: Wire, numbers: Floats, scratch: memoryview, out: Floats) -> None:
    """What a receiver of `numbers` would hold, written into `out`; `out` may be `numbers`."""
    wire.decode(wire.encode(numbers, scratch), out)


def as_floats(tensor: torch.Tensor) -> Floats:
    """The tensor's memory as a numpy array; ValueError unless it is flat, contiguous, float32 and on the CPU."""
    flat: Any = tensor.detach()
    if flat.device.type != "cpu" or flat.dtype != torch.float32 or flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"tensors must be flat, contiguous float32 on the CPU, got {flat.dtype} of shape {tuple(flat.shape)} on "
            f"{flat.device}: pass tensor.detach().to('cpu', torch.float32).contiguous().view(-1)"
        )
    array: Floats = flat.numpy()
    return array

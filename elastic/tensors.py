"""From the caller's tensors to the one flat CPU tensor that travels, and back into their likeness.

What is reduced travels as numbers: float32, float64 and integers as they are, bfloat16 and float16 as float32 on a wire
of their own width, so that a sum is rounded once. What is only moved travels as the bits that it is.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from collectives.wires import WIRES

from .errors import ConfigurationError
from .messages import OperationSpec

QUANTISED = ("int8", "int4", "e3m0")
_REDUCED = {
    **{dtype: dtype for dtype in (torch.float32, torch.float64, torch.int8, torch.uint8, torch.int16, torch.int32)},
    torch.int64: torch.int64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
_MOVED = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OWN_WIRES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
_MANY = 8  # tensors whose shapes are named one by one when they differ
_PIECE = 1 << 18
_WORTH_KEEPING = 1 << 20  # bytes
_LINE = 64  # bytes of a cache line

Tensors = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Staged:
    """Tensors of one dtype on one device, as one flat CPU tensor.

    flat: of a dtype that the data plane carries; copied: whether it is memory of its own, and not the caller's.
    dtype, device: of the tensors. shapes: of each. single: whether one was given, not a list.
    bits: whether `flat` holds their bits rather than their numbers.
    """

    flat: torch.Tensor
    copied: bool
    dtype: torch.dtype
    device: torch.device
    shapes: tuple[torch.Size, ...]
    single: bool
    bits: bool

    @property
    def shape(self) -> str:
        """All shapes in a few words, for comparison with other peers'."""
        words = [str(tuple(shape)) for shape in self.shapes]
        if len(words) <= _MANY:
            return " ".join(words)
        return f"{len(words)} tensors, {xxhash.xxh3_64_hexdigest(' '.join(words).encode())}"

    def snapshot(self) -> torch.Tensor:
        """The flat tensor in memory that the caller cannot change."""
        return self.flat if self.copied else self.flat.clone()

    def buffer(self, elements: int, reserve: Reserve) -> torch.Tensor:
        """Room for so many results."""
        if self.device.type == "cuda":
            return torch.empty(elements, dtype=self.flat.dtype, pin_memory=True)
        return reserve.take(elements, self.flat.dtype)

    def like(self, flat: torch.Tensor) -> torch.Tensor:
        """Results, flat, in the dtype and on the device of what was staged; the same memory where nothing changes."""
        if self.bits:
            flat = flat.view(self.dtype)
        if self.device.type == "cpu":
            return flat.to(self.dtype)
        with _beside(self.device):
            moved = flat.to(self.device, non_blocking=True).to(self.dtype)
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def pieces(self, flat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of a flat result, in the shapes of what was staged."""
        parts = torch.split(flat, [shape.numel() for shape in self.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))


class Reserve:
    """Memory of results that nobody holds any more, kept for the next ones.

    The system takes large memory back at once and hands it out page by page: on a fast network that costs as much as
    the exchange. So the memory of up to two results stays with the peer, until results of another size need it.
    """

    def __init__(self) -> None:
        self._free: deque[Any] = deque(maxlen=2)

    def take(self, elements: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of any content. Its memory comes back when the last tensor that shares it is gone."""
        nbytes = elements * dtype.itemsize
        if nbytes < _WORTH_KEEPING:
            return torch.empty(elements, dtype=dtype)
        base = self._fitting(nbytes + _LINE)
        skip = -base.ctypes.data % _LINE
        lent = base[skip : skip + nbytes]
        weakref.finalize(lent, self._free.append, base).atexit = False
        return torch.from_numpy(lent).view(dtype)

    def _fitting(self, nbytes: int) -> Any:
        for _ in range(len(self._free)):
            try:
                base = self._free.popleft()
            except IndexError:
                break
            if base.nbytes == nbytes:
                return base
        return np.empty(nbytes, dtype=np.uint8)

    def clear(self) -> None:
        """Keep nothing, from now on."""
        self._free = deque(maxlen=0)


def stage(tensors: Tensors, *, reduced: bool) -> Staged:
    """One contiguous CPU tensor is taken as it is, without a copy; anything else is copied once.

    reduced: whether its numbers will be added or compared, or only moved. ConfigurationError for an empty list, for
    several dtypes or devices in one list, and for what cannot travel.
    """
    single = isinstance(tensors, torch.Tensor)
    given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
    dtype, device = _common(given)
    carried = _REDUCED.get(dtype) if reduced else _MOVED.get(dtype.itemsize)
    if carried is None:
        known = ", ".join(str(each).removeprefix("torch.") for each in _REDUCED)
        raise ConfigurationError(f"tensors of {dtype} cannot be reduced; convert them to one of {known}")
    sources = [each.detach() if reduced else each.detach().view(carried) for each in given]
    shapes = tuple(each.shape for each in given)
    first = sources[0]
    if len(given) == 1 and device.type == "cpu" and first.dtype == carried and first.is_contiguous():
        return Staged(first.view(-1), False, dtype, device, shapes, single, not reduced)
    flat = torch.empty(sum(map(torch.Size.numel, shapes)), dtype=carried, pin_memory=device.type == "cuda")
    with _beside(device, wait=True):
        for room, source in zip(torch.split(flat, [shape.numel() for shape in shapes]), sources, strict=True):
            room.view(source.shape).copy_(source, non_blocking=device.type == "cuda")
    return Staged(flat, True, dtype, device, shapes, single, not reduced)


def _common(given: list[torch.Tensor]) -> tuple[torch.dtype, torch.device]:
    if not given or not all(isinstance(each, torch.Tensor) for each in given):
        raise ConfigurationError("give a tensor, or a list of at least one tensor")
    for what in ("dtype", "device"):
        found = sorted({str(getattr(each, what)) for each in given})
        if len(found) > 1:
            raise ConfigurationError(f"a list of tensors must have one {what}, this one has {', '.join(found)}")
    first = given[0]
    plain = all(each.layout is torch.strided and not each.is_quantized for each in given)
    if first.device.type not in ("cpu", "cuda") or not plain or first.dtype.is_complex:
        raise ConfigurationError(
            f"only dense, real tensors on a CPU or CUDA device travel, not {first.dtype} ({first.layout}) on "
            f"{first.device}: convert it, for example with .to_dense(), torch.view_as_real or .cpu()"
        )
    return first.dtype, first.device


@contextmanager
def _beside(device: torch.device, *, wait: bool = False) -> Iterator[None]:
    """On a CUDA device: a side stream that begins after the current one, which (wait: the host, too) waits for it."""
    if device.type == "cpu":
        yield
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(current)
    with torch.cuda.stream(side):
        yield
    current.wait_stream(side)
    if wait:
        side.synchronize()


def settle(device: torch.device) -> None:
    """Returns when results are on the device: for a thread whose CUDA stream nobody else waits for."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def wires_of(staged: Staged, wire: str | None, gather_wire: str | None) -> tuple[str, str]:
    """How such tensors travel, and how their results travel back ("": the same). ConfigurationError if they cannot."""
    own = _OWN_WIRES.get(staged.dtype, "raw")
    known = ("raw",) if own == "raw" else tuple(name for name in WIRES if name != "raw")
    for each in (wire, gather_wire):
        if each is not None and each not in known:
            raise ConfigurationError(f"wire {each!r} is not one of {', '.join(known)}, the wires of {staged.dtype}")
    wire = wire or own
    return wire, gather_wire or gathered_in(wire)


def spec_of(algorithm: str, op: str, staged: Staged, wire: str, **fields: Any) -> OperationSpec:
    """What this call wants, for comparison with what the others want."""
    fields.setdefault("shape", staged.shape)
    dtype, carried = (str(each).removeprefix("torch.") for each in (staged.dtype, staged.flat.dtype))
    elements = staged.flat.numel()
    return OperationSpec(
        algorithm=algorithm, op=op, dtype=dtype, carried=carried, elements=elements, wire=wire, **fields
    )


def gathered_in(wire: str) -> str:
    """How results travel back unless somebody says otherwise: 4 bits are enough for parts, 8 for their sum."""
    return "int8" if wire in ("int4", "e3m0") else ""


def check_wire(wire: str) -> str:
    """Returns a wire for float32 numbers, or raises ConfigurationError."""
    if wire not in WIRES or wire == "raw":
        raise ConfigurationError(f"wire {wire!r} is not one of {', '.join(name for name in WIRES if name != 'raw')}")
    return wire


def check_finite(flat: torch.Tensor, wire: str, peer: str) -> None:
    """Quantised wires have no NaN and no infinity. ConfigurationError names the first of them, and this peer."""
    if wire not in QUANTISED:
        return
    for at in range(0, flat.numel(), _PIECE):
        piece = flat[at : at + _PIECE]
        finite = torch.isfinite(piece)
        if not finite.all():
            index = int(torch.argmin(finite.to(torch.uint8)))
            raise ConfigurationError(
                f"element {at + index} of peer {peer} is {float(piece[index])}, and wire {wire!r} carries finite "
                "numbers only: leave this contribution out, or use wire='f32'",
                peer=peer,
            )


def check_weight(op: str, weight: Any, dtype: torch.dtype) -> float:
    """The weight of this peer in a mean, as a float. ConfigurationError for one that is none, or has no place."""
    value = float(weight)
    if not (math.isfinite(value) and value > 0):
        raise ConfigurationError(f"weight is {value}: it must be a finite number above 0")
    if op != "mean" and value != 1.0:
        raise ConfigurationError(f"weights belong to op='mean'; a {op} takes none")
    if op == "mean" and not dtype.is_floating_point:
        raise ConfigurationError(
            f"the mean of {dtype} tensors is no whole number: reduce tensor.double(), or use op='sum' and divide"
        )
    return value

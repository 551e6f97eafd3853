"""The outer state, and the flat layout that ties it to a model.

The state is one immutable `Version` of each fragment: parameters and momentum as flat float32 vectors. A version is
never changed: an outer step makes the next one, so that it can be served to joiners, hashed and compared while training
goes on. `State` is all fragments together; its number counts the committed rounds of the loop, one fragment a round.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeGuard

import torch
import xxhash
from torch.nn.parallel import DistributedDataParallel

from collectives.transfer import as_bytes

from ..errors import CheckpointMismatch, ConfigurationError, ParityError
from ..ranks import ALONE, Alone
from .fragments import Named, cut

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # what torch.compile and activation checkpointing put in names
DTYPES = (torch.float32, torch.bfloat16)
HOST = torch.device("cpu")
HEX = 32  # characters of a hash


@dataclass(frozen=True)
class Version:
    """One fragment. number: how many rounds have moved it. parameters: flat float32 tensor, not to be written.

    momentum: what outer optimizer and error feedback keep, any number of vectors of that length, end to end; on the
    same device.
    """

    number: int
    parameters: torch.Tensor
    momentum: torch.Tensor

    @cached_property
    def state_hash(self) -> str:
        """xxh3-128 of the bytes of parameters, then momentum; equal on all peers that hold this version."""
        digest = xxhash.xxh3_128()
        for tensor in (self.host.parameters, self.host.momentum):
            digest.update(as_bytes(tensor))
        return digest.hexdigest()

    @property
    def host(self) -> Version:
        """The same in the host's memory, where it is hashed, served and saved from: itself, if it is there."""
        return self if self.parameters.device.type == "cpu" else self._mirror

    @cached_property
    def _mirror(self) -> Version:
        return self._copied(HOST)

    def on(self, device: torch.device) -> Version:
        """The same on this device: itself, if it is there."""
        if self.parameters.device == device:
            return self
        copy = self._copied(device)
        copy.__dict__.update(_mirror=self.host, state_hash=self.state_hash)  # where cached properties keep them
        return copy

    def _copied(self, device: torch.device) -> Version:
        return Version(self.number, self.parameters.to(device), self.momentum.to(device))

    @classmethod
    def from_bytes(cls, number: int, data: bytearray | memoryview, state_hash: str, elements: int) -> Version:
        """The inverse of serving [parameters, momentum]. state_hash: of these bytes, verified when they came.

        Raises CheckpointMismatch if the length cannot be right.
        """
        if len(data) % 4 or len(data) < 4 * elements:
            raise CheckpointMismatch(f"fetched {len(data)} bytes of state for {elements} numbers and their momentum")
        flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
        version = cls(number, flat[:elements], flat[elements:])
        version.__dict__["state_hash"] = state_hash  # where the cached property keeps it
        return version


def combined(hashes: Iterable[str]) -> str:
    """The hash of a state: of one fragment, its own; of several, xxh3-128 of all of theirs."""
    known = list(hashes)
    return known[0] if len(known) == 1 else xxhash.xxh3_128_hexdigest("".join(known).encode())


@dataclass(frozen=True)
class State:
    """All fragments. A state that is elsewhere (ranks that do not lead) has number and hash, and no parts."""

    parts: tuple[Version, ...]
    elsewhere: tuple[int, str] = (-1, "")

    @cached_property
    def number(self) -> int:
        """How many rounds have been committed."""
        return sum(part.number for part in self.parts) if self.parts else self.elsewhere[0]

    @cached_property
    def state_hash(self) -> str:
        return combined(part.state_hash for part in self.parts) if self.parts else self.elsewhere[1]

    @property
    def parameters(self) -> torch.Tensor:
        """Of all fragments, end to end: of one, its own, not to be written."""
        return self.parts[0].parameters if len(self.parts) == 1 else torch.cat([p.parameters for p in self.parts])

    @property
    def next(self) -> int:
        """Which fragment the next round exchanges: a function of the round alone, never of a peer's own count."""
        return self.number % len(self.parts)

    def with_part(self, index: int, version: Version) -> State:
        return replace(self, parts=(*self.parts[:index], version, *self.parts[index + 1 :]))

    def on(self, device: torch.device) -> State:
        """The same on this device: itself, if it is there."""
        parts = tuple(part.on(device) for part in self.parts)
        return self if all(new is old for new, old in zip(parts, self.parts, strict=True)) else State(parts)


def part_number(number: int, fragment: int, fragments: int) -> int:
    """How many of the first `number` rounds of a loop have moved this fragment."""
    return (number - fragment + fragments - 1) // fragments


@dataclass(frozen=True, slots=True)
class Part:
    """One fragment of a layout. named: what is in it, in order; the numbers from `averaged` on are buffers."""

    named: tuple[Named, ...]
    elements: int
    averaged: int
    tensors: tuple[torch.Tensor, ...]


class Layout:
    """What is exchanged of a model: for each fragment one flat float32 vector. Tied parameters count once.

    model: its trainable parameters, float32 or bfloat16, on any device; with `buffers`, its floating point buffers
    too (running statistics of batch norm, for instance). fragments, how: see `fragments.cut`. device: where flat
    vectors are, which need not be where the model is.
    With several ranks, `read` and `write` are the leader's, and reach the parameters of all ranks, whole or sharded;
    one parameter at a time is put together.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        ranks: Alone = ALONE,
        tag: str = "outer",
        *,
        fragments: int = 1,
        how: str = "strided",
        buffers: bool = False,
        device: torch.device = HOST,
    ) -> None:
        entries = list(_entries(model, buffers))
        _check(entries)
        named = [(name, tuple(tensor.shape)) for name, tensor in entries]
        self._ranks, self._tag, self.device = ranks, tag, device
        self.parts = tuple(self._part(entries, members) for members in cut(named, fragments, how))
        self._tensors = [tensor for part in self.parts for tensor in part.tensors]
        self.sharded = any(map(is_sharded, self._tensors))
        self.exact = all(tensor.dtype is torch.float32 for tensor in self._tensors)
        self.elements = sum(part.elements for part in self.parts)
        kinds = [[(*each, _is_parameter(t)) for each, t in zip(p.named, p.tensors, strict=True)] for p in self.parts]
        plain = self.parts[0].averaged == self.parts[0].elements and len(self.parts) == 1
        identity = repr(list(self.parts[0].named) if plain else kinds)
        self.fingerprint = xxhash.xxh3_64_hexdigest(identity.encode())
        self._teach()

    @staticmethod
    def _part(entries: list[tuple[str, torch.Tensor]], members: Iterable[int]) -> Part:
        chosen = sorted((entries[i] for i in members), key=lambda entry: not _is_parameter(entry[1]))
        sizes = [(tensor.numel(), _is_parameter(tensor)) for _, tensor in chosen]
        return Part(
            named=tuple((name, tuple(tensor.shape)) for name, tensor in chosen),
            elements=sum(size for size, _ in sizes),
            averaged=sum(size for size, learned in sizes if learned),
            tensors=tuple(tensor for _, tensor in chosen),
        )

    @property
    def described(self) -> tuple[str, ...]:
        """One line for each entry, in order: by which two models are compared."""
        return tuple(f"{name} {list(shape)}" for part in self.parts for name, shape in part.named)

    def read(self, part: int = 0) -> torch.Tensor:
        """A new flat float32 copy of what the model holds of a fragment."""
        if any(map(is_sharded, self.parts[part].tensors)):
            self._ranks.order(f"{self._tag}/read/{part}")
        return torch.cat([whole.to(self.device, torch.float32).reshape(-1) for whole in self._wholes(part)])

    def write(self, part: int, flat: torch.Tensor) -> None:
        """Copies a flat vector into the model, in place."""
        if flat.numel() != self.parts[part].elements:
            raise CheckpointMismatch(f"{flat.numel()} numbers for a fragment of {self.parts[part].elements}")
        if self._ranks.size > 1:
            flat = flat.to(HOST)  # what goes from rank to rank goes through the host's memory
        pieces = torch.split(flat, [tensor.numel() for tensor in self.parts[part].tensors])
        self._ranks.order(f"{self._tag}/write/{part}")
        self._spread(part, pieces)

    def held(self, part: int, flat: torch.Tensor) -> torch.Tensor:
        """What `read` would give after `write`: the same numbers, rounded to what the model holds them in."""
        if self.exact:
            return flat
        tensors = self.parts[part].tensors
        pieces = torch.split(flat, [tensor.numel() for tensor in tensors])
        return torch.cat([p.to(t.dtype).to(torch.float32) for p, t in zip(pieces, tensors, strict=True)])

    def check_replicas(self) -> None:
        """Raises ParityError if the ranks have come to different values for what they should all have whole."""
        self._ranks.order(f"{self._tag}/check")
        mine, *others = self._ranks.gather(self._replicas())
        for rank, other in enumerate(others, 1):
            if other != mine:
                raise ParityError(
                    f"rank {rank} of this peer holds other parameters than rank 0: average gradients among the ranks, "
                    "for instance by DistributedDataParallel or fully_shard"
                )

    def keep(self) -> list[torch.Tensor]:
        """A copy of what this rank itself has of the parameters, for `put_back`. Nobody else takes part."""
        return [tensor.detach().clone() for tensor in self._tensors]

    def put_back(self, kept: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self._tensors, kept, strict=True):
                tensor.copy_(value)

    # --- the ranks of a peer ------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """What the other ranks do when the leader reads or writes."""
        self._ranks.teach(f"{self._tag}/check", lambda: self._ranks.gather(self._replicas()))
        for part in range(len(self.parts)):
            self._ranks.teach(f"{self._tag}/read/{part}", partial(self._take_part, part))
            self._ranks.teach(f"{self._tag}/write/{part}", partial(self._be_written, part))

    def _take_part(self, part: int) -> None:
        deque(self._wholes(part), maxlen=0)

    def _be_written(self, part: int) -> None:
        self._spread(part, self._rooms(part))

    def _replicas(self) -> str:
        digest = xxhash.xxh3_128()
        for tensor in self._tensors if self._ranks.size > 1 else ():
            if _is_parameter(tensor) and not is_sharded(tensor):
                digest.update(as_bytes(tensor.detach().to("cpu", torch.float32).contiguous()))
        return digest.hexdigest()

    def _wholes(self, part: int) -> Iterator[torch.Tensor]:
        for tensor in self.parts[part].tensors:
            value = tensor.detach()
            yield value.full_tensor() if is_sharded(value) else value

    def _rooms(self, part: int) -> Iterator[torch.Tensor]:
        return (torch.empty(tensor.numel()) for tensor in self.parts[part].tensors)

    def _spread(self, part: int, pieces: Iterable[torch.Tensor]) -> None:
        with torch.no_grad():
            for tensor, piece in zip(self.parts[part].tensors, pieces, strict=True):
                tensor.copy_(_own_part(self._ranks.spread(piece).to(tensor.device).view(tensor.shape), tensor))


def _check(entries: list[tuple[str, torch.Tensor]]) -> None:
    if not any(_is_parameter(tensor) for _, tensor in entries):
        raise ConfigurationError("the model has no trainable parameters")
    for name, tensor in entries:
        if tensor.dtype not in DTYPES or tensor.device.type == "meta":
            raise ConfigurationError(
                f"parameter {name} is {tensor.dtype} on {tensor.device}: outer loops take float32 and bfloat16, "
                "on the CPU or an accelerator"
            )


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return _is_a("torch.distributed.tensor", "DTensor", tensor)


def _is_a(module: str, kind: str, value: object) -> bool:
    """Without loading a module (a second, of this one) that whoever made such a value has loaded."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], kind))


def _own_part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What a rank holds of `whole`, distributed as the parameter is."""
    if not is_sharded(parameter):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def _entries(model: torch.nn.Module, buffers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What is exchanged, in the model's order, with the names that it has in the model as it was written."""
    if any(_is_a("torch.distributed.fsdp", "FullyShardedDataParallel", module) for module in model.modules()):
        raise ConfigurationError("the model is wrapped in FullyShardedDataParallel: use fully_shard (FSDP2) instead")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield _plain(name), parameter
    for name, buffer in model.named_buffers() if buffers else ():
        if buffer.is_floating_point() and buffer.numel():
            yield _plain(name), buffer


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)

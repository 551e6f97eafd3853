"""The outer state: one immutable version of a fragment, and the flat layout that ties it to a model.

A version is parameters and momentum as flat float32 vectors. It is never changed: an outer step makes the next one, so
that it can be served to joiners, hashed and compared while training goes on.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeGuard

import torch
import xxhash
from torch.nn.parallel import DistributedDataParallel

from collectives.transfer import as_bytes

from ..errors import CheckpointMismatch, ConfigurationError, ParityError
from ..ranks import ALONE, Alone

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}  # what torch.compile and activation checkpointing put in names


@dataclass(frozen=True)
class Version:
    """parameters, momentum: flat float32 CPU tensors of equal length, not to be written."""

    number: int
    parameters: torch.Tensor
    momentum: torch.Tensor

    @cached_property
    def state_hash(self) -> str:
        """xxh3-128 of the bytes of parameters, then momentum; equal on all peers that hold this version."""
        digest = xxhash.xxh3_128()
        for tensor in (self.parameters, self.momentum):
            digest.update(as_bytes(tensor))
        return digest.hexdigest()

    @classmethod
    def elsewhere(cls, number: int, state_hash: str) -> Version:
        """One that this process knows of, without its values."""
        return cls(number, torch.empty(0), torch.empty(0))._hashed(state_hash)

    @classmethod
    def from_bytes(cls, number: int, data: bytearray | memoryview, state_hash: str) -> Version:
        """The inverse of serving [parameters, momentum]. state_hash: of these bytes, verified when they came.

        Raises CheckpointMismatch if the length cannot be right.
        """
        if len(data) % 8:
            raise CheckpointMismatch(f"outer state of {len(data)} bytes is no pair of float32 vectors")
        flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
        half = flat.numel() // 2
        return cls(number, flat[:half], flat[half:])._hashed(state_hash)

    def _hashed(self, state_hash: str) -> Version:
        self.__dict__["state_hash"] = state_hash  # where the cached property keeps it
        return self


class Layout:
    """The trainable parameters of a model, in order, as one flat vector. Tied parameters count once.

    named: their names and whole shapes: of a model that is sharded or wrapped at one site and not at another, the same.
    With several ranks, `read`, `write` and `add` are the leader's, and reach the parameters of all ranks, whole or
    sharded; one parameter at a time is put together.
    """

    def __init__(self, model: torch.nn.Module, ranks: Alone = ALONE, tag: str = "outer") -> None:
        named = [(name, p) for name, p in _named_parameters(model) if p.requires_grad]
        if not named:
            raise ConfigurationError("the model has no trainable parameters")
        for name, parameter in named:
            if parameter.dtype is not torch.float32 or parameter.device.type != "cpu":
                raise ConfigurationError(
                    f"parameter {name} is {parameter.dtype} on {parameter.device}: outer loops take float32 on the CPU"
                )
        self._parameters = [parameter for _, parameter in named]
        self._ranks, self._tag = ranks, tag
        self.sharded = any(map(is_sharded, self._parameters))
        self.named = tuple((name, tuple(parameter.shape)) for name, parameter in named)
        self.elements = sum(parameter.numel() for parameter in self._parameters)
        self.fingerprint = xxhash.xxh3_64_hexdigest(repr([(name, tuple(p.shape)) for name, p in named]).encode())
        self._teach()

    def read(self) -> torch.Tensor:
        """A new flat copy of the model's parameters."""
        if self.sharded:
            self._ranks.order(f"{self._tag}/read")
        return torch.cat([whole.reshape(-1) for whole in self._wholes()])

    def write(self, flat: torch.Tensor) -> None:
        """Copies a flat vector into the model's parameters, in place."""
        pieces = self._pieces(flat)
        self._ranks.order(f"{self._tag}/write")
        self._spread(pieces, torch.Tensor.copy_)

    def add(self, flat: torch.Tensor) -> None:
        """Adds a flat vector to the model's parameters, in place."""
        pieces = self._pieces(flat)
        self._ranks.order(f"{self._tag}/add")
        self._spread(pieces, torch.Tensor.add_)

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
        return [parameter.detach().clone() for parameter in self._parameters]

    def put_back(self, kept: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self._parameters, kept, strict=True):
                parameter.copy_(value)

    # --- the ranks of a peer ------------------------------------------------------------------------------------------

    def _teach(self) -> None:
        """What the other ranks do when the leader reads or writes."""
        self._ranks.teach(f"{self._tag}/read", lambda: deque(self._wholes(), maxlen=0))
        self._ranks.teach(f"{self._tag}/check", lambda: self._ranks.gather(self._replicas()))
        self._ranks.teach(f"{self._tag}/write", lambda: self._spread(self._rooms(), torch.Tensor.copy_))
        self._ranks.teach(f"{self._tag}/add", lambda: self._spread(self._rooms(), torch.Tensor.add_))

    def _replicas(self) -> str:
        digest = xxhash.xxh3_128()
        for parameter in self._parameters if self._ranks.size > 1 else ():
            if not is_sharded(parameter):
                digest.update(as_bytes(parameter.detach().contiguous()))
        return digest.hexdigest()

    def _wholes(self) -> Iterator[torch.Tensor]:
        for parameter in self._parameters:
            value = parameter.detach()
            yield value.full_tensor() if is_sharded(value) else value

    def _rooms(self) -> Iterator[torch.Tensor]:
        return (torch.empty(parameter.numel()) for parameter in self._parameters)

    def _spread(self, pieces: Iterable[torch.Tensor], do: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        with torch.no_grad():
            for parameter, piece in zip(self._parameters, pieces, strict=True):
                do(parameter, _own_part(self._ranks.spread(piece).view(parameter.shape), parameter))

    def _pieces(self, flat: torch.Tensor) -> Iterable[torch.Tensor]:
        if flat.numel() != self.elements:
            raise CheckpointMismatch(f"state of {flat.numel()} numbers for a model of {self.elements}")
        return torch.split(flat, [parameter.numel() for parameter in self._parameters])


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


def _named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """With the names that they have in the model as it was written."""
    if any(_is_a("torch.distributed.fsdp", "FullyShardedDataParallel", module) for module in model.modules()):
        raise ConfigurationError("the model is wrapped in FullyShardedDataParallel: use fully_shard (FSDP2) instead")
    if isinstance(model, DistributedDataParallel):
        model = model.module
    for name, parameter in model.named_parameters():
        yield ".".join(part for part in name.split(".") if part not in WRAPPERS), parameter

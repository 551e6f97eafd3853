"""The outer state: one immutable version of a fragment, and the flat layout that ties it to a model.

A version is parameters and momentum as flat float32 vectors. It is never changed: an outer step makes the next one, so
that it can be served to joiners, hashed and compared while training goes on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash

from collectives.transfer import as_bytes

from ..errors import CheckpointMismatch, ConfigurationError


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
    def from_bytes(cls, number: int, data: bytearray | memoryview, state_hash: str) -> Version:
        """The inverse of serving [parameters, momentum]. state_hash: of these bytes, verified when they came.

        Raises CheckpointMismatch if the length cannot be right.
        """
        if len(data) % 8:
            raise CheckpointMismatch(f"outer state of {len(data)} bytes is no pair of float32 vectors")
        flat = torch.frombuffer(data, dtype=torch.float32) if data else torch.empty(0)
        half = flat.numel() // 2
        version = cls(number, flat[:half], flat[half:])
        version.__dict__["state_hash"] = state_hash  # where the cached property keeps it
        return version


class Layout:
    """The trainable parameters of a model, in order, as one flat vector. Tied parameters count once.

    named: their names and shapes.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ConfigurationError("the model has no trainable parameters")
        for name, parameter in named:
            if parameter.dtype is not torch.float32 or parameter.device.type != "cpu":
                raise ConfigurationError(
                    f"parameter {name} is {parameter.dtype} on {parameter.device}: outer loops take float32 on the CPU"
                )
        self._parameters = [parameter for _, parameter in named]
        self.named = tuple((name, tuple(parameter.shape)) for name, parameter in named)
        self.elements = sum(parameter.numel() for parameter in self._parameters)
        self.fingerprint = xxhash.xxh3_64_hexdigest(repr([(name, tuple(p.shape)) for name, p in named]).encode())

    def read(self) -> torch.Tensor:
        """A new flat copy of the model's parameters."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self._parameters])

    def write(self, flat: torch.Tensor) -> None:
        """Copies a flat vector into the model's parameters, in place."""
        with torch.no_grad():
            for parameter, piece in self._pieces(flat):
                parameter.copy_(piece.view_as(parameter))

    def add(self, flat: torch.Tensor) -> None:
        """Adds a flat vector to the model's parameters, in place."""
        with torch.no_grad():
            for parameter, piece in self._pieces(flat):
                parameter.add_(piece.view_as(parameter))

    def _pieces(self, flat: torch.Tensor) -> Iterable[tuple[torch.nn.Parameter, torch.Tensor]]:
        if flat.numel() != self.elements:
            raise CheckpointMismatch(f"state of {flat.numel()} numbers for a model of {self.elements}")
        sizes = [parameter.numel() for parameter in self._parameters]
        return zip(self._parameters, torch.split(flat, sizes), strict=True)

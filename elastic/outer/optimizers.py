"""Outer optimizers: how a mean pseudo-gradient moves the outer parameters.

Under the bit rule (docs/design.md, "Rules of a round", 9) each step is a fixed list of single-rounded float32 multiply
and add operations, one kernel each, so that every peer gets the same bits on any CPU: no torch.optim, no `alpha=`,
nothing that could be fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ConfigurationError


class OuterOptimizer(Protocol):
    """A pure function of (parameters, momentum, mean pseudo-gradient); describes itself for the parity check."""

    @property
    def description(self) -> str: ...

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns new (parameters, momentum): flat float32 CPU tensors of one length. Inputs stay as they are."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesterov:
    """SGD with Nesterov momentum, as DiLoCo uses it (arXiv 2311.08105, section 2), in PyTorch's form:

    b <- momentum * b + delta
    theta <- theta - lr * (delta + momentum * b)
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigurationError(f"outer lr is {self.lr}: it must be above 0; DiLoCo uses 0.7")
        if not 0 <= self.momentum < 1:
            raise ConfigurationError(f"outer momentum is {self.momentum}: it must be at least 0 and below 1")

    @property
    def description(self) -> str:
        return f"Nesterov(lr={self.lr}, momentum={self.momentum})"

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.mul(momentum, self.momentum)
        torch.add(buffer, delta, out=buffer)  # in place: fresh memory costs more than the arithmetic
        update = torch.mul(buffer, self.momentum)
        torch.add(update, delta, out=update)
        torch.mul(update, self.lr, out=update)
        return torch.sub(parameters, update, out=update), buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """theta <- theta - lr * delta. With lr 1 the outer loop is federated averaging (local SGD)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ConfigurationError(f"outer lr is {self.lr}: it must be above 0")

    @property
    def description(self) -> str:
        return f"SGD(lr={self.lr})"

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        update = torch.mul(delta, self.lr)
        return torch.sub(parameters, update, out=update), momentum

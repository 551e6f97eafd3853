"""Outer optimizers: how a mean pseudo-gradient moves the outer parameters.

Under the bit rule (docs/design.md, "Rules of a round", 9) each step is a fixed list of single-rounded float32 multiply,
add, square root and divide operations, one kernel each, so that every peer gets the same bits on any device: no
torch.optim, no `alpha=`, nothing that could be fused. Scalars are computed in double precision by multiplications
alone, and rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from ..errors import ConfigurationError


class OuterOptimizer(Protocol):
    """A pure function of (parameters, momentum, mean pseudo-gradient); describes itself for the parity check.

    slots: how many vectors of the parameters' length its state is made of, end to end in `momentum`; zeros at first.
    linear: whether a step is linear in (parameters, momentum, pseudo-gradient) together: eager loops need that.
    """

    @property
    def description(self) -> str: ...

    @property
    def slots(self) -> int: ...

    @property
    def linear(self) -> bool: ...

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns new (parameters, momentum): flat float32 tensors, where the inputs are, which stay as they are.

        taken: how many steps came before this one.
        """
        ...


def check_above(name: str, value: float, low: float = 0.0, *, advice: str = "") -> None:
    """ConfigurationError unless value > low."""
    if not value > low:
        raise ConfigurationError(f"{name} is {value}: it must be above {low:g}{advice}")


def check_part(name: str, value: float) -> None:
    """ConfigurationError unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ConfigurationError(f"{name} is {value}: it must be from 0 to 1")


def check_decay(name: str, value: float) -> None:
    """ConfigurationError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise ConfigurationError(f"{name} is {value}: it must be at least 0 and below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nesterov:
    """SGD with Nesterov momentum, as DiLoCo uses it (arXiv 2311.08105, section 2), in PyTorch's form:

    b <- momentum * b + delta
    theta <- theta - lr * (delta + momentum * b)
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_above("outer lr", self.lr, advice="; DiLoCo uses 0.7")
        check_decay("outer momentum", self.momentum)

    @property
    def description(self) -> str:
        return f"Nesterov(lr={self.lr}, momentum={self.momentum})"

    @property
    def slots(self) -> int:
        return 1

    @property
    def linear(self) -> bool:
        return True

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.mul(momentum, self.momentum)
        torch.add(buffer, delta, out=buffer)  # in place: fresh memory costs more than the arithmetic
        update = torch.mul(buffer, self.momentum)
        torch.add(update, delta, out=update)
        torch.mul(update, self.lr, out=update)
        return torch.sub(parameters, update, out=update), buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeavyBall:
    """SGD with Polyak's momentum, as SlowMo (arXiv 1910.00643) and CO2 use it:

    b <- momentum * b + delta
    theta <- theta - lr * b
    """

    lr: float = 0.7
    momentum: float = 0.5

    def __post_init__(self) -> None:
        check_above("outer lr", self.lr)
        check_decay("outer momentum", self.momentum)

    @property
    def description(self) -> str:
        return f"HeavyBall(lr={self.lr}, momentum={self.momentum})"

    @property
    def slots(self) -> int:
        return 1

    @property
    def linear(self) -> bool:
        return True

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        buffer = torch.mul(momentum, self.momentum)
        torch.add(buffer, delta, out=buffer)
        update = torch.mul(buffer, self.lr)
        return torch.sub(parameters, update, out=update), buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class SGD:
    """theta <- theta - lr * delta. With lr 1 the outer loop is federated averaging (local SGD)."""

    lr: float = 1.0

    def __post_init__(self) -> None:
        check_above("outer lr", self.lr)

    @property
    def description(self) -> str:
        return f"SGD(lr={self.lr})"

    @property
    def slots(self) -> int:
        return 0

    @property
    def linear(self) -> bool:
        return True

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        update = torch.mul(delta, self.lr)
        return torch.sub(parameters, update, out=update), momentum


@dataclass(frozen=True, slots=True, kw_only=True)
class Adam:
    """Adam (arXiv 1412.6980, algorithm 1) on pseudo-gradients, with bias correction:

    m <- beta1 * m + (1 - beta1) * delta;   v <- beta2 * v + (1 - beta2) * delta^2
    theta <- theta - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    DiLoCo's authors found it poor as an outer optimizer, and in need of a large eps (0.1).
    """

    lr: float = 0.3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 0.1

    def __post_init__(self) -> None:
        check_above("outer lr", self.lr)
        check_above("outer eps", self.eps)
        check_decay("outer beta1", self.beta1)
        check_decay("outer beta2", self.beta2)

    @property
    def description(self) -> str:
        return f"Adam(lr={self.lr}, beta1={self.beta1}, beta2={self.beta2}, eps={self.eps})"

    @property
    def slots(self) -> int:
        return 2

    @property
    def linear(self) -> bool:
        return False

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, moments = parameters.numel(), torch.empty_like(momentum)
        first, second, new_first, new_second = momentum[:n], momentum[n:], moments[:n], moments[n:]
        _decay(first, self.beta1, delta, new_first)
        _decay(second, self.beta2, torch.mul(delta, delta), new_second)
        scale = divided(new_second, 1.0 - power(self.beta2, taken + 1))
        torch.sqrt(scale, out=scale)
        torch.add(scale, self.eps, out=scale)
        update = divided(new_first, 1.0 - power(self.beta1, taken + 1))
        torch.mul(update, self.lr, out=update)
        torch.div(update, scale, out=update)
        return torch.sub(parameters, update, out=update), moments


def _decay(before: torch.Tensor, beta: float, news: torch.Tensor, out: torch.Tensor) -> None:
    torch.mul(before, beta, out=out)
    torch.add(out, torch.mul(news, 1.0 - beta), out=out)


def divided(x: torch.Tensor, by: float) -> torch.Tensor:
    """x / by, rounded once. A plain number as divisor would do on the CPU; CUDA multiplies by its reciprocal."""
    return torch.div(x, torch.full((), by, dtype=x.dtype, device=x.device))


def power(base: float, exponent: int) -> float:
    """base ** exponent by multiplications in a fixed order: a C library's pow() may round otherwise elsewhere."""
    result, square = 1.0, base
    while exponent:
        if exponent & 1:
            result *= square
        square *= square
        exponent >>= 1
    return result


_PIECE = 1 << 20


def norm(vector: torch.Tensor) -> float:
    """The Euclidean norm in double precision, the same bits everywhere: a library's sum may add in any order."""
    total = 0.0
    for piece in torch.split(vector, _PIECE) if vector.numel() else ():
        total += float(folded(piece.double().square()))
    return float(torch.tensor(total, dtype=torch.float64).sqrt())


def folded(numbers: torch.Tensor) -> torch.Tensor:
    """The sums over the last dimension, by adding halves element by element: the same bits everywhere."""
    while numbers.shape[-1] > 1:
        half = numbers.shape[-1] // 2
        rest = numbers[..., 2 * half :]
        numbers = torch.add(numbers[..., :half], numbers[..., half : 2 * half])
        if rest.numel():
            numbers[..., :1] += rest
    return numbers[..., 0] if numbers.shape[-1] else numbers.new_zeros(numbers.shape[:-1])

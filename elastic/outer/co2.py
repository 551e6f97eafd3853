"""CO2: asynchronous SlowMo with a penalty for stale contributions (Sun et al., arXiv 2401.16265).

    every H inner steps, with  delta(t-1)  from the round before:
        m      <-  beta m + delta(t-1) / Lambda(t)
        m      <-  clip(m, -phi, phi)                       element by element
        theta  <-  theta - lr m

Lambda(t) grows with the staleness gap, by how far the outer parameters have moved since the contributions that arrive
were measured. How the paper computes it could not be verified, and its published code uses the constant 1; here it is

    Lambda(t)  =  max(1,  |theta(t) - theta(t-1)| / |delta(t-1)|)        |theta(t) - theta(t-1)| = lr |m(t-1)|

so that a contribution that was measured further from here than it is long counts less; gap and penalty grow with lr and
beta. The published code's lr of 1 with beta 0.5 is stable only while the inner steps go less than half of the way to
the optimum; the default here is 0.4, which is stable whatever they do. That code also discards the clipped momentum;
here clipping acts. Both norms are replicated, under the bit rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from .cadence import WHOLE_ROUND
from .engine import OuterLoop
from .optimizers import HeavyBall, OuterOptimizer, check_above, divided, norm
from .rule import Rule

if TYPE_CHECKING:
    from ..peer import Peer


@dataclass(frozen=True, kw_only=True)
class CO2Rule(Rule):
    penalty: bool = True
    clip: float = 1.0

    def _options(self) -> list[str]:
        return [f"penalty={self.penalty}", f"clip={self.clip:g}"]

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(self.outer, HeavyBall)
        if self.penalty:
            delta = divided(delta, self.staleness(momentum, delta))
        buffer = torch.mul(momentum, self.outer.momentum)
        torch.add(buffer, delta, out=buffer)
        torch.clamp(buffer, -self.clip, self.clip, out=buffer)
        update = torch.mul(buffer, self.outer.lr)
        return torch.sub(parameters, update, out=update), buffer

    def staleness(self, momentum: torch.Tensor, delta: torch.Tensor) -> float:
        """Lambda, at least 1. momentum: as it was after the last outer step."""
        assert isinstance(self.outer, HeavyBall)
        length = norm(delta)
        return max(1.0, self.outer.lr * norm(momentum) / length) if length > 0 else 1.0


def rule(outer: OuterOptimizer | None = None, *, penalty: bool = True, clip: float = 1.0, **options: Any) -> Rule:
    """The equations above. options: fields of `Rule`. Raises ConfigurationError."""
    check_above("clip", clip)
    outer = outer or HeavyBall(lr=0.4, momentum=0.5)
    if not isinstance(outer, HeavyBall):
        raise ConfigurationError(f"CO2 has a heavy ball as its outer optimizer, not {outer.description}")
    return CO2Rule(name="CO2", outer=outer, delay=WHOLE_ROUND, takes_out=True, penalty=penalty, clip=clip, **options)


class CO2(OuterLoop):
    """All parameters, one round late, with penalty and clipping. clip: phi; math.inf for none.

    See `OuterLoop` for the other arguments. If a peer is lost meanwhile, the others finish that round with what they
    have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        penalty: bool = True,
        clip: float = 1.0,
        outer: OuterOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, inner, peer, make=partial(rule, outer, penalty=penalty, clip=clip), **options)

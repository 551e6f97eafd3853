"""DiLoCo with an exchange that takes a whole round, hidden behind it; plain, and with eager updates.

Plain (as PCCL's asynchronous DiLoCo does it): the outer step of round t uses what was sent in round t - 1.

    local  <-  H inner steps from theta(t)
    delta_m(t)  <-  theta(t) - local
    wait for  delta(t-1);   theta(t+1)  <-  OuterOpt(theta(t), delta(t-1));   local  <-  theta(t+1)
    begin the exchange of  delta_m(t)

Eager (Kale et al., arXiv 2502.12996): a peer's own contribution acts at once, and the others' a round later.

    delta~_m(t)  =  w_m delta_m(t) + ( delta(t-1) - w_m delta_m(t-1) )          w_m: this peer's part of the mean, 1/M
    theta_m(t+1) <-  OuterOpt(theta_m(t), delta~_m(t))

The notes know a second form, a delta_m(t) + (1 - a) delta(t-1); this one gives every contribution its whole weight over
two rounds. Since the outer step is linear, theta_m is kept as the plain delayed state, which is the same on all peers
and is what joiners fetch, plus a private offset that is moved by  w_m delta_m(t) - w_m delta_m(t-1)  alone.

A contribution that is a round late pushes along a momentum that has turned meanwhile: plain, with lr 0.7 and momentum
0.9, this diverges on a quadratic (13.9 where the synchronous loop has 0.0034), and is refused. If the H inner steps go
the part c of the way to the optimum, plain delay with momentum 0.9 is stable for every c up to lr 0.25, and for c below
0.63 with lr 0.4, which is what the sources take at most. The default is 0.2: early in training c is near 1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from .cadence import WHOLE_ROUND
from .engine import OuterLoop
from .optimizers import Nesterov, OuterOptimizer
from .rule import Rule

if TYPE_CHECKING:
    from ..peer import Peer

LONGEST_STEP = 5.0
"""lr / (1 - momentum), how far a contribution is carried in the end: 4 can converge, 7 diverges."""


def rule(outer: OuterOptimizer | None = None, *, eager: bool = False, **options: Any) -> Rule:
    """The equations above. options: fields of `Rule`. Raises ConfigurationError for what diverges."""
    outer = outer or Nesterov(lr=0.4 if eager else 0.2, momentum=0.9)
    if eager and not outer.linear:
        raise ConfigurationError(f"eager updates need a linear outer optimizer, not {outer.description}")
    reach = getattr(outer, "lr", 0.0) / (1 - getattr(outer, "momentum", 0.0))
    if not eager and reach > LONGEST_STEP + 1e-9:
        raise ConfigurationError(
            f"{outer.description} diverges when contributions are applied a round late: they are carried lr / (1 - "
            f"momentum) = {reach:.2g} times as far as they were measured; use lr=0.2 with momentum=0.9, or eager=True"
        )
    name = "EagerDiLoCo" if eager else "DelayedDiLoCo"
    return Rule(name=name, outer=outer, delay=WHOLE_ROUND, takes_out=True, eager=eager, **options)


class DelayedDiLoCo(OuterLoop):
    """All parameters, one round late: the exchange has a whole round of inner steps to finish in.

    eager: the own contribution acts at once. See `OuterLoop` for the other arguments. If a peer is lost meanwhile, the
    others finish that round with what they have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        eager: bool = False,
        outer: OuterOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, inner, peer, make=partial(rule, outer, eager=eager), **options)

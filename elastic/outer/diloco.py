"""DiLoCo: Distributed Low-Communication Training of Language Models (Douillard et al., arXiv 2311.08105, algorithm 1).

    for each round t:
        every peer m, from theta(t-1):  H inner steps of AdamW on its own data     ->  theta_m
        delta(t)  <-  weighted mean over the contributors of  theta(t-1) - theta_m
        theta(t)  <-  OuterOpt(theta(t-1), delta(t))                               (Nesterov, lr 0.7, momentum 0.9)

The paper does not say by what a partial round is divided: here it is the sum of the contributors' weights (the tokens
that each has trained on), so that a peer that is missing does not shrink the step.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .engine import OuterLoop
from .optimizers import Nesterov, OuterOptimizer
from .rule import Rule

if TYPE_CHECKING:
    from ..peer import Peer


def rule(outer: OuterOptimizer | None = None, **options: Any) -> Rule:
    """The equations above. options: fields of `Rule`."""
    return Rule(name="DiLoCo", outer=outer or Nesterov(lr=0.7, momentum=0.9), **options)


class DiLoCo(OuterLoop):
    """Synchronous DiLoCo: all parameters at once, every `sync_every` inner steps. See `OuterLoop` for the arguments.

        with elastic.DiLoCo(model, inner, peer, sync_every=100) as outer:
            for batch in peer.shards(dataset, batch_size=32):
                model(batch).loss.backward(); inner.step(); inner.zero_grad()

    If a peer is lost during a round, the others finish that round with what they have.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        outer: OuterOptimizer | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, inner, peer, make=partial(rule, outer), **options)

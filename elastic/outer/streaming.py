"""Streaming DiLoCo with overlapping communication (Douillard et al., arXiv 2501.18512, algorithm 2).

    peer m, inner step t; fragment p is exchanged every H steps, at an offset of p H / P
        theta_m(t)  <-  InnerOpt(theta_m(t-1))
        if it is fragment p's turn:                                                                  (send)
            delta_m,p  <-  theta_p - theta_m,p(t)          theta_p: the outer parameters of p; quantised by each sender
            the exchange of  delta_p = weighted mean of delta_m,p  begins, summed in float32
        tau inner steps later:                                                                       (receive)
            theta_p      <-  OuterOpt_p(theta_p, delta_p)                       (Nesterov, lr 0.4, momentum 0.9)
            theta_m,p(t) <-  alpha theta_m,p(t) + (1 - alpha) theta_p

alpha = 1 is no communication at all, alpha = 0 forgets the tau steps made meanwhile. With P = 1, tau = 0, alpha = 0 it
is DiLoCo. The paper's text and its algorithm differ in the sign of the offset; as in its worked example, the first
fragment is first exchanged after H steps and each further one H / P steps later. One exchange is under way at a time,
so that tau is at most H / P; docs/design.md says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .engine import OuterLoop
from .optimizers import Nesterov, OuterOptimizer, check_part
from .rule import Rule

if TYPE_CHECKING:
    from ..peer import Peer


@dataclass(frozen=True, kw_only=True)
class StreamingRule(Rule):
    def _options(self) -> list[str]:
        return [f"alpha={self.mix:g}"] if self.mix else []


def rule(outer: OuterOptimizer | None = None, *, sync_delay: int = 5, merge_alpha: float = 0.5, **options: Any) -> Rule:
    """The equations above. options: fields of `Rule`. Raises ConfigurationError."""
    check_part("merge_alpha", merge_alpha)
    outer = outer or Nesterov(lr=0.4, momentum=0.9)
    return StreamingRule(name="StreamingDiLoCo", outer=outer, delay=sync_delay, mix=merge_alpha, **options)


class StreamingDiLoCo(OuterLoop):
    """Fragments one after another, while inner steps go on.

    sync_every: H. fragments: P, at most the number of layers. fragment_cut: "strided", "sequential", "balanced".
    sync_delay: tau. merge_alpha: alpha, of which 1 keeps the local parameters. See `OuterLoop` for the others.

    While a fragment is on its way training goes on; it waits only if the exchange takes longer than `sync_delay`
    steps. If a peer is lost meanwhile, the others finish that round with what they have. Memory: see `OuterLoop`; of
    the contribution, one fragment.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        fragments: int = 4,
        sync_delay: int = 5,
        merge_alpha: float = 0.5,
        outer: OuterOptimizer | None = None,
        **options: Any,
    ) -> None:
        make = partial(rule, outer, sync_delay=sync_delay, merge_alpha=merge_alpha)
        super().__init__(model, inner, peer, make=make, fragments=fragments, **options)

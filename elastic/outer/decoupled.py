"""Decoupled DiLoCo: nobody waits for the slowest (arXiv 2604.21428, read through secondary sources only).

As Streaming DiLoCo with alpha = 0, but

    a round begins when K learners are ready, and a window after that: the time that the exchange would have been
    hidden behind the overlap anyway,
        grace  =  clamp( gamma (tau step_seconds - quorum_seconds - sync_seconds), 0, cap )
    contributions count by  w_m = tokens (tokens / steps)
    optionally, lengths and directions are averaged apart (radial-directional average, RDA):
        delta  =  ( sum w |v| / sum w )  phi( sum w phi(v) / sum w )        phi(x) = x / |x|, phi(0) = 0

In the sources a central syncer holds the outer parameters; here the peers do, as in all loops. RDA takes the whole
fragment as one vector, embeddings too, which the sources average plainly. If directions cancel out, phi cannot be
taken, and their mean is used as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError
from .engine import OuterLoop
from .optimizers import Nesterov, OuterOptimizer, divided, norm
from .rule import Rule
from .weighting import Throughput

if TYPE_CHECKING:
    from ..peer import Peer

SMALLEST_DIRECTION = 1e-6
"""The mean of directions below which they are taken to cancel out."""


@dataclass(frozen=True, kw_only=True)
class DecoupledRule(Rule):
    def _options(self) -> list[str]:
        return ["rda"] if self.directional else []

    def direct(self, mean: torch.Tensor, scale: float) -> torch.Tensor:
        length = norm(mean)
        return torch.mul(divided(mean, length) if length > SMALLEST_DIRECTION else mean, scale)


def rule(outer: OuterOptimizer | None = None, *, sync_delay: int = 2, rda: bool = False, **options: Any) -> Rule:
    """The equations above. options: fields of `Rule`. Raises ConfigurationError."""
    options.setdefault("weighting", Throughput())
    made = DecoupledRule(
        name="DecoupledDiLoCo",
        outer=outer or Nesterov(lr=0.7, momentum=0.9),
        delay=sync_delay,
        directional=rda,
        **options,
    )
    if rda and made.feedback.description != "none":
        raise ConfigurationError("rda sends directions, which error feedback cannot correct: leave one of them out")
    return made


class DecoupledDiLoCo(OuterLoop):
    """Streaming fragments with a quorum and a window of grace.

    quorum: how many peers open a round. grace: gamma. grace_cap: seconds. rda: radial-directional average.
    See `StreamingDiLoCo` and `OuterLoop` for the other arguments. A peer that is late is left out of the round, applies
    its result, and gives what it has learned to the fragment's next one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        inner: torch.optim.Optimizer,
        peer: Peer,
        *,
        sync_every: Any = 24,
        fragments: int = 8,
        fragment_cut: str = "balanced",
        sync_delay: int = 2,
        quorum: int = 1,
        grace: float = 1.0,
        grace_cap: float = 2.0,
        rda: bool = False,
        outer: OuterOptimizer | None = None,
        **options: Any,
    ) -> None:
        if quorum < 1 or grace < 0 or grace_cap < 0:
            raise ConfigurationError(
                f"quorum is {quorum}, grace {grace}, grace_cap {grace_cap}: quorum must be at least 1, the others 0"
            )
        self.quorum, self._grace, self._grace_cap = quorum, grace, grace_cap
        make = partial(rule, outer, sync_delay=sync_delay, rda=rda)
        options |= {"sync_every": sync_every, "fragments": fragments, "fragment_cut": fragment_cut}
        super().__init__(model, inner, peer, make=make, **options)

    @property
    def grace(self) -> float:
        """Seconds that a round may wait for others before this peer would have to wait for its result."""
        assert isinstance(self.replica.rule.delay, int)
        slack = self.replica.rule.delay * self.pace.step_seconds - self.pace.sync_seconds
        return min(max(self._grace * slack, 0.0), self._grace_cap)

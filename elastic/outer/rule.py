"""What an outer algorithm says: the equations, without the network.

`advance` is replicated: every peer computes it from the same committed mean, under the bit rule. All else concerns one
peer's own copy of the model. The algorithms (`diloco.py`, `streaming.py`, `delayed.py`, `co2.py`, `decoupled.py`) are
rules of this kind; `replica.py` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import ConfigurationError
from .cadence import WHOLE_ROUND, Cadence
from .compression import Compression
from .feedback import Feedback, NoFeedback
from .optimizers import Nesterov, OuterOptimizer
from .robust import Robust
from .state import Part, Version
from .weighting import Tokens, Weighting


@dataclass(frozen=True, slots=True)
class Facts:
    """What a commit says beside the mean. scale: mean length of what was sent as directions. share: which part of those
    who train has contributed. mass: the contributors' weights, over the number of those who train.
    """

    scale: float = 1.0
    share: float = 1.0
    mass: float = 1.0


PLAIN = Facts()


@dataclass(frozen=True, kw_only=True)
class Rule:
    """name: of the algorithm. outer: the outer optimizer.

    delay: inner steps between sending and applying; WHOLE_ROUND: until the next fragment is to be sent.
    mix: how much of the local parameters stays when a round is applied (Streaming's alpha): 0 takes the outer ones.
    takes_out: what is sent leaves the local parameters at once, which go on from the outer ones.
    eager: a peer's own contribution acts at once, the others' when they arrive.
    directional: contributions travel as directions, and their lengths apart from them.
    combine: how contributions become one, as an operation of the data plane. robust: the rule by which they do instead,
    if some may be bad: then every peer gets all of them.
    replicated: whether the outer state is bit-identical on all peers (gossip loops will say False).
    """

    name: str
    outer: OuterOptimizer = field(default_factory=Nesterov)
    compression: Compression = field(default_factory=Compression)
    feedback: Feedback = field(default_factory=NoFeedback)
    weighting: Weighting = field(default_factory=Tokens)
    delay: int = 0
    mix: float = 0.0
    takes_out: bool = False
    eager: bool = False
    directional: bool = False
    combine: str = "mean"
    robust: Robust | None = None
    replicated: bool = True

    @property
    def description(self) -> str:
        """All that peers must agree on, beside wire and fragments."""
        parts = [self.outer.description, *self._options()]
        weighted = "equal" if self.robust else "tokens"
        for part, usual in ((self.feedback.description, "none"), (self.weighting.description, weighted)):
            parts += [part] if part != usual else []
        parts += ["hadamard"] if self.compression.rotate else []
        if self.robust:
            parts += [self.robust.description, self.compression.wire]
        return f"{self.name}({', '.join(parts)})"

    def _options(self) -> list[str]:
        return []

    @property
    def slots(self) -> int:
        """Vectors of a fragment's length that the outer state has beside the parameters."""
        return self.outer.slots + self.feedback.slots

    def begin(self, parameters: torch.Tensor) -> Version:
        """Version 0."""
        return Version(0, parameters, parameters.new_zeros(self.slots * parameters.numel()))

    def advance(self, version: Version, mean: torch.Tensor, part: Part, facts: Facts = PLAIN) -> Version:
        """The next version, from the committed mean of what was sent, which comes in the host's memory."""
        n, own = part.elements, self.outer.slots * part.elements
        slot = version.momentum[own:] if self.feedback.slots else None
        mean = self.compression.received(mean).to(version.parameters.device)
        delta, slot = self.feedback.combined(mean, slot, share=facts.share)
        delta = self.direct(delta, facts.scale) if self.directional else delta
        delta = torch.mul(delta, facts.mass) if self.weighting.absolute else delta
        parameters, momentum = self.step(version.parameters, version.momentum[:own], delta, version.number)
        if part.averaged < n:  # buffers are averaged as they are
            learned = part.averaged
            torch.sub(version.parameters[learned:], delta[learned:], out=parameters[learned:])
            momentum.view(-1, n)[:, learned:] = 0
        if slot is not None:
            momentum = torch.cat([momentum, slot])
        return Version(version.number + 1, parameters, momentum)

    def step(
        self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outer step. Under the bit rule."""
        return self.outer.step(parameters, momentum, delta, taken)

    def direct(self, mean: torch.Tensor, scale: float) -> torch.Tensor:
        """From the mean of directions and the mean length, the pseudo-gradient. Under the bit rule."""
        raise NotImplementedError

    def merge(self, local: torch.Tensor, outer: torch.Tensor) -> torch.Tensor:
        """What the local parameters become once a round with this peer's contribution is applied."""
        return torch.add(torch.mul(local, self.mix), torch.mul(outer, 1.0 - self.mix))


def check_robust(rule: Rule, *, buffers: bool = False, gather_wire: str | None = None) -> None:
    """ConfigurationError if a robust rule is asked for with what would need a mean, or trust."""
    if rule.robust is None:
        return
    if not isinstance(rule.robust, Robust):
        raise ConfigurationError(
            f"combine is {rule.robust!r}: it must be a rule such as elastic.TrimmedMean(byzantine=1)"
        )
    wrong = {
        "eager=True: the own contribution acts at once as its part of a mean, and here nobody has one": rule.eager,
        "rda=True: lengths would be taken as peers claim them": rule.directional,
        f"{rule.feedback.description}: estimates add up to that of a mean only; use ErrorFeedback": rule.feedback.slots,
        f"weighting by {rule.weighting.description}: what peers claim must not buy influence; all count alike": (
            rule.weighting.description != "equal"
        ),
        "gather_wire: every contribution goes to every peer as it is, and no result travels": gather_wire is not None,
        'rotate=True with buffers="average": rotated buffers cannot be told from parameters': (
            buffers and rule.compression.rotate
        ),
    }
    for what, asked in wrong.items():
        if asked:
            raise ConfigurationError(f"{rule.robust.description} does not go with {what}")


def check_delay(delay: int, cadence: Cadence, fragments: int) -> None:
    """ConfigurationError if an exchange could not be over when the next one is to begin."""
    if not (isinstance(delay, int) and not isinstance(delay, bool) and (delay >= 0 or delay == WHOLE_ROUND)):
        raise ConfigurationError(f"sync_delay is {delay!r}: it must be a whole number of inner steps, at least 0")
    shortest = cadence.shortest
    if not shortest or delay <= 0:
        return
    if delay >= shortest:
        raise ConfigurationError(f"sync_delay is {delay}, sync_every {shortest:g}: sync_every must be above sync_delay")
    if delay > shortest // fragments:
        raise ConfigurationError(
            f"sync_delay is {delay}, but with {fragments} fragments an exchange begins every {shortest // fragments:g} "
            f"of sync_every={shortest:g} steps, and one is under way at a time: use fewer fragments or a shorter delay"
        )

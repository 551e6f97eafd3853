"""Error feedback: what a lossy wire loses of a contribution comes back in later ones.

A biased compressor that is used as it is stops the run short of the optimum: what it drops of the peers' vectors does
not cancel in their mean. Each method here keeps something private to a peer, the residual, and three of them need
nothing of the wire but that it is a contraction, ||C(x) - x||^2 <= (1 - d) ||x||^2, which all wires are
(`Compression.approximated`). With x a peer's pseudo-gradient and C(x) what the others get to see of it:

    ErrorFeedback  send p = decay e + x          e <- p - C(p)                             estimate: mean C(p)
                   (Seide et al., Interspeech 2014; Karimireddy et al., arXiv 1901.09847)
    EF21           send x - g_i                  g_i <- g_i + D, D = C(x - g_i)            estimate: g <- g + mean D
                   (Richtarik et al., arXiv 2106.05203)
    EControl       send eta e + x - h_i          h_i <- h_i + D, e <- e + x - h_i - D      estimate: h <- h + mean D
                   (Gao et al., arXiv 2311.05645; h_i on the right is that of before)

Classic feedback loses nothing over time, but keeps the noise of what the peers differ in. EF21 follows the mean
exactly once the peers' x settle, however much they differ. EControl does too, and averages noise as classic feedback.

**Rounds.** All functions are pure: a residual is never written, a new one is returned. `offered` may be called for an
attempt that aborts, again for the next, or for nothing. Only who learns that its offer is in a committed round replaces
its residual, by `counted`. So a round that aborts, is skipped, or leaves a peer out keeps its residual as it was, bit
for bit (a residual debited for a send that never counted is lost mass).

**Partial participation.** A peer that is left out keeps g_i (h_i, e) and its x as they were. The exchange gives the
mean over the contributors, by weight; `share` scales that to a mean over all who hold an estimate, as in EF21-PP
(Fatkhullin et al., arXiv 2110.03294). Without it the slot would drift from the estimates for good. What holds with it,
for EF21 and EControl, up to rounding:

- The slot is the mean of the peers' estimates, sum p_i g_i, as long as the p_i do not change: each peer has the same
  weight in every round that it is in, and `share` is the sum of the contributors' p_i (contributors / members, if all
  weigh the same). A weight by tokens that changes from round to round does not do.
- A peer that joins with `joined` leaves the mean where it is.
- When a member goes for good, its g_i stays in the slot, and nobody knows it. Nothing mends that by itself, and the
  estimate would stay off by as much. If everybody takes `rebased` at the same committed version, the slot is the mean
  again; the estimates then converge anew.
- The rounding of the second phase, in which the mean itself travels, is not fed back: it is in the slot and in nobody's
  g_i. It is as small as the differences that travel, but it adds up; f32 as gather wire avoids it, and `rebased`
  removes it.

The theory of EF21-PP draws the contributors at random; for peers that are left out because they are always slow, it
proves nothing. Classic feedback has no slot, needs none of the above, and loses only the residual of a member that
goes; where weights change from round to round, what is fed back counts by the weight of the round in which it is.

**Bits.** The slot and the estimate are replicated: one or two single-rounded float32 operations, each its own kernel
(docs/design.md, "Rules of a round", 9). Residuals are nobody else's, and no bit of theirs has to agree with anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch

from ..errors import CheckpointMismatch, ConfigurationError

_NAMES = ("error", "estimate")


class Compressor(Protocol):
    """A contraction. `Compression` is one; it must be that of the attempt which was committed: a round that cannot use
    its lossy wire travels as f32."""

    def approximated(self, x: torch.Tensor) -> torch.Tensor:
        """What the others get to see of x: a tensor of its length, or x itself."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """What one peer keeps to itself for one fragment. Flat float32 tensors of its length, not to be written, or None.

    error: what has not been sent yet (e). estimate: what the others believe that this peer's vector is (g_i, h_i).
    """

    error: torch.Tensor | None = None
    estimate: torch.Tensor | None = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors that are used, by name; the same memory."""
        named = ((name, getattr(self, name)) for name in _NAMES)
        return {name: tensor for name, tensor in named if tensor is not None}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor]) -> Residual:
        """The inverse of `state_dict`. CheckpointMismatch for other names or types, or different lengths."""
        unknown = sorted(set(state) - set(_NAMES))
        if unknown:
            raise CheckpointMismatch(f"a residual has {' and '.join(_NAMES)}, not {', '.join(unknown)}")
        for name, tensor in state.items():
            if tensor.dtype is not torch.float32 or tensor.dim() != 1:
                raise CheckpointMismatch(f"residual {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not flat")
        if len({tensor.numel() for tensor in state.values()}) > 1:
            raise CheckpointMismatch("the parts of a residual have different lengths")
        return cls(**state)


class Feedback(Protocol):
    """How losses are fed back. Vectors are flat float32 CPU tensors of the fragment's length; none is changed."""

    @property
    def description(self) -> str:
        """For the run's contract: peers that differ in it must not exchange."""
        ...

    @property
    def slots(self) -> int:
        """Replicated vectors in the outer state, 0 or 1. A slot begins with zeros."""
        ...

    def residual(self, elements: int) -> Residual:
        """That of a peer which is there when the slot is zeros."""
        ...

    def joined(self, elements: int, slot: torch.Tensor | None) -> Residual:
        """That of a peer which begins later, at a version with this slot. It may share the slot's memory."""
        ...

    def rebased(self, residual: Residual, slot: torch.Tensor | None) -> Residual:
        """After a member has gone for good: see above. For all peers at the same version, or for none."""
        ...

    def offered(self, residual: Residual, x: torch.Tensor) -> torch.Tensor:
        """What to compress and send for the pseudo-gradient x; it may be x itself."""
        ...

    def counted(self, residual: Residual, offered: torch.Tensor, x: torch.Tensor, compressor: Compressor) -> Residual:
        """The residual after a committed round that has `offered`, made from this residual and x, in it."""
        ...

    def combined(
        self, mean: torch.Tensor, slot: torch.Tensor | None, *, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Replicated: (estimate of the mean pseudo-gradient, new slot), for the mean of what the contributors offered.

        They may be the same tensor. share: of the members' weights, that of the contributors; the same for everyone.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NoFeedback:
    """What the wire loses is lost."""

    slots: ClassVar[int] = 0

    @property
    def description(self) -> str:
        return "none"

    def residual(self, elements: int) -> Residual:
        return Residual()

    def joined(self, elements: int, slot: torch.Tensor | None) -> Residual:
        return Residual()

    def rebased(self, residual: Residual, slot: torch.Tensor | None) -> Residual:
        return residual

    def offered(self, residual: Residual, x: torch.Tensor) -> torch.Tensor:
        return x

    def counted(self, residual: Residual, offered: torch.Tensor, x: torch.Tensor, compressor: Compressor) -> Residual:
        return residual

    def combined(
        self, mean: torch.Tensor, slot: torch.Tensor | None, *, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return mean, None


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorFeedback:
    """Classic: what was lost is added to the next vector.

    decay: what is kept of it, above 0 up to 1. With 1 nothing is ever lost: what was seen, added up, and the residual
    make the sum of all x. Below 1 old errors fade, which helps where they are stale by the time that they are sent.
    """

    decay: float = 1.0
    slots: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ConfigurationError(f"decay is {self.decay}: it must be above 0 and at most 1, which loses nothing")

    @property
    def description(self) -> str:
        return f"ErrorFeedback(decay={self.decay})"

    def residual(self, elements: int) -> Residual:
        return Residual(error=torch.zeros(elements))

    def joined(self, elements: int, slot: torch.Tensor | None) -> Residual:
        return self.residual(elements)

    def rebased(self, residual: Residual, slot: torch.Tensor | None) -> Residual:
        return residual

    def offered(self, residual: Residual, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(_held(residual.error), self.decay).add_(x)

    def counted(self, residual: Residual, offered: torch.Tensor, x: torch.Tensor, compressor: Compressor) -> Residual:
        return Residual(error=offered - compressor.approximated(offered))

    def combined(
        self, mean: torch.Tensor, slot: torch.Tensor | None, *, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return mean, None


@dataclass(frozen=True, slots=True, kw_only=True)
class EF21:
    """Every peer sends how its vector differs from what the others believe it to be."""

    slots: ClassVar[int] = 1

    @property
    def description(self) -> str:
        return "EF21"

    def residual(self, elements: int) -> Residual:
        return Residual(estimate=torch.zeros(elements))

    def joined(self, elements: int, slot: torch.Tensor | None) -> Residual:
        return Residual(estimate=_held(slot))

    def rebased(self, residual: Residual, slot: torch.Tensor | None) -> Residual:
        return Residual(estimate=_held(slot))

    def offered(self, residual: Residual, x: torch.Tensor) -> torch.Tensor:
        return x - _held(residual.estimate)

    def counted(self, residual: Residual, offered: torch.Tensor, x: torch.Tensor, compressor: Compressor) -> Residual:
        return Residual(estimate=_held(residual.estimate) + compressor.approximated(offered))

    def combined(
        self, mean: torch.Tensor, slot: torch.Tensor | None, *, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _moved(slot, mean, share)


@dataclass(frozen=True, slots=True, kw_only=True)
class EControl:
    """EF21 whose differences carry a part of the classic residual, so that the noise of single rounds averages out.

    eta: how much of it. Near 0 it is EF21. It must be well below the compressor's d: on quadratics with the largest of
    ten numbers as compressor (d = .1), .05 to .1 converge as EF21 does, and .3 diverges. Hence ConfigurationError
    above .2, or not above 0.
    """

    eta: float = 0.05
    slots: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 0.2:
            raise ConfigurationError(
                f"eta is {self.eta}: it must be above 0 (there it is EF21) and at most 0.2: 0.3 was measured to diverge"
            )

    @property
    def description(self) -> str:
        return f"EControl(eta={self.eta})"

    def residual(self, elements: int) -> Residual:
        return Residual(error=torch.zeros(elements), estimate=torch.zeros(elements))

    def joined(self, elements: int, slot: torch.Tensor | None) -> Residual:
        return Residual(error=torch.zeros(elements), estimate=_held(slot))

    def rebased(self, residual: Residual, slot: torch.Tensor | None) -> Residual:
        return Residual(error=residual.error, estimate=_held(slot))

    def offered(self, residual: Residual, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(_held(residual.error), self.eta).add_(x).sub_(_held(residual.estimate))

    def counted(self, residual: Residual, offered: torch.Tensor, x: torch.Tensor, compressor: Compressor) -> Residual:
        seen, estimate = compressor.approximated(offered), _held(residual.estimate)
        error = (x - estimate).sub_(seen).add_(_held(residual.error))
        return Residual(error=error, estimate=estimate + seen)

    def combined(
        self, mean: torch.Tensor, slot: torch.Tensor | None, *, share: float = 1.0
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return _moved(slot, mean, share)


def _moved(slot: torch.Tensor | None, mean: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """By the bit rule. Times 1 leaves every bit, so that everyone may skip it."""
    step = mean if share == 1 else torch.mul(mean, share)
    moved = torch.add(_held(slot), step)
    return moved, moved


def _held(tensor: torch.Tensor | None) -> torch.Tensor:
    """ValueError if a residual of another method, or no slot, was given."""
    if tensor is None:
        raise ValueError("this residual, or the outer state, is of another error feedback: it lacks what is needed")
    return tensor

"""How much a contribution counts against the others in a round. Only ratios matter, since a mean divides by the sum;
but for `absolute` weightings, where a round counts as much as all weights in it together, over the number of peers.

tokens, steps: trained since this peer last contributed to the fragment. missed: rounds of it that went on meanwhile.

| weighting | weight | source |
|---|---|---|
| `Tokens` (default) | tokens | rule 5 of docs/design.md; with equal speeds, all equal |
| `Equal` | 1 | DiLoCo's mean |
| `FedBuff` | tokens / sqrt(1 + missed) | arXiv 2106.06639, section 5: s(tau) |
| `FedFix` | 1 + missed, absolute | arXiv 2206.10189: the inverse of how often a peer of this speed takes part |
| `Throughput` | tokens * tokens / steps | Decoupled DiLoCo, arXiv 2604.21428 |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Weighting(Protocol):
    @property
    def description(self) -> str: ...

    @property
    def absolute(self) -> bool: ...

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        """0 for who has trained on nothing."""


@dataclass(frozen=True, slots=True)
class Tokens:
    description = "tokens"
    absolute = False

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        return tokens


@dataclass(frozen=True, slots=True)
class Equal:
    description = "equal"
    absolute = False

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        return 1.0 if tokens > 0 else 0.0


@dataclass(frozen=True, slots=True)
class FedBuff:
    description = "FedBuff"
    absolute = False

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        return tokens / math.sqrt(1 + missed)


@dataclass(frozen=True, slots=True)
class FedFix:
    """A mean over who has contributed leans towards the fast peers' data; so added up over rounds, all pull alike."""

    description = "FedFix"
    absolute = True

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        return 1.0 + missed if tokens > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Throughput:
    description = "throughput"
    absolute = False

    def weight(self, tokens: float, steps: int, missed: int) -> float:
        return tokens * tokens / max(steps, 1)

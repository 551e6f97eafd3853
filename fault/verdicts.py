"""What the detector says: what is wrong, whose it is, since when, and by which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SENDER, RECEIVER, NODE, LINK = "slow sender", "slow receiver", "slow node", "slow link"
AMBIGUOUS, STRAGGLER, GRADIENT = "slow, ambiguous", "slow peer", "bad gradient"
CRASH, SILENT, CUT, CORRUPT = "crash", "silent", "cut", "corrupt frames"
FLAPPING, DRIFTED = "flapping", "drifted state"
HANG, STALLED = "hang outside communication", "hang in communication"
DISK, CLOCK = "disk full", "clock jump"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """kind: the class. culprits: the peer; of a link, its sender and receiver; of what is ambiguous, the candidates: it
    may be that sender, that receiver, or the link between them. A "silent" peer is not heard of: frozen, or cut off
    from the coordinator; if its witness tells which, it is one of the hangs. "cut" are two peers that cannot reach one
    another. since: seconds of the observer's clock.
    confidence: from 0 to 1. evidence: the numbers behind it, by name.
    """

    kind: str
    culprits: tuple[str, ...]
    since: float
    confidence: float
    evidence: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, tuple[str, ...]]:
        return self.kind, self.culprits


def confidence(deviations: float, threshold: float) -> float:
    """1/2 at the threshold, towards 1 with the distance from it: not a probability, but in the order of one."""
    return deviations / (deviations + threshold) if deviations > 0 else 0.0

"""How much of the time accelerators compute, by a model of links and steps: for planning, and to compare with.

An exchange that begins with one inner step and is applied tau steps later has tau step times to finish in; what it
takes longer, training stands still, as it does while a contribution is made and a result applied:

    exchange  =  (M - 1) / M  x  n / P numbers  x  (bits there + bits back)  /  bandwidth  +  latency
    stall     =  max(0, exchange - tau x step time)
    utilisation  =  H x step time / (H x step time + P x (stall + busy))

This is the reading of Streaming DiLoCo (Douillard et al., arXiv 2501.18512), whose table of the bandwidth that a
utilisation needs comes from a simulator: up to 90 % the formula is within a third of it, but for fragments without
overlap, which the formula has cost as much as the whole. Exchanges overlap with nothing but steps here: for data
parallel training (H = 1, P = 1, tau = 0) that is too strict where the backward pass hides a part of the reduction.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cadence import WHOLE_ROUND


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """numbers: of the model (n), exchanged in `fragments` parts (P) every `sync_every` steps (H) among `peers` (M).

    bandwidth: bits a second of a peer's access, each way, of which a direct exchange uses all. bits: of a number on its
    way to be summed, and on its way back. delay: tau, or WHOLE_ROUND. latency: seconds of an exchange in which nothing
    is carried. busy: seconds of the training thread that an exchange costs in any case.
    """

    numbers: float
    peers: int
    bandwidth: float
    step_seconds: float
    sync_every: int
    fragments: int = 1
    delay: int = 0
    bits: tuple[float, float] = (32.0, 32.0)
    latency: float = 0.0
    busy: float = 0.0

    @property
    def exchanged_bits(self) -> float:
        """Of one fragment, that each peer sends."""
        return (self.peers - 1) / self.peers * self.numbers / self.fragments * sum(self.bits)

    @property
    def exchange_seconds(self) -> float:
        return self.exchanged_bits / self.bandwidth + self.latency

    @property
    def hidden_seconds(self) -> float:
        """Of training beside an exchange."""
        steps = self.sync_every / self.fragments if self.delay == WHOLE_ROUND else self.delay
        return steps * self.step_seconds

    @property
    def stall_seconds(self) -> float:
        return max(0.0, self.exchange_seconds - self.hidden_seconds)

    @property
    def utilisation(self) -> float:
        computing = self.sync_every * self.step_seconds
        return computing / (computing + self.fragments * (self.stall_seconds + self.busy))

    def bandwidth_for(self, utilisation: float) -> float:
        """Bits a second with which this utilisation, below 1, is reached; infinite if latency alone prevents it."""
        stall = self.sync_every * self.step_seconds * (1 / utilisation - 1) / self.fragments
        left = self.hidden_seconds + stall - self.busy - self.latency
        return self.exchanged_bits / left if left > 0 and stall >= self.busy else float("inf")

"""What peers report of themselves, for the detector: plain values, small enough to ride on a heartbeat.

All durations are measured on one host, by its own clock; none is the difference of two hosts' clocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """How long another peer's own numbers took to come here, in one operation, from when everyone was ready."""

    peer: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Gave:
    """This peer's contribution to a round of an outer loop.

    norm: of what it sent; -1 if that was no number, and was not sent. cosine: to the mean of the others', 0.0 if there
    were none (`gradients.cosine_to_others`). version: that the round led to, or would have led to.
    """

    tag: str
    version: int
    norm: float
    cosine: float

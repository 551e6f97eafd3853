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
    were none (`gradients.cosine_to_others`). version: that the round led to, or would have led to. steps: inner steps
    behind it; 0: not known.
    """

    tag: str
    version: int
    norm: float
    cosine: float
    steps: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """What the thread that trains is at.

    steps: inner steps of this life. usual_seconds: of one of them, the median lately. idle_seconds: since the last, or
    since it last waited for others, whichever is later. waiting: it waits for others just now (a round, a lease, a
    state, a checkpoint), evaluates, or does not train: it is not its fault that it makes no step.
    """

    steps: int = 0
    usual_seconds: float = 0.0
    idle_seconds: float = 0.0
    waiting: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchanged:
    """Where the time of a peer's exchanges has gone, those of this life together; seconds of its own clock.

    attempts: that succeeded. ready_seconds: from when it had entered until everyone had. reduce_seconds: of summing.
    blocked_seconds: of its senders, most of it waiting for the kernel. data_seconds: of waiting for the slowest link,
    from when everyone was ready.
    """

    attempts: int = 0
    seconds: float = 0.0
    ready_seconds: float = 0.0
    reduce_seconds: float = 0.0
    blocked_seconds: float = 0.0
    data_seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    """How the process and its machine are. 0: not known.

    memory_bytes: resident. gpu_bytes: of a CUDA device's memory, reserved by torch. disk_free, disk_bytes: of the
    fullest of the disks that this peer writes to (events, checkpoints). disk_refused: a write failed for want of room,
    so many times. clock: seconds of the wall clock minus those of the monotonic one.
    """

    memory_bytes: int = 0
    gpu_bytes: int = 0
    disk_free: int = 0
    disk_bytes: int = 0
    disk_refused: int = 0
    clock: float = 0.0

"""What a peer tells of itself with its heartbeats, for the detector: collected by any thread, in bounded buffers."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from collectives.records import OperationRecord, Start
from fault.gradients import cosine_to_others
from fault.records import Crossing, Gave

MOST = 256  # of each kind, between two heartbeats; of more, the newest
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class TelemetryStatistics:
    """seconds: of processor time that collecting took, in all. dropped: what was more than one heartbeat takes."""

    seconds: float
    dropped: int


class Telemetry:
    """Thread-safe. What has been taken for a heartbeat is forgotten: if that gets lost, so are a few measurements."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._crossings: deque[Crossing] = deque(maxlen=MOST)
        self._steps: deque[float] = deque(maxlen=MOST)
        self._gave: deque[Gave] = deque(maxlen=MOST)
        self._seconds, self._dropped = 0.0, 0

    def operated(self, record: OperationRecord) -> None:
        """An attempt has succeeded."""
        with self._accounted():
            for link in record.links:
                if link.own_bytes:
                    crossing = Crossing(peer=link.peer, bytes=link.own_bytes, seconds=link.own_seconds)
                    self._keep(self._crossings, crossing)

    def stepped(self, seconds: float) -> None:
        """An inner step took so long."""
        with self._accounted():
            self._keep(self._steps, seconds)

    def refused(self, tag: str, version: int) -> None:
        """What this peer has learned is no number."""
        with self._accounted():
            self._keep(self._gave, Gave(tag=tag, version=version, norm=-1.0, cosine=0.0))

    def contributed(self, tag: str, version: int, sent: torch.Tensor, mean: torch.Tensor, share: float) -> None:
        """A round was committed. sent, mean: flat, as they travelled. share: this peer's part of the mean's weight."""
        with self._accounted():
            norm, mean_norm, product = _products(sent, mean)
            cosine = cosine_to_others(norm, mean_norm, product, share) if share < 1 else 0.0
            self._keep(self._gave, Gave(tag=tag, version=version, norm=norm, cosine=cosine))

    def take(self) -> dict[str, Any]:
        """The fields of a heartbeat."""
        with self._accounted(), self._lock:
            crossings, steps, gave = tuple(self._crossings), list(self._steps), tuple(self._gave)
            for kept in (self._crossings, self._steps, self._gave):
                kept.clear()
        return {"crossings": crossings, "step_seconds": statistics.median(steps) if steps else 0.0, "gave": gave}

    def statistics(self) -> TelemetryStatistics:
        return TelemetryStatistics(self._seconds, self._dropped)

    def _keep(self, kept: deque[Any], one: object) -> None:
        with self._lock:
            self._dropped += len(kept) == MOST
            kept.append(one)

    @contextmanager
    def _accounted(self) -> Iterator[None]:
        began = time.thread_time()
        yield
        self._seconds += time.thread_time() - began


def share_of(start: Start, name: str) -> float:
    """Which part of the weight of this attempt's mean the contributor has."""
    names = [member.name for member in start.contributors]
    total = sum(start.multipliers)
    return start.multipliers[names.index(name)] / total if name in names and total > 0 else 0.0


def _products(sent: torch.Tensor, mean: torch.Tensor) -> tuple[float, float, float]:
    """Both norms and the inner product, piece by piece: a float32 sum over all would lose digits."""
    squares = [0.0, 0.0, 0.0]
    for one, other in zip(torch.split(sent, _PIECE), torch.split(mean, _PIECE), strict=True):
        for i, (a, b) in enumerate(((one, one), (other, other), (one, other))):
            squares[i] += float(torch.dot(a, b))
    return squares[0] ** 0.5, squares[1] ** 0.5, squares[2]

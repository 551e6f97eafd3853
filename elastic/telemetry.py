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
from fault.records import Crossing, Exchanged, Gave, Trainer

from .vitals import Vitals
from .witness import BEAT, BYTES, EXCHANGES, STEPPED, Page, page_of

MOST = 256  # of each kind, between two heartbeats; of more, the newest
USUAL = 31  # steps of which the median is the usual one
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class TelemetryStatistics:
    """seconds: of processor time that collecting took, in all. dropped: what was more than one heartbeat takes. beats,
    beat_bytes, beat_seconds: heartbeats made, their size, and the processor time of making them, all that they carry
    included. witness_seconds: of processor time that the witness has used.
    """

    seconds: float
    dropped: int
    beats: int = 0
    beat_bytes: int = 0
    beat_seconds: float = 0.0
    witness_seconds: float = 0.0


class Activity:
    """What the thread that trains is at, and the exchanges. Thread-safe, and marked in the page for the witness.

    The thread that trains is the one that began a loop, or made the last step. What others do in the background says
    nothing of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.page = page_of(bytearray(BYTES))
        self._loops = self._waits = self._steps = self._exchanges = 0
        self._thread = 0
        self._moved_at = time.monotonic()
        self._recent: deque[float] = deque(maxlen=USUAL)
        self._usual: float | None = None

    def marked_in(self, page: Page) -> None:
        with self._lock:
            for place in (STEPPED, EXCHANGES):
                page[place] = self.page[place]
            self.page = page

    def beat(self, late: float) -> bool:
        """The heart beats; False if it has not for longer than `late` seconds: then nothing of this process went on,
        and that time says nothing of the thread that trains, nor of attempts that were under way before.
        """
        now, before = time.monotonic(), self.page[BEAT]
        self.page[BEAT] = now
        in_time = not before or now - before <= late
        if not in_time:
            with self._lock:
                self._moved_at = min(now, self._moved_at + now - before)
        return in_time

    def begin(self) -> None:
        """This thread trains from now on."""
        with self._lock:
            self._loops += 1
            self._thread, self._moved_at = threading.get_ident(), time.monotonic()

    def end(self) -> None:
        with self._lock:
            self._loops = max(0, self._loops - 1)

    def stepped(self, seconds: float, now: float) -> None:
        with self._lock:
            self._steps += 1
            self._thread, self._moved_at = threading.get_ident(), now
            self._recent.append(seconds)
            self._usual = None
        self.page[STEPPED] = now

    @contextmanager
    def waiting(self, *, whoever: bool = False) -> Iterator[None]:
        """This thread waits for others, or is busy with what is no step. whoever: even if it is not the one that
        trains, which then has nothing to train on.
        """
        counts = whoever or threading.get_ident() == self._thread
        with self._lock:
            self._waits += counts
        try:
            yield
        finally:
            with self._lock:
                self._waits -= counts
                if counts and not self._waits:
                    self._moved_at = time.monotonic()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """An attempt of an operation is carried out."""
        self._count_exchange(1)
        try:
            yield
        finally:
            self._count_exchange(-1)

    def _count_exchange(self, more: int) -> None:
        with self._lock:
            self._exchanges += more
            self.page[EXCHANGES] = float(self._exchanges)

    def trainer(self) -> Trainer:
        with self._lock:
            waiting = self._waits > 0 or self._loops == 0
            if self._usual is None:
                self._usual = statistics.median(self._recent) if self._recent else 0.0
            idle = 0.0 if waiting else time.monotonic() - self._moved_at
            return Trainer(steps=self._steps, usual_seconds=self._usual, idle_seconds=idle, waiting=waiting)


class Telemetry:
    """Thread-safe. What has been taken for a heartbeat is forgotten: if that gets lost, so are a few measurements.

    activity, vitals: what the peer is at, and how it is. exchanged: where the time of its attempts has gone.
    """

    def __init__(self) -> None:
        self.activity, self.vitals = Activity(), Vitals()
        self._lock = threading.Lock()
        self._crossings: deque[Crossing] = deque(maxlen=MOST)
        self._steps: deque[float] = deque(maxlen=MOST)
        self._gave: deque[Gave] = deque(maxlen=MOST)
        self._seconds, self._dropped = 0.0, 0
        self.exchanged = Exchanged()

    def operated(self, record: OperationRecord) -> None:
        """An attempt has succeeded."""
        with self._accounted():
            with self._lock:
                self.exchanged = _added(self.exchanged, record)
            for link in record.links:
                if link.own_bytes:
                    crossing = Crossing(peer=link.peer, bytes=link.own_bytes, seconds=link.own_seconds)
                    self._keep(self._crossings, crossing)

    def stepped(self, seconds: float) -> None:
        """An inner step took so long."""
        with self._accounted():
            now = time.monotonic()
            self._keep(self._steps, seconds)
            self.activity.stepped(seconds, now)
            self.vitals.stepped(now)

    def refused(self, tag: str, version: int) -> None:
        """What this peer has learned is no number."""
        with self._accounted():
            self._keep(self._gave, Gave(tag=tag, version=version, norm=-1.0, cosine=0.0))

    def contributed(
        self, tag: str, version: int, sent: torch.Tensor, mean: torch.Tensor, share: float, steps: int
    ) -> None:
        """A round was committed. sent, mean: flat, as they travelled. share: this peer's part of the mean's weight.
        steps: inner ones behind what was sent."""
        with self._accounted():
            norm, mean_norm, product = _products(sent, mean)
            cosine = cosine_to_others(norm, mean_norm, product, share) if share < 1 else 0.0
            self._keep(self._gave, Gave(tag=tag, version=version, norm=norm, cosine=cosine, steps=steps))

    def take(self) -> dict[str, Any]:
        """The fields of a heartbeat that say what happened since the last."""
        with self._lock:
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


def _added(sums: Exchanged, record: OperationRecord) -> Exchanged:
    return Exchanged(
        attempts=sums.attempts + 1,
        seconds=sums.seconds + record.seconds,
        ready_seconds=sums.ready_seconds + record.wait_ready_seconds,
        reduce_seconds=sums.reduce_seconds + record.reduce_seconds,
        blocked_seconds=sums.blocked_seconds + sum(link.send_blocked_seconds for link in record.links),
        data_seconds=sums.data_seconds + max((link.waited_seconds for link in record.links), default=0.0),
    )


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

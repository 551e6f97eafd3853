"""Faults on purpose, at an exact point of an exchange, for tests and demonstrations.

A fault is armed before the exchange, fires at most once, and writes that it did to a file before it strikes: so that a
test can assert that it fired, even though the process did not survive it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from collectives.records import Progress

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """Strike this process in the middle of an exchange.

    kind: "kill" (SIGKILL) or "freeze" (SIGSTOP). tag, round: which operation; the first one with at least this round.
    fraction: of the chunks that this peer is to receive, after which it strikes, in [0, 1).
    """

    kind: str
    tag: str
    round: int
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SIGNALS:
            raise ValueError(f"fault {self.kind!r} is not one of {', '.join(SIGNALS)}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}: it must be at least 0 and below 1")

    def due(self, progress: Progress) -> bool:
        """Whether the exchange has come to the point: part of the data has moved, and part has not."""
        at_round = progress.identity.tag == self.tag and progress.identity.round >= self.round
        moved = progress.chunks_received >= max(1, int(self.fraction * progress.chunks_expected))
        return at_round and moved and progress.chunks_received < progress.chunks_expected


def strike(injection: Injection, peer: str, log: Path) -> Callable[[Progress], None]:
    """Returns an `observe` hook for `collectives.Group` that carries out the injection once, noting it in `log`."""
    fired = False
    one_at_a_time = threading.Lock()  # several stripes receive at once: while one strikes, the others get no further

    def observe(progress: Progress) -> None:
        nonlocal fired
        with one_at_a_time:
            if fired or not injection.due(progress):
                return
            fired = True
            at = {"round": progress.identity.round, "at": asdict_progress(progress)}
            note(log, peer=peer, **asdict(injection) | at)
            os.kill(os.getpid(), SIGNALS[injection.kind])

    return observe


def asdict_progress(progress: Progress) -> dict[str, int]:
    return {
        "attempt": progress.identity.attempt,
        "chunks_received": progress.chunks_received,
        "chunks_expected": progress.chunks_expected,
    }


def note(log: Path, **fields: object) -> None:
    """Appends one `fault.injected` event, in one write that outlives this process.

    It is not synced to the disk: that takes so long that the exchange may be over before the fault strikes.
    """
    head = {"event": "fault.injected", "time_unix": time.time(), "monotonic": time.monotonic()}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(head | fields) + "\n")
        file.flush()

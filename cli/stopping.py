"""How a command that runs until it is told to stop hears of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def told_to_stop(*numbers: signal.Signals) -> Iterator[threading.Event]:
    """An event that these signals set; afterwards they do what they did before."""
    stop = threading.Event()
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

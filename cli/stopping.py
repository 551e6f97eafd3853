"""How a command that runs until it is told to stop hears of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from . import exits


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


class Signals:
    """What SIGINT, SIGTERM and SIGHUP do, by how far a command is that must leave nothing behind.

    At first nothing has been started: they end the process, with the code that `code_of` says. After `raise_once` the
    first one raises KeyboardInterrupt and leaves `interrupted` set, for a library may swallow the exception; all others
    are ignored, so that nothing disturbs the end. After `note_first` the first is only kept in `number`, and the second
    is what the first was.
    """

    def __init__(self, code_of: Callable[[int], int] = lambda number: exits.INTERRUPTED) -> None:
        self.interrupted = False
        self.number = 0
        self._set(lambda number, frame: os._exit(code_of(number)))

    def raise_once(self) -> None:
        """From here on; again after a library has put its own handlers there. Raises if one has come already."""
        if self.interrupted:
            self.ignore()
            raise KeyboardInterrupt
        self._set(self._interrupt)

    def note_first(self) -> None:
        self.raise_once()
        self._set(self._note)

    def ignore(self) -> None:
        self._set(signal.SIG_IGN)

    def check(self) -> None:
        if self.interrupted:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number:
            self._interrupt(number, frame)
        self.number = number

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self.number = self.number or number
        self.ignore()
        raise KeyboardInterrupt

    def _set(self, handler: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, handler)

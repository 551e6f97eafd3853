"""What a training script reports for the history of its run: kept here until somebody has taken it, each entry once."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ConfigurationError

MOST = 4096  # entries that wait to be taken; where nobody takes them, the newest so many


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """One entry. number: from 1 on, without a gap unless entries were dropped. round, step, loss: as the peer had last
    said by then; loss is NaN until there is one."""

    number: int
    round: int
    step: int
    loss: float
    time_unix: float
    metrics: dict[str, Any]


class Reports:
    """A bounded queue of entries, safe to use from several threads."""

    def __init__(self, most: int = MOST) -> None:
        self._waiting: deque[Reported] = deque(maxlen=most)
        self._lock = threading.Lock()
        self._number = 0

    def add(self, **fields: Any) -> None:
        """fields: of `Reported`, but for its number."""
        with self._lock:
            self._number += 1
            self._waiting.append(Reported(number=self._number, **fields))

    def after(self, number: int) -> tuple[Reported, ...]:
        """All that came after this entry; it and those before it have arrived, and are let go of."""
        with self._lock:
            while self._waiting and self._waiting[0].number <= number:
                self._waiting.popleft()
            return tuple(self._waiting)


def plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: text, truth values and whole numbers as they are, all else that float() takes as its number.

    Raises ConfigurationError.
    """
    try:
        return {_name(name): _value(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"cannot report metrics {metrics!r:.200}: {error}; give numbers by name") from None


def _name(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is no name")
    return name


def _value(value: Any) -> str | bool | int | float | None:
    return value if value is None or type(value) in (str, bool, int) else float(value)

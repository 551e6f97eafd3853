"""Who is slow, from how long the bytes of each pair took: a sender, a receiver, or one link between them.

A matrix of delays, one row for each sender and one column for each receiver, in logarithms: a slow sender raises its
whole row, a slow receiver its column, a slow link one cell (the rule of C4, arXiv 2406.04594, from secondary
sources). Rows and columns are told apart by Tukey's median polish,

    L[s, d]  =  level + row[s] + column[d] + rest[s, d]

which a few wild cells do not disturb. Polishing rows first favours rows where peers are few: both orders are averaged.

Links over a WAN differ by nature, so what is judged is L minus what is usual for that cell (`slowness.Slowness`).

A ring shows one cell of each row and column: then sender, receiver and link cannot be told apart, and the answer is
`Slow` with kind "ambiguous", all three as candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .robust import DEVIATIONS, FACTOR, deviation

Matrix = NDArray[np.float64]

ENOUGH = 2
"""Cells that a row and a column need, for sender, receiver and link to be told apart."""
_SWEEPS = 5
_PART = 0.8  # of FACTOR, in logarithms: what a whole row or column must be slow by
_MEDIAN_ERROR = 1.25  # the standard error of a median, over that of a mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Slow:
    """kind: "sender", "receiver", "node" (both), "link", or "ambiguous". culprits: the peer, or sender and receiver of
    the link; of what is ambiguous, sender and receiver of the cell. factor: times what is usual. deviations: from it.
    """

    kind: str
    culprits: tuple[str, ...]
    factor: float
    deviations: float


@dataclass(frozen=True, slots=True)
class Polished:
    level: float
    rows: Matrix
    columns: Matrix
    rest: Matrix

    @property
    def noise(self) -> float:
        """A robust standard deviation of the rest."""
        return deviation(self.rest[np.isfinite(self.rest)])


def polish(logs: Matrix) -> Polished:
    """Median polish of a matrix in which NaN stands for what was not seen."""
    one, other = _polished(logs, rows_first=True), _polished(logs, rows_first=False)
    rows, columns = (one[0] + other[0]) / 2, (one[1] + other[1]) / 2
    level = _middle(logs - rows[:, None] - columns[None, :])
    return Polished(level, rows, columns, logs - level - rows[:, None] - columns[None, :])


def _polished(logs: Matrix, *, rows_first: bool) -> tuple[Matrix, Matrix]:
    rest, effects = logs.copy(), [np.zeros(size) for size in logs.shape]
    for _ in range(_SWEEPS):
        for axis in (0, 1) if rows_first else (1, 0):
            middles = _middles(rest, axis=1 - axis)
            effects[axis] += middles
            rest -= np.expand_dims(middles, 1 - axis)
    return effects[0] - _middle(effects[0]), effects[1] - _middle(effects[1])


def _middle(values: Matrix) -> float:
    seen = values[np.isfinite(values)]
    return float(np.median(seen)) if seen.size else 0.0


def _middles(values: Matrix, axis: int) -> Matrix:
    """Medians of what was seen, of an even number the lower: of two cells, a wild one says nothing. 0 of nothing."""
    ordered = np.sort(values, axis=axis)  # what was not seen comes last
    last = np.maximum(np.isfinite(values).sum(axis=axis, keepdims=True) - 1, 0)
    return np.nan_to_num(np.take_along_axis(ordered, last // 2, axis=axis).squeeze(axis))


def slow_parts(logs: Matrix, names: Sequence[str]) -> tuple[Slow, ...]:
    """Who is slow. logs[s, d]: logarithm of the delay from s to d over what is usual for it; NaN: not seen.

    The order of names makes no difference, nor does a factor that all delays have in common. What is explained by a row
    or a column is not said again of its cells.
    """
    seen = np.isfinite(logs)
    told_apart = (seen.sum(axis=1, keepdims=True) >= ENOUGH) & (seen.sum(axis=0, keepdims=True) >= ENOUGH) & seen
    if not told_apart.any():
        return _ambiguous(logs, names)
    polished = polish(np.where(told_apart, logs, np.nan))
    noise = polished.noise
    senders = _hot(polished.rows, told_apart.sum(axis=1), noise)
    receivers = _hot(polished.columns, told_apart.sum(axis=0), noise)
    found = [_peer(i, names, senders, receivers) for i in sorted(senders.keys() | receivers.keys())]
    for s, d in zip(*np.nonzero(told_apart), strict=True):
        rest = float(polished.rest[s, d])
        if rest > np.log(FACTOR) and rest > DEVIATIONS * noise:
            found.append(_slow("link", (names[s], names[d]), rest, noise))
    rest_of = np.where(seen & ~told_apart, logs - polished.level, np.nan)
    return (*found, *_ambiguous(rest_of, names, 0.0, noise))


def _hot(effects: Matrix, cells: NDArray[np.int_], noise: float) -> dict[int, tuple[float, float]]:
    """Which rows, or columns, are slow: by how much, and the standard error of that."""
    errors = _MEDIAN_ERROR * noise / np.sqrt(np.maximum(cells, 1))
    hot = (effects > _PART * np.log(FACTOR)) & (effects > DEVIATIONS * errors) & (cells > 0)
    return {int(i): (float(effects[i]), float(errors[i])) for i in np.nonzero(hot)[0]}


def _peer(
    i: int, names: Sequence[str], senders: dict[int, tuple[float, float]], receivers: dict[int, tuple[float, float]]
) -> Slow:
    kind = "node" if i in senders and i in receivers else "sender" if i in senders else "receiver"
    effect, error = max(found[i] for found in (senders, receivers) if i in found)
    return _slow(kind, (names[i],), effect, error)


def _slow(kind: str, culprits: tuple[str, ...], effect: float, error: float) -> Slow:
    return Slow(kind=kind, culprits=culprits, factor=float(np.exp(effect)), deviations=effect / error)


def _ambiguous(logs: Matrix, names: Sequence[str], level: float | None = None, noise: float = 0.0) -> tuple[Slow, ...]:
    """Cells that stand alone in row or column, against all that was seen."""
    seen = logs[np.isfinite(logs)]
    if not seen.size:
        return ()
    level = float(np.median(seen)) if level is None else level
    noise = noise or deviation(seen)
    hot = np.nan_to_num(logs - level) > max(float(np.log(FACTOR)), DEVIATIONS * noise)
    cells = zip(*np.nonzero(hot), strict=True)
    return tuple(_slow("ambiguous", (names[s], names[d]), float(logs[s, d]) - level, noise) for s, d in cells)

"""Which layer may travel in how few bits, if all of them together are to lose no more than with one format for all?

L-GreCo (Alimohammadi et al., arXiv 2210.17357). For each layer l of what is to travel, and each format c, the error
that c makes and its size are measured; a dynamic program then finds the smallest total size for which

    sum over l of |G_l - C(G_l)|  <=  slack * the same sum with the static format in all layers.

Errors are rounded up to whole steps, of which the budget has 10 000, so that it is never exceeded. That alone could
miss the static choice, which fits exactly: so it is kept as a candidate. Unlike in the authors' code, errors are not
forced into 1..10 000 steps: a layer that loses nothing costs nothing, and a format that breaks the budget by itself is
never chosen.

Pure functions: whoever knows G decides, and tells the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from collectives.records import BLOCK, WireRun
from collectives.wires import WIRES, approximated

from ..errors import ConfigurationError
from ..tensors import gathered_in

ADJUST_ROUNDS = 10  # how many rounds a choice of formats is kept; the authors: every thousand steps or so
FORMATS = ("f32", "int8", "int4", "e3m0")
_GUARD = 1 + 1e-9  # errors are rounded up from a little above, so that no rounding of floats leads past the budget


def errors(flat: torch.Tensor, sizes: Sequence[int], formats: Sequence[str]) -> list[list[float]]:
    """|G_l - C_c(G_l)|, the Euclidean norm, for each layer l (a row) and format c.

    flat: float32, on the CPU. sizes: elements of each layer, one after the other. NonFinite for what a quantised wire
    cannot carry; ValueError if the layers are not all of `flat`.
    """
    _check_sizes(flat, sizes)
    return [[_error(layer, name) for name in formats] for layer in torch.split(flat.detach(), list(sizes))]


def _error(layer: torch.Tensor, name: str) -> float:
    if WIRES[name].lossless:
        return 0.0
    return float(torch.linalg.vector_norm(layer - approximated(name, layer), dtype=torch.float64))


def _check_sizes(flat: torch.Tensor, sizes: Sequence[int]) -> None:
    if min(sizes, default=0) < 0 or sum(sizes) != flat.numel():
        raise ValueError(f"layers have {sum(sizes)} elements together, and there are {flat.numel()}")


def choose(
    errors: Sequence[Sequence[float]],
    bits: Sequence[Sequence[int]],
    static: int,
    slack: float = 1.0,
    steps: int = 10_000,
) -> tuple[int, ...]:
    """The index of a format for each layer: the smallest total size whose total error is within the budget.

    errors, bits: of each layer (a row) in each format. static: index of the format that sets the budget, and whose size
    is never exceeded while slack is at least 1. slack: the budget, in errors of the static choice; more of it never
    gives a larger size. steps: how finely errors are told apart.

    ValueError if nothing fits, which takes a slack below 1 and no format that is exact enough, or for wrong arguments.
    """
    _check(errors, bits, static, slack, steps)
    uniform = (static,) * len(errors)
    budget = slack * _total(errors, uniform)
    found = _cheapest(_in_steps(errors, budget, steps), np.asarray(bits, dtype=np.float64), steps) if errors else ()
    fits = _total(errors, uniform) <= budget
    if fits and (found is None or _total(bits, found) > _total(bits, uniform)):
        return uniform
    if found is None:
        raise ValueError(f"no choice of formats has a total error within {budget:.3g}: raise slack, which is {slack}")
    return found


def _check(
    errors: Sequence[Sequence[float]], bits: Sequence[Sequence[int]], static: int, slack: float, steps: int
) -> None:
    shapes = {len(row) for row in (*errors, *bits)}
    if len(errors) != len(bits) or len(shapes) > 1 or not 0 <= static < min(shapes, default=static + 1):
        raise ValueError("errors and bits must have one row for each layer, with one entry for each format")
    if not all(math.isfinite(each) and each >= 0 for row in errors for each in row):
        raise ValueError("errors must be finite and not negative")
    if not (math.isfinite(slack) and slack >= 0 and steps > 0):
        raise ValueError(f"slack is {slack}, steps is {steps}: choose a finite slack of at least 0, and steps above 0")


def _total(table: Sequence[Sequence[float]], choice: Sequence[int]) -> float:
    return math.fsum(row[index] for row, index in zip(table, choice, strict=True))


def _in_steps(errors: Sequence[Sequence[float]], budget: float, steps: int) -> NDArray[np.int64]:
    """Errors in whole steps of the budget, rounded up; steps + 1 for what is beyond it."""
    exact = np.asarray(errors, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        scaled = np.ceil(exact / budget * steps * _GUARD)
    return np.where(exact == 0, 0, np.clip(scaled, 1, steps + 1)).astype(np.int64)


def _cheapest(costs: NDArray[np.int64], sizes: NDArray[np.float64], steps: int) -> tuple[int, ...] | None:
    """The choice of smallest size whose costs sum to at most `steps`, with the least cost among those; None: none is.

    least[b]: the smallest size of the layers so far at a cost of at most b, inf if there is none.
    """
    least = np.zeros(steps + 1)
    chosen = np.empty((len(costs), steps + 1), dtype=np.min_scalar_type(costs.shape[1]))
    for layer, (row, lengths) in enumerate(zip(costs, sizes, strict=True)):
        options = np.full((len(row), steps + 1), np.inf)
        for option, cost, length in zip(options, row, lengths, strict=True):
            if cost <= steps:
                np.add(least[: steps + 1 - cost], length, out=option[cost:])
        chosen[layer] = options.argmin(axis=0)
        least = options.min(axis=0)
    return _backtracked(chosen, costs, int(least.argmin())) if np.isfinite(least).any() else None


def _backtracked(chosen: NDArray[np.unsignedinteger], costs: NDArray[np.int64], at: int) -> tuple[int, ...]:
    found: list[int] = []
    for layer in reversed(range(len(costs))):
        found.append(int(chosen[layer, at]))
        at -= int(costs[layer, found[-1]])
    return tuple(reversed(found))


def plan(
    flat: torch.Tensor,
    sizes: Sequence[int],
    formats: Sequence[str] = FORMATS,
    static: str = "int4",
    slack: float = 1.0,
) -> tuple[WireRun, ...]:
    """In which wires the layers of `flat` (float32, on the CPU) should travel; neighbours that agree are one run.

    sizes: elements of each layer. A layer's bits are those of the way there and of the way back, which is in int8 after
    4 bits. Wires meet between blocks only, so layers are moved to the nearest blocks first; those that nothing is left
    of go with their neighbours. Errors, bits and the budget are of what results: just what will travel. Errors are
    of the way there; what int8 does to the sum on the way back is not counted.

    NonFinite, ValueError: as in `errors` and `choose`; or for a format that there is not.
    """
    _check_sizes(flat, sizes)
    layers, names = _in_blocks(sizes), list(formats)
    if static not in names or not set(names) <= WIRES.keys():
        raise ValueError(f"static {static!r} must be one of the formats {names}, and these of {sorted(WIRES)}")
    bits = [[8 * (WIRES[name].size(layer) + WIRES[_back(name)].size(layer)) for name in names] for layer in layers]
    choice = choose(errors(flat, layers, names), bits, names.index(static), slack)
    return tuple(
        WireRun(elements=sum(layer for layer, _ in run), wire=names[index], gather_wire=_back(names[index]))
        for index, run in groupby(zip(layers, choice, strict=True), key=lambda each: each[1])
    )


def _back(name: str) -> str:
    return gathered_in(name) or name


def _in_blocks(sizes: Sequence[int]) -> list[int]:
    """The layers, cut at the nearest multiples of BLOCK; those that nothing is left of are left out."""
    ends = list(accumulate(sizes))
    cuts = [min((end + BLOCK // 2) // BLOCK * BLOCK, ends[-1]) for end in ends[:-1]]
    return [stop - start for start, stop in pairwise((0, *cuts, *ends[-1:])) if stop > start]


class Allotting:
    """The plans of one peer, for each fragment: made from its own contribution, and kept for a few rounds.

    wire: the static format. slack: of the budget. Raises ConfigurationError for what cannot be.
    """

    def __init__(self, wire: str, slack: float) -> None:
        if wire not in FORMATS or wire == "f32" or not slack >= 1:
            raise ConfigurationError(
                f"error_budget is {slack} with wire {wire!r}: it must be at least 1, with wire int8, int4 or e3m0"
            )
        self._wire, self._slack = wire, slack
        self._plans: dict[int, tuple[WireRun, ...]] = {}
        self._used: dict[int, int] = {}

    def wires(self, fragment: int, payload: torch.Tensor, sizes: Sequence[int]) -> tuple[WireRun, ...]:
        """For the next round of the fragment. payload: what this peer sends, finite; sizes: of its layers."""
        used = self._used.get(fragment, ADJUST_ROUNDS)
        if used >= ADJUST_ROUNDS:
            self._plans[fragment], used = plan(payload, sizes, static=self._wire, slack=self._slack), 0
        self._used[fragment] = used + 1
        return self._plans[fragment]

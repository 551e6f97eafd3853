"""How a model is cut into fragments: which parameters are exchanged together (arXiv 2501.18512, section 2.2).

A unit is a layer (all parameters below one numbered module, such as `blocks.3`) or, outside of those, one module with
parameters of its own (an embedding, a head). Units are never divided.

| cut | layers | everything else |
|---|---|---|
| strided (the paper's default) | p, p + P, p + 2P, ... | largest first, to the fragment with the fewest bytes |
| sequential | consecutive units in the model's order, of about equal bytes | in that order, too |
| balanced (Decoupled DiLoCo) | | single parameters, largest first, to the fragment with the fewest bytes |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..errors import ConfigurationError

Named = tuple[str, tuple[int, ...]]
CUTS = ("strided", "sequential", "balanced")


def cut(named: Sequence[Named], fragments: int, how: str = "strided") -> tuple[tuple[int, ...], ...]:
    """For each fragment, the indices of its entries in `named`, ascending. A pure function of names and shapes.

    Raises ConfigurationError for an unknown way, or for more fragments than units.
    """
    if how not in CUTS:
        raise ConfigurationError(f"fragments cannot be cut {how!r}: choose one of {', '.join(CUTS)}")
    units = [(str(i), [i]) for i in range(len(named))] if how == "balanced" else _units(named)
    if not 1 <= fragments <= len(units):
        what = "parameters" if how == "balanced" else "layers"
        raise ConfigurationError(f"fragments is {fragments}: this model has {len(units)} {what} to make them of")
    sizes = [sum(math.prod(named[i][1]) for i in members) for _, members in units]
    chosen = _sequential(sizes, fragments) if how == "sequential" else _spread(units, sizes, fragments, how)
    return tuple(
        tuple(sorted(i for (_, members), home in zip(units, chosen, strict=True) if home == f for i in members))
        for f in range(fragments)
    )


def _units(named: Sequence[Named]) -> list[tuple[str, list[int]]]:
    """Units in the model's order, with the indices of what belongs to them."""
    units: dict[str, list[int]] = {}
    for index, (name, _) in enumerate(named):
        units.setdefault(_unit(name), []).append(index)
    return list(units.items())


def _unit(name: str) -> str:
    """`blocks.3.attention.weight` belongs to `blocks.3`, `embedding.weight` to `embedding`."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    return ".".join(parts[: number + 1]) if number is not None else ".".join(parts[:-1]) or name


def _spread(units: list[tuple[str, list[int]]], sizes: list[int], fragments: int, how: str) -> list[int]:
    """Layers by their place in the model, all others to whichever fragment has the least."""
    chosen = [-1] * len(units)
    load = [0] * fragments
    layers = [i for i, (unit, _) in enumerate(units) if how == "strided" and unit.split(".")[-1].isdecimal()]
    for place, unit in enumerate(layers):
        chosen[unit] = place % fragments
        load[place % fragments] += sizes[unit]
    for unit in sorted(set(range(len(units))) - {*layers}, key=lambda i: (-sizes[i], i)):
        empty = [f for f in range(fragments) if f not in chosen]
        home = min(empty or range(fragments), key=lambda f: (load[f], f))
        chosen[unit] = home
        load[home] += sizes[unit]
    return chosen


def _sequential(sizes: list[int], fragments: int) -> list[int]:
    """Consecutive stretches whose ends are nearest to equal parts of all bytes; none is empty."""
    total, before = sum(sizes), 0
    chosen, fragment = [], 0
    for index, size in enumerate(sizes):
        left, needed = len(sizes) - index, fragments - fragment - 1
        full = (before + size / 2) * fragments > total * (fragment + 1)
        begun = fragment in chosen
        if begun and needed and (full or left == needed) and left >= needed:
            fragment += 1
        chosen.append(fragment)
        before += size
    return chosen

"""Whether the nodes of a Ray have room for a number of peers, before any of them is started."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping


def shortage(needs: Mapping[str, float], peers: int, nodes: Iterable[Mapping[str, float]]) -> str:
    """What is missing for so many peers that need this each, and what there is; "" if they fit."""
    needed = {name: amount for name, amount in needs.items() if amount > 0}
    nodes = list(nodes)
    room = sum(_fit(needed, node) for node in nodes) if needed else math.inf
    if room >= peers:
        return ""
    there = " and ".join(_amount(name, sum(node.get(name, 0.0) for node in nodes)) for name in needed)
    each = " and ".join(_amount(name, amount) for name, amount in needed.items())
    where = f" on {len(nodes)} nodes" if len(nodes) > 1 else ""
    wanted = f"{peers} peers need" if peers > 1 else "1 peer needs"
    return f"{wanted} {each} each; here is {there}{where}, which is room for {room}"


def _amount(name: str, amount: float) -> str:
    return f"{amount:g} {name}{'s' if name in ('CPU', 'GPU') and amount != 1 else ''}"


def _fit(needed: Mapping[str, float], node: Mapping[str, float]) -> int:
    # an amount that is a sum of tenths may fall short of a whole number by a last bit
    return min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in needed.items())

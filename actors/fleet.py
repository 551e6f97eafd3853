"""How many peers a run has room for, and whether it can go on with those it has: pure accounts of nodes and peers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

ABOVE_ZERO = 1e-6  # Ray counts in ten-thousandths
NAMES = {"CPU": "CPUs", "GPU": "GPUs"}
FIELDS = {"CPU": "cpus_per_peer", "GPU": "gpus_per_peer"}
_AMONG = re.compile(r"(!?)in\((.*)\)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A living node as Ray knows it. total, free: by the names of Ray's resources."""

    id: str
    address: str = ""
    total: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    free: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Need:
    """What one peer takes of a node: amounts by the names of Ray's resources, and what the node's labels must be."""

    amounts: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def held_by(self, node: Node) -> bool:
        """Whether the node is large enough when nothing else runs there."""
        large = all(node.total.get(name, 0.0) >= amount - ABOVE_ZERO for name, amount in self.amounts.items())
        return large and all(selected(node.labels.get(key), wish) for key, wish in self.labels.items())

    def __str__(self) -> str:
        labels = ", ".join(f"{key}={wish}" for key, wish in self.labels.items())
        return _listed(self.amounts) + (f" on a node with {labels}" if labels else "")


def selected(label: str | None, wish: str) -> bool:
    """Whether a label is what Ray's selector asks for: `value`, `!value`, `in(a,b)` or `!in(a,b)`."""
    among = _AMONG.fullmatch(wish)
    unwanted = among[1] == "!" if among else wish.startswith("!")
    values = [each.strip() for each in among[2].split(",")] if among else [wish.removeprefix("!")]
    return (label in values) != unwanted


def impossible(need: Need, nodes: Sequence[Node]) -> str:
    """Why no node could ever hold a peer, in one line; "" if one could."""
    if any(need.held_by(node) for node in nodes):
        return ""
    return f"no node can hold a peer: it needs {need}; {there(need, nodes)}. Add such a node, or {less(need)}"


def short(need: Need, nodes: Sequence[Node], *, found: int, fewest: int, seconds: float) -> str:
    """That too few peers have found room, in one line."""
    return (
        f"{found} of at least {fewest} peers have found room within {seconds:g} s: each needs {need}; "
        f"{there(need, nodes)}. Add nodes, free some, {less(need)}, fewer peers (num_peers), or wait longer "
        "(RunConfig(start_seconds=...))"
    )


def there(need: Need, nodes: Sequence[Node]) -> str:
    """What the nodes have of what a peer needs: the largest of them, and all together."""
    if not nodes:
        return "there is no node"
    largest = max(nodes, key=lambda node: _share(need, node))
    has = _listed({name: largest.total.get(name, 0.0) for name in need.amounts}, largest.free)
    if len(nodes) == 1:
        return f"the only node has {has}"
    total = {name: _sum(node.total.get(name, 0.0) for node in nodes) for name in need.amounts}
    free = {name: _sum(node.free.get(name, 0.0) for node in nodes) for name in need.amounts}
    return f"the largest of {len(nodes)} nodes has {has}, all together {_listed(total, free)}"


def less(need: Need) -> str:
    wanted = [FIELDS.get(name, f"resources[{name!r}]") for name in need.amounts] + ["labels"] * bool(need.labels)
    return f"ask for less in ScalingConfig ({', '.join(wanted)})"


def _share(need: Need, node: Node) -> tuple[float, float]:
    """By how much of a peer the node could hold at least, of what it has least of; then, of all."""
    shares = [min(1e9, node.total.get(name, 0.0) / amount) for name, amount in need.amounts.items() if amount > 0]
    return min(shares, default=0.0), sum(shares)


def _listed(amounts: Mapping[str, float], free: Mapping[str, float] | None = None) -> str:
    parts = []
    for name, amount in amounts.items():
        left = f" ({max(0.0, free.get(name, 0.0)):g} free)" if free is not None else ""
        parts.append(f"{amount:g} {NAMES.get(name, name)}{left}")
    return ", ".join(parts) or "nothing"


def _sum(amounts: Iterable[float]) -> float:
    return round(sum(amounts), 4)


# --- who can go on --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands. over: nobody is under way any more. lost: fewer than it needs can go on."""

    over: bool
    lost: bool


def stand(states: Sequence[str], fewest: int) -> Standing:
    """states: of all peers that the run may have; those that wait for room can go on, too."""
    failed = states.count("failed")
    lost = len(states) - failed < fewest
    return Standing(over=lost or all(state in ("finished", "failed") for state in states), lost=lost)


def endpoint(bind: str | None, nodes: Sequence[Node], own: str) -> tuple[str, str]:
    """Where the coordinator binds, and as which host others know it: on loopback if Ray has this one host.

    own: the address that Ray has for this node.
    """
    here = "127.0.0.1" if all(node.address == own for node in nodes) else own
    host, port = (bind or f"{here}:0").rsplit(":", 1)
    return f"tcp://{host}:{port}", here if host in ("0.0.0.0", "[::]", "*") else host

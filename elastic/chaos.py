"""How a peer and a coordinator come by faults on purpose (`fault.inject`): only if their script or environment asks.

`ELASTIC_CHAOS=DIR` has a process register in that folder and take orders from it (`fault.orders`, `elastic chaos`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fault.inject import Injector
from fault.orders import COORDINATOR, PEER, Station

from .errors import ConfigurationError

if TYPE_CHECKING:
    import torch

FOLDER = "ELASTIC_CHAOS"


def asked_for(env: Mapping[str, str], faults: Injector | None, name: str) -> Injector | None:
    """The injector of a process: its own, or one for the orders that it takes; None if it wants no faults."""
    if faults is not None:
        faults.peer = faults.peer or name
        return faults
    return Injector(name) if env.get(FOLDER) else None


def take_orders(
    env: Mapping[str, str], faults: Injector | None, *, name: str, run: str, incarnation: int, role: str = PEER
) -> Station | None:
    """Registers this process where its environment says; None if it says nothing. Raises ConfigurationError."""
    folder = env.get(FOLDER)
    if not folder or faults is None:
        return None
    if role == PEER and name == COORDINATOR:
        raise ConfigurationError(f"{FOLDER} is set, and there the name {name!r} is the coordinator's: choose another")
    try:
        return Station(Path(folder), faults, name=name, run=run, incarnation=incarnation, role=role)
    except OSError as error:
        raise ConfigurationError(f"{FOLDER}: {error}") from None


def tainted(faults: Injector | None, numbers: torch.Tensor) -> torch.Tensor:
    """A contribution as it goes out: `numbers` itself, or a copy that a fault has spoiled. Only floating point ones."""
    factor = faults.contribution() if faults is not None and numbers.is_floating_point() else None
    return numbers if factor is None else numbers * factor

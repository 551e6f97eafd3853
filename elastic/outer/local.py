"""What belongs to a peer and not to the run: its inner optimizer's state and random generators, on all its ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..checkpoints.portable import random_state, restore_random_state
from ..errors import CheckpointMismatch
from ..ranks import Alone
from .state import is_sharded


class Local:
    """Reads and writes it, on the leader, for a checkpoint.

    Where parameters are replicated among the ranks, so is the optimizer's state, and the leader's stands for all; where
    they are sharded, each rank's is kept, and fits the same number of ranks only.
    """

    def __init__(self, inner: torch.optim.Optimizer, ranks: Alone, tag: str) -> None:
        self._inner, self._ranks, self._tag = inner, ranks, tag
        self._sharded = any(is_sharded(parameter) for parameter in self._parameters())
        ranks.teach(f"{tag}/keep", lambda: ranks.gather(self._own()))
        ranks.teach(f"{tag}/restore", self._follow)

    def state(self) -> dict[str, Any]:
        """inner, random: of the leader; others: of the other ranks; shards: how many ranks share the parameters."""
        self._ranks.order(f"{self._tag}/keep")
        own, *others = self._ranks.gather(self._own())
        inner = own["inner"] if self._sharded else self._inner.state_dict()
        return {"inner": inner, "random": own["random"], "others": others, "shards": self._shards}

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state()`. Raises CheckpointMismatch for another number of shards, and what the optimizer
        raises for other parameters; then nothing changes.
        """
        shards = state.get("shards", 1)
        if shards != self._shards:
            raise CheckpointMismatch(f"the inner optimizer's state is in {shards} parts, here it is in {self._shards}")
        self._load(state["inner"])
        restore_random_state(state["random"])
        self._ranks.order(f"{self._tag}/restore")
        others = [*state.get("others", ()), *({} for _ in range(self._ranks.size))]
        self._ranks.scatter([{}, *others[: self._ranks.size - 1]])
        if not self._sharded:
            self._ranks.pass_on(state["inner"])

    @property
    def _shards(self) -> int:
        return self._ranks.size if self._sharded else 1

    def _own(self) -> dict[str, Any]:
        own = {"random": random_state()}
        return own | {"inner": self._parts()} if self._sharded else own

    def _follow(self) -> None:
        own = self._ranks.scatter()
        if "random" in own:
            restore_random_state(own["random"])
        self._load(own["inner"] if self._sharded else self._ranks.pass_on(None))

    # --- shards -------------------------------------------------------------------------------------------------------

    def _parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._inner.param_groups for parameter in group["params"]]

    def _parts(self) -> dict[str, Any]:
        """The optimizer's state with this rank's part of what is sharded."""
        return self._changed(self._inner.state_dict(), _part)

    def _load(self, inner: dict[str, Any]) -> None:
        self._inner.load_state_dict(self._changed(inner, _joined) if self._sharded else inner)

    def _changed(self, inner: dict[str, Any], change: Callable[[Any, torch.Tensor], Any]) -> dict[str, Any]:
        """With what is kept of each parameter changed."""
        parameters = self._parameters()
        state = {
            index: {name: change(value, parameters[index]) for name, value in each.items()}
            for index, each in inner["state"].items()
        }
        return inner | {"state": state}


def _part(value: Any, _: torch.Tensor) -> Any:
    return value.to_local() if isinstance(value, torch.Tensor) and is_sharded(value) else value


def _joined(value: Any, parameter: torch.Tensor) -> Any:
    """This rank's part of something that is sharded as its parameter is; anything else as it is."""
    if not (is_sharded(parameter) and isinstance(value, torch.Tensor) and value.shape == parameter.to_local().shape):
        return value
    return type(parameter).from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )

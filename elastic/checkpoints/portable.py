"""A peer's own state as plain values and tensors: what torch.load(weights_only=True) reads back, and nothing else."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..errors import ConfigurationError

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def portable(state: Any) -> Any:
    """A copy of a nested state that later steps do not change, and that a checkpoint can hold.

    Tensors of any dtype and device become CPU tensors with memory of their own; numpy arrays become tensors, numpy
    scalars Python numbers; mappings, lists and tuples keep their order. Raises ConfigurationError that names the place
    of anything else.
    """
    return _converted(state, "state", copy=True)


def checked(state: Any) -> Any:
    """As `portable`, without a copy of what is a CPU tensor with memory of its own already."""
    return _converted(state, "state", copy=False)


def _converted(value: Any, where: str, copy: bool) -> Any:
    if type(value) in _PLAIN:  # not a subclass: it would be pickled as itself
        return value
    match value:
        case torch.Tensor():
            return _tensor(value, copy)
        case np.ndarray() if value.dtype.kind in "biuf":
            return torch.from_numpy(value.copy())
        case np.generic() if type(value.item()) in _PLAIN:
            return value.item()
        case Mapping():
            return {_key(key, where): _converted(item, f"{where}[{key!r}]", copy) for key, item in value.items()}
        case list() | tuple():
            items = [_converted(item, f"{where}[{i}]", copy) for i, item in enumerate(value)]
            return items if isinstance(value, list) else tuple(items)
    raise ConfigurationError(
        f"{where} is a {type(value).__name__}: a checkpoint holds tensors, numbers, text, lists and dicts of them"
    )


def _tensor(value: torch.Tensor, copy: bool) -> torch.Tensor:
    tensor = value.detach()
    own = type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous()
    # a view is stored with all the memory that it looks at
    if own and not copy and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.to("cpu", copy=True).contiguous()


def _key(key: Any, where: str) -> Any:
    if type(key) in _PLAIN:
        return key
    raise ConfigurationError(f"{where} has a {type(key).__name__} as a key: use text or a number")


def random_state() -> dict[str, Any]:
    """Where the global random generators of Python, numpy, torch and, if there are any, CUDA devices stand."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    copy: dict[str, Any] = portable(state)
    return copy


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Sets the generators as `random_state()` found them; CUDA's only on as many devices as there were."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].numpy()}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])

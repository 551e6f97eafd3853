"""An inner optimizer's state as plain numbers, to be given to a joiner: nothing in it is ever unpickled.

    8 bytes   magic
    4 bytes   length of the header, little endian
    header    JSON: the optimizer's class and options, and for each trainable parameter, in the layout's order,
              [name, {key: [dtype, shape]}, {key: number}]; padded with blanks to a multiple of 4
    numbers   float32, all tensors end to end, in the header's order

Every field is checked against the joiner's own model before anything is taken over.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash

from collectives.transfer import as_bytes

from .state import Layout, is_sharded

MAGIC = b"elastic1"
HEAD = struct.Struct("<8sI")
KINDS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES = {kind: name for name, kind in KINDS.items()}
MOST_KEYS = 16
LONGEST_KEY = 64
HEADER_BYTES = 4096  # at most, and as much again for each parameter
WAYS = {"foreach", "fused", "capturable", "differentiable"}  # options that say how, not what, an optimizer computes

State = dict[str, Any]  # of one parameter


class Unfit(ValueError):
    """This optimizer's state cannot be given as plain numbers, or what came is not the state of such an optimizer."""


def pack(inner: torch.optim.Optimizer, layout: Layout) -> tuple[list[memoryview | torch.Tensor], str]:
    """What is to be served, a copy, and its xxh3-128. Raises Unfit."""
    described, flats = [], [torch.empty(0)]
    for name, parameter in learned(layout):
        tensors, numbers = _sorted(inner.state.get(parameter, {}), name)
        described.append([name, {key: [NAMES[t.dtype], list(t.shape)] for key, t in tensors.items()}, numbers])
        flats += [tensor.detach().to("cpu", torch.float32).reshape(-1) for tensor in tensors.values()]
    flat = torch.cat(flats)
    if not torch.isfinite(flat).all():
        raise Unfit("the optimizer's state holds what is no number")
    text = json.dumps(_identity(inner) | {"parameters": described}).encode()
    text += b" " * (-len(text) % 4)
    head = HEAD.pack(MAGIC, len(text)) + text
    digest = xxhash.xxh3_128(head)
    digest.update(as_bytes(flat))
    return [memoryview(head), flat], digest.hexdigest()


def install(data: memoryview, inner: torch.optim.Optimizer, layout: Layout) -> None:
    """Gives the optimizer the state that `pack` has made elsewhere. Raises Unfit; then nothing changes."""
    parameters = learned(layout)
    header, begin = _header(data, len(parameters))
    _check_identity(header, inner)
    described = _expect(header.get("parameters"), list, "parameters")
    if len(described) != len(parameters) or (len(data) - begin) % 4:
        raise Unfit(f"{len(described)} parameters in {len(data)} bytes: this model has {len(parameters)}")
    sizes = [_checked(each, name, p) for each, (name, p) in zip(described, parameters, strict=True)]
    if 4 * sum(sizes) != len(data) - begin:
        raise Unfit(f"{len(data) - begin} bytes for {sum(sizes)} numbers")
    flat = torch.frombuffer(data, dtype=torch.float32, offset=begin) if sum(sizes) else torch.empty(0)
    if not torch.isfinite(flat).all():
        raise Unfit("it holds what is no number")
    pieces = torch.split(flat, sizes)
    states = [_state(each, p, piece, inner) for each, (_, p), piece in zip(described, parameters, pieces, strict=True)]
    for (_, parameter), state in zip(parameters, states, strict=True):
        if state:
            inner.state[parameter] = state


def learned(layout: Layout) -> list[tuple[str, torch.Tensor]]:
    """The layout's trainable parameters by name, in its order. Raises Unfit for parameters that ranks share."""
    found = [(name, t) for part in layout.parts for (name, _), t in zip(part.named, part.tensors, strict=True)]
    found = [(name, tensor) for name, tensor in found if isinstance(tensor, torch.nn.Parameter)]
    if any(is_sharded(tensor) for _, tensor in found):
        raise Unfit("the parameters are sharded among the ranks")
    return found


def _identity(inner: torch.optim.Optimizer) -> dict[str, Any]:
    options = {key for group in inner.param_groups for key, value in group.items() if value is True} - WAYS
    return {"optimizer": type(inner).__name__, "options": sorted(options)}


def _sorted(state: Mapping[str, Any], name: str) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Tensors and numbers apart, by key. None is left out: optimizers write it for what they have not yet."""
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    others = {key: value for key, value in state.items() if key not in tensors and value is not None}
    for key, value in [*tensors.items(), *others.items()]:
        if value.dtype not in NAMES if isinstance(value, torch.Tensor) else type(value) not in (int, float):
            raise Unfit(f"{key} of {name} is neither floating point numbers nor one number")
    return dict(sorted(tensors.items())), dict(sorted(others.items()))


# --- what came --------------------------------------------------------------------------------------------------------


def _header(data: memoryview, parameters: int) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers begin."""
    if len(data) < HEAD.size:
        raise Unfit(f"{len(data)} bytes are no optimizer's state")
    magic, length = HEAD.unpack_from(data)
    begin = HEAD.size + length
    if magic != MAGIC or length % 4 or length > HEADER_BYTES * (1 + parameters) or begin > len(data):
        raise Unfit(f"it begins with {magic!r} and a header of {length} bytes")
    try:
        header = json.loads(bytes(data[HEAD.size : begin]))
    except (ValueError, RecursionError) as error:
        raise Unfit(f"its header is no JSON: {error}") from None
    return _expect(header, dict, "header"), begin


def _check_identity(header: dict[str, Any], inner: torch.optim.Optimizer) -> None:
    for what, ours in _identity(inner).items():
        if header.get(what) != ours:
            raise Unfit(f"its {what} is {str(header.get(what))[:LONGEST_KEY]!r}, this peer's {ours!r}")


def _checked(described: Any, name: str, parameter: torch.Tensor) -> int:
    """How many numbers it announces for one parameter."""
    entry = _expect(described, list, name)
    if len(entry) != 3 or entry[0] != name:
        raise Unfit(f"it does not describe {name}")
    tensors, numbers = _expect(entry[1], dict, name), _expect(entry[2], dict, name)
    if len(tensors) + len(numbers) > MOST_KEYS or any(len(key) > LONGEST_KEY for key in [*tensors, *numbers]):
        raise Unfit(f"too much about {name}")
    for key, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise Unfit(f"{key} of {name} is no number")
    return sum(_elements(each, parameter.numel(), f"{key} of {name}") for key, each in tensors.items())


def _elements(described: Any, most: int, what: str) -> int:
    """How many numbers a tensor of this description has: no more than its parameter has, or one."""
    described = _expect(described, list, what)
    kind, shape = described if len(described) == 2 else (None, None)
    whole = isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int and size >= 0 for size in shape)
    if not (isinstance(kind, str) and kind in KINDS and whole):
        raise Unfit(f"{what} is of no known kind")
    elements = math.prod(shape or ())
    if elements > max(1, most):
        raise Unfit(f"{what} has {elements} numbers for a parameter of {most}")
    return elements


def _expect(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise Unfit(f"{what} is no {kind.__name__}")
    return value


def _state(described: list[Any], parameter: torch.Tensor, flat: torch.Tensor, inner: torch.optim.Optimizer) -> State:
    _, tensors, numbers = described
    state: State = dict(numbers)
    for (key, (kind, shape)), piece in zip(tensors.items(), _pieces(tensors, flat), strict=True):
        home = parameter.device if shape or _counts_on_device(inner) else torch.device("cpu")
        state[key] = piece.clone().view(shape).to(home, KINDS[kind])
    return state


def _pieces(tensors: dict[str, list[Any]], flat: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(flat, [math.prod(shape) for _, shape in tensors.values()]) if tensors else ()


def _counts_on_device(inner: torch.optim.Optimizer) -> bool:
    """Where torch's optimizers keep their step counts."""
    return any(group.get("capturable") or group.get("fused") for group in inner.param_groups)

"""What stands in a checkpoint's files: a sealed manifest, and a safetensors file of flat vectors."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import xxhash

from .storage import CHUNK, Bytes

FORMAT = "elastic-checkpoint-1"
_ALIGNED = 64
T = TypeVar("T")

Parameters = tuple[tuple[str, tuple[int, ...]], ...]
"""Names and shapes, in the order in which they lie in a flat vector."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file that a manifest names. digest: xxh3-128 of its bytes."""

    name: str
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class Fragment:
    """momentum: how many numbers of it there are."""

    version: int
    state_hash: str
    parameters: Parameters
    momentum: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of parameters and of momentum."""
        return elements(self.parameters), self.momentum


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says about itself. time_unix: when it was written, in seconds. library: version of this one."""

    run: str
    tag: str
    algorithm: str
    fingerprint: str
    fragments: tuple[Fragment, ...]
    outer: DataFile
    run_state: bytes
    summary: dict[str, Any]
    time_unix: float
    writer: str
    library: str

    @property
    def identity(self) -> tuple[int, str]:
        """Number and hash of the whole state."""
        return identity([(fragment.version, fragment.state_hash) for fragment in self.fragments])


def elements(parameters: Parameters) -> int:
    return sum(math.prod(shape) for _, shape in parameters)


def identity(fragments: Sequence[tuple[int, str]]) -> tuple[int, str]:
    """Number and hash of a state, from the version and state hash of each fragment: of one fragment, its own.

    The number grows by one with each commit, whichever fragment that was of.
    """
    number = sum(version for version, _ in fragments)
    hashes = [state_hash for _, state_hash in fragments]
    return number, hashes[0] if len(hashes) == 1 else xxhash.xxh3_128_hexdigest("".join(hashes).encode())


def pieces(parts: Iterable[Bytes]) -> Iterator[Bytes]:
    """In short ones, to hash: that holds the interpreter's lock, which training needs."""
    return (part[start : start + CHUNK] for part in parts for start in range(0, len(part), CHUNK))


def digest_of(parts: Iterable[Bytes]) -> str:
    """xxh3-128 of all bytes, in order."""
    digest = xxhash.xxh3_128()
    for piece in pieces(parts):
        digest.update(piece)
    return digest.hexdigest()


def seal(body: Mapping[str, Any]) -> bytes:
    """JSON with a hash over itself, in the one form that `unseal` takes."""
    body = json.loads(json.dumps(body, allow_nan=False))  # keys become text before they are sorted
    digest = xxhash.xxh3_128_hexdigest(_render(body))
    return _render({**body, "digest": digest})


def unseal(data: bytes) -> dict[str, Any]:
    """The inverse of `seal`. Raises ValueError if a single byte differs."""
    try:
        body = json.loads(data)
    except ValueError:
        body = None
    if not isinstance(body, dict) or "digest" not in body:
        raise ValueError("is truncated or altered")
    del body["digest"]
    if seal(body) != data:
        raise ValueError("is altered: its content does not have the hash that it names")
    return body


def _render(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, indent=1, sort_keys=True).encode()


def header(sizes: Sequence[tuple[int, int]]) -> bytes:
    """What stands before the numbers in a safetensors file of these fragments: (parameters, momentum) of each.

    By hand, so that the state goes from memory to storage and back without a second copy of it, and so that reading
    compares the header instead of trusting it.
    """
    table, at = {}, 0
    for i, both in enumerate(sizes):
        for kind, size in zip(("parameters", "momentum"), both, strict=True):
            name = kind if len(sizes) == 1 else f"{kind}.{i}"
            table[name] = {"dtype": "F32", "shape": [size], "data_offsets": [at, at + 4 * size]}
            at += 4 * size
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return struct.pack("<Q", len(text)) + text


def body_of(manifest: Manifest) -> dict[str, Any]:
    return {**asdict(manifest), "format": FORMAT, "run_state": base64.b64encode(manifest.run_state).decode()}


def parse_manifest(body: dict[str, Any]) -> Manifest:
    if body.get("format") != FORMAT:
        raise ValueError(f"has format {body.get('format')!r}, this version reads {FORMAT!r}")
    try:
        run_state = base64.b64decode(get(body, "run_state", str), validate=True)
    except binascii.Error:
        raise ValueError("run_state is no base64") from None
    fragments = tuple(_parse_fragment(each) for each in get(body, "fragments", list))
    if not fragments:
        raise ValueError("names no fragment")
    names = ("run", "tag", "algorithm", "fingerprint", "writer", "library")
    return Manifest(
        **{name: get(body, name, str) for name in names},
        fragments=fragments,
        outer=parse_file(get(body, "outer", dict), r"outer-[0-9a-f]{16}\.safetensors"),
        run_state=run_state,
        summary=get(body, "summary", dict),
        time_unix=get(body, "time_unix", float),
    )


def _parse_fragment(body: Any) -> Fragment:
    parameters = []
    for each in get(body, "parameters", list):
        match each:
            case [str(name), [*shape]] if all(type(n) is int and n >= 0 for n in shape):
                parameters.append((name, tuple(shape)))
            case _:
                raise ValueError(f"{each!r} is no parameter")
    momentum = get(body, "momentum", int) if "momentum" in body else elements(tuple(parameters))
    if momentum < 0:
        raise ValueError(f"momentum has {momentum} numbers")
    return Fragment(get(body, "version", int), get(body, "state_hash", str), tuple(parameters), momentum)


def parse_file(body: Any, names: str) -> DataFile:
    file = DataFile(get(body, "name", str), get(body, "bytes", int), get(body, "digest", str))
    if not re.fullmatch(names, file.name):
        raise ValueError(f"names a file {file.name!r}")
    return file


def get(body: Any, key: str, kind: type[T]) -> T:
    """The value of a key. Raises ValueError if it is not there, or not of this kind."""
    value = body.get(key) if isinstance(body, dict) else None
    if type(value) is not kind:
        raise ValueError(f"{key} is not a {kind.__name__}")
    return value

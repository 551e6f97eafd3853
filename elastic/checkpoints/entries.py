"""One checkpoint, as it is read: verified, or refused with the name of the file that is wrong and the reason."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from collectives.transfer import as_bytes

from ..config import check_name
from ..errors import CheckpointMismatch
from ..outer.state import Version
from .manifest import (
    FORMAT,
    DataFile,
    Fragment,
    Manifest,
    digest_of,
    get,
    header,
    parse_file,
    parse_manifest,
    unseal,
)
from .storage import Folder

MANIFEST = "manifest.json"

_NAME = re.compile(r"v(\d{8,15})-([0-9a-f]{12})")
_PEER = re.compile(r"peer-(.+)\.json")
_MANIFEST_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Outer:
    """A checkpoint's outer state, read and verified."""

    entry: Entry
    manifest: Manifest
    versions: tuple[Version, ...]

    def parameters(self) -> dict[str, torch.Tensor]:
        """The model's parameters by name, in their shapes, float32."""
        named = {}
        for version, fragment in zip(self.versions, self.manifest.fragments, strict=True):
            pieces = torch.split(version.parameters, [math.prod(shape) for _, shape in fragment.parameters])
            for (name, shape), piece in zip(fragment.parameters, pieces, strict=True):
                named[name] = piece.view(shape)
        return named


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a checkpoint, or a peer's part of it, is not used. file: the one that is wrong."""

    checkpoint: str
    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.checkpoint}/{self.file}: {self.reason}"


class Refused(CheckpointMismatch):
    """The same as an error."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal

    def __reduce__(self) -> tuple[Any, ...]:
        return CheckpointMismatch, (str(self),)


@dataclass(frozen=True, slots=True)
class Entry:
    """A folder that is named like a checkpoint. Reads verify all that they return, or raise CheckpointMismatch."""

    folder: Folder
    number: int
    prefix: str

    @classmethod
    def at(cls, folder: Folder) -> Entry | None:
        match = _NAME.fullmatch(folder.name)
        return cls(folder, int(match[1]), match[2]) if match else None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        """Whether there is a manifest, be it good or bad. Raises OSError."""
        return MANIFEST in self.folder.list()

    def manifest(self) -> Manifest:
        """The manifest alone; of the outer state, only that its file is there in full length."""
        with self._blaming(MANIFEST):
            if self.folder.size(MANIFEST) > _MANIFEST_BYTES:
                raise ValueError("is too large")
            manifest = parse_manifest(unseal(self.folder.read(MANIFEST)))
            self._check_identity(*manifest.identity)
        with self._blaming(manifest.outer.name):
            self._check_size(manifest.outer)
        return manifest

    def outer(self, **belongs: str) -> Outer:
        """The outer state, with all hashes recomputed. Memory: the file's size.

        belongs: what the manifest must say of itself: run, tag, algorithm, fingerprint.
        """
        manifest = self.manifest()
        with self._blaming(MANIFEST):
            for key, value in belongs.items():
                if getattr(manifest, key) != value:
                    raise ValueError(f"is of {key} {getattr(manifest, key)!r}, not {value!r}")
        with self._blaming(manifest.outer.name):
            return Outer(self, manifest, self._versions(manifest))

    def _versions(self, manifest: Manifest) -> tuple[Version, ...]:
        sizes = [fragment.sizes for fragment in manifest.fragments]
        head, numbers = header(sizes), sum(map(sum, sizes))
        if manifest.outer.bytes != len(head) + 4 * numbers:
            raise ValueError(f"has {manifest.outer.bytes} bytes, its tensors {4 * numbers}")
        data = torch.empty(manifest.outer.bytes, dtype=torch.uint8)
        self.folder.read_into(manifest.outer.name, as_bytes(data))
        if digest_of([as_bytes(data)]) != manifest.outer.digest:
            raise ValueError("its bytes do not have the hash that the manifest names")
        if bytes(as_bytes(data[: len(head)])) != head:
            raise ValueError("holds other tensors than the manifest names")
        return tuple(_split(manifest.fragments, data[len(head) :].view(torch.float32)))

    def peers(self) -> list[str]:
        """Names of the peers that have a part here, be it good or bad. Raises OSError."""
        found = (_PEER.fullmatch(name) for name in self.folder.list())
        return sorted(match[1] for match in found if match)

    def peer(self, name: str, *, run: str = "", tag: str = "") -> dict[str, Any] | None:
        """The part of one peer, its tensors on the CPU; None if there is none. run, tag: what it must belong to."""
        label = f"peer-{name}.json"
        with self._blaming(label):
            check_name("peer", name)
            try:
                body = unseal(self.folder.read(label))
            except FileNotFoundError:
                return None
            self._check_identity(get(body, "version", int), get(body, "state_hash", str))
            file = parse_file(get(body, "file", dict), rf"peer-{re.escape(name)}-[0-9a-f]{{16}}\.pt")
            for key, value in {"format": FORMAT, "peer": name, "run": run, "tag": tag}.items():
                if value and body.get(key) != value:
                    raise ValueError(f"belongs to {key} {body.get(key)!r}, not to {value!r}")
        with self._blaming(file.name):
            self._check_size(file)
            return _load(self.folder.read(file.name), file.digest)

    def problems(self) -> list[Refusal]:
        """All that is wrong with it and its peers' parts; reads everything."""
        found = []
        checks: list[Callable[[], object]] = [self.outer]
        checks += [lambda name=name: self.peer(name) for name in self.peers()]  # type: ignore[misc]
        for check in checks:
            try:
                check()
            except Refused as error:
                found.append(error.refusal)
        return found

    def age(self) -> float:
        """Seconds since somebody wrote to it, at least; 0 if that cannot be known."""
        return self.folder.age() or 0.0

    def remove(self) -> None:
        """Raises OSError. Whatever is left if this is interrupted is no checkpoint."""
        self.folder.delete(MANIFEST)
        self.folder.remove()

    def _refuse(self, file: str, reason: str) -> Refused:
        return Refused(Refusal(str(self.folder), file, reason))

    @contextmanager
    def _blaming(self, file: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._refuse(file, "is missing") from None
        except OSError as error:
            raise self._refuse(file, f"cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise self._refuse(file, str(error)) from None

    def _check_identity(self, number: int, state_hash: str) -> None:
        if (number, state_hash[: len(self.prefix)]) != (self.number, self.prefix):
            raise ValueError(f"is of version {number} with state hash {state_hash}, not of this checkpoint")

    def _check_size(self, file: DataFile) -> None:
        size = self.folder.size(file.name)
        if size != file.bytes:
            raise ValueError(f"has {size} bytes instead of {file.bytes}")


def _split(fragments: Sequence[Fragment], flat: torch.Tensor) -> Iterator[Version]:
    at = 0
    for i, fragment in enumerate(fragments):
        n, m = fragment.sizes
        version = Version(fragment.version, flat[at : at + n], flat[at + n : at + n + m])
        if version.state_hash != fragment.state_hash:
            raise ValueError(f"fragment {i} has state hash {version.state_hash}, not {fragment.state_hash}")
        yield version
        at += n + m


def _load(data: bytes, digest: str) -> dict[str, Any]:
    if digest_of([data]) != digest:
        raise ValueError("its bytes do not have the hash that its .json names")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever comes to its mind
        raise ValueError(f"cannot be loaded: {str(error).splitlines()[0]}") from None
    if not isinstance(state, dict):
        raise ValueError(f"holds a {type(state).__name__}, not a dict")
    return state


def entries_in(folder: Folder) -> list[Entry]:
    found = (Entry.at(folder / name) for name, is_folder in folder.list().items() if is_folder)
    return sorted((entry for entry in found if entry), key=lambda entry: (entry.number, entry.prefix), reverse=True)


def find(url: str) -> list[Entry]:
    """All checkpoints at a URL: of one itself, of the folder of a tag, of a run, or of many runs; newest first in each.

    Raises ConfigurationError for a URL that cannot be opened, OSError if the storage fails.
    """
    folder = Folder.at(url)
    entry = Entry.at(folder)
    return [entry] if entry and folder.list() else _below(folder, 2)


def _below(folder: Folder, depth: int) -> list[Entry]:
    found = entries_in(folder)
    if found or not depth:
        return found
    return [e for name, inner in sorted(folder.list().items()) if inner for e in _below(folder / name, depth - 1)]

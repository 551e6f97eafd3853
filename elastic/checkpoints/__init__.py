"""Checkpoints: versions of a run's outer state on disk or in an object store, and what belongs to single peers.

A checkpoint is a folder URL/RUN/TAG/v00000012-0123456789ab, named by its number and the beginning of its state hash:

  outer-HASH.safetensors   parameters and momentum of each fragment, flat float32
  manifest.json            what that is and belongs to, the run's own state as of it; written last, sealed by a hash
  peer-NAME.json, peer-NAME-ID.pt    what belongs to one peer; written by torch.save, read with weights_only=True

A folder without a manifest is none. Files with data are named by what is in them, or by chance, and never changed: so
any number of writers can write the same checkpoint at once, and die at any moment, and what can be read is whole.
Everything is checked on reading; what is wrong is refused by its name, and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from importlib import metadata
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import torch
import xxhash

from collectives.transfer import as_bytes

from ..config import check_name
from ..errors import CheckpointMismatch, ConfigurationError
from ..outer.state import Version
from .entries import MANIFEST, Entry, Outer, Refusal, Refused, entries_in
from .manifest import (
    FORMAT,
    DataFile,
    Fragment,
    Manifest,
    Parameters,
    body_of,
    digest_of,
    elements,
    header,
    identity,
    pieces,
    seal,
)
from .portable import checked
from .storage import Bytes, Folder

ABANDONED_SECONDS = 3600.0
"""A folder that is no checkpoint and that nobody has written to for so long is removed."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Where checkpoints of a run go, and how often.

    url: a local path, or any URL that fsspec knows (s3://bucket/runs needs s3fs installed).
    every: versions from one checkpoint to the next. keep: how many are kept.
    shared: whether all peers see the same place; by default, whether the URL has a scheme other than file or local.
    """

    url: str
    _: KW_ONLY
    every: int = 10
    keep: int = 3
    shared: bool | None = None

    def __post_init__(self) -> None:
        if not self.url:
            raise ConfigurationError("url is empty: name a folder or a URL such as s3://bucket/runs")
        for name in ("every", "keep"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ConfigurationError(f"{name} is {value!r}: it must be a whole number of at least 1")

    @property
    def is_shared(self) -> bool:
        scheme = urlsplit(self.url).scheme if "://" in self.url else ""
        return scheme not in ("", "file", "local") if self.shared is None else self.shared

    def store(self, run: str, tag: str, check: Callable[[str], None] | None = None) -> Store:
        return Store(self.url, run, tag, keep=self.keep, check=check)


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The outer state between two rounds, to be written while training goes on.

    algorithm, fingerprint: as in the run's OperationSpec. versions: of each fragment, never changed later.
    parameters: of each fragment. run_state: what the run needs to go on from exactly here; opaque.
    summary: plain JSON for people. writer: name of the peer that writes.
    Raises ConfigurationError if lengths do not fit, or the summary is no JSON.
    """

    algorithm: str
    fingerprint: str
    versions: tuple[Version, ...]
    parameters: tuple[Parameters, ...]
    run_state: bytes = b""
    summary: Mapping[str, Any] = field(default_factory=dict)
    writer: str = ""

    def __post_init__(self) -> None:
        if not self.versions or len(self.versions) != len(self.parameters):
            raise ConfigurationError(f"{len(self.versions)} fragments with {len(self.parameters)} lists of parameters")
        for version, parameters in zip(self.versions, self.parameters, strict=True):
            sizes = [elements(parameters), version.parameters.numel(), version.momentum.numel()]
            fit = sizes[0] == sizes[1] and sizes[2] % max(sizes[1], 1) == 0
            if not fit or not all(map(_flat, (version.parameters, version.momentum))):
                raise ConfigurationError(
                    "parameters and momentum must be flat float32 on the CPU, the parameters as long as their names "
                    f"say, momentum a multiple of that, not {sizes}"
                )
        try:
            json.dumps(self.summary, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigurationError(f"summary is no plain JSON: {error}") from None

    @property
    def identity(self) -> tuple[int, str]:
        return identity([(version.number, version.state_hash) for version in self.versions])


class Store:
    """The checkpoints of one outer loop of a run, in one place. Any number of processes may use a place at once.

    Writing and listing raise OSError when the storage fails. Nothing is there in part: what is not complete is not
    read. url: as in `Checkpoints`; run, tag: names. check: as in `Folder`. Raises ConfigurationError.
    """

    def __init__(
        self, url: str, run: str, tag: str, *, keep: int = 3, check: Callable[[str], None] | None = None
    ) -> None:
        self.run, self.tag, self.keep = check_name("run", run), check_name("tag", tag), keep
        self.folder = Folder.at(url, check) / run / tag

    def entry(self, number: int, state_hash: str) -> Entry:
        """Where the checkpoint of this state is, or would be."""
        prefix = state_hash[:12]
        return Entry(self.folder / f"v{number:08d}-{prefix}", number, prefix)

    def entries(self) -> list[Entry]:
        """Newest first, unfinished and damaged ones among them."""
        return entries_in(self.folder)

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, *, peer: str = "", state: Mapping[str, Any] | None = None) -> int:
        """A whole checkpoint: the part of `peer`, if `state` is given, then the outer state; then prunes.

        Returns how many bytes that were.
        """
        written = self.write_peer(*snapshot.identity, peer, state) if state is not None else 0
        written += self.write_outer(snapshot)
        self.prune(self.entry(*snapshot.identity))
        return written

    def write_outer(self, snapshot: Snapshot) -> int:
        """Writes the outer state; the same state may be written again, also by several at once. Returns bytes written.

        Raises CheckpointMismatch if a version's tensors have changed since they were hashed.
        """
        tensors = [tensor for version in snapshot.versions for tensor in (version.parameters, version.momentum)]
        _check_unchanged(snapshot.versions)
        sizes = [(version.parameters.numel(), version.momentum.numel()) for version in snapshot.versions]
        parts: list[Bytes] = [header(sizes), *map(as_bytes, tensors)]
        digest = digest_of(parts)
        file = DataFile(f"outer-{digest[:16]}.safetensors", sum(map(len, parts)), digest)
        folder = self.entry(*snapshot.identity).folder
        return folder.write(file.name, parts) + folder.put(MANIFEST, seal(body_of(self._manifest(snapshot, file))))

    def write_peer(self, number: int, state_hash: str, name: str, state: Mapping[str, Any]) -> int:
        """Writes the part of peer `name` to the checkpoint of this state. Returns bytes written.

        state: see `portable()`; nobody may change it meanwhile. Raises ConfigurationError for what cannot be stored.
        """
        check_name("peer", name)
        plain = checked(state)
        folder = self.entry(number, state_hash).folder
        unique = f"peer-{name}-{uuid.uuid4().hex[:16]}.pt"
        with folder.create(unique) as file:
            sink = _Sink(file)
            torch.save(plain, cast(BinaryIO, sink))
            sink.check()
        body = {
            "format": FORMAT,
            "run": self.run,
            "tag": self.tag,
            "peer": name,
            "version": number,
            "state_hash": state_hash,
            "file": asdict(DataFile(unique, sink.bytes, sink.digest.hexdigest())),
            "time_unix": time.time(),
            "library": _library(),
        }
        return sink.bytes + folder.put(f"peer-{name}.json", seal(body))

    def _manifest(self, snapshot: Snapshot, file: DataFile) -> Manifest:
        both = zip(snapshot.versions, snapshot.parameters, strict=True)
        return Manifest(
            run=self.run,
            tag=self.tag,
            algorithm=snapshot.algorithm,
            fingerprint=snapshot.fingerprint,
            fragments=tuple(
                Fragment(version.number, version.state_hash, named, version.momentum.numel()) for version, named in both
            ),
            outer=file,
            run_state=snapshot.run_state,
            summary=dict(snapshot.summary),
            time_unix=time.time(),
            writer=snapshot.writer,
            library=_library(),
        )

    def prune(self, current: Entry | None = None) -> list[str]:
        """Removes complete checkpoints of the same model and algorithm as `current` that `keep` others make needless.

        current: the newest one if None. Newer ones than `current` are left alone. What is incomplete goes once nobody
        has written to it for an hour: a folder without a manifest, and a damaged checkpoint older than all that are
        kept. Returns the names of what was removed.
        """
        entries = self.entries()
        kinds = {entry: _kind(entry) for entry in entries}
        newest = current or next((entry for entry in entries if kinds[entry]), None)
        kind = kinds.get(newest) if newest else None
        alike = [each for each in entries if newest and kind and kinds[each] == kind and each.number <= newest.number]
        oldest = alike[self.keep - 1].number if len(alike) >= self.keep else 0
        gone = [entry for entry in entries if kinds[entry] is None and _forsaken(entry, oldest)]
        gone += [entry for entry in alike[self.keep :] if entry != newest]
        for entry in gone:
            entry.remove()
        return [entry.name for entry in gone]

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self, entry: Entry, **belongs: str) -> Outer:
        """The outer state. belongs: algorithm, fingerprint. Raises CheckpointMismatch, naming file and reason."""
        return entry.outer(run=self.run, tag=self.tag, **belongs)

    def read_peer(self, entry: Entry, name: str) -> dict[str, Any] | None:
        """The part of one peer; None if there is none. Raises CheckpointMismatch, naming file and reason."""
        return entry.peer(name, run=self.run, tag=self.tag)

    def newest(
        self,
        *,
        algorithm: str,
        fingerprint: str,
        rank: Callable[[Manifest], Any] = lambda manifest: manifest.identity[0],
        refused: Callable[[Refusal], object] | None = None,
    ) -> Outer | None:
        """The checkpoint of the highest rank that is good; None if none is. refused: told of each that is passed over.

        rank: by default the number; once a run has gone back to an earlier version, that does not say which is newer.
        """
        ranked = []
        for entry in self.entries():
            try:
                ranked.append((rank(entry.manifest()), entry))
            except Refused as error:
                if refused is not None:
                    refused(error.refusal)
        for _, entry in sorted(ranked, key=lambda each: each[0], reverse=True):
            try:
                return self.read(entry, algorithm=algorithm, fingerprint=fingerprint)
            except Refused as error:
                if refused is not None:
                    refused(error.refusal)
        return None


class _Sink:
    """What torch.save writes to. It keeps an error to itself until asked: raised within torch, that is lost."""

    def __init__(self, file: BinaryIO) -> None:
        self.bytes = 0
        self.digest = xxhash.xxh3_128()
        self._file = file
        self._error: OSError | None = None

    def write(self, data: memoryview) -> int:
        try:
            if self._error is None:
                self._file.write(data)
        except OSError as error:
            self._error = error
        for piece in pieces([data]):
            self.digest.update(piece)
        self.bytes += len(data)
        return len(data)

    def flush(self) -> None:
        """What torch calls; the file is synced later."""

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _kind(entry: Entry) -> tuple[str, str] | None:
    """Of which algorithm and model it is; None if it is not complete."""
    try:
        manifest = entry.manifest()
    except Refused:
        return None
    return manifest.algorithm, manifest.fingerprint


def _forsaken(entry: Entry, oldest: int) -> bool:
    # one that is only unreadable for now must not go, so that a damaged one has to be needless, too
    return (entry.number < oldest or not entry.finished) and entry.age() > ABANDONED_SECONDS


def _flat(tensor: torch.Tensor) -> bool:
    plain = tensor.dtype is torch.float32 and tensor.device.type == "cpu"
    return plain and tensor.dim() == 1 and tensor.is_contiguous()


def _check_unchanged(versions: Iterable[Version]) -> None:
    for i, version in enumerate(versions):
        if digest_of([as_bytes(version.parameters), as_bytes(version.momentum)]) != version.state_hash:
            raise CheckpointMismatch(f"fragment {i} of version {version.number} has changed since it was hashed")


def _library() -> str:
    try:
        return metadata.version("elastic-diloco")
    except metadata.PackageNotFoundError:
        return "unknown"

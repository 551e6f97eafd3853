"""Folders on any file system that fsspec knows, with files that are there as a whole or not at all.

On a local file system a file is written under a name of its own, synced, and moved into place. Elsewhere (object
stores have no such move) it is written under its final name: there, what several may write at once must either have a
name that says what is in it, or be small enough for a single request, which those stores carry out as a whole.
"""

from __future__ import annotations

import errno
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import fsspec.core
from fsspec.implementations.local import LocalFileSystem

from ..errors import ConfigurationError, ElasticError

CHUNK = 1 << 25
"""Bytes per request, read or written."""

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that may exist. Everything that goes wrong in storage is an OSError, whatever library it came from."""

    files: Any
    path: str
    check: Callable[[str], None] | None = None
    """Is told of each file that has been written, before it is synced and counts; what it raises is a failed write."""

    @classmethod
    def at(cls, url: str, check: Callable[[str], None] | None = None) -> Folder:
        """Raises ConfigurationError for a URL that no installed library can open."""
        try:
            files, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigurationError(f"cannot store anything at {url!r}: {error}") from None
        return cls(files, path.rstrip("/"), check)

    def __truediv__(self, name: str) -> Folder:
        return replace(self, path=f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.path if self.local else str(self.files.unstrip_protocol(self.path or "/"))

    @property
    def local(self) -> bool:
        return isinstance(self.files, LocalFileSystem)

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Folder:
        return replace(self, path=self.path.rpartition("/")[0])

    # --- reading ------------------------------------------------------------------------------------------------------

    def list(self) -> dict[str, bool]:
        """Names of what is in it, and whether each is a folder itself; empty if there is no such folder."""
        with _as_os_error():
            self.files.invalidate_cache(self.path)  # of listings: others write here, too
            try:
                entries = self.files.ls(self.path, detail=True)
            except FileNotFoundError:
                return {}
        found = {entry["name"].rstrip("/").rpartition("/")[2]: entry["type"] == "directory" for entry in entries}
        found.pop("", None)  # some stores list the folder's own marker
        return found

    def size(self, name: str) -> int:
        """Raises FileNotFoundError."""
        with _as_os_error():
            self.files.invalidate_cache(self.path)
            return int(self.files.size(f"{self.path}/{name}"))

    def read(self, name: str) -> bytes:
        with _as_os_error():
            return bytes(self.files.cat_file(f"{self.path}/{name}"))

    def read_into(self, name: str, view: memoryview) -> None:
        """Fills the view from the file's beginning. Raises OSError if the file is shorter."""
        for start in range(0, len(view), CHUNK):
            end = min(start + CHUNK, len(view))
            with _as_os_error():
                piece = self.files.cat_file(f"{self.path}/{name}", start=start, end=end)
            if len(piece) != end - start:
                raise OSError(f"{name} ends after {start + len(piece)} of {len(view)} bytes")
            view[start:end] = piece

    def age(self) -> float | None:
        """Seconds since anything in it was last written, by this machine's clock; None if that cannot be known."""
        paths = [f"{self.path}/{name}" for name in self.list()] or [self.path]
        try:
            with _as_os_error():
                newest = max(self.files.modified(path).timestamp() for path in paths)
        except OSError:
            return None
        return float(time.time() - newest)

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes) -> int:
        """Writes a small file, in place of one that is there. Returns its size in bytes."""
        if self.local:
            return self.write(name, [data])
        with _as_os_error():
            self._check(name)
            self._in_folder(self.files.pipe_file, f"{self.path}/{name}", data)
        return len(data)

    def write(self, name: str, parts: Iterable[Bytes]) -> int:
        """Writes a file of any size, in place of one that is there. Returns its size in bytes."""
        size = 0
        with self.create(name) as file:
            for part in parts:
                for start in range(0, len(part), CHUNK):
                    file.write(part[start : start + CHUNK])
                size += len(part)
        return size

    @contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """A new file to write to. After an exception it is thrown away; locally, one that was there before stays."""
        with _as_os_error(), self._local(name) if self.local else self._remote(name) as file:
            yield file
            self._check(name)

    def _check(self, name: str) -> None:
        if self.check is not None:
            self.check(f"{self.path}/{name}")

    @contextmanager
    def _local(self, name: str) -> Iterator[BinaryIO]:
        folder = Path(self.path)
        _make(folder)
        scratch = folder / f".{name}.{uuid.uuid4().hex}.part"
        try:
            with scratch.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, folder / name)
        except BaseException as error:
            with suppress(OSError):
                scratch.unlink()
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(folder / name)  # a full disk does not say where
            raise
        _sync(folder)

    @contextmanager
    def _remote(self, name: str) -> Iterator[BinaryIO]:
        file = self._in_folder(self.files.open, f"{self.path}/{name}", "wb", block_size=CHUNK)
        try:
            yield file
        except BaseException:
            # closing would make a file of what has been sent so far
            with suppress(Exception):
                file.discard()
            with suppress(Exception):
                file.closed = True
            raise
        file.close()

    def _in_folder(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        # object stores have no folders; to make one there may ask for rights that nobody needs
        try:
            return write(*arguments, **options)
        except FileNotFoundError:
            self.files.makedirs(self.path, exist_ok=True)
            return write(*arguments, **options)

    def delete(self, name: str) -> None:
        """Removes a file; it is no error if somebody else has."""
        with _as_os_error(), suppress(FileNotFoundError):
            self.files.rm_file(f"{self.path}/{name}")

    def remove(self) -> None:
        """Removes the folder with all that is in it; it is no error if somebody else does the same."""
        with _as_os_error(), suppress(FileNotFoundError):
            self.files.rm(self.path, recursive=True)


def _make(folder: Path) -> None:
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems know no such thing
            raise
    finally:
        os.close(handle)


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Libraries of object stores raise errors of their own kinds when the network or the bucket is gone."""
    try:
        yield
    except (OSError, ElasticError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error

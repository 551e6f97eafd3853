"""Text for the byte-level GPT: read it, split it into train and held-out parts, cut it into windows.

Files and folders of UTF-8 text, or, by default, the source of the running Python's standard library, which every
machine has. Whatever cannot be used is refused by name with a one-line `TextError`.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

MINIMUM_BYTES = 64 * 1024  # with less there is nothing to learn that would also help on held-out text


class TextError(ValueError):
    """The text cannot be used. The message is one line and names the file."""


class Document(NamedTuple):
    name: str
    data: bytes


# --- reading ---------------------------------------------------------------------------------------------------------


def load_text(paths: Sequence[Path] | None = None, *, minimum_bytes: int = MINIMUM_BYTES) -> list[Document]:
    """All text under `paths`, in sorted order; None: the standard library's source.

    Raises TextError for what is missing, unreadable, empty or not UTF-8, and for less than `minimum_bytes` together.
    """
    documents = standard_library() if paths is None else read_paths(paths)
    size = sum(len(document.data) for document in documents)
    if size < minimum_bytes:
        where = "the standard library" if paths is None else ", ".join(str(path) for path in paths) or "no path"
        raise TextError(f"too little text: {size:,} bytes in {where}; at least {minimum_bytes:,} are needed")
    return documents


def read_paths(paths: Sequence[Path]) -> list[Document]:
    """Each file once, however often it is named."""
    seen: set[Path] = set()
    documents = []
    for path in paths:
        for document, file in read_path(Path(path)):
            real = file.resolve()
            if real not in seen:
                seen.add(real)
                documents.append(document)
    return documents


def read_path(path: Path) -> list[tuple[Document, Path]]:
    """A file, or every regular file below a folder. Names are relative to the folder: equal on every machine."""
    kind = kind_of(path)
    if not kind:
        raise TextError(f"{path}: no such file or folder")
    if stat.S_ISREG(kind):
        document = read_file(path, path.name)
        if not document.data:
            raise TextError(f"{path}: the file is empty")
        return [(document, path)]
    if not stat.S_ISDIR(kind):
        raise TextError(f"{path}: neither a regular file nor a folder")
    found = [(read_file(file, file.relative_to(path).as_posix()), file) for file in files_below(path)]
    found = [(document, file) for document, file in found if document.data]  # an empty __init__.py is no mistake
    if not found:
        raise TextError(f"{path}: the folder holds no text")
    return found


def kind_of(path: Path) -> int:
    """Its `st_mode`, links followed; 0 if there is nothing. TextError where the system does not let us look."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # a null character
        raise TextError(f"{str(path)!r}: cannot be read ({error})") from error


def files_below(folder: Path) -> Iterator[Path]:
    """Regular files, sorted by path. Links to folders are not followed, so that no loop is."""

    def refuse(error: OSError) -> None:
        raise TextError(f"{error.filename}: cannot be read ({error.strerror})")

    files = [Path(root, name) for root, _, names in os.walk(folder, onerror=refuse) for name in names]
    return (file for file in sorted(files) if stat.S_ISREG(kind_of(file)))


def read_file(path: Path, name: str) -> Document:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 text (byte 0x{data[error.start]:02x} at offset {error.start:,})") from None
    return Document(name, data)


def standard_library() -> list[Document]:
    """The `*.py` files of the running Python without its tests and what was installed into it: about 12 MB.

    We choose this set, so the few files that are deliberately not UTF-8 are left out, not refused.
    """
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if not {"site-packages", "dist-packages", "test", "tests", "idle_test"}.intersection(name.parts):
            try:
                documents.append(read_file(file, name.as_posix()))
            except TextError:
                continue
    return [document for document in documents if document.data]


# --- train and held out ----------------------------------------------------------------------------------------------


def split(
    documents: Sequence[Document], held_out: float = 0.05, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(train, held out), by whole files and the same on every machine; no held-out byte is trained on.

    Files of equal contents go to the same side. Where whole files give less than half of the wanted share (one
    large file), the tail of the largest file is held out as well.
    """
    if not 0 < held_out < 1:
        raise TextError(f"the held-out share must be between 0 and 1, not {held_out}")
    copies = by_content(documents, seed)
    wanted = int(held_out * sum(len(document.data) for document in documents))
    chosen = choose(copies, wanted)
    train = [document for document in documents if document.data not in chosen]
    test = [document for document in documents if document.data in chosen]
    missing = wanted - sum(len(document.data) for document in test)
    if missing > wanted / 2:
        train, tail = cut_tail(train, missing)
        test.append(tail)
    return train, test


def by_content(documents: Sequence[Document], seed: int) -> dict[bytes, int]:
    """contents -> bytes in all its copies, ordered by a hash: an order that no name and no listing can change."""
    sizes: dict[bytes, int] = {}
    for document in documents:
        sizes[document.data] = sizes.get(document.data, 0) + len(document.data)
    return dict(sorted(sizes.items(), key=lambda item: content_hash(item[0], seed)))


def content_hash(data: bytes, seed: int) -> bytes:
    return hashlib.blake2b(data, digest_size=16, key=str(seed).encode()).digest()


def choose(copies: dict[bytes, int], wanted: int) -> set[bytes]:
    """What fits into `wanted` bytes, in hash order; if nothing fits, the smallest of several."""
    chosen: set[bytes] = set()
    taken = 0
    for data, size in copies.items():
        if taken + size <= wanted:
            chosen.add(data)
            taken += size
    if not chosen and len(copies) > 1:
        chosen.add(min(copies, key=lambda data: copies[data]))
    return chosen


def cut_tail(documents: list[Document], size: int) -> tuple[list[Document], Document]:
    """Take the last `size` bytes, half at most, off the largest document. Its copies go: they hold the same bytes."""
    largest = max(documents, key=lambda document: len(document.data))
    cut = len(largest.data) - min(size, len(largest.data) // 2)
    head = Document(f"{largest.name}[:{cut}]", largest.data[:cut])
    tail = Document(f"{largest.name}[{cut}:]", largest.data[cut:])
    kept = [head if document is largest else document for document in documents]
    return [document for document in kept if document.data != largest.data], tail


# --- windows ---------------------------------------------------------------------------------------------------------


class ByteDataset(Dataset[Tensor]):
    """Windows over the joined documents. Item i is int64 (context + 1,): inputs `[:-1]`, targets `[1:]`.

    Windows advance by `context`, so every byte is a target at most once: an epoch counts each token once.
    """

    def __init__(self, documents: Sequence[Document], context: int) -> None:
        self.context = context
        joined = bytearray(b"\n".join(document.data for document in documents))
        if len(joined) <= context:
            raise TextError(f"too little text: {len(joined)} bytes; one window needs {context + 1}")
        self._bytes = torch.frombuffer(joined, dtype=torch.uint8)

    @property
    def tokens_per_sample(self) -> int:
        return self.context

    def __len__(self) -> int:
        return (len(self._bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        start = index * self.context
        return self._bytes[start : start + self.context + 1].long()


def held_out_batches(
    documents: Sequence[Document], context: int, batch_size: int = 16, batches: int = 4
) -> list[tuple[Tensor, Tensor]]:
    """The same (inputs, targets), each (B, context), at every call: windows at equal distances over the whole text."""
    dataset = ByteDataset(documents, context)
    count = min(len(dataset), batch_size * batches)
    windows = torch.stack([dataset[i * len(dataset) // count] for i in range(count)])  # (count, context + 1)
    return [(rows[:, :-1], rows[:, 1:]) for rows in windows.split(batch_size)]

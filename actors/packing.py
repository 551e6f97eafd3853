"""What of a folder goes along with a job, as one zip: what `.gitignore` and `.rayignore` leave.

Ray would pack folders itself. But it stores without compressing, learns that a folder is too big only from the server,
and puts each Python package into a folder of its own, where ours take each other for strangers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

from ray._private.thirdparty.pathspec.pathspec import PathSpec

from elastic.errors import ElasticError

LIMIT = 100 << 20
"""What Ray's dashboard takes in one request. (Its own limit of 512 MiB is that of its store, behind the dashboard.)"""
PACKAGES = ("collectives", "fault", "elastic", "actors", "cli")
NEVER = (
    ".git", ".venv", "venv", "__pycache__", "*.pyc", ".mypy_cache", ".pytest_cache", ".ruff_cache", "node_modules"
)  # fmt: skip
IGNORE_FILES = (".gitignore", ".rayignore")
_SHOWN = 3
_CHUNK = 1 << 20


class UnusableFiles(ElasticError):
    """The script, or the folder that is to go along with it, cannot be used. The message says what to do."""


@dataclass(frozen=True)
class Rules:
    """Patterns as in a .gitignore. base: the folder that they are relative to."""

    base: Path
    spec: Any

    @classmethod
    def of(cls, base: Path, lines: Iterable[str]) -> Rules:
        return cls(base, PathSpec.from_lines("gitwildmatch", lines))  # type: ignore[no-untyped-call]

    def leave_out(self, path: Path, *, folder: bool = False) -> bool:
        name = path.relative_to(self.base).as_posix() + ("/" if folder else "")
        return bool(self.spec.match_file(name))


def files(folder: Path, excludes: Sequence[str] = ()) -> Iterator[Path]:
    """All files below that are to go along, in one order everywhere. folder: absolute."""
    above = [rules for rules in _from_above(folder) if not rules.leave_out(folder, folder=True)]
    yield from _walk(folder, [Rules.of(folder, [*NEVER, *excludes]), *above], frozenset())


def pack(folder: Path, excludes: Sequence[str], target: IO[bytes], *, limit: int = LIMIT) -> list[str]:
    """Writes the zip; returns the names in it. The same files make the same bytes. Raises UnusableFiles."""
    with ZipFile(target, "w") as archive:
        for path in files(folder, excludes):
            for _ in _added(archive, path, path.relative_to(folder)):
                if target.tell() > limit:
                    raise UnusableFiles(_too_big(folder, excludes, limit))
    if target.tell() > limit:  # with the list of its files
        raise UnusableFiles(_too_big(folder, excludes, limit))
    return archive.namelist()


def pack_packages(target: IO[bytes]) -> None:
    """The zip of this installation's own packages, side by side."""
    home = Path(__file__).resolve().parents[1]
    with ZipFile(target, "w") as archive:
        for name in PACKAGES:
            for path in files(home / name):
                list(_added(archive, path, path.relative_to(home)))


def _from_above(folder: Path) -> list[Rules]:
    """Of the git checkout that the folder lies in, if it does."""
    parents = list(folder.parents)
    roots = [i for i, each in enumerate([folder, *parents]) if (each / ".git").exists()]
    return [rules for each in parents[: roots[0]] for rules in _rules_in(each)] if roots else []


def _rules_in(folder: Path) -> list[Rules]:
    found = [folder / name for name in IGNORE_FILES if (folder / name).is_file()]
    return [Rules.of(folder, path.read_text(errors="replace").splitlines()) for path in found]


def _walk(folder: Path, rules: list[Rules], above: frozenset[Path]) -> Iterator[Path]:
    """above: the folders that this one lies in, as they really are: links may lead back to them."""
    rules, above = [*rules, *_rules_in(folder)], above | {folder.resolve()}
    for path in sorted(_entries(folder)):
        if path.is_dir():
            if path.resolve() not in above and not any(each.leave_out(path, folder=True) for each in rules):
                yield from _walk(path, rules, above)
        elif path.is_file() and not any(each.leave_out(path) for each in rules):
            yield path


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UnusableFiles(f"cannot read {folder}: {error.strerror}; leave it out with --exclude") from None


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise UnusableFiles(f"cannot read {path}: {error.strerror}; leave it out with --exclude") from None


def _added(archive: ZipFile, path: Path, name: Path) -> Iterator[int]:
    """Adds the file; the bytes read of it so far, now and then, since it may be far too large."""
    entry = ZipInfo(name.as_posix())  # without the time, by which equal files would make different zips
    entry.compress_type, entry.external_attr = ZIP_DEFLATED, (path.stat().st_mode & 0o777) << 16
    read = 0
    with _opened(path) as source, archive.open(entry, "w") as sink:
        while data := source.read(_CHUNK):
            read += sink.write(data)
            yield read


def _too_big(folder: Path, excludes: Sequence[str], limit: int) -> str:
    sizes: Counter[str] = Counter()
    for path in files(folder, excludes):
        first, *below = path.relative_to(folder).parts
        sizes[f"{first}/" if below else first] += path.stat().st_size
    biggest = ", ".join(f"{name} ({_readable(size)})" for name, size in sizes.most_common(_SHOWN))
    return (
        f"{folder} is more than {_readable(limit)} zipped, which Ray does not take. Biggest: {biggest}. "
        "Leave out what the job does not need (--exclude PATTERN, or a .gitignore), "
        "and let it read large data from where it lies"
    )


def _readable(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.1f} MiB"

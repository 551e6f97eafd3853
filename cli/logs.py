"""Event logs as a command is given them: files and folders, merged into one story by time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elastic.events import EventReader

Event = dict[str, Any]


class LogError(Exception):
    """What is wrong with a log, in one line that says what to do."""


@dataclass
class Logs:
    """The logs of a run, followed: `read` returns what has come since the last call, in order of time.

    paths: files, and folders whose *.jsonl count, those too that appear later. Raises LogError for what is not there,
    or cannot be read.
    """

    paths: Sequence[Path]
    _readers: dict[Path, EventReader] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path in self.paths:
            check_readable(path)

    @property
    def files(self) -> list[Path]:
        found = [file for path in self.paths for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path])]
        return list(dict.fromkeys(found))

    def read(self) -> list[Event]:
        for file in self.files:
            self._readers.setdefault(file, EventReader(file))
        found = [event for reader in self._readers.values() for event in reader.read() if is_event(event)]
        return sorted(found, key=lambda event: event["time_unix"])

    def cut_off(self) -> list[Path]:
        """Files that end in the middle of a line: whoever wrote there was killed, or is writing now."""
        return [file for file in self.files if not ends_whole(file)]


def is_event(found: Event) -> bool:
    return isinstance(found.get("event"), str) and isinstance(found.get("time_unix"), (int, float))


def check_readable(path: Path) -> None:
    try:
        if path.is_dir():
            next(path.iterdir(), None)
        else:
            path.open("rb").close()
    except FileNotFoundError:
        raise LogError(f"there is no {path}: give event logs, or the folder that ELASTIC_EVENTS_DIR names") from None
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror}") from None


def ends_whole(file: Path) -> bool:
    with file.open("rb") as log:
        size = log.seek(0, 2)
        log.seek(max(0, size - 1))
        return log.read(1) in (b"\n", b"")


def whole_story(paths: Sequence[Path]) -> tuple[list[Event], list[Path]]:
    """All events, and the files that are cut off. LogError if there are none at all."""
    logs = Logs(paths)
    events = logs.read()
    if not events:
        names = ", ".join(map(str, paths))
        raise LogError(f"there are no events in {names}: is it the log of a run (JSON lines with event, time_unix)?")
    return events, logs.cut_off()


def chosen(
    events: Iterable[Event], *, only: Sequence[str] = (), peers: Sequence[str] = (), since: float = 0.0
) -> Iterator[Event]:
    """only: patterns of event names ("round.*"), any of which will do; peers: of whom they are; since: time_unix."""
    for event in events:
        named = not only or any(fnmatchcase(event["event"], pattern) for pattern in only)
        about = not peers or concerns(event, peers)
        if named and about and event["time_unix"] >= since:
            yield event


def concerns(event: Event, peers: Sequence[str]) -> bool:
    """Told by one of them, or about it: as the peer, a culprit, a contributor, or lost."""
    lists = (event.get(key) for key in ("culprits", "contributors", "lost"))
    named = {event.get("peer"), *(name for each in lists if isinstance(each, list) for name in each)}
    return not named.isdisjoint(peers)

"""What a coordinator must not forget: records, and the SQLite file that keeps them in order.

The membership is a fold over these records; votes, heartbeats and plain operations are not among them.
"""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, get_args

from collectives.records import Member

from .errors import ConfigurationError
from .messages import MessageError, OperationSpec, decode, encode
from .runstate import RunState

FORMAT = "elastic-journal-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A coordinator began to serve; generation is its life."""

    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    member: Member
    site: str
    life: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Departed:
    name: str
    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRegistered:
    """samples: in an epoch; STREAM (-1) if only its end will tell."""

    samples: int
    shard_size: int
    seed: int
    epochs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEnded:
    """A peer has reached the end of this epoch of the stream, after so many samples."""

    epoch: int
    samples: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """name: of a peer, or of a team of twins (`twins.Twins.team`); in Released, too."""

    name: str
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Released:
    """The unfinished shards of this name may go to others."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paired:
    """From now on this name is in that team of twins, whose shards it reads; "": in none."""

    name: str
    team: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopFounded:
    """Version 0 of an outer loop's state is this one. parameters: a line for each tensor in it."""

    tag: str
    spec: OperationSpec
    fragment: int
    state_hash: str
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """A round of an outer loop is final. tokens: that it adds to the run. starts: as in Propose.

    elapsed: of the run, in seconds. scale, share, mass, covers: as in Commit.
    """

    tag: str
    round: int
    attempt: int
    fragment: int
    version: int
    contributors: tuple[str, ...]
    cursors: dict[int, int]
    tokens: float
    digest: str
    skipped: bool = False
    elapsed: float = 0.0
    starts: dict[int, int] = field(default_factory=dict)
    scale: float = 1.0
    share: float = 1.0
    mass: float = 1.0
    covers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Halted:
    """Nobody can say what this version of the loop's state is. It is void, and the loop stands until it is Restored to
    an earlier one."""

    tag: str
    fragment: int
    version: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """The run goes on from `state`, which a checkpoint held or the peers of a lost coordinator brought together.

    Rounds that were committed after it are void; their numbers are not used again. generation: none up to this one is
    opened again.
    """

    state: RunState
    generation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Targeted:
    """The run is over at this many rounds, tokens, seconds, or this held-out loss; 0 means no such target."""

    rounds: int
    tokens: int
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """A target is reached that the other records do not show: time, or held-out loss."""

    target: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Barred:
    """This name is in quarantine, for the how-manieth time. seconds: for so long; 0: for good."""

    name: str
    seconds: float
    strikes: int
    reason: str


Record = (
    Opened | Admitted | Departed | DatasetRegistered | StreamEnded | Leased | Released | Paired | LoopFounded
    | Committed | Halted | Restored | Targeted | Reached | Barred
)  # fmt: skip
RECORDS: dict[str, type] = {kind.__name__: kind for kind in get_args(Record)}


class Journal:
    """An append-only list of records in one SQLite file, written in one transaction per loop turn.

    Raises ConfigurationError for a file that is not this run's journal (it is left untouched), or that another
    coordinator on this machine holds.
    """

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        self._lock = _lock(path)
        try:
            _check_header(path)
            # the server's thread writes what the caller's thread opened; never both at once
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        except BaseException:
            self._lock.close()
            raise
        try:
            self._prepare(run)
        except sqlite3.DatabaseError as error:
            self.close()
            raise ConfigurationError(f"{path} is no journal of elastic ({error}); name another") from None
        except BaseException:
            self.close()
            raise

    def _prepare(self, run: str) -> None:
        tables = {row[0] for row in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if not tables:
            self._create(run)
        elif not {"meta", "records"} <= tables:
            raise ConfigurationError(f"{self._path} is another program's database; name another journal")
        meta = dict(self._db.execute("SELECT key, value FROM meta"))
        if meta.get("format") != FORMAT:
            raise ConfigurationError(f"{self._path} has format {meta.get('format')!r}, this version reads {FORMAT!r}")
        if meta.get("run") != run:
            raise ConfigurationError(f"{self._path} is the journal of run {meta.get('run')!r}, not of {run!r}")
        self._db.execute("PRAGMA synchronous = FULL")

    def _create(self, run: str) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("BEGIN")
        self._db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT)")
        self._db.execute("CREATE TABLE records (number INTEGER PRIMARY KEY, body BLOB NOT NULL)")
        self._db.executemany("INSERT INTO meta VALUES (?, ?)", [("format", FORMAT), ("run", run)])
        self._db.execute("COMMIT")

    def read(self) -> list[Any]:
        """All records, oldest first."""
        try:
            rows = self._db.execute("SELECT body FROM records ORDER BY number")
            return [decode(row[0], RECORDS) for row in rows]
        except (MessageError, sqlite3.DatabaseError) as error:
            raise ConfigurationError(f"{self._path} is damaged: {error}; restore a copy or name another") from None

    def append(self, records: Iterable[Record]) -> None:
        """Makes the records durable, all or none, before it returns."""
        rows = [(encode(record),) for record in records]
        if not rows:
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            self._db.executemany("INSERT INTO records (body) VALUES (?)", rows)
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def close(self) -> None:
        self._db.close()
        self._lock.close()


def read_copy(path: Path) -> tuple[str, list[Record]]:
    """The run's name and all records of a journal that a coordinator may be writing: from a copy of its files.

    Neither the file nor its lock is touched. Raises ConfigurationError for a file that is no journal, or is damaged.
    """
    try:
        _check_header(path)
        with TemporaryDirectory() as folder:
            copy = _copied(path, Path(folder))
            with closing(sqlite3.connect(copy)) as db:
                meta = dict(db.execute("SELECT key, value FROM meta"))
                rows = db.execute("SELECT body FROM records ORDER BY number").fetchall()
        if meta.get("format") != FORMAT:
            raise ConfigurationError(f"{path} has format {meta.get('format')!r}, this version reads {FORMAT!r}")
        return meta["run"], [decode(row[0], RECORDS) for row in rows]
    except OSError as error:
        raise ConfigurationError(f"cannot read the journal {path}: {error.strerror}") from None
    except (sqlite3.DatabaseError, MessageError, KeyError) as error:
        raise ConfigurationError(f"{path} is no journal of elastic, or damaged: {error}") from None


def _copied(path: Path, folder: Path) -> Path:
    """Database and write-ahead log as of one moment: records are only appended to the log, so that any length of it
    will do; but now and then the log is moved into the database, and then the two must be read anew."""
    log = path.with_name(path.name + "-wal")
    while True:
        before = path.stat().st_mtime_ns
        copy = Path(shutil.copy(path, folder))
        if log.exists():
            shutil.copy(log, folder)
        if path.stat().st_mtime_ns == before:
            return copy


def _check_header(path: Path) -> None:
    # sqlite would happily turn an existing empty or short foreign file into a database
    with path.open("rb") as file:
        head = file.read(16)
    if head and head != b"SQLite format 3\0":
        raise ConfigurationError(f"{path} is no journal of elastic; move it away or name another")


def _lock(path: Path) -> IO[bytes]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab")
    except OSError as error:
        raise ConfigurationError(f"cannot open the journal {path}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigurationError(f"another coordinator holds the journal {path}; stop it or name another") from None
    return file

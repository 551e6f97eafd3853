"""The journal keeps what it was given, and leaves alone what is not its own."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from collectives.records import Member
from elastic.errors import ConfigurationError
from elastic.journal import (
    Admitted,
    Committed,
    Departed,
    Halted,
    Journal,
    Leased,
    LoopFounded,
    Opened,
    Record,
    read_copy,
)
from elastic.messages import OperationSpec

SPEC = OperationSpec(op="mean", dtype="float32", elements=8, wire="f32")
SOME: list[Record] = [
    Opened(generation=1),
    Admitted(member=Member(name="a", incarnation=1 << 62, addresses=("h:1",)), site="s", life=1),
    LoopFounded(tag="outer", spec=SPEC, fragment=0, state_hash="h"),
    Leased(name="a", shards=(0, 3)),
    Committed(tag="outer", round=0, attempt=0, fragment=0, version=1, contributors=("a",), cursors={0: 2, 3: 1},
              tokens=3.0, digest="d"),
    Halted(tag="outer", fragment=0, version=1, reason="nobody can say"),
    Departed(name="a", incarnation=1 << 62, reason="left"),
]  # fmt: skip


def written(path: Path) -> Path:
    journal = Journal(path, "run")
    journal.append(SOME)
    journal.close()
    return path


def refused(path: Path, run: str = "run", says: str = "name another|damaged") -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match=says), closing(Journal(path, run)) as journal:
        journal.read()
    assert path.read_bytes() == before


def test_records_come_back_in_order_also_in_several_turns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "deep" / "er" / "journal", "run")
    assert journal.read() == []
    journal.append(SOME[:2])
    journal.append([])
    journal.append(SOME[2:])
    assert journal.read() == SOME
    journal.close()
    again = Journal(tmp_path / "deep" / "er" / "journal", "run")
    assert again.read() == SOME
    again.close()


@pytest.mark.parametrize("content", [b"my thesis\n", b"SQLite format 3\0" + b"\xff" * 200, bytes(range(256)) * 20])
def test_a_foreign_file_is_left_untouched(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "journal"
    path.write_bytes(content)
    refused(path)


def test_another_programs_database_is_left_untouched(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE sales (amount)")
    database.close()
    refused(path, says="another program's database")


@pytest.mark.parametrize("key, value, says", [("format", "elastic-journal-9", "format"), ("run", "other", "'other'")])
def test_another_format_or_run_is_refused_naming_it(tmp_path: Path, key: str, value: str, says: str) -> None:
    path = written(tmp_path / "journal")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE meta SET value = ? WHERE key = ?", (value, key))
    database.close()
    refused(path, says=says)


@pytest.mark.parametrize("body", [b"", b"garbage", b"\x81\xa4type\xa4Pong"])
def test_a_damaged_record_is_refused(tmp_path: Path, body: bytes) -> None:
    path = written(tmp_path / "journal")
    with sqlite3.connect(path) as database:
        database.execute("UPDATE records SET body = ? WHERE number = 3", (body,))
    database.close()
    refused(path, says="damaged")


def test_overwritten_pages_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    refused(path)


def test_a_second_coordinator_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    first = Journal(tmp_path / "journal", "run")
    with pytest.raises(ConfigurationError, match="another coordinator"):
        Journal(tmp_path / "journal", "run")
    first.append(SOME)
    assert first.read() == SOME
    first.close()
    Journal(tmp_path / "journal", "run").close()


def test_a_refused_journal_can_be_opened_again(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    refused(path, run="other", says="not of .other.")
    journal = Journal(path, "run")
    assert journal.read() == SOME
    journal.close()


@pytest.mark.parametrize("name", ["file/journal", "folder", "file/deeper/journal"])
def test_an_impossible_path_is_a_configuration_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigurationError, match="cannot open the journal"):
        Journal(tmp_path / name, "run")


def test_a_turn_is_durable_whole_or_not_at_all(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "run")
    broken: Any = Opened(generation=1 << 70)
    with pytest.raises(OverflowError):
        journal.append([SOME[0], broken])
    assert journal.read() == []
    journal._db.execute("CREATE TEMP TRIGGER full AFTER INSERT ON records WHEN NEW.number = 2 "
                        "BEGIN SELECT RAISE(ABORT, 'disk full'); END")  # fmt: skip
    with pytest.raises(sqlite3.DatabaseError, match="disk full"):
        journal.append(SOME)
    assert journal.read() == []
    journal._db.execute("DROP TRIGGER full")
    journal.append(SOME)
    assert journal.read() == SOME
    journal.close()


def test_what_was_appended_survives_a_kill(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from elastic.journal import Journal, Opened\n"
        "journal = Journal(Path(sys.argv[1]), 'run')\n"
        "for number in range(20): journal.append([Opened(generation=number)])\n"
        "journal._db.execute('BEGIN'); journal._db.execute('INSERT INTO records (body) VALUES (1)')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "journal"
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=root, timeout=60, check=False)
    journal = Journal(path, "run")
    assert journal.read() == [Opened(generation=number) for number in range(20)]
    journal.close()


def test_a_copy_taken_while_it_is_written_is_a_journal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "run")
    journal.append(SOME)
    for name in ("journal", "journal-wal"):
        shutil.copy(tmp_path / name, tmp_path / f"copy{name.removeprefix('journal')}")
    journal.close()
    copy = Journal(tmp_path / "copy", "run")
    assert copy.read() == SOME
    copy.close()


def test_a_journal_in_use_is_read_through_a_copy(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal", "run")
    journal.append(SOME)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert read_copy(tmp_path / "journal") == ("run", SOME)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    journal.close()
    assert read_copy(tmp_path / "journal") == ("run", SOME)


@pytest.mark.parametrize("content", [b"my thesis\n", b"SQLite format 3\0" + b"\xff" * 200, b""])
def test_a_copy_of_what_is_no_journal_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal").write_bytes(content)
    with pytest.raises(ConfigurationError, match="no journal of elastic"):
        read_copy(tmp_path / "journal")
    with pytest.raises(ConfigurationError, match="cannot read the journal"):
        read_copy(tmp_path / "none")

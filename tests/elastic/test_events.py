"""One event, one line; a reader may follow while they are written."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from elastic.errors import ConfigurationError
from elastic.events import EventLog, EventReader


def test_events_that_find_a_full_disk_are_dropped_and_counted() -> None:
    log = EventLog(Path("/dev/full"), run="r")
    for _ in range(3):
        log.emit("round.committed", round=1)
    assert log.dropped == 3
    log.close()


def test_events_carry_who_when_and_what(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "deep" / "eu-1.jsonl", run="r", peer="eu-1")
    log.emit("peer.joined", epoch=3, text="two\nlines")
    log.close()
    (line,) = (tmp_path / "deep" / "eu-1.jsonl").read_text().splitlines()
    event = json.loads(line)
    assert event["event"] == "peer.joined" and (event["run"], event["peer"]) == ("r", "eu-1")
    assert event["epoch"] == 3 and event["text"] == "two\nlines" and event["time_unix"] > 0 and "monotonic" in event


def test_without_a_path_events_are_dropped() -> None:
    log = EventLog(None, run="r")
    log.emit("anything")
    log.close()


def test_after_close_events_are_dropped(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", run="r")
    log.close()
    log.emit("too.late")
    log.close()
    assert (tmp_path / "log").read_text() == ""


def test_a_second_life_appends(tmp_path: Path) -> None:
    for life in (1, 2):
        log = EventLog(tmp_path / "log", run="r")
        log.emit("began", life=life)
        log.close()
    assert [event["life"] for event in EventReader(tmp_path / "log").read()] == [1, 2]


def test_lines_of_several_threads_stay_whole(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "log", run="r")
    threads = [threading.Thread(target=lambda t=t: [log.emit("e", t=t, i=i) for i in range(200)]) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    log.close()
    events = list(EventReader(tmp_path / "log").read())
    assert {(event["t"], event["i"]) for event in events} == {(t, i) for t in range(4) for i in range(200)}


def test_a_reader_follows_and_waits_for_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log"
    reader = EventReader(path)
    assert list(reader.read()) == []
    with path.open("w") as file:
        file.write('{"event": "one"}\n{"event": "tw')
        file.flush()
        assert [event["event"] for event in reader.read()] == ["one"]
        assert list(reader.read()) == []
        file.write('o"}\n')
        file.flush()
        assert [event["event"] for event in reader.read()] == ["two"]


def test_a_line_that_a_kill_cut_short_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"event": "one"}\n{"event": "ha{"event": "next life"}\n\xff\xfe\n17\n{"event": "two"}\n')
    assert [event["event"] for event in EventReader(path).read()] == ["one", "two"]


def test_a_path_that_cannot_be_written_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "log"):
        with pytest.raises(ConfigurationError, match="cannot write events"):
            EventLog(path, run="r")

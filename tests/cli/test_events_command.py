"""`elastic events` and `elastic replay`: what they make of logs that are whole, cut off, wrong, or still written."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cli import exits
from cli.main import main
from cli.replay import pace, play
from cli.view import LogView

HERE = Path(__file__).parents[2]


def line(at: float, event: str, **fields: Any) -> str:
    return json.dumps({"event": event, "time_unix": at, "monotonic": at, "run": "corn"} | fields) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A coordinator's log and a peer's, which interleave."""
    (tmp_path / "coordinator.jsonl").write_text(
        line(100.0, "coordinator.started", generation=1)
        + line(101.0, "peer.joined", peer="p0", life=1, epoch=1)
        + line(102.0, "peer.joined", peer="p1", life=1, epoch=2)
        + line(102.5, "run.target_set", peer="p0", rounds=4, tokens=0)
        + line(104.0, "round.committed", round=0, attempt=0, contributors=["p0", "p1"], tokens={"p0": 5}, version=1)
        + line(105.0, "peer.evicted", peer="p1", evidence="refused", epoch=3)
        + line(106.0, "round.committed", round=1, attempt=1, contributors=["p0"], tokens={"p0": 7}, version=2)
    )
    (tmp_path / "p0.jsonl").write_text(line(103.0, "train.loss", peer="p0", step=9, round=0, loss=2.5))
    return tmp_path


def run(*words: Any) -> Result:
    return CliRunner().invoke(main, list(map(str, words)))


def test_logs_of_a_folder_are_one_story(folder: Path) -> None:
    result = run("events", folder, "--json")
    found = [json.loads(each) for each in result.output.splitlines()]
    assert result.exit_code == exits.OK
    assert [each["time_unix"] for each in found] == [100.0, 101.0, 102.0, 102.5, 103.0, 104.0, 105.0, 106.0]


@pytest.mark.parametrize(
    ("words", "times"),
    [
        (("--only", "round.*"), [104.0, 106.0]),
        (("--only", "round.*", "--only", "peer.evicted"), [104.0, 105.0, 106.0]),
        (("--peer", "p1"), [102.0, 104.0, 105.0]),
        (("--peer", "p1", "--only", "peer.*"), [102.0, 105.0]),
        (("--last", "2"), [105.0, 106.0]),
        (("--peer", "nobody"), []),
    ],
)
def test_what_is_asked_for(folder: Path, words: tuple[str, ...], times: list[float]) -> None:
    result = run("events", folder, "--json", *words)
    assert [json.loads(each)["time_unix"] for each in result.output.splitlines()] == times, result.output


def test_people_get_words(folder: Path) -> None:
    output = run("events", folder).output
    assert "round 1 committed by p0 (7 tokens, attempt 1)" in output and "p1 was evicted: refused" in output
    assert "\x1b" not in output


def test_a_log_that_is_cut_off_in_mid_line_is_shown_up_to_there(folder: Path) -> None:
    log = folder / "coordinator.jsonl"
    log.write_bytes(log.read_bytes()[:-10])
    result = run("events", log, "--json")
    assert result.exit_code == exits.OK
    (*said, first) = result.output.splitlines()[::-1]
    assert "ends in the middle of a line" in first and len(said) == 6


@pytest.mark.parametrize("command", ["events", "replay"])
@pytest.mark.parametrize(
    ("content", "words"), [(None, "there is no"), ("", "no events"), ("no log\n[1]\n{}\n", "no events")]
)
def test_what_is_no_log_is_refused_in_one_line(tmp_path: Path, command: str, content: str | None, words: str) -> None:
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    result = run(command, log)
    assert result.exit_code == exits.DATA
    assert words in result.output and len(result.output.splitlines()) == 1 and str(log) in result.output


def test_a_log_that_is_still_written_is_followed_with_new_files_too(folder: Path) -> None:
    command = [sys.executable, "-m", "cli.main", "events", str(folder), "--follow", "--only", "peer.*"]
    environment = os.environ | {"PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as following:
        assert following.stdout is not None
        seen = [following.stdout.readline() for _ in range(3)]
        (folder / "p2.jsonl").write_text(line(time.time(), "peer.draining", peer="p2", timeout=3.0))
        seen.append(following.stdout.readline())
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == exits.INTERRUPTED
    assert "p1 was evicted" in seen[2] and "p2 makes one last exchange" in seen[3]


# --- replay -----------------------------------------------------------------------------------------------------------


def test_a_replayed_run_looks_as_it_did(folder: Path) -> None:
    result = run("replay", folder, "--speed", "0")
    assert result.exit_code == exits.OK
    for words in ("p0 joined (life 1)", "round 0 committed by p0, p1", "p1 was evicted", "attempt 1"):
        assert words in result.output, result.output


def test_the_last_picture_is_that_of_the_last_event(folder: Path) -> None:
    from cli.logs import whole_story

    waited: list[float] = []
    story = play(whole_story([folder])[0], LogView(io.StringIO()), waited.append)
    now = story.now()
    assert (now.round, now.rounds_target, now.contributors, now.epoch) == (2, 4, ("p0",), 3)
    assert now.elapsed_seconds == sum(waited) == 6.0
    states = {peer.name: (peer.state, peer.round, peer.step, peer.loss) for peer in now.peers}
    assert states == {"p0": ("training", 2, 9, 2.5), "p1": ("lost", 1, 0, None)}


def test_pauses_are_as_long_as_they_were_by_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("cli.replay.time.sleep", slept.append)
    for seconds in (1.0, 0.0, 100.0):
        pace(10.0, 2.0)(seconds)
        pace(0.0, 2.0)(seconds)
    assert slept == [0.1, 2.0]


@pytest.mark.parametrize("value", [None, [], {}, "x", True, -1])
def test_whatever_a_log_says_a_story_goes_on(value: Any) -> None:
    names = ("round.committed", "peer.joined", "train.loss", "round.applied", "run.target_set", "heldout.evaluated")
    fields = ("peer", "life", "step", "loss", "round", "version", "contributors", "rounds", "epoch", "skipped")
    events = [{"event": name, "time_unix": 1.0} | dict.fromkeys(fields, value) for name in names]
    play(events, LogView(io.StringIO()), lambda seconds: None)

"""The demo from end to end, as a user runs it; and what it says to input that cannot work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from processes import left_folders, processes_of, wait_for
from safetensors import safe_open

ELASTIC = [sys.executable, "-m", "cli.main"]
QUICK = ["demo", "--rounds", "9", "--sync-every", "10"]


def elastic(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ELASTIC, *arguments], capture_output=True, text=True, cwd=cwd, timeout=60)


MARK = "DEMO_WITNESSED"


def witnesses_of(folder: Path) -> list[int]:
    """The witnesses that were started by a demo in this folder: each is in a session of its own."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            line, environ = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
            if b"elastic.witness" in line and f"{MARK}={folder}".encode() in environ.split(b"\0"):
                found.append(int(entry.name))
    return found


# --- from end to end --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A small demo with the kill: its folder, its report, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    process = subprocess.Popen(
        [*ELASTIC, *QUICK, "--out", "out"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"ELASTIC_WITNESS": "1", MARK: str(folder)},
    )
    deadline = time.monotonic() + 100
    while len(witnesses_of(folder)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.5)
    assert process.poll() is None, "it ended before there were three witnesses"
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == 0, printed
    assert not processes_of(process.pid) and not witnesses_of(folder)
    return folder / "out", json.loads((folder / "out" / "report.json").read_text()), printed


@pytest.mark.timeout(300)
def test_the_kill_happened_in_mid_exchange_and_the_survivors_finished_that_round(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    out, report, _ = finished
    fired = [json.loads(line) for line in (out / "events" / "faults.jsonl").read_text().splitlines()]
    assert len(fired) == len(report["kills"]) == 1
    assert 0 < fired[0]["at"]["chunks_received"] < fired[0]["at"]["chunks_expected"], "struck in the middle"
    kill = report["kills"][0]
    assert kill["peer"] == fired[0]["peer"] and kill["round"] == fired[0]["round"] == 3
    assert kill["survivors_finished_round"] is True
    hit = next(entry for entry in report["contributors_per_round"] if entry["round"] == kill["round"])
    assert set(hit["contributors"]) == set(report["peers"]) - {kill["peer"]} and hit["attempt"] == 1
    assert kill["detected_seconds"] is not None and kill["contributed_again_seconds"] is not None


def test_each_peer_had_a_witness_and_nothing_was_taken_for_a_hang(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, _ = finished
    logs = {path.stem: path.read_text() for path in (out / "events").glob("*.jsonl")}
    assert logs.keys() >= {"coordinator", *report["peers"]}
    assert not any("witness.failed" in log or "witness.lost" in log for log in logs.values())
    told = [json.loads(line) for line in logs["coordinator"].splitlines() if "anomaly.confirmed" in line]
    assert {event["kind"] for event in told} & {"hang outside communication", "hang in communication"} == set()
    assert ("crash", [report["kills"][0]["peer"]]) in [(event["kind"], event["culprits"]) for event in told]


def test_all_states_are_equal_and_the_loss_fell(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, report, _ = finished
    hashes = report["state_hash"]
    assert len(hashes) == 3 and len(set(hashes.values())) == 1 and None not in hashes.values()
    assert report["rounds_committed"] == 9 and report["interrupted"] is False
    assert report["heldout_loss_last"] <= 0.75 * report["heldout_loss_first"]


def test_the_kill_is_named_as_a_crash_and_no_other_peer_is_blamed(
    finished: tuple[Path, dict[str, Any], str],
) -> None:
    out, report, _ = finished
    events = [json.loads(line) for line in (out / "events" / "coordinator.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "anomaly.confirmed"]
    victim = report["kills"][0]["peer"]
    assert {(event["kind"], *event["culprits"]) for event in told} == {("crash", victim)}


def test_tokens_were_counted_once(finished: tuple[Path, dict[str, Any], str]) -> None:
    """By three accounts: the commits' weights, the journal's cursors, and the steps that each peer says it made."""
    from elastic.config import RunPolicy, Timeouts
    from elastic.journal import Committed, Journal
    from elastic.membership import Membership

    out, report, _ = finished
    journal = Journal(out / "journal.sqlite", "demo")
    records = journal.read()
    journal.close()
    membership = Membership("demo", RunPolicy(), Timeouts())
    membership.begin(records, 0.0)
    assert membership.table is not None
    context = 128
    assert report["tokens_committed"] == membership.table.committed * context == membership.tokens
    assert sum(report["tokens_per_peer"].values()) == report["tokens_committed"]
    assert cursors_never_went_back(record for record in records if isinstance(record, Committed))
    stepped = sum(len(steps_of(path)) for path in (out / "events").glob("peer-*.jsonl"))
    lost = stepped * 8 * context - report["tokens_committed"]
    assert 0 <= lost <= 10 * 8 * context, "only what the killed peer had not committed was trained on again"


def cursors_never_went_back(commits: Any) -> bool:
    seen: dict[int, int] = {}
    for commit in commits:
        for shard, position in commit.cursors.items():
            if position < seen.get(shard, 0):
                return False
            seen[shard] = position
    return True


def steps_of(path: Path) -> list[int]:
    events = [json.loads(line) for line in path.read_text().splitlines()]
    return [event["step"] for event in events if event["event"] == "train.loss"]


def test_what_it_leaves_behind(finished: tuple[Path, dict[str, Any], str]) -> None:
    out, report, printed = finished
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    with safe_open(out / "model.safetensors", "pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == 853_120  # noqa: SIM118
    assert len(report["sample_text"]) > 100
    assert set(report["bytes_sent_per_peer"]) == set(report["peers"])
    assert all(sent > 1_000_000 for sent in report["bytes_sent_per_peer"].values())
    assert report["versions"]["torch"] and report["wall_seconds"] > 0
    assert "\x1b" not in printed, "plain log lines when it is not on a terminal"
    assert "in the middle of round 3" in printed and "round 8 committed" in printed


def test_why_a_peer_was_given_up_is_said_with_its_last_words() -> None:
    from actors.charge import ChargeReport
    from cli.demo import _failure

    error = "ended 4 times within 29 s (it hangs)\nthe last lines of logs/peer-1.4.log:\n  the last word"
    charge = ChargeReport(name="peer-1", state="failed", lives=4, pid=0, trained=None, error=error)
    assert _failure(charge) == f"peer-1: {error}" and charge.reason == "ended 4 times within 29 s (it hangs)"


# --- interrupted ------------------------------------------------------------------------------------------------------


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*ELASTIC, "demo", *arguments, "--out", "out"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def committed(folder: Path) -> bool:
    events = folder / "out" / "events" / "coordinator.jsonl"
    return events.exists() and "round.committed" in events.read_text()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_it_ends_everything_and_still_reports(tmp_path: Path, number: int) -> None:
    process = start(tmp_path, "--rounds", "200", "--no-kill")
    wait_for(lambda: committed(tmp_path), process)
    pressed = time.monotonic()
    os.killpg(process.pid, number)
    printed, _ = process.communicate(timeout=60)
    print(f"{signal.Signals(number).name}: ended {time.monotonic() - pressed:.1f} s later; at most 5 s are promised")
    assert process.returncode == 130, printed
    assert not processes_of(process.pid)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["interrupted"] is True and report["rounds_committed"] >= 1
    assert (tmp_path / "out" / "loss.png").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", ["nothing started", "Ray starts", "training"])
def test_whoever_presses_again_and_again_does_not_break_the_end(tmp_path: Path, moment: str) -> None:
    before = left_folders()
    process = start(tmp_path, "--rounds", "200", "--no-kill")
    due = {
        "nothing started": lambda: "torch" in (Path("/proc") / str(process.pid) / "maps").read_text(),
        "Ray starts": lambda: any("gcs_server" in line for line in processes_of(process.pid).values()),
        "training": lambda: committed(tmp_path),
    }
    wait_for(due[moment], process)
    between = threading.Event()
    while process.poll() is None and not between.wait(0.2):
        os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert not processes_of(process.pid) and left_folders() <= before
    assert (tmp_path / "out" / "report.json").exists() == (moment != "nothing started")


# --- ended by something else ------------------------------------------------------------------------------------------


@pytest.mark.timeout(120)
def test_when_the_coordinator_is_killed_it_says_so_and_reports(tmp_path: Path) -> None:
    before = left_folders()
    process = start(tmp_path, "--rounds", "200", "--no-kill")
    wait_for(lambda: committed(tmp_path), process)
    (victim,) = processes_of(process.pid, "ray::CoordinatorActor")
    os.kill(victim, signal.SIGKILL)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in printed, printed
    assert len([line for line in printed.splitlines() if "the run ended early" in line]) == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["rounds_committed"] >= 1 and report["interrupted"] is False
    assert not processes_of(process.pid) and left_folders() <= before


@pytest.mark.timeout(120)
def test_in_a_short_run_that_nobody_reads_the_killed_peer_still_ends_with_the_others(tmp_path: Path) -> None:
    process = start(tmp_path, "--rounds", "3", "--sync-every", "5")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=100) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert len(report["kills"]) == 1
    assert report["rounds_committed"] == 3 and report["state_hashes_equal"] is True


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--peers", "0"], 2, "0 is not in the range"),
        (["--stripes", "-1"], 2, "-1 is not in the range"),
        (["--rounds", "none"], 2, "'none' is not a valid integer"),
        (["--wire", "f31"], 2, "'f31' is not one of"),
        (["--peers", "1"], 2, "--no-kill"),
        (["--rounds", "2"], 2, "--no-kill"),
        (["--data", "missing.txt"], 3, "missing.txt"),
        (["--data", "latin1.txt"], 3, "latin1.txt"),
        (["--data", "little.txt"], 3, "too little text"),
        (["--out", "file/out"], 5, "file/out"),
        (["--out", "old"], 5, "another run"),
        (["--out", "loop/out"], 5, "loop/out"),
        (["--data", "x" * 300], 3, "File name too long"),
    ],
)
def test_bad_input_gets_one_line_and_a_code(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100_000)
    (tmp_path / "little.txt").write_text("too short\n")
    (tmp_path / "file").write_text("a file, not a folder")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "report.json").write_text("{}")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.rglob("*"))
    found = elastic("demo", *arguments, cwd=tmp_path)
    assert found.returncode == code, found.stderr
    assert words in found.stderr and "Traceback" not in found.stderr + found.stdout
    assert len([line for line in found.stderr.splitlines() if line.startswith(("Error", "elastic demo:"))]) == 1
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before and "elastic-demo-" not in str(path)]
    assert [path for path in made if path.parts[-1] not in ("events",)] == []


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = elastic("demo", "--port", str(port), cwd=tmp_path)
    assert found.returncode == 4 and f"port {port}" in found.stderr and "Traceback" not in found.stderr


def test_an_unknown_variable_is_refused_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_STRIPS", "2")
    found = elastic("demo", cwd=tmp_path)
    assert found.returncode == 2 and not list(tmp_path.iterdir())
    assert found.stderr.splitlines() == [
        "elastic demo: unknown environment variable ELASTIC_STRIPS: did you mean ELASTIC_STRIPES?"
    ]


def test_help_has_an_example_and_every_option() -> None:
    found = subprocess.run([*ELASTIC, "demo", "--help"], capture_output=True, text=True, check=True)
    for option in ("--data", "--peers", "--rounds", "--sync-every", "--wire", "--stripes", "--kill", "--seed", "--out"):
        assert option in found.stdout
    assert "Example: elastic demo" in found.stdout

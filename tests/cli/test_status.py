"""`elastic status`: what it prints about a living run and about a journal, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import elastic.vitals
from cli import exits
from cli.main import main
from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.journal import Committed, DatasetRegistered, Journal, Leased, Record
from elastic.outer.diloco import DiLoCo
from elastic.peer import Peer

TIMES = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=30)


def status(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["status", *map(str, arguments)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def served(folder: Path) -> Iterator[Coordinator]:
    policy = RunPolicy(rounds=9)
    with Coordinator(run="corn", policy=policy, timeouts=TIMES, journal=folder / "journal") as coordinator:
        yield coordinator


@pytest.fixture
def training(served: Coordinator, folder: Path) -> Iterator[Coordinator]:
    """A run in which eu-1 has committed 8 of 40 samples."""
    model = torch.nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with Peer(served.address, run="corn", name="eu-1", site="eu", timeouts=TIMES, events_dir=folder) as peer:
        with DiLoCo(model, inner, peer, sync_every=2):
            for number, batch in enumerate(peer.shards(torch.ones(40, 1), batch_size=4, shard_size=10, epochs=1)):
                if number == 2:
                    break
                model(batch).sum().backward()
                inner.step()
            yield served


def test_a_person_sees_peers_progress_and_shards(training: Coordinator) -> None:
    result = status(training.address, "--name", "corn", "--shards")
    assert result.exit_code == exits.OK, result.output
    for words in ("corn  running  generation 1", "rounds 1/9  tokens 8", "eu-1", "active", "every sample counts once",
                  "8 samples committed  0 twice  0 missing"):  # fmt: skip
        assert words in result.output, result.output
    assert "\x1b" not in result.output


def test_what_is_wrong_is_said_with_its_numbers(training: Coordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SimpleNamespace(statvfs=lambda folder: SimpleNamespace(f_bavail=5, f_blocks=2000, f_frsize=1 << 20))
    monkeypatch.setattr(elastic.vitals, "os", disk)
    deadline = time.monotonic() + 60
    while "disk full" not in (output := status(training.address, "--name", "corn").output):
        assert time.monotonic() < deadline, output
        time.sleep(0.1)
    assert "disk full: eu-1  for " in output and "free_bytes 5.24" in output and "5.2 MB" in output
    (verdict,) = json.loads(status(training.address, "--name", "corn", "--json").output)["verdicts"]
    assert (verdict["kind"], verdict["culprits"]) == ("disk full", ["eu-1"])


def test_a_program_gets_one_json_object(training: Coordinator) -> None:
    found = json.loads(status(str(training.token), "--shards", "--json").output)
    assert (found["run"], found["generation"], found["progress"]["rounds"], found["progress"]["targets"]["rounds"]) == (
        "corn",
        1,
        1,
        9,
    )
    (member,) = found["members"]
    assert (member["name"], member["site"], member["version"]) == ("eu-1", "eu", 1) and member["status"]["loss"] is None
    audit = found["audit"]
    assert (audit["committed"], audit["twice"], audit["missing"], audit["passed"]) == (8, 0, 0, True)
    (epoch,) = audit["epochs"]
    assert (epoch["epoch"], epoch["samples"]) == (0, 40)
    assert epoch["open"][0] == {"shard": 0, "holder": "eu-1", "cursor": 8}
    assert "audit" not in json.loads(status(str(training.token), "--json").output)


def test_a_journal_in_use_is_audited_and_left_as_it_is(training: Coordinator, folder: Path) -> None:
    files = sorted(folder.glob("journal*"))
    before = [(path, path.read_bytes(), path.stat().st_mtime_ns) for path in files if not path.name.endswith("-shm")]
    result = status("--journal", folder / "journal", "--json")
    found = json.loads(result.output)
    assert result.exit_code == exits.OK and found["audit"]["committed"] == 8 and found["run"] == "corn"
    assert sorted(folder.glob("journal*")) == files
    assert [(path, path.read_bytes(), path.stat().st_mtime_ns) for path, *_ in before] == before
    assert "eu-1" in status("--journal", folder / "journal").output


def test_a_journal_that_can_only_be_read_will_do(folder: Path) -> None:
    with Coordinator(run="corn", journal=folder / "journal"):
        pass
    os.chmod(folder / "journal", 0o400)
    assert status("--journal", folder / "journal").exit_code == exits.OK


def test_an_account_that_does_not_add_up_is_a_data_error(folder: Path) -> None:
    def commit(start: int, stop: int) -> Committed:
        fields: dict[str, Any] = {"tag": "outer", "fragment": 0, "attempt": 0, "digest": "d", "contributors": ("a",)}
        return Committed(**fields, round=0, version=1, cursors={0: stop}, starts={0: start}, tokens=1.0)

    records: list[Record] = [
        DatasetRegistered(samples=10, shard_size=10, seed=0, epochs=1),
        Leased(name="a", shards=(0,)),
        commit(0, 6),
        commit(3, 8),
    ]
    journal = Journal(folder / "journal", "corn")
    journal.append(records)
    journal.close()
    result = status("--journal", folder / "journal")
    assert result.exit_code == exits.DATA
    assert "does not add up" in result.output and "3 twice" in result.output


@pytest.mark.parametrize("content", [None, b"my thesis\n", b"SQLite format 3\0" + b"\xff" * 200, b""])
def test_what_is_no_journal_is_said(folder: Path, content: bytes | None) -> None:
    path = folder / "journal"
    if content is not None:
        path.write_bytes(content)
    result = status("--journal", path)
    assert result.exit_code == exits.DATA and "journal" in result.output and "Traceback" not in result.output
    assert content is None or path.read_bytes() == content


def test_a_coordinator_that_does_not_answer_is_a_network_error() -> None:
    result = status("tcp://127.0.0.1:9", "--name", "corn", "--timeout", 0.2)
    assert result.exit_code == exits.NETWORK and "no answer from the coordinator" in result.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "say which run"),
        (("tcp://127.0.0.1:9",), "--name"),
        (("127.0.0.1:9",), "a join token looks like"),
        (("tcp://127.0.0.1", "--name", "corn"), "not HOST:PORT"),
    ],
)
def test_what_does_not_name_a_run_is_a_usage_error(arguments: tuple[str, ...], words: str) -> None:
    result = status(*arguments)
    assert result.exit_code == exits.USAGE and words in result.output


def test_another_run_is_named(served: Coordinator) -> None:
    result = status(served.address, "--name", "wheat")
    assert result.exit_code == exits.USAGE and "serves run 'corn'" in result.output


# --- watched ----------------------------------------------------------------------------------------------------------


@contextmanager
def watching(address: str, *words: str) -> Iterator[subprocess.Popen[str]]:
    command = [
        sys.executable,
        "-m",
        "cli.main",
        "status",
        address,
        "--name",
        "corn",
        "--watch",
        "--timeout",
        "1",
        *words,
    ]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == exits.INTERRUPTED


def test_a_run_is_watched_until_ctrl_c(training: Coordinator) -> None:
    with watching(training.address, "--json") as process:
        assert process.stdout is not None
        reports = [json.loads(process.stdout.readline()) for _ in range(3)]
    assert [each["run"] for each in reports] == ["corn"] * 3
    assert {member["name"] for each in reports for member in each["members"]} == {"eu-1"}


def test_a_coordinator_that_goes_away_is_waited_for(folder: Path) -> None:
    options: dict[str, Any] = {"run": "corn", "policy": RunPolicy(), "timeouts": TIMES, "journal": folder / "journal"}
    with ExitStack() as stack:
        with Coordinator(**options) as first:
            process = stack.enter_context(watching(first.address, "--json"))
            assert process.stdout is not None and process.stderr is not None
            assert json.loads(process.stdout.readline())["generation"] == 1
        assert "no answer from the coordinator" in process.stderr.readline()
        stack.enter_context(Coordinator(first.address, **options))
        while json.loads(process.stdout.readline())["generation"] != 2:
            pass

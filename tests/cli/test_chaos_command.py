"""`elastic chaos` on a real run: every fault of the example fires, and what the run holds afterwards is right."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from cli.main import main
from elastic.config import FAULT_CLASSES
from elastic.events import EventReader
from fault.orders import registered

HERE = Path(__file__).parents[2]
EXAMPLE = HERE / "examples" / "chaos.toml"
NAMES = ("p0", "p1", "p2")


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


class Keeper:
    """Keeps a run going as a supervisor does: what has ended before it was to end is started again."""

    def __init__(self, folder: Path, port: int, names: tuple[str, ...] = NAMES) -> None:
        self.folder, self.chaos, self.port = folder, folder / "chaos", port
        self.environment = {
            **os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1", "ELASTIC_CHAOS": str(self.chaos)
        }  # fmt: skip
        self.lives: dict[str, list[subprocess.Popen[bytes]]] = {}
        self.ending = threading.Event()
        self.start("coordinator")
        for name in names:
            self.start(name)
        self.thread = threading.Thread(target=self.keep, name="keeper")
        self.thread.start()

    def start(self, name: str) -> None:
        if name == "coordinator":
            bind = ("--bind", f"127.0.0.1:{self.port}", "--journal", "j.sqlite", "--events", "coordinator.jsonl")
            # nobody is to be out of the run when its next fault is due
            observed = [word for each in FAULT_CLASSES for word in ("--on-fault", f"{each}=observe")]
            words = ["-m", "cli.main", "coordinator", "--run", "drill", *bind, *observed]
        else:
            words = [str(Path(__file__).with_name("drill_worker.py")), f"tcp://127.0.0.1:{self.port}", name, "."]
        with (self.folder / f"{name}.output").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *words], cwd=self.folder, env=self.environment, stdout=output, stderr=output
            )
        self.lives.setdefault(name, []).append(process)

    def keep(self) -> None:
        while not self.ending.wait(0.05):
            for name, lives in self.lives.items():
                if lives[-1].poll() is not None and not (name != "coordinator" and lives[-1].returncode == 0):
                    self.start(name)

    def said(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / f"{name}.said"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def version(self, name: str) -> int:
        return max((line["version"] for line in self.said(name)[-20:] if "version" in line), default=-1)

    def output(self) -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()}" for path in self.folder.glob("*.output"))

    def close(self) -> None:
        self.ending.set()
        self.thread.join()
        for process in (each for lives in self.lives.values() for each in lives):
            process.kill()
            process.wait()


@contextmanager
def kept(folder: Path, names: tuple[str, ...] = NAMES) -> Iterator[Keeper]:
    from test_coordinator_command import free_port

    keeper = Keeper(folder, free_port(), names)
    try:
        until(lambda: all(keeper.version(name) >= 1 for name in names))
        yield keeper
    finally:
        keeper.close()


def chaos(keeper: Keeper, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cli.main", "chaos", *arguments]
    return subprocess.Popen(command, env=keeper.environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.timeout(240)
def test_every_fault_of_the_example_fires_and_the_run_ends_right(tmp_path: Path) -> None:
    with kept(tmp_path) as keeper:
        driver = chaos(keeper, str(EXAMPLE), "--json")
        report = json.loads(driver.communicate(timeout=150)[0])
        idle = [each for each in report["faults"] if not each["fired"] or each["why"]]
        assert driver.returncode == 0 and report["all_fired"], f"{idle}\n{keeper.output()}"
        until(lambda: all(each.poll() is None for each in (lives[-1] for lives in keeper.lives.values())))
        last = max(map(keeper.version, NAMES))
        until(lambda: min(map(keeper.version, NAMES)) > last)
        (tmp_path / "end.new").write_text(str(max(map(keeper.version, NAMES)) + 5))
        (tmp_path / "end.new").rename(tmp_path / "end")
        until(lambda: all(keeper.lives[name][-1].poll() == 0 for name in NAMES))
    killed = {name: [life.returncode for life in lives[:-1]] for name, lives in keeper.lives.items()}
    assert killed.pop("coordinator") == [-signal.SIGKILL], keeper.output()
    assert list(itertools.chain(*killed.values())) == [-signal.SIGKILL], keeper.output()
    check_account(keeper, report)
    check_numbers(keeper)


def check_account(keeper: Keeper, report: dict[str, Any]) -> None:
    """What the driver says is what the processes have noted, before they were struck."""
    noted = [json.loads(line) for file in keeper.chaos.glob("*.fired.jsonl") for line in file.read_text().splitlines()]
    assert all(line["event"] == "fault.injected" for line in noted)
    kinds = [each["kind"] for each in report["faults"]]
    assert {line["kind"] for line in noted} == set(kinds) and len(kinds) == 17
    fired = {kind: sum(each["fired"] for each in report["faults"] if each["kind"] == kind) for kind in kinds}
    for kind in kinds:
        assert fired[kind] == sum(line["kind"] == kind for line in noted), kind
    assert (fired["flip"], fired["nan"], fired["scale"], fired["corrupt"], fired["kill"]) == (1, 1, 2, 3, 2)
    events = [event for name in NAMES for event in EventReader(keeper.folder / f"{name}.jsonl").read()]
    told = {event["kind"] for event in events if event["event"] == "fault.injected"}
    assert told == set(kinds) - {"kill", "freeze"}, "what a process does to itself is among its events"
    assert sum(event["event"] == "contribution.refused" for event in events) == 1, "the NaN was not sent"


def check_numbers(keeper: Keeper) -> None:
    """Every version that anybody held is the one before less half the mean of what its contributors gave."""
    held: dict[int, tuple[str, torch.Tensor]] = {}
    given: dict[tuple[str, int], list[tuple[torch.Tensor, float]]] = {}
    for name in NAMES:
        for line in keeper.said(name):
            if "outer" in line:
                state = held.setdefault(line["version"], (line["hash"], numbers(line["outer"])))
                assert state[0] == line["hash"], f"version {line['version']} differs on {name}"
            elif "payload" in line:
                payload = numbers(line["payload"]), line["weight"]
                given.setdefault((name, line["base"]), []).append(payload)
    ends = {(line["version"], line["hash"]) for name in NAMES for line in keeper.said(name) if "ended" in line}
    assert len(ends) == 1, "the peers end with different states"
    checked = 0
    for event in EventReader(keeper.folder / "coordinator.jsonl").read():
        if event["event"] == "round.committed" and {event["version"] - 1, event["version"]} <= held.keys():
            checked += 1
            check_commit(event, held, given)
    assert checked > 100


def numbers(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.float32)


def check_commit(
    event: dict[str, Any],
    held: dict[int, tuple[str, torch.Tensor]],
    given: dict[tuple[str, int], list[tuple[torch.Tensor, float]]],
) -> None:
    """Who has given twice, for one base, may be counted with either: after an attempt that came to nothing."""
    base, version = held[event["version"] - 1][1], held[event["version"]][1]
    choices = [given[name, event["version"] - 1] for name in event["contributors"]]
    for combination in itertools.product(*choices):
        total = sum(weight for _, weight in combination)
        mean = sum((payload * (weight / total) for payload, weight in combination), torch.zeros_like(base))
        if torch.allclose(version, base - 0.5 * mean, rtol=1e-4, atol=1e-5):
            return
    raise AssertionError(f"version {event['version']} is not what {event['contributors']} have given")


def test_ctrl_c_thaws_and_ends(tmp_path: Path) -> None:
    schedule = tmp_path / "freeze.toml"
    schedule.write_text('[[fault]]\nat = 0\nkind = "freeze"\ntarget = "p0"\nfor = 600\n')
    with kept(tmp_path, ("p0",)) as keeper:
        me = registered(keeper.chaos)["p0"]
        driver = chaos(keeper, str(schedule))
        until(lambda: me.state == "T")
        driver.send_signal(signal.SIGINT)
        output, _ = driver.communicate(timeout=20)
        assert driver.returncode == 130 and "1 of 1 faults fired" in output
        assert me.state in "RSD"
        last = keeper.version("p0")
        until(lambda: keeper.version("p0") > last)


def test_what_does_not_fire_is_in_the_table_and_the_exit_code(tmp_path: Path) -> None:
    schedule = tmp_path / "drop.toml"
    schedule.write_text('[[fault]]\nat = 0\nkind = "drop"\ntarget = ["p0", "nobody"]\n')
    with kept(tmp_path, ("p0",)) as keeper:
        driver = chaos(keeper, str(schedule), "--patience", "1")
        output, _ = driver.communicate(timeout=30)
    assert driver.returncode == 1
    assert "p0 -> nobody" in output and "it had no occasion to fire" in output and "0 of 1 faults fired" in output


@pytest.mark.parametrize(
    ("text", "arguments", "code", "words"),
    [
        (
            '[[fault]]\nat = 0\nkind = "exlpode"\ntarget = "a"',
            [],
            3,
            "x.toml: [[fault]] 1 (exlpode): kind 'exlpode' is",
        ),
        (None, [], 3, "cannot read x.toml"),
        ('[[fault]]\nat = 0\nkind = "kill"\ntarget = "a"', [], 2, "say where the processes register: --dir DIR"),
        ('[[fault]]\nat = 0\nkind = "kill"\ntarget = "a"', ["--dir", "open"], 5, "nobody else may write to it"),
        (
            '[[fault]]\nat = 0\nkind = "kill"\ntarget = "a"',
            ["--dir", "c", "--wait", "0.1"],
            4,
            "a did not register in c",
        ),
        ('[[fault]]\nat = 9\nkind = "kill"\ntarget = "a"', ["--seconds", "5"], 3, "comes after the end, 5 s"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELASTIC_CHAOS", raising=False)
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    if text is not None:
        (tmp_path / "x.toml").write_text(text)
    result = CliRunner().invoke(main, ["chaos", "x.toml", *arguments])
    assert result.exit_code == code and words in result.stderr and result.stderr.count("\n") == 1, result.output
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_example_is_checked_without_touching_anything(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["chaos", str(EXAMPLE), "--check"])
    assert result.exit_code == 0 and "15 faults, nothing wrong" in result.output


def test_neither_torch_nor_zmq_is_needed() -> None:
    code = "import sys, cli.chaos; print(sorted({'ray', 'torch', 'numpy', 'zmq'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HERE)
    assert found.stdout.strip() == "[]"

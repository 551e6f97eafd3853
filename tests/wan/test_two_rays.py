"""Two machines with a Ray each, joined by nothing but the emulated WAN: the recipe of examples/two_machines."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.wan.wan import Wan
from elastic.events import EventReader

pytestmark = [pytest.mark.wan, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
TOPOLOGY: dict[str, Any] = {
    "sites": {"a": {}, "b": {}},
    "default": {"rate_mbit": 200, "loss": 0.0001, "queue_ms": 50},
    "links": [{"between": ["a", "b"], "rtt_ms": 40}],
}
# How a script that is no peer of the training ends the run.
SET_TARGET = "import sys, elastic; elastic.Peer(token=sys.argv[1], name='judge', listen='').run_until(rounds={rounds})"


class Recipe:
    """What the two people type, each at their own machine."""

    def __init__(self, wan: Wan, folder: Path) -> None:
        self.wan, self.folder = wan, folder
        self.token = f"elastic://{wan.addr('a')}:29400/patterns"
        self.processes: dict[str, subprocess.Popen[Any]] = {}
        bind = ("--run", "patterns", "--bind", f"{wan.addr('a')}:29400", "--events", "run.jsonl")
        self.type("a", "coordinator", "coordinator", *bind)

    def join(self, site: str) -> None:
        script = str(ROOT / "examples" / "two_machines" / "train.py")
        words = ("join", self.token, script, "--name", site, "--peers", "1", "--config", "sync_every=200")
        self.type(site, f"join-{site}", *words, "--out", f"out-{site}", "--json")

    def type(self, site: str, label: str, *words: str) -> None:
        self.processes[label] = self.wan.popen(
            site,
            [sys.executable, "-m", "cli.main", *words],
            cwd=self.folder,
            stdout=(self.folder / f"{label}.stdout").open("w"),
            stderr=(self.folder / f"{label}.stderr").open("w"),
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )

    def status(self) -> dict[str, Any]:
        """As the person at A sees it."""
        command = [sys.executable, "-m", "cli.main", "status", self.token, "--shards", "--json"]
        done = self.wan.run("a", command, cwd=self.folder, capture_output=True, text=True, timeout=60)
        found: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
        return found

    def rounds(self) -> int:
        status = self.status()
        return int(status["progress"]["rounds"]) if status else 0

    def events(self, log: str, name: str) -> list[dict[str, Any]]:
        path = self.folder / log
        return [event for event in EventReader(path).read() if event["event"] == name] if path.exists() else []

    def contributions(self, name: str) -> int:
        return sum(name in event["contributors"] for event in self.events("run.jsonl", "round.committed"))

    def until(self, true: Callable[[], Any], what: str, seconds: float = 180.0) -> None:
        deadline, pause = time.monotonic() + seconds, threading.Event()
        while not true():
            for label, process in self.processes.items():
                said = (self.folder / f"{label}.stderr").read_text()
                assert process.poll() is None, f"{label} has ended with {process.poll()}: {said}"
            assert time.monotonic() < deadline, f"never: {what}; {self.status()}"
            pause.wait(0.3)

    def end(self, label: str) -> tuple[int, str, str]:
        process = self.processes[label]
        code = process.wait(180)
        return code, (self.folder / f"{label}.stdout").read_text(), (self.folder / f"{label}.stderr").read_text()


@pytest.fixture
def recipe(tmp_path: Path) -> Iterator[Recipe]:
    with Wan(TOPOLOGY, name=f"r{os.getpid()}", max_life=600) as wan:
        recipe = Recipe(wan, tmp_path)
        yield recipe
        recipe.processes.pop("coordinator")  # it has no end of its own, and goes with its site
        left = {label for label, process in recipe.processes.items() if process.poll() is None}
        assert not left


def test_two_sites_train_one_model_through_a_cut_and_a_kill(recipe: Recipe) -> None:
    wan = recipe.wan
    for site in "ab":
        recipe.join(site)
        recipe.until(lambda site=site: recipe.contributions(f"{site}-0") > 2, f"{site} contributes")  # type: ignore[misc]

    # A, where the coordinator is, is cut off: B trains up to its next round and waits; A goes on alone
    before = recipe.rounds()
    wan.cut("a", "b")
    recipe.until(lambda: recipe.events("out-b/events/join.jsonl", "coordinator.lost"), "B says that it is cut off")
    recipe.until(lambda: recipe.rounds() > before + 3, "A goes on alone")
    assert sum(int(link["drop_cut"]) for link in wan.links()) > 0, "the cut was not felt"
    gave = recipe.contributions("b-0")
    wan.heal("a", "b")
    recipe.until(lambda: recipe.contributions("b-0") > gave + 2, "B catches up and contributes again")
    assert recipe.events("out-b/events/join.jsonl", "coordinator.found")
    assert len(recipe.events("out-b/events/supervisor.jsonl", "peer.started")) == 1, "it had to be started again"

    # B's peer is killed: its own supervisor starts it again, and nobody at A has to do anything
    (first,) = recipe.events("out-b/events/supervisor.jsonl", "peer.started")
    gave, killed = recipe.contributions("b-0"), time.time()
    os.kill(first["pid"], signal.SIGKILL)
    recipe.until(lambda: recipe.contributions("b-0") > gave + 1, "B's next life contributes")
    again = recipe.events("out-b/events/supervisor.jsonl", "peer.started")[-1]
    assert again["life"] == 2 and again["pid"] != first["pid"]
    print(f"killed to the next life's joining: {again['time_unix'] - killed:.1f} s")

    # the run ends for both at the same version, bit for bit
    command = [sys.executable, "-c", SET_TARGET.format(rounds=recipe.rounds() + 8), recipe.token]
    assert wan.run("a", command, cwd=ROOT, timeout=60).returncode == 0
    for site in "ab":
        code, printed, said = recipe.end(f"join-{site}")
        assert code == 0, said
        summary = json.loads(printed)
        assert summary["finished"] and not summary["failures"], summary
    audit = recipe.status()["audit"]
    assert audit["passed"] and audit["twice"] == audit["missing"] == 0 and audit["committed"] > 0
    ends = [re.findall(r"version (\d+), state (\w+)", (recipe.folder / log).read_text())
            for log in ("out-a/logs/a-0.1.log", "out-b/logs/b-0.2.log")]  # fmt: skip
    assert len(ends[0]) == 1 and ends[0] == ends[1]

"""Starts, breaks and heals the processes of a chaos run, by a schedule drawn from a seed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.wan.wan import Wan

NAMES = ("p0", "p1", "p2", "p3")
pause = threading.Event().wait


def until(true: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < deadline, f"never came: {what}"
        pause(0.01)
    return value


@dataclass
class Process:
    """One process as the schedule knows it. code: how it ended; killed: by the schedule."""

    label: str
    pid: int
    folder: Path
    code: int | None = None
    killed: bool = False
    frozen: bool = False
    _offset: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)

    def events(self) -> list[dict[str, Any]]:
        path = self.folder / f"{self.label}.record"
        if path.exists():
            with path.open("rb") as file:
                file.seek(self._offset)
                for line in file:
                    if line.endswith(b"\n"):
                        self._offset += len(line)
                        self._events.append(json.loads(line))
        return self._events

    def version(self) -> int:
        """The version of the outer state at the last step; -1 before the first."""
        return max((event["version"] for event in self.events()[-400:] if event["event"] == "step"), default=-1)


class Server:
    """The process that has imported torch once, and forks the others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.pids: deque[int] = deque()
        self.codes: dict[int, int] = {}
        self.ready = threading.Event()
        worker = str(Path(__file__).parent / "chaos_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, name="chaos-server")
        self._reader.start()
        until(self.ready.is_set, "the server that forks")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said = json.loads(line)
            if "pid" in said:
                self.pids.append(said["pid"])
            elif "ended" in said:
                self.codes[said["ended"]] = said["code"]
            else:
                self.ready.set()

    def fork(self, **order: Any) -> int:
        with self._lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            until(lambda: self.pids, "a forked process")
            return self.pids.popleft()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self._reader.join()
        self.process.stdout.close()


class Chaos:
    """One run of some peers and a coordinator. `lives` holds every process there ever was.

    wan: each process is at a site of its own, named as it is; then paths are cut, too.
    """

    def __init__(
        self,
        server: Server,
        folder: Path,
        seed: int,
        *,
        samples: int,
        pace: float,
        names: tuple[str, ...] = NAMES,
        wan: Wan | None = None,
        loop: str = "DiLoCo",
    ) -> None:
        self.loop = loop
        self.server, self.folder, self.samples, self.pace = server, folder, samples, pace
        self.names, self.wan = names, wan
        self.random = random.Random(seed)
        self.lives: list[Process] = []
        self.now: dict[str, Process] = {}
        self.struck = 0
        self.log: list[str] = []
        self.address = f"tcp://{wan.addr('coordinator')}:0" if wan else "tcp://127.0.0.1:0"
        self.start("coordinator")
        serving = until(lambda: self.now["coordinator"].events(), "the coordinator")
        self.address = serving[0]["address"]
        for name in names:
            self.start(name)

    def start(self, name: str) -> None:
        label = f"{name}.{sum(life.label.startswith(name + '.') for life in self.lives) + 1}"
        role = "coordinator" if name == "coordinator" else "peer"
        pid = self.server.fork(
            role=role, name=name, label=label, address=self.address, folder=str(self.folder),
            samples=self.samples, pace=self.pace, loop=self.loop, **self.place(name),
        )  # fmt: skip
        self.now[name] = Process(label, pid, self.folder)
        self.lives.append(self.now[name])

    def place(self, name: str) -> dict[str, str]:
        """Where its process is."""
        if self.wan is None:
            return {}
        return {"listen": f"{self.wan.addr(name)}:0", "namespace": f"/var/run/netns/{self.wan.netns(name)}"}

    def look(self) -> None:
        """Fails the test at once if a process has ended that nobody ended."""
        for life in self.lives:
            if life.code is None:
                life.code = self.server.codes.get(life.pid)
            if life.code not in (None, 0) and not life.killed:
                stderr = (self.folder / f"{life.label}.stderr").read_text()
                raise AssertionError(f"{life.label} ended with {life.code}:\n{stderr}")

    def ended(self, life: Process) -> bool:
        self.look()
        return life.code is not None

    def well(self) -> list[str]:
        """Peers that train from a version that is not old."""
        self.look()
        versions = {name: self.now[name].version() for name in self.names if not self.now[name].frozen}
        newest = max(versions.values(), default=-1)
        return [name for name, version in versions.items() if version >= max(0, newest - 1)]

    # --- faults: each is a beginning and an end ---

    def kill(self, name: str) -> Callable[[], None]:
        life = self.now[name]
        life.killed = True
        os.kill(life.pid, signal.SIGKILL)
        until(lambda: self.ended(life), f"the end of {life.label}")
        return lambda: self.start(name)

    def freeze(self, name: str) -> Callable[[], None]:
        life = self.now[name]
        os.kill(life.pid, signal.SIGSTOP)
        life.frozen = True
        return lambda: self.thaw(life)

    def thaw(self, life: Process) -> None:
        os.kill(life.pid, signal.SIGCONT)
        life.frozen = False

    def leave(self, name: str) -> Callable[[], None]:
        life = self.now[name]
        os.kill(life.pid, signal.SIGTERM)
        until(lambda: self.ended(life), f"the leave of {life.label}")
        return lambda: self.start(name)

    def strike(self, name: str, kind: str) -> Callable[[], None]:
        life, before = self.now[name], self.fired()
        self.struck += 1
        life.killed = kind == "kill"
        order = {"kind": kind, "tag": self.random.choice(("outer", "plain")), "round": 0}
        arm = self.folder / f"{life.label}.arm.new"
        arm.write_text(json.dumps(order | {"fraction": self.random.random() * 0.99}))
        arm.rename(self.folder / f"{life.label}.arm")
        until(lambda: self.fired() > before, f"the fault armed in {life.label}")
        if kind == "kill":
            until(lambda: self.ended(life), f"the end of {life.label}")
            return lambda: self.start(name)
        life.frozen = True
        return lambda: self.thaw(life)

    def cut(self, name: str, other: str) -> Callable[[], None]:
        """Nothing gets through between the two, and nobody is told."""
        assert self.wan is not None
        self.wan.cut(name, other)
        return lambda: self.mend(name, other)

    def mend(self, name: str, other: str) -> None:
        assert self.wan is not None
        self.wan.heal(name, other)

    def drops(self) -> int:
        """Packets that cut paths have swallowed."""
        assert self.wan is not None
        return sum(int(link["drop_cut"]) for link in self.wan.links())

    def fired(self) -> int:
        path = self.folder / "faults.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    # --- the schedule ---

    def draw(self) -> list[tuple[str, str]]:
        """The next faults, two of them at once now and then; a function of the seed alone."""
        first, second = self.random.sample(self.names, 2)
        kinds = ("kill", "freeze", "freeze", "leave", "strike kill", "strike kill", "strike freeze")
        blunt = ("kill", "freeze")
        faults = [(self.random.choice(kinds), first)]
        if self.wan is not None and self.random.random() < 0.5:
            other = self.random.choice((second, second, "coordinator"))
            return [(f"cut {other}", first), *([("kill", second)] if self.random.random() < 0.3 else [])]
        chance = self.random.random()
        if chance < 0.2:
            faults = [(self.random.choice(blunt), "coordinator")]
        elif chance < 0.5:  # a strike comes first: it needs the others
            faults.append((self.random.choice(blunt), self.random.choice((second, "coordinator"))))
        return faults

    def bearable(self, faults: list[tuple[str, str]]) -> bool:
        """Whether at least two peers will hold the state all the while; and whether what is to be struck is there."""
        well = set(self.well())
        struck = {name for kind, name in faults if kind.startswith("strike") or kind == "leave"}
        return struck <= well and len(well) >= (3 if len(faults) == 1 else len(self.names))

    def strike_once(self) -> None:
        """Draws, carries out, and heals. It goes on as soon as the next one is bearable, not when all is well."""
        faults = self.draw()
        until(lambda: self.bearable(faults), f"enough peers that train, for {faults}")
        ends: list[Callable[[], None]] = []
        for kind, name in faults:
            self.log.append(f"{kind} {name}")
            if kind.startswith("strike "):
                ends.append(self.strike(name, kind.removeprefix("strike ")))
            elif kind.startswith("cut "):
                ends.append(self.cut(name, kind.removeprefix("cut ")))
            else:
                ends.append({"kill": self.kill, "freeze": self.freeze, "leave": self.leave}[kind](name))
        for (kind, _), end in zip(faults, ends, strict=True):
            lasts = "freeze" in kind or "cut" in kind
            pause(self.random.uniform(0.5, 4.0) if lasts else self.random.uniform(0.02, 0.8))
            end()
        pause(self.random.uniform(0.0, 0.6))

    def finish(self, seconds: float) -> None:
        """Once everybody is well, lets the data be read to its end, and everybody leave."""
        until(lambda: len(self.well()) == len(self.names), "everybody's return")
        (self.folder / "hurry").touch()
        until(lambda: all(self.ended(self.now[name]) for name in self.names), "the end of the run", seconds)
        os.kill(self.now["coordinator"].pid, signal.SIGTERM)
        until(lambda: self.ended(self.now["coordinator"]), "the end of the coordinator")

    def clean(self) -> None:
        """After a failure: ends what is left."""
        for life in self.lives:
            if life.code is None and life.pid not in self.server.codes:
                os.kill(life.pid, signal.SIGKILL)
        until(lambda: all(life.pid in self.server.codes for life in self.lives), "the end of everything")

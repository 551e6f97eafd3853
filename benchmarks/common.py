"""What the benchmarks share: teams of worker processes, medians with their spread, and reports.

A team's workers live through the whole run and hold all sides at once (`benchmarks.worker`), so that operations of the
sides alternate within the same processes. An operation takes from the moment the last worker began it to the moment
the last one had its result; all workers are on one machine and read the same clock.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
MIB = 1 << 20
PATIENCE = 600.0
# An operation begins so many seconds after the order for it was written: enough for it to reach all workers.
LEAD_TIME = 0.01
_SYSCTL = Path("/proc/sys/net/ipv4/tcp_congestion_control")

Launch = Callable[[list[str], dict[str, Any]], "subprocess.Popen[str]"]


class BenchmarkError(Exception):
    """Something that the user can act on; the message says what."""


def system_congestion_control() -> str:
    return _SYSCTL.read_text().strip()


# --- workers --------------------------------------------------------------------------------------------------------


def launch_here(command: list[str], options: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, **options)


def take_orders(desk_of: Callable[[str], Any]) -> NoReturn:
    """What a worker's process does: each line that comes is an order, whose "do" names a method of the desk.

    desk_of: makes the desk, of the worker's name.
    """
    # Whatever libraries print goes to standard error; the answers keep a descriptor of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    desk = desk_of(sys.argv[1])
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(desk, order["do"])(order)
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # the team is gone: nobody waits for a tidy end


class Worker:
    """One process of `benchmarks.worker`, or of another module: takes orders and answers them, one JSON line each."""

    def __init__(
        self, name: str, launch: Launch = launch_here, interface: str = "lo", module: str = "benchmarks.worker"
    ) -> None:
        self.name = name
        self._said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by kill()
        options = {
            "stdin": subprocess.PIPE,
            "stdout": subprocess.PIPE,
            "stderr": self._errors,
            "text": True,
            "cwd": ROOT,
            "env": {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": interface},
        }
        self.process = launch([sys.executable, "-m", module, name], options)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(json.loads(line))
        self._said.put(None)

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self, timeout: float = PATIENCE) -> dict[str, Any]:
        """The next answer; BenchmarkError with what the worker printed if it fails, ends or stays silent."""
        try:
            answer = self._said.get(timeout=timeout)
        except queue.Empty:
            raise BenchmarkError(f"{self.name} did not answer within {timeout:.0f} s{self.complaints()}") from None
        if answer is None:
            raise BenchmarkError(f"{self.name} ended{self.complaints()}")
        if "failed" in answer:
            raise BenchmarkError(f"{self.name}: {answer['failed']}")
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        self.tell(**order)
        return self.hear()

    def complaints(self) -> str:
        self._errors.seek(0)
        text = self._errors.read().strip()
        return f":\n{text[-2000:]}" if text else ""

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not flushed has no reader any more
                stream.close()


@dataclass(frozen=True)
class Sample:
    """One operation. began, ended: time.monotonic() of the last worker to begin and to end; answers: one a worker."""

    began: float
    ended: float
    answers: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        return self.ended - self.began


class Team:
    """Workers w0, w1, ... that run operations together, and a process for the coordinator if there are peers."""

    def __init__(self, launches: Sequence[Launch], hosts: Sequence[str], interface: str = "lo") -> None:
        self.hosts = list(hosts)
        self._launches = list(launches)
        self._interface = interface
        self._coordinator: Worker | None = None
        self.workers: list[Worker] = []
        try:
            for index in range(len(launches)):
                self.workers.append(self.hire(index))
        except BaseException:
            self.close()
            raise

    def hire(self, index: int) -> Worker:
        return Worker(f"w{index}", self._launches[index], self._interface)

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """The same order for all, at the same time."""
        for worker in self.workers:
            worker.tell(**order)
        return [worker.hear() for worker in self.workers]

    def ask_each(self, orders: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        for worker, order in zip(self.workers, orders, strict=True):
            worker.tell(**order)
        return [worker.hear() for worker in self.workers]

    def add_gloo(self, name: str) -> None:
        """A gloo process group of its own sockets."""
        world = len(self.workers)
        orders = [
            {"do": "gloo", "name": name, "rank": rank, "world": world, "host": self.hosts[0]} for rank in range(world)
        ]
        for order, worker in zip(orders[:1], self.workers[:1], strict=True):
            order["port"] = worker.ask(do="port", host=self.hosts[0])["port"]
        for order in orders[1:]:
            order["port"] = orders[0]["port"]
        self.ask_each(orders)

    def add_group(self, name: str, **options: Any) -> None:
        """Bare groups with these LinkOptions."""
        orders = ({"do": "group", "name": name, "host": host, "options": options} for host in self.hosts)
        members = [answer["member"] for answer in self.ask_each(orders)]
        self.ask(do="meet", name=name, members=members)

    def coordinate(self, policy: dict[str, Any] | None = None) -> str:
        """A coordinator beside the first worker, in a process of its own; returns its address."""
        self._coordinator = Worker("coordinator", self._launches[0], self._interface)
        answer = self._coordinator.ask(do="coordinate", host=self.hosts[0], policy=policy or {})
        return str(answer["address"])

    def add_peers(self, name: str, coordinator: str, **options: Any) -> None:
        orders = (
            {"do": "peer", "name": name, "host": host, "coordinator": coordinator, "options": options}
            for host in self.hosts
        )
        self.ask_each(orders)
        self.ask(do="wait_for", name=name, count=len(self.workers))

    def replace(self, index: int, name: str, coordinator: str, **options: Any) -> None:
        """Another life of a worker that was killed or frozen, as a peer; returns once all see it."""
        self.workers[index].kill()
        self.workers[index] = self.hire(index)
        host = self.hosts[index]
        self.workers[index].ask(do="peer", name=name, host=host, coordinator=coordinator, options=options)
        self.ask(do="wait_for", name=name, count=len(self.workers))

    def operate(self, name: str, elements: int, **order: Any) -> Sample:
        """One all-reduce of `elements` float32 on the side `name`; BenchmarkError unless every result is right."""
        return operate(self.workers, name, elements, **order)

    def settle(self, name: str, cc: str | None = None) -> str:
        """One small operation opens the sockets of a side; the next side must not be made before.

        cc: what they are told to use, for sides that cannot be told otherwise. Returns what the kernel says they use.
        """
        self.operate(name, 1024)
        found = {each for answer in self.ask(do="settle", name=name, cc=cc) for each in answer["congestion"]}
        return "/".join(sorted(found)) or "-"

    def congestion_control(self, name: str) -> str:
        """What the kernel says that the side's sockets use, as far as they are those that it had at first."""
        found = {each for answer in self.ask(do="congestion", name=name) for each in answer["congestion"]}
        return "/".join(sorted(found)) or "-"

    def close(self) -> None:
        for worker in (*self.workers, self._coordinator):
            if worker is not None:
                worker.kill()

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def operate(workers: Sequence[Worker], name: str, elements: int, **order: Any) -> Sample:
    """One all-reduce among these workers."""
    at = time.monotonic() + LEAD_TIME
    for worker in workers:
        worker.tell(do="run", name=name, elements=elements, at=at, **order)
    return gather(workers)


def gather(workers: Sequence[Worker]) -> Sample:
    """Their answers to one operation; BenchmarkError unless each has the right result."""
    answers = [worker.hear() for worker in workers]
    for worker, answer in zip(workers, answers, strict=True):
        if not answer["right"]:
            raise BenchmarkError(f"{worker.name} has a wrong result: {answer}")
    began, ended = (max(answer[which] for answer in answers) for which in ("began", "ended"))
    return Sample(began, ended, answers)


def local_team(size: int) -> Team:
    return Team([launch_here] * size, ["127.0.0.1"] * size)


# --- numbers --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median (smallest - largest)."""
    if not values:
        return "-"
    middle, low, high = (scale * each for each in (statistics.median(values), min(values), max(values)))
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def ratio(base: Sequence[float], ours: Sequence[float]) -> str:
    """How many times faster: ratio of the medians (smallest - largest ratio of operations next to each other)."""
    if not base or not ours:
        return "-"
    pairs = [b / o for b, o in zip(base, ours, strict=False)]
    return f"{statistics.median(base) / statistics.median(ours):.2f} ({min(pairs):.2f}-{max(pairs):.2f})"


# --- reports --------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "system_congestion_control": system_congestion_control(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


@dataclass
class Report:
    """A table and what it was made from. rows: the cells as text; samples: seconds behind them, and whatever else."""

    name: str
    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=machine)

    def add(self, cells: Sequence[str], **sample: Any) -> None:
        self.rows.append(tuple(cells))
        self.samples.append({"cells": dict(zip(self.columns, cells, strict=True)), **sample})

    def text(self) -> str:
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        table = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        return "\n".join([self.title, facts, "", *(line.rstrip() for line in table), "", *self.notes])

    def markdown(self) -> str:
        table = [self.columns, ["---"] * len(self.columns), *self.rows]
        lines = ("| " + " | ".join(line) + " |" for line in table)
        facts = ", ".join(f"{key} {value}" for key, value in self.machine.items())
        notes = (f"- {note}" for note in self.notes)
        return "\n".join(
            [f"## {self.title}", "", f"`{self.command}`", "", f"{facts}.", "", *lines, "", *notes]
        ).rstrip()

    @property
    def command(self) -> str:
        words = " ".join(word for word in sys.argv[1:] if word != "--markdown")
        return f"python -m benchmarks.{self.name} {words}".strip()

    def json(self) -> str:
        names = ("name", "title", "machine", "columns", "samples", "notes")
        return json.dumps({**{name: getattr(self, name) for name in names}, "command": self.command}, indent=1)


def parser(doc: str | None, repeat: int | None = 7) -> argparse.ArgumentParser:
    """The arguments that all benchmarks have. repeat: None for those that do not time operations."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeat is not None:
        about = f"operations per cell (default {repeat})"
        made.add_argument("--repeat", type=int, default=repeat, metavar="N", help=about)
    made.add_argument("--json", metavar="FILE", help="write all samples there too; - prints them instead of the table")
    made.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return made


def sizes(text: str) -> list[int]:
    """ "1,16,64": MiB of float32, fractions too; returns numbers of elements."""
    return [round(float(each) * MIB / 4) for each in text.split(",")]


def mib(elements: int) -> str:
    return f"{elements * 4 / MIB:g} MiB"


def publish(report: Report, arguments: argparse.Namespace) -> None:
    if arguments.json == "-":
        print(report.json())
        return
    print(report.markdown() if arguments.markdown else report.text())
    if arguments.json:
        Path(arguments.json).write_text(report.json())


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    try:
        yield
    except BenchmarkError as error:
        sys.exit(f"benchmark: {error}")


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

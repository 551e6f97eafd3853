"""What the chaos tests let live and die: training peers and a coordinator, forked from a server that knows torch.

    python chaos_worker.py      reads one JSON order a line, forks, answers {"pid": ...}, and reports each end

A peer trains a model with one number per sample, by steps that add exactly 1 to the numbers of their batch. So a
contribution shows which samples are in it, and how often. Everything that a peer does is appended to a record by single
writes, so that it is there after SIGKILL: it is what the test recomputes the run from.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.wan.wan import CLONE_NEWNET
from collectives.records import Done, Progress
from elastic.config import FaultPolicy, RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.errors import CoordinatorUnavailable, Evicted, NotEnoughPeers, RoundAborted
from elastic.messages import Propose
from elastic.outer.delayed import DelayedDiLoCo
from elastic.outer.diloco import DiLoCo
from elastic.outer.engine import OuterLoop
from elastic.outer.optimizers import Nesterov
from elastic.outer.replica import Flight
from elastic.outer.streaming import StreamingDiLoCo
from elastic.peer import Peer
from fault.inject import Injection, strike

RUN = "chaos"
TIMEOUTS = Timeouts(heartbeat=0.15, chunk=1.2, operation=20, round=60, grace=0.8, evict_after=30)
BATCH, SHARD, SEED, TOKENS = 4, 32, 3, 3
SYNC_EVERY, LR, MOMENTUM = 8, 0.4, 0.9
PLAIN_SIZE = 3000


class Record:
    """Appends events to a file, each with one write."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o600)

    def __call__(self, event: str, **fields: Any) -> None:
        os.write(self._fd, (json.dumps({"event": event} | fields) + "\n").encode())


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    tokens_per_sample = TOKENS

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Tally(torch.nn.Module):
    """One number per sample; a step with SGD of rate 1 adds 1 to those of its batch."""

    def __init__(self, n: int, fragments: int) -> None:
        super().__init__()
        parts = torch.zeros(n).split(n // fragments)
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(part.clone()) for part in parts)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return -torch.cat(list(self.layers))[batch].sum()


class Recorded(OuterLoop):
    """A loop that keeps its own account of the samples behind the next contribution.

    fresh: those that no round counts yet. pending: for each fragment, those that it has not had yet. fresh_sent,
    sent: the same, of the contribution that is on its way.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pending: list[list[int]] = [[] for _ in self.layout.parts]
        self.fresh: list[int] = []
        self.sent: list[int] = []
        self.fresh_sent: list[int] = []

    def learned_from(self, samples: list[int]) -> None:
        self.fresh += samples
        for pending in self.pending:
            pending += samples

    def _proposal(self, flight: Flight) -> Propose:
        self.sent, self.fresh_sent = list(self.pending[flight.fragment]), list(self.fresh)
        return super()._proposal(flight)

    def _conclude(self, outcome: Any, *rest: Any) -> None:
        if outcome.commit is not None and outcome.counted:
            del self.pending[self.version.next][: len(self.sent)]
            del self.fresh[: len(self.fresh_sent)]
        super()._conclude(outcome, *rest)

    def _reset(self) -> None:
        self.fresh.clear()
        for pending in self.pending:
            pending.clear()
        super()._reset()


class RecordedDiLoCo(Recorded, DiLoCo):
    pass


class RecordedDelayed(Recorded, DelayedDiLoCo):
    pass


class RecordedStreaming(Recorded, StreamingDiLoCo):
    pass


OPTIONS: dict[str, Any] = {"sync_every": SYNC_EVERY, "joining": "fresh"}  # every step adds exactly 1
LOOPS: dict[str, tuple[type[Recorded], dict[str, Any]]] = {
    "DiLoCo": (RecordedDiLoCo, {}),
    "DelayedDiLoCo": (RecordedDelayed, {}),
    "StreamingDiLoCo": (RecordedStreaming, {"fragments": 4, "sync_delay": 0, "merge_alpha": 0.0}),
}


class Trainer:
    """One life of one peer. SIGTERM: leave politely."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.folder = Path(order["folder"])
        self.name, self.label = order["name"], order["label"]
        self.samples: int = order["samples"]
        self.pace: float = order["pace"]
        self.make, self.options = LOOPS[order["loop"]]
        self.record = Record(self.folder / f"{self.label}.record")
        self.leaving, self.over = threading.Event(), threading.Event()
        self.hook: Callable[[Progress], None] | None = None
        self.calls = 0
        signal.signal(signal.SIGTERM, lambda *_: self.leaving.set())
        self.peer = Peer(
            order["address"],
            run=RUN,
            name=self.name,
            timeouts=TIMEOUTS,
            events_dir=self.folder,
            observe=lambda progress: self.hook(progress) if self.hook else None,
            join_timeout=60,
            listen=order.get("listen"),
        )
        self.record("joined", life=self.peer.life, incarnation=self.peer.incarnation)
        self.loop: Recorded | None = None
        self.execute = self.peer.group.run
        self.peer.group.run = self.recorded_run  # type: ignore[method-assign]

    def recorded_run(self, start: Any, source: torch.Tensor | None, result: torch.Tensor) -> Any:
        """Notes what goes into an attempt before it can go anywhere, and what came of it."""
        fields = {"tag": start.tag, "generation": start.generation, "round": start.round, "attempt": start.attempt}
        if source is None:  # it has started over, and has nothing to give yet
            return self.execute(start, source, result)
        names = [member.name for member in start.contributors]
        given = fields | {"multipliers": start.multipliers, "divisor": start.divisor, "contributors": names}
        if start.tag == "outer":
            assert self.loop is not None
            file = f"{self.label}-{start.generation}-{start.round}-{start.attempt}.npy"
            np.save(self.folder / file, source.numpy())
            given |= {"file": file, "pending": self.loop.sent, "fresh": self.loop.fresh_sent}
            given |= {"weight": self.loop.replica.flight.tokens if self.loop.replica.flight else 0.0}
            given |= {"base": self.loop.version.number, "cursors": self.peer.cursors}
        else:
            given |= {"value": source[0].item()}
        self.record("given", **given)
        outcome = self.execute(start, source, result)
        if isinstance(outcome, Done):
            self.record("done", digest=outcome.digest, **fields)
        return outcome

    def plain(self) -> None:
        """All-reduces of whole numbers beside the training, under a tag of their own."""
        while not self.over.wait(0.03):
            self.calls += 1
            value = float((hash((self.label, self.calls)) % 100_000) + 1)
            tensor = torch.full((PLAIN_SIZE,), value)
            try:
                got = self.peer.all_reduce(tensor, tag="plain", timeout=25)
            except (RoundAborted, NotEnoughPeers, CoordinatorUnavailable) as error:
                self.record("plain failed", error=type(error).__name__, reason=str(error))
            except Evicted as error:
                self.record("plain failed", error="Evicted", reason=str(error))
                return
            else:
                total = got.tensor[0].item()
                equal = bool((got.tensor == total).all())
                self.record("plain", round=got.round, contributors=got.contributors, total=total, equal=equal)
            assert bool((tensor == value).all()), "the input has been touched"

    def arm(self) -> None:
        """Arms the injection that the test has laid down, if there is a new one."""
        path = self.folder / f"{self.label}.arm"
        if path.exists():
            injection = Injection(**json.loads(path.read_text()))
            path.unlink()
            self.hook = strike(injection, self.label, self.folder / "faults.jsonl")

    def train(self) -> None:
        model = Tally(self.samples, self.options.get("fragments", 1))
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        beside = threading.Thread(target=self.plain, name="plain")
        beside.start()
        outer = Nesterov(lr=LR, momentum=MOMENTUM)
        try:
            with self.make(model, inner, self.peer, outer=outer, **OPTIONS, **self.options) as self.loop:
                self.record("entered", version=self.loop.version.number, state_hash=self.loop.version.state_hash)
                self.steps(model, inner, self.loop)
            self.record("finished", version=self.loop.version.number, state_hash=self.loop.version.state_hash,
                        tokens=self.peer.progress.tokens, left=self.loop.fresh)  # fmt: skip
        finally:
            self.over.set()
            beside.join()
        self.peer.leave()
        names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
        self.record("left", threads=names)

    def steps(self, model: Tally, inner: torch.optim.Optimizer, loop: Recorded) -> None:
        data = self.peer.shards(Samples(self.samples), batch_size=BATCH, shard_size=SHARD, seed=SEED, epochs=1)
        for batch in data:
            loop.learned_from(batch.tolist())  # the exchange happens inside the step
            model(batch).backward()
            inner.step()
            inner.zero_grad()
            self.record("step", version=loop.version.number)
            self.arm()
            if self.leaving.wait(self.patience()):
                return

    def patience(self) -> float:
        """Seconds until the next step: the data must outlast the schedule, and then be done with soon."""
        if (self.folder / "hurry").exists():
            return 0.0
        read = self.peer.progress.tokens / (TOKENS * self.samples)
        return self.pace * (1 if read < 0.5 else 10 if read < 0.75 else 50)


def serve_peer(order: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    Trainer(order).train()


def serve_coordinator(order: dict[str, Any]) -> None:
    folder, stopping = Path(order["folder"]), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    coordinator = Coordinator(
        order["address"],
        run=RUN,
        policy=RunPolicy(faults=FaultPolicy(flapping="observe")),  # they die again and again, on purpose
        timeouts=TIMEOUTS,
        journal=folder / "journal.sqlite",
        events=folder / "coordinator.jsonl",
    )
    record = Record(folder / f"{order['label']}.record")
    record("serving", address=coordinator.address)
    stopping.wait()
    coordinator.close()
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    record("left", threads=names, error=repr(coordinator.error) if coordinator.error else None)


# --- the server that forks --------------------------------------------------------------------------------------------


def enter(namespace: str) -> None:
    """This process goes to a site of the emulated WAN."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(namespace, os.O_RDONLY)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(fd)


def child(order: dict[str, Any]) -> None:
    code = 1
    try:
        for fd, path in ((0, os.devnull), (1, os.devnull), (2, f"{order['folder']}/{order['label']}.stderr")):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), fd)
        if "namespace" in order:
            enter(order["namespace"])
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        {"peer": serve_peer, "coordinator": serve_coordinator}[order["role"]](order)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def say(**fields: Any) -> None:
    os.write(1, (json.dumps(fields) + "\n").encode())


def reap(living: set[int]) -> None:
    for pid in list(living):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            living.discard(pid)
            say(ended=pid, code=os.waitstatus_to_exitcode(status))


def serve() -> None:
    """Until its input ends; then whatever is left is killed."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    living: set[int] = set()
    buffer = b""
    say(ready=True)
    while True:
        select.select([0, woken], [], [], 1.0)
        with contextlib.suppress(BlockingIOError):
            os.read(woken, 4096)
        reap(living)
        if not select.select([0], [], [], 0)[0]:
            continue
        data = os.read(0, 65536)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            pid = os.fork()
            if pid == 0:
                child(json.loads(line))
            living.add(pid)
            say(pid=pid)
    for pid in living:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()

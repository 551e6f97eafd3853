"""Processes forked from a server that has imported torch once: a new peer runs after some ten milliseconds.

`Forked` is a Group in such a process, as a test that plays the coordinator sees it: it takes orders, answers each
attempt, and can be told to strike itself in the middle of one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
from plane import numbers
from xxhash import xxh3_128_hexdigest

from collectives import Abort, Done, Failed, Group, Identity, LinkOptions, Member, Progress, Start

PRELOADED = ["__main__", "torch", "numpy", "collectives.group", "elastic.peer", "elastic.coordinator"]
PRELOADED += ["torch._dynamo", "elastic.outer.diloco"]  # torch imports the former with the first optimizer
SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}


def forking() -> ForkServerContext:
    """The one server of this test session; it has no thread of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """What a peer does to itself.

    kind: "kill" or "freeze". fraction: of the chunks that it is to receive, in [0, 1); 1: once its run() has returned.
    """

    kind: str
    fraction: float

    def due(self, progress: Progress) -> bool:
        return progress.chunks_received >= max(1, int(self.fraction * progress.chunks_expected)) and self.fraction < 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """An order: execute this attempt. seed: of the source; None for a receiver."""

    start: Start
    seed: int | None
    strike: Strike | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Struck:
    """Said just before a strike, of which the process may not live to tell."""

    kind: str
    identity: Identity


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a run. digest: of the result as its caller finds it; kept: the source is what it was."""

    identity: Identity
    outcome: Done | Failed | None
    digest: str
    kept: bool
    error: str = ""


class Served:
    """The peer, inside its process."""

    def __init__(self, pipe: Connection, name: str, incarnation: int, options: LinkOptions) -> None:
        torch.set_num_threads(1)
        self._pipe, self._lock = pipe, threading.Lock()
        self._strikes: dict[Identity, Strike] = {}
        self._group = Group(run="run", name=name, incarnation=incarnation, options=options, observe=self._observe)
        self._threads: list[threading.Thread] = []
        self._say(self._group.member)

    def _say(self, message: object) -> None:
        with self._lock:
            self._pipe.send(message)

    def _observe(self, progress: Progress) -> None:
        strike = self._strikes.get(progress.identity)
        if strike is not None and strike.due(progress):
            self._strike(progress.identity)

    def _strike(self, identity: Identity) -> None:
        with self._lock:  # so that no message is cut, and other stripes get no further
            strike = self._strikes.pop(identity, None)
            if strike is not None:
                self._pipe.send(Struck(kind=strike.kind, identity=identity))
                os.kill(os.getpid(), SIGNALS[strike.kind])

    def serve(self) -> None:
        """Until the pipe ends."""
        with contextlib.suppress(EOFError):
            while True:
                match self._pipe.recv():
                    case Run() as order:
                        self._threads.append(threading.Thread(target=self._run, args=(order,), daemon=True))
                        self._threads[-1].start()
                    case Abort() as abort:
                        self._group.abort(abort)
                    case members:
                        self._group.connect(members)
        self._group.close()
        for thread in self._threads:
            thread.join()

    def _run(self, order: Run) -> None:
        start = order.start
        if order.strike is not None:
            self._strikes[start.identity] = order.strike
        source = numbers(start.elements, order.seed) if order.seed is not None else None
        result = torch.full((start.elements,), float("nan"))
        before = digest_of(source)
        outcome, error = None, ""
        try:
            outcome = self._group.run(start, source, result)
        except Exception as caught:
            error = repr(caught)
        kept = digest_of(source) == before
        with contextlib.suppress(OSError):  # the test may be over
            self._say(
                Answer(identity=start.identity, outcome=outcome, digest=digest_of(result), kept=kept, error=error)
            )
        if isinstance(outcome, Done) and order.strike is not None:
            self._strike(start.identity)


def digest_of(tensor: torch.Tensor | None) -> str:
    return xxh3_128_hexdigest(tensor.numpy().data.cast("B")) if tensor is not None and tensor.numel() else ""


def serve(pipe: Connection, name: str, incarnation: int, options: LinkOptions) -> None:
    Served(pipe, name, incarnation, options).serve()


class Forked:
    """A peer in a process of its own. `read` waits for what it says, and gives None once the process has ended."""

    def __init__(self, name: str, incarnation: int, options: LinkOptions) -> None:
        context = forking()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, incarnation, options), daemon=True)
        self.process.start()
        theirs.close()
        hello = self.read()
        assert isinstance(hello, Member), hello
        self.member = hello

    @property
    def name(self) -> str:
        return self.member.name

    def tell(self, message: Run | Abort | Sequence[Member]) -> None:
        with contextlib.suppress(OSError):  # it may have died a moment ago, which `read` will say
            self.pipe.send(message)

    def read(self) -> Any:
        assert self.pipe.poll(60), "a forked peer says nothing"
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def kill(self) -> None:
        self.process.kill()

    def frozen(self) -> bool:
        """Whether it is stopped; waits for that, as the signal was sent before it said so."""
        stat = Path(f"/proc/{self.process.pid}/stat")
        deadline = time.monotonic() + 10
        while stat.read_text().rpartition(")")[2].split()[0] != "T" and time.monotonic() < deadline:
            threading.Event().wait(0.001)
        return stat.read_text().rpartition(")")[2].split()[0] == "T"

    def thaw(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGCONT)

    def end(self, *, killed: bool = False) -> None:
        """See that it ends once its pipe is closed, and how."""
        self.pipe.close()
        self.process.join(30)
        code = self.process.exitcode
        assert code == (-signal.SIGKILL if killed else 0), f"{self.name} ended with {code}"
        self.process.close()

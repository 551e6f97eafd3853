"""A coordinator and peers of one process, over real sockets, for the tests of what a training script sees."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.peer import Peer

QUICK = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=30)


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    """Returns once the condition holds; fails the test if it never does."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not true():
        assert time.monotonic() < deadline, "the condition never held"
        pause.wait(0.005)


def in_thread(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
    """Calls it in a thread of its own.

    A DataLoader forks from there, and a process that was forked by a thread of an executor ends with code 1: there it
    is the main thread, which waits for the executor's threads, itself among them.
    """
    future: Future[Any] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=call, name=f"test-{function.__name__}").start()
    return future


@dataclass
class Run:
    """One run in this process. `together` calls a function for several peers at once, each in its thread."""

    folder: Path
    policy: RunPolicy = field(default_factory=RunPolicy)
    timeouts: Timeouts = QUICK
    peers: list[Peer] = field(default_factory=list)
    coordinator: Coordinator | None = None
    port: int = 0
    garbage: bool = False  # whether the test itself sends what no peer would

    def open(self) -> Coordinator:
        """Starts the coordinator, or its next life on the same address and journal."""
        self.coordinator = Coordinator(
            f"tcp://127.0.0.1:{self.port}",
            run="test",
            policy=self.policy,
            timeouts=self.timeouts,
            journal=self.folder / "journal.sqlite",
            events=self.folder / "coordinator.jsonl",
        )
        self.port = int(self.coordinator.address.rpartition(":")[2])
        return self.coordinator

    def join(self, name: str, **options: Any) -> Peer:
        if self.coordinator is None:
            self.open()
        address = f"tcp://127.0.0.1:{self.port}"
        peer = Peer(address, run="test", name=name, timeouts=self.timeouts, events_dir=self.folder, **options)
        self.peers.append(peer)
        return peer

    def several(self, n: int) -> list[Peer]:
        peers = [self.join(f"p{i}") for i in range(n)]
        for peer in peers:
            peer.wait_for(n, timeout=30)
        return peers

    def together(self, function: Callable[[Peer], Any], peers: list[Peer] | None = None) -> list[Any]:
        peers = self.peers if peers is None else peers
        futures = [in_thread(function, peer) for peer in peers]
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.coordinator is not None:
            self.coordinator.close()

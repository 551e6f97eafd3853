"""SIGKILL in the middle of an all-reduce of 8 MiB, again and again: the survivors' results are exact.

Three peers all-reduce without pause. One of them is killed, by itself after a random part of its chunks or from outside
at a random moment; the kill counts if the call had begun and had not returned. Both survivors must return a result that
is exactly the sum over the peers that it names, before a new life takes the victim's place. KILLS_SEED draws the same
kills again; `make chaos` kills CHAOS_KILLS times.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from multiprocessing.connection import wait
from typing import Any

import pytest
from forked import forking
from kill_worker import (
    BEGUN,
    ENDED,
    EXPECTED,
    NAMES,
    NEVER,
    RECEIVED,
    STRIKE_AT,
    Result,
    serve_coordinator,
    serve_peer,
)

LONGEST = 0.06  # seconds into its call after which a kill from outside falls at the latest
pause = threading.Event().wait


class Life:
    """One life of a peer, as the test knows it. results: how many it has returned; silent: it says no more."""

    def __init__(self, name: str, life: int, address: str) -> None:
        context = forking()
        self.name, self.life, self.results, self.silent = name, life, 0, False
        self.pipe, theirs = context.Pipe()
        self.board: Any = context.RawArray("q", [0, 0, 0, 0, NEVER])
        self.process = context.Process(target=serve_peer, args=(name, life, address, self.board, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def phase(self) -> str:
        """How far the call had come at this peer when it died; "" if it was in none."""
        if self.board[BEGUN] == self.board[ENDED]:
            return ""
        received, expected = self.board[RECEIVED], self.board[EXPECTED]
        if not received:
            return "before the first chunk"
        quarter = 4 * received // expected
        return ("in quarter 1", "in quarter 2", "in quarter 3", "in quarter 4", "whole, not returned")[quarter]

    def end(self, code: int) -> None:
        """It ends, or has ended, in this way."""
        self.process.join(60)
        assert self.process.exitcode == code, f"{self.name} (life {self.life}) ended with {self.process.exitcode}"
        self.process.close()
        self.pipe.close()


class Kills:
    """A run of three peers.

    phases: what the kills fell into, `killed` of them into a call. rounds: who is in which result, and its digest.
    counted: in which round a call of a life of a peer counts. checked, retried: results, and those of a later attempt.
    """

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.phases: Counter[str] = Counter()
        self.killed = self.checked = self.retried = 0
        self.rounds: dict[int, tuple[Any, str]] = {}
        self.counted: dict[tuple[str, int, int], int] = {}
        context = forking()
        self.pipe, theirs = context.Pipe()
        self.coordinator = context.Process(target=serve_coordinator, args=(theirs,), daemon=True)
        self.coordinator.start()
        theirs.close()
        self.address: str = self.pipe.recv()
        self.now = {name: Life(name, 1, self.address) for name in NAMES}

    def take(self, life: Life) -> None:
        """One thing that a peer said: a right result, that agrees with what the others said of that round."""
        try:
            said = life.pipe.recv()
        except (EOFError, OSError):
            life.silent = True
            return
        assert isinstance(said, Result), said
        assert not said.fault, f"{life.name} (life {life.life}), round {said.round}: {said.fault}"
        assert (life.name, said.life, said.call) in said.claims, f"{life.name} is not in its own result: {said}"
        agreed = self.rounds.setdefault(said.round, (said.claims, said.digest))
        assert agreed == (said.claims, said.digest), f"round {said.round} is {agreed}, and for {life.name} {said}"
        for claim in said.claims:
            assert self.counted.setdefault(claim, said.round) == said.round, f"{claim} counts in two rounds"
        life.results += 1
        self.checked += 1
        self.retried += said.attempts > 1

    def take_what_came(self, names: list[str], seconds: float) -> None:
        """Whatever these peers say within this time, and not longer than until the first does."""
        pipes: dict[Any, Life] = {self.now[name].pipe: self.now[name] for name in names}
        for pipe in wait(list(pipes), seconds):
            self.take(pipes[pipe])
            assert not pipes[pipe].silent, f"{pipes[pipe].name} (life {pipes[pipe].life}) ended"

    def until_results(self, names: list[str]) -> None:
        """Until each of these has returned one more result, its first one at least."""
        before = {name: self.now[name].results for name in names}
        deadline = time.monotonic() + 60
        while behind := [name for name in names if self.now[name].results == before[name]]:
            assert time.monotonic() < deadline, f"no result comes from {', '.join(behind)}"
            self.take_what_came(names, 1.0)

    def kill_one(self) -> None:
        """One kill, counted if it fell into a call; then the survivors' results, and a new life."""
        victim = self.now[self.draw.choice(NAMES)]
        others = [name for name in NAMES if name != victim.name]
        if self.draw.random() < 0.5:
            victim.board[STRIKE_AT] = self.draw.randrange(1000)
        else:
            self.kill_from_outside(victim)
        self.until_dead(victim)
        phase = victim.phase()
        self.phases[phase or "between two calls, not counted"] += 1
        self.killed += bool(phase)
        self.until_results(others)
        self.now[victim.name] = Life(victim.name, victim.life + 1, self.address)
        self.until_results(list(NAMES))

    def kill_from_outside(self, victim: Life) -> None:
        """At a random moment of its next call."""
        call, deadline = victim.board[BEGUN], time.monotonic() + 60
        while victim.board[BEGUN] == call:
            assert time.monotonic() < deadline, f"{victim.name} begins no call"
            self.take_what_came(list(NAMES), 0.0005)
        pause(self.draw.uniform(0, LONGEST))
        os.kill(victim.process.pid or 0, signal.SIGKILL)

    def until_dead(self, victim: Life) -> None:
        """Until it is; what it said before counts."""
        deadline = time.monotonic() + 60
        while victim.process.exitcode is None:
            assert time.monotonic() < deadline, f"{victim.name} was to be killed, and lives"
            self.take_what_came([name for name in NAMES if name != victim.name], 0.001)
        while not victim.silent:
            self.take(victim)
        victim.end(-signal.SIGKILL)

    def end(self) -> None:
        """The peers leave, and everything ends in good order."""
        for life in self.now.values():
            life.pipe.send("leave")
        for life in self.now.values():
            life.end(0)
        self.pipe.send("close")
        self.coordinator.join(60)
        assert self.coordinator.exitcode == 0
        self.pipe.close()

    def abandon(self) -> None:
        """After a failure."""
        for process in (self.coordinator, *(life.process for life in self.now.values())):
            process.kill()


def kill(count: int) -> str:
    """So many kills. Returns what they fell into."""
    seed = int(os.environ.get("KILLS_SEED", time.time_ns() % 1_000_000))
    kills, began = Kills(seed), time.monotonic()
    try:
        kills.until_results(list(NAMES))
        while kills.killed < count:
            kills.kill_one()
        kills.end()
    except BaseException as error:
        error.add_note(f"KILLS_SEED={seed}, after {kills.killed} kills: {dict(kills.phases)}")
        kills.abandon()
        raise
    seconds = time.monotonic() - began
    return (
        f"seed {seed}: {kills.killed} kills in mid all-reduce, {kills.killed / seconds:.1f} a second: "
        f"{dict(sorted(kills.phases.items()))}; {kills.checked} results right, {kills.retried} of them after a retry"
    )


def test_fifty_kills_and_every_result_is_right() -> None:
    print(kill(50))


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_a_thousand_kills_and_every_result_is_right() -> None:
    print(kill(int(os.environ.get("CHAOS_KILLS", "1000"))), flush=True)

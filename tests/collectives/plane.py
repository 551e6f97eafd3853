"""What the data plane's tests share: groups in this process or in others, orders, and the values they must give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from collectives import Abort, Done, Failed, Group, LinkOptions, Member, Start, WireRun

ROOT = Path(__file__).resolve().parents[2]
SMALL = LinkOptions(chunk_bytes=4096, connect_timeout=5.0)
Outcome = Done | Failed


def make_start(contributors: Sequence[Member], elements: int, **changes: Any) -> Start:
    """Equal shares, weights of one."""
    members = tuple(sorted(contributors, key=lambda member: member.name))
    fields: dict[str, Any] = {
        "run": "run",
        "generation": 1,
        "epoch": 1,
        "tag": "grads",
        "round": 0,
        "attempt": 0,
        "fragment": 0,
        "base_version": 0,
        "contributors": members,
        "shares": (1 / len(members),) * len(members),
        "elements": elements,
        "multipliers": (1.0,) * len(members),
    }
    return Start(**{**fields, **changes})


def make_abort(start: Start, reason: str = "test", lost: tuple[str, ...] = ()) -> Abort:
    return Abort(**start.identity._asdict(), reason=reason, lost=lost)


def expected(start: Start, sources: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
    """The sum in the order of the members, every operation rounded once."""
    total = None
    for member, multiplier in zip(start.contributors, start.multipliers, strict=True):
        term = sources[member.name].numpy() * np.float32(multiplier)
        total = term if total is None else total + term
    assert total is not None
    return total / np.float32(start.divisor)


def numbers(elements: int, seed: int) -> torch.Tensor:
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


@contextmanager
def groups(count: int, options: LinkOptions = SMALL, **changes: Any) -> Iterator[list[Group]]:
    made = [Group(run="run", name=f"p{i}", incarnation=100 + i, options=options, **changes) for i in range(count)]
    try:
        yield made
    finally:
        for group in made:
            group.close()


def eventually(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something that another thread brings about."""
    deadline, tick = time.monotonic() + seconds, threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        tick.wait(0.01)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Call each in a thread of its own; what they return or raise, in order."""
    answers: list[Any] = [None] * len(calls)

    def work(index: int) -> None:
        try:
            answers[index] = calls[index]()
        except BaseException as error:
            answers[index] = error

    threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a call hangs"
    return answers


def run_all(
    made: Sequence[Group], start: Start, sources: dict[str, torch.Tensor]
) -> tuple[list[Outcome], list[torch.Tensor]]:
    """Run one attempt on all these groups at once; those without a source are receivers."""
    results = [torch.full((start.elements,), float("nan")) for _ in made]
    outcomes = together(
        *(
            lambda group=group, result=result: group.run(start, sources.get(group.member.name), result)
            for group, result in zip(made, results, strict=True)
        )
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes, results


def assert_exact(start: Start, sources: dict[str, torch.Tensor], outcomes: Sequence[Outcome], results: Any) -> None:
    """Everyone is done, with the same and the right bits."""
    assert all(isinstance(outcome, Done) for outcome in outcomes), outcomes
    assert len({outcome.digest for outcome in outcomes if isinstance(outcome, Done)}) == 1
    wanted = expected(start, sources)
    for result in results:
        np.testing.assert_array_equal(result.numpy().view(np.uint32), wanted.view(np.uint32))


def start_to_json(start: Start) -> dict[str, Any]:
    return asdict(start)


def start_from_json(fields: dict[str, Any]) -> Start:
    def members(listed: list[dict[str, Any]]) -> tuple[Member, ...]:
        return tuple(Member(**{**each, "addresses": tuple(each["addresses"])}) for each in listed)

    tuples = {name: tuple(fields[name]) for name in ("shares", "multipliers")}
    people = {name: members(fields[name]) for name in ("contributors", "receivers")}
    wires = {"wires": tuple(WireRun(**each) for each in fields["wires"])}
    return Start(**{**fields, **tuples, **people, **wires})


class Process:
    """A peer in a process of its own, that takes orders line by line (see peer_process.py)."""

    def __init__(self, name: str, incarnation: int) -> None:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("peer_process.py")), name, str(incarnation)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        hello = self.read()
        self.member = Member(name=name, incarnation=incarnation, addresses=tuple(hello["addresses"]))

    def read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the peer process ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def tell(self, **order: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()

"""Peers that all-reduce 8 MiB without end, and check every result, until they are killed or told to leave.

Every input says whose it is: its first numbers name the peer's life and the call, the others follow from them. They are
whole numbers below 2**20, so that a sum of a few is exact in any order, and shows who is in it, and how often.
"""

from __future__ import annotations

import os
import signal
from collections.abc import MutableSequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from collectives import Progress
from elastic.config import FaultPolicy, RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.peer import Peer

RUN, TAG, NAMES = "kills", "kills", ("a", "b", "c")
ELEMENTS = 2 << 20
TIMEOUTS = Timeouts(operation=20, round=60)
# The places of a peer's board, which the test reads after its death.
BEGUN, ENDED, RECEIVED, EXPECTED, STRIKE_AT = range(5)
NEVER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an all-reduce returned. claims: name, life, call of those whose numbers it shows; fault: "" if right."""

    life: int
    call: int
    round: int
    attempts: int
    contributors: tuple[str, ...]
    claims: tuple[tuple[str, int, int], ...]
    digest: str
    fault: str


@cache
def _noise() -> NDArray[np.float32]:
    places = np.arange(ELEMENTS + (1 << 16), dtype=np.uint32)
    return (places * np.uint32(2654435761) >> np.uint32(12)).astype(np.float32)


def source(name: str, life: int, call: int) -> NDArray[np.float32]:
    """The input of one call of one life of a peer."""
    offset = (NAMES.index(name) * 7919 + life * 104_729 + call * 1_299_709) % (1 << 16)
    numbers = _noise()[offset : offset + ELEMENTS].copy()
    numbers[: 2 * len(NAMES)] = 0
    numbers[2 * NAMES.index(name) :][:2] = life, call
    return numbers


def claims_of(result: NDArray[np.float32]) -> tuple[tuple[str, int, int], ...]:
    """Whose numbers are in a result."""
    pairs = [(name, int(result[2 * i]), int(result[2 * i + 1])) for i, name in enumerate(NAMES)]
    return tuple(pair for pair in pairs if pair[1:] != (0, 0))


def fault_of(result: NDArray[np.float32], contributors: tuple[str, ...]) -> str:
    """What is wrong with a result; "" if it is exactly the sum over its contributors."""
    claims = claims_of(result)
    if tuple(name for name, _, _ in claims) != contributors:
        return f"it names {contributors}, and is made of {claims}"
    total = np.zeros(ELEMENTS, dtype=np.float32)
    for claim in claims:
        total += source(*claim)
    wrong = np.count_nonzero(total.view(np.uint32) != result.view(np.uint32))
    return f"{wrong} of {ELEMENTS} numbers are wrong; claims {claims}" if wrong else ""


class Worker:
    """One life of one peer."""

    def __init__(self, name: str, life: int, address: str, board: MutableSequence[int], pipe: Connection) -> None:
        self.name, self.life, self.board, self.pipe = name, life, board, pipe
        self.peer = Peer(address, run=RUN, name=name, timeouts=TIMEOUTS, observe=self.observe)

    def observe(self, progress: Progress) -> None:
        """Notes how far the call is; strikes when it has come to the part (in thousandths) that the test asked for."""
        board = self.board
        board[RECEIVED], board[EXPECTED] = progress.chunks_received, progress.chunks_expected
        if board[STRIKE_AT] == NEVER:
            return
        due = max(1, board[STRIKE_AT] * progress.chunks_expected // 1000)
        if progress.chunks_received >= due and board[BEGUN] > board[ENDED]:
            os.kill(os.getpid(), signal.SIGKILL)

    def work(self) -> None:
        """All-reduces until the test says something."""
        with self.peer:
            for call in count(1):
                if self.pipe.poll():
                    return
                self.pipe.send(self.reduce(call))

    def reduce(self, call: int) -> Result:
        numbers = source(self.name, self.life, call)
        before = xxh3_128_hexdigest(numbers.data)
        self.board[RECEIVED] = 0
        self.board[BEGUN] = call
        got: Any = self.peer.all_reduce(torch.from_numpy(numbers), tag=TAG)
        self.board[ENDED] = call
        values = got.tensor.numpy()
        touched = "" if xxh3_128_hexdigest(numbers.data) == before else "the input was touched"
        return Result(
            life=self.life,
            call=call,
            round=got.round,
            attempts=got.attempts,
            contributors=got.contributors,
            claims=claims_of(values),
            digest=xxh3_128_hexdigest(values.data),
            fault=touched or fault_of(values, got.contributors),
        )


def serve_peer(name: str, life: int, address: str, board: MutableSequence[int], pipe: Connection) -> None:
    """One life, in a process of its own. What it raises is the last thing that it says."""
    torch.set_num_threads(1)
    try:
        Worker(name, life, address, board, pipe).work()
    except Exception as error:
        pipe.send(f"{name} (life {life}): {error!r}")


def serve_coordinator(pipe: Connection) -> None:
    """The coordinator, in a process of its own, until the test says something."""
    # the victims die again and again, on purpose
    policy = RunPolicy(faults=FaultPolicy(flapping="observe"))
    with Coordinator(run=RUN, timeouts=TIMEOUTS, policy=policy) as coordinator:
        pipe.send(coordinator.address)
        pipe.recv()

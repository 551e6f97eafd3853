"""Right or raise: random schedules of faults on real processes, and the value of every result recomputed.

Each schedule draws its peers, tensor, wire, shares and fault from a seed. An attempt runs under the fault and is ended
as a coordinator would end it: whoever is done holds the exact reduction, whoever is not has its source as it was. Then
the survivors retry, and must succeed. A schedule that failed is run again with
`SCHEDULE_SEED=N pytest tests/collectives/test_schedules.py -k FAULT`; `make chaos` draws CHAOS_SCHEDULES new ones.
"""

from __future__ import annotations

import math
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import pytest
import torch
from forked import Answer, Forked, Run, Strike, Struck, digest_of
from plane import make_abort, make_start, numbers
from wire_tap import FAULTS, Fault, Tap

from collectives import Done, LinkOptions, Member, Start

ON_PROCESSES = ("kill", "kill when done", "kill two", "freeze", "successor", "pretender")
ALL = (*ON_PROCESSES, *FAULTS, "cut and kill")
SEEDS = [int(os.environ["SCHEDULE_SEED"])] if "SCHEDULE_SEED" in os.environ else list(range(7))
pause = threading.Event().wait


def rounded(values: torch.Tensor, wire: str) -> torch.Tensor:
    return values.bfloat16().float() if wire == "bf16" else values


def exact(start: Start) -> str:
    """Digest of the reduction over the contributors, in their order, each operation rounded once."""
    total: Any = None
    for member, multiplier in zip(start.contributors, start.multipliers, strict=True):
        term = rounded(numbers(start.elements, member.incarnation), start.wire).numpy() * np.float32(multiplier)
        total = term if total is None else total + term
    return digest_of(rounded(torch.from_numpy(total / np.float32(start.divisor)), start.wire))


@dataclass
class Attempt:
    """What came of one attempt. struck: who said that it strikes itself; gone, frozen: who does not count any more."""

    start: Start
    answers: dict[str, Answer] = field(default_factory=dict)
    struck: dict[str, Struck] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    frozen: set[str] = field(default_factory=set)

    def note(self, peer: Forked, message: Any) -> bool:
        """True if the attempt is in trouble."""
        if message is None:
            self.gone.add(peer.name)
            return True
        if isinstance(message, Struck):
            self.struck[peer.name] = message
            if message.kind == "freeze":
                assert peer.frozen()
                self.frozen.add(peer.name)
            return peer.name in self.frozen
        self.answers[peer.name] = message
        return not isinstance(message.outcome, Done)

    def check(self, *, all_done: bool = False) -> None:
        """Right, or raised with the source as it was."""
        wanted = exact(self.start)
        for name, answer in self.answers.items():
            assert not answer.error and answer.outcome is not None, (name, answer)
            assert answer.kept, f"the source of {name} was touched"
            assert answer.identity == answer.outcome.identity == self.start.identity
            if isinstance(answer.outcome, Done):
                assert answer.digest == wanted, (name, answer)
            assert isinstance(answer.outcome, Done) or not all_done, (name, answer)
        outcomes = [answer.outcome for answer in self.answers.values()]
        assert len({outcome.digest for outcome in outcomes if isinstance(outcome, Done)}) <= 1, self.answers


class Schedule:
    """One draw from a seed, carried out by `run`. peers: the processes that count."""

    def __init__(self, fault: str, seed: int) -> None:
        self.fault = fault
        self.draw = draw = random.Random(f"{fault} {seed}")
        self.wired = fault in FAULTS or fault == "cut and kill"
        self.names = [
            f"p{index}" for index in range(draw.randint(3 if fault in ("kill two", "cut and kill") else 2, 4))
        ]
        sizes = (1, 2, 100, int(2 ** draw.uniform(8, 14)), int(2 ** draw.uniform(14, 19.5)))
        self.elements = max(draw.choice(sizes), 2000 if self.wired else 1)
        chunk_bytes = 64 * math.ceil(4 * self.elements / draw.randint(8, 256) / 64)
        pool_bytes = draw.choice((0, 4 * chunk_bytes, 32 << 20))
        shared = not self.wired and draw.random() < 0.6  # what passes a tap has to be on the wire
        if shared:
            self.elements = max(self.elements, 2**17)
            chunk_bytes = max(chunk_bytes, 20_480)
        self.options = LinkOptions(
            chunk_bytes=chunk_bytes,
            stripes=draw.randint(1, 4),
            connect_timeout=20.0,
            pool_bytes=pool_bytes,
            shared_memory=shared,
        )
        self.wire = draw.choice(("f32", "f32", "bf16"))
        self.warm = draw.random() < 0.6 or fault == "former life"  # who greets in another's name is another
        self.views = draw.random() < 0.5
        self.victim, self.second = draw.sample(self.names, 2)
        self.tapped = draw.choice(self.names[1:])  # others dial it, at least the first one does
        self.receiver = draw.choice(self.names) if len(self.names) > 2 and draw.random() < 0.25 else ""
        if self.wired and self.receiver == self.tapped:
            self.receiver = ""
        self.weights = {name: draw.choice((0.0, 1.0, 1.0, 2.0, 0.3)) for name in self.names}
        self.multipliers = {name: draw.choice((1.0, 1.0, 1.0, 0.1, 2.5)) for name in self.names}
        self.divisor = draw.choice((1.0, 1.0, 3.0, 7.3))
        self.peers: dict[str, Forked] = {}
        self.former: list[tuple[Forked, bool]] = []  # and whether it was killed
        self.tap: Tap | None = None

    def __str__(self) -> str:
        return (
            f"{self.fault}: {len(self.names)} peers, {self.elements} x {self.wire}, chunks of "
            f"{self.options.chunk_bytes}, {self.options.stripes} stripes"
            f"{' and shared memory' if self.options.shared_memory else ''}, {'warm' if self.warm else 'cold'}, "
            f"{'views' if self.views else 'no views'}, receiver {self.receiver or 'none'}"
        )

    def run(self) -> Attempt:
        """The whole schedule. Returns the attempt that met the fault."""
        try:
            for index, name in enumerate(self.names):
                self.peers[name] = Forked(name, 100 + index, self.options)
            if self.wired:
                self.tap = Tap(self.peers[self.tapped].member.addresses[0], self.tap_fired)
            self.connect()
            if self.warm:
                self.attempt(self.start(round=0)).check(all_done=True)
            attempt = self.under_fault()
            attempt.check(all_done=self.fault == "another attempt" and self.warm)
            self.retry(attempt)
            self.end()
        except BaseException:
            self.abandon()
            raise
        return attempt

    # The parts of a schedule.

    def under_fault(self) -> Attempt:
        """The attempt that the fault strikes, once it is over for everyone."""
        start = self.start(round=2, receiver=self.receiver)
        if self.tap is not None:
            self.arm_tap(self.tap)
            attempt = self.attempt(start, doomed={self.victim} if self.fault == "cut and kill" else set())
            assert self.tap.fired is not None, "the fault on the wire has not fired"
            return attempt
        kind = "freeze" if self.fault in ("freeze", "successor") else "kill"
        strike = Strike(kind=kind, fraction=1.0 if self.fault == "kill when done" else self.draw.random())
        doomed = {"kill two": {self.victim, self.second}}.get(self.fault, {self.victim} if kind == "kill" else set())
        attempt = self.attempt(start, {self.victim: strike}, doomed)
        assert set(attempt.struck) == {self.victim} and attempt.gone == doomed, "the fault has not fired"
        return attempt

    def arm_tap(self, tap: Tap) -> None:
        """At a frame that passes for certain: of the greetings, or of an attempt like the one before."""
        if self.warm:
            tap.arm(None)
            self.attempt(self.start(round=1, receiver=self.receiver)).check(all_done=True)
        kind = self.fault if self.fault in FAULTS else self.draw.choice(("reset", "truncate", "flip"))
        frame = self.draw.randrange(tap.frames if self.warm else 2 * self.options.stripes)
        tap.arm(Fault(kind=kind, frame=frame, seed=self.draw.getrandbits(32)))

    def tap_fired(self) -> None:
        if self.fault == "cut and kill":
            self.peers[self.victim].kill()

    def attempt(
        self,
        start: Start,
        strikes: dict[str, Strike] | None = None,
        doomed: set[str] = frozenset(),  # type: ignore[assignment]
        during: Callable[[], None] = lambda: None,
    ) -> Attempt:
        """Has everyone execute it; as soon as somebody fails, dies or freezes, the others are told to abort."""
        contributors = {member.incarnation for member in start.contributors}
        for name, peer in self.peers.items():
            seed = peer.member.incarnation if peer.member.incarnation in contributors else None
            peer.tell(Run(start=start, seed=seed, strike=(strikes or {}).get(name)))
        during()
        attempt, waiting = Attempt(start), dict(self.peers)
        while waiting:
            ready = wait([peer.pipe for peer in waiting.values()], 60)
            assert ready, f"{', '.join(waiting)} hang; so far: {attempt}"
            for peer in [peer for peer in waiting.values() if peer.pipe in ready]:
                message = peer.read()
                trouble = attempt.note(peer, message)
                if isinstance(message, Struck) and self.fault == "kill two":
                    self.peers[self.second].kill()
                over = attempt.gone | attempt.frozen | (set(attempt.answers) - doomed)
                waiting = {name: other for name, other in waiting.items() if name not in over}
                if trouble:
                    lost = tuple(attempt.gone | attempt.frozen)
                    for other in waiting.values():
                        other.tell(make_abort(start, "the coordinator of this test ends it", lost))
        return attempt

    def retry(self, attempt: Attempt) -> None:
        """Among the survivors, and whoever takes the victim's place; while its former life makes itself heard."""
        for name in attempt.gone | attempt.frozen:
            self.former.append((self.peers.pop(name), name in attempt.gone))
        thawed = [peer for peer, killed in self.former if not killed]
        if self.fault == "successor":
            self.peers[self.victim] = Forked(self.victim, 1100 + self.names.index(self.victim), self.options)
        self.connect()
        start = self.start(round=2, attempt=1, epoch=2)
        pretender = self.pretend(start) if self.fault == "pretender" else None

        def thaw() -> None:
            pause(self.draw.choice((0.0, self.draw.uniform(0, 0.02))))
            for peer in thawed:
                peer.thaw()

        self.attempt(start, during=thaw).check(all_done=True)
        for peer in thawed:
            Attempt(attempt.start, {peer.name: peer.read()}).check()
        if pretender is not None:
            pretender.tell(make_abort(start))
            answer = pretender.read()
            assert not isinstance(answer.outcome, Done) and answer.kept, answer

    def pretend(self, start: Start) -> Forked:
        """A process that claims to be the dead one, and to take part in the retry."""
        ghost = Forked(self.victim, self.former[0][0].member.incarnation, self.options)
        self.former.append((ghost, False))
        everyone = sorted((*start.contributors, ghost.member), key=lambda member: member.name)
        share = (1 / len(everyone),) * len(everyone)
        own = replace(start, contributors=tuple(everyone), shares=share, multipliers=(1.0,) * len(everyone))
        ghost.tell(Run(start=own, seed=4711))
        return ghost

    def members(self) -> list[Member]:
        """As they are made known: one of them by the address of the tap."""
        known = {name: peer.member for name, peer in self.peers.items()}
        if self.tap is not None and self.tapped in known:
            known[self.tapped] = replace(known[self.tapped], addresses=(self.tap.address,))
        return [known[name] for name in sorted(known)]

    def connect(self) -> None:
        for peer in self.peers.values() if self.views else ():
            peer.tell(self.members())

    def start(self, *, receiver: str = "", **changes: int) -> Start:
        """Orders for the peers there are."""
        members = self.members()
        givers = [member.name for member in members if member.name != receiver]
        weights = {name: 1.0 if self.wired and name == self.tapped else self.weights[name] for name in givers}
        if not any(weights.values()):
            weights[givers[-1]] = 1.0
        return make_start(
            [member for member in members if member.name != receiver],
            self.elements,
            receivers=tuple(member for member in members if member.name == receiver),
            wire=self.wire,
            shares=tuple(weight / sum(weights.values()) for weight in weights.values()),
            multipliers=tuple(self.multipliers[name] for name in givers),
            divisor=self.divisor,
            **changes,
        )

    def end(self) -> None:
        """Every process that was not killed ends by itself, in good order."""
        processes = [*self.former, *((peer, False) for peer in self.peers.values())]
        for peer, _ in processes:
            peer.pipe.close()
        for peer, killed in processes:
            peer.end(killed=killed)
        if self.tap is not None:
            self.tap.close()

    def abandon(self) -> None:
        """After a failure."""
        for peer in (*self.peers.values(), *(peer for peer, _ in self.former)):
            peer.kill()
        if self.tap is not None:
            self.tap.close()


def carry_out(fault: str, seed: int) -> str:
    """One schedule; one line about it."""
    schedule, began = Schedule(fault, seed), time.monotonic()
    try:
        attempt = schedule.run()
    except BaseException as error:
        error.add_note(f"SCHEDULE_SEED={seed}, {schedule}")
        raise
    outcomes = Counter(type(answer.outcome).__name__.lower() for answer in attempt.answers.values())
    fired = schedule.tap.fired if schedule.tap is not None else None
    struck = f" at a {fired.kind.name} frame" if fired is not None else ""
    return f"{schedule} took {time.monotonic() - began:.2f} s;{struck} {dict(outcomes)}"


@pytest.mark.parametrize("fault", ALL)
def test_right_or_raise(fault: str) -> None:
    for seed in SEEDS:
        print(carry_out(fault, seed))


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_right_or_raise_under_new_seeds() -> None:
    first = int(os.environ.get("SCHEDULE_SEED", time.time_ns() % 1_000_000_000))
    for count in range(int(os.environ.get("CHAOS_SCHEDULES", "1000"))):
        print(carry_out(ALL[count % len(ALL)], first + count // len(ALL)), flush=True)

"""A thousand aborts in one process leave it as it was: threads, sockets, descriptors, memory; and good links are kept.

Attempts of three groups end at random chunks: told to from another thread, by an `observe` hook that raises, or because
a fourth peer in a process of its own is killed.
"""

from __future__ import annotations

import gc
import os
import random
import re
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from forked import Forked, Run, Strike, forking
from plane import assert_exact, groups, make_abort, make_start, numbers

from collectives import Done, Failed, Group, LinkOptions, Progress, Start

SHARED = LinkOptions(chunk_bytes=20_480, connect_timeout=5.0)
TCP = replace(SHARED, shared_memory=False)  # one of the three: so there are links of either kind
ELEMENTS = 200_000  # 42 chunks
MEMORY = 4 << 20  # bytes that a thousand aborts may add: a fifth of a chunk for each


class Trigger:
    """An observe hook that calls `action` once, at one chunk of one round."""

    def __init__(self) -> None:
        self.at: tuple[int, int] | None = None
        self.action: Callable[[], None] = lambda: None

    def set(self, round_: int, chunk: int, action: Callable[[], None]) -> None:
        self.at, self.action = (round_, chunk), action

    def __call__(self, progress: Progress) -> None:
        if self.at == (progress.identity.round, progress.chunks_received):
            self.at = None
            self.action()


@dataclass(frozen=True)
class Holdings:
    """What this process holds. sockets: their inodes, which tell one connection from the next."""

    threads: Counter[str]
    tasks: int
    descriptors: int
    sockets: frozenset[str]
    memory: int = field(compare=False)


def holdings() -> Holdings:
    gc.collect()
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError:  # the listing's own
            continue
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[1])
    return Holdings(
        threads=Counter(re.sub(r"[0-9]+", "#", thread.name) for thread in threading.enumerate()),
        tasks=len(os.listdir("/proc/self/task")),
        descriptors=len(links),
        sockets=frozenset(link for link in links if link.startswith("socket:")),
        memory=pages * os.sysconf("SC_PAGE_SIZE"),
    )


class House:
    """Three groups, a thread for each that runs its attempts, and the coordinator's part."""

    def __init__(self, made: list[Group], triggers: dict[str, Trigger], pool: ThreadPoolExecutor) -> None:
        self.groups, self.triggers, self.pool = made, triggers, pool
        self.draw = random.Random(0)
        self.round = 0
        self.sources = {f"p{index}": numbers(ELEMENTS, index) for index in range(3)} | {"q": numbers(ELEMENTS, 3)}
        self.results = [torch.empty(ELEMENTS) for _ in made]
        self.aborted: Counter[str] = Counter()

    def begin(self, *guests: Forked) -> tuple[Start, list[Future[Any]]]:
        """A new round, under way on every group."""
        self.round += 1
        members = [group.member for group in self.groups] + [guest.member for guest in guests]
        start = make_start(members, ELEMENTS, round=self.round)
        running = [
            self.pool.submit(group.run, start, self.sources[group.member.name], result)
            for group, result in zip(self.groups, self.results, strict=True)
        ]
        return start, running

    def undisturbed(self) -> None:
        """One right result: all links are up."""
        start, running = self.begin()
        assert_exact(start, self.sources, [each.result(60) for each in running], self.results)

    def abort(self, start: Start, running: list[Future[Any]], lost: tuple[str, ...] = ()) -> bool:
        """Tells everyone; True if the attempt ended by that, and not before."""
        for group in self.draw.sample(self.groups, len(self.groups)):
            group.abort(make_abort(start, lost=lost))
        outcomes = [each.result(60) for each in running]
        assert all(isinstance(outcome, Done | Failed) for outcome in outcomes)
        return any(isinstance(outcome, Failed) for outcome in outcomes)

    def chance(self) -> tuple[Trigger, int]:
        """One of the groups, and one of the chunks that it will receive."""
        return self.triggers[self.draw.choice(self.groups).member.name], self.draw.randint(1, 45)

    def told(self) -> bool:
        """Aborted from this thread at a random chunk."""
        reached = threading.Event()
        trigger, chunk = self.chance()
        trigger.set(self.round + 1, chunk, reached.set)
        start, running = self.begin()
        assert reached.wait(60)
        return self.abort(start, running)

    def hook_raises(self) -> bool:
        """The hook of one group raises at a random chunk."""
        reached = threading.Event()

        def fail() -> None:
            reached.set()
            raise RuntimeError("on purpose")

        trigger, chunk = self.chance()
        trigger.set(self.round + 1, chunk, fail)
        start, running = self.begin()
        assert reached.wait(60)
        return self.abort(start, running)

    def guest_dies(self) -> bool:
        """A fourth peer is killed at a random chunk."""
        guest = Forked("q", 1000 + self.round, SHARED)
        self.connect(guest)
        start, running = self.begin(guest)
        guest.tell(Run(start=start, seed=3, strike=Strike(kind="kill", fraction=self.draw.random())))
        while guest.read() is not None:
            continue
        ended = self.abort(start, running, ("q",))
        guest.end(killed=True)
        self.connect()
        return ended

    def connect(self, *guests: Forked) -> None:
        for group in self.groups:
            group.connect([group.member for group in self.groups] + [guest.member for guest in guests])

    def many(self, how: Callable[[], bool], count: int) -> None:
        """So many aborts; attempts that were over before do not count."""
        for _ in range(10 * count):
            self.aborted[how.__name__] += how()
            if self.aborted[how.__name__] == count:
                return
        raise AssertionError(f"of {10 * count} attempts only {self.aborted} were aborted")

    def settled(self, before: Holdings | None = None) -> Holdings:
        """What is held once dead links are buried: as `before`, or what it was when that was given up."""
        self.undisturbed()
        tick = threading.Event()
        for _ in range(300):
            now = holdings()
            buried = all(link.state == "up" for group in self.groups for link in group.statistics().links)
            if buried and before in (None, now):
                break
            tick.wait(0.02)
        return now


@contextmanager
def house() -> Iterator[House]:
    triggers = {f"p{index}": Trigger() for index in range(3)}
    with ThreadPoolExecutor(3) as pool, groups(0) as made:
        for index, trigger in enumerate(triggers.values()):
            options = TCP if index == 0 else SHARED
            made.append(Group(run="run", name=f"p{index}", incarnation=100 + index, options=options, observe=trigger))
        yield House(made, triggers, pool)


def thousand_aborts() -> str:
    """Returns what was counted; raises what is wrong."""
    empty = holdings()
    with house() as subject:
        for how in (subject.told, subject.hook_raises, subject.guest_dies):
            subject.many(how, 30)
        subject.aborted.clear()
        before = subject.settled()
        assert {link.shared for group in subject.groups for link in group.statistics().links} == {True, False}
        subject.many(subject.told, 450)
        subject.many(subject.hook_raises, 450)
        assert subject.settled(before) == before  # the very same sockets: nobody had to dial again
        subject.many(subject.guest_dies, 100)
        after = subject.settled(before)
        assert after == before
        grown = after.memory - before.memory
        assert grown < MEMORY, f"memory grew by {grown} bytes"
    ended = holdings()
    assert (ended.threads, ended.tasks, ended.sockets) == (empty.threads, empty.tasks, empty.sockets)
    held = f"{after.tasks} threads, {after.descriptors} descriptors, {len(after.sockets)} sockets as before"
    return f"{dict(subject.aborted)} in {subject.round} rounds; {held}; memory grew by {grown / 1024:.0f} KiB"


def report(pipe: Connection) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send((thousand_aborts(), ""))
    except BaseException:
        pipe.send(("", traceback.format_exc()))


def test_a_thousand_aborts_leave_nothing_behind() -> None:
    """In a process of its own: in this one, other tests and their libraries come and go."""
    pipe, theirs = forking().Pipe()
    process = forking().Process(target=report, args=(theirs,))
    process.start()
    theirs.close()
    answered = pipe.poll(100)
    counted, wrong = pipe.recv() if answered else ("", "it hangs")
    if not answered:
        process.kill()
    process.join(30)
    assert not wrong, wrong
    assert process.exitcode == 0
    print(counted)

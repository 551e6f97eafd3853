"""Interleavings of threads that once went wrong, forced by events: links against attempts, senders against ends."""

from __future__ import annotations

import gc
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from plane import assert_exact, groups, make_abort, make_start, numbers, run_all
from plane import eventually as patiently

from collectives import Done, Failed, Group, LinkFailure, LinkOptions, Member, Start, links
from collectives.exchange import Attempt
from collectives.frames import NO_KEY, Header, Kind, key_of
from collectives.links import Link, Outgoing, Pool, Sink
from collectives.sockets import SLICE, Lease

OPTIONS = LinkOptions(chunk_bytes=4096, connect_timeout=3.0, stripes=1, shared_memory=False)
PATIENCE = 10.0  # seconds after which a call counts as hanging
BIG = 12 << 20  # bytes: more than the kernel keeps for a peer that does not read

eventually = partial(patiently, seconds=10.0)


class Call:
    """A call in a thread of its own."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._box: list[Any] = []
        self._work = work
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._box.append(self._work())
        except BaseException as error:
            self._box.append(error)

    def result(self) -> Any:
        """What it returned or raised."""
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "the call hangs"
        return self._box[0]


def wait_for(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "it never happened"


def run(group: Group, start: Start, source: torch.Tensor | None, result: torch.Tensor | None = None) -> Call:
    into = torch.zeros(start.elements, dtype=getattr(torch, start.dtype)) if result is None else result
    return Call(lambda: group.run(start, source, into))


def reduce(made: list[Group], round_: int, **changes: Any) -> None:
    """An attempt without incidents. It leaves the links up."""
    start = make_start([group.member for group in made], 1000, round=round_, **changes)
    sources = {group.member.name: numbers(1000, seed) for seed, group in enumerate(made)}
    assert_exact(start, sources, *run_all(made, start, sources))


class Deaf:
    """The hooks of a link that nobody uses."""

    def route(self, link: Link, header: Header) -> Sink | None:
        return None

    def lost(self, link: Link) -> None:
        return None

    def slots(self) -> int:
        return 2


@contextmanager
def lone_link(stripes: int) -> Iterator[tuple[Link, list[socket.socket]]]:
    """A link that has not started, and the other ends of its stripes, which nobody reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = [socket.create_connection(listener.getsockname()) for _ in range(stripes)]
        far = [listener.accept()[0] for _ in near]
    for sock in near:
        for which in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, which, struct.pack("@ll", 0, int(1e6 * SLICE)))
    link = Link(
        Member(name="deaf", incarnation=5), near, run=1, me=2, options=OPTIONS, hooks=Deaf(), pool=Pool(1 << 20, 4)
    )
    try:
        yield link, far
    finally:
        link.fail("reset", "the test is over")
        link.reap()
        for sock in far:
            sock.close()


def big(lease: Lease) -> Outgoing:
    return Outgoing(Kind.SCATTER, NO_KEY, numbers=np.zeros(BIG, dtype=np.uint8), lease=lease)


class Watched:
    """An epoll that counts how often it was asked, and says when somebody waits in it without an end."""

    def __init__(self, epoll: select.epoll) -> None:
        self._epoll = epoll
        self.polls = 0
        self.waiting = threading.Event()

    def poll(self, timeout: float | None = None) -> list[tuple[int, int]]:
        self.polls += 1
        if timeout is None:
            self.waiting.set()
        return self._epoll.poll(timeout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._epoll, name)


# Values.


def test_opposite_infinities_are_the_same_nan_on_everyone() -> None:
    with groups(3, OPTIONS) as made:
        start = make_start([group.member for group in made], 3051, wire="f16", base_version=-1)
        values = {"p0": float("inf"), "p1": float("-inf"), "p2": 1.0}
        calls = [run(group, start, torch.full((3051,), values[group.member.name])) for group in made]
        outcomes = [call.result() for call in calls]
        assert all(isinstance(outcome, Done) for outcome in outcomes), outcomes
        assert len({outcome.digest for outcome in outcomes}) == 1


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_the_smallest_chunks_hold_wide_numbers(dtype: str) -> None:
    with groups(2, replace(OPTIONS, chunk_bytes=64)) as made:
        start = make_start([group.member for group in made], 100, dtype=dtype, wire="raw")
        source = torch.arange(100, dtype=getattr(torch, dtype))
        results = [torch.zeros_like(source) for _ in made]
        calls = [run(group, start, source, result) for group, result in zip(made, results, strict=True)]
        outcomes = [call.result() for call in calls]
        assert all(isinstance(outcome, Done) for outcome in outcomes), outcomes
        assert all(torch.equal(result, 2 * source) for result in results)


@pytest.mark.parametrize("changes", [{}, {"pattern": "ring", "order": (0, 1, 2)}])
def test_members_that_differ_about_checksums_are_told_so(changes: dict[str, Any]) -> None:
    with groups(1, replace(OPTIONS, checksum=False)) as (odd,):
        others = [Group(run="run", name=f"q{i}", incarnation=200 + i, options=OPTIONS) for i in range(2)]
        made = [odd, *others]
        start = make_start([group.member for group in made], 3000, base_version=-1, **changes)
        calls = [run(group, start, torch.ones(3000)) for group in made]
        eventually(lambda: any(not call.thread.is_alive() for call in calls))
        eventually(lambda: any(group.statistics().corrupt_frames for group in made))
        for group in made:  # as a coordinator would, once it has heard of a failure
            group.abort(make_abort(start))
        outcomes = [call.result() for call in calls]
        for group in others:
            group.close()
    assert all(isinstance(outcome, Failed) for outcome in outcomes), outcomes
    lost = [each for outcome in outcomes for each in outcome.lost if each.evidence == "corrupt"]
    assert lost and all("checksum is" in each.detail for each in lost), outcomes


# Links against attempts.


def test_a_peer_that_is_ready_while_a_broadcast_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the root finishes after that is sent, too."""
    complete, ready, heard = Attempt._complete, Attempt.ready, threading.Event()

    def complete_late(self: Attempt, index: int) -> None:
        if self._name == "p1":
            wait_for(heard)
        complete(self, index)

    def hear(self: Attempt, link: Link) -> None:
        ready(self, link)
        if self._name == "p1":
            heard.set()

    monkeypatch.setattr(Attempt, "_complete", complete_late)
    monkeypatch.setattr(Attempt, "ready", hear)
    with groups(2, OPTIONS) as made:
        start = make_start([group.member for group in made], 5000, op="broadcast", shares=(0.0, 1.0))
        made[1].connect([made[0].member])  # so that the link comes up while its attempt begins
        source, result = numbers(5000, 1), torch.zeros(5000)
        calls = [run(made[1], start, source), run(made[0], start, None, result)]
        assert all(isinstance(call.result(), Done) for call in calls)
        assert torch.equal(source, result)


def test_a_link_that_dies_before_the_attempt_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with groups(2, OPTIONS) as made:
        reduce(made, 0)
        start = make_start([group.member for group in made], 1000, round=1)
        doomed, ensure = made[0]._links[101], made[0]._ensure

        def find(member: Member) -> Link | None:
            link = ensure(member)
            if link is doomed:
                link.fail("reset", "cut for the test")
            return link

        monkeypatch.setattr(made[0], "_ensure", find)
        other = run(made[1], start, torch.ones(1000))
        eventually(lambda: key_of(start.identity) in doomed.ready)
        assert isinstance(run(made[0], start, torch.ones(1000)).result(), Done)
        assert isinstance(other.result(), Done)


def test_a_new_link_that_overtakes_the_end_of_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers were lost with the old one: whoever sent them fails, whatever comes first."""
    with groups(2, OPTIONS) as made:
        reduce(made, 0)
        start = make_start([group.member for group in made], 1000, op="broadcast", shares=(0.0, 1.0), round=1)
        near, far = made[1]._links[100], made[0]._links[101]
        send, lost, linked, ready = near.send, made[1].lost, Attempt.linked, Attempt.ready
        swallowed, overtaken = threading.Event(), threading.Event()

        def swallow(*items: Outgoing) -> None:
            """Numbers stay in the socket."""
            send(*[item for item in items if item.numbers is None])
            if any(item.numbers is not None for item in items):
                swallowed.set()

        def lose_late(link: Link) -> None:
            if link is near:
                wait_for(overtaken)
            lost(link)

        def link_up(self: Attempt, link: Link) -> None:
            linked(self, link)
            if self._name == "p1" and link is not near:
                overtaken.set()

        def hear(self: Attempt, link: Link) -> None:
            if link is not far:  # it is cut before p0 hears that p1 is ready: p0 may dial again
                ready(self, link)

        monkeypatch.setattr(near, "send", swallow)
        monkeypatch.setattr(made[1], "lost", lose_late)
        monkeypatch.setattr(Attempt, "linked", link_up)
        monkeypatch.setattr(Attempt, "ready", hear)
        root, other = run(made[1], start, numbers(1000, 1)), run(made[0], start, None)
        wait_for(swallowed)
        cut = Call(lambda: near.fail("reset", "cut for the test"))
        outcome = root.result()
        assert isinstance(outcome, Failed) and [each.evidence for each in outcome.lost] == ["reset"]
        cut.result()
        for group in made:
            group.abort(make_abort(start))
        assert isinstance(other.result(), Failed)


def test_a_link_that_was_parked_does_not_replace_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with groups(2, OPTIONS) as made:
        made[0].connect([made[1].member])
        eventually(lambda: made[1].statistics().parked_links == 1 and 101 in made[0]._links)
        establish, newer = made[1]._establish, []

        def establish_late(member: Member, sockets: list[socket.socket], ident: int, **how: Any) -> Link | None:
            """Between the look at what is parked and its use, the peer gives that link up and builds another."""
            monkeypatch.setattr(made[1], "_establish", establish)
            made[0]._links[101].fail("reset", "cut for the test")
            made[0].connect([made[1].member])
            eventually(lambda: 100 in made[1]._links)
            newer.append(made[1]._links[100])
            return establish(member, sockets, ident, **how)

        monkeypatch.setattr(made[1], "_establish", establish_late)
        made[1].connect([made[0].member])
        assert made[1]._links[100] is newer[0] and newer[0].failure is None
        reduce(made, 0)


def test_whoever_looks_for_a_link_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """Links, and through them other attempts, are told things meanwhile: the attempt must not be locked."""
    with groups(1, OPTIONS) as (group,):
        start = make_start([group.member, Member(name="a", incarnation=9, addresses=("127.0.0.1:1",))], 10)
        free: list[bool] = []

        def take(attempt: Attempt) -> bool:
            with attempt.condition:
                return True

        def look(*_: Any) -> None:
            (attempt,) = group._attempts.values()
            taking = Call(lambda: take(attempt))
            taking.thread.join(1.0)
            free.append(not taking.thread.is_alive())
            group.abort(make_abort(start))

        monkeypatch.setattr(group, "_look_for", look)
        assert isinstance(run(group, start, torch.zeros(10)).result(), Failed)
        assert free == [True]


# Senders and receivers against the end of an attempt.


def test_nothing_is_written_after_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A READY that is on its way to the attempt when that ends starts no arithmetic in the result."""
    ready, held, gate, over = Attempt.ready, threading.Event(), threading.Event(), threading.Event()

    def hear_late(self: Attempt, link: Link) -> None:
        if self._name == "p0":
            held.set()
            wait_for(gate)
        ready(self, link)
        if self._name == "p0":
            over.set()

    monkeypatch.setattr(Attempt, "ready", hear_late)
    with groups(2, OPTIONS) as made:
        for group, other in (made, made[::-1]):
            group.connect([other.member])
        eventually(lambda: all(group._links for group in made))
        changes = {"pattern": "ring", "order": (0, 1), "multipliers": (0.5, 0.5)}
        start = make_start([group.member for group in made], 20_000, **changes)
        result = torch.zeros(20_000)
        mine = run(made[0], start, torch.ones(20_000), result)
        eventually(lambda: key_of(start.identity) in made[1]._links[100].ready)
        other_call = run(made[1], start, torch.ones(20_000))
        wait_for(held)
        made[0].abort(make_abort(start))
        assert isinstance(mine.result(), Failed)
        result.fill_(7.0)
        gate.set()
        wait_for(over)
        assert bool((result == 7.0).all())
        made[1].abort(make_abort(start))
        other_call.result()


def test_the_memory_of_a_frame_is_given_back_once() -> None:
    """By the sender thread, because its owner wants it, or by the receiver thread, because the link is dead."""
    entered, gate = threading.Event(), threading.Event()

    class Slow(Lease):
        def release(self) -> None:
            if not entered.is_set():
                entered.set()
                wait_for(gate)
            super().release()

    lease = Slow()
    with lone_link(2) as (link, _):
        link.start()
        link.send(big(lease), big(lease))
        assert all(stripe.handed for stripe in link.stripes)
        lease.revoke()
        link.discard(lease)
        wait_for(entered)
        link.fail("timeout", "left out")
        link._threads[-1].join(PATIENCE)
        gate.set()
    assert lease._users == 0


def test_memory_wanted_back_while_a_frame_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender thread has looked already, and the peer never reads: it must be told once more."""
    lease = Lease()
    with lone_link(2) as (link, _):
        watched = Watched(link._writable)
        link._writable = watched  # type: ignore[assignment]
        link.start()
        hand_over, hear = link._hand_over, link._hear

        def listen() -> None:
            hear()
            watched.waiting.clear()

        def late(stripe: links.Stripe) -> None:
            heard = watched.polls
            lease.revoke()
            link.discard(lease)
            eventually(lambda: watched.polls > heard and watched.waiting.is_set())
            hand_over(stripe)

        monkeypatch.setattr(link, "_hear", listen)
        monkeypatch.setattr(link, "_hand_over", late)
        Call(lambda: link.send(big(lease))).result()
        assert Call(lease.wait_unused).result() is None


def test_the_receiver_sleeps_while_the_sender_is_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bell that only the sender thread can silence wakes the receiver thread once."""
    advance, stuck = links._Frame.advance, threading.Event()

    def note(self: links._Frame, sock: socket.socket, flags: int) -> bool:
        if not flags:
            stuck.set()
        return advance(self, sock, flags)

    monkeypatch.setattr(links._Frame, "advance", note)
    with lone_link(1) as (link, (far,)):
        watched = Watched(link._readable)
        link._readable = watched  # type: ignore[assignment]
        link.start()
        link.send(big(Lease()), big(Lease()))
        while not stuck.is_set():  # some room in the socket, and the sender thread goes on with a call that blocks
            far.recv(1 << 20)
        before = watched.polls
        link.discard(Lease())
        threading.Event().wait(0.3)
        assert watched.polls - before < 5


def test_an_interrupted_send_ends_the_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the thread that calls run(), in the middle of a frame: everyone else hears of it."""
    advance, victims = links._Frame.advance, set()

    def interrupted(self: links._Frame, sock: socket.socket, flags: int) -> bool:
        if threading.current_thread() in victims and self.item.numbers is not None:
            raise KeyboardInterrupt
        return advance(self, sock, flags)

    def press() -> Any:
        victims.add(threading.current_thread())
        return made[0].run(start, torch.ones(1000), torch.zeros(1000))

    with groups(2, OPTIONS) as made:
        reduce(made, 0)
        start = make_start([group.member for group in made], 1000, round=1)
        link = made[0]._links[101]
        other = run(made[1], start, torch.ones(1000))
        eventually(lambda: key_of(start.identity) in link.ready)
        monkeypatch.setattr(links._Frame, "advance", interrupted)
        assert isinstance(Call(press).result(), KeyboardInterrupt)
        assert link.failure is not None
        outcome = other.result()
        assert isinstance(outcome, Failed) and [each.peer for each in outcome.lost] == ["p0"]
        assert Call(made[0].close).result() is None


# The end of a group.


def test_a_group_closes_while_it_begins_to_look_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, closing = threading.Thread.start, []

    def begin_late(self: threading.Thread) -> None:
        if self.name == "look-a":
            closing.append(Call(group.close))
            closing[0].thread.join(0.3)  # it gets so far as to join this thread, unless it has to wait
        begin(self)

    with groups(1, OPTIONS) as (group,):
        ghost = Member(name="a", incarnation=9, addresses=("127.0.0.1:1",))
        failure = LinkFailure(peer="a", incarnation=9, evidence="timeout", detail="")
        monkeypatch.setattr(threading.Thread, "start", begin_late)
        group._look_for(ghost, failure)
        assert closing[0].result() is None
        group._look_for(ghost, failure)
        assert len(closing) == 1, "a group that is closed begins nothing"


def test_a_link_that_comes_too_late_leaves_nothing_open() -> None:
    with groups(1, OPTIONS) as (group,), socket.create_server(("127.0.0.1", 0)) as listener:
        group.close()
        with socket.create_connection(listener.getsockname()) as sock:
            gc.collect()
            before = len(os.listdir("/proc/self/fd"))
            assert group._establish(Member(name="q", incarnation=9), [sock], 5) is None
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) == before - 1


def test_what_goes_wrong_in_looking_after_a_link_costs_that_link_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with groups(2) as made:
        for group in made:
            group.connect([each.member for each in made])
        eventually(lambda: all(group.statistics().links for group in made))

        def broken(link: Link) -> None:
            raise RuntimeError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(Link, "check_path", broken)
            eventually(lambda: not any(link.state == "up" for link in made[0].statistics().links))
        start = make_start([group.member for group in made], 500)
        sources = {group.member.name: torch.ones(500) for group in made}
        outcomes, results = run_all(made, start, sources)
        assert_exact(start, sources, outcomes, results)

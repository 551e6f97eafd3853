"""Peers that die, freeze, lie, or were never there; and garbage on the port."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from plane import (
    SMALL,
    Process,
    assert_exact,
    eventually,
    expected,
    groups,
    make_abort,
    make_start,
    numbers,
    run_all,
    start_to_json,
    together,
)
from xxhash import xxh3_128_hexdigest

from collectives import Done, Failed, Group, LinkOptions, Member, Progress, frames, patterns
from collectives.frames import Hello, Kind, Purpose
from collectives.sockets import parse_address, receive_into

ELEMENTS = 60_000  # 59 chunks of SMALL.chunk_bytes
TCP = replace(SMALL, shared_memory=False)  # where what passes on the wire matters


@contextmanager
def processes(count: int) -> Iterator[list[Process]]:
    made = [Process(f"p{index}", 100 + index) for index in range(count)]
    try:
        yield made
    finally:
        for process in made:
            process.process.send_signal(signal.SIGCONT)
            process.kill()


def sources_for(count: int, elements: int = ELEMENTS) -> dict[str, torch.Tensor]:
    return {f"p{index}": numbers(elements, index) for index in range(count)}


@pytest.mark.parametrize(("victim", "kill_at"), [(0, 1), (1, 5), (2, 20), (0, 38), (1, 57), (2, 1)])
def test_kill_one_of_three_and_retry_without_it(victim: int, kill_at: int) -> None:
    """Both survivors name the dead peer and hold their sources; the retry gives the right sum over the two."""
    with processes(3) as made:
        start = make_start([process.member for process in made], ELEMENTS)
        for index, process in enumerate(made):
            deadly = {"kill_at": kill_at} if index == victim else {}
            process.tell(start=start_to_json(start), seed=index, **deadly)
        survivors = [index for index in range(3) if index != victim]

        def outcome(me: int, other: int) -> dict[str, Any]:
            """Whoever fails has the other one aborted, as a coordinator would: it may need nothing of the dead peer."""
            answer = made[me].read()
            if not answer["done"]:
                made[other].tell(abort=asdict(make_abort(start, "the other one failed")))
            return answer

        one, two = survivors
        answers = together(lambda: outcome(one, two), lambda: outcome(two, one))
        assert all(answer["lost"] or answer["done"] or "the other" in answer["reason"] for answer in answers), answers
        for answer in answers:
            if answer["done"]:  # it had all it needed before the death: then the sum over three is right
                assert answer["digest"] == xxh3_128_hexdigest(expected(start, sources_for(3)).data)
                continue
            assert answer["source_kept"]
            blamed = [(each["peer"], each["evidence"]) for each in answer["lost"]]
            assert blamed in ([], [(f"p{victim}", "refused")])
        failed = [answer for answer in answers if not answer["done"]]
        assert not failed or any(answer["lost"] for answer in failed)
        again = make_start([made[index].member for index in survivors], ELEMENTS, attempt=1, epoch=2)
        for index in survivors:
            made[index].tell(start=start_to_json(again), seed=index)
        wanted = xxh3_128_hexdigest(expected(again, sources_for(3)).data)
        for index in survivors:
            answer = made[index].read()
            assert answer["done"] and answer["digest"] == wanted and answer["source_kept"]


@pytest.mark.parametrize("stop_at", [1, 20])
def test_a_frozen_peer_is_cut_by_abort(stop_at: int) -> None:
    with processes(3) as made:
        start = make_start([process.member for process in made], 400_000)
        made[0].tell(start=start_to_json(start), seed=0)
        made[1].tell(start=start_to_json(start), seed=1)
        made[2].tell(start=start_to_json(start), seed=2, stop_at=stop_at)
        pid, status = os.waitpid(made[2].process.pid, os.WUNTRACED)
        assert pid == made[2].process.pid and os.WIFSTOPPED(status)
        abort = asdict(make_abort(start, "p2 is silent", ("p2",)))
        again = make_start([process.member for process in made[:2]], 400_000, attempt=1, epoch=2)
        for process in made[:2]:
            process.tell(abort=abort)
        for index, process in enumerate(made[:2]):
            answer = process.read()
            assert not answer["done"] and "p2 is silent" in answer["reason"] and answer["source_kept"]
            process.tell(start=start_to_json(again), seed=index)
        wanted = xxh3_128_hexdigest(expected(again, sources_for(3, 400_000)).data)
        assert [process.read()["digest"] for process in made[:2]] == [wanted, wanted]
        made[2].process.send_signal(signal.SIGCONT)
        thawed = made[2].read()
        assert not thawed["done"] and {each["peer"] for each in thawed["lost"]} <= {"p0", "p1"}


def test_a_peer_that_leaves_in_good_order_takes_nothing_with_it() -> None:
    """p0 closes as soon as it is done; the others still get every byte that it sent."""
    sources = sources_for(3)
    for round_ in range(10):
        with groups(3) as made:
            start = make_start([group.member for group in made], ELEMENTS, round=round_)
            results = [torch.empty(ELEMENTS) for _ in made]

            def leave(made: list[Group] = made, start: Any = start, results: Any = results) -> Any:
                outcome = made[0].run(start, sources["p0"], results[0])
                made[0].close()
                return outcome

            others = [
                lambda index=index, made=made, start=start, results=results: made[index].run(
                    start, sources[f"p{index}"], results[index]
                )
                for index in (1, 2)
            ]
            assert_exact(start, sources, together(leave, *others), results)


def test_nobody_at_the_address() -> None:
    with groups(1) as made:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
            ghost = Member(name="q", incarnation=9, addresses=(f"127.0.0.1:{holder.getsockname()[1]}",))
            outcome = made[0].run(make_start([made[0].member, ghost], 10), torch.zeros(10), torch.zeros(10))
    assert isinstance(outcome, Failed)
    assert [(each.peer, each.incarnation, each.evidence) for each in outcome.lost] == [("q", 9, "refused")]


def test_a_listener_that_never_answers_is_a_timeout() -> None:
    with groups(1, replace(SMALL, connect_timeout=0.3, probe_timeout=0.1)) as made, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        ghost = Member(name="q", incarnation=9, addresses=(f"127.0.0.1:{silent.getsockname()[1]}",))
        outcome = made[0].run(make_start([made[0].member, ghost], 10), torch.zeros(10), torch.zeros(10))
    assert isinstance(outcome, Failed) and [each.evidence for each in outcome.lost] == ["timeout"]


def test_a_peer_that_should_dial_and_does_not_is_a_timeout() -> None:
    with groups(1, replace(SMALL, connect_timeout=0.3)) as made:
        ghost = Member(name="q", incarnation=9)
        outcome = made[0].run(make_start([made[0].member, ghost], 10), torch.zeros(10), torch.zeros(10))
    assert isinstance(outcome, Failed) and [each.evidence for each in outcome.lost] == ["timeout"]


def test_a_dead_peer_that_should_have_dialled_is_found_by_its_port() -> None:
    with groups(1, replace(SMALL, connect_timeout=3600.0)) as made, socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        ghost = Member(name="a", incarnation=9, addresses=(f"127.0.0.1:{holder.getsockname()[1]}",))
        outcome = made[0].run(make_start([made[0].member, ghost], 10), torch.zeros(10), torch.zeros(10))
    assert isinstance(outcome, Failed) and [each.evidence for each in outcome.lost] == ["refused"]


def test_a_former_incarnation_is_refused() -> None:
    with groups(2) as made:
        former = replace(made[1].member, incarnation=55)
        outcome = made[0].run(make_start([made[0].member, former], 10), torch.zeros(10), torch.zeros(10))
        assert isinstance(outcome, Failed)
        assert [(each.incarnation, each.evidence) for each in outcome.lost] == [(55, "refused")]
        assert "over" in outcome.lost[0].detail
        assert made[1].statistics().parked_links == 0


def test_a_peer_outside_the_view_cannot_link_again() -> None:
    with groups(2, replace(SMALL, connect_timeout=2.0)) as made:
        members = [group.member for group in made]
        start = make_start(members, 1000)
        sources = sources_for(2, 1000)
        assert_exact(start, sources, *run_all(made, start, sources))
        made[1].connect([])
        eventually(lambda: not made[1].statistics().links and not made[0].statistics().links)
        outcome = made[0].run(replace(start, round=1), sources["p0"], torch.empty(1000))
        assert isinstance(outcome, Failed) and outcome.lost[0].evidence == "unreachable"
        made[1].connect(members)
        again = replace(start, round=2)
        assert_exact(again, sources, *run_all(made, again, sources))


def test_a_link_that_was_named_too_early_is_parked_until_it_is_wanted() -> None:
    with groups(2) as made:
        made[0].connect([made[1].member])
        eventually(lambda: made[1].statistics().parked_links == 1)
        start = make_start([group.member for group in made], 1000)
        sources = sources_for(2, 1000)
        assert_exact(start, sources, *run_all(made, start, sources))
        assert made[1].statistics().parked_links == 0


def test_parked_links_are_bounded_in_number() -> None:
    with Group(run="run", name="z", incarnation=1, options=replace(SMALL, parked_links=2)) as door:
        callers = [Group(run="run", name=f"c{i}", incarnation=10 + i, listen="", options=SMALL) for i in range(5)]
        for caller in callers:
            caller.connect([door.member])
        eventually(lambda: sum(len(caller.statistics().links) for caller in callers) <= 2)
        assert door.statistics().parked_links <= 2
        for caller in callers:
            caller.close()


def test_parked_links_expire() -> None:
    with (
        Group(run="run", name="z", incarnation=1, options=replace(SMALL, parked_seconds=0.1)) as door,
        groups(1) as made,
    ):
        made[0].connect([door.member])
        eventually(lambda: len(made[0].statistics().links) == 1)
        eventually(lambda: door.statistics().parked_links == 0)
        eventually(lambda: not made[0].statistics().links)


def test_a_dead_link_is_rebuilt_within_the_attempt_while_nothing_is_lost() -> None:
    with groups(2) as made:
        start = make_start([group.member for group in made], 1000)
        sources = sources_for(2, 1000)
        assert_exact(start, sources, *run_all(made, start, sources))
        for round_ in range(1, 6):
            made[1]._links[100].fail("reset", "cut for the test")
            again = replace(start, round=round_)
            assert_exact(again, sources, *run_all(made, again, sources))


# Garbage.


def hello(group: Group, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "expected": group.member.incarnation,
        "link": 5,
        "chunk_bytes": SMALL.chunk_bytes,
        "stripe": 0,
        "stripes": 1,
        "purpose": Purpose.LINK,
    }
    payload = Hello(**{**fields, **changes}).pack()
    run = frames.name_hash("run")
    return (
        frames.encode(Kind.HELLO, run=run, incarnation=101, length=len(payload), digest=frames.checksum(payload))
        + payload
    )


def dial(group: Group) -> socket.socket:
    return socket.create_connection(parse_address(group.addresses[0]), timeout=30)


def test_garbage_on_the_port_takes_nothing_down() -> None:
    with groups(2, replace(SMALL, connect_timeout=1.0, half_open=8)) as made:
        random = np.random.default_rng(0)
        good = hello(made[0])
        samples = [random.bytes(size) for size in (1, 88, 120, 5000)]
        samples += [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", good[:50], b"", good[:-1], bytes(len(good))]
        flipped = bytearray(good)
        flipped[100] ^= 1
        for sample in [*samples, bytes(flipped)]:
            with dial(made[0]) as caller:
                caller.sendall(sample)
        idle = [dial(made[0]) for _ in range(40)]
        start = make_start([group.member for group in made], 1000)
        sources = sources_for(2, 1000)
        assert_exact(start, sources, *run_all(made, start, sources))
        for caller in idle:
            assert caller.recv(1) == b""  # dismissed: by the bound, or by its deadline
            caller.close()


@pytest.mark.parametrize("changes", [{"expected": 3}, {"chunk_bytes": 64}, {"stripes": 65}])
def test_hellos_that_do_not_fit_are_refused_with_a_reason(changes: dict[str, Any]) -> None:
    with groups(1) as made, dial(made[0]) as caller:
        caller.sendall(hello(made[0], **changes))
        answer = frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL))
        assert answer.kind is Kind.REFUSE
        assert len(caller.recv(answer.length, socket.MSG_WAITALL)) == answer.length > 0


@pytest.mark.parametrize("garbage", ["noise", "kind", "incarnation", "chunk", "length"])
def test_garbage_inside_a_link_kills_the_link_alone(garbage: str) -> None:
    """Somebody speaks for p1 and then sends what makes no sense during an attempt."""
    with Group(run="run", name="z", incarnation=1, options=SMALL) as group, dial_in(group) as caller:
        ghost = Member(name="ghost", incarnation=101)
        start = make_start([ghost, group.member], 4000)
        run, key = frames.name_hash("run"), frames.key_of(start.identity)
        bad = {
            "noise": b"\x00" * 88,
            "kind": frames.encode(Kind.GET, run=run, incarnation=101),
            "incarnation": frames.encode(Kind.READY, run=run, incarnation=102),
            "chunk": frames.encode(Kind.SCATTER, run=run, incarnation=101, key=key, chunk=77, length=4),
            "length": frames.encode(Kind.SCATTER, run=run, incarnation=101, key=key, chunk=3, length=4),
        }[garbage]
        result = torch.empty(4000)
        [outcome, _] = together(
            lambda: group.run(start, torch.zeros(4000), result), lambda: send_after_ready(caller, bad)
        )
        assert isinstance(outcome, Failed)
        assert [(each.peer, each.evidence) for each in outcome.lost] == [("ghost", "corrupt")]
        assert group.statistics().corrupt_frames == 1


@contextmanager
def dial_in(group: Group) -> Iterator[socket.socket]:
    """A link of one stripe from incarnation 101, by hand."""
    with dial(group) as caller:
        caller.sendall(hello(group))
        assert frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.WELCOME
        yield caller


def send_after_ready(caller: socket.socket, data: bytes) -> None:
    assert frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.READY
    caller.sendall(data)


class Proxy:
    """Forwards TCP both ways; `flip` spoils one byte of what passes after so many bytes; `hold` stops forwarding."""

    def __init__(self, target: str, flip_after: int) -> None:
        self._target, self._left = parse_address(target), flip_after
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            self._sockets += [near, far]
            for one, other in ((near, far), (far, near)):
                thread = threading.Thread(target=self._pump, args=(one, other), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, one: socket.socket, other: socket.socket) -> None:
        try:
            while data := bytearray(one.recv(65536)):
                with self._lock:
                    if 0 <= self._left < len(data):
                        data[self._left] ^= 0x10
                    self._left -= len(data)
                other.sendall(data)
        except OSError:
            return
        finally:
            for sock in (one, other):
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    continue

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for sock in self._sockets[1:]:
            sock.close()
        for thread in self._threads:
            thread.join()
        self._listener.close()


@pytest.mark.parametrize("flip_after", [1000, 30_000, 100_037])
def test_a_flipped_bit_in_transit_is_found(flip_after: int) -> None:
    with groups(1, TCP) as made, Group(run="run", name="q", incarnation=7, options=TCP) as other:
        proxy = Proxy(other.addresses[0], flip_after)
        both = [made[0], other]
        start = make_start([made[0].member, replace(other.member, addresses=(proxy.address,))], ELEMENTS)
        sources = {"p0": numbers(ELEMENTS, 0), "q": numbers(ELEMENTS, 1)}
        outcomes, _ = run_all(both, start, sources)
        assert all(isinstance(outcome, Failed) for outcome in outcomes)
        evidence = [each.evidence for outcome in outcomes if isinstance(outcome, Failed) for each in outcome.lost]
        assert "corrupt" in evidence
        assert sum(group.statistics().corrupt_frames for group in both) >= 1
        again = replace(start, attempt=1)
        assert_exact(again, sources, *run_all(both, again, sources))
    proxy.close()


def test_a_peer_that_stalls_with_a_frame_half_sent_holds_nobodys_memory() -> None:
    """The caller gets source and result back after an abort, although a frame is half sent and half received."""
    with Group(run="run", name="z", incarnation=1, options=replace(TCP, chunk_bytes=1 << 20)) as group:
        with dial(group) as caller:
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 17)
            caller.sendall(hello(group, chunk_bytes=1 << 20))
            ghost = Member(name="ghost", incarnation=101)
            start = make_start([ghost, group.member], 4_000_000)
            run, key = frames.name_hash("run"), frames.key_of(start.identity)
            chunk = next(i for i, each in enumerate(chunks_of(start, group)) if each.owner == 1)
            size = 4 * (chunks_of(start, group)[chunk].stop - chunks_of(start, group)[chunk].start)
            half = (
                frames.encode(Kind.READY, run=run, incarnation=101, key=key)
                + frames.encode(Kind.SCATTER, run=run, incarnation=101, key=key, chunk=chunk, length=size)
                + b"\x01" * 100
            )
            caller.sendall(half)
            source, result = torch.zeros(4_000_000), torch.zeros(4_000_000)

            def stop() -> None:
                eventually(lambda: any(link.bytes_received for link in group.statistics().links))
                group.abort(make_abort(start))

            [outcome, _] = together(lambda: group.run(start, source, result), stop)
            assert isinstance(outcome, Failed)
            source.fill_(1.0)
            result.fill_(2.0)
            caller.sendall(b"\x01" * (size - 100))
            eventually(lambda: group.statistics().stale_frames == 1)
            assert bool((result == 2.0).all())
            assert [link.state for link in group.statistics().links] == ["up"]
            assert_whole_frames(caller, source_was=0)


def chunks_of(start: Any, group: Group) -> Any:
    return patterns.chunks_of(start, group.options.chunk_bytes)


def assert_whole_frames(caller: socket.socket, source_was: int) -> None:
    """What was half sent is finished from a copy: its checksum holds, its content is the old one."""
    caller.settimeout(30)
    assert frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.WELCOME
    assert frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL)).kind is Kind.READY
    header = frames.decode(caller.recv(frames.HEADER_BYTES, socket.MSG_WAITALL))
    assert header.kind is Kind.SCATTER
    payload = bytearray(header.length)
    receive_into(caller, memoryview(payload))
    assert frames.checksum(payload) == header.checksum and set(payload) == {source_was}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_hundred_aborts_leak_nothing() -> None:
    gc.collect()
    threads, before = threading.active_count(), descriptors()
    armed = threading.Event()

    def observe(progress: Progress) -> None:
        if not armed.is_set() and progress.chunks_received >= progress.identity.round % 7:
            armed.set()
            for group in made:
                group.abort(make_abort(replace(start, round=progress.identity.round), lost=lost))

    with groups(3, observe=observe) as made:
        for round_ in range(100):
            armed.clear()
            lost: tuple[str, ...] = ("p2",) if round_ % 10 == 0 else ()
            start = make_start([group.member for group in made], 20_000, round=round_)
            outcomes, _ = run_all(made, start, sources_for(3, 20_000))
            assert any(isinstance(outcome, Failed) for outcome in outcomes)
        armed.set()
        final = make_start([group.member for group in made], 20_000, round=1000)
        assert_exact(final, sources_for(3, 20_000), *run_all(made, final, sources_for(3, 20_000)))
        eventually(lambda: threading.active_count() <= threads + 3 * (1 + 2 * 4))
    eventually(lambda: threading.active_count() == threads and descriptors() == before)


def test_closing_ends_a_run_that_waits() -> None:
    with groups(2) as made:
        start = make_start([group.member for group in made], 10)

        def close() -> None:
            eventually(lambda: bool(made[0].statistics().links))
            made[0].close()

        [outcome, _] = together(lambda: made[0].run(start, torch.zeros(10), torch.zeros(10)), close)
    assert isinstance(outcome, Failed) and "closed" in outcome.reason


def test_ctrl_c_interrupts_a_run_and_leaves_the_group_usable() -> None:
    with groups(2) as made:
        start = make_start([group.member for group in made], 1000)
        sources = sources_for(2, 1000)

        def interrupt() -> None:
            eventually(lambda: bool(made[0].statistics().links))
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            made[0].run(start, sources["p0"], torch.empty(1000))
        thread.join()
        again = replace(start, attempt=1)
        assert_exact(again, sources, *run_all(made, again, sources))


def test_bad_luck_of_a_receiver_costs_the_contributors_nothing() -> None:
    gone = threading.Event()

    def observe(progress: Progress) -> None:
        if not gone.is_set():
            gone.set()
            for link in list(taker._links.values()):
                link.fail("reset", "cut for the test")

    with groups(3, LinkOptions(chunk_bytes=1024)) as made:
        with Group(run="run", name="t", incarnation=9, options=LinkOptions(chunk_bytes=1024), observe=observe) as taker:
            start = make_start([group.member for group in made], ELEMENTS, receivers=(taker.member,))
            sources = sources_for(3)
            outcomes, results = run_all([*made, taker], start, sources)
            assert_exact(start, sources, outcomes[:3], results[:3])
            assert isinstance(outcomes[3], (Done, Failed))

"""Payloads through memory that peers on one host share: exact values, whoever dies, and TCP wherever it cannot be."""

from __future__ import annotations

import fcntl
import gc
import os
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked, Run, Strike, digest_of
from plane import assert_exact, eventually, expected, groups, make_abort, make_start, numbers, run_all, together

from collectives import Done, Failed, Group, LinkOptions, shared
from collectives.frames import FrameError
from collectives.links import Link
from collectives.shared import MAX_SLOTS, Inbox, Outbox, Sharing
from collectives.wires import WIRES, round_trip

SHARED = LinkOptions(chunk_bytes=20_480, connect_timeout=5.0)
TCP = replace(SHARED, shared_memory=False)
ELEMENTS = 250_000  # 51 chunks


def sources_of(made: list[Group], elements: int = ELEMENTS) -> dict[str, torch.Tensor]:
    return {group.member.name: numbers(elements, index) for index, group in enumerate(made)}


def all_reduce(made: list[Group], elements: int = ELEMENTS, **changes: Any) -> None:
    start = make_start([group.member for group in made], elements, **changes)
    sources = sources_of(made, elements)
    assert_exact(start, sources, *run_all(made, start, sources))


def shares(made: list[Group]) -> set[bool]:
    """Whether payloads from each of them go through shared memory."""
    return {link.shared for group in made for link in group.statistics().links}


def acknowledged(made: list[Group]) -> int:
    """Bytes that TCP has carried between them."""
    sockets = [stripe.socket for group in made for link in group._links.values() for stripe in link.stripes]
    return sum(int.from_bytes(sock.getsockopt(6, 11, 128)[120:128], "little") for sock in sockets)  # TCP_INFO


# Through groups.


@pytest.mark.parametrize("stripes", [1, 3])
@pytest.mark.parametrize("chunk_bytes", [20_480, 20_544, 1 << 18])
@pytest.mark.parametrize("pool_bytes", [0, 32 << 20])
def test_sums_are_exact_and_their_numbers_stay_off_the_wire(stripes: int, chunk_bytes: int, pool_bytes: int) -> None:
    options = LinkOptions(stripes=stripes, chunk_bytes=chunk_bytes, pool_bytes=pool_bytes)
    with groups(3, options) as made:
        all_reduce(made)
        assert shares(made) == {True}
        before = acknowledged(made)
        for round_ in range(1, 6):
            all_reduce(made, round=round_, multipliers=(1.0, 0.3, 2.5), divisor=3.0)
        counted = sum(group.statistics().bytes_sent for group in made)
        assert counted > 6 * 4 * 4 * ELEMENTS  # payloads are counted as ever
        assert acknowledged(made) - before < 0.2 * counted


@pytest.mark.parametrize(
    "way",
    [
        {"pattern": "ring", "order": (2, 0, 1)},
        {"pattern": "tree", "parents": (-1, 0, 0), "shares": (1.0, 0.0, 0.0)},
        {"pattern": "direct", "shares": (0.0, 0.9, 0.1)},
    ],
)
def test_every_pattern(way: dict[str, Any]) -> None:
    with groups(3, SHARED) as made:
        for round_ in range(3):
            start = make_start([group.member for group in made], ELEMENTS, round=round_, **way)
            whole = {name: source.mul(100).round() for name, source in sources_of(made).items()}  # any order is exact
            assert_exact(start, whole, *run_all(made, start, whole))
        assert True in shares(made)


@pytest.mark.parametrize("op", ["min", "max"])
def test_other_operations(op: str) -> None:
    with groups(3, SHARED) as made:
        for round_ in range(3):
            start = make_start([group.member for group in made], ELEMENTS, op=op, round=round_)
            sources = sources_of(made)
            _, results = run_all(made, start, sources)
            wanted = getattr(np, f"{op}imum").reduce([source.numpy() for source in sources.values()])
            assert all(np.array_equal(result.numpy(), wanted) for result in results)


@pytest.mark.parametrize("wire", ["bf16", "int8", "int4"])
def test_lossy_wires_are_encoded_into_slots_and_decoded_from_there(wire: str) -> None:
    with groups(3, LinkOptions(chunk_bytes=131_072)) as made:
        for round_ in range(3):
            start = make_start([group.member for group in made], ELEMENTS, wire=wire, round=round_)
            sources = sources_of(made)
            outcomes, results = run_all(made, start, sources)
            assert len({outcome.digest for outcome in outcomes if isinstance(outcome, Done)}) == 1
            assert all(torch.equal(result, results[0]) for result in results)
        if wire == "bf16":
            scratch, rounded = memoryview(bytearray(4 * ELEMENTS)), {name: torch.empty(ELEMENTS) for name in sources}
            for name, source in sources.items():
                round_trip(WIRES[wire], source.numpy(), scratch, rounded[name].numpy())
            wanted = expected(start, rounded)
            round_trip(WIRES[wire], wanted, scratch, wanted)
            np.testing.assert_array_equal(results[0].numpy(), wanted)
        assert shares(made) == {True}


def test_numbers_that_a_wire_refuses_give_their_slot_back() -> None:
    with groups(2, SHARED) as made:
        for round_ in range(MAX_SLOTS + 6):
            start = make_start([group.member for group in made], ELEMENTS, wire="int8", round=2 * round_)
            sources = sources_of(made)
            sources["p0"][-1] = float("nan")

            def attempt(group: Group, start: Any = start, sources: Any = sources) -> Any:
                outcome = group.run(start, sources[group.member.name], torch.empty(ELEMENTS))
                for other in made:
                    other.abort(make_abort(start))
                return outcome

            outcomes = together(*(lambda group=group: attempt(group) for group in made))
            assert all(isinstance(outcome, Failed) for outcome in outcomes)
            all_reduce(made, round=2 * round_ + 1)


def test_receivers_and_several_tags_share_the_slots() -> None:
    with groups(4, SHARED) as made:
        members = [group.member for group in made]
        starts = [make_start(members[:3], ELEMENTS, tag=f"t{tag}", receivers=(members[3],)) for tag in range(3)]
        sources = sources_of(made[:3])
        answers = together(*(lambda start=start: run_all(made, start, sources) for start in starts))
        for start, answer in zip(starts, answers, strict=True):
            assert_exact(start, sources, *answer)


def test_off_on_one_side_means_tcp_for_what_goes_out_from_there() -> None:
    with Group(run="run", name="a", incarnation=1, options=SHARED) as a, groups(1, TCP) as others:
        for round_ in range(3):
            all_reduce([a, *others], round=round_)
        assert shares([a, *others]) == {False}


@pytest.mark.parametrize("obstacle", ["another host", "no access", "no memory", "somebody else's"])
def test_whatever_stands_in_the_way_leaves_the_link_on_tcp(obstacle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError("not allowed")

    if obstacle == "another host":
        names = iter(range(1000))
        monkeypatch.setattr(shared, "host", lambda: f"{next(names):016d}".encode())
    elif obstacle == "no access":
        monkeypatch.setattr(shared.os, "readlink", refuse)
    elif obstacle == "no memory":
        monkeypatch.setattr(shared.os, "memfd_create", refuse)
    else:
        monkeypatch.setattr(shared.secrets, "token_bytes", lambda size: os.urandom(size))
        monkeypatch.setattr(shared.secrets, "compare_digest", lambda one, other: False)
    with groups(3, SHARED) as made:
        for round_ in range(3):
            all_reduce(made, round=round_)
        assert shares(made) == {False}


def test_a_bit_that_flips_in_a_slot_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    share, flipped = Link._share, threading.Event()

    def spoil(link: Link, frame: Any, payload: memoryview) -> memoryview:
        target = share(link, frame, payload)
        if frame.item.key.round == 1 and not flipped.is_set():
            flipped.set()
            target[len(target) // 2] ^= 1
        return target

    with groups(2, SHARED) as made:
        all_reduce(made)
        monkeypatch.setattr(Link, "_share", spoil)
        start = make_start([group.member for group in made], ELEMENTS, round=1)
        sources = sources_of(made)
        outcomes, _ = run_all(made, start, sources)
        assert flipped.is_set()
        evidence = [each.evidence for outcome in outcomes if isinstance(outcome, Failed) for each in outcome.lost]
        assert "corrupt" in evidence
        again = replace(start, attempt=1)
        assert_exact(again, sources, *run_all(made, again, sources))


def test_numbers_that_wait_for_a_slot_hold_nobodys_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that gives no slots back, as one that is frozen: after an abort the source is free, and the link is up."""
    kept: list[tuple[Link, int]] = []
    give_back, greedy = Link._give_back, threading.Event()

    def keep(link: Link, slot: int) -> None:
        if greedy.is_set():
            kept.append((link, slot))
        else:
            give_back(link, slot)

    monkeypatch.setattr(Link, "_give_back", keep)
    monkeypatch.setattr(Group, "slots", lambda group: 4)
    with groups(2, SHARED) as made:
        all_reduce(made)
        greedy.set()
        start = make_start([group.member for group in made], ELEMENTS, round=1)
        sources = sources_of(made)

        def stop() -> None:
            eventually(lambda: any(link.sharing.waiting for group in made for link in group._links.values()))
            for group in made:
                group.abort(make_abort(start))

        runs = [
            lambda group=group: group.run(start, sources[group.member.name], torch.empty(ELEMENTS)) for group in made
        ]
        outcomes = together(*runs, stop)[:2]
        assert all(isinstance(outcome, Failed) for outcome in outcomes)
        greedy.clear()
        for link, slot in kept:
            give_back(link, slot)
        all_reduce(made, round=2)
        assert {link.state for group in made for link in group.statistics().links} == {"up"}


def test_a_wake_up_that_was_missed_is_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Group, "slots", lambda group: 4)
    with groups(2, SHARED) as made:
        all_reduce(made)
        monkeypatch.setattr(Inbox, "give_back", lambda inbox, slot: inbox._memory.free(slot))  # and tells nobody
        all_reduce(made, round=1)


@pytest.mark.parametrize("kind", ["kill", "freeze"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.7, 0.99])
def test_the_survivors_of_a_process_are_right(kind: str, fraction: float) -> None:
    """Every retry gives the exact sum of the two that are left; who thaws has no wrong result."""
    options = LinkOptions(chunk_bytes=20_480, connect_timeout=20.0)
    peers = [Forked(f"p{index}", 100 + index, options) for index in range(3)]
    try:
        strike_in(peers, kind, fraction)
    finally:
        for peer in peers:
            peer.kill()


def strike_in(peers: list[Forked], kind: str, fraction: float) -> None:
    elements = 400_000
    sources = {peer.name: numbers(elements, index) for index, peer in enumerate(peers)}
    members = [peer.member for peer in peers]
    starts = [make_start(members, elements, round=round_) for round_ in range(2)]
    for start, strike in zip(starts, (None, Strike(kind=kind, fraction=fraction)), strict=True):
        for index, peer in enumerate(peers):
            peer.tell(Run(start=start, seed=index, strike=strike if index == 2 else None))
        if strike is None:
            wanted = digest_of(torch.from_numpy(expected(start, sources)))
            assert [peer.read().digest for peer in peers] == [wanted] * 3
    assert peers[2].read().kind == kind
    if kind == "kill":
        assert peers[2].read() is None
    for peer in peers[:2]:
        peer.tell(make_abort(starts[1], lost=("p2",)))
    again = make_start(members[:2], elements, round=1, attempt=1, epoch=2)
    for index, peer in enumerate(peers[:2]):
        answer = peer.read()
        assert answer.kept and (isinstance(answer.outcome, Failed) or answer.digest == wanted)
        peer.tell(Run(start=again, seed=index))
    two = digest_of(torch.from_numpy(expected(again, sources)))
    assert [peer.read().digest for peer in peers[:2]] == [two, two]
    if kind == "freeze":
        peers[2].thaw()
        answer = peers[2].read()
        assert answer.kept and (isinstance(answer.outcome, Failed) or answer.digest == wanted)


def test_all_that_is_shared_stays_small() -> None:
    with groups(1, LinkOptions(chunk_bytes=1 << 20)) as [group]:
        for count in (1, 2, 4, 8, 32):
            group._links = dict.fromkeys(range(count))  # type: ignore[misc]
            assert 1 <= group.slots() <= max(1, 16 // count)
        group._links = {}


def test_links_that_end_leave_neither_memory_nor_descriptors() -> None:
    gc.collect()
    before = mappings(), len(os.listdir("/proc/self/fd"))
    with groups(3, SHARED) as made:
        for round_ in range(10):
            all_reduce(made, round=round_)
            assert mappings() > before[0]
            for link in list(made[0]._links.values()):
                link.fail("reset", "cut for the test")
    gc.collect()
    assert (mappings(), len(os.listdir("/proc/self/fd"))) == before


def mappings() -> int:
    with open("/proc/self/maps", encoding="ascii") as file:
        return sum("memfd:elastic-link" in line for line in file)


# The two ends, by themselves.


def test_slots_go_round() -> None:
    outbox = Outbox(4, 8192)
    inbox = Inbox.open(outbox.announcement())
    slots = [outbox.take() for _ in range(4)]
    assert sorted(slot for slot in slots if slot is not None) == [0, 1, 2, 3]
    assert outbox.take() is None and outbox.waiting
    for index, slot in enumerate(slots):
        assert slot is not None
        outbox.view(slot)[:5] = b"hello"
        assert bytes(inbox.view(slot, 5)) == b"hello"
        assert inbox.give_back(slot) is (index == 1)  # told once: when half of them are free
    assert outbox.take() is not None and not outbox.waiting
    outbox.close()
    inbox.close()


def test_who_thaws_finds_what_was_meant_for_it() -> None:
    outbox = Outbox(2, 4096)
    inbox = Inbox.open(outbox.announcement())
    slot = outbox.take()
    assert slot is not None
    outbox.view(slot)[:] = b"\x07" * 4096
    outbox.close()
    gc.collect()
    assert bytes(inbox.view(slot, 4096)) == b"\x07" * 4096
    outbox.give(slot)  # too late, and no harm
    inbox.close()


@pytest.mark.parametrize(("slot", "length"), [(2, 1), (0, 4097), (1, 1)])
def test_a_payload_that_cannot_be_there_is_refused(slot: int, length: int) -> None:
    outbox = Outbox(2, 4096)
    inbox = Inbox.open(outbox.announcement())
    while outbox.take() != 0:
        continue
    outbox.give(1)
    with pytest.raises(FrameError):
        inbox.view(slot, length)


def test_only_the_very_memory_of_a_link_is_mapped(tmp_path: Any) -> None:
    outbox = Outbox(2, 4096)
    fields = list(shared._ANNOUNCEMENT.unpack(outbox.announcement()))
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, shared._size(2, 4096))
    loose = os.memfd_create("elastic-link", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, shared._size(2, 4096))
    pipe = os.pipe()
    changes = [(0, b"x" * 16), (1, b"x" * 16), (2, 1 << 22), (3, plain), (3, loose), (3, pipe[0]), (3, 9999)]
    changes += [(4, 0), (4, 65), (4, 3), (5, 0), (5, 8192), (5, 1 << 30)]
    for index, value in changes:
        forged = [*fields[:index], value, *fields[index + 1 :]]
        with pytest.raises(OSError):
            Inbox.open(shared._ANNOUNCEMENT.pack(*forged))
    for fd in (plain, loose, *pipe):
        os.close(fd)
    assert Inbox.open(outbox.announcement())


def test_its_size_cannot_be_changed() -> None:
    outbox = Outbox(2, 4096)
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(outbox._fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(outbox._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_what_nobody_asked_for_is_an_error() -> None:
    sharing = Sharing(wanted=True)
    with pytest.raises(FrameError):
        sharing.answered(True)
    with pytest.raises(FrameError):
        sharing.view(0, 1)
    announcement = memoryview(sharing.announce(2, 4096))
    assert sharing.accept(announcement)
    with pytest.raises(FrameError):
        sharing.accept(announcement)
    sharing.answered(True)
    assert sharing.usable
    with pytest.raises(FrameError):
        sharing.answered(True)
    sharing.close()
    assert not sharing.usable
    assert not Sharing(wanted=False).accept(announcement)

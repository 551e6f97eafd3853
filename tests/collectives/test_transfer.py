"""Fetching blobs: several sources, faults of each kind on the way, verification, many at once, and what is left."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blob_process import content
from plane import SMALL, eventually, groups, together
from xxhash import xxh3_128_hexdigest

from collectives import FetchError, Group, LinkOptions, Member, Partial, fetching, frames, transfer
from collectives.frames import Kind, Purpose
from collectives.handshake import Dialling, Self
from collectives.sockets import receive_into, send_all
from collectives.transfer import RANGE, Blob, request

HERE = Path(__file__).parent
DATA = np.random.default_rng(0).bytes(5_000_003)
DIGEST = xxh3_128_hexdigest(DATA)
MIB, SEED = 64, 1
BIG = content(MIB, SEED)
BIG_DIGEST = xxh3_128_hexdigest(BIG)


def parts() -> list[Any]:
    """The blob in pieces of several kinds, an empty one among them."""
    tensor = torch.frombuffer(bytearray(DATA[1000:401_000]), dtype=torch.float32).view(100, 1000)
    return [memoryview(DATA)[:1000], tensor, torch.empty(0), memoryview(DATA)[401_000:]]


def test_from_several_sources_at_once() -> None:
    with groups(4) as made:
        for group in made[:3]:
            group.publish("state/1", parts(), DIGEST)
        seen: list[tuple[int, int]] = []
        data = made[3].fetch(
            "state/1",
            [group.member for group in made[:3]],
            digest=DIGEST,
            timeout=60,
            progress=lambda here, total: seen.append((here, total)),
        )
        assert bytes(data) == DATA
        assert seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)


@pytest.mark.parametrize("size", [0, 1, 65_536])
def test_small_blobs(size: int) -> None:
    with groups(2) as made:
        digest = xxh3_128_hexdigest(DATA[:size])
        made[0].publish("k", [memoryview(DATA)[:size]], digest)
        assert bytes(made[1].fetch("k", [made[0].member], digest=digest, timeout=60)) == DATA[:size]


@pytest.mark.parametrize("victims", [1, 2])
def test_goes_on_when_sources_die_on_the_way(victims: int) -> None:
    with groups(4) as made:
        for group in made[:3]:
            group.publish("k", parts(), DIGEST)
        closed = threading.Event()

        def progress(here: int, total: int) -> None:
            if here and not closed.is_set():
                closed.set()
                for group in made[:victims]:
                    group.close()

        sources = [group.member for group in made[:3]]
        assert bytes(made[3].fetch("k", sources, digest=DIGEST, timeout=60, progress=progress)) == DATA


def test_sources_that_do_not_help_are_named() -> None:
    with groups(3) as made:
        made[0].publish("k", [memoryview(b"other")], xxh3_128_hexdigest(b"other"))
        nobody = Member(name="ghost", incarnation=5, addresses=("127.0.0.1:1",))
        with pytest.raises(FetchError) as caught:
            made[2].fetch("k", [made[0].member, made[1].member, nobody], digest=DIGEST, timeout=60)
        message = str(caught.value)
        assert "p0: it holds another version" in message and "p1: it has no such key" in message
        assert "ghost: " in message and "\n" not in message
        made[1].publish("k", parts(), DIGEST)
        assert bytes(made[2].fetch("k", [g.member for g in made[:2]], digest=DIGEST, timeout=60)) == DATA


def test_bytes_that_do_not_match_the_digest_are_refused() -> None:
    with groups(2) as made:
        made[0].publish("k", [memoryview(DATA)], "0" * 32)
        with pytest.raises(FetchError, match="wrong bytes"):
            made[1].fetch("k", [made[0].member], digest="0" * 32, timeout=60)


def test_no_sources_and_a_former_incarnation() -> None:
    with groups(2) as made:
        with pytest.raises(FetchError, match="no source"):
            made[1].fetch("k", [], digest=DIGEST, timeout=60)
        former = Member(name="p0", incarnation=1, addresses=made[0].addresses)
        with pytest.raises(FetchError, match="over"):
            made[1].fetch("k", [former], digest=DIGEST, timeout=60)


def test_withdrawn_blobs_are_gone_and_their_memory_is_free() -> None:
    with groups(2) as made:
        memory = bytearray(DATA)
        made[0].publish("k", [memoryview(memory)], DIGEST)
        assert made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60) == memory
        made[0].withdraw("k")
        made[0].withdraw("k")
        memory[:] = bytes(len(memory))
        with pytest.raises(FetchError, match="no such key"):
            made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60)


def test_what_cannot_be_published_is_refused() -> None:
    with Group(run="run", name="a", incarnation=1, options=SMALL) as group:
        with pytest.raises(ValueError, match="contiguous"):
            group.publish("k", [torch.zeros(4, 4).t()], "")
        with pytest.raises(ValueError, match="bytes"):
            group.publish("", [], "")


def test_closing_ends_a_fetch() -> None:
    with groups(2) as made:
        made[0].publish("k", parts(), DIGEST)

        def progress(here: int, total: int) -> None:
            made[1].close()

        with pytest.raises(FetchError):
            made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60, progress=progress)


class Publisher:
    """A source in a process of its own."""

    def __init__(self, incarnation: int) -> None:
        self.process = blob_process("publish", incarnation)

    @cached_property
    def member(self) -> Member:
        assert self.process.stdout is not None
        fields = json.loads(self.process.stdout.readline())
        return Member(**{**fields, "addresses": tuple(fields["addresses"])})

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait()


def blob_process(what: str, incarnation: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "blob_process.py"), what, str(MIB), str(SEED), str(incarnation)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.fixture
def publishers() -> Iterator[list[Publisher]]:
    """Two processes that publish BIG as "k"."""
    made = [Publisher(1000 + index) for index in range(2)]
    yield made
    for each in made:
        each.process.kill()
        each.process.communicate()


class Once:
    """A progress hook that does something once, when a part of the blob is here."""

    def __init__(self, part: float, act: Callable[[], object]) -> None:
        self.part, self.act, self.fired_at = part, act, 0

    def __call__(self, here: int, total: int) -> None:
        if not self.fired_at and here >= self.part * total:
            self.fired_at = here
            self.act()


def libraries() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "library"]


def test_a_source_that_is_killed_on_the_way_is_named_and_done_without(publishers: list[Publisher]) -> None:
    with groups(1) as made:
        partial, kill = Partial(), Once(0.2, lambda: publishers[0].send(signal.SIGKILL))
        sources = [each.member for each in publishers]
        data = made[0].fetch("k", sources, digest=BIG_DIGEST, timeout=60, progress=kill, partial=partial)
        assert data == BIG and 0 < kill.fired_at < len(BIG)
        dead, alive = (partial.sources[each.name] for each in sources)
        assert dead.trouble and dead.bytes < len(BIG) - kill.fired_at and not alive.trouble
        assert dead.bytes + alive.bytes == len(BIG)


def test_a_frozen_source_holds_nothing_up(publishers: list[Publisher]) -> None:
    with groups(1) as made:
        partial, freeze = Partial(), Once(0.2, lambda: publishers[0].send(signal.SIGSTOP))
        sources = [each.member for each in publishers]
        data = made[0].fetch("k", sources, digest=BIG_DIGEST, timeout=60, progress=freeze, partial=partial)
        assert data == BIG and 0 < freeze.fired_at < len(BIG)
        frozen, alive = (partial.sources[each.name] for each in sources)
        assert frozen.bytes < len(BIG) and alive.repeated > 0, "what it owed was not asked for again"


def test_what_has_come_is_kept_when_all_sources_are_gone(
    publishers: list[Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "GIVE_UP_SECONDS", 0.5)
    monkeypatch.setattr(fetching, "_TRIES", 1)
    first, second = publishers

    def strike() -> None:
        first.send(signal.SIGKILL)
        second.send(signal.SIGSTOP)

    with groups(1) as made:
        partial, struck = Partial(), Once(0.3, strike)
        sources = [each.member for each in publishers]
        with pytest.raises(FetchError) as caught:
            made[0].fetch("k", sources, digest=BIG_DIGEST, timeout=60, progress=struck, partial=partial)
        assert f"{first.member.name}: " in str(caught.value) and f"{second.member.name}: silent" in str(caught.value)
        assert 0 < struck.fired_at <= partial.here < len(BIG) == partial.size
        assert f"{partial.here} of {len(BIG)} bytes are here" in str(caught.value)
        before, seen = partial.here, list[int]()
        brought = partial.sources[second.member.name].bytes
        second.send(signal.SIGCONT)
        keep = seen.append
        data = made[0].fetch(
            "k", [second.member], digest=BIG_DIGEST, timeout=60, partial=partial, progress=lambda here, _: keep(here)
        )
        assert data == BIG and seen[0] >= before
        assert partial.sources[second.member.name].bytes - brought == len(BIG) - before


def test_another_blob_begins_anew() -> None:
    with groups(2) as made:
        partial, other = Partial(), DATA[:1000]
        for content in (DATA, other):
            digest = xxh3_128_hexdigest(content)
            made[0].publish("k", [memoryview(content)], digest)
            assert made[1].fetch("k", [made[0].member], digest=digest, timeout=60, partial=partial) == content
        assert partial.sources["p0"].bytes == partial.here == len(other)


def test_given_memory_is_used_if_it_fits() -> None:
    with groups(2) as made:
        made[0].publish("k", parts(), DIGEST)
        for room, used in ((bytearray(len(DATA)), True), (bytearray(len(DATA) + 1), False)):
            data = made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60, into=memoryview(room))
            assert data == DATA and (room == DATA) is used


@pytest.mark.parametrize("liars", [(0,), (1,), (2,), (0, 2)])
def test_sources_of_wrong_bytes_are_found_and_done_without(liars: tuple[int, ...]) -> None:
    with groups(4) as made:
        for index, group in enumerate(made[:3]):
            lie = bytearray(DATA)
            if index in liars:
                for at in range(0, len(DATA), 50_000):  # in every range that it may be asked for
                    lie[at + index] ^= 1
            group.publish("k", [memoryview(lie)], DIGEST)
        partial = Partial()
        sources = [group.member for group in made[:3]]
        assert made[3].fetch("k", sources, digest=DIGEST, timeout=60, partial=partial) == DATA
        given = {index for index in range(3) if partial.sources[f"p{index}"].bytes}
        wrong = {index for index in range(3) if partial.sources[f"p{index}"].wrong}
        assert wrong == given & set(liars)
        assert all(bool(partial.sources[f"p{index}"].trouble) == (index in wrong) for index in range(3))


def test_a_source_that_says_another_size_does_not_prevail() -> None:
    with groups(3) as made:
        for first in (0, 1):
            for index, group in enumerate(made[:2]):
                content = DATA if index != first else DATA + b"more"
                group.publish("k", [memoryview(content)], DIGEST)
            sources = [made[first].member, made[1 - first].member]
            assert made[2].fetch("k", sources, digest=DIGEST, timeout=60) == DATA


def test_all_wrong_is_an_error_that_names_them_and_keeps_nothing() -> None:
    with groups(3) as made:
        for index, group in enumerate(made[:2]):
            group.publish("k", [memoryview(DATA[: 1000 + index])], DIGEST)
        partial = Partial()
        with pytest.raises(FetchError, match="wrong bytes") as caught:
            made[2].fetch("k", [g.member for g in made[:2]], digest=DIGEST, timeout=60, partial=partial)
        assert partial.here == 0
        assert "p0: " in str(caught.value) or "p1: " in str(caught.value)


class Corrupting(Blob):
    """Says wrong checksums, so many times."""

    def __init__(self, times: int) -> None:
        super().__init__([memoryview(DATA)], DIGEST)
        self.left, self.fired = times, 0

    def sum(self, offset: int, length: int) -> int:
        if self.left:
            self.left -= 1
            self.fired += 1
            return super().sum(offset, length) ^ 1
        return super().sum(offset, length)


def test_a_corrupt_range_is_asked_for_again() -> None:
    with groups(2) as made:
        blob = Corrupting(2)
        made[0]._library.publish("k", blob)
        assert made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60) == DATA
        assert blob.fired == 2


def test_a_source_that_only_corrupts_is_given_up() -> None:
    with groups(2) as made:
        blob = Corrupting(1000)
        made[0]._library.publish("k", blob)
        with pytest.raises(FetchError, match="p0: checksum mismatch in bytes 0 to"):
            made[1].fetch("k", [made[0].member], digest=DIGEST, timeout=60)
        assert blob.fired >= fetching._TRIES


@pytest.mark.parametrize("left", [0, 1])
def test_memory_can_be_had_back_on_the_way(left: int) -> None:
    memory = bytearray(BIG)
    with groups(left + 2) as made:

        def take_back() -> None:
            made[0].withdraw("k")
            memory[:] = bytes(len(memory))

        made[0].publish("k", [memoryview(memory)], BIG_DIGEST)
        for group in made[1:-1]:
            group.publish("k", [memoryview(BIG)], BIG_DIGEST)
        hook, sources = Once(0.1, take_back), [group.member for group in made[:-1]]
        if left:
            assert made[-1].fetch("k", sources, digest=BIG_DIGEST, timeout=60, progress=hook) == BIG
        else:
            with pytest.raises(FetchError, match="p0: it no longer has this key"):
                made[-1].fetch("k", sources, digest=BIG_DIGEST, timeout=60, progress=hook)
        assert 0 < hook.fired_at < len(BIG)


def test_ten_at_once_where_there_is_room_for_four() -> None:
    options = LinkOptions(stripes=2, chunk_bytes=4096, servers=4)
    with groups(13, options) as made:
        sources, joiners = made[:3], made[3:]
        for group in sources:
            group.publish("k", [memoryview(BIG)], BIG_DIGEST)
        members, most = [group.member for group in sources], list[int]()

        def look(here: int, total: int) -> None:
            most.append(max(group.statistics().fetchers for group in sources))
            assert len(libraries()) <= len(sources)

        calls = [
            lambda group=group: group.fetch("k", members, digest=BIG_DIGEST, timeout=100, progress=look)
            for group in joiners
        ]
        fetched = together(*calls)
        assert [data == BIG for data in fetched] == [True] * 10, fetched
        assert max(most) <= options.servers
        assert sum(group.statistics().turned_away for group in sources) > 0, "there was room for all"
        eventually(lambda: not libraries())


def test_who_has_many_connections_makes_room_for_the_next() -> None:
    options = LinkOptions(stripes=4, chunk_bytes=4096, servers=4)
    with groups(3, options) as made:
        source, greedy, late = made
        source.publish("k", [memoryview(BIG)], BIG_DIGEST)

        def another() -> None:
            assert source.statistics().fetchers == options.servers, "there is room without anybody making it"
            assert late.fetch("k", [source.member], digest=BIG_DIGEST, timeout=60) == BIG

        hook = Once(0.1, another)
        assert greedy.fetch("k", [source.member], digest=BIG_DIGEST, timeout=60, progress=hook) == BIG
        assert 0 < hook.fired_at < len(BIG) and source.statistics().turned_away > 0


def test_a_fetcher_that_is_killed_leaves_nothing_behind() -> None:
    with groups(1) as [source]:
        memory = bytearray(BIG)
        source.publish("k", [memoryview(memory)], BIG_DIGEST)
        open_before, threads_before = len(os.listdir("/proc/self/fd")), threading.active_count()
        process = blob_process("fetch", 7)
        process.communicate(json.dumps([asdict(source.member)]) + "\n")
        assert process.returncode == -signal.SIGKILL
        assert len(BIG) // 4 <= source.statistics().bytes_served < 2 * len(BIG)
        eventually(lambda: source.statistics().fetchers == 0 and not libraries())
        assert threading.active_count() == threads_before
        source.withdraw("k")
        memory[:] = bytes(len(memory))
        assert len(os.listdir("/proc/self/fd")) <= open_before


def test_a_fetcher_that_takes_nothing_is_shown_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_STUCK_SECONDS", 0.2)
    with groups(1) as [source]:
        source.publish("k", [memoryview(BIG)], BIG_DIGEST)
        [sock] = Dialling(Self(frames.name_hash("run"), 77, SMALL), source.member, Purpose.FETCH, 1, 5.0).connect()
        with sock:
            asked = request(Kind.GET, "k", [(0, 16 << 20)])
            header = frames.encode(
                Kind.GET, run=1, incarnation=77, length=len(asked), digest=frames.checksum(asked), chunk=1
            )
            send_all(sock, [header, asked] * 8)
            eventually(lambda: source.statistics().bytes_served > 0)
            eventually(lambda: source.statistics().fetchers == 0)
        assert source.statistics().bytes_served < 8 * (16 << 20)


def test_while_an_exchange_runs_one_connection_at_a_time_is_served() -> None:
    options = LinkOptions(stripes=3, chunk_bytes=4096)
    with groups(3, options) as made:
        library, turns = made[0]._library, list[int]()
        made[0].publish("k", [memoryview(BIG)], BIG_DIGEST)

        def exchanging() -> bool:
            writing = [guest for guest in library._guests.values() if guest.interest & selectors.EVENT_WRITE]
            turns.append(len(writing))
            return True

        library._busy = exchanging
        calls = [
            lambda group=group: group.fetch("k", [made[0].member], digest=BIG_DIGEST, timeout=60) for group in made[1:]
        ]
        assert [data == BIG for data in together(*calls)] == [True, True]
        assert max(turns) == 1


def test_garbage_instead_of_requests_closes_that_connection_alone() -> None:
    with groups(2) as made:
        source, fetcher = made
        source.publish("k", [memoryview(BIG)], BIG_DIGEST)
        me = Self(frames.name_hash("run"), 77, SMALL)
        many = RANGE.pack(0, 1) * 3
        for kind, payload in ((Kind.GET, b""), (Kind.SUMS, b"\xff" * 4 + many), (Kind.READY, b""), (Kind.STAT, None)):
            [sock] = Dialling(me, source.member, Purpose.FETCH, 1, 5.0).connect()
            with sock:
                header = frames.encode(
                    kind, run=1, incarnation=1, length=len(payload or b""), digest=frames.checksum(payload or b"")
                )
                send_all(sock, [header, payload] if payload is not None else [b"\0" * 200])
                with pytest.raises(OSError):
                    receive_into(sock, memoryview(bytearray(1)))
        assert fetcher.fetch("k", [source.member], digest=BIG_DIGEST, timeout=60) == BIG

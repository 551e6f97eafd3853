"""Fetching blobs: several sources, failover, verification."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
from plane import SMALL, groups
from xxhash import xxh3_128_hexdigest

from collectives import FetchError, Group, Member

DATA = np.random.default_rng(0).bytes(5_000_003)
DIGEST = xxh3_128_hexdigest(DATA)


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

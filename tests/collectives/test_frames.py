"""Frames: what goes in comes out, and nothing else is accepted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import frames
from collectives.frames import HEADER_BYTES, MAX_PAYLOAD, FrameError, Hello, Key, Kind, Purpose

numbers = st.integers(0, (1 << 64) - 1)
small = st.integers(0, (1 << 32) - 1)
keys = st.builds(Key, numbers, numbers, numbers, numbers, small)


def header(kind: Kind = Kind.SCATTER, length: int = 10) -> bytes:
    return frames.encode(kind, run=1, incarnation=2, key=Key(3, 4, 5, 6, 7), chunk=8, length=length, digest=9)


@given(st.sampled_from(Kind), numbers, numbers, keys, small, st.integers(0, MAX_PAYLOAD), numbers)
def test_round_trip(kind: Kind, run: int, me: int, key: Key, chunk: int, length: int, digest: int) -> None:
    data = frames.encode(kind, run=run, incarnation=me, key=key, chunk=chunk, length=length, digest=digest)
    decoded = frames.decode(data)
    assert len(data) == HEADER_BYTES
    assert (decoded.kind, decoded.run, decoded.incarnation, decoded.key) == (kind, run, me, key)
    assert (decoded.chunk, decoded.length, decoded.checksum) == (chunk, length, digest)


@given(st.binary(max_size=2 * HEADER_BYTES))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        frames.decode(data)


@given(st.binary(max_size=64))
def test_random_hellos_are_refused_or_sound(data: bytes) -> None:
    try:
        hello = Hello.unpack(data)
    except FrameError:
        return
    assert hello.stripe < hello.stripes


@given(st.integers(0, HEADER_BYTES * 8 - 1))
def test_every_flipped_bit_is_noticed(bit: int) -> None:
    data = bytearray(header())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError):
        frames.decode(data)


@pytest.mark.parametrize("size", [0, 1, HEADER_BYTES - 1, HEADER_BYTES + 1])
def test_a_header_of_another_size_is_refused(size: int) -> None:
    with pytest.raises(FrameError, match="bytes"):
        frames.decode((header() * 2)[:size])


def test_oversized_payloads_are_refused_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FrameError, match="exceeds"):
        header(length=MAX_PAYLOAD + 1)
    monkeypatch.setattr(frames, "MAX_PAYLOAD", MAX_PAYLOAD + 1)
    data = header(length=MAX_PAYLOAD + 1)
    monkeypatch.undo()
    with pytest.raises(FrameError, match="exceeds"):
        frames.decode(data)


@pytest.mark.parametrize("key", [Key(-1, 0, 0, 0, 0), Key(0, 0, 0, 1 << 64, 0), Key(0, 0, 0, 0, 1 << 32)])
def test_numbers_that_do_not_fit_are_refused(key: Key) -> None:
    with pytest.raises(FrameError, match="fit"):
        frames.encode(Kind.READY, run=1, incarnation=1, key=key)


def test_hello_round_trip() -> None:
    hello = Hello(expected=1, link=2, chunk_bytes=64, stripe=1, stripes=2, purpose=Purpose.FETCH)
    assert Hello.unpack(hello.pack()) == hello
    with pytest.raises(FrameError, match="stripe"):
        Hello.unpack(Hello(expected=1, link=2, chunk_bytes=64, stripe=2, stripes=2, purpose=Purpose.LINK).pack())

"""What travels on a stripe: a fixed header that names the attempt completely, then a payload of known size.

A receiver never trusts a length before it has checked magic, version, and the header's own checksum, and it never
accepts more than `MAX_PAYLOAD` bytes in one frame. Nothing here is ever unpickled or evaluated.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from collectives.records import Identity

MAGIC = 0x4C544C45  # "ELTL" on the wire
VERSION = 1
MAX_PAYLOAD = 16 << 20
_BODY = struct.Struct("<IBBHQQQQQQIIIIQ")
_TRAILER = struct.Struct("<Q")
HEADER_BYTES = _BODY.size + _TRAILER.size
_UNCHECKED, _SHARED = 1, 2  # flags: the payload has no checksum; it lies in a slot and not behind the header
_HELLO = struct.Struct("<QQIHHB7x")


class FrameError(ValueError):
    """Bytes that are no valid frame, or a valid frame that has no place in this attempt."""


class Kind(enum.IntEnum):
    """What a frame is for."""

    HELLO = 1  # first on every connection; payload: Hello
    WELCOME = 2  # the answer to a HELLO that was accepted
    REFUSE = 3  # the answer to one that was not; payload: the reason, UTF-8; chunk: a Refusal
    READY = 4  # "my run() for this identity has begun: send"
    SCATTER = 5  # one contribution to a chunk, to the chunk's owner
    GATHER = 6  # the reduced chunk, from its owner
    BYE = 7  # the last frame on a stripe that closes in good order
    STAT = 8  # asks for the size of a published blob; payload: its key
    SIZE = 9  # the answer; payload: its size and digest
    GET = 10  # asks for a range; payload: offset, length, key; chunk: a number
    PART = 11  # the range; chunk: that number
    MISSING = 12  # there is no such blob here
    CREDIT = 13  # "so many of your parts have been added: send more"; chunk: how many
    MEMORY = 14  # "my payloads may lie in this memory"; payload: how to find it (shared.Outbox.announcement)
    MAPPED = 15  # the answer; chunk: 1 if it is mapped, 0 if it cannot be
    SLOTS = 16  # "there are free slots in your memory again"
    STRIPES = 17  # "I could use so many stripes", to whoever dialled; chunk: how many
    TRAIL = 18  # nothing; what it is for: links.Link._is_last
    BUSY = 19  # "no room for this connection: come again, or go on with those that you have"
    SUMS = 20  # asks for checksums of ranges; payload: their number, offsets, lengths; key. Answer: 8 bytes each


class Refusal(enum.IntEnum):
    """Why a HELLO was refused."""

    GONE = 1  # it asked for a life of this peer that is over
    DENIED = 2  # anything else: another run, other settings, a peer that has been dropped, no room


class Purpose(enum.IntEnum):
    """What a connection is for."""

    LINK = 1
    FETCH = 2
    PROBE = 3
    STRIPE = 4  # one more for a link that is there


class Header(NamedTuple):
    """One frame's header. `run` and `tag` are xxh3-64 of the names; `length` counts payload bytes.

    checked: `checksum` is that of the payload; without, the sender has made none. slot: where in the sender's memory
    the payload lies; -1 if it follows the header.
    """

    kind: Kind
    run: int
    tag: int
    generation: int
    incarnation: int
    epoch: int
    round: int
    attempt: int
    chunk: int
    length: int
    checksum: int
    checked: bool = True
    slot: int = -1

    @property
    def key(self) -> Key:
        return Key(self.generation, self.epoch, self.tag, self.round, self.attempt)


class Key(NamedTuple):
    """An identity as frames carry it; the run is a property of the whole connection."""

    generation: int
    epoch: int
    tag: int
    round: int
    attempt: int


NO_KEY = Key(0, 0, 0, 0, 0)


@lru_cache(maxsize=256)
def name_hash(name: str) -> int:
    """xxh3-64 of a run's or tag's name."""
    return int(xxh3_64_intdigest(name.encode()))


def key_of(identity: Identity) -> Key:
    """The numbers by which frames of this attempt are known."""
    return Key(identity.generation, identity.epoch, name_hash(identity.tag), identity.round, identity.attempt)


def checksum(payload: bytes | bytearray | memoryview) -> int:
    """xxh3-64 of a payload."""
    return int(xxh3_64_intdigest(payload))


def encode(
    kind: Kind,
    *,
    run: int,
    incarnation: int,
    key: Key = NO_KEY,
    chunk: int = 0,
    length: int = 0,
    digest: int = 0,
    checked: bool = True,
    slot: int = -1,
) -> bytes:
    """The header's bytes. Numbers that do not fit raise FrameError."""
    generation, epoch, tag, round_, attempt = key
    if not 0 <= length <= MAX_PAYLOAD:
        raise FrameError(f"a payload of {length} bytes exceeds the {MAX_PAYLOAD} that one frame may carry")
    try:
        body = _BODY.pack(
            MAGIC,
            VERSION,
            kind,
            (0 if checked else _UNCHECKED) | (_SHARED if slot >= 0 else 0),
            run,
            tag,
            generation,
            incarnation,
            epoch,
            round_,
            attempt,
            chunk,
            length,
            max(slot, 0),
            digest,
        )
    except struct.error as error:
        raise FrameError(f"identity numbers must be non-negative and fit their fields: {error}") from None
    return body + _TRAILER.pack(xxh3_64_intdigest(body))


def decode(data: bytes | bytearray | memoryview) -> Header:
    """Parse and check a header of HEADER_BYTES bytes; FrameError says what is wrong with it."""
    if len(data) != HEADER_BYTES:
        raise FrameError(f"a header has {HEADER_BYTES} bytes, got {len(data)}")
    body = memoryview(data)[: _BODY.size]
    (
        magic,
        version,
        kind,
        flags,
        run,
        tag,
        generation,
        incarnation,
        epoch,
        round_,
        attempt,
        chunk,
        length,
        slot,
        sum_,
    ) = _BODY.unpack(body)
    if magic != MAGIC:
        raise FrameError("bad magic: this is not one of our frames")
    if version != VERSION:
        raise FrameError(f"frame version {version}, this side speaks {VERSION}: install the same release on both")
    if _TRAILER.unpack(memoryview(data)[_BODY.size :])[0] != xxh3_64_intdigest(body):
        raise FrameError("header checksum mismatch")
    shared = bool(flags & _SHARED)
    if kind not in _KINDS or flags & ~(_UNCHECKED | _SHARED) or (slot and not shared):
        raise FrameError(f"unknown frame kind {kind} or flags {flags}")
    if length > MAX_PAYLOAD:
        raise FrameError(f"payload of {length} bytes exceeds {MAX_PAYLOAD}")
    return Header(
        _KINDS[kind],
        run,
        tag,
        generation,
        incarnation,
        epoch,
        round_,
        attempt,
        chunk,
        length,
        sum_,
        not flags & _UNCHECKED,
        slot if shared else -1,
    )


_KINDS = {int(kind): kind for kind in Kind}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The payload of a HELLO.

    expected: incarnation that the dialler wants to reach. link: the dialler's random number for this link.
    chunk_bytes: both sides must cut tensors alike.
    """

    expected: int
    link: int
    chunk_bytes: int
    stripe: int
    stripes: int
    purpose: Purpose

    SIZE = _HELLO.size

    def pack(self) -> bytes:
        return _HELLO.pack(self.expected, self.link, self.chunk_bytes, self.stripe, self.stripes, self.purpose)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Hello:
        if len(data) != _HELLO.size:
            raise FrameError(f"a HELLO carries {_HELLO.size} bytes, got {len(data)}")
        expected, link, chunk_bytes, stripe, stripes, purpose = _HELLO.unpack(data)
        if purpose not in set(Purpose) or not 0 <= stripe < stripes:
            raise FrameError("a HELLO with an unknown purpose or stripe")
        return cls(
            expected=expected,
            link=link,
            chunk_bytes=chunk_bytes,
            stripe=stripe,
            stripes=stripes,
            purpose=Purpose(purpose),
        )

"""A tap between two peers: it passes their frames on, and spoils one of them when it is told to.

It stands in front of one peer's port (others are given the tap's address), reads what passes frame by frame, and
notes when its fault has been carried out. What follows a fault passes untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

from collectives import frames
from collectives.frames import HEADER_BYTES, MAX_PAYLOAD, Header
from collectives.sockets import parse_address

_AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends a reset


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """kind: a key of FAULTS. frame: which one of those that pass from now on, from 0. seed: of what else is random."""

    kind: str
    frame: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spoilt:
    """What is sent instead of a frame, and how the connection ends after it: "", "reset" or "close"."""

    data: bytes
    end: str = ""


def _encoded(header: Header) -> bytes:
    """The header's bytes, with a checksum that fits its numbers, whatever they are."""
    with patch.object(frames, "MAX_PAYLOAD", 1 << 32):  # this side does not mind its manners
        return frames.encode(
            header.kind,
            run=header.run,
            incarnation=header.incarnation,
            key=header.key,
            chunk=header.chunk,
            length=header.length,
            digest=header.checksum,
        )


def _flip(frame: bytes, _: Header, draw: random.Random) -> Spoilt:
    spoilt = bytearray(frame)
    spoilt[draw.randrange(len(frame))] ^= 1 << draw.randrange(8)
    return Spoilt(data=bytes(spoilt))


def _oversize(frame: bytes, header: Header, draw: random.Random) -> Spoilt:
    length = draw.choice((header.length + 64, MAX_PAYLOAD, MAX_PAYLOAD + 1, (1 << 32) - 1))
    return Spoilt(data=_encoded(header._replace(length=length)) + frame[HEADER_BYTES:])


def _another_attempt(frame: bytes, header: Header, _: random.Random) -> Spoilt:
    """The same once more in the name of another attempt, ahead of the true one: it must be dropped."""
    return Spoilt(data=_encoded(header._replace(attempt=header.attempt + 1000)) + frame[HEADER_BYTES:] + frame)


FAULTS: dict[str, Callable[[bytes, Header, random.Random], Spoilt]] = {
    "flip": _flip,
    "oversize": _oversize,
    "another attempt": _another_attempt,
    "reset": lambda frame, _, draw: Spoilt(data=frame[: draw.randrange(len(frame))], end="reset"),
    "truncate": lambda frame, _, draw: Spoilt(data=frame[: draw.randrange(len(frame))], end="close"),
    "garbage": lambda frame, _, draw: Spoilt(data=draw.randbytes(draw.randint(1, 3 * HEADER_BYTES)) + frame),
    "former life": lambda frame, header, _: Spoilt(
        data=_encoded(header._replace(incarnation=header.incarnation - 1)) + frame[HEADER_BYTES:] + frame
    ),
    "twice": lambda frame, _, __: Spoilt(data=frame + frame),
}


class Tap:
    """Passes connections on to `target` ("host:port"), from a thread of its own. address: what peers are to dial.

    frames: so many have passed since it was last armed. fired: what the fault struck, None as long as it has not.
    on_fire: called in the tap's thread at that moment.
    """

    def __init__(self, target: str, on_fire: Callable[[], None] = lambda: None) -> None:
        self._target, self._on_fire = parse_address(target), on_fire
        self._fault: Fault | None = None
        self.frames = 0
        self.fired: Header | None = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._writers: list[asyncio.StreamWriter] = []
        self._thread = threading.Thread(target=self._serve, name="tap")
        self._thread.start()

    def arm(self, fault: Fault | None) -> None:
        """From the next frame on."""

        async def set_() -> None:
            self._fault, self.frames, self.fired = fault, 0, None

        asyncio.run_coroutine_threadsafe(set_(), self._loop).result(30)

    def close(self) -> None:
        """Ends every connection."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _serve(self) -> None:
        server = self._loop.run_until_complete(asyncio.start_server(self._visit, sock=self._listener))
        self._loop.run_forever()
        server.close()
        self._loop.run_until_complete(self._end_visits())
        self._loop.close()

    async def _end_visits(self) -> None:
        while visits := asyncio.all_tasks() - {asyncio.current_task()}:
            for writer in self._writers:
                _reset(writer)
            await asyncio.wait(visits, timeout=0.1)
        await asyncio.sleep(0)  # transports close in the turn after

    async def _visit(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        self._writers.append(near)
        try:
            answers, far = await asyncio.open_connection(*self._target)
        except OSError:
            _reset(near)
            return
        self._writers.append(far)
        try:
            await asyncio.gather(self._pass(reader, far), self._pass(answers, near))
        except OSError:
            _reset(near)
            _reset(far)
        near.close()
        far.close()

    async def _pass(self, reader: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        """One direction of one connection, frame by frame, until its end."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(HEADER_BYTES)
                header = frames.decode(head)
                spoilt = self._spoil(head + await reader.readexactly(header.length), header)
                to.write(spoilt.data)
                await to.drain()
                if spoilt.end == "close":
                    to.write_eof()
                if spoilt.end:
                    await asyncio.sleep(0.002)  # a reset overtakes what the kernel has not delivered
                    raise ConnectionResetError("the tap cuts the connection")
        to.write_eof()

    def _spoil(self, frame: bytes, header: Header) -> Spoilt:
        fault, self.frames = self._fault, self.frames + 1
        if fault is None or self.frames <= fault.frame:
            return Spoilt(data=frame)
        self._fault, self.fired = None, header
        self._on_fire()
        return FAULTS[fault.kind](frame, header, random.Random(fault.seed))


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
    writer.transport.abort()

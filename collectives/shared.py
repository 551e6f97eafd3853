"""Payloads between two peers on one host, through memory that both have mapped.

Everything else stays as it is: the link's TCP connections carry every header and all control. The payload of a data
frame is copied once, into a slot of memory that the sender has made (`Outbox`); its header says which slot, and the
receiver (`Inbox`) adds from there, or copies from there, and marks the slot as free in the same memory.

The memory belongs to one direction of one link, has no name (memfd: nothing is left behind, whoever is killed), cannot
change its size (sealed: nobody's access can fault), and dies with its link. It is never lent to anybody else: a peer
that was frozen, and given up, still finds what was meant for it when it thaws.

One host: same boot, same network namespace (what was put apart is treated as apart, so that an emulated network is
not passed by), same user, and the proof: the other side opens the memory through /proc and finds the token in it that
it was told. Whatever goes wrong with that leaves the link on TCP.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import stat
import struct
from functools import cache
from pathlib import Path

from xxhash import xxh3_128_digest

from collectives.frames import FrameError

WORTHWHILE = 1 << 14  # bytes: what is smaller is no slower behind its header, and takes no slot
MAX_SLOTS = 64
_ANNOUNCEMENT = struct.Struct("<16s16sQQII")  # the host, the token, process, descriptor, slots, bytes of each
ANNOUNCEMENT_BYTES = _ANNOUNCEMENT.size
_PAGE = 4096
_MAX_SLOT_BYTES = 16 << 20
_TOKEN_BYTES = 16
_HUNGRY = 64  # where in the first page: 1 while the sender waits for slots
_LENT = 128  # one byte for each slot: 1 from before its header leaves until the receiver has done with it
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0


@cache
def host() -> bytes:
    """Equal in two processes only if they run on one host, in one network namespace; b"" if that cannot be told."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return bytes(xxh3_128_digest(f"{boot} {os.readlink('/proc/self/ns/net')}".encode()))
    except OSError:
        return b""


class _Memory:
    """The first page is about the slots, the slots follow."""

    def __init__(self, fd: int, slots: int, slot_bytes: int) -> None:
        self.slots, self.slot_bytes = slots, slot_bytes
        self._view: memoryview | None = memoryview(mmap.mmap(fd, _size(slots, slot_bytes)))

    def view(self, slot: int, length: int) -> memoryview:
        start = _PAGE + slot * _stride(self.slot_bytes)
        return self.all[start : start + length]

    @property
    def all(self) -> memoryview:
        assert self._view is not None, "the memory of a link is there until its threads have ended"
        return self._view

    def close(self) -> None:
        """Unmapped as soon as nobody holds a view any more."""
        self._view = None

    def free(self, slot: int) -> None:
        view = self._view
        if view is not None:
            view[_LENT + slot] = 0

    def lent(self) -> bytes:
        return bytes(self.all[_LENT : _LENT + self.slots])


def _stride(slot_bytes: int) -> int:
    return -(-slot_bytes // _PAGE) * _PAGE


def _enough(slots: int) -> int:
    """So many free slots are worth a message to who waits for one."""
    return max(1, slots // 2)


def _size(slots: int, slot_bytes: int) -> int:
    return _PAGE + slots * _stride(slot_bytes)


class Outbox:
    """The slots of one direction, at the end that fills them. OSError if there is no such memory here.

    Not thread-safe but for `view`: its link guards it. usable: the other side has mapped it.
    """

    def __init__(self, slots: int, slot_bytes: int) -> None:
        if not host() or not _SEALS:
            raise OSError("no memory can be shared here")
        self.usable = False
        self.waiting = False
        self._fd = os.memfd_create("elastic-link", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._fd, _size(slots, slot_bytes))
            fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = _Memory(self._fd, slots, slot_bytes)
        except OSError:
            self.forget_descriptor()
            raise
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._memory.all[:_TOKEN_BYTES] = self._token
        self._free = list(range(slots))
        self._out: list[int] = []

    def announcement(self) -> bytes:
        """What the other side needs to find this memory, and to know it."""
        memory = self._memory
        return _ANNOUNCEMENT.pack(host(), self._token, os.getpid(), self._fd, memory.slots, memory.slot_bytes)

    def take(self) -> int | None:
        """A free slot. None if there is none: then the other side will say when half of them are free."""
        memory = self._memory.all
        if not self._free and not self._collect(1):
            memory[_HUNGRY] = 1
            # once more: what was given back before that could be seen
            self.waiting = not self._collect(_enough(self._memory.slots))
            if self.waiting:
                return None
        if self.waiting:
            self.waiting = False
            memory[_HUNGRY] = 0
        slot = self._free.pop()
        self._out.append(slot)
        memory[_LENT + slot] = 1
        return slot

    def _collect(self, wanted: int) -> bool:
        """Take back what was given back; True if so many are free."""
        lent = self._memory.lent()
        back = [slot for slot in self._out if not lent[slot]]
        if back:
            self._free += back
            self._out = [slot for slot in self._out if lent[slot]]
        return len(self._free) >= wanted

    def give(self, slot: int) -> None:
        """It was not sent after all. From any thread, also when the memory is gone."""
        self._memory.free(slot)

    def view(self, slot: int) -> memoryview:
        return self._memory.view(slot, self._memory.slot_bytes)

    def forget_descriptor(self) -> None:
        """The other side has answered: nobody needs to find this memory any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def close(self) -> None:
        self.forget_descriptor()
        self.usable = False
        self._memory.close()


class Inbox:
    """The other end's Outbox, as this end sees it. For the link's receiver thread alone."""

    def __init__(self, memory: _Memory) -> None:
        self._memory = memory

    @classmethod
    def open(cls, announcement: bytes | bytearray | memoryview) -> Inbox:
        """Map what was announced; OSError if it is not on this host, or not what it should be."""
        where, token, pid, number, slots, slot_bytes = _ANNOUNCEMENT.unpack(announcement)
        if not host() or where != host():
            raise OSError("another host")
        if not 1 <= slots <= MAX_SLOTS or not 1 <= slot_bytes <= _MAX_SLOT_BYTES:
            raise OSError("slots of no use")
        path = f"/proc/{pid}/fd/{number}"
        if not os.readlink(path).startswith("/memfd:elastic-link"):
            raise OSError("no memory of a link")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            _check(fd, _size(slots, slot_bytes))
            memory = _Memory(fd, slots, slot_bytes)
        finally:
            os.close(fd)
        if not secrets.compare_digest(bytes(memory.all[:_TOKEN_BYTES]), token):
            raise OSError("somebody else's memory")
        return cls(memory)

    def view(self, slot: int, length: int) -> memoryview:
        """A payload; FrameError if none can be there."""
        memory = self._memory
        if slot >= memory.slots or length > memory.slot_bytes or memory.all[_LENT + slot] != 1:
            raise FrameError(f"there can be no {length} bytes in slot {slot}")
        return memory.view(slot, length)

    def give_back(self, slot: int) -> bool:
        """The payload has been used. True if the other end has to be told that slots are free."""
        memory = self._memory
        memory.free(slot)
        if not memory.all[_HUNGRY] or memory.lent().count(0) < _enough(memory.slots):
            return False
        memory.all[_HUNGRY] = 0
        return True

    def close(self) -> None:
        self._memory.close()


def _check(fd: int, size: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_size != size or found.st_uid != os.geteuid():
        raise OSError("memory of another size or another user")
    if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
        raise OSError("memory whose size could change")


class Sharing:
    """What a link keeps of all this: at most one memory for each direction. The link guards `announce` and `outbox`."""

    def __init__(self, wanted: bool) -> None:
        self.outbox: Outbox | None = None
        self.announced = not wanted
        self._wanted = wanted
        self._inbox: Inbox | None = None

    @property
    def usable(self) -> bool:
        """Payloads from here go that way."""
        return self.outbox is not None and self.outbox.usable

    @property
    def waiting(self) -> bool:
        """Numbers wait for a slot."""
        return self.outbox is not None and self.outbox.waiting

    def announce(self, slots: int, slot_bytes: int) -> bytes:
        """Make the memory, once; returns what the other side has to be told, b"" if there is nothing to tell."""
        self.announced = True
        try:
            self.outbox = Outbox(slots, slot_bytes)
        except OSError:
            return b""
        return self.outbox.announcement()

    def answered(self, accepted: bool) -> None:
        """The other side has mapped the outbox, or will not. FrameError if it was not asked."""
        if self.outbox is None or self.outbox.usable:
            raise FrameError("an answer about memory that was not announced")
        self.outbox.usable = accepted
        self.outbox.forget_descriptor()

    def accept(self, announcement: memoryview) -> bool:
        """Map what the other side has announced, if it can be."""
        if self._inbox is not None:
            raise FrameError("memory was announced twice")
        with contextlib.suppress(OSError):
            if self._wanted:
                self._inbox = Inbox.open(announcement)
        return self._inbox is not None

    def view(self, slot: int, length: int) -> memoryview:
        """A payload from the other side."""
        if self._inbox is None:
            raise FrameError("a payload in memory that was never announced")
        return self._inbox.view(slot, length)

    def give_back(self, slot: int) -> bool:
        """It has been used. True if the other side has to be told that slots are free."""
        return self._inbox is not None and self._inbox.give_back(slot)

    def unused(self, slot: int) -> None:
        """A slot of this side's was not needed after all; -1 is none."""
        if slot >= 0 and self.outbox is not None:
            self.outbox.give(slot)

    def close(self) -> None:
        """The link has ended, and its threads with it."""
        for box in (self.outbox, self._inbox):
            if box is not None:
                box.close()

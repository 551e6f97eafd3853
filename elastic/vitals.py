"""What a peer finds out about its own process and machine, at little cost, and without ever waiting for a disk or a
driver that hangs: each thing is looked at by a thread that depends on it in any case."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from pathlib import Path

import torch

from fault.health import needed
from fault.records import Health

EVERY_SECONDS = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Vitals:
    """Thread-safe. `look` is for the thread that sends heartbeats, `stepped` for the one that trains, `look_at_disk`
    for one that writes there, which `writes` to a folder or was `refused` for want of room.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._folder: Path | None = None
        self._disks: dict[Path, tuple[int, int]] = {}
        self._refused = self._gpu = self._memory = 0
        self._looked_at = self._stepped_at = 0.0

    def writes(self, folder: Path) -> None:
        """Events go to this folder, from the thread that sends heartbeats, too."""
        self._folder = folder

    def look_at_disk(self, folder: Path) -> None:
        with contextlib.suppress(OSError):
            disk = os.statvfs(folder)
            with self._lock:
                self._disks[folder] = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize

    def refused(self, error: BaseException) -> None:
        """A write has failed; counts if that was for want of room."""
        found: BaseException | None = error
        while found is not None:
            if isinstance(found, OSError) and found.errno in _NO_ROOM:
                with self._lock:
                    self._refused += 1
                return
            found = found.__cause__ or found.__context__

    def stepped(self, now: float) -> None:
        """In the thread that trains: an allocator that is stuck holds up nobody else."""
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if begun and now - self._stepped_at > EVERY_SECONDS:
            self._stepped_at = now
            self._gpu = sum(torch.cuda.memory_reserved(device) for device in range(torch.cuda.device_count()))

    def look(self) -> Health:
        now = time.monotonic()
        if now - self._looked_at > EVERY_SECONDS:
            self._looked_at = now
            self._memory = resident_bytes()
            if self._folder is not None:
                self.look_at_disk(self._folder)
        with self._lock:
            free, size = min(self._disks.values(), key=_part_of_needed, default=(0, 0))
            return Health(
                memory_bytes=self._memory,
                gpu_bytes=self._gpu,
                disk_free=free,
                disk_bytes=size,
                disk_refused=self._refused,
                clock=time.time() - time.monotonic(),
            )


def resident_bytes() -> int:
    """Of this process; 0 where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE
    except (OSError, ValueError, IndexError):
        return 0


def _part_of_needed(disk: tuple[int, int]) -> float:
    free, size = disk
    return free / needed(size)

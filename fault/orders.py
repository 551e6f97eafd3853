"""Faults that one process orders from another on the same machine, through a folder of plain files.

    NAME.json           who takes orders: written whole, gone when the process leaves in good order
    NAME.orders.jsonl   what it is to do, a line for each order; appended by whoever drives
    NAME.fired.jsonl    what it has done, a line for each firing; appended before the fault strikes

Whoever may write there can break the run: the folder must belong to this user, and nobody else may write to it. Orders
are data, and nothing else than `Fault`s; each is for one incarnation, so that no later life obeys it. A process is
signalled only if it still is the one that registered: by the time at which it started, which no other with the same
pid has.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .inject import Fault, Injector, note

PEER, COORDINATOR = "peer", "coordinator"
POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Registered:
    """A process that takes orders. role: "peer" or "coordinator". started: of the process, in the kernel's ticks."""

    name: str
    role: str
    run: str
    incarnation: int
    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether this very process is there, running or stopped."""
        return self.state not in ("", "Z", "X")

    @property
    def state(self) -> str:
        """Of the process, by the letter that the kernel has for it ("T": stopped); "" once it is another or none."""
        found = process_state(self.pid)
        return found[0] if found and found[1] == self.started else ""


def process_state(pid: int) -> tuple[str, int] | None:
    """State and start time of a process, from /proc (proc(5), fields 3 and 22 of stat); None if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    words = text.rpartition(")")[2].split()  # the name may hold anything, parentheses too
    return words[0], int(words[19])


def prepare(folder: Path) -> None:
    """Makes the folder, for this user alone. PermissionError if others own it or may write to it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o022:
        raise PermissionError(
            f"{folder} is no place for orders: it must belong to this user, and nobody else may write to it (chmod 700)"
        )


class Lines:
    """Follows a JSONL file: each call gives the whole lines that were added since the last; what is no object is left
    out."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        try:
            if self._path.stat().st_size <= self._offset:
                return
        except OSError:
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                if (found := _object(line)) is not None:
                    yield found


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _append(path: Path, **fields: Any) -> None:
    """In one write, so that lines of several writers stay whole."""
    line = (json.dumps(fields) + "\n").encode()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


def _write_whole(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text)
    scratch.replace(path)


# --- the process that obeys -------------------------------------------------------------------------------------------


class Station:
    """Registers this process, and carries orders to its injector until it is closed. One thread, which looks every
    POLL_SECONDS. Firings go to the folder from here on.

    Raises OSError if the folder cannot be used.
    """

    def __init__(
        self, folder: Path, injector: Injector, *, name: str, run: str, incarnation: int, role: str = PEER
    ) -> None:
        prepare(folder)
        pid = os.getpid()
        found = process_state(pid)
        if found is None:
            raise OSError("/proc does not show this process: faults can be ordered on Linux alone")
        self.me = Registered(name=name, role=role, run=run, incarnation=incarnation, pid=pid, started=found[1])
        self._injector, self._folder = injector, folder
        injector.log = folder / f"{name}.fired.jsonl"
        self._orders = Lines(folder / f"{name}.orders.jsonl", from_end=True)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="elastic-chaos", daemon=True)
        self._thread.start()
        _write_whole(folder / f"{name}.json", json.dumps(asdict(self.me)))

    def _watch(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            for each in self._orders.read():
                if each.get("incarnation") == self.me.incarnation:
                    self._obey(each)

    def _obey(self, order: dict[str, Any]) -> None:
        try:
            if "arm" in order:
                self._injector.arm(Fault(**order["arm"]))
            else:
                self._injector.disarm(order.get("disarm"))
        except (TypeError, ValueError) as error:  # of another version, or by a hand: whoever ordered it is told
            _append(
                self._folder / f"{self.me.name}.fired.jsonl",
                event="fault.refused",
                time_unix=time.time(),
                id=_id_of(order.get("arm")),
                reason=str(error),
            )

    def close(self) -> None:
        """Takes no more orders, and what is armed strikes no more."""
        self._closing.set()
        self._thread.join()
        self._injector.close()
        path = self._folder / f"{self.me.name}.json"
        if _registered_at(path) == self.me:
            path.unlink(missing_ok=True)


def _id_of(arm: object) -> str:
    return str(arm.get("id", "")) if isinstance(arm, dict) else ""


# --- whoever drives ---------------------------------------------------------------------------------------------------


def registered(folder: Path) -> dict[str, Registered]:
    """Who takes orders there, by name: the processes that live."""
    found = (_registered_at(path) for path in sorted(folder.glob("*.json")))
    return {each.name: each for each in found if each is not None and each.alive}


def _registered_at(path: Path) -> Registered | None:
    """None for what is no registration, or is not this user's: nothing there is to get a signal."""
    try:
        if path.stat().st_uid != os.geteuid():
            return None
        found = Registered(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
    kinds = {
        field.name: int if field.name in ("incarnation", "pid", "started") else str for field in fields(Registered)
    }
    right = all(type(getattr(found, name)) is kind for name, kind in kinds.items())
    return found if right and found.pid > 1 and path.name == f"{found.name}.json" else None


def order(folder: Path, to: Registered, fault: Fault) -> None:
    """Has the process arm this fault; its id must be new to that incarnation."""
    _append(folder / f"{to.name}.orders.jsonl", incarnation=to.incarnation, arm=asdict(fault))


def call_off(folder: Path, to: Registered, id: str | None = None) -> None:
    """Has the process disarm this fault, or all."""
    _append(folder / f"{to.name}.orders.jsonl", incarnation=to.incarnation, disarm=id)


def strike(folder: Path, to: Registered, fault: Fault) -> bool:
    """Sends the signal of a kill or a freeze from outside, having noted it. False if the process is gone."""
    number = signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP
    if not to.alive:
        return False
    note(folder / f"{to.name}.fired.jsonl", peer=to.name, id=fault.id, kind=fault.kind, count=1, pid=to.pid)
    return send_signal(to, number)


def send_signal(to: Registered, number: int) -> bool:
    """To this very process. False if it is gone: whoever has its pid now gets nothing."""
    try:
        handle = os.pidfd_open(to.pid)
    except ProcessLookupError:
        return False
    try:  # the handle stays with one process: what is checked now is what gets the signal
        if not to.alive:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True

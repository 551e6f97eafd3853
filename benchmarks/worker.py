"""One worker of a benchmark: holds a gloo process group, bare groups and peers at once, and runs them on order.

Orders come as JSON lines on standard input, each is answered with one line; the worker ends with its input. Numbers are
whole, so that every order of summing gives the same exact float32 sum, except where a lossy wire is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

import elastic
from collectives import Done, Group, LinkOptions, Member, Progress, Start

LOSSLESS = ("f32",)

NAME = sys.argv[1] if __name__ == "__main__" else ""

# What the last operation left behind (its result, until nobody reads it any more) is gone after so long.
SWEEP_SECONDS = 1.5

torch.set_num_threads(1)


def say(**answer: Any) -> None:
    _answers.write(json.dumps(answer) + "\n")
    _answers.flush()


# Whatever libraries print goes to standard error; the answers keep a descriptor of their own.
_answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


# --- numbers --------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def source(name: str, elements: int, exact: bool) -> torch.Tensor:
    """What the worker of that name puts in: the same wherever it is computed."""
    generator = torch.Generator().manual_seed(int(name.removeprefix("w")))
    if exact:
        return torch.randint(-1000, 1001, (elements,), generator=generator, dtype=torch.float32)
    return torch.randn(elements, generator=generator)


@lru_cache(maxsize=2)
def total(names: tuple[str, ...], elements: int, exact: bool) -> torch.Tensor:
    result = torch.zeros(elements)
    for name in names:
        result += source(name, elements, exact)
    return result


def judge(result: torch.Tensor, names: tuple[str, ...], exact: bool) -> dict[str, Any]:
    """right: bit for bit where the wires are lossless, else within a wide bound. error: relative, root mean square."""
    wanted = total(names, result.numel(), exact)
    if torch.equal(result, wanted):
        return {"right": True, "error": 0.0}
    error = float((result - wanted).norm() / wanted.norm())
    return {"right": not exact and error < 0.5, "error": error}


# --- the sides ------------------------------------------------------------------------------------------------------


class Side(Protocol):
    """Something that all-reduces. prepare() is not timed, run() is; check() is given what run() returned.

    allocates: whether run() itself makes the tensor for the result. exact: whether the sum must be.
    """

    allocates: bool
    exact: bool

    def prepare(self, elements: int, order: dict[str, Any]) -> None: ...

    def run(self) -> Any: ...

    def check(self, outcome: Any) -> dict[str, Any]: ...


def tcp_connections(change: dict[int, str] | None = None) -> dict[int, str]:
    """Inode and congestion control of every TCP connection of this process; first sets that of those in `change`."""
    found = {}
    for link in Path("/proc/self/fd").iterdir():
        try:
            target = os.readlink(link)
            if not target.startswith("socket:["):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as sock:
                sock.getpeername()
                inode = int(target[8:-1])
                if change and inode in change:
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, change[inode].encode())
                name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16)
        except OSError:
            continue  # gone already, a listener, or no TCP
        found[inode] = name.rstrip(b"\0").decode()
    return found


class Gloo:
    """In place, as gloo does it; the copy that this needs is made before the clock starts."""

    allocates = False
    exact = True

    def __init__(self, order: dict[str, Any], names: tuple[str, ...]) -> None:
        if not dist.is_initialized():
            url = f"tcp://{order['host']}:{order['port']}"
            dist.init_process_group("gloo", init_method=url, rank=order["rank"], world_size=order["world"])
        self._group = dist.new_group(list(range(order["world"])), backend="gloo")
        self._names = names
        self._buffer = torch.empty(0)

    def prepare(self, elements: int, order: dict[str, Any]) -> None:
        if self._buffer.numel() != elements:
            self._buffer = torch.empty(elements)
        self._buffer.copy_(source(NAME, elements, True))

    def run(self) -> None:
        dist.all_reduce(self._buffer, group=self._group)

    def check(self, outcome: None) -> dict[str, Any]:
        return judge(self._buffer, self._names, True)


class Bare:
    """A Group without membership: one Start after the other."""

    allocates = False

    def __init__(self, order: dict[str, Any]) -> None:
        self.group = Group(
            run="benchmark",
            name=NAME,
            incarnation=secrets.randbits(62) + 1,
            listen=f"{order['host']}:0",
            options=LinkOptions(**order["options"]),
        )
        self._members: tuple[Member, ...] = ()
        self._tag = order["name"]
        self._round = 0
        self._result = torch.empty(0)
        self.exact = True
        self._start: Start | None = None

    def meet(self, members: list[dict[str, Any]]) -> None:
        people = (Member(**{**each, "addresses": tuple(each["addresses"])}) for each in members)
        self._members = tuple(sorted(people, key=lambda member: member.name))
        self.group.connect(self._members)

    def prepare(self, elements: int, order: dict[str, Any]) -> None:
        if self._result.numel() != elements:
            self._result = torch.empty(elements)
        self._result.fill_(float("nan"))
        count = len(self._members)
        start = {"wire": "f32", **order.get("start", {})}
        self.exact = {start["wire"], start.get("gather_wire", "") or start["wire"]} <= set(LOSSLESS)
        source(NAME, elements, self.exact)
        shares = tuple(start.pop("shares", (1 / count,) * count))
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in start.items()
        }
        self._start = Start(
            run="benchmark",
            generation=1,
            epoch=1,
            tag=self._tag,
            round=self._round,
            attempt=0,
            fragment=0,
            base_version=-1,  # no round of an outer loop, of whose result there is a hash of its own
            contributors=self._members,
            shares=shares,
            elements=elements,
            multipliers=(1.0,) * count,
            **fields,
        )
        self._round += 1

    def run(self) -> Any:
        assert self._start is not None
        return self.group.run(self._start, source(NAME, self._start.elements, self.exact), self._result)

    def check(self, outcome: Any) -> dict[str, Any]:
        if not isinstance(outcome, Done):
            return {"right": False, "outcome": str(outcome)}
        links = [asdict(link) for link in outcome.record.links]
        verdict = judge(self._result, tuple(member.name for member in self._members), self.exact)
        return {**verdict, "links": links, "record": {**asdict(outcome.record), "links": []}}


class Through:
    """peer.all_reduce, with propose and commit. May be told to kill or stop itself in the middle of an operation."""

    allocates = True

    def __init__(self, order: dict[str, Any]) -> None:
        self._fatal: tuple[float, signal.Signals] | None = None
        self.peer = elastic.Peer(
            order["coordinator"],
            run="benchmark",
            name=NAME,
            listen=f"{order['host']}:0",
            observe=self._observe,
            **peer_options(order["options"]),
        )
        self._tag = order["name"]
        self._order: dict[str, Any] = {}
        self._elements = 0
        self.exact = True

    def _observe(self, progress: Progress) -> None:
        if self._fatal and progress.chunks_received >= self._fatal[0] * progress.chunks_expected:
            number, self._fatal = self._fatal[1], None
            say(fatal=time.monotonic())
            os.kill(os.getpid(), number)

    def prepare(self, elements: int, order: dict[str, Any]) -> None:
        if "fatal" in order:
            self._fatal = (order["fatal"][0], signal.Signals[order["fatal"][1]])
        self._elements, self._order = elements, order.get("start", {})
        self.exact = self._order.get("wire", "f32") in LOSSLESS
        source(NAME, elements, self.exact)

    def run(self) -> elastic.Reduced:
        return self.peer.all_reduce(source(NAME, self._elements, self.exact), tag=self._tag, **self._order)

    def check(self, outcome: elastic.Reduced) -> dict[str, Any]:
        verdict = judge(outcome.tensor, outcome.contributors, self.exact)
        return {**verdict, "contributors": outcome.contributors, "attempts": outcome.attempts}


def peer_options(wanted: dict[str, Any]) -> dict[str, Any]:
    """What a Peer is made with: timeouts become Timeouts, links LinkOptions."""
    given = dict(wanted)
    if "timeouts" in given:
        given["timeouts"] = elastic.Timeouts(**given["timeouts"])
    links = given.pop("links", {})
    return {**given, "options": LinkOptions(**links)}


def forget_peak() -> int:
    """Gives free memory back, begins a new peak of resident memory, and returns where it begins, in bytes."""
    time.sleep(SWEEP_SECONDS)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


# --- orders ---------------------------------------------------------------------------------------------------------


class Desk:
    """Carries out one order after the other; what a method returns is the answer."""

    def __init__(self) -> None:
        self._sides: dict[str, Any] = {}
        self._resident = 0
        self._sockets: dict[str, set[int]] = {}
        self._others: set[int] = set()
        self._coordinator: elastic.Coordinator | None = None

    def port(self, order: dict[str, Any]) -> dict[str, Any]:
        with socket.create_server((order["host"], 0)) as listener:
            return {"port": listener.getsockname()[1]}

    def gloo(self, order: dict[str, Any]) -> dict[str, Any]:
        self._sides[order["name"]] = Gloo(order, tuple(f"w{rank}" for rank in range(order["world"])))
        return {}

    def group(self, order: dict[str, Any]) -> dict[str, Any]:
        side = self._sides[order["name"]] = Bare(order)
        return {"member": asdict(side.group.member)}

    def meet(self, order: dict[str, Any]) -> dict[str, Any]:
        self._sides[order["name"]].meet(order["members"])
        return {}

    def coordinate(self, order: dict[str, Any]) -> dict[str, Any]:
        policy = elastic.RunPolicy(**order["policy"])
        self._coordinator = elastic.Coordinator(f"tcp://{order['host']}:0", run="benchmark", policy=policy)
        return {"address": self._coordinator.address}

    def peer(self, order: dict[str, Any]) -> dict[str, Any]:
        self._sides[order["name"]] = Through(order)
        return {}

    def wait_for(self, order: dict[str, Any]) -> dict[str, Any]:
        self._sides[order["name"]].peer.wait_for(order["count"])
        return {}

    def settle(self, order: dict[str, Any]) -> dict[str, Any]:
        """The connections that are new since the last side was settled belong to this one."""
        found = set(tcp_connections()) - self._others
        self._others |= found
        self._sockets[order["name"]] = found
        if order["cc"]:
            tcp_connections(dict.fromkeys(found, order["cc"]))
        return self.congestion(order)

    def congestion(self, order: dict[str, Any]) -> dict[str, Any]:
        mine = self._sockets[order["name"]]
        return {"congestion": sorted({name for inode, name in tcp_connections().items() if inode in mine})}

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        side: Side = self._sides[order["name"]]
        side.prepare(order["elements"], order)
        time.sleep(max(0.0, order["at"] - time.monotonic()))
        if order.get("memory"):
            judge(torch.zeros(order["elements"]), tuple(order["names"]), side.exact)  # what checking keeps is there now
            resident = forget_peak()
            self._resident = self._resident or resident
        began, used = time.monotonic(), os.times()
        outcome = side.run()
        ended, now = time.monotonic(), os.times()
        cpu = {"user": now.user - used.user, "system": now.system - used.system}
        answer: dict[str, Any] = {"began": began, "ended": ended, "threads": threading.active_count(), "cpu": cpu}
        if order.get("memory"):
            room = self._resident + 4 * order["elements"] * side.allocates
            answer |= {"extra_bytes": status_bytes("VmHWM") - room, "idle_bytes": resident - self._resident}
        return {**answer, **side.check(outcome)}


def serve(desk: Desk, lines: Sequence[str] | Any) -> None:
    for line in lines:
        order = json.loads(line)
        act: Callable[[dict[str, Any]], dict[str, Any]] = getattr(desk, order["do"])
        try:
            say(**act(order))
        except Exception as error:
            say(failed=f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    serve(Desk(), sys.stdin)
    os._exit(0)  # the team is gone: nobody waits for a tidy end

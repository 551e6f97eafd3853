"""A thousand simulated peers before the real Membership and its journal, on a virtual clock; then real connections.

    python -m benchmarks.membership --peers 1000 --seconds 120 --sockets 200 --turns 20

The coordinator is a server that handles one message after the other: the processor time that the real code takes for
each (decoding, deciding, making it durable, encoding what goes out) passes on the virtual clock, so that what waits,
waits. Messages take --delay each way. Peers train, propose, report and apply as peers do; they crash, leave and come
back at random. A view is new when the last member has heard of the change.

Beside it, --sockets real ZeroMQ connections over loopback to a real coordinator in a process of its own: all send their
heartbeats, and one after the other leaves and comes back.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import zmq

from benchmarks import common
from benchmarks.common import Report
from collectives.records import LinkFailure, Member
from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import packed
from elastic.journal import Journal
from elastic.membership import Membership
from elastic.messages import (
    FROM_COORDINATOR,
    FROM_PEERS,
    Applied,
    Base,
    Begin,
    Commit,
    DoneReport,
    Enter,
    Expelled,
    Heartbeat,
    Join,
    Leave,
    LinkLost,
    Message,
    OperationSpec,
    PeerStatus,
    Pong,
    Propose,
    Represent,
    View,
    Welcome,
    decode,
    encode,
    identity,
)
from elastic.roster import Effect, Persist

RUN, TAG = "benchmark", "outer"
SPEC = OperationSpec(op="mean", dtype="float32", elements=1 << 28, wire="f32", algorithm="diloco")
STATE = "0" * 32


class Clock:
    """What happens when, in seconds that nobody waits for."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, event))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, event = heapq.heappop(self._events)
            event()
        self.now = until


@dataclass
class Account:
    """What was seen. cpu, bytes_out, messages by kind of message; views: seconds until all knew of a change."""

    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    received: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    bytes_out: Counter[str] = field(default_factory=Counter)
    largest: Counter[str] = field(default_factory=Counter)
    views: list[float] = field(default_factory=list)
    crashes: int = 0
    leaves: int = 0
    longest: float = 0.0


class Server:
    """The coordinator without its sockets: messages are handled in the order in which they come, one at a time."""

    def __init__(self, clock: Clock, journal: Journal, timeouts: Timeouts, deliver: Callable[..., None]) -> None:
        self.membership = Membership(RUN, RunPolicy(), timeouts)
        self.account = Account()
        self._clock, self._journal, self._deliver = clock, journal, deliver
        self._free_at = 0.0
        self._every = timeouts.heartbeat / 4
        self._work(lambda: ("start", self.membership.begin([], clock.now)))
        clock.after(self._every, self._tick)

    def receive(self, name: str, body: bytes) -> None:
        """A message has arrived: it is handled when those before it are done with."""
        self._clock.after(max(0.0, self._free_at - self._clock.now), partial(self._handle, name, body))

    def _handle(self, name: str, body: bytes) -> None:
        def decide() -> tuple[str, list[Effect]]:
            message = decode(body, FROM_PEERS)
            return type(message).__name__, self.membership.receive(name, message, self._clock.now)

        self.account.received[self._work(decide)] += 1

    def _tick(self) -> None:
        self._work(lambda: ("tick", self.membership.tick(self._clock.now)))
        self._clock.after(self._every, self._tick)

    def _work(self, decide: Callable[[], tuple[str, list[Effect]]]) -> str:
        """Decides, makes it durable and packs what goes out, in the time that this takes. Returns what it was about."""
        began = time.process_time()
        kind, effects = decide()
        self._journal.append(effect.record for effect in effects if isinstance(effect, Persist))
        mail = [(send, len(body)) for send, body in packed(effects)]
        seconds = time.process_time() - began
        self.account.cpu[kind] += seconds
        self.account.longest = max(self.account.longest, seconds)
        self._free_at = max(self._free_at, self._clock.now) + seconds
        for send, size in mail:
            what = type(send.message).__name__
            self.account.sent[what] += 1
            self.account.bytes_out[what] += size
            self.account.largest[what] = max(self.account.largest[what], size)
            self._deliver(self._free_at - self._clock.now, send.name, send.incarnation, send.message)
        return kind


class SimulatedPeer:
    """One life of a peer, as far as the coordinator can tell it from a real one."""

    def __init__(self, fleet: Fleet, name: str, incarnation: int) -> None:
        self.fleet, self.name, self.incarnation = fleet, name, incarnation
        self.alive, self.generation, self.version, self.sequence = True, 0, -1, 0
        address = f"10.{incarnation >> 16 & 255}.{incarnation >> 8 & 255}.{incarnation & 255}:29000"
        self.member = Member(name=name, incarnation=incarnation, addresses=(address,))

    def say(self, kind: type[Any], **fields: Any) -> None:
        message = kind(run=RUN, generation=self.generation, incarnation=self.incarnation, **fields)
        self.fleet.post(self.name, message)

    def join(self) -> None:
        self.say(Join, member=self.member, site="")

    def beat(self) -> None:
        if self.alive:
            if self.generation:
                self.say(Heartbeat, status=PeerStatus(state="training", step=self.sequence, loss=1.0))
            self.fleet.clock.after(self.fleet.timeouts.heartbeat, self.beat)

    def hear(self, message: Message) -> None:
        if not self.alive:
            return
        match message:
            case Welcome():
                self.generation = message.generation
                self.say(Enter, tag=TAG, spec=SPEC, state_hash=STATE)
            case View():
                self.fleet.noticed(message.epoch)
            case Base():
                self._fetched(message)
            case Begin():
                self.fleet.clock.after(self.fleet.exchange, partial(self._done, message))
            case Commit():
                self._apply(message)
            case Represent():
                self.join()
            case Expelled():
                self.alive = False

    def _fetched(self, base: Base) -> None:
        self.version = base.version
        self.say(Applied, tag=TAG, fragment=0, version=self.version, state_hash=base.state_hash)
        self._train()

    def _train(self) -> None:
        self.fleet.clock.after(self.fleet.between * self.fleet.random.uniform(0.9, 1.1), self._propose)

    def _propose(self) -> None:
        if self.alive:
            self.sequence += 1
            hashed = STATE if not self.version else f"{self.version:032x}"
            self.say(Propose, tag=TAG, sequence=self.sequence, base_version=self.version, base_hash=hashed, weight=1.0,
                     cursors={}, spec=SPEC)  # fmt: skip

    def _done(self, begin: Begin) -> None:
        if self.alive:
            start = begin.start
            self.say(DoneReport, tag=TAG, round=start.round, attempt=start.attempt, digest=f"{start.round:032x}")

    def _apply(self, commit: Commit) -> None:
        if commit.version != self.version + 1:
            return
        self.version = commit.version
        self.say(Applied, tag=TAG, fragment=0, version=self.version, state_hash=f"{self.version:032x}")
        self._train()


class Fleet:
    """All peers, and what happens to them."""

    def __init__(self, clock: Clock, journal: Journal, arguments: argparse.Namespace) -> None:
        self.clock, self.timeouts = clock, Timeouts()
        self.random = random.Random(arguments.seed)
        self.delay, self.between, self.exchange = arguments.delay / 1000, arguments.between, arguments.exchange
        self.away = arguments.away
        self.peers: dict[str, SimulatedPeer] = {}
        self._lives = 0
        self._changed: dict[int, float] = {}
        self._heard: Counter[int] = Counter()
        self._due: dict[int, int] = {}
        self.server = Server(clock, journal, self.timeouts, self.deliver)
        for index in range(arguments.peers):
            self.clock.after(self.random.uniform(0, arguments.arrive), partial(self.arrive, f"peer-{index:04d}"))

    def post(self, name: str, message: Message) -> None:
        self.clock.after(self.delay, partial(self.server.receive, name, encode(message)))

    def deliver(self, later: float, name: str, incarnation: int, message: Message) -> None:
        if isinstance(message, View):
            self._changed.setdefault(message.epoch, self.clock.now)
            self._due[message.epoch] = self._due.get(message.epoch, 0) + 1
        self.clock.after(later + self.delay, partial(self._arrived, name, incarnation, message))

    def _arrived(self, name: str, incarnation: int, message: Message) -> None:
        peer = self.peers.get(name)
        if peer is not None and peer.incarnation == incarnation:
            peer.hear(message)
        elif isinstance(message, View):
            self.noticed(message.epoch)

    def noticed(self, epoch: int) -> None:
        self._heard[epoch] += 1
        if self._heard[epoch] == self._due[epoch]:
            self.server.account.views.append(self.clock.now - self._changed[epoch])

    def arrive(self, name: str) -> None:
        self._lives += 1
        peer = self.peers[name] = SimulatedPeer(self, name, self._lives)
        peer.join()
        self.clock.after(self.random.uniform(0, self.timeouts.heartbeat), peer.beat)

    def end_some(self, per_hour: float, how: Callable[[SimulatedPeer], None]) -> None:
        """One after the other, at random times, as often as so many peers of that rate end."""
        rate = max(1e-9, per_hour / 3600 * len(self.peers))
        living = [peer for peer in self.peers.values() if peer.alive and peer.version >= 0]
        if living:
            how(self.random.choice(living))
        self.clock.after(self.random.expovariate(rate), partial(self.end_some, per_hour, how))

    def crash(self, victim: SimulatedPeer) -> None:
        """Its neighbours' links break, and their ports answer that nobody is there."""
        self.server.account.crashes += 1
        victim.alive = False
        failure = LinkFailure(peer=victim.name, incarnation=victim.incarnation, evidence="refused", detail="gone")
        living = [peer for peer in self.peers.values() if peer.alive]
        for witness in self.random.sample(living, min(3, len(living))):
            self.clock.after(0.1, partial(witness.say, LinkLost, failure=failure))
        self._return(victim)

    def leave(self, leaver: SimulatedPeer) -> None:
        self.server.account.leaves += 1
        leaver.say(Leave)
        leaver.alive = False
        self._return(leaver)

    def _return(self, peer: SimulatedPeer) -> None:
        self.clock.after(self.random.expovariate(1 / self.away), partial(self.arrive, peer.name))


SERVE = """
import sys
from pathlib import Path
from elastic import Coordinator
with Coordinator(run="benchmark", journal=Path(sys.argv[1])) as coordinator:
    print(coordinator.address, flush=True)
    sys.stdin.read()
"""


class Crowd:
    """Real connections to a real coordinator in another process. All that have joined send their heartbeats."""

    def __init__(self, count: int, journal: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(journal)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self._address = self.process.stdout.readline().strip()
        self._context, self._poller = zmq.Context(), zmq.Poller()
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._names: dict[zmq.Socket[bytes], str] = {}
        self._members: dict[str, Member] = {}
        self._lives = self._generation = self.beats = 0
        self._due = 0.0
        self.names = [f"peer-{index:03d}" for index in range(count)]

    def say(self, name: str, kind: type[Any], **fields: Any) -> None:
        life = self._members[name].incarnation
        self._sockets[name].send(encode(kind(run=RUN, generation=self._generation, incarnation=life, **fields)))

    def join(self, name: str) -> None:
        """Another life of this name, over another connection."""
        if name in self._sockets:
            former = self._sockets.pop(name)
            self._poller.unregister(former)
            del self._names[former]
            former.close(0)
        self._lives += 1
        self._members[name] = Member(name=name, incarnation=self._lives, addresses=("127.0.0.1:1",))
        sock = self._sockets[name] = self._context.socket(zmq.DEALER)
        sock.setsockopt(zmq.IDENTITY, identity(name, self._lives))
        sock.connect(self._address)
        self._poller.register(sock, zmq.POLLIN)
        self._names[sock] = name
        self.say(name, Join, member=self._members[name], site="")

    def take(self, seconds: float) -> list[tuple[str, Message]]:
        """What has come, after so many seconds at most. Hearts beat meanwhile."""
        if time.monotonic() >= self._due and self._generation:
            self._due = time.monotonic() + Timeouts().heartbeat
            for name in self._sockets:
                self.say(name, Heartbeat, status=PeerStatus(state="training"))
                self.beats += 1
        mail = [
            (self._names[sock], decode(sock.recv(), FROM_COORDINATOR))
            for sock, _ in self._poller.poll(round(1000 * seconds))
        ]
        self._generation = max((message.generation for _, message in mail), default=self._generation)
        return mail

    def settle(self, seconds: float = 1.0) -> None:
        """Until nothing more comes but answers to heartbeats."""
        quiet = time.monotonic() + seconds
        while time.monotonic() < quiet:
            if any(not isinstance(message, Pong) for _, message in self.take(0.05)):
                quiet = time.monotonic() + seconds

    def change(self, name: str, act: Callable[[], None]) -> float:
        """Seconds from what `name` does until all others have the view that follows from it."""
        waiting = {*self._sockets} - {name}
        began = time.monotonic()
        act()
        while waiting:
            waiting -= {who for who, message in self.take(0.05) if isinstance(message, View)}
            if time.monotonic() - began > 30:
                raise common.BenchmarkError(f"{len(waiting)} never heard of what {name} did")
        return time.monotonic() - began

    def cpu(self) -> float:
        """Seconds of processor time that the coordinator's process has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self._context.destroy(0)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def connect(report: Report, count: int, turns: int, journal: Path) -> None:
    """The row of real connections: heartbeats from all of them, while one after the other leaves and comes back."""
    crowd = Crowd(count, journal)
    try:
        for name in crowd.names:
            crowd.join(name)
            crowd.take(0.0)
        crowd.settle()
        began, cpu, beats, views = time.monotonic(), crowd.cpu(), crowd.beats, list[float]()
        for name in crowd.names[:turns]:
            views.append(crowd.change(name, partial(crowd.say, name, Leave)))
            views.append(crowd.change(name, partial(crowd.join, name)))
            crowd.settle(0.2)
        seconds, cpu, beats = time.monotonic() - began, crowd.cpu() - cpu, crowd.beats - beats
    finally:
        crowd.close()
    cells = (
        *(f"{count} real connections", str(beats), "", str(turns), f"{1e6 * cpu / max(1, beats):.0f}"),
        *(f"{100 * cpu / seconds:.0f} %", "", common.spread(views, 1, 3), "", "", ""),
    )
    report.add(cells, views=views, seconds=seconds, cpu_seconds=cpu, beats=beats)


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--peers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=120.0, help="of the virtual clock, after all have arrived")
    parser.add_argument("--arrive", type=float, default=30.0, help="seconds in which all of them join")
    parser.add_argument("--between", type=float, default=30.0, help="seconds of training between two rounds")
    parser.add_argument("--exchange", type=float, default=5.0, help="seconds that an all-reduce takes")
    parser.add_argument("--crashes", type=float, default=0.5, help="of each peer, per hour")
    parser.add_argument("--leaves", type=float, default=0.5, help="of each peer, per hour")
    parser.add_argument("--away", type=float, default=20.0, help="seconds until a peer that ended comes back")
    parser.add_argument("--delay", type=float, default=50.0, help="ms, one way")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sockets", type=int, default=200, help="real connections; 0: none")
    parser.add_argument("--turns", type=int, default=20, help="how many of those leave and come back")
    arguments = parser.parse_args()
    with common.one_line_errors(), tempfile.TemporaryDirectory() as folder:
        run(arguments, Path(folder) / "journal.sqlite")


def run(arguments: argparse.Namespace, path: Path) -> None:
    clock = Clock()
    journal = Journal(path, RUN)
    fleet = Fleet(clock, journal, arguments)
    clock.run(arguments.arrive + 5)
    common.progress(f"{len(fleet.server.membership.members)} members after {clock.now:.0f} s")
    joined, fleet.server.account = fleet.server.account, Account()
    fleet.end_some(arguments.crashes, fleet.crash)
    fleet.end_some(arguments.leaves, fleet.leave)
    clock.run(clock.now + arguments.seconds)
    rounds = sum(loop.rounds for loop in fleet.server.membership.loops.values())
    journal.close()
    report = Report("membership", f"{arguments.peers} simulated peers, virtual clock", COLUMNS)
    tell(report, "all join", joined, arguments.arrive + 5)
    tell(report, "training", fleet.server.account, arguments.seconds)
    size = sum(each.stat().st_size for each in path.parent.iterdir())
    if arguments.sockets:
        connect(report, arguments.sockets, min(arguments.turns, arguments.sockets), path.with_name("real.sqlite"))
    report.notes.append(f"{rounds} rounds committed; the journal has {size / 2**20:.1f} MiB")
    common.publish(report, arguments)


COLUMNS = (
    *("phase", "messages", "crashes", "leaves", "us a message", "core used", "longest ms"),
    *("s to a new view: median (min-max)", "MiB/s out", "KiB of a view", "KiB of a start"),
)


def tell(report: Report, phase: str, account: Account, seconds: float) -> None:
    cpu, messages = sum(account.cpu.values()), sum(account.received.values())
    cells = (
        phase,
        str(messages),
        str(account.crashes),
        str(account.leaves),
        f"{1e6 * cpu / max(1, messages):.0f}",
        f"{100 * cpu / seconds:.0f} %",
        f"{1000 * account.longest:.0f}",
        common.spread(account.views, 1, 3) if account.views else "",
        f"{sum(account.bytes_out.values()) / seconds / 2**20:.2f}",
        f"{account.largest['View'] / 1024:.2f}",
        f"{account.largest['Begin'] / 1024:.1f}",
    )
    report.add(cells, cpu=dict(account.cpu), received=dict(account.received), sent=dict(account.sent),
               bytes_out=dict(account.bytes_out), views=account.views, seconds=seconds)  # fmt: skip
    top = sorted(account.cpu.items(), key=lambda each: -each[1])[:6]
    shares = ", ".join(f"{kind} {value:.2f} s" for kind, value in top)
    middle = statistics.median(account.views) if account.views else 0.0
    report.notes.append(f"{phase}: processor time {shares}; {len(account.views)} views, median {middle:.3f} s")


if __name__ == "__main__":
    main()

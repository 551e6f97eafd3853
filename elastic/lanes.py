"""The lanes of a peer of several ranks: each rank has links of its own, and exchanges its own range of what travels.

A rank that does not lead has a `Lane`: a `collectives.Group` whose links go to the ranks of the same number in other
peers. The leader's `LanedGroup` has the face of any group. It cuts an attempt into ranges, the same on all peers, has
each rank run its own, and answers once all have ended: Done with the whole result, or Failed with all that was lost.
Whether an attempt is cut is a function of the Start alone, so that all its members do the same.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from xxhash import xxh3_128_hexdigest

from collectives import Group, GroupStatistics
from collectives.patterns import REDUCTIONS
from collectives.records import (
    BLOCK,
    Abort,
    Done,
    Failed,
    Identity,
    LinkFailure,
    LinkRecord,
    Member,
    OperationRecord,
    Start,
    WireRun,
)
from collectives.sockets import format_address, kept_from_children, parse_address, shut
from collectives.transfer import as_bytes

from .config import endpoints, environment
from .errands import (
    GREETING_SECONDS,
    MOST_VISITORS,
    Alive,
    Call,
    Door,
    Ended,
    Errand,
    Known,
    Stop,
    fill,
    give,
    hosts,
    hosts_towards,
    knock,
    listening,
    machine,
    packed,
    reach,
    receive,
    welcome,
)
from .errors import CollectiveError, ConfigurationError, RoundAborted, TransportError
from .messages import MessageError
from .peer import open_group
from .tensors import Reserve

SMALLEST_RANGE = 1 << 16  # elements of each lane: with fewer, it costs more to bring them to the ranks than it saves
ENDING_SECONDS = 20.0  # in which a rank that was told to stop has ended; else it is given up
ACCEPT_AGAIN_SECONDS = 0.05
SHUN_SECONDS = 30.0  # for which lanes to a peer are not tried again after they failed where the leader's link did not

Outcome = Done | Failed


# --- who runs what, as pure functions ---------------------------------------------------------------------------------


def lanes_of(start: Start) -> int:
    """Into how many ranges an attempt is cut. 1: the leaders run it alone, as they do whatever has failed once.

    So a lane through which nobody gets costs a round an attempt, and no more.
    """
    counts = {len(member.lanes) for member in (*start.contributors, *start.receivers)}
    if len(counts) != 1 or start.attempt or start.op not in REDUCTIONS or start.segments:
        return 1
    lanes = 1 + counts.pop()
    return lanes if start.elements >= lanes * SMALLEST_RANGE else 1


def ranges(elements: int, lanes: int) -> list[tuple[int, int]]:
    """[start, stop) for each lane: contiguous, as even as whole blocks can be."""
    blocks = -(-elements // BLOCK)
    return list(pairwise(min(elements, blocks * lane // lanes * BLOCK) for lane in range(lanes + 1)))


def cut_wires(runs: Iterable[WireRun], start: int, stop: int) -> tuple[WireRun, ...]:
    """Of runs that cover everything, those that cover [start, stop)."""
    runs = list(runs)
    bounds = pairwise([0, *accumulate(run.elements for run in runs)])
    shared = [min(high, stop) - max(low, start) for low, high in bounds]
    return tuple(replace(run, elements=n) for run, n in zip(runs, shared, strict=True) if n > 0)


def lane_run(run: str, lane: int) -> str:
    """What the groups of a lane call the run: nobody can mistake one lane for another."""
    return f"{run}/{lane}" if lane else run


def lane_member(member: Member, lane: int) -> Member:
    """A peer as the ranks of that lane see it."""
    addresses = member.lanes[lane - 1] if lane else member.addresses
    return replace(member, addresses=addresses, lanes=())


def derived(start: Start, lane: int, lanes: int) -> Start:
    """What the rank of that lane runs: a range of the same operation, with its like on the other peers.

    Its identity says how many lanes there are; the digest of the whole is made of the whole.
    """
    low, high = ranges(start.elements, lanes)[lane]
    return replace(
        start,
        run=lane_run(start.run, lane),
        tag=_lane_tag(start.tag, lane, lanes),
        base_version=-1,
        contributors=tuple(lane_member(each, lane) for each in start.contributors),
        receivers=tuple(lane_member(each, lane) for each in start.receivers),
        elements=high - low,
        wires=cut_wires(start.wires, low, high),
    )


def derived_abort(abort: Abort, lane: int, lanes: int) -> Abort:
    return replace(abort, run=lane_run(abort.run, lane), tag=_lane_tag(abort.tag, lane, lanes))


def _lane_tag(tag: str, lane: int, lanes: int) -> str:
    return f"{tag}/{lane} of {lanes}"


def in_lane(failure: LinkFailure, lane: int) -> LinkFailure:
    """A lane that broke says nothing of the peer, which may be reached by the others: no proof, and no cut."""
    if not lane:
        return failure
    return replace(failure, evidence="reset", detail=f"rank {lane}: {failure.evidence}; {failure.detail}")


def lost_in(ends: Iterable[Ended]) -> tuple[LinkFailure, ...]:
    """Each peer to which some lane's link was lost, once; the leader's word counts first."""
    lost: dict[int, LinkFailure] = {}
    for lane, ended in enumerate(ends):
        for failure in ended.lost:
            lost.setdefault(failure.incarnation, in_lane(failure, lane))
    return tuple(lost.values())


def merged(records: Iterable[OperationRecord], seconds: float) -> OperationRecord:
    """What an attempt cost this peer: its slowest lane's time, the bytes of all."""
    records = list(records)
    links: dict[str, LinkRecord] = {}
    for link in (link for record in records for link in record.links):
        links[link.peer] = _both(links[link.peer], link) if link.peer in links else link
    return OperationRecord(
        seconds=seconds,
        wait_ready_seconds=max(record.wait_ready_seconds for record in records),
        reduce_seconds=max(record.reduce_seconds for record in records),
        links=tuple(links.values()),
    )


def _both(one: LinkRecord, other: LinkRecord) -> LinkRecord:
    known = [each.rtt for each in (one, other) if each.rtt]
    return LinkRecord(
        peer=one.peer,
        bytes_sent=one.bytes_sent + other.bytes_sent,
        bytes_received=one.bytes_received + other.bytes_received,
        send_blocked_seconds=max(one.send_blocked_seconds, other.send_blocked_seconds),
        stripes=one.stripes + other.stripes,
        waited_seconds=max(one.waited_seconds, other.waited_seconds),
        retransmits=one.retransmits + other.retransmits,
        rtt=min(known, default=0.0),
    )


# --- a rank that does not lead ----------------------------------------------------------------------------------------


@dataclass
class _Visit:
    """An errand that is being run. ending: it has been; what the leader does from then on does not matter."""

    socket: socket.socket
    start: Start
    source: torch.Tensor | None
    result: torch.Tensor
    ending: bool = False
    speaking: threading.Lock = field(default_factory=threading.Lock)

    def hear(self, beat: float) -> Abort | None:
        """What the leader says meanwhile; None: it is gone, or has all that it wanted. It is told that this lives."""
        ears = select.poll()
        ears.register(self.socket, select.POLLIN)
        with contextlib.suppress(OSError, MessageError):
            while not ears.poll(beat * 1000):
                with self.speaking:
                    if not self.ending:
                        self.socket.sendall(packed(Alive()))
            return receive(self.socket, Stop).abort
        return None


class Lane:
    """Runs errands for the leader until it is closed. Each has threads of its own; training waits for none of them.

    group: with this rank's links. door: a listener, owned from here on, at which the leader knocks. beat: seconds
    between signs of life.
    """

    def __init__(self, group: Group, door: socket.socket, secret: bytes, beat: float) -> None:
        self.group = group
        self._door, self._secret, self._beat = door, secret, beat
        self._lock = threading.Lock()
        self._visitors: dict[socket.socket, threading.Thread] = {}
        self._newest, self._closed = -1, threading.Event()
        self._reserve = Reserve()
        self._thread = threading.Thread(target=self._receive_visitors, name="elastic-lane", daemon=True)
        self._thread.start()

    def _receive_visitors(self) -> None:
        while not self._closed.is_set():
            try:
                sock = kept_from_children(self._door.accept()[0])
            except OSError:  # it left before we came to the door, no descriptor is free, or the door is closed
                self._closed.wait(ACCEPT_AGAIN_SECONDS)
                continue
            thread = threading.Thread(target=self._visited, args=(sock,), name="elastic-errand", daemon=True)
            with self._lock:
                room = len(self._visitors) < MOST_VISITORS and not self._closed.is_set()
                if room:
                    self._visitors[sock] = thread
                    thread.start()
            if not room:
                sock.close()

    def _visited(self, sock: socket.socket) -> None:
        try:
            welcome(sock, self._secret)
            message = receive(sock, object)
            if isinstance(message, Known):
                self._learn(message)
            elif isinstance(message, Errand):
                self._run(sock, message)
        except (OSError, MessageError):
            pass  # the leader is gone, or has called it off; or it was a stranger
        finally:
            with self._lock:
                del self._visitors[sock]
            sock.close()

    def _learn(self, known: Known) -> None:
        with self._lock:
            if known.number > self._newest and not self._closed.is_set():
                self._newest = known.number
                self.group.connect(known.members)

    def _run(self, sock: socket.socket, errand: Errand) -> None:
        """This thread hears the leader, another executes."""
        start = errand.start
        dtype = getattr(torch, start.dtype)
        source = self._reserve.take(start.elements, dtype) if errand.gives else None
        if source is not None:
            fill(sock, source)
        visit = _Visit(sock, start, source, self._reserve.take(start.elements, dtype))
        thread = threading.Thread(target=self._execute, args=(visit,), name="elastic-lane-run", daemon=True)
        thread.start()
        abort = visit.hear(self._beat) or _given_up(start)
        if not visit.ending:
            self.group.abort(abort)
        thread.join()

    def _execute(self, visit: _Visit) -> None:
        ended = self._end(visit.start, visit.source, visit.result)
        with visit.speaking:
            visit.ending = True  # before the leader hears of it: that it then lets go is no abort
        with contextlib.suppress(OSError):  # it is gone: nobody needs this
            visit.socket.sendall(packed(ended))
            if ended.done:
                give(visit.socket, visit.result)

    def _end(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Ended:
        try:
            outcome = self.group.run(start, source, result)
        except Exception as error:  # told to the leader, which raises it
            return Ended(done=False, reason=str(error) or repr(error), unable=True)
        carried = self.group.statistics()
        ended = ended_of(outcome)
        return replace(ended, bytes_sent=carried.bytes_sent, bytes_received=carried.bytes_received)

    def close(self) -> None:
        """Ends all that runs here, and every thread."""
        with self._lock:
            self._closed.set()
            visitors = dict(self._visitors)
        shut(self._door)
        self._thread.join()
        self._door.close()
        for sock in visitors:
            shut(sock)
        self.group.close()
        for thread in visitors.values():
            thread.join()


def _given_up(start: Start) -> Abort:
    return Abort(**start.identity._asdict(), reason="the leader of this rank is gone")


def ended_of(outcome: Outcome) -> Ended:
    if isinstance(outcome, Done):
        return Ended(done=True, record=outcome.record)
    return Ended(done=False, reason=outcome.reason, lost=outcome.lost)


# --- how lanes are opened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LaneFacts:
    """What the leader tells the other ranks, within the site. group: options that the groups of all ranks share.

    beat: seconds between signs of life.
    """

    coordinator: str
    group: dict[str, Any]
    secret: bytes
    beat: float
    machine: tuple[str, ...] = field(default_factory=machine)
    hosts: tuple[str, ...] = field(default_factory=lambda: tuple(hosts()))


@dataclass(frozen=True, slots=True)
class LaneOffer:
    """A rank's answer. addresses: for other peers; doors: for the leader. trouble: why it has no lane."""

    addresses: tuple[str, ...] = ()
    doors: tuple[Door, ...] = ()
    trouble: str = ""


def open_lane(facts: LaneFacts, rank: int, listen: str | None, advertise: str | None) -> tuple[LaneOffer, Lane | None]:
    """On a rank that does not lead. listen, advertise: as this rank was told; without, as its environment says."""
    try:
        listen, advertise = endpoints(facts.coordinator, listen, advertise, environment())
        options = facts.group | {"run": lane_run(facts.group["run"], rank)}
        group = open_group(Group, beside(listen, rank), advertise=beside(advertise, rank), **options)
        near = facts.machine == machine()
        door = listening(near)
    except (ConfigurationError, OSError) as error:
        return LaneOffer(trouble=f"rank {rank}: {error}"), None
    names = ["127.0.0.1"] if near else hosts_towards(facts.hosts)
    doors = tuple((name, door.getsockname()[1]) for name in names)
    return LaneOffer(group.addresses, doors), Lane(group, door, facts.secret, facts.beat)


def beside(endpoints: str | None, rank: int) -> Any:
    """Where a rank listens if the leader does there: on ports that are higher by its number, if they are fixed."""
    if not endpoints:
        return endpoints
    named = [parse_address(each.strip()) for each in endpoints.split(",")]
    return ",".join(format_address(host, port and port + rank) for host, port in named)


# --- the leader -------------------------------------------------------------------------------------------------------


class LanedGroup(Group):
    """A group whose attempts are carried by all ranks of the peer, once `lead` has been told where they are."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._doors: list[Door] = []
        self._secret, self.patience = b"", GREETING_SECONDS
        self._flights: dict[Identity, _Flight] = {}
        self._flying = threading.Lock()
        self._views = 0
        self._couriers: set[threading.Thread] = set()
        self._shunned: dict[int, float] = {}
        self._carried: dict[int, tuple[int, int]] = {}

    def lead(self, offers: list[LaneOffer], secret: bytes, patience: float) -> str:
        """offers: of each other rank, by rank. patience: seconds that one may be silent.

        Says why there are no lanes; "" if there are.
        """
        trouble = "; ".join(offer.trouble for offer in offers if offer.trouble)
        try:
            doors = [reach(offer.doors, secret) for offer in offers] if not trouble else []
        except OSError as error:
            trouble = f"the leader does not reach a rank of its peer: {error}"
        if not trouble:
            self._secret, self._doors, self.patience = secret, doors, patience
            self.member = replace(self.member, lanes=tuple(offer.addresses for offer in offers))
        return trouble

    @property
    def carried(self) -> dict[int, tuple[int, int]]:
        """Bytes that the links of each other rank have sent and received by the end of its last errand."""
        with self._flying:
            return dict(self._carried)

    # What any group does.

    def connect(self, members: Iterable[Member]) -> None:
        """Also tells the other ranks, in the background: best effort, as all of it."""
        members = tuple(members)
        super().connect(members)
        with self._flying:
            self._views += 1
            if self._doors:
                courier = threading.Thread(
                    target=self._tell_view, args=(self._views, members), name="elastic-lanes-view", daemon=True
                )
                self._couriers.add(courier)
                courier.start()

    def _tell_view(self, number: int, members: tuple[Member, ...]) -> None:
        alike = [member for member in members if len(member.lanes) == len(self._doors)]
        for lane, door in enumerate(self._doors, 1):
            if number < self._views:
                break
            with contextlib.suppress(OSError):
                with knock(door, self._secret, self.patience) as sock:
                    sock.sendall(packed(Known(number=number, members=tuple(lane_member(m, lane) for m in alike))))
        with self._flying:
            self._couriers.discard(threading.current_thread())

    def run(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Outcome:
        lanes = lanes_of(start)
        if lanes == 1 or lanes != 1 + len(self._doors):
            return super().run(start, source, result)
        if shunned := self._shuns(start):
            return Failed(identity=start.identity, reason="lanes to it failed lately", lost=shunned)
        flight = _Flight(self, start, source, result)
        with self._flying:
            self._flights[start.identity] = flight
        try:
            return flight.run()
        finally:
            with self._flying:
                del self._flights[start.identity]

    def abort(self, abort: Abort) -> None:
        super().abort(abort)
        with self._flying:
            flight = self._flights.get(abort.identity)
        if flight is not None:
            flight.stop(abort)
        elif self._doors:  # it may be about to begin, or only receivers still wait for it
            super().abort(derived_abort(abort, 0, 1 + len(self._doors)))

    def statistics(self) -> GroupStatistics:
        """Bytes are those of all ranks' links; everything else is the leader's."""
        own, others = super().statistics(), self.carried.values()
        sent, received = (sum(each[way] for each in others) for way in (0, 1))
        return replace(own, bytes_sent=own.bytes_sent + sent, bytes_received=own.bytes_received + received)

    def close(self) -> None:
        with self._flying:
            flights, couriers = list(self._flights.values()), list(self._couriers)
        for flight in flights:
            flight.cut()
        super().close()
        for courier in couriers:
            courier.join()

    # What its flights need.

    def run_own(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Outcome:
        return super().run(start, source, result)

    def abort_own(self, abort: Abort) -> None:
        super().abort(abort)

    def call(self, lane: int) -> Call:
        return Call(lambda: knock(self._doors[lane - 1], self._secret, self.patience))

    def ended(self, ends: list[Ended]) -> None:
        """Keeps what is to be known of the lanes when an attempt has ended."""
        own = {failure.incarnation for failure in ends[0].lost}
        others = {failure.incarnation for ended in ends[1:] for failure in ended.lost}
        until = time.monotonic() + SHUN_SECONDS
        with self._flying:
            self._shunned |= dict.fromkeys(others - own, until)
            for lane, ended in enumerate(ends):
                if lane and ended.bytes_sent:
                    self._carried[lane] = ended.bytes_sent, ended.bytes_received

    def _shuns(self, start: Start) -> tuple[LinkFailure, ...]:
        """The members of the attempt to which lanes failed lately. The next attempt goes without lanes."""
        now = time.monotonic()
        with self._flying:
            self._shunned = {life: until for life, until in self._shunned.items() if until > now}
            shunned = [each for each in (*start.contributors, *start.receivers) if each.incarnation in self._shunned]
        return tuple(LinkFailure(peer=m.name, incarnation=m.incarnation, evidence="reset") for m in shunned)


def lost_rank(lane: int, why: object) -> TransportError:
    return TransportError(f"rank {lane} of this peer is lost ({why}): end all ranks, and start them anew")


class _Flight:
    """One attempt that all ranks of this peer carry. It runs in the caller's thread, and one for each other rank."""

    def __init__(self, group: LanedGroup, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> None:
        self._group, self._start, self._source, self._result = group, start, source, result
        self._lanes = lanes_of(start)
        self._ranges = ranges(start.elements, self._lanes)
        self._ends = [Ended(done=False, reason="it has not ended")] * self._lanes
        self._calls = {lane: group.call(lane) for lane in range(1, self._lanes)}
        self._lock = threading.Lock()
        self._stopped_at = 0.0
        self._first = -1
        self._trouble: CollectiveError | None = None

    def run(self) -> Outcome:
        began = time.monotonic()
        threads = [
            threading.Thread(target=self._carry, args=(lane,), name=f"elastic-lane-{lane}", daemon=True)
            for lane in self._calls
        ]
        for thread in threads:
            thread.start()
        try:
            self._carry_own()
        except BaseException as error:
            self._fail(f"the leader cannot: {error}")
            raise
        finally:
            self._wait(threads)
        self._group.ended(self._ends)
        return self._outcome(time.monotonic() - began)

    def _outcome(self, seconds: float) -> Outcome:
        if self._trouble is not None:
            raise self._trouble
        identity = self._start.identity
        if all(ended.done for ended in self._ends):
            digest = xxh3_128_hexdigest(as_bytes(self._result))
            return Done(identity=identity, digest=digest, record=merged((e.record for e in self._ends), seconds))
        first = self._ends[self._first]
        if first.unable:
            raise ValueError(f"rank {self._first}: {first.reason}")
        return Failed(identity=identity, reason=f"rank {self._first}: {first.reason}", lost=lost_in(self._ends))

    # Lanes.

    def _carry_own(self) -> None:
        start, source, result = self._part(0)
        self._finish(0, ended_of(self._group.run_own(start, source, result)))

    def _carry(self, lane: int) -> None:
        """In a thread of its own."""
        start, source, result = self._part(lane)
        try:
            ended = self._calls[lane].make(Errand(start=start, gives=source is not None), source, result)
        except (OSError, MessageError) as error:
            ended = Ended(done=False, reason=f"the connection within the peer ended: {error}")
            self._missing(lane, error)
        self._finish(lane, ended)

    def _missing(self, lane: int, error: Exception) -> None:
        """Silence is not death: it costs the round. A rank that is gone ends the peer."""
        with self._lock:
            if isinstance(error, TimeoutError):
                self._trouble = RoundAborted(f"rank {lane} of this peer was silent for {self._group.patience} s")
            elif not self._stopped_at:
                self._trouble = lost_rank(lane, error)

    def _part(self, lane: int) -> tuple[Start, torch.Tensor | None, torch.Tensor]:
        low, high = self._ranges[lane]
        source = self._source[low:high] if self._source is not None else None
        return derived(self._start, lane, self._lanes), source, self._result[low:high]

    def _finish(self, lane: int, ended: Ended) -> None:
        with self._lock:
            self._ends[lane] = ended
            if not ended.done and self._first < 0:
                self._first = lane
        if not ended.done:
            self._fail(ended.reason)

    # The end before the end.

    def _fail(self, reason: str) -> None:
        self.stop(Abort(**self._start.identity._asdict(), reason=reason))

    def stop(self, abort: Abort) -> None:
        """All lanes are to end, from any thread; also those that are through, of which receivers still read."""
        with self._lock:
            if self._stopped_at:
                return
            self._stopped_at = time.monotonic()
        self._group.abort_own(derived_abort(abort, 0, self._lanes))
        for lane, call in self._calls.items():
            call.stop(derived_abort(abort, lane, self._lanes))

    def cut(self) -> None:
        """The group is being closed: nobody is waited for."""
        self._fail("the group was closed")
        for call in self._calls.values():
            call.cut()

    def _wait(self, threads: list[threading.Thread]) -> None:
        """An attempt ends before the next begins. A rank that does not end is given up."""
        for lane, thread in enumerate(threads, 1):
            while thread.is_alive():
                thread.join(0.5)
                if thread.is_alive() and self._stopped_at and time.monotonic() > self._stopped_at + ENDING_SECONDS:
                    self._give_up(lane)

    def _give_up(self, lane: int) -> None:
        with self._lock:
            self._trouble = lost_rank(lane, f"it has not stopped within {ENDING_SECONDS:.0f} s")
        self._calls[lane].cut()

"""Fetching a blob in ranges from several sources at once, from one thread and over connections of its own.

Each connection (a lane) has as much asked of it as its path holds, and each range goes to whichever lane is free: so
fast sources give most. What a silent lane owes is asked of others after a second; at the end, idle lanes repeat what
slow ones owe. Every range is checked on arrival and the whole at the end. If the whole is wrong although every range
was as its source sent it, each source is asked what it holds, until one is found whose bytes are right.
"""

from __future__ import annotations

import contextlib
import ctypes
import queue
import random
import selectors
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from xxhash import xxh3_128

from collectives import frames
from collectives.frames import HEADER_BYTES, FrameError, Header, Kind, Purpose
from collectives.handshake import Dialling, Refused, Self, read_header
from collectives.ranges import Ranges, Span
from collectives.records import Member
from collectives.sockets import FAR, EndOfStream, evidence_of, receive_into, remaining, send_all, vitals
from collectives.transfer import MOST_SUMS, SIZE, request
from collectives.tuning import worth_it

PIECE = 1 << 20  # the largest range
LEAST = 64 << 10
SILENT_SECONDS = 1.0  # after which what a lane owes is asked of others
GIVE_UP_SECONDS = 10.0  # after which it is closed
_PIECE_SECONDS = 0.1
_LOOK_SECONDS = 0.1
_QUEUED = 32  # requests in flight on one lane
_TRIES = 3
_AGAIN_SECONDS = 0.25
_GROW_SECONDS, _GROW_TRIPS, _GAIN, _QUEUES = 0.5, 8.0, 1.15, 1.2
MOST_LANES = 32
_HEDGE_SECONDS = 0.005
_MOST_FACTS = 4096
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE of Linux 5.14; it changes nothing that has been written
_WORTH_WARMING, _WARMED = 32 << 20, 4 << 20

Progressing = Callable[[int, int], None]


class FetchError(OSError):
    """A blob could not be fetched; the message says what each source answered."""


@dataclass(slots=True)
class SourceRecord:
    """What one source has given of a blob. trouble: why it gave no more, "" if nothing was wrong with it.

    bytes: of its ranges that were used. repeated: ranges that were asked of it although another one owed them.
    wrong: what it holds has not the digest that it says. lanes: most connections to it at once.
    """

    bytes: int = 0
    repeated: int = 0
    lanes: int = 0
    wrong: bool = False
    trouble: str = ""


class Partial:
    """What has been received of one blob. Pass the same one to the next fetch of it, which then goes on from there.

    digest: of the blob; a fetch of another one begins anew. sources: by name, of all fetches since. Not for use by two
    fetches at once.
    """

    def __init__(self) -> None:
        self.digest = ""
        self.sources: dict[str, SourceRecord] = {}
        self.ranges: Ranges | None = None
        self.data = memoryview(b"")
        self.sums: dict[Span, tuple[int, str]] = {}
        self._hasher = xxh3_128()
        self._hashed = 0

    @property
    def here(self) -> int:
        """Bytes that have been received and verified."""
        return self.ranges.here if self.ranges is not None else 0

    @property
    def size(self) -> int:
        """Bytes of the blob; 0 while unknown."""
        return len(self.data)

    def begin(self, digest: str) -> None:
        """Forgets what belongs to another blob."""
        if self.digest != digest:
            self.forget()
            self.sources.clear()
            self.digest = digest

    def forget(self) -> None:
        """Nothing of what has come is worth keeping."""
        self.ranges, self.data = None, memoryview(b"")
        self.sums.clear()
        self._hasher, self._hashed = xxh3_128(), 0

    def measure(self, size: int, into: memoryview | None) -> bool:
        """Makes room, once the size is known: `into` if it has exactly this size, else fresh memory (then True)."""
        self.ranges = Ranges(size)
        fits = into is not None and len(into) == size
        self.data = into if fits and into is not None else np.empty(size, dtype=np.uint8).data.cast("B")
        return not fits

    def lacks(self, span: Span) -> bool:
        """Whether this range may still land."""
        return self.ranges is not None and self.ranges.lacks(span)

    def land(self, span: Span, checksum: int, source: str) -> bool:
        """A verified range lies in its place."""
        assert self.ranges is not None, "ranges land once the size is known"
        if not self.ranges.land(span):
            return False
        self.sums[span] = (checksum, source)
        if self.ranges.prefix - self._hashed >= PIECE or self.ranges.complete:
            self._hasher.update(self.data[self._hashed : self.ranges.prefix])
            self._hashed = self.ranges.prefix
        return True

    def is_right(self) -> bool:
        """Whether the whole has its digest."""
        return str(self._hasher.hexdigest()) == self.digest

    def accuse(self, source: str) -> None:
        """What this source holds has another digest than it says."""
        record = self.sources[source]
        record.wrong, record.trouble = True, "it serves wrong bytes"

    def hash_again(self) -> None:
        """Some of it has been replaced."""
        self._hasher = xxh3_128(self.data)


@dataclass(slots=True, eq=False)
class _Flight:
    """A range that a lane was asked for. view: where it goes; scratch: that is not its place in the blob.

    released: it has been silent for so long that others may bring it.
    """

    span: Span
    number: int
    view: memoryview
    scratch: bool
    released: bool = False


@dataclass(slots=True, eq=False)
class _Lane:
    """One connection. rate: bytes/s lately, 0 until known. heard: when anything last came. asked: bytes in flight."""

    socket: socket.socket
    source: _Source
    rtt: float
    heard: float
    flights: deque[_Flight] = field(default_factory=deque)
    header: memoryview = field(default_factory=lambda: memoryview(bytearray(HEADER_BYTES)))
    current: Header | None = None
    facts: memoryview | None = None
    at: int = 0
    opened: bool = False
    rate: float = 0.0
    came: int = 0
    asked: int = 0
    count: int = 0

    @property
    def far(self) -> bool:
        return self.rtt > FAR

    @property
    def piece(self) -> int:
        """Bytes of its next range: what it brings in a moment."""
        if not self.far:
            return PIECE
        return min(PIECE, max(LEAST, int(self.rate * _PIECE_SECONDS) // LEAST * LEAST))

    @property
    def window(self) -> int:
        """Bytes to have in flight: twice what the path holds, since it may get faster."""
        return max(2 * self.piece, int(2 * self.rate * (self.rtt + _PIECE_SECONDS)), 4 * LEAST)

    @property
    def has_room(self) -> bool:
        """Whether more can be asked of it."""
        return self.asked < self.window and len(self.flights) < _QUEUED and not any(f.released for f in self.flights)

    @property
    def target(self) -> memoryview:
        """Where what comes next goes."""
        if self.current is None:
            return self.header
        return self.facts if self.facts is not None else self.flights[0].view

    def expected(self, header: Header) -> Header:
        """A header, if it is the one that must come now."""
        if header.kind is Kind.BUSY:
            raise _Busy("it has no room")
        if header.kind is Kind.MISSING:
            raise _Wrong("it no longer has this key" if self.opened else "it has no such key")
        if not self.opened and header.kind is Kind.SIZE and SIZE.size <= header.length <= _MOST_FACTS:
            self.facts = memoryview(bytearray(header.length))
        elif not self.opened or header.kind is not Kind.PART or not self.flights:
            raise FrameError(f"a {header.kind.name} frame has no place here")
        elif (header.chunk, header.length) != (self.flights[0].number, len(self.flights[0].view)):
            raise FrameError("a range of the wrong length, or one that was not asked for")
        return header

    def divert(self, flight: _Flight) -> None:
        """It no longer writes in place; what it has brought of it so far is kept."""
        if not flight.scratch:
            came = self.at if self.current is not None and flight is self.flights[0] else 0
            scratch = memoryview(bytearray(len(flight.view)))
            scratch[:came] = flight.view[:came]
            flight.view, flight.scratch = scratch, True

    def measure(self, seconds: float) -> None:
        """Its rate, from what came in the last moment."""
        if self.flights and seconds > 0:
            now = self.came / seconds
            self.rate = (self.rate + now) / 2 if self.rate else now
        self.came = 0

    def seconds_for(self, length: int) -> float:
        """Until this lane, now idle, would have brought so much."""
        return self.rtt + length / self.rate if self.rate else self.rtt


@dataclass(slots=True, eq=False)
class _Source:
    """One peer that has the blob. wanted: lanes. again_at: when it is dialled again; None: never. lost: why last."""

    member: Member
    record: SourceRecord
    wanted: int | None
    lanes: set[_Lane] = field(default_factory=set)
    dialling: Dialling | None = None
    again_at: float | None = 0.0
    lost: Exception | None = None
    tries: int = 0
    busy: float = 0.0
    full: bool = False
    size: int = 0
    measured_at: float = 0.0
    best: float = 0.0

    @property
    def over(self) -> bool:
        """Nothing more will come from it."""
        return not self.lanes and self.dialling is None and self.again_at is None

    @property
    def rate(self) -> float:
        return sum(lane.rate for lane in self.lanes)


class _Wrong(FrameError):
    """A source that cannot help, whatever it is asked again."""


class _Busy(FrameError):
    """A source that has no room for this connection."""


class Fetch:
    """One blob on its way here.

    connections: to each source; None for as many as help. into: memory to use if it has exactly the blob's size.
    """

    def __init__(
        self,
        me: Self,
        key: str,
        sources: Sequence[Member],
        digest: str,
        timeout: float,
        connections: int | None = None,
        partial: Partial | None = None,
        into: memoryview | None = None,
    ) -> None:
        self._me, self._key, self._digest, self._into = me, key, digest, into
        self._deadline = time.monotonic() + timeout
        self._fixed = connections
        self._partial = partial if partial is not None else Partial()
        self._partial.begin(digest)
        self._sources = [
            _Source(member, self._partial.sources.setdefault(member.name, SourceRecord()), connections)
            for member in sources
        ]
        for source in self._sources:
            source.record.trouble = ""
        self._selector = selectors.DefaultSelector()
        self._bell, self._rope = socket.socketpair()
        self._rope.setblocking(False)
        self._dialled: queue.SimpleQueue[tuple[_Source, socket.socket | Exception | None]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._tried: set[int] = set()
        self._stopped = self._finished = False
        self._looked = 0.0
        self._shown = -1

    def run(self, progress: Progressing | None) -> memoryview:
        """The whole blob, verified; FetchError otherwise."""
        self._selector.register(self._bell, selectors.EVENT_READ)
        try:
            while True:
                while not self._ended():
                    self._look()
                    for key, _ in self._selector.select(_LOOK_SECONDS):
                        self._on(key.data)
                    self._show(progress)
                if not self._complete():
                    raise FetchError(f"{self._key!r} could not be fetched: {self._why()}")
                if self._partial.is_right() or self._find_right_one():
                    return self._partial.data
                self._begin_anew()
        finally:
            self._close()

    def stop(self) -> None:
        """End it from any thread."""
        self._stopped = True
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # full, or over
            self._rope.send(b"!")

    def _close(self) -> None:
        self._finished = True
        for source in self._sources:
            if source.dialling is not None:
                source.dialling.stop()
            for lane in source.lanes:
                lane.socket.close()
        for thread in self._threads:
            thread.join()
        while not self._dialled.empty():
            found = self._dialled.get()[1]
            if isinstance(found, socket.socket):
                found.close()
        if self._partial.ranges is not None:
            self._partial.ranges.release_all()
        self._selector.close()
        self._bell.close()
        self._rope.close()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _complete(self) -> bool:
        return self._partial.ranges is not None and self._partial.ranges.complete

    def _ended(self) -> bool:
        over = all(source.over for source in self._sources)
        return self._complete() or self._stopped or over or time.monotonic() >= self._deadline

    def _begin_anew(self) -> None:
        """All sources of this size were wrong: those that said another one may be right. FetchError if none did."""
        partial, said = self._partial, self._partial.size
        why = self._why()
        for lane in self._lanes():
            self._abandon(lane)
        partial.forget()
        self._tried.add(said)
        others = [each for each in self._sources if each.size not in self._tried and not each.record.wrong]
        if not others:
            wanted = f"its xxh3-128 is not {self._digest}"
            raise FetchError(f"{self._key!r} arrived, but {wanted}: wrong bytes are served: {why}")
        for source in self._sources:
            source.again_at, source.tries = (0.0, 0) if source in others else (None, 0)
        self._shown = -1

    def _why(self) -> str:
        reasons = [f"{name}: {each.trouble}" for name, each in sorted(self._partial.sources.items()) if each.trouble]
        if self._stopped:
            reasons.append("it was stopped")
        elif time.monotonic() >= self._deadline:
            reasons.append("the time is up")
        if self._partial.size:
            reasons.append(f"{self._partial.here} of {self._partial.size} bytes are here")
        return "; ".join(reasons) or "there is no source"

    def _show(self, progress: Progressing | None) -> None:
        here, size = self._partial.here, self._partial.size
        if progress is None or self._partial.ranges is None:
            return
        if self._shown < 0 or here >= self._shown + size // 100 + 1 or (here == size and here != self._shown):
            self._shown = here
            progress(here, size)

    # --- lanes come and go --------------------------------------------------------------------------------------------

    def _dial(self, source: _Source, count: int | None) -> None:
        limit = min(self._me.options.connect_timeout, remaining(self._deadline))
        dialling = source.dialling = Dialling(self._me, source.member, Purpose.FETCH, count, limit)

        def tell(found: socket.socket | Exception | None) -> None:
            self._dialled.put((source, found))
            self._ring()

        def work() -> None:
            try:
                dialling.connect(tell)
                tell(None)
            except (OSError, ValueError) as error:
                tell(error)

        self._begin(work, source.member.name)

    def _begin(self, work: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=work, name=f"fetch-{name}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _warm(self) -> None:
        """Has the system hand out the second half of fresh memory while the first half fills.

        Handing it out takes as long as receiving into it, and far longer on a virtual machine that has to ask its host.
        """
        data = np.frombuffer(self._partial.data, dtype=np.uint8)
        madvise = ctypes.CDLL(None).madvise
        first = -(-(data.ctypes.data + len(data) // 2) // _WARMED) * _WARMED
        for address in range(first, data.ctypes.data + len(data) - _WARMED, _WARMED):
            if self._finished or madvise(ctypes.c_void_p(address), ctypes.c_size_t(_WARMED), _POPULATE_WRITE):
                return  # older systems cannot

    def _welcome(self) -> None:
        """What has been dialled since."""
        with contextlib.suppress(queue.Empty):
            while True:
                source, found = self._dialled.get_nowait()
                if isinstance(found, socket.socket):
                    self._open(source, found)
                    continue
                source.dialling = None
                if not source.lanes:
                    self._give_up(source, found or source.lost or EndOfStream("it closed the connections"))

    def _open(self, source: _Source, sock: socket.socket) -> None:
        now = time.monotonic()
        source.again_at, source.measured_at = None, now
        lane = _Lane(sock, source, rtt=vitals(sock).shortest_rtt, heard=now)
        sock.setblocking(False)
        source.lanes.add(lane)
        self._selector.register(sock, selectors.EVENT_READ, lane)
        self._attempt(lane, self._ask_size)
        source.wanted = max(source.wanted or 0, len(source.lanes))
        source.record.lanes = max(source.record.lanes, len(source.lanes))

    def _attempt(self, lane: _Lane, act: Callable[[_Lane], None]) -> None:
        """The lane is closed if this fails."""
        try:
            act(lane)
        except BlockingIOError:
            return
        except (OSError, FrameError) as error:
            self._lose(lane, error)

    def _lose(self, lane: _Lane, error: Exception) -> None:
        source = lane.source
        source.lost = error
        self._abandon(lane)
        source.full = source.full or isinstance(error, _Busy)
        if isinstance(error, _Wrong):  # so it would be on the others
            for other in list(source.lanes):
                self._abandon(other)
        if not source.lanes and source.dialling is None:
            self._give_up(source, error)

    def _abandon(self, lane: _Lane) -> None:
        if lane not in lane.source.lanes:
            return
        lane.source.lanes.discard(lane)
        self._selector.unregister(lane.socket)
        lane.socket.close()
        self._release(lane)

    def _release(self, lane: _Lane) -> None:
        """What it owes may be asked of others; if it comes after all, it does not write in place."""
        for flight in lane.flights:
            if not flight.released:
                assert self._partial.ranges is not None, "ranges were asked for"
                lane.divert(flight)
                flight.released = True
                self._partial.ranges.release(flight.span)

    def _give_up(self, source: _Source, error: Exception) -> None:
        """For good, or until it is dialled again: a source without room is, as long as there is time."""
        busy = isinstance(error, _Busy)
        final = isinstance(error, (_Wrong, Refused)) or (isinstance(error, OSError) and evidence_of(error) == "refused")
        source.record.trouble = str(error) or type(error).__name__
        source.tries += not busy
        if final or source.tries >= _TRIES:
            source.again_at = None
            return
        source.busy = min(2.0, 2 * source.busy or _AGAIN_SECONDS)
        source.wanted = self._fixed or (1 if busy else None)
        source.again_at = time.monotonic() + source.busy * random.uniform(0.5, 1.0)

    # --- what comes ---------------------------------------------------------------------------------------------------

    def _on(self, lane: _Lane | None) -> None:
        if lane is None:
            self._bell.recv(4096)
            self._welcome()
        elif lane in lane.source.lanes:
            self._attempt(lane, self._read)

    def _read(self, lane: _Lane) -> None:
        """What has come, up to a few frames: a lane that brings without end must leave time for others."""
        for _ in range(4):
            view = lane.target
            count = lane.socket.recv_into(view[lane.at :])
            if not count:
                raise EndOfStream("it closed the connection")
            lane.at += count
            lane.came += count
            lane.heard = time.monotonic()
            if lane.at == len(view):
                lane.at = 0
                self._take(lane)

    def _take(self, lane: _Lane) -> None:
        """A header, or what belongs to one, is whole."""
        if lane.current is None:
            lane.current = lane.expected(frames.decode(lane.header))
            return
        header, lane.current = lane.current, None
        if lane.facts is not None:
            facts, lane.facts = lane.facts, None
            self._learn(lane, header, facts)
        else:
            self._land(lane, header)
        self._feed(lane)

    def _learn(self, lane: _Lane, header: Header, facts: memoryview) -> None:
        """Refuses a source that holds something else under this key."""
        if frames.checksum(facts) != header.checksum or len(facts) < SIZE.size:
            raise FrameError("checksum mismatch in its answer")
        [size] = SIZE.unpack_from(facts)
        digest = bytes(facts[SIZE.size :]).decode(errors="replace")
        if digest != self._digest:
            raise _Wrong(f"it holds another version, {digest}")
        lane.opened = True
        source = lane.source
        source.busy, source.size, source.record.trouble = 0.0, size, ""
        if self._partial.ranges is None:
            if self._partial.measure(size, self._into) and size >= _WORTH_WARMING:
                self._begin(self._warm, "warm")
        elif self._partial.size != size:
            raise _Wrong(f"its size {size} differs from the {self._partial.size} that another source said")
        for other in self._lanes():
            if other is not lane and not other.flights:
                self._feed(other)

    def _land(self, lane: _Lane, header: Header) -> None:
        flight, (begin, end) = lane.flights[0], lane.flights[0].span
        if frames.checksum(flight.view) != header.checksum:
            raise FrameError(f"checksum mismatch in bytes {begin} to {end}")
        lane.flights.popleft()
        lane.asked -= end - begin
        partial, record = self._partial, lane.source.record
        if flight.scratch and partial.lacks(flight.span):
            for other in self._lanes():
                for each in other.flights:
                    if each.span == flight.span:
                        other.divert(each)
            partial.data[begin:end] = flight.view
        if partial.land(flight.span, header.checksum, lane.source.member.name):
            record.bytes += end - begin
            lane.source.tries = 0

    # --- what is asked for --------------------------------------------------------------------------------------------

    def _lanes(self) -> list[_Lane]:
        return [lane for source in self._sources for lane in source.lanes]

    def _send(self, lane: _Lane, kind: Kind, payload: bytes, number: int = 0) -> None:
        message = _message(self._me, kind, payload, number)
        if lane.socket.send(message, socket.MSG_NOSIGNAL) < len(message):
            raise FrameError("it takes no requests")

    def _ask_size(self, lane: _Lane) -> None:
        self._send(lane, Kind.STAT, request(Kind.STAT, self._key))
        self._feed(lane)

    def _feed(self, lane: _Lane) -> None:
        """Asks a lane for as much as its path holds. The sizes of ranges shrink towards the end, for an even finish."""
        ranges = self._partial.ranges
        if ranges is None:
            return
        now, lanes = time.monotonic(), self._lanes()
        while lane.has_room:
            length = min(lane.piece, max(LEAST, ranges.waiting // (4 * len(lanes)) // LEAST * LEAST))
            if not ranges.waiting:
                span, again = self._late(lane, lanes, now), True
            elif worth_it(lane.rate, (each.rate for each in lanes), length, ranges.waiting):
                span, again = ranges.take(length), False
            else:
                return
            if span is None:
                return
            self._ask(lane, span, again, now)

    def _ask(self, lane: _Lane, span: Span, again: bool, now: float) -> None:
        begin, end = span
        view = memoryview(bytearray(end - begin)) if again else self._partial.data[begin:end]
        if again:
            assert self._partial.ranges is not None, "it has been asked for before"
            self._partial.ranges.repeat(span)
            lane.source.record.repeated += 1
        if not lane.flights:
            lane.heard = now
        lane.count = (lane.count + 1) % (1 << 32)
        lane.flights.append(_Flight(span, lane.count, view, again))
        lane.asked += end - begin
        self._send(lane, Kind.GET, request(Kind.GET, self._key, [span]), lane.count)

    def _late(self, lane: _Lane, lanes: Iterable[_Lane], now: float) -> Span | None:
        """For an idle lane, when all is asked for: the range that comes last, if this lane would bring it sooner."""
        assert self._partial.ranges is not None, "ranges were asked for"
        if lane.flights:
            return None
        last, found = 0.0, None
        for other in lanes:
            ahead = 0
            for flight in other.flights:
                ahead += len(flight.view)
                if self._partial.ranges.askers(flight.span) == 1:
                    seconds = max(ahead / other.rate if other.rate else 0.0, now - other.heard)
                    if seconds > last:
                        last, found = seconds, flight.span
        if found is None or lane.seconds_for(found[1] - found[0]) + _HEDGE_SECONDS > last:
            return None
        return found

    # --- ten times a second -------------------------------------------------------------------------------------------

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        for lane in self._lanes():
            lane.measure(now - self._looked)
            silent = now - lane.heard if lane.flights or not lane.opened else 0.0
            if silent > GIVE_UP_SECONDS:
                self._lose(lane, TimeoutError(f"silent for {GIVE_UP_SECONDS:g} s"))
            elif silent > max(SILENT_SECONDS, 4 * lane.rtt):
                self._release(lane)
        self._looked = now
        for source in self._sources:
            if source.dialling is None and source.again_at is not None and now >= source.again_at:
                self._dial(source, source.wanted)
            elif self._grows(source, now):
                self._dial(source, len(source.lanes))
        for lane in self._lanes():
            self._attempt(lane, self._feed)

    def _grows(self, source: _Source, now: float) -> bool:
        """Whether twice as many lanes may carry more: the last doubling did, and nothing queues on the path."""
        ranges, lanes = self._partial.ranges, source.lanes
        if ranges is None or not lanes or self._fixed or source.full or source.dialling is not None:
            return False
        rtt, rate = next(iter(lanes)).rtt, source.rate
        period = max(_GROW_SECONDS, _GROW_TRIPS * rtt)
        if rtt <= FAR or now - source.measured_at < period or len(lanes) > MOST_LANES // 2:
            return False
        source.measured_at = now
        enough = ranges.waiting > 2 * period * sum(each.rate for each in self._sources)
        if not enough or rate < _GAIN * source.best or queues(lane.socket for lane in lanes):
            return False
        source.best = rate
        return True

    # --- if the whole is wrong ----------------------------------------------------------------------------------------

    def _find_right_one(self) -> bool:
        """Takes from one source after the other what differs from what it holds, until the whole is right.

        So one right source is enough. Those that brought what it does not hold are the wrong ones.
        """
        partial, came = self._partial, dict(self._partial.sums)
        for source in sorted(self._sources, key=lambda each: -each.record.bytes):
            try:
                self._take_all_from(source)
            except (OSError, FrameError) as error:
                source.record.trouble = str(error) or type(error).__name__
                continue
            partial.hash_again()
            if partial.is_right():
                for span, (checksum, name) in came.items():
                    if checksum != partial.sums[span][0]:
                        partial.accuse(name)
                return True
            partial.accuse(source.member.name)
        return False

    def _take_all_from(self, source: _Source) -> None:
        """Makes all of it what this source holds."""
        data, sums = self._partial.data, self._partial.sums
        limit = min(self._me.options.connect_timeout, remaining(self._deadline))
        [sock] = Dialling(self._me, source.member, Purpose.FETCH, 1, limit).connect()
        with sock:
            for span in self._differing(sock):
                send_all(sock, [_message(self._me, Kind.GET, request(Kind.GET, self._key, [span]))])
                header = self._answer(sock, Kind.PART, data[span[0] : span[1]])
                sums[span] = (header.checksum, source.member.name)

    def _differing(self, sock: socket.socket) -> list[Span]:
        """The ranges of which this source says another checksum than what is here."""
        known, found = sorted(self._partial.sums), []
        for at in range(0, len(known), MOST_SUMS):
            spans = known[at : at + MOST_SUMS]
            send_all(sock, [_message(self._me, Kind.SUMS, request(Kind.SUMS, self._key, spans))])
            answer = memoryview(bytearray(8 * len(spans)))
            self._answer(sock, Kind.SUMS, answer)
            sums = answer.cast("Q")
            found += [span for span, theirs in zip(spans, sums, strict=True) if theirs != self._partial.sums[span][0]]
        return found

    def _answer(self, sock: socket.socket, kind: Kind, view: memoryview) -> Header:
        """One frame of this kind into `view`, verified."""
        header = read_header(sock, min(self._deadline, time.monotonic() + GIVE_UP_SECONDS))
        if header.kind is not kind or header.length != len(view):
            raise FrameError("it does not answer")
        sock.settimeout(GIVE_UP_SECONDS)
        receive_into(sock, view)
        if frames.checksum(view) != header.checksum:
            raise FrameError("checksum mismatch")
        return header


def _message(me: Self, kind: Kind, payload: bytes, number: int = 0) -> bytes:
    digest, length = frames.checksum(payload), len(payload)
    header = frames.encode(kind, run=me.run, incarnation=me.incarnation, chunk=number, length=length, digest=digest)
    return header + payload


def queues(sockets: Iterable[socket.socket]) -> bool:
    """Whether packets queue on the path of these connections: it is full then, and more of them carry no more."""
    seen = [vitals(sock) for sock in sockets]
    return statistics.median(each.rtt for each in seen) > _QUEUES * min(each.shortest_rtt for each in seen)

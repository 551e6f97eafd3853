"""The face of the data plane: a Group executes attempts and decides nothing.

It keeps one link per incarnation of a peer, across attempts and rounds. What a failure means, who is left out of the
next attempt and whether there is one, is decided elsewhere; a Group only says what happened, with evidence.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from collectives import exchange, frames, patterns
from collectives.exchange import Attempt, Observer, Part
from collectives.fetching import Fetch, Partial, Progressing
from collectives.frames import FrameError, Header, Hello, Key, Kind, Purpose, Refusal
from collectives.handshake import CUT, Dialling, Porter, Self, probe
from collectives.links import Array, Link, Outgoing, Pool, Stripe
from collectives.patterns import SMALLEST
from collectives.records import (
    Abort,
    Done,
    Failed,
    Identity,
    LinkFailure,
    LinkFaults,
    Member,
    Progress,
    Start,
    Underway,
)
from collectives.shared import MAX_SLOTS
from collectives.sockets import (
    LinkOptions,
    check_congestion_control,
    evidence_of,
    format_address,
    parse_address,
)
from collectives.transfer import Blob, Library

_REMEMBERED = 256
_SERVED = 8
_SHARED_BYTES = 16 << 20  # of memory for what goes out to peers on this host, all together
_WILDCARDS = ("0.0.0.0", "::")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """One link since it was built. Bytes include headers; `state` is "up" or the evidence of its failure.

    shared: payloads that go out from here lie in memory shared with the peer. goodput: bytes/s acked while it was busy;
    rtt: seconds, the shortest lately; 0 until known. retransmits: packets sent again. redialled: stripes that were
    replaced because they were slow. slowest, fastest: of its stripes, bytes/s that they can carry; 0 until known, which
    they are on long paths only. congestion_control: of the stripes, those that differ joined by "/".
    """

    peer: str
    incarnation: int
    state: str
    stripes: int
    bytes_sent: int
    bytes_received: int
    seconds_sending: float
    stale_frames: int
    corrupt_frames: int
    shared: bool = False
    goodput: float = 0.0
    rtt: float = 0.0
    retransmits: int = 0
    redialled: int = 0
    slowest: float = 0.0
    fastest: float = 0.0
    congestion_control: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupStatistics:
    """Counts since the group was made. Totals include dead links; bytes_served went to fetchers, beside the links.

    fetchers: connections on which somebody fetches from here now. turned_away: those for which there was no room.
    """

    links: tuple[LinkStatistics, ...]
    bytes_sent: int
    bytes_received: int
    bytes_served: int
    fetchers: int
    turned_away: int
    done: int
    failed: int
    stale_frames: int
    corrupt_frames: int
    serving: int
    parked_links: int


class Group:
    """One peer's end of the data plane.

    run: name of the training job; name, incarnation: this peer and which life of it (63 bits). listen: "host:port"
    (port 0: any), several with commas between, or "" to dial out only. advertise: what others dial, if that differs,
    best first; port 0 stands for the listener's in the same place.
    observe: called from the group's threads after each received chunk; if it raises, that attempt fails.
    on_lost: called, from a thread of its own, for each link to a peer of the current view that has died, whether or
    not an attempt was using it, once the peer's port has been probed.
    faults: what is to go wrong on purpose on the way to other peers.
    """

    def __init__(
        self,
        *,
        run: str,
        name: str,
        incarnation: int,
        listen: str = "127.0.0.1:0",
        advertise: str | None = None,
        options: LinkOptions = LinkOptions(),  # noqa: B008 - frozen
        observe: Callable[[Progress], None] | None = None,
        on_lost: Callable[[LinkFailure], None] | None = None,
        faults: LinkFaults | None = None,
    ) -> None:
        _check_identity(run, name, incarnation)
        check_congestion_control(options.congestion_control)
        self.options = options
        self.pool = Pool(max(options.chunk_bytes, SMALLEST), max(1, options.pool_bytes // options.chunk_bytes))
        self._run_name = run
        self._self = Self(frames.name_hash(run), incarnation, options, faults)
        self.observer: Observer | None = observe
        self._on_lost = on_lost
        self._lock = threading.RLock()
        self._links: dict[int, Link] = {}
        self._dead: list[Link] = []
        self._known: dict[int, Member] = {}
        self._view: frozenset[int] = frozenset()
        self._retired: OrderedDict[int, None] = OrderedDict()
        self._parked: OrderedDict[int, _Parked] = OrderedDict()
        self._dials: dict[int, Dialling] = {}
        self._widening: dict[Link, Dialling] = {}
        self._diallers: set[threading.Thread] = set()
        self._fetches: set[Fetch] = set()
        self._attempts: dict[Key, Attempt] = {}
        self._aborts: OrderedDict[Key, Abort] = OrderedDict()
        self._closed = False
        self._done = self._failed = self._stale = self._corrupt = self._sent = self._received = 0
        self._library = Library(self._self, self._exchanging)
        self._porter = Porter(listen, self._self, self)
        try:
            self.addresses = _addresses(self._porter.ports, advertise)
        except ValueError:
            self._porter.stop()
            raise
        self.member = Member(name=name, incarnation=incarnation, addresses=self.addresses)
        self._porter.start()

    # Links and views.

    def connect(self, members: Iterable[Member]) -> None:
        """Name the current view. Missing links are built in the background; those to other incarnations are dropped.

        Best effort: nothing is reported from here. `run` finds out, with evidence, whether a link works.
        """
        named = {member.incarnation: member for member in members if member.incarnation != self.member.incarnation}
        with self._lock:
            self._check_open()
            dropped = self._drop_others(frozenset(named))
        for link in dropped:
            link.fail("eof", "no longer in the view")
        for member in named.values():
            self._ensure(member)

    def _drop_others(self, view: frozenset[int]) -> list[Link]:
        busy = {incarnation for attempt in self._attempts.values() for incarnation in attempt.peers}
        gone = [each for each in self._known if each not in view and each not in busy]
        for incarnation in gone:
            del self._known[incarnation]
            self._retired[incarnation] = None
        while len(self._retired) > _REMEMBERED:
            self._retired.popitem(last=False)
        self._view = view
        return [self._links[each] for each in gone if each in self._links]

    def _ensure(self, member: Member) -> Link | None:
        """The link to a member if it is up; else see to it that one is being built."""
        incarnation = member.incarnation
        with self._lock:
            self._check_open()
            self._known[incarnation] = member
            self._retired.pop(incarnation, None)
            link = self._links.get(incarnation)
            if link is not None and link.failure is None:
                return link
            parked = self._parked.pop(incarnation, None)
            if parked is None:
                if incarnation not in self._dials and self._dials_to(member):
                    self._dial(member)
                return None
        return self._establish(member, parked.sockets, parked.ident, parked=True)

    def _dials_to(self, member: Member) -> bool:
        if not member.addresses:
            return False
        mine = (self.member.name, self.member.incarnation)
        return not self.addresses or mine < (member.name, member.incarnation)

    def _dial(self, member: Member) -> None:
        options = self.options
        dialling = Dialling(self._self, member, Purpose.LINK, options.fixed_stripes, options.connect_timeout)
        thread = threading.Thread(
            target=self._dialled, args=(member, dialling), name=f"dial-{member.name}", daemon=True
        )
        self._dials[member.incarnation] = dialling
        self._diallers.add(thread)
        thread.start()

    def _dialled(self, member: Member, dialling: Dialling) -> None:
        try:
            self._build(member, dialling)
        finally:
            with self._lock:
                self._diallers.discard(threading.current_thread())

    def _build(self, member: Member, dialling: Dialling) -> None:
        failure: LinkFailure | None = None
        try:
            sockets = dialling.connect()
        except (OSError, ValueError) as error:
            evidence = evidence_of(error) if isinstance(error, OSError) else "unreachable"
            failure = LinkFailure(
                peer=member.name, incarnation=member.incarnation, evidence=evidence, detail=f"dialling: {error}"
            )
        if failure is None:
            try:
                self._establish(member, sockets, dialling.link, dialled=True)
            finally:
                with self._lock:
                    if self._dials.get(member.incarnation) is dialling:
                        del self._dials[member.incarnation]
            return
        with self._lock:
            self._dials.pop(member.incarnation, None)
            attempts = list(self._attempts.values())
        for attempt in attempts:
            attempt.unreachable(failure)

    def _establish(
        self,
        member: Member,
        sockets: list[socket.socket],
        ident: int,
        *,
        dialled: bool = False,
        parked: bool = False,
    ) -> Link | None:
        """A link of these sockets replaces any former one to the same incarnation, unless they had been parked."""
        link = Link(
            member,
            sockets,
            run=self._self.run,
            me=self.member.incarnation,
            options=self.options,
            hooks=self,
            pool=self.pool,
            ident=ident,
            dialler=dialled,
            faults=self._self.faults,
        )
        with self._lock:
            if dialled:  # not earlier: whoever finds neither a link nor a dial would dial once more
                self._dials.pop(member.incarnation, None)
            former = self._links.get(member.incarnation)
            if self._closed or (parked and former is not None and former.failure is None):
                link.reap()
                return None if self._closed else former
            self._links[member.incarnation] = link
            attempts = list(self._attempts.values())
            link.start()
        if former is not None:
            former.fail("reset", "replaced by a new connection of the same peer")
        for attempt in attempts:
            attempt.linked(link)
        return link

    # What links tell (links.Hooks).

    def route(self, link: Link, header: Header) -> Part | None:
        """Where a frame's payload goes."""
        key = header.key
        if header.kind is Kind.READY and not header.length:
            with self._lock:
                link.remember_ready(key)
                attempt = self._attempts.get(key)
            if attempt is not None:
                attempt.ready(link)
            return None
        if header.kind is Kind.CREDIT and not header.length:
            attempt = self._attempts.get(key)
            if attempt is not None:
                attempt.credited(link, header.chunk)
            return None
        if header.kind is Kind.STRIPES and not header.length:
            link.care.asked = header.chunk
            return None
        if header.kind is Kind.TRAIL and not header.length:
            return None
        if header.kind not in (Kind.SCATTER, Kind.GATHER):
            raise FrameError(f"a {header.kind.name} frame has no place on a link")
        attempt = self._attempts.get(key)
        return None if attempt is None else attempt.place(link, header)

    def lost(self, link: Link) -> None:
        """A link died: build it again where nothing was lost yet, and tell the attempts that need it."""
        incarnation = link.member.incarnation
        with self._lock:
            if self._links.get(incarnation) is link:
                del self._links[incarnation]
            self._dead.append(link)
            attempts = list(self._attempts.values())
        again = [attempt.unlink(link) for attempt in attempts]
        if any(again):
            with contextlib.suppress(ValueError):  # closed just now: nobody needs it any more
                self._ensure(link.member)
        if self._on_lost is not None and link.failure is not None:
            self._tell(self._on_lost, link.member, link.failure)
        self._porter.ring()

    def _tell(self, listener: Callable[[LinkFailure], None], member: Member, failure: LinkFailure) -> None:
        """Probes the port of a peer whose link died, attempt or no attempt, and passes on what that showed."""

        def look() -> None:
            try:
                seen = probe(self._self, member, failure)
                if not self._closed:
                    listener(seen)
            finally:
                with self._lock:
                    self._diallers.discard(threading.current_thread())

        thread = threading.Thread(target=look, name=f"look-{member.name}", daemon=True)
        with self._lock:
            if self._closed or member.incarnation not in self._view:
                return
            self._diallers.add(thread)
            thread.start()

    def slots(self) -> int:
        """Few where there are many links: all that they share stays within a few megabytes."""
        return max(1, min(MAX_SLOTS, _SHARED_BYTES // (self.options.chunk_bytes * max(1, len(self._links)))))

    # What the porter asks (handshake.House).

    def examine(self, header: Header, hello: Hello) -> tuple[Refusal, str] | None:
        """Why a HELLO is refused, or None."""
        if header.run != self._self.run:
            return Refusal.DENIED, "this port belongs to another run"
        if hello.expected != self.member.incarnation:
            return Refusal.GONE, f"incarnation {hello.expected} of {self.member.name} is over"
        if hello.purpose is Purpose.LINK and header.incarnation in self._retired:
            return Refusal.DENIED, "the view no longer contains you"
        if hello.purpose is Purpose.STRIPE:
            link = self._links.get(header.incarnation)
            if link is None or link.ident != hello.link:
                return Refusal.DENIED, "there is no such link"
        if self._is_cut(self._known.get(header.incarnation)):
            return Refusal.DENIED, CUT
        if hello.chunk_bytes != self.options.chunk_bytes:
            return Refusal.DENIED, f"chunk_bytes is {self.options.chunk_bytes} here: use the same on all members"
        return None

    def _is_cut(self, member: Member | None) -> bool:
        faults = self._self.faults
        return faults is not None and member is not None and faults.cut(member.name)

    def joined(self, incarnation: int, link: int, sock: socket.socket) -> None:
        """One more stripe for a link that is there; `examine` has seen it."""
        with self._lock:
            found = self._links.get(incarnation)
        if found is not None and found.ident == link:
            found.add(sock)
        else:
            sock.close()

    def arrived(self, incarnation: int, link: int, sockets: list[socket.socket]) -> None:
        """A link came in: use it, or keep it until somebody names that incarnation."""
        with self._lock:
            member = self._known.get(incarnation)
            if member is None:
                former = self._parked.pop(incarnation, None)
                self._parked[incarnation] = _Parked(sockets, link, time.monotonic() + self.options.parked_seconds)
                while len(self._parked) > self.options.parked_links:
                    self._parked.popitem(last=False)[1].close()
                if former is not None:
                    former.close()
                return
        self._establish(member, sockets, link)

    def fetcher(self, incarnation: int, sock: socket.socket) -> None:
        """Somebody wants to fetch."""
        self._library.serve(incarnation, sock)

    def _exchanging(self) -> bool:
        """Whether an attempt is under way."""
        return any(not attempt.finished for attempt in list(self._attempts.values()))

    def sweep(self) -> None:
        """Bury dead links, look at live ones, let go of what nobody asked for."""
        now = time.monotonic()
        with self._lock:
            dead = [link for link in self._dead if link.ended]
            links = list(self._links.values())
            for late in [each for each, parked in self._parked.items() if parked.deadline < now]:
                self._parked.pop(late).close()
            for key in [key for key, each in self._attempts.items() if each.finished and not each.serving]:
                del self._attempts[key]
        for link in links:
            try:
                if self._is_cut(link.member):
                    link.fail("reset", CUT)
                link.check_path()
                self._tend(link)
            except Exception as error:  # one link must not close the door to all others
                link.fail("reset", f"unexpected {type(error).__name__} while it was looked after: {error}")
        self._bury(dead)

    def _tend(self, link: Link) -> None:
        """Give a link the stripes that it should have. In the porter's thread."""
        if link in self._widening or link.failure is not None:
            return
        orders = link.care.look(link.vitals())
        if orders.ask:
            link.send(Outgoing(Kind.STRIPES, frames.NO_KEY, orders.ask))
        for stripe in orders.retire:
            assert isinstance(stripe, Stripe), "a link's stripes are what it is looked after by"
            link.retire(stripe)
        if orders.add and link.member.addresses:
            self._widen(link, orders.add)

    def _widen(self, link: Link, count: int) -> None:
        dialling = Dialling(self._self, link.member, Purpose.STRIPE, count, self.options.connect_timeout, link.ident)

        def work() -> None:
            try:
                for sock in dialling.connect():
                    link.add(sock, dialled=True)
            except (OSError, ValueError):
                link.care.refused()
            finally:
                with self._lock:
                    self._widening.pop(link, None)
                    self._diallers.discard(threading.current_thread())

        thread = threading.Thread(target=work, name=f"widen-{link.member.name}", daemon=True)
        with self._lock:
            if self._closed:
                return
            self._widening[link] = dialling
            self._diallers.add(thread)
            thread.start()

    def _bury(self, dead: list[Link]) -> None:
        for link in dead:
            link.reap()
            with self._lock:
                record = _link_statistics(link)
                self._sent += record.bytes_sent
                self._received += record.bytes_received
                self._stale += link.stale_frames
                self._dead = [each for each in self._dead if each is not link]
                self._corrupt += link.corrupt_frames

    # Attempts.

    def run(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Done | Failed:
        """Execute one attempt. Blocks; obeys `abort` from other threads, and Ctrl-C.

        source: flat contiguous CPU tensor of start.dtype, read only; None on a receiver and on those who get a
        broadcast. result: likewise, must not overlap source; holds the result after Done, and garbage after Failed.
        Both have start.elements, but the source of an all_gather and the result of a reduce_scatter are the member's
        own segment. Bad arguments, and a Start that cannot be executed, raise ValueError. Numbers that a wire cannot
        carry (NaN and infinities in a quantised one) end the attempt as Failed on the member that would send them.

        When a contributor with which there is work is lost, this returns Failed at once, without waiting for others;
        links that still work stay. After Failed neither tensor is touched any more. After Done on a contributor, the
        result may still be *read* for receivers until `settle` returns: do not write to it before.
        """
        numbers, out = self._check(start, source, result)
        attempt = Attempt(start, self.member, numbers, out, self)
        with self._lock:
            self._check_open()
            if attempt.key in self._attempts:
                raise ValueError(f"{start.identity} has been run here already: retry with the next attempt number")
            if (abort := self._aborts.get(attempt.key)) is not None:
                self._failed += 1
                return Failed(identity=start.identity, reason=exchange.aborted_reason(abort))
            self._attempts[attempt.key] = attempt
        whole = False
        try:
            whole = self._drive(attempt)
        finally:
            if not whole:
                self._withdraw_attempt(attempt)
        return self._succeeded(attempt) if whole else self._fail(attempt)

    def _check(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> tuple[Array | None, Array]:
        patterns.check(start, self.member, self._run_name)
        lives = [member.incarnation for member in start.contributors]
        me = lives.index(self.member.incarnation) if self.member.incarnation in lives else -1
        read = patterns.source_span(start, me)
        if (read is None) != (source is None):
            raise ValueError("contributors pass a source; receivers, and those who get a broadcast, pass source=None")
        numbers = _as_array(source, start.dtype) if source is not None else None
        out = _as_array(result, start.dtype)
        for array, span in ((numbers, read), (out, patterns.result_span(start, me))):
            if array is not None and span is not None and array.size != span[1] - span[0]:
                raise ValueError(f"the start is about {span[1] - span[0]} elements here, the tensor has {array.size}")
        if numbers is not None and numbers.size and np.may_share_memory(numbers, out):
            raise ValueError("source and result must be different memory: the source is what a retry starts from")
        return numbers, out

    def _drive(self, attempt: Attempt) -> bool:
        """Wait for the end; True if the result is whole."""
        attempt.begin()
        for peer in list(attempt.peers.values()):
            self._adopt(attempt, peer.member)
        while not attempt.settled:
            self._seek(attempt)
            with attempt.condition:
                if not attempt.settled:
                    attempt.condition.wait(self._patience(attempt))
        with attempt.condition:
            whole = attempt.reason is None and not attempt.failures
            attempt.finished = whole
        return whole

    def _patience(self, attempt: Attempt) -> float:
        """Seconds until the next contributor counts as unreachable; notes those that do already."""
        now, limit = time.monotonic(), self.options.connect_timeout
        left = 1.0
        for peer in attempt.unlinked():
            waited = now - peer.unlinked_since
            if waited >= limit:
                attempt.unreachable(self._timed_out(peer.member))
                return 0.0
            left = min(left, limit - waited, max(0.0, peer.look_at - now))
        return left

    def _timed_out(self, member: Member) -> LinkFailure:
        detail = f"no link within {self.options.connect_timeout:g} s"
        return LinkFailure(peer=member.name, incarnation=member.incarnation, evidence="timeout", detail=detail)

    def _seek(self, attempt: Attempt) -> None:
        """See what became of the links that are missing. Not under the condition: links and other attempts are told."""
        now = time.monotonic()
        for peer in attempt.unlinked():
            if now >= peer.look_at:
                peer.look_at = now + 1.0
                self._adopt(attempt, peer.member)
                self._look_for(peer.member, self._timed_out(peer.member))

    def _adopt(self, attempt: Attempt, member: Member) -> None:
        """Use the link to this member, or see to it that one is being built."""
        link = self._ensure(member)
        if link is not None:
            attempt.linked(link)

    def _look_for(self, member: Member, failure: LinkFailure) -> None:
        """Whoever should dial here and does not may be dead: its port says so long before the time is up."""
        if self._dials_to(member) or not member.addresses:
            return

        def look() -> None:
            try:
                seen = probe(self._self, member, failure)
                with self._lock:
                    attempts = list(self._attempts.values()) if seen.evidence == "refused" else []
                for attempt in attempts:
                    attempt.unreachable(seen)
            finally:
                with self._lock:
                    self._diallers.discard(threading.current_thread())

        thread = threading.Thread(target=look, name=f"look-{member.name}", daemon=True)
        with self._lock:
            if not self._closed:
                self._diallers.add(thread)
                thread.start()

    def _succeeded(self, attempt: Attempt) -> Done:
        digest = attempt.digest()
        with self._lock:
            self._done += 1
            if not attempt.serving:
                self._attempts.pop(attempt.key, None)
            served = [each for each in self._attempts.values() if each.finished]
        for old in served[:-_SERVED]:
            self._withdraw_attempt(old)
        return Done(identity=attempt.start.identity, digest=digest, record=attempt.record())

    def _fail(self, attempt: Attempt) -> Failed:
        with attempt.condition:
            failures, reason = list(attempt.failures.values()), attempt.reason
        members = {peer.member.incarnation: peer.member for peer in attempt.peers.values()}
        failures = [probe(self._self, members[each.incarnation], each) for each in failures]
        if reason is None:
            reason = "; ".join(f"link to {each.peer}: {each.evidence}" for each in failures)
        with self._lock:
            self._failed += 1
        return Failed(identity=attempt.start.identity, reason=reason, lost=tuple(failures))

    def _withdraw_attempt(self, attempt: Attempt) -> None:
        with self._lock:
            if self._attempts.get(attempt.key) is attempt:
                del self._attempts[attempt.key]
        attempt.release()

    def settle(self, identity: Identity, timeout: float) -> bool:
        """After Done: wait until the receivers have what this peer owes them; after that nobody reads the result.

        True if they have it all. False when the time was up: then the rest is not sent, and nobody reads the result
        either.
        """
        with self._lock:
            attempt = self._attempts.get(frames.key_of(identity))
        if attempt is None:
            return True
        deadline = time.monotonic() + timeout
        with attempt.condition:
            while attempt.serving and (left := deadline - time.monotonic()) > 0:
                attempt.condition.wait(min(left, 1.0))
            served = not attempt.serving
        self._withdraw_attempt(attempt)
        return served

    def abort(self, abort: Abort) -> None:
        """End an attempt, from any thread: its run() returns Failed promptly, also one that begins later.

        Links to the lives of the members in `abort.lost` that took part are cut, so that no thread stays blocked on a
        frozen one; a new life of the same name is left alone.
        """
        key = frames.key_of(abort.identity)
        with self._lock:
            self._aborts[key] = abort
            while len(self._aborts) > _REMEMBERED:
                self._aborts.popitem(last=False)
            attempt = self._attempts.get(key)
            gone = attempt.lives_of(abort.lost) if attempt is not None else frozenset()
            lost = [link for incarnation, link in self._links.items() if incarnation in gone]
        if attempt is not None:
            attempt.stop(exchange.aborted_reason(abort))
            if attempt.finished:  # only receivers were still waiting for it
                self._withdraw_attempt(attempt)
        for link in lost:
            link.fail("timeout", f"left out: {abort.reason}")

    # Blobs.

    def publish(self, key: str, parts: Sequence[memoryview | torch.Tensor], digest: str) -> None:
        """Serve an immutable blob, the parts joined, to whoever fetches it. Its memory must not change until withdrawn.

        digest: xxh3-128 of all its bytes, hexadecimal; not checked here.
        """
        self._library.publish(key, Blob(parts, digest))

    def withdraw(self, key: str) -> None:
        """Serve it no more; on return nobody reads its memory. An unknown key is no error."""
        self._library.withdraw(key)

    def wanted(self, key: str) -> bool:
        """Whether somebody is fetching it from here: it should not be withdrawn yet."""
        return self._library.wanted(key)

    def fetch(
        self,
        key: str,
        sources: Sequence[Member],
        *,
        digest: str,
        timeout: float,
        progress: Progressing | None = None,
        partial: Partial | None = None,
        into: memoryview | None = None,
    ) -> memoryview:
        """The blob under `key`, from all sources at once; goes on as long as one of them lives.

        Its bytes are the caller's, and may be written. digest: its xxh3-128, hexadecimal. timeout: seconds for all of
        it. progress: called in this thread with (bytes here, bytes in all), at most a hundred times. partial: keeps
        what has come if this fails, for a next call with the same digest, and says what each source gave; also of one
        that served wrong bytes while another had the right ones. into: memory to receive into, used if it has exactly
        the blob's size; garbage after an error.

        A source that is silent for a second has what it owes asked of others, and is given up after ten; one that dies
        or withdraws the blob is done without. FetchError when no source is left, when the time is up, or when none
        has bytes of this digest.
        """
        reachable = [source for source in sources if source.addresses]
        fixed = self.options.fixed_stripes
        with self._lock:
            self._check_open()
            fetch = Fetch(self._self, key, reachable, digest, timeout, fixed, partial, into)
            self._fetches.add(fetch)
        try:
            return fetch.run(progress)
        finally:
            with self._lock:
                self._fetches.discard(fetch)

    # The end.

    def underway(self) -> tuple[Underway, ...]:
        """The attempts that have been entered here and have not ended."""
        with self._lock:
            attempts = [attempt for attempt in self._attempts.values() if not attempt.settled]
        return tuple(attempt.underway() for attempt in attempts)

    def statistics(self) -> GroupStatistics:
        """Counts so far."""
        with self._lock:
            links = [*self._links.values(), *self._dead]
            records = tuple(_link_statistics(link) for link in links)
            return GroupStatistics(
                links=records,
                bytes_sent=self._sent + sum(record.bytes_sent for record in records),
                bytes_received=self._received + sum(record.bytes_received for record in records),
                bytes_served=self._library.bytes_served,
                fetchers=self._library.fetchers,
                turned_away=self._library.turned_away,
                done=self._done,
                failed=self._failed,
                stale_frames=self._stale + sum(link.stale_frames for link in links),
                corrupt_frames=self._corrupt + sum(link.corrupt_frames for link in links),
                serving=sum(attempt.finished for attempt in self._attempts.values()),
                parked_links=len(self._parked),
            )

    def close(self) -> None:
        """End everything: attempts fail, links say goodbye, threads are joined, sockets closed. Twice does no harm."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            attempts, fetches = list(self._attempts.values()), list(self._fetches)
            dials, threads = [*self._dials.values(), *self._widening.values()], list(self._diallers)
        for attempt in attempts:
            attempt.stop("the group was closed")
        for fetch in fetches:
            fetch.stop()
        for dialling in dials:
            dialling.stop()
        for thread in threads:
            thread.join()
        self._porter.stop()
        self._library.close()
        with self._lock:
            links = list(self._links.values())
            for parked in self._parked.values():
                parked.close()
            self._parked.clear()
        for link in links:
            link.close()
        for attempt in attempts:
            self._withdraw_attempt(attempt)
        with self._lock:
            dead = list(self._dead)
        self._bury(dead)

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this group is closed")


@dataclass(slots=True)
class _Parked:
    """A link of an incarnation that nobody has named yet."""

    sockets: list[socket.socket]
    ident: int
    deadline: float

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()


def _as_array(tensor: torch.Tensor, dtype: str) -> Array:
    """The tensor's memory as a numpy array; ValueError unless it is flat, contiguous, of that dtype, on the CPU."""
    flat = tensor.detach()
    wanted = getattr(torch, dtype)
    if flat.device.type != "cpu" or flat.dtype != wanted or flat.dim() != 1 or not flat.is_contiguous():
        raise ValueError(
            f"tensors must be flat, contiguous {dtype} on the CPU, got {flat.dtype} of shape {tuple(flat.shape)} on "
            f"{flat.device}: pass tensor.detach().to('cpu', torch.{dtype}).contiguous().view(-1)"
        )
    array: Array = flat.numpy()
    return array


def _link_statistics(link: Link) -> LinkStatistics:
    stripes = (*link.stripes, *link.retired)
    rates = [stripe.rate for stripe in link.stripes if stripe.rate and not stripe.retiring]
    return LinkStatistics(
        peer=link.member.name,
        incarnation=link.member.incarnation,
        state="up" if link.failure is None else link.failure.evidence,
        stripes=len(link.stripes),
        bytes_sent=sum(stripe.bytes_sent for stripe in stripes),
        bytes_received=sum(stripe.bytes_received for stripe in stripes),
        seconds_sending=sum(stripe.seconds_sending for stripe in stripes),
        stale_frames=link.stale_frames,
        corrupt_frames=link.corrupt_frames,
        shared=link.sharing.usable,
        goodput=link.care.gauge.goodput,
        rtt=link.care.gauge.rtt,
        retransmits=link.retransmits,
        redialled=link.care.redialled,
        slowest=min(rates, default=0.0),
        fastest=max(rates, default=0.0),
        congestion_control=link.congestion_control,
    )


def _check_identity(run: str, name: str, incarnation: int) -> None:
    if not run or not name:
        raise ValueError("a group needs the name of its run and of its peer")
    if not 0 < incarnation < 1 << 63:
        raise ValueError(f"incarnation {incarnation} is not a positive 63-bit number: use secrets.randbits(63)")


def _addresses(ports: Sequence[tuple[str, int]], advertise: str | None) -> tuple[str, ...]:
    """What others dial: port 0 stands for that of the listener in the same place, or of the first."""
    if not ports:
        if advertise is not None:
            raise ValueError("advertise needs a listener: pass listen='host:port', or leave advertise out")
        return ()
    named = [parse_address(each.strip()) for each in advertise.split(",")] if advertise is not None else list(ports)
    found = []
    for index, (host, number) in enumerate(named):
        if host in _WILDCARDS:
            raise ValueError(f"nobody can dial {host}: pass advertise='host:port' with the address that others reach")
        found.append(format_address(host, number or ports[index if len(named) == len(ports) else 0][1]))
    return tuple(found)

"""The doctor that others visit, one at a time: it answers, dials back, takes data and gives some.

One thread watches the port, and never waits for anybody; the visit has a thread of its own. Whatever does not greet
like a doctor is closed, in bounded time and number.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import queue
import selectors
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from collectives.sockets import LinkOptions, evidence_of, format_address, listen_on, parse_address, remaining, shut

from ..messages import MessageError
from .facts import Side
from .flood import drink, pour
from .judging import mbit
from .pairing import (
    ANSWER_SECONDS,
    DATA,
    DIAL_SECONDS,
    GREETING_BYTES,
    GREETING_SECONDS,
    KEY_BYTES,
    KNOCK,
    MAGIC,
    MOST_CONNECTIONS,
    MOST_DIALLED,
    VISIT,
    Begin,
    Bye,
    DialBack,
    DialledBack,
    Door,
    Greeting,
    Hello,
    Line,
    Measure,
    Ping,
    Pong,
    Ready,
    Sorry,
    Tally,
    Welcome,
    beating,
    dial,
    made_ready,
    options_for,
    proof,
)

IDLE_SECONDS, VISIT_SECONDS = 30.0, 900.0
MOST_GUESTS = 2 * MOST_CONNECTIONS  # connections that have not greeted yet
LOOK_SECONDS = 0.2
STRANGER = "stranger"


@dataclass(slots=True)
class _Guest:
    """A connection that has not greeted yet."""

    where: str
    until: float
    said: bytearray = field(default_factory=bytearray)


class Host:
    """Listens on "host:port" from the start; OSError or ValueError if it cannot. told: a line for each visit."""

    def __init__(self, address: str, side: Side, told: Callable[[str], None]) -> None:
        self._listener = listen_on(address, LinkOptions())
        self._side, self._told = side, told
        self._guests: dict[socket.socket, _Guest] = {}
        self._visit: _Visit | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def address(self) -> str:
        host, port = self._listener.getsockname()[:2]
        return format_address(host, port)

    def serve(self, stop: threading.Event) -> None:
        """Until then; a visit that is under way is cut off."""
        while not stop.is_set():
            for key, _ in self._selector.select(LOOK_SECONDS):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.fileobj)  # type: ignore[arg-type]
            now = time.monotonic()
            for sock in [sock for sock, guest in self._guests.items() if guest.until < now]:
                self._release(sock).close()

    def close(self) -> None:
        if self._visit is not None:
            self._visit.close()
        for sock in list(self._guests):
            self._release(sock).close()
        self._selector.close()
        self._listener.close()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        try:
            sock, where = self._listener.accept()
        except OSError:  # it is gone again, or there are too many open files
            return
        if len(self._guests) >= MOST_GUESTS:
            sock.close()
            return
        sock.setblocking(False)
        self._guests[sock] = _Guest(str(where[0]), time.monotonic() + GREETING_SECONDS)
        self._selector.register(sock, selectors.EVENT_READ)

    def _release(self, sock: socket.socket) -> socket.socket:
        del self._guests[sock]
        self._selector.unregister(sock)
        return sock

    def _read(self, sock: socket.socket) -> None:
        said = self._guests[sock].said
        try:
            part = sock.recv(GREETING_BYTES - len(said))
        except BlockingIOError:
            return
        except OSError:
            part = b""
        said += part
        if not part or not (said.startswith(MAGIC) or MAGIC.startswith(bytes(said))):
            self._release(sock).close()
        elif len(said) == GREETING_BYTES:
            where = self._guests[sock].where
            self._receive(self._release(sock), where, bytes(said))

    def _receive(self, sock: socket.socket, where: str, said: bytes) -> None:
        visit = self._visit if self._visit is not None and self._visit.going else None
        try:
            greeting = Greeting.unpack(said)
        except MessageError as error:
            _turn_away(sock, str(error))
            return
        if greeting.purpose == VISIT and visit is None:
            self._visit = _Visit(sock, where, self._side, self._told)
        elif greeting.purpose == VISIT:
            _turn_away(sock, f"I have a visitor, {visit.where if visit else ''}; come again in some minutes")
        elif greeting.purpose == DATA and visit is not None and visit.expects(greeting.key):
            visit.arrived.put((greeting.number, sock))
        else:
            sock.close()


def _turn_away(sock: socket.socket, reason: str) -> None:
    with contextlib.suppress(OSError), sock:
        Line(sock, beaten=False).say(Sorry(reason=reason), LOOK_SECONDS)


class _Visit:
    """One visitor, in a thread. arrived: connections with the numbers of their measurements. going: it is not over."""

    going = True

    def __init__(self, sock: socket.socket, where: str, side: Side, told: Callable[[str], None]) -> None:
        self.key, self.where = os.urandom(KEY_BYTES), where
        self.arrived: queue.SimpleQueue[tuple[int, socket.socket]] = queue.SimpleQueue()
        self._sock, self._side, self._told = sock, side, told
        self._line = Line(sock, beaten=False)
        self._sockets: list[socket.socket] = []
        self._closing = False
        self._measured, self._most, self._reached = 0, 0.0, ""
        self._thread = threading.Thread(target=self._run, name="elastic-doctor-visit", daemon=True)
        self._thread.start()

    def expects(self, key: bytes) -> bool:
        """Whether a connection with this key may be taken in."""
        return hmac.compare_digest(key, self.key) and self.arrived.qsize() < MOST_CONNECTIONS

    def close(self) -> None:
        """Cuts it off."""
        self._closing = True
        self.arrived.put((-1, self._sock))
        for sock in [self._sock, *self._sockets]:
            shut(sock)
        self._thread.join()

    def _run(self) -> None:
        began, how = time.monotonic(), ""
        with self._sock:
            try:
                with beating(self._line):
                    self._serve(began + VISIT_SECONDS)
            except (OSError, MessageError) as error:
                how = f"; it ended early: {error}"
            finally:
                self._drop_arrived()
                self.going = False
        best = f", {mbit(self._most)} from there at the best" if self._most else ""
        seconds = time.monotonic() - began
        self._told(f"{self.where}: {self._measured} measurements in {seconds:.0f} s{best}{self._reached}{how}")

    def _serve(self, until: float) -> None:
        self._line.say(Welcome(key=self.key, seen=self.where, side=self._side))
        self._line.hear(Hello)
        while True:
            match self._line.hear_any((Ping, DialBack, Measure, Bye), min(IDLE_SECONDS, remaining(until))):
                case Ping():
                    received = time.time()
                    self._line.say(Pong(received=received, answered=time.time()))
                case DialBack() as order:
                    self._dial_back(order.doors)
                case Measure() as order:
                    self._measure(order)
                case _:
                    return

    def _dial_back(self, doors: tuple[Door, ...]) -> None:
        evidence = knock_at(doors)
        reached = [door.address for door, why in zip(doors, evidence, strict=True) if not why]
        self._reached = (
            f"; it can be dialled at {', '.join(reached)}" if reached else "; it cannot be dialled from here"
        )
        self._line.say(DialledBack(evidence=evidence))

    def _measure(self, order: Measure) -> None:
        if order.control and order.control not in self._side.usable:
            self._line.say(Sorry(reason=f"{order.control} is not to be had here"))
            return
        self._line.say(Ready())
        self._sockets = self._gather(order)
        try:
            if len(self._sockets) < order.connections:
                reason = f"{len(self._sockets)} of {order.connections} connections have come through"
                self._line.say(Sorry(reason=reason))
                return
            self._line.say(self._flood(order))
            self._measured += 1
        finally:
            for sock in self._sockets:
                sock.close()
            self._sockets = []

    def _flood(self, order: Measure) -> Tally:
        ready = [made_ready(sock, options_for(order.control)) for sock in self._sockets]
        self._line.say(Begin())
        if order.up:
            rate = drink(ready, order.seconds)
            self._most = max(self._most, rate)
            return Tally(rate=rate)
        return Tally(**pour(ready, order.seconds)._asdict())

    def _gather(self, order: Measure) -> list[socket.socket]:
        """The connections of this measurement, as far as they come; of others, none."""
        deadline, found = time.monotonic() + ANSWER_SECONDS, list[socket.socket]()
        while len(found) < order.connections:
            try:
                number, sock = self.arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return found
            if self._closing:
                raise ConnectionAbortedError("this doctor ends")
            if number == order.number:
                found.append(sock)
            else:
                sock.close()
        return found

    def _drop_arrived(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self.arrived.get_nowait()[1].close()


def knock_at(doors: tuple[Door, ...]) -> tuple[str, ...]:
    """For each door "" if who has named it is behind it, else why not."""
    pool = ThreadPoolExecutor(MOST_DIALLED, "elastic-doctor-dial")
    deadline = time.monotonic() + DIAL_SECONDS + 1
    calls = [pool.submit(_knock, door) for door in doors]
    evidence = []
    for each in calls:
        try:
            evidence.append(each.result(max(0.0, deadline - time.monotonic())))
        except TimeoutError:  # a name that nobody looks up
            evidence.append("timeout")
    pool.shutdown(wait=False, cancel_futures=True)
    return tuple(evidence)


def _knock(door: Door) -> str:
    try:
        host, port = parse_address(door.address)
        with dial(host, port, Greeting(KNOCK, door.key), LinkOptions(), DIAL_SECONDS / 2) as sock:
            answer = sock.recv(KEY_BYTES, socket.MSG_WAITALL)
        return "" if hmac.compare_digest(answer, proof(door.key)) else STRANGER
    except ValueError:
        return "unreachable"
    except OSError as error:
        return evidence_of(error)

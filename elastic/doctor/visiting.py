"""Visits the doctor of another machine: how far it is, what gets through, and whether it can dial back."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from collectives.sockets import LinkOptions, evidence_of, format_address, listen_on, parse_address

from ..config import is_loopback
from ..errors import TransportError
from ..messages import MessageError
from .calling import WHY
from .facts import Dialled, Machine, Pair, Sample, Side
from .facts import Ping as Pinged
from .flood import PATIENCE, drink, pour
from .judging import controls, mbit, settled
from .machine import side
from .pairing import (
    ANSWER_SECONDS,
    DATA,
    DIAL_SECONDS,
    GREETING_BYTES,
    KEY_BYTES,
    KNOCK,
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
    Refused,
    Tally,
    Welcome,
    dial,
    made_ready,
    options_for,
    proof,
)

COUNTS = (1, 2, 4, 8, 16, 32)
PINGS = 20
CONNECT_SECONDS = 5.0
LISTEN_SECONDS = 6.0  # for what TCP repeats by itself, less and less often
_SEGMENTS_IN = struct.Struct("=140xI")  # of struct tcp_info


def visit(address: str, machine: Machine, seconds: float, told: Callable[[str], None]) -> Pair:
    """seconds: of each measurement. told: a line for each.

    TransportError if there is no doctor at "host:port", or it has no time. What breaks later is a fact like others.
    """
    with _Visitor(address, side(machine)) as visitor:
        try:
            visitor.ping()
            visitor.be_dialled(machine)
            visitor.measure(seconds, told)
            visitor.say_goodbye()
        except (OSError, MessageError) as error:
            visitor.broke(error)
        return visitor.pair()


class _Visitor:
    def __init__(self, address: str, here: Side) -> None:
        self._address, self._here = address, here
        self._host, self._port = parse_address(address)
        self._sock = self._dial()
        try:
            self._line = Line(self._sock, beaten=True)
            self._welcome = self._come_in()
        except BaseException:
            self._sock.close()
            raise
        self._local = _plain(self._sock.getsockname()[0])
        self._pings: list[Pinged] = []
        self._listening: str | None = None
        self._promised = False
        self._dialled: tuple[Dialled, ...] = ()
        self._samples: list[Sample] = []
        self._refused: list[str] = []
        self._broken = self._cut = ""
        self._number = 0

    def __enter__(self) -> _Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def _dial(self) -> socket.socket:
        try:
            return dial(self._host, self._port, Greeting(VISIT), LinkOptions(), CONNECT_SECONDS)
        except OSError as error:
            raise TransportError(
                f"no doctor at {self._address}: {WHY[evidence_of(error)]}; on that machine, run "
                f"elastic doctor --serve 0.0.0.0:{self._port}"
            ) from None

    def _come_in(self) -> Welcome:
        try:
            welcome = self._line.hear(Welcome)
            self._line.say(Hello(side=self._here))
        except Refused as error:
            raise TransportError(f"the doctor at {self._address} says: {error}") from None
        except (OSError, MessageError) as error:
            raise TransportError(f"what answers at {self._address} is no doctor of this release: {error}") from None
        return welcome

    def pair(self) -> Pair:
        return Pair(
            address=self._address,
            here=self._here,
            there=self._welcome.side,
            local=self._local,
            seen=_plain(self._welcome.seen),
            pings=tuple(self._pings),
            listening=self._listening,
            promised=self._promised,
            dialled=self._dialled,
            samples=tuple(self._samples),
            refused=tuple(self._refused),
            broken=self._broken,
            cut=self._cut,
        )

    def ping(self) -> None:
        for _ in range(PINGS):
            sent, began = time.time(), time.monotonic()
            self._line.say(Ping())
            pong = self._line.hear(Pong)
            seconds = time.monotonic() - began
            self._pings.append(Pinged(seconds=seconds, sent=sent, received=pong.received, answered=pong.answered))

    def be_dialled(self, machine: Machine) -> None:
        if machine.listen == "":
            return
        wildcard = "[::]:0" if ":" in self._local else "0.0.0.0:0"
        try:
            bell = Doorbell((machine.listen or wildcard).split(",")[0].strip())
        except (OSError, ValueError) as error:
            self._listening = getattr(error, "strerror", None) or str(error)
            return
        self._listening, self._promised = "", bool(machine.advertise)
        with bell:
            doors = bell.doors(offers(machine, self._local, _plain(self._welcome.seen), *bell.address))
            self._line.say(DialBack(doors=doors))
            evidence = self._line.hear(DialledBack, DIAL_SECONDS + ANSWER_SECONDS).evidence
        if len(evidence) != len(doors):
            raise MessageError(f"{len(evidence)} answers about {len(doors)} addresses")
        pairs = zip(doors, evidence, strict=True)
        self._dialled = tuple(Dialled(address=door.address, evidence=why) for door, why in pairs)

    def measure(self, seconds: float, told: Callable[[str], None]) -> None:
        for control in controls(self._here, self._welcome.side):
            for count in COUNTS:
                for up in (True, False):
                    told(self._tried(up, control, count, seconds))
                if all(settled(self._rates(up, control)) for up in (True, False)):
                    break

    def _rates(self, up: bool, control: str) -> list[float]:
        return [each.rate for each in self._samples if (each.up, each.control) == (up, control)]

    def _tried(self, up: bool, control: str, count: int, seconds: float) -> str:
        where = "to there" if up else "from there"
        what = f"{where}, {count} connection{'s' if count > 1 else ''}{f', {control}' if control else ''}"
        try:
            sample = self._sample(up, control, count, seconds)
        except Refused as error:
            self._refused.append(f"{what}: {error}")
            return self._refused[-1]
        self._samples.append(sample)
        return f"{what}: {mbit(sample.rate)}"

    def _sample(self, up: bool, control: str, count: int, seconds: float) -> Sample:
        self._number += 1
        options = options_for(control)
        order = Measure(number=self._number, up=up, connections=count, seconds=seconds, control=control)
        self._line.say(order)
        self._line.hear(Ready)
        sockets = self._connections(count, options)
        with contextlib.ExitStack() as stack:
            for sock in sockets:
                stack.enter_context(sock)
            self._line.hear(Begin, 2 * ANSWER_SECONDS)
            ready = [made_ready(sock, options) for sock in sockets]
            poured = pour(ready, seconds) if up else None
            rate = 0.0 if up else drink(ready, seconds)
        tally = self._line.hear(Tally, seconds + PATIENCE + ANSWER_SECONDS)
        sent, resent, mtu = poured or (tally.sent, tally.resent, tally.mtu)
        known = {"sent": sent, "resent": resent, "mtu": mtu}
        return Sample(up=up, control=control, connections=count, rate=tally.rate if up else rate, **known)

    def _connections(self, count: int, options: LinkOptions) -> list[socket.socket]:
        """As many as come through; the host says if those are too few."""
        greeting = Greeting(DATA, self._welcome.key, self._number)
        found: list[socket.socket] = []

        def add(_: int) -> None:
            with contextlib.suppress(OSError):
                found.append(dial(self._host, self._port, greeting, options, CONNECT_SECONDS))

        with ThreadPoolExecutor(count, "elastic-doctor-dial") as pool:
            list(pool.map(add, range(count)))
        return found

    def say_goodbye(self) -> None:
        self._line.say(Bye())

    def broke(self, error: OSError | ValueError) -> None:
        """Which direction is lost: what the other side repeats, since it hears nothing, still arrives or does not."""
        self._broken = str(error) or type(error).__name__
        if isinstance(error, TimeoutError):
            before, deadline = _segments_in(self._sock), time.monotonic() + LISTEN_SECONDS
            while _segments_in(self._sock) == before and time.monotonic() < deadline:
                time.sleep(0.05)
            self._cut = "from" if _segments_in(self._sock) == before else "to"


def _segments_in(sock: socket.socket) -> int:
    """How many have arrived on this connection, also such as bring nothing new."""
    try:
        data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGMENTS_IN.size)
        return int(_SEGMENTS_IN.unpack(data)[0])
    except (OSError, struct.error):
        return 0


def _plain(host: str) -> str:
    """An IPv4 address as such, whatever socket it was seen on."""
    return host.removeprefix("::ffff:") if "." in host else host


def offers(machine: Machine, local: str, seen: str, host: str, port: int) -> list[str]:
    """HOST:PORT of each address by which this machine might be dialled, the likeliest first.

    local, seen: its address on the way to the other machine, as known on this side and on that. host, port: where it
    listens.
    """
    named = []
    for each in machine.advertise.split(",") if machine.advertise else ():
        with contextlib.suppress(ValueError):  # a flaw that is told elsewhere
            other, its_port = parse_address(each.strip())
            named.append(format_address(other, its_port or port))
    return list(dict.fromkeys([*named, *(format_address(each, port) for each in _hosts(machine, local, seen, host))]))[
        :MOST_DIALLED
    ]


def _hosts(machine: Machine, local: str, seen: str, host: str) -> Iterable[str]:
    if host not in ("0.0.0.0", "::"):
        return [host]
    own = [each for interface in machine.interfaces if interface.up for each in interface.addresses]
    far = [each for each in own if not is_loopback(each)]
    return [each for each in [local, *far, seen] if ":" not in each or host == "::"]


class Doorbell:
    """A listener that answers whoever knocks with a key of its own, one after the other, in a thread."""

    def __init__(self, address: str) -> None:
        self._listener = listen_on(address, LinkOptions())
        self._listener.settimeout(0.1)
        self._keys: set[bytes] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="elastic-doctor-bell", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def doors(self, addresses: Iterable[str]) -> tuple[Door, ...]:
        """Each with a key of its own."""
        made = tuple(Door(address=each, key=os.urandom(KEY_BYTES)) for each in addresses)
        self._keys.update(door.key for door in made)
        return made

    def __enter__(self) -> Doorbell:
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._listener.close()

    def _answer(self) -> None:
        while not self._over.is_set():
            with contextlib.suppress(OSError, MessageError):  # nobody came, or a stranger
                sock, _ = self._listener.accept()
                with sock:
                    sock.settimeout(DIAL_SECONDS / 4)
                    greeting = Greeting.unpack(sock.recv(GREETING_BYTES, socket.MSG_WAITALL).ljust(GREETING_BYTES))
                    if greeting.purpose == KNOCK and greeting.key in self._keys:
                        sock.sendall(proof(greeting.key))

"""Faults on purpose, counted: what a test or a drill asks for, a process does to itself, and says so.

`Injector` holds the faults that are armed in one process. The code that they befall asks it at a few points (an inner
step, a contribution, a frame that goes out, a connection that is to come up, a write to disk); without a fault each of
these costs one look at an empty tuple. Every firing is counted and noted before it strikes, so that a test can assert
that it fired, even though the process did not survive it. `orders.py` lets another process arm them.

`strike` is older and sharper: one kill or freeze at an exact point in the middle of an exchange.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from collectives.records import Interference, Progress

SIGNALS = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP}
ANY = "any"
PROCESS, STEP, CONTRIBUTION, LINK, DISK = "process", "step", "contribution", "link", "disk"
_LEAST_HOLD = 1e-4  # seconds that are worth sleeping for


@dataclass(frozen=True, slots=True)
class Kind:
    """What a kind of fault befalls. lasting: all of it while the fault lasts; else so many of them (`Fault.times`).

    needs, takes: fields of `Fault` that must or may be given beside at, round, and (`paused` aside) seconds, times.
    paused: `seconds` is how long it stands still, each time.
    """

    place: str
    does: str
    lasting: bool = False
    paused: bool = False
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


KINDS = {
    "kill": Kind(PROCESS, "SIGKILL"),
    "freeze": Kind(PROCESS, "SIGSTOP, and SIGCONT from outside after so many seconds", paused=True, needs=("seconds",)),
    "hang": Kind(STEP, "the training thread stands still for so many seconds", paused=True, needs=("seconds",)),
    "slow": Kind(STEP, "inner steps take factor times as long", lasting=True, needs=("factor",)),
    "nan": Kind(CONTRIBUTION, "a contribution is NaN throughout"),
    "scale": Kind(CONTRIBUTION, "a contribution is multiplied by factor", needs=("factor",)),
    "flip": Kind(CONTRIBUTION, "a contribution has the other sign"),
    "delay": Kind(LINK, "each frame is held back for delay seconds", lasting=True, needs=("delay",), takes=("peer",)),
    "slow-link": Kind(LINK, "frames take factor times as long", lasting=True, needs=("factor",), takes=("peer",)),
    "drop": Kind(LINK, "the link breaks in the middle of a frame", takes=("peer",)),
    "corrupt": Kind(LINK, "a bit of a frame is flipped after its checksum was made", takes=("peer",)),
    "partition": Kind(LINK, "connections break, and none come up", lasting=True, takes=("peer",)),
    "full-disk": Kind(DISK, "writes fail with ENOSPC", lasting=True),
}
_FIELDS = ("factor", "delay", "peer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, as plain data.

    kind: a key of KINDS. id: by which its firings are counted; the injector makes one up if there is none.
    at: seconds after it was armed; or round: once the outer loop holds this version, for which it waits.
    seconds: how long it lasts; of a freeze or a hang, how long that stands still. times: how often it fires at most;
    without either, kinds that are not lasting fire once.
    factor: of slow and slow-link, above 1; of scale, any. delay: seconds. peer: at the other end of the link, or "any".
    Raises ValueError, in one line, for what cannot be.
    """

    kind: str
    id: str = ""
    at: float = 0.0
    round: int | None = None
    seconds: float | None = None
    times: int | None = None
    factor: float | None = None
    delay: float | None = None
    peer: str = ANY

    def __post_init__(self) -> None:
        if not (isinstance(self.kind, str) and self.kind in KINDS):
            raise ValueError(f"kind {self.kind!r} is not one of {', '.join(KINDS)}")
        self._check_fields()
        self._check_time()
        self._check_values()

    @property
    def about(self) -> Kind:
        return KINDS[self.kind]

    @property
    def lasts(self) -> float:
        """Seconds from when it begins until it fires no more."""
        return math.inf if self.seconds is None or self.about.paused else self.seconds

    @property
    def at_most(self) -> float:
        """How often it fires."""
        momentary = not self.about.lasting and self.lasts == math.inf
        return self.times if self.times is not None else 1 if momentary else math.inf

    def _check_fields(self) -> None:
        kind = self.about
        for name in kind.needs:
            if getattr(self, name) is None:
                raise ValueError(f"a {self.kind} fault needs {name}: {kind.does}")
        given = [name for name in _FIELDS if getattr(self, name) not in (None, ANY)]
        for name in given:
            if name not in (*kind.needs, *kind.takes):
                raise ValueError(f"{name} has no place in a {self.kind} fault: {kind.does}")
        if kind.place == PROCESS and self.times not in (None, 1):
            raise ValueError(f"a {self.kind} fault fires once, not {self.times} times")
        if kind.lasting and self.seconds is None and self.times is None:
            raise ValueError(f"a {self.kind} fault needs seconds or times: it would never end")

    def _check_time(self) -> None:
        if not (_is_number(self.at) and self.at >= 0):
            raise ValueError(f"at is {self.at!r}: it must be at least 0 seconds")
        if self.round is not None and not (_is_whole(self.round) and self.round >= 0 and not self.at):
            raise ValueError(
                f"round is {self.round!r}: it must be a whole number of at least 0, and stands instead of at"
            )
        if self.times is not None and not (_is_whole(self.times) and self.times >= 1):
            raise ValueError(f"times is {self.times!r}: it must be a whole number of at least 1")

    def _check_values(self) -> None:
        for name in ("seconds", "delay"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value > 0):
                raise ValueError(f"{name} is {value!r}: it must be a number above 0")
        if self.factor is not None:
            low = -math.inf if self.kind == "scale" else 1
            if not (_is_number(self.factor) and self.factor > low):
                raise ValueError(
                    f"factor is {self.factor!r}: of a {self.kind} fault, it must be a number above {low:g}"
                )
        if not (isinstance(self.peer, str) and self.peer):
            raise ValueError(f"peer is {self.peer!r}: it must be the name of a peer, or {ANY!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """A fault fired. count: how often by now. detail: whom or what it befell; plain values."""

    fault: Fault
    count: int
    detail: dict[str, Any]

    @property
    def told(self) -> dict[str, Any]:
        return {"id": self.fault.id, "kind": self.fault.kind, "count": self.count, **self.detail}


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultStatistics:
    """armed: whether it can still fire."""

    fault: Fault
    fired: int
    armed: bool


@dataclass(slots=True, eq=False)
class _Armed:
    fault: Fault
    begins: float
    fired: int = 0

    def due(self, now: float) -> bool:
        return self.begins <= now < self.begins + self.fault.lasts

    def spent(self, now: float) -> bool:
        return self.fired >= self.fault.at_most or now >= self.begins + self.fault.lasts


@dataclass(slots=True)
class Injector:
    """The faults of one process. Thread-safe; all its methods may be called from any thread.

    peer: whose process this is. log: a file to which every firing is appended, in one write.

    It is a `collectives.records.LinkFaults`, which a `Group` asks; `elastic.Peer(faults=...)` asks it all the rest.
    """

    peer: str = ""
    log: Path | None = None
    _listeners: list[Callable[[Firing], None]] = field(default_factory=list)
    _armed: tuple[_Armed, ...] = ()
    _known: dict[str, _Armed] = field(default_factory=dict)
    _round: int = -1
    _owed: dict[str, float] = field(default_factory=dict)
    _closed: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    # --- from whoever wants faults ------------------------------------------------------------------------------------

    def arm(self, fault: Fault) -> str:
        """Returns the id by which it is counted. ValueError if that is in use.

        A process fault needs a round: by time, whoever knows the process sends it a signal from outside (`orders.py`).
        """
        if fault.about.place == PROCESS and fault.round is None:
            raise ValueError(f"a {fault.kind} fault by time is sent from outside; give it a round, or use strike()")
        with self._changed:
            if fault.id in self._known:
                raise ValueError(f"a fault with id {fault.id!r} is armed already, or was")
            number = len(self._known) + 1
            named = fault if fault.id else _with_id(fault, f"{fault.kind}-{number}")
            now = time.monotonic()
            begins = now + fault.at if fault.round is None or fault.round <= self._round else math.inf
            armed = self._known[named.id] = _Armed(named, begins)
            self._armed = (*self._armed, armed)
        return named.id

    def disarm(self, id: str | None = None) -> None:
        """This fault, or all of them, fire no more; who stands still goes on."""
        with self._changed:
            self._armed = tuple(each for each in self._armed if id not in (None, each.fault.id))
            for each in self._known.values():
                if id in (None, each.fault.id):
                    each.begins = -math.inf  # whoever hangs by it sees that
            self._changed.notify_all()

    def listen(self, listener: Callable[[Firing], None]) -> None:
        """It is called with each firing (of lasting kinds, with the first), before that strikes; from any thread."""
        self._listeners.append(listener)

    def close(self) -> None:
        """Disarms all; nobody stands still any more."""
        self._closed = True
        self.disarm()

    @property
    def fired(self) -> dict[str, int]:
        """How often each fault has fired, by id; 0 for what has not."""
        with self._changed:
            return {id: armed.fired for id, armed in self._known.items()}

    def statistics(self) -> tuple[FaultStatistics, ...]:
        """In the order in which they were armed."""
        with self._changed:
            now = time.monotonic()
            return tuple(
                FaultStatistics(fault=each.fault, fired=each.fired, armed=each in self._armed and not each.spent(now))
                for each in self._known.values()
            )

    # --- from the code that they befall -------------------------------------------------------------------------------

    def reached(self, round: int) -> None:
        """The outer loop holds this version. Kills and freezes that waited for it strike now."""
        self._round = round
        if not self._armed:
            return
        with self._changed:
            for each in self._armed:
                if each.begins == math.inf and each.fault.round is not None and each.fault.round <= round:
                    each.begins = time.monotonic()
        for fault in self._take(PROCESS, round=round):
            os.kill(os.getpid(), SIGNALS[fault.kind])

    def stepped(self, seconds: float) -> None:
        """An inner step took so long; returns when it has taken long enough."""
        if not self._armed:
            return
        for fault in self._take(STEP):
            self._stand_still(
                fault, fault.seconds or 0.0 if fault.kind == "hang" else (fault.factor or 1.0) * seconds - seconds
            )

    def entered(self) -> None:
        """A collective is entered outside of outer loops; returns when a hang is over."""
        if not self._armed:
            return
        for fault in self._take(STEP, ("hang",)):
            self._stand_still(fault, fault.seconds or 0.0)

    def contribution(self) -> float | None:
        """What a contribution that goes out is to be multiplied by; None if nothing befalls it."""
        if not self._armed:
            return None
        wrong = {"nan": math.nan, "flip": -1.0}
        factors = [wrong.get(fault.kind, fault.factor) or 0.0 for fault in self._take(CONTRIBUTION)]
        return math.prod(factors) if factors else None

    def check_disk(self, what: str) -> None:
        """Something is about to be written. Raises OSError(ENOSPC) if there is no room for it."""
        if self._armed and self._take(DISK, what=what):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (on purpose)")

    def cut(self, peer: str) -> bool:
        """LinkFaults: whether there is no path to this peer."""
        return bool(self._armed and self._take(LINK, ("partition",), to=peer))

    def sending(self, peer: str, nbytes: int) -> Interference | None:
        """LinkFaults: what befalls a frame with so many bytes of numbers."""
        if not self._armed:
            return None
        owed = self._owed.get(peer, 0.0)
        kinds = ["delay", "partition"] + ["slow-link"] * (owed >= _LEAST_HOLD) + ["drop", "corrupt"] * (nbytes > 0)
        faults = self._take(LINK, kinds, to=peer)
        if not faults:
            return None
        found = {fault.kind for fault in faults}
        return Interference(
            hold=sum(fault.delay or 0.0 for fault in faults)
            + (self._owed.pop(peer, 0.0) if "slow-link" in found else 0.0),
            corrupt="corrupt" in found,
            broken=bool(found & {"drop", "partition"}),
        )

    def sent(self, peer: str, seconds: float) -> None:
        """LinkFaults: a frame has left, which took so long."""
        if not self._armed:
            return
        now = time.monotonic()
        slow = [
            each.fault for each in self._armed if each.due(now) and _befalls(each.fault, LINK, ("slow-link",), peer)
        ]
        if slow:
            self._owed[peer] = self._owed.get(peer, 0.0) + seconds * (
                math.prod(each.factor or 1.0 for each in slow) - 1
            )

    # --- what is common to all ----------------------------------------------------------------------------------------

    def _take(self, place: str, kinds: Iterable[str] = (), to: str = "", **detail: Any) -> list[Fault]:
        """Those that strike here and now: counted, and noted."""
        now = time.monotonic()
        with self._changed:
            due = [each for each in self._armed if each.due(now) and _befalls(each.fault, place, kinds, to)]
            for each in due:
                each.fired += 1
            self._armed = tuple(each for each in self._armed if not each.spent(now))
            detail |= {"to": to} if to else {}
            firings = [Firing(fault=each.fault, count=each.fired, detail=detail) for each in due]
        for firing in firings:
            self._tell(firing)
        return [firing.fault for firing in firings]

    def _tell(self, firing: Firing) -> None:
        if self.log is not None:
            note(self.log, peer=self.peer, **firing.told)
        if firing.count == 1 or not firing.fault.about.lasting:
            for listener in list(self._listeners):
                listener(firing)

    def _stand_still(self, fault: Fault, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        with self._changed:
            armed = self._known[fault.id]
            while not self._closed and armed.begins > -math.inf and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)


def _befalls(fault: Fault, place: str, kinds: Iterable[str], to: str) -> bool:
    named = not kinds or fault.kind in kinds
    return fault.about.place == place and named and (not to or fault.peer in (ANY, to))


def _with_id(fault: Fault, id: str) -> Fault:
    return Fault(**asdict(fault) | {"id": id})


# --- one strike in the middle of an exchange --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """Strike this process in the middle of an exchange.

    kind: "kill" (SIGKILL) or "freeze" (SIGSTOP). tag, round: which operation; the first one with at least this round.
    fraction: of the chunks that this peer is to receive, after which it strikes, in [0, 1).
    """

    kind: str
    tag: str
    round: int
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in SIGNALS:
            raise ValueError(f"fault {self.kind!r} is not one of {', '.join(SIGNALS)}")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"fraction is {self.fraction}: it must be at least 0 and below 1")

    def due(self, progress: Progress) -> bool:
        """Whether the exchange has come to the point: part of the data has moved, and part has not."""
        at_round = progress.identity.tag == self.tag and progress.identity.round >= self.round
        moved = progress.chunks_received >= max(1, int(self.fraction * progress.chunks_expected))
        return at_round and moved and progress.chunks_received < progress.chunks_expected


def strike(injection: Injection, peer: str, log: Path) -> Callable[[Progress], None]:
    """Returns an `observe` hook for `collectives.Group` that carries out the injection once, noting it in `log`."""
    fired = False
    one_at_a_time = threading.Lock()  # several stripes receive at once: while one strikes, the others get no further

    def observe(progress: Progress) -> None:
        nonlocal fired
        with one_at_a_time:
            if fired or not injection.due(progress):
                return
            fired = True
            at = {"round": progress.identity.round, "at": asdict_progress(progress)}
            note(log, peer=peer, **asdict(injection) | at)
            os.kill(os.getpid(), SIGNALS[injection.kind])

    return observe


def asdict_progress(progress: Progress) -> dict[str, int]:
    return {
        "attempt": progress.identity.attempt,
        "chunks_received": progress.chunks_received,
        "chunks_expected": progress.chunks_expected,
    }


def note(log: Path, **fields: object) -> None:
    """Appends one `fault.injected` event, in one write that outlives this process.

    It is not synced to the disk: that takes so long that the exchange may be over before the fault strikes.
    """
    head = {"event": "fault.injected", "time_unix": time.time(), "monotonic": time.monotonic()}
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(head | fields) + "\n")
        file.flush()

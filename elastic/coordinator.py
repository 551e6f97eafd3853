"""A thin ZeroMQ server around the membership: one thread, one ROUTER socket, one journal.

Each turn of the loop takes what has arrived, lets the membership decide, makes its records durable in one
transaction, and only then sends. The server keeps no state of its own that a restart would need.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import zmq

from fault.inject import Injector

from .config import JoinToken, RunPolicy, Timeouts, check_coordinator, check_name
from .errors import ConfigurationError
from .events import INJECTED, EventLog
from .journal import Journal
from .membership import Membership
from .messages import (
    FROM_PEERS,
    MAX_MESSAGE_BYTES,
    AuditReport,
    Message,
    MessageError,
    StatusReport,
    decode,
    encode,
)
from .recovery import Recovery
from .roster import Effect, Emit, Persist, Send

BATCH = 1000


def identity(name: str, incarnation: int) -> bytes:
    """The ZeroMQ identity of one life of a peer."""
    return f"{name}/{incarnation:016x}".encode()


def packed(effects: Iterable[Effect]) -> Iterator[tuple[Send, bytes]]:
    """What goes out, encoded: once, where the same message goes to many."""
    last, body = None, b""
    for effect in effects:
        if isinstance(effect, Send):
            if effect.message is not last:
                last, body = effect.message, encode(effect.message)
            yield effect, body


@dataclass(frozen=True, slots=True)
class CoordinatorStatistics:
    """messages, refused: received so far, and how many of them were no valid message. turns: of the loop."""

    messages: int
    refused: int
    turns: int
    generation: int
    epoch: int
    members: int


class Coordinator:
    """Serves one run from a thread of its own until `close()`.

    bind: tcp://HOST:PORT, PORT 0 picks one; see `address`. journal: file that survives a restart; None keeps nothing.
    faults: what is to go wrong here on purpose: writes to the journal (`fault.inject`, "full-disk").
    recover: the journal of this run is lost: begin once a majority of its last view has said what it knows; see
    `recovering` and `accept_minority`. The journal must be a new one.
    Raises ConfigurationError if the address or the journal cannot be used.
    """

    def __init__(
        self,
        bind: str = "tcp://127.0.0.1:0",
        *,
        run: str,
        policy: RunPolicy | None = None,
        timeouts: Timeouts | None = None,
        journal: Path | None = None,
        events: Path | None = None,
        recover: bool = False,
        faults: Injector | None = None,
    ) -> None:
        self.run = check_name("run", run)
        self._timeouts = timeouts or Timeouts()
        self._membership = Membership(self.run, policy or RunPolicy(), self._timeouts)
        self._journal = Journal(journal, self.run) if journal else None
        self._events = EventLog(events, run=self.run)
        self.faults = faults
        if faults is not None:
            faults.listen(lambda firing: self._events.emit(INJECTED, **firing.told))
            self._events.check = faults.check_disk
        self._context = zmq.Context()
        self._socket = self._bind(bind)
        port = self._socket.get_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        self.address = f"{check_coordinator(bind).rpartition(':')[0]}:{port}"
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards the membership against readers in other threads
        self._messages = self._refused = self._turns = 0
        self.error: BaseException | None = None
        self._recovery = Recovery(self.run) if recover else None
        self._begin_from_journal()
        self._thread = threading.Thread(target=self._serve, name="elastic-coordinator", daemon=True)
        self._thread.start()

    @property
    def token(self) -> JoinToken:
        """What a peer needs to find this run."""
        return JoinToken(self.address, self.run)

    def _begin_from_journal(self) -> None:
        records = self._journal.read() if self._journal else []
        if self._recovery is None:
            self._carry_out(self._membership.begin(records, time.monotonic()))
        elif records:
            self._socket.close()
            self._release()
            raise ConfigurationError("the journal holds a run already: start without recover, or name a new journal")

    def _bind(self, bind: str) -> zmq.Socket[bytes]:
        address = check_coordinator(bind)
        socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # a reconnect must not wait for the old connection to be found dead
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 15)
        try:
            socket.bind(address)
        except zmq.ZMQError as error:
            socket.close(0)
            self._context.term()
            if self._journal:
                self._journal.close()
            in_use = "the port is in use; choose another" if error.errno == errno.EADDRINUSE else str(error)
            raise ConfigurationError(f"cannot listen on {bind}: {in_use}") from None
        return socket

    def _serve(self) -> None:
        try:
            while not self._stopping.is_set():
                self._turn()
        except BaseException as error:  # e.g. a full disk: nothing may be sent that is not durable
            self.error = error
            self._events.emit("coordinator.failed", reason=f"{type(error).__name__}: {error}")
            raise
        finally:
            self._socket.close()

    def _turn(self) -> None:
        ready = self._socket.poll(round(self._timeouts.heartbeat * 250))
        with self._lock:
            effects = self._tick(time.monotonic())
        for _ in range(BATCH if ready else 0):
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            effects += self._receive(parts)
        self._turns += 1
        self._carry_out(effects)

    def _tick(self, now: float) -> list[Effect]:
        recovery = self._recovery
        if recovery is None:
            return self._membership.tick(now)
        if not recovery.ready:
            return []
        self._recovery, records = None, recovery.records()
        return [*map(Persist, records), *self._membership.begin(records, now)]

    def _decide(self, name: str, message: Message) -> list[Effect]:
        with self._lock:
            if self._recovery is not None:
                return self._recovery.receive(name, message)
            return self._membership.receive(name, message, time.monotonic())

    def _receive(self, parts: list[bytes]) -> list[Effect]:
        self._messages += 1
        try:
            sender, payload = parts
            name = sender.decode().rpartition("/")[0]
            message = decode(payload, FROM_PEERS)
            if identity(name, message.incarnation) != sender:
                raise MessageError("the message names another incarnation than its connection")
        except (ValueError, UnicodeDecodeError):
            self._refused += 1
            return []
        try:
            return self._decide(name, message)
        except Exception as error:  # what no correct peer sends must not end the run for the others
            self._refused += 1
            kind = type(message).__name__
            self._events.emit("message.refused", sender=name, kind=kind, reason=f"{type(error).__name__}: {error}")
            return []

    def _carry_out(self, effects: Iterable[Effect]) -> None:
        effects = list(effects)
        records = [effect.record for effect in effects if isinstance(effect, Persist)]
        if self._journal and records:
            if self.faults is not None:
                self.faults.check_disk("journal")
            self._journal.append(records)
        for send, body in packed(effects):
            self._socket.send_multipart([identity(send.name, send.incarnation), body])
        for effect in effects:
            if isinstance(effect, Emit):
                self._events.emit(effect.event, **effect.fields)

    @property
    def recovering(self) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """While it recovers: who of the last view has come, and who is in it; None once it serves."""
        with self._lock:
            recovery = self._recovery
            return (recovery.present, tuple(sorted(recovery.view))) if recovery else None

    def accept_minority(self) -> None:
        """Recover from those who are there. What only the others saw committed is given up."""
        with self._lock:
            if self._recovery is not None:
                self._recovery.accept()

    def status(self) -> StatusReport:
        """Members, progress and shards as of now. A snapshot: the loop goes on meanwhile."""
        with self._lock:
            return self._membership.status(time.monotonic())

    def audit(self) -> AuditReport:
        """The account of the data as of now: what is committed, who holds the rest, what counts twice or is missing."""
        with self._lock:
            return self._membership.audit()

    def statistics(self) -> CoordinatorStatistics:
        membership = self._membership
        return CoordinatorStatistics(
            self._messages, self._refused, self._turns, membership.generation, membership.epoch, len(membership.members)
        )

    def close(self) -> None:
        """Stops serving. Members keep training and find the next life of the coordinator at the same address."""
        self._stopping.set()
        self._thread.join()
        self._release()

    def _release(self) -> None:
        self._context.term()
        if self._journal:
            self._journal.close()
        self._events.close()

    def __enter__(self) -> Coordinator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

"""A peer's line to its coordinator: one DEALER socket, owned by one thread.

The thread beats the heart, hands incoming messages to the peer, and survives whatever the coordinator does: ZeroMQ
reconnects by itself, and everything that matters is asked for again until it is answered. Where a run names several
addresses for its coordinator, the next one is tried when nothing that counts comes from this one.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import zmq

from .config import addresses
from .messages import FROM_COORDINATOR, MAX_MESSAGE_BYTES, Message, MessageError, decode, encode, identity


class Control:
    """Connects to `address` (several: with commas between) as (name, incarnation).

    on_message runs on the control thread, must not block, and says whether the message counts: what an old generation
    says is no sign of life. on_beat, called every `heartbeat` seconds, returns the message to send or None. on_failure
    is called if the thread ends by an error of its own. patience: seconds before another address is tried. beats,
    beat_bytes, beat_seconds: how many there were, how large, and the processor time of making them.
    """

    def __init__(
        self,
        address: str,
        name: str,
        incarnation: int,
        *,
        heartbeat: float,
        patience: float = 5.0,
        on_message: Callable[[Any], bool],
        on_beat: Callable[[], Message | None],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self.heard_at = time.monotonic()
        self.beats = self.beat_bytes = 0
        self.beat_seconds = 0.0
        self._heartbeat, self._on_message, self._on_beat = heartbeat, on_message, on_beat
        self._on_failure = on_failure
        self._outbox: deque[bytes] = deque()
        self._stopping = False
        self._addresses, self._own = deque(addresses(address)), identity(name, incarnation)
        self._patience, self._connected_at = patience, self.heard_at
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._socket = self._connect()
        wake = f"inproc://wake-{id(self)}"
        self._waker, self._wakee = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wakee.bind(wake)
        self._waker.connect(wake)
        self._wake_lock = threading.Lock()
        self._thread = threading.Thread(target=self._loop, name=f"elastic-control-{name}", daemon=True)
        self._thread.start()

    def _connect(self) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.IDENTITY, self._own)
        socket.setsockopt(zmq.LINGER, 500)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.RECONNECT_IVL, 50)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 15)
        socket.connect(self._addresses[0])
        self._poller.register(socket, zmq.POLLIN)
        return socket

    def _try_next_address(self) -> None:
        """Nothing that counts comes from here: another host may have taken over."""
        now = time.monotonic()
        if len(self._addresses) < 2 or now - max(self.heard_at, self._connected_at) < self._patience:
            return
        self._connected_at = now
        self._poller.unregister(self._socket)
        self._socket.close(0)
        self._addresses.rotate(-1)
        self._socket = self._connect()

    def send(self, message: Message) -> None:
        """Queues a message, from any thread. Delivery is not certain: askers ask again."""
        self._outbox.append(encode(message))  # in the caller's thread: what cannot be packed is the caller's error
        with self._wake_lock:
            if not self._stopping:
                self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(zmq.Again):  # a full pipe wakes as well as one more message would
            self._waker.send(b"", zmq.NOBLOCK)

    def _loop(self) -> None:
        self._poller.register(self._wakee, zmq.POLLIN)
        next_beat = 0.0
        try:
            while not self._stopping:
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._heartbeat
                    self._try_next_address()
                    self._beat()
                wait = max(0.0, next_beat - time.monotonic())
                ready = dict(self._poller.poll(int(wait * 1000) + 1))
                self._turn(ready)
        except Exception as error:
            self._on_failure(error)
            raise
        finally:
            try:
                self._flush()
            finally:
                self._socket.close()
                self._wakee.close()

    def _turn(self, ready: dict[Any, int]) -> None:
        if self._wakee in ready:
            self._wakee.recv()
        self._flush()
        while self._socket in ready:
            try:
                self._handle(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return

    def _beat(self) -> None:
        began = time.thread_time()
        message = self._on_beat()
        if message is not None:
            packed = encode(message)
            self.beats += 1
            self.beat_bytes += len(packed)
            self.beat_seconds += time.thread_time() - began
            self._outbox.append(packed)
            self._flush()

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._socket.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:  # nobody there and the queue is full: keep what is newest, it will be asked for again
                while len(self._outbox) > 1000:
                    self._outbox.popleft()
                return
            self._outbox.popleft()

    def _handle(self, data: bytes) -> None:
        try:
            message = decode(data, FROM_COORDINATOR)
        except MessageError:
            return
        if self._on_message(message):
            self.heard_at = time.monotonic()

    def close(self) -> None:
        """Sends what is queued, if it can, and ends the thread."""
        with self._wake_lock:
            if not self._stopping:
                self._stopping = True
                self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
            self._waker.close()
            self._context.term()

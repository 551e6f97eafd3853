"""A small process beside each peer, which tells the coordinator what the peer itself cannot: that it has ended, or that
it stands still.

Whoever hangs in a call that holds Python's lock, or is stopped, cannot say so, and whoever is killed cannot either. The
peer's threads leave their marks in a page of memory that both share; the witness looks at it once a heartbeat.

    the peer has ended, and did not close    Gone, at once: proof of a death
    no beat for two heartbeats               Witnessed, once a heartbeat, for as long as that lasts

It says nothing else, and has no connection before it has something to say. It ends with its peer: within a second of
its death, coordinator or no coordinator, and at once when the peer closes. It imports neither torch nor numpy, since
there is one of it for each peer. It needs Linux (pidfd, memfd).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import MutableSequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import zmq

BEAT, STEPPED, EXCHANGES, CLOSED, SPENT = range(5)
"""What stands where in the page, all of it numbers: when the heart last beat and the last inner step was made (seconds
of the monotonic clock, which all processes share; 0: none), how many exchanges are under way, whether the peer has
closed; and, by the witness, how many seconds of processor time it has used."""
BYTES = 8 * 8
LATE = 2.0  # heartbeats
NICE = 10
CLOSING_SECONDS = 1.0
TELLING_SECONDS = 0.6
LIFE_AFTER_DEATH = 0.95  # seconds, at the most

Page = MutableSequence[float]


def page_of(memory: mmap.mmap | bytearray) -> Page:
    return cast(Page, memoryview(memory).cast("d"))


class Witness:
    """The peer's side: the process runs until `close`, or until this process ends. Raises OSError if it cannot be had.

    coordinator: its addresses, as `config.addresses` takes them. heartbeat: seconds. page: what it looks at.
    """

    def __init__(self, coordinator: str, run: str, name: str, incarnation: int, heartbeat: float) -> None:
        orders = _orders(coordinator, run, name, incarnation, heartbeat)
        memory = os.memfd_create("elastic-witness")
        try:
            os.ftruncate(memory, BYTES)
            self.page = page_of(mmap.mmap(memory, BYTES))
            self.page[BEAT] = time.monotonic()
            death = os.pidfd_open(os.getpid())
            try:
                self._process = _spawn(name, memory, death)
            finally:
                os.close(death)
        finally:
            os.close(memory)
        self._say(json.dumps(orders | {"memory": memory, "death": death}).encode() + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether it is there no more, although it should be."""
        return self._process.poll() is not None

    @property
    def seconds(self) -> float:
        """Of processor time that it has used."""
        return self.page[SPENT]

    def close(self) -> None:
        """Good-bye: the peer leaves, or closes, and there is nothing to prove. Returns when the process is gone."""
        self.page[CLOSED] = 1.0
        self._say(b".")
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _say(self, words: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):  # it has ended: it watches nobody any more
            assert self._process.stdin is not None
            self._process.stdin.write(words)


def _orders(coordinator: str, run: str, name: str, incarnation: int, heartbeat: float) -> dict[str, Any]:
    """What it has to say, as messages: it does not know their classes. Keys have no place in a command line."""
    from .config import addresses
    from .messages import Gone, Witnessed, encode, identity

    own = secrets.randbits(63) | 1
    gone = Gone(run=run, incarnation=own, name=name, ended=incarnation, evidence="its process has ended")
    witnessed = Witnessed(run=run, incarnation=own, name=name, watched=incarnation)
    return {
        "pid": os.getpid(),
        "heartbeat": heartbeat,
        "addresses": addresses(coordinator),
        "identity": identity("witness", own).hex(),
        "gone": encode(gone).hex(),
        "witnessed": encode(witnessed).hex(),
    }


def _spawn(name: str, *descriptors: int) -> subprocess.Popen[bytes]:
    """It finds its modules where this process has found them, and nothing by chance in the current folder. name: for
    people who list processes.
    """
    if not sys.executable:
        raise OSError("this Python does not know its own program")
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *(os.path.abspath(entry) for entry in sys.path)])
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "elastic.witness", name],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        pass_fds=descriptors,
        start_new_session=True,  # what a terminal sends to the peer does not reach it
        cwd="/",
        env=os.environ | {"PYTHONPATH": path},
    )


# --- the process ------------------------------------------------------------------------------------------------------


class _Watch:
    def __init__(self, orders: dict[str, Any]) -> None:
        import msgpack
        import zmq  # now: when there is something to say, the machine may be out of memory

        self._zmq, self._msgpack = zmq, msgpack
        self._orders, self._heartbeat, self._pid = orders, float(orders["heartbeat"]), int(orders["pid"])
        self._page = page_of(mmap.mmap(orders["memory"], BYTES))
        self._witnessed: dict[str, Any] = msgpack.unpackb(bytes.fromhex(orders["witnessed"]))
        self._line: zmq.Socket[bytes] | None = None
        self._used: float | None = None

    def run(self) -> None:
        """Until the peer has closed, or ended."""
        poller, death = select.poll(), self._orders["death"]
        poller.register(death, select.POLLIN)
        poller.register(0, select.POLLIN)
        while True:
            ready = dict(poller.poll(self._heartbeat * 1000))
            if 0 in ready:
                if os.read(0, 64):
                    return
                poller.unregister(0)  # no good-bye: whether it died is for its pidfd to say
            if death in ready:
                if not self._page[CLOSED]:
                    self._prove()
                return
            self._look()
            self._page[SPENT] = time.process_time()

    def _prove(self) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, LIFE_AFTER_DEATH)
        gone, line = bytes.fromhex(self._orders["gone"]), self._connected()
        for _ in self._orders["addresses"]:  # each message goes to one of those that answer
            with contextlib.suppress(self._zmq.Again):
                line.send(gone)
        line.close(int(TELLING_SECONDS / 2 * 1000))
        line.context.term()

    def _look(self) -> None:
        late = time.monotonic() - self._page[BEAT]
        if late <= LATE * self._heartbeat or self._page[CLOSED]:
            self._used = None
            return
        state, used = process_state(self._pid)
        self._used = used if self._used is None else self._used
        seen = {
            "state": state,
            "beat_seconds": late,
            "step_seconds": time.monotonic() - self._page[STEPPED] if self._page[STEPPED] else -1.0,
            "exchanging": self._page[EXCHANGES] > 0,
            "cpu_seconds": used - self._used,
        }
        with contextlib.suppress(self._zmq.Again):  # nobody there: what is true now would be old news later
            self._connected().send(self._msgpack.packb(self._witnessed | seen), self._zmq.NOBLOCK)

    def _connected(self) -> zmq.Socket[bytes]:
        if self._line is None:
            zmq = self._zmq
            line = self._line = zmq.Context().socket(zmq.DEALER)
            line.setsockopt(zmq.IDENTITY, bytes.fromhex(self._orders["identity"]))
            line.setsockopt(zmq.IMMEDIATE, 1)
            line.setsockopt(zmq.SNDTIMEO, int(TELLING_SECONDS * 1000))
            line.setsockopt(zmq.LINGER, 0)
            line.setsockopt(zmq.IPV6, 1)
            line.setsockopt(zmq.RECONNECT_IVL, 50)
            line.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
            for address in self._orders["addresses"]:
                line.connect(address)
        return self._line


def process_state(pid: int) -> tuple[str, float]:
    """The letter of a process's first thread, as in /proc/PID/stat, and its processor time, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # it ends with its peer, and not before
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICE)
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        orders = stdin.readline()
    if orders:
        _Watch(json.loads(orders)).run()
    os._exit(0)


if __name__ == "__main__":
    main()

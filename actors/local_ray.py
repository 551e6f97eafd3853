"""A quiet Ray of our own on this machine, for one run: started, authenticated, and ended without touching any other.
Or one that runs already, which is used and left as it is.

See DESIGN section 7: token authentication is always set explicitly on both sides, the object store is small (tensors
never pass through Ray), the temporary folder is short (unix socket paths), and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from elastic.config import check_endpoint
from elastic.errors import ElasticError

OBJECT_STORE_BYTES = 80 << 20
NAMESPACE = "elastic"
_TOKEN = secrets.token_hex(32)  # one for all Rays of this process: Ray's library remembers the first that it has read
ANSWER_SECONDS = 5.0
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals by which a person or a machine asks a command to end."""


@contextlib.contextmanager
def local_ray(*, num_cpus: int, log: Path) -> Iterator[None]:
    """A local Ray for the duration of the context. Standard output and error, where Ray writes, go to the file `log`.

    A caller that has something to say meanwhile keeps its own duplicate of the descriptor.

    Only the processes of this Ray are ended. Raises RuntimeError if this process is already connected to a Ray.
    """
    folder = Path(f"/tmp/elastic-{secrets.token_hex(4)}")
    _adopt_orphans()
    before = _children()
    try:
        folder.mkdir(mode=0o700)  # its name is known before it exists: an interruption here leaves nothing behind
        with log.open("ab") as file, _standard_streams_to(file):
            _authenticate(folder)
            import ray

            if ray.is_initialized():
                raise RuntimeError("this process is already connected to a Ray; end that connection first")
            try:
                ray.init(**_settings(num_cpus, folder))
                yield
            finally:
                with undisturbed():
                    ray.shutdown()
    finally:
        with undisturbed():
            _end(lambda: _children() - before)
            _reap(before)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running_ray(address: str, *, log: Path) -> Iterator[None]:
    """A connection to a Ray that runs already, for the duration of the context: HOST:PORT of its head, or "auto".

    It is left as it is; what this process starts there ends with the connection. Standard output and error as in
    `local_ray`. Raises ConnectionError if there is none, or it does not take this process.
    """
    _check_answers(address)
    with log.open("ab") as file, _standard_streams_to(file):
        import ray

        try:
            ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            raise ConnectionError(
                f"the Ray at {address!r} does not take this process: {' '.join(str(error).split())} (if it asks for a "
                "token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH here, too)"
            ) from None
        try:
            yield
        finally:
            with undisturbed():
                ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for a minute."""
    if address == "auto":
        return
    host, port = check_endpoint("the address of the Ray", address)
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except OSError as error:
        raise ConnectionError(f"no Ray answers at {address}: {error.strerror or error}") from None


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """No signal that asks to end interrupts the body. Only Python's main thread may, and needs to, say so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in ENDING]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def error_line(error: BaseException) -> str:
    """What went wrong, in one line; of an actor that could not be created, why."""
    lines = str(error).strip().splitlines() or [""]
    if getattr(error, "actor_init_failed", False):
        return re.sub(r"^elastic\.errors\.\w+: ", "", lines[-1])  # our own words need no class before them
    return lines[0] if isinstance(error, ElasticError) else f"{type(error).__name__}: {lines[0]}"


def _adopt_orphans() -> None:
    """What Ray started is then found below this process even if its parent has died (prctl PR_SET_CHILD_SUBREAPER)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _children(*, ended: bool = False) -> set[int]:
    """All processes below this one; those that have ended and not been waited for too, if asked."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if ended or state != "Z":
                parents.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    queue = [os.getpid()]
    while queue:
        below = parents.get(queue.pop(), [])
        found.update(below)
        queue.extend(below)
    return found


def _end(left: Callable[[], set[int]]) -> None:
    """Ends, by pid, what an interrupted start or shutdown has left behind."""
    for number, seconds in ((signal.SIGTERM, 0.5), (signal.SIGKILL, 1.0)):
        for pid in left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while left() and time.monotonic() < deadline:
            time.sleep(0.02)


def _reap(before: set[int]) -> None:
    # killed processes whose parent was killed too have become ours to wait for
    for pid in _children(ended=True) - before:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def _authenticate(folder: Path) -> None:
    token = folder / "token"
    descriptor = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(_TOKEN)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.pop("RAY_ADDRESS", None)  # a Ray that happens to run here is not ours to use
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")  # who had imported Ray before has what was set then
    AuthenticationTokenLoader.instance().reset_cache()


def _settings(num_cpus: int, folder: Path) -> dict[str, Any]:
    return {
        "address": "local",
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "ERROR",
        "object_store_memory": OBJECT_STORE_BYTES,
        "namespace": NAMESPACE,
        "_temp_dir": str(folder),
    }


@contextlib.contextmanager
def _standard_streams_to(file: IO[bytes]) -> Iterator[None]:
    # Ray's C++ side writes to the file descriptors themselves, so these must be moved, not sys.stdout and sys.stderr
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    saved = [os.dup(descriptor) for descriptor in (1, 2)]
    for descriptor in (1, 2):
        os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for stream in streams:
            stream.flush()
        for descriptor, copy in zip((1, 2), saved, strict=True):
            os.dup2(copy, descriptor)
            os.close(copy)

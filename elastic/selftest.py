"""What a machine must pass before a peer comes back from quarantine: arithmetic, memory, disk, its own network.

Each check knows the right answer beforehand: products of small whole numbers are exact in float32 on every device, and
what was written must be read. It takes well under a second, and says in one line what is wrong.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

SIDE = 256
MEMORY = 64 << 20
DISK = 1 << 20
NETWORK = 4 << 20
SECONDS = 10.0  # for what goes through sockets


def self_test(folder: Path | None = None) -> str:
    """Returns what is wrong with this machine, in one line; "" if nothing was found. folder: where it must be able to
    write; by default, where temporary files go."""
    checks: tuple[tuple[str, Callable[[], str]], ...] = (
        ("arithmetic", _arithmetic),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("network", _network),
    )
    for name, check in checks:
        try:
            flaw = check()
        except (OSError, RuntimeError, MemoryError) as error:
            flaw = f"{type(error).__name__}: {error}"
        if flaw:
            return f"{name}: {flaw}".splitlines()[0]
    return ""


def devices() -> Iterator[torch.device]:
    yield torch.device("cpu")
    for index in range(torch.cuda.device_count()):
        yield torch.device("cuda", index)


def _arithmetic() -> str:
    """Sums stay below 2**24, so that float32 holds every one of them exactly, in whatever order they are added."""
    numbers = torch.arange(SIDE * SIDE, dtype=torch.int64).view(SIDE, SIDE)
    one, other = numbers * 7 % 251 - 125, numbers * 11 % 241 - 120
    right = one @ other
    for device in devices():
        product = one.to(device, torch.float32) @ other.to(device, torch.float32)
        wrong = int((product.to("cpu", torch.int64) != right).sum())
        if wrong:
            return f"{wrong} of {SIDE * SIDE} sums are wrong on {device}"
    return ""


def _memory() -> str:
    for device in devices():
        kept = torch.arange(MEMORY // 8, dtype=torch.int64, device=device)
        for pattern in (0x5555555555555555, -0x5555555555555556):
            kept ^= pattern
        back = kept ^ ~0  # the two patterns are each other's complement
        if not torch.equal(back, torch.arange(MEMORY // 8, dtype=torch.int64, device=device)):
            return f"what was written on {device} is not what is read"
    return ""


def _disk(folder: Path | None) -> str:
    data = os.urandom(DISK)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return "" if Path(file.name).read_bytes() == data else f"what was written to {file.name} is not what is read"


def _network() -> str:
    """Through this host's own TCP, both ways at once."""
    data = os.urandom(NETWORK)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SECONDS)
        with socket.create_connection(server.getsockname(), timeout=SECONDS) as near:
            far, _ = server.accept()
            with far:
                far.settimeout(SECONDS)
                sender = threading.Thread(target=near.sendall, args=(data,), daemon=True)
                sender.start()
                came = _received(far)
                sender.join(SECONDS)
    return "" if came == data else "what was sent to this host itself is not what came"


def _received(connection: socket.socket) -> bytes:
    came = bytearray()
    while len(came) < NETWORK and (piece := connection.recv(1 << 20)):
        came += piece
    return bytes(came)

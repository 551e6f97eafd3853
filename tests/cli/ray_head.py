"""A Ray as `ray start --head` makes one, with a dashboard that takes jobs: for tests, beside any other Ray here."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from actors.local_ray import _TOKEN, OBJECT_STORE_BYTES, _adopt_orphans, _children, _end, _reap

START = "from ray.scripts.scripts import main; main()"


@dataclass(frozen=True, kw_only=True)
class Head:
    """address: of its dashboard. environment: of those who may use it. folder: where all that is its own lies."""

    address: str
    environment: dict[str, str]
    folder: Path


@contextlib.contextmanager
def ray_head(python: Path, *, sees: Path | None = None, num_cpus: int = 4) -> Iterator[Head]:
    """python: with which it runs, and which its jobs find as `python`. sees: on its PYTHONPATH.

    Ended by the ids of its processes: `ray stop` would end every Ray of this machine.
    """
    folder, before = Path(f"/tmp/elastic-{secrets.token_hex(4)}"), _children()
    folder.mkdir(mode=0o700)
    (folder / "token").write_text(_TOKEN)
    _adopt_orphans()
    dashboard, agent, client = free_ports(3)
    environment = _environment(folder, python) | ({"PYTHONPATH": str(sees)} if sees else {})
    settings = {
        "node-ip-address": "127.0.0.1", "port": 0, "num-cpus": num_cpus, "object-store-memory": OBJECT_STORE_BYTES,
        "include-dashboard": "true", "dashboard-host": "127.0.0.1", "dashboard-port": dashboard,
        "dashboard-agent-listen-port": agent, "ray-client-server-port": client, "temp-dir": folder,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in settings.items()]
    try:
        started = subprocess.run(
            [python, "-c", START, "start", "--head", "--disable-usage-stats", *words],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=150,
        )  # fmt: skip
        assert started.returncode == 0, started.stdout + started.stderr
        allowed = {name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        yield Head(address=f"http://127.0.0.1:{dashboard}", environment=allowed, folder=folder)
    finally:
        _end(lambda: _children() - before)
        _reap(before)
        shutil.rmtree(folder, ignore_errors=True)


def bare_python(folder: Path) -> Path:
    """A Python that has all that is installed here, but elastic, whose sources lie elsewhere."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (found,) = (folder / "lib").glob("python3*/site-packages")
    # the .pth files in there, by which a checkout is installed, are not followed any further
    (found / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        servers = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def _environment(folder: Path, python: Path) -> dict[str, str]:
    strange = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    return {name: value for name, value in os.environ.items() if name not in strange} | {
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_TMPDIR": str(folder),  # it notes its address there, and not where others would find it
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "120",  # on a busy machine
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }

"""How soon is a machine in a run, out of it, and back? Seconds as a person with a watch would take them.

    demo      from `elastic demo` to its first committed round
    join      from `elastic join` to the first commit with a contribution of it; the run has a peer already
    restart   from SIGKILL of a peer's process to the first commit with its next life; its site's supervisor does that
    leave     from SIGTERM of `elastic join` to its end with an exchange made and nothing left
    node      from SIGKILL of a whole node of a Ray to the first commit with the peer's next life, on a spare node;
              with the settings of docs/ray.md, and with Ray's own

Everything is on this machine and goes over loopback; commits are read in the coordinator's event log. Nothing is
imported beforehand: Python, torch and Ray start anew each time.

    python -m benchmarks.lifecycle --repeat 5 --json lifecycle.json
    python -m benchmarks.lifecycle --only site

Ends with 1 if something does not happen at all; what takes longer than is to be reached is said in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, BenchmarkError, Report
from elastic.events import EventReader

RUN = "life"
PATIENCE = 180.0
COLUMNS = ("what", "s: median (min-max)", "to reach", "reached")
SCRIPT = Path(__file__).with_name("resident.py")


class Log:
    """An event log that somebody is writing."""

    def __init__(self, path: Path) -> None:
        self._reader = EventReader(path)
        self.events: list[dict[str, Any]] = []

    def until(self, true: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """The first event for which it holds. Raises BenchmarkError."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.events.extend(self._reader.read())
            if (found := next((each for each in self.events if true(each)), None)) is not None:
                return found
            time.sleep(0.01)
        raise BenchmarkError(f"it did not happen within {PATIENCE:.0f} s: {what}")

    def commit_with(self, peer: str, since: float) -> float:
        """When the first round with this contributor was committed after that; time.time()."""
        event = self.until(
            lambda each: (
                each["event"] == "round.committed" and each["time_unix"] > since and peer in each["contributors"]
            ),
            f"a commit with a contribution of {peer}",
        )
        return float(event["time_unix"])


@contextmanager
def process(*words: str, cwd: Path, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command of ours; ended, if need be, at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    found = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options
    )
    try:
        yield found
    finally:
        if found.poll() is None:
            found.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                found.communicate(timeout=30)
        found.kill()
        found.wait()


# --- the demo ---------------------------------------------------------------------------------------------------------


def demo(repeat: int) -> Iterator[tuple[str, float]]:
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            out, began = Path(folder, "out"), time.time()
            words = ("-m", "cli.main", "demo", "--no-kill", "--rounds", "3", "--out", str(out))
            with process(*words, cwd=ROOT) as running:
                log = Log(out / "events" / "coordinator.jsonl")
                first = log.until(lambda each: each["event"] == "round.committed", "the demo's first round")
                yield "demo", first["time_unix"] - began
                said, _ = running.communicate(timeout=PATIENCE)
                if running.returncode:
                    raise BenchmarkError(f"the demo ended with {running.returncode}:\n{said[-2000:]}")


# --- a site -----------------------------------------------------------------------------------------------------------


def sites(repeat: int, mib: float) -> Iterator[tuple[str, float]]:
    """A coordinator and one site that stays; another comes, has its peer killed, and goes; again and again."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        words = ("coordinator", "--run", RUN, "--bind", "127.0.0.1:0", "--events", "events.jsonl")
        with process("-m", "cli.main", *words, cwd=home) as coordinator:
            assert coordinator.stdout is not None
            token = coordinator.stdout.readline().strip().removeprefix("ELASTIC_JOIN=")
            log = Log(home / "events.jsonl")
            with site(home, token, "stays", mib):
                log.commit_with("stays-0", 0.0)
                for turn in range(repeat):
                    yield from visit(home, log, token, f"guest{turn}", mib)


def site(home: Path, token: str, name: str, mib: float) -> Any:
    words = ("join", token, str(SCRIPT), "--peers", "1", "--name", name, "--out", str(home / name))
    return process("-m", "cli.main", *words, "--config", f"mib={mib:g}", cwd=home)


def visit(home: Path, log: Log, token: str, name: str, mib: float) -> Iterator[tuple[str, float]]:
    began, peer = time.time(), f"{name}-0"
    with site(home, token, name, mib) as running:
        yield "join", log.commit_with(peer, began) - began
        started = Log(home / name / "events" / "supervisor.jsonl")
        pid = started.until(lambda each: each["event"] == "peer.started", "the peer's start")["pid"]
        time.sleep(2.0)
        killed = time.time()
        os.kill(pid, signal.SIGKILL)
        again = started.until(
            lambda each: each["event"] == "peer.started" and each["time_unix"] > killed, "the peer's next life"
        )
        yield "restart", log.commit_with(peer, again["time_unix"]) - killed
        time.sleep(2.0)
        told = time.time()
        running.send_signal(signal.SIGTERM)
        said, _ = running.communicate(timeout=PATIENCE)
        yield "leave", time.time() - told
        if running.returncode != 128 + signal.SIGTERM:
            raise BenchmarkError(f"elastic join ended with {running.returncode}:\n{said[-2000:]}")
        left = log.until(lambda each: each["event"] == "peer.left" and each["peer"] == peer, f"{peer} leaves")
        if left["time_unix"] < told:
            raise BenchmarkError(f"{peer} left before it was told to")


# --- a node -----------------------------------------------------------------------------------------------------------

TUNED = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1000,
    "health_check_failure_threshold": 3,
    "health_check_initial_delay_ms": 1000,
    "timeout_ms_task_wait_for_death_info": 100,
}


def nodes(repeat: int, mib: float) -> Iterator[tuple[str, float]]:
    """Each in a process of its own: a Ray's settings are its process's."""
    for _ in range(repeat):
        for what, settings in (("node, tuned", TUNED), ("node, Ray's own settings", {})):
            with tempfile.TemporaryDirectory() as folder:
                order = json.dumps({"settings": settings, "mib": mib, "folder": folder})
                with process("-m", "benchmarks.lifecycle", "--node", order, cwd=ROOT) as running:
                    said, _ = running.communicate(timeout=2 * PATIENCE)
                if running.returncode:
                    raise BenchmarkError(f"the run with a killed node failed:\n{said[-3000:]}")
                yield what, json.loads(said.strip().splitlines()[-1])["seconds"]


def kill_node(order: dict[str, Any]) -> None:
    """Three nodes with room for a peer each, two peers; the node of one is killed, with all that runs there."""
    import threading

    import ray
    from ray.cluster_utils import Cluster

    import elastic
    from benchmarks.resident import train

    os.environ |= {"RAY_TMPDIR": order["folder"], "RAY_USAGE_STATS_ENABLED": "0"}
    common_settings = {"include_dashboard": False, "object_store_memory": 80 << 20}
    head = {"num_cpus": 1, "_system_config": order["settings"]} | common_settings
    cluster = Cluster(initialize_head=True, head_node_args=head)
    others = [cluster.add_node(num_cpus=1, **common_settings) for _ in range(2)]
    ray.init(address=cluster.address, namespace="elastic", log_to_driver=False, logging_level="ERROR")
    trainer = elastic.Trainer(
        train,
        config={"mib": order["mib"]},
        scaling_config=elastic.ScalingConfig(num_peers=(1, 2)),
        run_config=elastic.RunConfig(
            name=RUN,
            storage_path=order["folder"],
        ),
    )
    running = threading.Thread(target=trainer.fit, daemon=True)
    running.start()
    folder = Path(order["folder"]) / RUN / "events"
    log, started = Log(folder / "coordinator.jsonl"), Log(folder / "supervisor.jsonl")
    for peer in ("local-0", "local-1"):
        log.commit_with(peer, 0.0)
        started.until(lambda e, peer=peer: (e["event"], e["peer"]) == ("peer.started", peer), "a life")
    home = {each["peer"]: each["node"] for each in started.events if each["event"] == "peer.started"}
    node = next(each for each in others if each.node_id in home.values())
    victim = next(peer for peer, where in home.items() if where == node.node_id)
    killed = time.time()
    cluster.remove_node(node, allow_graceful=False)
    again = started.until(
        lambda e: e["event"] == "peer.started" and e["peer"] == victim and e["time_unix"] > killed, "its next life"
    )
    seconds = log.commit_with(victim, again["time_unix"]) - killed
    print(json.dumps({"seconds": seconds}), flush=True)
    ray.shutdown()
    cluster.shutdown()
    os._exit(0)  # the driver's thread still waits for a run that is over


# --- the report -------------------------------------------------------------------------------------------------------

GOALS = {"demo": 25.0, "join": 10.0, "restart": 6.0, "leave": 10.0, "node, tuned": 30.0}
TITLES = {
    "demo": "`elastic demo` to its first committed round",
    "join": "`elastic join` to its first contribution committed",
    "restart": "a peer's process is killed, to its next life's contribution",
    "leave": "SIGTERM to `elastic join`'s clean end",
    "node, tuned": "a node is killed, to the next life's contribution on a spare one",
    "node, Ray's own settings": "the same, with Ray's own settings",
}


def run(arguments: argparse.Namespace) -> None:
    found: dict[str, list[float]] = {}
    wanted = arguments.only.split(",")
    parts = (
        ("demo", lambda: demo(arguments.repeat)),
        ("site", lambda: sites(arguments.repeat, arguments.mib)),
        ("node", lambda: nodes(arguments.repeat, arguments.mib)),
    )
    for name, part in parts:
        for what, seconds in part() if name in wanted else ():
            found.setdefault(what, []).append(seconds)
            common.progress(f"{what}: {seconds:.2f} s")
    report = Report("lifecycle", "In a run, out of it, and back, loopback", COLUMNS)
    for what, seconds in found.items():
        goal = GOALS.get(what)
        reached = "" if goal is None else "yes" if sorted(seconds)[len(seconds) // 2] < goal else "MISSED"
        report.add((TITLES[what], common.spread(seconds), f"< {goal:g}" if goal else "", reached), seconds=seconds)
    report.notes.append(f"a model of {arguments.mib:g} MiB of float32; compute is a timed wait (but for the demo's)")
    common.publish(report, arguments)


def main() -> None:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="times each is measured (default 5)")
    parser.add_argument("--only", default="demo,site,node", help="of demo, site (join, restart, leave) and node")
    parser.add_argument("--size", dest="mib", type=float, default=10.0, help="MiB of parameters (default 10)")
    parser.add_argument("--node", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.node:
        kill_node(json.loads(arguments.node))
    with common.one_line_errors():
        run(arguments)


if __name__ == "__main__":
    main()

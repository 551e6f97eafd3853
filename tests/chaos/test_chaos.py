"""Real processes under random faults, and the run recomputed from what they noted.

The short schedules belong to every test run; `make chaos` goes on with new seeds for CHAOS_SECONDS. CHAOS_SEED names
the first of them, so that one that failed can be run again.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_account import Account
from chaos_harness import NAMES, Chaos, Server, pause, until
from chaos_worker import LOOPS

from benchmarks.wan.wan import Wan

SITES = ("p0", "p1", "p2", "p3", "p4")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    before = set(threading.enumerate())
    server = Server()
    yield server
    server.close()
    assert set(threading.enumerate()) <= before


def run(
    server: Server,
    folder: Path,
    seed: int,
    *,
    faults: int,
    samples: int,
    names: tuple[str, ...] = NAMES,
    wan: Wan | None = None,
    loop: str = "DiLoCo",
) -> str:
    """One run, from its start to the comparison. Returns one line about it."""
    began = time.monotonic()
    folder.mkdir()
    chaos = Chaos(server, folder, seed, samples=samples, pace=0.02, names=names, wan=wan, loop=loop)
    try:
        for _ in range(faults):
            chaos.strike_once()
        chaos.finish(90)
    except BaseException as error:
        error.add_note(f"seed {seed}, folder {folder}, faults so far: {', '.join(chaos.log)}")
        chaos.clean()
        raise
    account = Account(chaos)
    try:
        numbers = account.check()
    except BaseException as error:
        error.add_note(f"seed {seed}, folder {folder}, faults: {', '.join(chaos.log)}")
        raise
    struck = Counter(fault.partition(" ")[0] for fault in chaos.log)
    if wan is not None:
        assert chaos.drops() > 0 or not struck["cut"], "no path was cut while something went over it"
    return f"seed {seed}: {time.monotonic() - began:.0f} s, {dict(struck)}, {numbers}"


@pytest.mark.parametrize("seed, loop", [(183, "DiLoCo"), (145, "DelayedDiLoCo"), (77, "StreamingDiLoCo")])
def test_a_short_run_under_faults_is_what_its_contributions_make_it(
    server: Server, tmp_path: Path, seed: int, loop: str
) -> None:
    print(run(server, tmp_path / "run", seed, faults=6, samples=4000, loop=loop))


def test_ten_kills_of_the_coordinator_cost_nobody_anything(server: Server, tmp_path: Path) -> None:
    """No committed round is lost, no peer starts again, no cursor is repeated; a frozen coordinator evicts nobody."""
    folder = tmp_path / "run"
    folder.mkdir()
    chaos = Chaos(server, folder, 7, samples=4000, pace=0.02)
    try:
        for kill in range(10):
            until(lambda: len(chaos.well()) == len(NAMES), f"all training, before kill {kill}")
            back = chaos.kill("coordinator")
            pause(chaos.random.uniform(0.0, 0.5))
            back()
            goes_on(chaos, f"after kill {kill}")
        thaw = chaos.freeze("coordinator")
        pause(10.0)
        thaw()
        goes_on(chaos, "after the freeze")
        chaos.finish(90)
    except BaseException:
        chaos.clean()
        raise
    Account(chaos).check()
    killed = [life.label for life in chaos.lives if life.killed]
    assert killed == [f"coordinator.{life}" for life in range(1, 11)]
    assert sorted(life.label for life in chaos.lives if not life.killed) == [
        "coordinator.11",
        *(f"{n}.1" for n in NAMES),
    ]
    told = (folder / "coordinator.jsonl").read_text()
    assert '"peer.evicted"' not in told and told.count('"coordinator.started"') == 11


def goes_on(chaos: Chaos, when: str) -> None:
    """Somebody trains from a version that is newer than any before."""

    def newest() -> int:
        chaos.look()
        return max(chaos.now[name].version() for name in NAMES)

    since = newest()
    until(lambda: newest() > since, f"a round {when}")


def sites(name: str) -> Wan:
    """Each process at a site of its own."""
    pairs = itertools.combinations(("coordinator", *SITES), 2)
    topology = {
        "name": "chaos",
        "sites": {name: {} for name in ("coordinator", *SITES)},
        "default": {"rate_mbit": 500, "queue_ms": 50, "loss": 0.0001},
        "links": [{"between": list(pair), "rtt_ms": 6} for pair in pairs],
    }
    return Wan(topology, name=name, max_life=3600)


@pytest.mark.wan
def test_a_short_run_on_the_wan_with_cut_paths(server: Server, tmp_path: Path) -> None:
    with sites(f"c{os.getpid()}") as wan:
        print(run(server, tmp_path / "run", 11, faults=8, samples=6000, names=SITES, wan=wan))


@pytest.mark.chaos
@pytest.mark.wan
@pytest.mark.timeout(0)
def test_long_runs_on_the_wan_with_cut_paths(server: Server, tmp_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("CHAOS_SECONDS", "300"))
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 1_000_000))
    with sites(f"c{os.getpid()}") as wan:
        while time.monotonic() < deadline:
            folder = tmp_path / f"{seed}"
            print(run(server, folder, seed, faults=15, samples=12_000, names=SITES, wan=wan), flush=True)
            seed += 1


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_long_runs_under_faults(server: Server, tmp_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("CHAOS_SECONDS", "300"))
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 1_000_000))
    while time.monotonic() < deadline:
        loop = list(LOOPS)[seed % len(LOOPS)]
        print(loop, run(server, tmp_path / f"{seed}", seed, faults=15, samples=12_000, loop=loop), flush=True)
        seed += 1

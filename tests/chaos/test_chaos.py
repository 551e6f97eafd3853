"""Real processes under random faults, and the run recomputed from what they noted.

The short schedules belong to every test run; `make chaos` goes on with new seeds for CHAOS_SECONDS. CHAOS_SEED names
the first of them, so that one that failed can be run again.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_account import Account
from chaos_harness import Chaos, Server


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    before = set(threading.enumerate())
    server = Server()
    yield server
    server.close()
    assert set(threading.enumerate()) <= before


def run(server: Server, folder: Path, seed: int, *, faults: int, samples: int) -> str:
    """One run, from its start to the comparison. Returns one line about it."""
    began = time.monotonic()
    folder.mkdir()
    chaos = Chaos(server, folder, seed, samples=samples, pace=0.02)
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
    struck = Counter(fault.rpartition(" ")[0] for fault in chaos.log)
    return f"seed {seed}: {time.monotonic() - began:.0f} s, {dict(struck)}, {numbers}"


@pytest.mark.parametrize("seed", [183, 145])
def test_a_short_run_under_faults_is_what_its_contributions_make_it(server: Server, tmp_path: Path, seed: int) -> None:
    print(run(server, tmp_path / "run", seed, faults=6, samples=4000))


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_long_runs_under_faults(server: Server, tmp_path: Path) -> None:
    deadline = time.monotonic() + float(os.environ.get("CHAOS_SECONDS", "300"))
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 1_000_000))
    while time.monotonic() < deadline:
        print(run(server, tmp_path / f"{seed}", seed, faults=15, samples=12_000), flush=True)
        seed += 1

"""State transfer between sites: from three sources at the rate of the joiner's access, past a cut and a slow path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from xxhash import xxh3_128_hexdigest

from benchmarks.wan import wan as emulator
from benchmarks.wan.wan import Wan
from collectives import FetchError, Group, LinkOptions, Partial

pytestmark = pytest.mark.wan
ROOT = Path(__file__).parents[2]
DATA = np.random.default_rng(0).bytes(24 << 20)
DIGEST = xxh3_128_hexdigest(DATA)
ACCESS = 100  # Mbit/s of the joiner
SOURCES = ("site-a", "site-b", "site-c")
JOINER = "site-d"


@pytest.fixture
def wan() -> Iterator[Wan]:
    """wan3, and a joiner in Europe."""
    topology: dict[str, Any] = json.loads(Path(emulator.HERE, "wan3.json").read_text())
    topology["sites"][JOINER] = {"down_mbit": ACCESS}
    for source, rtt in zip(SOURCES, (20, 20, 100), strict=True):
        topology["links"].append({"between": [source, JOINER], "rtt_ms": rtt})
    with Wan(topology, name=f"f{os.getpid()}", max_life=300) as made:
        yield made


@contextmanager
def groups(wan: Wan, *served: bytes) -> Iterator[list[Group]]:
    """One at each site; those at the sources publish what they are given."""
    made: list[Group] = []
    try:
        for index, site in enumerate((*SOURCES, JOINER)):
            with wan.inside(site):
                options = LinkOptions(congestion_control="cubic")
                listen = f"{wan.addr(site)}:0"
                made.append(Group(run="run", name=site, incarnation=9 + index, listen=listen, options=options))
        for group, content in zip(made, served, strict=False):
            group.publish("k", [memoryview(content)], xxh3_128_hexdigest(content))
        yield made
    finally:
        for group in made:
            group.close()


class Once:
    """Does something once, when a part is here."""

    def __init__(self, part: float, act: Callable[[], object]) -> None:
        self.part, self.act, self.at = part, act, 0.0

    def __call__(self, here: int, total: int) -> None:
        if not self.at and here >= self.part * total:
            self.act()
            self.at = time.monotonic()


def drops(wan: Wan) -> int:
    return sum(int(link["drop_cut"]) for link in wan.links())


def fetch(wan: Wan, made: list[Group], partial: Partial, **more: Any) -> memoryview:
    with wan.inside(JOINER):
        sources = [group.member for group in made[:-1]]
        options = {"digest": DIGEST, "timeout": 100} | more
        return made[-1].fetch("k", sources, partial=partial, **options)


def test_three_sources_fill_the_access_of_the_joiner(wan: Wan) -> None:
    data = 2 * DATA  # the far source gets up to speed while the first half comes
    with groups(wan, data, data, data) as made:
        partial, began = Partial(), time.monotonic()
        assert fetch(wan, made, partial, digest=xxh3_128_hexdigest(data)) == data
        seconds = time.monotonic() - began
        assert all(record.bytes > 0 and record.lanes >= 8 for record in partial.sources.values()), partial.sources
        assert seconds > 8 * len(data) / (ACCESS * 1e6), "faster than the emulated access lets through"


def test_a_path_that_is_cut_on_the_way_holds_nothing_up(wan: Wan) -> None:
    with groups(wan, DATA, DATA, DATA) as made:
        partial, cut = Partial(), Once(0.3, lambda: wan.cut("site-a", JOINER))
        assert fetch(wan, made, partial, progress=cut) == DATA
        assert cut.at and drops(wan) > 0
        others = [partial.sources[name].bytes for name in ("site-b", "site-c")]
        assert sum(others) > 0.5 * len(DATA) and partial.sources["site-a"].bytes + sum(others) == len(DATA)


def test_when_all_paths_are_cut_what_came_is_kept(wan: Wan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("collectives.fetching.GIVE_UP_SECONDS", 2.0)
    monkeypatch.setattr("collectives.fetching._TRIES", 1)
    with groups(wan, DATA, DATA, DATA) as made:
        partial, cut = Partial(), Once(0.3, lambda: wan.cut(JOINER))
        with pytest.raises(FetchError, match="site-c: ") as caught:
            fetch(wan, made, partial, progress=cut)
        assert "bytes are here" in str(caught.value) and drops(wan) > 0
        before = partial.here
        assert 0.3 * len(DATA) <= before < len(DATA)
        wan.heal(JOINER)
        assert fetch(wan, made, partial) == DATA
        assert sum(record.bytes for record in partial.sources.values()) == len(DATA)


def test_a_slow_source_does_not_hold_the_end_up(wan: Wan) -> None:
    wan.set("site-c", JOINER, rate=2, both=False)
    with groups(wan, DATA, DATA, DATA) as made:
        partial = Partial()
        assert fetch(wan, made, partial) == DATA
        assert partial.sources["site-c"].bytes < len(DATA) / 10


def test_the_benchmark_joins_over_the_wan() -> None:
    options = ["--wan", "--size", "2", "--repeat", "1", "--access", "50", "--json", "-"]
    command = [sys.executable, "-m", "benchmarks.join", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=110)
    assert done.returncode == 0, done.stderr
    [sample] = json.loads(done.stdout)["samples"]
    [answer] = sample["answers"]
    assert answer["bytes"] == 2 * 2 << 20
    assert answer["fetch"] > 8 * answer["bytes"] / 50e6, "faster than the emulated access lets through"

"""Two doctors on an emulated WAN: what they say of the path is what the path was made to be."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.wan.wan import Wan
from elastic.doctor import paths, visiting
from elastic.doctor.facts import Machine, Pair
from elastic.doctor.hosting import Host
from elastic.doctor.judging import NOTE, OK, PROBLEM, Finding
from elastic.doctor.machine import look, side

pytestmark = pytest.mark.wan
PATH = {
    "sites": ["here", "there"],
    "default": {"rtt_ms": 100, "rate_mbit": 200, "loss": 0.001, "queue_ms": 50},
    "sysctl": {"net.ipv4.tcp_congestion_control": "reno"},  # cubic may be set for sockets alone
}


@pytest.fixture
def wan() -> Iterator[Wan]:
    with Wan(PATH, f"t{os.getpid()}", max_life=300) as made:
        yield made


@contextmanager
def serving(wan: Wan, *usable: str) -> Iterator[str]:
    """A doctor there; its address. usable: congestion controls beside the system's."""
    stop = threading.Event()
    with wan.inside("there"):
        host = Host(f"{wan.addr('there')}:0", side(machine(usable)), lambda line: None)
        thread = threading.Thread(target=host.serve, args=(stop,))
        thread.start()
    try:
        yield host.address
    finally:
        stop.set()
        thread.join(60)
        host.close()


def machine(usable: tuple[str, ...]) -> Machine:
    """As the calling thread sees it."""
    return dataclasses.replace(look(Path.cwd(), {}), usable=usable)


def come(wan: Wan, address: str, seconds: float, told: Callable[[str], None], *usable: str) -> Pair:
    with wan.inside("here"):
        return visiting.visit(address, machine(usable), seconds, told)


def the(check: str, found: Pair) -> Finding:
    (finding,) = [each for each in paths.judge_pair(found) if each.check == check]
    return finding


def test_what_is_measured_is_what_the_path_was_made_to_be(wan: Wan) -> None:
    with serving(wan, "cubic") as address:
        found = come(wan, address, 2.0, print, "cubic")
    assert min(each.round_trip for each in found.pings) == pytest.approx(0.1, rel=0.2)
    closest = min(found.pings, key=lambda each: each.round_trip)
    assert abs(closest.offset) <= closest.round_trip / 2 and abs(closest.offset) < 0.02  # one clock, even ways
    assert found.here.control == found.there.control == "reno"
    assert (found.seen, found.local) == (wan.addr("here"), wan.addr("here"))
    assert the("to be dialled", found).level == OK and found.dialled[0].address.startswith(wan.addr("here"))
    assert the("path MTU", found).fact == "1500 bytes to there, 1500 from there"
    for up in (True, False):
        by_count = paths.rates(found.samples, up, "cubic")
        # above the path's rate when packets of the first half arrive before a gap that is filled in the second
        assert 0.5 * 25e6 < max(by_count.values()) < 1.25 * 25e6
        assert by_count[1] < 0.9 * max(by_count.values()), "one connection should suffer from loss"
    assert sum(each.resent for each in found.samples) > 0
    assert paths.wanted_stripes(found, "cubic") > 1
    stripes = the("stripes", found)
    assert stripes.level == NOTE and int(stripes.settings[0].value) > 1


@pytest.mark.parametrize("cut, words", [("to", "does not arrive, though"), ("from", "nothing arrives from")])
def test_a_direction_that_is_cut_is_named(wan: Wan, cut: str, words: str) -> None:
    def told(line: str) -> None:
        """After the first measurement."""
        ways = ("here", "there") if cut == "to" else ("there", "here")
        wan.cut(*ways, both=False)

    with serving(wan) as address:
        found = come(wan, address, 0.5, told)
    assert sum(int(link["drop_cut"]) for link in wan.links()) > 0
    assert found.cut == cut and found.samples and len(found.pings) == visiting.PINGS
    finding = the("path", found)
    assert finding.level == PROBLEM and words in finding.fact
    wan.heal("here", "there")

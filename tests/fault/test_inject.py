"""Faults on purpose: what is refused, when they fire, how often, and that each firing is counted and noted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fault.inject import KINDS, Fault, Firing, Injector

VALID: dict[str, dict[str, Any]] = {
    "kill": {"round": 3},
    "freeze": {"round": 3, "seconds": 1.0},
    "hang": {"seconds": 0.05},
    "slow": {"factor": 3.0, "times": 2},
    "nan": {},
    "scale": {"factor": -7.5},
    "flip": {},
    "delay": {"delay": 0.1, "times": 2},
    "slow-link": {"factor": 2.0, "seconds": 60.0},
    "drop": {},
    "corrupt": {},
    "partition": {"seconds": 60.0, "peer": "b"},
    "full-disk": {"times": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_asked_for(kind: str) -> None:
    fault = Fault(kind=kind, **VALID[kind])
    assert Injector().arm(fault) == f"{kind}-1"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "explode"}, "kind 'explode' is not one of kill, freeze"),
        ({"kind": "slow", "seconds": 1}, "a slow fault needs factor"),
        ({"kind": "slow", "factor": 2}, "needs seconds or times: it would never end"),
        ({"kind": "slow", "factor": 1, "seconds": 1}, "must be a number above 1"),
        ({"kind": "slow", "factor": math.inf, "seconds": 1}, "factor is inf"),
        ({"kind": "freeze"}, "a freeze fault needs seconds"),
        ({"kind": "freeze", "seconds": 1, "times": 2}, "fires once, not 2 times"),
        ({"kind": "nan", "factor": 2}, "factor has no place in a nan fault"),
        ({"kind": "nan", "peer": "b"}, "peer has no place in a nan fault"),
        ({"kind": "delay", "times": 1}, "a delay fault needs delay"),
        ({"kind": "delay", "delay": 0, "times": 1}, "delay is 0: it must be a number above 0"),
        ({"kind": "drop", "times": 0}, "times is 0"),
        ({"kind": "drop", "times": 1.5}, "times is 1.5"),
        ({"kind": "drop", "times": True}, "times is True"),
        ({"kind": "drop", "seconds": -1}, "seconds is -1"),
        ({"kind": "drop", "at": -1}, "at is -1"),
        ({"kind": "drop", "at": "soon"}, "at is 'soon'"),
        ({"kind": "drop", "at": 1, "round": 1}, "stands instead of at"),
        ({"kind": "drop", "round": -1}, "round is -1"),
        ({"kind": "drop", "peer": ""}, "peer is ''"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as refused:
        Fault(**fields)
    assert "\n" not in str(refused.value)


def test_a_kill_by_time_is_not_the_process_s_own_affair() -> None:
    with pytest.raises(ValueError, match="sent from outside; give it a round"):
        Injector().arm(Fault(kind="kill", at=1.0))


def test_an_id_is_used_once() -> None:
    injector = Injector()
    injector.arm(Fault(kind="nan", id="x"))
    injector.contribution()
    with pytest.raises(ValueError, match="'x' is armed already, or was"):
        injector.arm(Fault(kind="flip", id="x"))


def test_without_a_fault_nothing_happens_at_any_point() -> None:
    injector = Injector()
    injector.stepped(1.0)
    injector.entered()
    injector.reached(5)
    injector.check_disk("x")
    injector.sent("b", 1.0)
    assert injector.contribution() is None and injector.sending("b", 10) is None and not injector.cut("b")
    assert injector.fired == {} and injector.statistics() == ()


def test_contributions_are_spoiled_as_often_as_was_asked_for() -> None:
    injector = Injector()
    injector.arm(Fault(kind="scale", factor=4.0, times=2))
    injector.arm(Fault(kind="flip"))
    assert [injector.contribution() for _ in range(3)] == [-4.0, 4.0, None]
    injector.arm(Fault(kind="nan"))
    assert math.isnan(injector.contribution() or 0.0)
    assert injector.fired == {"scale-1": 2, "flip-2": 1, "nan-3": 1}
    assert not any(each.armed for each in injector.statistics())


def test_it_waits_for_its_time_and_ends_by_itself() -> None:
    injector = Injector()
    injector.arm(Fault(kind="flip", at=0.2, seconds=0.3))
    began = time.monotonic()
    seen = []
    while time.monotonic() - began < 0.7:
        if injector.contribution() == -1.0:
            seen.append(time.monotonic() - began)
        time.sleep(0.01)
    assert seen and seen[0] >= 0.19 and injector.contribution() is None
    assert injector.fired == {"flip-1": len(seen)} and not injector.statistics()[0].armed


def test_it_waits_for_its_round() -> None:
    injector = Injector()
    injector.arm(Fault(kind="flip", round=3))
    for version in range(3):
        injector.reached(version)
        assert injector.contribution() is None
    injector.reached(4)
    assert injector.contribution() == -1.0
    injector.arm(Fault(kind="nan", round=2))
    assert injector.contribution() is not None, "that round is over"


def test_slow_steps_take_factor_times_as_long() -> None:
    injector = Injector()
    injector.arm(Fault(kind="slow", factor=5.0, times=1))
    began = time.monotonic()
    injector.stepped(0.05)
    assert 0.2 <= time.monotonic() - began < 5
    injector.stepped(10.0)
    assert time.monotonic() - began < 5
    assert injector.fired == {"slow-1": 1}


@pytest.mark.parametrize("end", ["time", "disarm", "close"])
def test_who_hangs_goes_on_after_its_time_or_when_it_is_let_go(end: str) -> None:
    injector = Injector()
    id = injector.arm(Fault(kind="hang", seconds=0.2 if end == "time" else 100.0))
    let_go = {"time": lambda: None, "disarm": lambda: injector.disarm(id), "close": injector.close}[end]
    timer = threading.Timer(0.1, let_go)
    timer.start()
    began = time.monotonic()
    injector.entered()
    assert 0.05 < time.monotonic() - began < 10
    assert injector.fired == {id: 1}
    timer.join()


def test_link_faults_befall_the_named_peer_and_frames_with_numbers() -> None:
    injector = Injector()
    injector.arm(Fault(kind="corrupt", peer="b", times=2))
    injector.arm(Fault(kind="drop", times=1))
    assert injector.sending("c", 0) is None
    assert injector.sending("c", 8) == (0.0, False, True)
    assert injector.sending("b", 8) == (0.0, True, False)
    assert injector.sending("c", 8) is None
    injector.arm(Fault(kind="delay", delay=0.5, seconds=60, peer="c"))
    assert injector.sending("c", 0) == (0.5, False, False)
    assert injector.sending("b", 0) is None
    injector.arm(Fault(kind="partition", seconds=60, peer="d"))
    assert injector.cut("d") and not injector.cut("c")
    assert injector.sending("d", 0) == (0.0, False, True)


def test_a_slow_link_owes_what_was_sent_too_quickly() -> None:
    injector = Injector()
    injector.sent("b", 1.0)
    id = injector.arm(Fault(kind="slow-link", factor=3.0, seconds=60, peer="b"))
    assert injector.sending("b", 8) is None, "what went before is not its affair"
    injector.sent("b", 0.1)
    injector.sent("b", 0.2)
    injector.sent("c", 5.0)
    assert injector.sending("c", 8) is None
    hold = injector.sending("b", 8)
    assert hold is not None and math.isclose(hold.hold, 2 * 0.3)
    assert injector.sending("b", 8) is None
    assert injector.fired == {id: 1}


def test_a_full_disk_is_an_oserror() -> None:
    injector = Injector()
    injector.arm(Fault(kind="full-disk", times=1))
    with pytest.raises(OSError, match="No space left on device") as full:
        injector.check_disk("checkpoint")
    assert full.value.errno == 28
    injector.check_disk("checkpoint")


def test_every_firing_is_noted_before_it_strikes_and_told(tmp_path: Path) -> None:
    told: list[Firing] = []
    injector = Injector("a", log=tmp_path / "log")
    injector.listen(told.append)
    injector.arm(Fault(kind="flip", times=2, id="f"))
    injector.arm(Fault(kind="partition", peer="b", times=3, id="p"))
    for _ in range(3):
        injector.contribution()
        injector.cut("b")
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(line["id"], line["count"]) for line in lines] == [("f", 1), ("p", 1), ("f", 2), ("p", 2), ("p", 3)]
    assert all(line["event"] == "fault.injected" and line["peer"] == "a" for line in lines)
    assert lines[1]["to"] == "b" and lines[0]["kind"] == "flip"
    assert [(firing.fault.id, firing.count) for firing in told] == [("f", 1), ("p", 1), ("f", 2)]


def test_threads_share_the_times(tmp_path: Path) -> None:
    injector = Injector("a", log=tmp_path / "log")
    id = injector.arm(Fault(kind="corrupt", times=100))
    with ThreadPoolExecutor(8) as pool:
        struck = sum(found is not None for found in pool.map(lambda _: injector.sending("b", 1), range(1000)))
    assert struck == 100 == injector.fired[id]
    counts = [json.loads(line)["count"] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(counts) == list(range(1, 101)), "a line is lost, or torn"


@pytest.mark.parametrize("kind", ["kill", "freeze"])
def test_a_process_strikes_itself_at_a_round_and_has_noted_it(tmp_path: Path, kind: str) -> None:
    code = f"""
from pathlib import Path
from fault.inject import Fault, Injector
injector = Injector("a", log=Path({str(tmp_path / "log")!r}))
injector.arm(Fault(kind={kind!r}, round=2, seconds={5.0 if kind == "freeze" else None}))
for version in range(3):
    injector.reached(version)
    print(version, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status) if kind == "freeze" else os.WTERMSIG(status) == signal.SIGKILL
        assert [json.loads(line)["kind"] for line in (tmp_path / "log").read_text().splitlines()] == [kind]
    finally:
        if kind == "freeze":
            process.send_signal(signal.SIGCONT)
            assert process.communicate(timeout=30)[0].split() == ["0", "1", "2"]
            assert process.returncode == 0
        elif process.stdout is not None:
            assert process.stdout.read().split() == ["0", "1"]
            process.stdout.close()
            process.returncode = -9

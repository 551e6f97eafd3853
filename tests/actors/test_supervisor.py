"""The supervisor and its peers in a real Ray: what ends, what is started again, and what is given up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.local_ray import _children, local_ray
from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.events import EventReader

# One Ray for all tests of the module takes four seconds to start; each test then has a run of its own.
pytestmark = pytest.mark.timeout(180)

TIMEOUTS = Timeouts(chunk=1.0, evict_after=2.0)
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import elastic

def fine(peer, config):
    return {"name": peer.name, "life": peer.life, "config": config}

def broken(peer, config):
    raise ValueError(f"{peer.name} has no such file: data.bin")

def dies(peer, config):
    print(f"life {peer.life} reads shard 7")
    print("and finds it bad", file=sys.stderr)
    os.kill(os.getpid(), signal.SIGKILL)

def aborts(peer, config):
    print("the last word")
    os.abort()

def in_quarantine(peer, config):
    class Quarantined(elastic.Evicted):
        retry_after = 0.7
    if peer.life <= 2:
        raise Quarantined("come back later")
    return {"life": peer.life}

def superseded(peer, config):
    elastic.Peer(config["address"], run="site", name=peer.name)
    peer.wait_for(9)

def falls_silent_once(peer, config):
    if peer.life > 1:
        return {"life": peer.life}
    beat, peer._control._on_beat = peer._control._on_beat, lambda: None
    time.sleep(3)
    peer._control._on_beat = beat
    peer.wait_for(9)

def dies_once(peer, config):
    if peer.life == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"life": peer.life}

def hangs_once(peer, config):
    if peer.life == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(1000)
    return {"life": peer.life}
"""


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = _children()
    with local_ray(num_cpus=4, log=tmp_path_factory.mktemp("ray") / "ray.log"):
        yield
    assert _children() <= before, "Ray left processes behind"


@pytest.fixture
def site(ray_here: None, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Starts a supervisor with one peer that runs `function`; returns its report once the peer is done with."""
    import ray

    from actors.peer import PeerSpec
    from actors.restarts import RestartPolicy
    from actors.supervisor import EventLogSpec, SiteSupervisor

    script = tmp_path / f"script_{os.getpid()}.py"
    script.write_text(SCRIPT)
    with Coordinator(run="site", policy=RunPolicy(), timeouts=TIMEOUTS, events=tmp_path / "events.jsonl") as served:
        started: list[Any] = []

        def start(function: str, *, run: str = "site", broken: bool = False, **options: Any) -> Any:
            policy = RestartPolicy(**options)
            if broken:
                object.__setattr__(policy, "window_seconds", None)
            spec = PeerSpec(
                coordinator=served.address,
                run=run,
                name="p0",
                site="here",
                script=str(script),
                function=function,
                config={"address": served.address},
                timeouts=TIMEOUTS,
                events_dir=str(tmp_path),
            )
            actor: Any = SiteSupervisor
            log = EventLogSpec(run="site", path=tmp_path / "supervisor.jsonl")
            supervisor = actor.remote([spec], policy, log)
            started.append(supervisor)
            ray.get(supervisor.start.remote())
            return settled(supervisor)

        yield start
        for supervisor in started:
            ray.get(supervisor.stop.remote())
            ray.kill(supervisor)


def settled(supervisor: Any) -> Any:
    import ray

    deadline, pause = time.monotonic() + 120, threading.Event()
    while True:
        report = ray.get(supervisor.report.remote())[0]
        if report.state in ("finished", "failed"):
            return report
        assert time.monotonic() < deadline, report
        pause.wait(0.1)


def events(folder: Path, name: str = "") -> list[dict[str, Any]]:
    said = list(EventReader(folder / "supervisor.jsonl").read())
    return [event for event in said if event["event"] == name or not name]


def test_what_the_training_function_returns_comes_back(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("fine")
    assert report.state == "finished" and report.lives == 1
    result = report.trained.result
    assert (result["name"], result["life"]) == ("p0", 1) and result["config"]["address"].startswith("tcp://")


def test_an_exception_is_given_with_its_words_and_not_tried_again(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("broken")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.reason == "ValueError: p0 has no such file: data.bin"
    assert 'raise ValueError(f"{peer.name} has no such file: data.bin")' in report.error, "its traceback is in the log"
    assert events(tmp_path)[-1]["event"] == "peer.failed"


def test_a_dead_peer_gets_its_next_life_and_its_death_is_proven(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("dies_once")
    assert (report.state, report.lives) == ("finished", 2) and report.trained.result == {"life": 2}
    happened = [event["event"] for event in events(tmp_path)]
    assert happened == ["peer.started", "peer.lost", "peer.restarted", "peer.started"]
    said = list(EventReader(tmp_path / "events.jsonl").read())
    evicted = next(event for event in said if event["event"] == "peer.evicted")
    assert evicted["evidence"] == "its process has ended", "the coordinator was told, and did not have to wait"


def test_a_peer_that_hangs_is_ended_and_gets_its_next_life(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("hangs_once", hang_seconds=3.0)
    assert (report.state, report.lives) == ("finished", 2)
    assert [event["evidence"] for event in events(tmp_path, "peer.lost")] == ["it hangs"]


def test_a_peer_that_keeps_dying_is_given_up_with_what_it_said_last(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("dies", max_restarts=2, pause_seconds=0.5)
    assert (report.state, report.lives) == ("failed", 3)
    assert report.reason.startswith("ended 3 times within ")
    assert " s (its process has ended): ActorDiedError: The actor died unexpectedly" in report.reason
    assert report.error.endswith(
        f"\nthe last lines of {tmp_path}/logs/p0.3.log:\n  life 3 reads shard 7\n  and finds it bad"
    )
    (failed,) = events(tmp_path, "peer.failed")
    assert failed["reason"] == report.reason and failed["said"] == ["life 3 reads shard 7", "and finds it bad"]
    assert [event["after"] for event in events(tmp_path, "peer.restarted")] == [0.0, 0.5], "it does not spin"
    assert sorted(file.name for file in (tmp_path / "logs").iterdir()) == ["p0.1.log", "p0.2.log", "p0.3.log"]


def test_the_last_words_of_an_abort_are_in_the_report(site: Callable[..., Any]) -> None:
    report = site("aborts", max_restarts=0)
    assert (report.state, report.lives) == ("failed", 1) and report.reason.startswith("ended once (")
    assert "Fatal Python error: Aborted" in report.error and "in aborts" in report.error


def test_a_quarantined_peer_comes_back_when_it_may_and_that_is_no_crash(
    site: Callable[..., Any], tmp_path: Path
) -> None:
    report = site("in_quarantine", max_restarts=0)
    assert (report.state, report.lives) == ("finished", 3), report.error
    restarts, starts = events(tmp_path, "peer.restarted"), events(tmp_path, "peer.started")[1:]
    assert [event["after"] for event in restarts] == [0.7] * 2 and not events(tmp_path, "peer.lost")
    waits = [start["monotonic"] - told["monotonic"] for told, start in zip(restarts, starts, strict=True)]
    assert min(waits) >= 0.7


def test_who_took_its_name_is_left_alone(site: Callable[..., Any]) -> None:
    report = site("superseded")
    assert (report.state, report.lives) == ("failed", 1)
    assert "another life of this name has joined" in report.reason


def test_a_peer_that_was_expelled_for_its_silence_comes_back(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("falls_silent_once")
    assert (report.state, report.lives) == ("finished", 2), report.error
    (lost,) = events(tmp_path, "peer.lost")
    assert lost["evidence"].startswith("peer p0 was expelled: silent for")


def test_a_peer_that_cannot_begin_is_given_up_at_once_with_the_reason(site: Callable[..., Any]) -> None:
    report = site("fine", run="no name")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.reason.startswith("run 'no name' is not a name: use 1 to 63 letters")


def test_a_peer_that_its_supervisor_cannot_keep_is_given_up(site: Callable[..., Any]) -> None:
    """A policy of a wrong type stands for any fault of the supervisor's own."""
    report = site("dies", broken=True)
    assert (report.state, report.lives) == ("failed", 1) and report.reason.startswith("TypeError: ")

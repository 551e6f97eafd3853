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

SCRIPT = """
import os, signal, time
from pathlib import Path

def fine(peer, config):
    return {"name": peer.name, "life": peer.life, "config": config}

def broken(peer, config):
    raise ValueError(f"{peer.name} has no such file: data.bin")

def dies(peer, config):
    os.kill(os.getpid(), signal.SIGKILL)

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
    from actors.supervisor import EventLogSpec, RestartPolicy, SiteSupervisor

    script = tmp_path / f"script_{os.getpid()}.py"
    script.write_text(SCRIPT)
    with Coordinator(run="site", policy=RunPolicy(), timeouts=Timeouts(), events=tmp_path / "events.jsonl") as served:
        started: list[Any] = []

        def start(function: str, *, run: str = "site", **policy: Any) -> Any:
            spec = PeerSpec(
                coordinator=served.address,
                run=run,
                name="p0",
                site="here",
                script=str(script),
                function=function,
                config={"x": 1},
            )
            actor: Any = SiteSupervisor
            log = EventLogSpec(run="site", path=tmp_path / "supervisor.jsonl")
            supervisor = actor.remote([spec], RestartPolicy(**policy), log)
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


def events(folder: Path, file: str) -> list[str]:
    return [event["event"] for event in EventReader(folder / file).read()]


def test_what_the_training_function_returns_comes_back(site: Callable[..., Any]) -> None:
    report = site("fine")
    assert report.state == "finished" and report.lives == 1
    assert report.trained.result == {"name": "p0", "life": 1, "config": {"x": 1}}


def test_an_exception_is_given_with_its_words_and_not_tried_again(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("broken")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.error == "ValueError: p0 has no such file: data.bin"
    assert events(tmp_path, "supervisor.jsonl")[-1] == "peer.failed"


def test_a_dead_peer_gets_its_next_life_and_its_death_is_proven(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("dies_once")
    assert (report.state, report.lives) == ("finished", 2) and report.trained.result == {"life": 2}
    assert events(tmp_path, "supervisor.jsonl") == ["peer.started", "peer.lost", "peer.restarted", "peer.started"]
    said = list(EventReader(tmp_path / "events.jsonl").read())
    evicted = next(event for event in said if event["event"] == "peer.evicted")
    assert evicted["evidence"] == "its process has ended", "the coordinator was told, and did not have to wait"


def test_a_peer_that_hangs_is_ended_and_gets_its_next_life(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("hangs_once", hang_seconds=3.0)
    assert (report.state, report.lives) == ("finished", 2)
    lost = next(event for event in EventReader(tmp_path / "supervisor.jsonl").read() if event["event"] == "peer.lost")
    assert lost["evidence"] == "it hangs"


def test_a_peer_that_keeps_dying_is_given_up(site: Callable[..., Any]) -> None:
    report = site("dies", max_restarts=1)
    assert (report.state, report.lives) == ("failed", 2) and "ended 2 times" in report.error


def test_a_peer_that_cannot_begin_is_given_up_at_once_with_the_reason(site: Callable[..., Any]) -> None:
    report = site("fine", run="no name")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.error.startswith("run 'no name' is not a name: use 1 to 63 letters")


def test_a_peer_that_its_supervisor_cannot_keep_is_given_up(site: Callable[..., Any]) -> None:
    """A policy of a wrong type stands for any fault of the supervisor's own."""
    report = site("dies", window_seconds=None)
    assert (report.state, report.lives) == ("failed", 1) and report.error.startswith("TypeError: ")

"""The supervisor and its peers in a real Ray: what ends, what is started again, and what is given up."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError
from elastic.events import EventReader

pytestmark = pytest.mark.timeout(180)

SHORT = Timeouts(chunk=1.0, evict_after=2.0)
IMPATIENT = Timeouts(hang=2.0, evict_after=4.0)
SAMPLES = 700
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import elastic, torch

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
    if peer.life == 1:
        raise elastic.Quarantined("come back later", retry_after=0.7)
    return {"life": peer.life}

def banned(peer, config):
    raise elastic.Quarantined("for good", retry_after=float("inf"))

def gets_stuck(peer, config):
    gate, model = Path(config["gate"]), torch.nn.Linear(1, 1)
    if peer.life > 1:
        gate.touch()
        return {"life": peer.life}
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    with elastic.DiLoCo(model, inner, peer, sync_every=2):
        for step in range(2000):
            if peer.name == "p1" and step == 40:
                print("it waits for a lock")
                time.sleep(1000)
            if gate.exists():
                break
            time.sleep(0.05)
            model(torch.ones(1, 1)).sum().backward()
            inner.step()
            inner.zero_grad()
    return {"life": peer.life}

def superseded(peer, config):
    elastic.Peer(config["address"], run="site", name=peer.name)
    peer.wait_for(9)

class Numbers:
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.tensor([float(index)])

def learns(peer, config):
    model = torch.nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    gate, steps = Path(config["gate"]), 0
    if peer.life == 1:
        peer.wait_for(2)
    with elastic.DiLoCo(model, inner, peer, sync_every=2) as outer:
        if peer.life == 1:
            peer.barrier(tag="begin")  # so that both hold what is committed
        for batch in peer.shards(Numbers(), batch_size=2, shard_size=20, epochs=1):
            model(batch).sum().backward()
            inner.step()
            inner.zero_grad()
            steps += 1
            if steps == 5 and peer.name == config["breaks"]:
                print(f"life {peer.life} breaks after version {outer.version.number}", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if steps == 6 and peer.name == "p0":
                gate.touch()
            if peer.name == "p1" and not gate.exists():
                time.sleep(0.3)  # or nothing would be left for the others
    return {"life": peer.life, "steps": steps}

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


class Run:
    """A coordinator, and supervisors that a test starts."""

    def __init__(self, served: Coordinator, folder: Path, timeouts: Timeouts) -> None:
        self.served, self.folder, self.timeouts = served, folder, timeouts
        self.script = folder / f"script_{os.getpid()}.py"
        self.script.write_text(SCRIPT.replace("SAMPLES", str(SAMPLES)))
        self.supervisors: list[Any] = []

    def spec(self, function: str, name: str = "p0", *, run: str = "site", site: str = "here", **config: Any) -> Any:
        from actors.peer import PeerSpec

        return PeerSpec(
            coordinator=self.served.address,
            run=run,
            name=name,
            site=site,
            script=str(self.script),
            function=function,
            config={"address": self.served.address} | config,
            timeouts=self.timeouts,
            events_dir=str(self.folder / site),
        )

    def start(self, specs: list[Any], policy: Any, **options: Any) -> Any:
        import ray

        from actors.supervisor import EventLogSpec, SiteSupervisor

        site = (options.get("template") or specs[0]).site
        actor: Any = SiteSupervisor
        log = EventLogSpec(run="site", path=self.folder / site / "supervisor.jsonl")
        supervisor = actor.remote(specs, policy, log, **options)
        self.supervisors.append(supervisor)
        ray.get(supervisor.start.remote())
        return supervisor

    def said(self, *names: str) -> list[dict[str, Any]]:
        """What the coordinator has reported."""
        return [event for event in EventReader(self.folder / "events.jsonl").read() if event["event"] in names]


@pytest.fixture
def run(ray_here: None, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Run]:
    """With timeouts as a test says, else with those that are the default."""
    import ray

    timeouts = getattr(request, "param", Timeouts())
    with Coordinator(run="site", policy=RunPolicy(), timeouts=timeouts, events=tmp_path / "events.jsonl") as served:
        run = Run(served, tmp_path, timeouts)
        yield run
        for supervisor in run.supervisors:
            ray.get(supervisor.stop.remote())
            ray.kill(supervisor)


@pytest.fixture
def site(run: Run) -> Callable[..., Any]:
    """Starts a supervisor with one peer that runs `function`; returns its report once the peer is done with."""
    from actors.restarts import FailureConfig

    def start(function: str, *, name: str = "site", broken: bool = False, **options: Any) -> Any:
        policy = FailureConfig(**options)
        if broken:
            object.__setattr__(policy, "window_seconds", None)
        return settled(run.start([run.spec(function, run=name)], policy))

    return start


def settled(supervisor: Any, name: str = "p0") -> Any:
    import ray

    deadline, pause = time.monotonic() + 120, threading.Event()
    while True:
        reports = {report.name: report for report in ray.get(supervisor.report.remote())}
        if name in reports and reports[name].state in ("finished", "failed"):
            return reports[name]
        assert time.monotonic() < deadline, reports
        pause.wait(0.1)


def events(folder: Path, name: str = "") -> list[dict[str, Any]]:
    said = list(EventReader(folder / "here" / "supervisor.jsonl").read())
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


def test_a_dead_peer_gets_its_next_life_and_its_death_is_proven(
    site: Callable[..., Any], run: Run, tmp_path: Path
) -> None:
    report = site("dies_once")
    assert (report.state, report.lives) == ("finished", 2) and report.trained.result == {"life": 2}
    happened = [event["event"] for event in events(tmp_path)]
    assert happened == ["peer.started", "peer.lost", "peer.restarted", "peer.started"]
    assert run.said("peer.evicted")[0]["evidence"] == "its process has ended", (
        "the coordinator was told, and did not have to wait"
    )


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
        f"\nthe last lines of {tmp_path}/here/logs/p0.3.log:\n  life 3 reads shard 7\n  and finds it bad"
    )
    (failed,) = events(tmp_path, "peer.failed")
    assert failed["reason"] == report.reason and failed["said"] == ["life 3 reads shard 7", "and finds it bad"]
    assert [event["after"] for event in events(tmp_path, "peer.restarted")] == [0.0, 0.5], "it does not spin"
    assert sorted(file.name for file in (tmp_path / "here" / "logs").iterdir()) == ["p0.1.log", "p0.2.log", "p0.3.log"]


def test_the_last_words_of_an_abort_are_in_the_report(site: Callable[..., Any]) -> None:
    report = site("aborts", max_restarts=0)
    assert (report.state, report.lives) == ("failed", 1) and report.reason.startswith("ended once (")
    assert "Fatal Python error: Aborted" in report.error and "in aborts" in report.error
    assert "\n  the last word\n" in report.error, report.error


def test_a_quarantined_peer_comes_back_when_it_may_and_that_is_no_crash(
    site: Callable[..., Any], tmp_path: Path
) -> None:
    report = site("in_quarantine", max_restarts=0)
    assert (report.state, report.lives) == ("finished", 2), report.error
    restarts, starts = events(tmp_path, "peer.restarted"), events(tmp_path, "peer.started")[1:]
    assert [event["after"] for event in restarts] == [0.7] and not events(tmp_path, "peer.lost")
    waits = [start["monotonic"] - told["monotonic"] for told, start in zip(restarts, starts, strict=True)]
    assert min(waits) >= 0.7


def test_who_is_barred_for_good_is_given_up_at_once(site: Callable[..., Any]) -> None:
    report = site("banned")
    assert (report.state, report.lives) == ("failed", 1) and "for good" in report.reason


@pytest.mark.parametrize("run", [IMPATIENT], indirect=True)
def test_a_script_that_is_stuck_is_named_ended_and_started_again(run: Run) -> None:
    """Its process answers, and its heart beats: only its steps have stopped."""
    from actors.restarts import FailureConfig

    gate = str(run.folder / "gate")
    supervisor = run.start([run.spec("gets_stuck", name, gate=gate) for name in ("p0", "p1")], FailureConfig())
    report = settled(supervisor, "p1")
    assert (report.state, report.lives, report.trained.result) == ("finished", 2, {"life": 2}), report.error
    assert settled(supervisor).lives == 1
    blamed = [(event["kind"], event["culprits"]) for event in run.said("anomaly.confirmed")]
    assert blamed == [("hang outside communication", ["p1"])]
    assert [event["culprits"] for event in run.said("peer.left_out")] == [["p1"]]
    assert [event["peer"] for event in run.said("peer.ended")] == ["p1"]
    assert not run.said("peer.quarantined"), "that a script is stuck says nothing of its machine"


def test_who_took_its_name_is_left_alone(site: Callable[..., Any]) -> None:
    report = site("superseded")
    assert (report.state, report.lives) == ("failed", 1)
    assert "another life of this name has joined" in report.reason


@pytest.mark.parametrize("run", [SHORT], indirect=True)
def test_a_peer_that_was_expelled_for_its_silence_comes_back(site: Callable[..., Any], tmp_path: Path) -> None:
    report = site("falls_silent_once")
    assert (report.state, report.lives) == ("finished", 2), report.error
    (lost,) = events(tmp_path, "peer.lost")
    assert lost["evidence"].startswith("peer p0 was expelled: silent for")


def test_a_peer_that_cannot_begin_is_given_up_at_once_with_the_reason(site: Callable[..., Any]) -> None:
    report = site("fine", name="no name")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.reason.startswith("run 'no name' is not a name: use 1 to 63 letters")


def test_a_peer_that_its_supervisor_cannot_keep_is_given_up(site: Callable[..., Any]) -> None:
    """A policy of a wrong type stands for any fault of the supervisor's own."""
    report = site("dies", broken=True)
    assert (report.state, report.lives) == ("failed", 1) and report.reason.startswith("TypeError: ")


# --- what becomes of the work of a peer that is given up ------------------------------------------------------------


def check_data(run: Run) -> None:
    report = run.served.audit()
    (epoch,) = report.epochs
    assert report.passed and epoch.complete and (epoch.committed, epoch.twice, epoch.partial) == (SAMPLES, 0, 0)


def test_the_survivors_read_what_a_crash_loop_has_left_each_sample_once(run: Run) -> None:
    from actors.restarts import FailureConfig

    gate = run.folder / "gate"
    specs = [run.spec("learns", name, breaks="p0", gate=str(gate)) for name in ("p0", "p1")]
    supervisor = run.start(specs, FailureConfig(max_restarts=1))
    failed = settled(supervisor)
    gate.touch()
    assert (failed.state, failed.lives) == ("failed", 2) and "\n  life 2 breaks after version " in failed.error
    survivor = settled(supervisor, "p1")
    assert (survivor.state, survivor.lives) == ("finished", 1), survivor.error
    reassigned = run.said("shard.reassigned")
    assert reassigned and {(event["peer"], event["before"]) for event in reassigned} == {("p1", "p0")}
    assert [event["reason"] for event in run.said("vacancy.closed")] == ["no site has room for it"]
    given_up, released = run.said("vacancy.opened")[0], run.said("shard.released")[0]
    assert released["monotonic"] - given_up["monotonic"] < 1.0, "nobody had to wait for its shards"
    check_data(run)


def test_another_site_takes_up_the_place_of_a_peer_that_is_given_up(run: Run) -> None:
    from actors.restarts import FailureConfig

    gate = run.folder / "gate"
    template = run.spec("learns", "spare", site="there", breaks="", gate=str(gate))
    there = run.start([], FailureConfig(), room=1, template=template)
    here = run.start(
        [run.spec("learns", name, breaks="p0", gate=str(gate)) for name in ("p0", "p1")], FailureConfig(max_restarts=0)
    )
    failed = settled(here)
    assert (failed.state, failed.lives) == ("failed", 1)
    taken = settled(there)
    assert (taken.state, taken.lives) == ("finished", 1), taken.error
    assert taken.trained.result["life"] == 2 and taken.trained.result["steps"] > 5
    assert settled(here, "p1").state == "finished"
    offered, filled = run.said("vacancy.offered", "vacancy.filled")
    assert (offered["peer"], offered["site"]) == (filled["peer"], filled["site"]) == ("p0", "there")
    assert not [event for event in run.said("shard.released") if event["monotonic"] < filled["monotonic"]]
    check_data(run)


def test_a_supervisor_that_cannot_be_is_named() -> None:
    from actors.peer import PeerSpec
    from actors.supervisor import _template

    one = PeerSpec(coordinator="tcp://127.0.0.1:1", run="r", name="p0", site="here", script="train.py")
    with pytest.raises(ConfigurationError, match="room is -1: it must be 0"):
        _template([one], None, -1)
    with pytest.raises(ConfigurationError, match="peers p0 and p1 are not of the same run and site"):
        _template([one, replace(one, name="p1", site="there")], None, 0)
    with pytest.raises(ConfigurationError, match="a supervisor without peers of its own needs a template"):
        _template([], None, 1)

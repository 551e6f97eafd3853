"""`elastic.Trainer` in a real Ray: runs that end well, fail, grow, shrink, lose their driver, and are asked to end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trainees
from shared_ray import SharedRay, check_nobody_is_left, until

import elastic
from actors.local_ray import NAMESPACE, _adopt_orphans, _children
from elastic.audit import audit, summary
from elastic.checkpoints import Store
from elastic.checkpoints.entries import Entry
from elastic.checkpoints.storage import Folder
from elastic.events import EventReader
from elastic.journal import read_copy

pytestmark = pytest.mark.timeout(300)

DRIVER = Path(trainees.__file__)


@pytest.fixture(autouse=True)
def trainees_travel_by_value() -> Iterator[None]:
    """As what a script holds that is run by itself would: the peers cannot import this folder."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(trainees)
    yield
    cloudpickle.unregister_pickle_by_value(trainees)


class Fit(threading.Thread):
    """A run, and a trainer that fits it in a thread of its own."""

    def __init__(self, folder: Path, function: Callable[..., Any] = trainees.learns, **options: Any) -> None:
        super().__init__(daemon=True)
        self.folder, self.path = folder, folder / "run"
        self.config = trainees.config_in(folder, **options.pop("config", {}))
        self.trainer = elastic.Trainer(
            function,
            config=self.config,
            scaling_config=elastic.ScalingConfig(**options.pop("scaling", {})),
            failure_config=elastic.FailureConfig(**options.pop("failure", {})),
            run_config=elastic.RunConfig(name="run", storage_path=folder, **options),
        )
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self.trainer.fit()
        except BaseException as error:
            self.error = error

    def outcome(self) -> elastic.Result:
        """Once it has ended."""
        self.join(120)
        assert not self.is_alive(), "it goes on"
        if self.error is not None:
            raise self.error
        result: elastic.Result = self.result
        return result

    def open_gate(self) -> None:
        Path(self.config["gate"]).touch()


def supervisor() -> Any:
    import ray

    try:
        return ray.get_actor("run.supervisor", namespace=NAMESPACE)
    except ValueError:
        return None


def states() -> dict[str, str]:
    return {name: report.state for name, report in reports().items()}


def reports() -> dict[str, Any]:
    """What the supervisor says of its peers; nothing while there is none."""
    import ray

    actor = supervisor()
    return {report.name: report for report in ray.get(actor.report.remote())} if actor else {}


def until_running(count: int, version: int = 0) -> dict[str, Any]:
    """Once so many peers run; returns their reports."""
    running = lambda: [report for report in reports().values() if report.state == "running"]  # noqa: E731
    until(lambda: len(running()) == count)
    return {report.name: report for report in running()}


def said(path: Path, writer: str, *names: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(path / "events" / f"{writer}.jsonl").read() if event["event"] in names]


def rounds(path: Path) -> int:
    return len(said(path, "coordinator", "round.committed"))


def until_more_rounds(path: Path, more: int = 2) -> None:
    before = rounds(path)
    until(lambda: rounds(path) >= before + more)


def check_data(path: Path, samples: int | None = None) -> None:
    """No sample counted twice, none left out between; of a run to the end of its data, each of them once."""
    name, records = read_copy(path / "journal.sqlite")
    report = summary(name, audit(records))
    (epoch,) = report.epochs
    assert report.passed and epoch.twice == 0 and epoch.committed > 0
    assert samples is None or (epoch.complete and epoch.committed == samples)


def check_history(history: list[dict[str, Any]]) -> None:
    """Of each life every entry, in order, once."""
    seen = defaultdict(list)
    for entry in history:
        seen[entry["peer"], entry["life"]].append(entry["metrics"]["steps"])
        assert entry["step"] >= 0 and entry["loss"] is not None and entry["time_unix"] > 0
    for life, steps in seen.items():
        assert steps == list(range(1, len(steps) + 1)), life


# --- to the end -----------------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_metrics_and_its_checkpoint(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": 3}, config={"samples": 600, "pause": 0.01})
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    result = fit.trainer.fit()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert result.error is None and result.path == fit.path
    trained = {report.name: report.trained.result for report in result.peers if report.trained}
    assert trained.keys() == {"local-0", "local-1", "local-2"}
    check_history(result.metrics_history)
    assert len(result.metrics_history) == sum(each["steps"] for each in trained.values())
    assert result.metrics == result.metrics_history[-1]
    assert result.checkpoint is not None
    entry = Entry.at(Folder.at(str(result.checkpoint)))
    assert entry is not None and entry.number == max(each["version"] for each in trained.values()) > 0
    assert Store(str(result.path / "checkpoints"), "run", "outer").read(entry).parameters()["weight"].shape == (1, 1)
    check_data(result.path, 600)
    with pytest.raises(elastic.ConfigurationError, match=r"run 'run' has ended, .*: choose another"):
        fit.trainer.fit()


def test_an_exception_ends_a_run_that_needs_all_its_peers(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, trainees.one_raises, scaling={"num_peers": 2})
    with pytest.raises(elastic.TrainingFailed) as caught:
        fit.trainer.fit()
    error = caught.value
    assert str(error).splitlines()[0] == f"peer local-1: NotThere: local-1 {trainees.WORDS}" and error.peer == "local-1"
    assert "in one_raises" in error.traceback and error.traceback in str(error)
    assert type(error.__cause__).__name__ == "NotThere" and str(error.__cause__) == f"local-1 {trainees.WORDS}"


def test_a_run_goes_on_without_a_peer_that_raises_if_the_others_suffice(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, trainees.one_raises, scaling={"num_peers": (1, 2)}, config={"samples": 200, "pause": 0.01})
    result = fit.trainer.fit()
    assert isinstance(result.error, elastic.TrainingFailed) and result.error.peer == "local-1"
    assert {report.name: report.state for report in result.peers} == {"local-0": "finished", "local-1": "failed"}
    check_data(result.path, 200)


def test_what_cannot_be_sent_is_named(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(elastic.ConfigurationError, match="train_fn and config cannot be sent to peers: TypeError: "):
        elastic.Trainer(lambda peer, config: lock).fit()


# --- room -----------------------------------------------------------------------------------------------------------


def test_a_peer_that_no_node_could_hold_is_refused_at_once(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": 2, "cpus_per_peer": 64, "resources": {"tape": 1}}, start_seconds=1000.0)
    with pytest.raises(elastic.NotEnoughPeers) as caught:
        fit.trainer.fit()
    assert str(caught.value) == (
        "no node can hold a peer: it needs 64 CPUs, 1 tape; the largest of 2 nodes has 4 CPUs (4 free), 0 tape (0 "
        "free), all together 4 CPUs (4 free), 0 tape (0 free). Add such a node, or ask for less in ScalingConfig "
        "(cpus_per_peer, resources['tape'])"
    )


def test_too_few_that_find_room_in_time_are_one_clear_message(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": (3, 4), "cpus_per_peer": 2}, start_seconds=12.0)
    with pytest.raises(elastic.NotEnoughPeers) as caught:
        fit.trainer.fit()
    assert str(caught.value).startswith(
        "2 of at least 3 peers have found room within 12 s: each needs 2 CPUs; the largest of 2 nodes has 4 CPUs "
        "(0 free), all together 4 CPUs (0 free). Add nodes, free some, ask for less in ScalingConfig (cpus_per_peer)"
    )


def test_there_are_more_peers_when_nodes_appear_and_fewer_when_they_go(
    shared_ray: SharedRay, nodes: Any, tmp_path: Path
) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": (1, 3)}, failure={"max_restarts": 0})
    fit.start()
    first = until_running(2)
    until(lambda: sorted(states().values()) == ["running", "running", "waiting"])
    shared_ray.add(1)
    three = until_running(3)
    assert {name: three[name].pid for name in first} == {name: report.pid for name, report in first.items()}
    lost = max(first)
    (killed,) = [node for node in nodes.worker_nodes if node.node_id == first[lost].node]
    nodes.remove_node(killed, allow_graceful=False)
    until(lambda: states()[lost] == "waiting")
    until_more_rounds(fit.path)
    assert len(until_running(2)) == 2
    shared_ray.add(1)
    back = until_running(3)
    fit.open_gate()
    result = fit.outcome()
    assert result.error is None and all(report.state == "finished" for report in result.peers)
    assert {name: report.lives for name, report in back.items()} == dict.fromkeys(back, 1) | {lost: 2}
    (event,) = said(fit.path, "supervisor", "peer.lost")
    assert event["peer"] == lost and event["node"] == first[lost].node
    check_data(fit.path)


# --- processes that die ---------------------------------------------------------------------------------------------


def test_one_peer_is_started_again_and_the_others_go_on(ray_here: None, tmp_path: Path) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": 3})
    fit.start()
    first = until_running(3)
    until_more_rounds(fit.path)
    os.kill(first["local-1"].pid, signal.SIGKILL)
    until(lambda: reports()["local-1"].lives == 2)
    second = until_running(3)
    until_more_rounds(fit.path)
    fit.open_gate()
    result = fit.outcome()
    assert {name: second[name].pid == first[name].pid for name in first} == {
        "local-0": True,
        "local-1": False,
        "local-2": True,
    }
    lives = {report.name: report.trained.result["life"] for report in result.peers if report.trained}
    assert lives == {"local-0": 1, "local-1": 2, "local-2": 1}
    check_data(fit.path)


def test_a_coordinator_that_is_killed_goes_on_from_its_journal_and_no_peer_restarts(
    ray_here: None, tmp_path: Path
) -> None:
    fit = Fit(tmp_path, scaling={"num_peers": 2})
    fit.start()
    first = until_running(2)
    until_more_rounds(fit.path)
    (started,) = said(fit.path, "supervisor", "coordinator.started")
    os.kill(started["pid"], signal.SIGKILL)
    _, again = until(lambda: len(found := said(fit.path, "supervisor", "coordinator.started")) == 2 and found)
    assert again["address"] == started["address"] and again["pid"] != started["pid"]
    until_more_rounds(fit.path)
    assert {name: report.pid for name, report in until_running(2).items()} == {n: r.pid for n, r in first.items()}
    fit.open_gate()
    result = fit.outcome()
    assert [report.lives for report in result.peers] == [1, 1] and result.error is None
    assert len(said(fit.path, "supervisor", "coordinator.lost")) == 1
    check_data(fit.path)
    check_history(result.metrics_history)


def test_a_life_that_ray_believes_dead_changes_nothing(nodes: Any, tmp_path: Path) -> None:
    """Its node stands still with it, so that nobody can end it; it goes on when another life has its name."""
    fit = Fit(tmp_path, failure={"hang_seconds": 3.0, "place_seconds": 4.0})
    fit.start()
    zombie = until_running(1)["local-0"]
    until_more_rounds(fit.path)
    (home,) = [node for node in nodes.worker_nodes if node.node_id == zombie.node]
    frozen = (home.all_processes["raylet"][0].process.pid, zombie.pid)
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: reports()["local-0"].lives == 2)
        second = until_running(1)["local-0"]
        os.kill(zombie.pid, signal.SIGCONT)
        last_words = fit.path / "logs" / "local-0.1.log"
        until(lambda: "Evicted: peer local-0 was expelled" in last_words.read_text())
        until_more_rounds(fit.path)
        assert Path(f"/proc/{zombie.pid}").exists() and second.pid != zombie.pid
        fit.open_gate()
        result = fit.outcome()
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        nodes.remove_node(home)
    assert result.peers[0].lives == 2 and result.peers[0].trained.result["life"] == 2 and result.error is None
    check_data(fit.path)
    check_history(result.metrics_history)


def command(folder: Path, function: str) -> list[str]:
    return [sys.executable, str(DRIVER), "run", str(folder), function, "2", "2"]


def environment(**more: str) -> dict[str, str]:
    """As of a shell from which no Ray was started."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    path = [str(Path.cwd()), *filter(None, [os.environ.get("PYTHONPATH")])]
    return environ | {"PYTHONPATH": os.pathsep.join(path)} | more


@pytest.fixture
def driver(shared_ray: SharedRay, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a driver on the shared Ray."""
    started: list[subprocess.Popen[str]] = []

    def start(function: str = "learns") -> subprocess.Popen[str]:
        keys = {key: os.environ[key] for key in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        environ = environment(RAY_ADDRESS=shared_ray.cluster.address, **keys)
        with (tmp_path / "driver.log").open("a") as log:
            process = subprocess.Popen(command(tmp_path, function), env=environ, stdout=log, stderr=log, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ended", [False, True])
def test_a_second_fit_finds_the_run_whose_driver_was_killed(
    ray_here: None, driver: Callable[..., subprocess.Popen[str]], tmp_path: Path, ended: bool
) -> None:
    fit = Fit(tmp_path, trainees.never_hears)  # what it asks for does not matter: the run is there
    first = driver()
    before = until_running(2)
    until_more_rounds(fit.path)
    first.kill()
    first.wait()
    time.sleep(3)  # in which Ray ends what belongs to that driver
    until_more_rounds(fit.path)
    assert {name: report.pid for name, report in until_running(2).items()} == {n: r.pid for n, r in before.items()}
    if ended:
        fit.open_gate()
        until(lambda: set(states().values()) == {"finished"})
        assert len(until(lambda: said(fit.path, "supervisor", "run.ended"))) == 1
        result = fit.trainer.fit()
    else:
        fit.start()
        until_more_rounds(fit.path)
        fit.open_gate()
        result = fit.outcome()
    assert [report.lives for report in result.peers] == [1, 1] and result.error is None
    check_history(result.metrics_history)
    assert len(result.metrics_history) == sum(r.trained.result["steps"] for r in result.peers if r.trained)
    check_data(fit.path)


# --- asked to end ---------------------------------------------------------------------------------------------------


def test_sigterm_drains_the_run_and_the_next_fit_goes_on_from_its_checkpoint(
    ray_here: None, driver: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, path = driver(), tmp_path / "run"
    until_running(2)
    until_more_rounds(path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, (tmp_path / "driver.log").read_text()
    check_nobody_is_left()
    for name in ("local-0", "local-1"):
        assert len(said(path, name, "peer.draining")) == 1
    left = said(path, "coordinator", "peer.left")
    assert {event["peer"] for event in left} == {"local-0", "local-1"}, "they have said good-bye"
    check_data(path)
    before = rounds(path)
    fit = Fit(tmp_path, scaling={"num_peers": 2})
    fit.start()
    until_running(2)
    until_more_rounds(path)
    fit.open_gate()
    result = fit.outcome()
    assert min(report.trained.result["version"] for report in result.peers if report.trained) > before
    check_data(path)


def test_a_second_sigint_ends_a_run_at_once_and_nothing_is_left(
    ray_here: None, driver: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process, path = driver("never_hears"), tmp_path / "run"
    pids = [report.pid for report in until_running(2).values()]
    process.send_signal(signal.SIGINT)
    until(lambda: said(path, "supervisor", "site.draining"))
    assert process.poll() is None, "it waits for its peers"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (130, -signal.SIGINT), (tmp_path / "driver.log").read_text()
    assert "KeyboardInterrupt" in (tmp_path / "driver.log").read_text()
    check_nobody_is_left()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30)


def test_on_a_ray_of_its_own_it_leaves_no_process_behind(no_ray: None, tmp_path: Path) -> None:
    _adopt_orphans()
    before, path = _children(), tmp_path / "run"
    started = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command(tmp_path, "learns"), env=environment(), **started)
    until(lambda: rounds(path) >= 2)
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    print(f"SIGTERM to exit: {time.monotonic() - asked:.1f} s")
    assert process.returncode == 143, output
    assert output == "", "what Ray prints is in its log"
    assert len(said(path, "local-0", "peer.draining")) == 1
    until(lambda: _children() <= before, 20)

"""One run in a real Ray, and three faults at once: each is named, set aside or started again, without a person.

p1 freezes, p2's steps take five times as long, p3 sends no numbers; p0 and p4 are well. Faults are carried out by
`elastic chaos`, and `elastic status` has to tell the story.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.local_ray import _children, local_ray
from elastic.config import FaultPolicy, RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.events import EventReader

pytestmark = pytest.mark.timeout(400)

NAMES = ("p0", "p1", "p2", "p3", "p4")
AFTER = 12.0  # seconds of health, by which the detector knows everybody's pace
SCRIPT = """
import time
import elastic, torch

class Line(torch.utils.data.Dataset):
    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        x = torch.randn(8, generator=torch.Generator().manual_seed(index))
        return torch.cat([x, x.sum().view(1)])

def train(peer, config):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Linear(8, 1)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    with elastic.DiLoCo(model, inner, peer, sync_every=8, outer=elastic.Nesterov(lr=0.5, momentum=0.5)) as outer:
        for batch in peer.shards(Line(), batch_size=4, epochs=1):
            time.sleep(0.05)  # stands for compute
            loss = (model(batch[:, :8]).squeeze(1) - batch[:, 8]).square().mean()
            loss.backward()
            inner.step()
            inner.zero_grad()
            losses.append(float(loss))
    flat = torch.cat([each.detach().flatten() for each in model.parameters()])
    return {"life": peer.life, "first": sum(losses[:20]) / 20, "last": sum(losses[-20:]) / 20, "state": flat.tolist()}
"""
SCHEDULE = """
[[fault]]
at = {after}
kind = "freeze"
target = "p1"
for = 30.0

[[fault]]
at = {after}
kind = "slow"
target = "p2"
factor = 5.0
for = 60.0

[[fault]]
at = {after}
kind = "nan"
target = "p3"
times = 8
"""


@pytest.fixture
def chaos(no_ray: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Ray whose processes take orders from this folder."""
    folder = tmp_path_factory.mktemp("chaos")
    folder.chmod(0o700)
    monkeypatch.setenv("ELASTIC_CHAOS", str(folder))
    before = _children()
    with local_ray(num_cpus=6, log=tmp_path_factory.mktemp("ray") / "ray.log"):
        yield folder
    assert _children() <= before, "Ray left processes behind"


def elastic(*words: str) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("elastic")), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def start(served: Coordinator, folder: Path, timeouts: Timeouts) -> Any:
    import ray

    from actors.peer import PeerSpec
    from actors.restarts import FailureConfig
    from actors.supervisor import EventLogSpec, SiteSupervisor

    script = folder / "line.py"
    script.write_text(SCRIPT)
    specs = [
        PeerSpec(
            coordinator=served.address,
            run="repair",
            name=name,
            site="here",
            script=str(script),
            timeouts=timeouts,
            events_dir=str(folder),
        )
        for name in NAMES
    ]
    actor: Any = SiteSupervisor
    log = EventLogSpec(run="repair", path=folder / "supervisor.jsonl")
    supervisor = actor.remote(specs, FailureConfig(hang_seconds=5.0), log)
    ray.get(supervisor.start.remote())
    return supervisor


def follow(supervisor: Any, served: Coordinator, stories: list[dict[str, Any]]) -> dict[str, Any]:
    """Until all peers are done; what `elastic status` says meanwhile is kept."""
    import ray

    deadline = time.monotonic() + 240
    while True:
        reports = {report.name: report for report in ray.get(supervisor.report.remote())}
        if all(report.state in ("finished", "failed") for report in reports.values()):
            return reports
        assert time.monotonic() < deadline, reports
        asked = elastic("status", str(served.token), "--json")
        out, err = asked.communicate(timeout=60)
        assert asked.returncode == 0, err
        stories.append(json.loads(out))
        time.sleep(1.0)


def test_frozen_slow_and_wrong_peers_are_dealt_with_and_the_run_ends_well(chaos: Path, tmp_path: Path) -> None:
    import ray

    timeouts = Timeouts(heartbeat=0.25, chunk=2.5, grace=3.0)
    policy = RunPolicy(seconds=60.0, faults=FaultPolicy(quarantine_seconds=4.0))
    log = tmp_path / "events.jsonl"
    stories: list[dict[str, Any]] = []
    (tmp_path / "chaos.toml").write_text(SCHEDULE.format(after=AFTER))
    with Coordinator(run="repair", policy=policy, timeouts=timeouts, events=log) as served:
        supervisor = start(served, tmp_path, timeouts)
        drill = elastic("chaos", str(tmp_path / "chaos.toml"), "--dir", str(chaos), "--json", "--wait", "120")
        reports = follow(supervisor, served, stories)
        drilled, words = drill.communicate(timeout=120)
        ray.get(supervisor.stop.remote())
        ray.kill(supervisor)
        audit = served.audit()

    check_that_all_faults_fired(drilled, words)
    check_what_was_said(list(EventReader(log).read()))
    check_the_story(stories)
    assert {name: report.state for name, report in reports.items()} == dict.fromkeys(NAMES, "finished"), reports
    results = {name: report.trained.result for name, report in reports.items()}
    assert results["p1"]["life"] == 2 and results["p3"]["life"] == 2 and results["p0"]["life"] == 1
    assert len({tuple(result["state"]) for result in results.values()}) == 1, "all end with the same parameters"
    assert results["p0"]["last"] < results["p0"]["first"] / 5
    assert audit.passed, "every sample counts once"


def check_that_all_faults_fired(drilled: str, words: str) -> None:
    assert drilled, words
    injected = json.loads(drilled)["faults"]
    fired = {fault["kind"]: fault["fired"] for fault in injected}
    assert fired.keys() == {"freeze", "slow", "nan"} and all(fired.values()), injected


def check_what_was_said(events: list[dict[str, Any]]) -> None:
    """Nothing before the first fault, and of each fault the culprit."""
    blamed = {(e["kind"], *e["culprits"]) for e in events if e["event"] == "anomaly.confirmed"}
    assert blamed >= {("slow peer", "p2"), ("bad gradient", "p3")}, blamed
    assert {kind for kind, name, *_ in blamed if name == "p1"} & {"silent", "hang outside communication", "crash"}
    assert {name for _, name, *_ in blamed} <= {"p1", "p2", "p3"}, blamed
    (quarantined,) = [e for e in events if e["event"] == "peer.quarantined"]
    assert quarantined["culprits"] == ["p3"] and "not_finite" in quarantined["reason"]
    left_out = [(e["kind"], *e["culprits"]) for e in events if e["event"] == "peer.left_out"]
    assert ("slow peer", "p2") in left_out and ("bad gradient", "p3") in left_out
    joined = [e["peer"] for e in events if e["event"] == "peer.joined"]
    assert joined.count("p1") == 2 and joined.count("p3") == 2 and joined.count("p2") == 1


def check_the_story(stories: list[dict[str, Any]]) -> None:
    seen = {(v["kind"], v["culprits"][0]) for story in stories for v in story["verdicts"]}
    assert ("slow peer", "p2") in seen and seen & {
        ("silent", "p1"),
        ("hang outside communication", "p1"),
        ("crash", "p1"),
    }
    assert "p3" in {barred["name"] for story in stories for barred in story["barred"]}
    states = {(member["name"], member["state"]) for story in stories for member in story["members"]}
    assert ("p2", "left out") in states and ("p3", "probation") in states

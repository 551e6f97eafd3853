"""Peers of several ranks in a real Ray: they begin, fail and are replaced as one, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.events import EventReader

pytestmark = pytest.mark.timeout(400)

SAMPLES = 1200
SCRIPT = """
import os, signal, time
from pathlib import Path
import elastic, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        x = torch.randn(6, generator=torch.Generator().manual_seed(index))
        return index, x, x.sum().unsqueeze(0)

def note(peer, config):
    (Path(config["folder"]) / f"{peer.name}.{peer.life}.{dist.get_rank()}").write_text(str(os.getpid()))

def left(peer, config):
    '''Processes of earlier lives that are still there.'''
    noted = Path(config["folder"]).glob(f"{peer.name}.[0-9].[0-9]")
    earlier = [file.read_text() for file in noted if int(file.name.split(".")[1]) < peer.life]
    return [pid for pid in earlier if Path(f"/proc/{pid}").exists()]

def learns(peer, config):
    torch.set_num_threads(1)
    remained, gate = left(peer, config), Path(config["folder"]) / "gate"
    note(peer, config)
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    if peer.name == "p0":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen, steps = [], 0
    if peer.life == 1:
        peer.wait_for(2)
    with elastic.DiLoCo(model, inner, peer, sync_every=4) as outer:
        if peer.life == 1:
            peer.barrier(tag="begin")  # so that both hold what is committed
        else:
            gate.touch()
        for numbers, x, y in peer.shards(Numbers(), batch_size=2, shard_size=20, epochs=1):
            torch.nn.functional.mse_loss(model(x), y).backward()
            inner.step()
            inner.zero_grad()
            seen += numbers.tolist()
            steps += 1
            if steps == 5:
                (Path(config["folder"]) / f"ready.{peer.name}.{dist.get_rank()}").touch()
            if config.get("slow") and not gate.exists():
                time.sleep(0.2)  # or nothing would be left for the next life
    wholes = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in model.parameters()]
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, seen)
    return {
        "life": peer.life,
        "left": remained,
        "state": outer.version.state_hash,
        "parameters": torch.cat([whole.detach().flatten() for whole in wholes]).tolist(),
        "seen": everybody,
    }

def ends_once(peer, config):
    if peer.life > 1:
        return {"life": peer.life, "left": left(peer, config)}
    note(peer, config)
    dist.barrier()
    if dist.get_rank() == config["victim"]:
        os.kill(os.getpid(), config["signal"])
    dist.barrier()
    raise RuntimeError("nobody has ended")

def raises(peer, config):
    if dist.get_rank() == 1:
        raise ValueError("no such file: data.bin")
    if config["waits"] == "for the run":
        peer.barrier()
    else:
        dist.barrier()

def waits(peer, config):
    note(peer, config)
    peer.wait_for(9, timeout=600)
"""


def until(true: Callable[[], Any], what: str, seconds: float = 60.0) -> None:
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not true():
        assert time.monotonic() < deadline, what
        pause.wait(0.1)


def groups() -> list[dict[str, Any]]:
    """The placement groups that are there."""
    from ray.util.placement_group import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


class Site:
    """A run, with one supervisor that a test starts."""

    def __init__(self, served: Coordinator, folder: Path) -> None:
        self.served, self.folder = served, folder
        self.script = folder / f"script_{os.getpid()}.py"
        self.script.write_text(SCRIPT.replace("SAMPLES", str(SAMPLES)))
        self.supervisor: Any = None

    def spec(self, name: str, function: str, **options: Any) -> Any:
        from actors.peer import PeerSpec

        given = {"script": str(self.script), "ranks": 2, "cpus": 2.0, "events_dir": str(self.folder)} | options
        config = {"folder": str(self.folder)} | given.pop("config", {})
        where = {"coordinator": self.served.address, "run": "units", "name": name, "site": "here"}
        return PeerSpec(**where, function=function, config=config, **given)

    def start(self, *specs: Any, **policy: Any) -> None:
        import ray

        from actors.restarts import FailureConfig
        from actors.supervisor import EventLogSpec, SiteSupervisor

        actor: Any = SiteSupervisor
        log = EventLogSpec(run="units", path=self.folder / "supervisor.jsonl")
        self.supervisor = actor.remote(list(specs), FailureConfig(**policy), log)
        ray.get(self.supervisor.start.remote())

    def only(self, function: str, **policy: Any) -> Any:
        """Of one peer that runs this, what its supervisor says of it in the end."""
        spec = self.spec("p0", function, config=policy.pop("config", {}))
        self.start(spec, **policy)
        return self.ended()["p0"]

    def reports(self) -> dict[str, Any]:
        import ray

        return {report.name: report for report in ray.get(self.supervisor.report.remote())}

    def ended(self) -> dict[str, Any]:
        def over() -> bool:
            return all(report.state in ("finished", "failed") for report in self.reports().values())

        until(over, "a peer goes on", 240)
        return self.reports()

    def pids(self, name: str, life: int) -> list[int]:
        return [int(file.read_text()) for file in sorted(self.folder.glob(f"{name}.{life}.[0-9]"))]

    def happened(self, name: str) -> list[dict[str, Any]]:
        return [event for event in EventReader(self.folder / "supervisor.jsonl").read() if event["event"] == name]

    def check_data(self) -> None:
        report = self.served.audit()
        (epoch,) = report.epochs
        assert report.passed and epoch.complete and (epoch.committed, epoch.twice, epoch.partial) == (SAMPLES, 0, 0)


@pytest.fixture
def site(ray_here: None, tmp_path: Path) -> Iterator[Site]:
    """What a test leaves behind when its supervisor stops is a failure of the test."""
    import ray

    with Coordinator(run="units", policy=RunPolicy(), timeouts=Timeouts(), events=tmp_path / "events.jsonl") as served:
        site = Site(served, tmp_path)
        yield site
        if site.supervisor is not None:
            ray.get(site.supervisor.stop.remote())
        pids = [int(file.read_text()) for file in tmp_path.glob("p?.?.[0-9]")]
        until(lambda: not groups(), "a placement group is left")
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), f"one of {pids} is left")
        until(lambda: ray.available_resources().get("CPU") == 4.0, "CPUs are still taken")
        if site.supervisor is not None:
            ray.kill(site.supervisor)


# --- to the end -----------------------------------------------------------------------------------------------------


def test_peers_of_two_ranks_train_one_model_whether_they_shard_it_or_not(site: Site) -> None:
    site.start(site.spec("p0", "learns"), site.spec("p1", "learns"))
    reports = site.ended()
    assert [(report.state, report.lives) for report in reports.values()] == [("finished", 1)] * 2, reports
    sharded, replicated = (reports[name].trained.result for name in ("p0", "p1"))
    assert sharded["state"] == replicated["state"] and sharded["parameters"] == replicated["parameters"]
    assert all(len(seen) > 20 for result in (sharded, replicated) for seen in result["seen"]), "all four take part"
    assert {n for result in (sharded, replicated) for seen in result["seen"] for n in seen} == {*range(SAMPLES)}
    site.check_data()
    assert len({*site.pids("p0", 1), *site.pids("p1", 1)}) == 4
    assert reports["p0"].pid == site.pids("p0", 1)[0], "its leader stands for it"
    assert reports["p0"].trained.bytes_sent > 0


def test_a_rank_finds_what_torchrun_would_have_set(site: Site) -> None:
    from ray import cloudpickle

    def tells(peer: Any, config: dict[str, Any]) -> Any:
        import os

        import torch.distributed as dist

        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        ranks: list[Any] = [None] * dist.get_world_size()
        mine = {name: os.environ[name] for name in names} | {"backend": dist.get_backend()}
        dist.all_gather_object(ranks, mine | {"storage": str(peer.storage_path), "rank": dist.get_rank()})
        return ranks

    pickled = cloudpickle.dumps(tells)  # type: ignore[no-untyped-call]
    site.start(site.spec("p0", "", script="", pickled=pickled, storage_path=str(site.folder)))
    ended = site.ended()["p0"]
    assert ended.state == "finished", ended.error
    first, second = ended.trained.result
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != "0"
    for rank, found in enumerate((first, second)):
        assert (found["RANK"], found["LOCAL_RANK"], found["rank"]) == (str(rank), str(rank), rank)
        assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"], found["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
        assert (found["backend"], found["storage"]) == ("gloo", str(site.folder))


# --- one rank fails -------------------------------------------------------------------------------------------------


def test_when_one_rank_is_killed_its_peer_is_replaced_and_the_others_train_on(site: Site) -> None:
    site.start(*(site.spec(name, "learns", config={"slow": True}) for name in ("p0", "p1")))
    until(lambda: len(list(site.folder.glob("ready.*"))) == 4, "they do not train", 150)
    victims, others = site.pids("p0", 1), site.pids("p1", 1)
    os.kill(victims[1], signal.SIGKILL)
    reports = site.ended()
    assert [(report.state, report.lives) for report in reports.values()] == [("finished", 2), ("finished", 1)], reports
    (lost,) = site.happened("peer.lost")
    assert (lost["peer"], lost["evidence"]) == ("p0", "its process has ended")
    second, other = (reports[name].trained.result for name in ("p0", "p1"))
    assert second["left"] == [], "both processes of the first life were gone before the second began"
    assert not {*victims} & {*site.pids("p0", 2)} and len(site.pids("p0", 2)) == 2
    assert reports["p1"].pid == others[0] and not site.pids("p1", 2), "nothing has happened to the other peer"
    assert second["state"] == other["state"] and second["parameters"] == other["parameters"]
    assert all(second["seen"]), "the second life has trained, too"
    site.check_data()


@pytest.mark.parametrize(
    ("number", "victim", "evidence"),
    [(signal.SIGKILL, 0, "its process has ended"), (signal.SIGSTOP, 1, "it hangs")],
    ids=["the leader is killed", "another hangs"],
)
def test_whichever_rank_ends_none_of_that_life_remains(site: Site, number: int, victim: int, evidence: str) -> None:
    report = site.only("ends_once", config={"signal": number, "victim": victim}, hang_seconds=3.0)
    assert (report.state, report.lives, report.trained.result) == ("finished", 2, {"life": 2, "left": []}), report.error
    assert len(site.pids("p0", 1)) == 2
    assert [event["evidence"] for event in site.happened("peer.lost")] == [evidence]


@pytest.mark.parametrize("waits", ["for the run", "for each other"])
def test_what_one_rank_raises_is_told_and_not_that_the_others_lost_it(site: Site, waits: str) -> None:
    report = site.only("raises", config={"waits": waits})
    assert (report.state, report.lives) == ("failed", 1)
    assert report.reason == "rank 1: ValueError: no such file: data.bin"
    assert f"the last lines of {site.folder}/logs/p0.1.rank1.log" in report.error
    assert 'raise ValueError("no such file: data.bin")' in report.error, "its traceback is there"
    assert site.happened("peer.failed")[-1]["peer"] == "p0"


def test_a_rank_that_cannot_import_its_script_is_named(site: Site) -> None:
    site.script.write_text('import os\nif os.environ["RANK"] == "1":\n    raise OSError("no space")\n' + SCRIPT)
    report = site.only("raises")
    assert (report.state, report.lives) == ("failed", 1)
    assert report.reason == f"peer p0, rank 1: script {site.script} cannot be loaded: OSError: no space"
    assert 'raise OSError("no space")' in report.error


def test_a_rank_that_meets_nobody_is_named(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.script.write_text('import os\nif os.environ["RANK"] == "1":\n    os.environ["GLOO_SOCKET_IFNAME"] = "none0"\n')
    site.script.write_text(site.script.read_text() + SCRIPT)
    report = site.only("raises", max_restarts=0)
    assert report.state == "failed"
    assert "peer p0, rank 1: RuntimeError: " in report.reason and "none0" in report.reason


# --- room -----------------------------------------------------------------------------------------------------------


def test_without_room_for_all_ranks_none_is_started(site: Site) -> None:
    site.start(site.spec("p0", "waits", ranks=3, cpus=6.0), place_seconds=2.0)
    report = site.ended()["p0"]
    assert (report.state, report.error) == ("failed", "no node has had room for it in 2 s")
    assert not groups(), "nobody waits for room any more"


def test_who_is_stopped_while_it_waits_leaves_nothing_behind(site: Site) -> None:
    import ray

    site.start(*(site.spec(name, "waits", cpus=4.0) for name in ("p0", "p1")))
    until(lambda: len(site.pids("p0", 1) + site.pids("p1", 1)) == 2, "none begins", 150)
    assert len(groups()) == 2, "one has its room, the other waits for it"
    ray.get(site.supervisor.stop.remote())


# --- shares ---------------------------------------------------------------------------------------------------------


def test_the_gpus_of_all_ranks_are_visible_to_each_and_its_own_is_that_of_its_local_rank() -> None:
    from actors.rendezvous import Seat, environment_of

    seats = [Seat(port=7, gpus=("4", "5")), Seat(gpus=("6", "7"))]
    found = environment_of(1, seats)
    assert found["CUDA_VISIBLE_DEVICES"].split(",")[int(found["LOCAL_RANK"])] == "6"
    assert found["CUDA_VISIBLE_DEVICES"] == environment_of(0, seats)["CUDA_VISIBLE_DEVICES"] == "4,6,5,7"
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(0, [Seat(port=7), Seat()])


@pytest.mark.parametrize(
    ("amount", "ranks", "share"), [(2.0, 2, 1.0), (1.0, 3, 0.3333), (2.0, 3, 0.6666), (0.3, 3, 0.1)]
)
def test_all_shares_together_fit_where_the_whole_would(amount: float, ranks: int, share: float) -> None:
    from actors.unit import _share

    assert _share(amount, ranks) == share and ranks * share <= amount + 1e-9


def test_what_cannot_be_pickled_is_raised_in_words() -> None:
    from actors.peer import Raised

    error = ValueError(threading.Lock())
    raised = Raised.of(error, "", "rank 3: ")
    assert raised.pickled == b"" and raised.line.startswith("rank 3: ValueError: <unlocked _thread.lock")

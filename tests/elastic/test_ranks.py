"""A peer of several processes: what its ranks see, what reaches them, and what holds when one of them is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import QUICK, Run, until
from rank_worker import SAMPLES, failure, model_of, train
from sites import Site

from elastic.config import RunPolicy
from elastic.errors import ConfigurationError
from elastic.inquiry import inquire
from elastic.journal import Committed, Leased, read_copy
from elastic.messages import LeaveAsked, LeaveRequest
from elastic.outer.state import Layout


@pytest.fixture
def sites() -> Iterator[list[Site]]:
    made: list[Site] = []
    yield made
    for site in made:
        site.close()


@pytest.fixture
def two(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, policy=RunPolicy(min_peers=2))
    yield run
    run.close()


def trained_beside(run: Run, site: Site, data: str = "map") -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the site's ranks and a peer of one process have found, after training to the end of the data."""
    lone = train(run.join("lone"), model_of(seed=8), data=data)
    return site.facts(), lone


@pytest.mark.parametrize("data", ["map", "loader", "stream"])
def test_replicated_ranks_train_as_one_peer(two: Run, sites: list[Site], tmp_path: Path, data: str) -> None:
    sites.append(Site(tmp_path / "site", two, "replicated", data=data))
    (first, second), lone = trained_beside(two, sites[0], data)
    assert first["states"] == second["states"], "steps and versions are the same at each step of the ranks"
    for rank in (first, second):
        assert rank["parameters"] == lone["parameters"] and rank["state_hash"] == lone["state_hash"]
        assert rank["contributors"] == ["lone", "site"] and rank["stopping"] and rank["progress"] == lone["progress"]
    for a, b in zip(first["seen"], second["seen"], strict=True):
        assert not set(a) & set(b) or (a == b and len(a) == 1), "a sample twice in a step, and not for want of another"
    mine = [n for step in lone["seen"] for n in step]
    theirs = [n for rank in (first["seen"], second["seen"]) for step in rank for n in step]
    assert len(theirs) > SAMPLES / 4 and {*mine} | {*theirs} == {*range(SAMPLES)}
    assert two.coordinator is not None
    status = two.coordinator.status()
    assert status.samples == status.progress.tokens == 2 * SAMPLES, "each sample of both epochs once"


def test_sites_may_shard_differently(two: Run, sites: list[Site], tmp_path: Path) -> None:
    sites.append(Site(tmp_path / "site", two, "sharded"))
    (first, second), lone = trained_beside(two, sites[0])
    assert first["states"] == second["states"] and first["version"] >= 4
    for rank in (first, second):
        assert rank["parameters"] == lone["parameters"] and rank["state_hash"] == lone["state_hash"]
        assert rank["contributors"] == ["lone", "site"]


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_holds_what_belongs_to_each_rank(sites: list[Site], tmp_path: Path, sharded: bool) -> None:
    found = []
    for life in range(2):
        (tmp_path / f"run{life}").mkdir()
        timeouts = replace(QUICK, grace=3)  # so long a coordinator that has lost its journal waits for better offers
        run = Run(tmp_path / f"run{life}", policy=RunPolicy(min_peers=1), timeouts=timeouts)
        try:
            order = {"sharded": sharded, "restored": life == 1, "checkpoints": str(tmp_path / "saved")}
            sites.append(Site(tmp_path / f"site{life}", run, "saved", **order))
            found.append(sites[-1].facts())
        finally:
            run.close()
    before, after = found
    assert [rank["version"] for rank in after] == [4, 4]
    assert [rank["inner"] for rank in after] == [rank["inner"] for rank in before] and before[0]["inner"]
    assert [rank["seed"] for rank in after] == [1000, 1001], "the generators, too"
    assert [rank["steps"] for rank in after] == [rank["steps"] for rank in before]
    assert sharded == (before[0]["inner"] != before[1]["inner"])


def test_ranks_that_train_apart_are_told(sites: list[Site], tmp_path: Path) -> None:
    run = Run(tmp_path, policy=RunPolicy(min_peers=1))
    try:
        sites.append(Site(tmp_path / "site", run, "apart"))
        for rank in sites[0].facts():
            assert rank["failure"][0] == "ParityError" and "DistributedDataParallel" in rank["failure"][1]
        assert run.coordinator is not None and run.coordinator.status().progress.rounds == 0
    finally:
        run.close()


def test_every_call_gives_all_ranks_the_same(two: Run, sites: list[Site], tmp_path: Path) -> None:
    sites.append(Site(tmp_path / "site", two, "calls"))
    lone = two.join("lone")
    lone.wait_for(n=2)
    lone.all_reduce([torch.full((3,), 4.0), torch.full((2, 2), 8.0)], op="mean", tag="list")
    lone.all_reduce(torch.full((5000,), 3.0), tag="async")
    lone.all_gather(torch.arange(1), tag="gather")
    lone.broadcast(torch.tensor([8.0, 9.0]), root="lone", tag="cast")
    lone.reduce_scatter(torch.ones(7), tag="scatter")
    lone.barrier(tag="met")
    for rank in sites[0].facts((0, 0)):
        assert rank["view"] == rank["seen"] == rank["contributors"] == rank["met"] == ["lone", "site"]
        assert rank["reduced"] == [[3.0] * 3, [[6.0] * 2] * 2] and rank["views"]
        assert rank["async"] == [5000 * 4.0, True]
        assert rank["gathered"] == [[0], [0, 1]], "the leader's tensor counts"
        assert rank["broadcast"] == [8.0, 9.0]
        assert rank["scattered"] == [[2.0] * 3, 4, 7]
        assert rank["targets"]["rounds"] == 77 and rank["members"] == 2 and rank["name"] == "site"
        assert [name for name, _ in rank["errors"]] == ["ConfigurationError", "NotEnoughPeers"]
        assert rank["thread"][0] == "ConfigurationError" and "thread" in rank["thread"][1]
        assert rank["apart"][0] == "ParityError" and "same calls" in rank["apart"][1]


@pytest.mark.parametrize(("lost", "wrapped"), [(0, False), (1, False), (1, True)])
def test_when_a_rank_is_killed_the_peer_is_lost_and_the_run_goes_on(
    sites: list[Site], tmp_path: Path, lost: int, wrapped: bool
) -> None:
    run = Run(tmp_path, policy=RunPolicy(min_peers=1))
    sites.append(Site(tmp_path / "site", run, "endless", wrapped=wrapped))
    lone = run.join("lone")
    lone.wait_for(n=2)
    thread = threading.Thread(target=lambda: failure(lambda: train(lone, model_of(seed=8), epochs=0)))
    thread.start()
    try:
        sites[0].ready()
        sites[0].processes[lost].send_signal(signal.SIGKILL)
        codes = (-signal.SIGKILL, 1) if lost == 0 else (1, -signal.SIGKILL)
        facts = sites[0].facts(codes)[1 - lost]
        # DDP's own all-reduce may notice first: then it is torch's error that ends the script
        error = (tmp_path / "site" / f"{1 - lost}.err").read_text()
        assert facts["raised"][0] == "TransportError" if facts else wrapped and "RuntimeError" in error
        until(lambda: lone.view.names == ("lone",))
        rounds = lone.progress.rounds
        until(lambda: lone.progress.rounds > rounds + 2)
    finally:
        run.close()
        thread.join(60)
    assert not thread.is_alive()


def committed_by(name: str, journal: Path) -> int:
    """Samples of the shards that this peer held when they were committed."""
    holder: dict[int, str] = {}
    samples = 0
    for record in read_copy(journal)[1]:
        if isinstance(record, Leased):
            holder |= dict.fromkeys(record.shards, record.name)
        if isinstance(record, Committed):
            held = [shard for shard in record.cursors if holder[shard] == name]
            samples += sum(record.cursors[shard] - record.starts[shard] for shard in held)
    return samples


@pytest.mark.parametrize("asked", ["by a signal to a rank", "through the coordinator"])
def test_who_is_asked_to_leave_drains_as_one_peer(two: Run, sites: list[Site], tmp_path: Path, asked: str) -> None:
    sites.append(Site(tmp_path / "site", two, "endless", wrapped=True))
    lone = two.join("lone")
    thread = threading.Thread(target=lambda: failure(lambda: train(lone, model_of(seed=8), epochs=0)))
    thread.start()
    try:
        sites[0].ready()
        if asked == "by a signal to a rank":
            sites[0].processes[1].send_signal(signal.SIGTERM)
        else:
            assert two.coordinator is not None
            inquire(two.coordinator.token, LeaveRequest, LeaveAsked, 30.0, name="site", seconds=25.0)
        first, second = sites[0].facts()
        assert first["stopping"] and second["stopping"] and first["steps"] == second["steps"]
        assert first["parameters"] == second["parameters"]
        until(lambda: lone.view.names == ("lone",))
        assert committed_by("site", tmp_path / "journal.sqlite") == first["seen"] + second["seen"]
    finally:
        lone.close()
        thread.join(30)


def test_names_are_those_of_the_model_as_it_was_written() -> None:
    plain, compiled = Layout(model_of(1)), Layout(torch.compile(model_of(1)))  # type: ignore[arg-type]
    assert compiled.fingerprint == plain.fingerprint and compiled.described == plain.described


def test_a_model_in_the_older_wrapper_is_refused() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Wrapped(FullyShardedDataParallel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self._fsdp_wrapped_module = model_of(1)

    with pytest.raises(ConfigurationError, match="fully_shard"):
        Layout(Wrapped())

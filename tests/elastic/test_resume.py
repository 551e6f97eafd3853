"""A whole run that is killed comes back from its checkpoints: same bits, same place in the data, other peers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forking
from harness import Run, until
from resume_worker import SAMPLES, SHARD, Order, serve_coordinator, serve_peer

from elastic.checkpoints import Checkpoints, Snapshot, Store
from elastic.config import RunPolicy, Timeouts
from elastic.errors import ConfigurationError, NoSource, NotEnoughPeers
from elastic.events import EventReader
from elastic.outer.diloco import DiLoCo
from elastic.outer.state import Version
from elastic.peer import Peer
from elastic.runstate import RunState
from elastic.shards import Layout


class Running:
    """Processes of one life of the run; what each peer says is a list of its lines."""

    def __init__(self, folder: Path, journal: Path | None, peers: list[str], where: Path, **options: Any) -> None:
        self.said = {name: folder / f"{name}.said" for name in peers}
        self._pipe, theirs = forking().Pipe()
        self.coordinator = start(serve_coordinator, theirs, journal, len(peers))
        theirs.close()
        self._order = partial(Order, address=self._pipe.recv(), peers=len(peers), where=where, **options)
        self.peers = {name: start(serve_peer, said, self._order(name=name)) for name, said in self.said.items()}

    def lines(self, name: str) -> list[dict[str, Any]]:
        said = self.said[name]
        lines = said.read_text().split("\n")[:-1] if said.exists() else []
        return [json.loads(line) for line in lines]

    def version(self) -> int:
        """The newest one that anybody has spoken of."""
        return max((line.get("version", -1) for name in self.said for line in self.lines(name)), default=-1)

    def kill(self) -> None:
        for process in (*self.peers.values(), self.coordinator):
            process.kill()
        for process in (*self.peers.values(), self.coordinator):
            process.join()
        self._pipe.close()


def start(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = forking().Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


@contextmanager
def life(tmp_path: Path, number: int, *arguments: Any, **options: Any) -> Iterator[Running]:
    folder = tmp_path / f"life-{number}"
    folder.mkdir()
    running = Running(folder, *arguments, **options)
    try:
        yield running
    finally:
        running.kill()


def committed_samples(state: RunState) -> list[int]:
    """What stands behind this state, worked out from the cursors alone."""
    layout, data = Layout(SAMPLES, SHARD, 0), state.data
    found = []
    for shard in range(data.next):
        found.extend(layout.order(shard)[: data.cursors.get(shard, SHARD)])
    return found


@pytest.mark.parametrize(("seed", "journal", "second"), [(0, True, 3), (1, True, 2), (2, False, 4)])
def test_a_whole_run_killed_at_a_random_moment_goes_on_where_its_newest_checkpoint_stands(
    tmp_path: Path, seed: int, journal: bool, second: int
) -> None:
    where = tmp_path / "checkpoints"
    path = tmp_path / "journal.sqlite"
    moment = random.Random(seed)
    with life(tmp_path, 1, path, ["p0", "p1", "p2"], where, pause=0.001) as first:
        until(lambda: first.version() >= 3 + moment.randrange(5))
        until(lambda: moment.random() < 0.1)
    store = Store(str(where), "test", "outer")
    newest = newest_of(store)
    state = RunState.from_bytes(newest.manifest.run_state)
    before = committed_samples(state)
    assert len(before) == len(set(before)) == state.data.committed > 0

    names = [f"p{i}" for i in range(second)]
    with life(tmp_path, 2, path if journal else None, names, where) as again:
        until(lambda: len(ended(again, newest.versions[0].number + 5)) == second)
    for name in names:
        entered = again.lines(name)[0]
        assert (entered["version"], entered["hash"]) == (newest.versions[0].number, newest.versions[0].state_hash)
        assert (entered["steps"] > 0 and sum(entered["moments"]) > 0) == (name in first.said), "its inner optimizer"
    trained = [sample for name in names for line in again.lines(name) for sample in line.get("samples", ())]
    assert not set(before) & set(trained[: SAMPLES - len(before) - 200]), "committed samples were read again"


def ended(running: Running, version: int) -> list[str]:
    return [name for name in running.said if any(line.get("version", -1) >= version for line in running.lines(name))]


def newest_of(store: Store) -> Any:
    whole = next(entry for entry in store.entries() if entry.finished).manifest()
    found = store.newest(algorithm=whole.algorithm, fingerprint=whole.fingerprint)
    assert found is not None
    return found


def test_a_run_resumed_twice_reads_every_sample_of_the_epoch_once(tmp_path: Path) -> None:
    """What was committed by the version that was resumed, and what was trained on afterwards, is the whole epoch."""
    where, path = tmp_path / "checkpoints", tmp_path / "journal.sqlite"
    with life(tmp_path, 1, path, ["p0", "p1"], where, pause=0.001, every=4, epochs=1) as first:
        until(lambda: first.version() >= 10)
    with life(tmp_path, 2, path, ["p0", "p1", "p2"], where, pause=0.001, every=4, epochs=1) as second:
        until(lambda: second.version() >= 20)
    newest = newest_of(Store(str(where), "test", "outer"))
    before = committed_samples(RunState.from_bytes(newest.manifest.run_state))
    assert newest.versions[0].number % 4 == 0
    with life(tmp_path, 3, path, ["p0", "p1"], where, every=4, epochs=1) as third:
        for process in third.peers.values():
            process.join()
            assert process.exitcode == 0
        ends = [third.lines(name)[-1] for name in third.said]
        trained = [sample for name in third.said for line in third.lines(name) for sample in line.get("samples", ())]
    assert ends[0] == ends[1] and ends[0]["ended"]
    assert sorted(before + trained) == list(range(SAMPLES))


# --- in one process ---------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(37))

    def forward(self) -> torch.Tensor:
        return (self.x - 1.0).square().sum()


def train(peer: Peer, rounds: int, where: str | Checkpoints) -> DiLoCo:
    model = Model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    peer.run_until(rounds=rounds)
    with DiLoCo(model, inner, peer, sync_every=2, checkpoints=where) as loop:
        while not loop.finished:
            inner.zero_grad()
            model().backward()
            inner.step()
            assert loop.saver is not None and loop.saver._writer.flush(30)
    return loop


def events(run: Run, log: str, name: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(run.folder / f"{log}.jsonl").read() if event["event"] == name]


def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_is_used(run: Run) -> None:
    run.timeouts = replace(run.timeouts, grace=1.0)  # so long a newer one is waited for
    where = Checkpoints(str(run.folder / "c"), every=1, keep=4)
    peer = run.join("p0")
    loop = train(peer, 6, where)
    peer.leave()
    newest = loop.saver._store.entries()[0]  # type: ignore[union-attr]
    (file,) = Path(str(newest.folder)).glob("outer-*")
    file.write_bytes(file.read_bytes()[:-1])
    again = run.join("p0")
    resumed = train(again, 8, where)
    (refused,) = events(run, "p0", "checkpoint.refused")
    assert file.name in refused["reason"]
    (back,) = events(run, "coordinator", "run.rolled_back")
    assert (back["version"], back["versions_lost"], back["tokens_lost"]) == (newest.number - 1, 1, 2)
    assert resumed.version.number == 8 - 1, "rounds keep their numbers, and one of them is void"


def test_the_checkpoint_of_the_newest_version_is_no_step_back(run: Run) -> None:
    where = str(run.folder / "c")
    peer = run.join("p0")
    loop = train(peer, 3, where)
    peer.leave()
    again = run.join("p1")
    model = Model()
    with DiLoCo(model, torch.optim.SGD(model.parameters()), again, checkpoints=where) as other:
        assert (other.version.number, other.version.state_hash) == (3, loop.version.state_hash)
        assert torch.equal(model.x.detach(), loop.version.parameters)
    assert not events(run, "coordinator", "run.rolled_back")


def test_the_newest_of_several_peers_checkpoints_is_taken(run: Run) -> None:
    """Each has a disk of its own; who comes first has the older one."""
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=2.0, evict_after=30)
    old, new = (Checkpoints(str(run.folder / each), every=100) for each in ("old", "new"))
    peer = run.join("p0")
    train(peer, 2, old)
    peer.leave()
    peer = run.join("p0")
    second = Model()
    inner = torch.optim.AdamW(second.parameters())
    del second, inner
    peer.run_until(rounds=5)
    peer.leave()
    for store in (old, new):
        Path(store.url).mkdir(exist_ok=True)
    copied = Path(new.url) / "test"
    subprocess.run(["cp", "-r", str(Path(old.url) / "test"), str(copied)], check=True)
    peer = run.join("p0")
    train(peer, 5, new)
    peer.leave()
    run.coordinator.close()  # type: ignore[union-attr]
    (run.folder / "journal.sqlite").unlink()
    run.open()
    first, late = run.join("p0"), run.join("p1")
    ends = run.together(lambda p: train(p, 7, old if p is first else new).version, [first, late])
    assert ends[0].number == ends[1].number and ends[0].state_hash == ends[1].state_hash
    (resumed,) = events(run, "coordinator", "run.resumed")[-1:]
    assert (resumed["version"], resumed["peer"]) == (5, "p1")


def test_a_higher_version_that_the_run_went_back_from_is_not_the_newest(run: Run) -> None:
    where = Checkpoints(str(run.folder / "c"), every=1, keep=10)
    peer = run.join("p0")
    loop = train(peer, 3, where)
    assert loop.saver is not None
    right = newest_of(loop.saver._store)
    state = RunState.from_bytes(right.manifest.run_state)
    void = replace(state, serial=state.serial - 1, loops=(replace(state.loops[0], versions={0: 9}),))
    version = Version(9, right.versions[0].parameters + 1, right.versions[0].momentum)
    fragments = (right.manifest.fragments[0].parameters,)
    fields = {"algorithm": right.manifest.algorithm, "fingerprint": right.manifest.fingerprint}
    loop.saver._store.save(Snapshot(**fields, versions=(version,), parameters=fragments, run_state=void.to_bytes()))
    assert newest_of(loop.saver._store).versions[0].number == 9, "by its number"
    found = loop.saver.newest()
    assert found is not None and found.versions[0].number == 3


def test_without_any_checkpoint_the_lost_state_is_named(run: Run) -> None:
    run.timeouts = Timeouts(heartbeat=0.1, chunk=0.5, operation=10, round=20, grace=0.3, evict_after=30)
    peer = run.join("p0")
    train(peer, 2, str(run.folder / "c"))
    peer.leave()
    again = run.join("p0")
    again.run_until(rounds=9)
    with pytest.raises(NoSource, match="no living peer holds version 2 of outer, and no checkpoint was offered"):
        train(again, 9, str(run.folder / "elsewhere"))


def test_too_few_peers_for_too_long_leave_a_checkpoint(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)
    where = Checkpoints(str(run.folder / "c"), every=1000)
    first, second = run.several(2)

    def until_alone(peer: Peer) -> DiLoCo:
        model = Model()
        inner = torch.optim.AdamW(model.parameters(), lr=0.01)
        try:
            with DiLoCo(model, inner, peer, sync_every=2, checkpoints=where, timeout=3.0) as loop:
                while peer is first or loop.version.number < 3:
                    inner.zero_grad()
                    model().backward()
                    inner.step()
        except NotEnoughPeers:
            assert peer is first
        if peer is second:
            peer.leave()
        return loop

    ends = run.together(until_alone)
    (written,) = events(run, "p0", "checkpoint.written")
    assert written["version"] == ends[0].version.number >= 3
    assert newest_of(Store(where.url, "test", "outer")).versions[0].state_hash == ends[0].version.state_hash


def test_where_peers_share_a_place_one_of_them_writes_the_outer_state(run: Run) -> None:
    run.policy = RunPolicy(min_peers=3, quorum=1.0)
    where = Checkpoints(str(run.folder / "c"), every=1, keep=100, shared=True)
    run.together(lambda peer: train(peer, 6, where), run.several(3))
    writers = {}
    for name in ("p0", "p1", "p2"):
        for event in events(run, name, "checkpoint.written"):
            if event["outer"]:
                writers.setdefault(event["version"], []).append(name)
    assert all(len(each) == 1 for each in writers.values()) and len({each[0] for each in writers.values()}) == 3


def test_a_place_that_cannot_be_read_is_an_error_and_one_that_cannot_be_written_is_not(run: Run) -> None:
    file = run.folder / "file"
    file.write_text("no folder")
    peer = run.join("p0")
    model = Model()
    with pytest.raises(ConfigurationError, match="cannot read the checkpoints at"):
        with DiLoCo(model, torch.optim.SGD(model.parameters()), peer, checkpoints=str(file)):
            pass


def test_the_first_ones_who_come_without_a_checkpoint_follow_who_has_one(run: Run) -> None:
    """A coordinator without journal lets the first peer found the run; nothing is committed when the other comes."""
    run.timeouts = replace(run.timeouts, grace=1.0)
    where = str(run.folder / "c")
    run.policy = RunPolicy(min_peers=2)
    pair = run.several(2)
    hashes = {loop.version.state_hash for loop in run.together(lambda peer: train(peer, 3, where), pair)}
    run.together(lambda peer: peer.leave(), pair)
    run.coordinator.close()  # type: ignore[union-attr]
    (run.folder / "journal.sqlite").unlink()
    run.open()
    founder, holder = run.join("p0"), run.join("p1")
    model = Model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    with DiLoCo(model, inner, founder, sync_every=2) as loop:
        assert loop.version.number == 0
        other = Model()
        with DiLoCo(other, torch.optim.AdamW(other.parameters()), holder, checkpoints=where) as second:
            assert second.version.number == 3 and {second.version.state_hash} == hashes
            until(lambda: _step(model, inner) or loop.version.number == 3)
            assert {loop.version.state_hash} == hashes
            founder.drain(0.5), holder.drain(0.5)


def _step(model: Model, inner: torch.optim.Optimizer) -> None:
    inner.zero_grad()
    model().backward()
    inner.step()

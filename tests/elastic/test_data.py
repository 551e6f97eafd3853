"""Data from the training script's side: real peers, a real coordinator, real DataLoaders that run ahead.

The model is a tally: a step on a sample adds one to that sample's entry. So the displacement that a peer contributes
says what it was trained on, and the sum of all contributions that were counted says what the run has learned.
"""

from __future__ import annotations

import dataclasses
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, until
from torch.utils.data import DataLoader, Dataset, IterableDataset

from elastic.config import RunPolicy, Timeouts
from elastic.errors import CheckpointMismatch, ConfigurationError, Evicted, ParityError
from elastic.events import EventReader
from elastic.messages import GivenUp, Propose
from elastic.outer.diloco import DiLoCo
from elastic.outer.replica import Flight
from elastic.peer import Peer
from elastic.shards import ShardTable
from elastic.siteline import SiteLine

N = 103
PATIENT = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)
SHORT = Timeouts(heartbeat=0.1, chunk=0.5, operation=30, round=60, grace=0.1, evict_after=1.0)


class Numbers(Dataset[int]):
    tokens_per_sample = 2

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> int:
        return index


class Stream(IterableDataset[int]):
    """set_epoch rotates it; `begun` says from where it was read."""

    tokens_per_sample = 2

    def __init__(self, n: int = N) -> None:
        self.n, self.first = n, 0
        self.begun: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.turn = 7 * epoch

    def __iter__(self) -> Iterator[int]:
        self.begun.append(self.first)
        return iter([(i + self.turn) % self.n for i in range(self.first, self.n)])


class Skipping(Stream):
    def skip(self, n: int) -> Skipping:
        other = Skipping(self.n)
        other.first, other.begun = n, self.begun
        return other


class Tally(DiLoCo):
    """An outer loop over one parameter, that keeps what the run has counted of its contributions."""

    def __init__(self, peer: Peer, sync_every: int = 3, **options: Any) -> None:
        model = torch.nn.Module()
        model.x = torch.nn.Parameter(torch.zeros(N))
        options |= {"sync_every": sync_every, "joining": "fresh"}  # every step adds exactly 1
        super().__init__(model, torch.optim.SGD(model.parameters(), lr=1.0), peer, **options)
        self.counted = torch.zeros(N)
        self.given: dict[int, torch.Tensor] = {}

    def _proposal(self, flight: Flight) -> Propose:
        self.displacement = flight.delta
        return super()._proposal(flight)

    def _count(self, proposal: Propose) -> None:
        super()._count(proposal)
        assert not self._doubts
        self.counted += self.displacement.round()
        assert proposal.weight == Numbers.tokens_per_sample * self.displacement.round().sum()

    def learn(self, batch: torch.Tensor, *, step: bool = True) -> None:
        self.model.x[batch].sum().backward()  # type: ignore[index, union-attr, operator]
        if step:
            self.inner.step()
            self.inner.zero_grad()


def loader(peer: Peer, *, batch_size: int = 4, shard_size: int = 10, epochs: int = 1, **options: Any) -> Any:
    sampling = {key: options.pop(key) for key in ("batches_per_step", "seed") if key in options}
    sampler = peer.sampler(Numbers(), batch_size, shard_size=shard_size, epochs=epochs, **sampling)
    return DataLoader(Numbers(), batch_sampler=sampler, **options)


def train(peer: Peer, batches: Any, loop: Tally) -> None:
    while not peer.progress.finished:
        for batch in batches:
            loop.learn(batch)


def counted_once(tallies: list[torch.Tensor], times: int = 1) -> bool:
    return torch.equal(sum(tallies, torch.zeros(N)), torch.full((N,), float(times)))


def check_audit(run: Run, samples: int, epochs: int = 1) -> None:
    assert run.coordinator is not None
    report = run.coordinator.audit()
    assert (report.committed, report.twice, report.missing, report.partial) == (samples * epochs, 0, 0, 0)
    assert [epoch.epoch for epoch in report.epochs if epoch.complete] == list(range(epochs))


@contextmanager
def witness(run: Run) -> Iterator[Tally]:
    """p1 is in the loop, has no data, and keeps the state for lives to come."""
    over = threading.Event()
    loop = Tally(run.join("p1")).__enter__()

    def follow() -> None:
        while not over.is_set():
            loop._idle()
            loop.peer.pause()

    thread = threading.Thread(target=follow)
    thread.start()
    yield loop
    over.set()
    thread.join()
    loop._leave()


# --- a DataLoader ahead of the training -----------------------------------------------------------------------------

WORKERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 1, "prefetch_factor": 3},
    {"num_workers": 2, "prefetch_factor": 4, "persistent_workers": True},
]


@pytest.mark.parametrize("workers", WORKERS)
def test_what_a_loader_reads_ahead_counts_when_it_is_stepped(run: Run, workers: dict[str, Any]) -> None:
    def part(peer: Peer) -> torch.Tensor:
        with Tally(peer) as loop:
            train(peer, loader(peer, epochs=2, **workers), loop)
        return loop.counted

    assert counted_once(run.together(part, run.several(2)), times=2)
    check_audit(run, N, epochs=2)


def test_the_cursor_is_the_last_batch_stepped(run: Run) -> None:
    peer = run.join("p0")
    with Tally(peer, sync_every=100) as loop:
        batches = iter(loader(peer, shard_size=40, num_workers=1, prefetch_factor=4))
        for number in range(1, 6):
            batch = next(batches)
            assert peer.cursors == {0: 4 * number - 4}, "five are under way, and none of them counts"
            loop.learn(batch)
            assert peer.cursors == {0: 4 * number} and loop.replica.learned == 2 * 4 * number


def test_without_an_outer_loop_a_pass_reads_all_there_is(run: Run) -> None:
    peer = run.join("p0")
    batches = loader(peer, num_workers=1)
    assert sorted(index for batch in batches for index in batch.tolist()) == list(range(N))
    assert list(batches) == []


def test_a_pass_that_is_broken_off_loses_nothing(run: Run) -> None:
    peer = run.join("p0")
    with Tally(peer) as loop:
        batches = loader(peer, num_workers=2, prefetch_factor=3)
        while not peer.progress.finished:
            for number, batch in enumerate(batches):
                loop.learn(batch)
                if number == 2:
                    break
    assert counted_once([loop.counted])
    check_audit(run, N)


def test_a_second_pass_ends_the_first(run: Run) -> None:
    peer = run.join("p0")
    sampler = peer.sampler(Numbers(), 4, epochs=1)
    first, second = iter(sampler), iter(sampler)
    one = next(first)
    assert next(second) == one, "nobody will step what the first had handed out"
    with pytest.raises(ConfigurationError, match="another pass"):
        next(first)


def test_a_step_on_several_batches_counts_so_many(run: Run) -> None:
    peer = run.join("p0")
    with Tally(peer, sync_every=2) as loop:
        batches = loader(peer, num_workers=1, prefetch_factor=5, batches_per_step=3)
        while not peer.progress.finished:
            since = 0
            for batch in batches:
                since += 1
                loop.learn(batch, step=since == 3)
                since %= 3
            if since:
                loop.inner.step()
                loop.inner.zero_grad()
    assert counted_once([loop.counted])
    check_audit(run, N)


def test_what_is_left_over_and_never_stepped_is_said(run: Run) -> None:
    peer = run.join("p0")
    with pytest.raises(ConfigurationError, match="batches_per_step is 4: step at the end of a pass"):
        with Tally(peer) as loop:
            batches = loader(peer, num_workers=1, batches_per_step=4)
            while not peer.progress.finished:
                for number, batch in enumerate(batches, start=1):
                    loop.learn(batch, step=number % 4 == 0)


def test_shards_end_where_the_last_batch_was_not_stepped(run: Run) -> None:
    """It waits for others only if nothing of its own is missing: else it would wait for itself."""
    peer = run.join("p0")
    with Tally(peer) as loop:
        for number, batch in enumerate(peer.shards(Numbers(), batch_size=4, shard_size=10, epochs=1), start=1):
            loop.learn(batch, step=number % 4 == 0)
        loop.inner.step()
    assert counted_once([loop.counted])
    check_audit(run, N)


class Holding(Numbers):
    """Each sample says whether the process that loads it holds that socket."""

    def __init__(self, inode: str) -> None:
        self.link = f"socket:[{inode}]"

    def __getitem__(self, index: int) -> int:
        held = []
        for descriptor in Path("/proc/self/fd").iterdir():
            with suppress(OSError):  # the one that the folder itself is read through
                held.append(os.readlink(descriptor))
        return self.link in held


def test_workers_do_not_keep_the_connections_of_a_process_that_dies(run: Run) -> None:
    peer = run.join("p0")
    port = f":{int(peer.group.member.addresses[0].rpartition(':')[2]):04X} "
    (inode,) = [line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if port in line[:20]]
    dataset = Holding(inode)
    assert dataset[0], "the peer itself listens"
    assert not any(next(iter(DataLoader(dataset, batch_sampler=peer.sampler(dataset, 4), num_workers=1))))


# --- going back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_whenever_a_peer_goes_back_each_sample_counts_once(run: Run, seed: int) -> None:
    run.policy, run.timeouts = RunPolicy(quorum=0.4), PATIENT
    chance = random.Random(seed)
    workers, per_step = WORKERS[seed % 3], 1 + seed % 2
    gaps = Counter[str]()

    def part(peer: Peer) -> torch.Tensor:
        with Tally(peer, sync_every=2, max_staleness=50, keep_results=50) as loop:
            batches = loader(peer, batch_size=3, epochs=2, batches_per_step=per_step, **workers)
            while not peer.progress.finished:
                since = 0
                for batch in batches:
                    since = (since + 1) % per_step
                    loop.learn(batch, step=since == 0)
                    gaps[f"{peer.name} {'whole' if peer.whole else 'gap'}"] += 1
                    if since == 0 and chance.random() < 0.25:
                        loop._reset()
                if since:
                    loop.inner.step()
                    loop.inner.zero_grad()
        return loop.counted

    assert counted_once(run.together(part, run.several(2)), times=2)
    check_audit(run, N, epochs=2)
    assert workers["num_workers"] == 0 or gaps["p0 gap"] + gaps["p1 gap"], "the loader never was ahead"


def test_a_peer_with_a_gap_keeps_nobody_waiting(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    first, second = run.several(2)
    one, other = Tally(first, sync_every=1).__enter__(), Tally(second, sync_every=99).__enter__()
    batches = iter(loader(second, shard_size=40, num_workers=1, prefetch_factor=4))
    other.learn(next(batches))
    other._reset()
    other.learn(next(batches))  # it had been prefetched; the one before it comes again behind the others
    assert not second.whole and other.replica.learned == 2 * 4
    assert run.coordinator is not None
    coordinator = run.coordinator
    until(lambda: [member.state for member in coordinator.status().members] == ["active", "joining"])
    one.learn(next(iter(first.shards(Numbers(), batch_size=4, shard_size=40, epochs=1))))
    assert one.last_commit is not None and one.last_commit.contributors == ("p0",)
    other.flush()
    assert other.replica.learned == 2 * 4, "it keeps what it has until that is whole"
    steps = 1
    while not second.whole:
        other.learn(next(batches))
        steps += 1
    assert steps == 5 and max(second.cursors.values()) == 20 and not other._receiving
    one._leave(), other._leave()


# --- lost lives -----------------------------------------------------------------------------------------------------


def test_what_an_evicted_life_had_under_way_counts_for_the_next(run: Run) -> None:
    """It goes on training on what its loader still delivers, and nothing of that is ever counted."""
    run.policy, run.timeouts = RunPolicy(quorum=0.4), PATIENT
    with witness(run) as seen:
        old_peer = run.join("p0")
        old = Tally(old_peer, sync_every=2).__enter__()
        batches = iter(loader(old_peer, num_workers=1, prefetch_factor=4))
        for _ in range(3):
            old.learn(next(batches))
        assert old_peer.cursors[0] == 10 and old.counted.sum() == 8

        until(lambda: seen.version.number == old.version.number)
        peer = run.join("p0")
        with pytest.raises(Evicted):
            for batch in batches:
                old.learn(batch)
        with Tally(peer) as loop:
            train(peer, loader(peer, num_workers=1), loop)
        assert counted_once([old.counted, loop.counted])
        check_audit(run, N)
        old._leave()


def test_shards_of_a_lost_peer_are_taken_over_in_a_later_pass(run: Run) -> None:
    run.policy, run.timeouts = RunPolicy(quorum=0.4), SHORT
    first, second = run.several(2)
    lost = Tally(second).__enter__()
    batches = iter(loader(second, num_workers=1, prefetch_factor=4, epochs=1))
    for _ in range(2):
        lost.learn(next(batches))
    with Tally(first) as loop:
        passes = 0
        mine = loader(first, num_workers=1, epochs=1)
        while not first.progress.finished:
            for batch in mine:
                loop.learn(batch)
            passes += 1
            second.close()  # the rest waits for this one, then for its eviction
    assert passes > 1 and counted_once([loop.counted])
    check_audit(run, N)
    lost._leave()


def test_shards_of_a_peer_that_is_given_up_are_read_by_others_at_once(run: Run) -> None:
    run.policy, run.timeouts = RunPolicy(quorum=0.3), dataclasses.replace(PATIENT, evict_after=600)
    with witness(run) as seen:
        lost = Tally(run.join("p0")).__enter__()
        batches = iter(loader(lost.peer))
        for _ in range(7):
            lost.learn(next(batches))
        until(lambda: seen.version.number == lost.version.number > 0)
        lost.peer.close()
        line = SiteLine(f"tcp://127.0.0.1:{run.port}", "test", "local")
        line.tell(given_up=(GivenUp(name="p0", ended=lost.peer.incarnation, reason="it dies"),))
        with Tally(run.join("p2")) as loop:
            train(loop.peer, loader(loop.peer), loop)
        line.close()
    assert counted_once([loop.counted, lost.counted]) and lost.counted.sum() > 0
    check_audit(run, N)
    said = list(EventReader(run.folder / "coordinator.jsonl").read())
    reassigned = [event for event in said if event["event"] == "shard.reassigned"]
    assert reassigned and {(event["peer"], event["before"]) for event in reassigned} == {("p2", "p0")}
    lost._leave()


def test_the_next_life_reads_on_from_the_committed_cursor(run: Run) -> None:
    run.policy, run.timeouts = RunPolicy(quorum=0.4), PATIENT
    with witness(run) as seen:
        old = Tally(run.join("p0"), sync_every=2).__enter__()
        batches = iter(loader(old.peer, shard_size=50, num_workers=1))
        read = [next(batches) for _ in range(6)]
        for batch in read[:5]:
            old.learn(batch)
        until(lambda: seen.version.number == old.version.number)
        old._leave(), old.peer.close()
        again = iter(loader(run.join("p0"), shard_size=50, num_workers=1))
        assert torch.equal(next(again), read[4]) and torch.equal(next(again), read[5])


# --- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("later", [0, 4])
def test_a_state_restored_in_mid_flight_counts_each_sample_once(run: Run, later: int) -> None:
    """later: steps, with exchanges, that the old life makes after the state was taken: those were counted, too."""
    run.policy, run.timeouts = RunPolicy(quorum=0.4), PATIENT
    with witness(run) as seen:
        old = Tally(run.join("p0"), sync_every=4).__enter__()
        batches = loader(old.peer, num_workers=1, prefetch_factor=3)
        under_way = iter(batches)
        for _ in range(6):
            old.learn(next(under_way))
        state, place = old.state_dict(), batches.batch_sampler.state_dict()
        assert old.replica.learned == 2 * (2 + 4)
        for _ in range(later):
            old.learn(next(under_way))
        until(lambda: seen.version.number == old.version.number)
        old._leave(), old.peer.close()

        peer = run.join("p0")
        with Tally(peer, sync_every=4) as loop:
            batches = loader(peer, num_workers=1, prefetch_factor=3)
            if loop.version.number == state["version"]:
                loop.load_state_dict(state)
            batches.batch_sampler.load_state_dict(place)
            assert peer.spoiled == (later > 0)
            train(peer, batches, loop)
        assert counted_once([old.counted, loop.counted])
        check_audit(run, N)


def test_a_state_of_other_data_changes_nothing(run: Run) -> None:
    peer = run.join("p0")
    sampler = peer.sampler(Numbers(), 4, shard_size=10, epochs=1)
    batches = iter(sampler)
    next(batches)
    before = sampler.state_dict()
    with pytest.raises(CheckpointMismatch, match=r"\[99, 10, 0\]"):
        sampler.load_state_dict(before | {"layout": [99, 10, 0]})
    assert sampler.state_dict() == before


# --- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Stream, Skipping])
def test_a_stream_is_read_once_by_all_together(run: Run, kind: type[Stream]) -> None:
    def part(peer: Peer) -> tuple[torch.Tensor, list[int]]:
        stream = kind()
        with Tally(peer) as loop:
            for batch in peer.shards(stream, batch_size=4, shard_size=10, epochs=2):
                loop.learn(batch)
        return loop.counted, stream.begun

    parts = run.together(part, run.several(3))
    assert counted_once([counted for counted, _ in parts], times=2)
    check_audit(run, N, epochs=2)
    assert all(len(begun) <= 3 for _, begun in parts), "it goes forward, once an epoch"


@pytest.mark.parametrize("kind, begun", [(Stream, [0, 0]), (Skipping, [0, 12])])
def test_a_stream_goes_back_to_what_is_committed(run: Run, kind: type[Stream], begun: list[int]) -> None:
    peer, stream = run.join("p0"), kind()
    with Tally(peer) as loop:
        for number, batch in enumerate(peer.shards(stream, batch_size=4, shard_size=40, epochs=1)):
            loop.learn(batch)
            if number == 4:
                loop._reset()
    assert counted_once([loop.counted]) and stream.begun == begun


def test_a_stream_that_ends_where_a_shard_ends(run: Run) -> None:
    peer = run.join("p0")
    with Tally(peer) as loop:
        for batch in peer.shards(Stream(100), batch_size=4, shard_size=10, epochs=2):
            loop.learn(batch)
    assert loop.counted[:100].tolist() == [2.0] * 100 and loop.counted[100:].sum() == 0
    check_audit(run, 100, epochs=2)


def test_the_end_of_a_stream_outlives_the_coordinator(run: Run) -> None:
    ended = 0

    def restart_once_it_is_known(table: ShardTable | None) -> int:
        if table is None or ended or not table.ends:
            return ended
        assert run.coordinator is not None
        run.coordinator.close()
        replayed = run.open()._membership.table
        assert replayed is not None and replayed.ends == table.ends == {0: N}
        return 1

    peer = run.join("p0")
    with Tally(peer) as loop:
        for batch in peer.shards(Stream(), batch_size=4, shard_size=10, epochs=2):
            loop.learn(batch)
            assert run.coordinator is not None
            ended = restart_once_it_is_known(run.coordinator._membership.table)
    assert ended and counted_once([loop.counted], times=2)
    check_audit(run, N, epochs=2)


def test_streams_that_differ_are_refused(run: Run) -> None:
    run.policy, run.timeouts = RunPolicy(quorum=0.4), PATIENT
    first, second = run.several(2)
    loop = Tally(first, sync_every=1).__enter__()
    for batch in first.shards(Stream(), batch_size=10, shard_size=10, epochs=1):
        loop.learn(batch)
        if loop.counted.sum() == 60:
            break
    with pytest.raises(ParityError, match="40 on peer p1: it must be the same on all peers"):
        next(second.shards(Stream(40), batch_size=10, shard_size=10, epochs=1))
    loop._leave()


def test_an_empty_stream_is_refused(run: Run) -> None:
    with pytest.raises(ConfigurationError, match="has no samples"):
        next(run.join("p0").shards(Stream(0), batch_size=4))


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"shard_size": 0}, "shard_size 0"),
        ({"epochs": -1}, "epochs -1"),
        ({"batches_per_step": 0}, "batches_per_step is 0"),
        ({"dataset": Stream()}, r"use peer.shards\(dataset"),
    ],
)
def test_arguments_that_cannot_work_are_named(run: Run, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        run.join("p0").sampler(**{"dataset": Numbers(), "batch_size": 4} | options)


def test_one_peer_reads_one_dataset(run: Run) -> None:
    peer = run.join("p0")
    peer.sampler(Numbers(), 4)
    with pytest.raises(ConfigurationError, match="one dataset per peer"):
        peer.shards(range(7), batch_size=4)  # type: ignore[arg-type]

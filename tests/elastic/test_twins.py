"""Twins: peers that read the same shards, and stand in for one another in every round.

Where inner training is deterministic, a run of twins must come to the bits of a run of as many undisturbed peers as
there are teams, whatever becomes of single twins: a round holds one contribution of each team.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, until
from simulation import OUTER, SimData, World
from sites import Site
from test_data import N, Skipping, Stream, Tally, check_audit, counted_once, loader
from test_membership import events
from test_outer import Quadratic, all_train, equal, inner_of, steps, target_of
from torch.utils.data import Dataset

import elastic
from elastic.config import RunPolicy, Timeouts
from elastic.errors import ConfigurationError, Evicted
from elastic.peer import Peer
from elastic.shards import ShardReader

# a round that waits for somebody's grace waits longer than the test may take
ENDLESS = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=1000, evict_after=300)
SAMPLES, SHARD, BATCH, H, EPOCHS = 96, 48, 4, 3, 3
STEPS = EPOCHS * SHARD // BATCH  # of a peer that reads every other shard
SEEDED = threading.Lock()
Before = Callable[[Peer, int], None]


class Points(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.x[index].sin().sum(dim=0, keepdim=True)


def model_of() -> torch.nn.Module:
    with SEEDED:
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def train(
    peer: Peer, before: Before = lambda peer, step: None, ready: Callable[[], Any] = lambda: True, loop: str = "DiLoCo"
) -> tuple[str, dict[str, torch.Tensor], int]:
    """The state hash, the parameters and the number of steps at the end; of a peer that was killed, what it had."""
    model, made, steps = model_of(), getattr(elastic, loop), 0
    inner = torch.optim.SGD(model.parameters(), lr=0.05)
    joining = "fresh" if peer.name == "p4" else "rewarm"  # who comes late begins at its full learning rate
    outer = made(model, inner, peer, sync_every=H, joining=joining)
    try:
        with outer:
            until(ready)
            for x, y in peer.shards(Points(), batch_size=BATCH, shard_size=SHARD, epochs=EPOCHS):
                before(peer, steps)
                steps += 1
                inner.zero_grad()
                (model(x) - y).square().mean().backward()
                inner.step()
    except Evicted:
        pass
    return outer.version.state_hash, {name: p.detach().clone() for name, p in model.named_parameters()}, steps


def undisturbed(folder: Path, loop: str = "DiLoCo") -> tuple[str, dict[str, torch.Tensor], int]:
    """What two peers that share the data come to."""
    run = Run(folder, policy=RunPolicy(min_peers=2, quorum=1.0), timeouts=ENDLESS)
    folder.mkdir()
    try:
        peers = run.several(2)
        one, other = run.together(lambda peer: train(peer, ready=lambda: all_train(run, 2), loop=loop), peers)
        assert one[0] == other[0] and one[2] == other[2] == STEPS
        return one
    finally:
        run.close()


def told(run: Run, event: str) -> list[dict[str, Any]]:
    lines = (run.folder / "coordinator.jsonl").read_text().splitlines()
    return [each for each in map(json.loads, lines) if each["event"] == event]


def committed(run: Run) -> list[dict[str, Any]]:
    """All rounds; an event can be written a little after the peers hear of it."""
    assert run.coordinator is not None
    rounds = run.coordinator.status().progress.rounds
    until(lambda: len(told(run, "round.committed")) == rounds)
    return told(run, "round.committed")


def contributors(run: Run) -> list[tuple[str, ...]]:
    return [tuple(each["contributors"]) for each in committed(run)]


def check_points(run: Run) -> None:
    assert run.coordinator is not None
    report = run.coordinator.audit()
    assert (report.committed, report.twice, report.missing, report.partial) == (SAMPLES * EPOCHS, 0, 0, 0)
    assert run.coordinator.status().progress.tokens == SAMPLES * EPOCHS


@pytest.fixture
def twins(run: Run) -> Iterator[Run]:
    """Two teams: p0 and p1, p2 and p3."""
    run.policy, run.timeouts = RunPolicy(redundancy=2, min_peers=2, quorum=1.0), ENDLESS
    yield run


# --- real peers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["DiLoCo", "DelayedDiLoCo"])
def test_rounds_keep_the_pace_of_the_faster_twin(twins: Run, tmp_path: Path, loop: str) -> None:
    """p1 makes one step where p0 makes ten; nobody waits for it, and the run comes to the same bits as without it."""
    twins.policy = RunPolicy(redundancy=2, min_peers=4, quorum=1.0)  # who has a twin in the round is there, too
    made: Counter[str] = Counter()

    def before(peer: Peer, step: int) -> None:
        if peer.name == "p1":
            assert step == 0 or peer.starts.get(0, SHARD) >= 9, "it goes on where its twin is"
            until(lambda: made["p0"] >= 10 * (step + 1) or peer.progress.finished)
        made[peer.name] += 1

    peers = twins.several(4)
    ended = twins.together(lambda peer: train(peer, before, lambda: all_train(twins, 4), loop), peers)
    assert made["p0"] == STEPS and 1 <= made["p1"] <= 4
    rounds = contributors(twins)
    assert len(rounds) == STEPS // H and all(names[0] == "p0" and names[1] in ("p2", "p3") for names in rounds)
    assert all("p1" in each["covers"] for each in committed(twins))
    assert not told(twins, "shard.released") and not told(twins, "round.shrunk")
    lines = [json.loads(line) for line in (twins.folder / "p1.jsonl").read_text().splitlines()]
    assert [each["covered"] for each in lines if each["event"] == "round.applied"] == [True] * len(rounds)
    assert not [each for each in lines if each["event"] == "inner.rewarmed"], "nothing is wrong with its optimizer"
    check_points(twins)
    assert len({state_hash for state_hash, _, _ in ended}) == 1
    if loop == "DelayedDiLoCo" and len(set(rounds)) > 1:
        return  # p2 and p3 took turns: a contributor's steps under way stay its own, those of who is covered do not
    expected = undisturbed(tmp_path / "undisturbed", loop)
    assert {state_hash for state_hash, _, _ in ended} == {expected[0]}
    assert all(equal(parameters, expected[1]) for _, parameters, _ in ended)


def test_a_twin_that_dies_costs_nothing(twins: Run, tmp_path: Path) -> None:
    """p0 dies when p1 has hardly begun, p4 comes and is p1's twin, then p1 dies, too. The others never notice."""
    made: Counter[str] = Counter()
    dead: set[str] = set()
    waits: dict[tuple[str, int], Callable[[], bool]] = {
        ("p1", 0): lambda: "p0" in dead,
        ("p1", 4): lambda: made["p4"] > 1,
        ("p4", 6): lambda: "p1" in dead,
    }

    def before(peer: Peer, step: int) -> None:
        until(waits.get((peer.name, step), lambda: True))
        if (peer.name, step) in (("p0", 10), ("p1", 8)):
            dead.add(peer.name)
            peer.close()
        made[peer.name] += 1

    def part(name: str) -> tuple[str, dict[str, torch.Tensor], int]:
        if name == "p4":
            until(lambda: made["p1"] == 4 and told(twins, "peer.evicted"))
            return train(twins.join(name), before)
        return train(next(peer for peer in twins.peers if peer.name == name), before, lambda: all_train(twins, 4))

    twins.several(4)
    with ThreadPoolExecutor(5) as pool:
        _, _, *ended = pool.map(part, ("p0", "p1", "p2", "p3", "p4"))
    assert [each["peer"] for each in told(twins, "peer.evicted")] == ["p0", "p1"]
    (paired,) = [each for each in told(twins, "peer.paired") if each["peer"] == "p4"]
    assert (paired["team"], paired["twins"]) == ("p0", ["p1"])
    rounds = contributors(twins)
    assert len(rounds) == STEPS // H
    for number, names in enumerate(rounds):
        able = {"p0"} if number < 3 else {"p1", "p4"}
        assert len({*names} & able) == len({*names} & {"p2", "p3"}) == 1 and len(names) == 2
    assert not told(twins, "shard.released"), "its twin has its shards: nobody else reads them again"
    check_points(twins)
    expected = undisturbed(tmp_path / "undisturbed")
    assert {state_hash for state_hash, _, _ in ended} == {expected[0]}
    assert all(equal(parameters, expected[1]) for _, parameters, _ in ended)


def test_a_contributor_that_dies_in_the_exchange_is_replaced_by_its_twin(twins: Run, tmp_path: Path) -> None:
    """Both have proposed, p1 follows the attempt as a receiver, p0 dies in it: the next one has what p1 offers."""
    peers = twins.several(3)
    assert twins.coordinator is not None
    operations, execute = twins.coordinator._membership.operations, peers[0].group.run
    armed = threading.Event()

    def before(peer: Peer, step: int) -> None:
        if peer.name == "p2" and step == 5:  # its step makes the second round complete
            until(lambda: "outer" in operations and operations["outer"].proposals.keys() == {"p0", "p1"})
            armed.set()

    def die(*attempt: Any) -> Any:
        if armed.is_set():
            peers[0].close()
            raise Evicted("killed", peer="p0")
        return execute(*attempt)

    peers[0].group.run = die  # type: ignore[method-assign]
    _, *ended = twins.together(lambda peer: train(peer, before, lambda: all_train(twins, 3)), peers)
    assert [each["lost"] for each in told(twins, "round.shrunk")] == [["p0"]]
    second = [each for each in told(twins, "round.started") if each["round"] == 1]
    assert [each["contributors"] for each in second] == [["p0", "p2"], ["p1", "p2"]]
    assert contributors(twins)[1] == ("p1", "p2") and committed(twins)[1]["attempt"] == 1
    check_points(twins)
    expected = undisturbed(tmp_path / "undisturbed")
    assert {state_hash for state_hash, _, _ in ended} == {expected[0]}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_the_loader_of_a_slow_twin_has_under_way_never_counts_again(run: Run, workers: int) -> None:
    run.policy, run.timeouts = RunPolicy(redundancy=2), ENDLESS
    made: Counter[str] = Counter()
    options: dict[str, Any] = {"num_workers": workers} | ({"prefetch_factor": 3} if workers else {})

    def before(peer: Peer) -> None:
        if peer.name == "p1":  # one step for four, until it is alone
            until(lambda: made["p0"] >= min(4 * (made["p1"] + 1), 20) or peer.progress.finished)
        elif peer.name == "p0" and made["p0"] == 20:
            until(lambda: made["p1"] >= 3)
            peer.close()
        made[peer.name] += 1

    def part(peer: Peer) -> torch.Tensor:
        loop = Tally(peer)
        try:
            with loop:
                until(lambda: all_train(run, 3))
                while not peer.progress.finished:
                    for batch in loader(peer, epochs=2, **options):
                        before(peer)
                        loop.learn(batch)
        except Evicted:
            assert peer.name == "p0"
        return loop.counted

    assert counted_once(run.together(part, run.several(3)), times=2)
    check_audit(run, N, epochs=2)
    rounds = contributors(run)
    assert {name for names in rounds for name in names} == {"p0", "p1", "p2"}
    assert not any({"p0", "p1"} <= {*names} for names in rounds)


@pytest.mark.parametrize("kind", [Stream, Skipping])
def test_twins_of_a_stream(run: Run, kind: type[Stream]) -> None:
    run.policy, run.timeouts = RunPolicy(redundancy=2, quorum=1.0), ENDLESS
    made: Counter[str] = Counter()

    def part(peer: Peer) -> torch.Tensor:
        with Tally(peer) as loop:
            until(lambda: all_train(run, 3))
            for batch in peer.shards(kind(), batch_size=4, shard_size=10, epochs=2):
                if peer.name == "p1":
                    until(lambda: made["p0"] >= 3 * (made["p1"] + 1) or peer.progress.finished)
                made[peer.name] += 1
                loop.learn(batch)
        return loop.counted

    assert counted_once(run.together(part, run.several(3)), times=2)
    check_audit(run, N, epochs=2)
    assert made["p1"] and not any({"p0", "p1"} <= {*names} for names in contributors(run))


@pytest.mark.parametrize("data", ["map", "loader", "stream"])
def test_a_twin_may_be_several_ranks(tmp_path: Path, data: str) -> None:
    from rank_worker import SAMPLES as READ
    from rank_worker import model_of as ranked_model
    from rank_worker import train as train_ranked

    run = Run(tmp_path, policy=RunPolicy(redundancy=2, min_peers=2))
    site = Site(tmp_path / "site", run, "replicated", data=data)
    try:
        lone = train_ranked(run.join("lone"), ranked_model(seed=8), data=data)
        first, second = site.facts()
        assert first["state_hash"] == second["state_hash"] == lone["state_hash"]
        assert first["parameters"] == second["parameters"] == lone["parameters"]
        assert run.coordinator is not None
        status, report = run.coordinator.status(), run.coordinator.audit()
        assert status.samples == status.progress.tokens == 2 * READ and report.passed
        assert all(len(names) == 1 for names in contributors(run)) and len(told(run, "peer.paired")) == 2
    finally:
        site.close()
        run.close()


def test_peers_that_do_not_read_the_run_s_data_are_nobody_s_twins(run: Run) -> None:
    """What they train on nobody knows: a twin could not stand in for it."""
    run.policy = RunPolicy(redundancy=2, min_peers=2, quorum=1.0, rounds=3)

    def part(peer: Peer) -> str:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        with elastic.DiLoCo(model, inner, peer, sync_every=2) as outer:
            until(lambda: all_train(run, 2))
            while not outer.finished:
                steps(model, inner, 1)
        return outer.version.state_hash

    assert len({*run.together(part, run.several(2))}) == 1
    assert contributors(run) == [("p0", "p1")] * 3


def test_twins_need_one_loop_of_one_fragment(run: Run) -> None:
    run.policy = RunPolicy(redundancy=2)
    peer = run.join("p0")
    model = model_of()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigurationError, match=r"redundancy 2.*fragments=1"):
        with elastic.StreamingDiLoCo(model, inner, peer, sync_every=8, fragments=2, sync_delay=1):
            pass
    with elastic.DiLoCo(model, inner, peer, sync_every=4):
        with pytest.raises(ConfigurationError, match="one tag"):
            with elastic.DiLoCo(model, inner, peer, sync_every=4, tag="other"):
                pass


# --- who is whose twin ------------------------------------------------------------------------------------------------


def teams(world: World) -> dict[str, str]:
    assert world.membership is not None
    return world.membership.state().teams


def world_of(names: str, sites: dict[str, str] | None = None, **policy: Any) -> World:
    world = World(RunPolicy(**{"redundancy": 2} | policy), data=SimData(epochs=2))
    for name in names:
        world.start(name, site=(sites or {}).get(name, "here"))
        world.turn(read=0)
    return world


def test_who_comes_completes_a_team_of_another_site_first() -> None:
    world = world_of("abcd", {"a": "x", "b": "y", "c": "x", "d": "x"})
    assert teams(world) == {"a": "a", "b": "a", "c": "c", "d": "c"}, "of one site is better than alone"
    world = world_of("ab", {"a": "x", "b": "x"})
    assert teams(world) == {"a": "a", "b": "a"}
    world = world_of("abc", {"a": "x", "b": "y", "c": "y"})
    world.act(world.peers[1001], "leave")
    world.turn()
    assert teams(world) == {"a": "a", "c": "c"}
    world.start("d", site="x")
    world.turn()
    assert teams(world)["d"] == "c", "a is of its own site"


def test_a_twin_comes_back_to_its_place_and_a_newcomer_takes_it() -> None:
    world = world_of("abcd")
    assert world.run_until(lambda: world.ledger.version >= 2)
    a, b = world.peers[1000], world.peers[1001]
    world.die(a)
    world.prove(a)
    again = world.start("a")
    world.turn()
    assert teams(world) == {"a": "a", "b": "a", "c": "c", "d": "c"}
    world.die(again)
    world.prove(again)
    world.start("e")
    world.turn()
    assert teams(world) == {"b": "a", "c": "c", "d": "c", "e": "a"}
    world.start("a")
    world.turn()
    assert teams(world)["a"] == "a+", "the team that began with it is another now"
    world.kill_coordinator()
    world.restart()
    assert teams(world) == {"a": "a+", "b": "a", "c": "c", "d": "c", "e": "a"}
    assert b.running and not events(world, "shard.released")
    assert world.run_until(lambda: world.membership is not None and world.membership.progress.finished, turns=400)
    world.check_audit()


def test_three_may_read_the_same() -> None:
    world = world_of("abcd", redundancy=3)
    assert teams(world) == {"a": "a", "b": "a", "c": "a", "d": "d"}
    assert world.run_until(lambda: world.ledger.version >= 2)
    for incarnation in (1000, 1001):
        world.die(world.peers[incarnation])
        world.prove(world.peers[incarnation])
    assert world.run_until(lambda: world.membership is not None and world.membership.progress.finished, turns=400)
    world.check_audit()
    given = {name for each in events(world, "round.committed") for name in each["contributors"]}
    assert given >= {"a", "c", "d"} and not events(world, "shard.released")


def test_shards_of_twins_go_to_others_once_both_are_gone() -> None:
    world = world_of("abcd")
    assert world.run_until(lambda: world.ledger.version >= 2)
    a, b = world.peers[1000], world.peers[1001]
    world.act(a, "leave")
    world.turn()
    assert not events(world, "shard.released")
    world.act(b, "leave")
    world.turn()
    (released,) = events(world, "shard.released")
    assert released["peer"] == "a" and released["shards"] and teams(world) == {"c": "c", "d": "c"}
    assert world.run_until(lambda: world.membership is not None and world.membership.progress.finished, turns=400)
    world.check_audit()


def test_a_round_does_not_wait_for_who_has_a_twin_in_it() -> None:
    world = world_of("abcd", quorum=1.0)
    assert world.run_until(lambda: world.ledger.version >= 2)
    b = world.peers[1001]
    b.stuck, before = True, world.now
    live = world._live
    world._live = lambda peer, read: peer.beat() or world.flush(peer) if peer is b else live(peer, read)  # type: ignore[assignment, func-returns-value, method-assign]
    version = world.ledger.version
    assert world.run_until(lambda: world.ledger.version >= version + 4, turns=12)
    assert world.now - before < 12 and b.running
    committed = events(world, "round.committed")[-4:]
    assert all("b" in each["covers"] and each["contributors"] in (["a", "c"], ["a", "d"]) for each in committed)


def test_a_run_is_paired_when_it_is_restarted_with_redundancy() -> None:
    world = World(RunPolicy(), data=SimData(epochs=2))
    for name in "ab":
        world.start(name)
    assert world.run_until(lambda: world.ledger.version >= 2)
    assert teams(world) == {}
    world.kill_coordinator()
    world.policy = RunPolicy(redundancy=2)
    world.restart()
    assert teams(world) == {"a": "a", "b": "b"}, "each has begun on shards of its own"
    world.start("c")
    assert world.run_until(lambda: world.membership is not None and world.membership.progress.finished, turns=400)
    assert teams(world) == {"a": "a", "b": "b", "c": "a"}
    world.check_audit()


def test_what_a_twin_has_counted_is_not_taken_again() -> None:
    """A peer that has not understood that its twin's round was its own is told to begin anew."""
    world = world_of("ab")
    assert world.run_until(lambda: world.ledger.version >= 2, read=1) and world.membership is not None
    a, b = world.peers[1000], world.peers[1001]
    assert world.run_until(lambda: a.reader.starts == b.reader.starts and not a.learned and not b.learned, read=0)
    ((shard, before),) = b.reader.starts.items()
    world.act(a, "read", 1)
    world.act(a, "propose")
    version = world.ledger.version
    assert world.run_until(lambda: a.version == b.version == version + 1, read=0)
    assert world.membership.table is not None and world.membership.table.cursors == {shard: before + 1}
    b.slots[OUTER].close()
    b.reader, b.rewinds_to = ShardReader(b.reader.layout), 0
    b.reader.add({shard: before})
    world.act(b, "read", 2)
    world.act(b, "propose")
    assert b.slots[OUTER].proposal is not None and b.learned
    world.deliver_up(b, 100)
    assert "b" not in [name for name, _ in world.membership.rounds.proposals()], "it was refused"
    assert world.run_until(lambda: world.membership is not None and world.membership.progress.finished, turns=400)
    world.check_audit()

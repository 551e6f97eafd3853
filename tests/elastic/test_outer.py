"""The outer loop against its equations, over real sockets: values, joiners, peers that were left out, parity."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from harness import Run, until

from elastic.checkpoints import Checkpoints
from elastic.config import RunPolicy, Timeouts
from elastic.errors import CheckpointMismatch, ConfigurationError, NotEnoughPeers, ParityError
from elastic.events import EventReader
from elastic.messages import Commit, DoneReport, Withdraw
from elastic.outer.diloco import DiLoCo
from elastic.outer.optimizers import SGD, Nesterov
from elastic.peer import Peer


class Quadratic(torch.nn.Module):
    """Half the squared distance to a target that differs from peer to peer."""

    def __init__(self, target: torch.Tensor, start: float = 0.0) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.full_like(target, start))
        self.target = target

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.x - self.target).square().sum()


def target_of(peer: Peer) -> torch.Tensor:
    return torch.randn(37, generator=torch.Generator().manual_seed(int(peer.name[1:])))


def inner_of(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def all_train(run: Run, n: int) -> bool:
    """Whether the coordinator has heard from n peers that they hold the loop's state."""
    assert run.coordinator is not None
    return [member.state for member in run.coordinator.status().members] == ["active"] * n


def equal(one: Any, other: Any) -> bool:
    """Whether two nested states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def steps(model: torch.nn.Module, inner: torch.optim.Optimizer, n: int) -> None:
    for _ in range(n):
        inner.zero_grad()
        model().backward()
        inner.step()


# --- the outer optimizer ----------------------------------------------------------------------------------------------


def test_nesterov_is_a_fixed_list_of_single_rounded_operations() -> None:
    rng = np.random.default_rng(0)
    theta, buffer, delta = (rng.standard_normal(10_001).astype(np.float32) for _ in range(3))
    lr, mu = np.float32(0.7), np.float32(0.9)
    expected_buffer = buffer * mu + delta
    expected = theta - (expected_buffer * mu + delta) * lr
    got, got_buffer = Nesterov(lr=0.7, momentum=0.9).step(*map(torch.from_numpy, (theta, buffer, delta)))
    assert got.numpy().tobytes() == expected.tobytes()
    assert got_buffer.numpy().tobytes() == expected_buffer.tobytes()


def test_nesterov_agrees_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    torch_sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    theta, buffer = parameter.detach().clone(), torch.zeros(100)
    for seed in range(5):
        delta = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        parameter.grad = delta.clone()
        torch_sgd.step()
        theta, buffer = Nesterov(lr=0.7, momentum=0.9).step(theta, buffer, delta)
        torch.testing.assert_close(theta, parameter.detach())


BITS = """
import torch, numpy as np
from xxhash import xxh3_128_hexdigest
from collectives.wires import WIRES
from elastic.outer.optimizers import SGD, Nesterov

rng = np.random.default_rng(0)
scale = np.exp2(rng.integers(-140, 20, (3, 100_003))).astype(np.float32)  # some of these are denormal
theta, buffer, delta = (torch.from_numpy(each) for each in rng.standard_normal((3, 100_003)).astype(np.float32) * scale)
digests = []
for optimizer in (Nesterov(lr=0.7, momentum=0.9), SGD(lr=0.3)):
    for _ in range(3):
        theta, buffer = optimizer.step(theta, buffer, delta)
        digests.append(xxh3_128_hexdigest(theta.numpy().tobytes() + buffer.numpy().tobytes()))
for name in sorted(WIRES):
    encoded = WIRES[name].encode(delta.numpy(), memoryview(bytearray(1 << 20)))
    decoded = np.empty_like(delta.numpy())
    WIRES[name].decode(memoryview(bytearray(encoded)), decoded)
    digests.append(xxh3_128_hexdigest(bytes(encoded) + decoded.tobytes()))
print(torch.backends.cpu.get_cpu_capability(), *digests)
"""


def test_the_outer_step_and_the_wires_give_the_same_bits_on_other_processors() -> None:
    found: dict[str, str] = {}
    for capability in ("default", "avx2", "avx512"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", BITS], env=environment, capture_output=True, text=True, check=True)
        used, _, digests = done.stdout.strip().partition(" ")
        found[used] = digests
    assert len(found) > 1, f"this processor knows no other way to compute than {list(found)}"
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("make", [lambda: Nesterov(lr=0), lambda: Nesterov(momentum=1.0), lambda: SGD(lr=-1)])
def test_an_outer_optimizer_that_cannot_work_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        make()


# --- whole runs -------------------------------------------------------------------------------------------------------


def reference(n: int, rounds: int, h: int, outer: Nesterov) -> torch.Tensor:
    """DiLoCo in one process, by the paper's algorithm 1; the mean in the order of names."""
    peers = [type("P", (), {"name": f"p{i}"}) for i in range(n)]
    models = [Quadratic(target_of(peer)) for peer in peers]  # type: ignore[arg-type]
    inners = [inner_of(model) for model in models]
    theta, buffer = torch.zeros(37), torch.zeros(37)
    for _ in range(rounds):
        deltas = []
        for model, inner in zip(models, inners, strict=True):
            with torch.no_grad():
                model.x.copy_(theta)
            steps(model, inner, h)
            deltas.append(theta - model.x.detach())
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        theta, buffer = outer.step(theta, buffer, total / float(n))
    return theta


def test_diloco_is_the_papers_algorithm_to_the_bit(run: Run) -> None:
    run.policy = RunPolicy(min_peers=3, quorum=1.0, rounds=7)
    outer = Nesterov(lr=0.4, momentum=0.9)

    def train(peer: Peer) -> tuple[torch.Tensor, str, int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        with DiLoCo(model, inner, peer, sync_every=5, outer=outer) as loop:
            while not loop.finished:
                steps(model, inner, 1)
        return model.x.detach().clone(), loop.version.state_hash, loop.version.number

    results = run.together(train, run.several(3))
    expected = reference(3, 7, 5, outer)
    for parameters, state_hash, number in results:
        assert torch.equal(parameters, expected)
        assert (state_hash, number) == (results[0][1], 7)


@pytest.mark.parametrize("wire, gather_wire", [("bf16", ""), ("int8", ""), ("int4", "int8"), ("e3m0", "int8")])
def test_in_a_lossy_wire_all_peers_still_hold_the_same_bits(run: Run, wire: str, gather_wire: str) -> None:
    run.policy = RunPolicy(min_peers=3, quorum=1.0, rounds=3)

    def train(peer: Peer) -> str:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        with DiLoCo(model, inner, peer, sync_every=2, wire=wire) as loop:
            assert loop.spec.gather_wire == gather_wire
            while not loop.finished:
                steps(model, inner, 1)
        assert torch.isfinite(model.x).all() and model.x.abs().sum() > 0
        return loop.version.state_hash

    assert len(set(run.together(train, run.several(3)))) == 1


@pytest.mark.parametrize("wire", ["raw", "f31"])
def test_a_wire_that_carries_no_float32_is_refused(run: Run, wire: str) -> None:
    peer, model = run.join("p0"), Quadratic(torch.zeros(4))
    with pytest.raises(ConfigurationError, match=f"wire '{wire}' is not one of"):
        DiLoCo(model, inner_of(model), peer, wire=wire)


def test_one_peer_with_lr_1_and_no_momentum_trains_as_if_alone(run: Run) -> None:
    run.policy = RunPolicy(rounds=4)
    peer = run.join("p0")
    model, alone = Quadratic(target_of(peer)), Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=3, outer=SGD(lr=1.0)) as loop:
        while not loop.finished:
            steps(model, inner, 1)
    steps(alone, inner_of(alone), 12)
    torch.testing.assert_close(model.x, alone.x)


def test_the_founders_parameters_become_everybodys(run: Run) -> None:
    first, second = run.several(2)
    a, b = Quadratic(target_of(first), start=1.0), Quadratic(target_of(second), start=2.0)
    with DiLoCo(a, inner_of(a), first) as one, DiLoCo(b, inner_of(b), second) as two:
        assert torch.equal(b.x, torch.ones(37)) and one.version.state_hash == two.version.state_hash


def test_a_joiner_gets_the_state_and_contributes_to_the_next_round(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, rounds=6)
    joined, three = threading.Event(), threading.Event()

    def train(peer: Peer) -> tuple[str, list[tuple[str, ...]]]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        if peer.name == "p2":
            three.wait(60)
        seen: list[tuple[str, ...]] = []
        with DiLoCo(model, inner, peer, sync_every=4) as loop:
            if peer.name == "p2":
                assert loop.version.number == 3
                joined.set()
            while not loop.finished:
                steps(model, inner, 1)
                if loop.last_commit and len(seen) <= loop.last_commit.round:
                    seen.append(loop.last_commit.contributors)
                    if len(seen) == 3:
                        three.set()
                        joined.wait(60)
        return loop.version.state_hash, seen

    results = run.together(train, run.several(3))
    assert len({state_hash for state_hash, _ in results}) == 1
    assert results[0][1][:3] == [("p0", "p1")] * 3
    assert ("p0", "p1", "p2") in results[0][1][3:]


def test_nobody_waits_for_a_joiner_that_has_not_made_a_step(run: Run) -> None:
    """With this grace a round that waited for it would outlast the test."""
    run.policy = RunPolicy(min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=600, evict_after=300)
    peers = run.several(3)
    models = [Quadratic(target_of(peer)) for peer in peers]
    inners = [inner_of(model) for model in models]
    loops = [DiLoCo(m, i, p, sync_every=2) for m, i, p in zip(models, inners, peers, strict=True)]
    for loop in loops[:2]:
        loop.__enter__()
    run.together(lambda peer: steps(models[int(peer.name[1])], inners[int(peer.name[1])], 2), peers[:2])
    loops[2].__enter__()
    assert loops[2].version.number == 1
    until(lambda: run.coordinator is not None and "outer" in run.coordinator._membership.members["p2"].entered)
    run.together(lambda peer: steps(models[int(peer.name[1])], inners[int(peer.name[1])], 4), peers[:2])
    assert loops[0].version.number == 3 and loops[0].last_commit.contributors == ("p0", "p1")  # type: ignore[union-attr]
    until(lambda: peers[2].progress.rounds == 3)
    steps(models[2], inners[2], 1)
    assert loops[2].version.number == 3, "it followed as a receiver"
    run.together(lambda peer: steps(models[int(peer.name[1])], inners[int(peer.name[1])], 2), peers)
    assert loops[0].last_commit.contributors == ("p0", "p1", "p2")  # type: ignore[union-attr]
    for loop, peer in zip(loops, peers, strict=True):
        peer.close()
        loop._context.__exit__()


def test_a_version_that_is_being_fetched_is_kept_with_what_leads_on_from_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.outer.serving.SMALL", 0)
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=1) as loop:
        steps(model, inner, 2)
        monkeypatch.setattr(peer.group, "wanted", lambda key: key == "state/outer/0/2")
        steps(model, inner, 4)
        assert sorted(loop._shelf.versions) == [2, 3, 4, 5, 6] and sorted(loop._shelf.results) == [3, 4, 5, 6]
        monkeypatch.setattr(peer.group, "wanted", lambda key: False)
        steps(model, inner, 1)
        assert sorted(loop._shelf.versions) == [6, 7] and sorted(loop._shelf.results) == [6, 7]


def test_small_versions_and_results_are_kept_longer_up_to_so_many_bytes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version is parameters and momentum, twice a result."""
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    result = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr("elastic.outer.serving.SMALL", 12 * result)
    with DiLoCo(model, inner, peer, sync_every=1) as loop:
        steps(model, inner, 20)
        assert sorted(loop._shelf.versions) == [*range(15, 21)] and sorted(loop._shelf.results) == [*range(9, 21)]
        monkeypatch.setattr("elastic.outer.serving.MOST_SMALL", 4)
        steps(model, inner, 1)
        assert sorted(loop._shelf.versions) == sorted(loop._shelf.results) == [18, 19, 20, 21]


def test_a_peer_that_missed_a_round_keeps_what_it_learned(run: Run) -> None:
    run.policy = RunPolicy(rounds=3)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)
    peers = run.several(3)
    models = [Quadratic(target_of(peer)) for peer in peers]
    inners = [inner_of(model) for model in models]
    loops = [DiLoCo(m, i, p, sync_every=4) for m, i, p in zip(models, inners, peers, strict=True)]
    for loop in loops:
        loop.__enter__()
    until(lambda: all_train(run, 3))
    steps(models[2], inners[2], 2)  # less than a round
    before = loops[2].version
    displacement = before.parameters - models[2].x.detach()
    run.together(lambda peer: steps(models[int(peer.name[1])], inners[int(peer.name[1])], 4), peers[:2])
    assert loops[0].version.number == 1 and loops[0].last_commit.contributors == ("p0", "p1")  # type: ignore[union-attr]

    until(lambda: peers[2].progress.rounds == 1)
    loops[2]._listen()
    assert loops[2].version.state_hash == loops[0].version.state_hash, "it applied the round itself"
    torch.testing.assert_close(loops[2].version.parameters - models[2].x.detach(), displacement)
    assert loops[2].replica.learned == 2.0, "its two steps wait for the next round"

    run.together(lambda peer: steps(models[int(peer.name[1])], inners[int(peer.name[1])], 4), peers)
    events = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    second = next(event for event in events if event["event"] == "round.committed" and event["round"] == 1)
    assert second["tokens"]["p2"] > 2, "what it learned in both rounds is in the second"
    for loop, peer in zip(loops, peers, strict=True):
        peer.close()
        loop._context.__exit__()


def test_a_contribution_that_was_given_up_and_committed_all_the_same_counts_once(run: Run) -> None:
    """p0 stops waiting when it holds the result; the commit comes later, and says that its numbers are in it."""
    run.policy = RunPolicy(quorum=1.0)
    peers = run.several(2)
    models = [Quadratic(target_of(peer)) for peer in peers]
    inners = [inner_of(model) for model in models]
    first = DiLoCo(models[0], inners[0], peers[0], sync_every=2, timeout=1.0)
    second = DiLoCo(models[1], inners[1], peers[1], sync_every=2)
    first.__enter__(), second.__enter__()
    until(lambda: all_train(run, 2))
    sends = [peer.send for peer in peers]
    kept: list[DoneReport] = []

    def without_withdrawal(message: Any) -> None:
        if not isinstance(message, Withdraw):
            sends[0](message)

    def without_vote(message: Any) -> None:
        kept.append(message) if isinstance(message, DoneReport) else sends[1](message)

    peers[0].send, peers[1].send = without_withdrawal, without_vote  # type: ignore[method-assign]
    slow = threading.Thread(target=steps, args=(models[1], inners[1], 2))
    slow.start()
    with pytest.raises(NotEnoughPeers):
        steps(models[0], inners[0], 2)
    assert kept, "the other peer was done, too, before this one gave up"
    before = models[0].x.detach().clone()
    peers[0].send, peers[1].send = sends  # type: ignore[method-assign]
    sends[1](kept[0])
    slow.join(60)
    until(lambda: peers[0].progress.rounds == 1)
    first.flush()
    assert first.replica.learned == 0.0 and first.version.state_hash == second.version.state_hash
    torch.testing.assert_close(models[0].x.detach(), first.version.parameters)
    assert not torch.equal(models[0].x, before)
    assert run.coordinator is not None and run.coordinator.status().progress.tokens == 4
    for peer, loop in zip(peers, (first, second), strict=True):
        peer.close()
        loop._context.__exit__()


def test_of_several_contributions_given_up_the_one_that_was_committed_counts(run: Run) -> None:
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=2, timeout=0.6) as loop:
        deliver = peer._deliver
        peer._deliver = lambda m: None if isinstance(m, Commit) else deliver(m)  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(NotEnoughPeers):
                steps(model, inner, 2)
        peer._deliver = deliver  # type: ignore[method-assign]
        steps(model, inner, 2)
    assert run.coordinator is not None
    assert run.coordinator.status().progress.tokens == loop.steps


def test_the_outer_parameters_are_swapped_in_to_evaluate(run: Run) -> None:
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=100) as loop:
        steps(model, inner, 3)
        local = model.x.detach().clone()
        with loop.evaluating() as same:
            assert same is model and torch.equal(model.x, torch.zeros(37)) and not model.training
        assert torch.equal(model.x, local) and model.training
    assert loop.version.number == 1, "leaving the loop exchanges what was learned"


def test_state_goes_round_in_mid_flight(run: Run) -> None:
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=4) as loop:
        steps(model, inner, 6)
        state = loop.state_dict()
        steps(model, inner, 1)
        loop.load_state_dict(state)
        assert loop.steps == 6 and loop.state_dict().keys() == state.keys()
        assert equal(loop.state_dict(), state)
        with pytest.raises(CheckpointMismatch, match="fingerprint"):
            loop.load_state_dict(state | {"fingerprint": "other"})
        steps(model, inner, 2)
    assert loop.version.number == 2


def test_state_goes_round_with_the_place_in_the_data(run: Run) -> None:
    """What was learned after it was taken is forgotten, and its samples are read again: each counts once."""
    peer = run.join("p0")
    model = torch.nn.Linear(1, 1, bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1e-9)
    data = torch.arange(120.0)
    given: list[int] = []

    def train(batches: Any, n: int) -> list[int]:
        read: list[int] = []
        for batch in batches:
            model(batch[:, None]).sum().backward()
            inner.step()
            inner.zero_grad()
            read += batch.int().tolist()
            if len(read) == 5 * n:
                break
        return read

    with DiLoCo(model, inner, peer, sync_every=4) as loop:
        shards = {"batch_size": 5, "shard_size": 20, "epochs": 1}
        given += train(peer.shards(data, **shards), 6)
        state, cursors = loop.state_dict(), peer.cursors
        forgotten = train(peer.shards(data, **shards), 1)
        loop.load_state_dict(state)
        assert {shard: at for shard, at in peer.cursors.items() if at} == cursors
        assert loop.replica.learned == state["places"][0]["tokens"] == 10.0
        rest = train(peer.shards(data, **shards), 1000)
        assert set(forgotten) <= set(rest)
        given += rest
    assert sorted(given) == list(range(120))
    assert run.coordinator is not None and run.coordinator.status().samples == 120


def test_who_missed_the_last_round_still_gets_it(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, rounds=1)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)
    committed = threading.Event()

    def train(peer: Peer) -> tuple[str, tuple[str, ...], list[float]]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        with DiLoCo(model, inner, peer, sync_every=4) as loop:
            if peer.name == "p2":
                until(lambda: peer.progress.finished)
                assert committed.wait(60)
                assert len(peer.view.names) == 3, "the others have not left yet"
            while not loop.finished:
                steps(model, inner, 1)
            committed.set()
        assert loop.last_commit is not None
        return loop.version.state_hash, loop.last_commit.contributors, model.x.tolist()

    results = run.together(train, run.several(3))
    assert results[0] == results[1] == results[2] and results[0][1] == ("p0", "p1")


# --- parity and bad input ---------------------------------------------------------------------------------------------


class Wrong:
    """An outer optimizer on a machine that computes wrongly: once, in the step that makes `version`, or always."""

    def __init__(self, version: int, *, always: bool = False) -> None:
        self.inner, self.version, self.always, self.calls, self.wrong = Nesterov(), version, always, 0, 0
        self.description, self.slots, self.linear = self.inner.description, self.inner.slots, self.inner.linear

    def step(self, parameters: torch.Tensor, momentum: torch.Tensor, delta: torch.Tensor, taken: int = 0) -> Any:
        self.calls += 1
        parameters, momentum = self.inner.step(parameters, momentum, delta)
        if self.calls == self.version or (self.always and self.calls > self.version):
            self.wrong += 1
            parameters[3] = torch.nextafter(parameters[3], torch.tensor(float("inf")))
        return parameters, momentum


def train_wrongly(run: Run, n: int, wrong: dict[str, Wrong]) -> list[tuple[str, int, torch.Tensor, int]]:
    """All train; each gives the hash and number of its last version, its parameters and its steps."""

    def train(peer: Peer) -> tuple[str, int, torch.Tensor, int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        outer: Any = wrong.get(peer.name) or Nesterov()
        with DiLoCo(model, inner, peer, sync_every=3, outer=outer) as loop:
            while not loop.finished:
                steps(model, inner, 1)
        return loop.version.state_hash, loop.version.number, loop.version.parameters, loop.steps

    return run.together(train, run.several(n))


def parity_events(run: Run) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"].startswith("parity.")]


@pytest.mark.parametrize("n", [3, 2])
def test_a_peer_that_drifts_is_named_repaired_and_trains_on(run: Run, n: int) -> None:
    """Of three, the majority decides; of two, who cannot compute its claim again is wrong."""
    run.policy = RunPolicy(min_peers=n, quorum=1.0, rounds=6)
    wrong = Wrong(3)
    ends = train_wrongly(run, n, {"p1": wrong})
    assert wrong.wrong == 1, "the fault did not fire"
    assert len({(state_hash, number) for state_hash, number, _, _ in ends}) == 1 and ends[0][1] == 6
    (mismatch,) = parity_events(run)
    assert (mismatch["peer"], mismatch["version"]) == ("p1", 3) and mismatch["held"] != mismatch["agreed"]
    fetched = [json.loads(line) for line in (run.folder / "p1.jsonl").read_text().splitlines()]
    assert [event["version"] for event in fetched if event["event"] == "state.fetched"][-1] == 3
    assert run.coordinator is not None
    assert {m.name: m.repaired for m in run.coordinator.status().members}.get("p1", 1) == 1


def test_without_a_decision_the_run_stops_rather_than_train_on(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, quorum=1.0, rounds=6)
    wrong = Wrong(3, always=True)
    errors: list[ParityError] = []

    def train(peer: Peer) -> int:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        outer: Any = wrong if peer.name == "p1" else Nesterov()
        with pytest.raises(ParityError, match="no majority and no proof for version 3") as caught:
            with DiLoCo(model, inner, peer, sync_every=3, outer=outer) as loop:
                while not loop.finished:
                    steps(model, inner, 1)
        errors.append(caught.value)
        return loop.version.number

    assert run.together(train, run.several(2)) == [3, 3] and wrong.wrong >= 2
    until(lambda: parity_events(run), 5)  # events are written after messages are sent
    (undecided,) = parity_events(run)
    assert undecided["held"].keys() == {"p0", "p1"} and all(h in str(errors[0]) for h in undecided["held"].values())
    assert run.coordinator is not None and run.coordinator.status().progress.rounds == 3


def test_a_run_that_stopped_undecided_goes_on_from_a_checkpoint_from_before(run: Run) -> None:
    """Coordinator and peers are new; what they have is the journal and checkpoints of every second version."""
    run.policy = RunPolicy(min_peers=2, quorum=1.0, rounds=6)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=2.0, evict_after=30)
    wrong = Wrong(3, always=True)

    def train(peer: Peer, outer: Any) -> tuple[int, str]:
        model, where = Quadratic(target_of(peer)), Checkpoints(str(run.folder / f"of-{peer.name}"), every=2)
        inner = inner_of(model)
        with DiLoCo(model, inner, peer, sync_every=3, outer=outer, checkpoints=where) as loop:
            while not loop.finished:
                steps(model, inner, 1)
        return loop.version.number, loop.version.state_hash

    def stop(peer: Peer) -> None:
        with pytest.raises(ParityError, match="enter with a checkpoint of an earlier version"):
            train(peer, wrong if peer.name == "p1" else Nesterov())
        peer.leave()

    run.together(stop, run.several(2))
    assert run.coordinator is not None
    run.coordinator.close()
    run.open()
    ends = run.together(lambda peer: train(peer, Nesterov()), [run.join(name) for name in ("p0", "p1")])
    assert ends[0] == ends[1] and ends[0][0] == 5, "six rounds, of which the third is void"
    told = {event["event"]: event.get("version") for event in EventReader(run.folder / "coordinator.jsonl").read()}
    assert (told["parity.undecided"], told["run.rolled_back"], told["parity.voided"]) == (3, 2, 3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"outer": Nesterov(lr=0.5)}, "algorithm differs"),
        ({"wire": "bf16"}, "wire differs: 'f32' in the run, 'bf16' on peer p1"),
    ],
)
def test_a_peer_with_another_loop_is_refused(run: Run, options: dict[str, Any], words: str) -> None:
    first, second = run.several(2)
    a, b = Quadratic(target_of(first)), Quadratic(target_of(second))
    with DiLoCo(a, inner_of(a), first):
        with pytest.raises(ParityError, match=words):
            DiLoCo(b, inner_of(b), second, **options).__enter__()


def test_a_peer_with_another_model_is_refused(run: Run) -> None:
    first, second = run.several(2)
    a, b = Quadratic(torch.zeros(37)), Quadratic(torch.zeros(38))
    with DiLoCo(a, inner_of(a), first):
        with pytest.raises(ParityError, match=r"the models differ: x \[37\] in the run, x \[38\] on peer p1"):
            DiLoCo(b, inner_of(b), second).__enter__()


@pytest.mark.parametrize("options", [{"sync_every": 0}, {"max_staleness": 0}, {"keep_results": 0}, {"sync_every": 1.5}])
def test_options_that_cannot_work_are_named(run: Run, options: dict[str, Any]) -> None:
    peer = run.join("p0")
    model = Quadratic(target_of(peer))
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))} is"):
        DiLoCo(model, inner_of(model), peer, **options)


def test_a_model_that_cannot_be_flattened_is_refused_by_parameter(run: Run) -> None:
    peer = run.join("p0")
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    with pytest.raises(ConfigurationError, match=r"parameter weight is torch.float64"):
        DiLoCo(model, torch.optim.SGD(model.parameters()), peer)


# --- data -------------------------------------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    tokens_per_sample = 5

    def __len__(self) -> int:
        return 103

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def test_every_sample_is_read_once_and_counted_once(run: Run) -> None:
    def train(peer: Peer) -> list[int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        seen: list[int] = []
        with DiLoCo(model, inner, peer, sync_every=3):
            for batch in peer.shards(Samples(), batch_size=4, shard_size=10, seed=3, epochs=2):
                seen.extend(batch.tolist())
                steps(model, inner, 1)
        return seen

    results = run.together(train, run.several(3))
    read = sorted(index for seen in results for index in seen)
    assert read == sorted(list(range(103)) * 2)
    assert run.coordinator is not None
    status = run.coordinator.status()
    assert status.samples == 206 and status.progress.tokens == 206 * 5
    assert status.progress.finished, "the data is spent"


def test_a_peer_without_data_follows_the_others_to_the_end(run: Run) -> None:
    run.policy = RunPolicy(quorum=0.4)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)
    peers = run.several(2)

    def train(peer: Peer) -> tuple[str, int, int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        received = 0
        with DiLoCo(model, inner, peer, sync_every=2, max_staleness=50, keep_results=50) as loop:
            for batch in peer.shards(Samples(), batch_size=4, shard_size=52, seed=3, epochs=1):
                until(
                    lambda: all(each.cursors or each._status.state == "receiving" for each in peers)
                )  # both have a shard
                if peer.name == "p1" and not received:  # the other one has read its half, and nothing is left for it
                    until(lambda: peers[0]._status.state == "receiving")
                received += len(batch)
                steps(model, inner, 1)
        return loop.version.state_hash, loop.version.number, received

    results = run.together(train, peers)
    assert results[0][:2] == results[1][:2], "the receiver has followed to the last version"
    assert sorted(received for _, _, received in results) == [51, 52]
    assert run.coordinator is not None and run.coordinator.status().samples == 103


def test_the_last_samples_of_one_peer_count_although_the_others_have_none_left(run: Run) -> None:
    """Three shards of one batch for two peers: in the last round there is one contributor, and min_peers is two."""
    run.policy = RunPolicy(min_peers=2, quorum=1.0)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=40, grace=0.3, evict_after=30)

    class Nine(Samples):
        def __len__(self) -> int:
            return 9

    def train(peer: Peer) -> tuple[str, int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        with DiLoCo(model, inner, peer, sync_every=1) as loop:
            for _ in peer.shards(Nine(), batch_size=3, shard_size=3, epochs=1):
                steps(model, inner, 1)
        return loop.version.state_hash, loop.version.number

    results = run.together(train, run.several(2))
    assert results[0] == results[1]
    assert run.coordinator is not None and run.coordinator.status().samples == 9


def test_what_a_lost_peer_did_not_commit_is_read_by_the_others(run: Run) -> None:
    run.policy = RunPolicy(quorum=0.4)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=0.5, operation=30, round=60, grace=0.1, evict_after=1.0)
    first, second = run.several(2)
    began = threading.Event()

    def lost() -> None:
        model = Quadratic(target_of(second))
        loop = DiLoCo(model, inner_of(model), second, sync_every=100)
        loop.__enter__()
        next(iter(second.shards(Samples(), batch_size=4, shard_size=20, seed=3, epochs=1)))
        second.close()
        began.set()

    model = Quadratic(target_of(first))
    inner = inner_of(model)
    seen: list[int] = []
    with DiLoCo(model, inner, first, sync_every=3):
        lost()
        assert began.is_set()
        for batch in first.shards(Samples(), batch_size=4, shard_size=20, seed=3, epochs=1):
            seen.extend(batch.tolist())
            steps(model, inner, 1)
    assert sorted(seen) == list(range(103)), "all of it, once"
    assert run.coordinator is not None and run.coordinator.status().samples == 103


def test_the_next_life_of_a_peer_reads_on_from_the_committed_position(run: Run) -> None:
    run.policy = RunPolicy(quorum=0.4)  # one of two suffices: the other only keeps the state
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)

    def batches(peer: Peer, n: int) -> list[int]:
        model = Quadratic(target_of(peer))
        inner = inner_of(model)
        loop = DiLoCo(model, inner, peer, sync_every=2)
        loop.__enter__()
        seen: list[int] = []
        for batch in peer.shards(Samples(), batch_size=4, shard_size=50, seed=3, epochs=1):
            seen.extend(batch.tolist())
            steps(model, inner, 1)
            if len(seen) == 4 * n:
                break
        return seen

    first = batches(run.join("p0"), 5)  # the fifth batch is in no committed round
    witness = run.join("p1")
    model = Quadratic(target_of(witness))
    with DiLoCo(model, inner_of(model), witness):
        second = batches(run.join("p0"), 3)
        assert second[:4] == first[16:20], "what was not committed is read again, and nothing else"
        assert not set(second) & set(first[:16])

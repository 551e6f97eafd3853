"""Loops whose exchanges run while training goes on, over real sockets: equal to the simulator, and under faults."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Run, until
from test_algorithms import Layered, descend, inner_of, workers

import elastic
from elastic.config import RunPolicy, Timeouts
from elastic.errors import CheckpointMismatch, ConfigurationError, NotEnoughPeers, ParityError
from elastic.messages import Commit
from elastic.outer import co2, decoupled, delayed, streaming
from elastic.outer.compression import Compression
from elastic.outer.engine import OuterLoop
from elastic.outer.optimizers import SGD, HeavyBall, Nesterov
from elastic.outer.rule import Rule
from elastic.outer.simulator import Simulator
from elastic.peer import Peer

STREAM: dict[str, Any] = {"sync_every": 8, "fragments": 4, "sync_delay": 2}
DECOUPLED: dict[str, Any] = {"sync_every": 8, "fragments": 4, "sync_delay": 1, "quorum": 3}
LOSSY: list[dict[str, Any]] = [
    {},
    {"feedback": elastic.ErrorFeedback()},
    {"rotate": True},
    {"error_budget": 1.5},
]


def seed_of(peer: Peer) -> int:
    return int(peer.name[1:])


def events(run: Run, writer: str, kind: str) -> list[dict[str, Any]]:
    lines = (run.folder / f"{writer}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def train(peer: Peer, make: Callable[..., OuterLoop], steps: int, **options: Any) -> tuple[torch.Tensor, OuterLoop]:
    """So many inner steps; the model as it is at the end of the loop, before its last exchange, and the loop."""
    model = Layered(seed_of(peer))
    inner = inner_of(model)
    with make(model, inner, peer, **options) as loop:
        for _ in range(steps):
            descend(model, inner)
        before = model.flat()
    return before, loop


# --- equal to the simulator, which is equal to the papers -------------------------------------------------------------


CASES: list[tuple[Callable[..., OuterLoop], Rule, dict[str, Any]]] = [
    (elastic.StreamingDiLoCo, streaming.rule(sync_delay=2), STREAM),
    (elastic.StreamingDiLoCo, streaming.rule(sync_delay=0, merge_alpha=0.0),
     STREAM | {"sync_delay": 0, "merge_alpha": 0.0}),
    (elastic.DelayedDiLoCo, delayed.rule(), {"sync_every": 8}),
    (elastic.DelayedDiLoCo, delayed.rule(eager=True), {"sync_every": 8, "eager": True}),
    (elastic.CO2, co2.rule(), {"sync_every": 8}),
    (elastic.DecoupledDiLoCo, decoupled.rule(sync_delay=1), DECOUPLED),
    (elastic.DecoupledDiLoCo, decoupled.rule(sync_delay=1, rda=True), DECOUPLED | {"rda": True}),
]  # fmt: skip


@pytest.mark.parametrize("make, rule, options", CASES)
def test_over_the_network_it_is_what_it_is_in_one_process(
    run: Run, make: Callable[..., OuterLoop], rule: Rule, options: dict[str, Any]
) -> None:
    """Parameters of each peer after 37 steps, and the outer state after the last exchange: the same bits."""
    run.policy = RunPolicy(min_peers=3, quorum=1.0)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=60)
    models = workers()
    inners = [inner_of(model) for model in models]
    cut = "balanced" if rule.name == "DecoupledDiLoCo" else "strided"
    simulator = Simulator(models, rule, sync_every=8, fragments=options.get("fragments", 1), cut=cut)
    for _ in range(37):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
    expected = [model.flat() for model in models]
    simulator.flush()
    results = run.together(lambda peer: train(peer, make, 37, **options), run.several(3))
    assert len({loop.version.state_hash for _, loop in results}) == 1
    for (before, loop), model in zip(results, expected, strict=True):
        assert torch.equal(before, model)
        assert loop.version.state_hash == simulator.replicas[0].state.state_hash
        assert loop.version.number == simulator.number > 3


@pytest.mark.parametrize("wire", ["int8", "int4", "e3m0"])
@pytest.mark.parametrize(
    "options", [{}, {"feedback": elastic.ErrorFeedback()}, {"rotate": True}, {"error_budget": 1.5}]
)
def test_lossy_formats_give_all_peers_the_same_bits_and_bytes_are_as_predicted(
    run: Run, wire: str, options: dict[str, Any]
) -> None:
    run.policy = RunPolicy(min_peers=2, quorum=1.0)
    results = run.together(
        lambda peer: train(peer, elastic.StreamingDiLoCo, 33, **STREAM, wire=wire, **options), run.several(2)
    )
    one, other = (loop for _, loop in results)
    assert one.version.state_hash == other.version.state_hash and one.version.number >= 8
    statistics = one.statistics()
    assert statistics.contributed == statistics.rounds == one.version.number
    elements = [part.elements for part in one.layout.parts]
    sizes = [Compression(wire=wire).size(n) for n in elements]
    assert statistics.bytes_offered == sum(sizes[number % 4] for number in range(one.version.number))


def test_what_error_feedback_believes_to_have_sent_is_what_the_others_got(run: Run) -> None:
    """With chunks and owners on the way: the sum of what was counted and the residual is all that was learned."""
    run.policy = RunPolicy(min_peers=2, quorum=1.0)
    size = 40_000

    class Wide(torch.nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.x = torch.nn.Parameter(torch.zeros(size))
            self.gradient = torch.randn(size, generator=torch.Generator().manual_seed(seed))

        def forward(self) -> torch.Tensor:
            return (self.x * self.gradient).sum()

    def learn(peer: Peer) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        model = Wide(seed_of(peer))
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        options = {"wire": "int4", "gather_wire": "f32", "feedback": elastic.ErrorFeedback()}
        with elastic.DiLoCo(model, inner, peer, sync_every=1, outer=SGD(lr=1.0), **options) as loop:
            for _ in range(6):
                descend(model, inner)
            residual = loop.replica.places[0].residual.error
            return loop.version.parameters.clone(), residual, 6 * model.gradient

    (theta, e1, all1), (same, e2, all2) = run.together(learn, run.several(2))
    assert torch.equal(theta, same)
    torch.testing.assert_close(theta, -((all1 - e1) + (all2 - e2)) / 2, rtol=1e-4, atol=1e-4)
    assert e1.norm() > 0.01 * all1.norm(), "nothing was lost, so nothing was tested"


# --- overlap ----------------------------------------------------------------------------------------------------------


def test_inner_steps_go_on_while_a_fragment_is_on_its_way(run: Run) -> None:
    """The result is held back until the steps of the overlap are made: who would wait for it, would wait for ever."""
    run.policy = RunPolicy(quorum=1.0)
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    gate, execute = threading.Event(), peer.group.run

    def held(*args: Any) -> Any:
        assert gate.wait(30)
        return execute(*args)

    peer.group.run = held  # type: ignore[method-assign]
    with elastic.StreamingDiLoCo(model, inner, peer, **STREAM | {"sync_every": 24, "sync_delay": 4}) as loop:
        for _ in range(24 + 3):
            descend(model, inner)
        assert loop.version.number == 0 and loop.replica.flight is not None and loop.replica.flight.age == 3
        gate.set()
        descend(model, inner)
        assert loop.version.number == 1 and loop.replica.flight is None


def test_after_the_overlap_it_waits_and_says_for_how_long(run: Run) -> None:
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    execute = peer.group.run

    def slow(*args: Any) -> Any:
        time.sleep(0.3)
        return execute(*args)

    peer.group.run = slow  # type: ignore[method-assign]
    with elastic.StreamingDiLoCo(model, inner, peer, **STREAM | {"sync_delay": 1}) as loop:
        for _ in range(8):
            descend(model, inner)
        before = loop.statistics()
        descend(model, inner)
        after = loop.statistics()
        assert loop.version.number == 1 and after.sync_seconds >= 0.3
        trained = after.training_seconds - before.training_seconds
        assert after.stalled_seconds - before.stalled_seconds > 0.28 - trained and after.stalled_seconds > 0


def test_evaluating_and_state_in_mid_flight(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    with elastic.DelayedDiLoCo(model, inner, peer, sync_every=8) as loop:
        for _ in range(20):
            descend(model, inner)
        assert loop.replica.flight is not None
        local = model.flat()
        with loop.evaluating():
            assert torch.equal(model.flat(), loop.version.parameters)
        assert torch.equal(model.flat(), local)
        state = loop.state_dict()
        for _ in range(2):
            descend(model, inner)
        loop.load_state_dict(state)  # what was on its way is committed by now: nobody gives it twice
        assert loop.steps == 20 and loop.version.number == 2 and loop.replica.learned == 0.0
        assert torch.equal(model.flat(), loop.version.parameters)
        for _ in range(3):
            descend(model, inner)
        local, state = model.flat(), loop.state_dict()
        for _ in range(2):
            descend(model, inner)
        loop.load_state_dict(state)
        assert torch.equal(model.flat(), local) and loop.steps == 23 and loop.replica.learned == 3.0
        with pytest.raises(CheckpointMismatch, match="algorithm"):
            loop.load_state_dict(state | {"algorithm": "DiLoCo"})
        loop.flush()
        assert loop.replica.flight is None and loop.replica.learned == 0.0


def test_an_error_in_the_script_leaves_no_thread_behind(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)  # nobody else comes: the exchange would wait for ever
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    with pytest.raises(KeyError):
        with elastic.DelayedDiLoCo(model, inner, peer, sync_every=4):
            for _ in range(5):
                descend(model, inner)
            raise KeyError("the script's own")
    assert not [thread for thread in threading.enumerate() if thread.name == "elastic-exchange"]


def test_draining_does_not_wait_for_a_flight_longer_than_it_may(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    with elastic.DelayedDiLoCo(model, inner, peer, sync_every=4):
        for _ in range(5):
            descend(model, inner)
        began = time.monotonic()
        peer.drain(1.0)
    assert time.monotonic() - began < 10 < run.timeouts.round
    assert [event["given"] for event in events(run, "p0", "peer.drained")] == [False]


# --- peers that come, go and lag --------------------------------------------------------------------------------------


def paced(peer: Peer, make: Callable[..., OuterLoop], stop: threading.Event, pace: float, **options: Any) -> OuterLoop:
    model = Layered(seed_of(peer))
    inner = inner_of(model)
    with make(model, inner, peer, **options) as loop:
        while not (stop.is_set() or loop.finished):
            descend(model, inner)
            stop.wait(pace)
    return loop


def together(*calls: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def keep(index: int, call: Callable[[], Any]) -> None:
        results[index] = call()

    threads = [threading.Thread(target=keep, args=each) for each in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads), "somebody waits for ever"
    return results


@pytest.mark.parametrize(
    "make, options",
    [
        (elastic.StreamingDiLoCo, STREAM),
        (elastic.DelayedDiLoCo, {"sync_every": 6}),
        (elastic.DelayedDiLoCo, {"sync_every": 6, "eager": True}),
        (elastic.CO2, {"sync_every": 6}),
        (elastic.DecoupledDiLoCo, {"sync_every": 8, "fragments": 4, "sync_delay": 1, "quorum": 2}),
    ],
)
def test_peers_of_unequal_speed_and_a_joiner_end_with_the_same_state(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any]
) -> None:
    run.policy = RunPolicy(rounds=24, min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.3, evict_after=30)
    stop = threading.Event()
    first = run.several(2)

    def late() -> OuterLoop:
        until(lambda: first[0].progress.rounds >= 6)
        return paced(run.join("p2"), make, stop, 0.002, **options)

    loops = together(
        lambda: paced(first[0], make, stop, 0.002, **options),
        lambda: paced(first[1], make, stop, 0.02, **options),
        late,
    )
    assert len({loop.version.state_hash for loop in loops}) == 1
    committed = events(run, "coordinator", "round.committed")
    names = {name for event in committed for name in event["contributors"]}
    assert names == {"p0", "p1", "p2"}, "somebody never contributed"
    assert all(loop.statistics().contributed > 0 for loop in loops)
    assert [event["version"] for event in committed] == list(range(1, len(committed) + 1))


def test_a_peer_that_dies_with_a_contribution_on_its_way_costs_the_others_nothing_else(run: Run) -> None:
    run.timeouts = Timeouts(heartbeat=0.1, chunk=0.5, operation=30, round=60, grace=20, evict_after=30)
    run.policy = RunPolicy(rounds=30, min_peers=2)
    peers = run.several(3)
    stop = threading.Event()
    struck: list[int] = []
    execute = peers[2].group.run
    entered = threading.Barrier(3)

    class Together(elastic.StreamingDiLoCo):
        def __enter__(self) -> Together:
            super().__enter__()
            entered.wait(60)  # nobody makes a step before all are there, or the run could be over by then
            return self

    def dying(start: Any, source: Any, result: Any) -> Any:
        if start.round >= 5 and source is not None and not struck:
            struck.append(start.round)
            threading.Thread(target=peers[2].close).start()
        return execute(start, source, result)

    peers[2].group.run = dying  # type: ignore[method-assign]

    def dies() -> None:
        with pytest.raises(elastic.ElasticError):
            paced(peers[2], Together, stop, 0.005, **STREAM)

    loops = together(
        lambda: paced(peers[0], Together, stop, 0.005, **STREAM),
        lambda: paced(peers[1], Together, stop, 0.005, **STREAM),
        dies,
    )[:2]
    assert struck, "the fault did not fire"
    assert loops[0].version.state_hash == loops[1].version.state_hash
    after = {event["round"]: event["contributors"] for event in events(run, "coordinator", "round.committed")}
    assert all({"p0", "p1"} <= {*after[number]} for number in range(struck[0], 30)), "no round was lost"
    assert loops[0].version.number == 30


def test_a_flight_given_up_and_committed_all_the_same_counts_once(run: Run) -> None:
    """The peer stops waiting when it holds the result; the commit comes later, and says that its numbers are in it."""
    run.policy = RunPolicy(quorum=1.0)
    peer = run.join("p0")
    model = Layered(0)
    inner = inner_of(model)
    with elastic.DelayedDiLoCo(model, inner, peer, sync_every=4, timeout=0.6, outer=SGD(lr=0.5)) as loop:
        deliver = peer._deliver
        peer._deliver = lambda m: None if isinstance(m, Commit) else deliver(m)  # type: ignore[method-assign]
        with pytest.raises(NotEnoughPeers):
            for _ in range(8):
                descend(model, inner)
        assert loop._doubts and loop.replica.places[0].owed is not None
        peer._deliver = deliver  # type: ignore[method-assign]
        for _ in range(4):
            descend(model, inner)
    assert run.coordinator is not None and run.coordinator.status().progress.tokens == loop.steps == 12


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    tokens_per_sample = 3

    def __len__(self) -> int:
        return 211

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


@pytest.mark.parametrize(
    "make, options", [(elastic.StreamingDiLoCo, STREAM), (elastic.DelayedDiLoCo, {"sync_every": 4})]
)
def test_every_sample_of_an_epoch_counts_once_with_several_fragments(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any]
) -> None:
    def read(peer: Peer) -> list[int]:
        model = Layered(seed_of(peer))
        inner = inner_of(model)
        seen: list[int] = []
        with make(model, inner, peer, **options):
            for batch in peer.shards(Numbers(), batch_size=4, shard_size=12, epochs=2):
                seen += batch.tolist()
                descend(model, inner)
        return seen

    results = run.together(read, run.several(3))
    assert sorted(index for seen in results for index in seen) == sorted([*range(211)] * 2)
    assert run.coordinator is not None
    status = run.coordinator.status()
    assert status.samples == 422 and status.progress.tokens == 422 * 3 and status.progress.finished
    audit = run.coordinator._membership.audit()
    assert audit.passed and audit.committed == 422 and audit.partial == 0


def test_what_a_lost_peer_gave_to_some_fragments_only_is_counted_as_partial(run: Run) -> None:
    run.policy = RunPolicy(quorum=0.4)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=0.5, operation=30, round=60, grace=0.1, evict_after=1.0)
    first, second = run.several(2)
    models = [Layered(0), Layered(1)]
    inners = [inner_of(model) for model in models]
    options = STREAM | {"sync_delay": 0}
    loops = [elastic.StreamingDiLoCo(*each, **options) for each in zip(models, inners, (first, second), strict=True)]
    for loop in loops:
        loop.__enter__()
    seen: list[list[int]] = [[], []]

    def read(i: int, most: int) -> None:
        for batch in (first, second)[i].shards(Numbers(), batch_size=4, shard_size=40, epochs=1):
            seen[i] += batch.tolist()
            descend(models[i], inners[i])
            if len(seen[i]) == most:
                return

    read(1, 4 * 9)  # 8 steps before the first exchange, one since: fragment 0 alone has had what was learned in them
    until(lambda: first.progress.rounds == 1)
    loops[0]._listen()
    assert loops[1].version.number == loops[0].version.number == 1
    second.close()
    read(0, -1)
    loops[0].finish()
    assert run.coordinator is not None
    audit = run.coordinator._membership.audit()
    assert audit.passed and audit.committed == 211
    assert audit.partial == 3 * 32, "three fragments never got what was learned from 32 samples"
    assert sorted(seen[0] + seen[1][:32]) == list(range(211))


# --- a quorum of its own ----------------------------------------------------------------------------------------------


def test_a_decoupled_round_waits_for_nobody_and_a_peer_of_slow_steps_still_contributes(run: Run) -> None:
    """The run's own policy would wait for everybody, for 600 s; many rounds pass in one step of the slow peer."""
    run.policy = RunPolicy(quorum=1.0, rounds=300)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=900, grace=600, evict_after=1000)
    peers = run.several(3)
    stop = threading.Event()
    options = {"sync_every": 8, "fragments": 4, "sync_delay": 1, "quorum": 1, "grace_cap": 0.02, "max_staleness": 999}
    pace = {"p0": 0.005, "p1": 0.005, "p2": 0.1}
    loops = together(
        *(lambda p=peer: paced(p, elastic.DecoupledDiLoCo, stop, pace[p.name], **options) for peer in peers)
    )
    assert len({loop.version.state_hash for loop in loops}) == 1
    committed = events(run, "coordinator", "round.committed")
    slow = [event["round"] for event in committed if "p2" in event["contributors"]]
    assert len(slow) < len(committed) / 3, "the others waited for it"
    assert len([number for number in slow if number < 280]) >= 2, "and yet what it has learned gets in"
    assert loops[2].statistics().rounds > 100 and len(events(run, "p2", "state.fetched")) <= 3, "it follows"


# --- cadences over the network ----------------------------------------------------------------------------------------


def test_sync_every_in_seconds_lets_each_peer_make_its_own_number_of_steps(run: Run) -> None:
    run.policy = RunPolicy(rounds=4, quorum=1.0, min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=60)
    stop = threading.Event()
    peers = run.several(2)
    loops = together(
        lambda: paced(peers[0], elastic.DiLoCo, stop, 0.002, sync_every="0.3s"),
        lambda: paced(peers[1], elastic.DiLoCo, stop, 0.03, sync_every="0.3s"),
    )
    assert loops[0].version.state_hash == loops[1].version.state_hash
    assert loops[0].steps > 2 * loops[1].steps
    given = [event["tokens"] for event in events(run, "coordinator", "round.committed")]
    one, other = (sum(tokens.get(name, 0) for tokens in given) for name in ("p0", "p1"))
    assert one > 2 * other > 0, "weighted by what each has trained on"


def test_speed_matched_peers_are_ready_at_once(run: Run) -> None:
    """DyLU: the slow one makes fewer steps, so that the fast one does not wait for it."""
    run.policy = RunPolicy(rounds=6, quorum=1.0, min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.05, chunk=2.5, operation=30, round=60, grace=20, evict_after=60)
    stop = threading.Event()
    peers = run.several(2)
    loops = together(
        lambda: paced(peers[0], elastic.DiLoCo, stop, 0.01, sync_every=40, speed_matched=True),
        lambda: paced(peers[1], elastic.DiLoCo, stop, 0.04, sync_every=40, speed_matched=True),
    )
    last = events(run, "coordinator", "round.committed")[-1]
    assert 30 <= last["tokens"]["p0"] <= 40 and 5 <= last["tokens"]["p1"] <= 20, last["tokens"]
    assert loops[0].version.state_hash == loops[1].version.state_hash


def test_a_single_merging_when_the_loop_is_left(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, quorum=1.0)
    results = run.together(
        lambda peer: train(peer, elastic.DiLoCo, 30, sync_every=elastic.Final(), outer=SGD(lr=1.0)), run.several(2)
    )
    (before, one), (other_before, other) = results
    assert one.version.number == other.version.number == 1 and one.statistics().rounds == 1
    assert torch.equal(one.model.flat(), other.model.flat())
    torch.testing.assert_close(one.model.flat(), (before + other_before) / 2)


# --- what is no number, and other bad input ---------------------------------------------------------------------------


def test_a_contribution_that_is_no_number_never_reaches_the_others(run: Run) -> None:
    run.policy = RunPolicy(rounds=8, min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=10, evict_after=60)
    peers = run.several(3)
    sent: list[torch.Tensor] = []
    stop = threading.Event()
    execute = peers[1].group.run

    def seen(start: Any, source: Any, result: Any) -> Any:
        sent.extend([] if source is None else [source.clone()])
        return execute(start, source, result)

    peers[1].group.run = seen  # type: ignore[method-assign]
    spoilt: list[int] = []

    def poisoned() -> OuterLoop:
        model = Layered(1)
        inner = torch.optim.AdamW(model.parameters(), lr=0.1)
        with elastic.DiLoCo(model, inner, peers[1], sync_every=4) as loop:
            while not loop.finished:
                if loop.statistics().contributed == 2 and not spoilt:
                    spoilt.append(loop.version.number)
                    model.layers[2].data[7] = math.nan
                descend(model, inner)
                stop.wait(0.002)
        assert all(torch.isfinite(value).all() for kept in inner.state.values() for value in kept.values())
        return loop

    calls = [lambda i=i: paced(peers[i], elastic.DiLoCo, stop, 0.002, sync_every=4) for i in (0, 2)]
    one, other, loop = together(*calls, poisoned)
    assert one.version.state_hash == other.version.state_hash == loop.version.state_hash
    assert torch.isfinite(one.version.parameters).all() and all(torch.isfinite(each).all() for each in sent)
    (refused,) = events(run, "p1", "contribution.refused")
    assert (refused["parameter"], refused["version"]) == ("layers.2", spoilt[0]) and loop.statistics().refused == 1
    rounds = {event["version"]: event["contributors"] for event in events(run, "coordinator", "round.committed")}
    assert rounds[spoilt[0] + 1] == ["p0", "p2"], "the round went on without it"
    assert any("p1" in rounds[n] for n in range(spoilt[0] + 2, len(rounds) + 1)), "and it came back"


@pytest.mark.parametrize(
    "make, options, words",
    [
        (elastic.StreamingDiLoCo, {"sync_every": 5, "sync_delay": 5}, "sync_every must be above sync_delay"),
        (elastic.StreamingDiLoCo, {"fragments": 9}, "fragments is 9: this model has 4 layers"),
        (elastic.StreamingDiLoCo, {"merge_alpha": -0.1}, "merge_alpha is -0.1"),
        (elastic.DelayedDiLoCo, {"outer": Nesterov(lr=0.7, momentum=0.9)}, "diverges"),
        (elastic.CO2, {"outer": Nesterov()}, "CO2 has a heavy ball"),
        (elastic.DecoupledDiLoCo, {"quorum": 0}, "quorum is 0"),
        (elastic.DiLoCo, {"wire": "int5"}, "wire 'int5' is not one of"),
        (elastic.DiLoCo, {"buffers": "shared"}, "buffers is 'shared'"),
        (elastic.DiLoCo, {"error_budget": 1.0}, "error_budget is 1.0 with wire 'f32'"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any], words: str
) -> None:
    peer, model = run.join("p0"), Layered(0)
    with pytest.raises(ConfigurationError, match=words):
        make(model, inner_of(model), peer, **options)


@pytest.mark.parametrize(
    "make, options, words",
    [
        (elastic.DiLoCo, {}, "algorithm differs: 'StreamingDiLoCo.*' in the run, 'DiLoCo.*' on peer p1"),
        (elastic.StreamingDiLoCo, STREAM | {"wire": "int4"}, "wire differs: 'f32' in the run, 'int4' on peer p1"),
        (elastic.StreamingDiLoCo, STREAM | {"fragments": 2}, "fragments differs: 4 in the run, 2 on peer p1"),
        (elastic.StreamingDiLoCo, STREAM | {"feedback": elastic.ErrorFeedback()}, "algorithm differs"),
        (elastic.StreamingDiLoCo, STREAM | {"outer": HeavyBall()}, "algorithm differs"),
    ],
)
def test_a_peer_with_another_algorithm_is_refused_with_both_values(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any], words: str
) -> None:
    first, second = run.several(2)
    one, other = Layered(0), Layered(1)
    with elastic.StreamingDiLoCo(one, inner_of(one), first, **STREAM):
        with pytest.raises(ParityError, match=words):
            make(other, inner_of(other), second, **options).__enter__()


def test_a_model_that_differs_is_refused_by_the_name_of_its_tensor(run: Run) -> None:
    first, second = run.several(2)
    one, other = Layered(0), Layered(1)
    other.layers[2] = torch.nn.Parameter(torch.zeros(7))
    with elastic.StreamingDiLoCo(one, inner_of(one), first, **STREAM):
        with pytest.raises(ParityError, match=r"layers.2 \[150\] in the run, layers.2 \[7\] on peer p1"):
            elastic.StreamingDiLoCo(other, inner_of(other), second, **STREAM).__enter__()

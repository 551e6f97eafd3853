"""Faults in real runs on loopback: the culprit is named, with the numbers, and nothing is said of a healthy run."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Run, until
from test_algorithms import descend
from test_streaming import together

import elastic
from elastic.config import FAULT_CLASSES, FaultPolicy, RunPolicy, Timeouts
from elastic.errors import Quarantined
from elastic.peer import Peer

STEP = 0.02
TIMES = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=20, evict_after=30)
OBSERVE = FaultPolicy(**dict.fromkeys(FAULT_CLASSES, "observe"))


def anomalies(run: Run, kind: str = "anomaly.confirmed") -> list[dict[str, Any]]:
    lines = (run.folder / "coordinator.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


class Slope(torch.nn.Module):
    """It goes down for ever, the same way on all peers but for noise: so contributions always agree."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(40_000))
        self.slope = torch.randn(40_000, generator=torch.Generator().manual_seed(1))
        self.noise = torch.Generator().manual_seed(seed)

    def forward(self) -> torch.Tensor:
        return (self.x * (self.slope + torch.randn(40_000, generator=self.noise))).sum()


class Trainer:
    """One peer's loop of timed steps; `pace` and `spoil` may be changed on the way."""

    def __init__(self, peer: Peer, stop: threading.Event) -> None:
        self.peer, self.stop, self.pace = peer, stop, STEP
        self.spoil: Callable[[torch.nn.Module], None] = lambda model: None
        self.out: Quarantined | None = None

    def __call__(self) -> elastic.OuterLoop | None:
        try:
            return self._train()
        except Quarantined as error:
            self.out = error
            return None

    def _train(self) -> elastic.OuterLoop:
        model = Slope(int(self.peer.name[1:]))
        inner = torch.optim.SGD(model.parameters(), lr=1e-3)
        with elastic.DiLoCo(model, inner, self.peer, sync_every=8) as loop:
            while not self.stop.is_set():
                self.stop.wait(self.pace)
                self.spoil(model)
                descend(model, inner)
        return loop


def watch(run: Run, n: int, act: Callable[[list[Trainer]], None], faults: FaultPolicy = OBSERVE) -> None:
    """Trains with n peers while `act` does what it does, in a thread of its own."""
    run.timeouts, run.policy = TIMES, RunPolicy(quorum=1.0, faults=faults)
    stop = threading.Event()
    trainers = [Trainer(peer, stop) for peer in run.several(n)]

    def acting() -> None:
        try:
            assert run.coordinator is not None
            until(lambda: all(trainer.peer.progress.rounds >= 3 for trainer in trainers))
            act(trainers)
        finally:
            stop.set()

    together(acting, *trainers)


def quiet(run: Run, rounds: int, trainers: list[Trainer]) -> None:
    """So many more rounds pass."""
    goal = trainers[0].peer.progress.rounds + rounds
    until(lambda: trainers[0].peer.progress.rounds >= goal)


def test_a_peer_whose_steps_become_slow_is_named_and_cleared_when_it_is_well_again(run: Run) -> None:
    def act(trainers: list[Trainer]) -> None:
        quiet(run, 40, trainers)
        assert not anomalies(run)
        trainers[1].pace = 5 * STEP
        until(lambda: anomalies(run))
        assert run.coordinator is not None
        (report,) = run.coordinator.status().verdicts
        assert (report.kind, report.culprits) == ("slow peer", ("p1",)) and report.lasting_seconds < 20
        trainers[1].pace = STEP
        until(lambda: anomalies(run, "anomaly.cleared"))
        assert not run.coordinator.status().verdicts

    watch(run, 3, act)
    (event,) = anomalies(run)
    assert (event["kind"], event["culprits"]) == ("slow peer", ["p1"]) and event["confidence"] > 0.5
    assert event["evidence"]["factor"] > 2 and event["evidence"]["usual_seconds"] == pytest.approx(STEP, rel=0.7)


@pytest.mark.parametrize("factor, evidence", [(-1.0, "cosine"), (60.0, "norm")])
def test_a_peer_that_sends_wrong_gradients_is_named(run: Run, factor: float, evidence: str) -> None:
    """It moves another way than the others, or much further: as if its pseudo-gradient had been multiplied."""
    fired: list[float] = []

    def act(trainers: list[Trainer]) -> None:
        quiet(run, 20, trainers)
        assert not anomalies(run)
        peer = trainers[2].peer
        operation = peer.operation

        def spoiled(proposal: Any, buffers: Any, inbox: Any) -> Any:
            sent, _ = buffers(None)
            sent.mul_(factor)
            fired.append(float(sent.norm()))
            return operation(proposal, buffers, inbox)

        peer.operation = spoiled  # type: ignore[method-assign]
        until(lambda: anomalies(run))

    watch(run, 4, act)
    assert len(fired) >= 2, "the fault did not fire"
    event = anomalies(run)[0]
    assert (event["kind"], event["culprits"]) == ("bad gradient", ["p2"]) and evidence in event["evidence"]


def test_a_peer_whose_numbers_are_none_is_named_at_once(run: Run) -> None:
    def spoil(model: torch.nn.Module) -> None:
        with torch.no_grad():
            next(model.parameters()).fill_(float("nan"))

    def act(trainers: list[Trainer]) -> None:
        trainers[0].spoil = spoil
        until(lambda: trainers[0].peer.telemetry.statistics().dropped == 0 and anomalies(run))

    watch(run, 3, act)
    assert {(e["kind"], *e["culprits"]) for e in anomalies(run)} == {("bad gradient", "p0")}
    assert anomalies(run)[0]["evidence"]["not_finite"] == 1.0


def test_heartbeats_say_where_the_time_of_exchanges_goes(run: Run) -> None:
    peers = run.several(2)
    for _ in range(3):
        run.together(lambda peer: peer.all_reduce(torch.ones(1 << 20), tag="sum"))
    assert run.coordinator is not None
    coordinator = run.coordinator

    def exchanged() -> list[Any]:
        return [member.status.exchanged for member in coordinator.status().members]

    until(lambda: all(each.attempts == 3 for each in exchanged()))
    for each, peer in zip(exchanged(), peers, strict=True):
        assert each == peer.telemetry.exchanged
        assert 0 < each.ready_seconds + each.data_seconds <= each.seconds and each.reduce_seconds > 0

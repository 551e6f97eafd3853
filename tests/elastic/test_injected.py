"""Faults on purpose in real runs: they strike where they should, are counted and told, and the others stay right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness import QUICK, Run, until
from test_outer import Quadratic, inner_of, steps, target_of

from elastic.checkpoints import Checkpoints
from elastic.config import RunPolicy, Timeouts
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError
from elastic.events import EventReader
from elastic.outer.diloco import DiLoCo
from elastic.outer.optimizers import SGD
from elastic.peer import Peer
from fault.inject import Fault, Injector
from fault.orders import order, registered

ALL = ("p0", "p1", "p2")


def faulty(run: Run, n: int = 3, **options: Any) -> tuple[list[Peer], list[Injector]]:
    injectors = [Injector() for _ in range(n)]
    peers = [run.join(f"p{i}", faults=injector, **options) for i, injector in enumerate(injectors)]
    for peer in peers:
        peer.wait_for(n)
    return peers, injectors


def events(run: Run, writer: str, name: str) -> list[dict[str, Any]]:
    return [event for event in EventReader(run.folder / f"{writer}.jsonl").read() if event["event"] == name]


def train(peer: Peer, rounds: int, sync_every: int = 2, **options: Any) -> DiLoCo:
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=sync_every, outer=SGD(lr=1.0), **options) as loop:
        steps(model, inner, rounds * sync_every)
    return loop


def until_over(peer: Peer) -> DiLoCo:
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=2) as loop:
        while not loop.finished:
            steps(model, inner, 1)
            peer.pause()
    return loop


def test_nobody_has_faults_unless_it_asked(run: Run) -> None:
    assert run.join("p0").faults is None


@pytest.mark.parametrize("kind", ["nan", "scale", "flip"])
def test_what_a_faulty_peer_gives_to_a_sum_is_exactly_that_and_its_tensor_stays(run: Run, kind: str) -> None:
    peers, injectors = faulty(run)
    factor = {"nan": float("nan"), "scale": 3.0, "flip": -1.0}[kind]
    id = injectors[1].arm(Fault(kind=kind, factor=3.0 if kind == "scale" else None))
    for wrong in (True, False):
        tensors = {peer.name: torch.randn(1000) for peer in peers}
        kept = {name: tensor.clone() for name, tensor in tensors.items()}
        results = run.together(lambda peer, given=tensors: peer.all_reduce(given[peer.name]))
        p0, p1, p2 = (kept[name] for name in ALL)
        expected = p0 + (p1 * factor if wrong else p1) + p2
        for result in results:
            assert result.contributors == ALL
            torch.testing.assert_close(result.tensor, expected, rtol=0, atol=0, equal_nan=True)
        assert all(torch.equal(tensors[name], kept[name]) for name in ALL)
    assert injectors[1].fired == {id: 1}
    (event,) = events(run, "p1", "fault.injected")
    assert (event["kind"], event["id"], event["peer"]) == (kind, id, "p1")


def test_whole_numbers_are_left_alone(run: Run) -> None:
    (peer,), (injector,) = faulty(run, 1)
    injector.arm(Fault(kind="flip"))
    assert peer.all_reduce(torch.arange(4)).tensor.tolist() == [0, 1, 2, 3]
    assert injector.fired == {"flip-1": 0}


@pytest.mark.parametrize("factor", [-1.0, 10.0])
def test_a_wrong_contribution_moves_all_replicas_alike_and_by_what_it_says(run: Run, factor: float) -> None:
    run.policy = RunPolicy(min_peers=3, quorum=1.0)
    peers, injectors = faulty(run)
    kind = {"kind": "flip"} if factor == -1.0 else {"kind": "scale", "factor": factor}
    id = injectors[1].arm(Fault(round=2, **kind))
    loops = run.together(lambda peer: train(peer, 5))
    assert injectors[1].fired == {id: 1}
    assert len({loop.version.state_hash for loop in loops}) == 1
    torch.testing.assert_close(loops[0].version.parameters, simulated(peers, 5, {(2, "p1"): factor}))


def simulated(peers: list[Peer], rounds: int, wrong: dict[tuple[int, str], float]) -> torch.Tensor:
    """The outer parameters: minus the mean of how far each has moved, times what is wrong with it."""
    models = {peer.name: Quadratic(target_of(peer)) for peer in peers}
    inners = {name: inner_of(model) for name, model in models.items()}
    outer = torch.zeros(37)
    for version in range(rounds):
        total = torch.zeros(37)
        for name, model in models.items():
            model.x.data.copy_(outer)
            steps(model, inners[name], 2)
            total += (outer - model.x.data) * wrong.get((version, name), 1.0)
        outer = outer - total / len(models)
    return outer


def test_a_contribution_of_nans_is_never_sent(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=1.0, evict_after=30)
    peers, injectors = faulty(run)
    id = injectors[2].arm(Fault(kind="nan", round=2))
    peers[0].run_until(rounds=12)
    loops = run.together(until_over)
    assert injectors[2].fired == {id: 1}
    assert len(events(run, "p2", "contribution.refused")) == 1
    assert len({loop.version.state_hash for loop in loops}) == 1
    assert torch.isfinite(loops[0].version.parameters).all()


def test_a_loop_that_hangs_is_left_out_and_comes_back(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.2, evict_after=30)
    peers, injectors = faulty(run)
    id = injectors[1].arm(Fault(kind="hang", round=3, seconds=2.0))
    peers[0].run_until(rounds=40)
    loops = run.together(until_over)
    assert injectors[1].fired == {id: 1}
    committed = [set(event["contributors"]) for event in events(run, "coordinator", "round.committed")]
    assert {"p0", "p2"} in committed, "the round waited for who hangs"
    assert {"p0", "p1", "p2"} in committed[committed.index({"p0", "p2"}) :], "it did not come back"
    assert len({loop.version.state_hash for loop in loops}) == 1


def test_slow_steps_are_slow_for_everyone_who_measures(run: Run) -> None:
    peer = run.join("p0", faults=Injector())
    assert peer.faults is not None
    id = peer.faults.arm(Fault(kind="slow", factor=10.0, seconds=600))
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    pause = Pause(0.01)
    with DiLoCo(model, inner, peer, sync_every=1000) as loop:
        for _ in range(5):
            pause()
            steps(model, inner, 1)
        seconds = loop.statistics().step_seconds
    assert peer.faults.fired[id] == 5 and seconds >= 0.1


class Pause:
    def __init__(self, seconds: float) -> None:
        import threading

        self.wait, self.seconds = threading.Event().wait, seconds

    def __call__(self) -> None:
        self.wait(self.seconds)


def test_a_full_disk_costs_checkpoints_and_no_training(run: Run) -> None:
    peer = run.join("p0", faults=Injector())
    assert peer.faults is not None
    id = peer.faults.arm(Fault(kind="full-disk", round=2, seconds=600))
    where = Checkpoints(str(run.folder / "c"), every=1, keep=100)
    model = Quadratic(target_of(peer))
    inner = inner_of(model)
    with DiLoCo(model, inner, peer, sync_every=2, checkpoints=where) as loop:
        assert loop.saver is not None
        for round in range(5):
            steps(model, inner, 2)
            assert loop.saver._writer.flush(30)
            if round == 3:
                assert peer.events.dropped > 0
                peer.faults.disarm(id)
        counts = loop.saver.statistics()
    assert peer.faults.fired[id] >= 2 and counts.failed == 3 and "No space left on device" in counts.last_error
    assert counts.written == 2 and loop.version.number == 5
    (struck,) = events(run, "p0", "fault.injected")
    assert struck["kind"] == "full-disk"
    left = [path for path in (run.folder / "c").rglob("*") if path.name.endswith(".part")]
    assert not left, "what did not fit is still there"
    assert [event["version"] for event in events(run, "p0", "checkpoint.written")] == [1, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_coordinator_that_cannot_write_its_journal_stops_and_its_next_life_goes_on(run: Run) -> None:
    injector = Injector()
    options: dict[str, Any] = {"run": "test", "timeouts": QUICK, "journal": run.folder / "journal.sqlite"}
    first = Coordinator("tcp://127.0.0.1:0", events=run.folder / "coordinator.jsonl", faults=injector, **options)
    run.port = int(first.address.rpartition(":")[2])
    run.coordinator = first
    peers = run.several(2)
    id = injector.arm(Fault(kind="full-disk", seconds=600))
    run.timeouts = QUICK
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(train, peer, 6) for peer in peers]
        until(lambda: first.error is not None)
        first.close()
        assert isinstance(first.error, OSError) and injector.fired[id] >= 1
        assert [event["id"] for event in events(run, "coordinator", "fault.injected")] == [id]
        run.open()
        loops = [end.result(60) for end in ends]
    assert len({loop.version.state_hash for loop in loops}) == 1 and loops[0].version.number >= 6


def test_two_that_cannot_reach_each_other_are_both_in_the_sum(run: Run) -> None:
    _, injectors = faulty(run)
    run.together(lambda peer: peer.all_reduce(torch.ones(10)))
    ids = [injectors[i].arm(Fault(kind="partition", seconds=600, peer=other)) for i, other in ((0, "p1"), (1, "p0"))]
    for _ in range(3):
        results = run.together(lambda peer: peer.all_reduce(torch.full((5000,), float(int(peer.name[1:]) + 1))))
        for result in results:
            assert result.contributors == ALL and torch.equal(result.tensor, torch.full((5000,), 6.0))
    assert injectors[0].fired[ids[0]] + injectors[1].fired[ids[1]] > 0
    assert run.coordinator is not None and len(run.coordinator.status().members) == 3


@pytest.mark.parametrize("kind", ["drop", "corrupt"])
def test_a_broken_or_corrupted_frame_costs_an_attempt_and_no_sum(run: Run, kind: str) -> None:
    peers, injectors = faulty(run)
    run.together(lambda peer: peer.all_reduce(torch.ones(10)))
    id = injectors[0].arm(Fault(kind=kind, times=2, peer="p1"))
    attempts = 0
    for _ in range(20):
        results = run.together(lambda peer: peer.all_reduce(torch.full((200_000,), float(int(peer.name[1:]) + 1))))
        for result in results:
            assert torch.equal(result.tensor, torch.full((200_000,), 6.0)) and result.contributors == ALL
        attempts += results[0].attempts
        if injectors[0].fired[id] == 2:
            break
    assert injectors[0].fired[id] == 2 and attempts > 1
    corrupt = sum(peer.statistics().group.corrupt_frames for peer in peers)
    assert 1 <= corrupt <= 2 if kind == "corrupt" else corrupt == 0, "a link that is dead already reads no second one"


# --- by order ---------------------------------------------------------------------------------------------------------


def test_a_peer_takes_orders_where_its_environment_says(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.folder / "chaos"
    monkeypatch.setenv("ELASTIC_CHAOS", str(folder))
    peer = run.join("p0")
    me = registered(folder)["p0"]
    assert (me.run, me.incarnation, me.role) == ("test", peer.incarnation, "peer")
    order(folder, me, Fault(kind="flip", id="x"))
    until(lambda: peer.faults is not None and "x" in peer.faults.fired)
    assert peer.all_reduce(torch.ones(3)).tensor.tolist() == [-1.0] * 3
    assert '"x"' in (folder / "p0.fired.jsonl").read_text()
    peer.leave()
    assert registered(folder) == {}


def test_a_folder_that_others_may_write_to_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.folder / "chaos"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("ELASTIC_CHAOS", str(folder))
    with pytest.raises(ConfigurationError, match=r"ELASTIC_CHAOS: .* nobody else may write to it"):
        run.join("p0")
    folder.chmod(0o700)
    with pytest.raises(ConfigurationError, match="the name 'coordinator' is the coordinator's"):
        run.join("coordinator")
    assert Path(folder).stat().st_mode & 0o777 == 0o700

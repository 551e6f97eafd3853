"""What a training script sees of a peer: collectives, membership, errors; over real sockets."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
import torch
from harness import QUICK, Run, until

from collectives import LinkOptions
from collectives.records import Failed, Start
from elastic.config import RunPolicy, Timeouts
from elastic.errors import (
    CollectiveError,
    ConfigurationError,
    CoordinatorUnavailable,
    Evicted,
    NotEnoughPeers,
    ParityError,
    RoundAborted,
)
from elastic.messages import Commit, Withdraw
from elastic.peer import Peer
from elastic.siteline import SiteLine


def number_of(peer: Peer) -> int:
    return int(peer.name[1:])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (300_001,)])
def test_a_sum_is_exact_in_the_order_of_names_and_the_same_bytes_everywhere(run: Run, shape: tuple[int, ...]) -> None:
    peers = run.several(3)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    kept = [tensor.clone() for tensor in inputs]
    results = run.together(lambda peer: peer.all_reduce(inputs[number_of(peer)]), peers)
    exact = (inputs[0] + inputs[1]) + inputs[2]
    for result in results:
        assert torch.equal(result.tensor, exact)
        assert result.contributors == ("p0", "p1", "p2") and result.round == 0 and result.attempts == 1
    assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))


def test_means_plain_and_weighted(run: Run) -> None:
    peers = run.several(3)
    plain = run.together(lambda peer: peer.all_reduce(torch.tensor([number_of(peer) * 3.0]), op="mean"), peers)
    assert [result.tensor.item() for result in plain] == [3.0] * 3
    weights = (1.0, 1.0, 2.0)
    weighted = run.together(
        lambda peer: peer.all_reduce(
            torch.tensor([number_of(peer) * 4.0]), op="mean", weight=weights[number_of(peer)], tag="weighted"
        ),
        peers,
    )
    assert [result.tensor.item() for result in weighted] == [(0 + 4 + 16) / 4] * 3


def test_a_tensor_that_is_not_contiguous(run: Run) -> None:
    peers = run.several(2)
    matrix = torch.arange(12.0).reshape(3, 4)
    results = run.together(lambda peer: peer.all_reduce(matrix.t()), peers)
    assert torch.equal(results[0].tensor, 2 * matrix.t())


def test_a_list_goes_as_one_operation_and_comes_back_as_views(run: Run) -> None:
    peers = run.several(2)
    given = [torch.arange(6.0).reshape(2, 3).t(), torch.tensor(1.0), torch.ones(70_000)]
    for result in run.together(lambda peer: peer.all_reduce(given), peers):
        assert [torch.equal(got, 2 * tensor) for got, tensor in zip(result.tensors, given, strict=True)] == [True] * 3
        assert result.tensor.shape == (70_007,) and result.round == 0 and result.record is not None
        assert all(got.untyped_storage().data_ptr() == result.tensor.data_ptr() for got in result.tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_summed_in_float32_and_rounded_once(run: Run, dtype: torch.dtype) -> None:
    peers = run.several(3)
    inputs = [torch.randn(1000, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
    exact = ((inputs[0].float() + inputs[1].float()) + inputs[2].float()).to(dtype)
    for result in run.together(lambda peer: peer.all_reduce(inputs[number_of(peer)]), peers):
        assert result.tensor.dtype is dtype and torch.equal(result.tensor, exact)


def test_operations_under_several_tags_do_not_mix(run: Run) -> None:
    peers = run.several(3)

    def many(peer: Peer) -> list[float]:
        works = [peer.all_reduce_async(torch.full((1000,), float(k)), tag=f"t{k}") for k in range(5)]
        return [float(work.wait(timeout=60).tensor[0]) for work in works]

    assert run.together(many, peers) == [[0.0, 3.0, 6.0, 9.0, 12.0]] * 3


def test_an_async_operation_takes_a_snapshot(run: Run) -> None:
    peers = run.several(2)
    tensor = torch.ones(1000)
    work = peers[0].all_reduce_async(tensor)
    tensor.fill_(100.0)
    other = peers[1].all_reduce(torch.ones(1000))
    assert torch.equal(work.wait(60).tensor, torch.full((1000,), 2.0))
    assert torch.equal(other.tensor, torch.full((1000,), 2.0))


def test_a_peer_alone_reduces_with_itself(run: Run) -> None:
    peer = run.join("p0")
    assert torch.equal(peer.all_reduce(torch.ones(10), op="mean").tensor, torch.ones(10))


def test_a_barrier_is_passed_by_all_at_once(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peers = run.several(3)
    early = [threading.Thread(target=peer.barrier, daemon=True) for peer in peers[:2]]
    for thread in early:
        thread.start()
    operations = run.coordinator._membership.operations
    until(lambda: any(len(operation.proposals) == 2 for operation in list(operations.values())))
    assert all(thread.is_alive() for thread in early)
    assert peers[2].barrier().contributors == ("p0", "p1", "p2")
    for thread in early:
        thread.join()


# --- who is in --------------------------------------------------------------------------------------------------------


def test_an_absent_member_is_left_out_after_the_grace(run: Run) -> None:
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.3, evict_after=30)
    peers = run.several(3)
    results = run.together(lambda peer: peer.all_reduce(torch.ones(4)), peers[:2])
    assert all(result.contributors == ("p0", "p1") for result in results)


def test_the_same_name_again_expels_the_life_before(run: Run) -> None:
    old = run.join("p0")
    new = run.join("p0")
    assert (new.life, new.view.names) == (2, ("p0",))
    with pytest.raises(Evicted, match="another life"):
        old.wait_for(2, timeout=30)
    with pytest.raises(Evicted):
        old.all_reduce(torch.ones(1))
    assert torch.equal(new.all_reduce(torch.ones(1)).tensor, torch.ones(1))


def test_who_leaves_is_out_of_the_view_and_can_come_back(run: Run) -> None:
    first, second = run.several(2)
    second.leave()
    second.leave()
    until(lambda: first.view.names == ("p0",))
    with pytest.raises(NotEnoughPeers):
        first.wait_for(2, timeout=0.05)
    back = run.join("p1")
    assert first.wait_for(2, timeout=30).names == ("p0", "p1") and back.life == 2


def test_another_shape_under_the_same_tag_is_refused_with_both_values(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peers = run.several(3)
    work = [peer.all_reduce_async(torch.ones(4)) for peer in peers[:2]]
    operations = run.coordinator._membership.operations
    until(lambda: any(len(operation.proposals) == 2 for operation in list(operations.values())))
    with pytest.raises(ParityError, match="elements differs: 4 in the run, 5 on peer p2"):
        peers[2].all_reduce(torch.ones(5))
    with pytest.raises(ParityError, match=r"shape differs: '\(4,\)' in the run, '\(2, 2\)' on peer p2"):
        peers[2].all_reduce(torch.ones(2, 2))
    with pytest.raises(ParityError, match="algorithm differs: 'all_reduce' in the run, 'barrier' on peer p2"):
        peers[2].barrier()
    peers[2].all_reduce(torch.ones(4))
    assert all(torch.equal(each.wait(60).tensor, torch.full((4,), 3.0)) for each in work)


def test_who_no_longer_waits_does_not_hold_up_the_others(run: Run) -> None:
    peers = run.several(3)
    with pytest.raises(NotEnoughPeers):
        peers[0].all_reduce(torch.ones(4), timeout=0.2)
    results = run.together(lambda peer: peer.all_reduce(torch.ones(4)), [peers[1], peers[2], peers[0]])
    assert {result.contributors for result in results} == {("p0", "p1", "p2")}


# --- data -------------------------------------------------------------------------------------------------------------


def test_a_late_second_answer_about_shards_does_not_pass_for_the_next_one(run: Run) -> None:
    """A peer that asks twice while the coordinator is frozen gets two answers; cursors may have moved in between."""
    peer = run.join("p0")
    data = peer.shards(range(100), batch_size=5, shard_size=10, epochs=1)  # type: ignore[arg-type]
    read = [*next(data).tolist(), *next(data).tolist()]
    peer.data.inbox.put(dataclasses.replace(peer.data.ask(), shards={7: 0}, spent=True, sequence=1))
    read += [index for batch in data for index in batch.tolist()]
    assert sorted(read) == list(range(100))


def test_a_start_for_an_operation_that_nobody_waits_for_any_more_is_withdrawn(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    peers = run.several(3)
    send = peers[0].send
    peers[0].send = lambda message: None if isinstance(message, Withdraw) else send(message)  # type: ignore[method-assign]
    with pytest.raises(NotEnoughPeers):
        peers[0].all_reduce(torch.ones(4), timeout=0.2)
    peers[0].send = send  # type: ignore[method-assign]
    results = run.together(lambda peer: peer.all_reduce(torch.ones(4)), peers[1:])
    assert all(result.contributors == ("p1", "p2") and result.attempts == 2 for result in results)


def test_a_peer_that_cannot_drain_leaves_all_the_same(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    first, second = run.several(2)
    work = first.all_reduce_async(torch.ones(4))
    until(lambda: first.statistics().operations_waiting == 1)
    with pytest.raises(NotEnoughPeers, match="operations still waiting"):
        first.leave(timeout=0.1)
    with pytest.raises(Evicted):
        work.wait(60)
    until(lambda: second.view.names == ("p1",))


def test_the_late_commit_of_an_operation_that_was_given_up_is_not_the_next_ones(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    first, second = run.several(2)
    kept: list[Any] = []
    deliver, send = first._deliver, first.send
    first._deliver = lambda m: kept.append(m) if isinstance(m, Commit) else deliver(m)  # type: ignore[method-assign]
    first.send = lambda m: None if isinstance(m, Withdraw) else send(m)  # type: ignore[method-assign]
    other = second.all_reduce_async(torch.ones(4))
    with pytest.raises(NotEnoughPeers):
        first.all_reduce(torch.ones(4), timeout=0.5)
    assert other.wait(60).contributors == ("p0", "p1") and kept
    first._deliver, first.send = deliver, send  # type: ignore[method-assign]
    works = [peer.all_reduce_async(torch.full((4,), 5.0)) for peer in (first, second)]
    first._deliver(kept[0])
    for work in works:
        assert torch.equal(work.wait(60).tensor, torch.full((4,), 10.0))


# --- a peer's own trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trouble", [ValueError("sum of inf"), Failed(identity=None, reason="sum of inf")])  # type: ignore[arg-type]
def test_who_cannot_take_part_says_so_and_the_others_go_on(run: Run, trouble: Any) -> None:
    peers = run.several(3)

    def unable(start: Start, source: object, result: object) -> Failed:
        if isinstance(trouble, ValueError):
            raise trouble
        return dataclasses.replace(trouble, identity=start.identity)

    peers[1].group.run = unable  # type: ignore[method-assign, assignment]
    works = [peer.all_reduce_async(torch.ones(4)) for peer in peers]
    with pytest.raises((ConfigurationError, CollectiveError), match="sum of inf") as error:
        works[1].wait(60)
    assert error.value.peer == "p1"
    for work in (works[0], works[2]):
        result = work.wait(60)
        assert (
            result.contributors == ("p0", "p2")
            and result.attempts == 2
            and torch.equal(result.tensor, torch.ones(4) * 2)
        )


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda peer: peer.all_reduce(torch.ones(2, dtype=torch.int64), op="mean"),
            r"tensor.double\(\), or use op='sum'",
        ),
        (lambda peer: peer.all_reduce(torch.ones(2, dtype=torch.bool)), "convert them to one of float32, float64"),
        (lambda peer: peer.all_reduce(torch.ones(2, dtype=torch.complex64)), "torch.view_as_real"),
        (lambda peer: peer.all_reduce(torch.ones(2, device="meta")), "CPU or CUDA device"),
        (lambda peer: peer.all_reduce([]), "at least one tensor"),
        (
            lambda peer: peer.all_reduce([torch.ones(2), torch.ones(2).double()]),
            "one dtype, this one has torch.float32, ",
        ),
        (lambda peer: peer.all_reduce(torch.ones(2), op="median"), "'median' is not one of sum, mean, min, max"),
        (lambda peer: peer.reduce_scatter(torch.ones(2), op="max"), "'max' is not one of sum, mean"),
        (lambda peer: peer.broadcast(torch.ones(2), root="no name"), "root 'no name' is not a name"),
        (lambda peer: peer.all_reduce(torch.ones(2).long(), wire="f32"), "'f32' is not one of raw"),
        (lambda peer: peer.all_reduce(torch.ones(2), gather_wire="raw"), "'raw' is not one of f32, "),
        (lambda peer: peer.all_reduce(torch.ones(2), op="mean", weight=-1), "above 0"),
        (lambda peer: peer.all_reduce(torch.ones(2), weight=2.0), "weights belong to op='mean'"),
        (lambda peer: peer.all_reduce(torch.ones(2), wire="f31"), "wire 'f31'"),
        (lambda peer: peer.report(loss="high"), "cannot report"),
        (lambda peer: peer.report(speed=1), "known are state, step, loss"),
    ],
)
def test_arguments_that_cannot_work_are_named(run: Run, call: object, words: str) -> None:
    peer = run.join("p0")
    with pytest.raises(ConfigurationError, match=words):
        call(peer)  # type: ignore[operator]


def test_numbers_of_any_kind_are_reported_as_plain_ones(run: Run) -> None:
    peer = run.join("p0")
    peer.report(loss=torch.tensor(0.5), step=torch.tensor(3), tokens_per_second=1, state="training")
    assert run.coordinator is not None
    coordinator = run.coordinator
    until(lambda: coordinator.status().members[0].status.loss == 0.5)
    assert coordinator.status().members[0].status.step == 3
    assert peer.all_reduce(torch.ones(1), op="mean", weight=torch.tensor(3.0)).tensor.item() == 1.0  # type: ignore[arg-type]


def test_a_loopback_address_is_refused_where_others_could_not_dial_it() -> None:
    with pytest.raises(ConfigurationError, match=r"could not dial 127.0.0.1:0: say listen="):
        Peer("tcp://192.0.2.1:29400", run="test", name="x", join_timeout=0.1)
    with pytest.raises(CoordinatorUnavailable):
        Peer("tcp://192.0.2.1:29400", run="test", name="x", listen="", join_timeout=0.1)


def test_a_run_that_is_not_served_here_is_refused(run: Run) -> None:
    run.open()
    with pytest.raises(ConfigurationError, match="serves run 'test'"):
        Peer(f"tcp://127.0.0.1:{run.port}", run="other", name="x")


def test_no_coordinator_is_said_in_one_line() -> None:
    with pytest.raises(CoordinatorUnavailable, match="is it running"):
        Peer("tcp://127.0.0.1:9", run="test", name="x", join_timeout=0.3)


def test_an_unknown_variable_of_the_environment_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.open()
    monkeypatch.setenv("ELASTIC_STRIPE", "4")
    with pytest.raises(ConfigurationError, match="did you mean ELASTIC_STRIPES"):
        run.join("p0")


def test_a_token_says_where_the_run_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    token = str(run.open().token)
    monkeypatch.setenv("ELASTIC_JOIN", token)
    with Peer(name="by-environment", timeouts=QUICK) as peer:
        assert peer.run == "test"


def test_a_supervisors_proof_ends_a_membership_at_once(run: Run) -> None:
    first, second = run.several(2)
    line = SiteLine(f"tcp://127.0.0.1:{run.port}", "test", "here")
    line.prove_gone("p1", second.incarnation + 1, "another life")
    line.prove_gone("p1", second.incarnation, "its process has ended")
    line.close()
    with pytest.raises(Evicted, match="its process has ended"):
        second.wait_for(3, timeout=30)
    until(lambda: first.view.names == ("p0",))


def test_a_dead_process_is_found_by_its_port_without_any_operation(run: Run) -> None:
    run.timeouts = Timeouts(heartbeat=0.1, chunk=50, operation=60, round=90, evict_after=80)
    first, second = run.several(2)
    run.together(lambda peer: peer.all_reduce(torch.ones(4)))  # so that there is a link
    second._control._on_beat = lambda: None
    second.group.close()
    until(lambda: first.view.names == ("p0",))
    log = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    assert [event["evidence"] for event in log if event["event"] == "link.lost"] == ["refused"]
    assert "connection refused" in next(event["evidence"] for event in log if event["event"] == "peer.evicted")


# --- the coordinator dies ---------------------------------------------------------------------------------------------


def test_a_coordinator_that_comes_back_finds_everybody(run: Run) -> None:
    peers = run.several(3)
    run.together(lambda peer: peer.all_reduce(torch.ones(4)), peers)
    assert run.coordinator is not None
    run.coordinator.close()
    work = [peer.all_reduce_async(torch.ones(4)) for peer in peers]
    run.open()
    results = [each.wait(60) for each in work]
    assert all(result.contributors == ("p0", "p1", "p2") for result in results)
    assert run.coordinator.statistics().generation == 2
    assert [peer.life for peer in peers] == [1, 1, 1]


# --- real processes ---------------------------------------------------------------------------------------------------

WORKER = """
import json, sys, torch
from pathlib import Path
from elastic import Peer
from fault.inject import Injection, strike
address, name, folder, kind = sys.argv[1:]
fault = Injection(kind=kind, tag="grads", round=2, fraction=0.4) if name == "p1" else None
observe = strike(fault, name, Path(folder) / "faults.jsonl") if fault else None
peer = Peer(address, run="test", name=name, observe=observe)
peer.wait_for(3, timeout=60)

def numbers(seed):  # whole ones: their sum does not depend on the pattern
    return torch.randint(-1000, 1000, (2_000_003,), generator=torch.Generator().manual_seed(seed)).float()

out = []
for k in range(5):
    x = numbers(10 * k + int(name[1:]))
    before = x.clone()
    r = peer.all_reduce(x, tag="grads", timeout=60)
    seeds = [10 * k + int(name[1:]) for name in r.contributors]
    exact = sum(numbers(seed) for seed in seeds)
    out.append({"round": r.round, "attempts": r.attempts, "contributors": r.contributors,
                "right": torch.equal(r.tensor, exact), "untouched": torch.equal(x, before)})
print(json.dumps(out), flush=True)
peer.leave()
"""


@pytest.mark.parametrize("kind", ["kill", "freeze"])
def test_a_peer_struck_in_mid_all_reduce_costs_the_others_nothing(run: Run, kind: str) -> None:
    coordinator = run.open()
    command = [sys.executable, "-c", WORKER, coordinator.address]
    workers = [
        subprocess.Popen([*command, f"p{i}", str(run.folder), kind], stdout=subprocess.PIPE, text=True)
        for i in range(3)
    ]
    try:
        survivors = [json.loads(workers[i].communicate(timeout=100)[0]) for i in (0, 2)]
        fired = [json.loads(line) for line in (run.folder / "faults.jsonl").read_text().splitlines()]
    finally:
        for worker in workers:
            if worker.poll() is None:
                os.kill(worker.pid, signal.SIGKILL)
            worker.wait()
    assert [(fault["peer"], fault["kind"], fault["round"]) for fault in fired] == [("p1", kind, 2)]
    assert survivors[0] == survivors[1]
    for record in survivors[0]:
        assert record["right"] and record["untouched"]
        expected = ["p0", "p1", "p2"] if record["round"] < 2 else ["p0", "p2"]
        assert record["contributors"] == expected
    assert [record["round"] for record in survivors[0]] == [0, 1, 2, 3, 4]
    assert survivors[0][2]["attempts"] == 2, "the round that was hit is the one that the survivors finished"


def test_a_left_out_caller_sees_that_the_round_went_on(run: Run) -> None:
    left_out(run)


def left_out(run: Run) -> Peer:
    """Of the first round; it has heard so."""
    run.timeouts = Timeouts(heartbeat=0.1, chunk=0.6, operation=30, round=60, grace=0.2, evict_after=30)
    peers = run.several(3)
    blocked, gate = threading.Event(), threading.Event()

    def late(start: object, source: object, result: object) -> object:
        blocked.set()
        gate.wait(30)
        return original(start, source, result)  # type: ignore[arg-type]

    original = peers[2].group.run
    peers[2].group.run = late  # type: ignore[method-assign, assignment]
    work = peers[2].all_reduce_async(torch.ones(4))
    results = [peer.all_reduce_async(torch.ones(4)) for peer in peers[:2]]
    beat, peers[2]._control._on_beat = peers[2]._control._on_beat, lambda: None  # silent, as a frozen process is
    assert blocked.wait(30)
    assert [each.wait(60).contributors for each in results] == [("p0", "p1")] * 2
    peers[2].group.run, peers[2]._control._on_beat = original, beat  # type: ignore[method-assign]
    gate.set()
    with pytest.raises(RoundAborted, match=r"without this peer; in it were: p0, p1"):
        work.wait(60)
    return peers[2]


def test_who_was_left_out_of_a_round_still_knows_that_it_is_over(run: Run) -> None:
    """It alone can tell the coordinator's next life, which would otherwise number that round again: to a deaf peer."""
    peer = left_out(run)
    for other in run.peers[:2]:
        other.leave()
    run.coordinator.close()
    run.open()
    assert peer.all_reduce(torch.ones(4), timeout=30).round == 1


def test_options_of_links_reach_the_group(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments win over the environment, and stripes beside options over those inside."""
    monkeypatch.setenv("ELASTIC_STRIPES", "3")
    options = LinkOptions(stripes=5, shared_memory=False)
    assert run.join("a").group.options.stripes == 3
    assert run.join("b", options=options).group.options == options
    assert run.join("c", options=options, stripes=2).group.options == dataclasses.replace(options, stripes=2)
    with pytest.raises(ConfigurationError, match="stripes"):
        run.join("d", stripes=0)

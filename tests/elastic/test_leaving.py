"""How a peer leaves, how a run waits for peers, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Run, until

from elastic.config import RunPolicy, Timeouts
from elastic.errors import ConfigurationError, NotEnoughPeers
from elastic.events import EventReader
from elastic.messages import Leave, Message
from elastic.outer.diloco import DiLoCo
from elastic.peer import Peer

DATA = torch.arange(2000.0)
SHORT = Timeouts(heartbeat=0.1, chunk=0.5, operation=10, round=20, grace=0.3, evict_after=30)


def events(run: Run, name: str, log: str = "coordinator") -> list[dict[str, Any]]:
    return [event for event in EventReader(run.folder / f"{log}.jsonl").read() if event["event"] == name]


class Script:
    """What a user writes: trains on shards until they end. `enough` ends it early, by its own means."""

    def __init__(self, peer: Peer, *, sync_every: int = 4, **options: Any) -> None:
        self.peer, self.sync_every, self.options = peer, sync_every, options
        self.samples: list[int] = []
        self.step = threading.Event()
        self.hold = threading.Event()
        self.loop: DiLoCo | None = None

    def __call__(self) -> DiLoCo:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1e-9)
        with DiLoCo(model, inner, self.peer, sync_every=self.sync_every, **self.options) as self.loop:
            for batch in self.peer.shards(DATA, batch_size=5, shard_size=20):
                model(batch[:, None]).sum().backward()
                self.samples.extend(batch.int().tolist())
                inner.step()
                inner.zero_grad()
                self.step.set()
                self.while_training()
        return self.loop

    def while_training(self) -> None:
        """Called after each step."""


def test_who_drains_gives_what_it_has_learned_and_its_shards_go_to_others_at_once(run: Run) -> None:
    run.policy = RunPolicy(quorum=1.0)
    scripts = [Script(peer, sync_every=10**9) for peer in run.several(2)]
    with ThreadPoolExecutor(2) as pool:
        ends = [pool.submit(script) for script in scripts]
        until(lambda: all(len(script.samples) > 100 for script in scripts))
        scripts[1].peer.leave(drain=True)
        ends[1].result(30)
        until(lambda: bool(events(run, "peer.left")))
        (committed,) = events(run, "round.committed")
        assert committed["tokens"]["p1"] == len(scripts[1].samples), "what it learned is in no round"
        assert committed["contributors"] == ["p0", "p1"], "the round opened at once, and the other was in it"
        assert run.coordinator is not None and run.coordinator._membership.table is not None
        assert set(run.coordinator._membership.table.holders.values()) <= {"p0"}
        again = run.join("p1")
        assert again.life == 2
        scripts[0].peer.drain()
        ends[0].result(30)
    assert not events(run, "peer.evicted")


def test_a_script_may_leave_from_inside_its_own_loop(run: Run) -> None:
    script = Script(run.join("p0"), sync_every=10**9)

    def leave() -> None:
        if len(script.samples) == 50:
            script.peer.leave(drain=True)

    script.while_training = leave  # type: ignore[method-assign]
    loop = script()
    assert loop.version.number == 1 and len(script.samples) == 50
    (committed,) = events(run, "round.committed")
    assert committed["tokens"] == {"p0": 50}
    until(lambda: bool(events(run, "peer.left")))


SCRIPT = """
import sys, time, torch, elastic

peer = elastic.Peer(sys.argv[1], run="test", name="p1", sigterm_deadline=float(sys.argv[2]), events_dir=sys.argv[4])
model = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.zeros_(model.weight)
inner = torch.optim.SGD(model.parameters(), lr=1e-9)
with elastic.DiLoCo(model, inner, peer, sync_every=10**9) as loop:
    for batch in peer.shards(torch.arange(2000.0), batch_size=5, shard_size=20):
        model(batch[:, None]).sum().backward()
        inner.step()
        inner.zero_grad()
        print("step", loop.steps, flush=True)
        time.sleep(float(sys.argv[3]))
peer.leave()
print("left after", loop.steps, flush=True)
"""


def start_script(run: Run, deadline: float, pause: float) -> subprocess.Popen[str]:
    assert run.coordinator is not None
    command = [sys.executable, "-c", SCRIPT, run.coordinator.address, str(deadline), str(pause), str(run.folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_sigterm_lets_the_script_end_in_good_order(run: Run) -> None:
    run.open()
    with start_script(run, 30, 0.005) as process:
        assert process.stdout is not None
        until(lambda: process.stdout is not None and "step 20" in process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert process.wait(30) == 0 and "left after" in rest
    steps = int(rest.rsplit(maxsplit=1)[1])
    (committed,) = events(run, "round.committed")
    assert committed["tokens"] == {"p1": steps * 5}
    until(lambda: bool(events(run, "peer.left")))
    assert events(run, "peer.draining", "p1") and not events(run, "peer.evicted")


def test_a_script_that_does_not_end_is_ended_at_the_deadline_and_its_shards_are_free(run: Run) -> None:
    run.open()
    with start_script(run, 0.5, 10_000) as process:
        assert process.stdout is not None and "step 1" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    until(lambda: bool(events(run, "peer.left")))
    assert events(run, "shard.released") and not events(run, "round.committed")


CLOSED = """
import os, signal, sys, threading, time, elastic

peer = elastic.Peer(sys.argv[1], run="test", name="p1")
closing = threading.Thread(target=peer.close)
closing.start()
closing.join()
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(100)
"""


def test_a_closed_peer_does_not_stand_in_the_way_of_sigterm(run: Run) -> None:
    address = run.open().address
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", CLOSED, address], env=environment, timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_below_min_peers_training_pauses_after_h_steps_and_goes_on_when_a_peer_comes(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2, rounds=2)
    first = Script(run.join("p0"))
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(first)
        until(lambda: len(first.samples) == 4 * 5)
        assert run.coordinator is not None
        until(lambda: run.coordinator is not None and "outer" in run.coordinator._membership.operations)
        assert len(first.samples) == 4 * 5 and not events(run, "round.started")
        two = pool.submit(Script(run.join("p1")))
        assert one.result(30).version.state_hash == two.result(30).version.state_hash
    assert [event["contributors"] for event in events(run, "round.committed")][-1] == ["p0", "p1"]


def test_too_few_peers_for_too_long_is_an_error_and_nothing_is_lost(run: Run) -> None:
    run.policy = RunPolicy(min_peers=2)
    script = Script(run.join("p0"), timeout=0.5)
    with pytest.raises(NotEnoughPeers):
        script()
    assert script.loop is not None and script.loop.version.number == 0 and not events(run, "round.committed")


# --- the run's end --------------------------------------------------------------------------------------------------


def test_a_run_ends_at_its_time(run: Run) -> None:
    run.policy = RunPolicy(seconds=1.0)
    began = time.monotonic()
    Script(run.join("p0"))()
    assert time.monotonic() - began >= 1.0
    assert [event["target"] for event in events(run, "run.target_reached")] == ["1 s"]


def test_a_run_ends_at_a_held_out_loss_and_knows_that_after_a_restart(run: Run) -> None:
    run.policy = RunPolicy(loss=0.25)
    script = Script(run.join("p0"))

    def evaluate() -> None:
        script.peer.report(held_out_loss=1.0 / len(script.samples))
        time.sleep(0.02)

    script.while_training = evaluate  # type: ignore[method-assign]
    script()
    assert len(script.samples) >= 5
    assert "held-out loss" in events(run, "run.target_reached")[0]["target"]
    assert run.coordinator is not None
    run.coordinator.close()
    assert run.open().status().progress.finished


def test_targets_set_by_a_peer_hold_for_all_and_outlive_the_coordinator(run: Run) -> None:
    first, second = run.several(2)
    first.run_until(rounds=3)
    assert run.coordinator is not None
    run.coordinator.close()
    run.open()
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(lambda peer: Script(peer)(), (first, second)))
    assert [loop.version.number for loop in ends] == [3, 3]
    with pytest.raises(ConfigurationError, match="tokens is -1"):
        first.run_until(tokens=-1)


def test_what_a_leaver_gave_in_a_round_of_its_own_is_not_lost_with_it(run: Run) -> None:
    """The other one comes for the result only after that round: the leaver is still there then."""
    run.policy = RunPolicy(quorum=0.4)
    run.timeouts = Timeouts(heartbeat=0.1, chunk=2.5, operation=30, round=60, grace=0.1, evict_after=30)
    stays, leaves = run.several(2)
    models = [torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)]
    inners = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    loops = [DiLoCo(m, i, p, sync_every=50) for m, i, p in zip(models, inners, (stays, leaves), strict=True)]
    for loop in loops:
        loop.__enter__()

    def step(i: int) -> None:
        models[i](torch.ones(1, 3)).sum().backward()
        inners[i].step()
        inners[i].zero_grad()

    def leave() -> None:
        for _ in range(3):
            step(1)
        leaves.drain(20)
        loops[1].finish()
        leaves.leave()

    going = threading.Thread(target=leave)
    going.start()
    until(lambda: stays.progress.rounds == 1)
    assert going.is_alive(), "it waits for somebody to come"
    step(0)
    going.join(30)
    assert loops[0].version.number == 1 and loops[0].last_commit is not None
    assert loops[0].last_commit.contributors == ("p1",) and not going.is_alive()
    step(0)
    loops[0].finish()
    told = (run.folder / "coordinator.jsonl").read_text()
    assert '"run.rolled_back"' not in told and run.coordinator is not None
    assert run.coordinator.status().progress.tokens == 5


def test_the_coordinator_hears_of_a_leave_before_the_others_find_a_closed_port(run: Run) -> None:
    """However long the word is on its way: a closed port would be proof of a death."""
    peers = run.several(3)
    run.together(lambda peer: peer.all_reduce(torch.ones(4)))
    send = peers[1]._control.send

    def late(message: Message) -> None:
        if isinstance(message, Leave):
            threading.Timer(0.3, send, (message,)).start()
        else:
            send(message)

    peers[1]._control.send = late  # type: ignore[method-assign]
    peers[1].leave()
    until(lambda: bool(events(run, "peer.left")))
    run.together(lambda peer: peer.all_reduce(torch.ones(4)), [peers[0], peers[2]])
    assert not events(run, "peer.evicted") and not events(run, "anomaly.confirmed")


def test_leaving_does_not_wait_long_for_a_coordinator_that_is_gone(run: Run) -> None:
    peer = run.join("p0")
    assert run.coordinator is not None
    run.coordinator.close()
    began = time.monotonic()
    peer.leave()
    assert time.monotonic() - began < 10

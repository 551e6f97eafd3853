"""The witness beside a real process: it proves a death, tells a process that stands still, and never outlives its peer.

And what a peer that is heard of tells of itself: steps that do not come, exchanges that stand still, disks and clocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import Run, until
from witness_worker import TIMES

import elastic.vitals
from elastic.config import FaultPolicy, RunPolicy
from elastic.errors import ConfigurationError, RoundAborted
from elastic.messages import VerdictReport
from elastic.witness import Witness, process_state
from fault.records import Health
from fault.verdicts import CLOCK, CRASH, DISK, HANG, SILENT, STALLED

ROOT = Path(__file__).parents[2]
KINDS = {CRASH, HANG, STALLED, DISK, CLOCK, SILENT}  # a busy machine can make steps slow, and that is told, too


def exists(pid: int) -> bool:
    """Whether this process runs: one that has ended, and that nobody has asked after, does not."""
    with contextlib.suppress(OSError):
        return process_state(pid)[0] != "Z"
    return False


def verdicts(run: Run) -> list[VerdictReport]:
    assert run.coordinator is not None
    return [verdict for verdict in run.coordinator.status().verdicts if verdict.kind in KINDS]


def told(run: Run) -> set[tuple[str, tuple[str, ...]]]:
    return {(verdict.kind, verdict.culprits) for verdict in verdicts(run)}


def events(run: Run, name: str, writer: str = "coordinator") -> list[dict[str, Any]]:
    lines = (run.folder / f"{writer}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def anomalies(run: Run, name: str = "anomaly.confirmed") -> list[tuple[str, list[str]]]:
    return [(event["kind"], event["culprits"]) for event in events(run, name) if event["kind"] in KINDS]


class Worker:
    """A peer in a process of its own; see witness_worker.py."""

    def __init__(self, run: Run, name: str) -> None:
        arguments = [f"tcp://127.0.0.1:{run.port}", name, str(run.folder)]
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("witness_worker.py")), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1"},
        )
        said = self.hear()
        self.pid, self.witness = said["pid"], said["witness"]
        self.child = 0

    def hear(self) -> dict[str, int]:
        assert self.process.stdout is not None
        said: dict[str, int] = json.loads(self.process.stdout.readline())
        return said

    def tell(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()

    def end(self) -> None:
        for pid in filter(None, (self.child, self.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        until(lambda: not exists(self.witness), 5)


@pytest.fixture
def worker(run: Run) -> Iterator[Worker]:
    """It has trained for a while, and nothing is wrong with it. When it has ended, so has its witness."""
    run.timeouts = TIMES
    run.open()
    worker = Worker(run, "a")
    try:
        until(lambda: trainer(run).steps > 20)
        assert not told(run)
        yield worker
    finally:
        worker.end()


def trainer(run: Run) -> Any:
    assert run.coordinator is not None
    members = run.coordinator.status().members
    return members[0].status.trainer if members else SimpleNamespace(steps=0)


# --- a process that ends ----------------------------------------------------------------------------------------------


def test_a_process_that_is_killed_is_a_proven_crash_at_once(run: Run, worker: Worker) -> None:
    """Nobody dials it, no supervisor is there, and a child of it holds on to whatever was open."""
    worker.tell("fork")
    worker.child = worker.hear()["child"]
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    until(lambda: (CRASH, ("a",)) in told(run), 20)
    seconds = time.monotonic() - began
    print(f"\nproven {1000 * seconds:.0f} ms after the kill")
    assert seconds < TIMES.chunk, "it had to be found out in another way"
    assert exists(worker.child)
    until(lambda: [event["evidence"] for event in events(run, "peer.evicted")] == ["its process has ended"], 5)
    until(lambda: not exists(worker.witness), 5)


def test_a_witness_ends_within_a_second_of_its_peer_although_it_can_tell_nobody(run: Run, worker: Worker) -> None:
    assert run.coordinator is not None
    run.coordinator.close()
    os.kill(worker.pid, signal.SIGKILL)
    began = time.monotonic()
    worker.process.wait(10)
    until(lambda: not exists(worker.witness), 5)
    assert time.monotonic() - began < 1.5, "a second, and a little for a busy machine"


def test_who_leaves_has_not_crashed(run: Run, worker: Worker) -> None:
    worker.tell("leave")
    assert worker.process.wait(30) == 0
    assert not exists(worker.witness), "the peer waits for it"
    until(lambda: not run.coordinator.status().members)  # type: ignore[union-attr]
    assert not told(run) and not anomalies(run)


def test_a_peer_that_is_closed_without_leaving_is_silent_and_not_dead(run: Run) -> None:
    run.timeouts = TIMES
    peer = run.join("a", witness=True)
    assert peer._witness is not None
    pid = peer._witness.pid
    assert exists(pid)
    peer.close()
    assert not exists(pid)
    until(lambda: told(run) == {("silent", ("a",))})
    assert not events(run, "peer.evicted")


# --- a process that stands still --------------------------------------------------------------------------------------


def held(run: Run, stopped: float) -> VerdictReport:
    """The verdict once it is there, with the numbers of its witness."""
    until(lambda: (HANG, ("a",)) in told(run), 30)
    (verdict,) = verdicts(run)
    assert verdict.evidence["stopped"] == stopped and verdict.evidence["beat_seconds"] > 0.2, verdict
    assert verdict.confidence >= 0.9
    return verdict


def test_a_stopped_process_hangs_until_it_goes_on(run: Run, worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGSTOP)
    held(run, stopped=1.0)
    time.sleep(2 * TIMES.hang)  # so long that it would hang by its steps, too, as soon as it is heard of
    assert told(run) == {(HANG, ("a",))}
    os.kill(worker.pid, signal.SIGCONT)
    until(lambda: not told(run), 30)
    steps = trainer(run).steps
    until(lambda: trainer(run).steps > steps + 20)
    assert exists(worker.witness) and anomalies(run, "anomaly.cleared") == [(HANG, ["a"])]
    assert anomalies(run) == [(HANG, ["a"])], "and nothing else was said"
    worker.tell("leave")
    assert worker.process.wait(30) == 0


def test_a_process_that_is_stuck_with_pythons_lock_hangs_until_it_goes_on(run: Run, worker: Worker) -> None:
    worker.tell("hold 6")
    assert held(run, stopped=0.0).evidence["cpu_seconds"] < 1.0
    until(lambda: not told(run), 30)
    assert anomalies(run) == [(HANG, ["a"])]


def test_a_step_that_takes_far_too_long_is_a_hang_although_the_peer_is_heard_of(run: Run, worker: Worker) -> None:
    worker.tell("sleep 5")
    until(lambda: told(run) == {(HANG, ("a",))})
    (verdict,) = verdicts(run)
    assert verdict.evidence["seconds"] > TIMES.hang and verdict.evidence["usual_seconds"] < 0.15
    assert "stopped" not in verdict.evidence and not events(run, "peer.suspected"), "it was heard of all the time"
    until(lambda: not told(run))


# --- the witness itself -----------------------------------------------------------------------------------------------


def test_it_is_small_and_knows_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, time; began = time.perf_counter(); import elastic.witness, msgpack, zmq; "
        "print(time.perf_counter() - began, *sorted({'torch', 'numpy', 'ray', 'rich', 'click'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    seconds, *strangers = ran.stdout.split()
    print(f"\nimported in {1000 * float(seconds):.0f} ms")
    assert not strangers and float(seconds) < 2.0


def test_its_memory_and_time_are_little(run: Run) -> None:
    peer = run.join("a", witness=True)
    witness = peer._witness
    assert witness is not None
    until(lambda: witness.seconds > 0)
    begun, time_then = witness.seconds, time.monotonic()
    time.sleep(2.0)
    share = (witness.seconds - begun) / (time.monotonic() - time_then)
    status = Path(f"/proc/{witness.pid}/status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) << 10
    print(f"\n{resident >> 20} MiB resident, {share:.3%} of a core with ten heartbeats a second")
    assert resident < 40 << 20 and share < 0.02
    assert 0 < begun <= peer.statistics().telemetry.witness_seconds


def test_that_it_cannot_be_started_is_one_event_and_no_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    peer = run.join("a", witness=True)
    assert torch.equal(peer.all_reduce(torch.ones(3)).tensor, torch.ones(3))
    peer.leave()
    (event,) = events(run, "witness.failed", "a")
    assert "FileNotFoundError" in event["reason"]


def test_that_it_is_lost_is_one_event_and_no_error(run: Run) -> None:
    peer = run.join("a", witness=True)
    assert peer._witness is not None
    os.kill(peer._witness.pid, signal.SIGKILL)
    until(lambda: events(run, "witness.lost", "a"))
    time.sleep(0.5)
    assert torch.equal(peer.all_reduce(torch.ones(3)).tensor, torch.ones(3))
    peer.leave()
    assert len(events(run, "witness.lost", "a")) == 1


def test_one_that_does_not_listen_is_ended(run: Run) -> None:
    run.open()
    witness = Witness(f"tcp://127.0.0.1:{run.port}", "test", "a", 5, 0.1)
    until(lambda: witness.seconds > 0)
    os.kill(witness.pid, signal.SIGSTOP)
    witness.close()
    assert not exists(witness.pid)


def test_what_it_says_are_messages(run: Run) -> None:
    """Of a peer that does not beat: that is in no view, and nothing comes of it, but it is understood."""
    run.open()
    assert run.coordinator is not None
    witness = Witness(f"tcp://127.0.0.1:{run.port}", "test", "a", 5, 0.1)
    try:
        until(lambda: run.coordinator.statistics().messages > 3)  # type: ignore[union-attr]
        assert run.coordinator.statistics().refused == 0
    finally:
        witness.close()


@pytest.mark.parametrize("value, expected", [("1", True), ("0", False), (None, False)])
def test_argument_and_environment(run: Run, monkeypatch: pytest.MonkeyPatch, value: str | None, expected: bool) -> None:
    monkeypatch.setenv("ELASTIC_WITNESS", value or "1")
    peer = run.join("a") if value else run.join("a", witness=False)
    assert (peer._witness is not None) is expected


def test_an_environment_that_says_something_else_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_WITNESS", "yes")
    with pytest.raises(ConfigurationError, match="ELASTIC_WITNESS is 'yes'"):
        run.join("a")


# --- what a peer that is heard of tells of itself ---------------------------------------------------------------------


def test_an_exchange_that_stands_still_names_the_peer_that_holds_it_up(run: Run) -> None:
    run.timeouts, run.policy = TIMES, RunPolicy(faults=FaultPolicy(hang="observe"))
    release, fired = threading.Event(), list[Any]()

    def observe(progress: Any) -> None:
        fired.append(progress)
        release.wait(60)

    run.open()
    peers = [run.join(f"p{i}", observe=observe if i == 1 else None) for i in range(3)]
    for peer in peers:
        peer.wait_for(3, timeout=30)
    works = [peer.all_reduce_async(torch.ones(300_000), tag="g") for peer in peers]
    try:
        until(lambda: told(run) == {(STALLED, ("p1",))})
        assert fired, "the fault did not fire"
        (verdict,) = verdicts(run)
        assert verdict.evidence["seconds"] > TIMES.hang and verdict.evidence["links"] == 2.0
    finally:
        release.set()
    for work in works:
        reduced = work.wait(60)
        assert reduced.contributors == ("p0", "p1", "p2") and torch.equal(reduced.tensor, torch.full((300_000,), 3.0))
    until(lambda: not told(run))
    assert not events(run, "peer.suspected")


def test_who_holds_an_exchange_up_is_left_out_of_it(run: Run) -> None:
    """As long as it does; the others have their sum, and the next one at once."""
    run.timeouts = TIMES
    release = threading.Event()
    run.open()
    peers = [
        run.join(f"p{i}", observe=(lambda progress: bool(release.wait(120))) if i == 1 else None) for i in range(3)
    ]
    for peer in peers:
        peer.wait_for(3, timeout=30)
    works = [peer.all_reduce_async(torch.ones(300_000), tag="g") for peer in peers]
    try:
        for _ in range(2):
            for peer in (peers[0], peers[2]):
                reduced = works[peers.index(peer)].wait(60)
                assert reduced.contributors == ("p0", "p2")
                assert torch.equal(reduced.tensor, torch.full((300_000,), 2.0))
            for peer in (peers[0], peers[2]):
                works[peers.index(peer)] = peer.all_reduce_async(torch.ones(300_000), tag="g")
        (left_out,) = events(run, "peer.left_out")
        assert (left_out["kind"], left_out["culprits"]) == (STALLED, ["p1"])
    finally:
        release.set()
    with pytest.raises(RoundAborted, match="went on without this peer"):
        works[1].wait(60)


def test_a_disk_on_which_little_is_left_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [10**9]
    disk = SimpleNamespace(statvfs=lambda folder: SimpleNamespace(f_bavail=free[0], f_blocks=2 * 10**9, f_frsize=1))
    monkeypatch.setattr(elastic.vitals, "os", disk)
    run.join("a")
    until(lambda: health(run).disk_free == 10**9)
    assert health(run).memory_bytes > 10 << 20 and not told(run)
    free[0] = 10**6
    until(lambda: told(run) == {(DISK, ("a",))})
    (verdict,) = verdicts(run)
    assert verdict.evidence == {"free_bytes": 1e6, "disk_bytes": 2e9, "refused": 0.0}
    free[0] = 10**9
    until(lambda: not told(run))


def health(run: Run) -> Health:
    assert run.coordinator is not None
    return run.coordinator.status().members[0].status.health


def test_a_disk_that_refuses_the_events_is_told_and_ends_nothing(run: Run) -> None:
    (run.folder / "a.jsonl").symlink_to("/dev/full")
    peer = run.join("a")
    peer.events.emit("anything")
    until(lambda: told(run) == {(DISK, ("a",))})
    (verdict,) = verdicts(run)
    assert verdict.evidence["refused"] >= 1.0
    assert torch.equal(peer.all_reduce(torch.ones(3)).tensor, torch.ones(3))
    peer.leave()


def test_a_clock_that_is_set_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    set_by = [0.0]
    clocks = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + set_by[0])
    monkeypatch.setattr(elastic.vitals, "time", clocks)
    run.join("a")
    until(lambda: health(run).clock > 0)
    time.sleep(0.5)
    assert not told(run)
    set_by[0] = -120.0
    until(lambda: told(run) == {(CLOCK, ("a",))})
    (verdict,) = verdicts(run)
    assert verdict.evidence["seconds"] == pytest.approx(-120.0, abs=0.1)


def test_who_waits_evaluates_or_does_something_else_does_not_hang(run: Run) -> None:
    """Each takes longer than a hang; only what is none of these is one."""
    run.timeouts = TIMES
    peer = run.join("a")
    model = torch.nn.Linear(4, 1)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)

    def long(pause: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        with pause():
            time.sleep(2 * TIMES.hang)

    with elastic.DiLoCo(model, inner, peer, sync_every=100_000) as loop:
        for _ in range(10):
            model(torch.ones(2, 4)).sum().backward()
            inner.step()
        for pause in (loop.evaluating, peer.not_training):
            long(pause)
        assert not anomalies(run)
        long(contextlib.nullcontext)
        assert anomalies(run) == [(HANG, ["a"])]
        inner.step()
        until(lambda: not told(run))
    time.sleep(2 * TIMES.hang)  # it is in no loop any more
    assert not told(run)

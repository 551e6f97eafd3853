"""The coordinator's server: what it refuses at the door, and that nothing on its port takes it down."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zmq
from harness import Run, until

from elastic.config import RunPolicy
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError, CoordinatorUnavailable
from elastic.events import EventReader
from elastic.messages import Applied, Enter, Exit, Join, Message, OperationSpec, encode, identity
from elastic.outer.diloco import DiLoCo
from elastic.peer import Peer


def send(run: Run, sender: bytes, *parts: bytes) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.IDENTITY, sender)
        dealer.setsockopt(zmq.LINGER, 5000)
        dealer.connect(f"tcp://127.0.0.1:{run.port}")
        dealer.send_multipart(parts)


def test_garbage_is_counted_and_changes_nothing(run: Run) -> None:
    peer = run.join("p0")
    assert run.coordinator is not None
    coordinator = run.coordinator
    other = encode(Join(run="test", incarnation=5, member=peer.group.member, site="x"))
    messages = [(b"p0/zz", b"\xff" * 100), (b"x", b""), (b"a", b"one", b"two"), (identity("p9", 6), other)]
    for sender, *parts in messages:
        send(run, sender, *parts)
    with socket.create_connection(("127.0.0.1", run.port)) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    until(lambda: coordinator.statistics().refused == len(messages))
    assert peer.view.names == ("p0",)
    assert torch.equal(peer.all_reduce(torch.ones(1)).tensor, torch.ones(1))


def test_a_message_that_makes_no_sense_ends_nothing(run: Run) -> None:
    run.garbage = True
    peer = run.join("p0")
    assert run.coordinator is not None
    spec = OperationSpec(op="mean", dtype="float32", elements=1, wire="f32")
    common = {"run": "test", "incarnation": peer.incarnation, "generation": 1, "tag": "outer"}
    nonsense: list[Message] = [
        Enter(**common, spec=spec, state_hash="h"),
        Applied(**common, fragment=0, version=0, state_hash="h"),
        Applied(**common, fragment=7, version=-1, state_hash="h"),
        Applied(**common, fragment=0, version=1 << 62, state_hash="h"),
        Enter(**common, spec=spec, fragment=7, state_hash="h"),
    ]
    for message in nonsense:
        peer.send(message)
    assert torch.equal(peer.all_reduce(torch.ones(1)).tensor, torch.ones(1))
    assert run.coordinator.error is None and list(run.coordinator._membership.loops["outer"].versions) == [0]


def test_an_error_of_the_state_machine_is_an_event_and_not_the_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.garbage = True
    peer = run.join("p0")
    assert run.coordinator is not None
    membership = run.coordinator._membership
    monkeypatch.setattr(membership.outer, "exit", lambda *_: 1 / 0)
    peer.send(Exit(run="test", tag="outer"))
    until(lambda: run.coordinator is not None and run.coordinator.statistics().refused == 1)
    refused = [event for event in EventReader(run.folder / "coordinator.jsonl").read() if "refused" in event["event"]]
    assert [(event["sender"], event["kind"]) for event in refused] == [("p0", "Exit")]
    assert torch.equal(peer.all_reduce(torch.ones(1)).tensor, torch.ones(1))


def test_a_port_in_use_and_an_address_that_is_none_are_named(run: Run) -> None:
    run.open()
    with pytest.raises(ConfigurationError, match="port is in use"):
        Coordinator(f"tcp://127.0.0.1:{run.port}", run="other")
    with pytest.raises(ConfigurationError, match="must look like tcp://HOST:29400"):
        Coordinator("localhost", run="other")


# --- journal and host are lost ----------------------------------------------------------------------------------------


def elsewhere(run: Run, port: int) -> Coordinator:
    return Coordinator(
        f"tcp://127.0.0.1:{port}",
        run="test",
        policy=run.policy,
        timeouts=run.timeouts,
        journal=run.folder / f"journal-{port}.sqlite",
        events=run.folder / "second.jsonl",
        recover=True,
    )


def spare_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_a_run_is_rebuilt_on_another_host_from_what_a_majority_of_its_peers_knows(run: Run) -> None:
    """Its committed rounds, data positions and held leases are the same; the old host must not be heard any more.

    Who comes when a majority has made the run again holds nothing: what it had not given yet is read once more.
    """
    other = spare_port()
    run.policy = RunPolicy(min_peers=3, quorum=1.0, rounds=9)
    first = run.open()
    token = f"tcp://127.0.0.1:{run.port},tcp://127.0.0.1:{other}"
    peers = [Peer(token, run="test", name=f"p{i}", timeouts=run.timeouts, events_dir=run.folder) for i in range(3)]
    run.peers.extend(peers)
    dataset = torch.arange(4000.0)
    trained: list[list[int]] = [[], [], []]
    moved = threading.Event()

    def train(peer: Peer) -> tuple[str, int]:
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        inner = torch.optim.SGD(model.parameters(), lr=1e-9)
        index = int(peer.name[1])
        peer.wait_for(3)
        with DiLoCo(model, inner, peer, sync_every=4) as loop:
            for batch in peer.shards(dataset, batch_size=5, shard_size=20):
                model(batch[:, None]).sum().backward()
                inner.step()
                inner.zero_grad()
                trained[index].extend(batch.int().tolist())
                if peer.progress.rounds >= 3 and not moved.is_set() and index == 0:
                    first.close()
                    moved.set()
        return loop.version.state_hash, loop.version.number

    with ThreadPoolExecutor(4) as pool:
        ends = [pool.submit(train, peer) for peer in peers]
        assert moved.wait(60)
        run.coordinator = second = elsewhere(run, other)
        until(lambda: second.recovering is None)
        results = [end.result(60) for end in ends]
    assert results[0] == results[1] == results[2] and results[0][1] == 9
    report = second.status()
    assert report.generation > 1 << 20
    joined = [
        event["peer"] for event in EventReader(run.folder / "second.jsonl").read() if event["event"] == "peer.joined"
    ]
    late = {sample for name in joined for sample in trained[int(name[1])]}
    counts = Counter(sample for each in trained for sample in each)
    twice = {sample for sample, count in counts.items() if count > 1}
    assert twice <= late, "nobody read again what one of the majority had read, and was still to give"
    assert report.samples == report.progress.tokens == 9 * 3 * 4 * 5, "a round was lost, or counted twice"


def test_a_minority_is_asked_about_and_not_taken_for_the_run(run: Run) -> None:
    other = spare_port()
    first = run.open()
    token = f"tcp://127.0.0.1:{run.port},tcp://127.0.0.1:{other}"
    peers = [Peer(token, run="test", name=f"p{i}", timeouts=run.timeouts) for i in range(3)]
    run.peers.extend(peers)
    for peer in peers:
        peer.wait_for(3)
    first.close()
    for peer in peers[1:]:
        peer.close()
    run.coordinator = second = elsewhere(run, other)
    until(lambda: second.recovering == (("p0",), ("p0", "p1", "p2")))
    with pytest.raises(CoordinatorUnavailable):
        run.join("p9", join_timeout=1.0)
    assert second.recovering is not None, "a newcomer does not make a majority"
    second.accept_minority()
    until(lambda: [member.name for member in second.status().members] == ["p0"])
    assert torch.equal(peers[0].all_reduce(torch.ones(1)).tensor, torch.ones(1))


def test_a_journal_that_holds_a_run_is_not_written_over_by_a_recovery(run: Run) -> None:
    run.join("p0")
    assert run.coordinator is not None
    run.coordinator.close()
    before = (run.folder / "journal.sqlite").read_bytes()
    with pytest.raises(ConfigurationError, match="the journal holds a run already"):
        Coordinator("tcp://127.0.0.1:0", run="test", journal=run.folder / "journal.sqlite", recover=True)
    assert (run.folder / "journal.sqlite").read_bytes() == before

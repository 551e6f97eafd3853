"""The coordinator's server: what it refuses at the door, and that nothing on its port takes it down."""

from __future__ import annotations

import socket

import pytest
import torch
import zmq
from harness import Run, until

from elastic.coordinator import Coordinator, identity
from elastic.errors import ConfigurationError
from elastic.events import EventReader
from elastic.messages import Applied, Enter, Exit, Join, Message, OperationSpec, encode


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
    monkeypatch.setattr(membership, "_exit", lambda *_: 1 / 0)
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

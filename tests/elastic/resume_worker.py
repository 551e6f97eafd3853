"""The processes of a run that is killed as a whole: a coordinator, and peers that write down what they see and do."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import torch
from harness import QUICK

from elastic.checkpoints import Checkpoints
from elastic.config import RunPolicy
from elastic.coordinator import Coordinator
from elastic.outer.diloco import DiLoCo
from elastic.peer import Peer

SAMPLES, SHARD, BATCH = 4000, 20, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a peer is to do. peers: that it waits for; epochs: 0 for no end; pause: seconds after each step."""

    address: str
    name: str
    peers: int
    where: Path
    every: int = 1
    epochs: int = 0
    pause: float = 0.0


def serve_coordinator(pipe: Connection, journal: Path | None, peers: int) -> None:
    """Says its address, and goes on until it is killed or the pipe ends."""
    policy, timeouts = RunPolicy(min_peers=peers, quorum=1.0), replace(QUICK, grace=4.0, evict_after=4.0)
    with Coordinator("tcp://127.0.0.1:0", run="test", policy=policy, timeouts=timeouts, journal=journal) as coordinator:
        pipe.send(coordinator.address)
        with contextlib.suppress(EOFError):
            pipe.recv()


def serve_peer(said: Path, order: Order) -> None:
    """Trains; each of its lines in `said` is a JSON object."""
    torch.manual_seed(int(order.name[1:]))
    with said.open("w") as file, Peer(order.address, run="test", name=order.name, timeouts=QUICK) as peer:
        peer.wait_for(order.peers)
        _train(peer, order, partial(_say, file))
        peer.leave()


def _say(file: TextIO, **fields: Any) -> None:
    file.write(json.dumps(fields) + "\n")
    file.flush()


def _train(peer: Peer, order: Order, say: Callable[..., None]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-4)
    checkpoints = Checkpoints(str(order.where), every=order.every, keep=3)
    pause = threading.Event()
    with DiLoCo(model, inner, peer, sync_every=3, checkpoints=checkpoints) as loop:
        moments = [float(state["exp_avg"].abs().sum()) for state in inner.state.values()]
        say(version=loop.version.number, hash=loop.version.state_hash, steps=loop.steps, moments=moments)
        data = torch.arange(float(SAMPLES))
        for batch in peer.shards(data, batch_size=BATCH, shard_size=SHARD, epochs=order.epochs):
            model(batch[:, None]).square().mean().backward()
            say(samples=batch.int().tolist())
            inner.step()
            inner.zero_grad()
            say(version=loop.version.number, hash=loop.version.state_hash)
            pause.wait(order.pause)
    say(version=loop.version.number, hash=loop.version.state_hash, ended=True)

"""One process of `benchmarks.join`: the coordinator, an incumbent that trains, or a joiner. Orders as in `worker`.

The model is a real one whose steps are short however large it is: an embedding of which each step touches a few rows,
and a linear layer. The rest of a step's time is slept, as if an accelerator computed.
"""

from __future__ import annotations

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import elastic
from benchmarks import common
from collectives import Done, Group, LinkOptions

# elastic and collectives import what is in them with the first use: that is part of the imports, too
USED = (Group, elastic.Peer, elastic.DiLoCo, elastic.Coordinator, elastic.RunPolicy)
STARTED = time.monotonic()
MIB = 1 << 20
WIDTH = 256
RUN = "benchmark"
BATCH = 64
JOINERS = "joiner"
PLAIN_PIECE = 1 << 20

torch.set_num_threads(1)


class Model(torch.nn.Module):
    """`mib` MiB of float32 parameters, nearly all of them in the embedding."""

    def __init__(self, mib: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        rows = round(mib * MIB / 4 / WIDTH) - WIDTH
        self.table = torch.nn.Embedding.from_pretrained(
            torch.rand(rows, WIDTH, generator=generator), freeze=False, sparse=True
        )
        self.head = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(rows)).square().mean()

    def flat(self) -> torch.Tensor:
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters()])


def peer_of(order: dict[str, Any], name: str, events: str | None = None) -> elastic.Peer:
    options = LinkOptions(shared_memory=False, congestion_control=order["cc"])
    listen = f"{order['host']}:0"
    return elastic.Peer(order["coordinator"], run=RUN, name=name, listen=listen, options=options, events_dir=events)


def diloco(order: dict[str, Any], model: Model, inner: torch.optim.Optimizer, peer: elastic.Peer) -> elastic.DiLoCo:
    return elastic.DiLoCo(model, inner, peer, sync_every=order["sync_every"])


@dataclass
class Training(threading.Thread):
    """Trains until told to stop. steps: when each ended, seconds since the end of the one before, and whether a round
    was applied in it. waited: seconds that this peer waited for data of joiners, and was held up sending to them, by
    the records of its exchanges.
    """

    order: dict[str, Any]
    name_: str
    steps: list[tuple[float, float, bool]] = field(default_factory=list)
    hashes: dict[int, str] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=lambda: {"waited": 0.0, "exchanges": 0.0, "with_joiner": 0.0})
    error: str = ""

    def __post_init__(self) -> None:
        super().__init__(name="training", daemon=True)
        self.ready, self.stopping = threading.Event(), threading.Event()

    def __hash__(self) -> int:
        return id(self)

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
            self.ready.set()

    def _train(self) -> None:
        model = Model(self.order["mib"], seed=1)
        inner = torch.optim.SGD(model.parameters(), lr=0.01)
        period, generator = self.order["step_ms"] / 1e3, torch.Generator().manual_seed(len(self.name_))
        with peer_of(self.order, self.name_) as peer, diloco(self.order, model, inner, peer) as outer:
            self._watch(peer)
            self.hashes[outer.version.number] = outer.version.state_hash
            self.ready.set()
            last = due = time.monotonic()
            while not self.stopping.is_set():
                model(torch.randint(0, len(model.table.weight), (BATCH,), generator=generator)).backward()
                time.sleep(max(0.0, due - time.monotonic()))
                inner.step()
                inner.zero_grad()
                now, number = time.monotonic(), outer.version.number
                self.steps.append((now, now - last, number not in self.hashes))
                self.hashes[number] = outer.version.state_hash
                last, due = now, max(due, now - period) + period

    def _watch(self, peer: elastic.Peer) -> None:
        """Sums up what the data plane's own records say of joiners."""
        execute = peer.group.run

        def run(*arguments: Any) -> Any:
            outcome = execute(*arguments)
            if isinstance(outcome, Done):
                links = [link for link in outcome.record.links if link.peer.startswith(JOINERS)]
                self.waited["exchanges"] += 1
                self.waited["with_joiner"] += bool(links)
                self.waited["waited"] += sum(link.waited_seconds for link in links)
            return outcome

        peer.group.run = run  # type: ignore[method-assign]


class Desk:
    """Carries out one order after the other; what a method returns is the answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._coordinator: elastic.Coordinator | None = None
        self._training: Training | None = None
        self._model: Model | None = None
        self._data = np.empty(0, dtype=np.uint8)

    def hello(self, order: dict[str, Any]) -> dict[str, Any]:
        return {"started": STARTED, "now": time.monotonic()}

    def coordinate(self, order: dict[str, Any]) -> dict[str, Any]:
        policy = elastic.RunPolicy(min_peers=3)
        self._coordinator = elastic.Coordinator(f"tcp://{order['host']}:0", run=RUN, policy=policy)
        return {"address": self._coordinator.address}

    def train(self, order: dict[str, Any]) -> dict[str, Any]:
        self._training = Training(order, self._name)
        self._training.start()
        self._training.ready.wait()
        return self._checked({})

    def _checked(self, answer: dict[str, Any]) -> dict[str, Any]:
        assert self._training is not None, "nothing is trained"
        if self._training.error:
            raise RuntimeError(self._training.error)
        return answer

    def seen(self, order: dict[str, Any]) -> dict[str, Any]:
        training = self._training
        assert training is not None, "nothing is trained"
        return self._checked({"steps": training.steps, "hashes": training.hashes, "waited": training.waited})

    def prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a joiner has before it joins: a model."""
        self._model = Model(order["mib"], seed=2)
        return {}

    def join(self, order: dict[str, Any]) -> dict[str, Any]:
        """From the call of Peer() until the run's state, verified, is in the model."""
        assert self._model is not None, "there is no model"
        inner = torch.optim.SGD(self._model.parameters(), lr=0.01)
        with tempfile.TemporaryDirectory() as events:
            time.sleep(max(0.0, order["at"] - time.monotonic()))
            began = time.monotonic()
            peer = peer_of(order, self._name, events)
            admitted = time.monotonic()
            outer = diloco(order, self._model, inner, peer).__enter__()
            ended = time.monotonic()
            version = outer.version
            time.sleep(order["stay"])
            right = bool(torch.equal(self._model.flat(), version.parameters))
            outer.__exit__(InterruptedError, InterruptedError(), None)
            peer.leave(drain=False)
            log = [json.loads(line) for line in Path(events, f"{self._name}.jsonl").read_text().splitlines()]
        [fetched] = [each for each in log if each["event"] == "state.fetched"]
        parts = {"admitted": admitted - began, "fetch": fetched["seconds"], "bytes": fetched["bytes"]}
        facts = {"version": version.number, "hash": version.state_hash, "right": right}
        return {"began": began, "ended": ended, **parts, **facts}

    # --- the sides that do nothing but copy ---------------------------------------------------------------------------

    def give(self, order: dict[str, Any]) -> dict[str, Any]:
        """Beside the training: sends so many bytes to the next joiner, over one connection or by a gloo broadcast."""
        if len(self._data) != order["bytes"]:
            self._data = np.ones(order["bytes"], dtype=np.uint8)
        listener = socket.create_server((order["host"], 0))
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, order["cc"].encode())
        port = listener.getsockname()[1]
        work: Callable[[], None] = lambda: self._send_plain(listener)  # noqa: E731
        if order["side"] == "gloo":
            listener.close()
            work = lambda: broadcast(order["host"], port, 0, torch.from_numpy(self._data))  # noqa: E731
        threading.Thread(target=work, daemon=True).start()
        return {"port": port}

    def _send_plain(self, listener: socket.socket) -> None:
        with listener, listener.accept()[0] as sock:
            sock.sendall(self._data.data)

    def take(self, order: dict[str, Any]) -> dict[str, Any]:
        """The other end of `give`, into fresh memory, as a joiner would."""
        time.sleep(max(0.0, order["at"] - time.monotonic()))
        began = time.monotonic()
        data = np.empty(order["bytes"], dtype=np.uint8)
        if order["side"] == "gloo":
            broadcast(order["host"], order["port"], 1, torch.from_numpy(data))
        else:
            receive_plain(order["host"], order["port"], data)
        ended = time.monotonic()
        return {"began": began, "ended": ended, "right": bool((data == 1).all())}


def receive_plain(host: str, port: int, data: np.ndarray[Any, Any]) -> None:
    with socket.create_connection((host, port)) as sock:
        view, at = data.data, 0
        while at < len(view):
            count = sock.recv_into(view[at : at + PLAIN_PIECE], 0, socket.MSG_WAITALL)
            if not count:
                raise OSError("the sender has gone")
            at += count


def broadcast(host: str, port: int, rank: int, data: torch.Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://{host}:{port}", rank=rank, world_size=2)
    dist.broadcast(data, 0)
    dist.destroy_process_group()


if __name__ == "__main__":
    common.take_orders(Desk)

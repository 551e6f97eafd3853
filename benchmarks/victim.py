"""One process of `benchmarks.faults`: the coordinator, or a peer that trains and may be what a fault befalls.

Orders as in `worker`. A step is a real one of a small network, and then a timed wait, so that both together take a
step's time, as if an accelerator computed. Faults that a process does to itself are ordered from outside, armed in its
injector, and counted there.
"""

from __future__ import annotations

import json
import random
import statistics
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

import elastic
from benchmarks import common
from collectives import LinkOptions
from collectives.records import OperationRecord
from elastic.membership import Membership
from elastic.messages import Heartbeat
from fault.inject import Fault, Injector

RUN = "faults"
BATCH = 8
SHARD = 4096  # samples: more than a peer reads between two faults
TOKENS = 512  # that a sample stands for
LEARNING_RATE = 3e-6
# elastic imports what is in it with the first use: a spare has that behind it
SHORT = elastic.FaultPolicy(quarantine_seconds=5.0, longest_seconds=5.0, strikes=1000, flapping="observe")
"""As by default, but for the same names that are struck again and again."""
USED = (elastic.Peer, elastic.DiLoCo, elastic.Coordinator, elastic.RunPolicy)

torch.set_num_threads(1)


class Samples(Dataset[torch.Tensor]):
    """Random inputs of a few kinds, each a function of its index: what peers learn from them has much in common."""

    tokens_per_sample = TOKENS

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(3)
        self._kinds = torch.randn(64, width, generator=generator)
        self._noise = 0.3 * torch.randn(1 << 16, generator=generator)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, index: int) -> torch.Tensor:
        kind = self._kinds[index * 2654435761 % (1 << 32) % len(self._kinds)]
        at = index * 7919 % (len(self._noise) - len(kind))
        return kind + self._noise[at : at + len(kind)]


class Model(torch.nn.Module):
    """Two square layers of float32, `mib` MiB together, the same on all peers."""

    def __init__(self, mib: float, seed: int = 1) -> None:
        super().__init__()
        self.width = round((mib * 2**20 / 4 / 2) ** 0.5)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = (torch.nn.Linear(self.width, self.width, bias=False) for _ in range(2))
            self.layers = torch.nn.Sequential(next(layers), torch.nn.Tanh(), next(layers))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """The distance to what a fixed function of the batch is: to its own inputs, in another order."""
        loss: torch.Tensor = (self.layers(batch) - batch.flip(1)).square().sum(1).mean()
        return loss


class Training(threading.Thread):
    """Trains until the process ends. cc: congestion control of its links. faults: what is to go wrong here. came: of
    each other peer, how many bytes of its numbers came here lately, and how many seconds that took.
    """

    def __init__(self, order: dict[str, Any], model: Model) -> None:
        super().__init__(name="training", daemon=True)
        self.order, self._model = order, model
        self.faults = Injector(order["name"])
        self.cc: list[str] = []
        self.came: dict[str, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=8))
        self.ready, self.error = threading.Event(), ""

    def run(self) -> None:
        try:
            self._train()
        except BaseException as error:
            self.error = f"{type(error).__name__}: {error}"
        self.ready.set()

    def _peer(self) -> elastic.Peer:
        order = self.order
        options = LinkOptions(shared_memory=False, congestion_control=order["cc"])
        where, listen = order["coordinator"], f"{order['host']}:0"
        name, faults = order["name"], self.faults
        while True:
            try:
                return elastic.Peer(where, run=RUN, name=name, listen=listen, options=options, faults=faults)
            except elastic.Quarantined as error:  # as a supervisor would do
                time.sleep(error.retry_after)

    def _watch(self, peer: elastic.Peer) -> None:
        operated = peer.telemetry.operated

        def noted(record: OperationRecord) -> None:
            for link in record.links:
                if link.own_bytes:
                    self.came[link.peer].append((link.own_bytes, link.own_seconds))
            operated(record)

        peer.telemetry.operated = noted  # type: ignore[method-assign]

    def _train(self) -> None:
        model, order = self._model, self.order
        inner = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        chance = random.Random(order["name"])
        with self._peer() as peer, elastic.DiLoCo(model, inner, peer, sync_every=order["sync_every"]):
            self._watch(peer)
            peer.wait_for(order["peers"])
            self.ready.set()
            began = time.monotonic()
            for batch in peer.shards(Samples(model.width), batch_size=BATCH, shard_size=SHARD):
                model(batch).backward()
                usual = order["step_ms"] / 1e3 * chance.lognormvariate(0.0, order["jitter"])
                time.sleep(max(0.0, began + usual - time.monotonic()))
                inner.step()
                inner.zero_grad()
                self.cc = [link.congestion_control for link in peer.statistics().group.links]
                began = time.monotonic()


class Desk:
    """Carries out one order after the other; what a method returns is the answer."""

    def __init__(self, name: str) -> None:
        self._coordinator: elastic.Coordinator | None = None
        self._training: Training | None = None
        self._model: Model | None = None

    def coordinate(self, order: dict[str, Any]) -> dict[str, Any]:
        """record: a file for all telemetry that comes."""
        if order["record"]:
            record(Path(order["record"]))
        policy = elastic.RunPolicy(min_peers=2, faults=SHORT)
        address, events = f"tcp://{order['host']}:0", Path(order["events"])
        self._coordinator = elastic.Coordinator(address, run=RUN, policy=policy, events=events)
        return {"address": self._coordinator.address}

    def audit(self, order: dict[str, Any]) -> dict[str, Any]:
        assert self._coordinator is not None, "this is no coordinator"
        report = self._coordinator.audit()
        return {"committed": report.committed, "twice": report.twice, "missing": report.missing}

    def prepare(self, order: dict[str, Any]) -> dict[str, Any]:
        """What a spare has before it is needed: a model, and the first step of a process behind it: that takes long."""
        first = Model(0.1)
        first(torch.zeros(1, first.width)).backward()
        torch.optim.SGD(first.parameters(), lr=LEARNING_RATE).step()
        self._model = Model(order["mib"])
        return {}

    def train(self, order: dict[str, Any]) -> dict[str, Any]:
        """Becomes the peer `name`, and returns once it is in the run and the others are there."""
        assert self._model is not None, "prepare first"
        self._training = Training(order, self._model)
        self._training.start()
        self._training.ready.wait()
        return self.facts(order)

    def arm(self, order: dict[str, Any]) -> dict[str, Any]:
        """fault: fields of a `Fault`."""
        return {"id": self._well.faults.arm(Fault(**order["fault"]))}

    def disarm(self, order: dict[str, Any]) -> dict[str, Any]:
        """How often it has fired."""
        faults = self._well.faults
        faults.disarm(order["id"])
        return {"fired": faults.fired[order["id"]]}

    def came(self, order: dict[str, Any]) -> dict[str, Any]:
        """bytes, seconds: medians of what came from this peer lately; 0 if nothing did."""
        sizes, seconds = zip(*list(self._well.came[order["sender"]]) or [(0, 0.0)], strict=True)
        return {"bytes": statistics.median(sizes), "seconds": statistics.median(seconds)}

    def facts(self, order: dict[str, Any]) -> dict[str, Any]:
        return {"cc": sorted(set(self._well.cc))}

    @property
    def _well(self) -> Training:
        training = self._training
        assert training is not None, "nothing is trained"
        if training.error:
            raise RuntimeError(training.error)
        return training


def record(path: Path) -> None:
    """From now on, what peers tell of themselves is written down, one heartbeat a line: see `detector.replayed`."""
    receive: Callable[..., Any] = Membership.receive
    file = path.open("w", encoding="utf-8")

    def received(self: Membership, name: str, message: Any, now: float) -> Any:
        if isinstance(message, Heartbeat) and name in self.members:
            crossings = [[each.peer, each.bytes, float(f"{each.seconds:.4g}")] for each in message.crossings]
            gave = [[each.tag, each.version, float(f"{each.norm:.4g}"), round(each.cosine, 4)] for each in message.gave]
            step = float(f"{message.step_seconds:.4g}")
            file.write(json.dumps([round(now, 3), name, crossings, step, gave], separators=(",", ":")) + "\n")
            file.flush()
        return receive(self, name, message, now)

    Membership.receive = received  # type: ignore[method-assign]


if __name__ == "__main__":
    common.take_orders(Desk)

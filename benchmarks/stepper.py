"""One process of `benchmarks.overlap`: the coordinator, or a peer that trains under one algorithm after the other.

Orders as in `worker`. A step is the inner optimizer's, which moves one layer a little, and then a timed wait, so that
both together take a step's time, as if an accelerator computed. The wait is a hook of the optimizer before the outer
loop's, so that whatever follows it is the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

import elastic
from benchmarks import common
from collectives import LinkOptions

RUN = "overlap"
LAYERS = 8
DATA_PARALLEL = "data-parallel"
LEARNING_RATE = 1e-4
PATIENCE = 60.0

Spans = list[tuple[float, float]]
"""Seconds of each, and of these, of this thread on a processor."""

torch.set_num_threads(1)

LOOPS: dict[str, Callable[..., elastic.OuterLoop]] = {
    "DiLoCo": elastic.DiLoCo,
    "Streaming": elastic.StreamingDiLoCo,
    "Delayed": elastic.DelayedDiLoCo,
    "Eager": partial(elastic.DelayedDiLoCo, eager=True),
}


class Model(torch.nn.Module):
    """Equal layers of float32, the same on all peers; about so many MiB of them."""

    def __init__(self, mib: float) -> None:
        super().__init__()
        width = round((mib * 2**20 / 4 / LAYERS) ** 0.5)
        generator = torch.Generator().manual_seed(1)
        numbers = (torch.rand(width, width, generator=generator) for _ in range(LAYERS))
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(each) for each in numbers)


@dataclass
class Clock:
    """What a row is made of. ends: time.monotonic() at the end of each step, after the hook.

    waited: seconds of the steps as they came out, without hooks. hook: after each wait. parts: pieces of the hook, by
    the names of methods, some within others. exchanges: from each proposal to its commit.
    """

    ends: list[float] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    hook: Spans = field(default_factory=list)
    parts: dict[str, Spans] = field(default_factory=dict)
    exchanges: Spans = field(default_factory=list)

    def watch(self, outer: elastic.OuterLoop) -> None:
        pieces = {"launch": outer.replica, "land": outer.replica, "_adopt": outer, "_launch": outer, "_settle": outer}
        for name, owner in pieces.items():
            timed(owner, name, self.parts.setdefault(name, []))

    def forget(self) -> None:
        """What was measured so far was for warming up."""
        every: tuple[list[Any], ...] = (self.waited, self.hook, self.exchanges, *self.parts.values())
        for values in every:
            values.clear()
        del self.ends[:-1]


def timed(owner: Any, name: str, into: Spans) -> None:
    """From now on, every call of this method of `owner` is timed."""
    inner = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        began, used = time.monotonic(), time.thread_time()
        try:
            return inner(*arguments, **options)
        finally:
            into.append((time.monotonic() - began, time.thread_time() - used))

    setattr(owner, name, call)


class Desk:
    """Carries out one order after the other; what a method returns is the answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._coordinator: elastic.Coordinator | None = None
        self._peer: elastic.Peer | None = None
        self._exchanges: Spans = []

    def coordinate(self, order: dict[str, Any]) -> dict[str, Any]:
        policy = elastic.RunPolicy(min_peers=order["peers"], quorum=1.0)
        self._coordinator = elastic.Coordinator(f"tcp://{order['host']}:0", run=RUN, policy=policy)
        return {"address": self._coordinator.address}

    def join(self, order: dict[str, Any]) -> dict[str, Any]:
        """Becomes a peer, with links of its own; the one that it was before leaves."""
        if self._peer is not None:
            self._peer.leave()
        options = LinkOptions(shared_memory=False, congestion_control=order["cc"])
        listen = f"{order['host']}:0"
        self._peer = elastic.Peer(order["coordinator"], run=RUN, name=self._name, listen=listen, options=options)
        self._watch_exchanges(self._peer)
        return {}

    def _watch_exchanges(self, peer: elastic.Peer) -> None:
        make = peer.operation

        def operation(*arguments: Any) -> Any:
            made = make(*arguments)
            timed(made, "run", self._exchanges)
            return made

        peer.operation = operation  # type: ignore[assignment, method-assign]

    def settle(self, order: dict[str, Any]) -> dict[str, Any]:
        """Operations of the model's size, in which links find their stripes."""
        peer = self._member(order)
        flat = torch.zeros(round(order["mib"] * 2**20 / 4))
        for _ in range(order["settle"]):
            peer.all_reduce(flat, timeout=PATIENCE)
        links = peer.statistics().group.links
        return {"stripes": [link.stripes for link in links], "cc": sorted({link.congestion_control for link in links})}

    def _member(self, order: dict[str, Any]) -> elastic.Peer:
        assert self._peer is not None, "join first"
        self._peer.wait_for(order["peers"])
        return self._peer

    def train(self, order: dict[str, Any]) -> dict[str, Any]:
        """Steps, of which the first `warm` do not count."""
        row = Row(order, self._member(order), Clock(exchanges=self._exchanges))
        found = row.reduce() if order["loop"] == DATA_PARALLEL else row.loop()
        return {**found, **vars(row.clock)}


class Row:
    """One algorithm on one link."""

    def __init__(self, order: dict[str, Any], peer: elastic.Peer, clock: Clock) -> None:
        self.order, self.peer, self.clock = order, peer, clock
        self.model = Model(order["mib"])
        self.inner = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE)
        self.inner.register_step_post_hook(lambda *_: self.wait())
        self.began = self.ready = self.used = 0.0

    def loop(self) -> dict[str, Any]:
        make, options = LOOPS[self.order["loop"]], self.order["options"]
        with make(self.model, self.inner, self.peer, tag=self.order["tag"], **options) as outer:
            self.clock.watch(outer)
            found = self.measured(lambda: None, lambda: asdict(outer.statistics()))
        return {**found, "hash": outer.version.state_hash}

    def reduce(self) -> dict[str, Any]:
        """Data-parallel: after each wait, the mean of all gradients."""
        flat = torch.full((sum(each.numel() for each in self.model.parameters()),), 1e-3)

        def reduce() -> None:
            self.peer.all_reduce(flat, op="mean", timeout=PATIENCE)

        return {**self.measured(reduce, dict), "hash": ""}

    def measured(self, after: Callable[[], None], statistics: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """By how much the loop's statistics have grown; the clock keeps what was measured, and no more."""
        self.peer.barrier()  # entering a loop takes one of them longer: it fetches what the other begins with
        self.steps(self.order["warm"], after)
        self.clock.forget()
        before, sent = statistics(), self.sent
        self.steps(self.order["steps"], after)
        self.clock = deepcopy(self.clock)
        grown = {name: value - before[name] for name, value in statistics().items()}
        return {**grown, "sent": self.sent - sent}

    @property
    def sent(self) -> int:
        return self.peer.statistics().group.bytes_sent

    def steps(self, count: int, after: Callable[[], None]) -> None:
        gradient = torch.randn(self.model.layers[0].shape)
        for step in range(count):
            weight = self.model.layers[step % LAYERS]
            weight.grad, self.began = gradient, time.monotonic()
            self.inner.step()
            after()
            ended = time.monotonic()
            self.clock.hook.append((ended - self.ready, time.thread_time() - self.used))
            self.clock.ends.append(ended)
            weight.grad = None

    def wait(self) -> None:
        """The rest of a step's time."""
        time.sleep(max(0.0, self.began + self.order["seconds"] - time.monotonic()))
        self.ready, self.used = time.monotonic(), time.thread_time()
        self.clock.waited.append(self.ready - self.began)


if __name__ == "__main__":
    common.take_orders(Desk)

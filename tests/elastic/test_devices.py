"""Outer state on another device than the CPU: the same bits, over the network, too.

Torch's lazy device is one of its own that every build has: what would mix devices fails on it as it does on a GPU.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._lazy.ts_backend
from harness import Run
from test_algorithms import Layered, inner_of, outer_of, simulate
from test_streaming import DECOUPLED, STREAM, train

import elastic
from elastic.checkpoints import Checkpoints
from elastic.config import RunPolicy
from elastic.errors import ConfigurationError
from elastic.outer import co2, decoupled, delayed, diloco, streaming
from elastic.outer.compression import Compression
from elastic.outer.engine import OuterLoop
from elastic.outer.feedback import EF21, EControl, ErrorFeedback
from elastic.outer.optimizers import SGD, Adam
from elastic.outer.rule import Rule
from elastic.outer.state import Layout
from elastic.peer import Peer

torch._lazy.ts_backend.init()
DEVICES = ["lazy", *(["cuda"] if torch.cuda.is_available() else [])]
INT4 = Compression(wire="int4")
RULES = [
    diloco.rule(),
    diloco.rule(SGD(lr=1.0)),
    diloco.rule(Adam()),
    diloco.rule(compression=Compression(wire="int4", rotate=True), feedback=ErrorFeedback()),
    streaming.rule(sync_delay=2),
    streaming.rule(sync_delay=1, compression=INT4, feedback=EF21()),
    streaming.rule(sync_delay=1, compression=INT4, feedback=EControl()),
    delayed.rule(),
    delayed.rule(eager=True),
    co2.rule(),
    decoupled.rule(sync_delay=1, rda=True),
]


def on(name: str) -> torch.device:
    return torch.empty(0, device=name).device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.description)
def test_every_device_makes_the_same_bits(rule: Rule, device: str) -> None:
    """With a contribution that is left out now and then, too."""
    options: dict[str, Any] = {"sync_every": 8, "fragments": 2 if rule.mix or rule.directional else 1}
    options["received"] = lambda turn, replica: turn % 3 != 1 or replica != 0
    here, there = (simulate(rule, 43, device=on(name), **options) for name in ("cpu", device))
    assert here.number == there.number >= 4
    assert outer_of(there).device.type == device and outer_of(here).norm() > 0
    for one, other in zip(here.replicas, there.replicas, strict=True):
        assert one.state.state_hash == other.state.state_hash
    for model, same in zip(here.models, there.models, strict=True):  # type: ignore[attr-defined]
        assert torch.equal(model.flat(), same.flat())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "make, options",
    [
        (elastic.StreamingDiLoCo, STREAM),
        (elastic.DelayedDiLoCo, {"sync_every": 8, "eager": True}),
        (elastic.DecoupledDiLoCo, DECOUPLED | {"quorum": 2, "rda": True}),
    ],
)
def test_peers_whose_outer_state_is_elsewhere_are_peers_like_others(
    run: Run, make: Callable[..., OuterLoop], options: dict[str, Any], device: str
) -> None:
    """One of two has it on the device; then a third comes, fetches it from both, and has it there, too."""
    run.policy = RunPolicy(min_peers=2, quorum=1.0)

    def learn(peer: Peer) -> OuterLoop:
        return train(peer, make, 25, **options, outer_device="cpu" if peer.name == "p0" else device)[1]

    one, other = run.together(learn, run.several(2))
    assert one.version.state_hash == other.version.state_hash and one.version.number > 2
    assert one.version.parts[0].parameters.device.type == "cpu"
    assert all(part.momentum.device.type == device for part in other.version.parts)


@pytest.mark.parametrize("device", DEVICES)
def test_a_joiner_a_checkpoint_and_a_state_dict_come_to_the_device(run: Run, device: str) -> None:
    run.policy = RunPolicy(quorum=1.0)
    options: dict[str, Any] = STREAM | {
        "sync_delay": 1,
        "checkpoints": Checkpoints(f"file://{run.folder / 'kept'}", every=1),
    }
    first = run.join("p0")
    model = torch.nn.Linear(4, 3)
    two = torch.nn.Sequential(model, torch.nn.Linear(3, 1), torch.nn.Linear(1, 2), torch.nn.Linear(2, 2))
    inner = inner_of(two)

    def step() -> None:
        inner.zero_grad()
        two(torch.ones(2, 4)).square().sum().backward()
        inner.step()

    with elastic.StreamingDiLoCo(two, inner, first, **options, outer_device=device) as loop:
        for _ in range(11):  # no contribution is on its way then
            step()
        state = loop.state_dict()
        assert all(tensor.device.type == "cpu" for part in state["parts"] for tensor in part[1:])
        before = loop.version.state_hash
        loop.load_state_dict(state)
        assert loop.version.state_hash == before and loop.version.parts[0].parameters.device.type == device
        with elastic.StreamingDiLoCo(
            torch.nn.Sequential(*two), inner_of(two), run.join("p1"), **STREAM, outer_device=device
        ) as joiner:
            assert joiner.version.state_hash == loop.version.state_hash
            assert joiner.version.parts[0].parameters.device.type == device
    assert loop.saver is not None and (saved := loop.saver.newest()) is not None
    assert saved.versions[0].state_hash == loop.version.parts[0].state_hash


@pytest.mark.parametrize("device", ["cpu", *DEVICES])
def test_what_nobody_needs_any_more_is_freed_at_once(device: str) -> None:
    """Not when the garbage collector comes round: that can be many rounds later."""
    rule, layout = diloco.rule(), Layout(Layered(0), device=on(device))
    version = rule.begin(layout.read())
    assert version.state_hash == version.host.state_hash == version.on(torch.device("cpu")).state_hash
    seen = weakref.ref(version)
    gc.disable()
    try:
        version = rule.advance(version, torch.ones(len(version.parameters)), layout.parts[0])
        assert seen() is None
    finally:
        gc.enable()


def test_a_device_that_is_not_there_is_said_so(run: Run) -> None:
    peer, missing = run.join("p0"), "cuda:77"
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="outer_device is 'cuda:77'"):
        elastic.DiLoCo(model, inner_of(model), peer, outer_device=missing)
    with pytest.raises(ConfigurationError, match="outer_device is 'nonsense'"):
        elastic.DiLoCo(model, inner_of(model), peer, outer_device="nonsense")

"""What the peers of `benchmarks.lifecycle` train: a model of some MiB with DiLoCo; a step is a timed wait, as if an
accelerator computed."""

from __future__ import annotations

import time
from typing import Any

import torch

import elastic


def train(peer: elastic.Peer, config: dict[str, Any]) -> dict[str, Any]:
    """Until the run is over, or the peer is asked to leave. config: mib, step_seconds, sync_every."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    mib, step_seconds = float(config.get("mib", 10)), float(config.get("step_seconds", 0.05))
    model = torch.nn.Linear(1024, round(mib * (1 << 20) / 4 / 1024), bias=False)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    batch = torch.randn(4, 1024)
    with elastic.DiLoCo(model, inner, peer, sync_every=int(config.get("sync_every", 10))) as outer:
        while not peer.stopping:
            time.sleep(step_seconds)
            inner.zero_grad()
            model(batch).square().mean().backward()
            inner.step()
    return {"version": outer.version.number, "state_hash": outer.version.state_hash}

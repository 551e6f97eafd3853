"""Trains the byte-level GPT with DiLoCo as one peer of a run: what `elastic demo` runs in each of its peers.

`train(peer, config)` is ordinary torch; the outer loop works through the optimizer's step. By itself:

    python examples/train_gpt.py tcp://HOST:29400 RUN NAME
"""

import contextlib
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from gpt import GPT, GPTConfig
from safetensors.torch import save_model
from text import ByteDataset, Document, held_out_batches, load_text, split

import elastic

GATHER_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """data: files or folders of UTF-8 text; none: the source of Python's standard library. out: folder for results.

    rounds: the run's target, before whose last round all `peers` gather again; 0: they need not end together.
    """

    peers: int = 3
    rounds: int = 0
    data: tuple[str, ...] = ()
    sync_every: int = 25
    wire: str = "f32"
    batch_size: int = 8
    context: int = 128
    lr: float = 3e-3
    warmup_steps: int = 50
    outer_lr: float = 0.5
    outer_momentum: float = 0.7
    seed: int = 0
    threads: int = 1
    out: str = ""


def train(peer: elastic.Peer, config: dict[str, Any]) -> dict[str, Any]:
    """Trains until the run has reached its target. Returns facts about the final state, equal on all peers."""
    cfg = TrainConfig(**{field.name: config[field.name] for field in fields(TrainConfig) if field.name in config})
    torch.set_num_threads(cfg.threads)
    train_documents, held_out = split(load_text([Path(p) for p in cfg.data] or None), seed=cfg.seed)
    dataset = ByteDataset(train_documents, cfg.context)
    model = GPT(GPTConfig(context=cfg.context), seed=cfg.seed)
    inner = torch.optim.AdamW(model.parameters(), lr=cfg.lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    if peer.life == 1:
        peer.wait_for(n=cfg.peers, timeout=120)  # begin together; a peer that comes back does not wait

    try:
        return train_to_the_end(peer, model, inner, dataset, held_out, cfg)
    except elastic.NoSource:
        if not peer.progress.finished:
            raise
        return {"version": -1, "state_hash": ""}  # the run has ended without this peer, and nobody is left to ask


def train_to_the_end(
    peer: elastic.Peer,
    model: GPT,
    inner: torch.optim.Optimizer,
    dataset: ByteDataset,
    held_out: list[Document],
    cfg: TrainConfig,
) -> dict[str, Any]:
    warmup = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: min(1.0, (step + 1) / cfg.warmup_steps))
    outer_optimizer = elastic.Nesterov(lr=cfg.outer_lr, momentum=cfg.outer_momentum)
    gathered = cfg.rounds == 0
    with elastic.DiLoCo(model, inner, peer, sync_every=cfg.sync_every, outer=outer_optimizer, wire=cfg.wire) as outer:
        monitor = Monitor(peer, outer, model, held_out_batches(held_out, cfg.context))
        for batch in peer.shards(dataset, batch_size=cfg.batch_size, seed=cfg.seed):
            loss = model.loss(batch[:, :-1], batch[:, 1:])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            inner.step()
            inner.zero_grad()
            warmup.step()
            monitor.step(loss.item(), tokens=batch.size(0) * cfg.context)
            if not gathered and not peer.progress.finished and peer.progress.rounds >= cfg.rounds - 1:
                gathered = True
                gather(peer, cfg.peers)
    monitor.evaluate_if_due()
    return conclude(peer, outer, model, cfg)


def gather(peer: elastic.Peer, peers: int) -> None:
    """Waits, within bounds, for who is on the way back: once the others have left it would find no state to fetch."""
    with contextlib.suppress(elastic.NotEnoughPeers):
        peer.wait_for(n=peers, timeout=GATHER_SECONDS)


class Monitor:
    """Tells how training goes. After each round one peer, by turns, evaluates the outer parameters."""

    def __init__(self, peer: elastic.Peer, outer: elastic.DiLoCo, model: GPT, batches: list[Any]) -> None:
        self.peer, self.outer, self.model, self.batches = peer, outer, model, batches
        self.evaluated = -1 if outer.version.number == 0 else outer.version.number
        self.tokens, self.since = 0, time.monotonic()
        self.evaluate_if_due()

    def step(self, loss: float, tokens: int) -> None:
        self.tokens += tokens
        rate = self.tokens / max(time.monotonic() - self.since, 1e-9)
        self.peer.report(loss=loss, tokens_per_second=rate)
        self.peer.events.emit("train.loss", step=self.outer.steps, round=self.round, loss=round(loss, 4))
        self.evaluate_if_due()

    @property
    def round(self) -> int:
        return self.outer.last_commit.round if self.outer.last_commit else -1

    def evaluate_if_due(self) -> None:
        version = self.outer.version.number
        if version == self.evaluated:
            return
        self.evaluated = version
        self.tokens, self.since = 0, time.monotonic()
        names = self.outer.last_commit.contributors if self.outer.last_commit else self.peer.view.names
        if names[version % len(names)] == self.peer.name:
            self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> None:
        with self.outer.evaluating():
            losses = [self.model.loss(inputs, targets).item() for inputs, targets in self.batches]
        self.peer.events.emit("heldout.evaluated", round=self.round, loss=round(sum(losses) / len(losses), 5))


def conclude(peer: elastic.Peer, outer: elastic.DiLoCo, model: GPT, cfg: TrainConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {"version": outer.version.number, "state_hash": outer.version.state_hash}
    last = outer.last_commit
    if cfg.out and last and last.contributors and last.contributors[0] == peer.name:
        save_model(model, str(Path(cfg.out) / "model.safetensors"))
        prompt = b"def "
        text = prompt + model.generate(prompt, 400, temperature=0.7, generator=torch.Generator().manual_seed(cfg.seed))
        facts["sample_text"] = text.decode("utf-8", errors="replace")
    return facts


if __name__ == "__main__":
    coordinator, run, name = sys.argv[1:4]
    with elastic.Peer(coordinator, run=run, name=name) as peer:
        print(train(peer, asdict(TrainConfig())))

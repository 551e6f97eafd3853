"""Trains a small transformer whose parameters are sharded among the processes of each peer (FSDP2).

On this machine, or on the Ray that it belongs to, two peers of two processes each:

    python examples/fsdp/train.py

As one peer of a run, without Ray; another site may have more processes, or one:

    ELASTIC_JOIN=elastic://HOST:29400/RUN torchrun --nproc-per-node 2 examples/fsdp/train.py
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import elastic

CONTEXT = 64


class Bytes(torch.utils.data.Dataset[Tensor]):
    """The source of Python's json package as stretches of bytes: a vocabulary of 256, and nothing to download."""

    tokens_per_sample = CONTEXT

    def __init__(self) -> None:
        files = sorted(Path(json.__file__).parent.glob("*.py"))
        text = bytearray(b"\n".join(file.read_bytes() for file in files))
        self.rows = torch.frombuffer(text, dtype=torch.uint8)[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Tensor:
        return self.rows[index].long()


class Transformer(nn.Module):
    """Decoder only: each position sees what came before it."""

    def __init__(self, width: int = 64, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.positions = nn.Embedding(CONTEXT, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        T = tokens.shape[1]
        x = self.embedding(tokens) + self.positions(torch.arange(T, device=tokens.device))  # (B, T, width)
        mask = nn.Transformer.generate_square_subsequent_mask(T, device=tokens.device)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)  # (B, T, 256)


def sharded(device: torch.device) -> Transformer:
    """Each process holds its part of every parameter. All begin with the same, as the seed is."""
    torch.manual_seed(0)
    model = Transformer().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def train(peer: elastic.Peer, config: dict[str, Any]) -> dict[str, Any]:
    """Runs in every process of the peer, as one rank of the process group."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = sharded(device)
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with elastic.DiLoCo(model, inner, peer, sync_every=config["sync_every"]) as outer:
        for batch in peer.shards(Bytes(), batch_size=config["batch_size"]):  # of each process; no sample twice
            batch = batch.to(device)
            logits = model(batch[:, :-1])
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            inner.step()
            inner.zero_grad()
            losses.append(loss.item())
            peer.report(loss=losses[-1])
    return {"peer": peer.name, "first": losses[0], "last": losses[-1], "state": outer.version.state_hash}


def with_ray(options: argparse.Namespace, config: dict[str, Any]) -> None:
    result = elastic.Trainer(
        train,
        config=config,
        scaling_config=elastic.ScalingConfig(
            num_peers=options.peers,
            ranks_per_peer=options.ranks,
            cpus_per_peer=options.ranks,
            gpus_per_peer=options.ranks if torch.cuda.is_available() else 0,
        ),
        run_config=elastic.RunConfig(
            name=options.name, storage_path=options.storage, policy=elastic.RunPolicy(rounds=options.rounds)
        ),
    ).fit()
    for peer in result.peers:
        print(json.dumps(peer.trained.result if peer.trained else {"peer": peer.name, "error": peer.reason}))


def with_torchrun(config: dict[str, Any]) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    with elastic.Peer(process_group=dist.group.WORLD) as peer:
        facts = train(peer, config)
    if dist.get_rank() == 0:
        print(json.dumps(facts))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small transformer with FSDP2 in several peers.")
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2, help="processes of each peer, a GPU for each if there are any")
    parser.add_argument("--rounds", type=int, default=10, help="how many rounds to train")
    parser.add_argument("--sync-every", type=int, default=10, help="steps between rounds")
    parser.add_argument("--name", default="fsdp", help="of the run")
    parser.add_argument("--storage", default="~/elastic_results", help="folder for the run's folder")
    parsed = parser.parse_args()
    training = {"sync_every": parsed.sync_every, "batch_size": 4}
    if "ELASTIC_JOIN" in os.environ:
        with_torchrun(training)
    else:
        with_ray(parsed, training)

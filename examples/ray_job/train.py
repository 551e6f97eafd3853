"""Two peers tell two spirals apart, as a job of a Ray. Run: elastic submit train.py, or see README.md."""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import elastic


def spirals(count: int, noise: float = 0.05, seed: int = 0) -> torch.utils.data.TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 2, (count,), generator=draw)
    along = torch.rand(count, generator=draw)
    angle = 2.5 * math.pi * along + math.pi * which
    points = along.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], dim=1)
    return torch.utils.data.TensorDataset(points + noise * torch.randn(count, 2, generator=draw), which)


def train(peer: elastic.Peer, config: dict[str, Any]) -> float:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)
    )
    inner = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    points, which = spirals(1000, seed=1).tensors  # held out
    kept = elastic.Checkpoints(str(peer.storage_path / "checkpoints"), every=10, shared=True)
    accuracy, seen = 0.0, -1
    with elastic.DiLoCo(model, inner, peer, sync_every=20, checkpoints=kept) as outer:
        for batch, labels in peer.shards(spirals(20_000), batch_size=64):
            loss = torch.nn.functional.cross_entropy(model(batch), labels)
            loss.backward()
            inner.step()
            inner.zero_grad()
            if outer.version.number != seen:
                seen = outer.version.number
                with outer.evaluating(), torch.no_grad():
                    accuracy = (model(points).argmax(dim=1) == which).float().mean().item()
                peer.report(loss=loss.item(), metrics={"accuracy": accuracy})
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--storage", type=Path, default=Path("~/elastic_results"))
    arguments = parser.parse_args()
    policy = elastic.RunPolicy(rounds=arguments.rounds)
    result = elastic.Trainer(
        train,
        config={"lr": arguments.lr},
        scaling_config=elastic.ScalingConfig(num_peers=2),
        run_config=elastic.RunConfig(name="spirals", storage_path=arguments.storage, policy=policy),
    ).fit()
    print(f"accuracy {result.metrics['metrics']['accuracy']:.3f}; checkpoint {result.checkpoint}")

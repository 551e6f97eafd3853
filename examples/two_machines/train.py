"""What each peer of `elastic join` runs: a small network learns ten patterns under noise. README.md has the recipe."""

from typing import Any

import torch

import elastic

CLASSES, PIXELS = 10, 64


def patterns(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every machine, so that peers need only agree on who reads which samples."""
    ideal = torch.randn(CLASSES, PIXELS, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=noise)
    return ideal[labels] + 2.0 * torch.randn(count, PIXELS, generator=noise), labels


def train(peer: elastic.Peer, config: dict[str, Any]) -> dict[str, Any]:
    """Until the run has reached its target. config: sync_every, wire, hidden."""
    torch.set_num_threads(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, config.get("hidden", 512)),
        torch.nn.ReLU(),
        torch.nn.Linear(config.get("hidden", 512), CLASSES),
    )
    inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = torch.utils.data.TensorDataset(*patterns(20_000, seed=1))
    sync_every, wire = config.get("sync_every", 100), config.get("wire", "int8")
    with elastic.DiLoCo(model, inner, peer, sync_every=sync_every, wire=wire) as outer:
        for pixels, labels in peer.shards(data, batch_size=32):
            loss = torch.nn.functional.cross_entropy(model(pixels), labels)
            loss.backward()
            inner.step()
            inner.zero_grad()
            peer.report(loss=loss)
    pixels, labels = patterns(2_000, seed=2)
    right = (model(pixels).argmax(1) == labels).float().mean().item()
    print(
        f"{peer.name}: version {outer.version.number}, state {outer.version.state_hash}, {right:.1%} right", flush=True
    )
    return {"version": outer.version.number, "state_hash": outer.version.state_hash, "right": right}

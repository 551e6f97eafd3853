"""What the peers of a trainer's test do. And a driver, which tests signal and kill:

python trainees.py RUN FOLDER FUNCTION FEWEST MOST
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

import elastic

WORDS = "has no such file: data.bin"


class NotThere(Exception):
    """Of a class that only the peers and the driver know."""


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index)])


def learns(peer: elastic.Peer, config: dict[str, Any]) -> dict[str, Any]:
    """Reads every sample once, at leisure; once the gate is there, the run is over two rounds later."""
    torch.set_num_threads(1)
    assert peer.storage_path is not None
    gate, steps, model = Path(config["gate"]), 0, torch.nn.Linear(1, 1)
    inner = torch.optim.SGD(model.parameters(), lr=1e-6)
    checkpoints = elastic.Checkpoints(str(peer.storage_path / "checkpoints"), every=1, shared=True)
    with elastic.DiLoCo(model, inner, peer, sync_every=4, checkpoints=checkpoints) as outer:
        for batch in peer.shards(Numbers(config["samples"]), batch_size=2, shard_size=20, epochs=1):
            loss = model(batch / config["samples"]).square().mean()
            loss.backward()
            inner.step()
            inner.zero_grad()
            steps += 1
            peer.report(loss=loss.item(), metrics={"steps": steps})
            time.sleep(config["pause"])
            if gate.exists():
                peer.run_until(rounds=peer.progress.rounds + 2)
                gate = Path("/nowhere")
    return {"life": peer.life, "steps": steps, "version": outer.version.number}


def one_raises(peer: elastic.Peer, config: dict[str, Any]) -> Any:
    """local-1 does, with a class that its supervisor cannot know, once the others have seen it."""
    peer.wait_for(2)
    assert peer.storage_path is not None
    seen = peer.storage_path / "local-1.seen"
    if peer.name != "local-1":
        seen.touch()
        return learns(peer, config)
    while not seen.exists():
        time.sleep(0.01)
    raise NotThere(f"{peer.name} {WORDS}")


def never_hears(peer: elastic.Peer, config: dict[str, Any]) -> None:
    """Does not care about being asked to end."""
    peer.wait_for(1)
    time.sleep(1000)


def config_in(folder: Path, *, samples: int = 100_000, pause: float = 0.05) -> dict[str, Any]:
    return {"gate": str(folder / "gate"), "samples": samples, "pause": pause}


def main(run: str, folder: Path, function: str, fewest: int, most: int) -> None:
    result = elastic.Trainer(
        globals()[function],
        config=config_in(folder),
        scaling_config=elastic.ScalingConfig(num_peers=(fewest, most)),
        run_config=elastic.RunConfig(name=run, storage_path=folder, drain_seconds=8.0),
    ).fit()
    print(f"ended with {len(result.metrics_history)} entries")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))

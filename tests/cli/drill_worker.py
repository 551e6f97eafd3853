"""A peer of a drill: trains until it is told where to end, and writes down all that it gives and all that it holds."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from elastic.checkpoints import Checkpoints
from elastic.outer.diloco import DiLoCo
from elastic.outer.optimizers import SGD
from elastic.peer import Peer

ELEMENTS = 400  # enough for each peer to own a part
STEP_SECONDS = 0.01


class Well(torch.nn.Module):
    """Half the squared distance to a point that differs from peer to peer, and moves about."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(ELEMENTS))
        self.noise = torch.Generator().manual_seed(seed)

    def forward(self) -> torch.Tensor:
        return 0.5 * (self.x - torch.randn(ELEMENTS, generator=self.noise)).square().sum()


def main(address: str, name: str, folder: Path) -> None:
    pause = threading.Event().wait
    with (folder / f"{name}.said").open("a") as file, Peer(address, run="drill", name=name, events_dir=folder) as peer:

        def say(**fields: Any) -> None:
            file.write(json.dumps(fields) + "\n")
            file.flush()

        model = Well(int(name[1:]) + 1000 * peer.life)
        inner = torch.optim.SGD(model.parameters(), lr=0.05)
        where = Checkpoints(str(folder / "checkpoints" / name), every=1)
        with DiLoCo(model, inner, peer, sync_every=4, outer=SGD(lr=0.5), checkpoints=where) as loop:
            launch = loop.replica.launch

            def noted() -> Any:
                flight = launch()
                say(base=flight.base.number, payload=flight.payload.numpy().tobytes().hex(), weight=flight.weight)
                return flight

            loop.replica.launch = noted  # type: ignore[method-assign]
            told, seen = 0, -1
            while not loop.finished:
                pause(STEP_SECONDS)
                inner.zero_grad()
                model().backward()
                inner.step()
                if loop.version.number != seen:
                    seen = loop.version.number
                    say(
                        version=seen,
                        hash=loop.version.state_hash,
                        outer=loop.version.parameters.numpy().tobytes().hex(),
                    )
                if not told and (folder / "end").exists():
                    told = int((folder / "end").read_text())
                    peer.run_until(rounds=told)
        say(ended=True, version=loop.version.number, hash=loop.version.state_hash)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))

"""One rank of a peer, in a process of its own, for tests: `python rank_worker.py ORDER`, ORDER being JSON.

ORDER: scenario, address, name, rank, size, folder (for files of this rank). Writes what it found to RANK.json.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset

import elastic
from collectives import Group, LinkOptions, Progress

SAMPLES, SHARD, GLOBAL_BATCH = 241, 32, 16


class Numbered(Dataset[Any]):
    """Samples that know their number: (number, features, target)."""

    def __init__(self) -> None:
        self.x = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(3))

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return index, self.x[index], self.x[index].sum().unsqueeze(0)


class Stream(IterableDataset[Any]):
    def __init__(self) -> None:
        self.samples = Numbered()

    def __iter__(self) -> Iterator[Any]:
        return (self.samples[index] for index in range(SAMPLES))


def model_of(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))


def batches_of(peer: elastic.Peer, kind: str, size: int, epochs: int) -> Iterator[Any]:
    if kind == "stream":
        return peer.shards(Stream(), batch_size=size, shard_size=SHARD, epochs=epochs)
    if kind == "loader":
        return loaded(peer, size, epochs)
    return peer.shards(Numbered(), batch_size=size, shard_size=SHARD, epochs=epochs)


def loaded(peer: elastic.Peer, size: int, epochs: int) -> Iterator[Any]:
    dataset = Numbered()
    loader = DataLoader(
        dataset, batch_sampler=peer.sampler(dataset, size, shard_size=SHARD, epochs=epochs), num_workers=2
    )
    while not peer.progress.finished:
        yield from loader


def train(
    peer: elastic.Peer, model: torch.nn.Module, *, data: str = "map", epochs: int = 2, size: int = 1, **loop: Any
) -> dict[str, Any]:
    """Trains to the end of the data. What this process has seen and is left with."""
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    seen: list[list[int]] = []
    states: list[tuple[int, int, str]] = []
    with elastic.DiLoCo(model, inner, peer, sync_every=3, **loop) as outer:
        for numbers, x, y in batches_of(peer, data, GLOBAL_BATCH // size, epochs):
            torch.nn.functional.mse_loss(model(x), y).backward()
            inner.step()
            inner.zero_grad()
            seen.append(numbers.tolist())
            states.append((outer.steps, outer.version.number, outer.version.state_hash))
            with outer.evaluating():
                pass
    return {
        "seen": seen,
        "states": states,
        "parameters": flat(model),
        "version": outer.version.number,
        "state_hash": outer.version.state_hash,
        "contributors": outer.last_commit.contributors if outer.last_commit else (),
        "progress": [peer.progress.rounds, peer.progress.tokens, peer.progress.finished],
        "stopping": peer.stopping,
    }


def flat(model: torch.nn.Module) -> str:
    wholes = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return digest(torch.cat([whole.detach().reshape(-1) for whole in wholes]))


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


# --- scenarios --------------------------------------------------------------------------------------------------------


def replicated(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    model = DistributedDataParallel(model_of(seed=7))
    return train(peer, model, data=order["data"], size=order["size"])


def sharded(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    model = model_of(seed=7)
    fully_shard(model, mesh=init_device_mesh("cpu", (order["size"],)))
    return train(peer, model, size=order["size"])


def saved(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    """Four rounds with checkpoints, or what is restored of them: what this rank is left with, or begins with."""
    model = model_of(seed=7)
    if order["sharded"]:
        fully_shard(model, mesh=init_device_mesh("cpu", (order["size"],)))
    else:
        model = DistributedDataParallel(model)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    if not order["restored"]:
        torch.manual_seed(1000 + order["rank"])  # each rank's generator stands elsewhere
    with elastic.DiLoCo(model, inner, peer, sync_every=3, checkpoints=order["checkpoints"]) as outer:
        if order["restored"]:
            return state_of(inner, outer)
        for _, x, y in batches_of(peer, "map", GLOBAL_BATCH // order["size"], 0):
            torch.nn.functional.mse_loss(model(x), y).backward()
            inner.step()
            inner.zero_grad()
            if outer.version.number == 4:
                break
        return state_of(inner, outer)


def state_of(inner: torch.optim.Optimizer, outer: elastic.DiLoCo) -> dict[str, Any]:
    found: list[Any] = []
    for state in inner.state_dict()["state"].values():
        average = state["exp_avg"]
        found.append([float(state["step"]), digest(average.to_local() if hasattr(average, "to_local") else average)])
    return {
        "inner": found,
        "version": outer.version.number,
        "steps": outer.steps,
        "seed": torch.initial_seed(),
    }


def endless(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    """Trains until something happens; says so once a round is committed."""
    model = DistributedDataParallel(model_of(seed=7)) if order["wrapped"] else model_of(seed=7)
    inner = torch.optim.AdamW(model.parameters(), lr=0.01 if order["wrapped"] else 0.0)
    seen = []
    with elastic.DiLoCo(model, inner, peer, sync_every=3) as outer:
        for numbers, x, y in batches_of(peer, "map", GLOBAL_BATCH // order["size"], 0):
            torch.nn.functional.mse_loss(model(x), y).backward()
            inner.step()
            inner.zero_grad()
            seen += numbers.tolist()
            if outer.last_commit and peer.name in outer.last_commit.contributors:
                (Path(order["folder"]) / f"{order['rank']}.ready").touch()
            time.sleep(0.01)
    return {"steps": outer.steps, "seen": len(seen), "stopping": peer.stopping, "parameters": flat(model)}


def apart(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    """Each rank trains for itself: nobody has wrapped the model."""
    return {"failure": failure(lambda: train(peer, model_of(seed=7), size=order["size"]))}


def calls(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    """Every public call, together with one more peer that makes the same collectives."""
    rank = peer.ranks.rank
    facts: dict[str, Any] = {"view": peer.wait_for(n=2, timeout=30).names, "seen": peer.view.names, "name": peer.name}
    given = [torch.full((3,), 2.0 + 100 * rank), torch.full((2, 2), 4.0 + 100 * rank)]
    reduced = peer.all_reduce(given, op="mean", tag="list")
    facts["reduced"] = [tensor.tolist() for tensor in reduced.tensors]
    facts["views"] = reduced.tensors[0].untyped_storage().data_ptr() == reduced.tensor.untyped_storage().data_ptr()
    facts["contributors"] = reduced.contributors
    work = peer.all_reduce_async(torch.full((5000,), 1.0 + rank), tag="async")
    facts["async"] = [work.wait(30).tensor.sum().item(), work.done()]
    facts["gathered"] = [t.tolist() for t in peer.all_gather(torch.arange(rank + 2), tag="gather").tensors]
    facts["broadcast"] = peer.broadcast(torch.ones(2) * (rank + 5), root="lone", tag="cast").tensor.tolist()
    scattered = peer.reduce_scatter(torch.ones(7), tag="scatter")
    facts["scattered"] = [scattered.tensor.tolist(), scattered.start, scattered.stop]
    facts["met"] = peer.barrier(tag="met").contributors
    peer.run_until(rounds=77)
    facts["targets"] = peer.progress.targets
    facts["members"] = peer.statistics().members
    facts["errors"] = [failure(lambda: peer.all_reduce(torch.ones(1), op="no"))]  # type: ignore[arg-type]
    facts["errors"].append(failure(lambda: peer.wait_for(n=9, timeout=0.01)))
    facts["thread"] = in_thread(lambda: failure(lambda: peer.barrier()))
    facts["apart"] = failure(lambda: peer.barrier() if rank else peer.wait_for(n=1))
    return facts


def wide_of(seed: int) -> torch.nn.Module:
    """Of enough parameters for ranks to share a round, of half of them, too."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 600), torch.nn.Tanh(), torch.nn.Linear(600, 600), torch.nn.Linear(600, 1)
    )


def laned(peer: elastic.Peer, order: dict[str, Any]) -> dict[str, Any]:
    """Trains a model that is sharded among the ranks, on numbers of its own, until the run is over.

    beside: begins when so many peers are there. The run ends after so many rounds `together`, of both, or then `alone`.
    """
    peer.wait_for(n=order.get("beside", 1))
    model = wide_of(seed=7)
    if order["size"] > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (order["size"],)))
    inner = torch.optim.SGD(model.parameters(), lr=0.01)
    drawn = torch.Generator().manual_seed(sum(order["name"].encode()) + order["rank"])
    joint: set[int] = set()
    loop = order.get("loop", {})
    if "combine" in loop:
        loop["combine"] = getattr(elastic, loop["combine"])(byzantine=0)
    kind = elastic.StreamingDiLoCo if "sync_delay" in loop else elastic.DiLoCo
    with kind(model, inner, peer, sync_every=4, **loop) as outer:
        watch(peer, order, joint)
        while not peer.stopping:
            x = torch.randn(8, 6, generator=drawn)
            torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).backward()
            inner.step()
            inner.zero_grad()
            commit = outer.last_commit
            if commit and len(commit.contributors) > 1:
                joint.add(commit.round)
            if commit and (peer.name in commit.contributors or len(joint) > 1):
                (Path(order["folder"]) / f"{order['rank']}.ready").touch()
            alone = commit.round - max(joint) if commit and joint else 0
            if len(joint) == order.get("together") or alone == order.get("alone"):
                peer.run_until(rounds=1)
    return {
        "state_hash": outer.version.state_hash,
        "version": outer.version.number,
        "parameters": flat(model),
        "joint": len(joint),
        "attempts": peer.statistics().group.failed,
    } | carried(peer)


def carried(peer: elastic.Peer) -> dict[str, Any]:
    """What this rank's own links have moved, and on the leader what the peer has."""
    group = peer.group if peer.ranks.leads else peer.lane.group if peer.lane else None
    total = peer.statistics().group.bytes_sent
    if group is None:
        return {"sent": 0, "received": 0, "total": total}
    own = Group.statistics(group)
    return {"sent": own.bytes_sent, "received": own.bytes_received, "total": total}


def watch(peer: elastic.Peer, order: dict[str, Any], joint: set[int]) -> None:
    """In the middle of an exchange of this rank's own, once both peers have been in one: it is killed, or stops."""
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}.get(order.get("fate", ""))
    if number is None or order["rank"] != order["victim"]:
        return
    group = peer.group if peer.ranks.leads else peer.lane.group

    def observe(progress: Progress) -> None:
        if joint and 0 < progress.chunks_received < progress.chunks_expected:
            group.observer = None
            (Path(order["folder"]) / "fate").touch()
            os.kill(os.getpid(), number)

    group.observer = observe


def failure(call: Any) -> list[str]:
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return []


def in_thread(call: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    order = json.loads(sys.argv[1])
    folder = Path(order["folder"])
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=order["rank"], world_size=order["size"])
    facts: dict[str, Any] = {}
    try:
        with elastic.Peer(
            order["address"],
            run="test",
            name=order["name"],
            timeouts=elastic.Timeouts(**order["timeouts"]),
            events_dir=folder,
            process_group=dist.group.WORLD,
            lanes=order.get("lanes"),
            options=LinkOptions(**order.get("options", {})),
        ) as peer:
            facts = globals()[order["scenario"]](peer, order)
    except elastic.ElasticError as error:
        facts["raised"] = [type(error).__name__, str(error)]
    (folder / f"{order['rank']}.json").write_text(json.dumps(facts))
    sys.exit(1 if "raised" in facts else 0)


if __name__ == "__main__":
    main()

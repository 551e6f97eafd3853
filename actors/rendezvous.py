"""How the ranks of one peer find each other on their node: to the script, as if torchrun had started them."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore  # where torch.distributed has it from

HOST = "127.0.0.1"  # all ranks are on one node, and their store asks nobody who he is


@dataclass(frozen=True, kw_only=True)
class Seat:
    """What a rank tells the others. port: of the store, if it leads. gpus: from Ray, as CUDA names them."""

    port: int = 0
    gpus: tuple[str, ...] = ()


def open_store(ranks: int) -> TCPStore:
    """On a free port, at which only this machine can call."""
    door = socket.create_server((HOST, 0))
    port = door.getsockname()[1]
    descriptor = door.detach()  # the store's own from here on
    return TCPStore(
        HOST, port, ranks, is_master=True, wait_for_workers=False, master_listen_fd=descriptor, use_libuv=True
    )


def gpus_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name)


def take_seat(rank: int, seats: Sequence[Seat]) -> None:
    """Before anything looks at the environment, or at CUDA: this process becomes that rank."""
    os.environ.update(environment_of(rank, seats))
    # all that the name of this host stands for need not be an address that it can call itself at
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if seats[rank].gpus:
        torch.cuda.set_device(rank)


def environment_of(rank: int, seats: Sequence[Seat]) -> dict[str, str]:
    """What torchrun would set. The GPUs of all ranks are visible to each, its own first one under its local rank."""
    rounds = zip(*(seat.gpus for seat in seats), strict=True)
    gpus = [gpu for round in rounds for gpu in round]
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(len(seats))),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(seats[0].port),
    } | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def meet(rank: int, seats: Sequence[Seat], store: TCPStore | None) -> dist.ProcessGroup:
    """The group of all ranks, the default one of this process. store: the leader's own, which must live on with it."""
    store = store or TCPStore(HOST, seats[0].port, len(seats), is_master=False, wait_for_workers=False)
    backend = "cpu:gloo,cuda:nccl" if seats[rank].gpus else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=len(seats))
    group = dist.group.WORLD
    assert group is not None
    return group

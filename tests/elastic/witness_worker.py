"""A peer that trains in a process of its own, for tests: `python witness_worker.py ADDRESS NAME FOLDER`.

Says, on a line, what processes there are. Lines that it reads are what its next inner step does meanwhile: "hold 3"
(in C, with Python's lock), "sleep 3", "fork" (a child that lives on); "leave" ends it.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import sys
import threading
import time

import torch

import elastic
from elastic.config import Timeouts

TIMES = Timeouts(heartbeat=0.1, chunk=1.5, operation=30, round=60, grace=20, evict_after=30, hang=1.5)


def serve(address: str, name: str, folder: str) -> None:
    orders: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    with elastic.Peer(address, run="test", name=name, timeouts=TIMES, events_dir=folder, witness=True) as peer:
        assert peer._witness is not None
        say(pid=os.getpid(), witness=peer._witness.pid)
        threading.Thread(target=lambda: [orders.put(line.split()) for line in sys.stdin], daemon=True).start()
        train(peer, orders)


def train(peer: elastic.Peer, orders: queue.SimpleQueue[list[str]]) -> None:
    model = torch.nn.Linear(4, 1)
    inner = torch.optim.SGD(model.parameters(), lr=1e-3)
    with elastic.DiLoCo(model, inner, peer, sync_every=100_000):
        while True:
            model(torch.ones(2, 4)).sum().backward()
            time.sleep(0.02)
            if not orders.empty() and not obey(*orders.get()):
                return
            inner.step()


def obey(order: str, seconds: str = "0") -> bool:
    if order == "hold":
        ctypes.PyDLL(None).sleep(int(seconds))
    elif order == "sleep":
        time.sleep(float(seconds))
    elif order == "fork":
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        say(child=child)
    return order != "leave"


def say(**fields: int) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])

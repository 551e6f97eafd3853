"""A peer for tests with real processes. Reads orders as JSON lines, answers as JSON lines.

run: {"start": ..., "seed": int, "kill_at": int | null, "stop_at": int | null} - after so many received chunks it kills
or stops itself; {"abort": ...}; the answer to a run is its outcome and the digest of the source afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

import torch
from plane import SMALL, numbers, start_from_json
from xxhash import xxh3_128_hexdigest

from collectives import Abort, Done, Group, Progress

_fatal: dict[int, signal.Signals] = {}
_lock = threading.Lock()


def observe(progress: Progress) -> None:
    if (number := _fatal.get(progress.chunks_received)) is not None:
        os.kill(os.getpid(), number)


def say(**answer: Any) -> None:
    with _lock:
        print(json.dumps(answer), flush=True)


def run(group: Group, order: dict[str, Any]) -> None:
    start = start_from_json(order["start"])
    for field, number in (("kill_at", signal.SIGKILL), ("stop_at", signal.SIGSTOP)):
        if order.get(field) is not None:
            _fatal[order[field]] = number
    source, result = numbers(start.elements, order["seed"]), torch.empty(start.elements)
    before = xxh3_128_hexdigest(source.numpy().data)
    outcome = group.run(start, source, result)
    say(
        done=isinstance(outcome, Done),
        digest=outcome.digest if isinstance(outcome, Done) else "",
        lost=[] if isinstance(outcome, Done) else [asdict(each) for each in outcome.lost],
        reason="" if isinstance(outcome, Done) else outcome.reason,
        source_kept=xxh3_128_hexdigest(source.numpy().data) == before,
    )


def main() -> None:
    group = Group(run="run", name=sys.argv[1], incarnation=int(sys.argv[2]), options=SMALL, observe=observe)
    say(addresses=group.addresses)
    for line in sys.stdin:
        order = json.loads(line)
        if "abort" in order:
            group.abort(Abort(**{**order["abort"], "lost": tuple(order["abort"]["lost"])}))
        else:
            threading.Thread(target=run, args=(group, order), daemon=True).start()
    group.close()


if __name__ == "__main__":
    main()

"""A process that publishes a blob, or fetches one and kills itself on the way. Orders and answers are JSON lines.

publish MIB SEED: answers with its member, the digest and the blob's size; ends with its standard input.
fetch MIB SEED: reads the members to fetch from; kills itself with SIGKILL once it has a quarter of the blob.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict

import numpy as np
from plane import SMALL
from xxhash import xxh3_128_hexdigest

from collectives import Group, Member


def content(mib: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(mib << 20)


def die_on_the_way(here: int, total: int) -> None:
    if here >= total // 4:
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    what, mib, seed, incarnation = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    data = content(mib, seed)
    digest = xxh3_128_hexdigest(data)
    with Group(run="run", name=f"q{incarnation}", incarnation=incarnation, options=SMALL) as group:
        if what == "publish":
            group.publish("k", [memoryview(data)], digest)
            print(json.dumps(asdict(group.member)), flush=True)
            sys.stdin.read()
        else:
            members = [Member(**{**each, "addresses": tuple(each["addresses"])}) for each in json.loads(input())]
            group.fetch("k", members, digest=digest, timeout=60, progress=die_on_the_way)


if __name__ == "__main__":
    main()

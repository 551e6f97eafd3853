"""What an all-reduce needs besides its source and its result: peak of resident memory (VmHWM), per process.

The peak is begun anew before each operation (clear_refs), read after it. Source and, for a group, result are resident
before; a peer makes the result itself, and that is taken off.

    python -m benchmarks.memory --json memory.json
"""

from __future__ import annotations

import argparse

from benchmarks import common
from benchmarks.allreduce import known
from benchmarks.common import MIB, Report

PEERS = 3


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.sizes, default=common.sizes("64,256"), help="MiB, e.g. 64,256")
    parser.add_argument("--wires", default="f32", help="e.g. f32,int8")
    parser.add_argument("--stripes", type=int, help="TCP connections per link (default: ours)")
    arguments = parser.parse_args()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    columns = ("side", "wire", "size", "MiB extra, first operation", "MiB extra: median (min-max)", "to reach")
    report = Report("memory", f"Memory of an all-reduce beyond source and result, {PEERS} peers, loopback", columns)
    links = known(shared_memory=False, stripes=arguments.stripes)
    for elements in arguments.sizes:
        for side in ("group", "peer"):
            for wire in arguments.wires.split(","):
                with common.local_team(PEERS) as team:  # a new one: the first operation makes buffers that then stay
                    if side == "group":
                        team.add_group(side, **links)
                    else:
                        team.add_peers(side, team.coordinate({"min_peers": PEERS, "quorum": 1.0}), links=links)
                    extra = []
                    for _ in range(arguments.repeat + 1):
                        sample = team.operate(side, elements, memory=True, start={"wire": wire})
                        extra.append(max(answer["extra_bytes"] for answer in sample.answers))
                first, rest = extra[0] / MIB, common.spread(extra[1:], 1 / MIB)
                report.add(
                    (side, wire, common.mib(elements), f"{first:.1f}", rest, "< 64 MiB"),
                    elements=elements,
                    extra_bytes=extra,
                )
    report.notes.append(
        "The largest of the three processes counts. With shared memory, its pages count in each of them."
    )
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

"""What an all-reduce needs besides its source and its result: peak of resident memory (VmHWM), per process.

The peak is begun anew before each operation (clear_refs), read after it, and compared with what was resident before
the first one: source and, for a group, result. A peer makes the result itself, and that is taken off. What is still
resident 1.5 s after an operation, when its result has been dropped, stands in a column of its own.

    python -m benchmarks.memory --json memory.json
"""

from __future__ import annotations

import argparse

from benchmarks import common
from benchmarks.allreduce import known
from benchmarks.common import MIB, Report, Sample

PEERS = 3


def add(report: Report, side: str, wire: str, elements: int, samples: list[Sample]) -> None:
    extra = [max(answer["extra_bytes"] for answer in sample.answers) for sample in samples]
    kept = [max(answer["idle_bytes"] for answer in sample.answers) for sample in samples[1:]]
    numbers = (f"{extra[0] / MIB:.1f}", common.spread(extra[1:], 1 / MIB), common.spread(kept, 1 / MIB))
    report.add(
        (side, wire, common.mib(elements), *numbers, "< 64 MiB"), elements=elements, extra_bytes=extra, kept_bytes=kept
    )


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", type=common.sizes, default=common.sizes("64,256"), help="MiB, e.g. 64,256")
    parser.add_argument("--wires", default="f32", help="e.g. f32,int8")
    parser.add_argument("--stripes", type=int, help="TCP connections per link (default: ours)")
    arguments = parser.parse_args()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    columns = (
        "side",
        "wire",
        "size",
        "MiB extra, first operation",
        "MiB extra: median (min-max)",
        "MiB kept",
        "to reach",
    )
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
                    names = [worker.name for worker in team.workers]
                    order = {"memory": True, "names": names, "start": {"wire": wire}}
                    samples = [team.operate(side, elements, **order) for _ in range(arguments.repeat + 1)]
                add(report, side, wire, elements, samples)
    report.notes.append(
        "The largest of the three processes counts. With shared memory, its pages count in each of them."
    )
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

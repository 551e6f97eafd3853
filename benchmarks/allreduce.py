"""All-reduce of float32 among three processes on one machine, over TCP on loopback, beside gloo.

All sides live in the same three processes and take turns. gloo runs twice: with the congestion control that the host
gives it, and with ours, which its sockets are told through their descriptors once they are there.

    python -m benchmarks.allreduce --json allreduce.json
    python -m benchmarks.allreduce --sizes 0.25 --repeat 3 --warm 1        # a quick look
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import common
from benchmarks.common import Report, Team

PEERS = 3


@dataclass(frozen=True)
class Side:
    """One column of the comparison. cc: what the kernel says that its sockets use."""

    name: str
    title: str
    cc: str


def known(**options: object) -> dict[str, object]:
    """Those that were given: the others stay as they are by default."""
    return {name: value for name, value in options.items() if value is not None}


def assemble(team: Team, arguments: argparse.Namespace, system: str, cc: str) -> Iterator[Side]:
    """Opens the sides one after the other: each one's sockets are looked at before the next one's exist."""
    tcp = known(shared_memory=False, stripes=arguments.stripes, chunk_bytes=arguments.chunk)
    team.add_gloo("gloo")
    yield Side("gloo", "gloo as it comes", team.settle("gloo"))
    if cc != system:
        team.add_gloo("gloo-cc")
        yield Side("gloo-cc", "gloo, our cc", team.settle("gloo-cc", cc))
        team.add_group("group-system", **tcp)
        yield Side("group-system", "group, system cc", team.settle("group-system"))
    team.add_group("group", **tcp, congestion_control=cc)
    yield Side("group", "group", team.settle("group"))
    address = team.coordinate({"min_peers": PEERS, "quorum": 1.0})
    team.add_peers("peer", address, links={**tcp, "congestion_control": cc})
    yield Side("peer", "peer.all_reduce", team.settle("peer", cc))
    team.add_group("plain", **tcp, congestion_control=cc, checksum=False)
    yield Side("plain", "group, no checksums", team.settle("plain"))
    team.add_group("memory", **known(stripes=arguments.stripes), congestion_control=cc)
    yield Side("memory", "group, shared memory", "-")


def measure(team: Team, sides: list[Side], elements: int, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds by side; who begins moves on with every repetition."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for turn in range(arguments.warm + arguments.repeat):
        first = turn % len(sides)
        for side in sides[first:] + sides[:first]:
            sample = team.operate(side.name, elements)
            if turn >= arguments.warm:
                seconds[side.name].append(sample.seconds)
    return seconds


def fill(report: Report, sides: list[Side], elements: int, seconds: dict[str, list[float]]) -> None:
    for side in sides:
        same = next((each.name for each in sides if each.name.startswith("gloo") and each.cc == side.cc), "")
        ours = not side.name.startswith("gloo")
        cells = (
            common.mib(elements),
            side.title,
            side.cc,
            common.spread(seconds[side.name], 1e3),
            common.ratio(seconds["gloo"], seconds[side.name]) if ours else "",
            common.ratio(seconds[same], seconds[side.name]) if ours and same else "",
        )
        report.add(cells, side=side.name, elements=elements, cc=side.cc, seconds=seconds[side.name])
    cost = [peer - bare for peer, bare in zip(seconds["peer"], seconds["group"], strict=True)]
    report.notes.append(
        f"{common.mib(elements)}: the round protocol adds {common.spread(cost, 1e3, 2)} ms to the group"
    )
    if "plain" in seconds:
        costs = [100 * (whole / plain - 1) for whole, plain in zip(seconds["group"], seconds["plain"], strict=True)]
        report.notes.append(f"{common.mib(elements)}: checksums cost {common.spread(costs)} % (median of neighbours)")


def main() -> None:
    parser = common.parser(__doc__, repeat=15)
    parser.add_argument("--sizes", type=common.sizes, default=common.sizes("1,16,64"), help="MiB, e.g. 1,16,64")
    parser.add_argument("--warm", type=int, default=3, metavar="N", help="operations first that do not count")
    parser.add_argument("--cc", default="cubic", help="our congestion control (default cubic); 'system' for the host's")
    parser.add_argument("--stripes", type=int, help="TCP connections per link (default: ours)")
    parser.add_argument("--chunk", type=int, metavar="BYTES", help="LinkOptions.chunk_bytes (default: ours)")
    arguments = parser.parse_args()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    system = common.system_congestion_control()
    cc = system if arguments.cc == "system" else arguments.cc
    report = Report(
        "allreduce",
        f"All-reduce of float32, {PEERS} peers, loopback",
        ("size", "side", "cc", "ms: median (min-max)", "x gloo as it comes", "x gloo, same cc"),
    )
    with common.local_team(PEERS) as team:
        sides = list(assemble(team, arguments, system, cc))
        for elements in arguments.sizes:
            common.progress(common.mib(elements))
            fill(report, sides, elements, measure(team, sides, elements, arguments))
    report.notes.append(
        "gloo works in place, and the copy that keeps its input is not counted; ours keeps the input. Every result was "
        "compared with the exact sum. A ratio is that of the medians (smallest and largest of neighbouring operations)."
    )
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

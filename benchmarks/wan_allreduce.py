"""All-reduce between sites of the emulated WAN, beside gloo on the same links. Needs root and /dev/net/tun.

    python -m benchmarks.wan_allreduce lossy3 --size 64 --settle 10 --gloo-size 8 --gloo-repeat 2
    python -m benchmarks.wan_allreduce wan3 --size 256 --wires f32,int8,int4+int8,int4+int4 --gloo-repeat 0
    python -m benchmarks.wan_allreduce asym4 --size 32 --patterns planned,worst,direct --gloo-repeat 0

The share of the bottleneck is the time that the busiest link needs for its bytes, at its rate less what headers take
of a packet, over the time measured: from call to return, and from the first data byte that arrives anywhere to the
return of the last peer. gloo, which goes around a ring, is measured by the same yardstick as the direct pattern.
"""

from __future__ import annotations

import argparse
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

from benchmarks import common
from benchmarks.allreduce import known
from benchmarks.common import Report, Team
from benchmarks.wan.wan import DEV, Topology, Wan, WanError
from collectives.topology import Matrix, plan, ring_plan
from collectives.tuning import fine_chunk

BITS = {"f32": 32, "bf16": 16, "f16": 16, "int8": 8, "int4": 4, "e3m0": 4}
# Of a packet, what is left for data: 20 bytes of IP, 20 of TCP and 12 of its timestamps go.
HEADERS = 52
# So many bytes on one link are more than what idle connections and greetings send in the time it takes to begin.
DATA_BYTES = 20_000


@dataclass(frozen=True)
class Side:
    """One row. team_name: which group or process group runs it; start: fields of its Starts."""

    title: str
    team_name: str
    cc: str
    elements: int
    wire: str = "f32"
    pattern: str = "direct"
    start: dict[str, Any] = field(default_factory=dict)
    repeat: int = 7


@dataclass(frozen=True)
class Result:
    """One operation. seconds: from call to return; moving: from the first data byte that arrived to the return.

    cpu: seconds of processor time that the busiest peer took.
    """

    seconds: float
    moving: float
    stripes: tuple[int, ...]
    threads: int
    error: float
    cpu: float


class FirstByte(threading.Thread):
    """Asks the emulator for its counters until data has arrived on some link. at: time.monotonic() of that."""

    def __init__(self, wan: Wan) -> None:
        super().__init__(daemon=True)
        self.at: float | None = None
        self._wan = wan
        self._stopping = threading.Event()
        self._before = self._delivered()

    def _delivered(self) -> dict[tuple[str, str], int]:
        return {(link["from"], link["to"]): link["out_bytes"] for link in self._wan.links()}

    def run(self) -> None:
        while not self._stopping.wait(0.004):
            now = self._delivered()
            if any(now[link] - before > DATA_BYTES for link, before in self._before.items()):
                self.at = time.monotonic()
                return

    def stop(self) -> float | None:
        self._stopping.set()
        self.join()
        return self.at


def usable(topology: Topology, link: dict[str, Any]) -> float:
    """Bytes of data per second that a link can carry; 0 for an unlimited one."""
    return float(link["rate_mbit"]) * 1e6 / 8 * (topology.mtu - HEADERS) / topology.mtu


def ideal_seconds(topology: Topology, side: Side) -> float:
    """What the busiest link needs for the bytes that the pattern puts on it."""
    sites = topology.sites
    worst = 0.0
    for (a, b), link in topology.links.items():
        if link["rate_mbit"]:
            load = side.elements / 8 * bits_between(side, sites.index(a), sites.index(b), len(sites))
            worst = max(worst, load / usable(topology, link))
    return worst


def bits_between(side: Side, i: int, j: int, count: int) -> float:
    """Bits per element of the tensor that the contributor i sends to j."""
    scatter, gather = (BITS[name] for name in wires_of(side.wire))
    shares = side.start.get("shares") or [1 / count] * count
    order, parents = side.start.get("order"), side.start.get("parents")
    if order:  # what i owns ends its way of sums there, and what j owns begins its way back there
        follows = order[(order.index(i) + 1) % count] == j
        return scatter * (1 - shares[i]) + gather * (1 - shares[j]) if follows else 0.0
    if parents:
        return float(scatter * (parents[i] == j) + gather * (parents[j] == i))
    return scatter * float(shares[j]) + gather * float(shares[i])


def wires_of(text: str) -> tuple[str, str]:
    """ "int4+int8": sent as int4, gathered as int8."""
    send, _, gather = text.partition("+")
    for name in (send, gather or send):
        if name not in BITS:
            raise common.BenchmarkError(f"no wire {name!r}: choose of {', '.join(BITS)}")
    return send, gather or send


def pattern_of(text: str, wire: str, topology: Topology, elements: int) -> dict[str, Any]:
    """Fields of a Start: "direct", "direct:0.5/0.3/0.2" (shares), "ring:acbd" (last letters of the sites), "planned"
    (what our planner makes of the topology's own rates and delays), "worst" (its slowest ring).
    """
    kind, _, detail = text.partition(":")
    if kind in ("planned", "worst"):
        return planned(kind, wire, topology, elements)
    if kind == "ring":
        letters = [site[-1] for site in topology.sites]
        if sorted(detail) != sorted(letters):
            raise common.BenchmarkError(f"{text!r} does not name every site once: {''.join(letters)}")
        return {"pattern": "ring", "order": [letters.index(letter) for letter in detail]}
    return {"shares": [float(each) for each in detail.split("/")]} if detail else {}


def planned(kind: str, wire: str, topology: Topology, elements: int) -> dict[str, Any]:
    """The best plan, or the slowest of all rings with the best shares for it."""
    sites = topology.sites
    matrix = Matrix(
        names=tuple(sites),
        bandwidth=_table(sites, lambda a, b: usable(topology, topology.links[a, b])),
        rtt=_table(sites, lambda a, b: (topology.links[a, b]["delay_ms"] + topology.links[b, a]["delay_ms"]) / 1000),
    )
    factors = [BITS[name] / 32 for name in wires_of(wire)]
    job: dict[str, Any] = {"nbytes": 4 * elements, "scatter_factor": factors[0], "gather_factor": factors[1]}
    if kind == "planned":
        found = plan(matrix, lossless=wire == "f32", **job)
    else:
        rings = (ring_plan(matrix, (0, *rest), **job) for rest in permutations(range(1, len(sites))))
        found = max(rings, key=lambda each: each.seconds)
    fields = {"pattern": found.pattern, "shares": found.shares, "order": found.order, "parents": found.parents}
    return {name: value for name, value in fields.items() if value}


def _table(sites: Sequence[str], value: Callable[[str, str], float]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(value(a, b) if a != b else 0.0 for b in sites) for a in sites)


def assemble(team: Team, topology: Topology, arguments: argparse.Namespace) -> list[Side]:
    """Opens groups for every congestion control and number of stripes, and their rows."""
    sides = []
    for cc in arguments.cc.split(","):
        for stripes in arguments.stripes.split(","):
            number = int(stripes) if stripes.isdecimal() else stripes
            name = f"group-{cc}-{stripes}"
            team.add_group(name, **known(stripes=number, chunk_bytes=arguments.chunk), congestion_control=cc)
            base = Side(
                f"group, stripes {stripes}", name, team.settle(name), arguments.size[0], repeat=arguments.repeat
            )
            sides += rows(base, topology, arguments)
        if arguments.gloo_repeat:
            elements = (arguments.gloo_size or arguments.size)[0]
            team.add_gloo(f"gloo-{cc}")
            used = team.settle(f"gloo-{cc}", cc)
            sides.append(Side("gloo", f"gloo-{cc}", used, elements, pattern="", repeat=arguments.gloo_repeat))
    return sides


def rows(base: Side, topology: Topology, arguments: argparse.Namespace) -> list[Side]:
    """One for each pattern and wire."""
    made = []
    for pattern in arguments.patterns.split(","):
        for wire in arguments.wires.split(","):
            send, gather = wires_of(wire)
            start = {
                "wire": send,
                "chunk_bytes": cut(topology, send),
                **pattern_of(pattern, wire, topology, base.elements),
            }
            if gather != send:
                start["gather_wire"] = gather
            title = pattern_title(pattern, start, topology)
            made.append(replace(base, wire=wire, pattern=title, start=start))
    return made


def cut(topology: Topology, wire: str) -> int:
    """How finely tensors are cut: as the coordinator would tell these sites to."""
    ways = [(topology.links[a, b], topology.links[b, a]) for a, b in topology.links]
    links = [((one["delay_ms"] + other["delay_ms"]) / 1000, usable(topology, one)) for one, other in ways]
    return fine_chunk(links, BITS[wire] / 32)


def pattern_title(text: str, start: dict[str, Any], topology: Topology) -> str:
    """What a plan came to, where that is not what was asked for."""
    if text not in ("planned", "worst"):
        return text
    detail = "".join(topology.sites[index][-1] for index in start.get("order", ()))
    return f"{text}: {start['pattern']} {detail}".rstrip()


def operate(team: Team, wan: Wan, side: Side) -> Result:
    watch = FirstByte(wan)
    watch.start()
    try:
        order = {"start": side.start} if side.start else {}
        sample = team.operate(side.team_name, side.elements, **order)
    finally:
        first = watch.stop()
    links = [link for answer in sample.answers for link in answer.get("links", ())]
    return Result(
        sample.seconds,
        sample.ended - first if first else sample.seconds,
        tuple(sorted({link["stripes"] for link in links})),
        max(answer["threads"] for answer in sample.answers),
        max(answer["error"] for answer in sample.answers),
        max(sum(answer["cpu"].values()) for answer in sample.answers),
    )


def measure(team: Team, wan: Wan, sides: list[Side], arguments: argparse.Namespace) -> list[list[Result]]:
    """First the operations in which each side settles, in a row; then by turns, or in rows too if so ordered."""
    results: list[list[Result]] = [[] for _ in sides]

    def once(index: int) -> None:
        result = operate(team, wan, sides[index])
        results[index].append(result)
        side = sides[index]
        common.progress(f"{side.title} {side.cc} {side.wire} {side.pattern}: {result.seconds:.2f} s {result.stripes}")

    counts = [side.repeat + (arguments.settle if side.pattern else 0) for side in sides]
    for index, count in enumerate(counts):
        for _ in range(count if arguments.order == "row" else count - sides[index].repeat):
            once(index)
    while waiting := [index for index, count in enumerate(counts) if len(results[index]) < count]:
        for index in waiting:
            once(index)
    return results


def fill(report: Report, topology: Topology, sides: list[Side], results: list[list[Result]]) -> None:
    base: dict[str, float] = {}
    for side, all_results in zip(sides, results, strict=True):
        counted = all_results[-side.repeat :]
        ideal = ideal_seconds(topology, side)
        seconds, moving = [each.seconds for each in counted], [each.moving for each in counted]
        middle = statistics.median(seconds)
        base.setdefault(side.team_name + side.pattern, middle)
        times = base[side.team_name + side.pattern] / middle
        stripes = sorted({number for each in counted for number in each.stripes})
        cells = (
            side.title,
            side.cc,
            side.pattern or "its own ring",
            side.wire,
            common.mib(side.elements),
            "/".join(map(str, stripes)) or "1",
            str(max(each.threads for each in counted)),
            common.spread(seconds, 1, 2),
            f"{100 * ideal / middle:.0f} %",
            common.spread(moving, 1, 2),
            f"{100 * ideal / statistics.median(moving):.0f} %",
            f"{statistics.median(each.cpu for each in counted):.2f}",
            f"{times:.2f}",
            f"{max(each.error for each in counted):.2g}",
        )
        report.add(cells, ideal=ideal, seconds=seconds, moving=moving, elements=side.elements, start=side.start)
        ramp = " ".join(f"{each.seconds:.2f}/{'-'.join(map(str, each.stripes))}" for each in all_results)
        report.notes.append(f"{side.title} {side.cc} {side.wire} {side.pattern}, seconds/stripes in order: {ramp}")
    report.notes += compared(sides, results)


def compared(sides: list[Side], results: list[list[Result]]) -> list[str]:
    """How much faster each pattern is than the worst ring with the same wire and links."""
    seconds = [[each.seconds for each in found[-side.repeat :]] for side, found in zip(sides, results, strict=True)]
    lines = []
    for side, slow in zip(sides, seconds, strict=True):
        for other, fast in zip(sides, seconds, strict=True):
            same = (side.team_name, side.wire) == (other.team_name, other.wire)
            if same and side.pattern.startswith("worst") and side is not other:
                faster = f"{other.pattern} is {common.ratio(slow, fast)} times as fast as {side.pattern}"
                lines.append(f"{other.title} {other.cc} {other.wire}: {faster}")
    return lines


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("topology", help="lan3, wan3, lossy3, asym4, or a file")
    parser.add_argument("--size", type=common.sizes, default=common.sizes("64"), help="MiB of float32")
    parser.add_argument("--wires", default="f32", help="e.g. f32,int8,int4+int8")
    parser.add_argument("--patterns", default="direct", help="e.g. planned,worst,direct,direct:0.5/0.25/0.25,ring:acb")
    parser.add_argument("--cc", default="cubic", help="of both sides, e.g. cubic,bbr")
    parser.add_argument("--stripes", default="auto", help="per link, e.g. auto,2,8,16")
    parser.add_argument("--chunk", type=int, metavar="BYTES", help="LinkOptions.chunk_bytes (default: ours)")
    parser.add_argument("--settle", type=int, default=2, metavar="N", help="operations first that do not count")
    parser.add_argument(
        "--order", choices=("turns", "row"), default="turns", help="row: each side's operations in a row"
    )
    parser.add_argument("--gloo-size", type=common.sizes, metavar="MIB", help="where one connection is slow (same)")
    parser.add_argument("--gloo-repeat", type=int, default=2, metavar="N", help="0: no gloo")
    arguments = parser.parse_args()
    with common.one_line_errors():
        try:
            run(arguments)
        except WanError as error:
            raise common.BenchmarkError(str(error)) from None


def run(arguments: argparse.Namespace) -> None:
    name = arguments.topology
    topology = Topology.load(name if name.endswith(".json") else f"{name}.json")
    columns = (
        *("side", "cc", "pattern", "wire", "size", "stripes", "threads"),
        *(
            "s: median (min-max)",
            "share",
            "s from first byte",
            "share from first byte",
            "cpu s",
            "x first wire",
            "error",
        ),
    )
    with Wan(topology, f"bench{os.getpid()}", max_life=7200) as wan:
        launches = [partial(launch_at, wan, site) for site in wan.sites]
        with Team(launches, [wan.addr(site) for site in wan.sites], DEV) as team:
            sides = assemble(team, topology, arguments)
            results = measure(team, wan, sides, arguments)
        late = wan.status()["late_avg_us"]
    report = Report("wan_allreduce", f"All-reduce on the emulated WAN {topology.name}", columns)
    fill(report, topology, sides, results)
    report.notes.append(f"the emulator handed packets over {late:.0f} us late on average")
    common.publish(report, arguments)


def launch_at(wan: Wan, site: str, command: list[str], options: dict[str, Any]) -> Any:
    return wan.popen(site, command, **options)


if __name__ == "__main__":
    main()

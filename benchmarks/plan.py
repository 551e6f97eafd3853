"""What `elastic plan` predicts, beside what was measured on the emulated WAN. Needs root, unless reports are given.

Runs `benchmarks.overlap` (whole training loops between two sites) and `benchmarks.wan_allreduce` (bare exchanges among
three), or takes reports that they have written with --json, or the table of overlap in docs/benchmarks.md, and puts the
forecast for the same numbers beside each row. In the emulator each pair of sites has a link of its own, so that the
access of one of N peers is N - 1 times as fast. Bare exchanges have no coordinator (1.5 round trips: READY, numbers,
results) and follow each other, so that links do not rest.

    python -m benchmarks.plan --markdown
    python -m benchmarks.plan overlap.json wan3.json
    python -m benchmarks.plan docs/benchmarks.md             # nothing is run; without the bytes, which it lacks
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, overlap
from benchmarks.common import MIB, ROOT, BenchmarkError, Report
from benchmarks.wan.wan import Topology
from elastic.forecast import (
    CO2,
    DATA_PARALLEL,
    DELAYED,
    DILOCO,
    EAGER,
    STREAMING,
    Access,
    Exchange,
    Forecast,
    Network,
    Scheme,
    Setting,
    gathered_in,
)

RUNS = (
    ("overlap", "--periods 1"),
    ("wan_allreduce", "wan3 --size 64 --wires f32,int8,int4+int8 --settle 2 --repeat 3 --gloo-repeat 0"),
    ("wan_allreduce", "lossy3 --size 64 --settle 7 --repeat 3 --gloo-repeat 0"),
)
BARE_TRIPS = 1.5
LOOPS = {each.title: each for each in (DATA_PARALLEL, DILOCO, STREAMING, DELAYED, EAGER, CO2)}
COLUMNS = (
    *(
        "Mbit/s",
        "what",
        "wire",
        "utilisation %: measured",
        "predicted",
        "points",
        "exchange s: measured",
        "predicted s",
    ),
    *("error", "MB a peer sends: measured", "predicted MB"),
)


def reports(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """As their benchmarks wrote them."""
    if not arguments.files:
        yield from measured()
    for file in arguments.files:
        try:
            text = Path(file).read_text()
            found = printed(text) if file.endswith(".md") else json.loads(text)
        except (OSError, ValueError) as error:
            raise BenchmarkError(f"{file} is no report: {error}") from None
        yield found


def measured() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, words) in enumerate(RUNS):
            common.progress(f"{name} {words}")
            file = Path(folder) / f"{number}.json"
            command = [sys.executable, "-m", f"benchmarks.{name}", *words.split(), "--json", str(file)]
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, text=True)
            if done.returncode:
                raise BenchmarkError(f"benchmarks.{name} {words} ended with {done.returncode}")
            yield json.loads(file.read_text())


def printed(text: str) -> dict[str, Any]:
    """A report of overlap from the table in the docs: as much of it as stands there."""
    loops = {each.title: each for each in overlap.algorithms(fragments=8, delay=4)}
    row = re.compile(
        r"^\| (\d+) \| ([^|]+) \|[^|]+\|[^|]+\| ([\d.]+) \([^|]*\|(?:[^|]*\|){3} ([\d.]+) \|", re.MULTILINE
    )
    samples = [
        {"rate": float(rate), "algorithm": loops[title], "measured": float(measured), "exchange": float(seconds)}
        for rate, title, measured, seconds in row.findall(text)
        if title in loops
    ]
    if not samples:
        raise BenchmarkError("there is no table of overlap in it")
    return {"name": "overlap", "command": "python -m benchmarks.overlap", "samples": samples}


def loop_of(sample: dict[str, Any]) -> dict[str, Any]:
    """What is compared, of a row with everything that was measured."""
    if "answers" not in sample:
        return sample
    algorithm = overlap.Algorithm(**sample["algorithm"])
    result = overlap.Result(algorithm, sample["rate"], sample["period"], sample["seconds"], sample["answers"])
    sent = max(answer["sent"] / len(answer["exchanges"]) for answer in result.answers)
    facts = {"algorithm": algorithm, "measured": result.measured, "exchange": result.exchange, "sent": sent}
    return {"rate": result.rate, **facts}


def add(report: Report, found: dict[str, Any], host_rate: float) -> None:
    """Its rows, with what is predicted for each."""
    if found.get("name") not in ("overlap", "wan_allreduce"):
        raise BenchmarkError(f"a report of {found.get('name')!r} has nothing that is predicted: give one of overlap")
    words = shlex.split(found["command"])[3:]
    report.notes.append(found["command"])
    for sample in found["samples"]:
        if found["name"] == "overlap":
            add_loop(report, loop_of(sample), overlap.arguments_of(words), host_rate)
        elif not sample["cells"]["side"].startswith("gloo"):
            add_exchange(report, sample, words[0])


# --- training loops -------------------------------------------------------------------------------------------------


def add_loop(report: Report, sample: dict[str, Any], arguments: argparse.Namespace, host_rate: float) -> None:
    algorithm, measured, exchange = sample["algorithm"], sample["measured"], sample["exchange"]
    forecast = forecast_of(algorithm, sample["rate"], arguments, host_rate)
    utilisation = 100 * forecast.utilisation
    cells = (
        f"{sample['rate']:g}",
        algorithm.title,
        algorithm.wire,
        f"{measured:.1f}",
        f"{utilisation:.1f}",
        f"{utilisation - measured:+.1f}",
        *beside(exchange, forecast.round_seconds),
        f"{sample['sent'] / 1e6:.3f}" if "sent" in sample else "",
        f"{forecast.round_bytes / 1e6:.3f}",
    )
    report.add(cells, points=utilisation - measured, error=forecast.round_seconds / exchange - 1)


def forecast_of(algorithm: overlap.Algorithm, rate: float, arguments: argparse.Namespace, host_rate: float) -> Forecast:
    access = Access(up=rate * 1e6, down=rate * 1e6, rtt=arguments.rtt_ms / 1e3)
    setting = Setting(
        params=arguments.mib * MIB / 4,
        step_seconds=arguments.step_ms / 1e3,
        network=Network([access] * overlap.PEERS),
        host_rate=host_rate,
    )
    loop = LOOPS[algorithm.loop]
    scheme = Scheme(
        algorithm=loop,
        wire=algorithm.wire,
        sync_every=loop.steps or arguments.sync_every,
        fragments=algorithm.fragments,
        delay=algorithm.delay,
    )
    return setting.forecast(scheme)


def beside(seconds: float, predicted: float) -> tuple[str, str, str]:
    return f"{seconds:.3f}", f"{predicted:.3f}", f"{100 * (predicted / seconds - 1):+.0f} %"


# --- bare exchanges -------------------------------------------------------------------------------------------------


def add_exchange(report: Report, sample: dict[str, Any], name: str) -> None:
    cells = sample["cells"]
    wire, _, back = cells["wire"].partition("+")
    if (back or wire) != gathered_in(wire):
        return  # results that come back otherwise than usual
    topology = Topology.load(name if name.endswith(".json") else f"{name}.json")
    network = network_of(topology)
    exchange = network.exchange(sample["elements"], wire, rested=0.0)
    predicted, seconds = bare_seconds(exchange, network), statistics.median(sample["seconds"])
    rate = min(access.up for access in network.kinds) / (network.peers - 1) / 1e6
    what = f"{name}, {common.mib(sample['elements'])}, {network.peers} peers"
    sent = f"{exchange.sent / 1e6:.1f}"
    report.add(
        (f"{rate:g}", what, wire, "", "", "", *beside(seconds, predicted), "", sent), error=predicted / seconds - 1
    )


def network_of(topology: Topology) -> Network:
    """The access of a site has room for all its links."""
    sites = topology.sites
    accesses = []
    for site in sites:
        out = [topology.links[site, other] for other in sites if other != site]
        back = [topology.links[other, site] for other in sites if other != site]
        up, down = (min(link["rate_mbit"] for link in links) * 1e6 * len(links) for links in (out, back))
        rtt = max(one["delay_ms"] + other["delay_ms"] for one, other in zip(out, back, strict=True)) / 1e3
        accesses.append(Access(up=up, down=down, rtt=rtt, loss=max(link["loss"] for link in out)))
    return Network(accesses)


def bare_seconds(exchange: Exchange, network: Network) -> float:
    return exchange.carrying + exchange.starting + BARE_TRIPS * network.rtt


def summary(samples: Sequence[dict[str, Any]]) -> Iterator[str]:
    points = [abs(sample["points"]) for sample in samples if "points" in sample]
    errors = [abs(sample["error"]) for sample in samples]
    if points:
        yield f"utilisation is off by {statistics.median(points):.1f} points in the median, {max(points):.1f} at most"
    if errors:
        yield f"seconds by {100 * statistics.median(errors):.0f} % in the median, {100 * max(errors):.0f} % at most"


def main() -> None:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("files", nargs="*", help="reports of overlap and wan_allreduce (default: they are run)")
    parser.add_argument(
        "--host-rate", type=float, default=350, metavar="MB/S", help="of training threads (default 350)"
    )
    arguments = parser.parse_args()
    with common.one_line_errors():
        began = time.monotonic()
        report = Report("plan", "Predicted beside measured, emulated WAN", COLUMNS)
        for found in reports(arguments):
            add(report, found, 1e6 * arguments.host_rate)
        if not arguments.files:
            report.notes.append(f"measured in {time.monotonic() - began:.0f} s")
        report.notes[:0] = summary(report.samples)
        common.publish(report, arguments)


if __name__ == "__main__":
    main()

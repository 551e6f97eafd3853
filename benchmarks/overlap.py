"""What share of the time accelerators compute, under each outer loop and on links of several rates. Needs root.

Two peers at sites of the emulated WAN train: real processes, coordinator, outer loops and kernel TCP. Compute is a
timed wait. The measured window is whole periods of H steps, after two for warming up; what is computed in it is the
number of steps times their nominal length, so that a wait that ends late counts as lost. The peer with the smaller
share counts. Beside it: what `outer.statistics()` says, and the timing model (`elastic.outer.timing`) for the same
numbers, without latency and with the round trips of an exchange.

    python -m benchmarks.overlap --markdown
    python -m benchmarks.overlap --rates 50 --rows DiLoCo,Streaming --periods 2        # a quick look
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from benchmarks import common
from benchmarks.common import MIB, BenchmarkError, Report, Worker
from benchmarks.wan.wan import DEV, Wan, WanError
from collectives.wires import WIRES
from elastic.outer.cadence import WHOLE_ROUND
from elastic.outer.timing import Timing
from elastic.tensors import gathered_in

PEERS = 2
HEADERS = 52 / 1500  # of a packet, what is no data: IP, TCP and its timestamps
# Of an exchange, for the peer that is not beside the coordinator: from its proposal to the start, half of one each for
# the first numbers and the last results, from its report to the commit.
TRIPS = 3.0
WARM_PERIODS = 2
REDUCTIONS = 12  # measured steps of data-parallel training, whose period is a step
PARTS = ("launch", "land", "_adopt")
WELL, BADLY = 97.0, 80.0


@dataclass(frozen=True)
class Algorithm:
    """One row of each link. delay: WHOLE_ROUND, or inner steps."""

    title: str
    loop: str
    wire: str = "f32"
    fragments: int = 1
    delay: int = 0

    def options(self, sync_every: int) -> dict[str, Any]:
        """What the loop is made with."""
        made: dict[str, Any] = {"sync_every": sync_every, "wire": self.wire}
        if self.loop == "Streaming":
            made |= {"fragments": self.fragments, "sync_delay": self.delay}
        return made


def algorithms(fragments: int, delay: int) -> list[Algorithm]:
    return [
        Algorithm("data-parallel", "data-parallel"),
        Algorithm("DiLoCo", "DiLoCo"),
        Algorithm("Streaming, no overlap", "Streaming", "f32", fragments, 0),
        Algorithm("Streaming", "Streaming", "f32", fragments, delay),
        Algorithm("Streaming int4", "Streaming", "int4", fragments, delay),
        Algorithm("Delayed", "Delayed", delay=WHOLE_ROUND),
        Algorithm("Eager", "Eager", delay=WHOLE_ROUND),
    ]


def bits_of(wire: str) -> float:
    """Of a number on its way."""
    return 8 * WIRES[wire].size(MIB) / MIB


def timing(algorithm: Algorithm, rate: float, arguments: argparse.Namespace, trips: float = 0.0) -> Timing:
    """The model of a row. rate: Mbit/s of the link, of which headers take their part."""
    return Timing(
        numbers=arguments.mib * MIB / 4,
        peers=PEERS,
        bandwidth=rate * 1e6 * (1 - HEADERS),
        step_seconds=arguments.step_ms / 1e3,
        sync_every=1 if algorithm.loop == "data-parallel" else arguments.sync_every,
        fragments=algorithm.fragments,
        delay=algorithm.delay,
        bits=(bits_of(algorithm.wire), bits_of(gathered_in(algorithm.wire) or algorithm.wire)),
        latency=trips * arguments.rtt_ms / 1e3,
    )


@dataclass
class Result:
    """A row as it was measured. answers: one a peer."""

    algorithm: Algorithm
    rate: float
    period: int
    seconds: float
    answers: list[dict[str, Any]] = field(default_factory=list)

    def shares(self, answer: dict[str, Any]) -> list[float]:
        """Of each period, in percent."""
        ends: list[float] = answer["ends"][:: self.period]
        return [100 * self.period * self.seconds / (after - before) for before, after in pairwise(ends)]

    def share(self, answer: dict[str, Any]) -> float:
        ends: list[float] = answer["ends"]
        return 100 * (len(ends) - 1) * self.seconds / (ends[-1] - ends[0])

    @property
    def worst(self) -> dict[str, Any]:
        """What the peer says that computed least."""
        return min(self.answers, key=self.share)

    @property
    def measured(self) -> float:
        return self.share(self.worst)

    @property
    def stated(self) -> float | None:
        """What the loop's own statistics say."""
        training, stalled = (self.worst.get(f"{name}_seconds", 0.0) for name in ("training", "stalled"))
        return 100 * training / (training + stalled) if training else None

    @property
    def exchange(self) -> float:
        """Seconds from the proposal to the commit, in the median of all peers' exchanges."""
        return float(statistics.median(span for answer in self.answers for span, _ in answer["exchanges"]))

    @property
    def hook_ms(self) -> float:
        """Of a round, at the worst peer: processor time of the training thread after the waits, of all their steps."""
        return 1e3 * float(sum(used for _, used in self.worst["hook"])) / len(self.worst["exchanges"])

    def part_ms(self, name: str) -> tuple[float, float]:
        """Of a round, in one piece of the hook: how long it took, and on a processor."""
        whole, used = (1e3 * statistics.mean(each) for each in zip(*self.worst["parts"][name], strict=True))
        return whole, used


class Crew:
    """The coordinator beside the first peer, and the peers, one at each site."""

    def __init__(self, wan: Wan, arguments: argparse.Namespace) -> None:
        self.arguments, self._wan = arguments, wan
        self._hosts = [wan.addr(site) for site in wan.sites]
        self.peers: list[Worker] = []
        self._coordinator = self._hire("coordinator", wan.sites[0])
        self.peers = [self._hire(f"w{index}", site) for index, site in enumerate(wan.sites)]
        self._address = self._coordinator.ask(do="coordinate", host=self._hosts[0], peers=PEERS)["address"]

    def _hire(self, name: str, site: str) -> Worker:
        return Worker(name, partial(launch_at, self._wan, site), DEV, "benchmarks.stepper")

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """The same of all, at the same time."""
        for host, peer in zip(self._hosts, self.peers, strict=True):
            peer.tell(**order, host=host, coordinator=self._address, peers=PEERS, mib=self.arguments.mib)
        return [peer.hear() for peer in self.peers]

    def use(self, rate: float) -> str:
        """From now on all links have this rate; says what congestion control and how many stripes they came to."""
        self._wan.set(self._wan.sites[0], rate=rate)
        self.ask(do="join", cc=self.arguments.cc)
        answers = self.ask(do="settle", settle=self.arguments.settle)
        stripes, used = ({str(each) for answer in answers for each in answer[name]} for name in ("stripes", "cc"))
        return f"{rate:g} Mbit/s: {'/'.join(sorted(used))}, {'/'.join(sorted(stripes, key=int))} stripes"

    def train(self, algorithm: Algorithm, rate: float) -> Result:
        arguments, parallel = self.arguments, algorithm.loop == "data-parallel"
        period = 1 if parallel else arguments.sync_every
        count = REDUCTIONS if parallel else arguments.periods * period
        result = Result(algorithm, rate, period, arguments.step_ms / 1e3)
        result.answers = self.ask(
            do="train",
            loop=algorithm.loop,
            options={} if parallel else algorithm.options(arguments.sync_every),
            tag=f"{rate:g}-{algorithm.title}".replace(" ", "-").replace(",", ""),
            seconds=result.seconds,
            warm=WARM_PERIODS * period,
            steps=count,
        )
        check(result)
        return result

    def close(self) -> None:
        for worker in (*self.peers, self._coordinator):
            worker.kill()


def check(result: Result) -> None:
    """All came to the same bits."""
    if len({answer["hash"] for answer in result.answers}) != 1:
        raise BenchmarkError(f"{result.algorithm.title}: the peers hold different versions")


def measure(crew: Crew) -> tuple[list[Result], list[str]]:
    arguments = crew.arguments
    rows = [each for each in algorithms(arguments.fragments, arguments.delay) if arguments.wants(each.title)]
    results, links = [], []
    for rate in arguments.rates:
        links.append(crew.use(rate))
        common.progress(links[-1])
        for algorithm in rows:
            results.append(crew.train(algorithm, rate))
            common.progress(f"{rate:g} Mbit/s, {algorithm.title}: {results[-1].measured:.1f} %")
    return results, links


# --- the table ------------------------------------------------------------------------------------------------------

COLUMNS = (
    *("Mbit/s", "algorithm", "P", "tau", "utilisation %: measured (of single periods)", "statistics()"),
    *("model (error)", f"model + {TRIPS:g} RTT (error)", "exchange s", "model + RTT", "hook cpu ms a round"),
    *("launch/land/adopt ms (cpu)", "waits late ms"),
)


def cells(result: Result, arguments: argparse.Namespace) -> tuple[str, ...]:
    algorithm, measured = result.algorithm, result.measured
    plain, real = (timing(algorithm, result.rate, arguments, trips) for trips in (0.0, TRIPS))
    single = result.shares(result.worst)
    return (
        f"{result.rate:g}",
        algorithm.title,
        str(algorithm.fragments),
        "a round" if algorithm.delay == WHOLE_ROUND else str(algorithm.delay),
        f"{measured:.1f} ({min(single):.1f}-{max(single):.1f})",
        f"{result.stated:.1f}" if result.stated is not None else "",
        *(beside(measured, 100 * each.utilisation) for each in (plain, real)),
        f"{result.exchange:.3f}",
        f"{real.exchange_seconds:.3f}",
        f"{result.hook_ms:.1f}" if result.stated is not None else "",
        parts(result),
        f"{1e3 * (statistics.mean(result.worst['waited']) - result.seconds):.2f}",
    )


def beside(measured: float, modelled: float) -> str:
    return f"{modelled:.1f} ({measured - modelled:+.1f})"


def parts(result: Result) -> str:
    """Of the hook, a round: giving a contribution, applying the result, and hashing and announcing the new version."""
    pieces = [result.part_ms(name) for name in PARTS if name in result.worst["parts"]]
    whole, used = ("/".join(f"{piece[which]:.1f}" for piece in pieces) for which in (0, 1))
    return f"{whole} ({used})" if pieces else ""


def verdicts(results: Sequence[Result]) -> list[str]:
    """What is to be shown: overlap hides what DiLoCo waits for."""
    found = {(result.rate, result.algorithm.title): result.measured for result in results}
    lines = []
    for rate in dict.fromkeys(result.rate for result in results):
        synchronous = found.get((rate, "DiLoCo"))
        if synchronous is None or synchronous >= BADLY:
            continue
        for title in ("Streaming", "Streaming int4"):
            if (share := found.get((rate, title))) is not None:
                verdict = "reached" if share >= WELL else "missed"
                lines.append(
                    f"on {rate:g} Mbit/s DiLoCo falls below {BADLY:g} % ({synchronous:.1f}): {title} with overlap "
                    f"has {share:.1f} %; at least {WELL:g} %, {verdict}"
                )
    return lines or [f"DiLoCo was nowhere below {BADLY:g} %: nothing is shown"]


def notes(results: Sequence[Result], arguments: argparse.Namespace, links: Sequence[str]) -> list[str]:
    lines = [
        f"compute is a timed wait of {arguments.step_ms:g} ms a step; {PEERS} peers, {arguments.mib:g} MiB of f32 in 8 "
        f"layers, H = {arguments.sync_every}, {arguments.periods} periods measured after {WARM_PERIODS}, RTT "
        f"{arguments.rtt_ms:g} ms, no loss",
        *verdicts(results),
        *links,
    ]
    for result in results:
        contributed, rounds = (result.worst.get(name, 0) for name in ("contributed", "rounds"))
        if contributed < rounds:
            name = f"{result.rate:g} Mbit/s, {result.algorithm.title}"
            lines.append(f"{name}: {rounds - contributed} of {rounds} rounds went on without a peer")
    return lines


# --- the run --------------------------------------------------------------------------------------------------------


def launch_at(wan: Wan, site: str, command: list[str], options: dict[str, Any]) -> Any:
    return wan.popen(site, command, **options)


@contextmanager
def emulated(arguments: argparse.Namespace) -> Iterator[Wan]:
    topology = {
        "name": "overlap",
        "sites": {f"site-{'abcdefgh'[index]}": {} for index in range(PEERS)},
        "default": {"rtt_ms": arguments.rtt_ms, "rate_mbit": arguments.rates[0]},
    }
    try:
        with Wan(topology, f"ovl{os.getpid()}", max_life=3600) as wan:
            yield wan
    except WanError as error:
        raise BenchmarkError(str(error)) from None


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rates", default="1000,200,50", help="Mbit/s, one link after the other (default 1000,200,50)")
    parser.add_argument("--rtt-ms", type=float, default=30.0, help="round trip (default 30)")
    parser.add_argument("--size", dest="mib", type=float, default=8.0, help="MiB of parameters (default 8)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of a timed wait (default 100)")
    parser.add_argument("--sync-every", type=int, default=32, help="H (default 32)")
    parser.add_argument("--fragments", type=int, default=8, help="P of Streaming (default 8)")
    parser.add_argument("--delay", type=int, default=4, help="tau of Streaming with overlap (default 4)")
    parser.add_argument("--periods", type=int, default=4, help="of H steps, measured (default 4)")
    parser.add_argument("--settle", type=int, default=8, help="operations in which links find their stripes (8)")
    parser.add_argument("--cc", default="cubic", help="congestion control (default cubic)")
    parser.add_argument("--rows", help="of the algorithms, by their titles (default: all)")
    arguments = parser.parse_args(words)
    arguments.rates = [float(each) for each in arguments.rates.split(",")]
    chosen = arguments.rows.split(",") if arguments.rows else []
    arguments.wants = lambda title: not chosen or title.replace(",", "") in chosen
    return arguments


def main() -> None:
    arguments = arguments_of()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    report = Report("overlap", f"Compute utilisation, {PEERS} peers, emulated WAN", COLUMNS)
    report.machine["load before"] = f"{os.getloadavg()[0]:.1f}"
    with emulated(arguments) as wan, ExitStack() as stack:
        crew = Crew(wan, arguments)
        stack.callback(crew.close)
        results, links = measure(crew)
        late = wan.status()["late_avg_us"]
    for result in results:
        report.add(cells(result, arguments), **asdict(result))
    report.machine["load after"] = f"{os.getloadavg()[0]:.1f}"
    report.notes += notes(results, arguments, links)
    report.notes.append(f"the emulator handed packets over {late:.0f} us late on average")
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

"""A peer joins a run of three that go on training: how long until it has the state, and what do the others feel?

The clock runs from the call of Peer() until the outer state (parameters and momentum: twice the model), fetched from
all three at once and verified, is written into the joiner's model. It then idles in the run for a moment, while the
others make their rounds: nobody may wait for it. Each joiner is a new process; what its interpreter
and imports take is shown, and not counted. In turns with it, other new processes take as many bytes from one of the
three over one plain TCP connection, and by a gloo broadcast: they copy, and do nothing else.

    python -m benchmarks.join --json join.json
    python -m benchmarks.join --wan                 # from three sites of wan3, by the joiner's access (needs root)
    python -m benchmarks.join --size 16 --repeat 2                         # a quick look
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import MIB, BenchmarkError, Launch, Report, Worker, launch_here

INCUMBENTS = 3
QUIET_SECONDS = 2.0  # before each join, in which nothing but training runs: what a join is compared with
AFTER_SECONDS = 0.1  # of a join still count as part of it
LEAD_SECONDS = 0.05
SIDES = {
    "elastic": "join, fetch, verify, write into the model",
    "plain": "one TCP connection, copy only",
    "gloo": "gloo broadcast of two, copy only",
}


@dataclass
class Crew:
    """Where everybody runs. hosts: of the incumbents, then of the joiners. interface: that gloo uses."""

    launches: list[Launch]
    hosts: list[str]
    interface: str
    arguments: argparse.Namespace
    incumbents: list[Worker] = field(default_factory=list)
    coordinator: Worker | None = None
    address: str = ""
    joiners: int = 0

    def worker(self, name: str, place: int) -> Worker:
        return Worker(name, self.launches[place], self.interface, "benchmarks.trainee")

    def common(self, place: int) -> dict[str, Any]:
        names = ("mib", "step_ms", "sync_every", "cc")
        known = {name: getattr(self.arguments, name) for name in names}
        return {**known, "host": self.hosts[place], "coordinator": self.address}

    def start(self) -> None:
        self.coordinator = self.worker("coordinator", 0)
        self.address = self.coordinator.ask(do="coordinate", host=self.hosts[0])["address"]
        self.incumbents = [self.worker(f"w{index}", index) for index in range(INCUMBENTS)]
        for place, worker in enumerate(self.incumbents):
            worker.tell(do="train", **self.common(place))
        for worker in self.incumbents:
            worker.hear()

    def seen(self) -> list[dict[str, Any]]:
        for worker in self.incumbents:
            worker.tell(do="seen")
        return [worker.hear() for worker in self.incumbents]

    @contextmanager
    def joiner(self) -> Iterator[tuple[Worker, float]]:
        """A new process, and the seconds that it took to begin."""
        self.joiners += 1
        began = time.monotonic()
        worker = self.worker(f"joiner-{self.joiners}", INCUMBENTS)
        try:
            yield worker, float(worker.ask(do="hello")["now"]) - began
        finally:
            worker.kill()

    def close(self) -> None:
        for worker in (*self.incumbents, self.coordinator):
            if worker is not None:
                worker.kill()


@dataclass
class Times:
    """Of one side. spans: beginning and end of each, time.monotonic()."""

    spans: list[tuple[float, float]] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [end - begin for begin, end in self.spans]


def once(crew: Crew, side: str, times: Times) -> None:
    """One newcomer, after a quiet moment."""
    nbytes = round(2 * crew.arguments.mib * MIB)
    with crew.joiner() as (worker, start):
        worker.ask(do="prepare", mib=crew.arguments.mib)
        if crew.arguments.touch:
            np.ones(round(crew.arguments.touch * 1024 * MIB), dtype=np.uint8)
        time.sleep(QUIET_SECONDS)
        if side == "elastic":
            order = {**crew.common(INCUMBENTS), "stay": crew.arguments.stay}
            answer = worker.ask(do="join", at=time.monotonic() + LEAD_SECONDS, **order)
        else:
            about = {"side": side, "bytes": nbytes, "cc": crew.arguments.cc, "host": crew.hosts[0]}
            port = crew.incumbents[0].ask(do="give", **about)["port"]
            answer = worker.ask(do="take", at=time.monotonic() + LEAD_SECONDS, port=port, **about)
        time.sleep(AFTER_SECONDS)
    if not answer["right"] or answer.get("bytes", nbytes) != nbytes:
        raise BenchmarkError(f"{side} came to something wrong: {answer}")
    times.spans.append((answer["began"], answer["ended"]))
    times.starts.append(start)
    times.answers.append(answer)
    common.progress(f"{side}: {answer['ended'] - answer['began']:.3f} s, {start:.1f} s to begin")


def check(answers: Sequence[dict[str, Any]], seen: Sequence[dict[str, Any]]) -> None:
    """What joiners have is, bit for bit, a version that every incumbent had."""
    for answer in answers:
        known = {each["hashes"].get(str(answer["version"])) for each in seen}
        if known != {answer["hash"]}:
            raise BenchmarkError(f"version {answer['version']} is {answer['hash']} at the joiner, elsewhere {known}")


@dataclass
class Gaps:
    """Milliseconds between the ends of neighbouring steps of all incumbents. rounds: of steps with an exchange."""

    steps: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)

    def add(self, seen: Sequence[dict[str, Any]], begin: float, end: float) -> None:
        for each in seen:
            for at, gap, exchanged in each["steps"]:
                if begin <= at <= end:
                    (self.rounds if exchanged else self.steps).append(1e3 * gap)

    def text(self) -> str:
        if not self.steps:
            return "no step"
        rounds = f"; {len(self.rounds)} with a round {common.spread(self.rounds)}" if self.rounds else ""
        shown = f"p50 {part(self.steps, 0.5):.1f}, p99 {part(self.steps, 0.99):.1f}, longest {max(self.steps):.1f}"
        return f"{len(self.steps)} steps: {shown}{rounds}"


def part(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def gaps(seen: Sequence[dict[str, Any]], times: Times) -> tuple[Gaps, Gaps]:
    """Without a join, and during joins."""
    quiet, during = Gaps(), Gaps()
    for begin, end in times.spans:
        quiet.add(seen, begin - QUIET_SECONDS + LEAD_SECONDS, begin)
        during.add(seen, begin, end + AFTER_SECONDS)
    return quiet, during


def during_each(seen: Sequence[dict[str, Any]], times: Times) -> list[Gaps]:
    """During each join."""
    found = [Gaps() for _ in times.spans]
    for each, (begin, end) in zip(found, times.spans, strict=True):
        each.add(seen, begin, end + AFTER_SECONDS)
    return found


def measure(crew: Crew) -> tuple[dict[str, Times], list[dict[str, Any]]]:
    sides = {side: Times() for side in crew.arguments.sides.split(",")}
    for _ in range(crew.arguments.repeat):
        for side, times in sides.items():
            once(crew, side, times)
    seen = crew.seen()
    check(sides["elastic"].answers if "elastic" in sides else [], seen)
    return sides, seen


def target(arguments: argparse.Namespace, seconds: float) -> str:
    if arguments.wan:
        share = 16 * arguments.mib * MIB / seconds / (arguments.access * 1e6)
        return f"{100 * share:.0f} % of {arguments.access:g} Mbit/s; 85 %, {'reached' if share >= 0.85 else 'missed'}"
    if arguments.mib != 128:
        return ""
    return f"at most 0.42 s, {'reached' if seconds <= 0.42 else 'missed'}"


def fill(report: Report, arguments: argparse.Namespace, sides: dict[str, Times], seen: list[dict[str, Any]]) -> None:
    for side, times in sides.items():
        middle = statistics.median(times.seconds)
        ours = sides["elastic"].seconds if "elastic" in sides else []
        rates = [16 * arguments.mib * MIB / each / 1e6 for each in times.seconds]
        cells = (
            side,
            SIDES[side],
            f"{2 * arguments.mib:g} MiB",
            common.spread(times.seconds, 1, 3),
            common.spread(rates, 1, 0),
            common.ratio(times.seconds, ours) if side != "elastic" else "",
            target(arguments, middle) if side == "elastic" else "",
        )
        quiet, during = gaps(seen, times)
        report.add(cells, seconds=times.seconds, answers=times.answers, quiet=vars(quiet), during=vars(during))
        report.notes.append(
            f"{side}, step gaps of the incumbents, ms: in quiet {quiet.text()}; during it {during.text()}"
        )
        report.notes.append(f"{side}: {common.spread(times.starts, 1, 1)} s for interpreter and imports, not counted")
    if "elastic" in sides:
        report.notes += account(sides["elastic"], seen)


def account(times: Times, seen: list[dict[str, Any]]) -> list[str]:
    """Where a join's time goes, whether gaps are in bounds, and what the incumbents waited."""
    admitted, fetch = ([answer[name] for answer in times.answers] for name in ("admitted", "fetch"))
    rest = [whole - a - f for whole, a, f in zip(times.seconds, admitted, fetch, strict=True)]
    quiet, during = gaps(seen, times)
    lines = [
        f"of a join, s: {common.spread(admitted, 1, 3)} until admitted, {common.spread(fetch, 1, 3)} to fetch and "
        f"verify, {common.spread(rest, 1, 3)} for the loop's own copies, hashes and messages"
    ]
    if during.steps:
        bound = 2 * part(quiet.steps, 0.99)
        verdict = "reached" if max(during.steps) <= bound else "missed"
        each = [max(found.steps) for found in during_each(seen, times) if found.steps]
        within = sum(gap <= bound for gap in each)
        late = sum(gap > bound for gap in quiet.steps)
        lines.append(
            f"longest step gap during joins {max(during.steps):.1f} ms; 2x p99 is {bound:.1f} ms: {verdict}; none was "
            f"longer in {within} of {len(each)} joins, whose longest are {statistics.median(each):.1f} ms in the "
            f"median; in quiet, {late} of {len(quiet.steps)} steps were longer"
        )
    total = {name: sum(each["waited"][name] for each in seen) for name in seen[0]["waited"]}
    lines.append(
        f"the incumbents waited {total['waited']:g} s for joiners in {total['exchanges']:g} exchanges, of which "
        f"{total['with_joiner']:g} had one as a receiver (LinkRecord.waited_seconds of the links to joiners)"
    )
    return lines


@contextmanager
def local(arguments: argparse.Namespace) -> Iterator[Crew]:
    yield Crew([launch_here] * (INCUMBENTS + 1), ["127.0.0.1"] * (INCUMBENTS + 1), "lo", arguments)


@contextmanager
def emulated(arguments: argparse.Namespace) -> Iterator[Crew]:
    """The incumbents at the sites of wan3, the joiner at a fourth one in Europe."""
    from benchmarks.wan.wan import DEV, HERE, Wan, WanError

    topology = json.loads((HERE / "wan3.json").read_text())
    topology["sites"]["site-d"] = {"down_mbit": arguments.access}
    for site, rtt in (("site-a", 20), ("site-b", 20), ("site-c", 100)):
        topology["links"].append({"between": [site, "site-d"], "rtt_ms": rtt})
    try:
        with Wan(topology, f"join{os.getpid()}", max_life=7200) as wan:
            launches: list[Launch] = [partial(_launch_at, wan, site) for site in wan.sites]
            yield Crew(launches, [wan.addr(site) for site in wan.sites], DEV, arguments)
            common.progress(f"the emulator handed packets over {wan.status()['late_avg_us']:.0f} us late on average")
    except WanError as error:
        raise BenchmarkError(str(error)) from None


def _launch_at(wan: Any, site: str, command: list[str], options: dict[str, Any]) -> Any:
    return wan.popen(site, command, **options)


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, repeat=5)
    parser.add_argument("--size", dest="mib", type=float, default=128.0, help="MiB of parameters (default 128)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="of an inner step (default 20)")
    parser.add_argument("--sync-every", type=int, help="inner steps between rounds (default 250; --wan: none)")
    parser.add_argument("--stay", type=float, metavar="S", help="seconds that a joiner then idles (3; --wan: 0)")
    parser.add_argument("--cc", default="cubic", help="congestion control of all sides (default cubic)")
    parser.add_argument("--sides", help=f"of {','.join(SIDES)} (default: all; --wan: elastic)")
    parser.add_argument("--wan", action="store_true", help="on the emulated WAN; needs root")
    parser.add_argument("--access", type=float, default=200.0, help="--wan: Mbit/s of the joiner's access (200)")
    parser.add_argument(
        "--touch",
        type=float,
        default=0.0,
        metavar="GIB",
        help="of memory to use and free before each join, so that a virtual machine need not ask its host for it then",
    )
    arguments = parser.parse_args(words)
    arguments.sync_every = arguments.sync_every or (10**9 if arguments.wan else 250)
    arguments.stay = (0.0 if arguments.wan else 3.0) if arguments.stay is None else arguments.stay
    arguments.sides = arguments.sides or ("elastic" if arguments.wan else ",".join(SIDES))
    if unknown := set(arguments.sides.split(",")) - set(SIDES):
        parser.error(f"no side {', '.join(sorted(unknown))}: choose of {', '.join(SIDES)}")
    return arguments


def main() -> None:
    arguments = arguments_of()
    with common.one_line_errors():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    where = f"wan3, access {arguments.access:g} Mbit/s" if arguments.wan else "loopback"
    columns = ("side", "what it does", "size", "s: median (min-max)", "Mbit/s", "x elastic", "to reach")
    report = Report("join", f"A peer joins {INCUMBENTS} that train, {where}", columns)
    report.machine["cc"] = arguments.cc
    with (emulated if arguments.wan else local)(arguments) as crew, ExitStack() as stack:
        stack.callback(crew.close)
        crew.start()
        sides, seen = measure(crew)
    fill(report, arguments, sides, seen)
    common.publish(report, arguments)


if __name__ == "__main__":
    main()

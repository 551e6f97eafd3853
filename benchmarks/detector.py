"""The detector on synthetic telemetry with planted faults, and over a day of telemetry in which nothing is wrong.

Every pair of n peers has its own usual delay (log-normal between pairs: WAN links differ by nature) and log-normal
noise of deviation sigma in each window of a second; so have the steps of each peer. Contributions of one round a window
have half their square in common. After some windows of health one fault, or two at once, makes its cells, or its
steps, `factor` times as slow, or spoils the contributions (NaN, ten times as long, or the other sign), for the rest of
the trial. All goes through `fault.detector.Detector`, as heartbeats would. Recall: faults that are confirmed, by kind
and culprit. Precision: confirmed verdicts that are right. Windows: from the fault to its verdict, median and largest.

A clean day is synthetic (`Weather`: what it has in it stands there), or a recorded one: telemetry of a real run
(`benchmarks.faults --clean --record`), of which stretches of a minute are drawn with replacement until they make a day.

    python -m benchmarks.detector --trials 100 --json detector.json
    python -m benchmarks.detector --quick

Ends with 1 if a gate fails: at n = 16, sigma = .1, factor 2 recall >= .98 and precision >= .99 for each kind, and no
alarm in 10,000 clean windows.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.common import BenchmarkError, Report
from fault.detector import Detector
from fault.records import Crossing, Gave
from fault.verdicts import GRADIENT, LINK, RECEIVER, SENDER, STRAGGLER

Key = tuple[str, tuple[str, ...]]
Matrix = NDArray[np.float64]

KINDS = (SENDER, RECEIVER, LINK, STRAGGLER, GRADIENT)
TWO, ANY_TWO = "two delays", "any two"
HEALTHY, FAULTY = 30, 12  # windows of a trial before and after the fault: a whole past, and time enough
BYTES = 1 << 20
BETWEEN = 1.0  # log-deviation of usual delays between pairs
STEP = 0.1  # usual seconds
DIMENSIONS = 64  # of contributions
SPOILED = {"nan": math.nan, "flip": -1.0, "scale": 10.0}
GATE = (16, 0.1, 2.0)
CLEAN = 10_000
DAY = 86_400
STRETCH = 60.0  # seconds of a recorded run that stay together
TRACE = Path(__file__).parent / "traces" / "wan3.jsonl.gz"


@dataclass(slots=True)
class Tally:
    """faults: planted. right, wrong: verdicts. windows: to each right verdict."""

    faults: int = 0
    right: int = 0
    wrong: int = 0
    windows: list[int] = field(default_factory=list)

    @property
    def recall(self) -> float:
        return self.right / self.faults if self.faults else 1.0

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.wrong) if self.right else 0.0


class World:
    """n peers with links of their own nature; time goes in windows of a second, with a round in each."""

    def __init__(self, n: int, sigma: float, chance: np.random.Generator) -> None:
        self.names = [f"p{i:02d}" for i in range(n)]
        self._sigma, self._chance = sigma, chance
        self._usual = chance.normal(math.log(0.05), BETWEEN, (n, n))
        self._raised = np.zeros((n, n))
        self._pace, self._spoiled = np.zeros(n), np.ones(n)
        self._learned = chance.normal(0, 1, DIMENSIONS)
        self.detector = Detector()
        self.number = 0

    def plant(self, kind: str, factor: float, busy: set[int]) -> Key:
        """A fault of this kind from now on; not where another is."""
        free = [i for i in range(len(self.names)) if i not in busy]
        s, d = (int(i) for i in self._chance.choice(free, 2, replace=False))
        busy |= {s, d} if kind == LINK else {s}
        more = math.log(factor)
        if kind == LINK:
            self._raised[s, d] += more
            return kind, (self.names[s], self.names[d])
        if kind == SENDER:
            self._raised[s] += more
        elif kind == RECEIVER:
            self._raised[:, s] += more
        elif kind == STRAGGLER:
            self._pace[s] += more
        else:
            self._spoiled[s] = SPOILED[str(self._chance.choice(list(SPOILED)))]
        return kind, (self.names[s],)

    def noise(self, *shape: int) -> Matrix:
        """In logarithms."""
        return self._chance.normal(0, self._sigma, shape)

    def window(self) -> set[Key]:
        """One passes; returns what is confirmed by then."""
        self._cross(self._usual + self._raised + self.noise(*self._usual.shape))
        self._step(self._pace + self.noise(len(self.names)))
        self._give()
        self.number += 1
        return {verdict.key for verdict in self.detector.look(float(self.number))}

    def _cross(self, logs: Matrix, carried: int = BYTES) -> None:
        seconds = np.exp(logs).tolist()
        for s, sender in enumerate(self.names):
            for d, receiver in enumerate(self.names):
                if s != d:
                    crossing = Crossing(peer=sender, bytes=carried, seconds=seconds[s][d])
                    self.detector.crossed(receiver, crossing, float(self.number))

    def _step(self, logs: Matrix) -> None:
        for name, log in zip(self.names, logs.tolist(), strict=True):
            self.detector.stepped(name, STEP * math.exp(log), float(self.number))

    def _give(self) -> None:
        """Half of the square of each contribution is what all have in common."""
        own = self._chance.normal(0, 1, (len(self.names), DIMENSIONS))
        given = (self._learned + own) * self._spoiled[:, None]
        fine = np.isfinite(given[:, 0])
        others = np.nansum(given, axis=0) - np.nan_to_num(given)
        for name, mine, rest, finite in zip(self.names, given, others, fine, strict=True):
            norm = float(np.linalg.norm(mine)) if finite else -1.0
            cosine = float(mine @ rest / (norm * np.linalg.norm(rest))) if finite else 0.0
            gave = Gave(tag="outer", version=self.number, norm=norm, cosine=cosine)
            self.detector.gave(name, gave, float(self.number))


def trial(n: int, sigma: float, kinds: Sequence[str], factor: float, chance: np.random.Generator, tally: Tally) -> None:
    world = World(n, sigma, chance)
    wrong: set[Key] = set()
    for _ in range(HEALTHY):
        wrong |= world.window()
    busy: set[int] = set()
    planted = {world.plant(kind, factor, busy) for kind in kinds}
    seen: dict[Key, int] = {}
    for number in range(1, FAULTY + 1):
        for verdict in world.window():
            seen.setdefault(verdict, number)
    tally.faults += len(planted)
    tally.right += len(planted & seen.keys())
    tally.wrong += len(wrong | (seen.keys() - planted))
    tally.windows += [seen[each] for each in planted & seen.keys()]


def alarms(windows: Iterable[set[Key]]) -> Counter[str]:
    """How often something was confirmed that was not before, by kind."""
    found, before = Counter[str](), set[Key]()
    for confirmed in windows:
        found.update(kind for kind, _ in confirmed - before)
        before = confirmed
    return found


# --- a clean day ------------------------------------------------------------------------------------------------------


class Weather(World):
    """What a day has in it that is nobody's fault.

    Delays: noise of deviation .1; one in a hundred takes longer by a heavy tail (Pareto, 2); a slow drift of each link
    (deviation .1, a correlation time of ten minutes), and the sender's time of the day (up to e^.5 times); once an hour
    a burst on each link, and on all links of each peer, of one or two seconds and 2 to 4 times; every twenty minutes
    everything takes 1.5 to 3 times as long, or .1 to .5 s longer, for up to two minutes; every ten minutes a new plan
    changes how much each receiver gets. Steps: noise of deviation .1, one in a hundred up to 3 times as long, and every
    half an hour all of them twice as long for thirty seconds. A round every five seconds, contributions that become
    shorter by the hour.
    """

    def __init__(self, n: int, chance: np.random.Generator) -> None:
        super().__init__(n, 0.1, chance)
        self._drift = np.zeros((n, n))
        self._daily, self._phase = chance.uniform(0, 0.5, n), chance.uniform(0, 1, n)
        self._bursts, self._left = np.zeros((n, n)), np.zeros((n, n), dtype=int)
        self._times, self._more, self._common_left = 0.0, 0.0, 0
        self._latency = chance.uniform(0.0, 0.8, (n, n))
        self._shares = np.ones(n)

    def window(self) -> set[Key]:
        n, chance = len(self.names), self._chance
        self._drift += -self._drift / 600 + chance.normal(0, 0.1 * math.sqrt(2 / 600), (n, n))
        self._burst()
        self._slow_all()
        if self.number % 600 == 0:
            self._shares = chance.uniform(0.1, 2.0, n)
        day = self._daily * np.sin(2 * math.pi * (self.number / DAY + self._phase))
        tails = (chance.random((n, n)) < 0.01) * np.log1p(chance.pareto(2.0, (n, n)))
        logs = self._usual + self._drift + day[:, None] + self._bursts + self._times + tails + self.noise(n, n)
        seconds = np.exp(logs) * (self._latency + (1 - self._latency) * self._shares) + self._more
        self._receive(np.log(seconds))
        evaluation = math.log(2.0) if self.number % 1800 < 30 else 0.0
        late = (chance.random(n) < 0.01) * np.log(chance.uniform(1.0, 3.0, n))
        self._step(self.noise(n) + late + evaluation)
        if self.number % 5 == 0:
            self._spoiled[:] = math.exp(-self.number / DAY)
            self._give()
        self.number += 1
        return {verdict.key for verdict in self.detector.look(float(self.number))}

    def _receive(self, logs: Matrix) -> None:
        seconds, carried = np.exp(logs).tolist(), (BYTES * self._shares).astype(int).tolist()
        for s, sender in enumerate(self.names):
            for d, receiver in enumerate(self.names):
                if s != d:
                    crossing = Crossing(peer=sender, bytes=carried[d], seconds=seconds[s][d])
                    self.detector.crossed(receiver, crossing, float(self.number))

    def _burst(self) -> None:
        n, chance = len(self.names), self._chance
        self._left -= 1
        self._bursts[self._left <= 0] = 0.0
        begins = (chance.random((n, n)) < 1 / 3600) & (self._left < -10)
        whose = chance.random(n) < 1 / 3600
        begins |= (whose[:, None] | whose[None, :]) & (self._left < -10)
        self._bursts[begins] = np.log(chance.uniform(2.0, 4.0))
        self._left[begins] = chance.integers(1, 3)

    def _slow_all(self) -> None:
        self._common_left -= 1
        if self._common_left <= 0:
            self._times = self._more = 0.0
        if self._common_left < -1200 and self._chance.random() < 0.01:
            self._common_left = int(self._chance.integers(5, 120))
            if self._chance.random() < 0.5:
                self._times = math.log(self._chance.uniform(1.5, 3.0))
            else:
                self._more = self._chance.uniform(0.1, 0.5)


@dataclass(frozen=True, slots=True)
class Beat:
    """One heartbeat of a recorded run."""

    at: float
    name: str
    crossings: tuple[Crossing, ...]
    step: float
    gave: tuple[Gave, ...]

    @classmethod
    def of(cls, line: str) -> Beat:
        at, name, crossings, step, gave = json.loads(line)
        came = (Crossing(peer=peer, bytes=carried, seconds=seconds) for peer, carried, seconds in crossings)
        given = (Gave(tag=tag, version=version, norm=norm, cosine=cosine) for tag, version, norm, cosine in gave)
        return cls(at, name, tuple(came), step, tuple(given))


def recorded(path: Path) -> list[Beat]:
    """A trace of `benchmarks.faults --record`, plain or .gz."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
        return [Beat.of(line) for line in text.splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise BenchmarkError(f"{path} is no trace of a run: {error}") from None


def replayed(beats: Sequence[Beat], seconds: float, chance: np.random.Generator) -> Iterator[set[Key]]:
    """Stretches of the trace, drawn with replacement, one after the other; what is confirmed after each heartbeat."""
    detector, now, versions = Detector(), 0.0, 0
    times = np.array([beat.at for beat in beats])
    while now < seconds:
        begin = chance.uniform(times[0], max(times[0], times[-1] - STRETCH))
        stretch = beats[np.searchsorted(times, begin) : np.searchsorted(times, begin + STRETCH)]
        first = min((gave.version for beat in stretch for gave in beat.gave), default=0)
        for beat in stretch:
            _tell(detector, beat, now + beat.at - begin, versions - first)
            yield {verdict.key for verdict in detector.look(now + beat.at - begin)}
        versions += 1 + max((gave.version - first for beat in stretch for gave in beat.gave), default=0)
        now += STRETCH


def _tell(detector: Detector, beat: Beat, now: float, later: int) -> None:
    for crossing in beat.crossings:
        detector.crossed(beat.name, crossing, now)
    detector.stepped(beat.name, beat.step, now)
    for gave in beat.gave:
        moved = Gave(tag=gave.tag, version=gave.version + later, norm=gave.norm, cosine=gave.cosine)
        detector.gave(beat.name, moved, now)


def upper(count: int) -> float:
    """Of a Poisson distribution: the largest mean with which so few are seen in at least one of twenty cases."""
    low, high = 0.0, 3.0 * count + 10.0
    for _ in range(60):
        mean = (low + high) / 2
        term = total = math.exp(-mean)
        for k in range(1, count + 1):
            term *= mean / k
            total += term
        low, high = (mean, high) if total > 0.05 else (low, mean)
    return low


def told(what: str, found: Counter[str], hours: float) -> str:
    count = found.total()
    kinds = ": " + ", ".join(f"{n} x {kind}" for kind, n in sorted(found.items())) if count else ""
    return (
        f"{what}: {count} alarms in {hours:g} h{kinds}; {count / hours:.3g} an hour, with 95 % confidence at most "
        f"{upper(count) / hours:.2g}"
    )


def days(arguments: argparse.Namespace, chance: np.random.Generator) -> Iterator[tuple[str, Counter[str], float]]:
    """What each is, its alarms, and hours."""
    hours = 0.2 if arguments.quick else arguments.hours
    if not hours:
        return
    for n in (4,) if arguments.quick else (4, 16):
        weather = Weather(n, chance)
        yield f"synthetic day, {n} peers", alarms(weather.window() for _ in range(round(hours * 3600))), hours
    if arguments.trace.exists():
        beats = recorded(arguments.trace)
        seconds = beats[-1].at - beats[0].at
        found = alarms(replayed(beats, hours * 3600, chance))
        yield f"recorded run of {seconds:.0f} s, drawn to a day by stretches of {STRETCH:g} s", found, hours


# --- the report -------------------------------------------------------------------------------------------------------


def cases(arguments: argparse.Namespace) -> Iterable[tuple[int, float, float]]:
    if arguments.quick:
        return [(4, 0.1, 3.0), GATE]
    peers = [int(each) for each in arguments.peers.split(",")]
    return [(n, sigma, factor) for n in peers for sigma in (0.1, 0.2) for factor in (2.0, 3.0)]


def main() -> None:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("--trials", type=int, default=200, help="of each row; a tenth of it for n = 64")
    parser.add_argument("--peers", default="4,8,16,64", help="default 4,8,16,64")
    parser.add_argument("--clean", type=int, default=CLEAN, help="windows without a fault")
    parser.add_argument("--hours", type=float, default=24.0, help="of clean days (default 24)")
    parser.add_argument(
        "--trace", type=Path, default=TRACE, help="a recorded clean run (default: one that comes with it)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few trials: the figures say little")
    arguments = parser.parse_args()
    with common.one_line_errors():
        sys.exit(1 if run(arguments) else 0)


def run(arguments: argparse.Namespace) -> list[str]:
    """Prints the report; returns the gates that failed."""
    chance = np.random.default_rng(arguments.seed)
    columns = ("peers", "sigma", "factor", "fault", "recall", "precision", "windows to verdict")
    report, failed = Report("detector", "Faults, planted into telemetry", columns), list[str]()
    for n, sigma, factor in cases(arguments) if arguments.trials else ():
        for kind in (*KINDS, TWO, ANY_TWO):
            tally = planted(n, sigma, factor, kind, arguments, chance)
            report.add(_row(n, sigma, factor, kind, tally), recall=tally.recall, precision=tally.precision)
            common.progress(" ".join(report.rows[-1]))
            if (n, sigma, factor) == GATE and (tally.recall < 0.98 or tally.precision < 0.99):
                failed.append(f"{kind} at n={n}: recall {tally.recall:.3f}, precision {tally.precision:.3f}")
    if windows := arguments.clean // (20 if arguments.quick else 1):
        world = World(16, 0.1, chance)
        found = alarms(world.window() for _ in range(windows))
        report.notes.append(told(f"{windows} clean windows (16 peers, sigma .1)", found, windows / 3600))
        failed += [f"{found.total()} alarms in clean windows"] if found else []
    for what, found, hours in days(arguments, chance):
        report.notes.append(told(what, found, hours))
        common.progress(report.notes[-1])
    report.notes += [f"FAILED: {each}" for each in failed]
    common.publish(report, arguments)
    return failed


def planted(n: int, sigma: float, factor: float, kind: str, arguments: Any, chance: np.random.Generator) -> Tally:
    tally, trials = Tally(), 8 if arguments.quick else arguments.trials
    for _ in range(trials if n < 64 else max(1, trials // 10)):
        kinds = {TWO: KINDS[:3], ANY_TWO: KINDS}.get(kind)
        drawn = [str(each) for each in chance.choice(kinds, 2)] if kinds else [kind]
        trial(n, sigma, drawn, factor, chance, tally)
    return tally


def _row(n: int, sigma: float, factor: float, kind: str, tally: Tally) -> tuple[str, ...]:
    windows = f"{statistics.median(tally.windows):g} ({max(tally.windows)})" if tally.windows else "-"
    return str(n), f"{sigma:g}", f"{factor:g}", kind, f"{tally.recall:.3f}", f"{tally.precision:.3f}", windows


if __name__ == "__main__":
    main()

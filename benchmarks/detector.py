"""The detector of slow senders, receivers and links, on synthetic delays with planted faults.

Every pair of n peers has its own usual delay (log-normal between pairs: WAN links differ by nature) and log-normal
noise of deviation sigma in each window. After some windows of health one fault, or two at once, makes its cells
`factor` times as slow, for the rest of the trial. Recall: faults that are confirmed, by kind and culprit. Precision:
confirmed verdicts that are right. Windows: from the fault to its verdict, the median and the largest.

    python -m benchmarks.detector --json detector.json
    python -m benchmarks.detector --quick

Ends with 1 if a gate fails: at n = 16, sigma = .1, factor 2 recall >= .98 and precision >= .99 for each kind, and no
alarm in 10,000 clean windows.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks import common
from benchmarks.common import Report
from fault.persisting import Patience
from fault.slowness import Culprit, Slowness

KINDS = ("sender", "receiver", "link", "two")
HEALTHY, FAULTY = 12, 12  # windows of a trial before and after the fault
BYTES = 1 << 20
BETWEEN = 1.0  # log-deviation of usual delays between pairs
GATE = (16, 0.1, 2.0)
CLEAN = 10_000
UPPER = 3.0  # events that are likely (95 %) to have been seen if so many were to be expected: the rule of three


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
    """n peers with links of their own nature; time goes in windows of a second."""

    def __init__(self, n: int, sigma: float, chance: np.random.Generator) -> None:
        self.names = [f"p{i:02d}" for i in range(n)]
        self._sigma, self._chance = sigma, chance
        self._usual = chance.normal(math.log(0.05), BETWEEN, (n, n))
        self._raised = np.zeros((n, n))
        self.detector = Slowness(Patience())
        self.now = 0.0

    def plant(self, kind: str, factor: float, busy: set[int]) -> Culprit:
        """A fault of this kind from now on; not where another is."""
        free = [i for i in range(len(self.names)) if i not in busy]
        s, d = (int(i) for i in self._chance.choice(free, 2, replace=False))
        busy |= {s, d}
        if kind == "sender":
            self._raised[s] += math.log(factor)
            return "sender", (self.names[s],)
        if kind == "receiver":
            self._raised[:, d] += math.log(factor)
            return "receiver", (self.names[d],)
        self._raised[s, d] += math.log(factor)
        return "link", (self.names[s], self.names[d])

    def window(self) -> set[Culprit]:
        """One passes; returns what is confirmed by then."""
        noise = self._chance.normal(0, self._sigma, self._usual.shape)
        seconds = np.exp(self._usual + self._raised + noise)
        for s, sender in enumerate(self.names):
            for d, receiver in enumerate(self.names):
                if s != d:
                    self.detector.observe(sender, receiver, BYTES, float(seconds[s, d]), self.now)
        self.now += 1.0
        self.detector.look(self.now)
        return set(self.detector.slow)


def trial(n: int, sigma: float, kinds: Sequence[str], factor: float, chance: np.random.Generator, tally: Tally) -> None:
    world = World(n, sigma, chance)
    wrong: set[Culprit] = set()
    for _ in range(HEALTHY):
        wrong |= world.window()
    busy: set[int] = set()
    planted = {world.plant(kind, factor, busy) for kind in kinds}
    seen: dict[Culprit, int] = {}
    for number in range(1, FAULTY + 1):
        for verdict in world.window():
            seen.setdefault(verdict, number)
    tally.faults += len(planted)
    tally.right += len(planted & seen.keys())
    tally.wrong += len(wrong | (seen.keys() - planted))
    tally.windows += [seen[each] for each in planted & seen.keys()]


def clean(n: int, sigma: float, windows: int, chance: np.random.Generator) -> int:
    """Alarms in so many windows of health."""
    world, alarms, before = World(n, sigma, chance), 0, set[Culprit]()
    for _ in range(windows):
        confirmed = world.window()
        alarms += len(confirmed - before)
        before = confirmed
    return alarms


def cases(quick: bool) -> Iterable[tuple[int, float, float]]:
    if quick:
        return [(4, 0.1, 3.0), GATE]
    return [(n, sigma, factor) for n in (4, 8, 16, 64) for sigma in (0.1, 0.2) for factor in (2.0, 3.0)]


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--trials", type=int, default=200, help="of each row; a tenth of it for n = 64")
    parser.add_argument("--clean", type=int, default=CLEAN, help="windows without a fault")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="few trials: the figures say little")
    arguments = parser.parse_args()
    with common.one_line_errors():
        sys.exit(1 if run(arguments) else 0)


def run(arguments: argparse.Namespace) -> list[str]:
    """Prints the report; returns the gates that failed."""
    chance = np.random.default_rng(arguments.seed)
    columns = ("peers", "sigma", "factor", "fault", "recall", "precision", "windows to verdict")
    report, failed = Report("detector", "Slow senders, receivers and links, planted", columns), list[str]()
    trials = 8 if arguments.quick else arguments.trials
    for n, sigma, factor in cases(arguments.quick):
        for kind in KINDS:
            tally = Tally()
            for _ in range(trials if n < 64 else max(1, trials // 10)):
                trial(n, sigma, _kinds(kind, chance), factor, chance, tally)
            report.add(_row(n, sigma, factor, kind, tally), recall=tally.recall, precision=tally.precision)
            if (n, sigma, factor) == GATE and (tally.recall < 0.98 or tally.precision < 0.99):
                failed.append(f"{kind} at n={n}: recall {tally.recall:.3f}, precision {tally.precision:.3f}")
    windows = arguments.clean // (20 if arguments.quick else 1)
    alarms = clean(16, 0.1, windows, chance)
    report.notes.append(
        f"{alarms} alarms in {windows} clean windows (16 peers, sigma .1): with windows of a second fewer than "
        f"{UPPER * 3600 / windows:.2f} an hour (95 %, if none)"
    )
    failed += [f"{alarms} alarms in clean windows"] if alarms else []
    report.notes += [f"FAILED: {each}" for each in failed]
    common.publish(report, arguments)
    return failed


def _kinds(kind: str, chance: np.random.Generator) -> Sequence[str]:
    return [str(each) for each in chance.choice(KINDS[:3], 2)] if kind == "two" else [kind]


def _row(n: int, sigma: float, factor: float, kind: str, tally: Tally) -> tuple[str, ...]:
    windows = f"{statistics.median(tally.windows):g} ({max(tally.windows)})" if tally.windows else "-"
    return str(n), f"{sigma:g}", f"{factor:g}", kind, f"{tally.recall:.3f}", f"{tally.precision:.3f}", windows


if __name__ == "__main__":
    main()

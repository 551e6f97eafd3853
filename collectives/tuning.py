"""How many stripes a link has, and which of them are replaced or wait: pure functions of what TCP says of itself.

A path on which single packets get lost gives one connection little (MSS / RTT * sqrt(3/2) / sqrt(p): Mathis et al.,
"The Macroscopic Behavior of the TCP Congestion Avoidance Algorithm", CCR 1997), and so does one on which buffers are
small for the distance. More connections then carry more, until the path is full. How many that takes is found by
trying: the number is doubled while that helps and halved while that does no harm.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass

from collectives.sockets import FAR, MOST_STRIPES, Vitals

FIRST = 8  # stripes of a long path, before anything is known of it
ENOUGH = 0.9  # of the most that was seen: a number of stripes that carries it will do
NEARLY_ALL = 0.97  # what takes its place where chance holds stripes back: more of them also get up to speed sooner
WORSE, BETTER = 0.75, 1.5  # times what a settled number carried: then the path is another one
PATIENCE = 3  # samples that must say so
BUSY_SECONDS, BUSY_TRIPS = 0.4, 8.0  # how long a link must have been busy for one sample,
LONG = 4  # times that, if it does not come to rest before: a sample had better be a whole operation
HALF = 0.5
PAUSE = 10  # looks after stripes could not be dialled
SLOW_SAMPLES = 8  # in a row in which a stripe has carried less than half of what the others do
FAST = 100e6  # bytes/s
FINE, FINEST = 256 << 10, 64 << 10
DETOUR = 2.0  # times what the fastest stripe needs for a frame that another may need in any case


def first_count(rtt: float) -> int:
    """Stripes to begin with: where there is no distance each one more costs time."""
    return FIRST if rtt > FAR else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A link while it was busy. goodput: bytes/s acknowledged. loss: part of the sent bytes that was sent again."""

    stripes: int
    goodput: float
    rtt: float
    shortest_rtt: float
    loss: float

    @property
    def held_back(self) -> bool:
        """Packets get lost although none queue: what limits the stripes is chance, not the path."""
        return self.loss > 0 and self.rtt < 1.15 * self.shortest_rtt


class Tuner:
    """Finds the smallest number of stripes that carries what a link can carry, and keeps it while that stays so.

    wanted: how many there should be now. The numbers tried are `first` times powers of two, up to `most`.
    """

    def __init__(self, first: int, most: int = MOST_STRIPES) -> None:
        self.wanted = first
        self.settled = False
        self._most = most
        self._seen: dict[int, Sample] = {}
        self._reference = 0.0
        self._elsewhere = self._strikes = 0
        self._patience = PATIENCE

    def observe(self, sample: Sample) -> int:
        """What to have after this sample. Samples with another number than was wanted say little."""
        if self.settled:
            self._watch(sample)
            return self.wanted
        self._seen[sample.stripes] = sample
        if sample.stripes == self.wanted:
            self._elsewhere = 0
            self._decide(sample)
        else:
            self._elsewhere += 1
            if self._elsewhere > PATIENCE:  # the other side wants more, or connections are refused
                self.wanted = self._best()
                self._settle(sample.goodput)
        return self.wanted

    def _best(self) -> int:
        """The smallest number that carries nearly the most."""
        most = max(each.goodput for each in self._seen.values())

        def will_do(each: Sample) -> bool:
            return each.goodput >= most * (NEARLY_ALL if each.held_back else ENOUGH)

        return min(number for number, each in self._seen.items() if will_do(each))

    def _decide(self, sample: Sample) -> None:
        best = self._best()
        if best == max(self._seen) and best < self._most:
            self.wanted = min(self._most, best * (4 if sample.held_back else 2))
        elif best > 1 and best // 2 not in self._seen:
            self.wanted = best // 2
        else:
            self.wanted = best
            self._settle(self._seen[best].goodput)

    def _settle(self, goodput: float) -> None:
        self.settled, self._reference, self._strikes, self._elsewhere = True, goodput, 0, 0

    def _watch(self, sample: Sample) -> None:
        """Begin anew when the path has become another one: each time that takes longer to believe."""
        if WORSE * self._reference <= sample.goodput <= BETTER * self._reference:
            self._strikes = 0
            self._reference += 0.1 * (sample.goodput - self._reference)
            return
        self._strikes += 1
        if self._strikes >= self._patience and sample.stripes == self.wanted:
            self._patience = min(2 * self._patience, 16 * PATIENCE)
            self.settled, self._seen = False, {sample.stripes: sample}
            self._decide(sample)


_UNUSED = Vitals(0.0, 0.0, 0, 0, 0, 0, 0, 0.0, 0, 0.0)


class Gauge:
    """Measures a link from what its stripes say, over periods in which it was busy.

    goodput, rtt (the shortest lately, without what the link itself queues): 0 until known. slow: a stripe that has
    carried less than half of its siblings' in each of the last SLOW_SAMPLES in which all were busy.
    """

    def __init__(self) -> None:
        self.goodput = self.rtt = 0.0
        self.slow: Hashable = None
        self._since: dict[Hashable, Vitals] = {}
        self._strikes: dict[Hashable, int] = {}
        self._known = False
        self._last = 0

    def look(self, stripes: Mapping[Hashable, Vitals]) -> Sample | None:
        """A sample, each time that the link has been busy for long enough with the same stripes, and rests."""
        if not stripes:
            return None
        self.rtt = min(each.shortest_rtt for each in stripes.values())
        if not self._since:
            self._since = dict.fromkeys(stripes, _UNUSED)
        if self._since.keys() != stripes.keys():
            self._since = dict(stripes)
            return None
        grown = {
            key: (now, now.acked - self._since[key].acked, now.busy - self._since[key].busy)
            for key, now in stripes.items()
        }
        acked = sum(count for _, count, _ in grown.values())
        busy = sum(count * seconds for _, count, seconds in grown.values()) / max(1, acked)
        if not acked or busy <= 0:
            return None
        rests, self._last = acked == self._last, acked
        rtt = statistics.median(each.rtt for each in stripes.values())
        enough = max(BUSY_SECONDS, BUSY_TRIPS * rtt)
        if busy < enough or (busy < LONG * enough and not rests):
            if not self._known and busy > 2 * rtt:
                self.goodput = acked / busy  # better than nothing
            return None
        return self._sample(stripes, grown, acked / busy, busy)

    def _sample(
        self,
        stripes: Mapping[Hashable, Vitals],
        grown: Mapping[Hashable, tuple[Vitals, int, float]],
        goodput: float,
        busy: float,
    ) -> Sample:
        sent = sum(now.sent - self._since[key].sent for key, now in stripes.items())
        resent = sum(now.resent - self._since[key].resent for key, now in stripes.items())
        self.goodput = goodput if not self._known else (self.goodput + goodput) / 2
        self._known = True
        if all(seconds > HALF * busy for _, _, seconds in grown.values()):
            self._judge({key: count / seconds for key, (_, count, seconds) in grown.items()})
        self._since = dict(stripes)
        return Sample(
            stripes=len(stripes),
            goodput=goodput,
            rtt=statistics.median(each.rtt for each in stripes.values()),
            shortest_rtt=self.rtt,
            loss=resent / max(1, sent),
        )

    def _judge(self, rates: Mapping[Hashable, float]) -> None:
        """Rates, when all stripes were busy. What is slow by chance does not stay so."""
        strikes = {}
        for key, rate in rates.items():
            others = [other for each, other in rates.items() if each != key]
            slow = bool(others) and rate < HALF * statistics.median(others)
            strikes[key] = self._strikes.get(key, 0) + 1 if slow else 0
        self._strikes = strikes
        worst = max(strikes, key=lambda key: (strikes[key], -rates[key]), default=None)
        self.slow = worst if worst is not None and strikes[worst] >= SLOW_SAMPLES else None


@dataclass(frozen=True, slots=True)
class Orders:
    """add: stripes to dial. retire: those that end. ask: what the dialler is to be told; 0: nothing."""

    add: int = 0
    retire: tuple[Hashable, ...] = ()
    ask: int = 0


class Care:
    """Looks after one link, on one of its sides. Only who dialled it adds and retires stripes; the other side asks.

    fixed: the number that was set, None for auto. base: the number where nothing is to be found out.
    asked: how many the other side wants.
    redialled: slow stripes that were replaced.
    """

    def __init__(self, *, dialler: bool, fixed: int | None, rtt: float, stripes: int) -> None:
        self.gauge = Gauge()
        self.asked = self.redialled = 0
        self._dialler, self._fixed = dialler, fixed
        self._tuner = Tuner(stripes) if fixed is None and rtt > FAR else None
        self.base = fixed or stripes
        self._told = 0
        self._leaving: Hashable = None
        self._pause = 0

    @property
    def wanted(self) -> int:
        """How many stripes the link should have."""
        if self._fixed is not None:
            return self.base
        mine = self.base if self._tuner is None else self._tuner.wanted
        return max(mine, min(self.asked, MOST_STRIPES))

    def look(self, stripes: Mapping[Hashable, Vitals]) -> Orders:
        """What is to be done, given the stripes that the link has now. Not while an earlier order is being executed."""
        sample = self.gauge.look(stripes)
        if sample is not None and self._tuner is not None:
            self._tuner.observe(sample)
        if self._dialler:
            return self._order(stripes)
        wanted = self._tuner.wanted if self._tuner is not None else 0
        if wanted in (0, self._told):
            return Orders()
        self._told = wanted
        return Orders(ask=wanted)

    def refused(self) -> None:
        """What was ordered last could not be dialled: not again before long."""
        self._pause = PAUSE

    def _order(self, stripes: Mapping[Hashable, Vitals]) -> Orders:
        count, wanted = len(stripes), self.wanted
        if self._pause:
            self._pause -= 1
            return Orders()
        if self._leaving in stripes and count > wanted:  # its successor is there
            leaving, self._leaving = self._leaving, None
            self.redialled += 1
            return Orders(retire=(leaving,))
        if count < wanted:
            return Orders(add=wanted - count)
        if count > wanted:
            slowest = sorted(stripes, key=lambda key: stripes[key].rate)
            return Orders(retire=tuple(slowest[: count - wanted]))
        if self.gauge.slow in stripes and self.gauge.slow is not None:
            self._leaving, self.gauge.slow = self.gauge.slow, None
            return Orders(add=1)
        return Orders()


def worth_it(rate: float, rates: Iterable[float], frame: int, waiting: int) -> bool:
    """Whether a stripe of this rate should take the next frame, or leave it for a faster one that is busy now.

    It should if it is through with it before the faster ones are through with all that waits, so that slow stripes
    hold nothing up in the end (earliest completion first: Lim et al., "ECF: An MPTCP Path Scheduler to Manage
    Heterogeneous Paths", CoNEXT 2017). Rates in bytes/s; frame, waiting: bytes.
    """
    faster = [each for each in rates if each > rate]
    if rate <= 0 or not faster:
        return True
    return frame / rate <= max(waiting / sum(faster), DETOUR * frame / max(faster))


def fine_chunk(links: Iterable[tuple[float, float]], factor: float = 1.0) -> int:
    """Bytes in which tensors are cut among links of these (round trip in seconds, bytes/s); 0 for the usual.

    factor: bytes on the wire for each of the tensor's; 0.25 for float32 as int8.

    Over long paths each stripe carries little, so that a whole chunk would be long on its way when the others are done.
    On fast ones finer chunks cost more time than they save.
    """
    far = [goodput for rtt, goodput in links if rtt > FAR]
    if not far:
        return 0
    carried = FINE if max(far) > FAST else FINEST
    return min(int(carried / factor) // 64 * 64, 1 << 20)

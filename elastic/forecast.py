"""What a run will be like over given links, before anything is started: bytes, seconds, utilisation, memory. Pure.

n numbers, M peers, H inner steps of s seconds, P fragments; a, b: bits of a number on its way to be summed, and back.

| what | formula | source |
|---|---|---|
| a, b | bits of the wire, + 32 / 128 for the steps of blocks, + the headers of frames | `collectives/wires.py` |
| sent | by who owns the share x: (a (1 - x) + b (M - 1) x) n / P bits; | `collectives/topology.py` |
| | if all own as much, (M - 1) / M (a + b) n / P; as much around a ring | |
| carrying | the slowest peer's bits over its rate, up or down | |
| rate | the access less headers, of which links fill `FILLED`; at most what stripes carry | docs/benchmarks.md |
| a stripe | min(MSS / RTT x sqrt(3 / 2) / sqrt(loss), window / RTT) | Mathis et al., CCR 1997 |
| starting | links that have rested send 10 packets a stripe, then twice as many each round | RFC 6928, 5681 |
| | trip, until they are full: each such trip lasts RTT - window / rate too long | |
| latency | 3 RTT, 3.5 for three peers or more: propose, start, READY, numbers, results, | docs/design.md |
| | report, commit | |
| stall, utilisation | `elastic/outer/timing.py` | arXiv 2501.18512 |
| memory | n float32, times (1 + s) + (1 + s) / P + 2 / P + kept results / P; eager: 2 + s more | docs/algorithms.md |

s in the last row: vectors of the outer optimizer. Peers are taken to be equally fast, and their access is what limits
them, not the paths between. What the training thread itself does (contributions, outer steps) counts if `host_rate` is
given. Not in it: processors that encode or send slower than the links carry (at 1 Gbit/s and more, on few cores), a
backward pass that hides a part of data-parallel reductions, peers that come and go.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from collectives.frames import HEADER_BYTES
from collectives.records import BLOCK
from collectives.sockets import FAR, MOST_STRIPES, NEAR, LinkOptions
from collectives.tuning import FIRST, fine_chunk

from .errors import ConfigurationError
from .outer.cadence import WHOLE_ROUND
from .outer.timing import Timing
from .planning import FASTEST, LARGE, PLANNED_AT_ALL, WIRE_BYTES

PACKET, PACKET_HEADERS = 1500, 52  # bytes; IP, TCP and its timestamps
FILLED = 0.93  # of what a link carries; measured: 91 to 94 % where nothing is lost
SEGMENT = PACKET - PACKET_HEADERS
FIRST_PACKETS = 10  # of a connection that has rested
WINDOW = 3 << 20  # bytes in flight on one connection: half of the kernel's usual tcp_rmem
LEAST_TIMEOUT = 0.2  # seconds without a packet, beside a round trip, after which TCP halves what it sends at once
TRIPS, TRIPS_OF_MORE = 3.0, 3.5
NOISE = 1.1  # the planner keeps equal shares if they take so much longer than the best at most
KEPT_RESULTS = 2
FLOAT = 4

QUALITY_STEPS = 30  # H below which nothing is gained (scaling laws of DiLoCo: best loss at 30)
MOST_STEPS = 1000  # H up to which DiLoCo was tried: + 2.9 % perplexity against 50
MOST_DELAY = 10  # tau up to which Streaming loses less than .2 % of loss
GOOD_DELAY = 5  # tau that its paper advises
ALIKE = 1.25  # a simpler choice is taken if its H is at most so many times the smallest
PARTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # fragments that are tried
USUAL_STEPS = 100  # H to compare with where none reaches the target
WIRES = tuple(name for name in WIRE_BYTES if name != "raw")


def gathered_in(wire: str) -> str:
    """How results travel back: 4 bits are enough for parts, 8 for their sum (`tensors.gathered_in`)."""
    return "int8" if wire in ("int4", "e3m0") else wire


def bits_of(wire: str, chunk: int = 0) -> float:
    """Of a number on its way: its level, its part of the block's step, and of the header of a chunk of so many."""
    step = 32 / BLOCK if wire in ("int8", "int4", "e3m0") else 0.0
    return 8 * WIRE_BYTES[wire] + step + (8 * HEADER_BYTES / chunk if chunk else 0.0)


# --- links ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a peer is connected. up, down: bits a second in all. rtt: seconds of a round trip to the others. loss: part
    of the packets that is lost by chance. ConfigurationError for what no link is like.
    """

    up: float
    down: float
    rtt: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        if not (0 < self.up < math.inf and 0 < self.down < math.inf):
            raise ConfigurationError(f"a link of {self.up:g} bits a second up and {self.down:g} down carries nothing")
        if not (0 <= self.rtt < math.inf and 0 <= self.loss < 1):
            raise ConfigurationError(
                f"rtt is {self.rtt:g} s, loss {self.loss:g}: neither may be below 0, nor loss reach 1"
            )

    def scaled(self, factor: float) -> Access:
        return replace(self, up=self.up * factor, down=self.down * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """One exchange of all peers. sent: bytes of the peer that sends most; total: of all. pattern: direct or ring.

    carrying, starting, latency: seconds that bytes take at full rate, that links lose while they get there, and in
    which nothing is carried.
    """

    sent: float
    total: float
    pattern: str
    carrying: float
    starting: float
    latency: float

    @property
    def seconds(self) -> float:
        return self.carrying + self.starting + self.latency


def slow_start(nbytes: float, rate: float, rtt: float, window: float) -> float:
    """Seconds more than nbytes / rate that a link takes which may have `window` bytes in flight at first."""
    lost, left = 0.0, nbytes
    while left > window and window < rate * rtt:
        lost += rtt - window / rate
        left -= window
        window *= 2
    return lost


def stripe_rate(access: Access) -> float:
    """Bytes a second that one connection carries at most."""
    if not access.rtt:
        return math.inf
    by_loss = SEGMENT / access.rtt * math.sqrt(1.5 / access.loss) if access.loss else math.inf
    return min(by_loss, WINDOW / access.rtt)


def _slowest(kinds: Iterable[Access]) -> list[Access]:
    """Those of which no other is as bad in everything: with the same to carry, the slowest is among them."""
    found: list[Access] = []
    for access in sorted(kinds, key=lambda each: (each.up, each.down, -each.rtt, -each.loss)):
        if not any(_as_bad(other, access) for other in found):
            found.append(access)
    return found


def _as_bad(one: Access, other: Access) -> bool:
    narrow = one.up <= other.up and one.down <= other.down
    return narrow and one.rtt >= other.rtt and one.loss >= other.loss


class Network:
    """The links of all peers.

    accesses: one for each, or how many have which. stripes: between two peers; None: as `auto` does.

    Peers with equal links count as one kind, so that a thousand of them are as quickly forecast as two. It remembers
    what it was asked, and is not to be changed.
    """

    def __init__(self, accesses: Iterable[Access] | Mapping[Access, int], stripes: int | None = None) -> None:
        self.kinds = Counter(accesses)
        self.peers = self.kinds.total()
        if self.peers < 2:
            raise ConfigurationError(f"there must be at least 2 peers to exchange anything, not {self.peers}")
        if stripes is not None and not 1 <= stripes <= MOST_STRIPES:
            raise ConfigurationError(f"stripes is {stripes}: choose 1 to {MOST_STRIPES}")
        self.stripes = stripes
        self.rtt = max(access.rtt for access in self.kinds)
        self._slow = _slowest(self.kinds)
        self._rates = [(each.rtt, self._pair(each, each.up)[1]) for each in self.kinds]
        self._known: dict[tuple[float, str, float], Exchange] = {}
        self._shared: dict[tuple[float, float], dict[Access, float]] = {}

    def scaled(self, factor: float) -> Network:
        """The same with links so many times as fast."""
        return Network({access.scaled(factor): count for access, count in self.kinds.items()}, self.stripes)

    def exchange(self, numbers: float, wire: str, rested: float = math.inf) -> Exchange:
        """Of so many numbers, between links that have carried nothing for `rested` seconds."""
        key = (numbers, wire, rested)
        if key not in self._known:
            self._known[key] = self._exchange(numbers, wire, rested)
        return self._known[key]

    def _exchange(self, numbers: float, wire: str, rested: float) -> Exchange:
        chunk = self._chunk(wire)
        there, back = bits_of(wire, chunk), bits_of(gathered_in(wire), chunk)
        shares = self._shares(there, back)
        loads = {access: self._load(there, back, share, numbers) for access, share in shares.items()}
        slowest = max((self._seconds(access, load, rested) for access, load in loads.items()), key=sum)
        pattern = self._pattern(numbers, wire)
        return Exchange(
            sent=max(up for up, _ in loads.values()) / 8,
            total=(self.peers - 1) * (there + back) * numbers / 8,
            pattern=pattern,
            carrying=slowest[0],
            starting=slowest[1],
            latency=self._latency(pattern),
        )

    def _load(self, there: float, back: float, share: float, numbers: float) -> tuple[float, float]:
        """Bits that the owner of this share sends and receives."""
        others = self.peers - 1
        up = there * (1 - share) + back * others * share
        down = there * others * share + back * (1 - share)
        return up * numbers, down * numbers

    def _seconds(self, access: Access, load: tuple[float, float], rested: float) -> tuple[float, float]:
        """What it takes a peer at full rate, and what its links lose before they are there, in the slower direction."""
        found = []
        for bits, rate in zip(load, (access.up, access.down), strict=True):
            stripes, each = self._pair(access, rate)
            halvings = min(rested / (access.rtt + LEAST_TIMEOUT), 1000.0) // 1
            window = max(stripes * FIRST_PACKETS * SEGMENT, each * access.rtt / 2**halvings)
            nbytes = bits / 8 / (self.peers - 1)
            found.append((nbytes / each, slow_start(nbytes, each, access.rtt, window)))
        return max(found, key=sum)

    def _pair(self, access: Access, rate: float) -> tuple[int, float]:
        """Stripes of the link to one other peer, and bytes a second on it while all are busy."""
        share = FILLED * SEGMENT / PACKET * rate / 8 / (self.peers - 1)
        most = stripe_rate(access)
        stripes = self.stripes or self._auto(access, share / most)
        return stripes, min(share, stripes * most)

    def _auto(self, access: Access, needed: float) -> int:
        """As many as the tuner begins with, doubled until they carry what the access does."""
        stripes = FIRST if access.rtt > FAR else 1
        while stripes < min(needed, MOST_STRIPES):
            stripes *= 2
        return stripes

    def _chunk(self, wire: str) -> int:
        """Numbers that travel in one frame."""
        nbytes = fine_chunk(self._rates, factor=WIRE_BYTES[wire] / FLOAT) or LinkOptions().chunk_bytes
        return nbytes // FLOAT // BLOCK * BLOCK

    def _pattern(self, numbers: float, wire: str) -> str:
        """As `planning.Routes`: peers in one room, on a network that is faster than they are, take a ring."""
        near = all(0 < access.rtt < NEAR and min(access.up, access.down) >= 8 * FASTEST for access in self.kinds)
        few = 2 < self.peers <= PLANNED_AT_ALL
        return "ring" if near and few and wire == "f32" and FLOAT * numbers >= LARGE else "direct"

    def _latency(self, pattern: str) -> float:
        """Proposal to commit. A ring passes numbers and results 2 (M - 1) times where the direct pattern does twice."""
        trips = TRIPS if self.peers == 2 else TRIPS_OF_MORE
        return self.rtt * (trips + (self.peers - 2 if pattern == "ring" else 0))

    def _shares(self, there: float, back: float) -> dict[Access, float]:
        key = (there, back)
        if key not in self._shared:
            self._shared[key] = self._planned(there, back)
        return self._shared[key]

    def _planned(self, there: float, back: float) -> dict[Access, float]:
        """Equal shares, of those who may be slowest; or the fastest ones, if that saves more than measurements err, as
        `topology.plan` has it.
        """
        equal = dict.fromkeys(self._slow, 1 / self.peers)
        if len(self.kinds) == 1 or self.peers > PLANNED_AT_ALL:
            return equal
        up, down = self._load(there, back, 1 / self.peers, 1.0)
        evenly = max(up / min(access.up for access in self.kinds), down / min(access.down for access in self.kinds))
        best, shares = self._fastest(there, back, evenly)
        return equal if evenly <= NOISE * best else shares

    def _fastest(self, there: float, back: float, enough: float) -> tuple[float, dict[Access, float]]:
        """Fewest seconds a number, by bisection, and shares that reach them, within each peer's limits."""
        low, high = 0.0, enough
        for _ in range(50):
            middle = (low + high) / 2
            room = self._room(there, back, middle)
            low, high = (low, middle) if room is not None else (middle, high)
        room = self._room(there, back, high)
        assert room is not None, "equal shares fit into the seconds that they take"
        least = math.fsum(self.kinds[access] * low for access, (low, _) in room.items())
        slack = math.fsum(self.kinds[access] * (most - low) for access, (low, most) in room.items())
        part = (1 - least) / slack if slack else 0.0
        return high, {access: low + part * (most - low) for access, (low, most) in room.items()}

    def _room(self, there: float, back: float, seconds: float) -> dict[Access, tuple[float, float]] | None:
        """The least and the largest share that each may have; None if they cannot sum to 1."""
        others = self.peers - 1
        room = {}
        for access in self.kinds:
            rows = ((there, back * others - there, access.up), (back, there * others - back, access.down))
            least, most = 0.0, 1.0
            for fixed, growing, rate in rows:
                left = rate * seconds - fixed
                if growing > 0:
                    most = min(most, left / growing)
                elif growing < 0:
                    least = max(least, left / growing)
                elif left < 0:
                    return None
            if least > most or most < 0:
                return None
            room[access] = (least, most)
        sums = [math.fsum(self.kinds[access] * limits[at] for access, limits in room.items()) for at in (0, 1)]
        return room if sums[0] <= 1 + 1e-9 and sums[1] >= 1 - 1e-9 else None


# --- algorithms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """title: as people call it; call, options: how a script does, and what it has to say beside.

    fragmented: P and tau can be chosen. delay: what tau is otherwise. steps: of H, if that is fixed. extra: vectors of
    the model's length beside what all loops hold.
    """

    title: str
    call: str = ""
    options: str = ""
    fragmented: bool = False
    delay: int = 0
    steps: int = 0
    extra: float = 0.0


DATA_PARALLEL = Algorithm(title="data-parallel", steps=1)
DILOCO = Algorithm(title="DiLoCo", call="DiLoCo")
STREAMING = Algorithm(title="Streaming", call="StreamingDiLoCo", fragmented=True)
DECOUPLED = Algorithm(title="Decoupled", call="DecoupledDiLoCo", fragmented=True)
DELAYED = Algorithm(title="Delayed", call="DelayedDiLoCo", delay=WHOLE_ROUND)
EAGER = Algorithm(title="Eager", call="DelayedDiLoCo", options=", eager=True", delay=WHOLE_ROUND, extra=3.0)
CO2 = Algorithm(title="CO2", call="CO2", delay=WHOLE_ROUND)
# In the order of what is to be preferred, of those that need as few steps: DiLoCo is the reference for quality.
ALGORITHMS = (DATA_PARALLEL, DILOCO, STREAMING, EAGER, DECOUPLED, DELAYED, CO2)
SLOTS = 1  # vectors of the outer optimizers that the loops come with: Nesterov, heavy ball


def memory_bytes(params: float, algorithm: Algorithm, fragments: int) -> float:
    """Of a peer's host, beside the model and its inner optimizer."""
    if algorithm is DATA_PARALLEL:
        return 2 * FLOAT * params
    state = 1 + SLOTS
    return FLOAT * params * (state + algorithm.extra + (state + 2 + KEPT_RESULTS) / fragments)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """An algorithm with everything chosen. delay: tau, or WHOLE_ROUND."""

    algorithm: Algorithm
    wire: str
    sync_every: int
    fragments: int = 1
    delay: int = 0

    @property
    def call(self) -> str:
        """As a script would write it."""
        algorithm = self.algorithm
        if algorithm is DATA_PARALLEL:
            return f'peer.all_reduce(gradients, op="mean", wire="{self.wire}")'
        words = f"sync_every={self.sync_every}"
        if algorithm.fragmented:
            words += f", fragments={self.fragments}, sync_delay={self.delay}"
        return f'elastic.{algorithm.call}(model, inner, peer, {words}{algorithm.options}, wire="{self.wire}")'


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Of the peer with most to do. round: one exchange. waited: seconds of H steps in which it does not train."""

    scheme: Scheme
    pattern: str
    round_bytes: float
    step_bytes: float
    total_step_bytes: float
    round_seconds: float
    waited_seconds: float
    utilisation: float
    memory_bytes: float


@dataclass(frozen=True, kw_only=True)
class Setting:
    """params: of the model. step_seconds: of an inner step. host_rate: bytes of float32 parameters a second for which
    a peer makes contributions, applies results and hashes them, in its training thread; inf: as if that took no time.
    """

    params: float
    step_seconds: float
    network: Network
    host_rate: float = math.inf
    fragments: int | None = None  # if they are given
    delay: int | None = None
    target: float = 0.95
    most_steps: int = MOST_STEPS

    def __post_init__(self) -> None:
        for name, value in (("params", self.params), ("step_seconds", self.step_seconds)):
            if not 0 < value < math.inf:
                raise ConfigurationError(f"{name} is {value:g}: it must be above 0")
        if not self.host_rate > 0:
            raise ConfigurationError(f"host_rate is {self.host_rate:g}: it must be above 0")
        if not 0 < self.target < 1:
            raise ConfigurationError(f"target is {self.target:g}: it must be above 0 and below 1")
        if self.fragments is not None and not 1 <= self.fragments <= self.params:
            raise ConfigurationError(f"fragments is {self.fragments}: it must be at least 1")
        if self.delay is not None and self.delay < 0:
            raise ConfigurationError(f"sync_delay is {self.delay}: it must be at least 0")

    def timing(self, scheme: Scheme) -> tuple[Exchange, Timing]:
        """The exchange, and the model of stalls for it."""
        numbers, network = self.params / scheme.fragments, self.network
        rested = self.step_seconds if scheme.algorithm is DATA_PARALLEL else math.inf
        exchange = network.exchange(numbers, scheme.wire, rested)
        carried = (network.peers - 1) / network.peers * numbers * 2
        timing = Timing(
            numbers=self.params,
            peers=network.peers,
            bandwidth=carried / exchange.carrying,
            step_seconds=self.step_seconds,
            sync_every=scheme.sync_every,
            fragments=scheme.fragments,
            delay=scheme.delay,
            bits=(1.0, 1.0),  # the rate is one of numbers, since peers with unlike links carry unlike parts of the bits
            latency=exchange.latency + exchange.starting,
            busy=0.0 if scheme.algorithm is DATA_PARALLEL else FLOAT * numbers / self.host_rate,
        )
        return exchange, timing

    def forecast(self, scheme: Scheme) -> Forecast:
        exchange, timing = self.timing(scheme)
        rounds = scheme.fragments / scheme.sync_every
        return Forecast(
            scheme=scheme,
            pattern=exchange.pattern,
            round_bytes=exchange.sent,
            step_bytes=exchange.sent * rounds,
            total_step_bytes=exchange.total * rounds,
            round_seconds=timing.exchange_seconds,
            waited_seconds=scheme.fragments * (timing.stall_seconds + timing.busy),
            utilisation=timing.utilisation,
            memory_bytes=memory_bytes(self.params, scheme.algorithm, scheme.fragments),
        )

    def reaches(self, scheme: Scheme) -> bool:
        return self.timing(scheme)[1].utilisation >= self.target

    # Choosing.

    def scheme(self, algorithm: Algorithm, wire: str, sync_every: int) -> Scheme:
        """With the fragments and the delay that suit it best: of those that reach the target, up to GOOD_DELAY steps of
        delay and the fewest fragments; then the shortest delay. Without any, the highest utilisation.
        """
        options = list(self._options(algorithm, wire, algorithm.steps or sync_every))
        good = [each for each in options if self.reaches(each)]
        if good:
            return min(good, key=lambda each: (max(each.delay, GOOD_DELAY), each.fragments))
        if not options:
            raise ConfigurationError(
                f"sync_every is {sync_every}: {self.fragments or 1} fragments and a sync_delay of {self.delay or 1} "
                f"take {self.least_steps(algorithm)} steps or more, since one exchange is under way at a time"
            )
        return max(options, key=lambda each: self.timing(each)[1].utilisation)

    def least_steps(self, algorithm: Algorithm) -> int:
        """H that the given fragments and delay leave room for."""
        return (self.fragments or 1) * max(1, self.delay or 0) if algorithm.fragmented else 1

    def _options(self, algorithm: Algorithm, wire: str, sync_every: int) -> Iterator[Scheme]:
        made = Scheme(algorithm=algorithm, wire=wire, sync_every=sync_every, delay=algorithm.delay)
        if not algorithm.fragmented:
            yield made
            return
        for fragments in [self.fragments] if self.fragments else PARTS:
            if fragments * max(1, self.delay or 0) <= sync_every:
                cut = replace(made, fragments=fragments)
                yield replace(cut, delay=self._delay(cut) if self.delay is None else self.delay)

    def _delay(self, scheme: Scheme) -> int:
        """As many steps as the exchange takes, as far as they are to be had."""
        seconds = self.network.exchange(self.params / scheme.fragments, scheme.wire).seconds
        return max(1, min(math.ceil(seconds / self.step_seconds), scheme.sync_every // scheme.fragments, MOST_DELAY))

    def fewest_steps(self, algorithm: Algorithm, wire: str) -> int | None:
        """The smallest H with which the target is reached; None if there is none up to `most_steps`.

        With given fragments, utilisation never falls as H grows.
        """
        if algorithm.steps:
            return algorithm.steps if self.reaches(self.scheme(algorithm, wire, 1)) else None
        wanted = [self.fragments] if self.fragments else PARTS if algorithm.fragmented else [1]
        found = [self._bisect(algorithm, wire, fragments) for fragments in wanted]
        return min((each for each in found if each is not None), default=None)

    def _bisect(self, algorithm: Algorithm, wire: str, fragments: int) -> int | None:
        cut = replace(self, fragments=fragments)
        low, high = cut.least_steps(algorithm) - 1, self.most_steps

        def reached(steps: int) -> bool:
            return any(map(cut.reaches, cut._options(algorithm, wire, steps)))

        if high <= low or not reached(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        return high


# --- advice -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """best: what is recommended, for these reasons, a line each; or, if `reached` is not, what comes nearest.

    Then, what would do instead, all else equal: faster: links so many times as fast; longer: so large an H. None: that
    alone will not do.
    """

    reached: bool
    best: Forecast
    reasons: tuple[str, ...] = ()
    faster: float | None = None
    longer: int | None = None


Candidate = tuple[Algorithm, str]


def advise(setting: Setting, algorithms: Sequence[Algorithm], wires: Sequence[str], steps: int | None = None) -> Advice:
    """The smallest H that reaches the target, and how; or what would have to change. steps: H, if that is given.

    Below QUALITY_STEPS a smaller H gains nothing. What is simpler (algorithms and wires come in that order) is taken if
    its H is at most ALIKE times the smallest.
    """
    loops = [(each, wire) for each in algorithms for wire in wires if each is not DATA_PARALLEL]
    plain = [(each, wire) for each in algorithms for wire in wires if each is DATA_PARALLEL]
    if plain and (steps is None or not loops):
        found = next((pair for pair in plain if _may_serve(pair, loops) and setting.fewest_steps(*pair)), None)
        if found:
            return _without_loop(setting, found)
    needed = _needed(setting, loops, steps)
    if not needed:
        return _unreached(setting, loops or plain, steps)
    chosen = next(pair for pair, count in needed.items() if count <= ALIKE * min(needed.values()))
    best = setting.forecast(setting.scheme(*chosen, needed[chosen]))
    return Advice(reached=True, best=best, reasons=tuple(_reasons(setting, best, needed, steps)))


def _needed(setting: Setting, candidates: Sequence[Candidate], steps: int | None) -> dict[Candidate, int]:
    """H with which each reaches the target, for those that do."""
    if steps is not None:
        return {pair: steps for pair in candidates if setting.reaches(setting.scheme(*pair, steps))}
    found = {pair: setting.fewest_steps(*pair) for pair in candidates}
    return {pair: max(count, QUALITY_STEPS) for pair, count in found.items() if count is not None}


def _may_serve(pair: Candidate, loops: Sequence[Candidate]) -> bool:
    """Gradients of every step in few bits are another training: only where there is no choice."""
    return not loops or pair[1] in ("f32", "bf16", "f16")


def _without_loop(setting: Setting, pair: Candidate) -> Advice:
    best = setting.forecast(setting.scheme(*pair, 1))
    words = f"H 1: the gradients of a step are reduced in {best.round_seconds:.3g} s, so that no outer loop is needed"
    return Advice(reached=True, best=best, reasons=(words,))


def _reasons(setting: Setting, best: Forecast, needed: Mapping[Candidate, int], steps: int | None) -> Iterator[str]:
    scheme = best.scheme
    yield _of_steps(setting, scheme, steps)
    yield from _of_algorithm(setting, scheme)
    if scheme.algorithm.fragmented:
        fewest = "no more than the model has layers, and the fewest with which delays are short"
        yield f"fragments {scheme.fragments}: {fewest if setting.fragments is None else 'as given'}"
        hidden = scheme.delay * setting.step_seconds
        yield f"sync_delay {scheme.delay}: an exchange takes {best.round_seconds:.3g} s, these steps {hidden:.3g} s"
    yield _of_wire(scheme, {pair[1]: count for pair, count in needed.items() if pair[0] is scheme.algorithm}, steps)


def _of_steps(setting: Setting, scheme: Scheme, steps: int | None) -> str:
    target = f"{100 * setting.target:g} %"
    if steps is not None:
        return f"H {steps}: as given; {target} is reached"
    fewest = setting.fewest_steps(scheme.algorithm, scheme.wire)
    if fewest is not None and fewest < scheme.sync_every:
        return f"H {scheme.sync_every}: {fewest} would reach {target}, but below {QUALITY_STEPS} nothing is gained"
    return f"H {scheme.sync_every}: the smallest with which {target} is reached"


def _of_algorithm(setting: Setting, scheme: Scheme) -> Iterator[str]:
    if scheme.algorithm is DILOCO:
        yield "DiLoCo: the simplest, and the reference for quality"
        return
    plain = replace(setting, most_steps=1_000_000).fewest_steps(DILOCO, scheme.wire)
    waiting = f"needs H {plain} in {scheme.wire}" if plain else f"does not get there in {scheme.wire}, whatever H"
    yield f"{scheme.algorithm.title}: exchanges are hidden behind training; DiLoCo, which waits for them, {waiting}"


def _of_wire(scheme: Scheme, needed: Mapping[str, int], steps: int | None) -> str:
    back = gathered_in(scheme.wire)
    words = f"wire {scheme.wire}" + (f" (results come back in {back})" if back != scheme.wire else "")
    if steps is not None:
        return f"{words}: the first that will do"
    finer = list(needed)[: list(needed).index(scheme.wire)]
    if finer:
        return f"{words}: with more exact ones H is larger: " + ", ".join(f"{each} {needed[each]}" for each in finer)
    return f"{words}: {'exact' if scheme.wire == 'f32' else 'the most exact of those that get there'}"


def _unreached(setting: Setting, candidates: Sequence[Candidate], steps: int | None) -> Advice:
    """What comes nearest, and what it would take."""
    most = steps or setting.most_steps
    found = [setting.forecast(setting.scheme(*pair, most)) for pair in candidates]
    best = max(found, key=lambda each: each.utilisation)
    pair = best.scheme.algorithm, best.scheme.wire
    longer = replace(setting, most_steps=1_000_000).fewest_steps(*pair)
    faster = _faster(setting, pair, most)
    return Advice(reached=False, best=best, faster=faster, longer=None if best.scheme.algorithm.steps else longer)


def _faster(setting: Setting, pair: Candidate, steps: int) -> float | None:
    """How many times as fast all links would have to be; None if a million times would not do."""

    def reached(power: float) -> bool:
        faster = replace(setting, network=setting.network.scaled(2**power))
        return faster.reaches(faster.scheme(*pair, steps))

    low, high = 0.0, 20.0
    if not reached(high):
        return None
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return float(2**high)


def joining(setting: Setting) -> tuple[float, float]:
    """Bytes of the outer state that a newcomer fetches, and the seconds that the slowest access takes for them."""
    nbytes = FLOAT * setting.params * (1 + SLOTS)
    rate = FILLED * SEGMENT / PACKET * min(access.down for access in setting.network.kinds) / 8
    return nbytes, nbytes / rate + setting.network.rtt

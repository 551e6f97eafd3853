"""How an attempt is executed, from what was measured: pure functions, the same answer on every machine.

`plan` decides who takes part (the largest group that is connected, relays included), the pattern, and its numbers:

- direct: the shares. The directed pair i->j carries a*s[j] (parts) + b*s[i] (results) of the tensor's bytes, so the
  fastest shares are a linear programme: with y = s / seconds it reads max sum(y), a*y[j] + b*y[i] <= bandwidth[i][j].
  For a = b its dual is the minimum-weight fractional edge cover (Schrijver, Combinatorial Optimization, ch. 27 and 30);
  that dual is what `_Vertex` solves, by the revised simplex method. Who is part of a cut pair owns nothing.
- ring: the order, by the slowest link and then latency: the bottleneck travelling salesman problem (Gilmore and Gomory,
  Operations Research 12, 1964), exact up to 8 peers by branch and bound, above that by local search. Its shares are a
  linear programme of the same form: a link carries all parts but those of its sender and all results but those of its
  receiver's share.
- tree: parents. A maximum spanning tree has the widest bottleneck that any has (Hu, Operations Research 9, 1961); among
  the trees with links that wide, the one of least depth (in seconds, then in hops).

Of several patterns the fastest is taken; direct is preferred to ring and ring to tree within 10 %. Lossy formats always
go direct while any peer can talk to all others. A tree, or few owners for the sake of latency, must be faster even if
no peer of unknown limits carries more in all than its widest link does: pairs are often measured one at a time.

Measurements are noisy. Shares are exactly equal if that costs at most 10 % over the optimum (so whenever all bandwidths
lie within 10 % of each other); otherwise they are the most even ones within 1 % of it, and those that differ by less
than a quarter are made equal where this keeps within the 10 %. A `Planner` stays with a plan until another is 15 %
faster.

Only additions, multiplications, divisions and comparisons of doubles are used, in a fixed order: so that two machines
that hold the same matrix hold the same plan. (Not the built-in sum of floats, which Python 3.12 made more precise.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import NamedTuple

from collectives.records import Member

Pair = frozenset[str]
Floats = Sequence[float]

_ASSUMED = 12.5e6  # bytes/s, where nothing was measured at all
_NOISE = 1.1  # equal shares are kept up to this factor over the optimum
_STAY = 1.15  # a Planner keeps its plan up to this factor over the best
_ALIKE = 1.25  # shares within this factor are made equal
_PREFERENCE = 1.1  # a pattern further down the list must be faster by this factor
_EXACT_RING = 8  # peers
_REACHES = 8  # sets of owners tried, by how far away they are
_TIE = 1.01  # shares as even as they can be while the exchange takes at most this factor longer
_NEWTON_STEPS = 32
_TOLERANCE = 1e-9
_NEVER = 1e60


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """What is known about the paths between contributors, by index into `names`.

    bandwidth: bytes/s of the directed pair i->j; 0.0: not measured (the median of those measured is assumed).
    rtt: seconds, either direction of a pair; 0.0: not measured (likewise).
    cuts: pairs that cannot talk; names that are no contributors are ignored.
    uplinks, downlinks: bytes/s that a peer sends or receives in all; 0.0, or an empty tuple: unknown, no limit.
    ValueError if the sizes do not fit or a number is negative, infinite or NaN.
    """

    names: tuple[str, ...]
    bandwidth: tuple[tuple[float, ...], ...]
    rtt: tuple[tuple[float, ...], ...]
    cuts: frozenset[Pair] = frozenset()
    uplinks: tuple[float, ...] = ()
    downlinks: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        if not count or len(set(self.names)) != count:
            raise ValueError(f"names must be distinct, and at least one, got {self.names}")
        for rows in (self.bandwidth, self.rtt):
            if len(rows) != count or any(len(row) != count for row in rows):
                raise ValueError(f"bandwidth and rtt must have {count} rows and columns, one for each name")
        if len(self.uplinks) not in (0, count) or len(self.downlinks) not in (0, count):
            raise ValueError(f"uplinks and downlinks must be empty or have {count} entries")
        numbers = [
            *self.uplinks,
            *self.downlinks,
            *(x for rows in (self.bandwidth, self.rtt) for row in rows for x in row),
        ]
        if not all(0 <= number < math.inf for number in numbers):
            raise ValueError("bandwidths, round trips and limits must be finite and not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to execute an attempt; its fields go into a Start as they are.

    names: who takes part, in the order of the matrix; who is missing cannot be reached, not even through a relay.
    pattern: "direct", "ring", "tree". shares: of each name, sum to 1. order: ring only. parents: tree only.
    seconds: estimated, latency included.
    """

    names: tuple[str, ...]
    pattern: str
    shares: tuple[float, ...]
    order: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    seconds: float = 0.0

    @property
    def lossless_only(self) -> bool:
        """Partial sums travel: a lossy wire would be rounded again at every hop, so the caller takes f32 instead."""
        return self.pattern != "direct"


def cannot_meet(members: Iterable[Member]) -> frozenset[Pair]:
    """The pairs of members of which neither can be dialled: nobody could make a connection between them."""
    hidden = sorted({member.name for member in members if not member.addresses})
    return frozenset(frozenset(pair) for pair in combinations(hidden, 2))


def plan(
    matrix: Matrix, *, nbytes: int, lossless: bool, scatter_factor: float = 1.0, gather_factor: float = 1.0
) -> Plan:
    """The fastest way to reduce `nbytes` bytes (of the tensor as float32) over as many of the peers as are connected.

    scatter_factor, gather_factor: bytes on the wire per byte of the tensor, on the way to owners and back.
    If the wire is lossy and no peer can talk to all others, the plan is `lossless_only`, for factors of 1.
    """
    job = _job(matrix, _largest_component(matrix), nbytes, scatter_factor, gather_factor)
    direct = _direct(job)
    if direct is not None and (not lossless or len(job.names) == 1):
        return direct
    if not lossless:
        job = job._replace(scatter=1.0, gather=1.0)
    tree = _tree(job)
    found = [(each.seconds, each) for each in (direct, _ring(job)) if each] + [(_cautious(job, tree), tree)]
    limit = _PREFERENCE * min(seconds for seconds, _ in found)
    return next(each for seconds, each in found if seconds <= limit)


def ring_plan(
    matrix: Matrix, order: Sequence[int], *, nbytes: int, scatter_factor: float = 1.0, gather_factor: float = 1.0
) -> Plan:
    """A ring of all names of the matrix in the given order, with the best shares for it; inf seconds if it is cut."""
    if sorted(order) != list(range(len(matrix.names))) or len(order) < 2:
        raise ValueError(f"order must name each of the {len(matrix.names)} >= 2 peers once, got {tuple(order)}")
    return _ring_of(_job(matrix, matrix.names, nbytes, scatter_factor, gather_factor), tuple(order))


def estimate(
    matrix: Matrix, plan: Plan, *, nbytes: int, scatter_factor: float = 1.0, gather_factor: float = 1.0
) -> float:
    """Seconds that the plan should take for `nbytes` on these paths; inf if it needs a pair that is cut.

    The paths alone: neither processors nor the time until connections have found their rate. ValueError if the plan
    names somebody who is not in the matrix.
    """
    return _seconds(_job(matrix, plan.names, nbytes, scatter_factor, gather_factor), plan)


class Planner:
    """Remembers plans, so that new measurements change one only where another would be 15 % faster.

    `seconds` follows the measurements. Not thread-safe. Keeps at most `capacity` plans, those used last.
    """

    def __init__(self, capacity: int = 64) -> None:
        self._capacity = capacity
        self._kept: dict[tuple[object, ...], tuple[Matrix, Plan]] = {}

    def plan(
        self, matrix: Matrix, *, nbytes: int, lossless: bool, scatter_factor: float = 1.0, gather_factor: float = 1.0
    ) -> Plan:
        """As the function `plan`; at once for a matrix that is equal to the one before."""
        key = (matrix.names, nbytes, lossless, scatter_factor, gather_factor)
        before, kept = self._kept.pop(key, (None, None))
        if kept is None or before != matrix:
            found = plan(
                matrix, nbytes=nbytes, lossless=lossless, scatter_factor=scatter_factor, gather_factor=gather_factor
            )
            if found.lossless_only and not lossless:
                scatter_factor = gather_factor = 1.0
            job = _job(matrix, found.names, nbytes, scatter_factor, gather_factor)
            same_wire = kept is not None and (lossless or kept.lossless_only == found.lossless_only)
            kept = _lasting(kept, found, job) if kept is not None and same_wire else found
        self._kept[key] = matrix, kept
        while len(self._kept) > self._capacity:
            del self._kept[next(iter(self._kept))]
        return kept


def _lasting(kept: Plan, found: Plan, job: _Job) -> Plan:
    """`kept` while it serves the same peers nearly as fast as `found`."""
    if kept.names != found.names:
        return found
    still = _estimated(job, kept)
    return still if still.seconds <= _STAY * found.seconds else found


# What every pattern shares: paths without gaps, and the limits that they set to shares.


class _Job(NamedTuple):
    """What is to be planned. bandwidth: 0.0 only where a pair is cut. uplinks, downlinks: inf where unknown."""

    names: tuple[str, ...]
    bandwidth: list[list[float]]
    rtt: list[list[float]]
    uplinks: list[float]
    downlinks: list[float]
    nbytes: int
    scatter: float
    gather: float


class _Row(NamedTuple):
    """A limit: every * sum(s) + at_i * s[i] + at_j * s[j] is what flows there, as part of the tensor's bytes."""

    capacity: float
    every: float
    i: int = 0
    at_i: float = 0.0
    j: int = 0
    at_j: float = 0.0


def _job(matrix: Matrix, names: tuple[str, ...], nbytes: int, scatter: float, gather: float) -> _Job:
    if nbytes < 0 or not (0 < scatter < math.inf and 0 < gather < math.inf):
        raise ValueError(f"nbytes must not be negative and factors positive, got {nbytes}, {scatter}, {gather}")
    at = [matrix.names.index(name) for name in names]
    apart = [[frozenset((one, other)) in matrix.cuts for other in names] for one in names]
    bandwidth = _filled([[matrix.bandwidth[i][j] for j in at] for i in at], apart, _ASSUMED)
    rtt = _filled([[max(matrix.rtt[i][j], matrix.rtt[j][i]) for j in at] for i in at], apart, 0.0)
    uplinks, downlinks = (
        [(limits[i] or math.inf) if limits else math.inf for i in at] for limits in (matrix.uplinks, matrix.downlinks)
    )
    return _Job(names, bandwidth, rtt, uplinks, downlinks, nbytes, scatter, gather)


def _filled(values: list[list[float]], apart: list[list[bool]], assumed: float) -> list[list[float]]:
    """The values with the (upper) median in the place of what was not measured, and 0.0 where a pair is cut."""
    pairs = [(i, j) for i in range(len(values)) for j in range(len(values)) if i != j and not apart[i][j]]
    known = sorted(values[i][j] for i, j in pairs if values[i][j])
    median = known[len(known) // 2] if known else assumed
    filled = [[0.0] * len(values) for _ in values]
    for i, j in pairs:
        filled[i][j] = values[i][j] or median
    return filled


def _largest_component(matrix: Matrix) -> tuple[str, ...]:
    """The most names that are connected with each other; of equally many, those with the first name."""
    left = list(matrix.names)
    best: tuple[str, ...] = ()
    while left:
        found = [left[0]]
        for name in found:
            found += [each for each in left if each not in found and frozenset((name, each)) not in matrix.cuts]
        left = [name for name in left if name not in found]
        if len(found) > len(best) or (len(found) == len(best) and min(found) < min(best)):
            best = tuple(name for name in matrix.names if name in found)
    return best


def _rows(job: _Job, pattern: str, order: tuple[int, ...], parents: tuple[int, ...]) -> list[_Row]:
    """Everything that limits the pattern: directed pairs, and what each peer sends and receives in all."""
    if pattern == "direct":
        return _direct_rows(job)
    return _ring_rows(job, order) if pattern == "ring" else _tree_rows(job, parents)


def _direct_rows(job: _Job) -> list[_Row]:
    count, a, b = len(job.names), job.scatter, job.gather
    # Parts of j's share, and results of i's.
    rows = [_Row(job.bandwidth[i][j], 0.0, i, b, j, a) for i in range(count) for j in range(count) if i != j]
    for i in range(count):
        rows.append(_Row(job.uplinks[i], a, i, b * (count - 1) - a))
        rows.append(_Row(job.downlinks[i], b, i, a * (count - 1) - b))
    return [row for row in rows if row.capacity < math.inf]


def _ring_rows(job: _Job, order: tuple[int, ...]) -> list[_Row]:
    """Parts of a share start behind its owner and end at it, results start at it and end before it."""
    a, b = job.scatter, job.gather
    edges = zip(order, (*order[1:], order[0]), strict=True)
    return [_Row(_width(job, i, j), a + b, i, -a, j, -b) for i, j in edges]


def _tree_rows(job: _Job, parents: tuple[int, ...]) -> list[_Row]:
    """Every edge carries one sum up and one result down, whoever is the root."""
    a, b = job.scatter, job.gather
    sent, received = [0.0] * len(parents), [0.0] * len(parents)
    rows = []
    for i, parent in enumerate(parents):
        if parent >= 0:
            rows += [_Row(job.bandwidth[i][parent], a), _Row(job.bandwidth[parent][i], b)]
            sent[i] += a
            received[i] += b
            sent[parent] += b
            received[parent] += a
    rows += [_Row(limit, load) for limit, load in zip(job.uplinks, sent, strict=True)]
    rows += [_Row(limit, load) for limit, load in zip(job.downlinks, received, strict=True)]
    return [row for row in rows if row.capacity < math.inf]


def _width(job: _Job, i: int, j: int) -> float:
    """Bytes/s from i to j when neither does anything else."""
    return min(job.bandwidth[i][j], job.uplinks[i], job.downlinks[j])


def _slowest(rows: Iterable[_Row], shares: Floats) -> float:
    """Seconds for each byte of the tensor; inf if something must flow where nothing can. The shares sum to 1."""
    worst = 0.0
    for capacity, every, i, at_i, j, at_j in rows:
        load = every + at_i * shares[i] + at_j * shares[j]
        if load > worst * capacity:
            worst = load / capacity if capacity else math.inf
    return worst


def _latency(job: _Job, plan: Plan) -> float:
    """Seconds on the way of the last byte: to its owner and back, almost twice around, or up and down."""
    if plan.pattern == "direct":
        return max(max(job.rtt[i]) for i, share in enumerate(plan.shares) if share)
    if plan.pattern == "ring":
        return _ring_latency(job, plan.order)
    return max(_climb(job, plan.parents, i) for i in range(len(plan.parents)))


def _ring_latency(job: _Job, order: Sequence[int]) -> float:
    """Parts skip the hop that leaves their owner, results the one that enters it; the slowest owner counts."""
    hops = [job.rtt[i][j] for i, j in zip(order, (*order[1:], order[0]), strict=True)]
    return math.fsum(hops) - min((hops[k] + hops[k - 1]) / 2 for k in range(len(hops)))


def _climb(job: _Job, parents: tuple[int, ...], i: int) -> float:
    """Seconds from i to the root and back."""
    total = 0.0
    while parents[i] >= 0:
        total += job.rtt[i][parents[i]]
        i = parents[i]
    return total


def _seconds(job: _Job, plan: Plan) -> float:
    slowest = _slowest(_rows(job, plan.pattern, plan.order, plan.parents), plan.shares)
    return job.nbytes * slowest + _latency(job, plan) if slowest < math.inf else math.inf


def _cautious(job: _Job, plan: Plan) -> float:
    """Seconds if no peer of unknown limits can carry more in all than on its widest link.

    Asked of plans that give few peers much to carry: pairs that were measured one at a time may share an access link.
    """
    rows, columns = job.bandwidth, zip(*job.bandwidth, strict=True)
    uplinks = [max(row) if limit == math.inf else limit for limit, row in zip(job.uplinks, rows, strict=True)]
    downlinks = [
        max(column) if limit == math.inf else limit for limit, column in zip(job.downlinks, columns, strict=True)
    ]
    return _seconds(job._replace(uplinks=uplinks, downlinks=downlinks), plan)


def _estimated(job: _Job, plan: Plan) -> Plan:
    return replace(plan, seconds=_seconds(job, plan))


# Shares: the linear programme, and its answer made steady.


def _balanced(rows: list[_Row], owners: Sequence[int], count: int) -> tuple[tuple[float, ...], float]:
    """Shares of `count` peers, of which `owners` may own, and the least seconds per byte that any shares allow."""
    equal = [0.0] * count
    for owner in owners:
        equal[owner] = 1.0 / len(owners)
    vertex = _Vertex(rows, owners, count)
    vertex.climb()
    least = _slowest(rows, _shares(vertex.y))
    limit = _NOISE * least
    if _slowest(rows, equal) <= limit:
        return tuple(equal), least
    fastest = _shares(_evened(vertex, math.fsum(vertex.y) / _TIE))
    level = _levelled(fastest)
    return tuple(level if _slowest(rows, level) <= limit else fastest), least


def _shares(y: Floats) -> list[float]:
    """In proportion to y, without what is only rounding."""
    floor = _TOLERANCE * math.fsum(y)
    total = math.fsum(each for each in y if each > floor)
    return [each / total if each > floor else 0.0 for each in y]


def _evened(vertex: _Vertex, target: float) -> list[float]:
    """Of all y whose sum is at least `target`, the one whose largest entry is least, then its second, and so on.

    The optimum as a function of a common cap is concave: Newton's method climbs to the cap from below. Peers whose cap
    has a price there sit at it in every solution, and keep it while the others' is lowered further.
    """
    caps: dict[int, float] = {}
    free = list(vertex.owners)
    while free and (rest := target - math.fsum(caps.values())) > _TOLERANCE * target:
        cap, priced = rest / len(free), free
        for _ in range(_NEWTON_STEPS):
            vertex.cap({**caps, **dict.fromkeys(free, cap)})
            missing = target - math.fsum(vertex.y)
            prices = vertex.cap_prices(free)
            if missing <= _TOLERANCE * target or not prices:
                break
            cap, priced = cap + missing / math.fsum(prices.values()), list(prices)
        caps |= dict.fromkeys(priced, cap)
        free = [owner for owner in free if owner not in priced]
    return vertex.y


def _levelled(shares: list[float]) -> list[float]:
    """Shares that follow each other closely, from the largest down, replaced by their mean."""
    ranked = sorted(range(len(shares)), key=lambda i: -shares[i])
    groups = [[ranked[0]]]
    for i in ranked[1:]:
        if shares[i] * _ALIKE >= shares[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    level = [0.0] * len(shares)
    for group in groups:
        for i in group:
            level[i] = math.fsum(shares[k] for k in group) / len(group)
    return level


class _Vertex:
    """y >= 0 of largest sum within the rows, and within a cap on each owner; by the revised simplex method on the dual.

    The dual (min capacity.x, A^T x >= 1, x >= 0) has as many limits in its basis as there are owners. It begins with
    one on each owner alone, implied by the rows. A row that y exceeds is a column that improves the dual: so the rows
    need never be in a tableau all together, and after a change of caps the basis still serves.
    Every row that an owner is part of must have capacity > 0.
    """

    def __init__(self, rows: list[_Row], owners: Sequence[int], count: int) -> None:
        size = len(owners)
        self.owners = owners
        self._box = dict.fromkeys(owners, math.inf)
        for row in rows:
            for owner in owners if row.every else (row.i, row.j):
                amount = _amount(row, owner)
                if owner in self._box and amount > 0:
                    self._box[owner] = min(self._box[owner], row.capacity / amount)
        self._least = 1e-3 * max(self._box.values())  # added to capacities, lest rounding exceeds one that is tiny
        self._caps = len(rows)
        self._rows = rows + [_Row(self._box[owner], 0.0, owner, 1.0) for owner in owners]
        self.y = [self._box.get(i, 0.0) for i in range(count)]
        self._inverse = [[1.0 if i == k else 0.0 for k in range(size)] for i in range(size)]
        self._x = [1.0] * size
        self._members = list(range(self._caps, self._caps + size))

    def climb(self) -> None:
        """To the optimum: by Dantzig's rule first, then by Bland's, which cannot cycle."""
        patience = 100 + 10 * len(self.owners)
        for step in range(3 * patience):
            if not self._improve(first=step > patience):
                break

    def cap(self, caps: dict[int, float]) -> None:
        """Set the owners' caps and climb again."""
        for index, owner in enumerate(self.owners, self._caps):
            self._rows[index] = self._rows[index]._replace(capacity=caps[owner])
        costs = [self._rows[member].capacity if member < len(self._rows) else 0.0 for member in self._members]
        for k, owner in enumerate(self.owners):
            self.y[owner] = math.fsum(cost * row[k] for cost, row in zip(costs, self._inverse, strict=True))
        self.climb()

    def cap_prices(self, among: Sequence[int]) -> dict[int, float]:
        """How fast the sum of y grows with the cap of each of these owners, where it does."""
        prices = {}
        for member, x in zip(self._members, self._x, strict=True):
            if self._caps <= member < len(self._rows) and x > _TOLERANCE:
                prices[self.owners[member - self._caps]] = x
        return {owner: prices[owner] for owner in among if owner in prices}

    def _improve(self, *, first: bool) -> bool:
        """Take in the limit that is exceeded most (or the first), for the one that gives way; False at the optimum."""
        limit = self._exceeded(first)
        if limit is None:
            return False
        column, excess = self._column(limit)
        direction = [math.fsum(map(float.__mul__, row, column)) for row in self._inverse]
        ratios = [(self._x[k] / step, self._members[k], k) for k, step in enumerate(direction) if step > _TOLERANCE]
        if not ratios:  # only by rounding: y = 0 is always within the rows
            return False
        least = min(ratios)[0]
        leaving = min((member, k) for ratio, member, k in ratios if ratio <= least * (1 + _TOLERANCE))[1]
        self._pivot(leaving, direction)
        self._members[leaving] = limit
        for owner, change in zip(self.owners, self._inverse[leaving], strict=True):
            self.y[owner] -= excess * change
        return True

    def _exceeded(self, first: bool) -> int | None:
        """Index of a row, or of an owner whose y is negative, counted from the end of the rows."""
        y, total = self.y, math.fsum(self.y)
        worst, found = _TOLERANCE, None
        for index, (capacity, every, i, at_i, j, at_j) in enumerate(self._rows):
            excess = every * total + at_i * y[i] + at_j * y[j] - capacity
            if excess > worst * (capacity + self._least):
                worst, found = excess / (capacity + self._least), index
                if first:
                    return found
        for index, owner in enumerate(self.owners, len(self._rows)):
            if -y[owner] > worst * (self._box[owner] + self._least):
                worst, found = -y[owner] / (self._box[owner] + self._least), index
                if first:
                    return found
        return found

    def _column(self, limit: int) -> tuple[list[float], float]:
        """The limit's coefficients for the owners, and by how much y exceeds it."""
        if limit >= len(self._rows):
            owner = self.owners[limit - len(self._rows)]
            return [-1.0 if each == owner else 0.0 for each in self.owners], -self.y[owner]
        row = self._rows[limit]
        column = [_amount(row, owner) for owner in self.owners]
        return column, math.fsum(c * self.y[owner] for c, owner in zip(column, self.owners, strict=True)) - row.capacity

    def _pivot(self, leaving: int, direction: list[float]) -> None:
        scale = 1.0 / direction[leaving]
        pivot = [value * scale for value in self._inverse[leaving]]
        amount = self._x[leaving] * scale
        for k, step in enumerate(direction):
            if step and k != leaving:
                self._inverse[k] = [value - step * new for value, new in zip(self._inverse[k], pivot, strict=True)]
                self._x[k] = max(0.0, self._x[k] - step * amount)
        self._inverse[leaving], self._x[leaving] = pivot, amount


def _amount(row: _Row, owner: int) -> float:
    return row.every + (row.at_i if row.i == owner else 0.0) + (row.at_j if row.j == owner else 0.0)


# Direct.


def _direct(job: _Job) -> Plan | None:
    """The best direct exchange; None if every peer is part of a cut pair.

    For small tensors latency counts: owners that are far from somebody are left out where that is 10 % faster.
    """
    count = len(job.names)
    if count == 1:
        return Plan(names=job.names, pattern="direct", shares=(1.0,))
    owners = [i for i in range(count) if all(job.bandwidth[i][j] for j in range(count) if i != j)]
    if not owners:
        return None
    rows = _direct_rows(job)
    shares, least = _balanced(rows, owners, count)
    everyone = _estimated(job, Plan(names=job.names, pattern="direct", shares=shares))
    best, least_seconds = everyone, everyone.seconds / _PREFERENCE
    reaches = sorted({max(job.rtt[i]) for i in owners})[:-1]
    for reach in reaches[:: max(1, len(reaches) // _REACHES)]:
        if job.nbytes * least + reach >= least_seconds:
            break
        shares, _ = _balanced(rows, [i for i in owners if max(job.rtt[i]) <= reach], count)
        nearer = _estimated(job, replace(everyone, shares=shares))
        seconds = _cautious(job, nearer)
        if seconds < least_seconds:
            best, least_seconds = nearer, seconds
    return best


# Ring.


def _ring(job: _Job) -> Plan | None:
    """The best ring that was found; None if there is none, or of two peers, which is the same as direct."""
    order = _order(job) if len(job.names) > 2 else None
    return _ring_of(job, order) if order else None


def _ring_of(job: _Job, order: tuple[int, ...]) -> Plan:
    count = len(order)
    rows = _ring_rows(job, order)
    equal = (1.0 / count,) * count
    shares = _balanced(rows, range(count), count)[0] if all(row.capacity for row in rows) else equal
    return _estimated(job, Plan(names=job.names, pattern="ring", shares=shares, order=order))


def _order(job: _Job) -> tuple[int, ...] | None:
    """The order with the least seconds for equal shares: exact up to 8 peers; above that a ring may be missed."""
    count = len(job.names)
    widths = [[_width(job, i, j) for j in range(count)] for i in range(count)]
    load = (job.scatter + job.gather) * (count - 1) / count * job.nbytes

    def seconds(order: Sequence[int]) -> float:
        narrowest = min(widths[i][j] for i, j in zip(order, (*order[1:], order[0]), strict=True))
        return load / narrowest + _ring_latency(job, order) if narrowest else math.inf

    best = min(_likely_orders(job, widths), key=seconds)
    if count <= _EXACT_RING:
        best = _search(job, widths, load, best, seconds)
    at = best.index(0)
    return (*best[at:], *best[:at]) if seconds(best) < math.inf else None


def _search(
    job: _Job,
    widths: list[list[float]],
    load: float,
    start: tuple[int, ...],
    seconds: Callable[[Sequence[int]], float],
) -> tuple[int, ...]:
    """Branch and bound over all rings from `start`, which stays if nothing is faster.

    Bound: the narrowest hop so far, and the latency if every hop still to come were the nearest of its sender.
    """
    count = len(start)
    nearest = [min((job.rtt[i][j] for j in range(count) if widths[i][j]), default=math.inf) for i in range(count)]
    best, least = start, seconds(start)

    def extend(path: tuple[int, ...], narrowest: float, latency: float) -> None:
        nonlocal best, least
        if (load / narrowest + latency * (count - 1) / count) >= least * (1 - _TOLERANCE):
            return
        if len(path) == count:
            if seconds(path) < least * (1 - _TOLERANCE):
                best, least = path, seconds(path)
            return
        last = path[-1]
        for i in range(1, count):
            if widths[last][i] and i not in path:
                extend((*path, i), min(narrowest, widths[last][i]), latency + job.rtt[last][i] - nearest[last])

    widest = min(min(max(widths[i]), max(row[i] for row in widths)) for i in range(count))
    if widest:
        extend((0,), widest, math.fsum(nearest))
    return best


def _likely_orders(job: _Job, widths: list[list[float]]) -> list[tuple[int, ...]]:
    """Good rings by local search: one for width and, as wide, for latency; one for latency alone. They may be cut."""
    count = len(widths)
    widest = min(min(max(widths[i]), max(row[i] for row in widths)) for i in range(count)) or 1.0
    wide = _tour([[min(_power8(widest / w), _NEVER / 1e9) if w else _NEVER for w in row] for row in widths])
    narrowest = min(widths[i][j] for i, j in zip(wide, (*wide[1:], wide[0]), strict=True))
    orders = [wide]
    for floor, start in ((narrowest or math.ulp(0.0), wide), (math.ulp(0.0), None)):
        cost = [[job.rtt[i][j] if widths[i][j] >= floor else _NEVER for j in range(count)] for i in range(count)]
        orders.append(_tour(cost, start))
    return orders


def _power8(value: float) -> float:
    """Steep enough for a sum over hops to be ruled by the slowest."""
    value *= value
    value *= value
    return value * value


def _tour(cost: list[list[float]], start: tuple[int, ...] | None = None) -> tuple[int, ...]:
    """A short round trip, directed: the nearest neighbour (or `start`), improved by or-opt and 2-opt (Or 1976)."""
    order = list(start or (0,))
    left = [i for i in range(len(cost)) if i not in order]
    while left:
        row = cost[order[-1]]
        order.append(min(left, key=row.__getitem__))
        left.remove(order[-1])
    for _ in range(len(order)):
        moved = [_move_runs(order, cost, length) for length in (1, 2, 3) if length < len(order) - 1]
        if not (_turn_runs(order, cost) or any(moved)):
            break
    return tuple(order)


def _move_runs(order: list[int], cost: list[list[float]], length: int) -> bool:
    """Move each run of `length` hops to where it adds least; whether anything moved."""
    moved = False
    for _ in range(len(order)):
        run, rest = order[:length], order[length:]
        head, tail = run[0], cost[run[-1]]
        adds = [cost[x][head] + tail[y] - cost[x][y] for x, y in zip(rest, (*rest[1:], rest[0]), strict=True)]
        at = min(range(len(rest)), key=adds.__getitem__)
        if adds[at] < adds[-1] - _TOLERANCE * abs(adds[-1]):
            order[:] = [*rest[: at + 1], *run, *rest[at + 1 :]]
            moved = True
        else:
            order.append(order.pop(0))
    return moved


def _turn_runs(order: list[int], cost: list[list[float]]) -> bool:
    """Turn round each run for which that is shorter; whether there was one. Every hop in it changes its direction."""
    turned = False
    for i in range(1, len(order) - 1):
        before, along, back = order[i - 1], 0.0, 0.0
        for j in range(i + 1, len(order)):
            head, tail, after = order[i], order[j], order[(j + 1) % len(order)]
            along += cost[order[j - 1]][tail]
            back += cost[tail][order[j - 1]]
            old = cost[before][head] + along + cost[tail][after]
            if cost[before][tail] + back + cost[head][after] < old * (1 - _TOLERANCE):
                order[i : j + 1] = order[i : j + 1][::-1]
                along, back, turned = back, along, True
    return turned


# Tree.


def _tree(job: _Job) -> Plan:
    """The widest tree of least depth, or, for small tensors, the tree of least depth whatever its width."""
    count = len(job.names)
    widths = [[min(_width(job, i, j), _width(job, j, i)) for j in range(count)] for i in range(count)]
    trees = [*_shallow(job.rtt, widths, _bottleneck(widths)), *_shallow(job.rtt, widths, math.ulp(0.0))]
    plans = []
    for parents in trees:
        shares = tuple(float(parent < 0) for parent in parents)
        plans.append(_estimated(job, Plan(names=job.names, pattern="tree", shares=shares, parents=parents)))
    return min(plans, key=lambda each: each.seconds)


def _bottleneck(widths: list[list[float]]) -> float:
    """The width of the narrowest edge of a maximum spanning tree, by Prim's algorithm."""
    reach, narrowest = dict(enumerate(widths[0][1:], 1)), math.inf
    while reach:
        nearest = max(reach, key=reach.__getitem__)
        narrowest = min(narrowest, reach.pop(nearest))
        reach = {i: max(width, widths[nearest][i]) for i, width in reach.items()}
    return narrowest


def _shallow(rtt: list[list[float]], widths: list[list[float]], floor: float) -> list[tuple[int, ...]]:
    """Parents in the spanning trees of least depth (in seconds, then hops) over edges of at least `floor`."""
    edges = [[j for j, width in enumerate(row) if width >= floor] for row in widths]
    trees = [_nearest_paths(rtt, edges, root) for root in range(len(rtt))]
    seconds, hops = min(depth for depth, _ in trees)
    return [parents for depth, parents in trees if depth[0] <= seconds * (1 + 1e-9) and depth[1] <= hops]


def _nearest_paths(
    rtt: list[list[float]], edges: list[list[int]], root: int
) -> tuple[tuple[float, int], tuple[int, ...]]:
    """Depth in seconds and hops of the tree of shortest paths from `root` (Dijkstra), and its parents."""
    parents = [-1] * len(rtt)
    depth, done = (0.0, 0), [False] * len(rtt)
    heap = [(0.0, 0, root, -1)]
    while heap:
        seconds, hops, i, parent = heapq.heappop(heap)
        if not done[i]:
            done[i], parents[i] = True, parent
            depth = max(depth, (seconds, hops))
            for j in edges[i]:
                if not done[j]:
                    heapq.heappush(heap, (seconds + rtt[i][j], hops + 1, j, i))
    return depth, tuple(parents)

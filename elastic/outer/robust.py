"""How contributions become one where some peers cannot be trusted: what f of them give may be anything.

    with elastic.DiLoCo(model, inner, peer, sync_every=100, combine=elastic.TrimmedMean(byzantine=1)) as outer: ...

A mean goes wherever one contributor wants it to. With x_1 .. x_n what the n contributors give, and f of them bad:

| rule | result | needs |
|---|---|---|
| `CoordinateMedian` | of each number the median | n >= 2f + 1 |
| `TrimmedMean` | of each number the mean without the f largest and the f smallest | n >= 2f + 1 |
| `Krum` | the x_i with the smallest sum of |x_i - x_j|^2 over its n - f - 2 nearest x_j | n >= 2f + 3 |
| `GeometricMedian` | the z with the smallest sum of |z - x_i|, by smoothed Weiszfeld steps | n >= 2f + 1 |
| `FlagAggregator` | the mean direction within the subspace that is nearest to all directions | n >= 2f + 1 |
| `NormClip` | the mean of x_i min(1, c / |x_i|), c given or the median length | n >= 1 |

The sources, in this order: Yin et al., arXiv 1803.01498, definitions 1 and 2; Blanchard et al., arXiv 1703.02757;
Pillutla et al., arXiv 1912.13445; Almasi et al., arXiv 2302.05865; Sun et al., arXiv 1911.07963.

What they promise was proven for gradients of one distribution. After many inner steps, and on data that differs from
peer to peer, the geometric median alone has been analysed, as far as we know; that the others work there is experience.
All of them lean away from who differs. `NormClip` bounds what one peer can do, and does not take it away.

**Weights.** All contributors count alike: a weight is what a peer claims of itself, and must not buy influence.

**What is no number** is left out before anything is measured. Honest peers send no such thing, so that there is one bad
contributor fewer to expect. If nothing is left, the result is zeros.

**Where it is done.** A sum would have to be trusted to the owners of its chunks. So every contribution goes to every
peer (`Combining`), and each computes the result itself. Who tells different peers different things makes their results
differ, and who changes what he passes on for others is found out: such a round aborts, and nothing is applied.

**Bits.** All peers must get the same ones (docs/design.md, "Rules of a round", 9). Numbers are added in double
precision, in an order that is fixed by the contributions' own bytes, and rounded to float32 once; what is computed from
lengths and angles are a few plain doubles, by exactly rounded operations: no matrix product, no `linalg`, and `fsum`,
since Python's own sum has changed between versions. So the result depends on no thread, processor, or order of names.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from xxhash import xxh3_128, xxh3_128_hexdigest

from collectives.records import BLOCK, Done, Failed, LinkFailure
from collectives.transfer import as_bytes
from collectives.wires import WIRES, scratch_bytes

from ..errors import ConfigurationError
from .optimizers import check_above, divided, folded

if TYPE_CHECKING:
    from collectives.records import Abort, Start

    from ..operations import Executor

PIECE = 128 * BLOCK  # numbers at a time: contributions of so many stay in cache, and torch in this thread
WORD = 4  # bytes: encoded contributions begin at multiples, so that they can be read where they are
DEPENDENT = 1e-13  # what is left of a squared length is rounding
STEPS = 1000  # of Weiszfeld's iteration: a hundred do, unless the point is a contribution, which it nears slowly
STILL = 1e-12  # of the usual distance: a step by less is none
SWEEPS = 60  # of Jacobi's rotations; six or seven do

Matrix = list[list[float]]


# --- contributions ----------------------------------------------------------------------------------------------------


def encoded_size(elements: int, wire: str) -> int:
    """Bytes of one contribution of so many numbers."""
    return -(-WIRES[wire].size(elements) // WORD) * WORD


def encoded(x: torch.Tensor, wire: str) -> torch.Tensor:
    """A flat float32 CPU tensor as it travels: uint8, `encoded_size` long; f32 is the same memory."""
    if WIRES[wire].lossless:
        return x.view(torch.uint8)
    out = torch.zeros(encoded_size(x.numel(), wire), dtype=torch.uint8)
    scratch = memoryview(bytearray(scratch_bytes(min(x.numel(), PIECE))))
    at = 0
    for piece in torch.split(x, PIECE):
        data = WIRES[wire].encode(piece.numpy(), scratch)
        out.numpy()[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
        at += len(data)
    return out


def sealed(data: torch.Tensor) -> str:
    """The digest of an encoded contribution: nobody finds another one with the same."""
    return hashlib.sha256(as_bytes(data)).hexdigest()


@dataclass(frozen=True)
class Contributions:
    """data: what each contributor gave, uint8 tensors as `encoded` makes them. elements: numbers in each."""

    data: tuple[torch.Tensor, ...]
    elements: int
    wire: str = "f32"

    def piece(self, index: int, start: int, stop: int) -> torch.Tensor:
        """Numbers [start, stop) of a contribution, new; start is a multiple of PIECE. There is one zero: +0.0."""
        wire = WIRES[self.wire]
        low = wire.size(start)
        data = self.data[index][low : low + wire.size(stop - start)]
        if wire.lossless:
            return torch.add(data.view(torch.float32), 0.0)
        numbers = torch.empty(stop - start)
        wire.decode(data.numpy().data, numbers.numpy())
        return numbers.add_(0.0)

    def good(self) -> tuple[int, ...]:
        """Those that are finite, in the order of a hash of their numbers, whoever they are from."""
        digests = {index: self._digest(index) for index in range(len(self.data))}
        return tuple(sorted((index for index, digest in digests.items() if digest), key=lambda index: digests[index]))

    def _digest(self, index: int) -> bytes:
        """b"" if it is not finite."""
        digest = xxh3_128()
        for start in range(0, self.elements, PIECE):
            piece = self.piece(index, start, min(start + PIECE, self.elements))
            if not all(math.isfinite(end) for end in torch.aminmax(piece)):
                return b""
            digest.update(as_bytes(piece))
        return digest.digest()


@dataclass(frozen=True)
class Rows:
    """Numbers [start, stop) of some contributions: what a rule works on."""

    given: Contributions
    chosen: tuple[int, ...]
    start: int
    stop: int

    @property
    def count(self) -> int:
        return len(self.chosen)

    def pieces(self) -> Iterator[tuple[slice, list[torch.Tensor]]]:
        """Where they are, counted from `start`, and one float32 tensor of each contribution, not to be kept."""
        for at in range(self.start // PIECE * PIECE, self.stop if self.start < self.stop else 0, PIECE):
            low, high = max(at, self.start), min(at + PIECE, self.stop)
            rows = [self.given.piece(index, at, min(at + PIECE, self.given.elements)) for index in self.chosen]
            yield slice(low - self.start, high - self.start), [row[low - at : high - at] for row in rows]


# --- rules ------------------------------------------------------------------------------------------------------------


class Robust(ABC):
    """One way to combine. byzantine: how many contributors may be bad."""

    @property
    @abstractmethod
    def byzantine(self) -> int: ...

    @property
    @abstractmethod
    def description(self) -> str:
        """For the run's contract: peers that differ in it must not exchange."""

    @property
    @abstractmethod
    def needs(self) -> int:
        """With fewer contributors it means nothing: a round waits until they are there."""

    @abstractmethod
    def combine(self, rows: Rows, byzantine: int, out: torch.Tensor) -> None:
        """Writes the result into `out`, flat float32, under the bit rule. byzantine: how many rows may be bad."""


def combined(rule: Robust, given: Contributions, averaged: int, out: torch.Tensor) -> tuple[int, ...]:
    """The result of a round, into `out`; returns who was left out, by index.

    averaged: from there on the numbers are buffers. They are averages of data, of any size, and say nothing of who is
    honest: they are in no length and no distance, and get the coordinate-wise median under every rule.
    """
    good = given.good()
    left_out = tuple(index for index in range(len(given.data)) if index not in good)
    byzantine = max(0, rule.byzantine - len(left_out))
    out.zero_()
    if good:
        rule.combine(Rows(given, good, 0, averaged), byzantine, out[:averaged])
        CoordinateMedian().combine(Rows(given, good, averaged, given.elements), byzantine, out[averaged:])
    return left_out


@dataclass(frozen=True, kw_only=True)
class Byzantine(Robust):
    """byzantine: f, how many contributors may be bad. peers: how many the run has, if that is known: where they could
    never be enough, that is a ConfigurationError at once.
    """

    byzantine: int = 1
    peers: int | None = None
    times: ClassVar[int] = 2
    more: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_whole("byzantine", self.byzantine, 0)
        self._check()
        if self.peers is not None and self.peers < self.needs:
            raise ConfigurationError(
                f"{self.description} needs {self.needs} contributors, and peers is {self.peers}: lower byzantine, "
                "choose another rule, or have more peers"
            )

    def _check(self) -> None:
        """Of what a rule has beside."""

    @property
    def description(self) -> str:
        options = [f"byzantine={self.byzantine}", *self._options()]
        return f"{type(self).__name__}({', '.join(options)})"

    def _options(self) -> list[str]:
        return []

    @property
    def needs(self) -> int:
        return self.times * self.byzantine + self.more


@dataclass(frozen=True, kw_only=True)
class CoordinateMedian(Byzantine):
    """Of each number the median; of an even number of contributions the mean of the two in the middle."""

    def combine(self, rows: Rows, byzantine: int, out: torch.Tensor) -> None:
        for where, numbers in rows.pieces():
            out[where] = _median(numbers)


@dataclass(frozen=True, kw_only=True)
class TrimmedMean(Byzantine):
    """Of each number the mean of those that are neither among the f largest nor the f smallest; f = 0: the mean."""

    def combine(self, rows: Rows, byzantine: int, out: torch.Tensor) -> None:
        for where, numbers in rows.pieces():
            out[where] = _mean(_sorted(numbers)[byzantine : len(numbers) - byzantine])


class Weighing(Robust):
    """A rule whose result is a sum of contributions, each times a number that follows from lengths and angles.

    centred: whether those are measured from the coordinate-wise median. It is among the honest ones, so that what a
    huge contribution has in common with others does not drown the differences between those. pairs: whether angles
    count, or lengths alone.
    """

    centred: ClassVar[bool] = True
    pairs: ClassVar[bool] = True

    @abstractmethod
    def weights(self, products: Matrix, byzantine: int) -> list[float]:
        """products: the inner products of all pairs of contributions."""

    def combine(self, rows: Rows, byzantine: int, out: torch.Tensor) -> None:
        weights = self.weights(_products(rows, self.centred, self.pairs), byzantine)
        for where, numbers in rows.pieces():
            out[where] = _weighted(numbers, weights)


@dataclass(frozen=True, kw_only=True)
class Krum(Byzantine, Weighing):
    """The contribution that is nearest to its n - f - 2 nearest others; squared distances, as in the paper.

    keep: how many of the best are averaged (multi-Krum); 1 takes one contribution as it is.
    """

    keep: int = 1
    more: ClassVar[int] = 3

    def _check(self) -> None:
        check_whole("keep", self.keep, 1)

    def _options(self) -> list[str]:
        return [f"keep={self.keep}"] if self.keep > 1 else []

    @property
    def needs(self) -> int:
        return max(super().needs, self.keep + self.byzantine)

    def weights(self, products: Matrix, byzantine: int) -> list[float]:
        n = len(products)
        nearest = max(1, n - byzantine - 2)
        scores = []
        for i in range(n):
            apart = sorted(_apart(products, i, j) for j in range(n) if j != i)
            scores.append(math.fsum(apart[:nearest]))
        best = sorted(range(n), key=lambda i: scores[i])[: self.keep]
        return [1 / len(best) if i in best else 0.0 for i in range(n)]


@dataclass(frozen=True, kw_only=True)
class GeometricMedian(Byzantine, Weighing):
    """The point whose distances to all contributions have the smallest sum.

    smoothing: a distance counts as at least so much of the usual one, so that the point can pass a contribution.
    """

    smoothing: float = 1e-6

    def _check(self) -> None:
        check_above("smoothing", self.smoothing)

    def _options(self) -> list[str]:
        return [f"smoothing={self.smoothing:g}"]

    def weights(self, products: Matrix, byzantine: int) -> list[float]:
        points = _embedded(products)
        usual = _middle(sorted(map(_length, points)))
        least = max(self.smoothing * usual, 1e-300)
        weights, at = _pulls(points, [0.0] * len(points), least)
        for _ in range(STEPS):
            weights, after = _pulls(points, at, least)
            moved, at = _length(_minus(after, at)), after
            if moved <= STILL * usual:
                break
        return weights


@dataclass(frozen=True, kw_only=True)
class FlagAggregator(Byzantine, Weighing):
    """The mean direction within the subspace that lies nearest to all directions, as long as contributions usually are.

    With g_i = x_i / |x_i|, the subspace Y of dimension `rank` is that of the first left singular vectors of
    [w_1 g_1, ..., w_n g_n], with w_i = 1 at first, and then `iterations` times anew (sin^2 of the angle of g_i and Y +
    smoothing)^(-1/4): reweighted least squares for the smallest sum of sines. rank: 0 for ceil((n + 1) / 2). The result
    is Y Y^T (g_1 + ... + g_n) / n, times the median of the lengths.

    The paper's terms for pairs of contributions are not there. Its published code divides by the rank and does not
    keep lengths; here contributions that agree give themselves.
    """

    rank: int = 0
    iterations: int = 1
    smoothing: float = 1e-7
    centred: ClassVar[bool] = False

    def _check(self) -> None:
        check_whole("rank", self.rank, 0)
        check_whole("iterations", self.iterations, 0)
        check_above("smoothing", self.smoothing)

    def _options(self) -> list[str]:
        return [f"rank={self.rank}", f"iterations={self.iterations}", f"smoothing={self.smoothing:g}"]

    @property
    def needs(self) -> int:
        return max(super().needs, self.rank)

    def weights(self, products: Matrix, byzantine: int) -> list[float]:
        n = len(products)
        lengths = [math.sqrt(products[i][i]) for i in range(n)]
        cosines = [[_ratio(products[i][j], lengths[i] * lengths[j]) for j in range(n)] for i in range(n)]
        scales, rank = [1.0] * n, self.rank or n // 2 + 1
        for _ in range(self.iterations):
            sines = _squared_sines(cosines, scales, rank)
            scales = [1 / math.sqrt(math.sqrt(sine + self.smoothing)) for sine in sines]
        shares = _projected(cosines, scales, rank)
        usual = _middle(sorted(lengths))
        return [_ratio(share * usual, n * length) for share, length in zip(shares, lengths, strict=True)]


@dataclass(frozen=True, kw_only=True)
class NormClip(Weighing):
    """The mean, after which nobody is longer than `norm`; None: than the contributions' median length.

    It works with any number of peers, and keeps a bad one from moving the mean by more than norm / n; within that it
    moves it. Buffers get the coordinate-wise median.
    """

    norm: float | None = None
    centred: ClassVar[bool] = False
    pairs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.norm is not None:
            check_above("norm", self.norm)

    @property
    def byzantine(self) -> int:
        return 0

    @property
    def description(self) -> str:
        return f"NormClip(norm={'median' if self.norm is None else f'{self.norm:g}'})"

    @property
    def needs(self) -> int:
        return 1

    def weights(self, products: Matrix, byzantine: int) -> list[float]:
        lengths = [math.sqrt(products[i][i]) for i in range(len(products))]
        most = sorted(lengths)[(len(lengths) - 1) // 2] if self.norm is None else self.norm
        return [(1.0 if length <= most else most / length) / len(lengths) for length in lengths]


def check_whole(name: str, value: int, least: int) -> None:
    """ConfigurationError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigurationError(f"{name} is {value!r}: it must be a whole number of at least {least}")


# --- number by number -------------------------------------------------------------------------------------------------


def _exchanges(n: int) -> Iterator[tuple[int, int]]:
    """Which two to put in order, one after the other, so that n are sorted: Batcher's odd-even merge sort."""
    p = 1
    while p < n:
        k = p
        while k >= 1:
            for j in range(k % p, n - k, 2 * k):
                for i in range(j, min(j + k, n - k)):
                    if i // (2 * p) == (i + k) // (2 * p):
                        yield i, i + k
            k //= 2
        p *= 2


def _sorted(numbers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In ascending order, number by number."""
    ranked = list(numbers)
    for low, high in _exchanges(len(ranked)):
        one, other = ranked[low], ranked[high]
        ranked[low], ranked[high] = torch.minimum(one, other), torch.maximum(one, other)
    return ranked


def _mean(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """In double precision, in this order."""
    total = numbers[0].double()
    for each in numbers[1:]:
        total.add_(each)
    return divided(total, float(len(numbers)))


def _median(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    ranked, n = _sorted(numbers), len(numbers)
    return _mean(ranked[(n - 1) // 2 : n // 2 + 1])


def _weighted(numbers: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = torch.zeros(numbers[0].numel(), dtype=torch.float64)
    for each, weight in zip(numbers, weights, strict=True):
        if weight:
            total.add_(torch.mul(each.double(), weight))
    return total


# --- lengths and angles -----------------------------------------------------------------------------------------------


def _products(rows: Rows, centred: bool, pairs: bool) -> Matrix:
    """The inner products of all pairs, or, without `pairs`, of each with itself alone, in double precision.

    Products are added up place by place, over all pieces, and only then to one number.
    """
    n = rows.count
    chosen = [(i, j) for i in range(n) for j in range(i, n if pairs else i + 1)]
    sums = {pair: torch.zeros(PIECE, dtype=torch.float64) for pair in chosen}
    for _, numbers in rows.pieces():
        middle = _median(numbers) if centred else None
        vectors = [each.double() if middle is None else each.double().sub_(middle) for each in numbers]
        for i, j in chosen:
            sums[i, j][: vectors[i].numel()].add_(torch.mul(vectors[i], vectors[j]))
    products = {pair: float(folded(each)) for pair, each in sums.items()}
    return [[products.get((min(i, j), max(i, j)), 0.0) for j in range(n)] for i in range(n)]


def _apart(products: Matrix, i: int, j: int) -> float:
    """The squared distance of two."""
    return max(0.0, products[i][i] + products[j][j] - 2 * products[i][j])


def _dot(one: Iterable[float], other: Iterable[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _length(vector: Sequence[float]) -> float:
    return math.sqrt(_dot(vector, vector))


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


def _middle(ranked: Sequence[float]) -> float:
    n = len(ranked)
    return (ranked[(n - 1) // 2] + ranked[n // 2]) / 2


def _embedded(products: Matrix) -> Matrix:
    """Points in as many dimensions as there are of them, with these inner products: Cholesky's rows.

    Shorter ones come first, so that a huge one is measured along them, and not they along it.
    """
    order = sorted(range(len(products)), key=lambda i: products[i][i])
    points = [[0.0] * len(products) for _ in products]
    for axis, i in enumerate(order):
        left = products[i][i] - _dot(points[i], points[i])
        if left <= DEPENDENT * products[i][i]:
            continue
        points[i][axis] = math.sqrt(left)
        for j in order[axis + 1 :]:
            points[j][axis] = (products[i][j] - _dot(points[i], points[j])) / points[i][axis]
    return points


def _pulls(points: Matrix, at: list[float], least: float) -> tuple[list[float], list[float]]:
    """One of Weiszfeld's steps: by how much each point pulls, all together 1, and where that leads."""
    pulls = [1 / max(least, _length(_minus(point, at))) for point in points]
    total = math.fsum(pulls)
    weights = [pull / total for pull in pulls]
    return weights, [_dot(weights, axis) for axis in zip(*points, strict=True)]


def _principal(cosines: Matrix, scales: list[float], rank: int) -> list[tuple[float, list[float], list[float]]]:
    """Of the first singular vectors of [s_i g_i]: (value squared, right vector, inner products of the left one, times
    its value, with every g_i)."""
    n = len(cosines)
    values, vectors = _eigen([[scales[i] * cosines[i][j] * scales[j] for j in range(n)] for i in range(n)])
    first = sorted(range(n), key=lambda k: -values[k])[:rank]
    largest = values[first[0]]
    found = []
    for k in first:
        if values[k] > DEPENDENT * largest:
            scaled = [scale * part for scale, part in zip(scales, vectors[k], strict=True)]
            found.append((values[k], vectors[k], [_dot(scaled, row) for row in cosines]))
    return found


def _squared_sines(cosines: Matrix, scales: list[float], rank: int) -> list[float]:
    """Of the angles of every g_i with the subspace. What has no length has no angle, and counts as in it."""
    found = _principal(cosines, scales, rank)
    inside = [math.fsum(along[i] * along[i] / value for value, _, along in found) for i in range(len(cosines))]
    return [max(0.0, cosines[i][i] - inside[i]) for i in range(len(cosines))]


def _projected(cosines: Matrix, scales: list[float], rank: int) -> list[float]:
    """How much of each g_i there is in the sum of all g_i, projected onto the subspace."""
    found = [(math.fsum(along) / value, right) for value, right, along in _principal(cosines, scales, rank)]
    return [scales[i] * math.fsum(part * right[i] for part, right in found) for i in range(len(cosines))]


def _eigen(symmetric: Matrix) -> tuple[list[float], Matrix]:
    """Eigenvalues, and the eigenvectors as rows, by Jacobi's rotations, one pair after the other."""
    n = len(symmetric)
    a = [list(row) for row in symmetric]
    vectors = [[float(i == j) for j in range(n)] for i in range(n)]
    for _ in range(SWEEPS):
        off = math.fsum(a[i][j] * a[i][j] for i in range(n) for j in range(i))
        if off <= 1e-32 * math.fsum(a[i][i] * a[i][i] for i in range(n)):
            break
        for p in range(n):
            for q in range(p + 1, n):
                _rotate(a, vectors, p, q)
    return [a[i][i] for i in range(n)], vectors


def _rotate(a: Matrix, vectors: Matrix, p: int, q: int) -> None:
    """Makes a[p][q] zero."""
    if a[p][q] == 0:
        return
    theta = (a[q][q] - a[p][p]) / (2 * a[p][q])
    t = (1 if theta >= 0 else -1) / (abs(theta) + math.sqrt(theta * theta + 1))
    c = 1 / math.sqrt(t * t + 1)
    s = t * c
    for row in a:
        row[p], row[q] = c * row[p] - s * row[q], s * row[p] + c * row[q]
    for rows in (a, vectors):
        ps = [c * x - s * y for x, y in zip(rows[p], rows[q], strict=True)]
        rows[q] = [s * x + c * y for x, y in zip(rows[p], rows[q], strict=True)]
        rows[p] = ps


# --- over the network -------------------------------------------------------------------------------------------------


class Combining:
    """A group in whose attempts every member gets every contribution, and combines them by the rule.

    group: which carries them, as bytes. name: of this member. averaged: where buffers begin. left_out: told the names
    of those whose numbers are none. What `run` leaves in the result is the combination, and the digest is its own.
    Memory, beside that: all contributions as they travel.

    digests: of what each contributor gives, as the coordinator says of the next attempt. Where a pair cannot talk,
    contributions go by way of others, who could change them: then an attempt fails in which one has another digest.
    """

    def __init__(
        self,
        group: Executor,
        name: str,
        rule: Robust,
        wire: str,
        averaged: int,
        left_out: Callable[[list[str]], None],
    ) -> None:
        self._group, self._name, self._rule = group, name, rule
        self._wire, self._averaged, self._left_out = wire, averaged, left_out
        self.digests: tuple[str, ...] = ()

    def run(self, start: Start, source: torch.Tensor | None, result: torch.Tensor) -> Done | Failed:
        """As `collectives.Group.run`. ValueError if somebody's contribution is not as long as it must be."""
        size, count = encoded_size(result.numel(), self._wire), len(start.contributors)
        lengths = start.segments or (start.elements // count,) * count
        if start.elements != size * count or any(length != size for length in lengths):
            raise ValueError(f"contributions have {size} bytes, and these have {lengths}: a peer gives something else")
        gathered = torch.empty(start.elements, dtype=torch.uint8)
        mine = self._placed(start, encoded(source, self._wire)) if source is not None else None
        outcome = self._group.run(start, mine, gathered)
        if isinstance(outcome, Failed):
            return outcome
        parts = torch.split(gathered, size) if size else (gathered,) * count
        if start.op != "all_gather" and (changed := self._changed(start, parts)):
            return self._refuse(start, changed)
        given = Contributions(parts, result.numel(), self._wire)
        bad = combined(self._rule, given, self._averaged, result)
        if bad:
            self._left_out([start.contributors[index].name for index in bad])
        return replace(outcome, digest=xxh3_128_hexdigest(as_bytes(result)))

    def abort(self, abort: Abort) -> None:
        self._group.abort(abort)

    def _placed(self, start: Start, mine: torch.Tensor) -> torch.Tensor:
        """Where not all pairs can talk, contributions are added up, each in its own place among zeros."""
        if start.op == "all_gather":
            return mine
        among_zeros = torch.zeros(start.elements, dtype=torch.uint8)
        at = [member.name for member in start.contributors].index(self._name) * mine.numel()
        among_zeros[at : at + mine.numel()] = mine
        return among_zeros

    def _changed(self, start: Start, parts: Sequence[torch.Tensor]) -> list[str]:
        """Whose contribution is not what the coordinator was told of."""
        expected = self.digests or ("",) * len(parts)
        pairs = zip(start.contributors, parts, expected, strict=True)
        return [member.name for member, part, digest in pairs if sealed(part) != digest]

    def _refuse(self, start: Start, changed: list[str]) -> Failed:
        """Blames those who have passed everything on, and those who gave it: it cannot be told who lies."""
        reason = f"what {', '.join(changed)} gave was changed on its way"
        suspects = [
            member
            for member, share in zip(start.contributors, start.shares, strict=True)
            if (share > 0 or member.name in changed) and member.name != self._name
        ]
        lost = tuple(
            LinkFailure(peer=each.name, incarnation=each.incarnation, evidence="corrupt", detail=reason)
            for each in suspects
        )
        return Failed(identity=start.identity, reason=reason, lost=lost)

"""Who sends what to whom: a Start as chunks and routes. Pure functions, the same on every member.

A chunk has one owner among the contributors. Contributions, or sums of some of them, travel up to the owner along a
tree of which the owner is the root; the result travels down from it. In the direct pattern both trees are stars; in
the ring both are paths, up from the owner's successor around to the owner, and on around down to its predecessor; in
the tree pattern both are the tree that the Start names.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from collectives.records import BLOCK, Member, Start, WireRun, fits
from collectives.wires import WIRES, Wire

_ALIGN = 16  # elements: one cache line of float32
SMALLEST = max(_ALIGN * 8, BLOCK * 4)  # bytes: a chunk may have no less, whatever the type and the wire
REDUCTIONS = ("sum", "min", "max")
OPS = (*REDUCTIONS, "reduce_scatter", "broadcast", "all_gather")
PATTERNS = ("direct", "ring", "tree")
DTYPES = ("float32", "float64", "int8", "uint8", "int16", "int32", "int64")
LOSSLESS = ("f32", "raw")


_Way = tuple[int, Wire | None, Wire | None]  # where it ends; how contributions travel, and the result


class Chunk(NamedTuple):
    """Elements [start, stop), owned (reduced) by the contributor of index `owner`.

    wire, gather_wire: how contributions travel, and how the result does; None: as the bits that they are.
    """

    owner: int
    start: int
    stop: int
    wire: Wire | None = None
    gather_wire: Wire | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """What one member does for the chunks of one owner. Numbers are indices of contributors; -1 is nobody.

    terms: whose contributions, or sums of them, are added here, in this order; empty: none passes here. up: who gets
    that sum. above: who sends the result. down: who gets it from here.
    """

    terms: tuple[int, ...] = ()
    up: int = -1
    above: int = -1
    down: tuple[int, ...] = ()


def partition(elements: int, shares: tuple[float, ...], limit: int) -> tuple[Chunk, ...]:
    """Cut `elements` into contiguous runs in proportion to `shares`, and these into even chunks of <= `limit` elements.

    Every element lies in exactly one chunk; an owner with share 0 owns nothing; the same arguments give the same
    chunks on every machine.
    """
    return _cut(_ends(elements, shares, _ALIGN), [(elements, None, None)], limit, _ALIGN)


def _ends(elements: int, shares: tuple[float, ...], align: int) -> list[int]:
    """Where what each contributor owns ends."""
    last = max(index for index, share in enumerate(shares) if share > 0)
    ends = [min(elements, round(part * elements / align) * align) for part in accumulate(shares)]
    ends[last:] = [elements] * (len(shares) - last)
    return ends


def _cut(ends: list[int], ways: list[_Way], limit: int, align: int) -> tuple[Chunk, ...]:
    """Even chunks between where owners change and where wires do."""
    chunks: list[Chunk] = []
    stops = [way[0] for way in ways]
    for start, stop in pairwise(sorted({0, *ends, *stops})):
        owner, (_, wire, gather) = bisect_right(ends, start), ways[bisect_right(stops, start)]
        pieces = math.ceil((stop - start) / limit)
        step = math.ceil((stop - start) / pieces / align) * align
        chunks += [Chunk(owner, at, min(at + step, stop), wire, gather) for at in range(start, stop, step)]
    return tuple(chunks)


def chunks_of(start: Start, chunk_bytes: int) -> tuple[Chunk, ...]:
    """All chunks of an operation, in order. chunk_bytes: the limit of the group.

    If a wire has blocks, chunks begin at multiples of them (of what a segment leaves, from its own beginning on): the
    blocks of all chunks are those of the whole, and encoding that in one piece comes to the same.
    """
    size = np.dtype(start.dtype).itemsize
    ways = _ways(start)
    align = max((_ALIGN, *(wire.block for way in ways for wire in way[1:] if wire is not None)))
    chosen = min(start.chunk_bytes or chunk_bytes, chunk_bytes)
    limit = max(align, chosen // max(size, 4) // align * align)
    ends = list(accumulate(start.segments)) or _ends(start.elements, start.shares, align)
    return _cut(ends, ways, limit, align)


def runs_of(start: Start) -> tuple[WireRun, ...]:
    """How numbers travel, range by range."""
    return start.wires or (WireRun(elements=start.elements, wire=start.wire, gather_wire=start.gather_wire),)


def _ways(start: Start) -> list[_Way]:
    runs = runs_of(start)
    stops = accumulate(run.elements for run in runs)
    return [
        (stop, _coder(run.wire), _coder(run.gather_wire or run.wire)) for stop, run in zip(stops, runs, strict=True)
    ]


def _coder(name: str) -> Wire | None:
    return None if name in LOSSLESS else WIRES[name]


def segment_of(start: Start, index: int) -> tuple[int, int]:
    """[start, stop) of what a contributor owns by `segments`."""
    ends = [0, *accumulate(start.segments)]
    return ends[index], ends[index + 1]


def route(start: Start, me: int, owner: int) -> Route:
    """What the contributor `me` (-1: a receiver) does for the chunks of `owner`."""
    gathers = start.op != "reduce_scatter"
    if me < 0:
        return Route(above=owner) if gathers else Route()
    full = _ROUTES[start.pattern](start, me, owner)
    if start.op in ("broadcast", "all_gather"):
        full = Route(terms=(me,) if me == owner else (), above=full.above, down=full.down)
    return full if gathers else Route(terms=full.terms, up=full.up)


def _direct(start: Start, me: int, owner: int) -> Route:
    everyone = tuple(range(len(start.contributors)))
    if me == owner:
        return Route(terms=everyone, down=tuple(other for other in everyone if other != me))
    return Route(terms=(me,), up=owner, above=owner)


def _ring(start: Start, me: int, owner: int) -> Route:
    order = start.order
    here, size = order.index(me), len(order)
    before, after = order[here - 1], order[(here + 1) % size]
    first = order[(order.index(owner) + 1) % size]  # the sum starts here; so does the way down
    return Route(
        terms=(me,) if me == first else tuple(sorted((before, me))),
        up=-1 if me == owner else after,
        above=-1 if me == owner else before,
        down=(after,) if after != owner and size > 1 else (),
    )


def _tree(start: Start, me: int, owner: int) -> Route:
    children = tuple(index for index, parent in enumerate(start.parents) if parent == me)
    above = start.parents[me]
    return Route(terms=tuple(sorted((*children, me))), up=above, above=above, down=children)


_ROUTES = {"direct": _direct, "ring": _ring, "tree": _tree}


def check(start: Start, me: Member, run: str) -> None:
    """ValueError, in one line, for a Start that nobody could execute."""
    names = [member.name for member in start.contributors]
    if start.run != run:
        raise ValueError(f"start is for run {start.run!r}, this group belongs to {run!r}")
    if not names or names != sorted(set(names)):
        raise ValueError(f"contributors must be sorted by name and distinct, got {names}")
    if me.incarnation not in {member.incarnation for member in (*start.contributors, *start.receivers)}:
        raise ValueError(f"{me.name} (incarnation {me.incarnation}) is no member of this start")
    _check_kind(start)
    _check_numbers(start)
    _check_pattern(start)


def _check_kind(start: Start) -> None:
    known = start.pattern in PATTERNS and start.op in OPS and start.dtype in DTYPES
    wires = {name for run in runs_of(start) for name in (run.wire, run.gather_wire or run.wire)}
    own = "f32" if start.dtype == "float32" else "raw"
    allowed = set(WIRES) - {"raw"} if start.dtype == "float32" else {"raw"}
    if not known or not wires <= allowed:
        raise ValueError(
            f"pattern={start.pattern!r}, op={start.op!r}, dtype={start.dtype!r}, wires {sorted(wires)} are not "
            f"supported: use a pattern of {PATTERNS}, an op of {OPS}, a dtype of {DTYPES}, and for float32 wires of "
            f"{sorted(set(WIRES) - {'raw'})}, for the others 'raw'"
        )
    if start.pattern != "direct" and (wires != {own} or start.op == "reduce_scatter"):
        raise ValueError(f"pattern {start.pattern!r} needs the lossless wire {own!r} and no reduce_scatter")
    if start.wires:
        _check_wires(start)


def _check_wires(start: Start) -> None:
    if start.op != "sum" or start.dtype != "float32":
        raise ValueError(f"only sums of float32 have wires by ranges, not {start.op!r} of {start.dtype}")
    if not fits(start.wires, start.elements):
        lengths = [run.elements for run in start.wires]
        raise ValueError(
            f"wires must cover {start.elements} elements, in ranges above 0 that are multiples of {BLOCK} up to the "
            f"last one, got {lengths[:8]}{'...' if len(lengths) > 8 else ''} ({sum(lengths)})"
        )


def _check_numbers(start: Start) -> None:
    count = len(start.contributors)
    if len(start.multipliers) != count or len(start.segments) not in (0, count):
        raise ValueError(f"multipliers and segments must have one entry for each of the {count} contributors")
    if start.segments and (min(start.segments) < 0 or sum(start.segments) != start.elements):
        raise ValueError(f"segments must be non-negative and sum to {start.elements}, got {start.segments}")
    if start.segments and start.op not in ("all_gather", "reduce_scatter"):
        raise ValueError(f"only all_gather and reduce_scatter have segments, not {start.op!r}")
    if not start.segments:
        _check_shares(start)
    if not all(map(math.isfinite, (*start.multipliers, start.divisor))) or np.float32(start.divisor) == 0:
        raise ValueError("multipliers must be finite, and the divisor finite and not 0")
    scaled = start.divisor != 1 or any(each != 1 for each in start.multipliers)
    if scaled and (start.op not in ("sum", "reduce_scatter") or not start.dtype.startswith("float")):
        raise ValueError(f"only sums of floating point numbers have multipliers and a divisor, not {start.op!r}")
    if min(start.elements, start.generation, start.epoch, start.round, start.attempt) < 0:
        raise ValueError("elements, generation, epoch, round and attempt must be non-negative")
    if start.attempt >> 32 or max(start.elements, start.generation, start.epoch, start.round) >> 63:
        raise ValueError("attempt must fit 32 bits; elements, generation, epoch and round must fit 63")


def _check_shares(start: Start) -> None:
    if len(start.shares) != len(start.contributors):
        raise ValueError(f"shares must have one entry for each of the {len(start.contributors)} contributors")
    if min(start.shares) < 0 or not math.isclose(math.fsum(start.shares), 1.0, rel_tol=1e-6):
        raise ValueError(f"shares must be non-negative and sum to 1, got {start.shares}")
    if start.op in ("all_gather", "reduce_scatter"):
        raise ValueError(f"{start.op} needs segments: how many elements each contributor owns")
    if start.op == "broadcast" and max(start.shares) != 1:
        raise ValueError("broadcast needs share 1 for the contributor whose numbers they are, and 0 for the others")


def _check_pattern(start: Start) -> None:
    count = len(start.contributors)
    if start.chunk_bytes % 64 or start.chunk_bytes < 0:
        raise ValueError(f"chunk_bytes is {start.chunk_bytes}: choose a multiple of 64, or 0")
    if start.pattern == "ring" and sorted(start.order) != list(range(count)):
        raise ValueError(f"order must name each of the {count} contributors once, got {start.order}")
    if start.pattern == "tree":
        _check_tree(start, count)


def _check_tree(start: Start, count: int) -> None:
    roots = [index for index, parent in enumerate(start.parents) if parent == -1]
    if len(start.parents) != count or len(roots) != 1 or not all(-1 <= each < count for each in start.parents):
        raise ValueError(f"parents must give each of the {count} contributors the one above it, got {start.parents}")
    for index in range(count):
        steps, at = 0, index
        while start.parents[at] >= 0 and steps <= count:
            steps, at = steps + 1, start.parents[at]
        if steps > count:
            raise ValueError(f"parents contain a circle: {start.parents}")
    if start.op != "all_gather" and start.shares[roots[0]] != 1:
        raise ValueError("in a tree the root owns everything: its share must be 1")
    if start.op == "all_gather":
        raise ValueError("all_gather needs pattern 'direct' or 'ring'")


def result_span(start: Start, me: int) -> tuple[int, int]:
    """Which elements a member's result tensor holds: all, or after a reduce_scatter its own."""
    if start.op != "reduce_scatter":
        return 0, start.elements
    return segment_of(start, me) if me >= 0 else (0, 0)


def source_span(start: Start, me: int) -> tuple[int, int] | None:
    """Which elements a member's source tensor holds; None: it has none."""
    if me < 0 or (start.op == "broadcast" and start.shares[me] != 1):
        return None
    return segment_of(start, me) if start.op == "all_gather" else (0, start.elements)

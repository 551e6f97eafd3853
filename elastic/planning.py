"""Which way an attempt goes: by what members report of their links, and which pairs cannot talk.

Pure, as the membership is. Measurements arrive with heartbeats; plans are made between rounds (`refresh`), so that a
start only looks one up. Without measurements every peer owns the same share.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from collectives import topology
from collectives.records import WireRun, fits
from collectives.sockets import NEAR
from collectives.topology import Matrix, Plan
from collectives.tuning import fine_chunk
from fault.verdicts import AMBIGUOUS, CORRUPT, STALLED, Verdict

from .messages import LinkReport, OperationSpec
from .rounds import Pair, executed, extent

LOSSLESS = ("f32", "raw")
REPLAN_SECONDS = 1.0
KEPT_SECONDS = 20.0  # for which plans stay at the most while it is being judged what slows them
KEPT_PLANS = 32
PLANNED_AT_ONCE = 8  # peers: for so many, planning takes a few milliseconds
PLANNED_AT_ALL = 64
STEADY = 1.25  # a measurement that moved by less is as good as the one before
SAME_HOST = 5e-5  # seconds of round trip that no network has
LARGE = 8 << 20  # bytes from which a ring costs near hosts less than its hops: each has two links to serve, not all
FASTEST = 500e6  # bytes/s: above this, hosts and not paths set the pace, and nothing is to be planned

WIRE_BYTES = {"f32": 4.0, "bf16": 2.0, "f16": 2.0, "int8": 1.0, "int4": 0.5, "e3m0": 0.5}
MAX_RUNS = 4096  # of wires in one start, which goes to every member in one message
DTYPE_BYTES = {"float64": 8, "int64": 8, "int16": 2, "int8": 1, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be planned: among whom, and how much it carries; the size in powers of two. See `topology.plan`."""

    names: tuple[str, ...]
    cuts: frozenset[Pair]
    nbytes: int
    lossless: bool
    scatter: float
    gather: float


def job_of(spec: OperationSpec, names: tuple[str, ...], cuts: Iterable[Pair]) -> Job:
    gather = spec.gather_wire or spec.wire
    return Job(
        names,
        frozenset(pair for pair in cuts if pair <= set(names)),
        1 << (spec.elements * DTYPE_BYTES.get(spec.carried or spec.dtype, 4)).bit_length(),
        spec.wire in LOSSLESS and gather in LOSSLESS,
        WIRE_BYTES.get(spec.wire, 4.0) / 4,
        WIRE_BYTES.get(gather, 4.0) / 4,
    )


class Routes:
    """The measured links of a run, and the plans that were made from them."""

    def __init__(self) -> None:
        self._links: dict[tuple[str, str], LinkReport] = {}
        self._planner = topology.Planner(KEPT_PLANS)
        self._plans: OrderedDict[Job, Plan] = OrderedDict()
        self._moved = self._at_once = False
        self._next = 0.0
        self._judged_since: float | None = None
        self._avoided: frozenset[tuple[str, tuple[str, ...]]] = frozenset()
        self._probed: set[str] = set()
        self._shunned: frozenset[Pair] = frozenset()

    def learn(self, name: str, links: Iterable[LinkReport], members: Collection[str]) -> None:
        """What `name` sees of its links to other members now; what is no measurement is left out."""
        for link in links:
            if link.peer in members and 0 <= link.goodput < 1e15 and 0 <= link.rtt < 1e3:
                alike = 0 < link.rtt < SAME_HOST or link.goodput > FASTEST
                link = replace(link, goodput=FASTEST if alike else link.goodput)
                before = self._links.get((name, link.peer))
                if before is None or _moved(before.goodput, link.goodput) or _moved(before.rtt, link.rtt):
                    self._links[name, link.peer] = link
                    self._moved = True

    def forget(self, name: str) -> None:
        """The peer has departed: its next life may stand elsewhere."""
        self._links = {pair: link for pair, link in self._links.items() if name not in pair}
        self._plans = OrderedDict((job, plan) for job, plan in self._plans.items() if name not in job.names)

    def refresh(self, now: float, *, judging: bool = False) -> None:
        """Makes all plans anew if measurements have moved; more seldom the more there is to do.

        judging: it is not known yet what is slow under the plans of now. They stay until it is, for a while: else what
        there is to be seen would be planned away.
        """
        since = self._judged_since if self._judged_since is not None else now
        self._judged_since = since if judging else None
        stay = judging and now - since < KEPT_SECONDS and not self._at_once
        if self._moved and now >= self._next and not stay:
            self._at_once = False
            largest = max((len(job.names) for job in self._plans), default=0)
            self._next = now + REPLAN_SECONDS * max(1, largest / PLANNED_AT_ONCE)
            self._moved = False
            self._plans = OrderedDict((job, self._plan(job)) for job in self._plans)

    def avoid(self, verdicts: Mapping[tuple[str, ...], Verdict]) -> None:
        """Plans anew at once if these are others than before.

        Slow peers and links carry what they are measured to carry, as any other. Pairs whose frames came corrupt, or
        not at all, are taken for cut. Among whom a ring has shown a slow link that may be the fault of either end, no
        ring is used until nobody there is slow: the direct pattern tells ends and links apart.
        """
        found = frozenset((verdict.kind, culprits) for culprits, verdict in verdicts.items())
        if found == self._avoided:
            return
        self._avoided, self._moved, self._at_once, self._next = found, True, True, 0.0
        cut = (CORRUPT, STALLED)
        self._shunned = frozenset(frozenset(culprits) for kind, culprits in found if kind in cut)
        slow = {name for kind, culprits in found if kind not in cut for name in culprits}
        self._probed = (self._probed & slow) | {n for kind, names in found if kind == AMBIGUOUS for n in names}

    def find(self, spec: OperationSpec, names: tuple[str, ...], cuts: Iterable[Pair]) -> Plan:
        """The way for this operation among these contributors; who is not in it cannot be reached at all."""
        job = job_of(spec, names, self._around(names, frozenset(cuts)))
        if spec.root:
            return spread(names, job.cuts, spec.root)
        if segmented(spec) and not job.cuts:
            return simple(names, job.cuts)
        plan = self._plans.pop(job, None) or self._first(job)
        self._plans[job] = plan
        while len(self._plans) > KEPT_PLANS:
            self._plans.popitem(last=False)
        return plan

    def chunk_bytes(self, names: tuple[str, ...], wire: str) -> int:
        """How finely tensors are cut among these: finer on long ways, for many stripes to share. 0: as usual."""
        links = [self._links.get((one, other)) for one in names for other in names if one != other]
        known = [(link.rtt, link.goodput) for link in links if link is not None]
        return fine_chunk(known, factor=WIRE_BYTES.get(wire, 4.0) / 4)

    def _around(self, names: tuple[str, ...], cuts: frozenset[Pair]) -> frozenset[Pair]:
        """Shunned pairs count as cut, unless somebody could not be reached then."""
        around = cuts | self._shunned
        return around if len(spread(names, around, names[0]).names) == len(names) else cuts

    def _first(self, job: Job) -> Plan:
        if len(job.names) <= PLANNED_AT_ONCE:
            return self._plan(job)
        self._moved = True  # planned properly with the next refresh
        return simple(job.names, job.cuts)

    def _plan(self, job: Job) -> Plan:
        measured = any(pair in self._links for pair in _pairs(job.names))
        if not measured or len(job.names) > PLANNED_AT_ALL or self._probed.intersection(job.names):
            return simple(job.names, job.cuts)
        if job.lossless and job.nbytes >= LARGE and len(job.names) > 2 and self._near(job):
            count = len(job.names)
            return Plan(names=job.names, pattern="ring", shares=(1 / count,) * count, order=tuple(range(count)))
        return self._planner.plan(
            self._matrix(job.names, job.cuts),
            nbytes=job.nbytes,
            lossless=job.lossless,
            scatter_factor=job.scatter,
            gather_factor=job.gather,
        )

    def _near(self, job: Job) -> bool:
        """All are in one room, on a network that is faster than they are."""
        links = [self._links.get(pair) for pair in _pairs(job.names)]
        return not job.cuts and all(link and 0 < link.rtt < NEAR and link.goodput >= FASTEST / STEADY for link in links)

    def _matrix(self, names: tuple[str, ...], cuts: frozenset[Pair]) -> Matrix:
        unknown = LinkReport(peer="")
        rows = [[self._links.get((one, other), unknown) for other in names] for one in names]
        return Matrix(
            names=names,
            bandwidth=tuple(tuple(link.goodput for link in row) for row in rows),
            rtt=tuple(tuple(link.rtt for link in row) for row in rows),
            cuts=cuts,
        )


def segmented(spec: OperationSpec) -> bool:
    """Whether each contributor owns a segment whose bounds the caller sees."""
    return spec.op == "all_gather" or spec.algorithm == "reduce_scatter"


def valid_wires(runs: tuple[WireRun, ...], elements: int) -> bool:
    """Whether a sum of so many float32 numbers can travel in these runs: they cover it, in wires that are known."""
    known = all({run.wire, run.gather_wire or run.wire} <= WIRE_BYTES.keys() for run in runs)
    return 0 < len(runs) <= MAX_RUNS and known and fits(runs, elements)


def chosen_wires(spec: OperationSpec, plan: Plan, offered: Iterable[tuple[WireRun, ...]]) -> tuple[WireRun, ...]:
    """The first runs that are valid, of those that the contributors offer, in order; empty: all travels alike."""
    summed = executed(spec) == "sum" and (spec.carried or spec.dtype) == "float32"
    if not summed or plan.pattern != "direct" or plan.lossless_only:
        return ()
    return next((runs for runs in offered if valid_wires(runs, spec.elements)), ())


def orders(
    spec: OperationSpec, plan: Plan, given: tuple[int, ...], offered: Iterable[tuple[WireRun, ...]] = ()
) -> tuple[dict[str, Any], tuple[int, ...]]:
    """The fields of a Start that follow from what is done and how, and the segments that the callers see.

    given, offered: how many elements each contributor has, and in which runs of wires it would have them travel.
    Where not all pairs can talk, a reduce-scatter is a whole sum of which each keeps its segment, and an all-gather is
    the sum of what each gives in its own segment, with zeros in all others: exact, since moved bits are whole numbers.
    """
    elements, segments = extent(spec, given)
    apart = segmented(spec) and (plan.pattern != "direct" or min(plan.shares) == 0)
    wires = {"wire": spec.wire, "gather_wire": spec.gather_wire}
    if plan.lossless_only:
        wires = {"wire": spec.wire if spec.wire in LOSSLESS else "f32", "gather_wire": ""}
    fields = {
        "pattern": plan.pattern,
        "shares": plan.shares,
        "order": plan.order,
        "parents": plan.parents,
        "op": "sum" if apart else executed(spec),
        "segments": () if apart else segments,
        "elements": elements,
        "dtype": spec.carried or spec.dtype,
        "wires": chosen_wires(spec, plan, offered),
    }
    return fields | wires, segments


def simple(names: tuple[str, ...], cuts: Collection[Pair]) -> Plan:
    """Without measurements: equal shares for the contributors that can talk to all others, 0 for the rest.

    If there is none such, a tree from the best connected of the largest group that can reach each other.
    """
    apart = {name for pair in cuts for name in pair}
    owners = [name for name in names if name not in apart]
    if owners:
        shares = tuple(1.0 / len(owners) if name in owners else 0.0 for name in names)
        return Plan(names=names, pattern="direct", shares=shares)
    trees = [spread(names, cuts, root) for root in names]
    size = max(len(tree.names) for tree in trees)
    degree = {name: sum(name in pair for pair in cuts) for name in names}
    roots = [root for root, tree in zip(names, trees, strict=True) if len(tree.names) == size]
    return trees[names.index(min(roots, key=lambda root: (degree[root], root)))]


def spread(names: tuple[str, ...], cuts: Collection[Pair], root: str) -> Plan:
    """From one contributor to all that it can reach: directly, or along a tree of as few hops as there can be."""
    above = {root: ""}
    for name in (reached := [root]):
        new = [each for each in names if each not in above and frozenset((name, each)) not in cuts]
        above |= dict.fromkeys(new, name)
        reached += new
    names = tuple(name for name in names if name in above)
    shares = tuple(float(name == root) for name in names)
    if all(each in ("", root) for each in above.values()):
        return Plan(names=names, pattern="direct", shares=shares)
    parents = tuple(names.index(above[name]) if above[name] else -1 for name in names)
    return Plan(names=names, pattern="tree", shares=shares, parents=parents)


def described(plan: Plan) -> dict[str, Any]:
    """A plan as an event tells it; empty for the usual one, equal shares for all."""
    if plan.pattern == "direct" and len(set(plan.shares)) == 1:
        return {}
    shares = {name: round(share, 4) for name, share in zip(plan.names, plan.shares, strict=True)}
    fields: dict[str, Any] = {"pattern": plan.pattern, "shares": shares}
    if plan.order:
        fields["order"] = [plan.names[index] for index in plan.order]
    if plan.parents:
        parents = zip(plan.names, plan.parents, strict=True)
        fields["parents"] = {name: plan.names[index] if index >= 0 else "" for name, index in parents}
    return fields


def _moved(before: float, now: float) -> bool:
    """Whether a measurement says something else than the one before; 0 says nothing."""
    return bool(now) and not before / STEADY <= now <= before * STEADY


def _pairs(names: tuple[str, ...]) -> Iterable[tuple[str, str]]:
    return ((one, other) for one in names for other in names if one != other)

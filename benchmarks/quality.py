"""What the outer loops cost in quality: a byte-level GPT, trained by several simulated peers on real text.

One process holds all peers, in lockstep: `elastic.outer.simulator` runs the loops' own code on what they exchange. The
text is the source of Python's standard library; no two peers train on the same bytes, and the loss is that of held-out
files, of the outer parameters once everything has been exchanged. All rows of a seed begin with the same weights, and
peer m trains on the same windows in step t in each of them. But for `alone`, all rows train on equally many tokens. The
inner AdamW has the same learning rate everywhere: warm-up over a tenth of its steps, then a cosine to 5 %.

Means over seeds; "+-" is half of a 95 % confidence interval by Student's t, of differences within each seed.

    python -m benchmarks.quality --json quality.json
    python -m benchmarks.quality --peers 4 --rows diloco,streaming,streaming-e3m0
    python -m benchmarks.quality --quick                                  # a quick look: its figures say nothing

Ends with 1 if a gate fails (they are printed below the table). With --quick one gate decides, that no row is worse than
the untrained model. Interrupted, it reports the seeds that are complete.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import BenchmarkError, Report
from elastic.outer import co2, decoupled, delayed, diloco, streaming
from elastic.outer.compression import Compression
from elastic.outer.optimizers import SGD, Nesterov
from elastic.outer.rule import Rule
from elastic.outer.simulator import Simulator

sys.path.insert(0, str(common.ROOT / "examples"))
from gpt import GPT, VOCABULARY, GPTConfig
from text import ByteDataset, held_out_batches, load_text, split

SYNC_DELAY = 2  # of Streaming and Decoupled: an eighth of H
SOUND = "nothing diverges"
LONG, PARALLEL, ALONE = "alone-long", "data-parallel", "alone"
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last one will do for more.
STUDENT = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """steps: of each peer. every: H. batch: windows a step and peer. learning_rate: of the inner AdamW at its peak."""

    steps: int = 400
    every: int = 16
    batch: int = 4
    context: int = 32
    layers: int = 2
    width: int = 32
    learning_rate: float = 8e-3

    def model(self, seed: int) -> GPT:
        return GPT(GPTConfig(layers=self.layers, d_model=self.width, heads=2, context=self.context), seed=seed)


QUICK = Plan(steps=80, batch=2, layers=1, learning_rate=2e-3)


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Row:
    """name: for --rows. what: for the table. against: the row that it is compared with, beside data-parallel.

    make: the algorithm; none for those that exchange nothing but gradients, or nothing. lost: part of contributions
    that do not arrive. gated: False for settings that are known to be unstable, and are there to be seen.
    """

    name: str
    what: str
    against: str = ""
    make: Callable[..., Rule] | None = None
    wire: str = "f32"
    fragments: int = 1
    cut: str = "strided"
    lost: float = 0.0
    gated: bool = True

    def rule(self) -> Rule:
        assert self.make is not None
        return self.make(compression=Compression(wire=self.wire))


def outer_rows() -> list[Row]:
    gentle, low = Nesterov(lr=0.4, momentum=0.9), Nesterov(lr=0.2, momentum=0.9)

    def eager(outer: Nesterov, **options: Any) -> Rule:
        return delayed.rule(outer, eager=True, **options)

    late = partial(delayed.rule, gentle)
    return [
        Row(name="diloco", what="DiLoCo, lr .7", make=diloco.rule),
        Row(name="diloco-gentle", what="DiLoCo, lr .4", against="diloco", make=partial(diloco.rule, gentle)),
        Row(name="diloco-low", what="DiLoCo, lr .2", against="diloco", make=partial(diloco.rule, low)),
        Row(name="eager-low", what="eager, lr .2", against="diloco-low", make=partial(eager, low)),
        Row(name="delayed", what="delayed, lr .2", against="diloco-low", make=delayed.rule),
        Row(name="eager", what="eager, lr .4", against="diloco-gentle", make=partial(eager, gentle)),
        Row(name="delayed-fast", what="delayed, lr .4 (not gated)", against="diloco-gentle", make=late, gated=False),
        Row(
            name="delayed-plain",
            what="delayed, SGD lr .7",
            against="diloco-gentle",
            make=lambda **o: delayed.rule(SGD(lr=0.7), **o),
        ),
        Row(name="co2", what="CO2, lr .4, momentum .5", against="diloco", make=co2.rule),
        *streaming_rows(),
    ]


def streaming_rows() -> list[Row]:
    def rule(**options: Any) -> Rule:
        return streaming.rule(sync_delay=SYNC_DELAY, **options)

    def decoupled_rule(**options: Any) -> Rule:
        return decoupled.rule(sync_delay=SYNC_DELAY, **options)

    plain = Row(name="streaming", what="Streaming, lr .4, f32", against="diloco-gentle", make=rule, fragments=4)
    named = "streaming"
    return [
        plain,
        replace(plain, name="streaming-int4", what="Streaming, int4", against=named, wire="int4"),
        replace(plain, name="streaming-e3m0", what="Streaming, e3m0", against=named, wire="e3m0"),
        replace(plain, name="streaming-lost10", what="Streaming, 10 % dropped", against=named, lost=0.1),
        replace(plain, name="streaming-lost30", what="Streaming, 30 % dropped", against=named, lost=0.3),
        Row(
            name="decoupled",
            what="Decoupled, lr .7",
            against="diloco",
            make=decoupled_rule,
            fragments=8,
            cut="balanced",
        ),
    ]


def all_rows() -> list[Row]:
    return [
        Row(name=PARALLEL, what="data-parallel AdamW"),
        Row(name=ALONE, what="one peer alone, 1/M of the tokens"),
        Row(name=LONG, what="one peer alone, M times the steps"),
        *outer_rows(),
    ]


# --- text -------------------------------------------------------------------------------------------------------------


class Text:
    """Windows to train on, and batches that are held out. guess: their loss if only bytes' frequencies were known."""

    def __init__(self, context: int, held_windows: int) -> None:
        train, held = split(load_text())
        self.windows = ByteDataset(train, context)
        self.held = held_out_batches(held, context, batch_size=64, batches=held_windows // 64)
        self.guess = cross_entropy(b"".join(each.data for each in train), [targets for _, targets in self.held])

    def order(self, seed: int, plan: Plan, peers: int) -> torch.Tensor:
        """(steps, peers, batch): which window is where; each one at most once."""
        shape = (plan.steps, peers, plan.batch)
        if math.prod(shape) > len(self.windows):
            raise BenchmarkError(f"{math.prod(shape):,} windows are needed, the text has {len(self.windows):,}")
        drawn = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(seed))
        return drawn[: math.prod(shape)].view(shape)

    def batch(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.windows[i] for i in indices.flatten().tolist()])

    @torch.no_grad()
    def loss(self, model: GPT) -> float:
        """Nats per byte."""
        return statistics.fmean(model.loss(inputs, targets).item() for inputs, targets in self.held)


def cross_entropy(known: bytes, targets: Iterable[torch.Tensor]) -> float:
    """Of bytes by their frequencies in `known`, each seen once more than it was."""
    seen = torch.bincount(torch.frombuffer(bytearray(known), dtype=torch.uint8), minlength=VOCABULARY) + 1
    frequencies = (seen / seen.sum()).log()
    return -frequencies[torch.cat([each.flatten() for each in targets])].mean().item()


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """loss: of the held-out text. sent: bytes that a peer has given and that arrived. arrived: part that did."""

    loss: float
    sent: float = 0.0
    arrived: float = 1.0


class Trainee:
    """Models with an AdamW each; one optimizer for all, as it treats every number by itself."""

    def __init__(self, plan: Plan, seed: int, peers: int, steps: int) -> None:
        self.models = [plan.model(seed) for _ in range(peers)]
        parameters = [each for model in self.models for each in model.parameters()]
        self.inner = torch.optim.AdamW(
            parameters, lr=plan.learning_rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.inner, lambda step: pace(step, steps))

    def step(self, batches: Sequence[torch.Tensor]) -> None:
        losses = [m.loss(b[:, :-1], b[:, 1:]) for m, b in zip(self.models, batches, strict=True)]
        torch.stack(losses).sum().backward()
        for model in self.models:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        self.inner.step()
        self.inner.zero_grad()
        self.schedule.step()


def pace(step: int, steps: int) -> float:
    """Part of the peak learning rate: a tenth of the steps up to it, then along a cosine down to 5 %."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, steps - warm)))) / 2


def train_one(text: Text, plan: Plan, seed: int, order: torch.Tensor) -> float:
    """One model on all of order[t] in step t: the gradients of equal parts, averaged, are the gradient of the whole."""
    trainee = Trainee(plan, seed, 1, len(order))
    for indices in order:
        trainee.step([text.batch(indices)])
    return text.loss(trainee.models[0])


def train_outer(text: Text, plan: Plan, seed: int, order: torch.Tensor, row: Row) -> Outcome:
    peers = order.shape[1]
    trainee = Trainee(plan, seed, peers, len(order))
    simulator = simulated(trainee.models, plan, seed, row)
    for indices in order:
        trainee.step([text.batch(each) for each in indices])
        simulator.stepped(plan.batch * plan.context)
    simulator.flush()
    check_equal(trainee.models)
    arrived = statistics.fmean(len(giving) for _, giving in simulator.rounds) / peers
    return Outcome(text.loss(trainee.models[0]), simulator.sent / peers, arrived)


def simulated(models: Sequence[GPT], plan: Plan, seed: int, row: Row) -> Simulator:
    rule = row.rule()
    turns = (plan.steps // plan.every + 3) * row.fragments
    luck = torch.rand(turns, len(models), generator=torch.Generator().manual_seed(seed))  # the same for all rows
    return Simulator(
        models,
        rule,
        sync_every=plan.every,
        fragments=row.fragments,
        cut=row.cut,
        received=lambda turn, replica: bool(luck[turn, replica] >= row.lost),
    )


def check_equal(models: Sequence[GPT]) -> None:
    """BenchmarkError unless all peers have come to the same parameters, bit by bit."""
    first, *others = ([*model.parameters()] for model in models)
    if not all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True)):
        raise BenchmarkError("peers differ after the last exchange")


def run_row(row: Row, text: Text, plan: Plan, seed: int, peers: int) -> Outcome:
    order = text.order(seed, plan, peers)
    if row.name == PARALLEL:
        gradients = 4.0 * plan.model(0).num_parameters * plan.steps
        return Outcome(train_one(text, plan, seed, order), gradients)
    if row.name == ALONE:
        return Outcome(train_one(text, plan, seed, order[:, 0]))
    if row.name == LONG:
        return Outcome(train_one(text, plan, seed, order.flatten(0, 1)))
    return train_outer(text, plan, seed, order, row)


# --- numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Mean of differences within seeds, and half of its 95 % confidence interval."""

    mean: float
    half: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        each = [a - b for a, b in zip(ours, theirs, strict=True)]
        if len(each) < 2:
            return cls(each[0], math.inf)
        quantile = STUDENT[min(len(each) - 2, len(STUDENT) - 1)]
        return cls(statistics.fmean(each), quantile * statistics.stdev(each) / math.sqrt(len(each)))

    def __str__(self) -> str:
        return f"{self.mean:+.4f} +- {self.half:.4f}"


@dataclass
class Results:
    """Of one number of peers: the outcomes of each row, one a seed."""

    peers: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def add(self, outcomes: dict[str, Outcome]) -> None:
        for name, outcome in outcomes.items():
            self.outcomes.setdefault(name, []).append(outcome)

    @property
    def seeds(self) -> int:
        return min(map(len, self.outcomes.values()))

    def losses(self, name: str) -> list[float]:
        return [outcome.loss for outcome in self.outcomes[name]]

    def has(self, *names: str) -> bool:
        return all(name in self.outcomes for name in names)

    def mean(self, name: str) -> float:
        return statistics.fmean(self.losses(name))

    def deviation(self, name: str) -> float:
        losses = self.losses(name)
        return statistics.stdev(losses) if len(losses) > 1 else math.inf

    def difference(self, name: str, other: str) -> Difference:
        return Difference.of(self.losses(name), self.losses(other))

    def compared(self, name: str, other: str) -> str:
        return str(self.difference(name, other)) if other and name != other and self.has(other) else ""


# --- gates ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """holds: None if the rows that it is about were not run."""

    name: str
    holds: bool | None
    found: str

    def __str__(self) -> str:
        return f"{ {True: 'holds', False: 'FAILS', None: 'not checked'}[self.holds] }: {self.name}: {self.found}"


def judged_by(name: str, results: Results, names: Sequence[str], check: Callable[..., tuple[bool, str]]) -> Gate:
    name = f"M = {results.peers}, {name}"
    if not results.has(*names):
        return Gate(name, None, f"needs {', '.join(names)}")
    return Gate(name, *check(results, *names))


def gates(results: Results, limit: float) -> list[Gate]:
    lost = ("streaming", "streaming-lost10", "streaming-lost30")
    return [
        sound(results, limit),
        judged_by("e3m0 within 2 seed deviations of f32", results, ("streaming-e3m0", "streaming"), near),
        judged_by("more drops are no better", results, lost, no_better),
        judged_by("DiLoCo <= eager <= delayed, lr .2", results, ("diloco-low", "eager-low", "delayed"), ordered),
    ]


def sound(results: Results, limit: float) -> Gate:
    """limit: the loss from byte frequencies alone. Who is not below that has learned next to nothing, or lost it."""
    gated = {row.name for row in all_rows() if row.gated}
    worst = max((loss for name in gated & results.outcomes.keys() for loss in results.losses(name)), key=badness)
    found = f"worst run {worst:.3f}, limit {limit:.3f}, untrained {untrained():.3f}"
    return Gate(f"M = {results.peers}, {SOUND}", worst < limit, found)


def badness(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def untrained() -> float:
    return math.log(VOCABULARY)


def near(results: Results, name: str, other: str) -> tuple[bool, str]:
    distance, limit = results.mean(name) - results.mean(other), 2 * results.deviation(other)
    return abs(distance) <= limit, f"{distance:+.4f}, at most {limit:.4f}"


def no_better(results: Results, *names: str) -> tuple[bool, str]:
    """Each against the one before: not better by more than chance."""
    steps = [results.difference(more, less) for less, more in itertools.pairwise(names)]
    return all(each.mean + each.half >= 0 for each in steps), ", then ".join(map(str, steps))


def ordered(results: Results, *names: str) -> tuple[bool, str]:
    """By means alone; whether chance would do as well is to be seen from the intervals."""
    steps = [results.difference(worse, better) for better, worse in itertools.pairwise(names)]
    return all(each.mean >= 0 for each in steps), ", then ".join(map(str, steps))


# --- reports ----------------------------------------------------------------------------------------------------------


COLUMNS = (
    "M",
    "row",
    "held-out nats/byte: mean (seeds' deviation)",
    "less data-parallel",
    "less its reference",
    "reference",
    "MB given by a peer",
    "times less",
)


def add(report: Report, row: Row, results: Results, rows: Sequence[Row]) -> None:
    outcomes, name = results.outcomes[row.name], row.name
    sent = statistics.fmean(outcome.sent for outcome in outcomes)
    reference = results.compared(name, row.against)
    cells = (
        str(results.peers),
        row.what,
        f"{results.mean(name):.4f} ({results.deviation(name):.4f})",
        results.compared(name, PARALLEL),
        reference,
        next(each.what for each in rows if each.name == row.against) if reference else "",
        f"{sent / 1e6:.2f}",
        f"{fewer(results, sent):.0f}" if sent and results.has(PARALLEL) else "",
    )
    facts = {key: [getattr(outcome, key) for outcome in outcomes] for key in ("loss", "sent", "arrived")}
    report.add(cells, row=name, peers=results.peers, **facts)


def fewer(results: Results, sent: float) -> float:
    return results.outcomes[PARALLEL][0].sent / sent


def notes(plan: Plan, text: Text) -> list[str]:
    n = plan.model(0).num_parameters
    tokens = plan.steps * plan.batch * plan.context
    return [
        f"GPT of {n:,} parameters, {plan.layers} layers, context {plan.context}; {plan.steps} steps of "
        f"{plan.batch * plan.context} bytes a peer: {tokens:,} each, M times that together. H = {plan.every}, "
        f"{plan.steps // plan.every} rounds. Inner AdamW: lr {plan.learning_rate:g}, betas .9 and .99, decay .1, "
        "gradients clipped to 1.",
        f"Streaming: 4 fragments, {SYNC_DELAY} steps of delay, alpha .5; Decoupled: 8 balanced, {SYNC_DELAY} steps, "
        "all peers equally fast, so that its quorum and its weights do nothing. 4-bit results return in int8.",
        f"MB given by a peer: its contributions as they travel; for data-parallel a gradient in f32 ({4 * n / 1e6:.2f} "
        "MB) every step. The mean comes back, in as many bytes (twice as many for the 4-bit rows).",
        f"Held out: {sum(targets.numel() for _, targets in text.held):,} bytes of files that nobody trains on; by byte "
        f"frequencies alone {text.guess:.3f} nats/byte.",
    ]


# --- the command ------------------------------------------------------------------------------------------------------


def chosen(names: str) -> list[Row]:
    rows = {row.name: row for row in all_rows()}
    wanted = names.split(",") if names else [*rows]
    unknown = [name for name in wanted if name not in rows]
    if unknown:
        raise BenchmarkError(f"no row is called {', '.join(unknown)}: choose from {', '.join(rows)}")
    return [row for row in rows.values() if row.name in wanted]


def measure(rows: Sequence[Row], text: Text, plan: Plan, every: Sequence[int], seeds: int) -> list[Results]:
    """Interrupted, the seeds that are complete."""
    found = [Results(peers) for peers in every]
    with contextlib.suppress(KeyboardInterrupt):
        for seed in range(seeds):
            outcomes = [{row.name: timed(row, text, plan, seed, peers) for row in rows} for peers in every]
            for results, each in zip(found, outcomes, strict=True):
                results.add(each)
    if not found[0].outcomes:
        raise BenchmarkError("interrupted before the first seed was complete")
    return found


def timed(row: Row, text: Text, plan: Plan, seed: int, peers: int) -> Outcome:
    began = time.monotonic()
    outcome = run_row(row, text, plan, seed, peers)
    took = time.monotonic() - began
    common.progress(f"seed {seed}, M = {peers}, {row.name}: {outcome.loss:.4f} nats/byte, {took:.1f} s")
    return outcome


def arguments_of() -> argparse.Namespace:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="initialisations and orders (default 5)")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help=f"of each peer (default {Plan.steps})")
    parser.add_argument("--peers", default="", help="numbers of peers (default 4,8)")
    parser.add_argument("--rows", default="", help=f"some of: {', '.join(row.name for row in all_rows())}")
    parser.add_argument("--lr", type=float, default=0.0, help="of the inner AdamW, at its peak")
    parser.add_argument("--quick", action="store_true", help="fewer steps, 2 seeds, 2 peers")
    return parser.parse_args()


def plan_of(arguments: argparse.Namespace) -> Plan:
    plan = QUICK if arguments.quick else Plan()
    given = {"steps": arguments.steps, "learning_rate": arguments.lr}
    return replace(plan, **{name: value for name, value in given.items() if value})


def main() -> None:
    arguments = arguments_of()
    torch.set_num_threads(1)
    with common.one_line_errors():
        sys.exit(run(arguments))


def run(arguments: argparse.Namespace) -> int:
    quick, plan, rows = arguments.quick, plan_of(arguments), chosen(arguments.rows)
    text = Text(plan.context, 64 if quick else 512)
    every = [int(each) for each in (arguments.peers or ("2" if quick else "4,8")).split(",")]
    found = measure(rows, text, plan, every, arguments.seeds or (2 if quick else 5))
    report = Report("quality", f"Quality of the outer loops, {found[0].seeds} seeds, one process", COLUMNS)
    for results in found:
        for row in rows:
            add(report, row, results, all_rows())
    judged = [gate for results in found for gate in gates(results, untrained() if quick else text.guess)]
    report.notes += [*notes(plan, text), *map(str, judged)]
    common.publish(report, arguments)
    deciding = [gate for gate in judged if SOUND in gate.name] if quick else judged
    return int(any(gate.holds is False for gate in deciding))


if __name__ == "__main__":
    main()

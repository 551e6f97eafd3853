"""The outer algorithms against their papers, in one process: reductions, invariants, convergence on quadratics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from elastic.errors import ConfigurationError
from elastic.outer import co2, decoupled, delayed, diloco, streaming
from elastic.outer.cadence import Final, Late, Moment, Ramp, Seconds, Steps, cadence_of
from elastic.outer.compression import Compression
from elastic.outer.feedback import EF21, EControl, ErrorFeedback
from elastic.outer.fragments import cut
from elastic.outer.optimizers import SGD, Adam, HeavyBall, Nesterov, norm, power
from elastic.outer.replica import Replica
from elastic.outer.rule import Facts, Rule, check_delay
from elastic.outer.simulator import Simulator
from elastic.outer.state import Layout
from elastic.outer.weighting import Equal, FedBuff, FedFix, Throughput, Tokens

LAYERS, WIDTH, WORKERS = 4, 150, 3


class Layered(torch.nn.Module):
    """Half the squared distance to a target, with a condition of 10, in layers of `WIDTH`."""

    def __init__(self, seed: int, layers: int = LAYERS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(WIDTH)) for _ in range(layers))
        self.targets = [torch.randn(WIDTH, generator=generator) for _ in range(layers)]
        self.curvature = torch.linspace(0.1, 1.0, WIDTH)

    def forward(self) -> torch.Tensor:
        pairs = zip(self.layers, self.targets, strict=True)
        return torch.stack([(self.curvature * (x - t).square()).sum() / 2 for x, t in pairs]).sum()

    def flat(self) -> torch.Tensor:
        return torch.cat([x.detach() for x in self.layers])


def workers(n: int = WORKERS) -> list[Layered]:
    return [Layered(seed) for seed in range(n)]


def inner_of(model: torch.nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, "momentum": 0.5} | options)


def descend(model: torch.nn.Module, inner: torch.optim.Optimizer) -> None:
    inner.zero_grad()
    model().backward()
    inner.step()


def simulate(rule: Rule, steps: int, *, n: int = WORKERS, flush: bool = False, **options: Any) -> Simulator:
    """`steps` inner steps of n workers. The models are in `.models`."""
    models = workers(n)
    inners = [inner_of(model) for model in models]
    simulator = Simulator(models, rule, **options)
    simulator.models = models  # type: ignore[attr-defined]
    for _ in range(steps):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
    if flush:
        simulator.flush()
    return simulator


def locals_of(simulator: Simulator) -> list[torch.Tensor]:
    return [model.flat() for model in simulator.models]  # type: ignore[attr-defined]


def outer_of(simulator: Simulator) -> torch.Tensor:
    return simulator.replicas[0].state.parameters


# --- reductions -------------------------------------------------------------------------------------------------------


def literal_streaming(h: int, p: int, tau: int, alpha: float, outer: Nesterov, steps: int) -> list[torch.Tensor]:
    """Algorithm 2 of the paper, written out: fragment f is sent at t = H + f H/P, then every H; guard t - t_p >= H."""
    models = workers()
    inners = [inner_of(model) for model in models]
    parts = cut([(f"layers.{i}", (WIDTH,)) for i in range(LAYERS)], p)
    theta = [torch.zeros(WIDTH) for _ in range(LAYERS)]
    buffers = [torch.zeros(WIDTH) for _ in range(LAYERS)]
    flying: dict[int, tuple[int, list[torch.Tensor]]] = {}
    for t in range(1, steps + 1):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)

        def receive(f: int) -> None:
            _, means = flying.pop(f)
            for mean, layer in zip(means, parts[f], strict=True):
                theta[layer], buffers[layer] = outer.step(theta[layer], buffers[layer], mean)
                for model in models:
                    with torch.no_grad():
                        local = model.layers[layer]
                        mixed = local * alpha + theta[layer] * (1 - alpha)
                        local.copy_(theta[layer] if alpha == 0 else local if alpha == 1 else mixed)

        for f in [f for f, (sent, _) in flying.items() if t - sent == tau]:
            receive(f)
        for f in range(p):
            offset = f * h // p
            if t - offset >= h and (t - offset) % h == 0:
                means = []
                for layer in parts[f]:
                    total = theta[layer] - models[0].layers[layer].detach()
                    for model in models[1:]:
                        total = total + (theta[layer] - model.layers[layer].detach())
                    means.append(total / float(len(models)))
                flying[f] = (t, means)
                if tau == 0:
                    receive(f)
    order = [layer for part in parts for layer in part]
    return [torch.cat([theta[layer] for layer in order]), *(model.flat() for model in models)]


@pytest.mark.parametrize(
    "h, p, tau, alpha",
    [(8, 1, 0, 0.0), (8, 4, 0, 0.0), (8, 2, 3, 0.5), (12, 4, 2, 0.5), (12, 4, 3, 0.0), (9, 2, 1, 1.0)],
)
def test_streaming_is_the_papers_algorithm_to_the_bit(h: int, p: int, tau: int, alpha: float) -> None:
    outer = Nesterov(lr=0.4, momentum=0.9)
    steps = 5 * h + 1
    rule = streaming.rule(outer, sync_delay=tau, merge_alpha=alpha)
    got = simulate(rule, steps, sync_every=h, fragments=p)
    theta, *locals_ = literal_streaming(h, p, tau, alpha, outer, steps)
    assert got.number >= 4
    assert torch.equal(outer_of(got), theta)
    assert all(map(torch.equal, locals_of(got), locals_))


def test_streaming_with_one_fragment_no_delay_and_no_mixing_is_diloco_to_the_bit() -> None:
    outer = Nesterov(lr=0.7, momentum=0.9)
    one = simulate(diloco.rule(outer), 40, sync_every=8)
    other = simulate(streaming.rule(outer, sync_delay=0, merge_alpha=0.0), 40, sync_every=8)
    assert one.number == other.number == 5 and torch.equal(outer_of(one), outer_of(other))
    assert all(map(torch.equal, locals_of(one), locals_of(other)))


def test_alpha_1_is_independent_training() -> None:
    got = simulate(streaming.rule(sync_delay=1, merge_alpha=1.0), 30, sync_every=8, fragments=4)
    assert got.number > 4
    alone = workers()
    for model in alone:
        inner = inner_of(model)
        for _ in range(30):
            descend(model, inner)
    assert all(torch.equal(one, model.flat()) for one, model in zip(locals_of(got), alone, strict=True))


def test_outer_sgd_with_lr_1_is_federated_averaging() -> None:
    got = simulate(diloco.rule(SGD(lr=1.0)), 8, sync_every=8)
    models = workers()
    for model in models:
        inner = inner_of(model)
        for _ in range(8):
            descend(model, inner)
    mean = torch.stack([model.flat() for model in models]).mean(0)
    torch.testing.assert_close(outer_of(got), mean)


def test_h_1_with_sgd_is_data_parallel_sgd() -> None:
    models = workers()
    simulator = Simulator(models, diloco.rule(SGD(lr=1.0)), sync_every=1)
    inners = [inner_of(model, momentum=0.0) for model in models]
    theta = torch.zeros(LAYERS * WIDTH)
    curvature = torch.cat([models[0].curvature] * LAYERS)
    targets = torch.stack([torch.cat(model.targets) for model in models])
    for _ in range(20):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
        theta = theta - 0.1 * (curvature * (theta - targets)).mean(0)
    torch.testing.assert_close(outer_of(simulator), theta, rtol=1e-4, atol=1e-5)


def test_one_peer_with_lr_1_and_no_momentum_is_plain_training() -> None:
    got = simulate(diloco.rule(SGD(lr=1.0)), 24, n=1, sync_every=6)
    (model,) = workers(1)
    inner = inner_of(model)
    for _ in range(24):
        descend(model, inner)
    torch.testing.assert_close(locals_of(got)[0], model.flat())


def literal_delayed(h: int, rounds: int, outer: Any, *, eager: bool, n: int = WORKERS) -> list[torch.Tensor]:
    """The equations of delayed.py, each peer with its own theta and momentum as in the paper. The starts of round r."""
    models = workers(n)
    inners = [inner_of(model) for model in models]
    size = LAYERS * WIDTH
    theta = [torch.zeros(size, dtype=torch.float64) for _ in models]
    buffers = [torch.zeros(size, dtype=torch.float64) for _ in models]
    before: list[torch.Tensor] | None = None
    for _ in range(rounds):
        deltas = []
        for m, (model, inner) in enumerate(zip(models, inners, strict=True)):
            for x, value in zip(model.layers, theta[m].float().split(WIDTH), strict=True):
                x.data.copy_(value)
            for _ in range(h):
                descend(model, inner)
            deltas.append(theta[m] - model.flat().double())
        stale = torch.stack(before).mean(0) if before else torch.zeros(size, dtype=torch.float64)
        for m in range(n):
            own = deltas[m] / n - (before[m] / n if before else 0) if eager else 0
            theta[m], buffers[m] = outer.step(theta[m], buffers[m], stale + own)
        before = deltas
    return theta


@pytest.mark.parametrize("eager", [False, True])
def test_delayed_and_eager_are_their_equations(eager: bool) -> None:
    outer = Nesterov(lr=0.4, momentum=0.9)
    got = simulate(delayed.rule(outer, eager=eager), 6 * 8, sync_every=8)
    expected = literal_delayed(8, 6, outer, eager=eager)
    assert got.number == 5, "one round is under way"
    for local, theta in zip(locals_of(got), expected, strict=True):
        torch.testing.assert_close(local.double(), theta, rtol=1e-3, atol=2e-5)


def test_eager_with_one_peer_is_diloco() -> None:
    outer = Nesterov(lr=0.4, momentum=0.9)
    eager = simulate(delayed.rule(outer, eager=True), 40, n=1, sync_every=8)
    plain = simulate(diloco.rule(outer), 40, n=1, sync_every=8)
    torch.testing.assert_close(locals_of(eager)[0], locals_of(plain)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "rule", [delayed.rule(), delayed.rule(eager=True), co2.rule(), diloco.rule(), streaming.rule(sync_delay=1)]
)
def test_after_the_last_exchange_all_peers_hold_the_same_and_nothing_is_left(rule: Rule) -> None:
    got = simulate(rule, 43, flush=True, sync_every=8, fragments=2 if rule.name == "StreamingDiLoCo" else 1)
    assert all(torch.equal(each, locals_of(got)[0]) for each in locals_of(got))
    assert all(place.tokens == 0 and place.owed is None for each in got.replicas for place in each.places)
    hashes = {each.state.state_hash for each in got.replicas}
    assert len(hashes) == 1


def test_co2_without_penalty_and_clipping_is_delayed_slowmo() -> None:
    outer = HeavyBall(lr=0.8, momentum=0.5)
    plain = simulate(co2.rule(outer, penalty=False, clip=math.inf), 48, sync_every=8)
    expected = literal_delayed(8, 6, outer, eager=False)
    torch.testing.assert_close(locals_of(plain)[0].double(), expected[0], rtol=1e-3, atol=2e-5)


def test_co2_clips_its_momentum_and_counts_stale_contributions_less() -> None:
    rule = co2.rule(HeavyBall(lr=1.0, momentum=0.5), clip=0.25)
    layout = Layout(Layered(0, layers=1))
    version = rule.begin(torch.zeros(WIDTH))
    big = torch.full((WIDTH,), 3.0)
    after = rule.advance(version, big, layout.parts[0])
    assert torch.equal(after.momentum, torch.full((WIDTH,), 0.25)) and torch.equal(after.parameters, -after.momentum)
    assert isinstance(rule, co2.CO2Rule)
    assert rule.staleness(after.momentum, big) == 1.0, "the outer parameters have moved less than that"
    small = torch.full((WIDTH,), 0.05)
    assert rule.staleness(after.momentum, small) == pytest.approx(5.0)
    unclipped = co2.rule(HeavyBall(lr=1.0, momentum=0.5), penalty=True, clip=math.inf)
    moved = unclipped.advance(after, small, layout.parts[0])
    torch.testing.assert_close(moved.momentum, torch.full((WIDTH,), 0.25 * 0.5 + 0.05 / 5))


def test_decoupled_with_all_peers_no_grace_and_equal_tokens_is_streaming() -> None:
    outer = Nesterov(lr=0.4, momentum=0.9)
    one = simulate(decoupled.rule(outer, sync_delay=2), 50, sync_every=8, fragments=4)
    other = simulate(streaming.rule(outer, sync_delay=2, merge_alpha=0.0), 50, sync_every=8, fragments=4)
    assert one.number == other.number > 8 and torch.equal(outer_of(one), outer_of(other))


def test_rda_keeps_the_length_of_what_does_not_agree() -> None:
    rule = decoupled.rule(SGD(lr=1.0), rda=True)
    layout = Layout(Layered(0, layers=1))
    vectors = [torch.zeros(WIDTH) for _ in range(2)]
    vectors[0][0], vectors[1][1] = 3.0, 3.0
    mean = torch.stack([v / 3 for v in vectors]).mean(0)
    moved = rule.advance(rule.begin(torch.zeros(WIDTH)), mean, layout.parts[0], Facts(scale=3.0))
    assert moved.parameters.norm() == pytest.approx(3.0) and moved.parameters[0] == moved.parameters[1] < 0
    opposed = rule.advance(rule.begin(torch.zeros(WIDTH)), torch.zeros(WIDTH), layout.parts[0], Facts(scale=3.0))
    assert torch.equal(opposed.parameters, torch.zeros(WIDTH)), "directions that cancel out move nothing"


def test_rda_trains() -> None:
    """Where the peers' optima differ it keeps moving, since lengths do not cancel out; here they do not."""
    outer = Nesterov(lr=0.4, momentum=0.9)
    assert mean_loss(lambda: decoupled.rule(outer, sync_delay=1, rda=True)) < mean_loss(
        lambda: diloco.rule(SGD(lr=1.0))
    )


# --- invariants -------------------------------------------------------------------------------------------------------

RULES: list[Callable[..., Rule]] = [
    diloco.rule,
    lambda **options: streaming.rule(sync_delay=2, **options),
    delayed.rule,
    lambda **options: delayed.rule(eager=True, **options),
    co2.rule,
    decoupled.rule,
]


@pytest.mark.parametrize("wire, bits", [("f32", 32), ("bf16", 16), ("int8", 8.25), ("int4", 4.25), ("e3m0", 4.25)])
def test_the_bytes_on_the_wire_are_those_of_the_formula(wire: str, bits: float) -> None:
    """Each peer gives every number once in H steps, in as many bits: whatever the number of fragments."""
    sizes = {}
    for fragments in (1, 2, 4):
        rule = streaming.rule(sync_delay=0, compression=Compression(wire=wire))
        got = simulate(rule, 8 * 5, sync_every=8, fragments=fragments, flush=True)
        assert got.number % fragments == 0
        sizes[fragments] = got.sent / (got.number / fragments)
    blocks = math.ceil(WIDTH / 128) * 128 / WIDTH if bits < 16 else 1
    expected = WORKERS * LAYERS * WIDTH * bits / 8
    assert all(expected * 0.99 <= size <= expected * blocks for size in sizes.values()), (sizes, expected)


@pytest.mark.parametrize("h, p", [(8, 1), (8, 4), (10, 4), (24, 3), (7, 2)])
def test_each_fragment_is_exchanged_once_in_h_steps_and_one_at_a_time(h: int, p: int) -> None:
    models = workers(1)
    simulator = Simulator(models, streaming.rule(sync_delay=0), sync_every=h, fragments=p)
    launched: list[tuple[int, int, int]] = []
    largest = max(part.elements for part in simulator.replicas[0].layout.parts)
    for step in range(1, 6 * h + 1):
        before, sent = simulator.number, simulator.sent
        simulator.stepped()
        launched += [(step, number % p, simulator.sent - sent) for number in range(before, simulator.number)]
    assert launched[0][0] == h, "the first round has all of H"
    assert [fragment for _, fragment, _ in launched] == [i % p for i in range(len(launched))]
    for fragment in range(p):
        times = [step for step, each, _ in launched if each == fragment]
        assert {b - a for a, b in pairwise(times)} == {h}
    assert max(sent for _, _, sent in launched) == 4 * largest, "the most in one step is the largest fragment"


@pytest.mark.parametrize("make", RULES)
@pytest.mark.parametrize("feedback", [None, ErrorFeedback(), EF21(), EControl(eta=0.05)])
def test_a_round_that_aborts_changes_nothing(make: Callable[..., Rule], feedback: Any) -> None:
    """Parameters that are not in flight, momentum, residuals: as before; and what was learned goes into the next."""
    options = {"feedback": feedback, "weighting": Equal()} if feedback else {}
    rule = make(compression=Compression(wire="int4"), **options)
    simulator = simulate(rule, 24, n=2, sync_every=8)
    simulator.land()
    replica, model = simulator.replicas[0], simulator.models[0]  # type: ignore[attr-defined]
    inner = inner_of(model)
    for _ in range(3):
        descend(model, inner)
        replica.stepped(1.0)
    before, local = replica.state_dict(), model.flat()
    first = replica.launch()
    replica.abort()
    after = replica.state_dict()
    assert all(map(torch.equal, flat(before["parts"]), flat(after["parts"])))
    assert all(map(torch.equal, flat(before["places"][0]["residual"]), flat(after["places"][0]["residual"])))
    assert [p["tokens"] for p in before["places"]] == [p["tokens"] for p in after["places"]]
    if not rule.takes_out:
        assert torch.equal(model.flat(), local)
    again = replica.launch()
    torch.testing.assert_close(again.delta, first.delta)
    assert (again.tokens, again.weight) == (first.tokens, first.weight)


def flat(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return [tensor for each in parts for tensor in flat(each)]


@pytest.mark.parametrize("make", RULES)
def test_a_round_without_contributions_changes_nothing(make: Callable[..., Rule]) -> None:
    rule = make()
    simulator = simulate(rule, 20, n=2, sync_every=8)
    simulator.land()
    state = simulator.replicas[0].state
    simulator.received = lambda round, replica: False
    simulator.exchange()
    assert simulator.replicas[0].state is state and simulator.rounds[-1][1] == ()


@pytest.mark.parametrize("make", RULES)
def test_all_peers_hold_the_same_outer_bits_after_every_commit_whoever_is_left_out(make: Callable[..., Rule]) -> None:
    draw = torch.Generator().manual_seed(0)
    lost = torch.rand(100, WORKERS, generator=draw) < 0.4
    rule = make(compression=Compression(wire="e3m0"))
    got = simulate(
        rule, 80, sync_every=8, fragments=1 if rule.takes_out else 2, received=lambda r, i: not lost[r % 100, i]
    )
    assert any(0 < len(names) < WORKERS for _, names in got.rounds), "nobody was left out"
    assert len({replica.state.state_hash for replica in got.replicas}) == 1


def test_a_partial_round_is_the_mean_over_those_who_are_in_it() -> None:
    outer = SGD(lr=1.0)
    got = simulate(diloco.rule(outer), 8, sync_every=8, received=lambda round, i: i != 1)
    two = [workers()[0], workers()[2]]
    for model in two:
        inner = inner_of(model)
        for _ in range(8):
            descend(model, inner)
    torch.testing.assert_close(outer_of(got), (two[0].flat() + two[1].flat()) / 2)
    left_out = locals_of(got)[1]
    own = workers()[1]
    inner = inner_of(own)
    for _ in range(8):
        descend(own, inner)
    torch.testing.assert_close(left_out, own.flat() + outer_of(got), msg="it keeps what it has learned (rule 5)")


def test_a_weighted_mean_counts_tokens() -> None:
    models = workers(2)
    simulator = Simulator(models, diloco.rule(SGD(lr=1.0)), sync_every=4)
    inners = [inner_of(model) for model in models]
    for step in range(4):
        for i in (0, 1):
            if i == 0 or step < 2:
                descend(models[i], inners[i])
        simulator.stepped([10.0, 10.0 if step < 2 else 0.0])
    alone = workers(2)
    for i, count in ((0, 4), (1, 2)):
        inner = inner_of(alone[i])
        for _ in range(count):
            descend(alone[i], inner)
    torch.testing.assert_close(outer_of(simulator), (2 * alone[0].flat() + alone[1].flat()) / 3)


def test_staleness_weights_are_those_of_their_papers() -> None:
    for weighting in (Tokens(), Equal(), FedBuff(), FedFix(), Throughput()):
        assert weighting.weight(0.0, 3, 2) == 0.0
    assert Tokens().weight(40.0, 4, 3) == 40.0 and Throughput().weight(40.0, 4, 3) == 400.0
    assert FedBuff().weight(40.0, 4, 3) == 20.0 and FedFix().weight(40.0, 4, 3) == 4.0


def test_fedfix_is_unbiased_for_a_slow_peer_where_a_plain_mean_leans_to_the_fast_one() -> None:
    """Two speeds, heterogeneous targets: the slow peer is in every third round only. The target is their mean."""

    def train(weighting: Any) -> float:
        models = workers(2)
        rule = diloco.rule(SGD(lr=0.05), weighting=weighting)
        simulator = Simulator(models, rule, sync_every=2, received=lambda r, i: i == 0 or r % 3 == 2, max_staleness=99)
        inners = [inner_of(model, momentum=0.0) for model in models]
        tail = []
        for step in range(3000):
            for i, (model, inner) in enumerate(zip(models, inners, strict=True)):
                if i == 0 or step % 6 < 2:  # a third of the speed
                    descend(model, inner)
            simulator.stepped([1.0, 1.0 if step % 6 < 2 else 0.0])
            if step >= 2400:
                tail.append(outer_of(simulator))
        middle = (torch.cat(models[0].targets) + torch.cat(models[1].targets)) / 2
        return float((torch.stack(tail).mean(0) - middle).norm() / middle.norm())

    plain, fixed = train(Equal()), train(FedFix())
    assert fixed < 0.5 * plain, (plain, fixed)


@pytest.mark.parametrize("make", RULES)
def test_state_goes_round_in_mid_flight(make: Callable[..., Rule]) -> None:
    """What was under way counts as aborted on both sides: after a flush the two hold the same."""
    rule = make(compression=Compression(wire="int8"), feedback=ErrorFeedback())
    simulator = simulate(rule, 21, n=1, sync_every=8)
    if rule.delay:
        simulator.exchange(wait=False)
    state = simulator.replicas[0].state_dict()
    fresh = Replica(Layout(Layered(0)), rule)
    fresh.load_state_dict(state)
    again = fresh.state_dict()
    assert all(map(torch.equal, flat(state), flat(again)))
    simulator.replicas[0].abort()
    one, other = simulator.replicas[0].launch(), fresh.launch()
    assert torch.equal(one.payload, other.payload) and (one.tokens, one.weight) == (other.tokens, other.weight)


# --- outer optimizers -------------------------------------------------------------------------------------------------


def test_outer_adam_agrees_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    adam = torch.optim.Adam([parameter], lr=0.3, betas=(0.9, 0.95), eps=0.1)
    theta, moments = parameter.detach().clone(), torch.zeros(200)
    for seed in range(7):
        delta = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        parameter.grad = delta.clone()
        adam.step()
        theta, moments = Adam().step(theta, moments, delta, seed)
        torch.testing.assert_close(theta, parameter.detach(), rtol=1e-5, atol=1e-6)


def test_heavy_ball_agrees_with_torch() -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.5)
    theta, buffer = parameter.detach().clone(), torch.zeros(100)
    for seed in range(5):
        delta = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        parameter.grad = delta.clone()
        sgd.step()
        theta, buffer = HeavyBall(lr=0.7, momentum=0.5).step(theta, buffer, delta)
        torch.testing.assert_close(theta, parameter.detach())


def test_norms_and_powers_are_exact_enough_and_of_a_fixed_order() -> None:
    vector = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    assert norm(vector) == pytest.approx(float(vector.double().norm()), rel=1e-12)
    assert norm(torch.empty(0)) == 0.0 and power(0.9, 0) == 1.0
    assert power(0.95, 1000) == pytest.approx(0.95**1000, rel=1e-12)


# --- convergence ------------------------------------------------------------------------------------------------------


def loss(simulator: Simulator) -> float:
    """Of the outer parameters above the optimum of the mean of all workers' losses."""
    models = simulator.models  # type: ignore[attr-defined]
    targets = torch.stack([torch.cat(model.targets) for model in models]).mean(0)
    curvature = torch.cat([models[0].curvature] * LAYERS)
    return float((curvature * (outer_of(simulator) - targets).square()).sum() / 2)


class Stiff(torch.nn.Module):
    """The quadratic of the notes: d = 20, condition 100, the same optimum for all, noisy starts by seed."""

    def __init__(self, seed: int, noise: int) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.randn(20, generator=torch.Generator().manual_seed(seed)))
        self.curvature = torch.logspace(-2, 0, 20)
        self.draw = torch.Generator().manual_seed(1000 * seed + noise)

    def forward(self) -> torch.Tensor:
        gradient = torch.randn(20, generator=self.draw) * 0.02
        return (self.curvature * self.x.square()).sum() / 2 + (gradient * self.x).sum()


def final_loss(rule: Rule, seed: int, drop: float = 0.0, rounds: int = 60, **options: Any) -> float:
    models = [Stiff(seed, noise) for noise in range(4)]
    inners = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    dropped = torch.rand(rounds + 1, 4, generator=torch.Generator().manual_seed(seed)) < drop
    simulator = Simulator(
        models, rule, sync_every=10, received=lambda r, i: not dropped[min(r, rounds), i], max_staleness=99, **options
    )
    for _ in range(rounds * 10):
        for model, inner in zip(models, inners, strict=True):
            descend(model, inner)
        simulator.stepped()
    outer = simulator.replicas[0].state.parameters
    return float((models[0].curvature * outer.square()).sum() / 2)


def mean_loss(make: Callable[[], Rule], **options: Any) -> float:
    values = [final_loss(make(), seed, **options) for seed in range(10)]
    assert all(math.isfinite(value) for value in values)
    return sum(values) / len(values)


def test_momentum_beats_averaging_and_sync_beats_eager_beats_delayed() -> None:
    outer = Nesterov(lr=0.4, momentum=0.9)
    averaged = mean_loss(lambda: diloco.rule(SGD(lr=1.0)))
    sync = mean_loss(lambda: diloco.rule(outer))
    eager = mean_loss(lambda: delayed.rule(outer, eager=True))
    late = mean_loss(lambda: delayed.rule(outer))
    assert sync < averaged
    assert 1.3 * sync < 1.3 * eager < 1.3 * 1.3 * late and sync < eager < late, (sync, eager, late)


def test_the_same_order_where_plain_delay_diverges() -> None:
    outer = Nesterov(lr=0.7, momentum=0.9)
    sync = mean_loss(lambda: diloco.rule(outer))
    eager = mean_loss(lambda: delayed.rule(outer, eager=True))
    late = Rule(name="delayed, unchecked", outer=outer, delay=-1, takes_out=True)
    diverged = mean_loss(lambda: late)
    assert 1.3 * sync < eager and 1.3 * eager < diverged and diverged > 1, (sync, eager, diverged)


def test_delayed_sgd_has_the_same_fixed_point() -> None:
    plain = simulate(delayed.rule(SGD(lr=0.7)), 1200, sync_every=8, flush=True)
    sync = simulate(diloco.rule(SGD(lr=0.7)), 1200, sync_every=8, flush=True)
    torch.testing.assert_close(outer_of(plain), outer_of(sync), rtol=1e-3, atol=1e-4)


def test_drops_degrade_monotonically_and_nothing_diverges() -> None:
    outer = Nesterov(lr=0.7, momentum=0.9)
    losses = [mean_loss(lambda: diloco.rule(outer), drop=p) for p in (0.0, 0.3, 0.5)]
    averaged = mean_loss(lambda: diloco.rule(SGD(lr=1.0)))
    assert losses[0] <= losses[1] * 1.05 and losses[1] <= losses[2] * 1.05 and losses[2] < averaged, losses


@pytest.mark.parametrize("feedback", [ErrorFeedback(), EF21(), EControl(eta=0.05)])
def test_four_bits_with_feedback_come_as_near_as_f32_and_without_do_not(feedback: Any) -> None:
    """Heterogeneous targets: a peer's contribution never becomes small, so that its rounding does not either."""

    def train(**options: Any) -> float:
        rule = diloco.rule(SGD(lr=0.5), compression=Compression(wire=options.pop("wire", "int4")), **options)
        return loss(simulate(rule, 1600, sync_every=8, gather_wire="f32"))

    exact, plain = train(wire="f32"), train()
    fed = train(feedback=feedback, weighting=Equal())
    assert exact < 1e-6 < plain
    assert fed < plain / 3, (exact, plain, fed)


def test_a_single_merging_at_the_end_is_no_worse_than_the_peers_on_average() -> None:
    rule = diloco.rule(SGD(lr=1.0))
    got = simulate(rule, 60, sync_every=Final())
    assert got.number == 0

    def mean_of_all(x: torch.Tensor) -> float:
        models = got.models  # type: ignore[attr-defined]
        curvature = torch.cat([models[0].curvature] * LAYERS)
        each = [(curvature * (x - torch.cat(model.targets)).square()).sum() / 2 for model in models]
        return float(torch.stack(each).mean())

    apart = sum(map(mean_of_all, locals_of(got))) / WORKERS
    got.flush()
    assert got.number == 1 and mean_of_all(locals_of(got)[0]) < apart, "Jensen"
    assert all(torch.equal(each, locals_of(got)[0]) for each in locals_of(got))


# --- cadences ---------------------------------------------------------------------------------------------------------


def times(cadence: Any, steps: int, fragments: int = 1, **facts: Any) -> list[int]:
    """At which steps an exchange begins."""
    found, last, number = [], 0, 0
    for step in range(1, steps + 1):
        progress = step / steps
        moment = Moment(
            round=number,
            fragments=fragments,
            steps=step - last,
            seconds=0.1 * (step - last),
            progress=progress,
            **facts,
        )
        if cadence.due(moment):
            found, last, number = [*found, step], step, number + 1
    return found


def test_cadences_begin_when_they_say() -> None:
    assert times(Steps(10), 40) == [10, 20, 30, 40]
    assert times(Steps(10), 40, fragments=2) == [10, 15, 20, 25, 30, 35, 40]
    assert times(Seconds(0.95), 40) == [10, 20, 30, 40]
    assert times(Seconds(1.0), 40, fragments=2)[:3] == [10, 15, 20]
    assert times(Final(), 1000) == []
    grown = times(Ramp(first=2, last=32, rounds=4), 200)
    assert [b - a for a, b in pairwise([0, *grown])][:7] == [2, 4, 8, 16, 32, 32, 32]
    late = times(Late(sparse=50, dense=5, after=0.8), 200)
    assert late[:3] == [50, 100, 150] and [t for t in late if t > 160] == [160 + 5 * i for i in range(1, 9)]
    assert times(Steps(10), 40, pace=0.25) == list(range(3, 41, 3)), "a peer of a quarter of the speed: ceil(10 / 4)"
    assert times(Steps(10), 3, pace=0.001) == [1, 2, 3], "at least one step"


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "fast", "-3s", "0s", None, "10"])
def test_a_cadence_that_cannot_be_is_refused(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="sync_every is"):
        cadence_of(value)


def test_what_stands_for_a_cadence() -> None:
    assert cadence_of(7) == Steps(7) and cadence_of("2.5s") == Seconds(2.5) and cadence_of(Final()) == Final()


# --- bad input --------------------------------------------------------------------------------------------------------


def bad_inputs() -> Iterator[tuple[Callable[[], Any], str]]:
    yield lambda: check_delay(10, Steps(10), 1), "sync_delay is 10, sync_every 10: sync_every must be above sync_delay"
    yield lambda: check_delay(6, Steps(20), 4), "sync_delay is 6, but with 4 fragments an exchange begins every 5 of"
    yield lambda: check_delay(-2, Steps(20), 4), "sync_delay is -2"
    yield lambda: cut([("a.0.w", (3,)), ("a.1.w", (3,))], 3), "fragments is 3: this model has 2 layers"
    yield lambda: cut([("a.0.w", (3,))], 1, "random"), "cannot be cut 'random'"
    yield lambda: streaming.rule(merge_alpha=1.5), "merge_alpha is 1.5"
    yield lambda: delayed.rule(Nesterov(lr=0.7, momentum=0.9)), r"diverges .* use lr=0.2 with momentum=0.9, or eager=T"
    yield lambda: delayed.rule(Adam(), eager=True), "eager updates need a linear outer optimizer"
    yield lambda: co2.rule(SGD()), "CO2 has a heavy ball"
    yield lambda: co2.rule(clip=0.0), "clip is 0.0"
    yield lambda: decoupled.rule(rda=True, feedback=ErrorFeedback()), "rda sends directions"


@pytest.mark.parametrize("make, words", list(bad_inputs()))
def test_what_cannot_work_is_refused_with_what_to_do(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        make()


@pytest.mark.parametrize("how", ["strided", "sequential", "balanced"])
@pytest.mark.parametrize("fragments", [1, 2, 3, 5, 8])
def test_fragments_cover_everything_once_and_are_about_even(how: str, fragments: int) -> None:
    named = [("emb.weight", (64, 32)), ("pos.weight", (16, 32))]
    named += [(f"blocks.{i}.{name}", shape) for i in range(8) for name, shape in (("w", (32, 32)), ("b", (32,)))]
    named += [("norm.weight", (32,)), ("head.weight", (64, 32))]
    parts = cut(named, fragments, how)
    assert sorted(i for part in parts for i in part) == list(range(len(named))) and len(parts) == fragments
    sizes = [sum(math.prod(named[i][1]) for i in part) for part in parts]
    assert max(sizes) <= sum(sizes) / fragments + 64 * 32, "no fragment is more than one unit above its part"
    blocks = [{i for i, (name, _) in enumerate(named) if name.startswith(f"blocks.{n}.")} for n in range(8)]
    if how != "balanced":
        assert all(any(block <= {*part} for part in parts) for block in blocks), "layers are whole"
    if how == "strided" and fragments > 1:
        first = next(f for f, part in enumerate(parts) if blocks[0] <= {*part})
        assert blocks[fragments % 8] <= {*parts[first]} if fragments < 8 else True


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_contribution_with_one_value_that_is_no_number_is_not_finite(bad: float) -> None:
    model = Layered(0)
    replica = Replica(Layout(model), diloco.rule())
    replica.state = replica.begin()
    assert replica.launch().finite
    with torch.no_grad():
        model.layers[2][77] = bad
    assert not replica.launch().finite

"""Any torch module and optimizer: a small model of each kind, trained by two peers over real sockets."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from harness import Run, until
from torch.utils.data import DataLoader

import elastic
from elastic.config import RunPolicy
from elastic.outer.engine import OuterLoop
from elastic.peer import Peer

FEATURES = 6
SEEDING = threading.Lock()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Each peer is a thread already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Samples(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]):
    """Features, a target that a small network can learn from them, and the sample's own index."""

    def __init__(self, n: int = 240) -> None:
        self.x = torch.randn(n, FEATURES, generator=torch.Generator().manual_seed(0))
        self.y = self.x[:, :1] - 2 * self.x[:, 1:2] + 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index], torch.tensor(index)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The peers are threads, and the generator is everybody's."""
    with SEEDING:
        torch.manual_seed(seed)
        yield


def network(seed: int = 0) -> torch.nn.Sequential:
    with seeded(seed):
        return torch.nn.Sequential(torch.nn.Linear(FEATURES, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def error(model: torch.nn.Module, data: Samples | None = None) -> float:
    data = data or Samples()
    with torch.no_grad():
        return torch.nn.functional.mse_loss(model(data.x).float(), data.y).item()


def number(peer: Peer) -> int:
    return int(peer.name[1:])


def batch_of(peer: Peer, step: int, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Other samples on each peer and in each step."""
    data = Samples()
    at = torch.arange(n) + n * (2 * step + number(peer))
    return data.x[at % len(data)], data.y[at % len(data)]


def fit(model: torch.nn.Module, inner: torch.optim.Optimizer, peer: Peer, steps: int, begin: int = 0) -> None:
    for step in range(begin, begin + steps):
        x, y = batch_of(peer, step)
        inner.zero_grad()
        torch.nn.functional.mse_loss(model(x).float(), y).backward()
        inner.step()


def entered(run: Run, peers: int = 2) -> None:
    """Returns once the coordinator knows that all train: from then on a round is with all of them."""
    membership = run.coordinator and run.coordinator._membership
    assert membership is not None
    until(lambda: sum("outer" in state.trains for state in membership.members.values()) == peers)


def both(run: Run, train: Callable[[Peer], Any], **policy: Any) -> list[Any]:
    run.policy = RunPolicy(min_peers=2, quorum=1.0, **policy)
    return run.together(train, run.several(2))


def bits(model: torch.nn.Module) -> list[tuple[str, bytes]]:
    """Parameters and buffers, byte for byte."""
    return [
        (name, value.contiguous().view(torch.uint8).numpy().tobytes())
        for name, value in model.state_dict().items()
        if value.ndim
    ]


# --- what a model consists of -----------------------------------------------------------------------------------------


class Language(torch.nn.Module):
    """A bigram model whose head is its embedding."""

    def __init__(self, words: int = 11, width: int = 4) -> None:
        super().__init__()
        with seeded(0):
            self.embedding = torch.nn.Embedding(words, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, words, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embedding(words)))


def test_tied_weights_count_once_and_stay_tied(run: Run) -> None:
    words = torch.arange(11)

    def train(peer: Peer) -> tuple[Language, OuterLoop, list[float]]:
        model = Language()
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        with elastic.DiLoCo(model, inner, peer, sync_every=4) as loop:
            entered(run)
            while not loop.finished:
                inner.zero_grad()
                loss = torch.nn.functional.cross_entropy(model(words), (words * 3 + number(peer)) % 11)
                loss.backward()
                inner.step()
                losses.append(loss.item())
        return model, loop, losses

    ends = both(run, train, rounds=6)
    for model, loop, losses in ends:
        assert loop.layout.elements == loop.spec.elements == 11 * 4 + 2 * 4
        assert loop.layout.described == ("embedding.weight [11, 4]", "norm.weight [4]", "norm.bias [4]")
        assert model.head.weight is model.embedding.weight
        assert not torch.equal(model.head.weight, Language().head.weight) and losses[-1] < losses[0]
    assert bits(ends[0][0]) == bits(ends[1][0])


class Adapted(torch.nn.Module):
    """LoRA: a frozen float64 base, which an outer loop would refuse, and a float32 adapter of rank 2."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with seeded(seed):
            self.base = torch.nn.Linear(FEATURES, 8, dtype=torch.float64).requires_grad_(False)
        with seeded(0):
            self.a = torch.nn.Parameter(torch.randn(2, FEATURES) / 2)
        self.b = torch.nn.Parameter(torch.zeros(8, 2))
        self.head = torch.nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.base(x.double()).float() + x @ self.a.T @ self.b.T)


@pytest.mark.parametrize(("wire", "size"), [("f32", lambda n: 4 * n), ("bf16", lambda n: 2 * n)])
def test_of_a_model_with_adapters_only_these_are_exchanged(run: Run, wire: str, size: Callable[[int], int]) -> None:
    trainable = 2 * FEATURES + 8 * 2 + 8 + 1

    def train(peer: Peer) -> tuple[Adapted, OuterLoop]:
        model = Adapted(seed=10 + number(peer))  # bases that differ show that nobody else's arrives
        inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        with elastic.DiLoCo(model, inner, peer, sync_every=3, wire=wire) as loop:
            entered(run)
            while not loop.finished:
                fit(model, inner, peer, 1, begin=loop.steps)
        return model, loop

    ends = both(run, train, rounds=5)
    for k, (model, loop) in enumerate(ends):
        statistics = loop.statistics()
        assert statistics.contributed == 5 and statistics.bytes_offered == 5 * size(trainable)
        assert loop.spec.elements == loop.layout.elements == trainable
        assert {line.split(" ")[0] for line in loop.layout.described} == {"a", "b", "head.weight", "head.bias"}
        assert loop.version.parameters.numel() == trainable
        untouched = Adapted(seed=10 + k).base
        assert bits(model.base) == bits(untouched) and model.base.weight._version == untouched.weight._version
    (one, _), (two, _) = ends
    for name in ("a", "b"):
        assert torch.equal(getattr(one, name), getattr(two, name)) and not torch.equal(one.b, Adapted(0).b)
    assert not torch.equal(one.base.weight, two.base.weight)


class Normed(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(FEATURES)
        with seeded(0):
            self.head = torch.nn.Linear(FEATURES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def normed(run: Run, buffers: str) -> list[tuple[Normed, dict[str, torch.Tensor]]]:
    """p0 makes 3 steps, p1 makes 6; the one exchange is at the end. Each with its statistics from just before it."""

    def train(peer: Peer) -> tuple[Normed, dict[str, torch.Tensor]]:
        model = Normed()
        inner = torch.optim.SGD(model.parameters(), lr=1e-2)
        with elastic.DiLoCo(model, inner, peer, sync_every=100, buffers=buffers) as loop:
            entered(run)
            fit(model, inner, peer, 3 * (1 + number(peer)))
            local = {name: value.clone() for name, value in model.norm.named_buffers()}
        assert loop.version.number == 1
        return model, local

    return both(run, train)


def test_batch_norm_statistics_are_averaged_by_tokens_and_without_momentum(run: Run) -> None:
    (one, first), (two, second) = normed(run, "average")
    for name, begin in (("running_mean", 0.0), ("running_var", 1.0)):
        old = torch.full((FEATURES,), begin)
        mean = (3 * (old - first[name]) + 6 * (old - second[name])) / 9
        ours, theirs = getattr(one.norm, name), getattr(two.norm, name)
        assert torch.equal(ours, theirs) and not torch.equal(first[name], second[name])
        torch.testing.assert_close(ours, old - mean, rtol=1e-6, atol=1e-6)
    assert (one.norm.num_batches_tracked.item(), two.norm.num_batches_tracked.item()) == (3, 6)
    assert torch.equal(one.head.weight, two.head.weight)


def test_batch_norm_statistics_stay_local_by_default(run: Run) -> None:
    (one, first), (two, second) = normed(run, "local")
    for model, local in ((one, first), (two, second)):
        assert all(torch.equal(value, local[name]) for name, value in model.norm.named_buffers())
    assert not torch.equal(one.norm.running_mean, two.norm.running_mean)  # type: ignore[arg-type]
    assert torch.equal(one.head.weight, two.head.weight)


def test_bfloat16_parameters_have_a_float32_outer_state(run: Run) -> None:
    """Their rounding is not taken for something learned, and what is too small for them is not lost outside."""
    target = torch.linspace(-1, 1, 33)

    def train(peer: Peer) -> tuple[torch.nn.Parameter, OuterLoop, float]:
        x = torch.nn.Parameter(torch.zeros(33, dtype=torch.bfloat16))
        model = torch.nn.ParameterList([x])
        inner = torch.optim.SGD([x], lr=0.05)
        with elastic.DiLoCo(model, inner, peer, sync_every=5, outer=elastic.Nesterov(lr=0.3, momentum=0.5)) as loop:
            entered(run)
            while not loop.finished:
                inner.zero_grad()
                (0.5 * (x.float() - target * (1.0 + 0.2 * number(peer))).square().sum()).backward()
                inner.step()
        outer = loop.version.parameters
        assert not torch.equal(outer, outer.bfloat16().float()), "the outer parameters are finer than the model's"
        assert torch.equal(x.detach().float(), outer.bfloat16().float())
        moved = loop.replica.launch().delta
        return x, loop, moved.abs().max().item()

    ends = both(run, train, rounds=40)
    assert [moved for _, _, moved in ends] == [0.0, 0.0], "who has made no step has learned nothing"
    assert bits(torch.nn.ParameterList([ends[0][0]])) == bits(torch.nn.ParameterList([ends[1][0]]))
    for _, loop, _ in ends:
        version = loop.version.parts[0]
        assert version.parameters.dtype is version.momentum.dtype is torch.float32
        assert version.state_hash == ends[0][1].version.state_hash
        torch.testing.assert_close(
            version.parameters, 1.1 * target, rtol=0, atol=0.05
        )  # a bfloat16 step is lost below that


# --- how it is trained ------------------------------------------------------------------------------------------------


def test_parameter_groups_and_a_scheduler_that_follows_the_runs_progress(run: Run) -> None:
    """The gradient is zero, so that all that moves a parameter is its group's learning rate times its decay."""
    tokens, rates = 64, {"decayed": 0.1, "kept": 0.4}

    def train(peer: Peer) -> tuple[torch.nn.ParameterDict, list[tuple[float, ...]]]:
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.full((3,), 2.0)) for name in rates})
        groups = [
            {"params": [model[name]], "lr": lr, "weight_decay": 0.5 * (name == "decayed")} for name, lr in rates.items()
        ]
        inner = torch.optim.SGD(groups)
        scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda _: 1.0 - peer.progress.tokens / (2 * tokens))
        seen: list[tuple[float, ...]] = []
        with elastic.DiLoCo(model, inner, peer, sync_every=4, outer=elastic.SGD(lr=1.0)) as loop:
            entered(run)
            while not loop.finished:
                seen.append((peer.progress.tokens, *scheduler.get_last_lr()))
                for parameter in model.values():
                    parameter.grad = torch.zeros(3)
                inner.step()
                scheduler.step()
        return model, seen

    (one, seen), (two, others) = both(run, train, tokens=tokens)
    assert bits(one) == bits(two) and torch.equal(one["kept"], torch.full((3,), 2.0))
    assert [at for at, *_ in seen] == [at for at, *_ in others] == [8 * (step // 4) for step in range(32)]
    expected = 2.0
    for at, decayed, kept in seen:
        assert (decayed, kept) == pytest.approx((0.1 * (1 - at / 128), 0.4 * (1 - at / 128)))
        expected *= 1 - decayed * 0.5
    torch.testing.assert_close(one["decayed"], torch.full((3,), expected))


def all_counted_once(run: Run, samples: int) -> None:
    """The run has counted every sample exactly once: by its own status, and by the audit of its journal."""
    assert run.coordinator is not None
    audit, status = run.coordinator.audit(), run.coordinator.status()
    assert audit.passed and not audit.partial and audit.committed == status.samples == samples
    assert status.progress.finished and status.progress.tokens == samples


@pytest.mark.parametrize("reader", ["loader", "shards"])
def test_with_gradient_accumulation_every_sample_counts_once(run: Run, reader: str) -> None:
    """Three batches a step, through a DataLoader with workers, or whatever was handed out through `peer.shards`."""
    data = Samples(230)

    def train(peer: Peer) -> tuple[list[int], int, int]:
        model = network()
        inner = torch.optim.SGD(model.parameters(), lr=1e-2)
        seen: list[int] = []
        made = waiting = 0
        with elastic.DiLoCo(model, inner, peer, sync_every=3) as loop:
            options: dict[str, Any] = {"shard_size": 40, "epochs": 1}
            loader: Any
            if reader == "loader":
                loader = DataLoader(
                    data, batch_sampler=peer.sampler(data, 5, batches_per_step=3, **options), num_workers=1
                )
            while not peer.progress.finished:
                for x, y, index in loader if reader == "loader" else peer.shards(data, batch_size=5, **options):
                    torch.nn.functional.mse_loss(model(x), y).backward()
                    seen += index.tolist()
                    waiting += 1
                    if waiting == 3:
                        inner.step()
                        inner.zero_grad()
                        made, waiting = made + 1, 0
                if waiting:
                    inner.step()
                    inner.zero_grad()
                    made, waiting = made + 1, 0
        return seen, made, loop.steps

    ends = run.together(train, run.several(2))
    assert sorted(ends[0][0] + ends[1][0]) == list(range(230))
    assert [made for _, made, _ in ends] == [steps for *_, steps in ends]
    assert sum(steps for *_, steps in ends) < 230 / 5 / 3 + 8
    all_counted_once(run, 230)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_grad_scaler_skips_is_none_and_its_samples_count_with_the_next(run: Run, fused: bool) -> None:
    data, started = Samples(160), threading.Barrier(2)

    def train(peer: Peer) -> tuple[int, int, float]:
        model = network()
        inner = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        batches, learned = 0, []
        with elastic.DiLoCo(model, inner, peer, sync_every=100) as loop:
            for x, y, _ in peer.shards(data, batch_size=8, shard_size=40, epochs=1):
                batches or started.wait(60)  # both have a shard
                before = [p.detach().clone() for p in model.parameters()]
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    loss = torch.nn.functional.mse_loss(model(x).float(), y)
                scaler.scale(loss * (float("inf") if batches == 1 else 1.0)).backward()
                scaler.step(inner)
                scaler.update()
                inner.zero_grad()
                batches += 1
                learned.append(loop.replica.learned)
                if batches == 2:
                    assert all(map(torch.equal, before, model.parameters())), "the step was skipped"
                    assert (loop.steps, learned) == (1, [8.0, 8.0])
                if batches == 3:
                    assert (loop.steps, learned) == (2, [8.0, 8.0, 24.0])
        return batches, loop.steps, scaler.get_scale()

    for batches, steps, scale in run.together(train, run.several(2)):
        assert (steps, scale) == (batches - 1, 512.0)
    all_counted_once(run, 160)


def test_a_compiled_and_an_uncompiled_peer_train_together(run: Run) -> None:
    def train(peer: Peer) -> tuple[OuterLoop, list[torch.Tensor], float]:
        plain = network()
        compiled = torch.compile(plain, backend="eager") if number(peer) else plain
        assert next(compiled.named_parameters())[0] == ("_orig_mod.0.weight" if number(peer) else "0.weight")  # type: ignore[union-attr]
        inner = torch.optim.AdamW(compiled.parameters(), lr=1e-2)  # type: ignore[union-attr]
        with elastic.StreamingDiLoCo(compiled, inner, peer, sync_every=4, fragments=2, sync_delay=1) as loop:  # type: ignore[arg-type]
            entered(run)
            while not loop.finished:
                fit(compiled, inner, peer, 1, begin=loop.steps)  # type: ignore[arg-type]
        return loop, [p.detach() for p in plain.parameters()], error(plain)

    (one, ours, loss), (two, theirs, _) = both(run, train, rounds=12)
    assert (
        one.layout.described
        == two.layout.described
        == ("0.weight [8, 6]", "0.bias [8]", "2.weight [1, 8]", "2.bias [1]")
    )
    assert one.version.state_hash == two.version.state_hash and all(map(torch.equal, ours, theirs))
    assert loss < 0.5 * error(network())


INNERS: dict[str, Callable[[torch.nn.Module], torch.optim.Optimizer]] = {
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=0.1),
    "rmsprop": lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-2, momentum=0.5),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=5e-2, weight_decay=0.0),
    "lbfgs": lambda model: torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=4, history_size=4),
}


@pytest.mark.parametrize("make", INNERS.values(), ids=INNERS)
def test_any_optimizer_with_a_closure_or_without(run: Run, make: Callable[[torch.nn.Module], Any]) -> None:
    """However often a step asks for the loss, it is one step."""

    def train(peer: Peer) -> tuple[str, float, int, int, int]:
        model = network()
        inner = make(model)
        steps = asked = 0
        with elastic.DiLoCo(model, inner, peer, sync_every=3, outer=elastic.SGD(lr=1.0)) as loop:
            entered(run)
            while not loop.finished:
                batch = batch_of(peer, steps, n=64)

                def closure(batch: tuple[torch.Tensor, torch.Tensor] = batch) -> torch.Tensor:
                    nonlocal asked
                    asked += 1
                    inner.zero_grad()
                    loss = torch.nn.functional.mse_loss(model(batch[0]), batch[1])
                    loss.backward()
                    return loss

                assert inner.step(closure).item() > 0
                steps += 1
        return loop.version.state_hash, error(model), steps, loop.steps, asked

    ends = both(run, train, rounds=8)
    assert ends[0][0] == ends[1][0]
    for _, loss, steps, counted, asked in ends:
        assert steps == counted == 24 and loss < 0.6 * error(network())
        assert asked > steps if make is INNERS["lbfgs"] else asked == steps


# --- one script, every algorithm --------------------------------------------------------------------------------------

Loop = Callable[[torch.nn.Module, torch.optim.Optimizer, Peer], OuterLoop]
LOOPS: dict[str, Loop] = {
    "DiLoCo": lambda model, inner, peer: elastic.DiLoCo(model, inner, peer, sync_every=4),
    "StreamingDiLoCo": lambda model, inner, peer: elastic.StreamingDiLoCo(
        model, inner, peer, sync_every=6, fragments=2, sync_delay=2
    ),
    "DelayedDiLoCo": lambda model, inner, peer: elastic.DelayedDiLoCo(model, inner, peer, sync_every=4),
    "EagerDiLoCo": lambda model, inner, peer: elastic.DelayedDiLoCo(model, inner, peer, sync_every=4, eager=True),
    "CO2": lambda model, inner, peer: elastic.CO2(model, inner, peer, sync_every=4),
    "DecoupledDiLoCo": lambda model, inner, peer: elastic.DecoupledDiLoCo(
        model, inner, peer, sync_every=6, fragments=2, sync_delay=1
    ),
}


EPOCHS = 10


def script(peer: Peer, make: Loop, ready: Callable[[], object]) -> tuple[str, int, float, list[tuple[str, bytes]], str]:
    """What a user writes; of the algorithm it knows one line. ready: returns once both peers are there."""
    model = network(seed=number(peer))
    inner = torch.optim.AdamW(model.parameters(), lr=5e-3)
    with make(model, inner, peer) as outer:
        ready()
        for x, y, _ in peer.shards(Samples(), batch_size=8, shard_size=16, epochs=EPOCHS):
            torch.nn.functional.mse_loss(model(x), y).backward()
            inner.step()
            inner.zero_grad()
    return outer.version.state_hash, outer.version.number, error(model), bits(model), outer.algorithm


@pytest.mark.parametrize("name", LOOPS)
def test_a_script_switches_its_algorithm_by_one_line(run: Run, name: str) -> None:
    ends = run.together(lambda peer: script(peer, LOOPS[name], lambda: entered(run)), run.several(2))
    (state_hash, version, loss, values, algorithm), other = ends
    assert other == (state_hash, version, loss, values, algorithm), "all peers end with the same bits"
    print(name, version, loss)
    assert algorithm == name and version >= 5 and loss < 0.4 * error(network(seed=0))
    all_counted_once(run, EPOCHS * 240)
    commits = [json.loads(line) for line in (run.folder / "coordinator.jsonl").read_text().splitlines()]
    assert {name for each in commits if each["event"] == "round.committed" for name in each["contributors"]} == {
        "p0",
        "p1",
    }

"""The inner optimizer of a joiner: re-warmed learning rates, a donor's moments, and what they do to the loss."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness import Run, until

from collectives.records import Member
from elastic.config import RunPolicy, Timeouts
from elastic.errors import ConfigurationError
from elastic.events import EventLog
from elastic.messages import Base
from elastic.outer import joining
from elastic.outer.diloco import DiLoCo
from elastic.outer.joining import Joining, Rewarm
from elastic.outer.moments import HEAD, MAGIC, Unfit, install, pack
from elastic.outer.state import Layout
from elastic.peer import Peer
from elastic.ranks import Alone

Make = Callable[[torch.nn.Module], torch.optim.Optimizer]


def weights(*values: float) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.tensor([value])) for value in values]


# --- learning rates ---------------------------------------------------------------------------------------------------


def test_learning_rates_rise_to_what_the_script_and_its_scheduler_say() -> None:
    one, other = weights(0.0, 0.0)
    inner = torch.optim.SGD([{"params": [one], "lr": 1.0}, {"params": [other], "lr": 8.0}])
    scheduler = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 0.5**step)
    warming = Rewarm(inner, 4)
    warming.attach()
    warming.begin()
    moved, seen = [], []
    for _ in range(6):
        before = one.item(), other.item()
        one.grad = other.grad = torch.ones(1)
        inner.step()
        moved.append((before[0] - one.item(), before[1] - other.item()))
        seen.append([group["lr"] for group in inner.param_groups])
        scheduler.step()
    parts = [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]
    assert moved == [(part * 0.5**k, part * 8 * 0.5**k) for k, part in enumerate(parts)]
    assert seen == [[0.5**k, 8 * 0.5**k] for k in range(6)], "outside of its steps the optimizer is as it was"


def test_a_step_that_raises_leaves_no_scaled_learning_rate_behind() -> None:
    (x,) = weights(0.0)
    inner = torch.optim.SGD([x], lr=1.0)
    warming = Rewarm(inner, 2)
    warming.attach()
    warming.begin()

    def fail() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        inner.step(fail)
    x.grad = torch.ones(1)
    inner.step()
    assert (x.item(), inner.param_groups[0]["lr"]) == (-0.5, 1.0)
    with pytest.raises(ArithmeticError):
        inner.step(fail)
    inner.param_groups[0]["lr"] = 3.0  # the script has caught it and goes on more carefully
    warming.detach()
    assert inner.param_groups[0]["lr"] == 3.0


def test_learning_rates_that_are_tensors_stay_the_same_tensors() -> None:
    (x,) = weights(0.0)
    lr = torch.tensor(1.0)
    inner = torch.optim.Adam([x], lr=lr, capturable=False, foreach=False)
    warming = Rewarm(inner, 2)
    warming.attach()
    warming.begin()
    x.grad = torch.ones(1)
    inner.step()
    assert inner.param_groups[0]["lr"] is lr and lr.item() == 1.0 and abs(x.item() + 0.5) < 1e-6


@pytest.mark.parametrize(
    ("options", "words"), [({"joining": "later"}, "joining is 'later'"), ({"rewarm_steps": 0}, "rewarm_steps is 0")]
)
def test_options_that_cannot_work_are_named(run: Run, options: dict[str, Any], words: str) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match=words):
        DiLoCo(model, torch.optim.SGD(model.parameters()), run.join("p0"), **options)


# --- the blob ---------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Make] = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    "amsgrad": lambda model: torch.optim.Adam(model.parameters(), lr=1e-2, amsgrad=True),
    "fused": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True),
    "nadam": lambda model: torch.optim.NAdam(model.parameters(), lr=1e-2),
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9),
    "plain": lambda model: torch.optim.SGD(model.parameters(), lr=1e-2),
    "adagrad": lambda model: torch.optim.Adagrad(model.parameters(), lr=1e-2),
    "adafactor": lambda model: torch.optim.Adafactor(model.parameters(), lr=1e-2),
    "muon": lambda model: torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=1e-2),
}


class Small(torch.nn.Module):
    """Tied, frozen, and bfloat16 parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(5, 3)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.norm = torch.nn.BatchNorm1d(3)
        self.brief = torch.nn.Linear(3, 5, dtype=torch.bfloat16)
        self.tied = torch.nn.Linear(5, 3, bias=False)
        self.tied.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.frozen(self.first(x)))
        return self.tied(self.brief(hidden.bfloat16()).float())


def some_steps(model: torch.nn.Module, inner: torch.optim.Optimizer, n: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        inner.zero_grad()
        model(torch.randn(8, 5, generator=generator)).square().mean().backward()
        inner.step()


def blob(inner: torch.optim.Optimizer, layout: Layout) -> bytearray:
    head, flat = pack(inner, layout)[0]
    assert isinstance(flat, torch.Tensor)
    return bytearray(bytes(head) + flat.numpy().tobytes())


def states(inner: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [dict(inner.state.get(p, {})) for group in inner.param_groups for p in group["params"]]


def same(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> bool:
    """Bit for bit, of the same kinds; what is None may as well be missing."""
    for a, b in zip(one, other, strict=True):
        a, b = ({k: v for k, v in each.items() if v is not None} for each in (a, b))
        if a.keys() != b.keys():
            return False
        for x, y in ((a[key], b[key]) for key in a):
            if isinstance(x, torch.Tensor) and not (torch.equal(x, y) and (x.dtype, x.shape) == (y.dtype, y.shape)):
                return False
            if not isinstance(x, torch.Tensor) and (type(x), x) != (type(y), y):
                return False
    return True


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_state_goes_round_bit_for_bit_and_the_next_step_is_the_donors(make: Make) -> None:
    torch.manual_seed(0)
    donor = Small()
    given = make(donor)
    some_steps(donor, given, 5)
    joiner = copy.deepcopy(donor)
    taken = make(joiner)
    install(memoryview(blob(given, Layout(donor, fragments=2))), taken, Layout(joiner, fragments=2))
    assert same(states(given), states(taken))
    some_steps(donor, given, 2, seed=1)
    some_steps(joiner, taken, 2, seed=1)
    assert all(map(torch.equal, donor.parameters(), joiner.parameters()))


def test_what_is_no_state_of_plain_numbers_is_withheld() -> None:
    model = torch.nn.Linear(5, 3)
    inner = torch.optim.LBFGS(model.parameters())

    def closure() -> float:
        inner.zero_grad()
        loss = model(torch.ones(2, 5)).square().mean()
        loss.backward()
        return loss.item()

    inner.step(closure)
    with pytest.raises(Unfit, match="neither floating point numbers nor one number"):
        pack(inner, Layout(model))
    adam = torch.optim.Adam(model.parameters())
    some_steps(model, adam, 1)
    adam.state[model.bias]["exp_avg"][1] = float("nan")
    with pytest.raises(Unfit, match="no number"):
        pack(adam, Layout(model))


def changed(data: bytearray, change: Callable[[dict[str, Any]], Any]) -> bytearray:
    """The same with another header."""
    _, length = HEAD.unpack_from(data)
    header = json.loads(data[HEAD.size : HEAD.size + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 4)
    return bytearray(HEAD.pack(MAGIC, len(text)) + text + data[HEAD.size + length :])


def first_tensor(header: dict[str, Any]) -> list[Any]:
    described: list[Any] = header["parameters"][0][1]["exp_avg"]
    return described


GARBAGE: dict[str, Callable[[bytearray], bytearray]] = {
    "nothing": lambda data: bytearray(),
    "another magic": lambda data: bytearray(b"pickle!!") + data[8:],
    "a header beyond the end": lambda data: bytearray(HEAD.pack(MAGIC, 1 << 30)) + data[HEAD.size :],
    "no json": lambda data: data[: HEAD.size] + bytearray(b"!") + data[HEAD.size + 1 :],
    "deep json": lambda data: bytearray(HEAD.pack(MAGIC, 4000) + b"[" * 4000) + data[-4:],
    "a list": lambda data: bytearray(HEAD.pack(MAGIC, 4) + b"[1] "),
    "a number less": lambda data: data[:-4],
    "a byte more": lambda data: data + b"\0",
    "a number more": lambda data: data + b"\0\0\0\0",
    "nan": lambda data: data[:-4] + bytearray(np.float32("nan").tobytes()),
    "another optimizer": lambda data: changed(data, lambda h: h.update(optimizer="SGD")),
    "other options": lambda data: changed(data, lambda h: h.update(options=["amsgrad"])),
    "no parameters": lambda data: changed(data, lambda h: h.pop("parameters")),
    "a parameter less": lambda data: changed(data, lambda h: h["parameters"].pop()),
    "another name": lambda data: changed(data, lambda h: h["parameters"][0].__setitem__(0, "evil")),
    "a long key": lambda data: changed(data, lambda h: h["parameters"][0][1].update({"k" * 65: ["float32", [0]]})),
    "many keys": lambda data: changed(data, lambda h: h["parameters"][0][2].update({str(i): 0 for i in range(17)})),
    "a true step": lambda data: changed(data, lambda h: h["parameters"][0][2].update(step=True)),
    "an infinite step": lambda data: changed(data, lambda h: h["parameters"][0][2].update(step=float("inf"))),
    "another dtype": lambda data: changed(data, lambda h: first_tensor(h).__setitem__(0, "object")),
    "a dtype of no kind": lambda data: changed(data, lambda h: first_tensor(h).__setitem__(0, ["float32"])),
    "a negative size": lambda data: changed(data, lambda h: first_tensor(h).__setitem__(1, [-3, -5])),
    "a huge size": lambda data: changed(data, lambda h: first_tensor(h).__setitem__(1, [1 << 40, 1 << 40])),
    "no shape": lambda data: changed(data, lambda h: first_tensor(h).pop()),
}


@pytest.mark.parametrize("spoil", GARBAGE.values(), ids=GARBAGE)
def test_garbage_is_refused_and_changes_nothing(spoil: Callable[[bytearray], bytearray]) -> None:
    donor, joiner = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    given, taken = OPTIMIZERS["adamw"](donor), OPTIMIZERS["adamw"](joiner)
    some_steps(donor, given, 3)
    some_steps(joiner, taken, 1)
    before = copy.deepcopy(states(taken))
    with pytest.raises(Unfit):
        install(memoryview(spoil(blob(given, Layout(donor)))), taken, Layout(joiner))
    assert same(states(taken), before)


def test_random_damage_to_the_header_is_refused_or_harmless() -> None:
    donor, joiner = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    given, taken = OPTIMIZERS["adamw"](donor), OPTIMIZERS["adamw"](joiner)
    some_steps(donor, given, 3)
    whole, generator, refused = blob(given, Layout(donor)), np.random.default_rng(0), 0
    _, length = HEAD.unpack_from(whole)
    for _ in range(500):
        data = bytearray(whole)
        data[generator.integers(HEAD.size + length)] = generator.integers(256)
        try:
            install(memoryview(data), taken, Layout(joiner))
        except Unfit:
            refused += 1
    assert refused > 400


# --- whole runs -------------------------------------------------------------------------------------------------------


class Line(torch.nn.Module):
    """Fits a line through noise that differs from peer to peer."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.layer = torch.nn.Linear(5, 3)
        self.noise = torch.Generator().manual_seed(int(peer.name[1:]))

    def forward(self) -> torch.Tensor:
        x = torch.randn(8, 5, generator=self.noise)
        return (self.layer(x) - x[:, :3]).square().mean()


class Trainee:
    """A peer with its model, optimizer and loop, which is entered."""

    def __init__(self, peer: Peer, make: Make = OPTIMIZERS["adamw"], **options: Any) -> None:
        self.peer, self.model = peer, Line(peer)
        self.inner = make(self.model)
        self.loop = DiLoCo(self.model, self.inner, peer, sync_every=4, **options)
        self.loop.__enter__()

    def steps(self, n: int) -> None:
        for _ in range(n):
            self.inner.zero_grad()
            self.model().backward()
            self.inner.step()

    def events(self, folder: Path, kind: str) -> list[dict[str, Any]]:
        lines = (folder / f"{self.peer.name}.jsonl").read_text().splitlines()
        return [event for event in map(json.loads, lines) if event["event"].startswith(kind)]

    @property
    def warming(self) -> Rewarm:
        return self.loop.joining._warming

    def end(self) -> None:
        self.loop._leave()
        self.peer.close()


def begun(run: Run, **options: Any) -> list[Trainee]:
    """A run of two peers that has committed its first round."""
    run.policy = RunPolicy(min_peers=2, quorum=1.0)
    trainees = run.together(lambda peer: Trainee(peer, **options), run.several(2))
    membership = run.coordinator and run.coordinator._membership
    assert membership is not None
    until(lambda: all("outer" in state.trains for state in membership.members.values()))
    advance(run, trainees, 1)
    return trainees


def advance(run: Run, trainees: list[Trainee], version: int) -> None:
    """Trains to this version; returns once the coordinator knows that all of them hold it."""
    run.together(lambda peer: trainees[int(peer.name[1:])].steps(4), [each.peer for each in trainees])
    membership = run.coordinator and run.coordinator._membership
    assert membership is not None
    held = [membership.members[each.peer.name].held for each in trainees]
    until(lambda: all(each.get(("outer", 0), (-1, ""))[0] == version for each in held))


def test_a_joiner_gets_the_donors_moments_bit_for_bit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    served: dict[str, list[dict[str, Any]]] = {}
    serve = Joining._serve

    def remember(self: Joining) -> None:
        serve(self)
        served[self.digest] = copy.deepcopy(states(self._inner))

    monkeypatch.setattr(Joining, "_serve", remember)
    trainees = begun(run, joining="donor")
    assert [bool(each.loop.joining.digest) for each in trainees] == [False, True], "contributors take turns"
    trainees.append(Trainee(run.join("p2"), joining="donor"))
    joiner = trainees[2]
    digest = trainees[1].loop.joining.digest
    assert joiner.loop.version.number == 1 and list(served) == [digest]
    assert same(states(joiner.inner), served[digest]) and served[digest][0]["step"].item() == 4
    [fetched] = joiner.events(run.folder, "moments.")
    assert (fetched["event"], fetched["donor"]) == ("moments.fetched", "p1")
    assert joiner.warming.done == joiner.warming.steps, "it begins with full learning rates"
    for version in (2, 3, 4):
        advance(run, trainees, version)
    assert trainees[0].loop.joining.digest not in ("", digest) and run.coordinator is not None
    assert run.coordinator._membership.outer._donor("outer")[0] == ["p0"], "the newest"
    trainees[0].end()
    until(lambda: run.coordinator is not None and "p0" not in run.coordinator._membership.members)
    assert run.coordinator._membership.outer._donor("outer")[0] in (["p1"], ["p2"])
    for each in trainees[1:]:
        each.end()


def test_a_joiner_is_rewarmed_and_so_is_who_starts_over(run: Run) -> None:
    trainees = begun(run)
    assert all(each.warming.done == each.warming.steps for each in trainees), "who founds the run is not"
    joiner = Trainee(run.join("p2"), rewarm_steps=7)
    assert (joiner.warming.done, joiner.warming.steps) == (0, 7)
    joiner.steps(3)
    assert joiner.warming.done == 3 and joiner.inner.param_groups[0]["lr"] == 1e-2
    joiner.loop._reset()
    assert joiner.warming.done == 0 and len(joiner.events(run.folder, "inner.rewarmed")) == 2
    fresh = Trainee(run.join("p3"), joining="fresh")
    fresh.loop._reset()
    assert fresh.warming.done == fresh.warming.steps and not fresh.events(run.folder, "inner.")
    for each in (*trainees, joiner, fresh):
        each.end()


def test_without_a_donor_a_joiner_is_rewarmed_and_says_so(run: Run) -> None:
    trainees = begun(run)
    joiner = Trainee(run.join("p2"), joining="donor")
    [refused] = joiner.events(run.folder, "moments.")
    assert (refused["event"], refused["reason"]) == ("moments.refused", "nobody serves any")
    assert joiner.warming.done == 0 and not joiner.inner.state
    for each in (*trainees, joiner):
        each.end()


def test_moments_of_another_optimizer_and_of_a_donor_that_has_gone_are_done_without(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainees = begun(run, joining="donor")
    other = Trainee(run.join("p2"), make=OPTIMIZERS["amsgrad"], joining="donor")
    [refused] = other.events(run.folder, "moments.")
    assert refused["donor"] == "p1" and "its optimizer is 'AdamW', this peer's 'Adam'" in refused["reason"]
    trainees[1].peer.group.withdraw("moments/outer")
    late = Trainee(run.join("p3"), joining="donor")
    [refused] = late.events(run.folder, "moments.")
    assert refused["event"] == "moments.refused" and refused["donor"] == "p1"
    for each in (other, late):
        assert each.warming.done == 0 and not each.inner.state and each.loop.version.number == 1
    for each in (*trainees, other, late):
        each.end()


def test_what_is_being_fetched_is_not_replaced(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trainees = begun(run, joining="donor")
    kept = trainees[1].loop.joining.digest
    monkeypatch.setattr(joining, "KEPT_PERIODS", 1)
    monkeypatch.setattr(trainees[1].peer.group, "wanted", lambda key: key == "moments/outer")
    advance(run, trainees, 2)
    advance(run, trainees, 3)
    assert trainees[1].loop.joining.digest == kept
    monkeypatch.undo()
    monkeypatch.setattr(joining, "KEPT_PERIODS", 1)
    advance(run, trainees, 4)
    advance(run, trainees, 5)
    assert trainees[1].loop.joining.digest not in ("", kept)
    for each in trainees:
        each.end()


class Site(Alone):
    """The ranks of a peer in one process: what the leader orders is done by each of them at once."""

    size = 2

    def __init__(self) -> None:
        self.taught: dict[str, list[Callable[[], object]]] = {}
        self.ordered: list[str] = []
        self.passed: list[Any] = []

    def teach(self, name: str, act: Callable[[], object]) -> None:
        self.taught.setdefault(name, []).append(act)

    def order(self, name: str) -> None:
        self.ordered.append(name)

    def pass_on(self, value: Any) -> Any:
        if value is None:
            return self.passed[-1]
        self.passed.append(value)
        return value


def test_all_ranks_of_a_joiner_get_the_moments_and_are_rewarmed() -> None:
    model, site = torch.nn.Linear(5, 3), Site()
    given = OPTIMIZERS["adamw"](model)
    some_steps(model, given, 3)
    data = blob(given, Layout(model))
    donor = Member(name="p9", incarnation=9, addresses=("127.0.0.1:1",))
    base = Base(run="r", tag="outer", fragment=0, version=1, state_hash="", sources=(), donors=(donor,), moments="x")
    group = SimpleNamespace(fetch=lambda *_, **__: memoryview(data))
    peer: Any = SimpleNamespace(ranks=site, group=group, name="p0", timeouts=Timeouts(), events=EventLog(None, run="r"))
    copies = [copy.deepcopy(model) for _ in range(2)]
    inners = [OPTIMIZERS["adamw"](each) for each in copies]
    leader, other = (Joining("donor", 5, i, peer, "outer", Layout(m)) for i, m in zip(inners, copies, strict=True))
    leader.told(base)
    leader.entered(1)
    assert site.ordered == ["outer/moments"]
    site.taught["outer/moments"][1]()
    assert same(states(inners[0]), states(given)) and same(states(inners[1]), states(given))
    leader.rewarm()
    assert site.ordered[1:] == ["outer/rewarm"]
    site.taught["outer/rewarm"][1]()
    assert leader._warming.done == other._warming.done == 0


# --- what it does to the loss -----------------------------------------------------------------------------------------

CONTEXT, LR, SEEDS, AFTER = 8, 1e-2, 6, 20


class NextByte(torch.nn.Module):
    """Predicts a byte of source text from the eight before it."""

    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 16)
        self.hidden, self.head = torch.nn.Linear(16 * CONTEXT, 64), torch.nn.Linear(64, 128)

    def forward(self, seed: int, samples: int) -> torch.Tensor:
        at = torch.randint(len(self.text) - CONTEXT, (samples, 1), generator=torch.Generator().manual_seed(seed))
        window = self.text[at + torch.arange(CONTEXT + 1)].long()
        hidden = self.hidden(self.embedding(window[:, :-1]).flatten(1)).relu()
        return torch.nn.functional.cross_entropy(self.head(hidden), window[:, -1])


def trained(model: NextByte, inner: torch.optim.Optimizer, n: int, seed: int) -> NextByte:
    for step in range(n):
        inner.zero_grad()
        model(seed + step, 64).backward()
        inner.step()
    return model


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several would wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.no_grad()
def held_out(model: NextByte) -> float:
    return model(10**9, 512).item()


@cache
def donor(seed: int) -> tuple[NextByte, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = NextByte()
    inner = torch.optim.AdamW(model.parameters(), lr=LR)
    return trained(model, inner, 200, 1000 * seed), inner


def rise_after_joining(seed: int, how: str) -> float:
    """How far the loss lies above that at which the joiner came, in the mean over its first steps."""
    model, given = donor(seed)
    joiner = copy.deepcopy(model)
    inner = torch.optim.AdamW(joiner.parameters(), lr=LR)
    warming = Rewarm(inner, 50)
    warming.attach()
    if how == "donor":
        install(memoryview(blob(given, Layout(model))), inner, Layout(joiner))
    elif how == "rewarm":
        warming.begin()
    after = [held_out(trained(joiner, inner, 1, 1000 * seed + 500 + step)) for step in range(AFTER)]
    return mean(after) - held_out(model)


def test_a_fresh_adam_raises_the_loss_and_neither_a_rewarmed_one_nor_a_donors_moments_do(one_thread: None) -> None:
    rises = {how: mean(rise_after_joining(seed, how) for seed in range(SEEDS)) for how in joining.WAYS}
    print({how: round(rise, 4) for how, rise in rises.items()})
    assert rises["fresh"] > 0.02 and max(rises["rewarm"], rises["donor"]) < rises["fresh"] - 0.03

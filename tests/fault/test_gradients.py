"""Contributions that are not like the others."""

from __future__ import annotations

import math
import random

import pytest
import torch

from fault.gradients import Contribution, Gradients, bad_contributions, cosine_to_others


def fine(chance: random.Random) -> Contribution:
    return Contribution(norm=chance.lognormvariate(0, 0.3), cosine=chance.uniform(0.3, 0.9))


def some(n: int, seed: int = 0) -> dict[str, Contribution]:
    chance = random.Random(seed)
    return {f"p{i}": fine(chance) for i in range(n)}


def vectors(n: int, seed: int) -> dict[str, torch.Tensor]:
    """Pseudo-gradients of peers on different data: a common direction, and as much of their own."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(1000, generator=generator)
    return {f"p{i}": common + torch.randn(1000, generator=generator) for i in range(n)}


def measured(given: dict[str, torch.Tensor]) -> dict[str, Contribution]:
    mean = torch.stack(list(given.values())).mean(0)
    facts = {peer: (float(x.norm()), float(mean.norm()), float(x @ mean), 1 / len(given)) for peer, x in given.items()}
    return {peer: Contribution(norm=each[0], cosine=cosine_to_others(*each)) for peer, each in facts.items()}


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (5.0, 1.0, 2.0)])
def test_the_cosine_to_the_others_is_what_it_says(weights: tuple[float, ...]) -> None:
    given, total = list(vectors(3, 1).values()), sum(weights)
    mean = sum((w / total) * x for w, x in zip(weights, given, strict=True))
    assert isinstance(mean, torch.Tensor)
    others = sum(w * x for w, x in list(zip(weights, given, strict=True))[1:])
    expected = float(torch.nn.functional.cosine_similarity(given[0], torch.as_tensor(others), dim=0))
    facts = float(given[0].norm()), float(mean.norm()), float(given[0] @ mean), weights[0] / total
    assert cosine_to_others(*facts) == pytest.approx(expected, abs=1e-4)
    assert cosine_to_others(1.0, 1.0, 1.0, 1.0) == cosine_to_others(0.0, 0.0, 0.0, 0.5) == 0.0


@pytest.mark.parametrize("norm", [math.nan, math.inf])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_is_no_number_is_told_at_once_however_few_there_are(n: int, norm: float) -> None:
    gradients = Gradients()
    gradients.round(some(n) | {"x": Contribution(norm=norm, cosine=0.0)}, 7.0)
    bad, since = gradients.bad["x"]
    assert bad.why == "not finite" and since == 7.0 and len(gradients.bad) == 1


SCALED, FLIPPED = [(30.0, "norm"), (1 / 300, "norm")], [(-1.0, "direction")]


@pytest.mark.parametrize("n, factor, why", [(n, *how) for n in (3, 4, 9) for how in SCALED + FLIPPED * (n > 3)])
def test_scaled_and_flipped_gradients_are_named_in_the_second_round(n: int, factor: float, why: str) -> None:
    gradients = Gradients()
    for at in range(7):
        given = vectors(n, at)
        if at >= 5:
            given["p1"] = factor * given["p1"]
        assert not gradients.bad
        gradients.round(measured(given), float(at))
    assert {peer: (bad.why, since) for peer, (bad, since) in gradients.bad.items()} == {"p1": (why, 5.0)}


def test_who_differs_from_others_that_do_not_agree_is_not_blamed() -> None:
    """Near the end of a run with different data on each peer, contributions add up to nothing."""
    gradients = Gradients()
    for at in range(12):
        cosines = {"a": -0.8, "b": 0.1, "c": 0.15, "d": -0.4}
        gradients.round({name: Contribution(norm=1.0, cosine=cosine) for name, cosine in cosines.items()}, float(at))
        assert not gradients.bad


def test_who_comes_with_wrong_numbers_is_judged_by_those_who_have_been_there() -> None:
    gradients = Gradients()
    for at in range(7):
        given = vectors(5, at) if at >= 5 else vectors(4, at)
        if at >= 5:
            given["p4"] = 50 * given["p4"]
        gradients.round(measured(given), float(at))
    assert set(gradients.bad) == {"p4"}


def test_at_the_beginning_nobody_is_too_long() -> None:
    """The founder trains at full speed, those who join it begin slowly."""
    gradients = Gradients()
    for at in range(20):
        warm = Contribution(norm=0.01 * (1 + at), cosine=0.5)
        gradients.round({"p0": Contribution(norm=1.0, cosine=0.5), "p1": warm, "p2": warm}, float(at))
        assert not gradients.bad


def test_of_two_nobody_knows_which_is_right() -> None:
    given = {"a": Contribution(norm=1.0, cosine=0.9), "b": Contribution(norm=100.0, cosine=0.99)}
    assert bad_contributions(given) == ()


def test_who_is_as_it_always_was_is_not_blamed_for_what_the_others_do() -> None:
    """Two have joined, and their learning rates still grow: beside them the third is long."""
    gradients = Gradients()
    for at in range(5):
        gradients.round({"p0": Contribution(norm=1.0, cosine=0.0)}, float(at))
    for at in range(5, 20):
        warm = Contribution(norm=0.01 * at, cosine=0.5)
        gradients.round({"p0": Contribution(norm=1.1, cosine=0.5), "p1": warm, "p2": warm}, float(at))
        assert not gradients.bad
    for at in range(20, 22):
        fine = Contribution(norm=1.0, cosine=0.5)
        gradients.round({"p0": Contribution(norm=30.0, cosine=0.5), "p1": fine, "p2": fine}, float(at))
    assert set(gradients.bad) == {"p0"}, "but if it is itself that has changed, it is"


def test_a_round_that_is_good_again_clears_and_a_new_life_begins_afresh() -> None:
    gradients = Gradients()
    far = {"p1": Contribution(norm=50.0, cosine=0.5)}
    for at in range(-5, 2):
        gradients.round(some(5, at) | (far if at >= 0 else {}), float(at))
    assert set(gradients.bad) == {"p1"}
    gradients.forget("p1")
    gradients.round(some(5, 2) | far, 2.0)
    assert not gradients.bad
    gradients.round(some(5, 3) | far, 3.0)
    assert set(gradients.bad) == {"p1"}
    for at in range(4, 6):
        gradients.round(some(5, at), float(at))
    assert not gradients.bad


@pytest.mark.parametrize("n", [3, 4, 8, 16])
def test_a_thousand_clean_rounds_raise_nothing(n: int) -> None:
    gradients, chance = Gradients(), random.Random(n)
    for at in range(1000):
        gradients.round({f"p{i}": fine(chance) for i in range(n)}, float(at))
        assert not gradients.bad


def test_a_peer_that_goes_while_it_is_confirmed_and_good_again_leaves_nothing_behind() -> None:
    gradients, fine = Gradients(), Contribution(norm=1.0, cosine=0.5)
    good = dict.fromkeys(["a", "b", "c", "d"], fine)
    for at in range(8):
        gradients.round(good | ({"a": Contribution(norm=50.0, cosine=0.5)} if at in (5, 6) else {}), float(at))
    assert set(gradients.bad) == {"a"}
    gradients.forget("a")
    gradients.round(good, 8.0)
    assert not gradients.bad


def test_when_one_goes_what_was_found_by_comparison_with_it_is_found_anew() -> None:
    gradients = Gradients()
    fine = dict.fromkeys("abc", Contribution(norm=1.0, cosine=0.5))
    wrong = {"d": Contribution(norm=1.0, cosine=-0.9), "e": Contribution(norm=math.nan, cosine=0.0)}
    for number in range(2):
        gradients.round(fine | wrong, float(number))
    assert {peer: bad.why for peer, (bad, _) in gradients.bad.items()} == {"d": "direction", "e": "not finite"}
    gradients.forget("a")
    assert {peer: bad.why for peer, (bad, _) in gradients.bad.items()} == {"e": "not finite"}
    gradients.round({**fine, **wrong}, 2.0)
    assert gradients.bad["e"][0].rounds == 3 and "d" not in gradients.bad
    gradients.round({**fine, **wrong}, 3.0)
    assert gradients.bad["d"][0].why == "direction"


def test_rounds_that_a_peer_sits_out_are_neither_good_nor_bad() -> None:
    """Whoever had no numbers to give sits out the next round: its rounds are running all the same."""
    gradients = Gradients()
    well = {name: Contribution(norm=1.0, cosine=0.5) for name in "abc"}
    for number in range(2):
        gradients.round({**well, "d": Contribution(norm=math.nan, cosine=0.0)}, float(number))
        assert gradients.bad["d"][0].rounds == number + 1
        for part in range(1, 6):
            gradients.round(well, number + 0.1 * part)
            assert gradients.bad["d"][0].rounds == number + 1, "it has not been seen well since"
    for number in range(2):
        assert "d" in gradients.bad
        gradients.round({**well, "d": Contribution(norm=1.0, cosine=0.5)}, 3.0 + number)
    assert not gradients.bad


@pytest.mark.parametrize(("steps", "named"), [(80, False), (8, True), (0, True)])
def test_who_was_not_waited_for_goes_further_and_that_is_no_fault(steps: int, named: bool) -> None:
    """Ten times as long with ten times as many steps behind it; with as many as the others, or none told, it is one."""
    gradients = Gradients()
    others = {name: Contribution(norm=1.0, cosine=0.5, steps=8) for name in "ab"}
    for number in range(6):
        gradients.round(others | {"c": Contribution(norm=1.0, cosine=0.5, steps=8)}, float(number))
    for number in range(6, 9):
        gradients.round(others | {"c": Contribution(norm=10.0, cosine=0.5, steps=steps)}, float(number))
    assert ("c" in gradients.bad) == named


def test_more_steps_do_not_excuse_what_is_longer_still() -> None:
    gradients = Gradients()
    others = {name: Contribution(norm=1.0, cosine=0.5, steps=8) for name in "ab"}
    for number in range(3):
        gradients.round(others | {"c": Contribution(norm=1.0, cosine=0.5, steps=8)}, float(number))
    for number in range(3, 6):
        gradients.round(others | {"c": Contribution(norm=50.0, cosine=0.5, steps=80)}, float(number))
    assert "c" in gradients.bad


@pytest.mark.parametrize(("steps", "named"), [(80, False), (8, True), (0, True)])
def test_who_was_left_behind_may_point_back(steps: int, named: bool) -> None:
    gradients = Gradients()
    others = {name: Contribution(norm=1.0, cosine=0.9, steps=8) for name in "ab"}
    for number in range(4):
        gradients.round(others | {"c": Contribution(norm=1.0, cosine=-0.5, steps=steps)}, float(number))
    assert ("c" in gradients.bad) == named

"""How many stripes: simulated paths, on which the number must become right soon and stay so."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives.sockets import MOST_STRIPES, Vitals
from collectives.tuning import (
    PATIENCE,
    PAUSE,
    SLOW_SAMPLES,
    Care,
    Gauge,
    Orders,
    Sample,
    Tuner,
    fine_chunk,
    first_count,
    worth_it,
)

OPERATIONS = 10


class Path:
    """Carries min(cap, stripes * each) bytes/s, but for noise; packets are lost by chance where each < cap."""

    def __init__(self, cap: float, each: float, noise: float = 0.0, seed: int = 0) -> None:
        self.cap, self.each, self._noise, self._random = cap, each, noise, Random(seed)

    def carries(self, stripes: int) -> float:
        return min(self.cap, stripes * self.each)

    def sample(self, stripes: int) -> Sample:
        full = stripes * self.each >= self.cap
        goodput = self.carries(stripes) * (1 + self._random.uniform(-self._noise, self._noise))
        loss = 0.001 if self.each < self.cap else 0.0
        return Sample(stripes=stripes, goodput=goodput, rtt=0.15 if full else 0.1, shortest_rtt=0.1, loss=loss)


def run(tuner: Tuner, path: Path, operations: int) -> list[int]:
    return [tuner.observe(path.sample(tuner.wanted)) for _ in range(operations)]


@given(
    cap=st.floats(1e6, 1e9),
    knee=st.floats(0.4, 100),
    noise=st.floats(0, 0.04),
    seed=st.integers(0, 1000),
)
def test_settles_within_ten_operations_where_more_would_not_carry_more(
    cap: float, knee: float, noise: float, seed: int
) -> None:
    path, tuner = Path(cap, cap / knee, noise, seed), Tuner(first_count(0.1))
    run(tuner, path, OPERATIONS)
    assert tuner.settled
    assert path.carries(tuner.wanted) >= 0.85 * path.carries(MOST_STRIPES)
    assert tuner.wanted == 1 or path.carries(tuner.wanted // 2) <= 0.99 * path.carries(tuner.wanted)


@given(knee=st.floats(0.5, 100), noise=st.floats(0, 0.15), seed=st.integers(0, 1000))
def test_does_not_oscillate_once_settled(knee: float, noise: float, seed: int) -> None:
    path, tuner = Path(2e7, 2e7 / knee, noise, seed), Tuner(8)
    run(tuner, path, 2 * OPERATIONS)
    assert len(set(run(tuner, path, 200))) == 1


def test_a_path_of_one_percent_of_its_capacity_for_each_is_filled_in_two_steps() -> None:
    path, tuner = Path(24e6, 0.6e6), Tuner(8)
    assert run(tuner, path, 4) == [32, 64, 64, 64]


def test_shrinks_where_one_carries_as_much() -> None:
    tuner = Tuner(8)
    assert run(tuner, Path(2e7, 3e7), 6)[-1] == 1


def test_begins_anew_when_the_path_changes_but_not_for_one_bad_sample() -> None:
    path, tuner = Path(1e7, 1e7 / 7), Tuner(8)
    assert run(tuner, path, OPERATIONS)[-1] == 8
    good = path.each
    path.each = good / 4
    run(tuner, path, PATIENCE - 1)
    path.each = good
    assert run(tuner, path, 5) == [8] * 5
    path.each = good / 4
    assert run(tuner, path, PATIENCE + 3)[-1] == 32


def test_settles_when_the_number_is_never_had() -> None:
    tuner, path = Tuner(8), Path(1e8, 1e6)
    for _ in range(PATIENCE + 2):
        tuner.observe(path.sample(5))
    assert tuner.settled and tuner.wanted == 5


def vitals(acked: int, busy: float, *, rtt: float = 0.1, resent: int = 0) -> Vitals:
    return Vitals(
        rtt=rtt,
        shortest_rtt=rtt,
        window=60_000,
        acked=acked,
        sent=acked + resent,
        resent=resent,
        retransmits=resent // 1000,
        busy=busy,
        unanswered=0,
        silent=0.0,
    )


def looks(gauge: Gauge | Care, rates: dict[str, float], seconds: float = 1.0) -> Iterator[object]:
    """What comes of looking once a second at stripes that carry this while they are always busy."""
    now = 0.0
    while True:
        yield gauge.look({name: vitals(int(rate * now), now) for name, rate in rates.items()})
        now += seconds


def test_goodput_counts_only_the_time_in_which_the_link_was_busy() -> None:
    gauge = Gauge()
    gauge.look({"a": vitals(0, 0.0), "b": vitals(0, 0.0)})
    assert gauge.look({"a": vitals(3_000_000, 1.0), "b": vitals(1_000_000, 1.0)}) is None, "it may go on"
    for _ in range(5):  # idle
        sample = gauge.look({"a": vitals(3_000_000, 1.0), "b": vitals(1_000_000, 1.0, resent=40_000)})
        if sample is not None:
            break
    assert sample is not None
    assert sample.goodput == gauge.goodput == 4e6
    assert sample.loss == pytest.approx(0.01, rel=0.02) and sample.stripes == 2


def test_a_sample_never_spans_a_change_of_the_stripes() -> None:
    gauge = Gauge()
    gauge.look({"a": vitals(0, 0.0)})
    assert gauge.look({"a": vitals(9, 9.0), "b": vitals(0, 0.0)}) is None
    assert gauge.look({"a": vitals(9, 9.0)}) is None


def test_a_stripe_below_half_of_its_siblings_is_replaced_once_it_has_stayed_so() -> None:
    care = Care(dialler=True, fixed=3, rtt=0.1, stripes=3)
    rates = {"a": 1e6, "b": 1e6, "slow": 0.4e6}
    orders = looks(care, rates, seconds=10.0)
    found = [next(orders) for _ in range(SLOW_SAMPLES + 1)]
    assert found[:-1] == [Orders()] * SLOW_SAMPLES and found[-1] == Orders(add=1)
    rates["new"] = 1e6  # first the new one, then the old one goes
    assert next(orders) == Orders(retire=("slow",))
    assert care.redialled == 1
    del rates["slow"]
    assert [next(orders) for _ in range(2 * SLOW_SAMPLES)] == [Orders()] * (2 * SLOW_SAMPLES)


def test_a_stripe_that_is_slow_now_and_then_stays() -> None:
    care = Care(dialler=True, fixed=3, rtt=0.1, stripes=3)
    acked = {"a": 0, "b": 0, "c": 0}
    for turn in range(60):
        for name in acked:
            acked[name] += 300_000 if name == "c" and turn % 4 else 1_000_000
        assert care.look({name: vitals(count, 10.0 * turn) for name, count in acked.items()}) == Orders()


def test_near_links_never_grow() -> None:
    assert first_count(0.0002) == 1
    care = Care(dialler=True, fixed=None, rtt=0.0002, stripes=1)
    orders = looks(care, {"a": 1e9})
    assert {next(orders) for _ in range(50)} == {Orders()}


def test_who_was_dialled_asks_and_the_dialler_does() -> None:
    listening = Care(dialler=False, fixed=None, rtt=0.1, stripes=2)
    dialler = Care(dialler=True, fixed=None, rtt=0.1, stripes=2)
    assert listening.look({"a": vitals(0, 0.0), "b": vitals(0, 0.0)}) == Orders(ask=2)
    asked = listening.look({name: vitals(5_000_000, 5.0, resent=5_000) for name in "ab"})
    assert asked == Orders(ask=8)
    dialler.asked = asked.ask
    assert dialler.look({name: vitals(0, 0.0) for name in "ab"}) == Orders(add=6)
    dialler.refused()
    assert [dialler.look({name: vitals(0, 0.0) for name in "ab"}) for _ in range(PAUSE)] == [Orders()] * PAUSE
    assert dialler.look({name: vitals(0, 0.0) for name in "ab"}) == Orders(add=6)
    orders = dialler.look({name: vitals(0, 0.0) for name in "abcdefghij"})
    assert orders.add == 0 and len(orders.retire) == 2


def test_a_slow_stripe_takes_no_frame_that_the_others_carry_sooner() -> None:
    rates = [1e6, 1e6, 1e6, 1e5]
    assert worth_it(1e6, rates, 30_000, 30_000)
    assert not worth_it(1e5, rates, 30_000, 60_000)
    assert worth_it(1e5, rates, 30_000, 2_000_000), "there is enough for all"
    assert worth_it(0.0, [0.0, 0.0], 30_000, 30_000), "nothing is known yet"


@given(rates=st.lists(st.floats(1e3, 1e9), min_size=1, max_size=64), waiting=st.integers(1, 1 << 30))
def test_the_fastest_stripe_always_takes_a_frame(rates: list[float], waiting: int) -> None:
    assert worth_it(max(rates), rates, 32768, waiting)


def test_chunks_are_finer_on_long_paths() -> None:
    assert fine_chunk([]) == fine_chunk([(0.0001, 1e9), (0.001, 1e7)]) == 0
    assert fine_chunk([(0.1, 2e7)], 0.25) == 4 * fine_chunk([(0.1, 2e7)])
    assert 0 < fine_chunk([(0.0001, 1e9), (0.1, 2e7)]) < fine_chunk([(0.1, 2e8)])

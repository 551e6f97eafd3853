"""The timing model against the numbers that were computed from the papers by hand, and what must hold for any setting.

M = 2, 10^9 numbers of 16 bits, H = 100, steps of 0.1 s, 9 fragments: the 1B model of arXiv 2501.18512.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.outer.cadence import WHOLE_ROUND
from elastic.outer.timing import Timing

DILOCO = Timing(numbers=1e9, peers=2, bandwidth=1e9, step_seconds=0.1, sync_every=100, bits=(16, 16))
STREAMING = replace(DILOCO, fragments=9, delay=1)
UTILISATIONS = (0.5, 0.8, 0.9, 0.95, 0.99)


@pytest.mark.parametrize(
    ("timing", "gigabits"),
    [
        (DILOCO, (1.60, 6.40, 14.4, 30.4, 158)),
        (replace(STREAMING, delay=0), (1.60, 6.40, 14.4, 30.4, 158)),
        (STREAMING, (1.47, 4.71, 7.96, 11.2, 16.0)),
        (replace(STREAMING, bits=(4, 4)), (0.37, 1.18, 1.99, 2.80, 4.00)),
        (replace(STREAMING, bits=(4, 4), delay=5), (0.28, 0.57, 0.71, 0.80, 0.87)),
    ],
)
def test_bandwidth_for_a_utilisation(timing: Timing, gigabits: tuple[float, ...]) -> None:
    for utilisation, wanted in zip(UTILISATIONS, gigabits, strict=True):
        needed = timing.bandwidth_for(utilisation)
        assert needed / 1e9 == pytest.approx(wanted, rel=0.02)
        assert replace(timing, bandwidth=needed).utilisation == pytest.approx(utilisation)


timings = st.builds(
    Timing,
    numbers=st.floats(1e5, 1e11),
    peers=st.integers(2, 64),
    bandwidth=st.floats(1e6, 1e11),
    step_seconds=st.floats(0.01, 20),
    sync_every=st.integers(20, 1000),
    fragments=st.integers(1, 20),
    delay=st.integers(0, 20),
    latency=st.floats(0, 2),
)


@given(timings, st.floats(1, 100), st.integers(1, 20))
def test_faster_links_and_longer_delays_never_cost_anything(timing: Timing, faster: float, longer: int) -> None:
    assert 0 < timing.utilisation <= 1
    assert replace(timing, bandwidth=faster * timing.bandwidth).utilisation >= timing.utilisation
    assert replace(timing, delay=timing.delay + longer).utilisation >= timing.utilisation


@given(timings, st.integers(2, 20))
def test_fragments_help_where_there_is_overlap_and_only_there(timing: Timing, fragments: int) -> None:
    whole = replace(timing, fragments=1, latency=0.0)
    cut = replace(whole, fragments=fragments)
    assert replace(cut, delay=0).utilisation == pytest.approx(replace(whole, delay=0).utilisation)
    assert cut.utilisation >= whole.utilisation * (1 - 1e-9)
    if whole.delay and whole.stall_seconds > 1e-3:
        assert cut.utilisation > whole.utilisation


def test_a_whole_round_hides_as_much_as_its_steps_take() -> None:
    late = replace(DILOCO, delay=WHOLE_ROUND)
    assert late.hidden_seconds == pytest.approx(10) and late.bandwidth_for(1.0) == pytest.approx(1.6e9)
    assert replace(late, bandwidth=1.6e9).utilisation == pytest.approx(1)
    assert replace(late, bandwidth=0.8e9).utilisation == pytest.approx(0.5)


def test_latency_alone_can_make_a_utilisation_unreachable() -> None:
    assert replace(STREAMING, latency=0.3).bandwidth_for(0.99) == float("inf")

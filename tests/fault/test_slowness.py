"""Slow senders, receivers and links: planted in matrices, over windows, and what must make no difference."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fault.delays import Matrix, Slow, slow_parts
from fault.persisting import Patience, Persisting
from fault.slowness import Slowness

KINDS = ["sender", "receiver", "link"]


def names(n: int) -> list[str]:
    return [f"p{i}" for i in range(n)]


def noisy(n: int, seed: int, sigma: float = 0.05) -> Matrix:
    logs = np.random.default_rng(seed).normal(0, sigma, (n, n))
    np.fill_diagonal(logs, np.nan)
    return logs


def raised(logs: Matrix, kind: str, s: int, d: int, factor: float) -> Matrix:
    where = {"sender": (s, slice(None)), "receiver": (slice(None), d), "link": (s, d)}[kind]
    logs = logs.copy()
    logs[where] += math.log(factor)
    return logs


def culprit(kind: str, s: int, d: int) -> tuple[str, ...]:
    return {"sender": (f"p{s}",), "receiver": (f"p{d}",), "link": (f"p{s}", f"p{d}")}[kind]


def said(found: tuple[Slow, ...]) -> set[tuple[str, tuple[str, ...]]]:
    return {(slow.kind, slow.culprits) for slow in found}


@pytest.mark.parametrize("n", [3, 4, 8, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_planted_is_named_and_nothing_else(kind: str, n: int) -> None:
    for seed in range(20):
        s, d = (int(i) for i in np.random.default_rng(seed).choice(n, 2, replace=False))
        (slow,) = slow_parts(raised(noisy(n, seed), kind, s, d, 3.0), names(n))
        assert (slow.kind, slow.culprits) == (kind, culprit(kind, s, d))
        assert 2.0 < slow.factor < 4.5 and slow.deviations > 4


def test_a_node_is_slow_if_it_is_so_both_ways() -> None:
    logs = raised(raised(noisy(6, 1), "sender", 2, 0, 3.0), "receiver", 0, 2, 3.0)
    assert said(slow_parts(logs, names(6))) == {("node", ("p2",))}


def test_two_faults_at_once_are_told_apart() -> None:
    logs = raised(raised(noisy(8, 2), "sender", 1, 0, 3.0), "link", 4, 6, 4.0)
    assert said(slow_parts(logs, names(8))) == {("sender", ("p1",)), ("link", ("p4", "p6"))}


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kind=st.sampled_from(KINDS), n=st.integers(3, 9), scale=st.floats(-20, 20))
def test_neither_the_order_of_names_nor_a_common_factor_matters(seed: int, kind: str, n: int, scale: float) -> None:
    chance = np.random.default_rng(seed)
    logs = raised(noisy(n, seed, 0.2), kind, 0, 1, 2.5)
    order = chance.permutation(n)
    shuffled = slow_parts(logs[np.ix_(order, order)] + scale, [names(n)[i] for i in order])
    assert said(shuffled) == said(slow_parts(logs, names(n)))


def test_a_single_ring_cannot_tell_and_says_so() -> None:
    logs = np.full((6, 6), np.nan)
    for i in range(6):
        logs[i, (i + 1) % 6] = math.log(4.0) if i == 3 else 0.01 * i
    (slow,) = slow_parts(logs, names(6))
    assert (slow.kind, slow.culprits) == ("ambiguous", ("p3", "p4")) and slow.factor == pytest.approx(4.0, rel=0.1)


def test_a_cell_beside_a_full_matrix_is_ambiguous_too() -> None:
    """p5 is heard by p0 alone."""
    logs = np.full((6, 6), np.nan)
    logs[:5, :5] = noisy(5, 3)
    logs[5, 0] = math.log(5.0)
    assert said(slow_parts(logs, names(6))) == {("ambiguous", ("p5", "p0"))}


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_to_compare_raise_no_alarm_without_a_reason(n: int) -> None:
    assert slow_parts(noisy(n, 4), names(n)) == ()


def test_nothing_seen_is_nothing_said() -> None:
    assert slow_parts(np.full((4, 4), np.nan), names(4)) == ()


# --- over time --------------------------------------------------------------------------------------------------------


class Feed:
    """Windows of measurements, two seconds each: every pair in each."""

    def __init__(self, n: int = 4) -> None:
        self.names, self.now, self.detector = names(n), 0.0, Slowness(Patience())
        self._chance = np.random.default_rng(n)
        self._usual = self._chance.normal(-3, 1.0, (n, n))  # links differ by nature

    def windows(self, count: int, **faults: float) -> None:
        """faults: `p1="sender"`-like factors by the name of a sender."""
        for _ in range(count):
            for s, sender in enumerate(self.names):
                for d, receiver in enumerate(self.names):
                    if s != d:
                        noise = self._chance.normal(0, 0.05)
                        seconds = math.exp(self._usual[s, d] + noise) * faults.get(sender, 1.0)
                        self.detector.observe(sender, receiver, 1 << 20, seconds, self.now)
            self.now += 2.0
            self.detector.look(self.now)


def test_links_that_differ_by_nature_are_no_fault_and_three_windows_make_one() -> None:
    feed = Feed()
    feed.windows(20)
    assert not feed.detector.slow
    feed.windows(2, p1=3.0)
    assert not feed.detector.slow, "two windows may be chance"
    feed.windows(1, p1=3.0)
    assert set(feed.detector.slow) == {("sender", ("p1",))}
    slow, since = feed.detector.slow["sender", ("p1",)]
    assert since == 40.0 and slow.factor == pytest.approx(3.0, rel=0.3)


def test_a_burst_of_three_short_windows_is_none() -> None:
    detector = Slowness(Patience(lasting_seconds=4.0))
    for window in range(30):
        for s, d in permutations(range(4), 2):
            slow = s == 1 and (10 <= window < 14 or window >= 20)
            detector.observe(f"p{s}", f"p{d}", 1 << 20, 0.3 if slow else 0.1, float(window))
        detector.look(window + 1.0)
        assert bool(detector.slow) == (window >= 24), "four seconds after the first"


def test_what_lasts_does_not_become_usual_and_what_ends_is_cleared() -> None:
    feed = Feed()
    feed.windows(10)
    feed.windows(60, p1=3.0)
    assert set(feed.detector.slow) == {("sender", ("p1",))}
    feed.windows(2)
    assert feed.detector.slow, "two windows may be chance"
    feed.windows(1)
    assert not feed.detector.slow


def test_what_is_slow_from_the_beginning_is_its_nature() -> None:
    feed = Feed()
    feed.windows(30, p1=3.0)
    assert not feed.detector.slow


def test_a_peer_that_comes_again_is_measured_anew() -> None:
    feed = Feed()
    feed.windows(10)
    feed.windows(3, p1=3.0)
    feed.detector.forget("p1")
    assert not feed.detector.slow
    feed.windows(30, p1=3.0)
    assert not feed.detector.slow, "its new life was never faster"


def test_small_messages_and_short_windows_say_nothing() -> None:
    detector = Slowness(Patience())
    detector.observe("a", "b", 1000, 1.0, 0.0)
    detector.look(5.0)
    assert detector.windows == 0
    detector.observe("a", "b", 1 << 20, 1.0, 5.0)
    detector.look(5.5)
    assert detector.windows == 0
    detector.look(6.0)
    assert detector.windows == 1


@pytest.mark.parametrize("carried", [1 << 17, 1 << 20, 1 << 24])
def test_another_share_of_the_bytes_is_no_fault_whatever_part_of_a_delay_is_latency(carried: int) -> None:
    """A new plan gives p1 less, or more: all its cells change, in a way of their own."""
    detector, chance = Slowness(Patience()), np.random.default_rng(carried)
    latency = chance.uniform(0.0, 0.2, (4, 4))
    for window in range(40):
        for s, d in permutations(range(4), 2):
            share = carried if d == 1 and window >= 20 else 1 << 20
            seconds = latency[s, d] + share / 20e6
            detector.observe(f"p{s}", f"p{d}", share, seconds * math.exp(chance.normal(0, 0.05)), float(window))
        detector.look(window + 1.0)
        assert not detector.slow, window


def test_who_is_slow_with_another_share_is_named_all_the_same() -> None:
    feed = Feed()
    feed.windows(10)
    for _ in range(3):
        for s, d in permutations(range(4), 2):
            seconds = math.exp(feed._usual[s, d]) * 2 * (3.0 if s == 1 else 1.0)
            feed.detector.observe(f"p{s}", f"p{d}", 2 << 20, seconds, feed.now)
        feed.now += 2.0
        feed.detector.look(feed.now)
    assert set(feed.detector.slow) == {("sender", ("p1",))}


@pytest.mark.parametrize("common", [0.2, 0.5, 2.0])
def test_what_takes_everybody_as_many_seconds_more_is_nobodys_fault(common: float) -> None:
    """A busy machine: the short delays become many times as long, the long ones hardly."""
    detector, chance = Slowness(Patience()), np.random.default_rng(5)
    usual = np.where(np.add.outer([0, 0, 1, 1], [0, 0, 1, 1]) == 1, 0.8, 0.15)
    for window in range(40):
        more = common * chance.lognormal(0, 0.2) if window >= 20 else 0.0
        for s, d in permutations(range(4), 2):
            seconds = usual[s, d] * chance.lognormal(0, 0.05) + more
            detector.observe(f"p{s}", f"p{d}", 1 << 20, seconds, float(window))
        detector.look(window + 1.0)
        assert not detector.slow, window
    for window in range(40, 45):
        for s, d in permutations(range(4), 2):
            detector.observe(f"p{s}", f"p{d}", 1 << 20, (usual[s, d] + common) * (3 if s == 2 else 1), float(window))
        detector.look(window + 1.0)
    assert set(detector.slow) == {("sender", ("p2",))}, "who is slower than the others is named meanwhile, too"


def test_who_stays_as_it_was_while_all_others_become_faster_is_not_slow() -> None:
    """All were slowed for so long that it became usual; p2 had been spared, and one delay was long anyway."""
    detector, chance = Slowness(Patience()), np.random.default_rng(6)
    usual = np.full((4, 4), 0.05)
    usual[0, 1] = 2.0
    for window in range(70):
        for s, d in permutations(range(4), 2):
            more = 0.5 if 10 <= window < 50 and s != 2 else 0.0
            seconds = (usual[s, d] + more) * chance.lognormal(0, 0.05)
            detector.observe(f"p{s}", f"p{d}", 1 << 20, seconds, float(window))
        detector.look(window + 1.0)
        assert window < 50 or not detector.slow, window


def test_one_that_was_late_once_does_not_stay_behind_when_all_have_become_slower() -> None:
    detector = Slowness(Patience())
    for window in range(80):
        common = 3.0 if window >= 30 else 1.0
        for s, d in permutations(range(4), 2):
            late = 3.0 if (s, d) == (2, 0) and window in (25, 33, 34) else 1.0
            detector.observe(f"p{s}", f"p{d}", 1 << 20, 0.1 * (s + 1) * common * late, float(window))
        detector.look(window + 1.0)
        assert not detector.slow, window


def test_a_link_that_a_plan_spares_now_and_then_is_still_named() -> None:
    """Every second window, and that is no evidence for it; but what is never seen again is forgotten."""
    detector = Slowness(Patience())
    for window in range(40):
        for s, d in permutations(range(4), 2):
            spared = (s, d) == (2, 0) and (window >= 30 or window in (11, 13, 15))
            slow = 3.0 if (s, d) == (2, 0) and window >= 10 else 1.0
            if not spared:
                detector.observe(f"p{s}", f"p{d}", 1 << 20, 0.1 * slow, 2.0 * window)
        detector.look(2.0 * window + 2.0)
        assert set(detector.slow) == ({("link", ("p2", "p0"))} if 14 <= window < 34 else set()), window


def test_a_window_in_which_a_link_stood_out_alone_does_not_end_its_streak() -> None:
    """The plan left one cell of its row: it was slow, and could as well have been its sender."""
    detector = Slowness(Patience())
    for window in range(20):
        for s, d in permutations(range(4), 2):
            alone = window in (12, 13)
            slow = 3.0 if (s, d) == (2, 0) and window >= 10 else 1.0
            if not alone or s != 2 or d == 0:
                detector.observe(f"p{s}", f"p{d}", 1 << 20, 0.1 * slow, 2.0 * window)
        detector.look(2.0 * window + 2.0)
    assert set(detector.slow) == {("link", ("p2", "p0"))}
    assert detector.slow["link", ("p2", "p0")][1] == 20.0, "since its first window"


def test_windows_of_very_many_pairs_last_longer() -> None:
    detector = Slowness(Patience(pairs_per_second=4))
    for receiver in names(12):
        detector.observe("a", receiver, 1 << 20, 1.0, 0.0)
    detector.look(2.9)
    assert detector.windows == 0
    detector.look(3.0)
    assert detector.windows == 1


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 5))
def test_hysteresis(found: list[bool], windows: int) -> None:
    """Confirmed by so many in a row, cleared by as many without; since the first of the streak."""
    persisting: Persisting[str, int] = Persisting(windows)
    confirmed, hits, misses = False, 0, 0
    for at, hit in enumerate(found):
        persisting.window({"x": at} if hit else {}, float(at))
        hits, misses = (hits + 1, 0) if hit else (0, misses + 1)
        if hits >= windows and not confirmed:
            confirmed = True
            assert persisting.confirmed["x"] == (at, at - windows + 1)
        confirmed = confirmed and misses < windows
        assert ("x" in persisting.confirmed) == confirmed


@pytest.mark.parametrize(
    ("found", "confirmed"), [("xx.xx", True), ("xx..xxx", False), ("x.x.x", False), ("xxx", False)]
)
def test_what_must_last_may_be_missed_once(found: str, confirmed: bool) -> None:
    persisting: Persisting[str, int] = Persisting(3, 4.0)
    for at, hit in enumerate(found):
        persisting.window({"x": at} if hit == "x" else {}, float(at))
    assert ("x" in persisting.confirmed) == confirmed
    assert not confirmed or persisting.confirmed["x"][1] == 0.0


# --- plans ------------------------------------------------------------------------------------------------------------


def planned(detector: Slowness, windows: int, shares: list[float], seconds: Callable[[int, int], float]) -> None:
    """Every pair carries the receiver's share."""
    for _ in range(windows):
        now = float(3 * detector.windows)
        for s, d in permutations(range(4), 2):
            if shares[d]:
                detector.observe(f"p{s}", f"p{d}", int(shares[d] * (8 << 20)), seconds(s, d), now)
        detector.look(now + 2.0)


def test_what_a_new_plan_makes_slow_is_nobodys_fault() -> None:
    """p0 owns a part now, and its uplink has that to send, too: what it gives to p3 takes twice as long as before."""
    detector = Slowness()
    planned(detector, 10, [0.0, 0.5, 0.0, 0.5], lambda s, d: 0.2)
    planned(detector, 20, [0.16, 0.4, 0.04, 0.4], lambda s, d: 0.4 if (s, d) == (0, 3) else 0.18)
    assert not detector.slow
    planned(detector, 4, [0.15, 0.41, 0.04, 0.4], lambda s, d: 0.4 if (s, d) in ((0, 3), (1, 2)) else 0.18)
    assert set(detector.slow) == {("link", ("p1", "p2"))}, "what became usual under that plan is what counts"


def test_a_plan_that_comes_back_is_known() -> None:
    detector = Slowness()
    planned(detector, 6, [0.5, 0.5, 0.0, 0.0], lambda s, d: 0.2)
    planned(detector, 6, [0.0, 0.0, 0.5, 0.5], lambda s, d: 0.5)
    planned(detector, 3, [0.5, 0.5, 0.0, 0.0], lambda s, d: 0.6 if (s, d) == (2, 0) else 0.2)
    assert set(detector.slow) == {("link", ("p2", "p0"))}


def test_while_something_is_suspected_it_is_being_judged() -> None:
    detector = Slowness()
    planned(detector, 8, [0.25] * 4, lambda s, d: 0.2)
    assert not detector.judging
    detector.observe("p0", "p1", 1 << 21, 0.2, 100.0)
    assert detector.judging, "the window is open"
    detector.look(102.0)
    for windows, judging in ((1, True), (1, True), (1, False)):
        planned(detector, windows, [0.25] * 4, lambda s, d: 0.6 if (s, d) == (2, 0) else 0.2)
        assert detector.judging == judging
    assert set(detector.slow) == {("link", ("p2", "p0"))}

"""Who stands still: planted faults are found and nothing else, and what is healthy raises no alarm."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.records import Awaited, Underway
from fault.hangs import ENOUGH, Hangs
from fault.records import Trainer
from fault.verdicts import HANG, STALLED

LIMIT = 30.0
fixed = settings(derandomize=True, deadline=None, max_examples=150)
Told = set[tuple[str, tuple[str, ...]]]


def told(hangs: Hangs, at: float = 0.0, silent: Iterable[str] = ()) -> Told:
    return {verdict.key for verdict in hangs.look(at, set(silent))}


def trainer(idle: float, *, steps: int = ENOUGH, usual: float = 0.1, waiting: bool = False) -> Trainer:
    return Trainer(steps=steps, usual_seconds=usual, idle_seconds=idle, waiting=waiting)


# --- outside communication --------------------------------------------------------------------------------------------


def test_a_peer_that_makes_no_step_is_named_until_it_makes_one() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", trainer(LIMIT - 1), (), 100.0)
    assert not told(hangs)
    for idle in (LIMIT + 1, LIMIT + 5):
        hangs.reported("a", trainer(idle), (), 100.0 + idle)
        (verdict,) = hangs.look(100.0 + idle)
        assert verdict.key == (HANG, ("a",)) and verdict.since == 100.0
        assert verdict.evidence == {"seconds": idle, "usual_seconds": 0.1}
    assert not told(hangs, silent=["a"]), "of a silent peer, others speak"
    hangs.reported("a", trainer(0.0, steps=ENOUGH + 1), (), 200.0)
    assert not told(hangs)


@pytest.mark.parametrize(
    "state",
    [
        trainer(1e6, waiting=True),
        trainer(1e6, steps=ENOUGH - 1),
        trainer(9 * 60.0, usual=60.0),
        trainer(float("nan")),
        trainer(1e6, usual=float("nan")),
        trainer(float("inf")),
    ],
)
def test_who_waits_has_just_begun_or_is_always_slow_does_not_hang(state: Trainer) -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", state, (), 1.0)
    assert not told(hangs)


def test_a_slow_peer_hangs_after_ten_of_its_steps() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", trainer(601.0, usual=60.0), (), 1.0)
    hangs.reported("b", trainer(601.0, usual=61.0), (), 1.0)
    assert told(hangs) == {(HANG, ("a",))}


@fixed
@given(seed=st.integers(0, 10**6))
def test_random_healthy_training_raises_no_alarm(seed: int) -> None:
    """Steps of log-normal length, long waits for others in between, and links that bring something now and then."""
    chance, hangs, now = random.Random(seed), Hangs(LIMIT), 0.0
    names = [f"p{i}" for i in range(chance.randint(2, 5))]
    usual = {name: chance.uniform(0.01, 20.0) for name in names}
    for _ in range(200):
        now += 0.5
        for name in names:
            waiting = chance.random() < 0.3
            idle = 0.0 if waiting else usual[name] * min(9.0, chance.lognormvariate(0, 0.7))
            state = trainer(idle, steps=chance.randint(0, 1000), usual=usual[name], waiting=waiting)
            stage = chance.choice(["ready", "own", "result"])
            awaited = tuple(
                Awaited(peer=other, what=chance.choice(["ready", "own", "result"]), seconds=chance.uniform(0, LIMIT))
                for other in names
                if other != name and chance.random() < 0.7
            )
            attempt = Underway(tag="t", round=0, attempt=0, stage=stage, seconds=now, awaited=awaited)
            hangs.reported(name, state, (attempt,) if waiting else (), now)
        assert not told(hangs, now)


# --- in communication -------------------------------------------------------------------------------------------------


class Exchange:
    """What n peers report of a direct exchange in which something stands still, `seconds` after it stopped."""

    def __init__(self, n: int) -> None:
        self.names = [f"p{i}" for i in range(n)]

    def pairs(self) -> list[tuple[str, str]]:
        return [(s, r) for s in self.names for r in self.names if s != r]

    def report(
        self, hangs: Hangs, stuck: set[tuple[str, str]], absent: str, seconds: float, lag: random.Random
    ) -> None:
        """stuck: pairs between which own numbers do not move. All else follows from that."""
        own = {name: {s for s, r in stuck if r == name} for name in self.names}
        for name in self.names:
            if name == absent:
                hangs.reported(name, Trainer(), (), seconds)
                continue
            if absent:
                stage, whats = "ready", {absent: "ready"}
            else:
                results = {other for other in self.names if other != name and own[other]}
                stage = "own" if own[name] else "result"
                whats = dict.fromkeys(results, "result") | dict.fromkeys(own[name], "own")
            # what follows from a fault stops a little later than what it strikes itself
            awaited = tuple(
                Awaited(peer=peer, what=what, seconds=seconds - (lag.uniform(0, 2) if what == "result" else 0))
                for peer, what in whats.items()
            )
            attempt = Underway(tag="t", round=3, attempt=0, stage=stage, seconds=seconds + 1, awaited=awaited)
            hangs.reported(name, Trainer(), (attempt,) if awaited else (), seconds)


@fixed
@given(
    n=st.integers(3, 7),
    kind=st.sampled_from(["sender", "receiver", "link", "absent"]),
    seconds=st.floats(LIMIT + 1, 200.0),
    seed=st.integers(0, 10**6),
)
def test_the_planted_cause_is_named_and_nothing_else(n: int, kind: str, seconds: float, seed: int) -> None:
    chance, exchange, hangs = random.Random(seed), Exchange(n), Hangs(LIMIT)
    culprit, other = chance.sample(exchange.names, 2)
    stuck = {
        "sender": {pair for pair in exchange.pairs() if pair[0] == culprit},
        "receiver": {pair for pair in exchange.pairs() if pair[1] == culprit},
        "link": {(culprit, other)},
        "absent": set(),
    }[kind]
    absent = culprit if kind == "absent" else ""
    exchange.report(hangs, stuck, absent, LIMIT / 2, chance)
    assert not told(hangs)
    exchange.report(hangs, stuck, absent, seconds, chance)
    culprits = (culprit, other) if kind == "link" else (culprit,)
    assert told(hangs) == {(HANG if absent else STALLED, culprits)}
    assert not {name for _, names in told(hangs, silent=[culprit]) for name in names} & {culprit}
    exchange.report(hangs, set(), "", seconds, chance)
    assert not told(hangs), "the attempt is over, and so is the verdict"


def underway(stage: str, *awaited: tuple[str, str, float]) -> tuple[Underway, ...]:
    waits = tuple(Awaited(peer=peer, what=what, seconds=seconds) for peer, what, seconds in awaited)
    return (Underway(tag="t", round=0, attempt=0, stage=stage, seconds=99.0, awaited=waits),)


def test_of_two_peers_nobody_knows_which_end_it_is() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", Trainer(), underway("own", ("b", "own", 40.0)), 0.0)
    hangs.reported("b", Trainer(), underway("result", ("a", "result", 39.0)), 0.0)
    assert told(hangs) == {(STALLED, ("b", "a"))}


def test_a_result_that_does_not_come_from_one_who_has_all_it_needs() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", Trainer(), underway("result"), 0.0)
    for name in ("b", "c"):
        hangs.reported(name, Trainer(), underway("result", ("a", "result", 40.0)), 0.0)
    assert told(hangs) == {(STALLED, ("a",))}


def test_who_says_nothing_because_others_have_not_begun_is_no_cause() -> None:
    """b does not send, since it has not heard that c has begun, as d has."""
    hangs = Hangs(LIMIT)
    hangs.reported("b", Trainer(), underway("ready", ("c", "ready", 50.0)), 0.0)
    hangs.reported("d", Trainer(), underway("own", ("b", "own", 50.0)), 0.0)
    hangs.reported("c", Trainer(), underway("own", ("b", "own", 50.0)), 0.0)
    assert told(hangs) == {(STALLED, ("c", "b"))}


def test_a_ring_in_which_all_wait_says_where_it_began_and_is_not_sure() -> None:
    hangs = Hangs(LIMIT)
    for name, before, seconds in (("a", "c", 40.0), ("b", "a", 41.0), ("c", "b", 40.5)):
        hangs.reported(name, Trainer(), underway("own", (before, "result", seconds)), 0.0)
    (verdict,) = hangs.look(0.0)
    assert verdict.key == (STALLED, ("a", "b")) and verdict.confidence == 0.5


def test_what_is_no_number_is_no_wait() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", Trainer(), underway("own", ("b", "own", float("inf")), ("c", "own", float("nan"))), 0.0)
    assert not told(hangs)


def test_who_has_left_is_forgotten() -> None:
    hangs = Hangs(LIMIT)
    hangs.reported("a", trainer(99.0), underway("own", ("b", "own", 40.0)), 0.0)
    hangs.forget("a")
    assert not told(hangs)

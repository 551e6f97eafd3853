"""What is known without measuring: how long it is told, and what adds up to something else."""

from __future__ import annotations

from fault.incidents import Incidents
from fault.verdicts import CORRUPT, CRASH, CUT, FLAPPING, SILENT, Verdict


def told(incidents: Incidents, at: float) -> dict[tuple[str, tuple[str, ...]], Verdict]:
    return {verdict.key: verdict for verdict in incidents.verdicts(at)}


def test_what_happened_is_told_for_a_while_and_how_often() -> None:
    incidents = Incidents(lasting=60)
    incidents.happened(CRASH, ("a",), 10.0)
    incidents.happened(CRASH, ("a",), 40.0)
    verdict = told(incidents, 99.0)[CRASH, ("a",)]
    assert verdict.since == 10.0 and verdict.evidence == {"times": 2.0} and verdict.confidence == 1.0
    assert not told(incidents, 100.0)
    incidents.happened(CRASH, ("a",), 200.0)
    assert told(incidents, 201.0)[CRASH, ("a",)].evidence == {"times": 1.0}


def test_what_holds_is_told_until_it_is_over() -> None:
    incidents = Incidents(lasting=60)
    incidents.holds(SILENT, ("a",), 0.0, sure=0.5)
    incidents.holds(CUT, ("a", "b"), 0.0)
    assert told(incidents, 1e6).keys() == {(SILENT, ("a",)), (CUT, ("a", "b"))}
    assert incidents.holding(CUT) == {("a", "b")}
    incidents.over(SILENT, ("a",))
    incidents.over(SILENT, ("nobody",))
    assert told(incidents, 1e6).keys() == {(CUT, ("a", "b"))}


def test_flapping_is_three_ends_within_ten_minutes() -> None:
    incidents = Incidents()
    for at in (0.0, 400.0, 800.0, 1200.0):
        incidents.ended("a", at)
        assert not told(incidents, at)
    incidents.ended("a", 1300.0)
    assert told(incidents, 1300.0)[FLAPPING, ("a",)].evidence["lives"] == 3.0


def test_machines_that_are_taken_away_now_and_then_do_not_flap() -> None:
    incidents = Incidents()
    for at in (0.0, 100.0, 200.0, 300.0):
        incidents.ended("a", at, lived=95.0)
    assert not told(incidents, 300.0)
    for at in (310.0, 320.0, 330.0):
        incidents.ended("a", at, lived=8.0)
    assert (FLAPPING, ("a",)) in told(incidents, 330.0)


def test_lives_that_ended_long_ago_are_not_kept() -> None:
    incidents = Incidents(within=600)
    for number in range(1000):
        incidents.ended(f"p{number}", float(number))
    assert not told(incidents, 1000.0) and len(incidents._ends) <= 601
    told(incidents, 5000.0)
    assert not incidents._ends and not incidents._known


def test_several_who_cannot_read_one_accuse_it_and_one_who_cannot_read_several_does_not() -> None:
    incidents = Incidents()
    incidents.unreadable("a", "x", 0.0)
    incidents.unreadable("b", "x", 0.0)
    assert told(incidents, 1.0).keys() == {(CORRUPT, ("a", "x")), (CORRUPT, ("b", "x"))}
    incidents.unreadable("a", "y", 0.0)
    assert told(incidents, 1.0)[CORRUPT, ("a",)].evidence["accusers"] == 2.0

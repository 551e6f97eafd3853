"""Who is right about a version: claims as a pure value."""

from __future__ import annotations

import pytest

from elastic.parity import Claims


def claims(claimed: dict[str, str], reproduced: dict[str, str] | None = None) -> Claims:
    value = Claims(7)
    for name, held in claimed.items():
        value.claim(name, held, 1.0)
    value.reproduced |= reproduced or {}
    return value


@pytest.mark.parametrize(
    "claimed, disputed, unanimous",
    [({}, False, ""), ({"a": "x"}, False, "x"), ({"a": "x", "b": "x"}, False, "x"), ({"a": "x", "b": "y"}, True, "")],
)
def test_claims_that_differ_are_disputed(claimed: dict[str, str], disputed: bool, unanimous: str) -> None:
    value = claims(claimed)
    assert (value.disputed, value.unanimous) == (disputed, unanimous)


@pytest.mark.parametrize(
    "claimed, electorate, right",
    [
        ({"a": "x", "b": "x", "c": "y"}, "abc", "x"),
        ({"a": "x", "b": "y"}, "ab", ""),  # one against one
        ({"a": "x", "b": "x", "c": "y"}, "abcd", ""),  # half is no majority: d may yet say y
        ({"a": "x", "b": "x", "c": "y"}, "c", "y"),  # only those who could claim count
        ({"a": "x", "b": "x", "c": "y", "d": "y"}, "abcd", ""),
        ({}, "abc", ""),
    ],
)
def test_more_than_half_of_the_electorate_decides(claimed: dict[str, str], electorate: str, right: str) -> None:
    assert claims(claimed).majority(set(electorate)) == right


@pytest.mark.parametrize(
    "claimed, reproduced, right",
    [
        ({"a": "x", "b": "y"}, {"a": "x", "b": "x"}, "x"),  # b gets the other's bits: its own were wrong
        ({"a": "x", "b": "y"}, {"a": "x", "b": ""}, "x"),  # b cannot say
        ({"a": "x", "b": "y"}, {"a": "x"}, "x"),
        ({"a": "x", "b": "y"}, {"a": "x", "b": "y"}, ""),  # both get theirs again
        ({"a": "x", "b": "y"}, {"a": "z", "b": ""}, ""),
        ({"a": "x", "b": "y"}, {}, ""),
        ({"a": "x", "b": "x", "c": "y", "d": "y"}, {"a": "z", "b": "x", "c": "x", "d": "x"}, "x"),
    ],
)
def test_the_only_claim_that_somebody_reproduces_is_proven(
    claimed: dict[str, str], reproduced: dict[str, str], right: str
) -> None:
    assert claims(claimed, reproduced).proven() == right


def test_settling_names_who_was_wrong_and_ends_the_dispute() -> None:
    value = claims({"a": "x", "b": "y", "c": "x", "d": "z"}, {"a": "x"})
    value.asked = 2.0
    assert value.settle("x") == ["b", "d"]
    assert value.claimed == {"a": "x", "c": "x"} and not value.disputed
    assert (value.asked, value.since, value.reproduced) == (None, None, {})


def test_a_dispute_begins_when_claims_come_to_differ() -> None:
    value = Claims(7)
    for when, (name, held) in enumerate((("a", "x"), ("b", "x"), ("c", "y"), ("d", "z"))):
        value.claim(name, held, float(when))
    assert value.since == 2.0


def test_who_has_gone_counts_no_more() -> None:
    value = claims({"a": "x", "b": "y"}, {"b": "y"})
    value.forget("b")
    value.forget("stranger")
    assert value.unanimous == "x" and not value.reproduced


def test_all_are_heard_and_have_recomputed_when_those_who_are_there_have() -> None:
    value = claims({"a": "x", "b": "y"}, {"a": "x"})
    assert value.all_heard({"a", "b"}) and not value.all_heard({"a", "b", "c"})
    assert value.recomputed({"a"}) and not value.recomputed({"a", "b"})

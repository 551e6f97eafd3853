"""What a script reports for the history of its run arrives once and in order, however often it is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.errors import ConfigurationError
from elastic.reports import Reported, Reports, plain

FIELDS: dict[str, Any] = {"round": 0, "step": 0, "loss": 0.0, "time_unix": 0.0, "metrics": {}}


@settings(derandomize=True, deadline=None)
@given(story=st.lists(st.sampled_from(["add", "ask", "lose"]), max_size=60), most=st.integers(1, 8))
def test_nothing_is_repeated_and_only_what_did_not_fit_is_missing(story: list[str], most: int) -> None:
    """lose: an answer that does not arrive."""
    reports, heard, added, taken = Reports(most), 0, 0, list[Reported]()
    for word in [*story, "ask"]:
        if word == "add":
            added += 1
            reports.add(**FIELDS)
            continue
        answer = reports.after(heard)
        if word == "ask":
            taken += answer
            heard = answer[-1].number if answer else heard
    numbers = [each.number for each in taken]
    assert numbers == sorted(set(numbers)) and (not numbers or numbers[-1] == added)
    assert set(numbers) >= set(range(max(1, added - most + 1), added + 1)), "the newest are never dropped"
    if added <= most:
        assert numbers == list(range(1, added + 1))


def test_numbers_of_any_kind_become_plain_ones() -> None:
    given = {"accuracy": torch.tensor(0.5), "steps": 3, "best": True, "note": "ok", "none": None}
    assert plain(given) == {"accuracy": 0.5, "steps": 3, "best": True, "note": "ok", "none": None}


@pytest.mark.parametrize("wrong", [{"x": torch.zeros(2)}, {"x": object()}, {1: 2.0}, [1.0]])
def test_what_is_no_number_by_name_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match="cannot report metrics"):
        plain(wrong)

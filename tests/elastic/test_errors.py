"""Errors keep their place and their meaning when they are pickled within a site."""

from __future__ import annotations

import copy
import pickle

import pytest

from elastic import errors
from elastic.errors import ConfigurationError, ElasticError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ElasticError)]
RETRYABLE = {
    *(
        "Quarantined",
        "NotEnoughPeers",
        "CoordinatorUnavailable",
        "RoundAborted",
        "TransportError",
        "TransferInterrupted",
    )
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_each_makes_the_round_trip(kind: type[ElasticError], protocol: int) -> None:
    error = kind("what to do", peer="eu-1", round=7, epoch=3)
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is kind and str(again) == "what to do"
        assert (again.peer, again.round, again.epoch) == ("eu-1", 7, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_each_is_documented_and_drawn_in_the_tree(kind: type[ElasticError]) -> None:
    assert kind.__doc__ and errors.__doc__ is not None and kind.__name__ in errors.__doc__


def test_only_these_are_worth_a_retry() -> None:
    assert {kind.__name__ for kind in KINDS if kind.retryable} == RETRYABLE


def test_what_is_not_known_is_said_so() -> None:
    error = ElasticError("x")
    assert (error.peer, error.round, error.epoch) == ("", -1, -1)
    assert isinstance(ConfigurationError("x"), ValueError)

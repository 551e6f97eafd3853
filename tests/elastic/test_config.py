"""Configuration refuses what cannot work, and says which field and what to write."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import (
    ENVIRONMENT,
    JoinToken,
    RunPolicy,
    Timeouts,
    check_coordinator,
    check_endpoint,
    check_name,
    environment,
)
from elastic.errors import ConfigurationError, ElasticError


def test_known_variables_are_returned_and_others_ignored() -> None:
    assert environment({"ELASTIC_RUN": "r", "HOME": "/"}) == {"ELASTIC_RUN": "r"}
    assert set(environment(dict.fromkeys(ENVIRONMENT, "x"))) == set(ENVIRONMENT)


@pytest.mark.parametrize("name, hint", [("ELASTIC_JION", "did you mean ELASTIC_JOIN"), ("ELASTIC_ZZZZZZ", "known:")])
def test_an_unknown_variable_is_an_error_with_a_hint(name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}.*{hint}"):
        environment({name: "1"})


@pytest.mark.parametrize("name", ["a", "eu-1", "A.b_c-9", "9", "x" * 63])
def test_names(name: str) -> None:
    assert check_name("peer", name) == name


@pytest.mark.parametrize("name", ["", "-a", ".a", "a b", "a/b", "ü", "x" * 64, "a\n", "../etc"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(ConfigurationError, match=r"peer .* is not a name"):
        check_name("peer", name)


@pytest.mark.parametrize(
    "text, expected", [("h:1", ("h", 1)), ("10.0.0.1:0", ("10.0.0.1", 0)), ("[::1]:65535", ("::1", 65535))]
)
def test_endpoints(text: str, expected: tuple[str, int]) -> None:
    assert check_endpoint("listen", text) == expected


@pytest.mark.parametrize("text", ["", "h", "h:", ":1", "h:x", "h:65536", "h:-1", "h:1/x", "[::1:5", "tcp://h:1"])
def test_what_is_no_endpoint(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"listen .* is not HOST:PORT"):
        check_endpoint("listen", text)


def test_coordinator_addresses() -> None:
    assert check_coordinator("tcp://host:29400") == "tcp://host:29400"
    assert check_coordinator("tcp://[fe80::1]:29400") == "tcp://[fe80::1]:29400"


@pytest.mark.parametrize("address", ["host:1", "http://host:1", "tcp://host", "tcp://:1", "tcp://h:x", ""])
def test_what_is_no_coordinator_address(address: str) -> None:
    with pytest.raises(ConfigurationError, match="coordinator address"):
        check_coordinator(address)


def test_a_token_says_where_the_run_is(tmp_path: Path) -> None:
    token = JoinToken("tcp://host:29400", "c4-1b")
    assert JoinToken.parse(str(token)) == token == JoinToken.parse(f"  {token}\n")
    (tmp_path / "join.token").write_text(f"{token}\n")
    assert JoinToken.parse(f"@{tmp_path / 'join.token'}") == token
    six = JoinToken("tcp://[::1]:29400", "r")
    assert JoinToken.parse(str(six)) == six


@pytest.mark.parametrize(
    "text",
    ["", "x", "elastic://", "elastic://h:1", "elastic://h:1/", "elastic://h/run", "elastic://h:x/run", "http://h:1/run",
     "elastic://h:1/a/b", "elastic://h:1/-", "elastic://[::1/run", "elastic://h:99999/run"],
)  # fmt: skip
def test_what_is_no_token(text: str) -> None:
    with pytest.raises(ConfigurationError):
        JoinToken.parse(text)


@settings(derandomize=True, deadline=None)
@given(text=st.text(max_size=30).map(lambda rest: rest.removeprefix("@")), prefix=st.sampled_from(["", "elastic://"]))
def test_any_text_is_a_token_or_a_configuration_error(text: str, prefix: str) -> None:
    with contextlib.suppress(ConfigurationError):
        JoinToken.parse(prefix + text)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_a_token_file_that_cannot_be_read(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "token"
    if content:
        path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="cannot read the join token"):
        JoinToken.parse(f"@{path}")


@pytest.mark.parametrize("field", ["heartbeat", "chunk", "operation", "round", "grace", "evict_after"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_a_timeout_is_above_zero(field: str, value: float) -> None:
    with pytest.raises(ConfigurationError, match=f"timeout {field} must be above 0"):
        Timeouts(**{field: value})


@pytest.mark.parametrize(
    "fields, low, high",
    [
        ({"heartbeat": 3.0}, "heartbeat", "chunk"),
        ({"chunk": 300.0}, "chunk", "operation"),
        ({"operation": 2000.0}, "operation", "round"),
        ({"evict_after": 2.5}, "chunk", "evict_after"),
    ],
)
def test_timeouts_in_another_order_are_refused_by_name(fields: dict[str, float], low: str, high: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"timeout {low} \(.*\) must be below {high} \("):
        Timeouts(**fields)


@pytest.mark.parametrize(
    "fields",
    [{"min_peers": 0}, {"quorum": 0.0}, {"quorum": 1.1}, {"quorum": float("nan")}, {"max_attempts": 0},
     {"rounds": -1}, {"tokens": -1}],
)  # fmt: skip
def test_an_impossible_policy_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(fields))):
        RunPolicy(**fields)


def test_defaults_are_valid_and_errors_are_value_errors() -> None:
    assert Timeouts().heartbeat < Timeouts().chunk and RunPolicy().quorum == 0.5
    assert issubclass(ConfigurationError, ValueError) and issubclass(ConfigurationError, ElasticError)

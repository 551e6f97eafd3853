"""`elastic config show`: what holds, and where it comes from."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner

from cli import exits
from cli.main import main
from elastic.config import ENVIRONMENT, RunPolicy, Timeouts


def shown(monkeypatch: pytest.MonkeyPatch, **variables: str) -> dict[tuple[str, str], tuple[Any, str]]:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(main, ["config", "show", "--json"])
    assert result.exit_code == exits.OK, result.output
    return {(each["group"], each["name"]): (each["value"], each["source"]) for each in json.loads(result.output)}


def test_defaults_are_those_of_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(monkeypatch)
    assert {source for _, source in found.values()} == {"default"}
    assert {name for group, name in found if group == "environment"} == ENVIRONMENT.keys()
    assert found["timeouts", "chunk"][0] == Timeouts().chunk and found["policy", "quorum"][0] == RunPolicy().quorum
    assert found["links", "stripes"][0] == "auto" and found["faults", "gradient"][0] == "quarantine"


def test_what_a_variable_says_holds_and_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(monkeypatch, ELASTIC_STRIPES="8", ELASTIC_SITE="eu")
    assert found["links", "stripes"] == (8, "ELASTIC_STRIPES")
    assert found["environment", "ELASTIC_SITE"] == ("eu", "ELASTIC_SITE")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ELASTIC_STRIPS", "8", "did you mean ELASTIC_STRIPES"),
        ("ELASTIC_STRIPES", "99", "choose 1 to 64"),
        ("ELASTIC_WITNESS", "yes", "must be 0 or 1"),
        ("ELASTIC_JOIN", "http://x", "a join token looks like"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, words: str
) -> None:
    monkeypatch.setenv(variable, value)
    result = CliRunner().invoke(main, ["config", "show"])
    assert result.exit_code == exits.USAGE and words in result.output and result.output.count("\n") == 1


def test_people_get_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_STRIPES", "8")
    output = CliRunner().invoke(main, ["config", "show"]).output
    assert "ELASTIC_STRIPES" in output and "evict_after" in output and "\x1b" not in output

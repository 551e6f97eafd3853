"""`elastic config show`: what a peer or coordinator that starts here would go by, and where each value comes from."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from collectives.sockets import LinkOptions
from elastic.config import ENVIRONMENT, FaultPolicy, JoinToken, RunPolicy, Timeouts, environment, switched
from elastic.errors import ConfigurationError

from . import exits
from .view import clean

DEFAULT = "default"
# What an unset variable comes to. Without an entry: nothing, or the variable says so itself.
UNSET = {
    "ELASTIC_NAME": "HOSTNAME-PID",
    "ELASTIC_SITE": "local",
    "ELASTIC_LISTEN": "127.0.0.1:0",
    "ELASTIC_ADVERTISE": "as ELASTIC_LISTEN",
    "ELASTIC_LANES": "1",
    "ELASTIC_WITNESS": "1",
}
GROUPS: dict[str, tuple[Any, str]] = {
    "timeouts": (Timeouts, "Peer(timeouts=...), Coordinator(timeouts=...)"),
    "links": (LinkOptions, "Peer(options=...)"),
    "policy": (RunPolicy, "Coordinator(policy=...), elastic coordinator"),
    "faults": (FaultPolicy, "RunPolicy(faults=...), elastic coordinator --on-fault"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """group: by what it is set in Python; "environment" for variables. source: a variable, or "default"."""

    group: str
    name: str
    value: Any
    source: str


@click.group(epilog="Example: elastic config show --json")
def command() -> None:
    """Show what is set, and by what."""


@command.command(epilog="Example: ELASTIC_STRIPES=8 elastic config show")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(as_json: bool) -> None:
    """Show the values that hold here for a script that gives no arguments, and where each comes from.

    Arguments of a script, and options of a command, win over the environment. Exits with 2 if a variable is unknown,
    or cannot be.
    """
    try:
        found = list(settings(environment()))
    except (ConfigurationError, ValueError) as error:
        click.echo(f"elastic config: {clean(str(error))}", err=True)
        sys.exit(exits.USAGE)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(each) for each in found]))
    else:
        _print(found)


def settings(env: Mapping[str, str]) -> Iterator[Setting]:
    """Raises ConfigurationError or ValueError for a value that cannot be."""
    _check(env)
    for name in ENVIRONMENT:
        yield Setting("environment", name, env.get(name, UNSET.get(name)), name if name in env else DEFAULT)
    for group, (kind, _) in GROUPS.items():
        made = LinkOptions(stripes=_stripes(env)) if kind is LinkOptions else kind()
        for field in dataclasses.fields(made):
            value = getattr(made, field.name)
            by_variable = (group, field.name) == ("links", "stripes") and "ELASTIC_STRIPES" in env
            if not dataclasses.is_dataclass(value):
                yield Setting(group, field.name, value, "ELASTIC_STRIPES" if by_variable else DEFAULT)


def _check(env: Mapping[str, str]) -> None:
    if "ELASTIC_JOIN" in env:
        JoinToken.parse(env["ELASTIC_JOIN"])
    for variable in ("ELASTIC_LANES", "ELASTIC_WITNESS"):
        switched(variable, env)


def _stripes(env: Mapping[str, str]) -> int | str:
    text = env.get("ELASTIC_STRIPES", LinkOptions().stripes)
    return int(text) if str(text).isdecimal() else text


def _print(found: list[Setting]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for group in ("environment", *GROUPS):
        by = f"  {GROUPS[group][1]}" if group in GROUPS else "  variables of this shell"
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name in (group, "value", "from"):
            table.add_column(name, no_wrap=True)
        for each in found:
            if each.group == group:
                style = "" if each.source == DEFAULT else "bold green"
                table.add_row(each.name, Text(clean(_text(each.value)), style=style), each.source)
        console.print(Text.assemble((group, "bold"), (by, "dim")))
        console.print(table)


def _text(value: Any) -> str:
    return "-" if value is None or value == "" else str(value)

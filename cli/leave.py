"""`elastic leave`: asks a peer or a site to leave a run in good order, and waits until it has."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from elastic.config import JoinToken, environment
from elastic.errors import ConfigurationError

from . import exits
from .screen import refuse, refusing, say
from .view import clean

if TYPE_CHECKING:
    from elastic.messages import LeaveAsked, StatusReport

LOOK_SECONDS = 0.5
ASK_SECONDS = 10.0


@click.command()
@click.argument("name")
@click.argument("token", required=False)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Seconds to wait until they have left.",
)
@click.option(
    "--drain-seconds",
    type=click.FloatRange(0, min_open=True),
    default=20.0,
    show_default=True,
    help="What each of them gets for one last exchange.",
)
@click.option("--no-wait", is_flag=True, help="Do not wait until they have left.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(name: str, token: str | None, timeout: float, drain_seconds: float, no_wait: bool, as_json: bool) -> None:
    """Ask the peer NAME, or else all peers of the site NAME, to leave: each makes one last exchange and ends.

    A supervisor does not start them again; a site's supervisor ends with them. Whoever leaves may come back later.
    TOKEN is elastic://HOST:PORT/RUN or @FILE; without it, ELASTIC_JOIN counts. Exits with 0; with 1 if they have not
    left in time, 2 if nobody has that name, 4 if the coordinator does not answer.

    \b
    Example:
      elastic leave eu-1 elastic://192.0.2.10:29400/c4-1b
    """
    with refusing("leave"):
        asked, left = _leave(name, _where(token), timeout, drain_seconds, wait=not no_wait)
    _tell(asked, left, timeout, wait=not no_wait, as_json=as_json)


def _where(token: str | None) -> JoinToken:
    text = token or environment().get("ELASTIC_JOIN")
    if not text:
        raise ConfigurationError("say which run: elastic leave NAME TOKEN, or set ELASTIC_JOIN")
    return JoinToken.parse(text)


def _leave(
    name: str, where: JoinToken, timeout: float, seconds: float, *, wait: bool
) -> tuple[LeaveAsked, dict[str, str]]:
    """The first answer, and how those that have not left after `timeout` seconds were then. Raises ElasticError."""
    from elastic.inquiry import inquire
    from elastic.messages import StatusReport, StatusRequest

    deadline = time.monotonic() + timeout
    asked = _ask(name, where, timeout, seconds)
    generation, staying = asked.generation, dict.fromkeys(asked.lives, "")
    while wait and staying:
        report = inquire(where, StatusRequest, StatusReport, max(ASK_SECONDS, deadline - time.monotonic()))
        staying = _staying(report, asked)
        if time.monotonic() > deadline:
            break
        if staying and report.generation != generation:  # its next life does not know that they were asked
            generation = report.generation
            for each in staying:
                with suppress(ConfigurationError):  # it has just left
                    _ask(each, where, ASK_SECONDS, seconds)
        time.sleep(LOOK_SECONDS if staying else 0.0)
    return asked, staying if wait else {}


def _ask(name: str, where: JoinToken, timeout: float, seconds: float) -> LeaveAsked:
    from elastic.inquiry import inquire
    from elastic.messages import LeaveAsked, LeaveRequest

    return inquire(where, LeaveRequest, LeaveAsked, min(ASK_SECONDS, timeout), name=name, seconds=seconds)


def _staying(report: StatusReport, asked: LeaveAsked) -> dict[str, str]:
    """Who of those that were asked is still there in the same life, and why that may be."""
    found = {}
    for member in report.members:
        if asked.lives.get(member.name) == member.life:
            silent = f"not heard of for {member.silence:.0f} s"
            found[member.name] = (
                silent if member.state == "suspect" else f"{member.status.state}, step {member.status.step}"
            )
    return found


def _tell(asked: LeaveAsked, staying: dict[str, str], timeout: float, *, wait: bool, as_json: bool) -> None:
    code = exits.FAILED if staying else exits.OK
    if as_json:
        facts: dict[str, Any] = {"run": asked.run, "asked": sorted(asked.lives), "supervisors": asked.supervisors}
        say(json.dumps(facts | {"waited": wait, "staying": staying}))
    elif not staying:
        names = clean(", ".join(sorted(asked.lives))) or "nobody but the supervisor"
        say(f"{'left' if wait and asked.lives else 'asked to leave'}: {names}")
    if staying:
        still = "; ".join(f"{name} ({how})" for name, how in sorted(staying.items()))
        words = f"not left after {timeout:g} s: {still}. A script ends when peer.stopping says so, or its data ends"
        refuse("leave", code, clean(words))
    sys.exit(code)

"""`elastic doctor`: whether this machine can take part in a run, and what to set."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from collectives.sockets import parse_address
from elastic.config import JoinToken
from elastic.errors import ConfigurationError, TransportError

from . import exits
from .screen import refuse
from .stopping import told_to_stop
from .view import clean

if TYPE_CHECKING:
    from elastic.doctor.facts import Call, Machine
    from elastic.doctor.judging import Finding, Setting

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}
MOST_SECONDS = 30.0


@click.command(epilog="Example: elastic doctor @run.token --with host:29555")
@click.argument("token", required=False)
@click.option("--serve", metavar="HOST:PORT", help="Be the other side: wait here for doctors of other machines.")
@click.option("--with", "other", metavar="HOST:PORT", help="Measure the way to the doctor that --serve runs there.")
@click.option(
    "--seconds",
    type=click.FloatRange(0.1, MOST_SECONDS),
    default=2.0,
    show_default=True,
    help="Of each measurement of bandwidth; there are up to 36.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the coordinator.",
)
@click.option("--gpu", is_flag=True, help="Look for GPUs, too: that loads torch.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    token: str | None,
    serve: str | None,
    other: str | None,
    seconds: float,
    timeout: float,
    gpu: bool,
    as_json: bool,
) -> None:
    """Say whether this machine can take part in a run, and what to set.

    It looks at this machine; with TOKEN (elastic://HOST:PORT/RUN or @FILE; else ELASTIC_JOIN) also at the run's
    coordinator; and between two machines it measures round trip, clocks, path and bandwidth: run --serve on one and
    --with on the other, while nothing trains. Who serves dials back to the addresses that the visitor names.

    Exits with 0, with 1 if something is a problem, 2 if an argument is wrong, 4 if the coordinator or the other doctor
    is not reached.
    """
    if serve is not None and (token or other):
        refuse("doctor", exits.USAGE, "--serve goes without TOKEN and --with")
    if serve is not None:
        _serve(serve)
        return
    try:
        where = _where(token)
        if other is not None:
            parse_address(other)
    except (ConfigurationError, ValueError) as error:
        refuse("doctor", exits.USAGE, clean(str(error)))
    try:
        examination = _Examination(where, None if as_json else Console(highlight=False, soft_wrap=True))
        examination.make(other, seconds=seconds, timeout=timeout, gpu=gpu)
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    examination.end()


def _where(token: str | None) -> JoinToken | None:
    """Raises ConfigurationError if the argument is none. What is wrong with ELASTIC_JOIN is a finding."""
    if token:
        return JoinToken.parse(token)
    try:
        return JoinToken.parse(os.environ["ELASTIC_JOIN"])
    except (KeyError, ConfigurationError):
        return None


def _serve(address: str) -> None:
    from elastic.doctor.hosting import Host
    from elastic.doctor.machine import look, side

    with told_to_stop(signal.SIGINT, signal.SIGTERM) as stop:
        try:
            host = Host(address, side(look(Path.cwd())), lambda line: click.echo(clean(line)))
        except ValueError as error:
            refuse("doctor", exits.USAGE, clean(str(error)))
        except OSError as error:
            refuse(
                "doctor", exits.NETWORK, clean(f"cannot listen on {address}: {error.strerror or error}; choose another")
            )
        with host:
            port = host.address.rpartition(":")[2]
            click.echo(f"on {host.address}; on the other machine: elastic doctor --with ADDRESS-OF-THIS-MACHINE:{port}")
            host.serve(stop)


class _Examination:
    """What was found so far. console: where it is printed meanwhile; None for JSON in the end."""

    def __init__(self, where: JoinToken | None, console: Console | None) -> None:
        self._where, self._console = where, console
        self._findings: list[Finding] = []
        self._facts: dict[str, Any] = {}
        self._reached = True

    def make(self, other: str | None, *, seconds: float, timeout: float, gpu: bool) -> None:
        from elastic.doctor.calling import call
        from elastic.doctor.judging import judge_call, judge_machine, listening
        from elastic.doctor.machine import look

        machine = look(Path.cwd(), gpus=gpu)
        self._add("machine", machine, judge_machine(machine))
        if self._where is not None:
            found = call(self._where, timeout)
            self._reached = not found.silent
            self._add("run", found, judge_call(found, machine.protocol))
            self._add("run", found, [listening(machine, self._where.coordinator, _local(found))])
        if other is not None:
            self._visit(other, machine, seconds)

    def _visit(self, other: str, machine: Machine, seconds: float) -> None:
        from elastic.doctor.judging import problem
        from elastic.doctor.paths import judge_pair
        from elastic.doctor.visiting import visit

        try:
            pair = visit(other, machine, seconds, self._tell)
        except TransportError as error:
            self._reached = False
            advice = "see that it runs, and that firewalls let the port through"
            self._add("pair", None, [problem("other side", str(error), advice)])
            return
        self._add("pair", pair, judge_pair(pair))

    def _tell(self, line: str) -> None:
        """For whoever watches: it takes a minute or two."""
        if self._console is not None and sys.stderr.isatty():
            click.echo(f"  {clean(line)}", err=True)

    def _add(self, what: str, facts: Any, findings: Iterable[Finding]) -> None:
        self._facts[what] = dataclasses.asdict(facts) if facts is not None else None
        for each in findings:
            self._findings.append(each)
            if self._console is not None:
                self._console.print(_line(each))

    def end(self) -> None:
        from elastic.doctor.judging import PROBLEM, recommended

        settings = recommended(self._findings)
        if self._console is None:
            click.echo(json.dumps(self._plain(settings)))
        else:
            self._print(settings)
        bad = any(each.level == PROBLEM for each in self._findings)
        sys.exit(exits.NETWORK if not self._reached else exits.FAILED if bad else exits.OK)

    def _plain(self, settings: Iterable[Setting]) -> dict[str, Any]:
        fields = ("check", "level", "fact", "advice")
        checks = [{name: getattr(each, name) for name in fields} for each in self._findings]
        wanted = [{"by": each.kind, "name": each.name, "value": each.value} for each in settings]
        return {"checks": checks, "settings": wanted, "facts": self._facts}

    def _print(self, settings: tuple[Setting, ...]) -> None:
        assert self._console is not None
        if settings:
            self._console.print(Text("recommended settings", style="bold"))
        for line in _settings(settings):
            self._console.print(Text(f"  {clean(line)}"))


def _local(call: Call) -> str:
    return next((each.local for each in call.addresses if each.local), "")


def _line(finding: Finding) -> Text:
    advice = f"  -> {clean(finding.advice)}" if finding.advice else ""
    words = f" {finding.check}: {clean(finding.fact)}{advice}"
    return Text.assemble((f"{finding.level:<7}", STYLES[finding.level]), words)


def _settings(settings: Iterable[Setting]) -> Iterable[str]:
    from elastic.doctor.judging import LINKS, SYSCTL, VARIABLE

    of = {kind: [each for each in settings if each.kind == kind] for kind in (SYSCTL, VARIABLE, LINKS)}
    yield from (f"sysctl -w {each.name}='{each.value}'" for each in of[SYSCTL])
    yield from (f"export {each.name}={each.value}" for each in of[VARIABLE])
    if of[LINKS]:
        yield f"elastic.LinkOptions({', '.join(f'{each.name}={each.value}' for each in of[LINKS])})"

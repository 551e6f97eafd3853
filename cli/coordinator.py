"""`elastic coordinator`: serves one run until it is stopped."""

from __future__ import annotations

import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from elastic.chaos import asked_for, take_orders
from elastic.config import (
    ACTIONS,
    FAULT_CLASSES,
    TARGETS,
    FaultPolicy,
    JoinToken,
    RunPolicy,
    check_coordinator,
    environment,
)
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError
from fault.orders import COORDINATOR

from . import exits
from .screen import refuse
from .stopping import told_to_stop

LOOK_SECONDS = 0.2
ASK_SECONDS = 15.0  # how long a recovery waits for a majority before it asks


@click.command()
@click.option("--run", required=True, metavar="NAME", help="Name of the run.")
@click.option(
    "--bind",
    default="127.0.0.1:29400",
    show_default=True,
    metavar="HOST:PORT",
    help="Where to listen; PORT 0 picks one. Peers of other machines need an address that they can reach.",
)
@click.option(
    "--advertise",
    metavar="HOST:PORT",
    help="What peers dial, if that differs: it goes into the token.  [default: as --bind]",
)
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File by which a restarted coordinator knows the run.  [default: elastic-NAME.sqlite]",
)
@click.option("--no-journal", is_flag=True, help="Keep nothing: if this process ends, the run is over.")
@click.option("--events", type=click.Path(dir_okay=False, path_type=Path), help="JSONL file for the run's events.")
@click.option("--token", type=click.Path(dir_okay=False, path_type=Path), help="File to write the join token to.")
@click.option("--min-peers", type=click.IntRange(1), default=1, show_default=True, help="Rounds wait for so many.")
@click.option(
    "--quorum",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Part of the peers that must be ready before a round opens.",
)
@click.option(
    "--redundancy",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many peers read each part of the data: with 2, rounds wait for the faster of two twins only.",
)
@click.option("--rounds", type=click.IntRange(0), default=0, help="The run is over after so many outer rounds.")
@click.option("--tokens", type=click.IntRange(0), default=0, help="... so many tokens.")
@click.option("--seconds", type=click.FloatRange(0), default=0.0, help="... this time.")
@click.option("--loss", type=click.FloatRange(0), default=0.0, help="... at this held-out loss.")
@click.option(
    "--on-fault",
    multiple=True,
    metavar="CLASS=ACTION",
    help="What may follow from a verdict at the most; can be given again. CLASS: "
    f"{', '.join(FAULT_CLASSES)}. ACTION: {', '.join(ACTIONS)}.",
)
@click.option(
    "--quarantine",
    type=click.FloatRange(0, min_open=True),
    default=30.0,
    show_default=True,
    help="Seconds of a peer's first quarantine; each further one is twice as long.",
)
@click.option("--recover", is_flag=True, help="Journal and host are lost: rebuild the run from what its peers know.")
@click.option("--accept-minority", is_flag=True, help="With --recover: do not ask if a majority does not come in 15 s.")
def command(**options: Any) -> None:
    """Run a coordinator: who is in, what is committed, where the data stands.

    Prints where the run is; peers find it by that line. Stopped and started again with the same journal and address,
    it goes on where it was, and so does everybody else. Ctrl-C or SIGTERM end it; peers keep training meanwhile.

    \b
    Example:
      elastic coordinator --run demo --rounds 100
      elastic coordinator --run demo --bind 0.0.0.0:29401 --journal new.sqlite --recover
    """
    with (
        told_to_stop(signal.SIGINT, signal.SIGTERM) as stop,
        _open(options) as coordinator,
        _taking_orders(coordinator),
    ):
        _say_where(_token(coordinator, options["advertise"]), options["token"])
        if options["recover"]:
            _recover(coordinator, stop, options["accept_minority"])
        while not stop.wait(LOOK_SECONDS) and coordinator.error is None:
            pass
    if coordinator.error is not None:
        refuse("coordinator", exits.FAILED, f"stopped by {type(coordinator.error).__name__}: {coordinator.error}")


def _open(options: dict[str, Any]) -> Coordinator:
    journal = None if options["no_journal"] else options["journal"] or Path(f"elastic-{options['run']}.sqlite")
    try:
        return Coordinator(
            f"tcp://{options['bind']}",
            run=options["run"],
            policy=RunPolicy(
                faults=_faults(options["on_fault"], options["quarantine"]),
                **{name: options[name] for name in ("min_peers", "quorum", "redundancy", *TARGETS)},
            ),
            journal=journal,
            events=options["events"],
            recover=options["recover"],
            faults=asked_for(environment(), None, COORDINATOR),
        )
    except ConfigurationError as error:
        refuse("coordinator", _code(str(error)), str(error))


def _faults(chosen: tuple[str, ...], seconds: float) -> FaultPolicy:
    """Raises ConfigurationError."""
    actions: dict[str, Any] = {}
    for each in chosen:
        name, _, action = each.partition("=")
        if name not in FAULT_CLASSES:
            raise ConfigurationError(f"--on-fault {each!r}: there is no class {name!r}; use {', '.join(FAULT_CLASSES)}")
        actions[name] = action.replace("-", " ")
    return FaultPolicy(quarantine_seconds=seconds, **actions)


@contextmanager
def _taking_orders(coordinator: Coordinator) -> Iterator[None]:
    """For faults on purpose, if ELASTIC_CHAOS says so."""
    where = {"name": COORDINATOR, "role": COORDINATOR, "run": coordinator.run}
    try:
        station = take_orders(environment(), coordinator.faults, incarnation=secrets.randbits(63) | 1, **where)
    except ConfigurationError as error:
        refuse("coordinator", exits.OUTPUT, str(error))
    try:
        yield
    finally:
        if station is not None:
            station.close()


def _code(message: str) -> int:
    if message.startswith("cannot listen"):
        return exits.NETWORK
    return exits.DATA if "journal" in message else exits.USAGE


def _token(coordinator: Coordinator, advertise: str | None) -> JoinToken:
    if not advertise and any(every in coordinator.address for every in ("//0.0.0.0:", "//[::]:")):
        click.echo("elastic coordinator: no other machine can dial this token: say --advertise HOST:PORT", err=True)
    try:
        return JoinToken(check_coordinator(f"tcp://{advertise}"), coordinator.run) if advertise else coordinator.token
    except ConfigurationError as error:
        refuse("coordinator", exits.USAGE, f"--advertise: {error}")


def _say_where(token: JoinToken, file: Path | None) -> None:
    """The file first: whoever has read the line finds it."""
    if file is not None:
        try:
            file.write_text(f"{token}\n", encoding="utf-8")
        except OSError as error:
            refuse("coordinator", exits.OUTPUT, f"cannot write {file}: {error.strerror}")
    click.echo(f"ELASTIC_JOIN={token}")


def _recover(coordinator: Coordinator, stop: threading.Event, accept: bool) -> None:
    """Says who has come, and asks if those stay too few."""
    waited, told = 0.0, None
    while (gathered := coordinator.recovering) is not None and not stop.wait(LOOK_SECONDS):
        present, view = gathered
        if gathered != told:
            click.echo(f"recovering: {len(present)} of {len(view)} peers of the last view have come: {_names(present)}")
            told, waited = gathered, 0.0
        waited += LOOK_SECONDS
        if present and waited > ASK_SECONDS:
            waited = 0.0
            _ask(coordinator, present, view, accept)
    if coordinator.recovering is None:
        status = coordinator.status()
        click.echo(f"recovered: {status.progress.rounds} rounds, {status.progress.tokens} tokens are committed")


def _ask(coordinator: Coordinator, present: tuple[str, ...], view: tuple[str, ...], accept: bool) -> None:
    missing = _names(tuple(name for name in view if name not in present))
    question = f"no majority: {missing} are missing. What only they saw committed would be lost. Go on without them?"
    if accept or (sys.stdin.isatty() and click.confirm(question)):
        coordinator.accept_minority()
    elif not sys.stdin.isatty():
        click.echo(f"no majority: {missing} are missing; still waiting (--accept-minority goes on without them)")


def _names(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nobody"

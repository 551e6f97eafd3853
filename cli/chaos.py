"""`elastic chaos`: faults on purpose, by a schedule, in processes of a run on this machine; each is accounted for."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import click

from elastic.config import environment
from elastic.errors import ConfigurationError
from fault.driver import Absent, Driver, Injected, all_fired
from fault.schedule import ScheduleError, load

from . import exits
from .screen import refuse
from .stopping import told_to_stop


@click.command()
@click.argument("schedule", type=click.Path(path_type=Path))
@click.option(
    "--dir",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where the processes of the run register.  [default: ELASTIC_CHAOS]",
)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="No fault begins later than this.")
@click.option(
    "--seed", type=int, help='Of who is meant by "any", and of jitter.  [default: as the schedule says, or 0]'
)
@click.option(
    "--wait",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    help="Seconds until all targets must have registered.",
)
@click.option(
    "--patience",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds that a fault waits for its target, and for its occasion.",
)
@click.option("--check", is_flag=True, help="Only check the schedule.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    schedule: Path,
    folder: Path | None,
    seconds: float | None,
    seed: int | None,
    wait: float,
    patience: float,
    check: bool,
    as_json: bool,
) -> None:
    """Inject the faults of SCHEDULE, a TOML file, into processes of this machine that run with ELASTIC_CHAOS=DIR.

    The whole schedule is checked first. Exits with 0 if every fault has fired, with 1 if one has not; with 3 for a
    schedule that cannot be, 4 if targets do not register in time, 5 if DIR cannot be used. Ctrl-C thaws what is frozen,
    calls off the rest, and ends with 130.

    \b
    Example:
      ELASTIC_CHAOS=/tmp/chaos elastic coordinator --run drill &     # the peers likewise
      elastic chaos examples/chaos.toml --dir /tmp/chaos
    \b
    A schedule:
      [[fault]]
      at = 5.0
      kind = "freeze"          # kill, freeze, hang, slow, nan, scale, flip, delay,
      target = "any"           # slow-link, drop, corrupt, partition, full-disk
      for = 3.0
    """
    try:
        plan = load(schedule)
        plan.due(seconds=seconds)
        if check:
            click.echo(f"{schedule}: {len(plan.entries)} faults, nothing wrong")
            return
        where = folder or _from_environment()
        driver = Driver(
            plan, where, seed=seed, seconds=seconds, patience=patience, say=lambda each: None if as_json else _say(each)
        )
    except ScheduleError as error:
        refuse("chaos", exits.DATA, str(error))
    except ConfigurationError as error:
        refuse("chaos", exits.USAGE, str(error))
    except OSError as error:
        refuse("chaos", exits.OUTPUT, str(error))
    _drive(driver, wait, as_json)


def _from_environment() -> Path:
    folder = environment().get("ELASTIC_CHAOS")
    if not folder:
        raise ConfigurationError("say where the processes register: --dir DIR, or ELASTIC_CHAOS")
    return Path(folder)


def _drive(driver: Driver, wait: float, as_json: bool) -> None:
    with told_to_stop(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as stop:
        try:
            driver.wait_for_targets(stop, wait)
        except Absent as error:
            refuse("chaos", exits.NETWORK, str(error))
        records = driver.run(stop)
        if as_json:
            click.echo(json.dumps({"faults": [asdict(each) for each in records], "all_fired": all_fired(records)}))
        else:
            _show(records)
        interrupted = stop.is_set()
    sys.exit(exits.INTERRUPTED if interrupted else exits.OK if all_fired(records) else exits.FAILED)


def _say(record: Injected) -> None:
    click.echo(f"{record.at or 0.0:8.2f} s  {record.kind} {record.target}" + (f": {record.why}" if record.why else ""))


def _show(records: list[Injected]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD)
    for name, side in (("#", "right"), ("fault", "left"), ("target", "left"), ("at", "right"), ("fired", "right")):
        table.add_column(name, justify="right" if side == "right" else "left")
    table.add_column("")
    for each in records:
        at = "-" if each.at is None else f"{each.at:.2f} s"
        table.add_row(str(each.number), each.kind, each.target, at, str(each.fired), each.why)
    Console(highlight=False, markup=False).print(table)
    missed = sum(not each.fired for each in records)
    click.echo(f"{len(records) - missed} of {len(records)} faults fired")

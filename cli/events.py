"""`elastic events`: what has happened in a run, from its event logs, as it happens too."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.text import Text

from . import exits
from .logs import Event, LogError, Logs, chosen, whole_story
from .screen import refuse, say
from .view import clean, describe, event_style

LOOK_SECONDS = 0.2


@click.command(epilog="Example: elastic events runs/demo/events --only 'round.*' --follow")
@click.argument("paths", nargs=-1, required=True, metavar="FILE|FOLDER...", type=click.Path(path_type=Path))
@click.option("--follow", "-f", is_flag=True, help="Go on as more is written, until Ctrl-C.")
@click.option("--only", multiple=True, metavar="PATTERN", help="Names of events, * for any part; can be given again.")
@click.option("--peer", "peers", multiple=True, metavar="NAME", help="Told by this peer, or about it; repeatable.")
@click.option("--last", type=click.IntRange(1), metavar="N", help="Only the last N of them.")
@click.option("--json", "as_json", is_flag=True, help="Print the events themselves, one JSON object a line.")
def command(paths: tuple[Path, ...], follow: bool, last: int | None, as_json: bool, **choice: Any) -> None:
    """Show what has happened in a run.

    FILE is an event log; of a FOLDER, all its *.jsonl are merged by time (clocks of several machines may differ).
    Exits with 0; with 3 if a log cannot be read, or holds no events.
    """
    try:
        logs = Logs(paths)
        events, cut_off = (logs.read(), []) if follow else whole_story(paths)
    except LogError as error:
        refuse("events", exits.DATA, clean(str(error)))
    for path in cut_off:
        say(
            f"elastic events: {clean(str(path))} ends in the middle of a line: what wrote it was killed, or is writing",
            err=True,
        )
    show = Printer(as_json)
    try:
        show(list(chosen(events, **choice))[-last if last else None :])
        while follow:
            time.sleep(LOOK_SECONDS)
            show(chosen(logs.read(), **choice))
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    except BrokenPipeError:  # `| head`: what is still in the buffer goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Printer:
    """One line per event."""

    def __init__(self, as_json: bool) -> None:
        self._json = as_json
        self._console = Console(highlight=False, soft_wrap=True)

    def __call__(self, events: Iterable[Event]) -> None:
        for event in events:
            if self._json:
                click.echo(json.dumps(event))
            else:
                self._console.print(line(event))


def line(event: Event) -> Text:
    at = datetime.fromtimestamp(event["time_unix"]).strftime("%m-%d %H:%M:%S.%f")[:-3]
    return Text.assemble((f"{at}  ", "dim"), (describe(event), event_style(event)))

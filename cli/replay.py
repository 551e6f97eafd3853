"""`elastic replay`: the live view of a run that is over, from its event logs, at any speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from . import exits
from .logs import Event, LogError, whole_story
from .story import Story
from .view import View, clean, make_view


@click.command(epilog="Example: elastic replay runs/demo/events --speed 20")
@click.argument("paths", nargs=-1, required=True, metavar="FILE|FOLDER...", type=click.Path(path_type=Path))
@click.option(
    "--speed",
    type=click.FloatRange(0),
    default=10.0,
    show_default=True,
    help="So many seconds of the run in one; 0: as fast as it goes.",
)
@click.option(
    "--longest-pause", type=click.FloatRange(0), default=2.0, show_default=True, help="Seconds, however long it was."
)
def command(paths: tuple[Path, ...], speed: float, longest_pause: float) -> None:
    """Show again how a run went: its peers, rounds and faults, as the live view did.

    FILE is an event log; of a FOLDER, all its *.jsonl are merged by time. Exits with 0; with 3 if a log cannot be read.
    """
    try:
        events, _ = whole_story(paths)
    except LogError as error:
        click.echo(f"elastic replay: {clean(str(error))}", err=True)
        sys.exit(exits.DATA)
    view = make_view(run=str(events[0].get("run", "")))
    try:
        play(events, view, pace(speed, longest_pause))
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)
    finally:
        view.close()


def pace(speed: float, longest: float) -> Callable[[float], None]:
    """What to do about so many seconds in which nothing happened."""
    return lambda seconds: time.sleep(min(longest, seconds / speed)) if speed and seconds > 0 else None


def play(events: Sequence[Event], view: View, pause: Callable[[float], None]) -> Story:
    story, last = Story(), events[0]["time_unix"]
    for event in events:
        pause(event["time_unix"] - last)
        last = event["time_unix"]
        story.tell(event)
        view.update(story.now())
        view.event(event)
    return story

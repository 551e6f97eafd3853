"""`elastic replay`: the live view of a run that is over, from its event logs, at any speed; or its rounds, verified."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import exits
from .logs import Event, LogError, whole_story
from .screen import refuse
from .story import Story
from .view import View, clean, make_view

if TYPE_CHECKING:
    from elastic.outer.verifying import Verified


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
@click.option("--verify", is_flag=True, help="Recompute the outer states from what was recorded, and compare.")
@click.option("--checkpoint", metavar="URL", help="--verify: begin there, instead of where the record does.")
def command(paths: tuple[Path, ...], speed: float, longest_pause: float, verify: bool, checkpoint: str | None) -> None:
    """Show again how a run went: its peers, rounds and faults, as the live view did.

    FILE is an event log; of a FOLDER, all its *.jsonl are merged by time. With --verify, FOLDERs in which peers have
    recorded (ELASTIC_RECORD, or the loop's record=...): each round is made once more, and the first round and peer
    that differ are named. Exits with 0; with 3 if a log cannot be read, or a peer held a state that it should not have.
    """
    try:
        events, _ = whole_story(paths)
        if verify:
            sys.exit(exits.OK if _verify(paths, events, checkpoint) else exits.DATA)
    except LogError as error:
        refuse("replay", exits.DATA, clean(str(error)))
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


# --- verifying --------------------------------------------------------------------------------------------------------


def _verify(paths: Sequence[Path], events: Sequence[Event], checkpoint: str | None) -> bool:
    """Says what comes out of each record; whether all is as it should be. LogError if there is nothing to say."""
    from elastic.errors import ElasticError
    from elastic.outer.recorder import records
    from elastic.outer.verifying import verify

    try:
        found = [record for path in paths for record in records(path if path.is_dir() else path.parent)]
        if not found:
            raise LogError(f"nothing was recorded beside {paths[0]}: set ELASTIC_RECORD=N for a peer of the run")
        base = _state_at(checkpoint) if checkpoint else None
        verdicts = [(record, verify(record, events, base)) for record in found]
    except ElasticError as error:
        raise LogError(str(error)) from None
    for record, verdict in verdicts:
        for line in account(record.loop.peer, verdict):
            click.echo(clean(line))
    return all(verdict.passed for _, verdict in verdicts)


def _state_at(url: str) -> Any:
    """The outer state of a checkpoint: of several, the oldest. Raises ElasticError or LogError."""
    from elastic.checkpoints.entries import find
    from elastic.outer.state import State

    entries = find(url)
    if not entries:
        raise LogError(f"there is no checkpoint at {url}")
    return State(entries[-1].outer().versions)


def account(peer: str, found: Verified) -> Iterator[str]:
    """For people."""
    compared = ", ".join(f"{name} {count}" for name, count in sorted(found.compared.items())) or "none"
    yield (
        f"{found.run}/{found.tag}, as {peer} recorded it: versions {found.first} to {found.last} recomputed; "
        f"states compared: {compared}"
    )
    if found.gap:
        yield f"  not all of it: {found.gap}"
    if not found.divergences:
        yield "  every peer held the state that follows from the rounds"
        return
    first = found.divergences[0]
    yield (
        f"  first divergence: round {first.round}, version {first.version}, {first.peer} held {first.held} "
        f"instead of {first.expected}"
    )
    others = Counter(each.peer for each in found.divergences)
    yield "  in all: " + ", ".join(f"{name} {count} times" for name, count in others.most_common())

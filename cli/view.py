"""What a run looks like while it runs: a live table on a terminal, plain log lines anywhere else.

Both are fed the same two things: snapshots (the state now) and events (what happened). Names and evidence come from
other machines, so nothing unprintable in them reaches the terminal.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

Event = Mapping[str, Any]

EVENTS_SHOWN = 6
STATUS_SECONDS = 10.0
HISTORY = 40
BARS = "▁▂▃▄▅▆▇█"
# They come many times a round; their content is in the table and the header.
QUIET = frozenset({"train.loss", "heldout.evaluated", "round.started", "round.applied", "peer.started"})
STATE_STYLES = {
    "training": "green",
    "exchanging": "cyan",
    "waiting": "blue",
    "joining": "yellow",
    "fetching": "yellow",
    "starting": "yellow",
    "suspect": "magenta",
    "left out": "magenta",
    "probation": "yellow",
    "leaving": "dim",
    "finished": "bold green",
    "killed": "bold red",
    "lost": "bold red",
    "dead": "bold red",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerRow:
    """One peer now. life counts its incarnations from 1; note is one short remark, such as "killed in round 7"."""

    name: str
    life: int
    state: str
    step: int
    loss: float | None
    tokens_per_second: float | None
    round: int
    bytes_sent: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The run now. round counts committed rounds; contributors are those of the last one. rounds_target: 0 for none."""

    elapsed_seconds: float
    round: int
    rounds_target: int
    contributors: tuple[str, ...]
    epoch: int
    heldout_loss: float | None
    peers: tuple[PeerRow, ...]


class View(Protocol):
    """Where a run is shown. `close` may be called twice; nothing is shown after it."""

    def update(self, snapshot: Snapshot) -> None: ...

    def event(self, event: Event) -> None: ...

    def close(self) -> None: ...


def make_view(stream: TextIO | None = None, *, run: str = "") -> View:
    """The live view if `stream` (standard output) is a terminal that can show it, else log lines."""
    stream = sys.stdout if stream is None else stream
    if can_be_live(stream):
        return LiveView(Console(file=stream), run=run)
    return LogView(stream, run=run)


def can_be_live(stream: TextIO) -> bool:
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb").lower() in ("", "dumb", "unknown")
    blocks = (stream.encoding or "").lower().replace("-", "") == "utf8"
    return stream.isatty() and blocks and not plain


# --- on a terminal ---------------------------------------------------------------------------------------------------


class LiveView:
    """A header, a row for each peer, and the last few events, redrawn in place; the last picture stays."""

    def __init__(self, console: Console, *, run: str = "") -> None:
        self._run = clean(run)
        self._snapshot: Snapshot | None = None
        self._heldout: deque[float] = deque(maxlen=HISTORY)
        self._events: deque[Text] = deque(maxlen=EVENTS_SHOWN)
        # what others print goes where their descriptors point, not into the picture
        self._live = Live(
            console=console,
            refresh_per_second=4,
            get_renderable=self._render,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def update(self, snapshot: Snapshot) -> None:
        loss = snapshot.heldout_loss
        if loss is not None and (not self._heldout or self._heldout[-1] != loss):
            self._heldout.append(loss)
        self._snapshot = snapshot

    def event(self, event: Event) -> None:
        if event.get("event") not in QUIET:
            elapsed = self._snapshot.elapsed_seconds if self._snapshot else 0.0
            self._events.append(Text.assemble((f"{elapsed:6.1f}s  ", "dim"), (describe(event), event_style(event))))

    def close(self) -> None:
        self._live.stop()

    def _render(self) -> RenderableType:
        # Read once: rich's refresh thread calls this while the run's own thread puts new snapshots and events.
        snapshot = self._snapshot
        if snapshot is None:
            return Group(Text(f"{self._run}  starting", style="bold"), *self._events.copy())
        header = header_line(self._run, snapshot, tuple(self._heldout.copy()))
        bar = [progress_line(snapshot)] if snapshot.rounds_target else []
        return Group(header, *bar, peer_table(snapshot.peers), *self._events.copy())


def header_line(run: str, snapshot: Snapshot, heldout: Sequence[float]) -> Text:
    line = Text.assemble(
        (run, "bold"), f"  round {of_target(snapshot)}", f"  view {snapshot.epoch}",
        f"  {snapshot.elapsed_seconds:.0f} s", f"  contributors: {joined(snapshot.contributors)}",
    )  # fmt: skip
    if heldout:
        line.append(f"\nheld-out loss {heldout[-1]:.3f} nats/byte  ", style="bold")
        line.append(sparkline(heldout), style="cyan")
    return line


def of_target(snapshot: Snapshot) -> str:
    """How many rounds; out of how many, if there is a target."""
    return f"{snapshot.round}/{snapshot.rounds_target}" if snapshot.rounds_target else str(snapshot.round)


def progress_line(snapshot: Snapshot) -> Table:
    line = Table.grid()  # a bar alone ends no line
    line.add_row(ProgressBar(total=snapshot.rounds_target, completed=snapshot.round, width=60))
    return line


def peer_table(peers: Sequence[PeerRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("peer", "life", "state", "step", "loss", "tokens/s", "round", "sent", ""):
        table.add_column(name, justify="left" if name in ("peer", "state", "") else "right", no_wrap=bool(name))
    for peer in peers:
        table.add_row(*peer_cells(peer))
    return table


def peer_cells(peer: PeerRow) -> tuple[Text, ...]:
    """Text, not str: a name with brackets in it is not markup."""
    rate = "-" if peer.tokens_per_second is None else f"{peer.tokens_per_second:,.0f}"
    state = Text(clean(peer.state), style=STATE_STYLES.get(peer.state.partition(" ")[0], ""))
    numbers = f"{peer.step:,}", loss_text(peer.loss), rate, str(peer.round), human_bytes(peer.bytes_sent)
    return Text(clean(peer.name)), Text(str(peer.life)), state, *map(Text, numbers), Text(clean(peer.note))


def sparkline(values: Sequence[float]) -> str:
    """One block per value, the highest block for the highest value; what is not finite is a space."""
    finite = [value for value in values if abs(value) < float("inf")]
    if not finite:
        return ""
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return "".join(
        BARS[int((value - low) / span * (len(BARS) - 1))] if abs(value) < float("inf") else " " for value in values
    )


# --- as a log --------------------------------------------------------------------------------------------------------


class LogView:
    """One line per event, and a line of status every ten seconds; no escape codes, flushed line by line."""

    def __init__(self, stream: TextIO, *, run: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._begun = clock()
        self._status_due = self._begun + STATUS_SECONDS
        self._closed = False
        self._prefix = f"{clean(run)} " if run else ""

    def update(self, snapshot: Snapshot) -> None:
        if self._clock() >= self._status_due:
            self._status_due = self._clock() + STATUS_SECONDS
            self._write(status_line(snapshot))

    def event(self, event: Event) -> None:
        if event.get("event") not in QUIET:
            self._write(describe(event))

    def close(self) -> None:
        self._closed = True

    def _write(self, words: str) -> None:
        if self._closed:
            return
        line = f"{self._prefix}{self._clock() - self._begun:7.1f}s  {words}\n"
        encoding = self._stream.encoding or "utf-8"  # a log in ASCII must not end the run over a peer's name
        self._stream.write(line.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def status_line(snapshot: Snapshot) -> str:
    peers = "  ".join(
        f"{clean(peer.name)}: {clean(peer.state)} step {peer.step} loss {loss_text(peer.loss)}"
        for peer in snapshot.peers
    )
    held_out = "" if snapshot.heldout_loss is None else f"held-out {loss_text(snapshot.heldout_loss)}  "
    return f"round {of_target(snapshot)}  {held_out}{peers}"


# --- words -----------------------------------------------------------------------------------------------------------


def describe(event: Event) -> str:
    """The event in a person's words, on one line; an event without words of its own as `name key=value`."""
    words = WORDS.get(str(event.get("event")), plain)
    return clean(words(event))


def plain(event: Event) -> str:
    hidden = ("event", "time_unix", "monotonic", "run")
    return " ".join([str(event.get("event", "?")), *(f"{k}={v}" for k, v in event.items() if k not in hidden)])


def committed(event: Event) -> str:
    tokens = event.get("tokens")
    counts = tokens.values() if isinstance(tokens, Mapping) else ()
    total = sum(count for count in counts if isinstance(count, int))
    again = f", attempt {event['attempt']}" if event.get("attempt") else ""
    return f"round {field(event, 'round')} committed by {joined(event.get('contributors'))} ({total:,} tokens{again})"


def shrunk(event: Event) -> str:
    return f"round {field(event, 'round')} goes on without {joined(event.get('lost'))}"


def short(event: Event) -> str:
    there = joined(event.get("contributors"))
    return f"round {field(event, 'round')} waits: it needs {field(event, 'needs')} contributors, and has {there}"


def injected(event: Event) -> str:
    what = "SIGKILL to" if event.get("kind") == "kill" else f"fault {field(event, 'kind')} in"
    if "id" in event:  # of an injector; else in mid exchange
        return f"{what} {field(event, 'peer')}" + (f", on the way to {event['to']}" if "to" in event else "")
    return f"{what} {field(event, 'peer')} in the middle of round {field(event, 'round')}"


def killed(event: Event) -> str:
    return f"{field(event, 'peer')} was killed"


def joined_run(event: Event) -> str:
    life = event.get("life")
    return f"{field(event, 'peer')} joined" + (f" (life {life})" if life else "")


def gone(event: Event) -> str:
    word = "was evicted" if event.get("event") == "peer.evicted" else "is gone"
    evidence = event.get("evidence")
    return f"{field(event, 'peer')} {word}" + (f": {evidence}" if evidence else "")


def fetched(event: Event) -> str:
    size, seconds = event.get("bytes"), event.get("seconds")
    amount = human_bytes(size) if isinstance(size, int) else "state"
    taken = f" in {seconds:.2f} s" if isinstance(seconds, (int, float)) else ""
    version = f" of version {event['version']}" if "version" in event else ""
    return f"{field(event, 'peer')} fetched {amount}{version} from {joined(event.get('sources'))}{taken}"


def founded(event: Event) -> str:
    return f"{field(event, 'peer')} gives its parameters as version 0"


def restarted(event: Event) -> str:
    return f"the supervisor starts life {field(event, 'life')} of {field(event, 'peer')}"


def failed(event: Event) -> str:
    return f"{field(event, 'peer')} is given up: {field(event, 'reason')}"


def left(event: Event) -> str:
    return f"{field(event, 'peer')} left"


def serving(event: Event) -> str:
    return f"the coordinator serves, generation {field(event, 'generation')}"


def released(event: Event) -> str:
    return f"{field(event, 'peer')} gave back its shards {joined(event.get('shards'))}"


def reassigned(event: Event) -> str:
    return f"{field(event, 'peer')} reads on in shard {field(event, 'shard')}, which was {field(event, 'before')}'s"


def asked(event: Event) -> str:
    return f"{field(event, 'peer')} is asked to leave"


def draining(event: Event) -> str:
    return f"{field(event, 'peer')} makes one last exchange and leaves"


def away(event: Event) -> str:
    silent = f"the coordinator has not answered for {field(event, 'seconds')} s"
    return f"{silent}: peers train up to their next round, and wait for it"


def back(event: Event) -> str:
    return f"the coordinator is back after {field(event, 'seconds')} s"


def vacant(event: Event) -> str:
    return f"the place of {field(event, 'peer')} is free: {field(event, 'reason')}"


def offered(event: Event) -> str:
    return f"the place of {field(event, 'peer')} is offered to site {field(event, 'site')}"


def filled(event: Event) -> str:
    return f"{field(event, 'peer')} goes on at site {field(event, 'site')}"


def closed(event: Event) -> str:
    return f"the place of {field(event, 'peer')} is closed: {field(event, 'reason')}"


WORDS: dict[str, Callable[[Event], str]] = {
    "round.committed": committed,
    "round.shrunk": shrunk,
    "round.short": short,
    "fault.injected": injected,
    "peer.killed": killed,
    "peer.joined": joined_run,
    "peer.evicted": gone,
    "peer.lost": gone,
    "state.fetched": fetched,
    "loop.founded": founded,
    "peer.restarted": restarted,
    "peer.failed": failed,
    "peer.left": left,
    "peer.asked_to_leave": asked,
    "peer.draining": draining,
    "coordinator.lost": away,
    "coordinator.found": back,
    "coordinator.started": serving,
    "shard.released": released,
    "shard.reassigned": reassigned,
    "vacancy.opened": vacant,
    "vacancy.offered": offered,
    "vacancy.filled": filled,
    "vacancy.closed": closed,
}


def event_style(event: Event) -> str:
    name = str(event.get("event", ""))
    if name in ("fault.injected", "peer.killed", "peer.lost", "peer.evicted", "run.rolled_back"):
        return "red"
    if name in ("round.shrunk", "round.short", "anomaly.confirmed", "coordinator.lost"):
        return "yellow"
    return "green" if name in ("peer.joined", "state.fetched") else ""


def field(event: Event, key: str) -> str:
    value = event.get(key)
    return "?" if value is None else str(value)


def joined(names: object) -> str:
    if isinstance(names, (list, tuple, set, frozenset)):
        return clean(", ".join(str(name) for name in names)) or "nobody"
    return "nobody" if names is None else clean(str(names))


def loss_text(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.3f}"


def clean(text: str) -> str:
    """Nothing that a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)


def human_bytes(size: float) -> str:
    """Decimal units, as links are counted: 1 MB is a million bytes."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"

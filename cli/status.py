"""`elastic status`: who is in a run, how far it is, and where its data stands."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from elastic.config import JoinToken, check_coordinator, check_name, environment
from elastic.errors import ConfigurationError, CoordinatorUnavailable

from . import exits
from .screen import refusing
from .view import STATE_STYLES, clean, human_bytes, joined, loss_text

if TYPE_CHECKING:
    from elastic.messages import AuditReport, BarredReport, MemberReport, StatusReport, VerdictReport

    Found: TypeAlias = tuple[StatusReport | None, AuditReport | None]

WATCH_SECONDS = 1.0


@click.command(epilog="Example: elastic status tcp://host:29400 --name c4-1b --shards")
@click.argument("where", metavar="[TOKEN|tcp://HOST:PORT]", required=False)
@click.option("--name", help="Name of the run, with tcp://HOST:PORT.  [default: ELASTIC_RUN]")
@click.option("--shards", is_flag=True, help="Audit the data, too: what is committed, and who holds the rest.")
@click.option(
    "--journal",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Audit this coordinator's journal instead of asking; it is only read, and may be in use.",
)
@click.option("--watch", "-w", is_flag=True, help="Show it anew every second, until Ctrl-C; with --json, a line each.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--timeout",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="Seconds to wait for the coordinator.",
)
def command(
    where: str | None, name: str | None, shards: bool, journal: Path | None, watch: bool, as_json: bool, timeout: float
) -> None:
    """Show a run's peers, its progress and its data.

    TOKEN is elastic://HOST:PORT/RUN or @FILE; without it, ELASTIC_JOIN counts. Exits with 0; with 3 if a sample counts
    twice or is missing, 4 if the coordinator does not answer (with --watch: at the first look; later it is waited for).
    """

    def look() -> Found:
        return (None, _read(journal)) if journal else _ask(where, name, shards, timeout)

    with refusing("status", exits.DATA if journal else exits.USAGE):
        report, audit = look()
    show = _show_as_json if as_json else _show
    if watch:
        with _picture() if not as_json and sys.stdout.isatty() else nullcontext((show, _complain)) as (show, complain):
            _watch(look, show, complain)
    show(report, audit)
    sys.exit(exits.OK if audit is None or audit.passed else exits.DATA)


def _watch(look: Callable[[], Found], show: Callable[..., None], complain: Callable[[Exception], None]) -> NoReturn:
    try:
        while True:
            try:
                show(*look())
            except CoordinatorUnavailable as error:  # it may come back
                complain(error)
            time.sleep(WATCH_SECONDS)
    except KeyboardInterrupt:
        sys.exit(exits.INTERRUPTED)


@contextmanager
def _picture() -> Iterator[tuple[Callable[..., None], Callable[[Exception], None]]]:
    """One that changes, on a terminal: what shows a report there, and what says that there is none."""
    with Live(console=Console(highlight=False), auto_refresh=False, screen=True) as live:
        last: list[Text | Table] = []

        def show(*found: Any) -> None:
            last[:] = _lines(*found)
            live.update(Group(*last), refresh=True)

        def complain(error: Exception) -> None:
            live.update(Group(*last, Text(clean(str(error)), style="red")), refresh=True)

        yield show, complain


def _complain(error: Exception) -> None:
    click.echo(f"elastic status: {clean(str(error))}", err=True)


def _where(text: str | None, name: str | None) -> JoinToken:
    env = environment()
    text = text or env.get("ELASTIC_JOIN")
    if not text:
        raise ConfigurationError("say which run: a token, tcp://HOST:PORT with --name, or ELASTIC_JOIN")
    if not text.startswith("tcp://"):
        return JoinToken.parse(text)
    name = name or env.get("ELASTIC_RUN")
    if not name:
        raise ConfigurationError("give the run's name with --name, or set ELASTIC_RUN")
    return JoinToken(check_coordinator(text), check_name("run", name))


def _ask(
    text: str | None, name: str | None, shards: bool, timeout: float
) -> tuple[StatusReport | None, AuditReport | None]:
    from elastic.inquiry import inquire
    from elastic.messages import AuditReport, AuditRequest, StatusReport, StatusRequest

    where = _where(text, name)
    report = inquire(where, StatusRequest, StatusReport, timeout)
    return report, inquire(where, AuditRequest, AuditReport, timeout) if shards else None


def _read(path: Path) -> AuditReport:
    from elastic.audit import audit, summary
    from elastic.journal import Opened, read_copy

    run, records = read_copy(path)
    generation = max((record.generation for record in records if isinstance(record, Opened)), default=0)
    return summary(run, audit(records), generation=generation)


# --- for programs -----------------------------------------------------------------------------------------------------


def _plain(report: StatusReport | None, audit: AuditReport | None) -> dict[str, Any]:
    head = report or audit
    assert head is not None
    plain: dict[str, Any] = {"run": head.run, "generation": head.generation}
    if report:
        fields = _finite(dataclasses.asdict(report))
        del fields["incarnation"]
        plain |= fields
    if audit:
        sums = {name: getattr(audit, name) for name in ("committed", "twice", "missing", "partial", "passed")}
        plain["audit"] = sums | {"epochs": [dataclasses.asdict(epoch) for epoch in audit.epochs]}
    return plain


def _finite(value: Any) -> Any:
    """NaN has no place in JSON: what is not known is null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- for people -------------------------------------------------------------------------------------------------------


def _show_as_json(report: StatusReport | None, audit: AuditReport | None) -> None:
    click.echo(json.dumps(_plain(report, audit)))


def _show(report: StatusReport | None, audit: AuditReport | None) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for line in _lines(report, audit):
        console.print(line)


def _lines(report: StatusReport | None, audit: AuditReport | None) -> list[Text | Table]:
    return [*(_head(report) if report else ()), *(_account(audit) if audit else ())]


def _head(report: StatusReport) -> Iterable[Text | Table]:
    progress = report.progress
    target = progress.targets.get
    rounds, tokens = _of(progress.rounds, target("rounds", 0)), _of(progress.tokens, target("tokens", 0))
    trained = _of(progress.elapsed, target("seconds", 0))
    goal = f"  held-out loss to reach {target('loss', 0):g}" if target("loss", 0) else ""
    state = "finished" if progress.finished else "running"
    yield Text(f"{clean(report.run)}  {state}  generation {report.generation}  view {report.epoch}", style="bold")
    yield Text(f"rounds {rounds}  tokens {tokens}  seconds {trained}{goal}")
    yield Text(f"last contributors: {joined(report.contributors)}")
    yield from (_verdict(verdict) for verdict in report.verdicts)
    yield from (_barred(barred) for barred in report.barred)
    yield _members(report.members)
    yield _health(report.members)


def _verdict(verdict: VerdictReport) -> Text:
    numbers = ", ".join(f"{clean(name)} {value:g}" for name, value in verdict.evidence.items())
    where = " -> ".join(map(clean, verdict.culprits))
    lasting = f"for {verdict.lasting_seconds:.0f} s, confidence {verdict.confidence:.2f}"
    return Text(f"{clean(verdict.kind)}: {where}  {lasting} ({numbers})", style="yellow")


def _barred(barred: BarredReport) -> Text:
    until = "for good" if barred.seconds < 0 else f"for {barred.seconds:.0f} s yet"
    times = f"time {barred.strikes}" if barred.strikes > 1 else "the first time"
    return Text(f"in quarantine: {clean(barred.name)}  {until}, {times} ({clean(barred.reason)})", style="red")


def _of(done: float, target: float) -> str:
    return f"{done:,.0f}/{target:,.0f}" if target else f"{done:,.0f}"


def _members(members: Iterable[MemberReport]) -> Table:
    table = _table("peer", "site", "life", "state", "doing", "version", "step", "loss", "sent", "silent")
    for member in members:
        status = member.status
        repaired = f", repaired {member.repaired}x" if member.repaired else ""
        state = Text(clean(member.state) + repaired, style=STATE_STYLES.get(member.state, ""))
        numbers = str(member.version), f"{status.step:,}", loss_text(None if math.isnan(status.loss) else status.loss)
        silence = f"{member.silence:.1f} s"
        texts = clean(member.name), clean(member.site), str(member.life)
        last = clean(status.state), *numbers, human_bytes(status.bytes_sent), silence
        table.add_row(*map(Text, texts), state, *map(Text, last))
    return table


def _health(members: Iterable[MemberReport]) -> Table:
    """How their processes are, and what their training threads are at."""
    table = _table("peer", "memory", "GPU memory", "disk free", "usual step", "since the last")
    for member in members:
        health, trainer = member.status.health, member.status.trainer
        sizes = health.memory_bytes, health.gpu_bytes, health.disk_free
        known = (human_bytes(size) if size else "?" for size in sizes)
        usual = f"{trainer.usual_seconds:.3g} s" if trainer.steps else "-"
        idle = "waits" if trainer.waiting else f"{trainer.idle_seconds:.1f} s"
        table.add_row(*map(Text, (clean(member.name), *known, usual, idle)))
    return table


def _account(audit: AuditReport) -> Iterable[Text | Table]:
    verdict = "every sample counts once" if audit.passed else "the account does not add up"
    counts = f"{audit.committed:,} samples committed  {audit.twice:,} twice  {audit.missing:,} missing"
    yield Text(f"{clean(audit.run)}  data: {verdict}", style="bold" if audit.passed else "bold red")
    yield Text(f"{counts}  {audit.partial:,} in some fragments only")
    table = _table("epoch", "samples", "committed", "twice", "missing", "shard", "holder", "cursor")
    for epoch in audit.epochs:
        samples = "?" if epoch.samples < 0 else f"{epoch.samples:,}"
        counted = f"{epoch.committed:,}", str(epoch.twice), str(epoch.missing)
        table.add_row(str(epoch.epoch), samples, *counted)
        for shard in epoch.open:
            holder = Text(clean(shard.holder)) if shard.holder else Text("free", style="yellow")
            table.add_row("", "", "", "", "", str(shard.shard), holder, str(shard.cursor))
    yield table


def _table(*names: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in names:
        left = name in ("peer", "site", "state", "doing", "holder")
        table.add_column(name, justify="left" if left else "right", no_wrap=True)
    return table

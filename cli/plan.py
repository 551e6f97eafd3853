"""`elastic plan`: what a run will be like over given links, and how it should be set."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from elastic.errors import ConfigurationError
from elastic.forecast import (
    ALGORITHMS,
    FLOAT,
    MOST_STEPS,
    USUAL_STEPS,
    WIRES,
    Access,
    Advice,
    Algorithm,
    Forecast,
    Network,
    Setting,
    advise,
    bits_of,
    gathered_in,
    joining,
)
from elastic.outer.cadence import WHOLE_ROUND

from . import exits
from .report import NO_MATPLOTLIB, replace_with
from .units import bits_text, quantity, rate, seconds, share, time_text, whole
from .view import human_bytes

MEASURED_HOST = 350e6  # bytes of float32 a second, on one core of a small virtual machine (docs/benchmarks.md)
POINTS, DECADES = 61, 2.0  # of the picture: so many, up to 10^2 times as slow and as fast
COARSEST = ("int4", "e3m0")
LINK = {"up": rate, "down": rate, "rtt": seconds, "loss": share}


def loop(text: str) -> Algorithm:
    """An algorithm, by its title or by the name of its class."""
    names = {each.call.lower(): each for each in ALGORITHMS} | {each.title.lower(): each for each in ALGORITHMS}
    found = names.get(text.lower()) if text else None
    if found is None:
        raise click.BadParameter(f"{text!r} is none of {', '.join(each.title for each in ALGORITHMS)}")
    return found


@dataclass(frozen=True)
class Wanted:
    """What is to be shown. steps: H, if it is given."""

    algorithms: tuple[Algorithm, ...]
    wires: tuple[str, ...]
    steps: int | None


@click.command(epilog="Example: elastic plan --params 10e9 --peers 8 --step-seconds 0.8 --bandwidth 1Gbit --rtt 80ms")
@click.option("--params", type=quantity("count"), required=True, metavar="N", help="Of the model: 10e9, 350M, 10B.")
@click.option("--peers", type=whole, required=True, metavar="M", help="How many train.")
@click.option("--step-seconds", type=quantity("seconds"), required=True, metavar="S", help="Of an inner step: 0.8.")
@click.option("--bandwidth", type=quantity("rate"), metavar="RATE", help="Of each peer's access: 1Gbit, 25MB/s.")
@click.option("--uplink", type=quantity("rate"), metavar="RATE", help="What a peer sends, if that is another rate.")
@click.option(
    "--rtt",
    metavar="TIME",
    type=quantity("seconds", positive=False),
    default="50ms",
    show_default=True,
    help="Round trip between peers.",
)
@click.option(
    "--loss",
    metavar="SHARE",
    type=quantity("share", positive=False),
    default="0",
    show_default=True,
    help="Of packets, by chance: 0.1%.",
)
@click.option(
    "--link",
    "links",
    multiple=True,
    metavar="NAME=RATE[,up=RATE][,rtt=TIME][,loss=SHARE]",
    help="One peer whose access is another; repeatable.",
)
@click.option(
    "--stripes", metavar="N|auto", default="auto", show_default=True, help="TCP connections between two peers."
)
@click.option(
    "--algorithm",
    "algorithms",
    multiple=True,
    type=loop,
    metavar="NAME",
    help="Only this one, such as Streaming; repeatable.",
)
@click.option("--wire", "wires", multiple=True, type=click.Choice(WIRES), help="Only this one; repeatable.")
@click.option("--sync-every", type=whole, metavar="H", help="Inner steps between rounds.  [default: the best]")
@click.option("--fragments", type=whole, metavar="P", help="Of Streaming and Decoupled.  [default: the best]")
@click.option(
    "--sync-delay", type=click.IntRange(0), metavar="TAU", help="Steps of their overlap.  [default: the best]"
)
@click.option(
    "--target", metavar="SHARE", type=quantity("share"), default="0.95", show_default=True, help="Utilisation to reach."
)
@click.option(
    "--host-rate",
    type=quantity("rate"),
    metavar="RATE",
    help="Parameters that a peer's training thread gives and applies in float32: 350MB/s was measured on one slow "
    "core.  [default: that is not counted]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Draw utilisation by bandwidth, a PNG.",
)
def command(as_json: bool, plot: Path | None, **options: Any) -> None:
    """Predict bytes, seconds, utilisation and memory of a run, and recommend H, fragments, delay and wire.

    Nothing is measured: docs/plan.md has the formulas, and how far they were from measured runs. Utilisation is the
    part of the time in which a peer computes.
    """
    try:
        setting, wanted = setting_of(**options), wanted_of(**options)
        advice = advise(setting, wanted.algorithms, wanted.wires, wanted.steps)
        rows = table_of(setting, wanted, advice)
    except (ConfigurationError, ValueError) as error:
        give_up(exits.USAGE, str(error))
    if as_json:
        click.echo(json.dumps(plain(setting, advice, rows), indent=1))
    else:
        show(setting, advice, rows)
    if plot is not None:
        draw(plot, setting, wanted, advice)


def give_up(code: int, message: str) -> NoReturn:
    click.echo(f"elastic plan: {message}", err=True)
    sys.exit(code)


# --- what is asked --------------------------------------------------------------------------------------------------


def setting_of(
    *,
    params: float,
    peers: int,
    step_seconds: float,
    stripes: str,
    fragments: int | None,
    sync_delay: int | None,
    target: float,
    host_rate: float | None,
    **options: Any,
) -> Setting:
    return Setting(
        params=params,
        step_seconds=step_seconds,
        network=Network(accesses_of(peers, **options), stripes_of(stripes)),
        host_rate=math.inf if host_rate is None else host_rate / 8,
        fragments=fragments,
        delay=sync_delay,
        target=target,
    )


def stripes_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal():
        raise ConfigurationError(f"--stripes is {text!r}: write a number of connections, or auto")
    return int(text)


def accesses_of(
    peers: int, bandwidth: float | None, uplink: float | None, rtt: float, loss: float, links: Sequence[str], **_: Any
) -> list[Access]:
    """Of each peer: those that are named, and for the others what holds for all."""
    named = dict(link_of(text, rtt, loss) for text in links)
    if len(named) < len(links):
        raise ConfigurationError("--link names a peer twice: each has one access")
    if len(named) > peers:
        raise ConfigurationError(f"--link names {len(named)} peers, and --peers is {peers}")
    rest = peers - len(named)
    if rest and bandwidth is None:
        raise ConfigurationError(f"say what {rest} of {peers} peers are connected with: --bandwidth 1Gbit")
    accesses = list(named.values())
    if rest and bandwidth is not None:
        accesses += [Access(up=uplink or bandwidth, down=bandwidth, rtt=rtt, loss=loss)] * rest
    return accesses


def link_of(text: str, rtt: float, loss: float) -> tuple[str, Access]:
    """eu-1=200Mbit,up=50Mbit,rtt=120ms,loss=0.1%"""
    name, equals, value = text.partition("=")
    first, *others = value.split(",")
    if not (name.strip() and equals and first):
        raise ConfigurationError(f"--link {text!r}: write it as eu-1=200Mbit,up=50Mbit,rtt=120ms,loss=0.1%")
    try:
        down = rate(first)
        fields = {"down": down, "up": down, "rtt": rtt, "loss": loss} | dict(map(field_of, others))
    except ValueError as error:
        raise ConfigurationError(f"--link {text!r}: {error}") from None
    return name.strip(), Access(**fields)


def field_of(text: str) -> tuple[str, float]:
    key, _, value = (part.strip() for part in text.partition("="))
    if key not in LINK:
        raise ValueError(f"{key!r} is none of {', '.join(LINK)}")
    return key, LINK[key](value)


def wanted_of(*, algorithms: Sequence[Algorithm], wires: Sequence[str], sync_every: int | None, **_: Any) -> Wanted:
    return Wanted(
        tuple(each for each in ALGORITHMS if not algorithms or each in algorithms),
        tuple(each for each in WIRES if not wires or each in wires),
        sync_every,
    )


# --- what comes of it -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One algorithm with wires that are alike. needed: H that reaches the target; None: none does."""

    wires: tuple[str, ...]
    forecast: Forecast
    needed: int | None


def table_of(setting: Setting, wanted: Wanted, advice: Advice) -> list[Row]:
    """All algorithms with all wires, with the same H as far as that can be."""
    best = advice.best.scheme
    steps = wanted.steps or (USUAL_STEPS if best.algorithm.steps else best.sync_every)
    rows = []
    for algorithm in wanted.algorithms:
        for wires in alike(wanted.wires):
            least = 0 if wanted.steps else setting.least_steps(algorithm)
            scheme = setting.scheme(algorithm, wires[0], max(steps, least))
            rows.append(Row(wires, setting.forecast(scheme), setting.fewest_steps(algorithm, wires[0])))
    return rows


def alike(wires: Sequence[str]) -> list[tuple[str, ...]]:
    """Wires that take as many bits there and back."""
    return [tuple(group) for _, group in groupby(wires, lambda wire: (bits_of(wire), bits_of(gathered_in(wire))))]


def chosen(row: Row, advice: Advice) -> bool:
    scheme, best = row.forecast.scheme, advice.best.scheme
    return scheme.algorithm is best.algorithm and best.wire in row.wires


def plain(setting: Setting, advice: Advice, rows: Iterable[Row]) -> dict[str, Any]:
    """For programs."""
    nbytes, took = joining(setting)
    return {
        "params": setting.params,
        "peers": setting.network.peers,
        "step_seconds": setting.step_seconds,
        "target": setting.target,
        "links": [plain_link(access, many) for access, many in setting.network.kinds.items()],
        "rows": [{**plain_forecast(row.forecast), "wires": row.wires, "needed": row.needed} for row in rows],
        "recommendation": {
            "reached": advice.reached,
            **plain_forecast(advice.best),
            "call": advice.best.scheme.call,
            "reasons": advice.reasons,
            "faster": advice.faster,
            "longer": advice.longer,
        },
        "join": {"bytes": nbytes, "seconds": took},
    }


def plain_link(access: Access, many: int) -> dict[str, float]:
    return {"peers": many, "up": access.up, "down": access.down, "rtt": access.rtt, "loss": access.loss}


def plain_forecast(forecast: Forecast) -> dict[str, Any]:
    scheme = forecast.scheme
    return {
        "algorithm": scheme.algorithm.title,
        "wire": scheme.wire,
        "gather_wire": gathered_in(scheme.wire),
        "pattern": forecast.pattern,
        "sync_every": scheme.sync_every,
        "fragments": scheme.fragments,
        "sync_delay": "a round" if scheme.delay == WHOLE_ROUND else scheme.delay,
        **{name: getattr(forecast, name) for name in NUMBERS},
    }


NUMBERS = (
    *("round_bytes", "step_bytes", "total_step_bytes", "round_seconds", "waited_seconds", "utilisation"),
    "memory_bytes",
)


# --- for people -----------------------------------------------------------------------------------------------------


def show(setting: Setting, advice: Advice, rows: Sequence[Row]) -> None:
    drawn = table(setting, advice, rows)
    needed = Console(width=1000).measure(drawn).maximum
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, needed))
    console.print(Text(head(setting), style="bold"))
    console.print(drawn)
    for line in words(setting, advice):
        console.print(line)


def head(setting: Setting) -> str:
    network = setting.network
    rates = [rate for access in network.kinds for rate in (access.up, access.down)]
    links = bits_text(min(rates)) + ("" if min(rates) == max(rates) else f" to {bits_text(max(rates))}")
    lossy = max(access.loss for access in network.kinds)
    return (
        f"{network.peers:,} peers, {setting.params:,.0f} parameters, steps of {time_text(setting.step_seconds)}; "
        f"{links}, {time_text(network.rtt)} round trip" + (f", {100 * lossy:g} % loss" if lossy else "")
    )


def table(setting: Setting, advice: Advice, rows: Sequence[Row]) -> Table:
    made = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    names = (
        "",
        "algorithm",
        "wire",
        "H",
        "P",
        "tau",
        "sent a\nround",
        "sent a\nstep",
        "round\ntakes",
        "waits in\nH steps",
    )
    for name in (*names, "utilis-\nation", "memory", f"H for\n{100 * setting.target:g} %"):
        made.add_column(name, justify="left" if name in ("", "algorithm", "wire") else "right", no_wrap=True)
    for row in rows:
        best = chosen(row, advice)
        mark = ("*" if advice.reached else "~") if best else ""
        made.add_row(mark, *cells(row), style="bold green" if best and advice.reached else None)
    return made


def cells(row: Row) -> tuple[str, ...]:
    forecast, scheme = row.forecast, row.forecast.scheme
    return (
        scheme.algorithm.title,
        ", ".join(row.wires),
        str(scheme.sync_every),
        str(scheme.fragments),
        "H" if scheme.delay == WHOLE_ROUND else str(scheme.delay),
        human_bytes(forecast.round_bytes),
        human_bytes(forecast.step_bytes),
        time_text(forecast.round_seconds),
        time_text(forecast.waited_seconds),
        f"{100 * forecast.utilisation:.1f} %",
        human_bytes(forecast.memory_bytes),
        "-" if row.needed is None else str(row.needed),
    )


def words(setting: Setting, advice: Advice) -> Iterable[Text]:
    yield from recommended(advice) if advice.reached else unreached(setting, advice)
    nbytes, took = joining(setting)
    yield Text(f"A newcomer fetches {human_bytes(nbytes)}, in {time_text(took)} over the slowest access.")
    if math.isinf(setting.host_rate):
        own = time_text(FLOAT * setting.params / MEASURED_HOST)
        yield Text(
            f"Not counted: what a peer's training thread does for rounds, on one slow core {own} in all H steps; "
            f"--host-rate {MEASURED_HOST / 1e6:g}MB/s counts it.",
            style="dim",
        )


def recommended(advice: Advice) -> Iterable[Text]:
    yield Text(f"* recommended: {advice.best.scheme.call}", style="bold")
    yield from (Text(f"  {reason}") for reason in advice.reasons)


def unreached(setting: Setting, advice: Advice) -> Iterable[Text]:
    best = advice.best
    how = f"H {best.scheme.sync_every}, {best.scheme.algorithm.title}, {best.scheme.wire}"
    target = f"{100 * setting.target:g} %"
    yield Text(f"{target} is not to be had: at most {100 * best.utilisation:.1f} % (~ {how}).", style="bold yellow")
    changes = []
    if advice.faster is not None:
        slowest = min(min(access.up, access.down) for access in setting.network.kinds)
        changes.append(f"links {advice.faster:.3g} times as fast (the slowest: {bits_text(advice.faster * slowest)})")
    if advice.longer is not None:
        changes.append(f"H {advice.longer}" + (", which costs quality" if advice.longer > MOST_STEPS else ""))
    changes += ["a smaller model"] + ([] if best.scheme.wire in COARSEST else ["a coarser wire"])
    if advice.faster or advice.longer:
        yield Text("  It would take " + "; or ".join(changes) + ".")
    else:
        yield Text("  Neither faster links nor a longer H would do: round trips and the host's own work take too long.")


# --- the picture ----------------------------------------------------------------------------------------------------


def draw(path: Path, setting: Setting, wanted: Wanted, advice: Advice) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        give_up(exits.FAILED, NO_MATPLOTLIB)
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    slowest = min(min(access.up, access.down) for access in setting.network.kinds)
    for titles, values in curves(setting, wanted, advice):
        axes.plot([slowest * factor / 1e6 for factor in factors()], values, label=titles)
    label(axes, setting, advice, slowest / 1e6)
    try:
        replace_with(path, lambda scratch: figure.savefig(scratch, format="png"))
    except OSError as error:
        give_up(exits.OUTPUT, f"{path} cannot be written: {error.strerror or error}")


def factors() -> list[float]:
    return [10 ** (DECADES * (2 * index / (POINTS - 1) - 1)) for index in range(POINTS)]


def curves(setting: Setting, wanted: Wanted, advice: Advice) -> list[tuple[str, list[float]]]:
    """Utilisation in percent, of each algorithm in the wire and with the H of what is recommended; equal ones once."""
    wire, steps = advice.best.scheme.wire, max(advice.best.scheme.sync_every, setting.fragments or 1)
    settings = [replace(setting, network=setting.network.scaled(factor)) for factor in factors()]
    found: dict[tuple[float, ...], list[str]] = {}
    for algorithm in wanted.algorithms:
        most = max(steps, setting.least_steps(algorithm))
        values = (each.forecast(each.scheme(algorithm, wire, most)).utilisation for each in settings)
        found.setdefault(tuple(100 * value for value in values), []).append(algorithm.title)
    return [(", ".join(titles), list(values)) for values, titles in found.items()]


def label(axes: Any, setting: Setting, advice: Advice, here: float) -> None:
    scheme = advice.best.scheme
    axes.set_xscale("log")
    axes.set_xlabel("Mbit/s of the slowest access, all others in proportion")
    axes.set_ylabel("% of the time in which peers compute")
    axes.set_ylim(0, 102)
    axes.set_title(f"{setting.network.peers} peers, H = {scheme.sync_every}, {scheme.wire}", loc="left", fontsize=11)
    axes.axhline(100 * setting.target, color="gray", linewidth=0.8, linestyle="--")
    axes.axvline(here, color="gray", linewidth=0.8, linestyle=":")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper left")

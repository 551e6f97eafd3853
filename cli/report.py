"""What remains of a run: report.json, loss.png and a summary in words.

A report is built from events and whatever the peers said last. Both may be incomplete, since a run can be interrupted
anywhere: what is not known is None, and nothing here raises for it.
"""

from __future__ import annotations

import bisect
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from cli.view import human_bytes, joined

Event = Mapping[str, Any]
Report = dict[str, Any]

DISTRIBUTIONS = ("elastic-diloco", "torch", "ray", "numpy", "pyzmq", "msgpack")
# Without the red and the green that mark a kill and a return.
PEER_COLORS = ("tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:cyan", "tab:pink", "tab:olive", "tab:gray")
NO_MATPLOTLIB = "no picture: matplotlib is missing; install it with  pip install 'elastic-diloco[plots]'"


# --- fields of events ------------------------------------------------------------------------------------------------


def named(events: Iterable[Event], *names: str) -> list[Event]:
    return [event for event in events if event.get("event") in names]


def number(event: Event, key: str) -> float | None:
    value = event.get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def whole(event: Event, key: str) -> int | None:
    value = number(event, key)
    return None if value is None else int(value)


def strings(event: Event, key: str) -> list[str]:
    value = event.get(key)
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else []


# --- commits ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """One committed round, as its event told it."""

    round: int
    attempt: int
    seconds: float | None
    contributors: tuple[str, ...]
    tokens: Mapping[str, int]


def commits_of(events: Iterable[Event]) -> list[Commit]:
    """By round, once each: the same commit may be told again, and after a rollback the later one holds."""
    commits = (commit_of(event) for event in named(events, "round.committed"))
    return sorted({c.round: c for c in commits if c is not None}.values(), key=lambda c: c.round)


def commit_of(event: Event) -> Commit | None:
    number_of_round = whole(event, "round")
    if number_of_round is None:
        return None
    tokens = event.get("tokens")
    counted = {str(peer): whole(tokens, peer) or 0 for peer in tokens} if isinstance(tokens, Mapping) else {}
    return Commit(
        round=number_of_round,
        attempt=whole(event, "attempt") or 0,
        seconds=number(event, "time_unix"),
        contributors=tuple(strings(event, "contributors")),
        tokens=counted,
    )


def tokens_by_peer(commits: Iterable[Commit]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for commit in commits:
        for peer, count in commit.tokens.items():
            totals[peer] = totals.get(peer, 0) + count
    return totals


# --- kills -----------------------------------------------------------------------------------------------------------


def kills_of(events: Sequence[Event], commits: Sequence[Commit]) -> list[Report]:
    injected = named(events, "fault.injected")
    return [kill_of(event, events, commits) for event in injected if event.get("kind", "kill") == "kill"]


def kill_of(event: Event, events: Sequence[Event], commits: Sequence[Commit]) -> Report:
    peer, at = str(event.get("peer")), number(event, "time_unix")
    hit = whole(event, "round")
    again = contributed_again(peer, hit, at, commits)
    return {
        "peer": peer,
        "round": hit,
        "time_unix": at,
        "survivors_finished_round": survivors_finished(peer, hit, commits),
        "detected_seconds": since(at, detected(peer, at, events)),
        "contributed_again_round": again.round if again else None,
        "contributed_again_seconds": since(at, again.seconds if again else None),
    }


def since(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(end - start, 3)


def detected(peer: str, at: float | None, events: Sequence[Event]) -> float | None:
    """When the run first said, after the injection, that this peer is missing."""
    times = [
        told
        for event in named(events, "round.shrunk", "peer.lost", "peer.evicted")
        if peer == event.get("peer") or peer in strings(event, "lost")
        if (told := number(event, "time_unix")) is not None and at is not None and told >= at
    ]
    return min(times, default=None)


def survivors_finished(peer: str, hit: int | None, commits: Sequence[Commit]) -> bool | None:
    """Was the round that the kill hit committed by all the others? None: the run ended before one could say.

    What the killed peer had already given to all of them may be in the result: it counts, too.
    """
    if hit is None:
        return None
    for commit in commits:
        if commit.round == hit:
            return set(commit.contributors) >= survivors(peer, hit, commits)
    return False if any(commit.round > hit for commit in commits) else None


def survivors(peer: str, hit: int, commits: Sequence[Commit]) -> set[str]:
    """The contributors of the round before without the killed one; of the first round: all who are ever seen."""
    before = [commit for commit in commits if commit.round < hit]
    seen = before[-1].contributors if before else {name for commit in commits for name in commit.contributors}
    return set(seen) - {peer}


def contributed_again(peer: str, hit: int | None, at: float | None, commits: Sequence[Commit]) -> Commit | None:
    """The first commit with this peer after the round that was hit: that round itself may hold its last words."""
    for commit in commits:
        later = hit is not None and commit.round > hit
        if later and peer in commit.contributors and (at is None or commit.seconds is None or commit.seconds > at):
            return commit
    return None


# --- losses ----------------------------------------------------------------------------------------------------------


def heldout_of(events: Iterable[Event]) -> list[list[float]]:
    """[round, loss] by round; the last evaluation of a round holds."""
    losses = {
        at: loss
        for event in named(events, "heldout.evaluated")
        if (at := whole(event, "round")) is not None and (loss := number(event, "loss")) is not None
    }
    return [[at, losses[at]] for at in sorted(losses)]


def train_of(events: Sequence[Event], position: Callable[[Event], float | None]) -> dict[str, list[list[float]]]:
    """{peer: [[position in rounds, loss], ...]} in the order of position."""
    curves: dict[str, list[list[float]]] = {}
    for event in named(events, "train.loss"):
        loss, at = number(event, "loss"), position(event)
        if loss is not None and at is not None:
            curves.setdefault(str(event.get("peer")), []).append([round(at, 3), loss])
    return {peer: sorted(curves[peer]) for peer in sorted(curves)}


def clock_to_rounds(events: Sequence[Event], commits: Sequence[Commit]) -> Callable[[float], float | None]:
    """Maps wall-clock seconds to rounds: a commit stands at its round, and between two commits time runs evenly."""
    times = [at for event in events if (at := number(event, "time_unix")) is not None]
    marks = [(c.seconds, float(c.round)) for c in commits if c.seconds is not None]
    if marks and times:
        marks.insert(0, (min(times), marks[0][1] - 1))
        marks.append((max(times), marks[-1][1] + min(1.0, late(max(times), marks))))
    marks = [a for a, b in pairwise([*sorted(marks), (math.inf, 0.0)]) if a[0] < b[0]]

    def position(seconds: float) -> float | None:
        if len(marks) < 2:
            return None
        i = min(max(bisect.bisect_right(marks, (seconds, math.inf)), 1), len(marks) - 1)
        (t0, r0), (t1, r1) = marks[i - 1], marks[i]
        return r0 + (r1 - r0) * min(max((seconds - t0) / (t1 - t0), 0.0), 1.0)

    return position


def late(end: float, marks: Sequence[tuple[float, float]]) -> float:
    """How many rounds of usual length fit between the last commit and the end."""
    usual = (marks[-1][0] - marks[0][0]) / max(len(marks) - 1, 1)
    return max(0.0, end - marks[-1][0]) / usual if usual > 0 else 0.0


def position_of(event: Event, clock: Callable[[float], float | None]) -> float | None:
    """Where an event stands on the axis of rounds: by its time if it has one, else by the round it names."""
    seconds = number(event, "time_unix")
    at = None if seconds is None else clock(seconds)
    return number(event, "round") if at is None else at


# --- the report ------------------------------------------------------------------------------------------------------


def build_report(
    events: Sequence[Event],
    final: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    sample_text: str | None = None,
    interrupted: bool = False,
    seed: int | None = None,
    wall_seconds: float | None = None,
) -> Report:
    """The report of a run, finished or not.

    events: in the order they were told. final: {peer: what it said last}; `state_hash` and `bytes_sent` are used.
    """
    commits = commits_of(events)
    clock = clock_to_rounds(events, commits)
    facts = final or {}
    hashes = {peer: facts[peer].get("state_hash") for peer in sorted(facts)}
    report = {
        "run": next((event["run"] for event in events if event.get("run")), None),
        "interrupted": interrupted,
        "seed": seed,
        "peers": peers_of(events, facts, commits),
        "wall_seconds": run_seconds(events) if wall_seconds is None else round(wall_seconds, 3),
        **of_rounds(commits),
        "kills": [placed(kill, clock) for kill in kills_of(events, commits)],
        **of_losses(events, clock),
        "bytes_sent_per_peer": {peer: facts[peer].get("bytes_sent") for peer in sorted(facts)},
        "state_hash": hashes,
        "state_hashes_equal": equal(hashes.values()),
        "sample_text": sample_text,
        "settings": dict(settings or {}),
        "versions": versions(),
    }
    return {key: jsonable(value) for key, value in report.items()}


def of_rounds(commits: Sequence[Commit]) -> Report:
    tokens = tokens_by_peer(commits)
    return {
        "rounds_committed": len(commits),
        "contributors_per_round": [
            {"round": c.round, "attempt": c.attempt, "contributors": c.contributors} for c in commits
        ],
        "tokens_committed": sum(tokens.values()),
        "tokens_per_peer": tokens,
    }


def of_losses(events: Sequence[Event], clock: Callable[[float], float | None]) -> Report:
    heldout = heldout_of(events)
    return {
        "heldout_loss_first": heldout[0][1] if heldout else None,
        "heldout_loss_last": heldout[-1][1] if heldout else None,
        "heldout_loss": heldout,
        "train_loss": train_of(events, lambda event: position_of(event, clock)),
    }


def placed(kill: Report, clock: Callable[[float], float | None]) -> Report:
    """With its place on the axis of rounds, for the picture."""
    at = kill["time_unix"]
    position = None if at is None else clock(at)
    return {**kill, "position": kill["round"] if position is None else round(position, 3)}


def peers_of(events: Iterable[Event], facts: Iterable[str], commits: Iterable[Commit]) -> list[str]:
    seen = set(facts).union(*(commit.contributors for commit in commits))
    return sorted(seen | {str(event["peer"]) for event in named(events, "peer.joined") if event.get("peer")})


def run_seconds(events: Iterable[Event]) -> float | None:
    times = [at for event in events if (at := number(event, "time_unix")) is not None]
    return since(min(times), max(times)) if times else None


def equal(hashes: Iterable[object]) -> bool | None:
    """None if a hash is missing: unknown is not equal."""
    known = list(hashes)
    return None if not known or None in known else len(set(map(str, known))) == 1


def versions() -> dict[str, str | None]:
    """Of what takes part in the numbers; read from metadata, so that nothing heavy is imported."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def jsonable(value: Any) -> Any:
    """As JSON can say it: not-a-number and infinities become None, bytes text, keys strings, anything else its str."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if value is None or isinstance(value, (str, int)) else str(value)


def write_report(out: Path, report: Mapping[str, Any]) -> Path:
    """Write `out`/report.json at once: a reader finds the whole report or none. Raises OSError."""
    path = out / "report.json"
    text = json.dumps(jsonable(report), indent=2, ensure_ascii=False)
    # A lone surrogate, as in an undecodable file name, is no UTF-8; it is written as an escape instead.
    replace_with(path, lambda scratch: scratch.write_bytes((text + "\n").encode("utf-8", "backslashreplace")))
    return path


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


# --- in words --------------------------------------------------------------------------------------------------------


def summary(report: Mapping[str, Any]) -> str:
    """A few lines for the end of the run."""
    peers, rounds, wall = report.get("peers") or [], report.get("rounds_committed") or 0, report.get("wall_seconds")
    ended = "interrupted after" if report.get("interrupted") else "finished:"
    lines = [
        f"{ended} {counted(rounds, 'round')} committed by {counted(len(peers), 'peer')} ({joined(peers)})"
        + (f" in {wall:.0f} s" if wall is not None else ""),
        heldout_words(report),
        f"tokens     {count(report.get('tokens_committed') or 0)}: {amounts(report.get('tokens_per_peer'), count)}",
        f"sent       {amounts(report.get('bytes_sent_per_peer'), human_bytes)}",
        *(f"kill       {kill_words(kill)}" for kill in report.get("kills") or []),
        f"state      {state_words(report)}",
    ]
    return "\n".join(lines)


def counted(amount: int, noun: str) -> str:
    return f"{amount} {noun}" if amount == 1 else f"{amount} {noun}s"


def count(amount: float) -> str:
    return f"{amount:,.0f}"


def amounts(by_peer: Mapping[str, float | None] | None, form: Callable[[float], str]) -> str:
    told = [f"{peer} {'?' if value is None else form(value)}" for peer, value in (by_peer or {}).items()]
    return ", ".join(told) or "not known"


def heldout_words(report: Mapping[str, Any]) -> str:
    first, last = report.get("heldout_loss_first"), report.get("heldout_loss_last")
    if first is None or last is None:
        return "held out   never evaluated"
    change = f" ({(last - first) / first:+.0%})" if first else ""
    return f"held out   {first:.3f} -> {last:.3f} nats/byte{change}"


def kill_words(kill: Mapping[str, Any]) -> str:
    finished = {True: "the others finished it", False: "the others did not finish it", None: "its end is not known"}
    again = "it has not contributed again"
    if kill.get("contributed_again_round") is not None:
        after = seconds_words(kill.get("contributed_again_seconds"))
        again = f"it contributed again in round {kill['contributed_again_round']}, {after} after the kill"
    return (
        f"{kill.get('peer')} in round {'?' if kill.get('round') is None else kill['round']}: "
        f"{finished[kill.get('survivors_finished_round')]}; "
        f"detected after {seconds_words(kill.get('detected_seconds'))}; {again}"
    )


def seconds_words(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.2f} s"


def state_words(report: Mapping[str, Any]) -> str:
    hashes = report.get("state_hash") or {}
    match report.get("state_hashes_equal"):
        case True:
            return f"the same on all {counted(len(hashes), 'peer')}: {str(next(iter(hashes.values())))[:16]}"
        case False:
            return "DIFFERS: " + ", ".join(f"{peer} {str(value)[:16]}" for peer, value in hashes.items())
        case _:
            return "not known on every peer"


# --- the picture -----------------------------------------------------------------------------------------------------


def draw_loss(path: Path, report: Mapping[str, Any]) -> str | None:
    """Draw the losses by round to a PNG. None if it was drawn; else, in a line, why there is no picture."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return NO_MATPLOTLIB
    figure = Figure(figsize=(11, 5.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    draw_curves(axes, report)
    for row, kill in enumerate(report.get("kills") or []):
        draw_kill(axes, kill, row)
    label_axes(axes, title(report))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    replace_with(path, lambda scratch: figure.savefig(scratch, format="png"))
    return None


def label_axes(axes: Any, words: str) -> None:
    axes.set_xlabel("outer round")
    axes.set_ylabel("loss (nats per byte)")
    axes.set_title(words, loc="left", fontsize=11)
    axes.locator_params(axis="x", integer=True)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "the run ended before a loss was known", ha="center", transform=axes.transAxes)


def draw_curves(axes: Any, report: Mapping[str, Any]) -> None:
    """Thin lines for what each peer trains on; one thick line for what all of them share."""
    kills = report.get("kills") or []
    for i, (peer, points) in enumerate((report.get("train_loss") or {}).items()):
        breaks = [kill["position"] for kill in kills if kill["peer"] == peer and kill.get("position") is not None]
        style = {"color": PEER_COLORS[i % len(PEER_COLORS)], "linewidth": 0.9, "alpha": 0.7}
        axes.plot(*columns(broken(points, breaks)), **style, label=f"train, {peer}")
    heldout = report.get("heldout_loss") or []
    if heldout:
        style = {"color": "black", "linewidth": 2, "marker": "o", "markersize": 3.5}
        axes.plot(*columns(heldout), **style, label="held out,\nouter parameters")


def broken(points: Sequence[Sequence[float]], breaks: Iterable[float]) -> list[Sequence[float]]:
    """With a gap at each break: no line is drawn through the time in which the peer was dead."""
    return sorted([*points, *([at, math.nan] for at in breaks)], key=lambda point: point[0])


def columns(points: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def draw_kill(axes: Any, kill: Mapping[str, Any], row: int) -> None:
    """A red line at the kill, a green one at the return, and the time between them shaded."""
    at, back = kill.get("position"), kill.get("contributed_again_round")
    height = 0.97 - 0.14 * (row % 3)
    if at is not None:
        draw_mark(axes, at, f"{kill['peer']} killed (round {kill.get('round')})", "tab:red", height)
    if back is not None:
        after = kill.get("contributed_again_seconds")
        words = f"{kill['peer']} contributes again" + ("" if after is None else f" ({after:.1f} s later)")
        draw_mark(axes, back, words, "tab:green", height - 0.065)
    if at is not None and back is not None:
        axes.axvspan(at, back, color="tab:red", alpha=0.07, linewidth=0)


def draw_mark(axes: Any, x: float, words: str, color: str, height: float) -> None:
    """A dashed line with its words beside it, on the side with more room."""
    low, high = axes.get_xlim()
    left = x > (low + high) / 2
    axes.axvline(x, color=color, linewidth=1.2, linestyle="--")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5}
    place = {"xy": (x, height), "xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    offset, side = ((-5, 0), "right") if left else ((5, 0), "left")
    axes.annotate(words, **place, xytext=offset, ha=side, va="top", color=color, fontsize=9, bbox=box)


def title(report: Mapping[str, Any]) -> str:
    peers, rounds = len(report.get("peers") or []), report.get("rounds_committed") or 0
    line = f"{counted(peers, 'peer')}, {counted(rounds, 'round')}"
    first, last = report.get("heldout_loss_first"), report.get("heldout_loss_last")
    if first is not None and last is not None:
        line += f": held-out loss {first:.2f} → {last:.2f}"
    line += " (interrupted)" if report.get("interrupted") else ""
    return "\n".join([line, *(kill_title(kill) for kill in (report.get("kills") or [])[:2])])


def kill_title(kill: Mapping[str, Any]) -> str:
    peer, back = kill.get("peer"), kill.get("contributed_again_round")
    finished = "; the survivors finished the round" if kill.get("survivors_finished_round") else ""
    returned = "; it did not come back" if back is None else f"; it contributed again in round {back}"
    return f"{peer} was killed in round {kill.get('round')}{finished}{returned}"

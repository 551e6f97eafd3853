"""`elastic checkpoint`: what checkpoints there are, what is in them, whether they are whole, and their weights."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from elastic.errors import CheckpointMismatch, ConfigurationError

from . import exits
from .report import replace_with
from .view import human_bytes

if TYPE_CHECKING:
    from elastic.checkpoints.entries import Entry, Outer

T = TypeVar("T")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
COLUMNS = ("checkpoint", "of", "written", "by", "bytes", "peers", "state")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: elastic checkpoint verify /data/checkpoints --all",
)
def command() -> None:
    """List, look into, verify and export a run's checkpoints.

    A URL is a local path, or anything that fsspec knows (s3://bucket/runs needs s3fs installed); it names the place
    given to elastic.Checkpoints, or a folder below it: of a run, of an outer loop, or of one checkpoint.
    """


@command.command("list", epilog="Example: elastic checkpoint list s3://bucket/runs")
@click.argument("url")
@AS_JSON
def list_(url: str, as_json: bool) -> None:
    """List the checkpoints at URL, newest first. Data are not read: see `verify`."""
    with told():
        rows = [row(entry) for entry in found(url)]
    show(rows, as_json, table([COLUMNS, *map(cells, rows)]))


@command.command(
    short_help="Print what a manifest says.",
    epilog="Example: elastic checkpoint inspect /data/checkpoints/c4-1b --json",
)
@click.argument("url", metavar="URL_OR_CHECKPOINT")
@AS_JSON
def inspect(url: str, as_json: bool) -> None:
    """Print what the manifest of a checkpoint says; of the newest complete one, if there are several."""
    with told():
        facts = newest(url, inside)
    show(facts, as_json, fact_lines(facts))


@command.command(epilog="Example: elastic checkpoint verify /data/checkpoints --all")
@click.argument("url")
@click.option("--all", "every", is_flag=True, help="All checkpoints, not only the newest one of each outer loop.")
@AS_JSON
def verify(url: str, every: bool, as_json: bool) -> None:
    """Read checkpoints in full and check every hash. Exit code 3 if one is bad.

    One whose writing was never finished (it has no manifest) is named, and is not bad: nobody takes it for one.
    """
    with told():
        results = [verified(entry) for entry in (found(url) if every else firsts(found(url)))]
    show(results, as_json, (line for result in results for line in verdict(result)))
    states = {result["state"] for result in results}
    if "bad" in states or "good" not in states:
        sys.exit(exits.DATA)


@command.command(
    short_help="Write the weights as safetensors.",
    epilog="Example: elastic checkpoint export /data/checkpoints/c4-1b model.safetensors",
)
@click.argument("url", metavar="CHECKPOINT")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.safetensors")
def export(url: str, out: Path) -> None:
    """Write the outer parameters of a checkpoint, verified, under the model's own names and shapes, in float32.

    Of several, the newest good one is taken. The file suits
    model.load_state_dict(safetensors.torch.load_file(OUT), strict=False); buffers are not in it.
    """
    with told():
        if out.exists():
            raise Refused(exits.OUTPUT, f"{out} exists; choose another name")
        outer = newest(url, lambda entry: entry.outer())
        tensors = write_model(outer, out)
    click.echo(f"{out}: {len(tensors)} tensors of {outer.entry.folder}")


# --- finding ----------------------------------------------------------------------------------------------------------


def found(url: str) -> list[Entry]:
    from elastic.checkpoints.entries import find

    entries = find(url)
    if not entries:
        raise Refused(exits.DATA, f"there are no checkpoints at {url}")
    return entries


def newest(url: str, read: Callable[[Entry], T]) -> T:
    """What `read` makes of the newest checkpoint that it takes; says which ones it does not."""
    entries = found(url)
    loops = sorted({str(entry.folder.parent) for entry in entries})
    if len(loops) > 1:
        raise Refused(exits.USAGE, f"{url} holds several outer loops; name one of {', '.join(loops)}")
    for entry in entries:
        try:
            return read(entry)
        except CheckpointMismatch as error:
            if len(entries) == 1:
                raise
            complain(str(error))
    raise Refused(exits.DATA, f"no checkpoint at {url} is good")


def firsts(entries: Sequence[Entry]) -> list[Entry]:
    """The newest of each outer loop that was finished, and the unfinished ones before it."""
    chosen, done = [], set()
    for entry in entries:
        loop = str(entry.folder.parent)
        if loop not in done:
            chosen.append(entry)
            if entry.finished:
                done.add(loop)
    return chosen


# --- facts ------------------------------------------------------------------------------------------------------------


def row(entry: Entry) -> dict[str, Any]:
    """What `list` knows. state: complete, unfinished, or what is wrong."""
    folder = entry.folder
    facts: dict[str, Any] = {"checkpoint": str(folder), "run": folder.parent.parent.name, "tag": folder.parent.name}
    facts |= {"version": entry.number, "state_hash": None, "time_unix": None, "writer": None, "bytes": None}
    try:
        manifest = entry.manifest()
    except CheckpointMismatch as error:
        state = str(error).removeprefix(f"{folder}/") if entry.finished else "unfinished"
        return {**facts, "peers": entry.peers(), "state": state}
    known: dict[str, Any] = {"run": manifest.run, "tag": manifest.tag, "state_hash": manifest.identity[1]}
    known |= {"time_unix": manifest.time_unix, "writer": manifest.writer, "bytes": manifest.outer.bytes}
    return {**facts, **known, "peers": entry.peers(), "state": "complete"}


def inside(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest()
    version, state_hash = manifest.identity
    named = [shape for fragment in manifest.fragments for shape in fragment.parameters]
    return {
        "checkpoint": str(entry.folder),
        "run": manifest.run,
        "tag": manifest.tag,
        "version": version,
        "state_hash": state_hash,
        "time_unix": manifest.time_unix,
        "writer": manifest.writer,
        "library": manifest.library,
        "algorithm": manifest.algorithm,
        "fingerprint": manifest.fingerprint,
        "fragments": [{"version": f.version, "state_hash": f.state_hash} for f in manifest.fragments],
        "parameters": {name: list(shape) for name, shape in named},
        "files": {manifest.outer.name: manifest.outer.bytes},
        "peers": entry.peers(),
        "run_state_bytes": len(manifest.run_state),
        "summary": manifest.summary,
    }


def verified(entry: Entry) -> dict[str, Any]:
    """state: good, bad or unfinished. problems: what is wrong with which file."""
    facts = {"checkpoint": str(entry.folder), "version": entry.number}
    if not entry.finished:
        return {**facts, "state": "unfinished", "problems": []}
    problems = [{"file": problem.file, "reason": problem.reason} for problem in entry.problems()]
    return {**facts, "state": "bad" if problems else "good", "problems": problems}


# --- words ------------------------------------------------------------------------------------------------------------


def cells(row: dict[str, Any]) -> list[str]:
    return [
        Path(row["checkpoint"]).name,
        f"{row['run']}/{row['tag']}",
        "-" if row["time_unix"] is None else date(row["time_unix"]),
        row["writer"] or "-",
        "-" if row["bytes"] is None else human_bytes(row["bytes"]),
        ",".join(row["peers"]) or "-",
        row["state"],
    ]


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def fact_lines(facts: dict[str, Any]) -> Iterator[str]:
    parameters = facts["parameters"]
    shown = {**facts, "written": date(facts["time_unix"]), "parameters": len(parameters)}
    del shown["time_unix"]
    for name, value in shown.items():
        yield f"{name:16} {value if isinstance(value, str | int) else json.dumps(value)}"
    for name, shape in parameters.items():
        yield f"  {name} {shape}"


def verdict(result: dict[str, Any]) -> Iterator[str]:
    yield f"{result['state']:10} {result['checkpoint']}"
    for problem in result["problems"]:
        yield f"{'':10} {problem['file']}: {problem['reason']}"


def date(time_unix: float) -> str:
    try:
        return datetime.fromtimestamp(time_unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return str(time_unix)


# --- output -----------------------------------------------------------------------------------------------------------


def write_model(outer: Outer, out: Path) -> dict[str, Any]:
    """Writes a safetensors file at once; returns its tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    manifest, tensors = outer.manifest, outer.parameters()
    version, state_hash = manifest.identity
    about = {"run": manifest.run, "tag": manifest.tag, "version": str(version), "state_hash": state_hash}
    about |= {"algorithm": manifest.algorithm, "format": "pt"}
    try:
        replace_with(out, lambda scratch: save_file(tensors, scratch, metadata=about))
    except (OSError, SafetensorError) as error:
        raise Refused(exits.OUTPUT, f"cannot write {out}: {error}") from None
    return tensors


def show(facts: Any, as_json: bool, lines: Iterable[str]) -> None:
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for line in lines:  # names come from files that anybody may have written
        click.echo("".join(c if c.isprintable() else "?" for c in line))


def complain(message: str) -> None:
    click.echo(f"elastic checkpoint: {message}", err=True)


class Refused(Exception):
    """Ends the command with one line and an exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def told() -> Iterator[None]:
    """What goes wrong, in one line and an exit code."""
    try:
        yield
    except Refused as error:
        refuse(error.code, error)
    except ConfigurationError as error:
        refuse(exits.USAGE, error)
    except CheckpointMismatch as error:
        refuse(exits.DATA, error)
    except (ConnectionError, TimeoutError) as error:
        refuse(exits.NETWORK, error)
    except OSError as error:
        refuse(exits.DATA, error)


def refuse(code: int, error: Exception) -> None:
    complain(str(error))
    sys.exit(code)

"""`elastic checkpoint`: what checkpoints there are, what is in them, whether they are whole, and their weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from elastic.errors import CheckpointMismatch, ConfigurationError

from . import exits
from .report import human_bytes

if TYPE_CHECKING:
    from elastic.entries import Entry, Outer
    from elastic.manifest import Manifest

AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
COLUMNS = ("checkpoint", "of", "written", "by", "bytes", "peers", "state")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
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
    if as_json:
        say_json(rows)
    else:
        say_table([*COLUMNS], [words(row) for row in rows])


@command.command(epilog="Example: elastic checkpoint inspect /data/checkpoints/c4-1b --json")
@click.argument("url", metavar="URL_OR_CHECKPOINT")
@AS_JSON
def inspect(url: str, as_json: bool) -> None:
    """Print what the manifest of a checkpoint says; of the newest complete one, if there are several."""
    with told():
        entry, manifest = newest(url, lambda entry: entry.manifest())
        facts = inside(entry, manifest)
    if as_json:
        say_json(facts)
    else:
        say_facts(facts)


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
    if as_json:
        say_json(results)
    else:
        for line in (line for result in results for line in verdict(result)):
            say(line)
    if not any(result["state"] == "good" for result in results) or any(r["state"] == "bad" for r in results):
        sys.exit(exits.DATA)


@command.command(epilog="Example: elastic checkpoint export /data/checkpoints/c4-1b model.safetensors")
@click.argument("url", metavar="CHECKPOINT")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.safetensors")
def export(url: str, out: Path) -> None:
    """Write the outer parameters of a checkpoint, verified, under the model's own names and shapes, in float32.

    Of several, the newest good one is taken. The file suits
    model.load_state_dict(safetensors.torch.load_file(OUT), strict=False); buffers are not in it.
    """
    with told():
        _, outer = newest(url, lambda entry: entry.outer())
    try:
        write_model(outer, out)
    except FileExistsError:
        refuse(exits.OUTPUT, f"{out} exists; choose another name")
    except OSError as error:
        refuse(exits.OUTPUT, f"cannot write {out}: {error.strerror or error}")
    parameters = outer.parameters()
    numbers = sum(tensor.numel() for tensor in parameters.values())
    say(f"{out}: {len(parameters)} tensors, {numbers:,} numbers, from {outer.entry.folder}")


# --- finding ----------------------------------------------------------------------------------------------------------


def found(url: str) -> list[Entry]:
    from elastic.entries import find

    entries = find(url)
    if not entries:
        refuse(exits.DATA, f"no checkpoints at {url}")
    return entries


def newest[T](url: str, read: Callable[[Entry], T]) -> tuple[Entry, T]:
    raise NotImplementedError

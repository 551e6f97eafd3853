"""`elastic bench`: the measurements behind docs/benchmarks.md, on this machine.

They live in `benchmarks`, beside `cli` in a checkout and inside it in an installed copy, and run in processes of their
own, which find each other by that folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click

from . import exits

HERE = Path(__file__).parent
SIZE = click.FloatRange(1 / 16, 1 << 20)


def home() -> Path:
    """The folder that `benchmarks` lies in."""
    for folder in (HERE.parent, HERE):
        if (folder / "benchmarks" / "join.py").exists():
            return folder
    raise click.ClickException("the folder 'benchmarks' is missing: install elastic-diloco again, or use a checkout")


def measure(name: str, *arguments: str, json_: str | None) -> None:
    """Runs one of them, and ends as it does."""
    folder = home()
    where = [] if json_ is None else ["--json", json_ if json_ == "-" else str(Path(json_).resolve())]
    paths = [str(folder), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, *where]
    try:
        code = subprocess.run(command, cwd=folder, env=environment).returncode
    except KeyboardInterrupt:
        code = exits.INTERRUPTED
    sys.exit(exits.FAILED if code not in (exits.OK, exits.USAGE, exits.INTERRUPTED) else code)


@click.group(epilog="Example: elastic bench join --repeat 3")
def command() -> None:
    """Measure on this machine what docs/benchmarks.md reports of another."""


_repeat = click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each kind.")
_json = click.option("--json", "json_", metavar="FILE", help="Write all samples there too; - prints them alone.")


@command.command(epilog="Example: elastic bench join --repeat 3 --json join.json")
@click.option("--size", type=SIZE, default=128, show_default=True, help="MiB of parameters; the state is twice that.")
@click.option("--wan", is_flag=True, help="From three sites of an emulated WAN; needs root and /dev/net/tun.")
@click.option("--access", type=click.FloatRange(1), default=200, show_default=True, help="--wan: the joiner's Mbit/s.")
@click.option("--cc", default="cubic", show_default=True, help="Congestion control of all sides.")
@_repeat
@_json
def join(size: float, wan: bool, access: float, cc: str, repeat: int, json_: str | None) -> None:
    """A peer joins three that train: how long it takes, and what they feel of it.

    Beside it, by turns: as many bytes over one plain TCP connection, and by a gloo broadcast.
    """
    words = ["--size", f"{size:g}", "--repeat", str(repeat), "--cc", cc]
    measure("join", *words, *(["--wan", "--access", f"{access:g}"] if wan else []), json_=json_)


@command.command(epilog="Example: elastic bench recovery --size 64 --repeat 3")
@click.option("--size", type=SIZE, default=256, show_default=True, help="MiB of float32 that are reduced.")
@click.option("--faults", default="SIGKILL,SIGSTOP", show_default=True, help="What befalls the victim.")
@_repeat
@_json
def recovery(size: float, faults: str, repeat: int, json_: str | None) -> None:
    """One of three peers is killed or frozen in mid all-reduce: how long until the others have the right sum?"""
    measure("recovery", "--size", f"{size:g}", "--faults", faults, "--repeat", str(repeat), json_=json_)


@command.command(epilog="Example: elastic bench overlap --rates 50 --periods 2")
@click.option("--rates", default="1000,200,50", show_default=True, help="Mbit/s, one link after the other.")
@click.option("--rtt", type=click.FloatRange(0), default=30, show_default=True, help="Milliseconds of a round trip.")
@click.option("--periods", type=click.IntRange(1), default=4, show_default=True, help="Of 32 steps, measured.")
@click.option("--cc", default="cubic", show_default=True, help="Congestion control.")
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@_json
def overlap(rates: str, rtt: float, periods: int, cc: str, markdown: bool, json_: str | None) -> None:
    """What share of the time peers compute, under each outer loop, on links of several rates.

    Two sites of an emulated WAN; needs root and /dev/net/tun. Compute is a timed wait. Takes about 8 minutes.
    """
    words = ["--rates", rates, "--rtt-ms", f"{rtt:g}", "--periods", str(periods), "--cc", cc]
    measure("overlap", *words, *(["--markdown"] if markdown else []), json_=json_)


@command.command(epilog="Example: elastic bench faults --repeat 3 --json faults.json")
@click.option("--loopback", is_flag=True, help="No emulated WAN: without slow links, and needs no root.")
@click.option("--clean", type=click.FloatRange(0), default=0, metavar="SECONDS", help="Inject nothing; with jitter.")
@click.option("--goodput", is_flag=True, help="Tokens per second, undisturbed and with a kill now and then.")
@click.option("--seconds", type=click.FloatRange(1), default=120, show_default=True, help="--goodput: of each run.")
@click.option("--every", type=click.FloatRange(1), default=30, show_default=True, help="--goodput: between kills.")
@click.option("--kinds", help="Of faults, by their titles, with commas between.  [default: all]")
@click.option("--size", type=SIZE, default=8, show_default=True, help="MiB of parameters.")
@click.option("--cc", default="cubic", show_default=True, help="Congestion control.")
@click.option(
    "--repeat", type=click.IntRange(1), default=5, show_default=True, help="Injections of each kind, or runs."
)
@click.option("--markdown", is_flag=True, help="Print the table as Markdown.")
@_json
def faults(
    loopback: bool,
    clean: float,
    goodput: bool,
    seconds: float,
    every: float,
    kinds: str | None,
    size: float,
    cc: str,
    repeat: int,
    markdown: bool,
    json_: str | None,
) -> None:
    """Faults befall a run of four peers: are they named, is it the right culprit, how long does it take?

    Five sites of an emulated WAN; needs root and /dev/net/tun, or --loopback. Compute is a timed wait. Takes some
    4 minutes for each turn of --repeat.
    """
    words = ["--repeat", str(repeat), "--size", f"{size:g}", "--cc", cc]
    words += ["--goodput", "--seconds", f"{seconds:g}", "--every", f"{every:g}"] if goodput else []
    words += ["--clean", f"{clean:g}"] if clean else []
    words += ["--kinds", kinds] if kinds else []
    words += [f"--{name}" for name, wanted in (("loopback", loopback), ("markdown", markdown)) if wanted]
    measure("faults", *words, json_=json_)

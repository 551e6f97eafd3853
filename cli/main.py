"""The `elastic` command. Commands are imported when they are called, so that `elastic --help` answers at once."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version

import click

COMMANDS = {
    "demo": "Train a small GPT with three peers on this machine; one is killed on the way.",
    "coordinator": "Run a coordinator; or bring a run back whose coordinator is lost.",
    "join": "Join a run with peers on this machine, and keep them alive.",
    "leave": "Ask a peer or a site to leave a run in good order.",
    "submit": "Run a training script as a job of a running Ray, and follow it.",
    "status": "Show a run's peers, its progress and its data, or audit a journal.",
    "events": "Show what has happened in a run, from its event logs; as it happens, too.",
    "replay": "Show again how a run went, from its event logs.",
    "config": "Show the values that hold here, and where each comes from.",
    "doctor": "Say whether this machine can take part in a run, and what to set.",
    "checkpoint": "List, look into, verify and export a run's checkpoints.",
    "chaos": "Inject faults on purpose into the processes of a run on this machine.",
    "plan": "Predict utilisation over given links, and recommend how to train.",
    "completion": "Print a script by which a shell completes commands and options.",
    "bench": "Measure on this machine: joining a run, recovering from a loss.",
}


class LazyGroup(click.Group):
    """Knows its commands by name and one line of help; imports `cli.NAME` only to run one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cli.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _version() -> str:
    try:
        return version("elastic-diloco")
    except PackageNotFoundError:
        return "unknown (not installed)"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(_version(), prog_name="elastic")
def main() -> None:
    """Train one model on machines that come and go, over the ordinary internet.

    \b
    Example:
      elastic demo --rounds 12
    """


if __name__ == "__main__":
    main()

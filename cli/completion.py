"""`elastic completion`: what makes a shell complete `elastic`'s commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog="Example: elastic completion bash > ~/.local/share/bash-completion/completions/elastic")
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print a shell's completion script.

    \b
    bash:  elastic completion bash > ~/.local/share/bash-completion/completions/elastic
    zsh:   elastic completion zsh > ~/.zfunc/_elastic     (with fpath+=~/.zfunc before compinit)
    fish:  elastic completion fish > ~/.config/fish/completions/elastic.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(context.find_root().command, {}, "elastic", "_ELASTIC_COMPLETE").source())

"""`elastic completion`: what a shell is given, and what it completes with that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import exits
from cli.main import COMMANDS, main

HERE = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete "), ("zsh", "#compdef elastic"), ("fish", "complete ")]
)
def test_each_shell_gets_its_script(shell: str, words: str) -> None:
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == exits.OK and words in result.output and "_ELASTIC_COMPLETE" in result.output


def completed(*typed: str) -> list[str]:
    """As bash asks, by the script's protocol."""
    environment = os.environ | {
        "PYTHONPATH": str(HERE),
        "_ELASTIC_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("elastic", *typed)),
        "COMP_CWORD": str(len(typed)),
    }
    code = "import sys; sys.argv = ['elastic']; from cli.main import main; main(prog_name='elastic')"
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True).stdout
    return [line.partition(",")[2] for line in output.splitlines()]


def test_commands_and_options_are_completed() -> None:
    assert set(completed("")) == COMMANDS.keys()
    assert completed("stat") == ["status"]
    assert "--watch" in completed("status", "--w")


def test_bash_takes_the_script(tmp_path: Path) -> None:
    script = tmp_path / "elastic"
    script.write_text(CliRunner().invoke(main, ["completion", "bash"]).output)
    found = subprocess.run(["bash", "-c", f"source {script} && complete -p elastic"], capture_output=True, text=True)
    assert found.returncode == 0 and "_elastic_completion" in found.stdout

"""`elastic coordinator`, as a user runs it: processes, signals, exit codes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import elastic
from cli.main import main

HERE = Path(__file__).parents[2]


# In a process of its own, in which a recovery asks early.
COMMAND = "import cli.coordinator, cli.main; cli.coordinator.ASK_SECONDS = 2.0; cli.main.main()"


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", COMMAND, "coordinator", "--run", "test", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def line(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    """The next line that matches."""
    assert process.stdout is not None
    for each in process.stdout:
        if found := re.search(pattern, each):
            return found
    raise AssertionError(f"it ended before it said {pattern}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def test_it_prints_where_the_run_is_and_is_found_again_after_a_kill(tmp_path: Path) -> None:
    port = free_port()
    arguments = ("--bind", f"127.0.0.1:{port}", "--token", "run.token")
    with serving(tmp_path, *arguments) as process:
        token = line(process, r"ELASTIC_JOIN=(elastic://\S+)").group(1)
        assert (tmp_path / "run.token").read_text().strip() == token
        with elastic.Peer(token=token, name="p0") as peer:
            assert peer.all_reduce(torch.ones(2)).contributors == ("p0",)
            process.send_signal(signal.SIGKILL)
            process.wait()
            with serving(tmp_path, *arguments) as second:
                line(second, "ELASTIC_JOIN")
                assert peer.all_reduce(torch.ones(2), timeout=30).contributors == ("p0",)
                assert peer.life == 1
                second.send_signal(signal.SIGTERM)
                assert second.wait(20) == 0


def test_a_lost_journal_is_rebuilt_elsewhere_and_a_minority_is_asked_about(tmp_path: Path) -> None:
    ports = free_port(), free_port()
    token = f"elastic://127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}/test"
    with serving(tmp_path, "--bind", f"127.0.0.1:{ports[0]}") as first:
        line(first, "ELASTIC_JOIN")
        peers = [elastic.Peer(token=token, name=f"p{i}") for i in range(2)]
        for peer in peers:
            peer.wait_for(2)
    try:
        peers[1].close()
        arguments = ("--bind", f"127.0.0.1:{ports[1]}", "--journal", "new.sqlite", "--recover", "--accept-minority")
        with serving(tmp_path, *arguments) as second:
            assert line(second, r"recovering: (.*)").group(1) == "0 of 0 peers of the last view have come: nobody"
            assert "1 of 2 peers of the last view have come: p0" in line(second, r"recovering: 1.*").string
            line(second, r"recovered: 0 rounds, 0 tokens")
            assert peers[0].all_reduce(torch.ones(2), timeout=30).contributors == ("p0",)
    finally:
        for peer in peers:
            peer.close()


def test_the_token_holds_what_others_dial(tmp_path: Path) -> None:
    with serving(
        tmp_path, "--bind", "0.0.0.0:0", "--advertise", "203.0.113.5:29400", "--token", "run.token"
    ) as process:
        assert line(process, r"ELASTIC_JOIN=(\S+)").group(1) == "elastic://203.0.113.5:29400/test"
        assert (tmp_path / "run.token").read_text() == "elastic://203.0.113.5:29400/test\n"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--run", "a b"], 2, "is not a name"),
        (["--run", "x", "--bind", "nowhere"], 2, "is not HOST:PORT"),
        (["--run", "x", "--journal", "text"], 3, "text is no journal of elastic"),
        (["--run", "x", "--min-peers", "0"], 2, "min-peers"),
        (["--run", "x", "--token", "nowhere/token"], 5, "cannot write nowhere/token"),
        (["--run", "x", "--advertise", "203.0.113.5"], 2, "--advertise: coordinator address '203.0.113.5' is not HOST"),
        ([], 2, "--run"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("this is some text that was here before")
    result = CliRunner().invoke(main, ["coordinator", "--bind", "127.0.0.1:0", *arguments])
    assert result.exit_code == code and words in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "text").read_text().startswith("this is some text")


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        bind = f"127.0.0.1:{server.getsockname()[1]}"
        result = CliRunner().invoke(main, ["coordinator", "--run", "x", "--no-journal", "--bind", bind])
    assert result.exit_code == 4 and "the port is in use; choose another" in result.stderr
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "its handlers stay behind"

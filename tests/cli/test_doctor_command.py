"""`elastic doctor`: what it prints, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from click.testing import CliRunner, Result

from cli import exits
from cli.main import main
from elastic.coordinator import Coordinator
from elastic.doctor import visiting
from elastic.doctor.pairing import VISIT, Greeting, Hello, Line, Welcome

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("ELASTIC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(visiting, "COUNTS", (1, 2))
    monkeypatch.setattr(visiting, "controls", lambda here, there: ("",))


def doctor(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def told(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.output)
    return found


def level(found: dict[str, Any], check: str) -> list[str]:
    return [each["level"] for each in found["checks"] if each["check"] == check]


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], str, IO[str]]]:
    """A doctor in a process of its own, on loopback: that, its address, and what it prints after the first line."""
    words = [sys.executable, "-m", "cli.main", "doctor", "--serve", "127.0.0.1:0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("on 127.0.0.1:") and "elastic doctor --with ADDRESS-OF-THIS-MACHINE:" in first
            yield process, first.split(";")[0].removeprefix("on "), process.stdout
        finally:
            process.kill()


@pytest.fixture
def free() -> str:
    """An address on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return f"127.0.0.1:{sock.getsockname()[1]}"


def test_a_person_gets_a_line_for_each_check_and_what_to_set() -> None:
    result = doctor()
    lines = result.output.splitlines()
    levels = [line.split()[0] for line in lines]
    cut = lines.index("recommended settings") if "recommended settings" in lines else len(lines)
    assert set(levels[:cut]) <= {"ok", "note", "problem"} and cut >= 12
    assert all(("->" in line) == (name != "ok") for line, name in zip(lines[:cut], levels[:cut], strict=True))
    assert all(line.startswith(("  sysctl -w ", "  export ", "  elastic.LinkOptions(")) for line in lines[cut + 1 :])
    assert result.exit_code == (exits.FAILED if "problem" in levels[:cut] else exits.OK)
    assert "Python 3." in lines[0] and "\x1b" not in result.output


def test_a_program_gets_one_json_object() -> None:
    result = doctor("--json")
    found = told(result)
    assert {each["level"] for each in found["checks"]} <= {"ok", "note", "problem"}
    assert found["facts"]["machine"]["python"].startswith("3.")
    assert all(set(each) == {"by", "name", "value"} for each in found["settings"])


def test_variables_that_cannot_be_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELASTIC_JION", "elastic://h:1/r")
    monkeypatch.setenv("ELASTIC_STRIPES", "100")
    result = doctor()
    assert result.exit_code == exits.FAILED
    assert "did you mean ELASTIC_JOIN?" in result.output and "choose 1 to 64" in result.output


def test_a_coordinator_that_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Coordinator(run="corn") as coordinator:
        found = told(doctor(coordinator.token, "--json"))
        assert level(found, "coordinator") == ["ok"] and level(found, "run") == ["ok"]
        assert found["facts"]["run"]["addresses"][0]["local"] == "127.0.0.1"
        (tmp_path / "token").write_text(f"{coordinator.token}\n")
        assert "corn: 0 peers, generation 1" in doctor(f"@{tmp_path / 'token'}").output
        monkeypatch.setenv("ELASTIC_JOIN", str(coordinator.token))
        assert "corn: 0 peers" in doctor().output
        other = doctor(str(coordinator.token).replace("corn", "wheat"))
        assert other.exit_code == exits.FAILED and "serves run 'corn'" in other.output


def test_a_coordinator_that_is_not_there_is_a_network_error(free: str) -> None:
    result = doctor(f"elastic://{free}/corn", "--timeout", 0.5)
    assert result.exit_code == exits.NETWORK and "nobody listens on that port" in result.output
    result = doctor("elastic://no-such-host.invalid:29400/corn", "--timeout", 0.5)
    assert result.exit_code == exits.NETWORK and "the name no-such-host.invalid is not found" in result.output


def test_what_accepts_and_never_answers_is_a_network_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        result = doctor(f"elastic://127.0.0.1:{silent.getsockname()[1]}/corn", "--timeout", 0.5, "--json")
    assert result.exit_code == exits.NETWORK
    assert level(told(result), "coordinator") == ["ok"] and level(told(result), "run") == ["problem"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("http://h/r",), "a join token looks like elastic://HOST:PORT/RUN"),
        (("@/no/such/file",), "cannot read the join token"),
        (("--with", "host"), "is not host:port"),
        (("--serve", "host"), "is not host:port"),
        (("--serve", "127.0.0.1:0", "--with", "h:1"), "--serve goes without"),
        (("--seconds", "31"), "not in the range"),
    ],
)
def test_arguments_that_cannot_be(arguments: tuple[str, ...], words: str) -> None:
    result = doctor(*arguments)
    assert result.exit_code == exits.USAGE and words in result.output and "Traceback" not in result.output


def test_a_port_that_is_taken_is_a_network_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = doctor("--serve", f"127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == exits.NETWORK and "cannot listen on" in result.output


def test_another_doctor_that_is_not_there_is_a_network_error(free: str) -> None:
    result = doctor("--with", free)
    assert result.exit_code == exits.NETWORK and "elastic doctor --serve 0.0.0.0:" in result.output


def test_both_sides_and_ctrl_c() -> None:
    with serving() as (process, address, printed):
        for number in (1, 2):
            result = doctor("--with", address, "--seconds", 0.2, "--json")
            found = told(result)
            for check in ("round trip", "clocks", "bandwidth to there", "bandwidth from there", "to be dialled"):
                assert level(found, check), result.output
            samples = found["facts"]["pair"]["samples"]
            assert [(each["up"], each["connections"]) for each in samples[:2]] == [(True, 1), (False, 1)]
            assert all(each["rate"] > 1e6 for each in samples)
            assert "4 measurements in" in printed.readline(), number
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 20) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert stranger.recv(100) == b""
        result = doctor("--with", address, "--seconds", 0.2)
        assert f"{address} reaches 127.0.0.1:" in result.output, result.output
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == exits.OK
        assert len(printed.read().splitlines()) == 1


def test_ctrl_c_in_mid_visit_ends_it() -> None:
    with serving() as (process, address, printed):
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 20) as sock:
            sock.sendall(Greeting(VISIT).pack())
            line = Line(sock, beaten=True)
            welcome = line.hear(Welcome)
            line.say(Hello(side=welcome.side))
            process.send_signal(signal.SIGINT)
            with pytest.raises(OSError):
                line.hear(Welcome)
        assert process.wait(30) == exits.OK
        assert "it ended early" in printed.read()

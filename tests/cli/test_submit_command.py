"""`elastic submit`, as a user runs it: on a Ray that does not know elastic; signals, lost connections, bad input."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from ray_head import Head, bare_python, free_ports, ray_head

from cli.main import main

pytestmark = pytest.mark.timeout(400)

HERE = Path(__file__).parents[2]
PATIENCE = "import actors.jobs, cli.main; actors.jobs.PATIENCE_SECONDS = {seconds}; cli.main.main()"

REMOTE = """
import os, sys
import ray
import elastic, actors.settings, cli.main

@ray.remote
def there():
    import collectives, elastic, fault
    return [collectives.__file__, elastic.__file__, fault.__file__, os.environ["FLAVOUR"], open("note.txt").read()]

ray.init(log_to_driver=False, logging_level="ERROR")
for each in ray.get(there.remote()):
    print("PEER", each)
print("DRIVER", elastic.__file__, elastic.ScalingConfig(num_peers=2).most)
print("ARGUMENTS", sys.argv[1:])
print("LEFT OUT", [name for name in ("secret.bin", "big.bin", ".git") if not os.path.exists(name)])
"""

LEAVING = """
import signal, sys, time

def leave(number, frame):
    for step in range(6):
        print("leaving", step, flush=True)
        time.sleep(1)
    print("all is saved", flush=True)
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
print("ready", flush=True)
time.sleep(600)
"""

HALVES = """
import pathlib, signal, sys, time

def wait():
    while not pathlib.Path(sys.argv[1]).exists():
        time.sleep(0.1)

def leave(number, frame):
    wait()
    sys.exit(0)

signal.signal(signal.SIGTERM, leave)
for i in range(10):
    print("line", i, flush=True)
wait()
for i in range(10, 20):
    print("line", i, flush=True)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On whose side elastic is not installed, and that is so."""
    found = bare_python(tmp_path_factory.mktemp("python") / "bare")
    for module, there in (("ray", True), ("elastic", False)):
        asked = subprocess.run([found, "-I", "-c", f"import {module}"], capture_output=True)
        assert (asked.returncode == 0) is there, f"{module}: {asked.stderr.decode()}"
    return found


@pytest.fixture(scope="module")
def head(python: Path) -> Iterator[Head]:
    with ray_head(python) as started:
        yield started


def environment(head: Head) -> dict[str, str]:
    strange = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    kept = {name: value for name, value in os.environ.items() if name not in strange}
    return kept | head.environment | {"PYTHONPATH": str(HERE)}


def submit(head: Head, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "submit", "--address", head.address, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment(head), timeout=200)


class Running:
    """A command under way, and what it has said so far."""

    def __init__(self, head: Head, *words: str, cwd: Path, address: str = "", patience: float = 30.0) -> None:
        code = PATIENCE.format(seconds=patience)
        command = [sys.executable, "-c", code, "submit", "--address", address or head.address, *words]
        merged = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=cwd, env=environment(head), **merged)  # type: ignore[call-overload]
        self.said = ""

    def until(self, words: str, seconds: float = 180.0) -> None:
        deadline = time.monotonic() + seconds
        while words not in self.said:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            assert data, f"it did not say {words!r}: {self.said}"
            self.said += data.decode()

    def ended(self, seconds: float = 180.0) -> int:
        rest, _ = self.process.communicate(timeout=seconds)
        self.said += rest.decode()
        code: int = self.process.returncode
        return code


@contextlib.contextmanager
def running(*arguments: object, **options: object) -> Iterator[Running]:
    command = Running(*arguments, **options)  # type: ignore[arg-type]
    try:
        yield command
    finally:
        command.process.kill()
        command.process.wait()


def status(head: Head, name: str) -> str:
    """Of a job, as Ray says."""
    code = (
        "import sys; from actors.jobs import Jobs; found = Jobs(sys.argv[1]).ended(sys.argv[2]); "
        "print(found.status if found else 'RUNNING')"
    )
    command = [sys.executable, "-c", code, head.address, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment(head), check=True).stdout.strip()


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.2)


# --- on a Ray that does not know elastic ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A checkout with things in it that are not to go along."""
    for name in (".git", "jobs", "jobs/data"):
        (tmp_path / name).mkdir()
    (tmp_path / ".gitignore").write_text("*.bin\n!jobs/big.bin\n")
    (tmp_path / "jobs" / "train.py").write_text(REMOTE)
    (tmp_path / "jobs" / "note.txt").write_text("a note")
    for name in ("secret.bin", "big.bin"):
        (tmp_path / "jobs" / name).write_bytes(bytes(1000))
    return tmp_path


def test_script_folder_and_packages_go_along_to_a_ray_without_elastic(head: Head, project: Path) -> None:
    words = ("--env", "FLAVOUR=sweet sour", "--exclude", "big.bin", "--json", "--", "--lr", "3e-4 or so")
    done = submit(head, "jobs/train.py", *words, cwd=project)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["status"], facts["exit_code"], facts["address"]) == ("SUCCEEDED", 0, head.address)
    peer = re.findall(r"^PEER (.*)$", done.stderr, re.MULTILINE)
    assert peer[3:] == ["sweet sour", "a note"]
    homes = {Path(path).parents[1] for path in peer[:3]}
    assert len(homes) == 1 and "py_modules" in str(homes), "not those that were sent, or not side by side"
    assert f"DRIVER {homes.pop()}/elastic/__init__.py 2" in done.stderr
    assert "ARGUMENTS ['--lr', '3e-4 or so']" in done.stderr
    assert "LEFT OUT ['secret.bin', 'big.bin', '.git']" in done.stderr


def test_without_them_the_job_fails_and_it_is_said_why(head: Head, project: Path) -> None:
    done = submit(head, "jobs/train.py", "--installed", cwd=project)
    assert done.returncode == 1
    assert done.stdout.count("No module named 'elastic'") == 1, "elastic is installed there, or it is told twice"
    assert "elastic is not installed there: leave out --installed" in done.stderr


@pytest.mark.parametrize(
    ("code", "ends", "words"),
    [
        ("import sys; sys.exit(7)", 7, "failed: exit code 7"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 137, "failed: exit code 137"),
        ("import torchvisions_missing", 1, "torchvisions_missing is not installed there: name it with --pip"),
    ],
)
def test_it_ends_as_the_script_does(head: Head, tmp_path: Path, code: str, ends: int, words: str) -> None:
    (tmp_path / "train.py").write_text(f"print('begun')\n{code}\nprint('never')\n")
    done = submit(head, "train.py", cwd=tmp_path)
    assert done.returncode == ends and words in done.stderr, done.stdout + done.stderr
    assert "begun" in done.stdout and "never" not in done.stdout
    assert (done.stdout + done.stderr).count("Traceback (most recent call last)") == (1 if ends == 1 else 0)


def test_no_wait_and_a_name_that_is_taken(head: Head, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import time; time.sleep(2)")
    name = f"twice-{secrets.token_hex(4)}"
    done = submit(head, "train.py", "--name", name, "--no-wait", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["status"] == "PENDING"
    assert f"ray job logs --follow --address {head.address} {name}" in done.stderr
    again = submit(head, "train.py", "--submission-id", name, cwd=tmp_path)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.splitlines() == [f"elastic submit: there is a job {name} already: choose another --name"]
    until(lambda: status(head, name) == "SUCCEEDED")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_job_leave_in_its_own_time(
    head: Head, tmp_path: Path, number: signal.Signals, ends: int
) -> None:
    (tmp_path / "train.py").write_text(LEAVING)
    with running(head, "train.py", cwd=tmp_path) as command:
        command.until("ready")
        command.process.send_signal(number)
        assert command.ended() == ends
    assert "leaving 5\nall is saved" in command.said and "was stopped\n" in command.said
    assert "Traceback" not in command.said


def test_with_the_time_that_ray_gives_by_itself_it_would_have_been_cut(head: Head, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(LEAVING)
    with running(head, "train.py", "--stop-seconds", "3", cwd=tmp_path) as command:
        command.until("ready")
        command.process.send_signal(signal.SIGTERM)
        assert command.ended() == 143
    assert "leaving 0" in command.said and "all is saved" not in command.said
    assert "its 3 s were over: what it had not saved is lost" in command.said


def test_the_second_signal_leaves_at_once_and_says_how_to_come_back(head: Head, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(HALVES)
    name = f"left-{secrets.token_hex(4)}"
    words = ("train.py", "--name", name, "--stop-seconds", "200", "--", str(tmp_path / "go"))
    with running(head, *words, cwd=tmp_path) as command:
        command.until("line 9\n")
        command.process.send_signal(signal.SIGINT)
        command.until("once more leaves it alone")
        command.process.send_signal(signal.SIGINT)
        assert command.ended() == 130
    assert f"to stop it: ray job stop --address {head.address} {name}" in command.said
    assert status(head, name) == "RUNNING"
    (tmp_path / "go").touch()
    until(lambda: status(head, name) == "STOPPED")


# --- connections ------------------------------------------------------------------------------------------------------


class Relay:
    """To a port of this machine, with connections that can be cut and a port that can be closed."""

    def __init__(self, port: int) -> None:
        self.target, (self.port,) = port, free_ports(1)
        self.sockets: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        self.server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.serve, args=(self.server,), name="relay", daemon=True).start()

    def serve(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = server.accept()[0], socket.create_connection(("127.0.0.1", self.target))
                self.sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self.carry, args=pair, name="relay", daemon=True).start()

    def carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        for each in (self.server, *self.sockets):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.sockets.clear()


@pytest.fixture
def relay(head: Head) -> Iterator[Relay]:
    found = Relay(int(head.address.rpartition(":")[2]))
    yield found
    found.close()


def test_after_a_cut_connection_the_log_goes_on_where_it_was(head: Head, tmp_path: Path, relay: Relay) -> None:
    (tmp_path / "train.py").write_text(HALVES)
    words = ("train.py", "--", str(tmp_path / "go"))
    with running(head, *words, cwd=tmp_path, address=f"http://127.0.0.1:{relay.port}") as command:
        command.until("line 9\n")
        relay.close()
        (tmp_path / "go").touch()
        time.sleep(2)
        relay.open()
        assert command.ended() == 0
    assert re.findall(r"^line (\d+)$", command.said, re.MULTILINE) == [str(i) for i in range(20)]


def test_if_it_stays_cut_the_job_goes_on_and_it_is_said_how_to_follow(head: Head, tmp_path: Path, relay: Relay) -> None:
    (tmp_path / "train.py").write_text(HALVES)
    name, address = f"lost-{secrets.token_hex(4)}", f"http://127.0.0.1:{relay.port}"
    words = ("train.py", "--name", name, "--", str(tmp_path / "go"))
    with running(head, *words, cwd=tmp_path, address=address, patience=3.0) as command:
        command.until("line 9\n")
        relay.close()
        assert command.ended() == 4
    assert f"{name} may well go on" in command.said
    assert f"to follow it: ray job logs --follow --address {address} {name}" in command.said
    assert "Traceback" not in command.said
    assert status(head, name) == "RUNNING"
    (tmp_path / "go").touch()
    until(lambda: status(head, name) == "SUCCEEDED")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "good.py").write_text("print('hello')\n")
    (tmp_path / "broken.py").write_text("print('hello'\n")
    (tmp_path / "binary.py").write_bytes(b"\x00\xff\x00")
    (tmp_path / "passive.py").write_text('"""Doc."""\nimport os\nN = 3\n\ndef train(peer, config):\n    print(N)\n')
    (tmp_path / "sub").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none.py"], 3, "none.py: No such file or directory"),
        (["sub"], 3, "sub: Is a directory"),
        (["broken.py"], 3, "broken.py:1 is not Python: '(' was never closed"),
        (["binary.py"], 3, "binary.py is not Python"),
        (["passive.py"], 3, "runs nothing; end it with if __name__"),
        (["good.py", "--working-dir", "sub"], 2, "choose a --working-dir that contains it"),
        (["good.py", "--working-dir", "nowhere"], 3, "nowhere is not a folder"),
        (["good.py", "--env", "=x"], 2, "--env '=x' is not KEY=VALUE"),
        (["good.py", "--name", "a b"], 2, "is not a name"),
        (["good.py", "--address", "ray://host:10001"], 2, "is not that of a dashboard"),
        (["good.py", "--address", "http://:99999999"], 2, "is not that of a dashboard"),
        (["good.py", "--stop-seconds", "0"], 2, "stop-seconds"),
        ([], 2, "SCRIPT"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(scripts: Path, arguments: list[str], code: int, words: str) -> None:
    result = CliRunner().invoke(main, ["submit", *arguments])
    assert result.exit_code == code and words in result.stderr, result.output
    assert "Traceback" not in result.output
    if "Usage" not in result.stderr:
        assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("elastic submit: ")


def refusal(address: str) -> str:
    result = CliRunner().invoke(main, ["submit", "good.py", "--address", address])
    assert result.exit_code == 4 and len(result.stderr.splitlines()) == 1, result.output
    return result.stderr


def test_no_ray_at_the_address(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what is said wins over it
    assert f"no Ray at http://127.0.0.1:{port}: Connection refused" in refusal(f"127.0.0.1:{port}")


def test_something_that_listens_and_says_nothing(scripts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.jobs.ANSWER_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert "does not answer; is it Ray's dashboard?" in refusal(f"127.0.0.1:{server.getsockname()[1]}")


@contextlib.contextmanager
def answering(answers: dict[str, object]) -> Iterator[str]:
    """A web server that answers so; else, with a page."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(answers[self.path]).encode() if self.path in answers else b"<p>welcome</p>"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, name="answering", daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("ray", "python", "words"),
    [
        (None, None, "does not answer as Ray's dashboard"),
        ("2.9.3", "3.12.1", "has Ray 2.9.3: elastic needs 2.60 or newer there"),
        ("2.60.0", "3.9.18", "has Python 3.9.18: elastic needs 3.11 or newer there"),
    ],
)
def test_another_service_or_an_old_version(scripts: Path, ray: str | None, python: str | None, words: str) -> None:
    answers: dict[str, object] = {
        "/api/version": {"version": "4", "ray_version": ray},
        "/api/v0/cluster_metadata": {"data": {"pythonVersion": python}},
    }
    with answering(answers if ray else {}) as address:
        assert words in refusal(address)


@pytest.mark.parametrize(
    ("mode", "token", "words"),
    [
        ("token", None, "cannot read the token"),
        ("token", "", "holds no token"),
        ("token", "0" * 64, "does not accept this token"),
        ("", None, "wants a token"),
    ],
)
def test_a_wrong_token_is_said_to_be_wrong(
    head: Head, tmp_path: Path, mode: str, token: str | None, words: str
) -> None:
    if token is not None:
        (tmp_path / "token").write_text(token)
    (tmp_path / "train.py").write_text("print('hello')")
    secret = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    allowed = Head(address=head.address, environment=secret, folder=head.folder)
    done = submit(allowed, "train.py", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (4, "") and words in done.stderr
    assert len(done.stderr.splitlines()) == 1 and "RAY_AUTH_TOKEN_PATH" in done.stderr

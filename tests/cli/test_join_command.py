"""`elastic join` and `elastic leave`, as a user calls them: a site trains to the end, leaves in good order, or says why
it cannot."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from processes import processes_of, wait_for

from cli.join import _config, _listening
from cli.script import check_script
from elastic.config import JoinToken, RunPolicy
from elastic.coordinator import Coordinator
from elastic.errors import ConfigurationError
from elastic.events import EventReader
from elastic.peer import Peer

pytestmark = pytest.mark.timeout(400)

ELASTIC = [sys.executable, "-m", "cli.main"]
EXAMPLE = Path(__file__).parents[2] / "examples" / "two_machines" / "train.py"


class Served:
    """A run, its coordinator in this process, and commands that are started for it."""

    def __init__(self, folder: Path, **policy: Any) -> None:
        self.folder, self.policy = folder, RunPolicy(**policy)
        self.started: list[subprocess.Popen[str]] = []
        self.coordinator = self.open("tcp://127.0.0.1:0")

    def open(self, address: str) -> Coordinator:
        self.coordinator = Coordinator(
            address, run="corn", policy=self.policy, journal=self.folder / "journal", events=self.folder / "run.jsonl"
        )
        return self.coordinator

    @property
    def token(self) -> str:
        return str(self.coordinator.token)

    def join(self, script: Path | str = EXAMPLE, *arguments: str, out: str = "out") -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*ELASTIC, "join", self.token, str(script), "--name", "eu", *arguments, "--out", out],
            cwd=self.folder,
            stdout=(self.folder / f"{out}.stdout").open("w"),
            stderr=(self.folder / f"{out}.stderr").open("w"),
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def ended(self, process: subprocess.Popen[str], out: str = "out") -> tuple[int, str, str]:
        """The code of a command that has left nothing behind, and what it has said."""
        code = process.wait(180)
        assert not processes_of(process.pid)
        return code, (self.folder / f"{out}.stdout").read_text(), (self.folder / f"{out}.stderr").read_text()

    def said(self, name: str) -> list[dict[str, Any]]:
        """By the coordinator."""
        return [event for event in EventReader(self.folder / "run.jsonl").read() if event["event"] == name]

    def by(self, writer: str, name: str) -> list[dict[str, Any]]:
        log = self.folder / "out" / "events" / f"{writer}.jsonl"
        return [event for event in EventReader(log).read() if event["event"] == name] if log.exists() else []

    def committed(self, rounds: int) -> bool:
        return self.coordinator.status().progress.rounds >= rounds

    def both(self) -> bool:
        """Whether a round of both of its peers is committed."""
        return self.coordinator.status().contributors == ("eu-0", "eu-1")

    def names(self) -> set[str]:
        return {member.name for member in self.coordinator.status().members}

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self.coordinator.close()


@contextmanager
def serving(folder: Path, **policy: Any) -> Iterator[Served]:
    served = Served(folder, **policy)
    try:
        yield served
    finally:
        served.close()


def elastic(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*ELASTIC, *arguments], capture_output=True, text=True, cwd=cwd, timeout=100)


# --- from beginning to end --------------------------------------------------------------------------------------------


def test_two_peers_train_to_the_end_of_the_run(tmp_path: Path) -> None:
    with serving(tmp_path, min_peers=2, rounds=6) as served:
        started = time.time()
        process = served.join(EXAMPLE, "--peers", "2", "--config", "sync_every=20", "--json")
        code, printed, told = served.ended(process)
        assert code == 0, told
        summary = json.loads(printed)
        assert (summary["finished"], summary["rounds"], summary["failures"]) == (True, 6, [])
        assert [(peer["name"], peer["state"], peer["lives"]) for peer in summary["peers"]] == [
            ("eu-0", "finished", 1),
            ("eu-1", "finished", 1),
        ]
        states = {
            re.findall(r"version (\d+), state (\w+)", log.read_text())[0] for log in served.folder.glob("out/logs/*")
        }
        assert len(states) == 1 and states.pop()[0] == "6", "all hold the same version, bit for bit"
        assert "starting a Ray of its own" in told and "run corn is over, after 6 rounds" in told
        assert not served.said("peer.evicted") and len(served.said("peer.left")) == 2
        began = min(event["time_unix"] for event in served.by("supervisor", "peer.started"))
        print(f"{began - started:.1f} s from the command to the first peer that trains")
    again = elastic("join", served.token, str(EXAMPLE), "--timeout", "0.5", cwd=tmp_path)
    assert again.returncode == 4, "nobody answers any more"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop_each_peer_gives_what_it_has_learned_and_leaves(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    with serving(tmp_path) as served:
        process = served.join(EXAMPLE, "--peers", "2", "--config", "sync_every=50")
        wait_for(lambda: served.both() and served.committed(2), process)
        folders = set(re.findall(r"/tmp/elastic-[0-9a-f]{8}", " ".join(processes_of(process.pid).values())))
        pressed = time.monotonic()
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # a terminal's Ctrl-C reaches all that the command has started
        else:
            process.send_signal(number)
        found, printed, told = served.ended(process)
        print(f"{number.name}: ended {time.monotonic() - pressed:.1f} s later")
        assert (found, told) == (code, ""), told
        assert len(folders) == 1 and not any(Path(folder).exists() for folder in folders)
        assert "eu-0, eu-1 left in good order" in printed
        assert len(served.said("peer.left")) == 2 and not served.said("peer.evicted")
        assert not [event for peer in ("eu-0", "eu-1") for event in served.by(peer, "peer.drained")]
        audited = elastic("status", served.token, "--shards", "--json", cwd=tmp_path)
        audit = json.loads(audited.stdout)["audit"]
        assert audited.returncode == 0 and audit["passed"] and (audit["twice"], audit["missing"]) == (0, 0)
        drained = [len(served.by(peer, "peer.draining")) for peer in ("eu-0", "eu-1")]
        assert drained == [1, 1] and audit["committed"] == served.coordinator.status().progress.tokens


STUBBORN = """
import time

def train(peer, config):
    while True:
        time.sleep(0.1)
"""


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    with serving(tmp_path) as served:
        process = served.join(script, "--drain-seconds", "600")
        wait_for(lambda: served.names() == {"eu-0"}, process)
        wait_for(lambda: served.by("supervisor", "peer.started"), process)
        os.killpg(process.pid, signal.SIGINT)
        wait_for(lambda: served.by("eu-0", "peer.draining"), process)
        os.killpg(process.pid, signal.SIGINT)
        code, printed, told = served.ended(process)
        assert code == 130 and "nobody left in good order" in printed and "Traceback" not in told


def test_who_does_not_leave_in_time_is_named_and_ended(tmp_path: Path) -> None:
    script = tmp_path / "stubborn.py"
    script.write_text(STUBBORN)
    with serving(tmp_path) as served:
        process = served.join(script, "--drain-seconds", "1")
        wait_for(lambda: served.by("supervisor", "peer.started"), process)
        late = elastic("leave", "eu-0", served.token, "--timeout", "1", cwd=tmp_path)
        assert late.returncode == 1 and late.stderr.startswith("elastic leave: not left after 1 s: eu-0 (")
        process.terminate()
        code, _, told = served.ended(process)
        assert code == 143 and re.match(r"elastic join: eu-0: .* 1 s", told.splitlines()[0]), told


# --- leave ------------------------------------------------------------------------------------------------------------


def test_a_peer_and_then_its_site_leave_by_name_and_are_not_started_again(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        process = served.join(EXAMPLE, "--peers", "2", "--config", "sync_every=50")
        wait_for(lambda: served.both() and served.committed(2), process)
        nobody = elastic("leave", "ue", served.token, cwd=tmp_path)
        assert nobody.returncode == 2 and nobody.stderr == (
            "elastic leave: there is no peer and no site 'ue' in run 'corn': peers are eu-0, eu-1; sites are eu\n"
        )
        left = elastic("leave", "eu-1", served.token, "--json", cwd=tmp_path)
        assert left.returncode == 0, left.stderr
        assert json.loads(left.stdout) == {
            "run": "corn", "asked": ["eu-1"], "supervisors": 0, "waited": True, "staying": {}
        }  # fmt: skip
        assert served.names() == {"eu-0"}
        rounds = served.coordinator.status().progress.rounds
        wait_for(lambda: served.committed(rounds + 3), process)
        gone = elastic("leave", "eu", served.token, cwd=tmp_path)
        assert (gone.returncode, gone.stdout) == (0, "left: eu-0\n"), gone.stderr
        code, printed, told = served.ended(process)
        assert (code, told) == (0, "") and re.search(r"site eu has left; run corn goes on, after \d+ rounds", printed)
        assert [event["life"] for event in served.by("supervisor", "peer.started")] == [1, 1]
        assert [event["peer"] for event in served.said("peer.asked_to_leave")] == ["eu-1", "eu-0"]
        assert served.coordinator.audit().passed and not served.said("peer.evicted")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["eu"], 2, "say which run: elastic leave NAME TOKEN, or set ELASTIC_JOIN"),
        (["eu", "corn"], 2, "a join token looks like"),
        (["eu", "elastic://127.0.0.1:9/corn", "--timeout", "0.2"], 4, "no answer from the coordinator"),
    ],
)
def test_what_cannot_be_asked_to_leave(tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    found = elastic("leave", *arguments, cwd=tmp_path)
    assert found.returncode == code and words in found.stderr and len(found.stderr.splitlines()) == 1


# --- what goes wrong on the way ---------------------------------------------------------------------------------------


def test_a_script_that_cannot_be_imported_says_why_once_and_is_not_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text('raise ImportError("libfoo.so.7: not found")\n\ndef train(peer, config):\n    pass\n')
    with serving(tmp_path) as served:
        code, _, told = served.ended(served.join(script, "--peers", "2"))
        assert code == 1
        lines = told.splitlines()
        assert [line for line in lines if line.startswith("elastic join: ")] == [
            f"elastic join: eu-0, eu-1: script {script} cannot be loaded: ImportError: libfoo.so.7: not found"
        ]
        assert f'  File "{script}", line 1, in <module>' in "".join(lines) and "eu-1.1.log" not in told
        assert sorted(log.name for log in tmp_path.glob("out/logs/*")) == ["eu-0.1.log", "eu-1.1.log"]
        assert not served.said("peer.joined"), "nobody else needs to hear of it"


def test_while_the_coordinator_is_away_a_dead_peer_is_not_given_up(tmp_path: Path) -> None:
    """Its next lives find nobody to admit them, and that is no crash of theirs."""
    with serving(tmp_path) as served:
        process = served.join(EXAMPLE, "--peers", "2", "--config", "sync_every=50", "--max-restarts", "1")
        wait_for(lambda: served.both() and served.committed(2), process)
        wait_for(lambda: len(served.by("supervisor", "peer.started")) == 2, process)
        address = served.coordinator.address
        served.coordinator.close()
        started = {event["peer"]: event["pid"] for event in served.by("supervisor", "peer.started")}
        os.kill(started["eu-1"], signal.SIGKILL)
        wait_for(lambda: len(served.by("supervisor", "peer.restarted")) >= 2, process)
        rounds = served.open(address).status().progress.rounds
        wait_for(lambda: served.names() == {"eu-0", "eu-1"} and served.committed(rounds + 2), process)
        wait_for(lambda: served.by("join", "coordinator.found"), process)
        assert served.by("join", "coordinator.lost")[0]["seconds"] >= 5
        reasons = [event["reason"] for event in served.by("supervisor", "peer.restarted")]
        assert reasons[0] == "its process has ended" and "no answer from the coordinator" in reasons[1]
        process.send_signal(signal.SIGTERM)
        code, printed, _ = served.ended(process)
        assert code == 143 and "eu-0, eu-1 left in good order" in printed
        assert "the coordinator has not answered for" in printed and served.coordinator.audit().passed


def test_a_running_ray_is_used_and_left_as_it_is(tmp_path: Path) -> None:
    from actors.local_ray import local_ray

    with local_ray(num_cpus=2, log=tmp_path / "ray.log"):
        import ray

        address = ray.get_runtime_context().gcs_address
        with serving(tmp_path, min_peers=2, rounds=3) as served:
            many = served.join(EXAMPLE, "--peers", "3", "--ray", address, out="many")
            code, _, told = served.ended(many, "many")
            assert (code, told) == (2, (
                "elastic join: 3 peers need 1 CPU each; here is 2 CPUs, which is room for 2: "
                "lower --peers, --room or what each of them takes\n"
            ))  # fmt: skip
            process = served.join(EXAMPLE, "--peers", "2", "--config", "sync_every=20", "--ray", address)
            code, printed, told = served.ended(process)
            assert code == 0, told
            assert f"using the Ray at {address}" in printed and "run corn is over" in printed
        assert ray.nodes()[0]["Alive"]
        wait_until_nothing_runs(ray)


def wait_until_nothing_runs(ray: Any) -> None:
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2:
        assert time.monotonic() < deadline, "its peers are still there"
        time.sleep(0.2)


# --- bad input: one line, an exit code, nothing started ---------------------------------------------------------------

SCRIPTS = {
    "fine.py": "def train(peer, config):\n    pass\n",
    "broken.py": "import os\ndef train(peer, config)\n    pass\n",
    "other.py": "def learn(peer, config):\n    pass\n",
    "short.py": "def train(peer):\n    pass\n",
    "turtle.py": "def train(peer, config):\n    pass\n",
    "list.json": "[1]",
}
NOWHERE = "elastic://127.0.0.1:9/corn"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in SCRIPTS.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "old" / "events").mkdir(parents=True)
    (tmp_path / "old" / "ray.log").touch()
    (tmp_path / "file").touch()
    return tmp_path


def refused(folder: Path, *arguments: str) -> tuple[int, str]:
    """The code, and the one line."""
    before = sorted(folder.rglob("*"))
    found = elastic("join", *arguments, cwd=folder)
    assert sorted(path for path in folder.rglob("*") if "__pycache__" not in str(path)) == before
    line = [each for each in found.stderr.splitlines() if each.startswith(("elastic join: ", "Error: "))]
    assert len(line) == 1 and "Traceback" not in found.stderr, found.stderr
    return found.returncode, line[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say which script to run: elastic join TOKEN SCRIPT"),
        ([NOWHERE], "say which script to run"),
        (["@run.token"], "say which script to run"),
        (["fine.py"], "say which run: elastic join TOKEN SCRIPT, or set ELASTIC_JOIN"),
        ([NOWHERE, "fine.py", "more"], "too many arguments: more"),
        (["corn", "fine.py"], "a join token looks like elastic://HOST:PORT/RUN"),
        (["@run.token", "fine.py"], "cannot read the join token in run.token"),
        ([NOWHERE, "missing.py"], "cannot read missing.py: No such file or directory"),
        ([NOWHERE, "broken.py"], "broken.py is no Python: line 2: expected ':'"),
        ([NOWHERE, "other.py"], "other.py has no function 'train': write def train(peer, config), or say --function"),
        ([NOWHERE, "short.py"], "short.py, line 1: train is called as train(peer, config)"),
        ([NOWHERE, "turtle.py"], "turtle.py cannot be imported under its name"),
        ([NOWHERE, "fine.py", "--config", "lr"], "--config 'lr' is neither KEY=VALUE nor @FILE.json"),
        ([NOWHERE, "fine.py", "--config", "@no.json"], "cannot read no.json: No such file"),
        ([NOWHERE, "fine.py", "--config", "@list.json"], "list.json holds no JSON object"),
        ([NOWHERE, "fine.py", "--stripes", "0"], "--stripes is '0': it must be auto"),
        ([NOWHERE, "fine.py", "--name", "a b"], "site 'a b' is not a name"),
        ([NOWHERE, "fine.py", "--listen", "here"], "listen 'here' is not HOST:PORT"),
        ([NOWHERE, "fine.py", "--peers", "999"], "999 peers need 1 CPU each; here is"),
        ([NOWHERE, "fine.py", "--peers", "0"], "0 is not in the range"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(folder: Path, arguments: list[str], words: str) -> None:
    code, line = refused(folder, *arguments)
    assert code == 2 and words in line


def test_a_coordinator_that_is_not_there_or_not_the_right_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = refused(folder, NOWHERE, "fine.py", "--timeout", "0.3")
    assert code == 4 and "no answer from the coordinator at tcp://127.0.0.1:9 within 0.3 s" in line
    with Coordinator(run="corn") as served:
        token = str(served.token)
        code, line = refused(folder, token.replace("corn", "wheat"), "fine.py")
        assert code == 2 and "this coordinator serves run 'corn'" in line
        with Peer(token=token, name="eu-1"):
            code, line = refused(folder, token, "fine.py", "--name", "eu", "--peers", "2")
        assert code == 2 and "eu-1 is in the run already: choose another --name" in line
        for out, words in (("old", "old holds the results of another run"), ("file/x", "file/x: Not a directory")):
            code, line = refused(folder, token, "fine.py", "--out", out)
            assert code == 5 and words in line
        monkeypatch.setattr("elastic.membership.PROTOCOL", 9)
        code, line = refused(folder, token, "fine.py")
        assert code == 1 and "the coordinator speaks protocol 9, this installation speaks 1: install the same" in line
        monkeypatch.setenv("ELASTIC_STRIPS", "2")
        code, line = refused(folder, token, "fine.py")
        assert code == 2 and "unknown environment variable ELASTIC_STRIPS" in line


def test_a_run_that_is_over_needs_nobody(folder: Path) -> None:
    with Coordinator(run="corn", policy=RunPolicy(loss=1.0)) as served:
        with Peer(token=str(served.token), name="p") as peer:
            peer.report(held_out_loss=0.5)
            deadline = time.monotonic() + 60
            while not served.status().progress.finished:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        found = elastic("join", str(served.token), "fine.py", cwd=folder)
    assert (found.returncode, found.stdout) == (
        0, "elastic join: run corn is over (0 rounds): there is nothing to do\n"
    )  # fmt: skip


def test_help_has_an_example_and_every_option() -> None:
    found = subprocess.run([*ELASTIC, "join", "--help"], capture_output=True, text=True, check=True)
    for option in ("--peers", "--name", "--room", "--function", "--config", "--cpus-per-peer", "--gpus-per-peer",
                   "--ranks-per-peer", "--stripes", "--listen", "--advertise", "--max-restarts", "--drain-seconds",
                   "--ray", "--out", "--json"):  # fmt: skip
        assert option in found.stdout
    assert "elastic join @c4-1b.token train.py --name us" in found.stdout


# --- parts ------------------------------------------------------------------------------------------------------------


def test_where_peers_listen() -> None:
    here, far = JoinToken.parse(NOWHERE), JoinToken.parse("elastic://192.0.2.1:29400/corn")
    assert _listening(here, None, None, {}, 0) == ("127.0.0.1:0", None), (
        "nothing listens beyond loopback for a run here"
    )
    assert _listening(far, "", None, {}, 3) == ("", None)
    assert _listening(far, None, None, {"ELASTIC_LISTEN": "10.0.0.5:7"}, 1) == ("10.0.0.5:7", None)
    assert _listening(far, "0.0.0.0:7", "10.0.0.5:8", {}, 1) == ("0.0.0.0:7", "10.0.0.5:8")
    for listen, advertise in (("0.0.0.0:7", None), ("0.0.0.0:0", "10.0.0.5:8")):
        with pytest.raises(ConfigurationError, match="--room is 2, and so many guests cannot share a fixed port"):
            _listening(far, listen, advertise, {}, 2)
    with pytest.raises(ConfigurationError, match=r"other peers could not dial 127\.0\.0\.1:0"):
        _listening(far, "127.0.0.1:0", None, {}, 0)


def test_config_is_json_or_else_text(tmp_path: Path) -> None:
    (tmp_path / "more.json").write_text('{"lr": 0.5, "seed": 3}')
    items = ("lr=0.1", f"@{tmp_path}/more.json", "seed=4", "deep=true", "dims=[1, 2]", "name=eu=1", "data=~/corn")
    found: dict[str, Any] = {"lr": 0.5, "seed": 4, "deep": True, "dims": [1, 2], "name": "eu=1", "data": "~/corn"}
    assert _config(items) == found


@pytest.mark.parametrize(
    "text",
    [
        "def train(peer, config, more=1): pass",
        "def train(*both): pass",
        "from recipes import train",
        "from recipes import learn as train",
        "from recipes import *",
        "import functools, recipes\ntrain = functools.partial(recipes.train, 3)",
        "try:\n    from fast import train\nexcept ImportError:\n    def train(peer, config): pass",
        "class train:\n    def __init__(self, peer, config): pass",
    ],
)
def test_functions_of_all_kinds_are_found(tmp_path: Path, text: str) -> None:
    (tmp_path / "script.py").write_text(text)
    assert check_script(tmp_path / "script.py", "train") == tmp_path / "script.py"


@pytest.mark.parametrize(
    "text",
    [
        "async def train(peer, config): pass",
        "def train(peer, config, more): pass",
        "def train(peer, config, *, more): pass",
        "def learn():\n    def train(peer, config): pass",
        "train(1, 2)",
        "x = '\0'",
    ],
)
def test_what_could_not_be_called_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "script.py").write_text(text)
    with pytest.raises(ConfigurationError, match=r"train|null"):
        check_script(tmp_path / "script.py", "train")

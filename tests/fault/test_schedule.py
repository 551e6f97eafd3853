"""A schedule says in one line what is wrong with it; what is due when is a function of file, seed and end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from fault.driver import Absent, Driver, Injected, all_fired
from fault.inject import KINDS
from fault.orders import Registered, registered
from fault.schedule import Schedule, ScheduleError, load

GOOD = """
seed = 3
[[fault]]
at = 1
kind = "freeze"
target = "any"
for = 2.5
[[fault]]
every = 10.0
jitter = 1.0
count = 3
kind = "delay"
target = ["a", "b"]
delay = 0.1
times = 4
[[fault]]
round = 7
kind = "kill"
target = "a"
"""


def read(tmp_path: Path, text: str) -> Schedule:
    path = tmp_path / "x.toml"
    path.write_text(text)
    return load(path)


def test_a_schedule_is_what_the_file_says(tmp_path: Path) -> None:
    freeze, delay, kill = read(tmp_path, GOOD).entries
    assert (freeze.target, freeze.fault.seconds, freeze.at, freeze.needed) == ("any", 2.5, 1.0, ("any",))
    assert (delay.target, delay.fault.peer, delay.fault.delay, delay.fault.times) == ("a", "b", 0.1, 4)
    assert delay.needed == ("a",), "what is sent is in the sender's hands"
    assert (kill.fault.round, kill.at, kill.number) == (7, None, 3)


def test_what_is_due_is_drawn_from_the_seed(tmp_path: Path) -> None:
    schedule = read(tmp_path, GOOD)
    due = schedule.due()
    assert [each.entry.number for each in due] == [3, 1, 2, 2, 2]
    times = [each.at for each in due if each.entry.number == 2]
    assert all(abs(at - 10 * n) <= 1 for n, at in enumerate(times, 1)) and times != [10, 20, 30]
    assert schedule.due() == due == schedule.due(seed=3) != schedule.due(seed=4)
    assert [each.entry.number for each in schedule.due(seconds=21)] == [3, 1, 2, 2]


def test_partitions_need_both_ends(tmp_path: Path) -> None:
    text = '[[fault]]\nat = 1\nkind = "partition"\nfor = 1\n'
    (pair,) = read(tmp_path, text + 'target = ["a", "b"]').entries
    (single,) = read(tmp_path, text + 'target = "a"').entries
    assert pair.both_ends and pair.needed == ("a", "b") and not single.both_ends


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('at = 1\nkind = "explode"\ntarget = "a"', "(explode): kind 'explode' is not one of kill"),
        ('at = 1\nkind = "kill"', "(kill): target is None: it must be a name, 'any' or 'coordinator'"),
        ('at = 1\ntarget = "a"', "it has no kind"),
        ('kind = "kill"\ntarget = "a"', "it needs one of at, every and round, and has none"),
        ('at = 1\nround = 2\nkind = "kill"\ntarget = "a"', "has at and round"),
        ('at = -1\nkind = "kill"\ntarget = "a"', "at is -1: it must be a number of at least 0 seconds"),
        ('at = "soon"\nkind = "kill"\ntarget = "a"', "at is 'soon'"),
        ('at = nan\nkind = "kill"\ntarget = "a"', "at is nan"),
        ('every = 0\ncount = 1\nkind = "kill"\ntarget = "a"', "every is 0"),
        ('every = 1\ncount = 0\nkind = "kill"\ntarget = "a"', "count is 0"),
        ('at = 1\ncount = 2\nkind = "kill"\ntarget = "a"', "jitter and count belong to every"),
        ('at = 1\nkind = "freeze"\ntarget = "a"', "a freeze fault needs for: SIGSTOP"),
        ('at = 1\nkind = "freeze"\ntarget = "a"\nfor = -2', "for is -2: it must be a number above 0"),
        ('at = 1\nkind = "slow"\ntarget = "a"\nfor = 2', "a slow fault needs factor"),
        ('at = 1\nkind = "partition"\ntarget = ["a", "b"]', "needs for or times: it would never end"),
        ('at = 1\nkind = "partition"\ntarget = ["a", "a"]\nfor = 1', "target is ['a', 'a']"),
        ('at = 1\nkind = "drop"\ntarget = ["a", "any"]', "two names of peers for a link"),
        ('at = 1\nkind = "nan"\ntarget = ["a", "b"]', "the ends of a link, and a nan fault befalls one process"),
        ('at = 1\nkind = "kill"\ntarget = ["a", "b"]', "the ends of a link, and a kill fault befalls one process"),
        ('at = 1\nkind = "nan"\ntarget = "coordinator"', "of the coordinator, there are kill, freeze and full-disk"),
        ('round = 1\nkind = "kill"\ntarget = "coordinator"', "the coordinator needs at or every"),
        ('at = 1\nkind = "kill"\ntarget = "a"\nfro = 3', "'fro' is no key of it; did you mean for?"),
        ('at = 1\nkind = "kill"\ntarget = "a"\ncolour = 3', "'colour' is no key of it; known are kind"),
        ('at = 1\nkind = ["kill"]\ntarget = "a"', "kind ['kill'] is not one of"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_file_and_table(tmp_path: Path, table: str, words: str) -> None:
    with pytest.raises(ScheduleError) as refused:
        read(tmp_path, '[[fault]]\nat = 1\nkind = "kill"\ntarget = "x"\n[[fault]]\n' + table)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'x.toml'}: [[fault]] 2") and words in message and "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no [[fault]] in it"),
        ("fault = 3", "there is no [[fault]] in it"),
        ("fault = [3]", "[[fault]] 1 is no table"),
        ("seed = 1.5", "seed is 1.5"),
        ("sed = 1", "'sed' is no key of it; did you mean seed?"),
        ("[[fault]", "is no TOML"),
    ],
)
def test_what_is_no_schedule(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ScheduleError) as refused:
        read(tmp_path, text)
    assert words in str(refused.value) and str(tmp_path / "x.toml") in str(refused.value)
    with pytest.raises(ScheduleError, match=r"cannot read .*nowhere"):
        load(tmp_path / "nowhere")


def test_no_end_and_no_time_are_refused(tmp_path: Path) -> None:
    endless = read(tmp_path, '[[fault]]\nevery = 1\nkind = "kill"\ntarget = "any"')
    with pytest.raises(ScheduleError, match="every has no end: give count"):
        endless.due()
    assert len(endless.due(seconds=5)) == 5
    with pytest.raises(ScheduleError, match="more than 10000 injections"):
        endless.due(seconds=1e9)
    late = read(tmp_path, '[[fault]]\nat = 9\nkind = "kill"\ntarget = "any"')
    with pytest.raises(ScheduleError, match=r"at = 9.0 comes after the end, 5 s"):
        late.due(seconds=5)


# --- carried out on real processes, which do nothing else -------------------------------------------------------------

WORKER = """
import sys, threading
from pathlib import Path
from fault.inject import Injector
from fault.orders import Station
folder, name, role = sys.argv[1:]
injector = Injector(name)
Station(Path(folder), injector, name=name, run="r", incarnation=hash(name) % 1000 + 1, role=role)
print("here", flush=True)
version = 0
while not threading.Event().wait(0.01):
    injector.reached(version := version + 1)
    injector.contribution()
    injector.stepped(0.001)
    for other in ("a", "b"):
        injector.cut(other), injector.sending(other, 8), injector.sent(other, 0.001)
    try:
        injector.check_disk("x")
    except OSError:
        pass
"""


@contextmanager
def worker(folder: Path, name: str, role: str = "peer") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WORKER, str(folder), name, role]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "here\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def drive(folder: Path, schedule: Schedule, stop: threading.Event | None = None, **options: float) -> list[Injected]:
    driver = Driver(schedule, folder, patience=options.pop("patience", 20.0))
    stop = stop or threading.Event()
    driver.wait_for_targets(stop, 20)
    return driver.run(stop)


def test_every_kind_fires_on_evidence(tmp_path: Path) -> None:
    folder = tmp_path / "chaos"
    extra = {
        "freeze": "for = 0.3", "hang": "for = 0.1", "slow": "factor = 2\nfor = 0.3", "scale": "factor = 3",
        "delay": "delay = 0.01\nfor = 0.3", "slow-link": "factor = 3\nfor = 0.5", "partition": "for = 0.3",
        "full-disk": "for = 0.2",
    }  # fmt: skip
    kinds = [kind for kind in KINDS if kind != "kill"]
    tables = [
        f'[[fault]]\nat = {0.1 * n}\nkind = "{kind}"\ntarget = "a"\n{extra.get(kind, "")}\n'
        for n, kind in enumerate(kinds)
    ]
    tables += ['[[fault]]\nat = 0.5\nkind = "partition"\ntarget = ["a", "b"]\nfor = 0.3\n']
    tables += ['[[fault]]\nat = 0.5\nkind = "corrupt"\ntarget = ["b", "a"]\ntimes = 3\n']
    tables += [
        '[[fault]]\nround = 200\nkind = "kill"\ntarget = "b"\n',
        '[[fault]]\nat = 4\nkind = "kill"\ntarget = "a"\n',
    ]
    tables += ['[[fault]]\nat = 0.2\nkind = "freeze"\ntarget = "coordinator"\nfor = 0.4\n']
    with worker(folder, "a") as a, worker(folder, "b") as b, worker(folder, "coordinator", "coordinator") as c:
        records = drive(folder, read(tmp_path, "".join(tables)))
        assert all_fired(records), records
        assert not any(each.why for each in records)
        assert a.wait(20) == b.wait(20) == -signal.SIGKILL and c.poll() is None
        me = registered(folder)["coordinator"]
        assert me.state in "RS", "it is still frozen"
    by_kind = {(each.kind, each.target): each.fired for each in records}
    assert by_kind["nan", "a"] == 1 and by_kind["corrupt", "b -> a"] == 3 and by_kind["partition", "a | b"] > 1
    noted = [json.loads(line) for name in "ab" for line in (folder / f"{name}.fired.jsonl").read_text().splitlines()]
    assert {line["kind"] for line in noted} == set(KINDS)


def test_any_is_a_peer_and_a_partition_of_any_are_two(tmp_path: Path) -> None:
    text = '[[fault]]\nat = 0\nkind = "{}"\ntarget = "any"\nfor = 0.5\n'
    with ExitStack() as stack:
        for name, role in (("a", "peer"), ("b", "peer"), ("coordinator", "coordinator")):
            stack.enter_context(worker(tmp_path / "c", name, role))
        records = drive(tmp_path / "c", read(tmp_path, text.format("partition") + text.format("freeze")))
    assert all_fired(records)
    assert {each.target for each in records} <= {"a | b", "b | a", "a", "b"}


def test_what_does_not_fire_is_not_said_to_have(tmp_path: Path) -> None:
    text = """
[[fault]]
at = 0
kind = "drop"
target = ["a", "c"]
[[fault]]
at = 0.5
kind = "kill"
target = "b"
[[fault]]
at = 1.0
kind = "nan"
target = "b"
"""
    with worker(tmp_path / "c", "a"), worker(tmp_path / "c", "b"):
        records = drive(tmp_path / "c", read(tmp_path, text), patience=1.5)
    whys = [(each.kind, each.fired, each.why) for each in records]
    assert sorted(whys) == [
        ("drop", 0, "it had no occasion to fire"), ("kill", 1, ""), ("nan", 0, "its target was not there")
    ]  # fmt: skip
    assert not all_fired(records)


def test_stopping_thaws_and_calls_off(tmp_path: Path) -> None:
    text = """
[[fault]]
at = 0
kind = "freeze"
target = "a"
for = 600
[[fault]]
at = 0
kind = "partition"
target = "b"
for = 600
[[fault]]
at = 500
kind = "kill"
target = "b"
"""
    folder, stop = tmp_path / "c", threading.Event()

    def frozen(me: Registered) -> None:
        while me.state != "T" or not (folder / "b.fired.jsonl").exists():
            time.sleep(0.01)
        stop.set()

    with worker(folder, "a"), worker(folder, "b"):
        there = registered(folder)
        watcher = threading.Thread(target=frozen, args=(there["a"],))
        watcher.start()
        records = drive(folder, read(tmp_path, text), stop)
        watcher.join()
        assert there["a"].state in "RS" and there["b"].alive
        time.sleep(0.3)
        before = (folder / "b.fired.jsonl").read_text()
        time.sleep(0.3)
        assert (folder / "b.fired.jsonl").read_text() == before, "the partition goes on"
    assert [(each.kind, each.fired > 0) for each in records] == [("freeze", True), ("partition", True), ("kill", False)]


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    schedule = read(
        tmp_path, '[[fault]]\nat = 0\nkind = "kill"\ntarget = "c"\n[[fault]]\nat=0\nkind="kill"\ntarget="any"'
    )
    driver = Driver(schedule, tmp_path / "c")
    with pytest.raises(Absent, match=r"c, 1 more of any peers did not register in .* within 0.1 s"):
        driver.wait_for_targets(threading.Event(), 0.1)

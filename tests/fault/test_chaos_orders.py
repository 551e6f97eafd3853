"""Orders through a folder: who registers, who obeys, what is refused, and that no signal ever hits another process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fault.inject import Fault, Injector
from fault.orders import (
    Lines,
    Registered,
    Station,
    call_off,
    order,
    prepare,
    process_state,
    registered,
    send_signal,
    strike,
)


def until(true: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)


@contextmanager
def station(folder: Path, incarnation: int = 7) -> Iterator[tuple[Station, Injector]]:
    injector = Injector("a")
    made = Station(folder, injector, name="a", run="r", incarnation=incarnation)
    try:
        yield made, injector
    finally:
        made.close()


@contextmanager
def sleeper() -> Iterator[tuple[subprocess.Popen[bytes], Registered]]:
    """Another process that is registered, as what it is."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = process_state(process.pid)
        assert found is not None
        yield process, Registered(name="s", role="peer", run="r", incarnation=1, pid=process.pid, started=found[1])
    finally:
        process.kill()
        process.communicate()


def test_the_folder_is_this_users_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "chaos"
    prepare(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    prepare(folder)
    folder.chmod(0o770)
    with pytest.raises(PermissionError, match="nobody else may write to it"):
        prepare(folder)


def test_a_process_registers_obeys_and_is_gone(tmp_path: Path) -> None:
    with station(tmp_path) as (made, injector):
        assert registered(tmp_path) == {"a": made.me} and made.me.pid == os.getpid()
        assert made.me.alive and made.me.state in "RS"
        order(tmp_path, made.me, Fault(kind="flip", id="one"))
        until(lambda: "one" in injector.fired)
        assert injector.contribution() == -1.0
        fired = list(Lines(tmp_path / "a.fired.jsonl").read())
        assert [(line["event"], line["id"], line["peer"]) for line in fired] == [("fault.injected", "one", "a")]
        order(tmp_path, made.me, Fault(kind="partition", id="two", seconds=60, peer="b"))
        until(lambda: injector.cut("b"))
        call_off(tmp_path, made.me, "two")
        until(lambda: not injector.cut("b"))
    assert registered(tmp_path) == {} and not (tmp_path / "a.json").exists()


def test_orders_for_another_life_are_not_obeyed(tmp_path: Path) -> None:
    with station(tmp_path, incarnation=7) as (made, _):
        former = made.me
    order(tmp_path, former, Fault(kind="flip", id="before"))
    with station(tmp_path, incarnation=8) as (made, injector):
        order(tmp_path, former, Fault(kind="flip", id="former"))
        order(tmp_path, made.me, Fault(kind="flip", id="mine"))
        until(lambda: injector.fired)
        assert injector.fired == {"mine": 0}


def test_what_cannot_be_ordered_is_said_and_does_no_harm(tmp_path: Path) -> None:
    with station(tmp_path) as (made, injector):
        with (tmp_path / "a.orders.jsonl").open("a") as file:
            for line in ("no json", "[1]", '{"incarnation": 7, "arm": {"kind": "explode", "id": "x"}}',
                         '{"incarnation": 7, "arm": {"colour": 1}}', '{"incarnation": 7, "arm": 5}'):  # fmt: skip
                file.write(line + "\n")
        order(tmp_path, made.me, Fault(kind="flip", id="after"))
        until(lambda: injector.fired == {"after": 0})
        refused = list(Lines(tmp_path / "a.fired.jsonl").read())
        assert [line["event"] for line in refused] == ["fault.refused"] * 3
        assert refused[0]["id"] == "x" and "kind 'explode' is not one of" in refused[0]["reason"]


def test_a_half_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "x"
    lines = Lines(path)
    assert list(lines.read()) == []
    path.write_text('{"a": 1}\n{"b"')
    assert list(lines.read()) == [{"a": 1}] and list(lines.read()) == []
    path.write_text('{"a": 1}\n{"b": 2}\n')
    assert list(lines.read()) == [{"b": 2}]


def test_a_process_is_frozen_thawed_and_killed_and_each_is_noted(tmp_path: Path) -> None:
    with sleeper() as (process, me):
        assert strike(tmp_path, me, Fault(kind="freeze", id="f", seconds=1.0))
        until(lambda: me.state == "T")
        assert me.alive
        assert send_signal(me, signal.SIGCONT)
        until(lambda: me.state in "RS")
        assert strike(tmp_path, me, Fault(kind="kill", id="k"))
        assert process.wait(20) == -signal.SIGKILL
        assert not me.alive and not strike(tmp_path, me, Fault(kind="kill", id="again"))
    assert [line["id"] for line in Lines(tmp_path / "s.fired.jsonl").read()] == ["f", "k"]


def test_who_has_the_pid_of_a_process_that_is_gone_gets_no_signal(tmp_path: Path) -> None:
    with sleeper() as (process, me):
        former = replace(me, started=me.started - 1)
        (tmp_path / "s.json").write_text(json.dumps(asdict(former)))
        assert registered(tmp_path) == {}
        assert not send_signal(former, signal.SIGKILL) and not strike(tmp_path, former, Fault(kind="kill"))
        time.sleep(0.1)
        assert process.poll() is None
        (tmp_path / "s.json").write_text(json.dumps(asdict(me)))
        assert registered(tmp_path) == {"s": me}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": "s"}', '{"name": "s", "role": "peer", "run": "r", '
                                  '"incarnation": 1, "pid": 1, "started": 1}'])  # fmt: skip
def test_what_is_no_registration_is_left_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_text(text)
    assert registered(tmp_path) == {}


def test_a_next_life_is_not_unregistered_by_the_former(tmp_path: Path) -> None:
    with station(tmp_path, incarnation=7):
        with station(tmp_path, incarnation=8) as (second, _):
            pass_on = registered(tmp_path)["a"]
            assert pass_on == second.me
            (tmp_path / "a.json").write_text(json.dumps(asdict(replace(second.me, incarnation=9))))
        assert (tmp_path / "a.json").exists()

"""What a doctor finds out, what it makes of that, and that whoever serves takes no harm from what comes."""

from __future__ import annotations

import dataclasses
import os
import socket
import string
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.config import ENVIRONMENT
from elastic.doctor import judging, paths, visiting
from elastic.doctor.facts import (
    BACKLOG,
    CONTROL,
    IDLE,
    PROBING,
    RECEIVE,
    SEND,
    SYSCTLS,
    Address,
    Call,
    Clock,
    Dialled,
    Disk,
    Interface,
    Machine,
    Pair,
    Ping,
    Sample,
    Side,
)
from elastic.doctor.hosting import MOST_GUESTS, Host
from elastic.doctor.judging import NOTE, OK, PROBLEM, Finding, Setting, fewest, recommended, settled
from elastic.doctor.machine import CHECKS, flaws, look, side
from elastic.doctor.pairing import (
    DATA,
    GREETING_BYTES,
    VISIT,
    Greeting,
    Hello,
    Line,
    Measure,
    Refused,
    Welcome,
)
from elastic.errors import TransportError
from elastic.messages import MessageError

fixed = settings(derandomize=True, deadline=None)
GOOD = Machine(
    system="Linux 6.1",
    python="3.12.1",
    protocol=1,
    packages=dict.fromkeys(("elastic-diloco", *judging.NEEDED), "1.0"),
    interfaces=(Interface(name="lo", mtu=65536, up=True, addresses=("127.0.0.1",)),
                Interface(name="eth0", mtu=1500, up=True, addresses=("192.0.2.7",))),
    sysctl={IDLE: "0", RECEIVE: "4096 131072 6291456", SEND: "4096 16384 4194304", CONTROL: "cubic", PROBING: "1",
            BACKLOG: "4096"},
    usable=("cubic", "bbr", "reno"),
    open_files=65536,
    shm_free=8 << 30,
    disk=Disk(folder="/work", free=50 << 30, size=100 << 30),
    clock=Clock(synchronised=True, error=0.01),
    pidfd=True,
    memfd=True,
)  # fmt: skip
SIDE = Side(version="0.1.0", protocol=1, control="cubic", usable=("cubic", "bbr"), receive=6 << 20, send=4 << 20)
PING = Ping(seconds=0.1, sent=1000.0, received=1000.05, answered=1000.05)


def pair(*samples: Sample, **changes: Any) -> Pair:
    known: dict[str, Any] = {"address": "192.0.2.9:29555", "here": SIDE, "there": SIDE, "local": "192.0.2.7",
                             "seen": "192.0.2.7", "pings": (PING,), "samples": samples}  # fmt: skip
    return Pair(**{**known, **changes})


def sweep(*rates: float, control: str = "", resent: int = 0) -> list[Sample]:
    """Both directions carry so many Mbit/s by 1, 2, 4, ... connections."""
    return [
        Sample(up=up, control=control, connections=1 << i, rate=rate * 1e6 / 8, sent=1000, resent=resent, mtu=1500)
        for i, rate in enumerate(rates)
        for up in (True, False)
    ]


def the(check: str, findings: list[Finding]) -> Finding:
    (found,) = [each for each in findings if each.check == check]
    return found


# --- judgement --------------------------------------------------------------------------------------------------------


def is_a_line(finding: Finding) -> bool:
    one_line = all("\n" not in text for text in (finding.check, finding.fact, finding.advice))
    has_advice = bool(finding.advice) == (finding.level != OK)
    return one_line and has_advice and bool(finding.fact) and finding.level in (OK, NOTE, PROBLEM)


words = st.text(string.ascii_letters + string.digits + " \n.:,", max_size=12)
hosts = st.sampled_from(("127.0.0.1", "10.0.0.1", "192.0.2.7", "fd00::1", "::1"))
numbers = st.integers(0, 1 << 40)
rates = st.floats(0, 1e11)
seconds = st.floats(0, 1e4)
machines = st.builds(
    Machine,
    system=words,
    python=words,
    protocol=numbers,
    packages=st.dictionaries(st.sampled_from(("elastic-diloco", *judging.NEEDED)), words),
    variables=st.lists(words, max_size=3).map(tuple),
    flaws=st.dictionaries(st.sampled_from(("ELASTIC_JOIN", "ELASTIC_JION")), words, max_size=2),
    listen=st.none(),
    advertise=st.none(),
    interfaces=st.lists(
        st.builds(Interface, name=words, mtu=numbers, up=st.booleans(), addresses=st.lists(hosts).map(tuple))
    ).map(tuple),
    sysctl=st.dictionaries(st.sampled_from(SYSCTLS), words | numbers.map(str)),
    usable=st.lists(words, max_size=3).map(tuple),
    open_files=st.integers(-1, 1 << 40),
    shm_free=st.none() | numbers,
    disk=st.none() | st.builds(Disk, folder=words, free=numbers, size=numbers),
    clock=st.none() | st.builds(Clock, synchronised=st.booleans(), error=seconds),
    pidfd=st.booleans(),
    memfd=st.booleans(),
    gpus=st.none() | st.lists(words.filter(str.strip), max_size=2).map(tuple),
)
sides = st.builds(
    Side,
    version=words,
    protocol=numbers,
    control=words,
    usable=st.lists(st.sampled_from(("cubic", "bbr", "reno"))).map(tuple),
    receive=numbers,
    send=numbers,
)
pairs = st.builds(
    Pair,
    address=st.just("192.0.2.9:29555"),
    here=sides,
    there=sides,
    local=hosts,
    seen=hosts,
    pings=st.lists(st.builds(Ping, seconds=seconds, sent=seconds, received=seconds, answered=seconds)).map(tuple),
    listening=st.none() | words,
    promised=st.booleans(),
    dialled=st.lists(st.builds(Dialled, address=st.just("192.0.2.7:1"), evidence=words)).map(tuple),
    samples=st.lists(
        st.builds(Sample, up=st.booleans(), control=st.sampled_from(("", "cubic", "bbr")),
                  connections=st.integers(1, 64), rate=rates, sent=numbers, resent=numbers, mtu=st.integers(0, 65536))
    ).map(tuple),
    refused=st.lists(words.filter(str.strip), max_size=2).map(tuple),
    broken=words,
    cut=st.sampled_from(("", "to", "from")),
)  # fmt: skip


@fixed
@given(machines)
def test_whatever_a_machine_is_each_finding_is_a_line_with_advice(machine: Machine) -> None:
    findings = judging.judge_machine(machine)
    assert all(map(is_a_line, findings)) and len({each.check for each in findings}) == len(findings)


@fixed
@given(pairs)
def test_whatever_two_machines_are_each_finding_is_a_line_with_advice(found: Pair) -> None:
    assert all(map(is_a_line, paths.judge_pair(found)))


@fixed
@given(st.lists(st.builds(Setting, st.sampled_from("abc"), st.sampled_from("xyz"), words, st.floats(0, 9))))
def test_one_value_is_recommended_for_each_name_and_none_of_them_is_lower(wanted: list[Setting]) -> None:
    made = recommended([Finding(check="c", level=NOTE, fact="f", advice="a", settings=tuple(wanted))])
    assert len({each[:2] for each in made}) == len(made) and {each[:2] for each in made} == {
        each[:2] for each in wanted
    }
    for each in wanted:
        (best,) = [other for other in made if other[:2] == each[:2]]
        assert best in wanted and best.order >= each.order


def test_a_good_machine_has_no_findings() -> None:
    assert {each.level for each in judging.judge_machine(GOOD)} == {OK}
    assert recommended(judging.judge_machine(GOOD)) == ()


@pytest.mark.parametrize(
    "check, level, setting, changes",
    [
        ("versions", PROBLEM, None, {"packages": {"torch": "2.9"}}),
        ("versions", PROBLEM, None, {"system": "Darwin 23"}),
        ("environment", PROBLEM, None, {"flaws": {"ELASTIC_STRIPES": "stripes is 0"}}),
        ("interfaces", PROBLEM, None, {"interfaces": GOOD.interfaces[:1]}),
        ("interfaces", NOTE, None, {"interfaces": (dataclasses.replace(GOOD.interfaces[1], mtu=576),)}),
        ("slow start", NOTE, (IDLE, "0"), {"sysctl": {**GOOD.sysctl, IDLE: "1"}}),
        ("buffers", NOTE, (RECEIVE, "4096 131072 4194304"), {"sysctl": {**GOOD.sysctl, RECEIVE: "4096 65536 212992"}}),
        ("MTU probing", NOTE, (PROBING, "1"), {"sysctl": {**GOOD.sysctl, PROBING: "0"}}),
        ("backlog", NOTE, (BACKLOG, "4096"), {"sysctl": {**GOOD.sysctl, BACKLOG: "128"}}),
        ("slow start", NOTE, None, {"sysctl": {name: text for name, text in GOOD.sysctl.items() if name != IDLE}}),
        ("open files", NOTE, None, {"open_files": 1024}),
        ("open files", PROBLEM, None, {"open_files": 256}),
        ("shared memory", NOTE, None, {"shm_free": 64 << 20}),
        ("clock", NOTE, None, {"clock": Clock(synchronised=False, error=16.0)}),
        ("disk", PROBLEM, None, {"disk": Disk(folder="/", free=1 << 20, size=100 << 30)}),
        ("witness", NOTE, None, {"pidfd": False}),
        ("GPUs", NOTE, None, {"gpus": ()}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_machine_is_named(
    check: str, level: str, setting: tuple[str, str] | None, changes: dict[str, Any]
) -> None:
    findings = judging.judge_machine(dataclasses.replace(GOOD, **changes))
    assert the(check, findings).level == level
    assert [each.check for each in findings if each.level != OK] == [check]
    if setting is not None:
        assert setting in [each[1:3] for each in recommended(findings)]


@pytest.mark.parametrize(
    "level, wanted, changes",
    [
        (NOTE, True, {}),
        (PROBLEM, True, {"listen": "127.0.0.1:29401"}),
        (PROBLEM, True, {"listen": "0.0.0.0:29401", "advertise": "localhost:29401"}),
        (OK, False, {"listen": "0.0.0.0:29401", "advertise": "192.0.2.7:29401"}),
        (OK, False, {"listen": ""}),
    ],
)
def test_whether_others_can_dial_what_a_peer_listens_on(level: str, wanted: bool, changes: dict[str, Any]) -> None:
    finding = judging.listening(dataclasses.replace(GOOD, **changes), "tcp://192.0.2.1:29400", "192.0.2.7")
    assert finding.level == level and bool(finding.settings) == wanted
    assert not wanted or ("ELASTIC_ADVERTISE", "192.0.2.7:29401") in [each[1:3] for each in finding.settings]
    near = judging.listening(GOOD, "tcp://127.0.0.1:29400", "127.0.0.1")
    assert near.level == OK


def test_what_a_coordinator_said_is_judged() -> None:
    there = Address(address="tcp://h:1", found=("192.0.2.1",), connected=0.01, local="192.0.2.7")
    lost = dataclasses.replace(there, address="tcp://g:1", error="no answer")
    answered = Call(run="corn", addresses=(there,), protocol=1, members=2, answered=0.1)
    assert [each.level for each in judging.judge_call(answered, 1)] == [OK, OK]
    (_, other) = judging.judge_call(answered, 2)
    assert other.level == PROBLEM and "protocol 1" in other.fact and "installation 2" in other.fact
    spare = dataclasses.replace(answered, addresses=(lost, there))
    assert [each.level for each in judging.judge_call(spare, 1)] == [NOTE, OK, OK]
    silent = Call(run="corn", addresses=(lost,), silent="nobody is there")
    assert [each.level for each in judging.judge_call(silent, 1)] == [PROBLEM, PROBLEM]


@fixed
@given(st.dictionaries(st.sampled_from((1, 2, 4, 8, 16, 32)), rates, min_size=1))
def test_the_fewest_connections_that_carry_nearly_the_most(by_count: dict[int, float]) -> None:
    number, most = fewest(by_count), max(by_count.values())
    assert by_count[number] >= 0.95 * most
    assert all(rate < 0.95 * most for other, rate in by_count.items() if other < number)


def test_a_sweep_goes_on_while_more_connections_carry_more() -> None:
    assert not settled([]) and not settled([10, 10]) and not settled([10, 20, 40, 80])
    assert not settled([10, 10, 20]) and settled([10, 10, 10]) and settled([10, 20, 20.5, 19])


@fixed
@given(st.floats(-1e4, 1e4), st.floats(0, 10), st.floats(0, 10), st.floats(0, 1))
def test_the_clock_offset_is_wrong_by_half_a_round_trip_at_most(
    offset: float, to: float, fro: float, at: float
) -> None:
    received = 1e6 + to + offset
    ping = Ping(seconds=to + at + fro, sent=1e6, received=received, answered=received + at)
    assert abs(ping.offset - offset) <= ping.round_trip / 2 + 1e-6
    assert ping.round_trip == pytest.approx(to + fro, abs=1e-6)


def test_more_connections_are_recommended_where_they_carry_more() -> None:
    finding = the("stripes", paths.judge_pair(pair(*sweep(10, 20, 40, 80, 160, 165))))
    assert finding.level == NOTE and [each[1:3] for each in finding.settings] == [("stripes", "16")]
    assert "10 Mbit/s" in finding.advice
    alone = the("stripes", paths.judge_pair(pair(*sweep(900, 910, 905))))
    assert alone.level == OK and not alone.settings


def test_a_congestion_control_is_recommended_if_it_carries_clearly_more() -> None:
    better = pair(*sweep(5, 10, 20, 40), *sweep(190, 191, 190, control="bbr"))
    assert [each[1:3] for each in the("stripes", paths.judge_pair(better)).settings] == [
        ("stripes", "1"),
        ("congestion_control", "'bbr'"),
    ]
    assert paths.best_control(pair(*sweep(5, 190), *sweep(195, 195, control="bbr"))) == ""


def test_what_is_wrong_with_a_path_is_named() -> None:
    def level(check: str, *samples: Sample, **changes: Any) -> str:
        return the(check, paths.judge_pair(pair(*samples, **changes))).level

    assert level("bandwidth to there", *sweep(100, 100)) == OK
    assert level("bandwidth to there", *sweep(0, 0)) == PROBLEM
    assert level("bandwidth to there", *sweep(100, 100, resent=100)) == NOTE
    assert level("path MTU", *(dataclasses.replace(each, mtu=1400) for each in sweep(9))) == NOTE
    assert level("window", *sweep(1000)) == NOTE  # 100 ms of a Gbit/s are 12.5 MB
    assert level("window", *sweep(*[100] * 5)) == OK
    assert level("clocks", pings=(dataclasses.replace(PING, received=1001.0, answered=1001.0),)) == NOTE
    assert level("round trip", pings=(PING, *[dataclasses.replace(PING, seconds=0.9)] * 2)) == NOTE
    assert level("other side", there=dataclasses.replace(SIDE, protocol=2)) == PROBLEM
    for cut, words in (("to", "does not arrive"), ("from", "nothing arrives from"), ("", "ended")):
        finding = the("path", paths.judge_pair(pair(broken="deadline passed", cut=cut)))
        assert finding.level == PROBLEM and words in finding.fact


def test_who_cannot_be_dialled_and_who_is_behind_a_nat_is_told() -> None:
    failed = (Dialled(address="192.0.2.7:1", evidence="refused"),)
    reached = (*failed, Dialled(address="198.51.100.1:1", evidence=""))
    nat = the("to be dialled", paths.judge_pair(pair(listening="", dialled=failed, seen="198.51.100.1")))
    assert nat.level == NOTE and "behind a NAT" in nat.fact and "192.0.2.7:1 (refused)" in nat.fact
    kept = the("to be dialled", paths.judge_pair(pair(listening="", dialled=failed, promised=True)))
    assert kept.level == PROBLEM
    found = the("to be dialled", paths.judge_pair(pair(listening="", dialled=reached)))
    assert found.level == OK and ("ELASTIC_ADVERTISE", "198.51.100.1:29401") in [each[1:3] for each in found.settings]
    loopback = (Dialled(address="[::1]:1", evidence=""),)
    near = the("to be dialled", paths.judge_pair(pair(listening="", dialled=loopback)))
    assert near.level == OK and not near.settings
    assert the("to be dialled", paths.judge_pair(pair(listening="in use"))).level == PROBLEM
    assert the("to be dialled", paths.judge_pair(pair())).level == OK


def test_the_addresses_to_dial_are_the_likeliest_first() -> None:
    promised = dataclasses.replace(GOOD, advertise="203.0.113.1:7, host:0")
    found = visiting.offers(promised, "192.0.2.7", "198.51.100.1", "0.0.0.0", 5)
    assert found == ["203.0.113.1:7", "host:5", "192.0.2.7:5", "198.51.100.1:5"]
    assert visiting.offers(GOOD, "192.0.2.7", "192.0.2.7", "192.0.2.7", 5) == ["192.0.2.7:5"]
    assert visiting.offers(GOOD, "::1", "::1", "::", 5) == ["[::1]:5", "192.0.2.7:5"]


# --- this machine -----------------------------------------------------------------------------------------------------


def test_a_look_at_this_machine_finds_what_is_there(tmp_path: Path) -> None:
    found = look(tmp_path, {"ELASTIC_RUN": "corn", "ELASTIC_LISTEN": ""})
    assert "127.0.0.1" in [each for interface in found.interfaces for each in interface.addresses]
    assert found.variables == ("ELASTIC_LISTEN", "ELASTIC_RUN") and found.listen == "" and not found.flaws
    assert found.sysctl[IDLE] == Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text().strip()
    room = os.statvfs(tmp_path)
    assert found.disk is not None and found.disk.size == room.f_blocks * room.f_frsize
    assert found.sysctl[CONTROL] in found.usable or found.sysctl[CONTROL] not in ("cubic", "bbr", "reno")
    assert found.packages["torch"] and found.python.startswith("3.") and found.gpus is None
    assert all(map(is_a_line, judging.judge_machine(found)))
    told = side(found)
    assert told.receive == int(found.sysctl[RECEIVE].split()[2]) and told.protocol == found.protocol


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("ELASTIC_JION", "x", "did you mean ELASTIC_JOIN"),
        ("ELASTIC_JOIN", "http://h/r", "a join token looks like"),
        ("ELASTIC_JOIN", "@/no/such/file", "cannot read the join token"),
        ("ELASTIC_NAME", "my peer", "is not a name"),
        ("ELASTIC_LISTEN", "0.0.0.0", "is not HOST:PORT"),
        ("ELASTIC_ADVERTISE", "a:1,b", "is not HOST:PORT"),
        ("ELASTIC_STRIPES", "65", "choose 1 to 64"),
        ("ELASTIC_LANES", "yes", "must be 0 or 1"),
        ("ELASTIC_EVENTS_DIR", "/proc/1", "cannot write"),
        ("ELASTIC_RECORD", "-1", "must be a number of rounds"),
    ],
)
def test_each_variable_that_cannot_be_is_named(name: str, value: str, words: str) -> None:
    good = {"ELASTIC_STRIPES": "auto", "ELASTIC_LISTEN": "", "ELASTIC_RUN": "corn", "HOME": "/"}
    found = flaws({**good, "ELASTIC_SITE": "-", name: value})
    assert set(found) == {"ELASTIC_SITE", name} and words in found[name]
    assert flaws(good) == {} and set(CHECKS) == set(ENVIRONMENT)


# --- two doctors ------------------------------------------------------------------------------------------------------


@contextmanager
def serving(here: Side | None = None) -> Iterator[tuple[str, list[str]]]:
    """A doctor on loopback: its address, and what it has told."""
    told: list[str] = []
    stop = threading.Event()
    with Host("127.0.0.1:0", here or side(look(Path.cwd(), {})), told.append) as host:
        thread = threading.Thread(target=host.serve, args=(stop,))
        thread.start()
        try:
            yield host.address, told
        finally:
            stop.set()
            thread.join(30)
            assert not thread.is_alive()


def until(true: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This one; few measurements are made of it."""
    monkeypatch.setattr(visiting, "COUNTS", (1, 2))
    return dataclasses.replace(look(Path.cwd(), {}), usable=())


def come(address: str, machine: Machine, lines: list[str] | None = None) -> Pair:
    return visiting.visit(address, machine, 0.2, (lines if lines is not None else []).append)


def test_two_doctors_measure_what_lies_between_them(machine: Machine) -> None:
    lines: list[str] = []
    with serving() as (address, told):
        found = come(address, machine, lines)
        until(lambda: told)
    assert [(each.up, each.connections) for each in found.samples] == [(True, 1), (False, 1), (True, 2), (False, 2)]
    assert all(each.rate > 1e6 and each.mtu > 1000 and each.sent > 1e5 for each in found.samples)
    best = paths.rates(found.samples, True, "")
    assert len(lines) == 4 and lines[0].startswith("to there, 1 connection:")
    assert len(found.pings) == visiting.PINGS and all(0 <= each.round_trip < 1 for each in found.pings)
    closest = min(found.pings, key=lambda each: each.round_trip)
    assert abs(closest.offset) <= closest.round_trip / 2 + 1e-4  # one clock
    assert found.listening == "" and found.dialled[0].address.startswith("127.0.0.1:") and not found.dialled[0].evidence
    assert (found.seen, found.local, found.broken, found.cut) == ("127.0.0.1", "127.0.0.1", "", "")
    (line,) = told
    assert "4 measurements" in line and judging.mbit(max(best.values())) in line and "it can be dialled at" in line


def test_the_bytes_that_are_counted_are_those_that_were_sent(machine: Machine) -> None:
    """What arrives in the second half is no more than what was sent in all."""
    with serving() as (address, _):
        found = come(address, machine)
    for each in found.samples:
        assert each.rate * 0.1 <= each.sent


def test_congestion_controls_that_both_have_are_tried(machine: Machine) -> None:
    here = side(machine)
    other = next(
        (name for name in ("cubic", "bbr") if name != here.control and name in look(Path.cwd(), {}).usable), ""
    )
    assert other, "this kernel has one congestion control only"
    both = dataclasses.replace(machine, usable=(here.control, other))
    with serving(dataclasses.replace(here, usable=(other,))) as (address, _):
        found = come(address, both)
    assert {each.control for each in found.samples} == {"", other}


def test_what_cannot_be_measured_is_said_and_the_rest_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visiting, "controls", lambda here, there: ("", "bbr"))
    with serving(dataclasses.replace(side(machine), usable=())) as (address, _):
        found = come(address, machine)
    assert len(found.refused) == 4 and all("bbr is not to be had here" in each for each in found.refused)
    assert len(found.samples) == 4 and not found.broken


def test_visitors_come_one_after_the_other_and_one_at_a_time(machine: Machine) -> None:
    with serving() as (address, told):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port))) as first:
            first.sendall(Greeting(VISIT).pack())
            line = Line(first, beaten=True)
            assert line.hear(Welcome).seen == "127.0.0.1"
            line.say(Hello(side=side(machine)))
            with pytest.raises(TransportError, match="I have a visitor"):
                come(address, machine)
        until(lambda: told)
        assert "ended early" in told[0]
        for number in (2, 3):
            assert not come(address, machine).broken
            until(lambda number=number: len(told) == number)  # type: ignore[misc]


def test_a_visitor_that_only_dials_out_is_not_dialled(machine: Machine) -> None:
    with serving() as (address, told):
        found = come(address, dataclasses.replace(machine, listen=""))
        until(lambda: told)
    assert found.listening is None and not found.dialled and "dialled" not in told[0]


def test_an_address_that_is_not_this_machine_is_not_reached(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as stranger, serving() as (address, told):
        port = stranger.getsockname()[1]

        def answer() -> None:
            sock, _ = stranger.accept()
            with sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        found = come(address, dataclasses.replace(machine, advertise=f"127.0.0.1:{port}", listen="127.0.0.1:0"))
        until(lambda: told)
        thread.join(10)
    assert [each.evidence for each in found.dialled] == ["stranger", ""] and found.promised


def test_a_port_that_is_taken_here_is_told(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, serving() as (address, _):
        found = come(address, dataclasses.replace(machine, listen=f"127.0.0.1:{taken.getsockname()[1]}"))
    assert found.listening == "Address already in use" and len(found.samples) == 4


def test_nobody_there_or_somebody_else_is_told(machine: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        free = silent.getsockname()[1]
    with pytest.raises(TransportError, match=f"refused.*elastic doctor --serve 0.0.0.0:{free}"):
        come(f"127.0.0.1:{free}", machine)
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            sock, _ = other.accept()
            with sock:
                sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(TransportError, match="no doctor of this release"):
            come(f"127.0.0.1:{other.getsockname()[1]}", machine)


def test_a_host_that_ends_in_mid_visit_leaves_what_was_found(machine: Machine) -> None:
    lines: list[str] = []
    stop = threading.Event()
    host = Host("127.0.0.1:0", side(machine), lambda line: None)
    thread = threading.Thread(target=host.serve, args=(stop,))
    thread.start()

    def ending() -> None:
        until(lambda: lines)
        stop.set()
        thread.join(30)
        host.close()

    ender = threading.Thread(target=ending)
    ender.start()
    found = visiting.visit(host.address, machine, 1.0, lines.append)
    ender.join(30)
    assert not thread.is_alive() and found.broken and 1 <= len(found.samples) < 4
    assert len(found.pings) == visiting.PINGS and found.cut == ""


GARBAGE = (
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\x00" * 4096,
    os.urandom(1 << 20),
    b"ELDOCTOR" + b"\xff" * (GREETING_BYTES - 8),  # another edition
    Greeting(DATA, b"k" * 16).pack(),  # of no visit
    Greeting(VISIT).pack() + b"\xff\xff\xff\xff" + b"x" * 65536,  # a message of 4 GiB
    Greeting(VISIT).pack() + b"\x05\x00\x00\x00hello",
)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_hung_up_on_and_the_next_visitor_is_served(garbage: bytes, machine: Machine) -> None:
    with serving() as (address, told):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 20) as sock:
            with suppress(ConnectionError):  # hung up on before it had said all
                sock.sendall(garbage)
                while sock.recv(1 << 16):
                    pass
        if garbage.startswith(Greeting(VISIT).pack()):
            until(lambda: told)
            assert "ended early" in told[0]
        found = come(address, machine)
        assert not found.broken and len(found.samples) == 4


def test_who_says_nothing_is_hung_up_on_and_many_of_them_are_not_kept(machine: Machine) -> None:
    with serving() as (address, _):
        host, port = address.rsplit(":", 1)
        crowd = [socket.create_connection((host, int(port)), 20) for _ in range(MOST_GUESTS + 20)]
        try:
            crowd[0].sendall(b"ELDOC")  # half a greeting
            assert [sock.recv(1) for sock in crowd[-20:]] == [b""] * 20
            assert [sock.recv(1) for sock in crowd[:MOST_GUESTS]] == [b""] * MOST_GUESTS
        finally:
            for sock in crowd:
                sock.close()
        assert not come(address, machine).broken


@pytest.mark.parametrize("order", [{"connections": 65}, {"seconds": 31.0}, {"seconds": float("nan")}])
def test_an_order_beyond_the_bounds_ends_the_visit(order: dict[str, Any], machine: Machine) -> None:
    with pytest.raises(ValueError):
        Measure(**{"number": 1, "up": True, "connections": 1, "seconds": 1.0, "control": "", **order})
    made = Measure(number=1, up=True, connections=1, seconds=1.0, control="")
    for name, value in order.items():
        object.__setattr__(made, name, value)
    with serving() as (address, told):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 20) as sock:
            sock.sendall(Greeting(VISIT).pack())
            line = Line(sock, beaten=True)
            line.hear(Welcome)
            line.say(Hello(side=side(machine)))
            line.say(made)
            until(lambda: told)
        assert "ended early: Measure" in told[0]


def test_connections_that_do_not_come_are_missed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.doctor.hosting.ANSWER_SECONDS", 0.5)
    with serving() as (address, _):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), 20) as sock:
            sock.sendall(Greeting(VISIT).pack())
            line = Line(sock, beaten=True)
            key = line.hear(Welcome).key
            line.say(Hello(side=side(machine)))
            line.say(Measure(number=3, up=True, connections=3, seconds=0.1, control=""))
            with socket.create_connection((host, int(port))) as one, socket.create_connection((host, int(port))) as old:
                one.sendall(Greeting(DATA, key, 3).pack())
                old.sendall(Greeting(DATA, key, 2).pack())
                with pytest.raises(Refused, match="1 of 3 connections"):
                    while True:
                        line.hear_any((object,), 20)


@fixed
@given(st.binary(min_size=GREETING_BYTES, max_size=GREETING_BYTES))
def test_bytes_are_a_greeting_or_an_error_and_nothing_else(data: bytes) -> None:
    with suppress(MessageError):
        assert Greeting.unpack(data).pack() == data


@fixed
@given(st.integers(0, 2), st.binary(min_size=16, max_size=16), st.integers(0, 2**32 - 1))
def test_greetings_survive_the_wire(purpose: int, key: bytes, number: int) -> None:
    assert Greeting.unpack(Greeting(purpose, key, number).pack()) == (purpose, key, number)

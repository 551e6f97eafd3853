"""The WAN emulator itself: delays, rates, losses, queues, cuts, and that it leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from plane import eventually, together

from benchmarks.wan.wan import Topology, Wan, WanError, _start_time

ROOT = Path(__file__).parents[2]
NAME = f"t{os.getpid()}"
SMALL = {
    "sites": ["a", "b", "c"],
    "default": {"rtt_ms": 20, "rate_mbit": 200},
    "sysctl": {"net.ipv4.tcp_congestion_control": "reno"},
}


@pytest.fixture
def wan() -> Iterator[Wan]:
    with Wan(SMALL, NAME, max_life=300) as w:
        yield w


def running(pid: int) -> bool:
    return _start_time(pid) is not None


def listen(w: Wan, site: str, port: int = 5000) -> socket.socket:
    with w.inside(site):
        return socket.create_server((w.addr(site), port), backlog=16)


def connect(w: Wan, a: str, b: str, port: int = 5000, timeout: float = 5.0) -> socket.socket:
    with w.inside(a):
        s = socket.socket()
    s.settimeout(timeout)
    s.connect((w.addr(b), port))
    return s


def flood(w: Wan, count: int, size: int = 1400) -> None:
    """So many datagrams from a to b, as fast as they go."""
    with w.inside("a"):
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with s:
        for _ in range(count):
            s.sendto(bytes(size), (w.addr("b"), 9))


def admit(w: Wan, count: int, size: int = 1400) -> float:
    """Floods, and waits until all of it has come to the link from a to b: sent is not yet there on a busy machine.

    Returns the seconds from before the first was sent to when the last was seen to be there.
    """
    began, before = time.monotonic(), link(w, "a", "b")["in_pkts"]
    flood(w, count, size)
    eventually(lambda: link(w, "a", "b")["in_pkts"] == before + count)
    return time.monotonic() - began


def delivered(w: Wan) -> dict[str, Any]:
    """The link from a to b, once nothing is on its way there."""
    eventually(lambda: not link(w, "a", "b")["held_pkts"])
    return link(w, "a", "b")


def assert_takes(measure: Callable[[], float], least: float, most: float) -> None:
    """It never takes less; and not more, but for a busy machine: so once at least within a few times."""
    took: list[float] = []
    while not took or took[-1] >= most:
        assert len(took) < 20, took
        took.append(measure())
        assert took[-1] >= least


def connecting(w: Wan, a: str, b: str) -> float:
    """Seconds."""
    began = time.monotonic()
    connect(w, a, b).close()
    return time.monotonic() - began


def transfer(w: Wan, a: str, b: str, data: bytes, port: int = 5000, chunk: int = 1 << 16) -> tuple[str, float]:
    """Sends data from a to b; returns (digest at b, seconds from the first send to the last byte there)."""
    got: dict[str, Any] = {}

    def receive(ls: socket.socket) -> None:
        c, _ = ls.accept()
        h = hashlib.sha256()
        with c:
            while d := c.recv(1 << 18):
                h.update(d)
        got.update(digest=h.hexdigest(), at=time.monotonic())

    with listen(w, b, port) as ls:
        th = threading.Thread(target=receive, args=(ls,), daemon=True)
        th.start()
        with connect(w, a, b, port, timeout=60) as s:
            began = time.monotonic()
            for i in range(0, len(data), chunk):
                s.sendall(data[i : i + chunk])
        th.join(60)
    return got["digest"], got["at"] - began


def link(w: Wan, a: str, b: str) -> dict[str, Any]:
    found: dict[str, Any] = next(k for k in w.status()["links"] if (k["from"], k["to"]) == (a, b))
    return found


@pytest.mark.wan
def test_delay_and_changing_it(wan: Wan) -> None:
    with listen(wan, "b"):
        assert_takes(lambda: connecting(wan, "a", "b"), 0.020, 0.030)
        wan.set("a", "b", delay=50)
        assert_takes(lambda: connecting(wan, "a", "b"), 0.100, 0.115)
        wan.set("a", "b", both=False, delay=5)
        assert_takes(lambda: connecting(wan, "a", "b"), 0.055, 0.070)


@pytest.mark.wan
def test_settings_of_a_site_are_made_or_refused(wan: Wan) -> None:
    with wan.inside("b"), socket.socket() as s:
        assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
    with pytest.raises(WanError, match="tcp_congestion_control: no such setting"):
        Wan({**SMALL, "sysctl": {"net.ipv4.tcp_congestion_control": "nonsense"}}, f"{NAME}x").up()


@pytest.mark.wan
def test_rate(wan: Wan) -> None:
    wan.set("a", "b", rate=40)
    data = os.urandom(1 << 20) * 10
    ideal = len(data) * 8 / 40e6
    assert_takes(lambda: transfer(wan, "a", "b", data)[1], ideal, ideal / 0.75)


@pytest.mark.wan
def test_data_is_intact_under_loss(wan: Wan) -> None:
    wan.set("a", "b", loss=0.01, delay=1, jitter=1)
    data = os.urandom(20 << 20)
    digest, _ = transfer(wan, "a", "b", data, chunk=300_001)
    assert digest == hashlib.sha256(data).hexdigest()
    k = link(wan, "a", "b")
    assert 0.005 < k["drop_loss"] / k["in_pkts"] < 0.02


@pytest.mark.wan
def test_burst_loss_has_the_same_mean(wan: Wan) -> None:
    wan.set("a", "b", both=False, loss=0.02, burst=5, rate=0, delay=0)
    for _ in range(50):  # no more at once than the TUN device holds
        admit(wan, 1000, 1)
    k = delivered(wan)
    assert k["in_pkts"] == 50_000
    assert 0.01 < k["drop_loss"] / k["in_pkts"] < 0.03


@pytest.mark.wan
def test_queue_is_finite(wan: Wan) -> None:
    each = 1428 * 8 / 1e6  # seconds on the wire at 1 Mbit/s
    wan.set("a", "b", both=False, rate=1, queue=100)
    took = admit(wan, 100)
    k = delivered(wan)
    assert 0.1 / each <= k["out_pkts"] <= (0.1 + took) / each + 2 and k["drop_queue"] + k["out_pkts"] == 100
    wan.reset()
    wan.set("a", "b", both=False, queue=1000, queue_pkts=20)
    took = admit(wan, 100)
    k = delivered(wan)
    assert 20 <= k["out_pkts"] <= 22 + took / each and k["drop_queue"] + k["out_pkts"] == 100


@pytest.mark.wan
def test_lowering_the_rate_does_not_block_the_link(wan: Wan) -> None:
    wan.set("a", "b", both=False, rate=1, queue=2000)
    admit(wan, 100)  # more than a second on the wire; a hundred times that at the new rate, and no room behind it
    wan.set("a", "b", both=False, rate=0.01)
    admit(wan, 1, 1)
    k = delivered(wan)
    assert k["out_pkts"] == 101 and k["drop_queue"] == 0


@pytest.mark.wan
def test_cut_and_heal(wan: Wan) -> None:
    with listen(wan, "b") as ls, connect(wan, "a", "b") as s:
        c, _ = ls.accept()
        wan.cut("a", "b")
        s.sendall(b"x" * 1000)
        eventually(lambda: link(wan, "a", "b")["drop_cut"] > 1)  # it was sent again
        assert link(wan, "a", "b")["cut"]
        c.setblocking(False)
        with pytest.raises(BlockingIOError):
            c.recv(10)
        with listen(wan, "c"):
            connect(wan, "a", "c").close()  # the others are not affected
        wan.heal("a", "b")
        c.settimeout(10)
        assert c.recv(10) == b"x" * 10  # TCP sends it again
        c.close()


@pytest.mark.wan
def test_one_way_cut_and_isolation(wan: Wan) -> None:
    wan.cut("b", "a", both=False)
    with listen(wan, "b"), listen(wan, "a"):
        with pytest.raises(TimeoutError):
            connect(wan, "a", "b", timeout=0.3)
        eventually(lambda: link(wan, "b", "a")["drop_cut"] > 0)
        assert link(wan, "a", "b")["out_pkts"] > 0 and link(wan, "b", "a")["out_pkts"] == 0
    wan.cut("c")
    assert {(k["from"], k["to"]) for k in wan.status()["links"] if k["cut"]} == {
        ("b", "a"),
        ("c", "a"),
        ("c", "b"),
        ("a", "c"),
        ("b", "c"),
    }
    wan.heal("a")
    wan.heal("c")
    assert not any(k["cut"] for k in wan.status()["links"])


@pytest.mark.wan
def test_shared_uplink_and_downlink(wan: Wan) -> None:
    data = bytes(5 << 20)
    ideal, digest = 2 * len(data) * 8 / 40e6, hashlib.sha256(data).hexdigest()

    def both(*pairs: tuple[str, str]) -> float:
        """Seconds until both transfers are over."""
        began = time.monotonic()
        moved = together(*(partial(transfer, wan, *pair, data, port=5100 + i) for i, pair in enumerate(pairs)))
        assert [found for found, _ in moved] == [digest] * 2
        return time.monotonic() - began

    for shared, pairs in (({"up": 40}, (("a", "b"), ("a", "c"))), ({"up": 0, "down": 40}, (("b", "a"), ("c", "a")))):
        wan.access("a", **shared)
        assert_takes(partial(both, *pairs), ideal, 5.0)


@pytest.mark.wan
def test_sighup_reads_the_file_again(wan: Wan) -> None:
    conf = wan.dir / "wanem.conf"
    conf.write_text(conf.read_text() + "link a b delay_us=40000\n")
    os.kill(wan.state()["pid"], signal.SIGHUP)
    eventually(lambda: link(wan, "a", "b")["delay_ms"] == 40)
    assert link(wan, "b", "a")["delay_ms"] == 10


@pytest.mark.wan
def test_down_removes_everything(wan: Wan) -> None:
    p = wan.popen("a", ["sleep", "60"])
    st = dict(wan.state())
    wan.down()
    assert p.wait() != 0
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert NAME not in left
    assert not running(st["pid"])
    assert not wan.dir.exists()
    wan.down()  # again: nothing to do
    with pytest.raises(WanError, match="not up"):
        wan.status()


@pytest.mark.wan
def test_it_ends_with_its_owner_and_can_be_taken_over() -> None:
    code = (
        "import os\n"
        f"from benchmarks.wan.wan import Wan\nw = Wan({SMALL!r}, {NAME!r}, max_life=60).up(owned=True)\n"
        "print(w.state()['pid'], flush=True)\nos._exit(0)\n"
    )
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout)
    eventually(lambda: not running(pid))
    with Wan(SMALL, NAME, max_life=60) as w, listen(w, "b"):
        connect(w, "a", "b").close()


@pytest.mark.wan
def test_a_namespace_of_someone_else_is_left_alone() -> None:
    subprocess.run(["ip", "netns", "add", f"{NAME}-b"], check=True)
    try:
        with pytest.raises(WanError, match="exists"):
            Wan(SMALL, NAME).up()
        assert f"{NAME}-b" in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    finally:
        subprocess.run(["ip", "netns", "del", f"{NAME}-b"], check=True)


@pytest.mark.wan
def test_clear_errors(wan: Wan) -> None:
    with pytest.raises(WanError, match="no site 'z'"):
        wan.set("a", "z", delay=1)
    with pytest.raises(WanError, match="fraction"):
        wan.set("a", "b", loss=2)
    with pytest.raises(WanError, match="already up"):
        Wan(SMALL, NAME).up()


def test_topologies() -> None:
    for name, n in (("lan3.json", 3), ("wan3.json", 3), ("lossy3.json", 3), ("asym4.json", 4)):
        t = Topology.load(name)
        assert len(t.sites) == n and len(t.links) == n * (n - 1)
    t = Topology.load("asym4.json")
    r = {k: v["rate_mbit"] for k, v in t.links.items()}

    def slowest(order: str) -> float:
        ring = [f"site-{x}" for x in order]
        return min(r[a, b] for a, b in zip(ring, ring[1:] + ring[:1], strict=True))

    rings = {o: slowest(o) for o in ("abcd", "abdc", "acbd", "acdb", "adbc", "adcb")}
    assert rings == {"acbd": 200, "adbc": 100, "adcb": 30, "acdb": 30, "abcd": 20, "abdc": 20}
    for bad in (
        {},
        {"sites": ["a"]},
        {"sites": ["a", "b"], "links": [{"from": "a", "to": "x"}]},
        {"sites": ["a", "b"], "default": {"loss": 3}},
        {"sites": ["a", "b"], "dealy": 1},
        {"sites": ["a b", "c"]},
    ):
        with pytest.raises(WanError):
            Topology(bad)

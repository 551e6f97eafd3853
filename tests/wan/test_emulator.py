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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from plane import eventually

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


def delivered(w: Wan, count: int, seconds: float) -> dict[str, Any]:
    """The link from a to b, once so many packets have come to it and none is on its way."""
    eventually(lambda: link(w, "a", "b")["in_pkts"] >= count and not link(w, "a", "b")["held_pkts"], seconds)
    return link(w, "a", "b")


def connect_s(w: Wan, a: str, b: str, port: int = 5000, n: int = 5) -> float:
    took = []
    for _ in range(n):
        t = time.monotonic()
        connect(w, a, b, port).close()
        took.append(time.monotonic() - t)
    return sorted(took)[n // 2]


def transfer(w: Wan, a: str, b: str, data: bytes, port: int = 5000, chunk: int = 1 << 16) -> tuple[str, float]:
    """Sends data from a to b; returns (digest at b, seconds from first to last byte)."""
    got: dict[str, Any] = {}

    def receive(ls: socket.socket) -> None:
        c, _ = ls.accept()
        h = hashlib.sha256()
        t = 0.0
        with c:
            while d := c.recv(1 << 18):
                t = t or time.monotonic()
                h.update(d)
        got.update(digest=h.hexdigest(), took=time.monotonic() - t)

    with listen(w, b, port) as ls:
        th = threading.Thread(target=receive, args=(ls,), daemon=True)
        th.start()
        with connect(w, a, b, port, timeout=60) as s:
            for i in range(0, len(data), chunk):
                s.sendall(data[i : i + chunk])
        th.join(60)
    return got["digest"], got["took"]


def link(w: Wan, a: str, b: str) -> dict[str, Any]:
    found: dict[str, Any] = next(k for k in w.status()["links"] if (k["from"], k["to"]) == (a, b))
    return found


@pytest.mark.wan
def test_delay_and_changing_it(wan: Wan) -> None:
    with listen(wan, "b"):
        assert 0.020 <= connect_s(wan, "a", "b") < 0.030
        wan.set("a", "b", delay=50)
        assert 0.100 <= connect_s(wan, "a", "b") < 0.115
        wan.set("a", "b", both=False, delay=5)
        assert 0.055 <= connect_s(wan, "a", "b") < 0.070


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
    _, took = transfer(wan, "a", "b", data)
    assert 0.75 * 40 < len(data) * 8 / took / 1e6 < 40


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
    for sent in range(1000, 50_001, 1000):  # no more at once than the TUN device holds
        flood(wan, 1000, 1)
        eventually(lambda sent=sent: link(wan, "a", "b")["in_pkts"] == sent)  # type: ignore[misc]
    k = delivered(wan, 50_000, 0.2)
    assert 0.01 < k["drop_loss"] / k["in_pkts"] < 0.03


@pytest.mark.wan
def test_queue_is_finite(wan: Wan) -> None:
    wan.set("a", "b", both=False, rate=10, queue=10)
    flood(wan, 100)
    k = delivered(wan, 100, 0.3)
    assert 5 <= k["out_pkts"] <= 25 and k["drop_queue"] + k["out_pkts"] == 100
    wan.reset()
    wan.set("a", "b", both=False, queue=1000, queue_pkts=20)
    flood(wan, 100)
    assert 20 <= delivered(wan, 100, 0.3)["out_pkts"] <= 35


@pytest.mark.wan
def test_lowering_the_rate_does_not_block_the_link(wan: Wan) -> None:
    wan.set("a", "b", both=False, rate=100, queue=200)
    flood(wan, 100)
    wan.set("a", "b", both=False, rate=1)
    flood(wan, 1)
    k = delivered(wan, 101, 0.5)
    assert k["out_pkts"] == 101 and k["held_pkts"] == 0


@pytest.mark.wan
def test_cut_and_heal(wan: Wan) -> None:
    with listen(wan, "b") as ls, connect(wan, "a", "b") as s:
        c, _ = ls.accept()
        wan.cut("a", "b")
        s.sendall(b"x" * 1000)
        c.settimeout(0.5)
        with pytest.raises(TimeoutError):
            c.recv(10)
        assert link(wan, "a", "b")["cut"] and link(wan, "a", "b")["drop_cut"] > 0
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
    for kw, pairs in (({"up": 40}, (("a", "b"), ("a", "c"))), ({"up": 0, "down": 40}, (("b", "a"), ("c", "a")))):
        wan.access("a", **kw)
        took: dict[int, float] = {}

        def go(i: int, a: str, b: str, took: dict[int, float] = took) -> None:
            took[i] = transfer(wan, a, b, data, port=5100 + i)[1]

        threads = [threading.Thread(target=go, args=(i, a, b)) for i, (a, b) in enumerate(pairs)]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
        assert 2 * len(data) * 8 / max(took.values()) / 1e6 < 42
        assert max(took.values()) < 5


@pytest.mark.wan
def test_sighup_reads_the_file_again(wan: Wan) -> None:
    conf = wan.dir / "wanem.conf"
    conf.write_text(conf.read_text() + "link a b delay_us=40000\n")
    os.kill(wan.state()["pid"], signal.SIGHUP)
    eventually(lambda: link(wan, "a", "b")["delay_ms"] == 40, 3)
    assert link(wan, "b", "a")["delay_ms"] == 10


@pytest.mark.wan
def test_down_removes_everything(wan: Wan) -> None:
    p = wan.popen("a", ["sleep", "60"])
    st = dict(wan.state())
    wan.down()
    assert p.wait(5) != 0
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
    eventually(lambda: not running(pid), 3)
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

"""Measures what the emulator delivers and prints the tables of README.md.

Needs iperf3.  About ten minutes: `python -m benchmarks.wan.validate`; with `--quick` about five.
"""

import contextlib
import json
import math
import socket
import subprocess
import sys
import time

from benchmarks.wan.wan import Topology, Wan

QUICK = "--quick" in sys.argv
MSS = 1448
NAME = "validate"


def connect_ms(w: Wan, a: str, b: str, n: int = 20) -> float:
    """Median TCP connect time from a to b."""
    with w.inside(b):
        ls = socket.create_server((w.addr(b), 5300), backlog=64)
    took = []
    with ls:
        for _ in range(n):
            with w.inside(a):
                s = socket.socket()
            with s:
                t = time.perf_counter()
                s.connect((w.addr(b), 5300))
                took.append((time.perf_counter() - t) * 1e3)
            ls.accept()[0].close()
            time.sleep(0.01)
    return sorted(took)[n // 2]


def iperf(w: Wan, a: str, b: str, cc: str, streams: int, secs: int, omit: int) -> tuple[float, int, float]:
    """Goodput Mbit/s, retransmissions, emulator cpu (cores)."""
    server = w.popen(b, ["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(0.3)
        r = w.popen(
            a,
            ["iperf3", "-c", w.addr(b), "-C", cc, "-P", str(streams), "-t", str(secs), "-O", str(omit), "-J"],
            stdout=subprocess.PIPE,
            text=True,
        )
        time.sleep(omit + 0.5)
        s0, t0 = w.status(), time.monotonic()
        time.sleep(max(secs - 1.0, 1))
        s1, t1 = w.status(), time.monotonic()
        end = json.loads(r.communicate(timeout=secs + 60)[0])["end"]
    finally:
        server.terminate()
        server.wait(10)
    cpu = (s1["cpu_user_s"] + s1["cpu_sys_s"] - s0["cpu_user_s"] - s0["cpu_sys_s"]) / (t1 - t0)
    return end["sum_received"]["bits_per_second"] / 1e6, end["sum_sent"].get("retransmits", 0), cpu


def mathis(rtt_s: float, loss: float) -> float:
    return MSS * 8 / rtt_s * math.sqrt(1.5 / loss) / 1e6


def main() -> None:
    print("## Round trips\n\n| topology | pair | set (ms) | TCP connect, median (ms) |\n|---|---|---|---|")
    for top, pairs in (("lan3.json", ["ab"]), ("wan3.json", ["ab", "ac"]), ("lossy3.json", ["ab"])):
        with Wan(top, NAME, max_life=900) as w:
            for p in pairs:
                a, b = f"site-{p[0]}", f"site-{p[1]}"
                t = Topology.load(top)
                rtt = t.links[a, b]["delay_ms"] + t.links[b, a]["delay_ms"]
                print(f"| {top} | {a} - {b} | {rtt:g} | {connect_ms(w, a, b):.2f} |", flush=True)

    two = {"sites": ["site-a", "site-b"], "default": {"rtt_ms": 100, "rate_mbit": 200, "queue_ms": 50}}
    print("\n## Random loss\n\n| set | packets | measured |\n|---|---|---|")
    with Wan(two, NAME, max_life=900) as w:
        for loss in (0.0001, 0.001, 0.01):
            w.reset()
            w.set("site-a", "site-b", both=False, loss=loss, rate=0, delay=1)
            n = 200_000 if QUICK else 1_000_000
            with w.inside("site-a"):
                s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with s:
                s.connect((w.addr("site-b"), 9))
                for i in range(n):
                    with contextlib.suppress(ConnectionRefusedError):
                        s.send(b"x" * 64)
                    if i % 2000 == 0:
                        time.sleep(0.01)
            time.sleep(0.3)
            k = next(x for x in w.status()["links"] if x["from"] == "site-a")
            print(f"| {loss:g} | {k['in_pkts']} | {k['drop_loss'] / max(k['in_pkts'], 1):.6f} |", flush=True)

    print(
        "\n## One link, 1 Gbit/s and unlimited, 10 ms round trip, no loss, cubic\n\n"
        "| rate (Mbit/s) | connections | goodput (Mbit/s) | emulator cpu (cores) |\n|---|---|---|---|"
    )
    with Wan({"sites": ["site-a", "site-b"], "default": {"rtt_ms": 10, "queue_ms": 10}}, NAME, max_life=900) as w:
        for rate in (1000, 0):
            w.set("site-a", "site-b", rate=rate)
            for flows in (1, 8):
                g, _, cpu = iperf(w, "site-a", "site-b", "cubic", flows, 5 if QUICK else 10, 2)
                print(f"| {rate or 'unlimited'} | {flows} | {g:.0f} | {cpu:.2f} |", flush=True)

    print(
        "\n## 100 ms round trip, 200 Mbit/s, queue 50 ms\n\n"
        "| loss | congestion control | connections | goodput (Mbit/s) | retransmissions | emulator cpu (cores) | "
        "Mathis, one flow (Mbit/s) |\n|---|---|---|---|---|---|---|"
    )
    with Wan(two, NAME, max_life=1800) as w:
        for loss in (0.0001, 0.001):
            w.set("site-a", "site-b", both=False, loss=loss)
            for cc in ("reno", "cubic", "bbr"):
                for flows in (1,) if cc == "reno" else (1, 4, 8, 16):
                    secs, omit = (8, 4) if QUICK else (40, 10) if flows == 1 and cc != "bbr" else (15, 5)
                    g, retr, cpu = iperf(w, "site-a", "site-b", cc, flows, secs, omit)
                    m = f"{mathis(0.1, loss):.1f}" if cc == "reno" else ""
                    print(f"| {loss * 100:g} % | {cc} | {flows} | {g:.1f} | {retr} | {cpu:.2f} | {m} |", flush=True)


if __name__ == "__main__":
    main()

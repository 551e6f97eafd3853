"""Set up and drive an emulated WAN between network namespaces.

The command `wan` is a thin layer over this module; tests use the class:

    with Wan("wan3.json") as w:
        p = w.popen("site-a", ["python3", "worker.py"])
        w.set("site-a", "site-b", delay=50, rate=200, loss=0.001)
        w.cut("site-a", "site-c")
        w.heal("site-a", "site-c")
        print(w.status()["links"])

Delays are one-way milliseconds, rates Mbit/s, losses fractions (0.001 = 0.1 %).
Needs root, iproute2, a C compiler (once), and /dev/net/tun.  Python 3.11, standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "wanem.c"
DEV = "wan0"
CFLAGS = ["-O2", "-pthread", "-Wall"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}\Z")
CLONE_NEWNET = 0x40000000

SET_OPTIONS = {
    "delay": "one way, ms",
    "jitter": "ms",
    "rate": "Mbit/s, 0 = unlimited",
    "queue": "ms",
    "queue_pkts": "packets, 0 = no limit",
    "loss": "fraction",
    "burst": "mean packets lost in a row",
}
ACCESS_OPTIONS = {"up": "Mbit/s", "down": "Mbit/s", "up_queue": "ms", "down_queue": "ms"}

# name in a topology or in set(): (name in wanem, factor)
LINK_KEYS = {
    "delay_ms": ("delay_us", 1000),
    "jitter_ms": ("jitter_us", 1000),
    "rate_mbit": ("rate_kbit", 1000),
    "queue_ms": ("queue_us", 1000),
    "queue_pkts": ("queue_pkts", 1),
    "loss": ("loss", 1),
    "burst": ("burst", 1),
}
ACCESS_KEYS = {
    "up_mbit": ("up_kbit", 1000),
    "down_mbit": ("down_kbit", 1000),
    "up_queue_ms": ("up_queue_us", 1000),
    "down_queue_ms": ("down_queue_us", 1000),
}
LINK_DEFAULT = {"delay_ms": 0, "jitter_ms": 0, "rate_mbit": 0, "queue_ms": 50, "queue_pkts": 0, "loss": 0, "burst": 1}
# Without no_metrics_save a connection would start with what an earlier one learned.
SYSCTL_DEFAULT = {
    "net.ipv6.conf.all.disable_ipv6": "1",
    "net.ipv6.conf.default.disable_ipv6": "1",
    "net.ipv4.tcp_no_metrics_save": "1",
}


class WanError(Exception):
    """Something the user can act on; the message says what."""


def run_root() -> Path:
    return Path(os.environ.get("XDG_RUNTIME_DIR") or "/tmp") / "wanem"


def cache_root() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wanem"


def check_host() -> None:
    """Raises WanError when this machine cannot run the emulator."""
    if not sys.platform.startswith("linux"):
        raise WanError("the WAN emulator needs Linux (network namespaces and TUN)")
    if os.geteuid() != 0:
        raise WanError("the WAN emulator needs root: it makes network namespaces and TUN devices")
    if not shutil.which("ip"):
        raise WanError("the command `ip` is missing: install iproute2")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as e:
        raise WanError(
            f"/dev/net/tun cannot be opened ({e.strerror}): load the tun module or make the device "
            "(mkdir -p /dev/net && mknod /dev/net/tun c 10 200)"
        ) from None


def _ip(*args: str, check: bool = True) -> str:
    r = subprocess.run(["ip", *args], capture_output=True, text=True, timeout=30)
    if check and r.returncode:
        raise WanError(f"ip {' '.join(args)}: {r.stderr.strip() or r.returncode}")
    return r.stdout


def build() -> Path:
    """Compiles wanem.c unless this very source has been compiled before."""
    cc = os.environ.get("CC") or "gcc"
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join([cc, *CFLAGS]).encode()).hexdigest()[:16]
    exe = cache_root() / f"wanem-{digest}"
    if exe.exists():
        return exe
    if not shutil.which(cc):
        raise WanError(f"no C compiler ({cc}): wanem.c has to be compiled once")
    exe.parent.mkdir(parents=True, exist_ok=True)
    tmp = exe.with_name(f"{exe.name}.{os.getpid()}.tmp")
    r = subprocess.run([cc, *CFLAGS, "-o", str(tmp), str(SOURCE)], capture_output=True, text=True, timeout=120)
    if r.returncode:
        tmp.unlink(missing_ok=True)
        raise WanError(f"wanem.c does not compile:\n{r.stderr}")
    tmp.rename(exe)
    return exe


# ---------------------------------------------------------------- topology


class Topology:
    """A checked topology: sites with addresses, and settings for every ordered pair."""

    def __init__(self, data: dict[str, Any]):
        known = {"name", "description", "mtu", "tick_us", "seed", "sysctl", "network", "sites", "default", "links"}
        self._only(data, known, "topology")
        self.name = str(data.get("name", "wan"))
        self.mtu = int(data.get("mtu", 1500))
        self.seed = int(data.get("seed", 1))
        self.sysctl = {**SYSCTL_DEFAULT, **{k: str(v) for k, v in data.get("sysctl", {}).items()}}
        net = ipaddress.ip_network(data.get("network", "10.77.0.0/24"))
        self.prefix = net.prefixlen
        sites = data.get("sites")
        if isinstance(sites, list):
            sites = {n: {} for n in sites}
        if not isinstance(sites, dict) or len(sites) < 2:
            raise WanError("a topology needs at least two sites")
        if len(sites) > 32:
            raise WanError("at most 32 sites")
        self.sites: list[str] = list(sites)
        self.addr: dict[str, str] = {}
        self.access: dict[str, dict[str, float]] = {}
        self.site_sysctl: dict[str, dict[str, str]] = {}
        for i, (n, s) in enumerate(sites.items()):
            if not NAME.match(n):
                raise WanError(f"not a usable site name: {n!r}")
            self._only(s, {"addr", "label", "sysctl", *ACCESS_KEYS}, f"site {n}")
            a = ipaddress.ip_address(s.get("addr") or net.network_address + 1 + i)
            if a not in net:
                raise WanError(f"{n}: {a} is outside {net}")
            self.addr[n] = str(a)
            self.access[n] = {k: s[k] for k in ACCESS_KEYS if k in s}
            self.site_sysctl[n] = {k: str(v) for k, v in s.get("sysctl", {}).items()}
        if len(set(self.addr.values())) < len(self.addr):
            raise WanError("two sites have the same address")
        base = dict(LINK_DEFAULT)
        self._apply(base, data.get("default", {}), "default")
        self.links = {(a, b): dict(base) for a in self.sites for b in self.sites if a != b}
        for link in data.get("links", []):
            pairs = self._pairs(link)
            settings = {k: v for k, v in link.items() if k not in ("between", "from", "to", "label")}
            for p in pairs:
                self._apply(self.links[p], settings, f"link {' -> '.join(p)}")
        # Longer ticks cost less cpu and add at most one tick of delay under load.
        shortest = min(s["delay_ms"] for s in self.links.values())
        self.tick_us = int(data.get("tick_us", min(max(shortest * 1000 / 50, 20), 250)))

    @classmethod
    def load(cls, source: Topology | dict[str, Any] | str | os.PathLike[str]) -> Topology:
        if isinstance(source, Topology):
            return source
        if isinstance(source, dict):
            return cls(source)
        path = Path(source)
        if not path.exists() and not path.is_absolute() and (HERE / path).exists():
            path = HERE / path  # a sample by its bare name
        try:
            return cls(json.loads(path.read_text()))
        except OSError as e:
            raise WanError(f"{source}: {e.strerror}") from None
        except ValueError as e:
            raise WanError(f"{source}: {e}") from None

    @staticmethod
    def _only(d: Any, known: set[str], what: str) -> None:
        if not isinstance(d, dict):
            raise WanError(f"{what}: expected an object")
        if bad := sorted(set(d) - known):
            raise WanError(f"{what}: unknown {', '.join(bad)} (known: {', '.join(sorted(known))})")

    def _pairs(self, link: dict[str, Any]) -> list[tuple[str, str]]:
        if "between" in link:
            a, b = link["between"]
            pairs = [(a, b), (b, a)]
        else:
            pairs = [(link.get("from"), link.get("to"))]
        for p in pairs:
            if p not in self.links:
                raise WanError(f"no such link: {p[0]} -> {p[1]}")
        return pairs

    def _apply(self, to: dict[str, Any], settings: dict[str, Any], what: str) -> None:
        settings = dict(settings)
        if "rtt_ms" in settings:  # shorthand for half of it each way
            settings["delay_ms"] = settings.pop("rtt_ms") / 2
        self._only(settings, set(LINK_KEYS), what)
        for k, v in settings.items():
            if not isinstance(v, (int, float)) or v < 0 or (k == "loss" and v > 1):
                raise WanError(f"{what}: {k} cannot be {v!r}")
            to[k] = v

    def config(self, netns: dict[str, str]) -> str:
        out = [f"tick_us {self.tick_us}", f"seed {self.seed}"]
        out += [f"site {n} {netns[n]} {self.addr[n]} {self.prefix} {DEV} {self.mtu}" for n in self.sites]
        out += [f"access {n} {_words(self.access[n], ACCESS_KEYS)}" for n in self.sites if self.access[n]]
        out += [f"link {a} {b} {_words(s, LINK_KEYS)}" for (a, b), s in self.links.items()]
        return "\n".join(out) + "\n"


def _words(settings: dict[str, Any], keys: dict[str, tuple[str, int]]) -> str:
    return " ".join(f"{keys[k][0]}={v * keys[k][1]:.12g}" for k, v in settings.items())


# ---------------------------------------------------------------- processes


def _start_time(pid: int) -> str | None:
    """When a process started (clock ticks), which with the pid names it for good; None: gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _end(pids: dict[int, str], grace: float = 2.0) -> None:
    """SIGTERM, and after `grace` seconds SIGKILL, for processes given as pid -> start time."""
    for sig, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 3.0)):
        live = [p for p, t in pids.items() if _start_time(p) == t]
        for p in live:
            with contextlib.suppress(ProcessLookupError):
                os.kill(p, sig)
        end = time.monotonic() + wait
        while live and time.monotonic() < end:
            live = [p for p in live if _start_time(p) == pids[p]]
            time.sleep(0.02)
        if not live:
            return


def _netns_list() -> set[str]:
    return {line.split()[0] for line in _ip("netns", "list", check=False).splitlines() if line.strip()}


# ---------------------------------------------------------------- the emulated WAN


class Wan:
    """One emulated WAN.  `name` lets several run side by side; the default one
    has namespaces named like the sites, others get `NAME-SITE`."""

    def __init__(self, topology: Any = None, name: str = "wan", *, max_life: float = 0, replace: bool = False):
        if not NAME.match(name):
            raise WanError(f"not a usable name: {name!r}")
        self.name, self.max_life, self.replace = name, max_life, replace
        self.dir = run_root() / name
        self.topology = Topology.load(topology) if topology is not None else None
        self._watch = -1
        self._state: dict[str, Any] | None = None

    # -- life

    def __enter__(self) -> Wan:
        return self.up(owned=True)

    def __exit__(self, *exc: object) -> None:
        self.down()

    def up(self, owned: bool = False) -> Wan:
        """Makes the namespaces and starts the emulator.  owned: it ends with this process."""
        if self.topology is None:
            raise WanError("no topology")
        check_host()
        exe = build()
        if (self.dir / "state.json").exists():
            if self._alive() and not self.replace:
                raise WanError(f"{self.name!r} is already up (wan down, or another --name)")
            self.down()
        top = self.topology
        netns = {s: s if self.name == "wan" else f"{self.name}-{s}" for s in top.sites}
        if taken := sorted(set(netns.values()) & _netns_list()):
            raise WanError(
                f"namespace {', '.join(taken)} exists and is not from this WAN: "
                f"remove it (ip netns del {taken[0]}) or use another --name"
            )
        self._make_dir()
        self._state = {"name": self.name, "netns": netns, "addr": top.addr, "made": [], "pid": 0, "start": ""}
        try:
            for s in top.sites:
                self._state["made"].append(netns[s])  # noted first: down must find it
                self._save()
                _ip("netns", "add", netns[s])
                _ip("-n", netns[s], "link", "set", "lo", "up")
                self._sysctl(netns[s], {**top.sysctl, **top.site_sysctl[s]})
            (self.dir / "wanem.conf").write_text(top.config(netns))
            self._start(exe, owned)
        except BaseException:
            self.down()
            raise
        return self

    @staticmethod
    def _sysctl(ns: str, values: dict[str, str]) -> None:
        script = (
            "import sys\nfor a in sys.argv[1:]:\n k, v = a.split('=', 1)\n"
            " try:\n  with open('/proc/sys/' + k.replace('.', '/'), 'w') as f: f.write(v)\n"
            " except FileNotFoundError:\n  if 'ipv6' not in k: sys.exit(k + ': no such setting')\n"
            " except OSError as e: sys.exit(f'{k}={v}: {e.strerror}')\n"
        )
        r = subprocess.run(
            [
                "ip",
                "netns",
                "exec",
                ns,
                sys.executable,
                "-I",
                "-S",
                "-c",
                script,
                *(f"{k}={v}" for k, v in values.items()),
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        if r.returncode:
            raise WanError(f"sysctl in {ns}: {r.stderr.strip()}")

    def _start(self, exe: Path, owned: bool) -> None:
        assert self._state is not None
        cmd = [str(exe), "-c", str(self.dir / "wanem.conf"), "-s", str(self._sock)]
        fds: tuple[int, ...] = ()
        r = -1
        if owned:
            r, self._watch = os.pipe()
            cmd += ["-w", str(r)]
            fds = (r,)
        if self.max_life:
            cmd += ["-T", str(self.max_life)]
        with open(self.dir / "wanem.log", "wb") as log:
            p = subprocess.Popen(
                cmd, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds, start_new_session=True
            )
        p.returncode = 0  # its end is awaited by pid (down may run in another process)
        if r >= 0:
            os.close(r)
        self._state.update(pid=p.pid, start=_start_time(p.pid) or "")
        self._save()
        end = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError):
                if self.command("ping") == "ok":
                    return
            if _start_time(p.pid) is None or time.monotonic() > end:
                log_text = (self.dir / "wanem.log").read_text(errors="replace").strip()
                raise WanError(f"the emulator did not start: {log_text or 'no message'}")
            time.sleep(0.01)

    def down(self) -> None:
        """Ends what runs inside the namespaces and the emulator, and removes all of it.  Never fails for
        things already gone."""
        if self._watch >= 0:
            os.close(self._watch)
            self._watch = -1
        try:
            st = self._state or json.loads((self.dir / "state.json").read_text())
        except (OSError, ValueError):
            st = {"made": [], "pid": 0, "start": ""}
        there = _netns_list()
        pids: dict[int, str] = {}
        for ns in st["made"]:
            if ns in there:
                for p in _ip("netns", "pids", ns, check=False).split():
                    if int(p) != os.getpid() and (t := _start_time(int(p))):
                        pids[int(p)] = t
        _end(pids)
        if st["pid"] and st["start"]:
            _end({st["pid"]: st["start"]})
            with contextlib.suppress(ChildProcessError):  # reap it where it is a child of ours
                os.waitpid(st["pid"], os.WNOHANG)
        for ns in st["made"]:
            if ns in there:
                _ip("netns", "del", ns, check=False)
        self._state = None
        for f in ("state.json", "state.json.tmp", "wanem.conf", "wanem.log", "control"):
            with contextlib.suppress(OSError):
                (self.dir / f).unlink()
        for d in (self.dir, self.dir.parent):
            with contextlib.suppress(OSError):
                d.rmdir()

    # -- state

    @property
    def _sock(self) -> Path:
        return self.dir / "control"

    def _make_dir(self) -> None:
        for d in (self.dir.parent, self.dir):
            d.mkdir(parents=True, exist_ok=True, mode=0o700)
            if d.is_symlink() or d.stat().st_uid != os.geteuid():
                raise WanError(f"{d} belongs to someone else")

    def _save(self) -> None:
        tmp = self.dir / "state.json.tmp"
        tmp.write_text(json.dumps(self._state))
        tmp.replace(self.dir / "state.json")

    def state(self) -> dict[str, Any]:
        if self._state is None:
            try:
                self._state = json.loads((self.dir / "state.json").read_text())
            except (OSError, ValueError):
                raise WanError(f"{self.name!r} is not up") from None
        return self._state

    def _alive(self) -> bool:
        try:
            st = self.state()
        except WanError:
            return False
        return bool(st["start"]) and _start_time(st["pid"]) == st["start"]

    @property
    def sites(self) -> list[str]:
        return list(self.state()["netns"])

    def addr(self, site: str) -> str:
        return str(self.state()["addr"][self._site(site)])

    def netns(self, site: str) -> str:
        return str(self.state()["netns"][self._site(site)])

    def _site(self, site: str) -> str:
        if site not in self.state()["netns"]:
            raise WanError(f"no site {site!r} (there are: {', '.join(self.sites)})")
        return site

    # -- control

    def command(self, line: str) -> str:
        """Sends one line to the emulator and returns its answer."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as s:
            s.settimeout(10)
            s.connect(str(self._sock))
            s.send(line.encode())
            answer = s.recv(1 << 20).decode()
        if answer.startswith("error "):
            raise WanError(answer[6:])
        return answer

    def _send(self, lines: Sequence[str]) -> None:
        self.state()
        for line in lines:
            try:
                self.command(line)
            except OSError as e:
                raise WanError(f"the emulator does not answer ({e.strerror or e})") from None

    def _pairs(self, a: str, b: str | None, both: bool) -> list[tuple[str, str]]:
        others = [self._site(b)] if b and b != "*" else [s for s in self.sites if s != a]
        self._site(a)
        return [p for o in others for p in ([(a, o), (o, a)] if both else [(a, o)])]

    def set(self, a: str, b: str | None = None, *, both: bool = True, **kw: float | None) -> None:
        """Changes links between a and b (None: all other sites), at once.

        Settings: delay, jitter (ms), rate (Mbit/s, 0 = unlimited), queue (ms), queue_pkts, loss (fraction),
        burst (packets).  Packets already on their way keep their delivery time."""
        names = {"delay": "delay_ms", "jitter": "jitter_ms", "rate": "rate_mbit", "queue": "queue_ms"}
        s = {names.get(k, k): v for k, v in kw.items() if v is not None}
        if not s:
            raise WanError("nothing to set")
        if bad := sorted(set(s) - set(LINK_KEYS)):
            raise WanError(f"unknown setting {', '.join(bad)}")
        self._send([f"link {x} {y} {_words(s, LINK_KEYS)}" for x, y in self._pairs(a, b, both)])

    def access(self, site: str, **kw: float | None) -> None:
        """Changes a site's shared access link: up, down (Mbit/s, 0 = unlimited), up_queue, down_queue (ms)."""
        names = {"up": "up_mbit", "down": "down_mbit", "up_queue": "up_queue_ms", "down_queue": "down_queue_ms"}
        s = {names.get(k, k): v for k, v in kw.items() if v is not None}
        if not s or set(s) - set(ACCESS_KEYS):
            raise WanError("access takes up, down, up_queue, down_queue")
        self._send([f"access {self._site(site)} {_words(s, ACCESS_KEYS)}"])

    def cut(self, a: str, b: str | None = None, *, both: bool = True) -> None:
        """Cuts the links between a and b (None: isolates a); what is in flight on them is dropped."""
        self._send([f"cut {x} {y}" for x, y in self._pairs(a, b, both)])

    def heal(self, a: str, b: str | None = None, *, both: bool = True) -> None:
        self._send([f"heal {x} {y}" for x, y in self._pairs(a, b, both)])

    def reset(self) -> None:
        """Zeroes the counters."""
        self._send(["reset"])

    def status(self) -> dict[str, Any]:
        self.state()
        try:
            st: dict[str, Any] = json.loads(self.command("status"))
        except OSError as e:
            raise WanError(f"the emulator does not answer ({e.strerror or e})") from None
        for s in st["sites"]:  # packets the device dropped because the emulator was too slow to read
            with contextlib.suppress(WanError, ValueError, KeyError, IndexError):
                j = json.loads(_ip("-n", self.netns(s["name"]), "-s", "-j", "link", "show", DEV))
                s["drop_device"] = j[0]["stats64"]["tx"]["dropped"]
        return st

    def links(self) -> list[dict[str, Any]]:
        """The counters of the links alone: cheap enough to be asked for every few milliseconds."""
        found: list[dict[str, Any]] = json.loads(self.command("status"))["links"]
        return found

    # -- running things at a site

    def argv(self, site: str, cmd: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.netns(site), *cmd]

    def popen(self, site: str, cmd: Sequence[str], **kw: Any) -> subprocess.Popen[Any]:
        """subprocess.Popen at a site (its pid is that of the command itself)."""
        return subprocess.Popen(self.argv(site, cmd), **kw)

    def run(self, site: str, cmd: Sequence[str], **kw: Any) -> subprocess.CompletedProcess[Any]:
        """subprocess.run at a site."""
        return subprocess.run(self.argv(site, cmd), **kw)

    @contextlib.contextmanager
    def inside(self, site: str) -> Iterator[None]:
        """The calling thread is at the site: sockets it makes there stay there afterwards."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            there = os.open(f"/var/run/netns/{self.netns(site)}", os.O_RDONLY)
            try:
                if libc.setns(there, CLONE_NEWNET):
                    raise WanError(f"cannot enter {site}: {os.strerror(ctypes.get_errno())}")
            finally:
                os.close(there)
            try:
                yield
            finally:
                if libc.setns(home, CLONE_NEWNET):
                    raise WanError("cannot return from the site's namespace")
        finally:
            os.close(home)


# ---------------------------------------------------------------- command line


def _print_status(st: dict[str, Any]) -> None:
    up = max(st["uptime_s"], 1e-9)
    cpu = st["cpu_user_s"] + st["cpu_sys_s"]
    print(
        f"emulator: pid {st['pid']}, up {st['uptime_s']:.1f} s, cpu {cpu:.2f} s ({100 * cpu / up:.1f} % of a core), "
        f"late avg {st['late_avg_us']:.0f} us, max {st['late_max_us']:.0f} us"
    )
    for s in st["sites"]:
        acc = "".join(f"  {d} {s[d + '_mbit']:g} Mbit/s" for d in ("up", "down") if s[d + "_mbit"])
        drops = {
            k: s.get(k, 0) for k in ("drop_up", "drop_down", "drop_device", "no_route", "write_errors") if s.get(k)
        }
        print(f"  {s['name']:<12} {s['addr']:<12}{acc}" + "".join(f"  {k} {v}" for k, v in drops.items()))
    rows = [("from", "to", "delay", "rate", "loss", "pkts in", "pkts out", "MB out", "q-drop", "lost", "cut", "")]
    for k in st["links"]:
        rows.append(
            (
                k["from"],
                k["to"],
                f"{k['delay_ms']:g}" + (f"+{k['jitter_ms']:g}" if k["jitter_ms"] else ""),
                f"{k['rate_mbit']:g}" if k["rate_mbit"] else "-",
                f"{k['loss']:g}",
                str(k["in_pkts"]),
                str(k["out_pkts"]),
                f"{k['out_bytes'] / 1e6:.1f}",
                str(k["drop_queue"]),
                str(k["drop_loss"]),
                str(k["drop_cut"]),
                "CUT" if k["cut"] else "",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    for r in rows:
        cells = (c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        print("  " + "  ".join(cells).rstrip())


def _parser() -> argparse.ArgumentParser:
    ap = argparse.ArgumentParser(prog="wan", description="An emulated WAN between network namespaces.")
    ap.add_argument("--name", default="wan", help="which WAN, when several run side by side (default: wan)")
    sub = ap.add_subparsers(dest="verb", required=True)
    sub.add_parser("check", help="say whether this machine can run the emulator")
    p = sub.add_parser("up", help="make the sites and start the emulator")
    p.add_argument("topology")
    p.add_argument("--max-life", type=float, default=0, metavar="S", help="the emulator ends itself after S seconds")
    p.add_argument("--replace", action="store_true", help="take down one that is up already")
    p = sub.add_parser("exec", help="run a command at a site")
    p.add_argument("site")
    p.add_argument("cmd", nargs=argparse.REMAINDER, metavar="-- CMD ...")
    p = sub.add_parser("set", help="change the links between two sites")
    p.add_argument("a")
    p.add_argument("b", help="a site, or '*' for all others")
    _add_numbers(p, SET_OPTIONS)
    p.add_argument("--one-way", action="store_true", help="only A to B")
    p = sub.add_parser("access", help="change a site's shared access link")
    p.add_argument("site")
    _add_numbers(p, ACCESS_OPTIONS)
    for verb, text in (("cut", "cut links"), ("heal", "heal cut links")):
        p = sub.add_parser(verb, help=text)
        p.add_argument("a")
        p.add_argument("b", nargs="?", help="a site; without it all others")
        p.add_argument("--one-way", action="store_true", help="only A to B")
    p = sub.add_parser("status", help="counters of every link")
    p.add_argument("--json", action="store_true")
    sub.add_parser("reset", help="zero the counters")
    sub.add_parser("down", help="remove everything")
    return ap


def _add_numbers(parser: argparse.ArgumentParser, options: dict[str, str]) -> None:
    for name, text in options.items():
        parser.add_argument("--" + name.replace("_", "-"), type=float, help=text)


def _obey(w: Wan, a: argparse.Namespace) -> None:
    match a.verb:
        case "up":
            w = Wan(a.topology, a.name, max_life=a.max_life, replace=a.replace).up()
            print("up: " + ", ".join(f"{s} {w.addr(s)}" for s in w.sites))
        case "exec":
            cmd = a.cmd[1:] if a.cmd[:1] == ["--"] else a.cmd
            if not cmd:
                raise WanError("exec needs a command")
            argv = w.argv(a.site, cmd)
            os.execvp(argv[0], argv)
        case "set":
            w.set(a.a, a.b, both=not a.one_way, **{name: getattr(a, name) for name in SET_OPTIONS})
        case "access":
            w.access(a.site, **{name: getattr(a, name) for name in ACCESS_OPTIONS})
        case "cut":
            w.cut(a.a, a.b, both=not a.one_way)
        case "heal":
            w.heal(a.a, a.b, both=not a.one_way)
        case "status":
            st = w.status()
            print(json.dumps(st, indent=1)) if a.json else _print_status(st)
        case "reset":
            w.reset()
        case "down":
            w.down()


def main(argv: Sequence[str] | None = None) -> int:
    a = _parser().parse_args(argv)
    try:
        if a.verb == "check" or os.geteuid() != 0:
            check_host()  # says so
        _obey(Wan(name=a.name), a)
    except WanError as e:
        print(f"wan: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

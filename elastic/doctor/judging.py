"""What the facts mean, and what to do: pure functions. `paths` judges what two doctors have found between them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from collectives.sockets import MOST_STRIPES
from collectives.tuning import FIRST
from fault.health import needed

from ..config import addresses, check_endpoint, endpoints, is_loopback
from ..errors import ConfigurationError
from .facts import (
    AVAILABLE,
    BACKLOG,
    CONTROL,
    IDLE,
    PROBING,
    RECEIVE,
    RECEIVE_SET,
    SEND,
    SEND_SET,
    Call,
    Interface,
    Machine,
    Side,
    last_number,
)

OK, NOTE, PROBLEM = "ok", "note", "problem"
SYSCTL, VARIABLE, LINKS = "sysctl", "environment", "links"

NEARLY = 0.95  # of the most: fewer connections that carry it will do
FASTER = 1.2  # times what the default carries: then another congestion control is worth naming
ASSUMED_RATE, ASSUMED_RTT = 125e6, 0.1  # bytes/s and seconds of a path that nobody has measured
LEAST_MTU, USUAL_MTU = 1280, 1500
SMALL_BACKLOG = 256
FEW_FILES, MANY_FILES = 512, 4096
LEAST_SHARED = 1 << 30
LISTEN = 29401
NEEDED = ("torch", "ray", "pyzmq", "numpy", "msgpack", "xxhash", "safetensors")


class Setting(NamedTuple):
    """kind: by what it is set. order: of several values for one name, the highest counts."""

    kind: str
    name: str
    value: str
    order: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line: what was looked at, how it is, in numbers, and, unless it is ok, what to do."""

    check: str
    level: str
    fact: str
    advice: str = ""
    settings: tuple[Setting, ...] = ()


def ok(check: str, fact: str) -> Finding:
    return Finding(check=check, level=OK, fact=one_line(fact))


def note(check: str, fact: str, advice: str, *settings: Setting) -> Finding:
    return Finding(check=check, level=NOTE, fact=one_line(fact), advice=one_line(advice), settings=settings)


def problem(check: str, fact: str, advice: str, *settings: Setting) -> Finding:
    return Finding(check=check, level=PROBLEM, fact=one_line(fact), advice=one_line(advice), settings=settings)


def recommended(findings: Iterable[Finding]) -> tuple[Setting, ...]:
    """One value for each name."""
    best: dict[tuple[str, str], Setting] = {}
    for each in (setting for finding in findings for setting in finding.settings):
        known = best.get(each[:2])
        if known is None or each.order >= known.order:
            best[each[:2]] = each
    return tuple(best.values())


def judge_machine(machine: Machine) -> list[Finding]:
    checks = (
        versions, variables, networks, slow_start, buffers, congestion, probing, backlog, open_files, shared_memory,
        clock, disk, witness,
    )  # fmt: skip
    found = [check(machine) for check in checks]
    return found if machine.gpus is None else [*found, gpus(machine.gpus)]


# --- this machine -----------------------------------------------------------------------------------------------------


def versions(machine: Machine) -> Finding:
    shown = [f"{name} {machine.packages[name]}" for name in ("torch", "ray", "pyzmq") if machine.packages.get(name)]
    own = machine.packages.get("elastic-diloco") or "from a folder"
    fact = ", ".join([f"elastic {own}", f"protocol {machine.protocol}", f"Python {machine.python}", *shown])
    missing = [name for name in NEEDED if not machine.packages.get(name)]
    if not machine.system.startswith("Linux"):
        return problem("versions", f"{fact}, {machine.system}", "peers need Linux: use a machine that runs it")
    if missing:
        return problem("versions", f"{fact}; missing: {', '.join(missing)}", "pip install elastic-diloco")
    return ok("versions", f"{fact}, {machine.system}")


def variables(machine: Machine) -> Finding:
    if machine.flaws:
        fact = "; ".join(each if name in each else f"{name}: {each}" for name, each in machine.flaws.items())
        return problem("environment", fact, "mend these variables: nothing of elastic starts with them")
    return ok("environment", f"set: {', '.join(machine.variables)}" if machine.variables else "no ELASTIC_* is set")


def networks(machine: Machine) -> Finding:
    usable = [each for each in machine.interfaces if each.up and not all(map(is_loopback, each.addresses))]
    if not usable:
        return problem("interfaces", "none is up but the loopback", "bring a network up: no other machine is reached")
    fact = ", ".join(map(_interface, usable[:8])) + (f" and {len(usable) - 8} more" if len(usable) > 8 else "")
    small = [each.name for each in usable if each.mtu < LEAST_MTU]
    if small:
        return note("interfaces", fact, f"{', '.join(small)}: an MTU below {LEAST_MTU} carries no IPv6; raise it")
    return ok("interfaces", fact)


def _interface(interface: Interface) -> str:
    return f"{interface.name} {' '.join(interface.addresses)} (MTU {interface.mtu})"


def slow_start(machine: Machine) -> Finding:
    value = machine.sysctl.get(IDLE)
    if value is None:
        return _unknown("slow start", IDLE)
    if value == "0":
        return ok("slow start", f"{IDLE} = 0")
    advice = "set it to 0: else each connection starts again from ten packets after a pause between rounds"
    return note("slow start", f"{IDLE} = {value}", advice, Setting(SYSCTL, IDLE, "0"))


def buffers(machine: Machine) -> Finding:
    """By rule of thumb; `paths.windows` judges with a path that was measured."""
    receive, send = (last_number(machine.sysctl.get(name, "")) for name in (RECEIVE, SEND))
    if not receive or not send:
        return _unknown("buffers", f"{RECEIVE} or {SEND}")
    window = min(receive, send) / 2
    carried = window / ASSUMED_RTT
    caps = ", ".join(f"{mebi(last_number(machine.sysctl.get(name, '')))}" for name in (RECEIVE_SET, SEND_SET))
    fact = (
        f"up to {mebi(receive)} received and {mebi(send)} sent: one connection carries at most {mbit(carried)} over "
        f"{ASSUMED_RTT * 1e3:.0f} ms (buffers of a set size: up to {caps})"
    )
    if carried * FIRST >= ASSUMED_RATE:
        return ok("buffers", fact)
    need = 2 * ASSUMED_RATE * ASSUMED_RTT / FIRST
    small = [name for name, size in ((RECEIVE, receive), (SEND, send)) if size < need]
    advice = f"allow more: {FIRST} connections would not fill {mbit(ASSUMED_RATE)}"
    return note("buffers", fact, advice, *(buffer_setting(name, need) for name in small))


def buffer_setting(name: str, need: float) -> Setting:
    """RECEIVE or SEND: that a connection may have so many bytes, and some more."""
    size = 1 << max(22, math.ceil(math.log2(max(1.0, need))))
    return Setting(SYSCTL, name, f"4096 {131072 if name == RECEIVE else 16384} {size}", size)


def congestion(machine: Machine) -> Finding:
    value = machine.sysctl.get(CONTROL)
    if value is None:
        return _unknown("congestion control", CONTROL)
    rest = [name for name in machine.usable if name != value]
    loaded = machine.sysctl.get(AVAILABLE, "").split()
    more = "" if "bbr" in (*loaded, value) else "; bbr is not there (modprobe tcp_bbr), try it where packets get lost"
    return ok("congestion control", f"{value}; per socket also {', '.join(rest) or 'nothing else'}{more}")


def probing(machine: Machine) -> Finding:
    value = machine.sysctl.get(PROBING)
    if value is None:
        return _unknown("MTU probing", PROBING)
    if value != "0":
        return ok("MTU probing", f"{PROBING} = {value}")
    advice = "set it to 1: else a path that silently drops large packets stalls, though small ones pass"
    return note("MTU probing", f"{PROBING} = 0", advice, Setting(SYSCTL, PROBING, "1"))


def backlog(machine: Machine) -> Finding:
    value = last_number(machine.sysctl.get(BACKLOG, ""))
    if not value:
        return _unknown("backlog", BACKLOG)
    if value >= SMALL_BACKLOG:
        return ok("backlog", f"{BACKLOG} = {value}")
    advice = f"set it to 4096: {value} connections at once, of all peers together, overflow it"
    return note("backlog", f"{BACKLOG} = {value}", advice, Setting(SYSCTL, BACKLOG, "4096"))


def open_files(machine: Machine) -> Finding:
    many = machine.open_files
    if many < 0 or many >= MANY_FILES:  # -1: unlimited
        return ok("open files", "no limit" if many < 0 else f"up to {many}")
    fact = f"up to {many}: enough for links to {max(0, many - 256) // MOST_STRIPES} peers at {MOST_STRIPES} stripes"
    make = problem if many < FEW_FILES else note
    return make("open files", fact, "ulimit -n 65536, before the peer starts (LimitNOFILE of a service)")


def shared_memory(machine: Machine) -> Finding:
    free = machine.shm_free
    if free is None:
        return note("shared memory", "/dev/shm is not there", "mount a tmpfs there: Ray and DataLoader workers use it")
    fact = f"{gibi(free)} free in /dev/shm"
    if free >= LEAST_SHARED:
        return ok("shared memory", fact)
    return note("shared memory", fact, "make it larger (docker run --shm-size=8g): Ray and DataLoader workers use it")


def clock(machine: Machine) -> Finding:
    if machine.clock is None:
        return note("clock", "the kernel does not tell", "see that a time service runs (chrony, systemd-timesyncd)")
    error = f"{machine.clock.error * 1e3:.3g} ms"
    if machine.clock.synchronised:
        return ok("clock", f"synchronised, right to {error} at the worst")
    advice = "start a time service (chrony, systemd-timesyncd): no decision needs it, but event logs are laid together"
    return note("clock", "not synchronised, says the kernel", advice)


def disk(machine: Machine) -> Finding:
    if machine.disk is None:
        return problem("disk", "the working folder cannot be looked at", "choose a folder that is there")
    found = machine.disk
    fact = f"{gibi(found.free)} of {gibi(found.size)} free in {found.folder}"
    if found.free >= needed(found.size):
        return ok("disk", fact)
    return problem("disk", fact, f"free {gibi(needed(found.size))}: below, the run names this peer as 'disk full'")


def witness(machine: Machine) -> Finding:
    missing = [name for name, there in (("pidfd", machine.pidfd), ("memfd", machine.memfd)) if not there]
    if not missing:
        return ok("witness", "pidfd and memfd are there")
    advice = "use Linux 5.3 or newer: without, a death or a hang is seen by silence alone, after 2.5 s"
    return note("witness", f"no {' and no '.join(missing)}", advice)


def gpus(names: Sequence[str]) -> Finding:
    if names:
        return ok("GPUs", ", ".join(names))
    return note("GPUs", "torch sees none", "see nvidia-smi, and that torch was installed for CUDA")


def listening(machine: Machine, where: str, local: str) -> Finding:
    """Whether what a peer of this environment listens on can be dialled by peers of other machines.

    where: the coordinator, as `config.addresses` takes it. local: this machine's address on the way there.
    """
    far = not all(
        is_loopback(check_endpoint("coordinator", each.removeprefix("tcp://"))[0]) for each in addresses(where)
    )
    listen, advertise = machine.listen, machine.advertise
    if far and listen is None and not advertise:
        advice = "say what others can dial (arguments of Peer win), or ELASTIC_LISTEN= to dial out only"
        return note("listening", "peers listen on 127.0.0.1 by default", advice, *listen_settings(local))
    try:
        endpoints(where, listen, advertise, {})
    except ConfigurationError as error:
        return problem("listening", str(error), "set both variables", *listen_settings(local))
    if listen == "":
        return ok("listening", "dials out only: the others must be dialled")
    return ok("listening", f"on {listen or '127.0.0.1:0'}{f', others dial {advertise}' if advertise else ''}")


def listen_settings(host: str) -> tuple[Setting, ...]:
    named = f"[{host}]" if ":" in host else host or "ADDRESS-OF-THIS-MACHINE"
    return (
        Setting(VARIABLE, "ELASTIC_LISTEN", f"{'[::]' if ':' in host else '0.0.0.0'}:{LISTEN}"),
        Setting(VARIABLE, "ELASTIC_ADVERTISE", f"{named}:{LISTEN}"),
    )


def _unknown(check: str, name: str) -> Finding:
    return note(check, f"{name} cannot be read", "look at it on the host: a container may hide it")


# --- the coordinator --------------------------------------------------------------------------------------------------


def judge_call(call: Call, protocol: int) -> list[Finding]:
    return [*_addresses(call), _answer(call, protocol)]


def _addresses(call: Call) -> Iterable[Finding]:
    spare = any(not each.error for each in call.addresses)
    for each in call.addresses:
        found = f" ({', '.join(each.found)})" if each.found and each.found[0] not in each.address else ""
        if not each.error:
            times = f"connected in {each.connected * 1e3:.1f} ms, name looked up in {each.looked_up * 1e3:.0f} ms"
            yield ok("coordinator", f"{each.address}{found}: {times}, from {each.local}")
            continue
        advice = "start it there, or open the port in firewalls and security groups on the way"
        yield (note if spare else problem)("coordinator", f"{each.address}{found}: {each.error}", advice)


def _answer(call: Call, protocol: int) -> Finding:
    if call.silent:
        return problem("run", f"{call.run}: {call.silent}", "see that elastic coordinator runs and is reached")
    if call.refused:
        return problem("run", f"{call.run}: {call.refused}", "take the token that this coordinator prints")
    fact = f"{call.run}: {call.members} peers, generation {call.generation}, answered in {call.answered * 1e3:.0f} ms"
    if call.protocol != protocol:
        both = f"the coordinator speaks protocol {call.protocol}, this installation {protocol}"
        return problem("run", f"{fact}; {both}", "install the same release of elastic on both")
    return ok("run", fact)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def controls(here: Side, there: Side) -> tuple[str, ...]:
    """What to measure: the default (""), and what both sides can have beside it."""
    same = here.control if here.control == there.control else ""
    both = [name for name in ("cubic", "bbr") if name in here.usable and name in there.usable and name != same]
    return ("", *both)


def settled(rates: Sequence[float]) -> bool:
    """Whether more connections are not worth trying: the last two doublings have brought next to nothing."""
    return len(rates) >= 3 and max(rates[-2:]) * NEARLY <= max(rates[:-2])


def fewest(rates: Mapping[int, float]) -> int:
    """The smallest number of connections that carries nearly the most."""
    most = max(rates.values())
    return min(number for number, rate in rates.items() if rate >= NEARLY * most)


# --- words ------------------------------------------------------------------------------------------------------------


def mbit(rate: float) -> str:
    """Of bytes/s."""
    bits = rate * 8 / 1e6
    if bits >= 1000:
        return f"{bits / 1000:.3g} Gbit/s"
    return f"{bits:.0f} Mbit/s" if bits >= 9.95 else f"{bits:.2g} Mbit/s"


def mebi(size: float) -> str:
    return f"{size / 2**20:.3g} MiB"


def gibi(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()

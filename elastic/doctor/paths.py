"""What two doctors have found between their machines, and what to do about it: pure functions."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable

from ..config import is_loopback
from .facts import PROBING, RECEIVE, SEND, Pair, Ping, Sample
from .judging import (
    FASTER,
    LEAST_MTU,
    LINKS,
    SYSCTL,
    USUAL_MTU,
    Finding,
    Setting,
    buffer_setting,
    fewest,
    listen_settings,
    mbit,
    mebi,
    note,
    ok,
    problem,
)

FAR_CLOCK = 0.1  # seconds
LONG, SHAKY, LITTLE = 0.5, 3.0, 0.005  # seconds of round trip; times the shortest, if it is by more than this
LOSSY = 0.02  # of what was sent, sent again
LOPSIDED = 4.0  # times the other direction


def judge_pair(pair: Pair) -> list[Finding]:
    found = [release(pair)]
    found += [distance(pair.pings), offset(pair.pings)] if pair.pings else []
    found += [dialled(pair)]
    found += [broken(pair)] if pair.broken else []
    if pair.samples:
        found += [mtu(pair), *(carried(pair, up) for up in (True, False)), stripes(pair)]
        found += [windows(pair)]
    found += [note("bandwidth", each, "firewalls limit connections, or have forgotten some: try it again")
              for each in pair.refused]  # fmt: skip
    return found


def release(pair: Pair) -> Finding:
    fact = f"{pair.address} has elastic {pair.there.version}, protocol {pair.there.protocol}"
    if pair.there.protocol == pair.here.protocol:
        return ok("other side", fact)
    return problem("other side", f"{fact}, and this one {pair.here.protocol}", "install the same release on both")


def distance(pings: tuple[Ping, ...]) -> Finding:
    trips = [each.round_trip for each in pings]
    shortest, median = min(trips), statistics.median(trips)
    fact = f"{shortest * 1e3:.3g} ms at the shortest, {median * 1e3:.3g} ms in the median of {len(trips)}"
    if median > LONG:
        return note(
            "round trip", fact, "rounds take long: use overlapped loops (StreamingDiLoCo), and more steps between"
        )
    if median > SHAKY * shortest and median - shortest > LITTLE:
        return note("round trip", fact, "something queues on the way: look for other traffic, or a wireless link")
    return ok("round trip", fact)


def offset(pings: tuple[Ping, ...]) -> Finding:
    """By the ping with the shortest way, whose error is the smallest."""
    best = min(pings, key=lambda each: each.round_trip)
    error = best.round_trip / 2
    fact = f"there it is {best.offset * 1e3:+.3g} ms (give or take {error * 1e3:.2g} ms)"
    if abs(best.offset) - error <= FAR_CLOCK:
        return ok("clocks", fact)
    return note(
        "clocks", fact, "start a time service on both (chrony, systemd-timesyncd): event logs are laid together"
    )


def broken(pair: Pair) -> Finding:
    lost = {
        "to": f"what is sent to {pair.address} does not arrive, though what comes from there does",
        "from": f"nothing arrives from {pair.address} any more: that direction is cut, or both are",
    }.get(pair.cut, "the other doctor ended, or the connection was cut off")
    return problem("path", f"{lost} ({pair.broken})", "look at firewalls and routes of that direction")


def mtu(pair: Pair) -> Finding:
    known = {
        up: min((each.mtu for each in pair.samples if each.up == up and each.mtu), default=0) for up in (True, False)
    }
    fact = f"{known[True] or '?'} bytes to there, {known[False] or '?'} from there"
    found = [size for size in known.values() if size]
    if not found:
        return note("path MTU", fact, "the kernel does not tell: measure again")
    if min(found) < LEAST_MTU:
        return note("path MTU", fact, "packets are small for a tunnel on the way: see its MTU, each packet costs time")
    if min(found) < USUAL_MTU:
        advice = "a tunnel is on the way: have the kernels probe, should its size ever not be told"
        return note("path MTU", fact, advice, Setting(SYSCTL, PROBING, "1"))
    return ok("path MTU", fact)


def rates(samples: Iterable[Sample], up: bool, control: str) -> dict[int, float]:
    return {each.connections: each.rate for each in samples if (each.up, each.control) == (up, control)}


def carried(pair: Pair, up: bool) -> Finding:
    """One direction, as links have it by default."""
    check = "bandwidth to there" if up else "bandwidth from there"
    by_count = rates(pair.samples, up, "")
    if not by_count:
        return note(check, "was not measured", "measure again")
    table = ", ".join(f"{number}: {mbit(rate)}" for number, rate in sorted(by_count.items()))
    mine = [each for each in pair.samples if each.up == up and not each.control]
    again = sum(each.resent for each in mine) / max(1, sum(each.sent for each in mine))
    fact = f"{mbit(max(by_count.values()))} (by connections {table}; {again:.2%} sent again)"
    other = max(rates(pair.samples, not up, "").values(), default=0.0)
    if not max(by_count.values()):
        advice = (
            "bulk does not pass, though small packets do: set MTU probing on both sides, look for a limit on the way"
        )
        return problem(check, fact, advice, Setting(SYSCTL, PROBING, "1"))
    if again > LOSSY:
        return note(check, fact, "packets get lost, or the queue on the way is short: prefer wire='int4', try bbr")
    if other > LOPSIDED * max(by_count.values()):
        return note(check, fact, f"the other direction carries {mbit(other)}: rounds take as long as this one needs")
    return ok(check, fact)


def best_control(pair: Pair) -> str:
    """What carries clearly more than the default in the worse direction, or "" for the default."""
    carries = {control: _carries(pair, control) for control in {each.control for each in pair.samples}}
    best = max(carries, key=lambda control: (carries[control], control == ""))
    return best if carries[best] > FASTER * carries.get("", 0.0) else ""


def _carries(pair: Pair, control: str) -> float:
    return min(max(rates(pair.samples, up, control).values(), default=0.0) for up in (True, False))


def wanted_stripes(pair: Pair, control: str) -> int:
    """As many as both directions want."""
    found = [rates(pair.samples, up, control) for up in (True, False)]
    return max((fewest(each) for each in found if each), default=1)


def stripes(pair: Pair) -> Finding:
    control = best_control(pair)
    number = wanted_stripes(pair, control)
    by = f" with {control}" if control else ""
    fact = f"{number} carr{'y' if number > 1 else 'ies'} nearly the most in both directions{by}"
    settings = [Setting(LINKS, "stripes", str(number))]
    if control:
        settings.append(Setting(LINKS, "congestion_control", repr(control)))
    if number == 1 and not control:
        return ok("stripes", f'{fact}; "auto" finds it by itself')
    advice = f'set it; "auto" finds it too, in some rounds. One connection carries {mbit(_single(pair))}'
    return note("stripes", fact, advice, *settings)


def _single(pair: Pair) -> float:
    return min(rates(pair.samples, up, "").get(1, 0.0) for up in (True, False))


def windows(pair: Pair) -> Finding:
    """Whether the buffers of one connection hold what its part of the path holds."""
    trip = min((each.round_trip for each in pair.pings), default=0.0)
    to, fro = (_need(pair, up, trip) for up in (True, False))
    held = (
        ("here", SEND, pair.here.send, to),
        ("there", RECEIVE, pair.there.receive, to),
        ("there", SEND, pair.there.send, fro),
        ("here", RECEIVE, pair.here.receive, fro),
    )
    least = min((size for _, _, size, _ in held if size), default=0)
    fact = f"a connection needs {mebi(max(to, fro))} for {trip * 1e3:.3g} ms; the smallest buffer has {mebi(least)}"
    small = [(where, buffer_setting(name, need)) for where, name, size, need in held if 0 < size < need]
    if not small:
        return ok("window", fact)
    advice = ", ".join(f"{setting.name} {where} up to {mebi(setting.order)}" for where, setting in small)
    return note("window", fact, f"allow {advice}", *(setting for where, setting in small if where == "here"))


def _need(pair: Pair, up: bool, trip: float) -> float:
    """Of each connection: twice what is under way, since the kernel counts its own bookkeeping in."""
    control = best_control(pair)
    carried_in_all = max(rates(pair.samples, up, control).values(), default=0.0)
    return 2 * carried_in_all * trip / wanted_stripes(pair, control)


def dialled(pair: Pair) -> Finding:
    behind = (
        "" if pair.seen == pair.local else f"behind a NAT: here it is {pair.local}, there it is seen as {pair.seen}; "
    )
    if pair.listening is None:
        return ok("to be dialled", f"{behind}not wanted: ELASTIC_LISTEN says to dial out only")
    if pair.listening:
        return problem("to be dialled", f"the port cannot be opened here: {pair.listening}", "choose another")
    reached = [each.address for each in pair.dialled if not each.evidence]
    failed = ", ".join(f"{each.address} ({each.evidence})" for each in pair.dialled if each.evidence)
    if not reached:
        advice = (
            "open the port (and forward it, if there is a NAT), then set ELASTIC_LISTEN and ELASTIC_ADVERTISE; or "
            "ELASTIC_LISTEN= to dial out only: the other machines must be dialled then"
        )
        make = problem if pair.promised else note
        return make("to be dialled", f"{behind}{pair.address} reaches none of {failed or 'its addresses'}", advice)
    fact = f"{behind}{pair.address} reaches {', '.join(reached)}{f'; not {failed}' if failed else ''}"
    far = [host for host in (each.rpartition(":")[0].strip("[]") for each in reached) if not is_loopback(host)]
    settings = listen_settings(far[0]) if far and not pair.promised else ()
    return dataclasses.replace(ok("to be dialled", fact), settings=settings)

"""Faults befall a run of real processes: are they named, is it the right culprit, and how long does it take?

Four peers train with DiLoCo at sites of the emulated WAN: those of wan3, one more in the US, and one in Europe where a
spare process waits (imports done, model made, no member). Compute is a timed wait. One fault after the other is
injected, each into a run in which all are well again; verdicts are what the coordinator's event log says, and times
are of one clock, from the injection to the log's line. Who is killed, or expelled, is replaced by the spare, at another
site.

    python -m benchmarks.faults --repeat 5 --json faults.json        # needs root and /dev/net/tun
    python -m benchmarks.faults --clean 1200                         # nothing but jitter: false verdicts are counted
    python -m benchmarks.faults --goodput --seconds 120 --repeat 3   # tokens per second under a kill every 30 s
    python -m benchmarks.faults --loopback --repeat 1                # without sites: what needs no network

Ends with 1 if a fault does not strike, a round is lost, or a sample does not count once. What is not reached is said.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from benchmarks import common
from benchmarks.common import MIB, BenchmarkError, Launch, Report, Worker, launch_here
from benchmarks.wan.wan import DEV, Wan, WanError
from elastic.events import EventReader
from fault.verdicts import CORRUPT, CRASH, CUT, FLAPPING, GRADIENT, HANG, LINK, SILENT, STALLED, STRAGGLER

NAMES = ("w0", "w1", "w2", "w3")
RATE, LOSS, JITTER_MS = 200.0, 0.0001, 5.0
RTT = 0.1  # seconds, of the longest way
EUROPE, AMERICA = ("site-a", "site-b", "site-e"), ("site-c", "site-d")
SLOWER = 3.0
PAST = 7  # rounds, and seconds, that a peer has been in before its pace, or a link's, is judged: five windows and some
LASTING = (CRASH, CORRUPT, FLAPPING)  # what happened once is told for a while: nothing is wrong any more
PATIENCE = 120.0
ENDS = ("peer.evicted", "peer.left", "peer.removed", "peer.ended")
CLEARED = 45.0  # seconds after which a verdict that still stands is a false one

Found = TypeVar("Found")
Key = tuple[str, tuple[str, ...]]


class Place(NamedTuple):
    """Where a process runs."""

    site: str
    host: str
    launch: Launch


@dataclass(frozen=True)
class Kind:
    """A class of faults. names: of verdicts, each of which is right. strike: the method of `Crew`. whom: "peer", "away"
    (a peer that is not beside the coordinator), "pair" of those, or "link" (one that carries contributions: of others,
    nobody times anything). past: rounds of health that it needs.
    seconds: how long a verdict is waited for. goal: of seconds, or of rounds, to reach.
    """

    title: str
    names: tuple[str, ...]
    strike: Callable[[Crew, Sequence[str]], AbstractContextManager[None]]
    whom: str = "peer"
    past: int = 2
    seconds: float = 15.0
    goal_seconds: float | None = None
    goal_rounds: int | None = None
    wan: bool = False


@dataclass
class Injection:
    """One fault. seconds, rounds: until it was named, None if it was not. others: verdicts that were not right,
    from the fault until all were well again. again: seconds until a commit moved the cursor of a shard of the lost.
    """

    kind: str
    culprits: tuple[str, ...]
    named: str = ""
    seconds: float | None = None
    rounds: int | None = None
    others: list[Key] = field(default_factory=list)
    again: float | None = None


class Watch:
    """The coordinator's event log, as far as it is written."""

    def __init__(self, path: Path) -> None:
        self._reader = EventReader(path)
        self.events: list[dict[str, Any]] = []

    def look(self) -> None:
        self.events.extend(self._reader.read())

    def until(self, true: Callable[[], Found], seconds: float = PATIENCE) -> Found:
        """What it came to by then, true or not."""
        deadline = time.monotonic() + seconds
        while True:
            self.look()
            found = true()
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.005)

    def since(self, at: float, *names: str) -> Iterator[dict[str, Any]]:
        return (each for each in self.events if each["event"] in names and each["monotonic"] > at)

    def commits(self, since: float = 0.0) -> list[dict[str, Any]]:
        return [each for each in self.since(since, "round.committed") if not each["skipped"]]

    def verdicts(self, since: float) -> list[tuple[float, Key]]:
        return [(each["monotonic"], key_of(each)) for each in self.since(since, "anomaly.confirmed")]

    @property
    def standing(self) -> set[Key]:
        """What is confirmed now."""
        now: set[Key] = set()
        for each in self.since(0.0, "anomaly.confirmed", "anomaly.cleared"):
            (now.add if each["event"] == "anomaly.confirmed" else now.discard)(key_of(each))
        return now

    def joined(self, name: str) -> float:
        """When its newest life was admitted; 0 if it has ended since."""
        ends = (each for each in self.since(0.0, "peer.joined", *ENDS) if each["peer"] == name)
        last = max(ends, key=lambda each: each["monotonic"], default=None)
        return float(last["monotonic"]) if last and last["event"] == "peer.joined" else 0.0

    def rounds_of(self, name: str, since: float) -> int:
        return sum(name in each["contributors"] for each in self.commits(max(since, self.joined(name))))

    def carries(self, receiver: str) -> bool:
        """Whether others send this peer more than a tenth of their numbers to be added up: by a direct plan, for of a
        ring or a tree nobody times single links."""
        plan = next((each for each in reversed(self.events) if each["event"] == "plan.changed"), None)
        if plan is None or isinstance(plan["shares"], str):
            return True
        return plan["pattern"] == "direct" and float(plan["shares"].get(receiver, 0.0)) > 0.1

    def rounds_of_plan(self) -> int:
        """How many have been committed since the plan changed."""
        last = max((each["monotonic"] for each in self.since(0.0, "plan.changed")), default=0.0)
        return len(self.commits(last))

    def lost_rounds(self) -> int:
        """Numbers that were given up, or are missing between others."""
        numbers = {each["round"] for each in self.since(0.0, "round.committed")}
        failed = {each["round"] for each in self.since(0.0, "round.failed")}
        return len(failed | (set(range(min(numbers), max(numbers))) - numbers)) if numbers else 0

    def again(self, name: str, since: float) -> float | None:
        """When a commit moved the cursor of a shard that this peer had begun, by whoever has it by then."""
        before = [
            each["cursors"][name] for each in self.commits() if each["monotonic"] <= since and name in each["cursors"]
        ]
        shards, joined = before[-1] if before else {}, self.joined(name)
        for each in self.commits(since):
            for other, cursors in each["cursors"].items():
                moved = any(cursors.get(shard, 0) > position for shard, position in shards.items())
                if moved and (other != name or each["monotonic"] > joined > since):
                    return float(each["monotonic"]) - since
        return None


def key_of(event: dict[str, Any]) -> Key:
    return str(event["kind"]), tuple(event["culprits"])


class Crew:
    """The coordinator at the first place, a peer at each of the next, and the spare at the last."""

    def __init__(self, places: Sequence[Place], wan: Wan | None, arguments: argparse.Namespace) -> None:
        self.wan, self.arguments = wan, arguments
        self._home, self._folder = places[0], tempfile.TemporaryDirectory()
        events = Path(arguments.events or Path(self._folder.name, "coordinator.jsonl"))
        self.watch = Watch(events)
        self._workers: list[Worker] = []
        self.coordinator = self._hire("coordinator", self._home)
        order = {"host": self._home.host, "events": str(events), "record": arguments.record}
        self._address = self.coordinator.ask(do="coordinate", **order)["address"]
        self.place = dict(zip(NAMES, places, strict=False))
        self.peers = {name: self._hire(name, place) for name, place in self.place.items()}
        self._spare_place = places[len(NAMES)]
        self._spare, self._prepared = self._hire("spare", self._spare_place), False

    def _hire(self, name: str, place: Place) -> Worker:
        worker = Worker(name, place.launch, DEV if self.wan else "lo", "benchmarks.victim")
        self._workers.append(worker)
        if name != "coordinator":
            worker.tell(do="prepare", mib=self.arguments.mib)
        return worker

    def start(self) -> str:
        """Returns the congestion control of their links."""
        for name in NAMES:
            self.peers[name].hear()
            self._train(name, len(NAMES))
        for name in NAMES:
            self.peers[name].hear()
        self.settle(2)
        return "/".join(sorted({cc for name in NAMES for cc in self.peers[name].ask(do="facts")["cc"]}))

    def _train(self, name: str, peers: int) -> None:
        order = {each: getattr(self.arguments, each) for each in ("cc", "sync_every", "step_ms", "jitter")}
        host = self.place[name].host
        self.peers[name].tell(do="train", name=name, host=host, coordinator=self._address, peers=peers, **order)

    def await_spare(self) -> None:
        """Until it is prepared; its start is a disturbance of all who share its cores."""
        if not self._prepared:
            self._spare.hear()
        self._prepared = True

    def replace(self, name: str) -> None:
        """The spare becomes this peer; the next one begins to wait where this one was."""
        self.await_spare()
        self.peers[name].kill()
        self.peers[name], self.place[name], place = self._spare, self._spare_place, self.place[name]
        self._train(name, 1)
        self._spare, self._spare_place, self._prepared = self._hire("spare", place), place, False
        self.peers[name].hear()

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._folder.cleanup()

    # --- how they are -------------------------------------------------------------------------------------------------

    def settle(self, rounds: int, past: int = 0, *, planned: bool = False) -> None:
        """Until all have been in so many rounds from now on, `past` in their lives, and nothing is said to be wrong.

        planned: and as many rounds under the plan of now, for as long as the detector needs to know a plan.
        """
        began = time.monotonic()

        def well() -> bool:
            self.mend()
            now, lives = time.monotonic(), [self.watch.joined(name) for name in NAMES]
            enough = all(self.watch.rounds_of(name, began) >= rounds for name in NAMES)
            known = all(self.watch.rounds_of(name, 0.0) >= past for name in NAMES) and now - max(lives) > past
            steady = not planned or (self.watch.rounds_of_plan() >= past and any(map(self.watch.carries, NAMES)))
            return enough and known and steady and (not self._wrong or now - began > CLEARED)

        if not self.watch.until(well):
            raise BenchmarkError(f"not all are well again after {PATIENCE:g} s: {sorted(self.watch.standing)}")

    @property
    def _wrong(self) -> set[Key]:
        return {key for key in self.watch.standing if key[0] not in LASTING}

    def mend(self) -> bool:
        """Who has been expelled, or has ended, is replaced; returns whether anybody was."""
        replaced = False
        for name in NAMES:
            if self.peers[name].process.poll() is not None or (self.watch.commits() and not self.watch.joined(name)):
                self.replace(name)
                replaced = True
        return replaced

    def whom(self, kind: Kind, turn: int) -> tuple[str, ...]:
        """The culprits of this turn."""
        away = [name for name in NAMES if self.place[name].site != self._home.site] if self.wan else list(NAMES)
        if kind.whom == "link":
            pairs = [pair for pair in permutations(NAMES, 2) if self.watch.carries(pair[1])]
            return pairs[turn * 5 % len(pairs)]
        if kind.whom == "pair":
            return tuple(sorted(away[(turn + i) % len(away)] for i in range(2)))
        names = away if kind.whom == "away" else NAMES
        return (names[turn % len(names)],)

    # --- faults: each lasts as long as its context, and none passes unnoticed that did not strike ---------------------

    @contextmanager
    def kill(self, culprits: Sequence[str]) -> Iterator[None]:
        process = self.peers[culprits[0]].process
        process.kill()
        yield
        fired(process.wait() == -signal.SIGKILL, "kill")

    @contextmanager
    def freeze(self, culprits: Sequence[str]) -> Iterator[None]:
        pid = self.peers[culprits[0]].process.pid
        os.kill(pid, signal.SIGSTOP)
        yield
        stat = Path(f"/proc/{pid}/stat").read_text()
        fired(stat.rpartition(")")[2].split()[0] in "TZ", "freeze")  # Z: expelled, and ended by whoever knew
        os.kill(pid, signal.SIGCONT)

    @contextmanager
    def cut(self, culprits: Sequence[str]) -> Iterator[None]:
        """Between two, or of one from all others."""
        assert self.wan is not None
        sites = [self.place[name].site for name in culprits]
        before = self._dropped()
        self.wan.cut(*sites)
        try:
            yield
            fired(self._dropped() > before, "cut")
        finally:
            self.wan.heal(*sites)

    def _dropped(self) -> int:
        assert self.wan is not None
        return sum(int(link["drop_cut"]) for link in self.wan.links())

    @contextmanager
    def slow_link(self, culprits: Sequence[str]) -> Iterator[None]:
        """At a rate at which what it has carried lately takes so many times as long."""
        assert self.wan is not None
        sender, receiver = (self.place[name].site for name in culprits)
        came, before = self.peers[culprits[1]].ask(do="came", sender=culprits[0]), self._carried(sender, receiver)
        fired(came["bytes"] > 0, "slow link that carries nothing")
        mbit = 8e-6 * came["bytes"] / (SLOWER * came["seconds"])
        common.progress(f"{came['bytes'] / MIB:.1f} MiB in {came['seconds']:.2f} s, from now on at {mbit:.1f} Mbit/s")
        self.wan.set(sender, receiver, both=False, rate=min(mbit, RATE / SLOWER))
        yield
        fired(self._carried(sender, receiver) > before, "slow link")
        self.wan.set(sender, receiver, both=False, rate=RATE)

    def _carried(self, sender: str, receiver: str) -> int:
        assert self.wan is not None
        return sum(
            int(each["out_bytes"]) for each in self.wan.links() if (each["from"], each["to"]) == (sender, receiver)
        )

    @contextmanager
    def armed(self, culprits: Sequence[str], **fault: Any) -> Iterator[None]:
        """What a process does to itself; on the way to the second, if there is one."""
        worker = self.peers[culprits[0]]
        if len(culprits) > 1:
            fault["peer"] = culprits[1]
        id = worker.ask(do="arm", fault=fault)["id"]
        yield
        fired(worker.ask(do="disarm", id=id)["fired"] > 0, fault["kind"])

    @contextmanager
    def parted(self, culprits: Sequence[str]) -> Iterator[None]:
        """As `cut` between two, where there are no sites."""
        with self.armed(culprits, kind="partition", seconds=PATIENCE):
            with self.armed(culprits[::-1], kind="partition", seconds=PATIENCE):
                yield


def fired(true: bool, what: str) -> None:
    if not true:
        raise BenchmarkError(f"a fault was injected and did not strike: {what}")


def own(**fault: Any) -> Callable[[Crew, Sequence[str]], AbstractContextManager[None]]:
    return lambda crew, culprits: crew.armed(culprits, **fault)


def cut(crew: Crew, culprits: Sequence[str]) -> AbstractContextManager[None]:
    return crew.cut(culprits) if crew.wan else crew.parted(culprits)


KINDS = (
    Kind("kill", (CRASH,), Crew.kill, goal_seconds=0.2 + 2 * RTT),
    Kind("freeze", (HANG, STALLED, SILENT), Crew.freeze, goal_seconds=3.0),
    Kind("cut pair", (CUT,), cut, "pair", goal_seconds=3.0),
    Kind("cut off", (SILENT,), Crew.cut, "away", goal_seconds=3.0, wan=True),
    Kind("slow peer", (STRAGGLER,), own(kind="slow", factor=SLOWER, seconds=600.0), "peer", PAST, 40.0, goal_rounds=5),
    Kind("slow link", (LINK,), Crew.slow_link, "link", PAST, 40.0, goal_rounds=5, wan=True),
    Kind("NaN gradient", (GRADIENT,), own(kind="nan", times=1000), "peer", PAST, 40.0),
    Kind("flipped gradient", (GRADIENT,), own(kind="flip", times=1000), "peer", PAST, 40.0),
    Kind("scaled gradient", (GRADIENT,), own(kind="scale", factor=10.0, times=1000), "peer", PAST, 40.0),
    Kind("corrupt frame", (CORRUPT,), own(kind="corrupt"), "link"),
)


def inject(crew: Crew, kind: Kind, turn: int) -> Injection:
    """One fault into a run that is well, until all are well again."""
    crew.settle(2, kind.past, planned=kind.whom == "link")
    culprits, watch = crew.whom(kind, turn), crew.watch
    found, right = Injection(kind.title, culprits), {(name, culprits) for name in kind.names}
    watch.until(lambda: not right & watch.standing)  # of the last time
    began = time.monotonic()
    with kind.strike(crew, culprits):
        named = watch.until(lambda: [each for each in watch.verdicts(began) if each[1] in right], kind.seconds)
    if named:
        (at, (found.named, _)), *_ = named
        found.seconds, found.rounds = at - began, sum(each["monotonic"] < at for each in watch.commits(began))
    crew.settle(2)
    found.others = [key for _, key in watch.verdicts(began) if key not in right and not told_again(key, culprits)]
    if kind.title in ("kill", "freeze", "cut off"):
        found.again = watch.until(lambda: watch.again(culprits[0], began), 5.0)
    return found


def told_again(key: Key, culprits: Sequence[str]) -> bool:
    """Three lives of one name that end without a word are what it says."""
    return key == (FLAPPING, tuple(culprits))


# --- the three questions --------------------------------------------------------------------------------------------

COLUMNS = (
    *("fault", "injected", "named as, of the right culprit", "other verdicts", "s to verdict: median (worst)"),
    *("rounds to verdict", "s until its shard trains again", "to reach"),
)


def confused(crew: Crew, report: Report, arguments: argparse.Namespace) -> list[str]:
    """Injects all; fills the report; returns what failed."""
    kinds = [each for each in KINDS if (crew.wan or not each.wan) and arguments.wants(each.title)]
    found: dict[str, list[Injection]] = {kind.title: [] for kind in kinds}
    for turn in range(arguments.repeat):
        for index, kind in enumerate(kinds):
            one = inject(crew, kind, turn + index)
            found[kind.title].append(one)
            common.progress(f"{kind.title} {'-'.join(one.culprits)}: {one.named or 'not named'} {told(one)}")
    for kind in kinds:
        report.add(cells(kind, found[kind.title]), injections=[asdict(each) for each in found[kind.title]])
        report.notes += missed(kind, found[kind.title])
    others = Counter((one.kind, *key) for each in found.values() for one in each for key in one.others)
    report.notes += [f"beside {kind}: {name} of {'-'.join(who)}, {n} times" for (kind, name, who), n in others.items()]
    return ended(crew, report)


def missed(kind: Kind, injections: Sequence[Injection]) -> list[str]:
    """What was to be reached, and was not."""
    named = [each for each in injections if each.seconds is not None]
    late = [each for each in named if kind.goal_seconds and each.seconds and each.seconds > kind.goal_seconds]
    late += [each for each in named if kind.goal_rounds and each.rounds and each.rounds > kind.goal_rounds]
    lines = [f"{kind.title}: {len(named)} of {len(injections)} named; at least 95 %, missed"]
    lines = lines if len(named) < 0.95 * len(injections) else []
    return lines + [f"{kind.title}: {len(late)} of {len(injections)} later than to be reached"] * bool(late)


def told(one: Injection) -> str:
    parts = [f"after {one.seconds:.2f} s, {one.rounds} rounds"] if one.seconds is not None else []
    parts += [f"shard again after {one.again:.2f} s"] if one.again else []
    return ", ".join([*parts, *(f"also {name} of {'-'.join(who)}" for name, who in one.others)])


def cells(kind: Kind, injections: Sequence[Injection]) -> tuple[str, ...]:
    goal = f"< {kind.goal_seconds:g} s" if kind.goal_seconds else ""
    goal = f"<= {kind.goal_rounds} rounds" if kind.goal_rounds else goal
    return (
        kind.title,
        str(len(injections)),
        tally(each.named or "nothing" for each in injections),
        tally(name for each in injections for name, _ in each.others),
        worst([each.seconds for each in injections if each.seconds is not None], 2),
        worst([each.rounds for each in injections if each.rounds is not None], 0),
        worst([each.again for each in injections if each.again is not None], 1),
        goal,
    )


def tally(names: Iterable[str]) -> str:
    """A row of the confusion matrix: each verdict that there was, and how often."""
    return ", ".join(f"{name} {n}" for name, n in Counter(names).most_common()) or "-"


def worst(values: Sequence[float], digits: int) -> str:
    """Median (largest)."""
    return f"{statistics.median(values):.{digits}f} ({max(values):.{digits}f})" if values else "-"


def ended(crew: Crew, report: Report) -> list[str]:
    """What holds of the run as a whole."""
    audit, lost = crew.coordinator.ask(do="audit"), crew.watch.lost_rounds()
    committed = len(crew.watch.commits())
    report.notes.append(
        f"{committed} rounds committed, {lost} lost; of {audit['committed']} samples {audit['twice']} counted twice, "
        f"{audit['missing']} passed over"
    )
    report.samples.append({"cells": dict.fromkeys(report.columns, ""), "rounds": committed, "lost": lost, **audit})
    return [f"{lost} rounds lost"] * bool(lost) + ["samples miscounted"] * bool(audit["twice"] + audit["missing"])


def clean(crew: Crew, report: Report, arguments: argparse.Namespace) -> list[str]:
    """Nothing is injected; every verdict is false."""
    crew.await_spare()
    crew.settle(2)
    began = time.monotonic()
    crew.watch.until(lambda: False, arguments.clean)
    false = [key for _, key in crew.watch.verdicts(0.0)]
    rounds, seconds = len(crew.watch.commits(began)), time.monotonic() - began
    plans = len(list(crew.watch.since(began, "plan.changed")))
    report.add(
        (f"{seconds:.0f}", str(rounds), str(plans), str(len(false)), told_of(false)), verdicts=false, seconds=seconds
    )
    return ended(crew, report)


def told_of(keys: Iterable[Key]) -> str:
    return ", ".join(f"{n} x {kind} of {'-'.join(who)}" for (kind, who), n in Counter(keys).items()) or "-"


def goodput(crew: Crew, report: Report, arguments: argparse.Namespace) -> list[str]:
    """By turns undisturbed, and with a kill every so many seconds."""
    rates: dict[str, list[float]] = {"undisturbed": [], "kills": []}
    kills = 0
    for _ in range(arguments.repeat):
        for side, found in rates.items():
            crew.settle(2)
            began, before = time.monotonic(), kills
            while time.monotonic() - began < arguments.seconds:
                due = began + (kills - before + 0.5) * arguments.every
                if side == "kills" and time.monotonic() > due:
                    kills += 1
                    crew.peers[NAMES[kills % len(NAMES)]].process.kill()
                crew.watch.until(crew.mend, 0.02)
            found.append(rate(crew.watch.commits(began)))
            common.progress(f"{side}: {found[-1]:.0f} tokens/s, {kills - before} kills")
    share = statistics.median(rates["kills"]) / statistics.median(rates["undisturbed"])
    for side, found in rates.items():
        report.add((side, common.spread(found, 1, 0), f"{share:.3f}" if side == "kills" else "1"), tokens=found)
    verdict = "reached" if share >= 0.9 else "missed"
    report.notes.append(f"{kills} kills, one every {arguments.every:g} s; to reach: 0.90 of the undisturbed, {verdict}")
    return ended(crew, report)


def rate(commits: Sequence[dict[str, Any]]) -> float:
    """Tokens per second from the first commit to the last."""
    if len(commits) < 2:
        raise BenchmarkError("fewer than two rounds were committed: take more seconds")
    seconds = commits[-1]["monotonic"] - commits[0]["monotonic"]
    return float(sum(sum(each["tokens"].values()) for each in commits[1:]) / seconds)


# --- the run --------------------------------------------------------------------------------------------------------


def topology() -> dict[str, Any]:
    far = [(a, b) for a in EUROPE for b in AMERICA]
    near = [(a, b) for side in (EUROPE, AMERICA) for a, b in permutations(side, 2) if a < b]
    rtt = [({"between": [*pair], "rtt_ms": 1e3 * RTT}) for pair in far]
    rtt += [({"between": [*pair], "rtt_ms": 20.0}) for pair in near]
    sites: dict[str, Any] = {site: {} for site in sorted((*EUROPE, *AMERICA))}
    default = {"rate_mbit": RATE, "loss": LOSS, "queue_ms": 50}
    return {"name": "faults", "sites": sites, "default": default, "links": rtt}


def launch_at(wan: Wan, site: str, command: list[str], options: dict[str, Any]) -> Any:
    return wan.popen(site, command, **options)


@contextmanager
def emulated() -> Iterator[tuple[Wan, list[Place]]]:
    try:
        with Wan(topology(), f"flt{os.getpid()}", max_life=7200) as wan:
            yield wan, [Place(site, wan.addr(site), partial(launch_at, wan, site)) for site in wan.sites]
    except WanError as error:
        raise BenchmarkError(f"{error} (--loopback does without)") from None


def arguments_of(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__, repeat=None)
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="injections of each kind, or pairs (5)")
    parser.add_argument("--kinds", help="of faults, by their titles (default: all)")
    parser.add_argument("--loopback", action="store_true", help="no emulated WAN: no cuts and no slow links")
    parser.add_argument("--clean", type=float, default=0.0, metavar="SECONDS", help="inject nothing; with jitter")
    parser.add_argument("--record", default="", metavar="FILE", help="write all telemetry there, for the detector")
    parser.add_argument(
        "--events", default="", metavar="FILE", help="where the coordinator's event log goes, to be kept"
    )
    parser.add_argument("--goodput", action="store_true", help="tokens per second with and without kills")
    parser.add_argument("--seconds", type=float, default=120.0, help="--goodput: of each run (default 120)")
    parser.add_argument("--every", type=float, default=30.0, help="--goodput: seconds between kills (default 30)")
    parser.add_argument("--size", dest="mib", type=float, default=8.0, help="MiB of parameters (default 8)")
    parser.add_argument("--step-ms", type=float, default=100.0, help="of a timed wait (default 100)")
    parser.add_argument("--sync-every", type=int, default=16, help="H (default 16)")
    parser.add_argument("--jitter", type=float, default=0.1, help="log-deviation of a step's time (default .1)")
    parser.add_argument("--cc", default="cubic", help="congestion control (default cubic)")
    arguments = parser.parse_args(words)
    chosen = arguments.kinds.split(",") if arguments.kinds else []
    arguments.wants = lambda title: not chosen or title in chosen
    return arguments


def question(arguments: argparse.Namespace) -> tuple[str, Sequence[str], Callable[..., list[str]]]:
    """Its title, the columns of its answer, and what finds it."""
    if arguments.goodput:
        return "Goodput under kills", ("run", "tokens/s: median (min-max)", "of undisturbed"), goodput
    if arguments.clean:
        return "A clean run", ("s", "rounds", "changes of plan", "false verdicts", "which"), clean
    return "Faults, named", COLUMNS, confused


def main() -> None:
    arguments = arguments_of()
    with common.one_line_errors():
        sys.exit(1 if run(arguments) else 0)


def run(arguments: argparse.Namespace) -> list[str]:
    title, columns, answer = question(arguments)
    where = "loopback" if arguments.loopback else "emulated WAN"
    report = Report("faults", f"{title}, {len(NAMES)} peers, {where}", columns)
    report.machine["load before"] = f"{os.getloadavg()[0]:.1f}"
    with ExitStack() as stack:
        wan, places = None, [Place("here", "127.0.0.1", launch_here)] * (len(NAMES) + 1)
        if not arguments.loopback:
            wan, places = stack.enter_context(emulated())
            for site in wan.sites if arguments.clean else ():
                wan.set(site, jitter=JITTER_MS)
        crew = Crew(places, wan, arguments)
        stack.callback(crew.close)
        report.machine["cc"] = crew.start()
        failed = answer(crew, report, arguments)
        if wan:
            report.notes.append(
                f"the emulator handed packets over {wan.status()['late_avg_us']:.0f} us late on average"
            )
    report.machine["load after"] = f"{os.getloadavg()[0]:.1f}"
    report.notes.insert(0, setting(arguments))
    report.notes += [f"FAILED: {each}" for each in failed]
    common.publish(report, arguments)
    return failed


def setting(arguments: argparse.Namespace) -> str:
    links = "" if arguments.loopback else f"; {RATE:g} Mbit/s, RTT 20 ms within a continent, {1e3 * RTT:g} ms between"
    jitter = f", {JITTER_MS:g} ms of jitter" if arguments.clean and links else ""
    return (
        f"compute is a timed wait of {arguments.step_ms:g} ms a step (log-deviation {arguments.jitter:g}), "
        f"H = {arguments.sync_every}, {arguments.mib:g} MiB of f32{links}{jitter}; default timeouts; one spare"
    )


if __name__ == "__main__":
    main()

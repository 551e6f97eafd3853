"""What the coordinator sees of faults: telemetry and incidents go into the detector, verdicts come out as events.

Pure, as all parts of the membership. It observes and reports; nothing is isolated here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from collectives.records import LinkFailure, Underway
from fault.detector import Detector
from fault.health import Clocks, Disks
from fault.incidents import Incidents
from fault.records import Health
from fault.verdicts import CLOCK, CRASH, CUT, DISK, DRIFTED, HANG, SILENT, STALLED, Verdict

from .config import Timeouts
from .messages import Heartbeat, VerdictReport, Witnessed
from .roster import Roster

_MOST_ATTEMPTS = 16  # of one peer that are looked at


class Watching:
    """verdicts: what is confirmed now."""

    def __init__(self, roster: Roster, timeouts: Timeouts | None = None) -> None:
        self._roster, self._timeouts = roster, timeouts or Timeouts()
        self._detector = Detector(hang_seconds=self._timeouts.hang)
        self._incidents = Incidents()
        self._disks, self._clocks = Disks(), Clocks()
        self._silent: dict[str, float] = {}
        self._witnessed: dict[str, tuple[Witnessed, float]] = {}
        self._measured: tuple[Verdict, ...] = ()
        self._repaired: dict[int, int] = {}
        self.verdicts: tuple[Verdict, ...] = ()

    def heard(self, name: str, message: Heartbeat, now: float) -> None:
        for crossing in message.crossings:
            if crossing.peer in self._roster.members and crossing.peer != name:
                self._detector.crossed(name, crossing, now)
        if message.step_seconds > 0:
            self._detector.stepped(name, message.step_seconds, now)
        for gave in message.gave:
            if gave.tag in self._roster.members[name].entered:
                self._detector.gave(name, gave, now)
        underway = tuple(self._among_members(each) for each in message.underway[:_MOST_ATTEMPTS])
        self._detector.is_at(name, message.status.trainer, underway, now)
        self._note_health(name, message.status.health, now)

    def _among_members(self, underway: Underway) -> Underway:
        return replace(underway, awaited=tuple(each for each in underway.awaited if each.peer in self._roster.members))

    def _note_health(self, name: str, health: Health, now: float) -> None:
        if moved := self._clocks.moved(name, health, now):
            self._incidents.happened(CLOCK, (name,), now, seconds=moved)
        if self._disks.full(name, health, now):
            room = {"free_bytes": float(health.disk_free), "disk_bytes": float(health.disk_bytes)}
            self._incidents.holds(DISK, (name,), now, **room, refused=float(health.disk_refused))
        else:
            self._incidents.over(DISK, (name,))

    # --- incidents ----------------------------------------------------------------------------------------------------

    def crashed(self, name: str, now: float) -> None:
        """It is proven that the process is gone."""
        self._incidents.happened(CRASH, (name,), now)
        self._say(now)

    def ended(self, name: str, lived: float, now: float) -> None:
        """A life of this name is over after so many seconds, and it has not said good-bye."""
        self._heard_again(name)
        self._incidents.ended(name, now, lived)
        self._say(now)

    def silent(self, name: str, seconds: float, now: float) -> None:
        """Nothing has been heard of it for so long."""
        self._silent[name] = now - seconds
        self._tell_silence(name, now)
        self._say(now)

    def back(self, name: str, now: float) -> None:
        self._heard_again(name)
        self._say(now)

    def witnessed(self, message: Witnessed, now: float) -> None:
        """Its witness sees this member stand still. As long as it is heard of, that says nothing."""
        self._witnessed[message.name] = message, now
        if message.name in self._silent:
            self._tell_silence(message.name, now)
            self._say(now)

    def _tell_silence(self, name: str, now: float) -> None:
        """A silent peer stands still, if its witness says so; if there is none that speaks, nobody knows."""
        message, at = self._witnessed.get(name, (None, now))
        kind, sure, evidence = SILENT, 0.5, dict[str, float]()
        if message is not None and now - at <= self._timeouts.chunk:
            kind = STALLED if message.exchanging else HANG
            stopped = message.state in ("T", "t")
            sure = 1.0 if stopped else 0.9
            evidence = {"stopped": float(stopped), "beat_seconds": message.beat_seconds}
            evidence |= {"step_seconds": message.step_seconds, "cpu_seconds": message.cpu_seconds}
        for other in {SILENT, HANG, STALLED} - {kind}:
            self._incidents.over(other, (name,))
        self._incidents.holds(kind, (name,), self._silent[name], sure=sure, **evidence)

    def _heard_again(self, name: str) -> None:
        self._silent.pop(name, None)
        self._witnessed.pop(name, None)
        for kind in (SILENT, HANG, STALLED):
            self._incidents.over(kind, (name,))

    def failed(self, name: str, failures: Iterable[LinkFailure], now: float) -> None:
        """Links that have failed, as this peer saw it."""
        for failure in failures:
            if failure.evidence == "corrupt" and self._roster.is_life(failure.peer, failure.incarnation):
                self._incidents.unreadable(failure.peer, name, now)
        self._say(now)

    def _look_at(self, cuts: Iterable[frozenset[str]], now: float) -> None:
        """What others find out, and do not tell."""
        pairs = {(first, second) for first, second in map(sorted, cuts)}
        for pair in self._incidents.holding(CUT) - pairs:
            self._incidents.over(CUT, pair)
        for pair in pairs - self._incidents.holding(CUT):
            self._incidents.holds(CUT, pair, now)
        repaired = {state.member.incarnation: state.repaired for state in self._roster.members.values()}
        for name, state in self._roster.members.items():
            if state.repaired > self._repaired.get(state.member.incarnation, 0):
                self._incidents.happened(DRIFTED, (name,), now)
        self._repaired = repaired

    # --- out ----------------------------------------------------------------------------------------------------------

    def tick(self, cuts: Iterable[frozenset[str]], now: float) -> None:
        """Time passes. cuts: pairs of members that cannot reach one another."""
        self._look_at(cuts, now)
        for name in self._silent:
            self._tell_silence(name, now)
        self._measured = self._detector.look(now, self._silent)
        self._say(now)

    @property
    def judging(self) -> bool:
        """Whether more is to be seen of links under the plans that they are used by now."""
        return self._detector.judging

    def _say(self, now: float) -> None:
        """What is new, and what is over."""
        before = {verdict.key: verdict for verdict in self.verdicts}
        after = {verdict.key: verdict for verdict in (*self._measured, *self._incidents.verdicts(now))}
        self.verdicts = tuple(after.values())
        for key, verdict in after.items():
            if key not in before:
                self._roster.emit("anomaly.confirmed", **told(verdict, now))
        for key, verdict in before.items():
            if key not in after:
                self._roster.emit("anomaly.cleared", **told(verdict, now))

    def forget(self, name: str) -> None:
        """It is no member any more; a later life of its name is measured anew."""
        self._detector.forget(name)
        self._disks.forget(name)
        self._clocks.forget(name)
        self._incidents.over(DISK, (name,))
        self._heard_again(name)

    def dealt_with(self, name: str) -> None:
        """It has been removed for what it did."""
        self._incidents.forget(name)

    def reports(self, now: float) -> tuple[VerdictReport, ...]:
        return tuple(VerdictReport(**told(verdict, now)) for verdict in self.verdicts)


def told(verdict: Verdict, now: float) -> dict[str, Any]:
    """As an event says it."""
    return {
        "kind": verdict.kind,
        "culprits": verdict.culprits,
        "lasting_seconds": round(now - verdict.since, 3),
        "confidence": round(verdict.confidence, 3),
        "evidence": {name: float(f"{value:.4g}") for name, value in verdict.evidence.items()},
    }


def why(verdict: Verdict) -> str:
    """In one line, for people."""
    return f"{verdict.kind} ({', '.join(f'{name} {value:.3g}' for name, value in verdict.evidence.items())})"

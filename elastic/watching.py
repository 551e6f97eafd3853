"""What the coordinator sees of faults: telemetry and incidents go into the detector, verdicts come out as events.

Pure, as all parts of the membership. It observes and reports; nothing is isolated here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from collectives.records import LinkFailure
from fault.detector import Detector
from fault.incidents import Incidents
from fault.verdicts import CRASH, CUT, DRIFTED, SILENT, Verdict

from .messages import Heartbeat, VerdictReport
from .roster import Roster


class Watching:
    """verdicts: what is confirmed now."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._detector = Detector()
        self._incidents = Incidents()
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

    # --- incidents ----------------------------------------------------------------------------------------------------

    def crashed(self, name: str, now: float) -> None:
        """It is proven that the process is gone."""
        self._incidents.happened(CRASH, (name,), now)
        self._say(now)

    def ended(self, name: str, lived: float, now: float) -> None:
        """A life of this name is over after so many seconds, and it has not said good-bye."""
        self._incidents.over(SILENT, (name,))
        self._incidents.ended(name, now, lived)
        self._say(now)

    def silent(self, name: str, seconds: float, now: float) -> None:
        """Nothing has been heard of it for so long."""
        self._incidents.holds(SILENT, (name,), now - seconds, sure=0.5)
        self._say(now)

    def back(self, name: str, now: float) -> None:
        self._incidents.over(SILENT, (name,))
        self._say(now)

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
        self._measured = self._detector.look(now)
        self._say(now)

    def _say(self, now: float) -> None:
        """What is new, and what is over."""
        before = {verdict.key: verdict for verdict in self.verdicts}
        self.verdicts = (*self._measured, *self._incidents.verdicts(now))
        after = {verdict.key: verdict for verdict in self.verdicts}
        for key, verdict in after.items():
            if key not in before:
                self._roster.emit("anomaly.confirmed", **told(verdict, now))
        for key, verdict in before.items():
            if key not in after:
                self._roster.emit("anomaly.cleared", **told(verdict, now))

    def forget(self, name: str) -> None:
        """It is no member any more; a later life of its name is measured anew."""
        self._detector.forget(name)

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

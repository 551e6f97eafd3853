"""What the coordinator sees of faults: telemetry goes into the detector, verdicts come out as events.

Pure, as all parts of the membership. It observes and reports; nothing is isolated here.
"""

from __future__ import annotations

from typing import Any

from fault.detector import Detector
from fault.verdicts import Verdict

from .messages import Heartbeat, VerdictReport
from .roster import Roster


class Watching:
    """verdicts: what is confirmed now."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._detector = Detector()
        self.verdicts: tuple[Verdict, ...] = ()

    def heard(self, name: str, message: Heartbeat, now: float) -> None:
        for crossing in message.crossings:
            if crossing.peer in self._roster.members and crossing.peer != name:
                self._detector.crossed(name, crossing, now)
        if message.step_seconds > 0:
            self._detector.stepped(name, message.step_seconds, now)
        for gave in message.gave:
            self._detector.gave(name, gave, now)

    def tick(self, now: float) -> None:
        """Says what is new, and what is over."""
        before = {verdict.key: verdict for verdict in self.verdicts}
        self.verdicts = self._detector.look(now)
        after = {verdict.key: verdict for verdict in self.verdicts}
        for key, verdict in after.items():
            if key not in before:
                self._roster.emit("anomaly.confirmed", **_told(verdict, now))
        for key, verdict in before.items():
            if key not in after:
                self._roster.emit("anomaly.cleared", **_told(verdict, now))

    def forget(self, name: str) -> None:
        """It is no member any more; a later life of its name is measured anew."""
        self._detector.forget(name)

    def reports(self, now: float) -> tuple[VerdictReport, ...]:
        return tuple(VerdictReport(**_told(verdict, now)) for verdict in self.verdicts)


def _told(verdict: Verdict, now: float) -> dict[str, Any]:
    return {
        "kind": verdict.kind,
        "culprits": verdict.culprits,
        "lasting_seconds": round(now - verdict.since, 3),
        "confidence": round(verdict.confidence, 3),
        "evidence": {name: float(f"{value:.4g}") for name, value in verdict.evidence.items()},
    }

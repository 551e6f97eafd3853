"""What is known without measuring: processes that have died, silence, cut paths, corrupt frames, drifted state.

Each was observed by somebody, once, or holds until it is said to be over. What happens to one peer again and again is
said of the peer: too many lives that ended without a word, frames that several others could not read.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from .verdicts import CORRUPT, DRIFTED, FLAPPING, Verdict

Key = tuple[str, tuple[str, ...]]


@dataclass(slots=True)
class _Incident:
    since: float
    last: float
    confidence: float
    evidence: dict[str, float]
    holds: bool = False


@dataclass(slots=True)
class Incidents:
    """lasting: seconds for which something that happened once is told. within, flaps: so many lives of one name that
    end without a word within so many seconds are flapping, if none of them has lasted `brief` seconds: machines that
    are taken away now and then are no fault. accusers: so many peers that could not read what one sent
    make it that one's fault, and not that of the links.
    """

    lasting: float = 60.0
    within: float = 600.0
    flaps: int = 3
    brief: float = 60.0
    accusers: int = 2
    _known: dict[Key, _Incident] = field(default_factory=dict)
    _ends: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))

    def happened(
        self, kind: str, culprits: tuple[str, ...], at: float, *, sure: float = 1.0, **evidence: float
    ) -> None:
        """Once, now. `times` in the evidence counts."""
        known = self._known.get((kind, culprits))
        times = known.evidence.get("times", 0.0) + 1 if known else 1.0
        since = known.since if known else at
        self._known[kind, culprits] = _Incident(since, at, 1.0, {**evidence, "times": times})

    def holds(self, kind: str, culprits: tuple[str, ...], at: float, *, sure: float = 1.0, **evidence: float) -> None:
        """From now on, until it is `over`."""
        since = known.since if (known := self._known.get((kind, culprits))) else at
        self._known[kind, culprits] = _Incident(since, at, sure, evidence, holds=True)

    def over(self, kind: str, culprits: tuple[str, ...]) -> None:
        self._known.pop((kind, culprits), None)

    def holding(self, kind: str) -> set[tuple[str, ...]]:
        """Of what this now holds."""
        return {culprits for (known, culprits), each in self._known.items() if known == kind and each.holds}

    def unreadable(self, sender: str, receiver: str, at: float) -> None:
        """A frame that came from one to the other was not what its checksum says."""
        self.happened(CORRUPT, (sender, receiver), at)
        others = {link[1] for kind, link in self._known if kind == CORRUPT and link[0] == sender and len(link) == 2}
        if len(others) >= self.accusers:
            self.happened(CORRUPT, (sender,), at, accusers=float(len(others)))

    def ended(self, name: str, at: float, lived: float = 0.0) -> None:
        """A life of this name has ended without a word, after so many seconds."""
        if lived >= self.brief:
            self._ends.pop(name, None)
            return
        ends = self._ends[name]
        ends.append(at)
        while at - ends[0] > self.within:
            ends.popleft()
        if len(ends) >= self.flaps:
            self.happened(FLAPPING, (name,), at, lives=float(len(ends)), seconds=at - ends[0])

    def forget(self, name: str) -> None:
        """What was held against this name has been dealt with."""
        for kind in (CORRUPT, DRIFTED, FLAPPING):
            self.over(kind, (name,))
        self._ends.pop(name, None)

    def verdicts(self, at: float) -> Iterator[Verdict]:
        """What holds, and what has happened lately."""
        self._known = {k: each for k, each in self._known.items() if each.holds or at - each.last < self.lasting}
        self._ends = defaultdict(deque, {n: ends for n, ends in self._ends.items() if at - ends[-1] <= self.within})
        for (kind, culprits), each in self._known.items():
            evidence: Mapping[str, float] = each.evidence
            yield Verdict(kind=kind, culprits=culprits, since=each.since, confidence=each.confidence, evidence=evidence)

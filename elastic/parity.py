"""Who is right when peers hold different bits as the same version of the outer state (rules 2 and 9).

A claim is what a peer says it holds after an outer step of its own. A majority of those who could claim decides.
Without one, each side computes the version again from the one before and the committed result: who does not get its own
claim again is wrong. If that leaves more than one side, or none, there is no decision.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field


@dataclass
class Claims:
    """What is claimed about one version of one fragment, by peer name.

    reproduced: what each one got on computing it again; "" for one that could not. since: when they came to differ.
    asked: when they were asked to compute it again.
    """

    version: int
    claimed: dict[str, str] = field(default_factory=dict)
    reproduced: dict[str, str] = field(default_factory=dict)
    asked: float | None = None
    since: float | None = None

    @property
    def disputed(self) -> bool:
        return len(set(self.claimed.values())) > 1

    @property
    def unanimous(self) -> str:
        """What all claims say; "" if there is none, or they differ."""
        held = set(self.claimed.values())
        return held.pop() if len(held) == 1 else ""

    def claim(self, name: str, state_hash: str, now: float) -> None:
        self.claimed[name] = state_hash
        if self.disputed and self.since is None:
            self.since = now

    def forget(self, name: str) -> None:
        """The peer has gone, or has taken over another's state: its claim does not count any more."""
        self.claimed.pop(name, None)
        self.reproduced.pop(name, None)

    def settle(self, right: str) -> list[str]:
        """The question is decided; returns who was wrong. Their claims are dropped."""
        wrong = sorted(name for name, held in self.claimed.items() if held != right)
        for name in wrong:
            self.forget(name)
        self.asked = self.since = None
        self.reproduced.clear()
        return wrong

    def majority(self, electorate: Set[str]) -> str:
        """What more than half of the electorate claims; "" if nothing."""
        votes = Counter(held for name, held in self.claimed.items() if name in electorate)
        held, count = votes.most_common(1)[0] if votes else ("", 0)
        return held if 2 * count > len(electorate) else ""

    def all_heard(self, electorate: Set[str]) -> bool:
        return electorate <= self.claimed.keys()

    def recomputed(self, electorate: Set[str]) -> bool:
        """Whether everybody who claims something, and is still there, has answered."""
        return self.claimed.keys() & electorate <= self.reproduced.keys()

    def proven(self) -> str:
        """The only claim that somebody reproduces; "" if there are several or none."""
        sides = {held for name, held in self.claimed.items() if self.reproduced.get(name) == held}
        return sides.pop() if len(sides) == 1 else ""

"""When, and where, the next life of a peer begins, and when there is none: a pure account of its deaths.

A node where a peer has died repeatedly may be what kills it; so another one is preferred then. The first restart comes
at once, later ones after ever longer pauses, so that a crash loop does not spin. Who dies with its node is not to
blame.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from elastic.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class FailureConfig:
    """A peer that ended more than `max_restarts` times within `window_seconds` is given up.

    hang_seconds: without an answer, after which a life is ended. deaths_per_node: within the window, after which other
    nodes are preferred. place_seconds: for a node to start a life's process, after which another node is tried.
    pause_seconds: before the second restart within the window; doubled for each further one, up to longest_pause.
    """

    max_restarts: int = 3
    window_seconds: float = 600.0
    hang_seconds: float = 30.0
    deaths_per_node: int = 2
    place_seconds: float = 60.0
    pause_seconds: float = 1.0
    longest_pause: float = 60.0

    def __post_init__(self) -> None:
        if self.max_restarts < 0:
            raise ConfigurationError(f"max_restarts is {self.max_restarts}: it must be 0 (none) or more")
        if self.deaths_per_node < 1:
            raise ConfigurationError(f"deaths_per_node is {self.deaths_per_node}: it must be at least 1")
        for name in ("window_seconds", "hang_seconds", "place_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be above 0 seconds")
        if not 0 <= self.pause_seconds <= self.longest_pause:
            raise ConfigurationError(
                f"pause_seconds is {self.pause_seconds}: it must be from 0 to longest_pause ({self.longest_pause})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Restart:
    """Start the next life after so many seconds."""

    after: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Start no further life. reason: how often it ended, within what time, and how."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where to start a life. node: there and nowhere else; "": on any but those in `avoid`."""

    node: str = ""
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Death:
    """node: where it was; "" if it had not begun. at: seconds of the caller's clock."""

    node: str
    at: float
    evidence: str


class Restarts:
    """The deaths of one peer within the window, and what follows from them. Times are seconds of one clock."""

    def __init__(self, policy: FailureConfig) -> None:
        self._policy = policy
        self._deaths: list[Death] = []
        self._unplaced: dict[str, float] = {}
        self._home = ""

    def began(self, node: str) -> None:
        """A life runs on this node: the next one should, too."""
        self._home = node

    def died(self, node: str, evidence: str, now: float) -> Restart | GiveUp:
        self._forget(now)
        self._deaths.append(Death(node, now, evidence))
        count = len(self._deaths)
        if count > self._policy.max_restarts:
            return GiveUp(reason=_account(self._deaths))
        if count == 1:
            return Restart(after=0.0)
        # the exponent is bounded: a float has an end
        return Restart(after=min(self._policy.longest_pause, self._policy.pause_seconds * 2.0 ** min(count - 2, 60)))

    def excuse(self, node: str) -> None:
        """The node is gone: the deaths there were its own."""
        self._deaths = [death for death in self._deaths if death.node != node]

    def unplaced(self, place: Place, now: float) -> None:
        """The node had no room, or was gone: it is avoided for the window."""
        if place.node:
            self._unplaced[place.node] = now

    def places(self, alive: Set[str], now: float) -> tuple[Place, ...]:
        """Where to try, in this order: the same node, any other that is not avoided, any at all.

        alive: the nodes as Ray knows them.
        """
        self._forget(now)
        for death in list(self._deaths):
            if death.node and death.node not in alive:
                self.excuse(death.node)
        avoid = frozenset(node for node in alive if self._avoids(node))
        places = []
        if self._home in alive - avoid:
            places.append(Place(node=self._home))
        if avoid and alive - avoid:
            places.append(Place(avoid=avoid))
        return (*places, Place())

    def _avoids(self, node: str) -> bool:
        return node in self._unplaced or sum(d.node == node for d in self._deaths) >= self._policy.deaths_per_node

    def _forget(self, now: float) -> None:
        since = now - self._policy.window_seconds
        self._deaths = [death for death in self._deaths if death.at >= since]
        self._unplaced = {node: at for node, at in self._unplaced.items() if at >= since}


def _account(deaths: list[Death]) -> str:
    span, times = deaths[-1].at - deaths[0].at, "once" if len(deaths) == 1 else f"{len(deaths)} times"
    within = f" within {span:.0f} s" if len(deaths) > 1 else ""
    kinds = list(dict.fromkeys(death.evidence for death in deaths))
    return f"ended {times}{within} ({', then '.join(kinds)})"

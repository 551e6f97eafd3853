"""Places in the run whose supervisors have given them up, offered to sites that have room for one more peer.

A supervisor says again and again what room it has and whom it has given up, each time the whole of it; so nothing here
is lost with a message or a coordinator. A place is offered to one site at a time: to those of the same name first, then
to whoever has most room. A site takes it up, declines, or is not waited for; one where this peer has failed is not
asked again for a while. If no site is left, or none has brought the peer back in time, its leases go to the survivors.

Pure, like all parts of the membership: it touches no member and no lease itself, and speaks through the Roster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .config import Timeouts
from .messages import GivenUp, SiteReport, Vacancy
from .roster import Roster

SILENT_CHUNKS = 4.0
"""A supervisor that was not heard for so many `chunk` times is not counted on."""
TRIED_EVICTIONS = 10.0
"""For so many `evict_after` times a site where a peer was given up is not asked to take it again."""


@dataclass(slots=True)
class _Site:
    """What a supervisor last said of itself. supervisor: the name of its connection."""

    supervisor: str
    site: str
    room: int
    heard: float


@dataclass(slots=True)
class _Opening:
    """A free place. site: whose it was. asked: the supervisor that it is offered to now; taken: it has agreed."""

    site: str
    opened: float
    asked: int = 0
    asked_at: float = 0.0
    taken: bool = False


@dataclass(slots=True)
class _Failed:
    """ended: the last life of a peer that was given up. by: which supervisors could not keep it, and since when."""

    ended: int
    by: dict[int, float] = field(default_factory=dict)


class Vacancies:
    """Free places by the names of their peers. Supervisors are known by their incarnations.

    release: hands a peer's leases to the survivors. Times are seconds of the membership's clock.
    """

    def __init__(self, roster: Roster, timeouts: Timeouts, release: Callable[[str], None]) -> None:
        self._roster, self._timeouts, self._release = roster, timeouts, release
        self._sites: dict[int, _Site] = {}
        self._openings: dict[str, _Opening] = {}
        self._failed: dict[str, _Failed] = {}

    def open(self, gone: GivenUp, by: SiteReport, now: float, *, wanted: bool) -> None:
        """This supervisor starts no further life of that peer. wanted: whether another life would be of use.

        Told again of the same life, it does nothing.
        """
        failed = self._failed.setdefault(gone.name, _Failed(ended=-1))
        if failed.ended == gone.ended:
            return
        failed.ended = gone.ended
        failed.by[by.incarnation] = now
        self._roster.emit("vacancy.opened", peer=gone.name, site=by.site, reason=gone.reason)
        opening = self._openings[gone.name] = _Opening(by.site, now)
        if wanted:
            self._ask_next(gone.name, opening, now)
        else:
            self._close(gone.name, "the run is over")

    def admitted(self, peer: str, site: str) -> None:
        """A life of this peer has joined, from wherever: the place is taken."""
        if self._openings.pop(peer, None) is not None:
            self._roster.emit("vacancy.filled", peer=peer, site=site)

    def supervisors(self, site: str) -> list[tuple[str, int]]:
        """Of this site, as far as they are heard of: the names of their connections, and their incarnations."""
        return [(each.supervisor, own) for own, each in self._sites.items() if each.site == site]

    def hear(self, supervisor: str, report: SiteReport, now: float) -> None:
        """What room a supervisor has, and what became of the places that it was offered."""
        own = report.incarnation
        self._sites[own] = _Site(supervisor, report.site, report.room, now)
        for peer, opening in list(self._openings.items()):
            if opening.asked != own:
                continue
            if peer in report.taking:
                opening.taken = True
            elif opening.taken or peer in report.declined:
                self._ask_other(peer, opening, now)
            else:
                self._tell(own, peer, free=True)
        for peer in report.taking:
            if not self._may_take(own, peer, report.site):
                self._tell(own, peer, free=False)

    def _may_take(self, supervisor: int, peer: str, site: str) -> bool:
        opening, member = self._openings.get(peer), self._roster.members.get(peer)
        asked = opening is not None and opening.asked == supervisor
        return asked or (member is not None and member.site == site)  # its own life may just have joined

    def tick(self, now: float) -> None:
        silence = SILENT_CHUNKS * self._timeouts.chunk
        self._sites = {own: site for own, site in self._sites.items() if now - site.heard <= silence}
        for peer, opening in list(self._openings.items()):
            if now - opening.opened > self._timeouts.evict_after:
                self._close(peer, "nobody has taken it up in time")
            elif opening.asked not in self._sites or (
                not opening.taken and now - opening.asked_at > 2 * self._timeouts.chunk
            ):
                self._ask_other(peer, opening, now)
        self._forget(now)

    def _forget(self, now: float) -> None:
        since = now - TRIED_EVICTIONS * self._timeouts.evict_after
        for failed in self._failed.values():
            failed.by = {own: at for own, at in failed.by.items() if at >= since}

    def postpone(self, seconds: float) -> None:
        """The coordinator itself stood still for so long: nobody's time ran."""
        for site in self._sites.values():
            site.heard += seconds
        for opening in self._openings.values():
            opening.opened += seconds
            opening.asked_at += seconds

    def _ask_other(self, peer: str, opening: _Opening, now: float) -> None:
        """The one that was asked does not bring the peer back."""
        self._failed[peer].by[opening.asked] = now
        self._ask_next(peer, opening, now)

    def _ask_next(self, peer: str, opening: _Opening, now: float) -> None:
        opening.asked, opening.asked_at, opening.taken = 0, now, False
        chosen = min(self._candidates(peer), key=lambda own: self._rank(own, opening), default=None)
        if chosen is None:
            self._close(peer, "no site has room for it")
            return
        opening.asked = chosen
        self._roster.emit("vacancy.offered", peer=peer, site=self._sites[chosen].site)
        self._tell(chosen, peer, free=True)

    def _candidates(self, peer: str) -> list[int]:
        return [own for own in self._sites if own not in self._failed[peer].by and self._room(own) > 0]

    def _room(self, own: int) -> int:
        """What a supervisor has agreed to it has taken off its room itself."""
        return self._sites[own].room - sum(o.asked == own and not o.taken for o in self._openings.values())

    def _rank(self, own: int, opening: _Opening) -> tuple[bool, int, int]:
        return (self._sites[own].site != opening.site, -self._room(own), own)

    def _close(self, peer: str, reason: str) -> None:
        del self._openings[peer]
        self._roster.emit("vacancy.closed", peer=peer, reason=reason)
        self._release(peer)

    def _tell(self, own: int, peer: str, *, free: bool) -> None:
        self._roster.send_to(self._sites[own].supervisor, own, self._roster.stamp(Vacancy, name=peer, free=free))

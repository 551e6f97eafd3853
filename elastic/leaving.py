"""Who is asked to leave: a peer by its name, or a whole site.

Pure, like all parts of the membership: it touches no member but to note that it was asked, and speaks through the
Roster. Nothing of it is journaled: whoever asks sees who has left, and asks the coordinator's next life again. What
could get lost on the way is said again with each sign of life of who was asked, until that has left; hearing it twice
does no harm.
"""

from __future__ import annotations

import math

from .messages import Drain, LeaveAsked, LeaveRequest
from .roster import MemberState, Roster
from .vacancies import Vacancies

NAMED = 8


class Leaving:
    """Requests to leave, carried to peers and to the supervisors of sites."""

    def __init__(self, roster: Roster, vacancies: Vacancies) -> None:
        self._roster, self._vacancies = roster, vacancies
        self._supervisors: dict[int, float] = {}

    def ask(self, sender: str, request: LeaveRequest) -> None:
        """Of a site, its supervisors are asked, too: they would start the next life of who is between two lives."""
        members = self._members(request.name)
        supervisors = [] if request.name in members else self._vacancies.supervisors(request.name)
        if not 0 < request.seconds < math.inf:
            reason = f"seconds is {request.seconds}: it must be above 0"
            self._roster.refuse(sender, request, "ConfigurationError", reason)
            return
        if not members and not supervisors:
            self._roster.refuse(sender, request, "ConfigurationError", self._not_there(request.name))
            return
        for name, state in members.items():
            self._ask_member(name, state, request)
        for supervisor, own in supervisors:
            self._supervisors.setdefault(own, request.seconds)
            self.reported(supervisor, own)
        lives = {name: state.life for name, state in members.items()}
        answer = self._roster.stamp(LeaveAsked, lives=lives, supervisors=len(supervisors))
        self._roster.send_to(sender, request.incarnation, answer)

    def heard(self, name: str) -> None:
        """A member is still there: if it was asked to leave, it may not know."""
        seconds = self._roster.members[name].leaving
        if seconds is not None:
            self._roster.send(name, self._roster.stamp(Drain, seconds=seconds))

    def reported(self, supervisor: str, own: int) -> None:
        """So is a supervisor."""
        if own in self._supervisors:
            self._roster.send_to(supervisor, own, self._roster.stamp(Drain, seconds=self._supervisors[own]))

    def _members(self, name: str) -> dict[str, MemberState]:
        """A peer's name wins over a site's."""
        members = self._roster.members
        if name in members:
            return {name: members[name]}
        return {peer: state for peer, state in members.items() if state.site == name}

    def _ask_member(self, name: str, state: MemberState, request: LeaveRequest) -> None:
        if state.leaving is None:
            state.leaving = request.seconds
            self._roster.emit("peer.asked_to_leave", peer=name, life=state.life, seconds=request.seconds)
        self.heard(name)

    def _not_there(self, name: str) -> str:
        members = self._roster.members
        sites = sorted({state.site for state in members.values()})
        there = f"peers are {_some(sorted(members))}; sites are {_some(sites)}" if members else "nobody is there"
        return f"there is no peer and no site {name!r} in run {self._roster.run!r}: {there}"


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")

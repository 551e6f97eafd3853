"""Which peers stand in for one another: twins hold the same shards, and read the same samples in the same order.

With `RunPolicy.redundancy` 2, members are put into teams of two as they come. Shards are leased to the team, so each
twin reads all of them; a round takes the contribution of one, and goes on for the other as if it had given the same
(`Commit.covers`). A team lasts while one of its names is a member; the next life of a name comes back to its place.

Pure, like all parts of the membership. docs/design.md, "Twins", says why the data is repeated and nothing is coded.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from .journal import Paired
from .roster import Roster


class Twins:
    """The teams, by the names of their peers. A name that is in none stands for itself: so it is without redundancy.

    A team is called after the peer that it began with.
    """

    def __init__(self, roster: Roster, redundancy: int) -> None:
        self._roster, self._redundancy = roster, redundancy
        self.teams: dict[str, str] = {}

    def team(self, name: str) -> str:
        """Under which name this peer's shards are leased."""
        return self.teams.get(name, name)

    def mates(self, names: Iterable[str]) -> set[str]:
        """The members that could stand in for one of these, and are not among them."""
        if not self.teams:
            return set()
        names = {*names}
        teams = {self.team(name) for name in names}
        return {name for name in self._roster.members if name not in names and self.team(name) in teams}

    def members_of(self, teams: Set[str]) -> list[str]:
        """The members of the view that are in one of these teams."""
        return sorted(name for name in self._roster.members if self.team(name) in teams)

    # --- who comes and goes -------------------------------------------------------------------------------------------

    def admit(self, name: str, holding: bool) -> None:
        """Finds a place for a member: the one that its name had, else with somebody who is alone, else in a new team.

        holding: shards are leased to this very name; then it begins a team with them.
        """
        if name in self.teams and len(self.mates({name})) < self._redundancy:
            return
        others = self._roster.members.keys() - {name}
        alone = {} if holding else self._with_room(others)
        site = self._roster.members[name].site
        team = min(alone, key=lambda each: (site in alone[each], each), default="") or self._fresh(name)
        if team != name or self._redundancy > 1:
            self.forget({team})
            self._roster.record(Paired(name=name, team=team))
            self._roster.emit("peer.paired", peer=name, team=team, twins=sorted(self.mates({name})))

    def _with_room(self, names: Set[str]) -> dict[str, set[str]]:
        """Teams that lack a peer, with the sites of those they have."""
        sites: dict[str, list[str]] = {}
        for name in names & self.teams.keys():
            sites.setdefault(self.teams[name], []).append(self._roster.members[name].site)
        return {team: {*each} for team, each in sites.items() if len(each) < self._redundancy}

    def _fresh(self, name: str) -> str:
        """A team's name that no other team has: this peer's own, marked as no peer's name can be if need be."""
        team, taken = name, {each for other, each in self.teams.items() if other != name}
        while team in taken:
            team += "+"
        return team

    def forget(self, teams: Set[str]) -> None:
        """The names in these teams that are no members have no place there any more."""
        for name in sorted(self.teams.keys() - self._roster.members.keys()):
            if self.teams[name] in teams:
                self._roster.record(Paired(name=name, team=""))

    # --- durable state ------------------------------------------------------------------------------------------------

    def apply(self, record: Paired) -> None:
        if record.team:
            self.teams[record.name] = record.team
        else:
            self.teams.pop(record.name, None)

    def apply_restored(self, teams: dict[str, str]) -> None:
        """Those who are here stay as they are: they know their shards by that."""
        here = {name: team for name, team in self.teams.items() if name in self._roster.members}
        self.teams = {name: team for name, team in teams.items() if name not in self._roster.members} | here

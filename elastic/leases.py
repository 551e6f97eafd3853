"""Which shards each peer may read: what answers a LeaseRequest.

Leases belong to the names of peers, or to teams of twins (`twins.py`), and outlive their lives for a while
(docs/design.md, "Data"). Pure, like all parts of the membership: it touches the shard table and the teams alone, speaks
through the Roster, and sees of the rounds under way only what is proposed in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .config import Timeouts
from .journal import DatasetRegistered, Leased, Paired, Released, StreamEnded
from .messages import STREAM, LeaseRequest, Leases, Message, Propose
from .roster import Roster
from .runstate import DataState
from .shards import ShardTable
from .twins import Twins


class Leasing:
    """The run's data, if it has any.

    proposals: of all rounds under way, with the names of those who made them. orphaned: since when teams that hold
    shards have no members; a peer without twins is a team by itself. given_back: who held shards before that are free
    now.
    """

    def __init__(
        self,
        roster: Roster,
        timeouts: Timeouts,
        proposals: Callable[[], Iterable[tuple[str, Propose]]],
        redundancy: int = 1,
    ) -> None:
        self._roster, self._timeouts, self._proposals = roster, timeouts, proposals
        self.twins = Twins(roster, redundancy)
        self.table: ShardTable | None = None
        self._orphaned: dict[str, float] = {}
        self._given_back: dict[int, str] = {}

    def lease(self, name: str, message: LeaseRequest) -> None:
        """Answers with the shards that are the peer's; it gets one more if it has begun on all it has."""
        if message.samples == 0:
            self.release(name)
            self._roster.send(name, self._roster.stamp(Leases, shards={}, sequence=message.sequence))
            return
        if message.samples < STREAM or message.shard_size < 1 or message.epochs < 0:
            self._roster.refuse(name, message, "ConfigurationError", f"there is no such data: {message}")
            return
        if self.table is None:
            self._roster.record(
                DatasetRegistered(
                    samples=message.samples,
                    shard_size=message.shard_size,
                    seed=message.seed,
                    epochs=message.epochs,
                )
            )
        table = self.table
        assert table is not None
        ours = (table.layout.samples, table.layout.shard_size, table.layout.seed, table.epochs)
        theirs = (message.samples, message.shard_size, message.seed, message.epochs)
        if ours != theirs:
            reason = f"the run's data has (samples, shard_size, seed, epochs) = {ours}, peer {name} has {theirs}"
            self._roster.refuse(name, message, "ParityError", reason)
        elif self._ended(name, table, message):
            self._roster.send(name, self._leases(name, table, message))

    def _leases(self, name: str, table: ShardTable, message: LeaseRequest) -> Message:
        doubt = self._in_doubt(table)
        team = self.twins.team(name)
        if message.more:
            self._lease_one(team, table, doubt | {*message.holding}, doubt)
        # who reads beside a twin that is lost goes on: if the round counts the twin's part, it covers this peer's
        hidden = doubt - {*message.holding}
        shards = {shard: table.cursors[shard] for shard in table.held_by(team) if shard not in hidden}
        spent = not doubt and not shards.keys() - {*message.holding}
        epochs = {table.layout.epoch(shard) for shard in (*message.holding, *shards)}
        ends = {epoch: samples for epoch, samples in table.ends.items() if epoch in epochs}
        leases: Leases = self._roster.stamp(Leases, shards=shards, spent=spent, sequence=message.sequence, ends=ends)
        return leases

    @property
    def exhausted(self) -> bool:
        """Whether there is data, and none of it is left to lease."""
        return self.table is not None and self.table.offer() is None

    def _ended(self, name: str, table: ShardTable, message: LeaseRequest) -> bool:
        """Takes note of the ends of a stream's epochs that a peer has reached; False if it is another stream's."""
        for epoch, samples in message.ends.items():
            if epoch not in table.ends and table.can_end(epoch, samples):
                self._roster.record(StreamEnded(epoch=epoch, samples=samples))
                self._roster.emit("stream.ended", peer=name, stream_epoch=epoch, samples=samples)
            if table.ends.get(epoch) != samples:
                known = f"{table.ends[epoch]} samples" if epoch in table.ends else "more or fewer"
                reason = f"epoch {epoch} of the stream has {known} in the run, {samples} on peer {name}"
                self._roster.refuse(name, message, "ParityError", f"{reason}: it must be the same on all peers")
                return False
        return True

    def _lease_one(self, team: str, table: ShardTable, holding: set[int], doubt: set[int]) -> None:
        shard = table.offer(doubt)
        if shard is not None and not set(table.held_by(team)) - holding:
            self._roster.record(Leased(name=team, shards=(shard,)))
            before = self._given_back.pop(shard, team)
            if before != team:
                cursor = table.cursors[shard]
                self._roster.emit("shard.reassigned", shard=shard, peer=team, before=before, cursor=cursor)

    def _in_doubt(self, table: ShardTable) -> set[int]:
        """Shards that the contribution of a life gone by may yet move (rule 8): not read until that is decided.

        What a member proposes about shards that it holds itself concerns nobody else.
        """
        return {
            shard
            for name, proposal in self._proposals()
            for shard in proposal.cursors
            if not (self._roster.is_life(name, proposal.incarnation) and table.holders.get(shard) == self.team(name))
        }

    def has_read_others(self, name: str, message: Propose) -> bool:
        """Whether it has read what the run does not know it to hold, since leases can be lost with a journal; or what
        the run has counted as its twin's."""
        holders, cursors = (self.table.holders, self.table.cursors) if self.table else ({}, {})
        if any(holders.get(shard) != self.team(name) for shard in message.cursors):
            return True
        return name in self.twins.teams and any(message.starts.get(s) != cursors[s] for s in message.cursors)

    def release(self, name: str) -> None:
        """What this name has not finished may go to others, or stays with its twin."""
        team = self.twins.team(name)
        if not self.twins.mates({name}):
            self._release(team)
        if name not in self._roster.members:
            self.twins.forget({team})

    def _release(self, team: str) -> None:
        self._orphaned.pop(team, None)
        if self.table and self.table.held_by(team):
            self._roster.emit("shard.released", peer=team, shards=self.table.held_by(team))
            self._given_back |= dict.fromkeys(self.table.held_by(team), team)
            self._roster.record(Released(name=team))

    # --- twins --------------------------------------------------------------------------------------------------------

    def team(self, name: str) -> str:
        """What counts as one peer in a round: twins do once there is data that they share."""
        return self.twins.team(name) if self.table else name

    def mates(self, names: Iterable[str]) -> set[str]:
        """The members for whom these can stand in."""
        return self.twins.mates(names) if self.table else set()

    def covers(self, contributors: tuple[str, ...], cursors: Iterable[int]) -> tuple[str, ...]:
        """Who else reads these shards: what they have learned from them is void if this is committed."""
        if not (self.table and self.twins.teams):
            return ()
        teams = {self.table.holders[shard] for shard in cursors if shard in self.table.holders}
        return tuple(name for name in self.twins.members_of(teams) if name not in contributors)

    # --- whose lease goes on without them ---------------------------------------------------------------------------

    def departed(self, name: str, now: float) -> None:
        """The next life of this name gets its shards back, if it comes in time."""
        team = self.twins.team(name)
        held = name in self.twins.teams or (self.table and self.table.held_by(team))
        if held and not self.twins.mates({name}):
            self._orphaned[team] = now

    def admitted(self, name: str) -> None:
        self.twins.admit(name, holding=bool(self.table and name not in self.twins.teams and self.table.held_by(name)))
        self._orphaned.pop(self.twins.team(name), None)

    def find_orphans(self, now: float) -> None:
        """After a replay or a restored state: shards can be held by names that are no members."""
        teams = {*self.twins.teams.values(), *(self.table.holders.values() if self.table else ())}
        for team in teams - {self.twins.team(name) for name in self._roster.members}:
            self._orphaned.setdefault(team, now)

    def tick(self, now: float) -> None:
        for team, since in list(self._orphaned.items()):
            if now - since > self._timeouts.evict_after:
                self._release(team)
                self.twins.forget({team})

    def postpone(self, seconds: float) -> None:
        """The coordinator itself stood still for so long: nobody's time ran."""
        for team in self._orphaned:
            self._orphaned[team] += seconds

    # --- durable state ----------------------------------------------------------------------------------------------

    def apply(self, record: DatasetRegistered | StreamEnded | Leased | Released | Paired) -> None:
        match record:
            case Paired():
                self.twins.apply(record)
            case DatasetRegistered():
                self.table = ShardTable.of(record)
            case StreamEnded() if self.table:
                self.table.end(record.epoch, record.samples)
            case Leased() if self.table:
                self.table.lease(record.name, record.shards)
            case Released() if self.table:
                self.table.release(record.name)

    def apply_committed(self, cursors: dict[int, int]) -> None:
        if self.table:
            self.table.commit(cursors)

    def apply_restored(self, data: DataState, teams: dict[str, str]) -> None:
        self.table = ShardTable.restored(data)
        self.twins.apply_restored(teams)

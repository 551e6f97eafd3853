"""Which shards each peer may read: what answers a LeaseRequest.

Leases belong to the names of peers, and outlive their lives for a while (docs/design.md, "Data"). Pure, like all parts
of the membership: it touches the shard table alone, speaks through the Roster, and sees of the rounds under way only
what is proposed in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .config import Timeouts
from .journal import DatasetRegistered, Leased, Released, StreamEnded
from .messages import STREAM, LeaseRequest, Leases, Message, Propose
from .roster import Roster
from .runstate import DataState
from .shards import ShardTable


class Leasing:
    """The run's data, if it has any.

    proposals: of all rounds under way, with the names of those who made them. orphaned: since when names that hold
    shards are no members. given_back: who held shards before that are free now.
    """

    def __init__(
        self, roster: Roster, timeouts: Timeouts, proposals: Callable[[], Iterable[tuple[str, Propose]]]
    ) -> None:
        self._roster, self._timeouts, self._proposals = roster, timeouts, proposals
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
        self._lease_one(name, table, doubt | {*message.holding}, doubt)
        shards = {shard: table.cursors[shard] for shard in table.held_by(name) if shard not in doubt}
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

    def _lease_one(self, name: str, table: ShardTable, holding: set[int], doubt: set[int]) -> None:
        shard = table.offer(doubt)
        if shard is not None and not set(table.held_by(name)) - holding:
            self._roster.record(Leased(name=name, shards=(shard,)))
            before = self._given_back.pop(shard, name)
            if before != name:
                cursor = table.cursors[shard]
                self._roster.emit("shard.reassigned", shard=shard, peer=name, before=before, cursor=cursor)

    def _in_doubt(self, table: ShardTable) -> set[int]:
        """Shards that the contribution of a life gone by may yet move (rule 8): not read until that is decided.

        What a member proposes about shards that it holds itself concerns nobody else.
        """
        return {
            shard
            for name, proposal in self._proposals()
            for shard in proposal.cursors
            if not (self._roster.is_life(name, proposal.incarnation) and table.holders.get(shard) == name)
        }

    def has_read_others(self, name: str, message: Propose) -> bool:
        """Whether it has read what the run does not know it to hold: leases can be lost with a journal."""
        holders = self.table.holders if self.table else {}
        return any(holders.get(shard) != name for shard in message.cursors)

    def release(self, name: str) -> None:
        """What this name has not finished may go to others."""
        self._orphaned.pop(name, None)
        if self.table and self.table.held_by(name):
            self._roster.emit("shard.released", peer=name, shards=self.table.held_by(name))
            self._given_back |= dict.fromkeys(self.table.held_by(name), name)
            self._roster.record(Released(name=name))

    # --- whose lease goes on without them ---------------------------------------------------------------------------

    def departed(self, name: str, now: float) -> None:
        """The next life of this name gets its shards back, if it comes in time."""
        if self.table and self.table.held_by(name):
            self._orphaned[name] = now

    def admitted(self, name: str) -> None:
        self._orphaned.pop(name, None)

    def find_orphans(self, now: float) -> None:
        """After a replay or a restored state: shards can be held by names that are no members."""
        for name in set(self.table.holders.values()) - self._roster.members.keys() if self.table else ():
            self._orphaned.setdefault(name, now)

    def tick(self, now: float) -> None:
        for name, since in list(self._orphaned.items()):
            if now - since > self._timeouts.evict_after:
                self.release(name)

    def postpone(self, seconds: float) -> None:
        """The coordinator itself stood still for so long: nobody's time ran."""
        for name in self._orphaned:
            self._orphaned[name] += seconds

    # --- durable state ----------------------------------------------------------------------------------------------

    def apply(self, record: DatasetRegistered | StreamEnded | Leased | Released) -> None:
        match record:
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

    def apply_restored(self, data: DataState) -> None:
        self.table = ShardTable.restored(data)

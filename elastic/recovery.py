"""A run whose coordinator and journal are lost, brought together again from what its peers know.

Every commit carries the run state. A new coordinator asks each peer that finds it for the newest one that it has and
for the last view. Once a majority of that view has answered, it opens a lineage of generations that the lost
coordinator cannot reach, should it come back, and asks once more: peers follow the highest generation, so whoever
answers in the new lineage obeys the other no more. With the answers of a majority the run goes on from what is newest
among them.

So what holds is: a commit that a majority of the last view has heard of is not lost. One that only fewer saw can be;
those who hold it are led back to the state of the run. The last view is the last one that somebody here knows: peers
that were out of reach while the others evicted them do not know that they were, and can go on in a line of their own.
The higher lineage wins once both meet, and what the other committed after the fork is void.

Without a majority nothing happens by itself: two halves of a run must not both go on. A person can decide (`accept`).
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace

from collectives.records import Member

from .errors import CheckpointMismatch
from .journal import Admitted, Leased, Record, Restored
from .messages import Join, Message, Refused, Represent
from .roster import Effect, Send
from .runstate import RunState, above

RIVALS = 1 << 16
"""A lineage is drawn from so many, lest two coordinators that recover the same run count in the same one."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What one peer knows: its last view and run state, the shards that it holds.

    followed: the generation that it obeyed when it was first asked. promised: the one in which it has answered.
    """

    member: Member
    site: str
    followed: int
    promised: int
    epoch: int
    view: dict[str, int]
    state: RunState | None
    holding: tuple[int, ...]


class Recovery:
    """Gathers memories, as a pure function of messages, until there are enough.

    skipped: how many lineages to leave out; random by default.
    """

    def __init__(self, run: str, skipped: int | None = None) -> None:
        self.run = run
        self.generation = 0
        self._skipped = secrets.randbelow(RIVALS) if skipped is None else skipped
        self._memories: dict[int, Memory] = {}
        self._accepted = False

    def receive(self, name: str, message: Message) -> list[Effect]:
        """Every member is asked for what it knows; nobody is admitted yet, and newcomers wait."""
        if message.run != self.run:
            reason = f"this coordinator serves run {self.run!r}"
            return [Send(name, message.incarnation, Refused(run=self.run, error="ConfigurationError", reason=reason))]
        if isinstance(message, Join) and message.view:
            return self._remember(name, message)
        return [self._ask(name, message.incarnation, message.generation)] if message.generation else []

    def _ask(self, name: str, incarnation: int, followed: int) -> Effect:
        generation = max(self.generation, followed)
        return Send(name, incarnation, Represent(run=self.run, generation=generation, recall=True))

    def _remember(self, name: str, message: Join) -> list[Effect]:
        try:
            state = RunState.from_bytes(message.state) if message.state else None
        except CheckpointMismatch:
            return []
        member = message.member
        if (state is not None and state.run != self.run) or (member.name, member.incarnation) != (
            name,
            message.incarnation,
        ):
            return []
        before = self._memories.get(member.incarnation)
        kept = before is not None and message.generation == self.generation
        self._memories[member.incarnation] = Memory(
            member=member,
            site=message.site,
            followed=before.followed if before is not None and kept else message.generation,
            promised=message.generation,
            epoch=message.epoch,
            view=message.view,
            state=state,
            holding=message.holding,
        )
        return self._open_lineage()

    def _open_lineage(self) -> list[Effect]:
        """With a majority there, the lost coordinator is shut out: from here on they obey this one or a later one."""
        highest = max(memory.promised for memory in self._memories.values())
        if highest > self.generation:
            self.generation = 0
        if self.generation or not self._enough(self._present):
            return []
        self.generation = above(highest, self._skipped)
        return [self._ask(m.member.name, m.member.incarnation, m.promised) for m in self._memories.values()]

    def _enough(self, memories: list[Memory]) -> bool:
        return 2 * len(memories) > len(self.view)

    def accept(self) -> None:
        """Go on with those that are there: the others are known to be lost, or will fetch the state anew."""
        self._accepted = True

    @property
    def view(self) -> dict[str, int]:
        """The last view that anybody knows: incarnations by name."""
        last = max(self._memories.values(), key=lambda m: (m.followed, m.epoch), default=None)
        return dict(last.view) if last else {}

    @property
    def _present(self) -> list[Memory]:
        return [self._memories[i] for _, i in sorted(self.view.items()) if i in self._memories]

    @property
    def present(self) -> tuple[str, ...]:
        """Who of that view has answered."""
        return tuple(memory.member.name for memory in self._present)

    @property
    def ready(self) -> bool:
        promised = [memory for memory in self._present if memory.promised == self.generation]
        return bool(self._memories) and (self._accepted or self._enough(promised))

    def records(self) -> list[Record]:
        """What the new journal begins with. Shards leased since the last commit stay with whoever holds them.

        Lives that the view does not know are no members: they may be old ones.
        """
        state = self._newest()
        highest = max(memory.promised for memory in self._memories.values())
        generation = highest if highest == self.generation else above(highest, self._skipped)
        reason = f"rebuilt from what {', '.join(self.present)} know"
        records: list[Record] = [Restored(state=state, generation=generation, reason=reason)]
        records += [Admitted(member=memory.member, site=memory.site, life=1) for memory in self._present]
        taken = set(state.data.cursors)
        for memory in self._present:
            more = tuple(shard for shard in memory.holding if shard >= state.data.next and shard not in taken)
            taken.update(more)
            if more and state.data.samples:
                team = state.teams.get(memory.member.name, memory.member.name)
                records.append(Leased(name=team, shards=more))
        return records

    def _newest(self) -> RunState:
        """The last decision that anybody knows of; epochs go on from the last view."""
        memories = self._memories.values()
        states = [memory.state for memory in memories if memory.state is not None]
        nothing = RunState(run=self.run, generation=0, epoch=0, serial=0, tokens=0.0, elapsed=0.0, loops=())
        state = max(states, key=lambda state: (state.generation, state.serial), default=nothing)
        return replace(state, epoch=max(state.epoch, *(memory.epoch for memory in memories)))

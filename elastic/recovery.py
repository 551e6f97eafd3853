"""A run whose coordinator and journal are lost, brought together again from what its peers know.

Every commit carries the run state. A new coordinator asks each peer that finds it for the newest one that it has and
for the last view; once a majority of that view has answered, what is newest among them is what the run goes on from,
in a lineage of generations that the lost coordinator cannot reach, should it come back: peers follow the highest
generation, so that whoever has answered here obeys the other no more.

Without a majority nothing happens by itself: two halves of a run must not both go on. A person can decide (`accept`).
What only the missing peers saw committed is lost; they fetch the state anew when they come.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import CheckpointMismatch
from .journal import Leased, Record, Restored
from .membership import Effect, Send
from .messages import Join, Message, Refused, Represent
from .runstate import RunState, above


@dataclass(frozen=True, slots=True)
class Memory:
    """What one peer knows: the generation that it follows, its last view and run state, the shards that it holds."""

    incarnation: int
    generation: int
    epoch: int
    view: dict[str, int]
    state: RunState
    holding: tuple[int, ...]


class Recovery:
    """Gathers memories, as a pure function of messages, until there are enough."""

    def __init__(self, run: str) -> None:
        self.run = run
        self._memories: dict[str, Memory] = {}
        self._accepted = False

    def receive(self, name: str, message: Message) -> list[Effect]:
        """Every member is asked for what it knows; nobody is admitted yet, and newcomers wait."""
        if message.run != self.run:
            reason = f"this coordinator serves run {self.run!r}"
            return [Send(name, message.incarnation, Refused(run=self.run, error="ConfigurationError", reason=reason))]
        if isinstance(message, Join) and message.view:
            return self._remember(name, message)
        if not message.generation:
            return []
        return [Send(name, message.incarnation, Represent(run=self.run, generation=message.generation, recall=True))]

    def _remember(self, name: str, message: Join) -> list[Effect]:
        """No state: the peer has not entered any outer loop."""
        nothing = RunState(run=self.run, generation=0, epoch=message.epoch, serial=0, tokens=0.0, elapsed=0.0, loops=())
        try:
            state = RunState.from_bytes(message.state) if message.state else nothing
        except CheckpointMismatch:
            return []
        if state.run == self.run:
            self._memories[name] = Memory(
                message.incarnation, message.generation, message.epoch, message.view, state, message.holding
            )
        return []

    def accept(self) -> None:
        """Go on with those that are there: the others are known to be lost, or will fetch the state anew."""
        self._accepted = True

    @property
    def view(self) -> dict[str, int]:
        """The last view that anybody knows: incarnations by name."""
        last = max(self._memories.values(), key=lambda m: (m.generation, m.epoch), default=None)
        return dict(last.view) if last else {}

    @property
    def present(self) -> tuple[str, ...]:
        """Who of that view has answered."""
        return tuple(
            n for n, i in sorted(self.view.items()) if n in self._memories and self._memories[n].incarnation == i
        )

    @property
    def ready(self) -> bool:
        return bool(self._memories) and (self._accepted or 2 * len(self.present) > len(self.view))

    def records(self) -> list[Record]:
        """What the new journal begins with. Shards leased since the last commit stay with whoever holds them."""
        memories = self._memories.values()
        state = max((memory.state for memory in memories), key=lambda state: (state.generation, state.serial))
        generation = above(max(memory.generation for memory in memories))
        reason = f"rebuilt from what {', '.join(self.present)} know"
        records: list[Record] = [Restored(state=state, generation=generation, reason=reason)]
        taken = set(state.data.cursors)
        for name, memory in sorted(self._memories.items()):
            more = tuple(shard for shard in memory.holding if shard >= state.data.next and shard not in taken)
            taken.update(more)
            if more and state.data.samples:
                records.append(Leased(name=name, shards=more))
        return records

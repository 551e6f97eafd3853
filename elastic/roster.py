"""Who is in the view, and how the parts of the coordinator's state machine speak: in effects.

Every part (`membership`, `loops`, `leases`, `deciding`) sends, journals and reports through the one Roster, so that the
order of effects is the order of events. It decides nothing: who is admitted and who departs is for `membership` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from collectives.records import Member

from .journal import Record
from .messages import Message, PeerStatus, Refused


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver `message` to this life of this peer, if it is connected."""

    name: str
    incarnation: int
    message: Message


@dataclass(frozen=True, slots=True)
class Persist:
    """Make the record durable before any Send that follows."""

    record: Record


@dataclass(frozen=True, slots=True)
class Emit:
    """Write an event."""

    event: str
    fields: dict[str, Any]


Effect = Send | Persist | Emit


@dataclass
class MemberState:
    """A member and what is known of it now. Only member, site and life are durable. since: it was admitted, as far as
    this coordinator knows.

    repaired: how often it held other bits than the run, and had to fetch the state anew. wrong: those bits, until it
    has said what it holds instead: messages that still speak of them are on their way. moments: of each loop, the hash
    of what it serves of its inner optimizer, and the version that it held when it first said so. leaving: seconds that
    it has for its last exchange, once it was asked to leave.
    """

    member: Member
    site: str
    life: int
    last_heard: float
    since: float = -math.inf
    silent: bool = False
    status: PeerStatus = field(default_factory=PeerStatus)
    held: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)
    entered: set[str] = field(default_factory=set)
    trains: set[str] = field(default_factory=set)
    exited: set[str] = field(default_factory=set)
    repaired: int = 0
    wrong: dict[tuple[str, int], str] = field(default_factory=dict)
    moments: dict[str, tuple[int, str]] = field(default_factory=dict)
    leaving: float | None = None


class Roster:
    """The members by name, the numbers that stamp every message, and the effects since the last `take`.

    apply: folds a record into the run's durable state. returning: members that may not yet have said, after a restart,
    what they hold; until when that is waited for.
    """

    def __init__(self, run: str, apply: Callable[[Record], None]) -> None:
        self.run = run
        self.generation = self.epoch = 0
        self.members: dict[str, MemberState] = {}
        self.returning: dict[str, float] = {}
        self._apply = apply
        self._effects: list[Effect] = []

    def identities(self) -> dict[str, Member]:
        return {name: state.member for name, state in self.members.items()}

    def awake(self) -> set[str]:
        return {name for name, state in self.members.items() if not state.silent}

    def is_life(self, name: str, incarnation: int | None) -> bool:
        """Whether this very life is in the view."""
        state = self.members.get(name)
        return state is not None and state.member.incarnation == incarnation

    def record(self, record: Record) -> None:
        """The only way to durable state: journal first, then the fold."""
        self._effects.append(Persist(record))
        self._apply(record)

    def stamp(self, kind: type[Any], **fields: Any) -> Any:
        return kind(run=self.run, generation=self.generation, epoch=self.epoch, **fields)

    def send(self, name: str, message: Message) -> None:
        state = self.members.get(name)
        if state is not None:
            self.send_to(name, state.member.incarnation, message)

    def send_to(self, name: str, incarnation: int, message: Message) -> None:
        self._effects.append(Send(name, incarnation, message))

    def broadcast(self, message: Message, but: str = "") -> None:
        for name in self.members:
            if name != but:
                self.send(name, message)

    def refuse(
        self, name: str, message: Message, error: str, reason: str, *, tag: str = "", sequence: int = -1, **more: Any
    ) -> None:
        refused = self.stamp(Refused, error=error, reason=reason, tag=tag, sequence=sequence, **more)
        self.send_to(name, message.incarnation, refused)

    def emit(self, event: str, **fields: Any) -> None:
        self._effects.append(Emit(event, fields))

    def take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

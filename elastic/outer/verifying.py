"""Makes the outer states of a recorded run once more, and finds the first at which a peer held another one.

From a base, each committed result gives the next state by the loop's own rule, under the bit rule: whoever did not hold
these very bits after that round has diverged. What the peers held is in their event logs (`round.applied`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointMismatch
from .recorder import Record, Step
from .state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Divergence:
    """A peer held another state than follows from the rounds. expected, held: state hashes."""

    round: int
    version: int
    peer: str
    expected: str
    held: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """first, last: versions that were recomputed, from the base on. compared: states of peers that were compared, by
    peer. divergences: in the order of rounds; the first of them says where it began. gap: what was not recomputed.
    """

    run: str
    tag: str
    first: int
    last: int
    compared: dict[str, int]
    divergences: tuple[Divergence, ...]
    gap: str = ""

    @property
    def passed(self) -> bool:
        return not self.divergences


Held = dict[int, dict[str, str]]
"""By version: the state hash that each peer held."""


def verify(record: Record, events: Iterable[dict[str, Any]], base: State | None = None) -> Verified:
    """base: where to begin, for instance a checkpoint; else the oldest that was recorded.

    Raises CheckpointMismatch if there is nothing to begin with, or a file is not what was written.
    """
    state = base if base is not None else _oldest(record)
    first, held = state.number, held_by(events, record.loop.tag)
    compared: dict[str, int] = {}
    divergences: list[Divergence] = []
    gap = ""
    for version in (each for each in record.rounds if each > first):
        if version != state.number + 1:
            gap = f"version {state.number + 1} is not in the record"
            if version - 1 not in record.bases:
                break
            state = record.base(version - 1)
        step, mean = record.step(version)
        state = _next(record, state, step, mean)
        told = {record.loop.peer: step.state_hash} | held.get(version, {})
        for peer in told:
            compared[peer] = compared.get(peer, 0) + 1
        divergences += _differing(step, state, told)
    return Verified(
        run=record.loop.run,
        tag=record.loop.tag,
        first=first,
        last=state.number,
        compared=compared,
        divergences=tuple(divergences),
        gap=gap,
    )


def _oldest(record: Record) -> State:
    if not record.bases:
        raise CheckpointMismatch(f"{record.folder}: no base to begin with: give a checkpoint")
    return record.base(record.bases[0])


def _next(record: Record, state: State, step: Step, mean: Any) -> State:
    rule, part = record.loop.rule, record.loop.parts[step.fragment]
    return state.with_part(step.fragment, rule.advance(state.parts[step.fragment], mean, part, step.facts))


def _differing(step: Step, state: State, told: dict[str, str]) -> Iterator[Divergence]:
    for peer, held in sorted(told.items()):
        if held != state.state_hash:
            yield Divergence(round=step.round, version=step.version, peer=peer, expected=state.state_hash, held=held)


def held_by(events: Iterable[dict[str, Any]], tag: str) -> Held:
    """What each peer says that it held after a round, as far as it says so with the loop's tag."""
    found: Held = {}
    for event in events:
        of_loop = event.get("event") == "round.applied" and event.get("tag", tag) == tag
        peer, version, state_hash = (event.get(key) for key in ("peer", "version", "state_hash"))
        if of_loop and isinstance(peer, str) and isinstance(version, int) and isinstance(state_hash, str):
            found.setdefault(version, {})[peer] = state_hash
    return found

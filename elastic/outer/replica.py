"""One peer's copy of an outer loop: what it would send, and what becomes of it. No network, no clock, no thread.

The engine (`engine.py`) drives a replica over the network, the simulator (`simulator.py`) drives several in one
process; both run this code. A round goes `launch` -> (inner steps) -> `land`, or `abort`: then all is as before, but
for the inner steps. At most one round is under way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from .cadence import WHOLE_ROUND
from .compression import Compression
from .feedback import Residual
from .optimizers import norm
from .rule import PLAIN, Facts, Rule
from .state import HOST, Layout, State, Version

PIECE = 1 << 20  # numbers at a time, where what is between two results need not be there as a whole


@dataclass
class Place:
    """What this peer has beside the outer state, of one fragment.

    tokens, steps: trained since it last contributed to it. missed: its rounds since then. residual: of error feedback.
    owed: what was taken out of the local parameters to be sent, and was not counted.
    offset, offset_momentum: by how much an eager peer is ahead of the outer state. pending: its own part of that.
    """

    residual: Residual
    tokens: float = 0.0
    steps: int = 0
    missed: int = 0
    owed: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    offset_momentum: torch.Tensor | None = None
    pending: torch.Tensor | None = None


@dataclass
class Flight:
    """A contribution on its way. delta: how far this peer has moved. payload: what is sent of it. base: the version.

    offered: what error feedback makes of delta; both payload and it are in the host's memory.
    tokens, steps: behind it. age: inner steps since it was launched. length: of the payload before it was scaled to 1.
    """

    fragment: int
    base: State
    delta: torch.Tensor
    payload: torch.Tensor
    offered: torch.Tensor
    weight: float
    tokens: float
    steps: int
    length: float = 0.0
    age: int = 0

    @cached_property
    def finite(self) -> bool:
        """Whether all that it holds are numbers. NaN is both smallest and largest of what holds one."""
        ends = torch.aminmax(self.payload) if self.payload.numel() else ()
        return all(math.isfinite(end) for end in ends)


@dataclass
class Replica:
    """layout: of the model that is trained. share: what part of a mean this peer's contribution is likely to be.

    since: inner steps since the last exchange began. taint: what becomes of a payload on its way out, if that is not
    nothing: faults on purpose.
    """

    layout: Layout
    rule: Rule
    state: State = field(default_factory=lambda: State(()))
    share: float = 1.0
    since: int = 0
    flight: Flight | None = None
    taint: Callable[[torch.Tensor], torch.Tensor] | None = None
    places: list[Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.places = [self._fresh(part.elements) for part in self.layout.parts]

    def _fresh(self, elements: int) -> Place:
        return Place(residual=self.rule.feedback.residual(elements))

    # --- where it begins ----------------------------------------------------------------------------------------------

    def begin(self) -> State:
        """Version 0, made of what the model holds. Nothing changes."""
        return State(tuple(self.rule.begin(self.layout.read(f)) for f in range(len(self.layout.parts))))

    def reset(self) -> None:
        """The model takes the outer parameters; what was learned since, and not counted, is forgotten."""
        self.flight = None
        for f, part in enumerate(self.layout.parts):
            place = self.places[f] = self._fresh(part.elements)
            if self.rule.feedback.slots:
                slot = self.state.parts[f].host.momentum[self.rule.outer.slots * part.elements :]
                place.residual = self.rule.feedback.joined(part.elements, slot)
        self.load_outer()
        self.since = 0

    def cover(self, mean: torch.Tensor, *, facts: Facts = PLAIN) -> None:
        """A round was committed with the contribution of this peer's twin, on the samples that this one has read, too.

        The model takes the outer parameters, as a contributor's would; what was learned from those samples is dropped.
        What a lossy wire has kept back of earlier contributions is still owed.
        """
        self._advance(self.state.next, mean, facts)
        residuals = [place.residual for place in self.places]
        self.reset()
        for place, residual in zip(self.places, residuals, strict=True):
            place.residual = residual

    def load_outer(self) -> None:
        """The outer parameters into the model."""
        for f, version in enumerate(self.state.parts):
            self.layout.write(f, version.parameters)

    # --- inner steps --------------------------------------------------------------------------------------------------

    def stepped(self, tokens: float) -> None:
        """The inner optimizer has made a step, on so many tokens."""
        self.since += 1
        if self.flight:
            self.flight.age += 1
        for place in self.places:
            place.tokens += tokens
            place.steps += 1

    @property
    def landing(self) -> bool:
        """Whether the round under way should be applied now, by the number of steps since it was launched."""
        return self.flight is not None and self.rule.delay != WHOLE_ROUND and self.flight.age >= self.rule.delay

    @property
    def learned(self) -> float:
        """Tokens behind what this peer could give to the next round."""
        return self.places[self.state.next].tokens

    # --- a round ------------------------------------------------------------------------------------------------------

    def launch(self) -> Flight:
        """What this peer gives to the next round. A contribution that is not `finite` must not be sent."""
        f = self.state.next
        place = self.places[f]
        delta = self.layout.read(f)
        torch.sub(self._anchor(f), delta, out=delta)  # in place: fresh memory costs more than the arithmetic
        if place.owed is not None:
            delta.add_(place.owed)
        offered = self.rule.feedback.offered(place.residual, delta.to(HOST))
        length = norm(offered) if self.rule.directional else 0.0
        scaled = torch.div(offered, length) if length > 0 else offered
        payload = self.rule.compression.sent(scaled)
        self.flight = Flight(
            fragment=f,
            base=self.state,
            delta=delta,
            offered=offered,
            payload=payload if self.taint is None else self.taint(payload),
            weight=self.rule.weighting.weight(place.tokens, place.steps, place.missed),
            tokens=place.tokens,
            steps=place.steps,
            length=length,
        )
        if self.flight.finite and self.rule.takes_out:
            self._take_out(f, delta)
        self.since = 0
        return self.flight

    def _take_out(self, f: int, delta: torch.Tensor) -> None:
        place = self.places[f]
        if self.rule.eager:
            pending = torch.mul(delta, self.share)
            news = pending if place.pending is None else torch.sub(pending, place.pending)
            offset = torch.zeros_like(delta) if place.offset is None else place.offset
            momentum = place.offset_momentum
            momentum = delta.new_zeros(self.rule.outer.slots * delta.numel()) if momentum is None else momentum
            place.offset, place.offset_momentum = self.rule.outer.step(offset, momentum, news)
            place.pending = pending
        place.owed = None
        self.layout.write(f, self._anchor(f))

    def abort(self) -> None:
        """The round under way came to nothing here. What was to be sent goes into the next one."""
        flight, self.flight = self.flight, None
        if flight is not None and self.rule.takes_out and flight.finite:
            self.places[flight.fragment].owed = flight.delta

    def land(
        self, mean: torch.Tensor, *, counted: bool, facts: Facts = PLAIN, travelled: Compression | None = None
    ) -> Version:
        """The round was committed: the outer step, and what it does to the model. Returns the version before.

        mean: the committed result, in the host's memory. counted: whether it holds what this peer launched.
        travelled: how, if not as usual.
        """
        flight = self.flight
        assert flight is not None
        if not counted:
            self.abort()
            return self.follow(mean, facts=facts)
        self.flight = None
        before, after = self._advance(flight.fragment, mean, facts)
        self._count(flight, travelled)
        place, f = self.places[flight.fragment], flight.fragment
        if self.rule.takes_out:
            self._move(f, before, after)
        elif self.rule.mix == 0:
            self.layout.write(f, after.parameters)
        elif self.rule.mix != 1:
            self.layout.write(f, self.rule.merge(self.layout.read(f), after.parameters))
        place.missed = 0
        return before

    def follow(self, mean: torch.Tensor, *, facts: Facts = PLAIN) -> Version:
        """A round was committed without this peer: it applies the result, and keeps what it has learned (rule 5)."""
        f = self.state.next
        before, after = self._advance(f, mean, facts)
        self._move(f, before, after)
        self.places[f].missed += 1
        return before

    def count_late(self, flight: Flight, travelled: Compression | None = None) -> None:
        """`follow` has applied a round that held this contribution after all: it must not be given again."""
        self._count(flight, travelled)
        f, place = flight.fragment, self.places[flight.fragment]
        place.missed = 0
        if self.rule.takes_out:
            assert place.owed is not None, "it was given up"
            place.owed = torch.sub(place.owed, flight.delta)
        else:
            self.layout.write(f, torch.add(self.layout.read(f), flight.delta))

    def _count(self, flight: Flight, travelled: Compression | None) -> None:
        place = self.places[flight.fragment]
        place.tokens -= flight.tokens
        place.steps -= flight.steps
        compression = travelled or self.rule.compression
        place.residual = self.rule.feedback.counted(place.residual, flight.offered, flight.delta.to(HOST), compression)

    def _advance(self, f: int, mean: torch.Tensor, facts: Facts) -> tuple[Version, Version]:
        before = self.state.parts[f]
        after = self.rule.advance(before, mean, self.layout.parts[f], facts)
        self.state = self.state.with_part(f, after)
        return before, after

    def _anchor(self, f: int) -> torch.Tensor:
        """Where the local parameters have begun, as the model holds it."""
        outer, offset = self.state.parts[f].parameters, self.places[f].offset
        return self.layout.held(f, outer if offset is None else torch.add(outer, offset))

    def _move(self, f: int, before: Version, after: Version) -> None:
        """The local parameters move along with the outer ones (rule 5): what was learned stays learned."""
        offset = self.places[f].offset
        ends = [v.parameters if offset is None else torch.add(v.parameters, offset) for v in (before, after)]
        old, new = (self.layout.held(f, end) for end in ends)
        local = self.layout.read(f)
        for at in range(0, local.numel(), PIECE):
            local[at : at + PIECE].add_(torch.sub(new[at : at + PIECE], old[at : at + PIECE]))
        self.layout.write(f, local)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All of it, in the host's memory, at any moment: a round under way counts as aborted."""
        flight = self.flight
        owed = [place.owed for place in self.places]
        if flight is not None and self.rule.takes_out:
            owed[flight.fragment] = flight.delta
        parts = [part.host for part in self.state.parts]
        return {
            "parts": [(part.number, part.parameters.clone(), part.momentum.clone()) for part in parts],
            "local": [self.layout.read(f).to(HOST) for f in range(len(self.layout.parts))],
            "places": [_kept(place, left) for place, left in zip(self.places, owed, strict=True)],
            "since": self.since,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse. The state's numbers are copied."""
        self.flight = None
        self.state = State(tuple(Version(n, p.clone(), m.clone()) for n, p, m in state["parts"])).on(self.layout.device)
        for f, local in enumerate(state["local"]):
            self.layout.write(f, local)
        self.places = [_restored(place, self.layout.device) for place in state["places"]]
        self.since = state["since"]


_TENSORS = ("offset", "offset_momentum", "pending", "owed")


def _kept(place: Place, owed: torch.Tensor | None) -> dict[str, Any]:
    tensors = {name: getattr(place, name) for name in _TENSORS} | {"owed": owed}
    plain = {"tokens": place.tokens, "steps": place.steps, "missed": place.missed}
    copies = {name: value if value is None else value.to(HOST, copy=True) for name, value in tensors.items()}
    return plain | copies | {"residual": place.residual.state_dict()}


def _restored(state: dict[str, Any], device: torch.device) -> Place:
    given = {name: state[name] for name in _TENSORS if state[name] is not None}
    copies: dict[str, Any] = state | {name: tensor.to(device, copy=True) for name, tensor in given.items()}
    return Place(**copies | {"residual": Residual.from_state_dict(state["residual"])})

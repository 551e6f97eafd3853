"""Several replicas of an outer loop in one process, in lockstep: the same code as over the network, without one.

For quality studies and property tests, and for trying an algorithm out. What is exchanged goes through the real wire
formats, is summed in the order of the replicas in float32, divided, and rounded once more for the way back, as the
data plane's direct pattern does it; every peer gets the same bits. With a robust rule it goes to all, and is combined;
with fewer than that needs nothing is applied, and what was learned stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from ..rounds import float32, mean_length, scalars
from ..tensors import gathered_in
from .cadence import Cadence, Moment, cadence_of
from .compression import Compression
from .replica import Flight, Replica
from .robust import Contributions, combined, encoded
from .rule import Facts, Rule, check_delay, check_robust
from .state import HOST, Layout


class Simulator:
    """models: one for each replica, equal at first. rule, sync_every, fragments, cut, gather_wire: as for the loops.
    device: of the outer state.

    received: called as received(turn, replica) in the turn-th exchange (skipped ones count): whether that contribution
    arrives; without it, all do. Who is left out keeps what it has learned, as in a run (rule 5). sent: bytes of all
    contributions so far, as they travel.
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        rule: Rule,
        *,
        sync_every: int | str | Cadence = 100,
        fragments: int = 1,
        cut: str = "strided",
        gather_wire: str | None = None,
        buffers: bool = False,
        received: Callable[[int, int], bool] = lambda turn, replica: True,
        max_staleness: int = 4,
        device: torch.device = HOST,
    ) -> None:
        self.rule, self.cadence, self.received = rule, cadence_of(sync_every), received
        check_delay(rule.delay, self.cadence, fragments)
        check_robust(rule, buffers=buffers, gather_wire=gather_wire)
        wire = rule.compression.wire
        self.gather = Compression(wire=(gathered_in(wire) if gather_wire is None else gather_wire) or wire)
        self.max_staleness = max_staleness
        layouts = [Layout(m, fragments=fragments, how=cut, buffers=buffers, device=device) for m in models]
        self.replicas = [Replica(layout, rule) for layout in layouts]
        first = self.replicas[0].begin()
        for replica in self.replicas:
            replica.state, replica.share = first, 1.0 / len(models)
            replica.reset()
        self.sent = 0
        self.rounds: list[tuple[int, tuple[int, ...]]] = []
        self._flights: dict[int, Flight] | None = None

    @property
    def number(self) -> int:
        """Committed rounds."""
        return self.replicas[0].state.number

    def stepped(self, tokens: Iterable[float] | float = 1.0, progress: float = 0.0) -> None:
        """Every replica's inner optimizer has made a step. tokens: of each, or of all alike; 0: it has made none."""
        each = [tokens] * len(self.replicas) if isinstance(tokens, (int, float)) else list(tokens)
        for replica, count in zip(self.replicas, each, strict=True):
            if count:
                replica.stepped(count)
        if self._flights is not None and any(replica.landing for replica in self.replicas):
            self.land()
        if any(self._due(replica, progress) for replica in self.replicas):
            self.exchange(wait=self.rule.delay == 0)

    def _due(self, replica: Replica, progress: float) -> bool:
        fragments = len(replica.layout.parts)
        moment = Moment(round=self.number, fragments=fragments, steps=replica.since, seconds=0.0, progress=progress)
        return self.cadence.due(moment)

    def exchange(self, *, wait: bool = True) -> None:
        """Launches the next round, and lands it unless there is a delay."""
        self.land()
        flights = {i: replica.launch() for i, replica in enumerate(self.replicas) if replica.learned > 0}
        self._flights = flights
        if wait:
            self.land()

    def flush(self) -> None:
        """Exchanges what is left of every fragment, and loads the outer parameters into all models."""
        self.land()
        for _ in self.replicas[0].layout.parts:
            if any(replica.learned > 0 for replica in self.replicas):
                self.exchange()
        for replica in self.replicas:
            replica.load_outer()

    def land(self) -> None:
        """Commits the round under way, if there is one, with those whose contributions arrive."""
        if self._flights is None:
            return
        flights, self._flights = self._flights, None
        turn = len(self.rounds)
        giving = {i: f for i, f in flights.items() if f.weight > 0 and f.finite and self.received(turn, i)}
        self.rounds.append((self.number, tuple(giving)))
        if len(giving) < (self.rule.robust.needs if self.rule.robust else 1):
            for replica in self.replicas:
                replica.abort()
            return
        mean = self._mean(list(giving.values()))
        lengths = [(flight.weight, flight.length) for flight in giving.values()]
        everyone = len(self.replicas)
        mass = float32(sum(flight.weight for flight in giving.values()) / everyone)
        facts = Facts(mean_length(lengths), float32(len(giving) / everyone), mass)
        for i, replica in enumerate(self.replicas):
            self._apply(replica, mean, i in giving, facts, len(giving))

    def _apply(self, replica: Replica, mean: torch.Tensor, counted: bool, facts: Facts, contributors: int) -> None:
        fragment = replica.state.next
        if counted:
            replica.land(mean, counted=True, facts=facts)
        else:
            replica.abort()
            replica.follow(mean, facts=facts)
        replica.share = 1.0 / contributors
        if replica.places[fragment].missed > self.max_staleness:
            replica.reset()

    def _mean(self, flights: list[Flight]) -> torch.Tensor:
        wire = Compression(wire=self.rule.compression.wire)  # what is sent has been rotated by then
        if self.rule.robust:
            return self._combined(flights, wire)
        multipliers, divisor = scalars("mean", (flight.weight for flight in flights))
        total = torch.zeros_like(flights[0].payload)
        for index, (flight, multiplier) in enumerate(zip(flights, multipliers, strict=True)):
            self.sent += wire.size(flight.payload.numel())
            term = torch.mul(wire.approximated(flight.payload), multiplier)
            total = term if index == 0 else torch.add(total, term)
        mean = torch.div(total, divisor) if divisor != 1 else total
        return self.gather.approximated(mean)

    def _combined(self, flights: list[Flight], wire: Compression) -> torch.Tensor:
        assert self.rule.robust is not None
        payloads = [flight.payload for flight in flights]
        self.sent += sum(wire.size(payload.numel()) for payload in payloads)
        given = tuple(encoded(payload, wire.wire) for payload in payloads)
        result = torch.empty_like(payloads[0])
        averaged = self.replicas[0].layout.parts[flights[0].fragment].averaged
        combined(self.rule.robust, Contributions(given, result.numel(), wire.wire), averaged, result)
        return result

"""Who reads which samples, and how far that is committed.

A dataset of n samples is cut into shards of `shard_size` samples. Shards are numbered through the epochs: number
e * S + k is the k-th of S shards in epoch e; in a stream, whose length nobody knows before its end, S is 2**32. A shard
is leased to one peer name at a time; its cursor says how many of its samples stand behind committed rounds. Shards are
small against the dataset and leased as peers run dry, so that fast peers read more and a newcomer finds work at once;
nothing needs to be moved when somebody joins or leaves.

`ShardTable` is the coordinator's pure account; `ShardReader` is a peer's place in the data.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest

from .errors import CheckpointMismatch
from .journal import DatasetRegistered
from .messages import STREAM
from .runstate import DataState

EPOCH_STRIDE = 1 << 32
NO_ENDS: Mapping[int, int] = {}


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the shards lie. samples: in an epoch, or STREAM.

    Order within a shard is a function of (seed, epoch, shard) alone; in a stream it is the stream's own.
    """

    samples: int
    shard_size: int
    seed: int

    @property
    def stream(self) -> bool:
        return self.samples == STREAM

    @property
    def shards_per_epoch(self) -> int:
        return EPOCH_STRIDE if self.stream else math.ceil(self.samples / self.shard_size)

    def epoch(self, shard: int) -> int:
        return shard // self.shards_per_epoch

    def start(self, shard: int) -> int:
        """How many samples of the epoch lie before the shard."""
        return shard % self.shards_per_epoch * self.shard_size

    def size(self, shard: int, ends: Mapping[int, int] = NO_ENDS) -> int:
        """Samples in the shard; the last one of an epoch can be smaller. ends: of a stream's epochs, where known."""
        samples = ends.get(self.epoch(shard)) if self.stream else self.samples
        return self.shard_size if samples is None else max(0, min(self.shard_size, samples - self.start(shard)))

    def order(self, shard: int) -> list[int]:
        """The shard's sample indices in the order in which they are read: a stretch of the epoch's permutation.

        Samples that lie together in the dataset land in different shards, so that no peer sees one corner of it.
        """
        start, epoch = self.start(shard), self.epoch(shard)
        return [permuted(i, self.samples, f"{self.seed}/{epoch}") for i in range(start, start + self.size(shard))]


def permuted(index: int, n: int, key: str) -> int:
    """Where a keyed permutation of range(n) sends `index`: computed, not stored, whatever n is.

    A balanced Feistel network over the next even number of bits, walked until it lands below n (Black and Rogaway,
    "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, section 4).
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(4):
            mixed = xxh3_64_intdigest(f"{key}/{turn}/{right}".encode())
            left, right = right, left ^ (mixed & ((1 << half) - 1))
        index = left << half | right
        if index < n:
            return index


@dataclass
class ShardTable:
    """The coordinator's account of one dataset. A pure value: changed by `lease`, `commit`, `release`, `end` alone.

    ends: how many samples an epoch of a stream turned out to have.
    """

    layout: Layout
    epochs: int
    holders: dict[int, str] = field(default_factory=dict)
    cursors: dict[int, int] = field(default_factory=dict)
    free: set[int] = field(default_factory=set)
    next: int = 0
    committed: int = 0
    ends: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, record: DatasetRegistered) -> ShardTable:
        return cls(Layout(record.samples, record.shard_size, record.seed), record.epochs)

    def state(self) -> DataState:
        """All of it, as a value."""
        layout = self.layout
        return DataState(
            samples=layout.samples,
            shard_size=layout.shard_size,
            seed=layout.seed,
            epochs=self.epochs,
            next=self.next,
            committed=self.committed,
            cursors=dict(self.cursors),
            holders=dict(self.holders),
            free=tuple(sorted(self.free)),
            ends=dict(self.ends),
        )

    @classmethod
    def restored(cls, state: DataState) -> ShardTable | None:
        """The inverse of `state()`; None for a run without data."""
        if not state.samples:
            return None
        layout = Layout(state.samples, state.shard_size, state.seed)
        return cls(
            layout,
            state.epochs,
            holders=dict(state.holders),
            cursors=dict(state.cursors),
            free={*state.free},
            next=state.next,
            committed=state.committed,
            ends=dict(state.ends),
        )

    @property
    def spent(self) -> bool:
        """Whether every sample of every epoch is committed."""
        if not self.layout.stream:
            return 0 < self.epochs * self.layout.samples <= self.committed
        return 0 < self.epochs <= len(self.ends) and sum(self.ends.values()) <= self.committed

    def held_by(self, name: str) -> list[int]:
        return sorted(shard for shard, holder in self.holders.items() if holder == name)

    def offer(self, but: Set[int] = frozenset()) -> int | None:
        """The shard that the next lease should be: one given back before a fresh one; None if the data is spent.

        but: shards that cannot be given now.
        """
        if self.free - but:
            return min(self.free - but)
        fresh, epoch = self.next, self.layout.epoch(self.next)
        if self.layout.size(fresh, self.ends) == 0:
            epoch += 1
            fresh = epoch * self.layout.shards_per_epoch
        return fresh if not self.epochs or epoch < self.epochs else None

    def lease(self, name: str, shards: tuple[int, ...]) -> None:
        """Shards that are passed over are free: after a journal was lost, nobody may know who had them."""
        for shard in shards:
            for between in self._passed_over(shard):
                self.free.add(between)
                self.cursors.setdefault(between, 0)
            self.holders[shard] = name
            self.free.discard(shard)
            self.cursors.setdefault(shard, 0)
            self.next = max(self.next, shard + 1)

    def _passed_over(self, shard: int) -> Iterator[int]:
        """From `next` up to the shard, all that have samples."""
        each = self.layout.shards_per_epoch
        for epoch in range(self.layout.epoch(self.next), self.layout.epoch(shard) + 1):
            known = epoch in self.ends or not self.layout.stream
            count = math.ceil(self.ends.get(epoch, self.layout.samples) / self.layout.shard_size) if known else 0
            stop = shard if epoch == self.layout.epoch(shard) else epoch * each + count
            yield from range(max(self.next, epoch * each), stop)

    def commit(self, cursors: dict[int, int]) -> None:
        """Moves cursors forward, never back; a shard read to its end is closed."""
        for shard, position in cursors.items():
            before = self.cursors.get(shard)
            if before is None or position <= before:
                continue
            size = self.layout.size(shard, self.ends)
            self.cursors[shard] = min(position, size)
            self.committed += self.cursors[shard] - before
            if position >= size:
                self._close(shard)

    def can_end(self, epoch: int, samples: int) -> bool:
        """Whether that epoch of the stream was leased beyond so many samples, and is committed up to them at most."""
        if not self.layout.stream or epoch != self.layout.epoch(self.next - 1):
            return False
        first = epoch * self.layout.shards_per_epoch
        begun = range(self.next - 1, first - 1, -1)
        done = next((shard for shard in begun if shard not in self.cursors), None)  # closed: read to its end
        ends = [self.layout.start(shard) + self.cursors[shard] for shard in begun if self.cursors.get(shard)]
        last = max([*ends, 0 if done is None else self.layout.start(done) + self.layout.shard_size])
        return last <= samples and 0 < samples < len(begun) * self.layout.shard_size

    def end(self, epoch: int, samples: int) -> None:
        """That epoch of the stream has this many samples: shards beyond them are no more."""
        self.ends[epoch] = samples
        for shard in [shard for shard in self.cursors if self.layout.epoch(shard) == epoch]:
            if self.cursors[shard] >= self.layout.size(shard, self.ends):
                self._close(shard)

    def _close(self, shard: int) -> None:
        self.holders.pop(shard, None)
        self.free.discard(shard)
        del self.cursors[shard]

    def release(self, name: str) -> None:
        for shard in self.held_by(name):
            del self.holders[shard]
            self.free.add(shard)


class Stretch(NamedTuple):
    """Samples of a shard, from position `start` up to `stop`, in the order in which they are read."""

    shard: int
    start: int
    stop: int


@dataclass(slots=True)
class _Place:
    """One leased shard. committed: how far the run has counted it. cursor: all before it is committed or stepped.

    handed: from here on nothing was ever handed out. beyond: what is stepped beyond a gap, ascending and apart.
    """

    committed: int
    cursor: int
    handed: int
    beyond: list[tuple[int, int]] = field(default_factory=list)

    def count(self, start: int, stop: int) -> None:
        self.beyond = sorted([*self.beyond, (start, stop)])
        while self.beyond and self.beyond[0][0] <= self.cursor:
            self.cursor = max(self.cursor, self.beyond.pop(0)[1])

    def counted(self) -> list[tuple[int, int]]:
        """What is stepped and not committed."""
        return [(a, b) for a, b in ((self.committed, self.cursor), *self.beyond) if a < b]


class ShardReader:
    """A peer's place in its leased shards: what it has handed out, and what has been stepped.

    A sample counts once its optimizer step is done. Batches are stepped in the order in which they were handed out;
    between the two they are in flight (whoever loads them may run ahead of the training) and cannot be called back.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.ends: dict[int, int] = {}
        self.steps = 0
        self._places: dict[int, _Place] = {}
        self._again: list[Stretch] = []
        self._flight: deque[Stretch | None] = deque()  # None: of a shard that this reader has lost
        self._spoiled = False

    def add(self, shards: Mapping[int, int]) -> None:
        """Takes over leases; the cursor is where reading begins. Known shards stay as they are."""
        for shard, cursor in shards.items():
            if shard not in self._places:
                self._places[shard] = _Place(cursor, cursor, cursor)

    # --- handing out --------------------------------------------------------------------------------------------------

    def take(self, size: int) -> Stretch | None:
        """The next at most `size` samples, from one shard, are in flight from now on; None when nothing is left.

        What has to be read again comes first, so that what is counted becomes whole soon.
        """
        if self._again:
            shard, start, stop = self._again.pop(0)
            if stop - start > size:
                self._again.insert(0, Stretch(shard, start + size, stop))
        else:
            shard = next((each for each in self if self._places[each].handed < self._size(each)), -1)
            if shard < 0:
                return None
            start, stop = self._places[shard].handed, self._size(shard)
            self._places[shard].handed = min(stop, start + size)
        stretch = Stretch(shard, start, min(stop, start + size))
        self._flight.append(stretch)
        return stretch

    def batch(self, size: int) -> list[int]:
        """`take` as indices of a dataset that has them; empty when nothing is left to hand out."""
        stretch = self.take(size)
        return self.indices(stretch) if stretch else []

    def indices(self, stretch: Stretch) -> list[int]:
        return list(_order(self.layout, stretch.shard)[stretch.start : stretch.stop])

    def left(self) -> int:
        """Samples leased and to be handed out, for the first time or again."""
        fresh = sum(self._size(shard) - place.handed for shard, place in self._places.items())
        return fresh + sum(stop - start for _, start, stop in self._again)

    @property
    def in_flight(self) -> int:
        """Batches handed out and not stepped."""
        return len(self._flight)

    def give_back(self) -> None:
        """What is in flight never arrives: it will be handed out again."""
        self._read_again(stretch for stretch in self._flight if stretch)
        self._flight.clear()

    def _read_again(self, stretches: Iterable[Stretch]) -> None:
        merged: list[Stretch] = []
        for stretch in sorted([*self._again, *stretches]):
            if merged and merged[-1].shard == stretch.shard and merged[-1].stop == stretch.start:
                stretch = merged.pop()._replace(stop=stretch.stop)
            merged.append(stretch)
        self._again = []
        for stretch in merged:
            place = self._places[stretch.shard]
            if stretch.stop == place.handed:  # nothing follows it: as if it had never been handed out
                place.handed = stretch.start
            else:
                self._again.append(stretch)

    def _size(self, shard: int) -> int:
        return self.layout.size(shard, self.ends)

    # --- counting -----------------------------------------------------------------------------------------------------

    def stepped(self, batches: int | None = None) -> int:
        """Counts the oldest `batches` in flight, or all of them, as used; returns how many samples that added."""
        self.steps += 1
        added = 0
        for _ in range(len(self._flight) if batches is None else min(batches, len(self._flight))):
            stretch = self._flight.popleft()
            if stretch is None:
                self._spoiled = True
            else:
                self._places[stretch.shard].count(stretch.start, stretch.stop)
                added += stretch.stop - stretch.start
        return added

    @property
    def whole(self) -> bool:
        """Whether what has been stepped since the last commit is, in each shard, all from there up to the cursor."""
        return not self._spoiled and not any(place.beyond for place in self._places.values())

    @property
    def spoiled(self) -> bool:
        """Whether what has been stepped holds samples that are not this reader's to count; only `rewind` mends that."""
        return self._spoiled and None not in self._flight

    @property
    def cursors(self) -> dict[int, int]:
        return {shard: place.cursor for shard, place in self._places.items()}

    @property
    def starts(self) -> dict[int, int]:
        """For each shard held, how many of its samples the run has committed, as far as this reader knows."""
        return {shard: place.committed for shard, place in self._places.items()}

    @property
    def holding(self) -> tuple[int, ...]:
        return tuple(sorted(self._places))

    def forget(self, cursors: Mapping[int, int]) -> None:
        """The run has committed these positions; shards that are committed to their end are dropped."""
        for shard, position in cursors.items():
            place = self._places.get(shard)
            if place is not None:
                place.committed = max(place.committed, position)
                if place.committed >= self._size(shard):
                    del self._places[shard]

    # --- when things go otherwise -------------------------------------------------------------------------------------

    def rewind(self, committed: Mapping[int, int]) -> None:
        """Goes back to committed positions: what was stepped beyond them is read again, after what is in flight.

        committed: the shards that are held. Any other is somebody else's now, or done.
        """
        self.retain({shard for shard, position in committed.items() if position <= self.cursors.get(shard, position)})
        self._spoiled = False
        for shard, place in self._places.items():
            undone = [(committed[shard], place.cursor), *place.beyond]
            place.committed = place.cursor = committed[shard]
            place.beyond = []
            self._read_again(Stretch(shard, start, stop) for start, stop in undone if start < stop)
        self.add(committed)

    def retain(self, held: Container[int]) -> None:
        """Drops the shards that are not held any more; what is in flight of them, or stepped, must not be counted."""
        for shard in [shard for shard in self._places if shard not in held]:
            place = self._places.pop(shard)
            self._spoiled |= bool(place.counted())
            self._again = [stretch for stretch in self._again if stretch.shard != shard]
            self._flight = deque(None if each and each.shard == shard else each for each in self._flight)

    def unfinished(self) -> set[int]:
        """Shards of which something is still to be stepped."""
        return {shard for shard, place in self._places.items() if place.cursor < self._size(shard)}

    def end(self, epoch: int, samples: int) -> bool:
        """That epoch of the stream has this many samples. False if more of them have been stepped here."""
        self.ends[epoch] = samples
        self._flight = deque(each and self._clipped(each) for each in self._flight)
        self._flight = deque(each for each in self._flight if each is None or each.start < each.stop)
        self._again = [each for each in map(self._clipped, self._again) if each.start < each.stop]
        ours = [shard for shard in self if self.layout.epoch(shard) == epoch]
        if any(place.cursor > self._size(s) or place.beyond[-1:] > [(self._size(s), 0)] for s, place in self._of(ours)):
            return False
        for shard, place in self._of(ours):
            place.handed = min(place.handed, self._size(shard))
            if place.committed >= self._size(shard):
                del self._places[shard]
        return True

    def _clipped(self, stretch: Stretch) -> Stretch:
        return stretch._replace(stop=min(stretch.stop, self._size(stretch.shard)))

    def _of(self, shards: Iterable[int]) -> list[tuple[int, _Place]]:
        return [(shard, self._places[shard]) for shard in shards]

    # --- keeping ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What is committed, stepped and handed out of each shard; plain values. Defined at any moment."""
        layout = self.layout
        return {
            "layout": [layout.samples, layout.shard_size, layout.seed],
            "ends": [[epoch, samples] for epoch, samples in self.ends.items()],
            "spoiled": self._spoiled,
            "shards": [
                [shard, place.committed, place.handed, [list(each) for each in place.counted()]]
                for shard, place in self._places.items()
            ],
        }

    def load_state_dict(self, state: dict[str, Any], held: Mapping[int, int]) -> None:
        """Restores `state_dict()`; what was in flight is handed out again. held: the leases as they are now.

        Where the run has gone on since, its account holds: then what had been stepped is `spoiled`. Raises
        CheckpointMismatch for another dataset; then nothing changes.
        """
        ours = [self.layout.samples, self.layout.shard_size, self.layout.seed]
        if list(state["layout"]) != ours:
            raise CheckpointMismatch(
                f"the state's (samples, shard_size, seed) are {state['layout']}, this peer's are {ours}"
            )
        self._places, self._again, self._flight = {}, [], deque()
        self.ends = dict(state["ends"])
        self._spoiled = state["spoiled"]
        for shard, committed, handed, counted in state["shards"]:
            if held.get(shard) == committed:
                self._restore(shard, committed, handed, counted)
            else:
                self._spoiled |= bool(counted)
        self.add(held)

    def _restore(self, shard: int, committed: int, handed: int, counted: list[list[int]]) -> None:
        place = self._places[shard] = _Place(committed, committed, handed)
        position = committed
        for start, stop in [*counted, [handed, handed]]:
            if position < start:
                self._read_again([Stretch(shard, position, start)])
            if start < stop:
                place.count(start, stop)
            position = stop

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._places))


@lru_cache(maxsize=16)
def _order(layout: Layout, shard: int) -> list[int]:
    return layout.order(shard)

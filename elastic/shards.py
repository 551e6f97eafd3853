"""Who reads which samples, and how far that is committed.

A dataset of n samples is cut into shards of `shard_size` samples. Shards are numbered through the epochs: number
e * S + k is the k-th of S shards in epoch e. A shard is leased to one peer name at a time; its cursor says how many of
its samples stand behind committed rounds. Shards are small against the dataset and leased as peers run dry, so that
fast peers read more and a newcomer finds work at once; nothing needs to be moved when somebody joins or leaves.

`ShardTable` is the coordinator's pure account; `ShardReader` is a peer's place in the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from dataclasses import dataclass, field

from xxhash import xxh3_64_intdigest

from .journal import DatasetRegistered
from .runstate import DataState


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the shards lie. Order within a shard is a function of (seed, epoch, shard) alone."""

    samples: int
    shard_size: int
    seed: int

    @property
    def shards_per_epoch(self) -> int:
        return math.ceil(self.samples / self.shard_size)

    def size(self, shard: int) -> int:
        """Samples in the shard; the last one of an epoch can be smaller."""
        return min(self.shard_size, self.samples - self._start(shard))

    def order(self, shard: int) -> list[int]:
        """The shard's sample indices in the order in which they are read: a stretch of the epoch's permutation.

        Samples that lie together in the dataset land in different shards, so that no peer sees one corner of it.
        """
        start, epoch = self._start(shard), shard // self.shards_per_epoch
        return [permuted(i, self.samples, f"{self.seed}/{epoch}") for i in range(start, start + self.size(shard))]

    def _start(self, shard: int) -> int:
        return shard % self.shards_per_epoch * self.shard_size


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
    """The coordinator's account of one dataset. A pure value: changed by `lease`, `commit`, `release` alone."""

    layout: Layout
    epochs: int
    holders: dict[int, str] = field(default_factory=dict)
    cursors: dict[int, int] = field(default_factory=dict)
    free: set[int] = field(default_factory=set)
    next: int = 0
    committed: int = 0

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
        )

    @classmethod
    def restored(cls, state: DataState) -> ShardTable | None:
        """The inverse of `state()`; None for a run without data."""
        if not state.samples:
            return None
        layout = Layout(state.samples, state.shard_size, state.seed)
        table = cls(layout, state.epochs, dict(state.holders), dict(state.cursors), {*state.free})
        table.next, table.committed = state.next, state.committed
        return table

    def held_by(self, name: str) -> list[int]:
        return sorted(shard for shard, holder in self.holders.items() if holder == name)

    def offer(self, but: Set[int] = frozenset()) -> int | None:
        """The shard that the next lease should be: one given back before a fresh one; None if the data is spent.

        but: shards that cannot be given now.
        """
        if self.free - but:
            return min(self.free - but)
        fresh_left = not self.epochs or self.next < self.epochs * self.layout.shards_per_epoch
        return self.next if fresh_left else None

    def lease(self, name: str, shards: tuple[int, ...]) -> None:
        """Shards that are passed over are free: after a journal was lost, nobody may know who had them."""
        for shard in shards:
            for between in range(self.next, shard):
                self.free.add(between)
                self.cursors.setdefault(between, 0)
            self.holders[shard] = name
            self.free.discard(shard)
            self.cursors.setdefault(shard, 0)
            self.next = max(self.next, shard + 1)

    def commit(self, cursors: dict[int, int]) -> None:
        """Moves cursors forward, never back; a shard read to its end is closed."""
        for shard, position in cursors.items():
            before = self.cursors.get(shard)
            if before is None or position <= before:
                continue
            size = self.layout.size(shard)
            self.cursors[shard] = min(position, size)
            self.committed += self.cursors[shard] - before
            if position >= size:
                self._close(shard)

    def _close(self, shard: int) -> None:
        self.holders.pop(shard, None)
        self.free.discard(shard)
        del self.cursors[shard]

    def release(self, name: str) -> None:
        for shard in self.held_by(name):
            del self.holders[shard]
            self.free.add(shard)


class ShardReader:
    """A peer's place in its leased shards: what it has handed out, and what has been stepped.

    A sample counts once its optimizer step is done: `stepped()` moves the cursors to all that was handed out so far.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._orders: dict[int, list[int]] = {}
        self._handed: dict[int, int] = {}
        self._cursors: dict[int, int] = {}

    def add(self, shards: dict[int, int]) -> None:
        """Takes over leases; the cursor is where reading begins. Known shards stay as they are."""
        for shard, cursor in shards.items():
            if shard not in self._orders:
                self._orders[shard] = self.layout.order(shard)
                self._handed[shard] = self._cursors[shard] = cursor

    def batch(self, size: int) -> list[int]:
        """The next at most `size` sample indices, from one shard; empty when nothing is left to hand out."""
        for shard in sorted(self._orders):
            start = self._handed[shard]
            indices = self._orders[shard][start : start + size]
            if indices:
                self._handed[shard] = start + len(indices)
                return indices
        return []

    def left(self) -> int:
        """Samples leased and not yet handed out."""
        return sum(len(order) - self._handed[shard] for shard, order in self._orders.items())

    def stepped(self) -> int:
        """Counts everything handed out as used; returns how many samples that added."""
        added = sum(self._handed.values()) - sum(self._cursors.values())
        self._cursors = dict(self._handed)
        return added

    @property
    def cursors(self) -> dict[int, int]:
        return dict(self._cursors)

    @property
    def holding(self) -> tuple[int, ...]:
        return tuple(sorted(self._orders))

    def forget(self, cursors: dict[int, int]) -> None:
        """Drops shards whose end has been committed by `cursors`."""
        for shard, position in cursors.items():
            order = self._orders.get(shard)
            if order is not None and position >= len(order):
                del self._orders[shard], self._handed[shard], self._cursors[shard]

    def rewind(self, committed: dict[int, int]) -> None:
        """Goes back to committed positions: what was read beyond them is read again."""
        for shard, position in committed.items():
            if shard in self._orders:
                self._handed[shard] = self._cursors[shard] = position

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._orders))

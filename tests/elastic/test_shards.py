"""Every sample is leased, read and committed once, whoever reads it."""

from __future__ import annotations

import itertools
import json
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.journal import DatasetRegistered
from elastic.messages import STREAM
from elastic.shards import Layout, ShardReader, ShardTable, Stretch, permuted

fixed = settings(derandomize=True, deadline=None)
layouts = st.builds(Layout, st.integers(1, 60), st.integers(1, 20), st.integers(0, 5))


def table_of(layout: Layout, epochs: int = 1) -> ShardTable:
    return ShardTable.of(
        DatasetRegistered(samples=layout.samples, shard_size=layout.shard_size, seed=layout.seed, epochs=epochs)
    )


@fixed
@given(layout=layouts, epoch=st.integers(0, 3))
def test_the_shards_of_an_epoch_hold_each_sample_once(layout: Layout, epoch: int) -> None:
    count = layout.shards_per_epoch
    orders = [layout.order(shard) for shard in range(epoch * count, (epoch + 1) * count)]
    assert sorted(index for order in orders for index in order) == list(range(layout.samples))
    assert [len(order) for order in orders] == [layout.size(epoch * count + i) for i in range(count)]


def test_the_order_is_a_function_of_seed_epoch_and_shard() -> None:
    layout = Layout(100, 10, 7)
    assert layout.order(3) == Layout(100, 10, 7).order(3) != layout.order(13) != Layout(100, 10, 8).order(13)


@fixed
@given(layout=layouts, epochs=st.integers(1, 3), names=st.lists(st.sampled_from("abc"), max_size=60))
def test_leasing_ends_after_the_last_epoch_and_no_shard_has_two_holders(
    layout: Layout, epochs: int, names: list[str]
) -> None:
    table, given_out = table_of(layout, epochs), list[int]()
    for name in names:
        shard = table.offer()
        if shard is None:
            break
        given_out.append(shard)
        table.lease(name, (shard,))
    total = epochs * layout.shards_per_epoch
    assert given_out == list(range(min(len(names), total)))
    assert (table.offer() is None) == (len(given_out) == total)
    assert sorted(shard for name in "abc" for shard in table.held_by(name)) == given_out


def test_zero_epochs_never_end() -> None:
    table = table_of(Layout(4, 2, 0), epochs=0)
    for shard in range(50):
        table.lease("a", (shard,))
    assert table.offer() == 50


def test_released_shards_go_first_and_keep_their_cursor() -> None:
    table = table_of(Layout(40, 10, 0))
    table.lease("a", (0,))
    table.lease("b", (1,))
    table.commit({0: 4})
    table.release("a")
    assert table.offer() == 0 and table.cursors[0] == 4
    assert table.offer(but={0}) == 2
    table.lease("b", (0,))
    assert table.held_by("b") == [0, 1] and not table.free


@fixed
@given(moves=st.lists(st.dictionaries(st.integers(-1, 5), st.integers(-5, 25)), max_size=20))
def test_cursors_never_go_back_and_never_beyond_the_end(moves: list[dict[int, int]]) -> None:
    table = table_of(Layout(35, 10, 0))
    for shard in range(4):
        table.lease("a", (shard,))
    for move in moves:
        before, count = dict(table.cursors), table.committed
        table.commit(move)
        assert all(table.cursors.get(shard, 99) >= position for shard, position in before.items())
        assert table.committed >= count
    open_shards = sum(table.cursors.values())
    closed = sum(table.layout.size(shard) for shard in range(4) if shard not in table.cursors)
    assert table.committed == open_shards + closed <= 35


def test_a_shard_read_to_its_end_is_closed_for_good() -> None:
    table = table_of(Layout(20, 10, 0))
    table.lease("a", (0,))
    table.commit({0: 10})
    table.commit({0: 3})
    assert table.held_by("a") == [] and table.cursors == {} and table.committed == 10
    table.release("a")
    assert table.offer() == 1


@fixed
@given(layout=layouts, sizes=st.lists(st.integers(1, 9), max_size=40))
def test_a_reader_hands_out_each_sample_once(layout: Layout, sizes: list[int]) -> None:
    reader, seen = ShardReader(layout), Counter[int]()
    shards = dict.fromkeys(range(layout.shards_per_epoch), 0)
    reader.add(shards)
    for size in sizes:
        batch = reader.batch(size)
        assert len(batch) <= size and (batch or not reader.left())
        seen.update(batch)
    assert max(seen.values(), default=1) == 1
    assert reader.left() == layout.samples - seen.total()
    assert reader.stepped() == seen.total() == sum(reader.cursors.values()) and reader.stepped() == 0


def test_a_reader_begins_at_the_cursor_and_counts_only_what_was_stepped() -> None:
    layout = Layout(20, 10, 1)
    reader = ShardReader(layout)
    reader.add({0: 4})
    assert reader.batch(3) == layout.order(0)[4:7] and reader.cursors == {0: 4}
    assert reader.stepped() == 3 and reader.cursors == {0: 7}
    reader.add({0: 0})
    assert reader.cursors == {0: 7}, "a shard that is known stays as it is"


def test_a_reader_rewinds_to_what_was_committed() -> None:
    layout = Layout(20, 10, 1)
    reader = ShardReader(layout)
    reader.add({0: 0, 1: 0})
    first = reader.batch(6)
    reader.stepped()
    reader.rewind({0: 2, 1: 0})
    assert reader.batch(4) == first[2:] and reader.cursors == {0: 2, 1: 0}


def test_a_reader_forgets_what_is_committed_to_the_end() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0, 1: 0})
    reader.forget({0: 10, 1: 9, 7: 3})
    assert reader.holding == (1,) and list(reader) == [1] and reader.left() == 10


# --- a loader that runs ahead ---


def test_only_the_oldest_in_flight_are_counted() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0})
    for _ in range(3):
        reader.batch(3)
    assert reader.stepped(2) == 6 and reader.cursors == {0: 6} and reader.in_flight == 1
    assert reader.stepped(2) == 3 and reader.in_flight == 0 and reader.stepped(2) == 0


def test_after_a_rewind_what_was_stepped_comes_again_behind_what_is_in_flight() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0})
    for _ in range(4):
        reader.take(2)
    reader.stepped(2)
    reader.rewind({0: 1})
    assert reader.whole and reader.cursors == {0: 1} and reader.in_flight == 2
    assert reader.take(9) == (0, 1, 4) and reader.take(9) == (0, 8, 10)
    assert reader.stepped(2) == 4 and not reader.whole and reader.cursors == {0: 1}
    assert reader.stepped(1) == 3 and reader.whole and reader.cursors == {0: 8}


def test_what_is_given_back_is_handed_out_again() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0, 1: 0})
    first = reader.take(4)
    reader.stepped(1)
    second, third = reader.take(6), reader.take(7)
    reader.give_back()
    assert reader.in_flight == 0 and [reader.take(6), reader.take(7)] == [second, third]
    assert (first, second, third) == ((0, 0, 4), (0, 4, 10), (1, 0, 7))


def test_what_is_in_flight_of_a_lost_shard_counts_for_nothing_and_is_undone() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0, 1: 0})
    for _ in range(3):
        reader.take(5)
    reader.stepped(1)
    reader.retain({1})
    assert reader.holding == (1,) and not reader.whole and not reader.spoiled, "more of it is to come"
    assert reader.stepped(1) == 0 and reader.spoiled
    assert reader.stepped(1) == 5 and reader.spoiled and reader.cursors == {1: 5}
    reader.rewind({1: 0, 2: 3})
    assert reader.whole and not reader.spoiled and reader.cursors == {1: 0, 2: 3}


def test_who_is_told_that_more_is_committed_than_it_has_stepped_starts_there() -> None:
    reader = ShardReader(Layout(20, 10, 1))
    reader.add({0: 0})
    reader.take(2)
    reader.rewind({0: 4})
    assert reader.cursors == {0: 4} and reader.stepped() == 0, "what is in flight is somebody else's"


class Reading:
    """One peer and the table. learned: the samples behind its next proposal; done: those that were committed."""

    def __init__(self) -> None:
        self.layout = Layout(23, 6, 1)
        self.table, self.reader = table_of(self.layout), ShardReader(self.layout)
        self.flight: list[Stretch | None] = []
        self.learned: Counter[tuple[int, int]] = Counter()
        self.done: Counter[tuple[int, int]] = Counter()

    def held(self) -> dict[int, int]:
        fresh = self.table.offer()
        if fresh is not None and len(self.table.held_by("a")) < 2:
            self.table.lease("a", (fresh,))
        return {shard: self.table.cursors[shard] for shard in self.table.held_by("a")}

    def take(self, number: int) -> None:
        self.reader.add(self.held())
        stretch = self.reader.take(number)
        if stretch:
            self.flight.append(stretch)

    def step(self, number: int) -> None:
        stepped, self.flight = self.flight[:number], self.flight[number:]
        new = [(each.shard, i) for each in stepped if each for i in range(each.start, each.stop)]
        assert self.reader.stepped(number) == len(new)
        self.learned.update(new)
        if None in stepped and None not in self.flight:
            assert self.reader.spoiled
            self.rewind(0)

    def commit(self, number: int) -> None:
        if not self.reader.whole:
            return
        cursors, starts = self.reader.cursors, self.reader.starts
        assert self.learned == Counter((s, i) for s, stop in cursors.items() for i in range(starts[s], stop))
        self.done += self.learned
        self.learned.clear()
        self.table.commit(cursors)
        self.reader.forget(cursors)

    def rewind(self, number: int) -> None:
        self.learned.clear()
        self.reader.rewind(self.held())

    def give_back(self, number: int) -> None:
        self.flight.clear()
        self.reader.give_back()

    def lose(self, number: int) -> None:
        """Its shards are given to somebody else, who gives them back."""
        self.reader.retain(())
        self.flight = [None for _ in self.flight]
        if self.reader.spoiled or not self.flight:
            self.rewind(0)

    def save(self, number: int) -> None:
        self.flight.clear()
        state, self.reader = json.loads(json.dumps(self.reader.state_dict())), ShardReader(self.layout)
        self.reader.load_state_dict(state, self.held())
        if self.reader.spoiled:
            self.rewind(0)


moves = st.tuples(st.sampled_from(["take", "take", "step", "commit", "rewind", "give_back", "lose", "save"]),
                  st.integers(1, 4))  # fmt: skip


@settings(derandomize=True, deadline=None, max_examples=500)
@given(moves=st.lists(moves, max_size=80))
def test_whatever_happens_each_sample_is_committed_once(moves: list[tuple[str, int]]) -> None:
    reading = Reading()
    for move, number in moves:
        getattr(reading, move)(number)
    while not reading.table.spent:
        reading.take(4)
        reading.step(1 if reading.reader.left() else 99)
        reading.commit(0)
    assert len(reading.done) == 23 and set(reading.done.values()) == {1}


# --- streams ---


def test_shards_of_a_stream_are_numbered_apart_from_each_other_for_ever() -> None:
    layout = Layout(STREAM, 10, 0)
    table = table_of(layout, epochs=2)
    for shard in range(3):
        assert table.offer() == shard
        table.lease("a", (shard,))
    table.commit({0: 10, 1: 4})
    assert table.can_end(0, 14) and not table.can_end(0, 13) and not table.can_end(0, 31) and not table.can_end(1, 9)
    table.end(0, 14)
    assert table.held_by("a") == [] and not table.spent and table.offer() == 1 << 32
    table.lease("b", (1 << 32,))
    table.end(1, 3)
    table.commit({1 << 32: 3})
    assert table.spent and table.offer() is None and table.committed == 17


def test_a_closed_shard_says_how_long_a_stream_is_at_least() -> None:
    table = table_of(Layout(STREAM, 10, 0))
    for shard in range(2):
        table.lease("a", (shard,))
    table.commit({1: 10})
    assert not table.can_end(0, 19) and not table.can_end(-1, 5)


def test_a_reader_learns_where_the_stream_ends() -> None:
    reader = ShardReader(Layout(STREAM, 10, 0))
    reader.add({1: 0, 2: 0})
    reader.take(4), reader.take(4)
    assert reader.end(0, 16) and reader.holding == (1,) and reader.left() == 0
    assert reader.stepped() == 6 and reader.cursors == {1: 6}
    assert not reader.end(0, 15), "it has stepped the sixteenth"


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(1, 1500), st.text(max_size=8))
def test_the_permutation_of_an_epoch_hits_every_sample_once(n: int, key: str) -> None:
    assert sorted(permuted(i, n, key) for i in range(n)) == list(range(n))


def test_neighbours_in_the_dataset_land_far_apart() -> None:
    layout = Layout(samples=100_000, shard_size=128, seed=0)
    order = sorted(layout.order(7))
    gaps = [b - a for a, b in itertools.pairwise(order)]
    assert max(gaps) < 100_000 / 128 * 12 and order[0] < 10_000 and order[-1] > 90_000

"""A peer's data: leases, what is handed out to the training script, and what of it counts.

Batches are counted in the order in which they were handed out, as optimizer steps are made; so whoever loads them may
run ahead. What is in flight (handed out and not stepped) cannot be called back. When the peer goes back to the
committed positions, what had been stepped is therefore handed out again *behind* what is in flight. Until it has been
stepped again, there is a gap in what would be counted, and the peer proposes nothing (`whole`).

A shard is lost to others only with the membership, and the proposals of a life gone by are refused: what it had in
flight is never counted, and the next life begins at the committed positions. Should a living peer ever be told that a
shard is not its own any more, or load a state that the run has passed, then what it has stepped holds samples that are
not its to count (`spoiled`): it starts over from the outer parameters.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset, Sampler, default_collate

from .errors import ConfigurationError, ParityError
from .messages import STREAM, LeaseRequest, Leases
from .operations import Inbox
from .shards import Layout, ShardReader, Stretch

if TYPE_CHECKING:
    from .peer import Peer


class Data:
    """What `Peer.shards`, `Peer.sampler` and the outer loops stand on. One dataset a peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.inbox: Inbox = queue.SimpleQueue()
        self._lock = threading.RLock()  # a loader may ask for batches in another thread than the one that trains
        self._reader: ShardReader | None = None
        self._request: LeaseRequest | None = None
        self._questions = 0
        self._tokens_per_sample = 1
        self._batches_per_step: int | None = None
        self._pass: object = None
        self._given_back = -1

    # --- passes -------------------------------------------------------------------------------------------------------

    def open(self, dataset: Any, layout: Layout, epochs: int) -> ShardReader:
        if layout.shard_size < 1 or epochs < 0 or not (layout.stream or layout.samples > 0):
            raise ConfigurationError(
                f"samples {layout.samples}, shard_size {layout.shard_size}, epochs {epochs}: all must be above 0 "
                "(epochs may be 0: without end)"
            )
        if self._reader is not None and self._reader.layout != layout:
            raise ConfigurationError("this peer reads another dataset already: one dataset per peer")
        self._reader = self._reader or ShardReader(layout)
        self._tokens_per_sample = int(getattr(dataset, "tokens_per_sample", 1))
        self._request = LeaseRequest(
            run=self._peer.run, samples=layout.samples, shard_size=layout.shard_size, seed=layout.seed, epochs=epochs
        )
        return self._reader

    def batches(self, batch_size: int, batches_per_step: int | None = None) -> Iterator[Stretch]:
        """One pass: until the run is over, or nothing more can be handed out before what is in flight is stepped.

        batch_size: of each rank; a stretch is for all of them. batches_per_step: how many the next optimizer step
        counts; None for all that is in flight.
        """
        ranks = self._peer.ranks
        leased = self._batches(batch_size * ranks.size, batches_per_step)
        while (stretch := ranks.together("batch", lambda: next(leased, None))) is not None:
            yield stretch

    def _batches(self, batch_size: int, batches_per_step: int | None) -> Iterator[Stretch]:
        reader, this = self._begin_pass(batches_per_step), self._pass
        first = True
        while not self._peer.ending:
            if self._pass is not this:
                raise ConfigurationError("another pass over this peer's data has begun: go on with that one")
            # what a departed peer has given back is found by asking again before the end
            spent = reader.left() < batch_size and self.lease()
            with self._lock:
                stretch = reader.take(batch_size)
            if stretch:
                first = False
                yield stretch
            elif self._is_over(reader, spent, first):
                break
            else:
                self._idle()
        self._pass = None

    def _idle(self) -> None:
        """What is left depends on others: on a round under way, or on what a lost peer did not commit."""
        for give in list(self._peer.when_idle):
            give()
        self._peer.ranks.tick()
        self._peer.pause()

    def _begin_pass(self, batches_per_step: int | None) -> ShardReader:
        reader = self._reader
        assert reader is not None
        with self._lock:
            if self._pass is not None:  # the last one was broken off: nobody will deliver what is in flight
                reader.give_back()
            self._pass, self._batches_per_step = object(), batches_per_step
        return reader

    def _is_over(self, reader: ShardReader, spent: bool, first: bool) -> bool:
        """There is nothing to hand out: whether the pass ends, or waits for what others may lose."""
        if not self._peer.when_idle:
            return spent
        return bool(reader.in_flight) and not (first and self._take_back(reader))

    def _take_back(self, reader: ShardReader) -> bool:
        """The last pass has delivered everything, and part of it was not stepped: that is handed out once more."""
        with self._lock:
            if reader.steps == self._given_back:
                raise ConfigurationError(
                    f"{reader.in_flight} batches were handed out twice without an optimizer step; "
                    f"batches_per_step is {self._batches_per_step}: step at the end of a pass, too"
                )
            self._given_back = reader.steps
            reader.give_back()
        return True

    def indices(self, batch_size: int, batches_per_step: int | None = None) -> Iterator[list[int]]:
        for stretch in self.batches(batch_size, batches_per_step):
            assert self._reader is not None
            yield self._peer.ranks.share(self._reader.indices(stretch))

    def collated(self, dataset: Any, batch_size: int) -> Iterator[Any]:
        for indices in self.indices(batch_size):
            yield default_collate([dataset[index] for index in indices])

    def streamed(self, dataset: Any, batch_size: int) -> Iterator[Any]:
        stream, reader = _Stream(dataset), self._reader
        assert reader is not None
        for stretch in self.batches(batch_size):
            epoch, first = reader.layout.epoch(stretch.shard), reader.layout.start(stretch.shard) + stretch.start
            samples = stream.read(epoch, first, stretch.stop - stretch.start)
            if len(samples) < stretch.stop - stretch.start:
                self._reached_end(epoch, stream.position)
            if samples:
                yield default_collate(self._peer.ranks.share(samples))

    def _reached_end(self, epoch: int, samples: int) -> None:
        """Tells the coordinator how long this epoch of the stream was; returns once it is durable."""
        if samples == 0:
            raise ConfigurationError(f"epoch {epoch} of the stream has no samples")
        assert self._request is not None
        self._request = dataclasses.replace(self._request, ends=self._request.ends | {epoch: samples})
        self._learn_ends({epoch: samples})
        self._peer.ranks.together("end of stream", self.lease)  # all ranks come to it

    # --- leases -------------------------------------------------------------------------------------------------------

    def lease(self) -> bool:
        """Takes on the next shards; returns whether there are none."""
        reader = self._reader
        assert reader is not None
        leases = self.ask()
        self._learn_ends(leases.ends)
        with self._lock:
            reader.retain(leases.shards.keys() | (set(reader) - reader.unfinished()))
            reader.add(leases.shards)
        return leases.spent

    def _learn_ends(self, ends: dict[int, int]) -> None:
        assert self._reader is not None
        for epoch, samples in ends.items():
            with self._lock:
                if not self._reader.end(epoch, samples):
                    raise ParityError(
                        f"epoch {epoch} of the stream ended after {samples} samples on another peer, and has more on "
                        f"peer {self._peer.name}: it must be the same on all peers",
                        peer=self._peer.name,
                    )

    def ask(self, *, more: bool = True) -> Leases:
        assert self._request is not None and self._reader is not None
        # a question that was asked twice is answered twice, and the second answer must not pass for a later one's
        self._questions += 1
        request = dataclasses.replace(self._request, holding=self._reader.holding, sequence=self._questions, more=more)
        answer = self._peer.ask(request, self.inbox, Leases, self._peer.timeouts.round)
        assert isinstance(answer, Leases)
        return answer

    # --- for outer loops ----------------------------------------------------------------------------------------------

    def stepped(self) -> float:
        if self._reader is None:
            return 1.0
        with self._lock:
            return float(self._reader.stepped(self._batches_per_step) * self._tokens_per_sample)

    @property
    def whole(self) -> bool:
        with self._lock:
            return self._reader is None or self._reader.whole

    @property
    def spoiled(self) -> bool:
        with self._lock:
            return self._reader is not None and self._reader.spoiled

    @property
    def cursors(self) -> dict[int, int]:
        with self._lock:
            return self._reader.cursors if self._reader else {}

    @property
    def holding(self) -> tuple[int, ...]:
        with self._lock:
            return self._reader.holding if self._reader else ()

    @property
    def starts(self) -> dict[int, int]:
        with self._lock:
            return self._reader.starts if self._reader else {}

    def committed(self, cursors: dict[int, int]) -> None:
        if self._reader:
            with self._lock:
                self._reader.forget(cursors)

    def rewind(self) -> None:
        if self._reader:
            shards = self.ask(more=False).shards  # one that goes back often must not lay in a store
            with self._lock:
                self._reader.rewind(shards)

    # --- keeping ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where this peer is in the data: plain values, defined at any moment. Empty before any data is opened.

        Of several ranks, the leader's is the one to keep.
        """
        with self._lock:
            return self._reader.state_dict() if self._reader else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()` once the same data is opened; asks the coordinator what still holds.

        What was in flight is handed out again. Where the run has gone on, its account wins. Raises CheckpointMismatch
        for other data; then nothing changes.
        """
        if self._reader is None:
            raise ConfigurationError("open the data first: make the sampler, or begin with peer.shards(...)")
        self._peer.ranks.together("load data", lambda: self._load(state))

    def _load(self, state: dict[str, Any]) -> None:
        held = self.ask().shards
        with self._lock:
            assert self._reader is not None
            self._reader.load_state_dict(state, held)
            self._pass = None


class ShardSampler(Sampler[list[int]]):
    """Batches of sample indices for a DataLoader; made by `Peer.sampler`, which says how it is used."""

    def __init__(self, data: Data, batch_size: int, batches_per_step: int) -> None:
        self._data, self.batch_size, self.batches_per_step = data, batch_size, batches_per_step

    def __iter__(self) -> Iterator[list[int]]:
        return self._data.indices(self.batch_size, self.batches_per_step)

    def state_dict(self) -> dict[str, Any]:
        """What is committed, stepped and handed out; what the DataLoader has prefetched counts as not handed out."""
        return self._data.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict()`, between two passes.

        Where the run has gone on since, its committed positions hold, and an outer loop starts over from the outer
        parameters if it had learned from what others have counted. Raises CheckpointMismatch for other data.
        """
        self._data.load_state_dict(state)


class _Stream:
    """One iterator over a stream that can only go forward; to go back, it begins again."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._samples: Iterator[Any] = iter(())
        self._epoch, self.position, self._skipped = -1, 0, False

    def read(self, epoch: int, first: int, count: int) -> list[Any]:
        """Samples `first` to `first + count` of the epoch; fewer if it ends before, and then `position` is its end."""
        if epoch != self._epoch or first < self.position:
            self._begin(epoch, first)
        samples = self._take(first, count)
        if not samples and self._skipped:  # the end may lie before what was skipped: find it
            self._begin(epoch, 0)
            samples = self._take(first, count)
        self._skipped = False
        return samples

    def _begin(self, epoch: int, first: int) -> None:
        self._epoch, self.position = epoch, 0
        source = _at_epoch(self._dataset, epoch)
        self._skipped = first > 0 and hasattr(source, "skip")
        if self._skipped:
            source, self.position = _at_epoch(source.skip(first), epoch), first
        self._samples = iter(source)

    def _take(self, first: int, count: int) -> list[Any]:
        for _ in islice(self._samples, first - self.position):
            self.position += 1
        samples = list(islice(self._samples, count)) if self.position == first else []
        self.position += len(samples)
        return samples


def _at_epoch(dataset: Any, epoch: int) -> Any:
    if hasattr(dataset, "set_epoch"):
        dataset.set_epoch(epoch)
    return dataset


def is_stream(dataset: Any) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__")


def layout_of(dataset: Any, batch_size: int, shard_size: int | None, seed: int) -> Layout:
    """Raises ConfigurationError for a batch size below 1."""
    if batch_size < 1:
        raise ConfigurationError(f"batch_size is {batch_size}: it must be at least 1")
    samples = STREAM if is_stream(dataset) else len(dataset)
    return Layout(samples, 16 * batch_size if shard_size is None else shard_size, seed)

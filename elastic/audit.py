"""Whether every sample counts once: an account of the data over the journal's records, apart from the coordinator's.

A commit says, for each shard, from where to where its contributions reach. Laid side by side, these stretches must
cover a shard from its beginning without gap or overlap, whoever held it and however often it changed hands.

A sample counts with the first round after its step, whichever fragment that exchanges. The other fragments get what was
learned from it in the rounds that follow, unless its peer is lost before: at most one period of that peer, which is
counted as `partial` (rule 8 of docs/design.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .journal import (
    Committed,
    DatasetRegistered,
    Departed,
    Leased,
    LoopFounded,
    Record,
    Released,
    Restored,
    StreamEnded,
)
from .messages import STREAM, AuditReport, EpochReport, ShardReport
from .runstate import RunState
from .shards import Layout

COMPLETE_SHOWN = 8


@dataclass(slots=True)
class _Shard:
    """mark: where its next contribution must begin."""

    epoch: int
    holder: str
    mark: int = 0


@dataclass(slots=True)
class _Epoch:
    committed: int = 0
    twice: int = 0
    missing: int = 0
    partial: int = 0


class Account:
    """Takes records one by one; `report` is the account as of now. Shards that are done cost no memory.

    owed: by loop, peer, fragment and epoch, samples that count and whose effect that fragment has not had yet.
    """

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._ends: dict[int, int] = {}
        self._epochs: defaultdict[int, _Epoch] = defaultdict(_Epoch)
        self._shards: dict[int, _Shard] = {}
        self._fragments: dict[str, int] = {}
        self._owed: dict[tuple[str, str, int, int], int] = {}

    def take(self, record: Record) -> None:
        match record:
            case DatasetRegistered():
                self._layout = Layout(record.samples, record.shard_size, record.seed)
            case StreamEnded():
                self._ends[record.epoch] = record.samples
                self._drop_done()
            case Leased():
                self._leased(record)
            case Released():
                for shard in self._held_by(record.name):
                    shard.holder = ""
            case Departed():
                self._departed(record)
            case LoopFounded():
                self._fragments[record.tag] = record.spec.fragments
            case Restored():
                self._restored(record.state)
            case Committed() if self._layout:
                for number, stop in record.cursors.items():
                    self._committed(record, number, record.starts.get(number), stop)
                self._given(record)

    def _restored(self, state: RunState) -> None:
        """What was counted later is void. What single fragments had not had by then is not known any more."""
        data = state.data
        self._layout = Layout(data.samples, data.shard_size, data.seed) if data.samples else None
        self._ends, self._fragments = dict(data.ends), {loop.tag: loop.spec.fragments for loop in state.loops}
        self._epochs.clear()
        self._owed.clear()
        self._shards = {
            number: _Shard(self._epoch_of(number), data.holders.get(number, ""), cursor)
            for number, cursor in data.cursors.items()
        }
        for epoch in range(self._epoch_of(data.next - 1) + 1 if data.next else 0):
            unread = (self._size(n) - shard.mark for n, shard in self._shards.items() if shard.epoch == epoch)
            self._epochs[epoch].committed = self._begun(epoch, data.next) - sum(unread)

    def _begun(self, epoch: int, next: int) -> int:
        """Samples of the epoch in shards below `next`."""
        assert self._layout is not None, "there is data where shards were leased"
        shards = min(next - epoch * self._layout.shards_per_epoch, self._layout.shards_per_epoch)
        leased, whole = shards * self._layout.shard_size, self._samples(epoch)
        return leased if whole == STREAM else min(leased, whole)

    def _leased(self, record: Leased) -> None:
        for number in record.shards:
            shard = self._shards.setdefault(number, _Shard(self._epoch_of(number), record.name))
            shard.holder = record.name

    def _departed(self, record: Departed) -> None:
        """What a peer gave to some fragments only, nobody gives to the others any more."""
        for key in [key for key in self._owed if key[1] == record.name]:
            self._epochs[key[3]].partial += self._owed.pop(key)

    def _committed(self, record: Committed, number: int, start: int | None, stop: int) -> None:
        shard, epoch = self._shards.get(number), self._epochs[self._epoch_of(number)]
        size = self._size(number)
        if shard is None:  # it was never leased, or is done
            epoch.twice += max(0, stop - (stop if start is None else start))
            return
        start = shard.mark if start is None else start
        epoch.twice += max(0, min(shard.mark, stop) - start) + max(0, stop - max(size, start))
        skipped = max(0, start - shard.mark)
        epoch.missing += skipped
        stop = max(shard.mark, min(stop, size))
        added = stop - shard.mark - skipped
        epoch.committed += added
        self._owe(record, shard, added)
        shard.mark = stop
        if stop >= size:
            del self._shards[number]

    def _owe(self, record: Committed, shard: _Shard, samples: int) -> None:
        for fragment in range(self._fragments.get(record.tag, 1)):
            if samples and fragment != self._moved(record):
                key = record.tag, shard.holder, fragment, shard.epoch
                self._owed[key] = self._owed.get(key, 0) + samples

    def _given(self, record: Committed) -> None:
        """The fragment of this round has all that its contributors have learned."""
        for key in list(self._owed):
            if key[0] == record.tag and key[2] == self._moved(record) and key[1] in record.contributors:
                del self._owed[key]

    def _moved(self, record: Committed) -> int:
        """Which fragment the round has exchanged."""
        return (record.version - 1) % self._fragments.get(record.tag, 1)

    def _drop_done(self) -> None:
        for number, shard in list(self._shards.items()):
            if shard.mark >= self._size(number):
                del self._shards[number]

    def _held_by(self, name: str) -> list[_Shard]:
        return [shard for shard in self._shards.values() if shard.holder == name]

    def _epoch_of(self, number: int) -> int:
        return self._layout.epoch(number) if self._layout else 0

    def _size(self, number: int) -> int:
        return self._layout.size(number, self._ends) if self._layout else 0

    def report(self) -> tuple[EpochReport, ...]:
        """Every epoch of which a shard was leased, in order."""
        numbers = sorted(self._epochs.keys() | {shard.epoch for shard in self._shards.values()})
        return tuple(self._report(number) for number in numbers)

    def _report(self, number: int) -> EpochReport:
        epoch = self._epochs[number]
        return EpochReport(
            epoch=number,
            samples=self._samples(number),
            committed=epoch.committed,
            twice=epoch.twice,
            missing=epoch.missing,
            partial=epoch.partial,
            open=tuple(
                ShardReport(shard=each, holder=shard.holder, cursor=shard.mark)
                for each, shard in sorted(self._shards.items())
                if shard.epoch == number and shard.mark < self._size(each)
            ),
        )

    def _samples(self, epoch: int) -> int:
        samples = self._layout.samples if self._layout else 0
        return self._ends.get(epoch, STREAM) if samples == STREAM else samples


def audit(records: Iterable[Record]) -> tuple[EpochReport, ...]:
    """The account of all these records, oldest first: a report for each epoch that was begun."""
    account = Account()
    for record in records:
        account.take(record)
    return account.report()


def summary(run: str, epochs: tuple[EpochReport, ...], **stamp: int) -> AuditReport:
    """The epochs in one report: all that are under way, and the newest complete ones."""
    complete = [epoch for epoch in epochs if epoch.complete]
    shown = {id(epoch) for epoch in complete[-COMPLETE_SHOWN:]}
    return AuditReport(
        run=run,
        epochs=tuple(epoch for epoch in epochs if not epoch.complete or id(epoch) in shown),
        committed=sum(epoch.committed for epoch in epochs),
        twice=sum(epoch.twice for epoch in epochs),
        missing=sum(epoch.missing for epoch in epochs),
        partial=sum(epoch.partial for epoch in epochs),
        **stamp,
    )

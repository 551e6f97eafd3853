"""The account of the data: what it finds in journals that are in order, and in ones that are not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.records import Member
from elastic.audit import audit, summary
from elastic.journal import (
    Admitted,
    Committed,
    DatasetRegistered,
    Departed,
    Leased,
    LoopFounded,
    Record,
    Released,
    StreamEnded,
)
from elastic.messages import STREAM, EpochReport, OperationSpec, ShardReport

SPEC = OperationSpec(op="mean", dtype="float32", elements=8, wire="f32")


def dataset(samples: int = 20, *, epochs: int = 1) -> DatasetRegistered:
    return DatasetRegistered(samples=samples, shard_size=10, seed=0, epochs=epochs)


def commit(**shards: tuple[int, int]) -> Committed:
    """commit(s0=(2, 5)): shard 0 from 2 to 5."""
    return commit_to(1, **shards)


def commit_to(version: int, by: str = "a", **shards: tuple[int, int]) -> Committed:
    spans = {int(name[1:]): span for name, span in shards.items()}
    starts, cursors = ({shard: span[end] for shard, span in spans.items()} for end in (0, 1))
    fields: dict[str, Any] = {"tag": "outer", "round": 0, "attempt": 0, "fragment": 0, "tokens": 1.0, "digest": "d"}
    return Committed(**fields, version=version, contributors=(by,), cursors=cursors, starts=starts)


def only(*records: Record) -> EpochReport:
    (report,) = audit(records)
    return report


def faults(report: EpochReport) -> tuple[int, int, int]:
    return report.twice, report.missing, report.partial


@settings(derandomize=True, deadline=None)
@given(cuts=st.lists(st.integers(0, 20), max_size=8), leavers=st.lists(st.booleans(), min_size=10, max_size=10))
def test_stretches_that_tile_the_data_count_once_whoever_held_it(cuts: list[int], leavers: list[bool]) -> None:
    records: list[Record] = [dataset(), Leased(name="a", shards=(0, 1))]
    edges = sorted({0, 10, 20, *cuts})
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        shard = start // 10
        records.append(commit(**{f"s{shard}": (start - 10 * shard, stop - 10 * shard)}))
        if leavers[number]:
            records += [Departed(name="a", incarnation=number, reason="left"), Released(name="a")]
            records += [Leased(name="a", shards=tuple(s for s in (0, 1) if stop < 10 * s + 10))]
    report = only(*records)
    assert report.complete and faults(report) == (0, 0, 0) and report.open == ()


def test_what_overlaps_counts_twice_and_what_was_skipped_is_missing() -> None:
    begun = [dataset(), Leased(name="a", shards=(0, 1)), commit(s0=(0, 6))]
    assert faults(only(*begun, commit(s0=(4, 8)))) == (2, 0, 0)
    assert faults(only(*begun, commit(s0=(7, 8)))) == (0, 1, 0)
    assert only(*begun, commit(s0=(7, 8))).committed == 7
    assert faults(only(*begun, commit(s0=(6, 13)))) == (3, 0, 0), "there is no sample 10 to 12 in this shard"
    assert faults(only(*begun, commit(s0=(6, 10)), commit(s0=(9, 10)))) == (1, 0, 0), "it is done"
    assert faults(audit([*begun, commit(s5=(0, 3))])[-1]) == (3, 0, 0), "nobody was ever given it"
    skipping = only(*begun, commit(s0=(8, 10)), commit(s1=(0, 10)))
    assert not skipping.complete and (skipping.committed, skipping.missing) == (18, 2)


def test_open_shards_are_named_with_their_holders() -> None:
    records = [dataset(), Leased(name="a", shards=(0,)), Leased(name="b", shards=(1,)), commit(s0=(0, 4), s1=(0, 3))]
    report = only(*records, Released(name="b"))
    assert report.open == (ShardReport(shard=0, holder="a", cursor=4), ShardReport(shard=1, holder="", cursor=3))
    assert report.committed == 7 and not report.complete


def test_who_is_lost_between_two_fragments_leaves_a_part_and_that_is_counted() -> None:
    """Rule 8's one exception; with one fragment it cannot be."""

    def begun(fragments: int) -> list[Record]:
        return [
            Admitted(member=Member(name="a", incarnation=1, addresses=()), site="s", life=1),
            LoopFounded(tag="outer", spec=replace(SPEC, fragments=fragments), fragment=0, state_hash="h"),
            dataset(),
            Leased(name="a", shards=(0,)),
            commit_to(1, s0=(0, 4)),
            commit_to(2, s0=(4, 6)),
        ]

    lost = [Departed(name="a", incarnation=1, reason="gone"), Leased(name="b", shards=(0,))]
    assert faults(only(*begun(3))) == (0, 0, 0), "it can still give the rest"
    all_given = [commit_to(3, s0=(6, 7)), commit_to(4), commit_to(5)]
    assert faults(only(*begun(3), *all_given, *lost)) == (0, 0, 0), "each fragment has had everything"
    by_another = commit_to(3, by="b", s0=(6, 10))
    assert faults(only(*begun(3), *lost, by_another)) == (0, 0, 2 + 6), "fragment 0 misses 2 samples, fragment 2 all 6"
    assert faults(only(*begun(3), *lost, commit_to(3, by="b", s0=(4, 10)))) == (2, 0, 8), "somebody gave some again"
    assert faults(only(*begun(1), *lost, commit_to(3, by="b", s0=(6, 10)))) == (0, 0, 0)


def test_a_stream_is_complete_once_its_end_is_known() -> None:
    begun = [dataset(STREAM), Leased(name="a", shards=(0,)), commit(s0=(0, 7)), Leased(name="b", shards=(1, 2))]
    assert only(*begun).samples == STREAM and not only(*begun).complete
    report = only(*begun, StreamEnded(epoch=0, samples=7))
    assert report.complete and report.open == ()


def test_the_summary_keeps_what_is_under_way_and_the_newest() -> None:
    leased = [Leased(name="a", shards=(shard,)) for shard in range(24)]
    done = [commit(**{f"s{shard}": (0, 10)}) for shard in range(24) if shard != 3]
    report = summary("r", audit([dataset(epochs=12), *leased, *done]), generation=3)
    assert [epoch.epoch for epoch in report.epochs] == [1, 4, 5, 6, 7, 8, 9, 10, 11]
    assert (report.committed, report.passed, report.generation) == (230, True, 3)


def test_a_journal_without_data_has_no_epochs() -> None:
    assert audit([commit()]) == ()

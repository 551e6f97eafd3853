"""Bookkeeping of ranges: whatever is asked, lost, repeated and brought, no byte is forgotten and none counted twice."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from collectives.ranges import Ranges, Span

STEPS = st.lists(st.tuples(st.sampled_from(["take", "repeat", "release", "land", "land late"]), st.integers(1, 40)))


@given(st.integers(0, 200), STEPS)
def test_every_byte_comes_exactly_once(size: int, steps: list[tuple[str, int]]) -> None:
    ranges = Ranges(size)
    flying: list[Span] = []
    released: list[Span] = []
    held = bytearray(size)

    def land(span: Span) -> None:
        if ranges.land(span):
            assert not any(held[span[0] : span[1]]), "counted twice"
            held[span[0] : span[1]] = b"\1" * (span[1] - span[0])

    for what, number in steps:
        pick = number % len(flying) if flying else None
        if what == "take":
            span = ranges.take(number)
            if span is not None:
                assert 0 < span[1] - span[0] <= number and not any(held[span[0] : span[1]])
                flying.append(span)
        elif what == "land late" and released:
            land(released.pop(number % len(released)))
        elif pick is None:
            continue
        elif what == "repeat" and ranges.askers(flying[pick]):
            ranges.repeat(flying[pick])
            flying.append(flying[pick])
        elif what == "release":
            ranges.release(flying[pick])
            released.append(flying.pop(pick))
        elif what == "land":
            land(flying.pop(pick))
        on_their_way = sum(end - begin for begin, end in set(flying) if ranges.askers((begin, end)))
        assert ranges.here == sum(held)
        assert ranges.here + ranges.waiting + on_their_way == size
        assert ranges.prefix == (held.index(0) if 0 in held else size)
    ranges.release_all()
    while (span := ranges.take(7)) is not None:
        land(span)
    assert ranges.complete and all(held)

"""Messages survive the wire unchanged; anything else is a MessageError and nothing more."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic.journal import RECORDS
from elastic.messages import (
    FROM_COORDINATOR,
    FROM_PEERS,
    MAX_INTEGER,
    MAX_MESSAGE_BYTES,
    Applied,
    MessageError,
    Pong,
    decode,
    encode,
)

KINDS: dict[str, type] = {**FROM_PEERS, **FROM_COORDINATOR, **RECORDS}
fixed = settings(derandomize=True, deadline=None)
PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(max_size=6),
    int: st.integers(-MAX_INTEGER, MAX_INTEGER),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
    bytes: st.binary(max_size=6),
}


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Whatever the schema allows for a field."""
    if typing.get_origin(hint) is tuple:
        return st.lists(values(typing.get_args(hint)[0]), max_size=2).map(tuple)
    if typing.get_origin(hint) is dict:
        key, item = typing.get_args(hint)
        return st.dictionaries(values(key), values(item), max_size=2)
    return built(hint) if dataclasses.is_dataclass(hint) else PLAIN[hint]


def built(kind: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values(hints[field.name]) for field in dataclasses.fields(kind)})


any_message = st.sampled_from(sorted(KINDS)).flatmap(lambda name: built(KINDS[name]))
any_value = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=4) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner),
    max_leaves=6,
)


def only_refuses(data: bytes) -> None:
    try:
        assert type(decode(data, KINDS)).__name__ in KINDS
    except MessageError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_message_and_record_makes_the_round_trip(name: str) -> None:
    @settings(max_examples=20, derandomize=True, deadline=None)
    @given(message=built(KINDS[name]))
    def round_trip(message: Any) -> None:
        assert decode(encode(message), KINDS) == message

    round_trip()


@fixed
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    only_refuses(data)


@fixed
@given(value=any_value)
def test_any_msgpack_that_is_no_message_is_refused(value: Any) -> None:
    only_refuses(msgpack.packb(value))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(message=any_message, where=st.integers(0, 10**6), byte=st.integers(0, 255), how=st.integers(0, 2))
def test_mutated_bytes_are_refused_or_still_a_message(message: Any, where: int, byte: int, how: int) -> None:
    data = bytearray(encode(message))
    position = where % len(data)
    if how == 0:
        data[position] = byte
    elif how == 1:
        del data[position:]
    else:
        data.insert(position, byte)
    only_refuses(bytes(data))


@settings(max_examples=300, derandomize=True, deadline=None)
@given(message=any_message, where=st.integers(0, 50), value=any_value)
def test_a_field_of_another_type_is_refused(message: Any, where: int, value: Any) -> None:
    body = msgpack.unpackb(encode(message), strict_map_key=False)
    body[sorted(body)[where % len(body)]] = value
    only_refuses(msgpack.packb(body))


@pytest.mark.parametrize(
    "body, says",
    [
        ([1], "not a map"),
        ({"type": 3}, "not a map"),
        ({"type": "Nobody"}, "unknown message type 'Nobody'"),
        ({"type": "Pong", "run": "r"}, "Pong.progress is missing"),
        ({"type": "Pong", "run": 7, "progress": {}}, "Pong.run is int, not str"),
        ({"type": "Pong", "run": "r", "progress": []}, "Pong.progress is no map"),
        ({"type": "Pong", "run": "r", "generation": True, "progress": {}}, "generation is bool, not int"),
        ({"type": "Pong", "run": "r", "generation": 1 << 63, "progress": {}}, "larger than"),
        ({"type": "Leases", "run": "r", "shards": {"x": 1}}, "Leases.shards is str, not int"),
    ],
)
def test_what_is_wrong_is_said(body: Any, says: str) -> None:
    with pytest.raises(MessageError, match=says):
        decode(msgpack.packb(body), KINDS)


def test_unknown_fields_are_ignored_and_integers_pass_for_floats() -> None:
    data = {"type": "Heartbeat", "run": "r", "status": {"loss": 3, "new": 1}, "later": [1, 2]}
    assert decode(msgpack.packb(data), FROM_PEERS).status.loss == 3.0


def test_a_message_of_the_other_direction_is_refused() -> None:
    applied = encode(Applied(run="r", tag="t", fragment=0, version=0, state_hash="h"))
    with pytest.raises(MessageError, match="unknown message type"):
        decode(applied, FROM_COORDINATOR)


def test_a_message_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(MessageError, match="at most"):
        decode(b"\xc1" * (MAX_MESSAGE_BYTES + 1), KINDS)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(MessageError):
        decode(b"\x91" * 100_000 + b"\xc0", KINDS)


def test_the_two_directions_share_no_name() -> None:
    assert not FROM_PEERS.keys() & FROM_COORDINATOR.keys() and Pong.__name__ in FROM_COORDINATOR

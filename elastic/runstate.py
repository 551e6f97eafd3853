"""The small run state: what a coordinator must know to go on with a run.

It travels with every commit of an outer loop (docs/design.md, rule 13), so that peers together can rebuild a lost
journal, and lies in every checkpoint, so that a version comes back with exactly the data positions that belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import CheckpointMismatch
from .messages import MessageError, OperationSpec, decode, encode

LINEAGE = 1 << 20
"""A rebuilt run begins at the next multiple of this: its generations are above all that the lost coordinator could
still count to, should it come back."""


def above(generation: int, skipped: int = 0) -> int:
    """The first number of the next lineage, or of one further on."""
    return (generation // LINEAGE + 1 + skipped) * LINEAGE


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopState:
    """An outer loop after `rounds` rounds. versions, hashes: of each fragment; "" where the hash is not yet known.

    digests: of the results that led to these versions.
    """

    tag: str
    spec: OperationSpec
    rounds: int
    versions: dict[int, int]
    hashes: dict[int, str]
    digests: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class DataState:
    """Where the data stands. samples 0: the run has no dataset. Shards below `next` that have no cursor are read.

    The other fields are those of `shards.ShardTable`.
    """

    samples: int = 0
    shard_size: int = 1
    seed: int = 0
    epochs: int = 0
    next: int = 0
    committed: int = 0
    cursors: dict[int, int] = field(default_factory=dict)
    holders: dict[int, str] = field(default_factory=dict)
    free: tuple[int, ...] = ()
    ends: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """As of one commit. serial counts the durable decisions of a run; elapsed: seconds that it has been served.

    teams: of twins, by the names of peers; shards are held by these (`DataState.holders`).
    """

    run: str
    generation: int
    epoch: int
    serial: int
    tokens: float
    elapsed: float
    loops: tuple[LoopState, ...]
    data: DataState = field(default_factory=DataState)
    teams: dict[str, str] = field(default_factory=dict)

    def loop(self, tag: str) -> LoopState | None:
        return next((loop for loop in self.loops if loop.tag == tag), None)

    def to_bytes(self) -> bytes:
        return encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> RunState:
        """The inverse of `to_bytes`. Raises CheckpointMismatch for anything else."""
        try:
            state: RunState = decode(data, {cls.__name__: cls})
        except MessageError as error:
            raise CheckpointMismatch(f"this is no run state: {error}") from None
        return state

"""An outer loop's checkpoints: what it has to offer when it enters a run, and what it writes while training goes on.

The outer state is the same on all peers: where they share a place, one of them writes it, another one each time. What
belongs to one peer (inner optimizer, random generators, its place in the round) each writes for itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..checkpoints import Checkpoints, Snapshot
from ..checkpoints.entries import Entry, Outer, Refused
from ..checkpoints.manifest import Manifest
from ..checkpoints.portable import portable
from ..checkpoints.writer import Writer, WriterStatistics
from ..errors import CheckpointMismatch, ConfigurationError
from ..messages import Commit, OperationSpec
from ..runstate import RunState
from .local import Local
from .state import Layout, State

if TYPE_CHECKING:
    from ..peer import Peer

LAST_SECONDS = 120.0  # how long the end of a loop waits for what is still being written


@dataclass(frozen=True, slots=True)
class Due:
    """A version that may be written. state: the run state as of the commit that made it, encoded."""

    version: State
    state: bytes
    mine: bool


class Saver:
    """Checkpoints of one outer loop on one peer. Nothing here raises while training goes on; see `statistics`."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        peer: Peer,
        tag: str,
        spec: OperationSpec,
        layout: Layout,
        local: Local,
    ) -> None:
        self.checkpoints, self._peer, self._spec = checkpoints, peer, spec
        self._layout, self._local = layout, local
        self._store = checkpoints.store(peer.run, tag, check=peer.faults.check_disk if peer.faults else None)
        self._writer = Writer(self._failed)
        self._last: Due | None = None
        self._saved = -1

    # --- reading ------------------------------------------------------------------------------------------------------

    def newest(self) -> Outer | None:
        """The newest checkpoint that is whole and belongs to this loop; what is not is said by name.

        Raises ConfigurationError if the place cannot be read: beginning anew by mistake would be worse.
        """
        try:
            return self._store.newest(
                algorithm=self._spec.algorithm,
                fingerprint=self._layout.fingerprint,
                rank=history_of,
                refused=self._refuse,
            )
        except OSError as error:
            raise ConfigurationError(f"cannot read the checkpoints at {self.checkpoints.url}: {error}") from None

    def restore(self, outer: Outer) -> dict[str, Any]:
        """Gives this peer back what belongs to it in the checkpoint: optimizer, generators. Returns the loop's part.

        If this peer had not written its own yet, the one in the checkpoint before is nearer than nothing. Empty if none
        is good: then the inner optimizer begins afresh.
        """
        for entry in self._store.entries():
            if entry.number <= outer.entry.number and (loop := self._restore_from(entry)) is not None:
                return loop
        return {}

    def _restore_from(self, entry: Entry) -> dict[str, Any] | None:
        try:
            part = self._store.read_peer(entry, self._peer.name)
            if part is None:
                return None
            self._local.restore(part)
            loop: dict[str, Any] = part["loop"]
        except Refused as error:
            self._refuse(error.refusal)
            return None
        except (CheckpointMismatch, OSError, ValueError, KeyError) as error:
            self._refuse(f"{entry.name}: peer {self._peer.name}: {error!r}")
            return None
        self._peer.events.emit("checkpoint.restored", checkpoint=entry.name)
        return loop

    def _refuse(self, refusal: object) -> None:
        self._peer.events.emit("checkpoint.refused", reason=str(refusal))

    # --- writing ------------------------------------------------------------------------------------------------------

    def committed(self, version: State, commit: Commit, loop: Mapping[str, Any]) -> None:
        """A new version is there: it is written if its time has come. loop: the loop's own part."""
        names = commit.contributors
        if not commit.state or not names:
            return
        turn = names[version.number // self.checkpoints.every % len(names)]
        self._last = Due(version, commit.state, not self.checkpoints.is_shared or turn == self._peer.name)
        if version.number % self.checkpoints.every == 0:
            self._submit(self._last, loop)

    def save_last(self, loop: Mapping[str, Any]) -> None:
        """Writes the newest version now, and waits for it: the loop ends, or cannot go on."""
        if self._last is not None and self._last.version.number > self._saved:
            self._submit(self._last, loop)
        self._writer.flush(LAST_SECONDS)

    def close(self) -> None:
        self._writer.close(LAST_SECONDS)

    def statistics(self) -> WriterStatistics:
        return self._writer.statistics()

    def _submit(self, due: Due, loop: Mapping[str, Any]) -> None:
        # only the copy of what training changes is made here
        part = portable(self._local.state() | {"loop": dict(loop)})
        self._saved = due.version.number
        self._writer.submit(lambda: self._write(due, part))

    def _write(self, due: Due, part: dict[str, Any]) -> int:
        version, name = due.version, self._peer.name
        self._look_at_disk()
        if due.mine:
            written = self._store.save(self._snapshot(due), peer=name, state=part)
        else:
            written = self._store.write_peer(version.number, version.state_hash, name, part)
        self._peer.events.emit("checkpoint.written", version=version.number, bytes=written, outer=due.mine)
        return written

    def _look_at_disk(self) -> None:
        if (folder := self.checkpoints.folder) is not None:
            self._peer.telemetry.vitals.look_at_disk(folder)

    def _failed(self, error: Exception) -> None:
        self._peer.telemetry.vitals.refused(error)
        self._peer.events.emit("checkpoint.failed", reason=str(error))

    def _snapshot(self, due: Due) -> Snapshot:
        state = RunState.from_bytes(due.state)
        loops = {loop.tag: loop.rounds for loop in state.loops}
        cursors = {str(shard): position for shard, position in sorted(state.data.cursors.items())}
        return Snapshot(
            algorithm=self._spec.algorithm,
            fingerprint=self._layout.fingerprint,
            versions=tuple(part.host for part in due.version.parts),
            parameters=tuple(part.named for part in self._layout.parts),
            run_state=due.state,
            summary={
                "rounds": loops,
                "tokens": int(state.tokens),
                "samples": state.data.committed,
                "cursors": cursors,
                "members": list(self._peer.view.names),
                "epoch": state.epoch,
                "generation": state.generation,
            },
            writer=self._peer.name,
        )


def history_of(manifest: Manifest) -> tuple[int, int, int]:
    """How much a checkpoint has behind it. A higher version that the run has gone back from has less."""
    try:
        state = RunState.from_bytes(manifest.run_state)
    except CheckpointMismatch:
        return -1, -1, manifest.identity[0]
    return state.generation, state.serial, manifest.identity[0]

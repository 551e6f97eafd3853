"""What a run keeps in its folder: journal, events, logs, checkpoints, metrics, and whether it has ended."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from elastic.checkpoints.entries import find
from elastic.errors import CheckpointMismatch, ConfigurationError
from elastic.outer.saving import history_of
from elastic.reports import Reported
from fault.orders import Lines


@dataclass(frozen=True, slots=True)
class RunFolder:
    """The folder of one run."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.sqlite"

    @property
    def events(self) -> Path:
        return self.path / "events"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def end(self) -> Path:
        return self.path / "result.json"

    def begin(self) -> Path | None:
        """Makes it ready for a coordinator: one that was left goes on from its journal, if there is a checkpoint to go
        on from; else the journal is set aside, and its new place returned.

        Raises ConfigurationError if it cannot be written to, or its run has ended well.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"cannot write to {self.path}: {error.strerror}; choose another RunConfig(storage_path=...)"
            ) from None
        if self.end.exists():
            raise ConfigurationError(
                f"run {self.path.name!r} has ended, its results are in {self.path}: choose another RunConfig(name=...)"
            )
        if not self.journal.exists() or self.checkpoint() is not None:
            return None
        aside = self.path / f"journal-until-{time.time():.0f}.sqlite"
        for suffix in ("-wal", "-shm", ""):  # the file itself last: should this be interrupted, it is found again
            with suppress(FileNotFoundError):
                Path(f"{self.journal}{suffix}").replace(f"{aside}{suffix}")
        return aside

    def mark_ended(self, **facts: Any) -> None:
        """The run has ended well: there is nothing to go on with."""
        scratch = self.end.with_suffix(".tmp")
        scratch.write_text(json.dumps({"ended_unix": time.time()} | facts) + "\n")
        scratch.replace(self.end)

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint: of the line with the longest history, should there be several."""
        found = []
        for entry in find(str(self.path / "checkpoints")):
            with suppress(CheckpointMismatch):
                manifest = entry.manifest()
                found.append((history_of(manifest), manifest.time_unix, str(entry.folder)))
        return Path(max(found)[2]) if found else None

    def history(self) -> list[dict[str, Any]]:
        """All metrics that were reported, in order."""
        return list(Lines(self.metrics).read())


class History:
    """Appends what peers report to a file.

    An entry has peer, life, round, step, loss (None until there is one), time_unix, metrics. What a full disk refuses
    is lost, and counted: a run does not end for that.
    """

    def __init__(self, path: Path) -> None:
        self._file: TextIO = path.open("a", encoding="utf-8")
        self.refused = 0

    def add(self, peer: str, life: int, reported: Sequence[Reported]) -> None:
        for each in reported:
            self._write(
                {
                    "peer": peer,
                    "life": life,
                    "round": each.round,
                    "step": each.step,
                    "loss": None if math.isnan(each.loss) else each.loss,
                    "time_unix": each.time_unix,
                    "metrics": each.metrics,
                }
            )

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(entry) + "\n")
            self._file.flush()
        except OSError:
            self.refused += 1

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()

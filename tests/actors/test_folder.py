"""A run's folder: what a coordinator finds there, and what a result is made of."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from actors.folder import History, RunFolder
from elastic.checkpoints import Snapshot, Store
from elastic.errors import ConfigurationError
from elastic.outer.state import Version
from elastic.reports import Reported


def entry(number: int, loss: float = 0.5) -> Reported:
    return Reported(number=number, round=3, step=12, loss=loss, time_unix=1.0, metrics={"accuracy": 0.25 * number})


def write_checkpoint(folder: RunFolder, number: int) -> None:
    version = Version(number, torch.full((2,), float(number)), torch.zeros(2))
    snapshot = Snapshot(
        algorithm="a", fingerprint="f", versions=(version,), parameters=((("weight", (2,)),),), writer="p0"
    )
    Store(str(folder.path / "checkpoints"), "r", "outer").save(snapshot)


def test_the_history_is_all_that_was_added_in_order(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.history() == []
    for life in (1, 2):  # a supervisor that takes the run up again goes on with the file
        history = History(folder.metrics)
        history.add("p0", life, [entry(1), entry(2, math.nan)])
        history.close()
    common = {"peer": "p0", "round": 3, "step": 12, "time_unix": 1.0}
    assert folder.history() == [
        common | {"life": life, "loss": loss, "metrics": {"accuracy": accuracy}}
        for life in (1, 2)
        for loss, accuracy in ((0.5, 0.25), (None, 0.5))
    ]


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.checkpoint() is None
    for number in (1, 2, 3):
        write_checkpoint(folder, number)
    newest = folder.checkpoint()
    assert newest is not None and newest.name.startswith("v00000003-")
    (newest / "manifest.json").write_text("{}")
    second = folder.checkpoint()
    assert second is not None and second.name.startswith("v00000002-")


def test_a_run_goes_on_from_its_journal_only_with_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "one")
    assert folder.begin() is None and folder.path.is_dir()
    folder.journal.write_text("journal")
    Path(f"{folder.journal}-wal").write_text("log")
    aside = folder.begin()
    assert aside is not None and aside.read_text() == "journal" and not folder.journal.exists()
    assert Path(f"{aside}-wal").read_text() == "log" and not Path(f"{folder.journal}-wal").exists()
    folder.journal.write_text("journal")
    write_checkpoint(folder, 1)
    assert folder.begin() is None and folder.journal.read_text() == "journal"


def test_a_run_that_has_ended_or_cannot_write_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "one")
    folder.begin()
    folder.mark_ended(peers={})
    with pytest.raises(ConfigurationError, match=r"run 'one' has ended, .* RunConfig\(name=\.\.\.\)"):
        folder.begin()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"cannot write to .*Not a directory; choose another RunConfig"):
        RunFolder(tmp_path / "file" / "two").begin()

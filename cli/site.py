"""The peers of one site, as their supervisor and the coordinator see them, for commands that show or report them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from . import exits
from .screen import refuse
from .view import PeerRow

if TYPE_CHECKING:
    from actors.charge import ChargeReport
    from elastic.messages import MemberReport


def prepare_out(command: str, out: Path, *, result: str) -> Path:
    """Makes the folder for results and events; returns its path in full. result: the file that another run left."""
    try:
        out = out.resolve()
        (out / "events").mkdir(parents=True, exist_ok=True)
        probe = out / ".writable"
        probe.touch()
        probe.unlink()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, in the words of Python 3.11 and 3.12
        why = error.strerror if isinstance(error, OSError) else "too many levels of symbolic links"
        refuse(command, exits.OUTPUT, f"cannot write to {out}: {why}; choose another --out")
    if (out / result).exists() or any((out / "events").iterdir()):
        refuse(command, exits.OUTPUT, f"{out} holds the results of another run; choose another --out")
    return out


class Rows:
    """One line for each peer of a supervisor. What a life has shown last stays until the next one shows something."""

    def __init__(self) -> None:
        self.by_name: dict[str, PeerRow] = {}

    def note(self, charges: Iterable[ChargeReport], members: Iterable[MemberReport], versions: dict[str, int]) -> None:
        """versions: that peers whose training has ended hold, if known."""
        known = {member.name: member for member in members}
        for charge in charges:
            member = known.get(charge.name)
            if member is None or charge.state != "running":
                row = _resting(charge, self.by_name.get(charge.name), versions.get(charge.name))
            else:
                row = _running(charge, member)
            self.by_name[charge.name] = row


def _resting(charge: ChargeReport, before: PeerRow | None, version: int | None) -> PeerRow:
    kept = before if before and before.life == charge.lives else None
    return PeerRow(
        name=charge.name,
        life=charge.lives,
        state=charge.state if charge.state != "running" else "starting",
        step=kept.step if kept else 0,
        loss=kept.loss if kept else None,
        tokens_per_second=None,
        round=version if charge.trained and version is not None else kept.round if kept else 0,
        bytes_sent=kept.bytes_sent if kept else 0,
        note=charge.reason,
    )


def _running(charge: ChargeReport, member: MemberReport) -> PeerRow:
    status = member.status
    return PeerRow(
        name=charge.name,
        life=charge.lives,
        state="suspect" if member.state == "suspect" else status.state,
        step=status.step,
        loss=status.loss if status.loss == status.loss else None,
        tokens_per_second=status.tokens_per_second or None,
        round=max(0, member.version),
        bytes_sent=status.bytes_sent,
        note=f"pid {charge.pid}",
    )

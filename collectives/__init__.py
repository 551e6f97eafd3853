"""Tensors between peers that may die: frames, striped links, wire formats, and exchanges over them.

`Group.run(Start) -> Done | Failed` executes one attempt of one operation and decides nothing: who takes part, whether
to retry, and what a failure means is decided by whoever holds the group. Importing this package costs nothing; torch
and numpy are imported with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collectives.fetching import FetchError, Partial, SourceRecord
    from collectives.frames import FrameError
    from collectives.group import Group, GroupStatistics, LinkStatistics
    from collectives.records import (
        Abort,
        Done,
        Failed,
        Identity,
        Interference,
        LinkFailure,
        LinkFaults,
        LinkRecord,
        Member,
        OperationRecord,
        Progress,
        Start,
        WireRun,
    )
    from collectives.sockets import LinkOptions

_HOMES = {
    **dict.fromkeys(
        ("Abort", "Done", "Failed", "Identity", "LinkFailure", "LinkRecord", "Member", "OperationRecord", "Progress"),
        "records",
    ),
    **dict.fromkeys(("Interference", "LinkFaults", "Start", "WireRun"), "records"),
    "FrameError": "frames",
    "LinkOptions": "sockets",
    **dict.fromkeys(("FetchError", "Partial", "SourceRecord"), "fetching"),
    **dict.fromkeys(("Group", "GroupStatistics", "LinkStatistics"), "group"),
}

__all__ = [
    "Abort",
    "Done",
    "Failed",
    "FetchError",
    "FrameError",
    "Group",
    "GroupStatistics",
    "Identity",
    "Interference",
    "LinkFailure",
    "LinkFaults",
    "LinkOptions",
    "LinkRecord",
    "LinkStatistics",
    "Member",
    "OperationRecord",
    "Partial",
    "Progress",
    "SourceRecord",
    "Start",
    "WireRun",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'collectives' has no attribute {name!r}")
    value = getattr(import_module(f"collectives.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

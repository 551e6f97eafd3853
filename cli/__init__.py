"""The command line: click commands, live views, and reports. Ray and torch are imported inside the commands."""

from __future__ import annotations

from pathlib import Path as _Path

import actors as _below

if not _below.__file__ or _Path(_below.__file__).parents[1] != _Path(__file__).parents[1]:
    raise ImportError(
        f"the folder {next(iter(_below.__path__))} shadows cli's package 'actors': rename it or move away"
    )

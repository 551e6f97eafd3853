"""What went wrong and whose it is: records in, verdicts out (`detector`). And faults on purpose, for tests and drills:
in a process (`inject`), by order of another (`orders`), by a schedule (`schedule`, `driver`).

It decides nothing. Injected faults are counted, so that a test can tell that they fired.
"""

from __future__ import annotations

from pathlib import Path as _Path

import collectives as _below

if not _below.__file__ or _Path(_below.__file__).parents[1] != _Path(__file__).parents[1]:
    raise ImportError(
        f"the folder {next(iter(_below.__path__))} shadows fault's package 'collectives': rename it or move away"
    )

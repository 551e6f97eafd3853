"""Ray: the coordinator's host, the peers' processes and the site's supervisor.

Lifecycle only: they obey membership's effects and move no tensors. Ray is imported when a module here is.
"""

from __future__ import annotations

from pathlib import Path as _Path

import elastic as _below

if not _below.__file__ or _Path(_below.__file__).parents[1] != _Path(__file__).parents[1]:
    raise ImportError(
        f"the folder {next(iter(_below.__path__))} shadows actors' package 'elastic': rename it or move away"
    )

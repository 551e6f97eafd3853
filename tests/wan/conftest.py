"""Puts the data plane's helpers (`plane`) on the path, and makes the emulated WAN of three sites."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.wan.wan import Wan

sys.path.insert(0, str(Path(__file__).parents[1] / "collectives"))


@pytest.fixture
def wan3() -> Iterator[Wan]:
    """site-a and site-b near each other, site-c 100 ms away."""
    with Wan("wan3.json", name=f"t{os.getpid()}", max_life=300) as wan:
        yield wan

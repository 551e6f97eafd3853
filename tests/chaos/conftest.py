"""Puts the data plane's test helpers (`forked`) on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "collectives"))

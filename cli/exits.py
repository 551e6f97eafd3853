"""Exit codes, the same for every command; the list stands in the README."""

from __future__ import annotations

OK = 0
FAILED = 1
USAGE = 2
DATA = 3
NETWORK = 4
OUTPUT = 5
INTERRUPTED = 130
TERMINATED = 143

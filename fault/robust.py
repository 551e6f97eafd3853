"""What the rules have in common: when something is far from usual, and how much it varies in any case."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

FACTOR = 1.5
"""Times as slow as usual is slow."""
DEVIATIONS = 4.0
"""And so many deviations from it."""
LEAST_NOISE = 0.02
"""In logarithms: what is steadier than that is no ground for suspicion."""
_NORMAL_MAD = 1.4826


def deviation(values: Iterable[float], least: float = LEAST_NOISE) -> float:
    """A standard deviation that wild values do not disturb, from the median distance to the median; `least` or more."""
    seen = np.fromiter(values, dtype=np.float64)
    return max(least, _NORMAL_MAD * float(np.median(np.abs(seen - np.median(seen))))) if seen.size else least

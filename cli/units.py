"""Quantities as people write them: 10e9, 350M, 1Gbit, 25MB/s, 80ms, 0.1%."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import click

_NUMBER = re.compile(
    r"\s*(-?[0-9]+\.?[0-9]*(?:e[+-]?[0-9]+)?|-?\.[0-9]+(?:e[+-]?[0-9]+)?)\s*([^\s\d].*)?", re.IGNORECASE
)
_PREFIXES = {
    "": 1.0,
    "k": 1e3,
    "m": 1e6,
    "g": 1e9,
    "t": 1e12,
    "ki": 2.0**10,
    "mi": 2.0**20,
    "gi": 2.0**30,
    "ti": 2.0**40,
}


def split(text: str) -> tuple[float, str]:
    """The number, and what follows it. ValueError if there is none, or it is too large to be one."""
    found = _NUMBER.fullmatch(text)
    if found is None or not math.isfinite(float(found[1])):
        raise ValueError(f"{text!r} does not begin with a number")
    return float(found[1]), (found[2] or "").strip()


def count(text: str) -> float:
    """10e9, 350M, 1.5B: how many. B and G are both 10^9."""
    number, unit = split(text)
    scale = _PREFIXES.get("g" if unit in ("B", "b") else unit.lower())
    if scale is None or unit.lower().endswith("i"):
        raise ValueError(f"{text!r}: write a count as 10e9, 350M or 10B")
    return number * scale


def rate(text: str) -> float:
    """1Gbit, 200Mbit/s, 1Gbps, 25MB/s: bits a second. A small b is a bit, a capital one a byte."""
    number, unit = split(text)
    unit = re.sub(r"(/s|ps)$", "", unit)
    for name, bits in (("bit", 1), ("bits", 1), ("byte", 8), ("bytes", 8), ("b", 1), ("B", 8)):
        if unit.endswith(name) and (scale := _PREFIXES.get(unit.removesuffix(name).lower())) is not None:
            return number * scale * bits
    raise ValueError(f"{text!r}: write a rate as 1Gbit, 200Mbit/s or 25MB/s")


def seconds(text: str) -> float:
    """80ms, 0.8s, 2min; a number alone is of seconds."""
    number, unit = split(text)
    scale = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}.get(unit.lower())
    if scale is None:
        raise ValueError(f"{text!r}: write a time as 80ms, 0.8s or 2min")
    return number * scale


def share(text: str) -> float:
    """0.1% or 0.001."""
    number, unit = split(text)
    if unit not in ("", "%") or number > (100 if unit else 1):
        raise ValueError(f"{text!r}: write a share as 0.1% or 0.001, up to 100% or 1")
    return number / 100 if unit else number


READERS = {"count": count, "rate": rate, "seconds": seconds, "share": share}


def quantity(name: str, *, positive: bool = True) -> Callable[[str], float]:
    """The type of an option that one of the functions above reads. positive: it must be above 0, and not only at it."""

    def read(text: str) -> float:
        try:
            found = READERS[name](text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
        if found < 0 or (positive and not found):
            raise click.BadParameter(f"{text!r}: it must {'be above' if positive else 'not be below'} 0")
        return found

    return read


def whole(text: str) -> int:
    """The type of an option that counts, as people write it."""
    found = quantity("count")(text)
    if found != int(found):
        raise click.BadParameter(f"{text!r} is no whole number")
    return int(found)


# --- and back -------------------------------------------------------------------------------------------------------


def bits_text(bits: float) -> str:
    """1 Gbit/s."""
    for prefix, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= scale:
            return f"{bits / scale:.3g} {prefix}bit/s"
    return f"{bits:.3g} bit/s"


def time_text(value: float) -> str:
    """4 ms, 0.81 s, 12.3 min, 4.2 h."""
    for unit, scale in (("h", 3600.0), ("min", 60.0)):
        if value >= 2 * scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} s" if value >= 0.1 or not value else f"{1e3 * value:.3g} ms"

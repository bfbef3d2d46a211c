"""Numbers as people read them: bytes, times and counts, in one way for every table, card, page and log.

Three significant digits, and no number is shown as 1000 or more of a unit that has a larger one: what rounds
up to 1000 goes on to the next unit, so 999600 bytes are 1 MB. The audit's page formats by the same units
and the same rule (`mpcache/audit/page.html`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """most: from how many on the next unit is shown; None: there is none.  step: how many make one of it."""

    name: str
    most: float | None = None
    step: float = 1


BYTES: Sequence[Unit] = (*(Unit(name, 1000, 1000) for name in ("B", "kB", "MB", "GB", "TB")), Unit("PB"))
# Seconds up to 10 minutes, and minutes up to 10 hours: three digits tell more there.
DURATIONS: Sequence[Unit] = (Unit("ms", 1000, 1000), Unit("s", 600, 60), Unit("min", 600, 60), Unit("h"))


def size(n: float) -> str:
    """Return n bytes in decimal units: 1234567 -> `1.23 MB`. Bytes themselves are whole."""
    return _scaled(math.floor(n + 0.5) if n < 1000 else n, BYTES)


def duration(ms: float) -> str:
    """Return a time in ms, s, min or h: 4.314 -> `4.31 ms`, 12500 -> `12.5 s`."""
    return _scaled(ms, DURATIONS)


def in_one_unit(values: Sequence[float], units: Sequence[Unit]) -> tuple[str, list[str]]:
    """Return values of a column in one unit, that of the largest, with its name: `MB`, `[0.324, 15.3]`.

    Three significant digits each, so that a small one has more places.
    """
    scale, last = 1.0, units[-1]
    for unit in units[:-1]:
        if unit.most is None or float(_digits(max(values, default=0) / scale)) < unit.most:
            last = unit
            break
        scale *= unit.step
    return last.name, [_digits(value / scale) for value in values]


def number(n: float) -> str:
    """Return a count with its thousands apart, and one decimal where it is not whole: `1,234`, `5.3`."""
    return f"{n:,.0f}" if n == int(n) else f"{n:,.1f}"


def whole(value: float) -> int | float:
    """Return 5.0 as 5: the same rounds in every step give a whole number."""
    return int(value) if value == int(value) else value


def _scaled(n: float, units: Sequence[Unit]) -> str:
    for unit in units[:-1]:
        if unit.most is None or float(_digits(n)) < unit.most:
            return f"{_digits(n)} {unit.name}"
        n /= unit.step
    return f"{_digits(n)} {units[-1].name}"


def _digits(n: float) -> str:
    """Three significant digits without an exponent; whole from 100 on."""
    if n >= 100 or n == 0:
        return str(math.floor(n + 0.5))
    text = f"{n:.3g}"
    return text if "e" not in text else f"{n:.12f}".rstrip("0").rstrip(".")

"""How long long work will still take."""

from __future__ import annotations

import time

from mpcache.report.units import duration


class Clock:
    """Tells how long the rest will take, as what was done before took. Call `left` before each of `whole`."""

    def __init__(self, whole: int) -> None:
        self.whole, self.begun, self.start = whole, 0, time.perf_counter()

    def left(self) -> str:
        """Say it, once there is something to go by."""
        done, self.begun = self.begun, self.begun + 1
        if not done:
            return ""
        ms = 1000 * (time.perf_counter() - self.start) / done * (self.whole - done)
        return f", about {duration(ms)} left"

"""Signals that end a process in order: peers are told, children are ended, one line is printed."""

from __future__ import annotations

import os
import signal
from types import FrameType

from mpcache.errors import MpcacheError

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(MpcacheError):
    """Someone asked this process to end."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.exit_code = 128 + number


def stop_on_signals(who: str) -> None:
    """From now on a stop signal raises Stopped in the main thread; a second one ends it at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPS:
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise Stopped(f"{who}: stopped by {signal.Signals(number).name}", number)

    for each in STOPS:
        signal.signal(each, stop)


def ignore_signals() -> None:
    """For the end of a process: nothing is left to stop, and its exit code is known."""
    for each in STOPS:
        signal.signal(each, signal.SIG_IGN)

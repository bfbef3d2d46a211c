"""Print what a party says: lines for people, or events, one JSON object a line, for a parent process."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from enum import StrEnum
from typing import Any, TextIO

from mpcache.errors import MpcacheError
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration, number, size
from mpcache_parties.operations.logs import Log, LogLevel


class EventKind(StrEnum):
    """What an event tells: the value of its key `event`."""

    SAY = "say"
    TOKEN = "token"
    ERROR = "error"
    REPORT = "report"
    LAYER = "layer"  # of a conversation: a phase has come to a layer
    OPENED = "opened"  # a conversation: questions may come
    TURN = "turn"  # an answer is complete
    REFUSED = "refused"  # a question was not asked


class Output:
    """Where a party's words go. Lines for people, or (`events`) JSON lines for the process that started it.

    out: where tokens and events go; stdout, unless a test wants them.  log: gets the words, too.
    """

    def __init__(self, events: bool, out: TextIO | None = None, log: Log | None = None) -> None:
        self.events = events
        self.out = out if out is not None else sys.stdout
        self.log = log or Log("")

    def event(self, kind: EventKind, **values: Any) -> None:
        """Print an event, if events are asked for.

        A parent that is gone hears nothing more; stdin, whose other end it had, ends this process in order.
        """
        if self.events:
            with suppress(BrokenPipeError):
                print(json.dumps({"event": kind, **values}), file=self.out, flush=True)

    def say(self, text: str) -> None:
        """Tell people, or the parent, a line."""
        self.log("note", text=text)
        if self.events:
            self.event(EventKind.SAY, text=text)
        else:
            _to_stderr(text)

    def token(self, token: int, text: str) -> None:
        """Show a token of the answer: its id, or -1 for text that was held back until the end."""
        if self.events:
            self.event(EventKind.TOKEN, id=token, text=text)
        else:
            print(text, end="", file=self.out, flush=True)

    def error(self, error: MpcacheError) -> None:
        """Tell why this party ends; its log gets what peers may read of it."""
        name, text, code = type(error).__name__, str(error), error.exit_code
        self.log("error", LogLevel.ERROR, name=name, text=error.for_peers, exit_code=code)
        if self.events:
            self.event(EventKind.ERROR, name=name, text=text, exit_code=code)
        else:
            _to_stderr(f"error: {text}")

    def report(self, report: Report) -> None:
        """Tell what the party's session took, at its end."""
        self.event(EventKind.REPORT, report=report.to_dict())
        self.log("end", text=closing_line(report))
        if not self.events:
            if report.rank == Rank.CLIENT:
                print(file=self.out, flush=True)
            _to_stderr(closing_line(report))


def _to_stderr(line: str) -> None:
    """Write a line, whole, whichever thread it is. A stderr that takes nothing ends no session."""
    with suppress(OSError):
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


def closing_line(report: Report) -> str:
    """Return one party's session in one line."""
    who = Rank(report.rank).label
    steps = len(report.phases) - 2  # without set-up and context
    offline = report.per_token("offline_sent") + report.per_token("offline_received")
    parts = [f"{who}: done: {steps} token{'s' * (steps != 1)}, {duration(report.per_token('ms'))} each"]
    if report.rank != Rank.DEALER:
        parts.append(f"{number(report.per_token('rounds'))} rounds, {size(report.per_token('sent'))} sent")
    parts.append(f"{size(offline)} {'sent' if report.rank == Rank.DEALER else 'from the dealer'}")
    return ", ".join(parts)

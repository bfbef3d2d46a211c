"""Hold how far a party is: what its log, its metrics and its health answer from. Public sizes only."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from threading import Lock

from mpcache.answer import Observer
from mpcache.ledger import Entry, Ledger
from mpcache.phases import PART, ChunkPlace, is_private
from mpcache.rank import Rank
from mpcache_parties.operations.logs import Log, LogLevel


class SessionPhase(StrEnum):
    """How far a session is. What comes before it (start) and after it (the end) is the party's."""

    CONNECT = "connect"
    HELLO = "hello"
    SETUP = "setup"
    CONTEXT = "context"
    QUESTION = "question"
    DECODE = "decode"
    CLOSE = "close"


class Outcome(StrEnum):
    """How a session has ended."""

    DONE = "done"
    FAILED = "failed"


BOUNDS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)  # of the classes of durations


@dataclass
class Durations:
    """How long something took, by classes: the last one is above all bounds. Units: s."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    total_s: float = 0.0

    def note(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.total_s += seconds

    def add(self, other: Durations) -> None:
        """Add another's."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total_s += other.total_s


@dataclass
class Totals:
    """What sessions have cost so far. Units: rounds, bytes, tokens, s."""

    traffic: Entry = field(default_factory=Entry)
    wire_bytes: int = 0
    tokens: int = 0
    dealer_wait_s: float = 0.0  # time spent waiting for the dealer: how far it lags behind
    first_tokens: Durations = field(default_factory=Durations)  # each a question taken in
    further_tokens: Durations = field(default_factory=Durations)

    def add(self, other: Totals) -> None:
        self.traffic += other.traffic
        self.wire_bytes += other.wire_bytes
        self.tokens += other.tokens
        self.dealer_wait_s += other.dealer_wait_s
        self.first_tokens.add(other.first_tokens)
        self.further_tokens.add(other.further_tokens)


class SessionStatus(Observer):
    """One session, from its own thread's view; others only read."""

    def __init__(self, ledger: Ledger | None = None, log: Log | None = None) -> None:
        self.phase = SessionPhase.CONNECT
        self.totals = Totals()
        # Told when a layer begins: its phase, number, and the part of a long question, and of how many.
        self.on_layer: Callable[[str, int, int, int], None] = lambda phase, layer, part, parts: None
        self._ledger = ledger or Ledger()
        self._log = log or Log("")
        self._layer_begins = "/"  # how the names of this layer's steps begin

    def at_step(self, step: str) -> None:
        """Note a round of the program; tells `on_layer` when it is the first of a layer."""
        if step.startswith(self._layer_begins):
            return
        if found := re.match(rf"([^/]+)/(?:{PART})?layer(\d+)/", step):
            self._layer_begins = found[0]
            self.on_layer(found[1], int(found[4]), int(found[2] or 1), int(found[3] or 1))

    def reached(self, phase: SessionPhase) -> None:
        """Note that the session is in this phase now."""
        self.phase = phase
        self._log("phase", LogLevel.DEBUG, phase=phase)

    def began(self, name: str) -> None:
        """Note that a phase of the program begins: setup, context, question, decode1, ..."""
        place = ChunkPlace.of(name)
        if place is None:
            self.reached(SessionPhase.CONTEXT if is_private(name) else SessionPhase(name))
        else:
            self.reached(SessionPhase.DECODE if place.step else SessionPhase.QUESTION)

    def ended(self, name: str, ms: float) -> None:
        """Count a phase that took `ms`, and its traffic, with what was said before it began."""
        totals, ledger = self.totals, self._ledger
        if name == "setup":
            spent = ledger.total()
        else:
            spent = ledger.phase_total(name)
            totals.traffic += ledger.booked(f"more/{name}")
        totals.traffic += spent
        totals.wire_bytes = ledger.wire_bytes
        place = ChunkPlace.of(name)
        tokens = int(place is not None)
        totals.tokens += tokens
        if place is not None:
            if not place.step:  # what was said of the turn, and of the end of the one before
                totals.traffic += ledger.booked(f"turn/{place.turn}")
                totals.traffic += ledger.booked(f"dealt/{place.turn - 1}")
            (totals.further_tokens if place.step else totals.first_tokens).note(ms / 1000)
        self._log("token" if tokens else "done", step=name, ms=round(ms, 3), values=asdict(spent))

    def so_far(self, phase: str) -> Entry:
        """Sum up the phases that have ended, and this one, which runs."""
        spent = self._ledger.phase_total(phase)
        spent += self.totals.traffic
        return spent

    def waited(self, seconds: float) -> None:
        """Count a wait for the dealer."""
        self.totals.dealer_wait_s += seconds


class PartyStatus:
    """All sessions of this party since it started.

    ready: it takes part, or waits for others to: not while it starts, not while it ends.
    on_ready: told when that changes.
    """

    def __init__(self, rank: Rank, log: Log | None = None) -> None:
        self.rank, self.log = rank, log or Log("")
        self.ready = False
        self.on_ready: list[Callable[[bool], None]] = []
        self.ended = dict.fromkeys(Outcome, 0)  # sessions
        self.refused = 0  # connections
        self._now: list[SessionStatus] = []
        self._past = Totals()
        self._lock = Lock()

    def be_ready(self, ready: bool) -> None:
        self.ready = ready
        for tell in self.on_ready:
            tell(ready)

    def refuse(self, connections: int) -> None:
        """Count connections that were refused."""
        with self._lock:
            self.refused += connections

    @contextmanager
    def session(self, ledger: Ledger) -> Iterator[SessionStatus]:
        """Show a session as long as it lasts; one that ends with an error counts as failed."""
        status, outcome = SessionStatus(ledger, self.log), Outcome.FAILED
        with self._lock:
            self._now.append(status)
        try:
            yield status
            outcome = Outcome.DONE
        finally:
            with self._lock:
                self._now.remove(status)
                self._past.add(status.totals)
                self.ended[outcome] += 1

    def totals(self) -> Totals:
        totals = Totals()
        with self._lock:
            for part in (self._past, *(status.totals for status in self._now)):
                totals.add(part)
        return totals

    def phases(self) -> dict[SessionPhase, int]:
        """Count the sessions that are in each phase now."""
        with self._lock:
            now = [status.phase for status in self._now]
        return {phase: now.count(phase) for phase in SessionPhase}

"""How far a party is: what its log, its metrics and its health answer from. Public sizes only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from threading import Lock

from mpcache.answer import Observer
from mpcache.ledger import Entry, Ledger
from mpcache.rank import Rank
from mpcache_parties.operations.logs import Log

# Of a session. What comes before (start) and after (close) is the party's.
PHASES = ("connect", "hello", "setup", "context", "question", "decode", "close")


@dataclass
class Totals:
    """What sessions have cost so far. Units: rounds, bytes, tokens, s."""

    traffic: Entry = field(default_factory=Entry)
    wire_bytes: int = 0
    tokens: int = 0
    dealer_wait_s: float = 0.0  # time spent waiting for the dealer: how far it lags behind

    def add(self, other: Totals) -> None:
        self.traffic += other.traffic
        self.wire_bytes += other.wire_bytes
        self.tokens += other.tokens
        self.dealer_wait_s += other.dealer_wait_s


class SessionStatus(Observer):
    """One session, from its own thread's view; others only read."""

    def __init__(self, ledger: Ledger | None = None, log: Log | None = None) -> None:
        self.phase = PHASES[0]
        self.totals = Totals()
        self._ledger = ledger or Ledger()
        self._log = log or Log("")

    def reached(self, phase: str) -> None:
        """The session is in this one of PHASES now."""
        self.phase = phase
        self._log("phase", "debug", phase=phase)

    def began(self, name: str) -> None:
        """A phase of the program: setup, context, question, decode1, ..."""
        self.reached("decode" if name.startswith("decode") else name)

    def ended(self, name: str, ms: float) -> None:
        """It took so long. Its traffic is counted now, with what was said before it began."""
        totals, ledger = self.totals, self._ledger
        if name == "setup":
            spent = ledger.total()
        else:
            spent = ledger.total(f"{name}/")
            totals.traffic += ledger.total(f"more/{name}")
        totals.traffic += spent
        totals.wire_bytes = ledger.wire_bytes
        tokens = int(name not in ("setup", "context"))
        totals.tokens += tokens
        self._log("token" if tokens else "done", step=name, ms=round(ms, 3), values=asdict(spent))

    def waited(self, seconds: float) -> None:
        """For the dealer."""
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
        self.ended: dict[str, int] = {"done": 0, "failed": 0}  # sessions
        self._now: list[SessionStatus] = []
        self._past = Totals()
        self._lock = Lock()

    def be_ready(self, ready: bool) -> None:
        self.ready = ready
        for tell in self.on_ready:
            tell(ready)

    @contextmanager
    def session(self, ledger: Ledger) -> Iterator[SessionStatus]:
        """A session as long as it lasts; one that ends with an error counts as failed."""
        watch, outcome = SessionStatus(ledger, self.log), "failed"
        with self._lock:
            self._now.append(watch)
        try:
            yield watch
            outcome = "done"
        finally:
            with self._lock:
                self._now.remove(watch)
                self._past.add(watch.totals)
                self.ended[outcome] += 1

    def totals(self) -> Totals:
        totals = Totals()
        with self._lock:
            for part in (self._past, *(watch.totals for watch in self._now)):
                totals.add(part)
        return totals

    def phases(self) -> dict[str, int]:
        """How many sessions are in each phase now."""
        with self._lock:
            now = [watch.phase for watch in self._now]
        return {phase: now.count(phase) for phase in PHASES}

"""Every round and byte, by step name, counted where it leaves or arrives.

A round is one wait for a message from the other computing party: an exchange, in which both send
at once, is one round, and so is a one-way message. Bytes are payload bytes; what framing adds is
kept apart as `wire_bytes`, and what a broken connection made this party send again as `resent_bytes`:
a message is booked once. Traffic with the dealer is booked as offline (docs/design.md, section 10).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass
class Entry:
    """Traffic of one step. Units: rounds, bytes."""

    rounds: int = 0
    sent: int = 0
    received: int = 0
    offline_sent: int = 0
    offline_received: int = 0

    def __iadd__(self, other: Entry) -> Entry:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self

    def __sub__(self, other: Entry) -> Entry:
        return Entry(**{n: v - getattr(other, n) for n, v in asdict(self).items()})


@dataclass
class Ledger:
    """Entries by step name, such as `layer3/select/topk`."""

    steps: dict[str, Entry] = field(default_factory=lambda: defaultdict(Entry))
    wire_bytes: int = 0
    resent_bytes: int = 0

    def book(self, step: str, **amounts: int) -> None:
        """Add amounts (fields of `Entry`) to a step."""
        entry = self.steps[step]
        for name, amount in amounts.items():
            setattr(entry, name, getattr(entry, name) + amount)

    def book_each(self, amount: str, steps: Sequence[str], sizes: Sequence[int]) -> None:
        """Add to one amount (a field of `Entry`) of several steps."""
        for step, size in zip(steps, sizes, strict=True):
            vars(self.steps[step])[amount] += size

    def total(self, prefix: str = "") -> Entry:
        """Sum over the steps whose name starts with `prefix`."""
        total = Entry()
        for step, entry in self.steps.items():
            if step.startswith(prefix):
                total += entry
        return total

    def snapshot(self) -> Entry:
        """Totals now; subtract two snapshots to get what lies between them."""
        return self.total()

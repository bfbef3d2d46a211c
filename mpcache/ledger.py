"""Every round and byte, by step name, counted where it leaves or arrives.

A round is one wait for a message from the other computing party: an exchange, in which both send
at once, is one round, and so is a one-way message. Bytes are payload bytes; what framing adds is
kept apart as `wire_bytes`, and what a broken connection made this party send again as `resent_bytes`:
a message is booked once. Traffic with the dealer is booked as offline (docs/design.md, section 10).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Entry:
    """Traffic of one step. Units: rounds, bytes."""

    rounds: int = 0
    sent: int = 0
    received: int = 0
    offline_sent: int = 0
    offline_received: int = 0

    def __iadd__(self, other: Entry) -> Entry:
        mine = vars(self)
        for name, value in vars(other).items():
            mine[name] += value
        return self

    def __sub__(self, other: Entry) -> Entry:
        theirs = vars(other)
        return Entry(**{name: value - theirs[name] for name, value in vars(self).items()})


class Steps(dict[str, Entry]):
    """Entries by step name, made when they are first asked for, and by the name's first word, too."""

    def __init__(self) -> None:
        super().__init__()
        self.by_phase: defaultdict[str, list[Entry]] = defaultdict(list)

    def __missing__(self, step: str) -> Entry:
        self[step] = entry = Entry()
        self.by_phase[step.partition("/")[0]].append(entry)
        return entry


@dataclass
class Ledger:
    """Entries by step name, such as `layer3/select/topk`."""

    steps: Steps = field(default_factory=Steps)
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

    def booked(self, step: str) -> Entry:
        """Return what one step has booked, nothing if it is none."""
        return self.steps.get(step) or Entry()

    def phase_total(self, phase: str) -> Entry:
        """Sum over the steps of a phase, however many others there are by now."""
        total = Entry()
        for entry in self.steps.by_phase.get(phase, ()):
            total += entry
        return total

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

"""What was counted, and its sums: by phase, by layer, by operation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

from mpcache.model.shape import ModelShape
from mpcache.phases import PART, is_private
from mpcache.policy import BoundPolicy


@dataclass(slots=True)
class Tally:
    """What a step, a layer or a phase takes.

    rounds: in each, both wait for a message.
    server_sent, client_sent: online bytes to the other computing party.
    critical: online bytes of the busier direction, summed over rounds (what a duplex link waits for).
    server_offline, client_offline: bytes that the dealer sends there.
    uploaded: bytes that the server sends to the dealer, once for a model or a document.
    comparisons: of two secrets, or a secret with a public number.  multiplications: of two secrets.
    lookups: secret places in public tables or series.
    multiply_adds: 64-bit ones of products, tables and series, at the server (the busier party).
    key_blocks: AES blocks of evaluating key trees, at each party.
    random_bytes: expanded from key streams or received from the dealer, at the server.
    working: most bytes that one operation draws and opens, a lower bound of its memory.
    """

    rounds: int = 0
    server_sent: int = 0
    client_sent: int = 0
    critical: int = 0
    server_offline: int = 0
    client_offline: int = 0
    uploaded: int = 0
    comparisons: int = 0
    multiplications: int = 0
    lookups: int = 0
    multiply_adds: int = 0
    key_blocks: int = 0
    random_bytes: int = 0
    working: int = 0

    def __iadd__(self, other: Tally) -> Tally:
        working = max(self.working, other.working)
        for name in _AMOUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.working = working
        return self

    @property
    def online(self) -> int | float:
        """Bytes that one computing party sends, the mean of both."""
        total = self.server_sent + self.client_sent
        return total / 2 if total % 2 else total // 2

    @property
    def offline(self) -> int:
        """Bytes that the dealer sends."""
        return self.server_offline + self.client_offline


_AMOUNTS = tuple(f.name for f in fields(Tally))
Steps = dict[str, Tally]  # by step name within a phase: `layer3/select/coarse`


@dataclass(frozen=True)
class Cost:
    """The cost of one policy for one model shape, context and protocol.

    question: tokens.  steps: decode steps that were read, as they follow the question.
    phases: `setup`, `context`, `question`, `decode1`, ..., as a ledger has them, with their steps.
    held: bytes that a computing party keeps from step to step: operands, cache and their masks.
    """

    shape: ModelShape
    policy: BoundPolicy
    protocol: str
    question: int
    steps: int
    phases: Mapping[str, Steps]
    held: int

    def total(self, phase: str) -> Tally:
        """Sum a phase; `decode` stands for all decode steps, `private` for all of the client's document."""
        return sum_tallies(self._steps(phase))

    def by_layer(self, phase: str) -> dict[int | None, Tally]:
        """Sum a phase per layer; None stands for the steps outside of the layers."""
        parts: dict[int | None, Tally] = {i: Tally() for i in range(self.shape.layers)}
        for step, tally in self._steps(phase):
            number, _ = split_step(step)
            parts.setdefault(number, Tally())
            parts[number] += tally
        return parts

    def by_op(self, phase: str) -> Steps:
        """Sum a phase per operation, over all layers, in program order."""
        parts: Steps = {}
        for step, tally in self._steps(phase):
            _, name = split_step(step)
            parts.setdefault(name, Tally())
            parts[name] += tally
        return parts

    def shares_selection(self) -> set[int]:
        """Return the layers that spread weights by another layer's selection: they select nothing."""
        names = [step for step, _ in self._steps("decode")]
        selects, spreads = (
            {n for name in names if f"/{word}" in name and (n := split_step(name)[0]) is not None}
            for word in ("select", "scatter")
        )
        return spreads - selects

    @property
    def peak(self) -> int:
        """Estimated peak memory of one computing party, in bytes: what it holds, and the largest step."""
        return self.held + max(self.total(phase).working for phase in self.phases)

    def _steps(self, phase: str) -> Iterator[tuple[str, Tally]]:
        for name, steps in self.phases.items():
            grouped = {"decode": name.startswith("decode"), "private": is_private(name)}
            if name == phase or grouped.get(phase, False):
                yield from steps.items()


def sum_tallies(steps: Iterable[tuple[str, Tally]]) -> Tally:
    """Add up the tallies of some steps."""
    total = Tally()
    for _, tally in steps:
        total += tally
    return total


def split_step(step: str) -> tuple[int | None, str]:
    """Split a step's name: `layer3/mlp/gate` -> (3, `mlp/gate`); `lm_head` -> (None, `lm_head`).

    The parts of a long question, `part2of3/layer3/mlp/gate`, are one.
    """
    step = re.sub(f"^{PART}", "", step)
    match = re.fullmatch(r"layer(\d+)/?(.*)", step)
    return (int(match[1]), match[2] or "together") if match else (None, step or "together")

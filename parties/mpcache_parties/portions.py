"""Divide the dealing of one session among workers, by layers.

Draws do not depend on each other: a correlation is derived from random parts alone, which any worker can
expand from the session's seeds (`PortionDealer`). What ties them is memory: a layer's tapes are made for the
masks of its weights. So a layer goes to one worker in all phases, which holds these masks; those of other
layers it never makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpcache.cost.rates import RATES
from mpcache.cost.sizing import PROCESS
from mpcache.cost.tally import Cost, split_step, sum_tallies

SETUP = "setup"
BUFFERS = 400_000_000  # bytes: of Ray, what is written, and what a store's driver brings (S3: 200 MB)
COPIES = 2  # of the largest operation: what is drawn, and what is made of it
HELD = 0.75  # of the bytes that a weight's mask is drawn from: 6 of 8


@dataclass(frozen=True)
class Portion:
    """What one of a session's dealers deals. number: 0, 1, ...

    layers: None among them is what is outside of the layers; None: all.
    """

    number: int
    layers: frozenset[int | None] | None = None

    def has(self, layer: int | None) -> bool:
        """Return whether a layer belongs to it."""
        return self.layers is None or layer in self.layers

    def deals(self, step: str) -> bool:
        """Return whether a step, with its phase in front, is dealt here."""
        return self.layers is None or self.has(split_step(step.partition("/")[2])[0])

    def needs(self, step: str) -> bool:
        """Return whether what a step of another portion keeps may be needed here: of weights it is not."""
        return not step.startswith(f"{SETUP}/")


ALL_LAYERS = Portion(0)


def portions_of(cost: Cost, count: int) -> list[Portion]:
    """Divide a session of this cost into up to `count` portions that take about as long."""
    work: dict[int | None, float] = {}
    for phase in cost.phases:
        for layer, tally in cost.by_layer(phase).items():
            ms = RATES.ms(0, tally.multiply_adds, tally.key_blocks, tally.random_bytes)
            work[layer] = work.get(layer, 0.0) + ms
    count = min(count, len(work))
    if count < 2:
        return [ALL_LAYERS]
    taken: list[set[int | None]] = [set() for _ in range(count)]
    for layer in sorted(work, key=lambda layer: -work[layer]):
        min(taken, key=lambda layers: sum(work[one] for one in layers)).add(layer)
    return [Portion(number, frozenset(layers)) for number, layers in enumerate(taken)]


def worker_bytes(cost: Cost, portions: Sequence[Portion]) -> int:
    """Estimate the memory of a worker that deals the largest of these, in bytes.

    It holds its weights' masks, and those of all keys and values; beside them, in a phase, what it sends of
    it, and the largest operation.
    """
    weights, phase = [0] * len(portions), [0] * len(portions)
    for name in cost.phases:
        layers = cost.by_layer(name).items()
        for i, portion in enumerate(portions):
            mine = sum_tallies((name, tally) for layer, tally in layers if portion.has(layer))
            phase[i] = max(phase[i], mine.offline + COPIES * mine.working)
            if name == SETUP:
                weights[i] = round(HELD * mine.random_bytes)
    document = max(0, cost.held - round(HELD * cost.total(SETUP).random_bytes))
    return PROCESS + BUFFERS + document + max(map(sum, zip(weights, phase, strict=True)))

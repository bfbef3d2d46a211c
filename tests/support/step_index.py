"""A policy that does what mpcache refuses to do: it opens which clusters it chose, at every step.

As a policy must, it declares so (`leaks`), and opens through the one door, with its reason. It exists
to prove that the leak tests see.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from mpcache.ops import Ops, Value
from mpcache.policy import POLICIES
from mpcache.policy.clusters import ClusterPlan, Pick
from mpcache.policy.mpcache import MPCache
from mpcache.policy.plan import LeakClass
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, together

WHY = "chosen clusters (step-index)"


@dataclass(frozen=True)
class StepIndex(MPCache):
    """mpcache's options."""

    name = "step-index"
    source = "none: for tests only"
    leaks = LeakClass.STEP_INDEX

    @property
    def leak(self) -> LeakClass:
        return LeakClass.STEP_INDEX

    def _pick(
        self, ops: Ops, plan: ClusterPlan, levels: list[Value], tokens: Value
    ) -> Program[tuple[Value, list[Pick]]]:
        rows = tokens.shape[:-1]
        chosen, picks = yield from super()._pick(ops, plan, levels, tokens)
        for pick in picks:
            numbers = torch.arange(pick.items).unsqueeze(-1).expand(*rows, pick.items, 1)
            secret = ops.secret(numbers.double(), numbers.shape, Rank.SERVER)
            index = yield from at("index", pick.selection.gather(secret))
            both = (ops.reveal(index, rank, WHY) for rank in (Rank.SERVER, Rank.CLIENT))
            yield from at("index", together(*both))
        return chosen, picks


@contextmanager
def registered() -> Iterator[None]:
    """The policy by its name, as long as this lasts."""
    POLICIES[StepIndex.name] = StepIndex
    try:
        yield
    finally:
        del POLICIES[StepIndex.name]

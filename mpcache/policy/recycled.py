"""recycled: every S-th step attends to everything, the steps between to what it looked at most.

Recycled Attention keeps the whole cache and a small one of K tokens for each KV head: those that the last
full step paid the most attention to, summed over the heads of a group. The question is a full step, too,
and its last token decides.

Differs from the paper: the K tokens stay K between two full steps there, because each new token drops the
one that got the least attention; here new tokens join, up to S - 1 of them, and nothing is compared. When a
full step is due follows from counting: the published test, how near a query is to that of the last full
step, would let a secret decide which step comes. At a budget of tokens full steps attend to their choice
(`dense=false`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.choosing import Choosing
from mpcache.policy.plan import Budget, Plan, setting


@dataclass(frozen=True)
class Recycled(Choosing):
    """Options of recycled."""

    name = "recycled"
    source = "Recycled Attention, arXiv 2411.05787"
    needs = "the whole cache; an oblivious top-k of single tokens per KV head in every S-th step"
    example = "recycled:k=64,refresh=10"
    scope = "group"
    by_attention = True

    k: Budget = setting(
        0.2, "tokens that the heads of a group attend to between full steps",
        "1 to the context, or a ratio up to 1.0",
    )  # fmt: skip
    refresh: int = setting(50, "steps from one full step to the next", "1 or more")
    dense: bool = setting(True, "full steps attend to everything, as published", "true, false")

    @property
    def steps(self) -> int:
        return self.refresh

    def limit(self, shape: ModelShape) -> int:
        return 1 << shape.group.bit_length()

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.refresh < 1:
            raise self.fail("refresh", "1 or more")
        keep = self.count("k", context, "the context")
        return self.item_plan(context, range(shape.layers), 1, 0, 0, keep, self.dense)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Recycled:
        return replace(self, k=tokens, dense=False)

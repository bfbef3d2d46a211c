"""full: every token, every step. What the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from mpcache.model import ModelShape
from mpcache.policy.base import Policy
from mpcache.policy.plan import LayerPlan, Plan


@dataclass(frozen=True)
class Full(Policy):
    """No options: nothing is evicted, nothing is chosen."""

    name = "full"
    source = "no eviction"
    needs = "nothing"
    example = "full"

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Full:
        if tokens < context:
            raise self.too_few(tokens, context, "the context")
        return self

    def on_shares(self, tokens: int, shape: ModelShape) -> None:
        return None

    def plan(self, context: int, shape: ModelShape) -> Plan:
        return Plan(context, (LayerPlan(context, context, 0),) * shape.layers)

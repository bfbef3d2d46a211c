"""STATIC|DYNAMIC: one policy's eviction of the context, then another's choice at every step.

The first evicts once, in plaintext, as it does by itself; what it does while decoding does not happen.
The second attends, selects and remembers as if the tokens that are left were the whole context: its
budgets are of those. A layer that shares another's choice keeps that layer's tokens, so that a cluster
is the same tokens in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.policy.base import LayerView, PlaintextContext, Policy
from mpcache.policy.plan import LeakClass, Plan
from mpcache.runtime.program import Program
from mpcache_kernels import Backend


@dataclass(frozen=True)
class CombinedPlan(Plan):
    """layers: as the second policy plans them.  first: the plan of the one that evicts."""

    first: Plan


@dataclass(frozen=True)
class Combined(Policy):
    """first: `evicts`.  then: `selects`, and evicts nothing here (`as_selector`)."""

    name = "combined"
    source = "one policy's eviction, another's selection"
    needs = "what its two parts need"

    first: Policy
    then: Policy

    @property
    def spec(self) -> str:
        return f"{self.first.spec}|{self.then.spec}"

    @property
    def leak(self) -> str:
        """All that either of them reveals."""
        both = [part.leak for part in (self.first, self.then) if part.leak != LeakClass.NONE]
        return " and ".join(dict.fromkeys(both)) or LeakClass.NONE

    @property
    def in_the_clear(self) -> bool:
        return self.first.in_the_clear or self.then.in_the_clear

    def heads_summed(self, shape: ModelShape) -> int:
        return self.then.heads_summed(shape)

    def plan(self, context: int, shape: ModelShape) -> CombinedPlan:
        first = self.first.plan(context, shape)
        layers = []
        for i, mine in enumerate(first.layers):
            try:
                layer = self.then.as_selector().plan(mine.kept, shape).layers[i]
            except PolicyError as error:
                raise PolicyError(f"behind {self.first.spec}, {error}") from None
            leader = getattr(layer, "leader", i)
            if mine.kept != first.layers[leader].kept:
                raise PolicyError(
                    f"behind {self.first.spec}, policy {self.then.name}: layers {leader} and {i} keep "
                    f"{first.layers[leader].kept} and {mine.kept} tokens and cannot share a choice; "
                    "give share=none, or budgets that are equal where layers share"
                )
            layers.append(layer)
        return CombinedPlan(context, tuple(layers), first)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Combined:
        """Let the second choose that many of what the first leaves.

        The first stays as it is, but where it leaves fewer: then it leaves that many, and there is nothing
        to choose.
        """
        if not self.plan_is_public:
            raise PolicyError(f"policy {self.spec}: the document decides what stays, so no budget is known")
        first, kept = self.first, self.first.plan(context, shape).kept
        if kept < tokens:
            first, kept = first.at_budget(tokens, context, shape), tokens
        then = self.then.selector_at_budget(tokens, kept, shape)
        return replace(self, first=first, then=then)

    # ------------------------------------------------------------------------- the first, at the server

    @property
    def plan_is_public(self) -> bool:
        return self.first.plan_is_public

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        return self.first.count_from_document(prefill, kernels)

    def with_counts(self, counts: Sequence[int]) -> Combined:
        return replace(self, first=self.first.with_counts(counts))

    def window(self, context: int) -> int:
        return self.first.window(context)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        assert isinstance(plan, CombinedPlan)
        leader = getattr(plan.layers[layer], "leader", layer)
        return self.first.evict(prefill, leader, plan.first, kernels)

    # ------------------------------------------------------------------------------ the second, on shares

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Any]:
        return self.then.remember(ops, shape, plan, index, known)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        return self.then.attend(view, q)

    def observe(self, view: LayerView) -> Program[None]:
        return self.then.observe(view)

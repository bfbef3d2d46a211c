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
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import Kept, LayerView, PlaintextContext
from mpcache.policy.plan import LayerPlan, LeakClass, Plan, SplitPlan
from mpcache.runtime.program import Program
from mpcache_kernels import Backend

PARTS = 200  # in which a head's share is looked for


@dataclass(frozen=True)
class CombinedPlan(Plan):
    """layers: as the second policy plans them.  first: the plan of the one that evicts."""

    first: Plan


@dataclass(frozen=True)
class Combined(Policy):
    """first: `evicts`.  then: `selects`, and evicts nothing here (`as_selector`)."""

    name = "combined"
    source = "one policy's eviction, another's selection"
    no_shares = "it is two policies; give the left one alone"
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

    @property
    def can_pack(self) -> bool:
        return self.first.can_pack and self.then.can_pack

    @property
    def skips_padding(self) -> bool:  # type: ignore[override]
        return self.then.skips_padding

    def heads_summed(self, shape: ModelShape) -> int:
        return self.then.heads_summed(shape)

    def plan(self, context: int, shape: ModelShape) -> CombinedPlan:
        return self._behind(self.first.plan(context, shape), shape)

    def priced(self, context: int, shape: ModelShape) -> CombinedPlan:
        return self._behind(self.first.priced(context, shape), shape)

    def _behind(self, first: Plan, shape: ModelShape) -> CombinedPlan:
        """Plan the second, behind a plan of the first."""
        layers: list[LayerPlan] = []
        for i, mine in enumerate(first.layers):
            if isinstance(mine, SplitPlan):
                layers.append(self._split(mine, i, shape))
                continue
            layer = self._selector(mine.kept, shape).layers[i]
            leader = getattr(layer, "leader", i)
            if self.first.largest_bias or isinstance(first.layers[leader], SplitPlan):
                self._check_leader(i, leader)
            if mine.kept != first.layers[leader].kept:
                raise PolicyError(
                    f"behind {self.first.spec}, policy {self.then.name}: layers {leader} and {i} keep "
                    f"{first.layers[leader].kept} and {mine.kept} tokens and cannot share a choice; "
                    "give share=none, or budgets that are equal where layers share"
                )
            layers.append(layer)
        return CombinedPlan(first.context, tuple(layers), first)

    def _selector(self, kept: int, shape: ModelShape) -> Plan:
        """Plan the second for so many tokens. Raises PolicyError."""
        try:
            return self.then.as_selector().plan(kept, shape)
        except PolicyError as error:
            raise PolicyError(f"behind {self.first.spec}, {error}") from None

    def _split(self, mine: SplitPlan, index: int, shape: ModelShape) -> SplitPlan:
        """Plan the second for each part of a layer: a layer of its own."""
        parts = []
        for kept in (part.kept for part in mine.parts):
            layer: Any = self._selector(kept, shape).layers[index]
            self._check_leader(index, getattr(layer, "leader", index))
            parts.append(replace(layer, leader=0) if hasattr(layer, "leader") else layer)
        return SplitPlan.of(mine.heads, parts)

    def _check_leader(self, index: int, leader: int) -> None:
        """Raise PolicyError where a layer shares a choice that it cannot."""
        if leader != index:
            raise PolicyError(
                f"behind {self.first.spec}, policy {self.then.name}: layers {leader} and {index} keep tokens "
                "of their own and cannot share a choice; give share=none"
            )

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Combined:
        """Let the second choose that many of what the first leaves.

        The first stays as it is, but where it leaves fewer: then it leaves that many, and there is nothing
        to choose.
        """
        if not self.plan_is_public:
            return self._at_share(tokens, context, shape)
        if self.then.attends_to_all:
            return replace(self, first=self.first.at_budget(tokens, context, shape))
        first, kept = self.first, self.first.plan(context, shape).kept
        if kept < tokens:
            first, kept = first.at_budget(tokens, context, shape), tokens
        then = self.then.selector_at_budget(tokens, kept, shape)
        return replace(self, first=first, then=then)

    def _at_share(self, tokens: int, context: int, shape: ModelShape) -> Combined:
        """Let the second choose a share of what each head keeps, where only the mean of all is known."""
        kept = self.first.mean_kept(context)
        if kept is None:
            raise PolicyError(f"policy {self.spec}: the document decides what stays, so no budget is known")
        if kept <= tokens:
            first = self.first.at_budget(tokens, context, shape)
            return replace(self, first=first, then=self.then.selector_at_share(1.0))
        share = max(1, PARTS * tokens // kept) / PARTS
        return replace(self, then=self.then.selector_at_share(share))

    def within(self, tokens: int, context: int, model: Model) -> Combined:
        """Choose as much of each head as stays within the mean budget: no head chooses less than a cluster.

        Raises PolicyError where even the least is more.
        """
        counts, shape = self.count_from_model(model, context), model.shape
        if not counts:
            return self
        low, high = 0, PARTS
        while low < high:
            middle = (low + high + 1) // 2
            tried = replace(self, then=self.then.selector_at_share(middle / PARTS))
            plan = tried.with_counts(counts).plan(context, shape)
            low, high = (
                (middle, high) if plan.tokens_attended(shape.kv_heads) <= tokens else (low, middle - 1)
            )
        if not low:
            raise self.too_few(tokens, tokens + 1, "a cluster of each head, and what fills none")
        return replace(self, then=self.then.selector_at_share(low / PARTS))

    # ------------------------------------------------------------------------- the first, at the server

    @property
    def plan_is_public(self) -> bool:
        return self.first.plan_is_public

    @property
    def largest_bias(self) -> float:
        return self.first.largest_bias

    @property
    def rereads(self) -> bool:
        return self.first.rereads

    def count_from_model(self, model: Model, context: int) -> list[int]:
        return self.first.count_from_model(model, context)

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        return self.first.count_from_document(prefill, kernels)

    @property
    def counts_given(self) -> tuple[int, ...]:
        return self.first.counts_given

    def with_counts(self, counts: Sequence[int]) -> Combined:
        return replace(self, first=self.first.with_counts(counts))

    def window(self, context: int) -> int:
        return self.first.window(context)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        assert isinstance(plan, CombinedPlan)
        leader = getattr(plan.layers[layer], "leader", layer)
        return self.first.evict(prefill, leader, plan.first, kernels)

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        assert isinstance(plan, CombinedPlan)
        if getattr(plan.layers[layer], "leader", layer) != layer:  # another layer's rows of this one's tokens
            return super().retain(prefill, layer, plan, kernels)
        return self.first.retain(prefill, layer, plan.first, kernels)

    # ------------------------------------------------------------------------------ the second, on shares

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Any]:
        return self.then.remember(ops, shape, plan, index, known)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        return self.then.attend(view, q)

    def observe(self, view: LayerView) -> Program[None]:
        return self.then.observe(view)

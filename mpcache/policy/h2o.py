"""h2o: heavy hitters by accumulated attention, and the recent tokens (arXiv 2306.14048)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Ops, Value
from mpcache.policy.averages import by_head
from mpcache.policy.evicting import Evicting, LivingPlan
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import Budget, Plan, SharedEviction, setting
from mpcache.rank import Rank
from mpcache_kernels import Backend


@dataclass(frozen=True)
class H2O(Evicting):
    """Options of h2o."""

    name = "h2o"
    source = "H2O, arXiv 2306.14048"
    needs = "all of the context's queries; an oblivious argmin per KV head and step"
    evicts = True
    packs = False  # it goes on with what the context's queries paid

    example = "h2o:heavy=128,recent=64"

    heavy: Budget = setting(
        0.1,
        "tokens of each KV head that live by the attention which all queries so far paid them",
        "1 to the context, or a ratio up to 1.0",
    )
    recent: Budget = setting(0.1, "last tokens, which live anyway", "1 to the context, or a ratio up to 1.0")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        heavy = self.count("heavy", context, "the context")
        recent = self.count("recent", context, "the context")
        return self.living_plan(context, shape, heavy + recent, recent)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> H2O:
        """Half of them heavy, half of them recent, as published."""
        if tokens < 2:
            raise self.too_few(tokens, 2, "a heavy one and a recent one")
        return replace(self, heavy=tokens // 2, recent=tokens - tokens // 2)

    def window(self, context: int) -> int:
        return context

    def on_shares(self, tokens: int, shape: ModelShape) -> SharedEviction:
        plan = self.plan(tokens, shape).layers[0]
        assert isinstance(plan, LivingPlan)
        layers, last = shape.layers, min(plan.recent, plan.kept)
        return SharedEviction(tokens, tokens, 0, last, (plan.kept,) * layers, tuple(range(layers)), True)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        mine = plan.layers[layer]
        assert isinstance(mine, LivingPlan)
        paid = by_head(prefill, layer, kernels)
        paid[:, max(0, plan.context - mine.recent) :] = torch.inf
        return torch.sort(paid, descending=True, stable=True).indices[:, : mine.kept].sort(-1).values

    def initial_importance(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Value:
        size, paid = (shape.kv_heads, plan.layers[index].kept), None
        if known is not None:  # summed over a group's heads, as `importance` does
            assert known.prefill is not None, "no document is packed for h2o"
            paid = by_head(known.prefill, index, known.kernels).gather(1, known.rows) * shape.group
        return ops.secret(paid, size, Rank.SERVER)

    def importance(self, view: LayerView, attention: Value, before: Value | None) -> tuple[Value, int]:
        """Sum over all queries so far and the heads of a group: at most one each."""
        paid, m = attention.sum(1), view.m
        assert before is not None, "h2o carries importance from the context on"
        old = paid[..., :-m] + before
        most = view.shape.group * (int(view.positions[-1]) + 1)
        return view.ops.cat([old, paid[..., -m:]], -1), 1 << most.bit_length()

"""snapkv: the context cut to a fixed number of tokens by its last queries (arXiv 2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.averages import by_head
from mpcache.policy.base import Policy
from mpcache.policy.plan import Budget, LayerPlan, Plan, SharedEviction, setting
from mpcache_kernels import Backend


@dataclass(frozen=True)
class SnapKV(Policy):
    """Options of snapkv."""

    name = "snapkv"
    source = "SnapKV, arXiv 2404.14469"
    needs = "the context's last queries"
    evicts = True
    example = "snapkv:cap=256,queries=16"

    cap: Budget = setting(
        0.2,
        "context tokens that stay, per KV head, those of the last queries first",
        "1 to the context, or a ratio up to 1.0",
    )
    queries: int = setting(32, "last queries, which vote and whose tokens stay", "1 or more")
    pool: int = setting(5, "tokens over which votes are averaged, so that neighbours stay together", "odd")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.queries < 1:
            raise self.fail("queries", "1 or more")
        if self.pool < 1 or self.pool % 2 == 0:
            raise self.fail("pool", "an odd number of tokens")
        kept = self.count("cap", context, "the context")
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> SnapKV:
        return replace(self, cap=tokens)

    def window(self, context: int) -> int:
        return min(context, self.queries)

    def on_shares(self, tokens: int, shape: ModelShape) -> SharedEviction:
        kept = [layer.kept for layer in self.plan(tokens, shape).layers]
        last = min(self.queries, kept[0])
        return SharedEviction(
            tokens, self.window(tokens), 0, last, tuple(kept), tuple(range(shape.layers)), True, self.pool
        )

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        kept = plan.layers[layer].kept
        last = min(self.queries, kept)
        before = plan.context - last
        votes = by_head(prefill, layer, kernels)[:, :before]  # (KV, T - last)
        if before:
            votes = torch.nn.functional.avg_pool1d(votes[:, None], self.pool, 1, self.pool // 2)[:, 0]
        best = torch.sort(votes, dim=-1, descending=True, stable=True).indices[:, : kept - last]
        window = torch.arange(before, plan.context, device=best.device).expand(len(best), last)
        return torch.cat([best.sort(-1).values, window], -1)

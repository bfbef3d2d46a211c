"""Clusters of which the owner picks some that always attend: what shadowkv and nosa are made of.

The owner puts its picks first, each KV head its own, so that the cache stands as [picked | clusters |
tail]. The order of tokens in a cache is free, because every key carries its position already; and nobody
else knows it.
"""

from __future__ import annotations

from abc import abstractmethod

import torch

from mpcache.model.prefill import Prefill
from mpcache.policy.clusters import Clustered, ClusterPlan
from mpcache.policy.layer_view import Kept, take
from mpcache.policy.plan import Plan
from mpcache_kernels import Backend


class Fronted(Clustered):
    """A policy whose clusters the owner ranks once, in plaintext."""

    evicts = selects = False  # what stands first is not what another policy left
    fixed = frozenset({"score", "alpha", "blocks"})  # a query meets mean keys alone

    @abstractmethod
    def front(self, prefill: Prefill, layer: int, size: int, clusters: int) -> torch.Tensor:
        """Rank the context's first clusters: (KV, clusters), the highest stand first and always attend."""

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        """Keep every token: (KV, T), the picked clusters' first."""
        mine, k = plan.layers[layer], prefill.k[layer]
        assert isinstance(mine, ClusterPlan)
        every = torch.arange(plan.context, device=k.device).expand(len(k), plan.context)
        if not mine.sizes or not mine.sink:
            return every
        size = mine.sizes[0]
        picked, clusters = mine.sink // size, mine.sink // size + mine.counts[0]
        order = torch.sort(self.front(prefill, layer, size, clusters), descending=True, stable=True).indices
        order = torch.cat([part.sort(-1).values for part in (order[:, :picked], order[:, picked:])], -1)
        tokens = order[..., None] * size + torch.arange(size, device=k.device)
        return torch.cat([tokens.flatten(1), every[:, clusters * size :]], -1)

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        rows = self.evict(prefill, layer, plan, kernels)
        return [Kept(rows, take(prefill.k[layer], rows), take(prefill.v[layer], rows))]

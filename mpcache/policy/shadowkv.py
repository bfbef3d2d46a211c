"""shadowkv: chunks of 8 tokens, found by their mean keys, beside outliers and what is new (ShadowKV).

The owner finds the chunks whose tokens are unlike their mean, by the smallest cosine: these outliers always
attend, and so do the last chunks. The heads of a group choose among the others by their queries' scores
with the mean keys. Tokens of questions and answers always attend. Keys before their rotation are replaced
by a product of rank 160, but for outliers and the last chunks.

Differs from the paper: heads of a group add their scores, in place of the largest of their softmax weights,
which would take a comparison and an exponential for each chunk. Means are those of the keys in the cache.
The product of low rank saves memory there; on shares it saves nothing, and keeps its error.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.clusters import ClusterPlan
from mpcache.policy.fronted import Fronted
from mpcache.policy.layer_view import Kept, LayerView, take
from mpcache.policy.plan import Budget, Plan, setting, tokens_of
from mpcache.policy.scores import shifted
from mpcache.runtime.program import Program, local
from mpcache_kernels import Backend

CHUNKS_ALLOWED = "1 to the context's chunks, or a ratio up to 1.0"


@dataclass(frozen=True)
class ShadowKV(Fronted):
    """Options of shadowkv."""

    name = "shadowkv"
    source = "ShadowKV, arXiv 2410.21465"
    needs = "the whole cache; mean keys; an oblivious top-k of chunks per KV head, layer and step"
    example = "shadowkv:pages=0.1,rank=32"

    score: str = "mean"
    gqa: str = "sum"
    page: int = setting(8, "tokens per chunk", "1 or more")
    pages: Budget = setting(0.2, "chunks that are chosen", CHUNKS_ALLOWED)
    outliers: Budget = setting(0.05, "outlier chunks, of all", CHUNKS_ALLOWED)
    recent: int = setting(4, "last chunks, which always attend", "0 or more")
    rank: int = setting(160, "of the product that stands for the keys; 0: they stay as they are", "0 or more")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        self.check_options()
        if self.page < 1:
            raise self.fail("page", "1 or more tokens")
        for name in ("recent", "rank"):
            if getattr(self, name) < 0:
                raise self.fail(name, "0 or more")
        recent = self.recent * self.page
        (total,) = self.clusters_of(context, 0, recent, (self.page,))
        outliers = min(self.count("outliers", total, "the context's chunks"), total - 1) if total else 0
        keep = min(self.count("pages", total, "the context's chunks"), total - outliers) if total else 1
        layers = [
            self.layer_plan(i, leader, context, outliers * self.page, recent, (self.page,), [keep])
            for i, leader in enumerate(self.leaders(shape.layers))
        ]
        return Plan(context, tuple(layers))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> ShadowKV:
        """Let outliers take a quarter of the budget's chunks, and the last chunks another, at most."""
        rest = context % self.page
        least = min(context, rest + 2 * self.page)
        if tokens < least:
            raise self.too_few(tokens, least, "an outlier chunk, a chosen one and what fills no chunk")
        chunks = (tokens - rest) // self.page
        recent = min(self.recent, chunks // 4)
        whole = context // self.page - recent
        outliers = max(1, min(tokens_of(self.outliers, whole), chunks // 4))
        return replace(self, recent=recent, outliers=outliers, pages=max(1, chunks - recent - outliers))

    def front(self, prefill: Prefill, layer: int, size: int, clusters: int) -> torch.Tensor:
        """Rank outliers first: by the smallest cosine of a chunk's keys with their mean."""
        k = prefill.k[layer][:, : clusters * size]
        chunks = k.reshape(len(k), clusters, size, -1)
        return -F.cosine_similarity(chunks, chunks.mean(2, keepdim=True), dim=-1).amin(-1)

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        (kept,) = super().retain(prefill, layer, plan, kernels)
        mine, k = plan.layers[layer], prefill.k[layer]
        assert isinstance(mine, ClusterPlan)
        if not mine.sizes or not 0 < self.rank < min(k.shape[1], k.shape[0] * k.shape[2]):
            return [kept]
        end = mine.sink + mine.counts[0] * self.page
        rebuilt = take(low_rank(prefill, k, self.rank), kept.rows)
        keys = torch.cat([kept.k[:, : mine.sink], rebuilt[:, mine.sink : end], kept.k[:, end:]], 1)
        return [replace(kept, k=keys)]

    def observe(self, view: LayerView) -> Program[None]:
        """Form no chunks: what is new always attends."""
        if view.layer.memory is not None:
            view.layer.memory.age += 1
        return local(None)


def low_rank(prefill: Prefill, k: torch.Tensor, rank: int) -> torch.Tensor:
    """Replace keys (KV, T, d), without their rotation, by their best product of a rank."""
    kv, n, d = k.shape
    flat = shifted(prefill, k, 0, -1).transpose(0, 1).reshape(n, kv * d)
    u, s, vt = torch.linalg.svd(flat, full_matrices=False)
    product = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return shifted(prefill, product.reshape(n, kv, d).transpose(0, 1), 0, 1)

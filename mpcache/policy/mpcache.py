"""mpcache: static eviction, then two levels of clusters chosen by the query (arXiv 2501.06807).

The published code thresholds the static scores by the largest attention, which reveals how many
tokens it keeps, and forgets 1/sqrt d and the causal mask; here a public number is kept, by the mean.
`threshold` brings the published rule back. A layer that shares another's choice keeps its tokens,
too, so that a cluster is the same tokens in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.clusters import Clustered, ClusterPlan, cluster_size
from mpcache.policy.plan import Budget, Budgets, Plan, SharedEviction, setting, tokens_of
from mpcache_kernels import Backend


@dataclass(frozen=True)
class MPCache(Clustered):
    """Options of mpcache."""

    name = "mpcache"
    source = "MPCache, arXiv 2501.06807"
    needs = "the context's last queries; representatives; two oblivious top-k per head and choosing layer"
    may_leak = "count with threshold"
    evicts = selects = True

    example = "mpcache:n_keep=512,score=bound,share=none"

    share: str = "default"
    n_keep: Budgets = setting(
        0.75, "context tokens that survive, for all layers or for each, as in 512/256/256",
        "1 to the context, or a ratio up to 1.0",
    )  # fmt: skip
    queries: Budget = setting(
        0.2, "last queries, which judge importance", "1 to the context, or a ratio up to 1.0"
    )
    threshold: float = setting(
        0.0,
        "keep what has more than this part of some query's attention, in place of n_keep; 0: off",
        "0 to 1",
    )
    sink: int = setting(4, "first tokens, which always attend", "0 or more")
    recent: int = setting(16, "last tokens, which always attend", "0 or more")
    coarse: int = setting(
        0, "tokens per coarse cluster; 0: about the square root of the context's, 16 at least", "0 or more"
    )
    fine: int = setting(0, "tokens per fine cluster; 0: half of coarse", "0, or a divisor of coarse")
    coarse_keep: Budget = setting(0.5, "coarse clusters that are kept", "1 to all, or a ratio up to 1.0")
    fine_keep: Budget = setting(
        0.2, "fine clusters of all that are attended to", "1 to all, or a ratio up to 1.0"
    )
    dynamic: bool = setting(True, "choose clusters at each step; false: evict alone", "true, false")

    @property
    def leak(self) -> str:
        return "count" if self.threshold else "none"

    def sizes(self, context: int) -> tuple[int, int]:
        """Tokens per coarse cluster and per fine one, for a context of so many tokens."""
        coarse = self.coarse or cluster_size(context)
        return coarse, self.fine or max(1, coarse // 2)

    def plan(self, context: int, shape: ModelShape) -> Plan:
        self.check_options()
        coarse, fine = self.sizes(context)
        if self.coarse < 0:
            raise self.fail("coarse", "1 or more tokens, or 0 for the default")
        if fine < 0 or coarse % fine:
            raise self.fail("fine", f"a divisor of coarse, {coarse}, or 0 for its half")
        if not 0 <= self.threshold < 1:
            raise self.fail("threshold", "0 to 1, an attention weight")
        self.count("queries", context, "the context")
        for option in ("sink", "recent"):
            if getattr(self, option) < 0:
                raise self.fail(option, "0 or more tokens")
        kept = (
            self.per_layer("n_keep", context, shape.layers)
            if self.plan_is_public
            else [context] * shape.layers
        )
        leaders = self.leaders(shape.layers)
        layers = []
        for i, (n, leader) in enumerate(zip(kept, leaders, strict=True)):
            if n != kept[leader]:
                raise self.fail("n_keep", f"the same number in layers {leader} and {i}, which share a choice")
            sink = min(self.sink, n)
            sizes = (coarse, fine) if self.dynamic else ()
            totals = self.clusters_of(n, sink, self.recent, (coarse, fine))
            keeps = [
                self.count(option, total, f"the clusters of layer {i}") if total else 1
                for option, total in zip(("coarse_keep", "fine_keep"), totals, strict=True)
            ]
            layers.append(self.layer_plan(i, leader, n, sink, self.recent, sizes, keeps))
        return Plan(context, tuple(layers))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> MPCache:
        """Let the fine clusters that are chosen fill the budget, and as many coarse ones as they need.

        Static eviction stays as it is, but for a kept context of whole clusters. What it leaves within the
        budget needs no choice.
        """
        if isinstance(self.n_keep, tuple):
            raise self.fail("n_keep", "one number for all layers, to be set to a budget")
        coarse, fine = self.sizes(context)
        kept = self.count("n_keep", context, "the context")
        (total,) = self.clusters_of(kept, self.sink, self.recent, (coarse,))
        whole = self.sink + self.recent + total * coarse
        if not self.dynamic or not total or whole <= tokens:
            return replace(self, n_keep=tokens, threshold=0.0, dynamic=False)
        return replace(self._filled(tokens, whole, coarse, fine), n_keep=whole, threshold=0.0)

    def selector_at_budget(self, tokens: int, context: int, shape: ModelShape) -> MPCache:
        """Choose so many by clusters: what fills no cluster of the context always attends, too."""
        if context <= tokens:
            return replace(self, coarse_keep=1.0, fine_keep=1.0)
        return self._filled(tokens, context, *self.sizes(context))

    def selector_at_share(self, share: float) -> MPCache:
        return replace(self, coarse_keep=max(float(self.coarse_keep), share), fine_keep=share)

    def _filled(self, tokens: int, kept: int, coarse: int, fine: int) -> MPCache:
        """Choose `tokens` of so many kept ones, or fewer by less than a fine cluster."""
        (total,) = self.clusters_of(kept, self.sink, self.recent, (coarse,))
        always = kept - total * coarse
        least = always + fine if total else kept
        if tokens < least:
            raise self.too_few(tokens, least, "sink, recent, what fills no cluster, and a fine cluster")
        chosen = (tokens - always) // fine
        above = max(-(-chosen * fine // coarse), self.count("coarse_keep", total, "the clusters"))
        return replace(self, coarse_keep=above, fine_keep=chosen)

    def window(self, context: int) -> int:
        return min(context, tokens_of(self.queries, context))

    def as_selector(self) -> MPCache:
        for option in ("n_keep", "threshold"):
            if getattr(self, option) != getattr(type(self), option):
                raise self.fail(option, "none on the right of |, where it evicts nothing")
        return replace(self, n_keep=1.0, dynamic=True)

    @property
    def plan_is_public(self) -> bool:
        return not self.threshold or self.n_keep != type(self).n_keep

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        """Tokens of each layer above the threshold, at least one; a sharing layer keeps its leader's."""
        context = prefill.k[0].shape[1]
        leaders = self.leaders(len(prefill.k))
        above = {
            i: int((self._importance(prefill, i, context, kernels) > self.threshold).sum())
            for i in set(leaders)
        }
        return [max(1, above[i]) for i in leaders]

    def with_counts(self, counts: Sequence[int]) -> MPCache:
        return replace(self, n_keep=tuple(counts))

    @property
    def counts_given(self) -> tuple[int, ...]:
        return tuple(map(int, self.n_keep)) if isinstance(self.n_keep, tuple) else ()

    def _importance(self, prefill: Prefill, layer: int, context: int, kernels: Backend) -> torch.Tensor:
        """(T,): what the last queries pay to each token on average, or at most; sink and recent first."""
        q, k = prefill.q_window[layer], prefill.k[layer]
        if self.threshold:
            importance = largest_attention(q, k, prefill.first_position)
        else:
            importance = kernels.window_importance(q, k, prefill.first_position)
        importance[: self.sink] = torch.inf
        importance[max(0, context - self.recent) :] = torch.inf
        return importance

    def on_shares(self, tokens: int, shape: ModelShape) -> SharedEviction:
        """Evict as the static part does; what is chosen of it at each step is the other policy's matter."""
        if self.threshold:
            raise self.fail("threshold", "none on shares, where it would tell how many tokens stay")
        layers = self.plan(tokens, shape).layers
        kept = tuple(layer.kept for layer in layers)
        first = min(self.sink, *kept)
        return SharedEviction(
            tokens, self.window(tokens), first, min(self.recent, min(kept) - first), kept,
            tuple(self.leaders(shape.layers)), by_head=False,
        )  # fmt: skip

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        mine = plan.layers[layer]
        assert isinstance(mine, ClusterPlan)
        importance = self._importance(prefill, mine.leader, plan.context, kernels)
        best = torch.sort(importance, descending=True, stable=True).indices[: mine.kept]
        return best.sort().values


def largest_attention(q: torch.Tensor, k: torch.Tensor, first_position: int) -> torch.Tensor:
    """(T,): each token's largest attention weight, over the window's queries and all heads.

    q: (heads, w, d), scaled; k: (KV, T, d).
    """
    group = q.shape[0] // k.shape[0]
    rows = torch.arange(q.shape[1], device=k.device) + first_position
    later = torch.arange(k.shape[1], device=k.device) > rows[:, None]
    largest = torch.zeros(k.shape[1], device=k.device)
    for head in range(q.shape[0]):
        scores = q[head].float() @ k[head // group].float().T
        attention = scores.masked_fill(later, -torch.inf).softmax(-1)
        largest = torch.maximum(largest, attention.amax(0))
    return largest

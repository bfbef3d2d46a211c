"""mpcache: static eviction, then two levels of clusters chosen by the query (arXiv 2501.06807).

Kept tokens stand as [sink | clusters | window]; sink, window and generated tokens always attend and
are never scored for selection, so no token is gathered twice. What does not fill a coarse cluster
belongs to the window: there are no ragged clusters and no padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels import Backend
from mpcache.ops import Ops, Value
from mpcache.policy.base import Budget, Plan, Policy, pad_visible, tokens_of
from mpcache.prefill import Prefill
from mpcache.secure.program import Program, at


@dataclass(frozen=True)
class MPCache(Policy):
    """n_keep: context tokens that survive.  coarse, fine: tokens per cluster (0: 32 and 16, or 16
    and 8 for contexts below 1024).  coarse_keep: of the coarse clusters.  fine_keep: of all fine
    clusters.  alpha: weight of r_max.  sink, recent: always attended.  queries: the last ones that
    judge importance.
    """

    name = "mpcache"
    source = "MPCache, arXiv 2501.06807"

    n_keep: Budget = 0.75
    coarse: int = 0
    fine: int = 0
    coarse_keep: Budget = 0.5
    fine_keep: Budget = 0.2
    alpha: float = 0.6
    sink: int = 4
    recent: int = 16
    queries: Budget = 0.2

    def plan(self, context: int) -> Plan:
        kept = tokens_of(self.n_keep, context)
        coarse = self.coarse or (32 if context >= 1024 else 16)
        fine = self.fine or coarse // 2
        if kept > context:
            raise self.fail("n_keep", f"1 to {context}, the context, or a ratio up to 1.0")
        if not 0 <= self.alpha <= 1:
            raise self.fail("alpha", "0 to 1")
        for option in ("sink", "recent"):
            if getattr(self, option) < 0:
                raise self.fail(option, "0 or more")
        if fine < 1 or coarse % fine:
            raise self.fail("fine", f"a divisor of coarse, {coarse}")
        sink = min(self.sink, kept)
        n1 = max(0, kept - sink - self.recent) // coarse
        middle = n1 * coarse
        n2 = middle // fine
        k1 = tokens_of(self.coarse_keep, n1)
        k2 = tokens_of(self.fine_keep, n2)
        if n1 and k1 > n1:
            raise self.fail("coarse_keep", f"1 to {n1} clusters, or a ratio up to 1.0")
        if n1 and k2 > n2:
            raise self.fail("fine_keep", f"1 to {n2} clusters, or a ratio up to 1.0")
        k2 = min(k2, k1 * (coarse // fine))  # no more than the children of what level 1 keeps
        budgets = dict(coarse=coarse, fine=fine, n1=n1, k1=k1, n2=n2, k2=k2, sink=sink)
        attended = kept - middle + k2 * fine if n1 else kept
        return Plan(context, kept, n1 + n2, attended, budgets)

    def window(self, context: int) -> int:
        return min(context, tokens_of(self.queries, context))

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        importance = kernels.window_importance(
            prefill.q_window[layer], prefill.k[layer], prefill.first_position
        )
        # Always kept: the sink and the recent window, as they always attend.
        importance[: plan.budgets["sink"]] = torch.inf
        importance[plan.context - min(self.recent, plan.kept) :] = torch.inf
        best = torch.sort(importance, descending=True, stable=True).indices[: plan.kept]
        return best.sort().values

    def represent(self, k: torch.Tensor, plan: Plan, kernels: Backend) -> torch.Tensor | None:
        b = plan.budgets
        if not b["n1"]:
            return None
        middle = k[:, b["sink"] : b["sink"] + b["n1"] * b["coarse"]]
        levels = (kernels.cluster_extremes(middle, b[size]) for size in ("coarse", "fine"))
        return torch.cat([kernels.representatives(*extremes, self.alpha) for extremes in levels], 1)

    def weigh(
        self, ops: Ops, plan: Plan, scores: Value, visible: torch.Tensor | None
    ) -> Program[tuple[Value, Value]]:
        b = plan.budgets
        if not b["n1"]:
            return (yield from super().weigh(ops, plan, scores, visible))
        kv, rows, columns = scores.shape
        n = columns - plan.representatives
        sink, middle = b["sink"], b["n1"] * b["coarse"]
        children, k1, k2 = b["coarse"] // b["fine"], b["k1"], b["k2"]

        # Level 1 picks coarse clusters and brings their children's scores and tokens' scores along;
        # level 2 picks among the children.
        tokens = scores[..., sink : sink + middle].reshape(kv, rows, b["n1"], b["coarse"])
        fine = scores[..., n + b["n1"] :].reshape(kv, rows, b["n1"], children)
        coarse = scores[..., n : n + b["n1"]]
        first, (fine, tokens) = yield from at("select/coarse", ops.top(coarse, k1, [fine, tokens]))
        fine = fine.reshape(kv, rows, k1 * children)
        tokens = tokens.reshape(kv, rows, k1 * children, b["fine"])
        second, (tokens,) = yield from at("select/fine", ops.top(fine, k2, [tokens]))

        chosen = k2 * b["fine"]
        always = ops.cat([scores[..., :sink], scores[..., sink + middle : n]], -1)
        attended = ops.cat([tokens.reshape(kv, rows, chosen), always], -1)
        e, total = yield from at("softmax", ops.softmax(attended, pad_visible(visible, chosen + n - middle)))

        # The weights go back to their tokens' places, where resident V waits for them.
        spread = e[..., :chosen].reshape(kv, rows, k2, b["fine"])
        spread = yield from at("scatter/fine", second.scatter(spread))
        spread = yield from at("scatter/coarse", first.scatter(spread.reshape(kv, rows, k1, b["coarse"])))
        e_sink, e_rest = e[..., chosen : chosen + sink], e[..., chosen + sink :]
        return ops.cat([e_sink, spread.reshape(kv, rows, middle), e_rest], -1), total

"""random and oracle: what a policy at the same budget must beat, and what none can."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Value, as_tensor, as_value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache.runtime.program import Program, at, local
from mpcache_kernels import Backend


@dataclass(frozen=True)
class Random(Policy):
    """Options of random."""

    name = "random"
    source = "uniform choice, for calibration"
    needs = "nothing"
    evicts = True

    example = "random:n_keep=0.1,seed=3"

    n_keep: Budget = setting(
        0.2,
        "context tokens that stay, drawn uniformly for each layer",
        "1 to the context, or a ratio up to 1.0",
    )
    seed: int = setting(0, "of the draw; public", "0 to 2^31 - 1")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if not 0 <= self.seed < 2**31:
            raise self.fail("seed", "0 to 2^31 - 1")
        kept = self.count("n_keep", context, "the context")
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Random:
        return replace(self, n_keep=tokens)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + layer)
        drawn = torch.randperm(plan.context, generator=generator)[: plan.layers[layer].kept]
        return drawn.sort().values


@dataclass(frozen=True)
class Oracle(Policy):
    """Options of oracle."""

    name = "oracle"
    source = "exact top-k of the true attention, for calibration"
    needs = "every score in the clear"
    plain_only = True
    selects = True

    example = "oracle:k=0.1"

    k: Budget = setting(
        0.2,
        "context tokens that each query head attends to, its highest scores",
        "1 to the context, or a ratio up to 1.0",
    )

    def plan(self, context: int, shape: ModelShape) -> Plan:
        k = self.count("k", context, "the context")
        return Plan(context, (LayerPlan(context, k, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Oracle:
        return replace(self, k=tokens)

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, kept = view.ops, view.plan.layers[view.index].kept
        scores = as_tensor(view.biased((yield from at("scores", ops.scores(q, view.layer.k)))))
        order = torch.sort(scores[..., :kept], descending=True, stable=True).indices
        others = order[..., view.plan.layers[view.index].attended :]
        scores = scores.scatter(-1, others, -torch.inf)
        e, total = yield from at("softmax", ops.softmax(as_value(scores), view.visible(view.tokens)))
        out, _ = yield from average(view, local(e), total)
        return out

"""tova: at every step the token that the last query looks at least is dropped (arXiv 2401.06104)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.ops import Value
from mpcache.policy.evicting import Evicting
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import Budget, Plan, setting
from mpcache_kernels import Backend


@dataclass(frozen=True)
class Tova(Evicting):
    """Options of tova."""

    name = "tova"
    source = "TOVA, arXiv 2401.06104"
    no_shares = "it drops a token at every step, by that step's query"
    needs = "the context's last query; an oblivious argmin per layer and step"
    evicts = True

    example = "tova:cap=256"

    cap: Budget = setting(
        0.2,
        "tokens that live, the same ones in all heads of a layer",
        "1 to the context, or a ratio up to 1.0",
    )

    def plan(self, context: int, shape: ModelShape) -> Plan:
        return self.living_plan(context, shape, self.count("cap", context, "the context"), 0)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Tova:
        return replace(self, cap=tokens)

    def window(self, context: int) -> int:
        return 1

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        paid = kernels.window_importance(prefill.q_window[layer], prefill.k[layer], prefill.first_position)
        best = torch.sort(paid, descending=True, stable=True).indices[: plan.layers[layer].kept]
        return best.sort().values

    def importance(self, view: LayerView, attention: Value, before: Value | None) -> tuple[Value, int]:
        """Sum the last token's queries over all heads: at most one each."""
        last = attention[:, attention.shape[1] - view.shape.group :].sum(1)
        return last.sum(0, keepdim=True), 1 << view.shape.heads.bit_length()

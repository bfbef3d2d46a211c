"""promptdistill: at one layer the last token chooses, and only the chosen ones go on (PromptDistill).

The document is read as usual up to that layer. Its last token's scores, raw, on average over the heads and
over 5 neighbours, choose k tokens. The hidden states of all others stop there: later layers read the chosen
ones alone, at their own positions, so that their keys and values differ from those of the whole document's.

Differs from the paper: the last token always stays; with `truncate`, which the paper has as an option, the
layers up to that one keep the chosen tokens, too, and so the cache is as small in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.model.residual import read_on, stream_at
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import Kept, take
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache_kernels import Backend

DEPTH = 13 / 32  # where the last token chooses, as published


@dataclass(frozen=True)
class PromptDistill(Policy):
    """Options of promptdistill."""

    name = "promptdistill"
    source = "PromptDistill, arXiv 2503.23274"
    needs = "the context's last query; a second reading of the chosen tokens by the later layers"
    evicts = True
    example = "promptdistill:k=256,layer=12"

    k: Budget = setting(0.2, "context tokens that go on", "1 to the context, or a ratio up to 1.0")
    layer: int = setting(-1, "layer that chooses; -1: at 13/32 of the depth", "-1, or 0 to the last layer")
    pool: int = setting(5, "tokens over which scores are averaged, so that neighbours stay together", "odd")
    truncate: bool = setting(True, "layers up to that one keep the chosen tokens alone", "true, false")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if not -1 <= self.layer < shape.layers:
            raise self.fail("layer", f"-1, or 0 to {shape.layers - 1}")
        if self.pool < 1 or self.pool % 2 == 0:
            raise self.fail("pool", "an odd number of tokens")
        kept = self.count("k", context, "the context")
        whole = 0 if self.truncate else self._chooser(shape.layers) + 1
        before, behind = LayerPlan(context, context, 0), LayerPlan(kept, kept, 0)
        return Plan(context, (before,) * whole + (behind,) * (shape.layers - whole))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> PromptDistill:
        return replace(self, k=tokens, truncate=True)

    def _chooser(self, layers: int) -> int:
        return self.layer if self.layer >= 0 else min(layers - 1, round(DEPTH * layers))

    def window(self, context: int) -> int:
        return 1

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        if plan.layers[layer].kept == plan.context:
            return torch.arange(plan.context, device=prefill.k[0].device)
        chooser = self._chooser(len(plan.layers))
        q, k = prefill.q_window[chooser][:, -1:], prefill.k[chooser]  # (heads, 1, d), (KV, T, d)
        scores = (q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)).mean(0)  # (1, T)
        pooled = F.avg_pool1d(scores, self.pool, 1, self.pool // 2)[0]
        pooled[-1] = torch.inf
        return (
            torch.sort(pooled, descending=True, stable=True).indices[: plan.layers[layer].kept].sort().values
        )

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        rows, chooser = self.evict(prefill, layer, plan, kernels), self._chooser(len(plan.layers))
        if layer <= chooser:
            return [Kept(rows, take(prefill.k[layer], rows), take(prefill.v[layer], rows))]
        note = ("promptdistill", chooser, self.pool, len(rows))
        if note not in prefill.notes:
            x = stream_at(prefill, chooser + 1)[rows]
            prefill.notes[note] = read_on(prefill, x, rows, chooser + 1)
        keys, values = prefill.notes[note]
        return [Kept(rows, keys[layer - chooser - 1], values[layer - chooser - 1])]

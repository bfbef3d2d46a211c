"""windowkv: windows of 8 tokens, kept by the attention of the context's last tokens (WindowKV).

A token's vote is the attention that the suffix's queries pay it, on average over all heads. A window's
score is the mean of its tokens' votes (`score=average`) or of its four highest (`score=max`). The suffix
and the best windows stay, those of the first layer of a group of 8 in all its layers. Later groups keep
less: the budget falls from the first group to the last by even steps.

Differs from the paper: no classifier reads the question to choose between `average` and `max`, because the
option is public and the question is not there yet. A rest of the budget that fills no window goes to the
tokens before the suffix. At a budget of tokens all groups keep the same number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.base import Policy
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache_kernels import Backend

SCORES = ("average", "max")
HIGHEST = 4  # votes of a window that count with score=max


@dataclass(frozen=True)
class WindowKV(Policy):
    """Options of windowkv."""

    name = "windowkv"
    source = "WindowKV, arXiv 2503.17922"
    needs = "the context's last queries"
    evicts = True
    example = "windowkv:cap=256,group=4"

    cap: Budget = setting(
        0.2,
        "context tokens that stay, the mean over groups",
        "1 to the context, or a ratio up to 1.0",
    )
    suffix: int = setting(16, "last queries, which vote and whose tokens stay", "1 or more")
    size: int = setting(8, "tokens per window", "1 or more")
    score: str = setting("average", "how a window's votes become its score", "average, max")
    group: int = setting(8, "layers that keep the same tokens", "1 or more")
    decay: float = setting(  # published: 6/14
        0.43, "how much more the first group keeps, and the last one less", "0 up to 1"
    )

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.score not in SCORES:
            raise self.fail("score", ", ".join(SCORES))
        for name in ("suffix", "size", "group"):
            if getattr(self, name) < 1:
                raise self.fail(name, "1 or more")
        if not 0 <= self.decay < 1:
            raise self.fail("decay", "0 up to 1, a part of the budget")
        cap = self.count("cap", context, "the context")
        last = (shape.layers - 1) // self.group
        layers = []
        for i in range(shape.layers):
            tilt = self.decay * (1 - 2 * (i // self.group) / last) if last else 0.0
            kept = max(1, min(context, round(cap * (1 + tilt))))
            layers.append(LayerPlan(kept, kept, 0))
        return Plan(context, tuple(layers))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> WindowKV:
        return replace(self, cap=tokens, decay=0.0)

    def window(self, context: int) -> int:
        return min(context, self.suffix)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        first, kept = layer // self.group * self.group, plan.layers[layer].kept
        votes = kernels.window_importance(prefill.q_window[first], prefill.k[first], prefill.first_position)
        last = min(self.suffix, kept)
        there = (plan.context - last) // self.size
        taken = min(there, (kept - last) // self.size)
        best = self._best(votes[: there * self.size].reshape(there, self.size), taken)
        inside = (best[:, None] * self.size + torch.arange(self.size, device=best.device)).flatten()
        return self._filled(inside, plan.context, kept, last)

    def _best(self, votes: torch.Tensor, taken: int) -> torch.Tensor:
        """Choose windows by their votes (windows, size): ascending."""
        if self.score == "max":
            votes = votes.sort(-1, descending=True).values[:, :HIGHEST]
        return torch.sort(votes.mean(-1), descending=True, stable=True).indices[:taken].sort().values

    @staticmethod
    def _filled(inside: torch.Tensor, context: int, kept: int, last: int) -> torch.Tensor:
        """Add the suffix, and the last tokens before it that stand in no chosen window: ascending."""
        worth = torch.arange(context, device=inside.device, dtype=torch.float64)
        worth[context - last :] = 2 * context
        worth[inside] = 2 * context
        return torch.sort(worth, descending=True, stable=True).indices[:kept].sort().values

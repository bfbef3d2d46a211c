"""topv: tokens kept by the mass that an optimal transport moves from them (TopV's score, on a text cache).

At layer 2 each token's hidden state, as it enters the layer, is a source, and each one behind it, normed, a
target. Moving costs what the two differ by and how far apart they stand; three rounds of Sinkhorn's
algorithm give the plan of least cost, and a source that much mass leaves is important. One set of tokens is
kept in all layers, and every m-th of the others is recovered, evenly spread, as part of the budget.

Differs from the paper: positions are those of a text, so that the cost of being far from an image's centre
is left out; the first and the last tokens stay, which a text cache cannot do without; pruning is of the
cache alone, and no hidden state stops.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill, normalise
from mpcache.model.residual import stream_at
from mpcache.policy.base import Policy
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache_kernels import Backend

LAYER = 2  # where tokens are judged, as published
ROUNDS = 3  # of Sinkhorn's algorithm
SHARPNESS = 0.1  # of the plan: the cost, whose mean is one, that divides mass by e
SINK = RECENT = 4  # first and last tokens, which stay


@dataclass(frozen=True)
class TopV(Policy):
    """Options of topv."""

    name = "topv"
    source = "TopV, arXiv 2503.18278"
    needs = "hidden states at one layer; work that grows with the square of the context"
    evicts = True
    example = "topv:cap=256,recover=0.2"

    cap: Budget = setting(0.2, "context tokens that stay", "1 to the context, or a ratio up to 1.0")
    recover: float = setting(0.1, "share of them that is taken evenly from the others", "0 up to 1")
    far: float = setting(0.5, "weight of the distance in tokens, beside that of hidden states", "0 or more")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if not 0 <= self.recover < 1:
            raise self.fail("recover", "0 up to 1")
        if not 0 <= self.far < float("inf"):
            raise self.fail("far", "0 or more")
        kept = self.count("cap", context, "the context")
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> TopV:
        return replace(self, cap=tokens)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        context, kept = plan.context, plan.layers[layer].kept
        note = ("topv", self.far)
        if note not in prefill.notes:
            judged = min(LAYER, len(prefill.k) - 1)
            source, behind = stream_at(prefill, judged), stream_at(prefill, judged + 1)
            prefill.notes[note] = transported(normalise(source, 1e-5), normalise(behind, 1e-5), self.far)
        worth = prefill.notes[note].clone()
        worth[:SINK] = torch.inf
        worth[max(0, context - RECENT) :] = torch.inf
        order = torch.sort(worth, descending=True, stable=True).indices
        again = min(int(self.recover * kept), context - kept)
        best, others = order[: kept - again], order[kept - again :].sort().values
        step = (torch.arange(again, device=order.device) * 2 + 1) * len(others) // max(1, 2 * again)
        return torch.cat([best, others[step]]).sort().values


def transported(source: torch.Tensor, target: torch.Tensor, far: float) -> torch.Tensor:
    """Return the mass (T,) that leaves each source, after three rounds of Sinkhorn's algorithm.

    source, target: (T, width).  The last of each round's two steps makes the columns' sums right, so that the
    rows' tell sources apart.
    """
    n = len(source)
    apart = torch.cdist(source, target).square()
    place = torch.arange(n, device=source.device, dtype=apart.dtype)
    near = torch.exp(-((place[:, None] - place) / max(1.0, n / 8)).square() / 2)
    cost = apart / apart.mean().clamp(min=1e-9) + far * (1 - near)
    plan = torch.exp(-cost / SHARPNESS + (cost / SHARPNESS).amin(1, keepdim=True)).double()
    for _ in range(ROUNDS):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True).clamp(min=1e-300)
    return plan.sum(1)

"""pact: unimportant tokens pruned, the others merged by density-peak clusters (PACT, on a text cache).

A token's importance is what a layer's mean query would pay it, over all heads, times the length of its
hidden state. The most important 55 % are clustered, for each KV head, by the cosine of their keys: a
token's density is the sum of its nearness to all others, its distance that to the nearest denser one, and
the most distant ones are centres. Every other token joins the nearest centre; a pruned one as well, if it
is within 1.5 times the cutoff. A cluster is kept as its centre's key, the mean of its values, and the
logarithm of its size, which is added to the centre's logits.

Differs from the paper: a public number of centres is taken, in place of all that are farther than the
cutoff, whose number would tell about the document. What is merged are cached values, not hidden states
before the layers behind. Queries are averaged over the whole context, in each layer; the first and last
tokens are centres and stay by themselves, which a text cache cannot do without.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.model.residual import stream_sizes
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import Kept, take
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting, tokens_of
from mpcache_kernels import Backend

SINK = RECENT = 4  # first and last tokens, which stay
REACH = 1.5  # cutoffs within which a pruned token is merged
LARGEST_SIZE = 64  # of a cluster, as far as its logarithm counts


@dataclass(frozen=True)
class Pact(Policy):
    """Options of pact."""

    name = "pact"
    source = "PACT, arXiv 2504.08966"
    needs = (
        "all of the context's queries; hidden states' lengths; work that grows with the square of the context"
    )
    evicts = True
    example = "pact:centres=128,cutoff=0.3"

    keep: Budget = setting(
        0.55, "context tokens that are not pruned", "1 to the context, or a ratio up to 1.0"
    )
    centres: Budget = setting(
        0.2, "clusters that stay, per KV head", "1 to the context, or a ratio up to 1.0"
    )
    cutoff: float = setting(0.21, "cosine distance; a pruned token within 1.5 times it is merged", "0 to 2")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if not 0 <= self.cutoff <= 2:
            raise self.fail("cutoff", "0 to 2")
        self.count("keep", context, "the context")
        kept = self.count("centres", context, "the context")
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    @property
    def largest_bias(self) -> float:
        return math.log(LARGEST_SIZE)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Pact:
        return replace(self, centres=tokens)

    def window(self, context: int) -> int:
        return context

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        (kept,) = self.retain(prefill, layer, plan, kernels)
        return kept.rows

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        if (self, layer) not in prefill.notes:
            prefill.notes[self, layer] = self._merged(prefill, layer, plan.layers[layer].kept)
        found: list[Kept] = prefill.notes[self, layer]
        return found

    def importance(self, prefill: Prefill, layer: int) -> torch.Tensor:
        """Return what the mean query pays, over all heads, times hidden states' lengths: (T,)."""
        q, k = prefill.q_window[layer].mean(1, keepdim=True), prefill.k[layer]
        paid = (q @ k.repeat_interleave(len(q) // len(k), 0).transpose(1, 2)).softmax(-1).mean((0, 1))
        return paid * stream_sizes(prefill)[layer].to(paid)

    def _merged(self, prefill: Prefill, layer: int, centres: int) -> list[Kept]:
        """Cluster the important tokens of each KV head."""
        k, v = prefill.k[layer], prefill.v[layer]
        n = k.shape[1]
        worth = self.importance(prefill, layer)
        worth[:SINK] = torch.inf
        worth[max(0, n - RECENT) :] = torch.inf
        spared = max(centres, min(n, tokens_of(self.keep, n)))
        order = torch.sort(worth, descending=True, stable=True).indices
        important = torch.zeros(n, device=k.device).index_fill(0, order[:spared], 1.0)
        rows, values, biases = [], [], []
        for head in range(len(k)):
            unit = F.normalize(k[head], dim=-1)
            apart = 1 - unit @ unit.T
            picked = density_peaks(apart, important, centres)
            merged, size = self._join(apart, important, picked, v[head])
            rows.append(picked)
            values.append(merged)
            biases.append(size.clamp(max=LARGEST_SIZE).log())
        stay = torch.stack(rows)
        return [Kept(stay, take(k, stay), torch.stack(values), torch.stack(biases))]

    def _join(
        self, apart: torch.Tensor, important: torch.Tensor, picked: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Let each token join the nearest of the picked centres: their mean values (c, d), and sizes (c,)."""
        n = len(apart)
        nearest = apart[:, picked].min(1)
        joins = (important > 0) | (nearest.values <= REACH * self.cutoff)
        place = torch.arange(n, device=v.device)
        alone = (place < SINK) | (place >= n - RECENT)  # nobody joins them, and they join nobody
        member = F.one_hot(nearest.indices, len(picked)).to(v) * (joins & ~alone)[:, None]
        member = member * (~alone[picked])[None]
        own = F.one_hot(picked, n).to(v)  # (c, T): a centre is a member of its own cluster alone
        member = member * (1 - own.sum(0))[:, None] + own.T
        size = member.sum(0)
        return (member.T @ v) / size[:, None], size


def density_peaks(apart: torch.Tensor, important: torch.Tensor, centres: int) -> torch.Tensor:
    """Choose the centres of important tokens by their distances apart (T, T): positions, ascending.

    The first and last tokens come first, whatever their density.
    """
    n = len(apart)
    near = torch.exp(-(apart / 2).square()) * important
    density = near.sum(1)
    place = torch.arange(n, device=apart.device)
    earlier = place[:, None] > place
    denser = (density > density[:, None]) | ((density == density[:, None]) & earlier)
    denser = denser & (important > 0)
    far = apart.masked_fill(~denser, torch.inf).amin(1)
    far = far.masked_fill(important == 0, -1.0)
    far = far.masked_fill((place < SINK) | (place >= n - RECENT), torch.inf)
    return torch.sort(far, descending=True, stable=True).indices[:centres].sort().values

"""What policies share of attention: the average of values, heads of different counts, importance by head."""

from __future__ import annotations

import torch

from mpcache.cache import SplitLayer
from mpcache.model.prefill import Prefill
from mpcache.ops import Value, as_tensor
from mpcache.policy.layer_view import (
    LayerView,
)
from mpcache.runtime.program import Program, at, together
from mpcache_kernels import Backend


def average(view: LayerView, weights: Program[Value], total: Value) -> Program[tuple[Value, Value]]:
    """Average cached values by weights (KV, rows, n) over total (KV, rows, 1): (KV, rows, d), and 1 / total.

    The division of softmax comes last. What the weights still cost runs beside the reciprocal.
    """
    ops = view.ops

    def weighted() -> Program[Value]:
        w = yield from weights
        return (yield from at("attend", ops.weighted_sum(w, view.layer.v)))

    out, inverse = yield from together(weighted(), at("attend/reciprocal", ops.reciprocal(total)))
    return (yield from at("attend", ops.mul(out, inverse))), inverse


def attend_split(kernels: Backend, layer: SplitLayer, q: torch.Tensor) -> torch.Tensor:
    """Attend with one token's q (KV, rows, d) to a layer in the clear whose heads hold different numbers."""
    keys, values, biases, counts = [], [], [], []
    for part in layer.parts:
        k, v = as_tensor(part.k), as_tensor(part.v)
        heads, n, d = k.shape
        bias = k.new_zeros(heads, n)
        if part.bias is not None:
            bias[:, : part.bias.shape[-1]] = as_tensor(part.bias)[:, 0]
        keys.append(k.reshape(-1, d))
        values.append(v.reshape(-1, d))
        biases.append(bias.reshape(-1))
        counts += [n] * heads
    order = torch.tensor([head for some in layer.heads for head in some], device=q.device)
    starts = torch.tensor([0, *counts]).cumsum(0)
    out = kernels.ragged_attend(
        q[order], torch.cat(keys), torch.cat(values), torch.cat(biases), starts, max(counts)
    )
    return torch.empty_like(out).index_copy_(0, order, out)


def by_head(prefill: Prefill, layer: int, kernels: Backend) -> torch.Tensor:
    """Sum what the window's queries pay to each token, per KV head, mean over its group: (KV, T)."""
    q, k = prefill.q_window[layer], prefill.k[layer]
    heads = zip(q.chunk(len(k)), k.chunk(len(k)), strict=True)
    return torch.stack([kernels.window_importance(*pair, prefill.first_position) for pair in heads])

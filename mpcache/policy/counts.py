"""How many tokens each KV head keeps: the second part of `compact`.

Counts are (layers, kv_heads) whole numbers whose mean is the budget. Each is at least `least` and at most the
context.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 8  # tokens of a head, the first and last ones among them
OWN = 0.2  # adakv: what each head keeps of its budget in any case


def least_of(budget: int) -> int:
    """Return what each head keeps at least."""
    return min(LEAST, budget)


def equal(layers: int, kv_heads: int, budget: int) -> Tensor:
    """Give all heads the budget."""
    return torch.full((layers, kv_heads), budget)


def joint(scores: Tensor, budget: int) -> Tensor:
    """Keep the best tokens of all heads of the model, by their scores (layers, kv_heads, T)."""
    layers, kv_heads, _ = scores.shape
    return _best(scores.flatten(0, 1), budget, least_of(budget)).reshape(layers, kv_heads)


def adakv(scores: Tensor, budget: int) -> Tensor:
    """Keep the best tokens of each layer, whichever heads' they are (AdaKV, arXiv 2407.11550)."""
    own = max(least_of(budget), int(OWN * budget))
    return torch.stack([_best(layer, budget, own) for layer in scores])


def _best(scores: Tensor, budget: int, own: int) -> Tensor:
    """Count the best `budget` per row of (rows, T), each row's best `own` first: (rows,)."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True)
    ranked = order.values.clone()
    ranked[:, :own] = torch.inf
    flat = ranked.flatten().sort(descending=True, stable=True).indices[: budget * len(scores)]
    return torch.bincount(flat // scores.shape[1], minlength=len(scores)).cpu()


def shares(levels: list[float], errors: Tensor, ratio: float) -> Tensor:
    """Deal out a mean share of the tokens where it saves the most error: (layers, kv_heads).

    levels: rising shares from 0 to 1.  errors: (layers, kv_heads, levels), what each head loses there. The
    pieces of each head's lower convex hull are taken by falling slope, as long as there is something left.
    """
    layers, kv_heads, _ = errors.shape
    pieces = []
    for head, curve in enumerate(errors.flatten(0, 1).tolist()):
        hull = convex_hull(levels, curve)
        for left, right in zip(hull, hull[1:], strict=False):
            size = levels[right] - levels[left]
            pieces.append(((curve[left] - curve[right]) / size, head, size))
    found, rest = torch.zeros(layers * kv_heads, dtype=torch.float64), ratio * layers * kv_heads
    for _, head, size in sorted(pieces, key=lambda piece: (-piece[0], piece[1])):
        given = min(size, max(0.0, rest))
        found[head] += given
        rest -= given
    return found.reshape(layers, kv_heads)


def convex_hull(x: list[float], y: list[float]) -> list[int]:
    """Find the points of the lower convex hull of a curve over rising x, ends among them."""
    hull: list[int] = []
    for i in range(len(x)):
        while len(hull) > 1 and _above(x, y, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _above(x: list[float], y: list[float], a: int, b: int, c: int) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (y[b] - y[a]) * (x[c] - x[a]) >= (y[c] - y[a]) * (x[b] - x[a])


def from_shares(share: Tensor, budget: int, context: int) -> Tensor:
    """Scale shares to counts within their limits that add up to the budget's sum, by largest remainder."""
    least, total = least_of(budget), budget * share.numel()
    flat = share.flatten().double().clamp(min=1e-6)
    low, high = 0.0, context / float(flat.min())  # where all heads keep everything
    for _ in range(100):
        middle = (low + high) / 2
        if float((flat * middle).clamp(least, context).sum()) < total:
            low = middle
        else:
            high = middle
    exact = (flat * high).clamp(least, context)
    counts = exact.floor()
    rest = total - int(counts.sum())
    room = counts < context
    order = (exact - counts).masked_fill(~room, -1).sort(descending=True, stable=True).indices
    counts[order[:rest]] += 1
    return counts.long().reshape(share.shape)

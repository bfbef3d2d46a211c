"""Keys that stand for clusters of tokens: made by the document's owner, or on shares for generated tokens.

floors: r_min for the score `bound`, whose spans are r_max - r_min; else the one representative.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpcache.ops import Operand, Ops, Value
from mpcache.policy.layer_view import PlaintextContext
from mpcache.runtime.program import Program, together


def in_plaintext(
    known: PlaintextContext, k: torch.Tensor, size: int, score: str, alpha: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute floor and span (KV, n, d) of clusters of k (KV, n size, d), at the document's owner."""
    if score == "mean":
        return known.kernels.cluster_means(k, size), None
    if score == "linear":
        return known.kernels.cluster_representatives(k, size, alpha), None
    r_max, r_min = known.kernels.cluster_extremes(k, size)
    return r_min, r_max - r_min


def on_shares(
    ops: Ops, k: Value, sizes: Sequence[int], score: str, alpha: float, extreme: bool
) -> Program[tuple[list[Operand], list[Operand | None]]]:
    """Compute floors and spans, per level, of clusters of k (KV, n coarse, d).

    One round prepares them; extremes (`score` bound, or `extreme`) take log2(coarse) more.
    """
    kv, length, d = k.shape
    extreme = extreme or score == "bound"
    floors: list[Value] = []
    spans: list[Value] = []
    high = low = k
    for size in reversed(sizes):  # a coarse cluster's extremes are those of its fine ones
        if not extreme:
            floors.append(ops.scale(k.reshape(kv, length // size, size, d).sum(2), 1 / size))
            continue
        apart = high is not low
        high = high.reshape(kv, length // size, -1, d)
        low = low.reshape(kv, length // size, -1, d) if apart else high
        high, low = yield from extremes(ops, high, low)
        if score == "bound":
            floors.append(low)
            spans.append(high - low)
        else:
            floors.append(ops.scale(high, alpha) + ops.scale(low, 1 - alpha))
    kept = yield from together(*(ops.prepare(x) for x in (*reversed(floors), *reversed(spans))))
    levels = len(sizes)
    return kept[:levels], kept[levels:] or [None] * levels


def extremes(ops: Ops, high: Value, low: Value) -> Program[tuple[Value, Value]]:
    """Take maxima of high and minima of low (KV, n, s, d) over s: (KV, n, d) each. log2 s rounds.

    max(a, b) = b + max(a - b, 0) and min(a, b) = a - max(a - b, 0): where high is low, one comparison
    gives both.
    """
    while high.shape[2] > 1:
        half = high.shape[2] // 2
        a, b = high[:, :, :half], high[:, :, half : 2 * half]
        c, e = low[:, :, :half], low[:, :, half : 2 * half]
        if high is low:
            over = under = yield from ops.relu(a - b)
        else:
            over, under = yield from together(ops.relu(a - b), ops.relu(c - e))
        odd = slice(2 * half, None)
        high, low = ops.cat([b + over, high[:, :, odd]], 2), ops.cat([c - under, low[:, :, odd]], 2)
    return high[:, :, 0], low[:, :, 0]


def largest(ops: Ops, x: Value) -> Program[Value]:
    """Take the maxima of x (rows, s, n) over s: (rows, n). log2 s rounds."""
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        a, b = x[:, :half], x[:, half : 2 * half]
        x = ops.cat([b + (yield from ops.relu(a - b)), x[:, 2 * half :]], 1)
    return x[:, 0]

"""Find how much queries look at each token, without ever holding the map of all their scores.

The first pass finds softmax's denominators; the second adds up the columns (a context's last queries), or
takes their maxima (those of a second reading).
"""

# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcache_kernels.triton_kernels.tiles import (
    LOG2E,
    LOWEST,
    load_rows,
    on_device,
    product_type,
    split_length,
    strided,
    tile_product,
    tile_size,
)

LN2 = 0.6931471805599453


@triton.jit
def _add_keys(
    top, total, q, k, k_row, begin, stop, positions, length,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Update the maximum `top` and the sum `total` of exp2(s - top) per query by keys begin..stop-1."""
    for start in range(begin, stop, BN):
        columns = start + tl.arange(0, BN)
        s = tile_product(q, tl.trans(load_rows(k, columns, k_row, length, D, DP)), DOT) * LOG2E
        if MASKED:
            seen = (columns[None, :] <= positions[:, None]) & (columns < length)[None, :]
            s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(s - new_top[:, None]), 1)
        top = new_top
    return top, total


@triton.jit
def _row_log_sums(
    q, k, out, q_head, q_row, k_head, k_row, w, length, first, group, span,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute out[split, head, i] = log2 of the sum of exp(q_i . k_t) over the visible tokens of the split.

    One program: BM queries of one head, and `span` tokens, a multiple of BN.
    """
    row, head, split = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    q += head.to(tl.int64) * q_head
    k += (head // group).to(tl.int64) * k_head
    rows = row + tl.arange(0, BM)
    queries = load_rows(q, rows, q_row, w, D, DP)
    begin = split * span
    stop = tl.minimum(begin + span, tl.minimum(first + row + BM, length))
    # Tokens that all BM queries see need no mask: all but those of the last block or two.
    unmasked = begin + tl.maximum(tl.minimum(first + row + 1, stop) - begin, 0) // BN * BN
    top = tl.full((BM,), LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    top, total = _add_keys(
        top, total, queries, k, k_row, begin, unmasked, first + rows, length, D, DP, BN, DOT, False
    )
    top, total = _add_keys(
        top, total, queries, k, k_row, unmasked, stop, first + rows, length, D, DP, BN, DOT, True
    )
    heads = tl.num_programs(1)
    tl.store(out + (split * heads + head) * w + rows, top + tl.log2(total), mask=rows < w)


@triton.jit
def _add_queries(
    weights, q, q_row, keys, log_sums, begin, stop, first, columns, w,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the softmax weights of queries begin..stop-1 on the keys to `weights`, every BM-th in one row."""
    for start in range(begin, stop, BM):
        rows = start + tl.arange(0, BM)
        s = tile_product(load_rows(q, rows, q_row, w, D, DP), tl.trans(keys), DOT) * LOG2E
        # A query that is not there has an infinite denominator and adds nothing.
        new = tl.exp2(s - tl.load(log_sums + rows, mask=rows < w, other=float("inf"))[:, None])
        if MASKED:
            new = tl.where(columns[None, :] <= (first + rows)[:, None], new, 0.0)
        weights += new
    return weights


@triton.jit
def _column_sums(
    q, k, log_sums, out, q_head, q_row, k_head, k_row, w, length, first, group,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute out[head, t] = sum over the head's queries of their softmax weight on token t.

    One program: BN tokens and one head; it meets the queries that see any of them. Weights are added
    up thread by thread (BM, BN), and over the threads once, at the end.
    """
    column, head = tl.program_id(0) * BN, tl.program_id(1)
    q += head.to(tl.int64) * q_head
    k += (head // group).to(tl.int64) * k_head
    log_sums += head * w
    columns = column + tl.arange(0, BN)
    keys = load_rows(k, columns, k_row, length, D, DP)
    begin = tl.minimum(tl.maximum(column - first, 0), w)
    unmasked = tl.minimum(tl.maximum(column + BN - 1 - first, 0), w)  # from here on all BN are seen
    unmasked = tl.minimum(begin + (unmasked - begin + BM - 1) // BM * BM, w)
    weights = tl.zeros((BM, BN), tl.float32)
    weights = _add_queries(
        weights, q, q_row, keys, log_sums, begin, unmasked, first, columns, w, D, DP, BM, DOT, True
    )
    weights = _add_queries(
        weights, q, q_row, keys, log_sums, unmasked, w, first, columns, w, D, DP, BM, DOT, False
    )
    tl.store(out + head.to(tl.int64) * length + columns, tl.sum(weights, 0), mask=columns < length)


def window_importance(q_w: Tensor, k: Tensor, first_position: int) -> Tensor:
    """Compute `reference.window_importance`: (heads, w, d), (kv_heads, T, d) -> (T,) float32."""
    (heads, w, d), (kv_heads, length, _) = q_w.shape, k.shape
    if not w or not length:
        return torch.zeros(length, dtype=torch.float32, device=k.device)
    q_w, k = strided(q_w), strided(k)
    strides = (*q_w.stride()[:2], *k.stride()[:2])
    sizes = (w, length, first_position, heads // kv_heads)
    # Two programs fit on a Hopper multiprocessor. What stays in place (a program's queries, then its
    # keys) is the larger tile where there is room: each pass over the other is traffic.
    narrow = k.element_size() == 2
    shape = {"D": d, "DP": tile_size(d), "DOT": product_type(q_w, k)}
    launch = {"num_warps": 4, "num_stages": 3 if narrow else 2}
    bm, bn = min(128 if narrow else 64, tile_size(w)), 64 if narrow else 32
    row_blocks = triton.cdiv(w, bm)
    splits, span = split_length(min(length, first_position + w), row_blocks * heads, bn, k.device)
    log_sums = torch.empty(splits, heads, w, dtype=torch.float32, device=k.device)
    per_head = torch.empty(heads, length, dtype=torch.float32, device=k.device)
    with on_device(k.device):
        _row_log_sums[(row_blocks, heads, splits)](
            q_w, k, log_sums, *strides, *sizes, span, **shape, BM=bm, BN=bn, **launch
        )
        log_sum = log_sums[0] if splits == 1 else torch.logsumexp(log_sums * LN2, 0) / LN2
        bm, bn = min(64, tile_size(w)), 128 if narrow else 32
        _column_sums[(triton.cdiv(length, bn), heads)](
            q_w, k, log_sum, per_head, *strides, *sizes, **shape, BM=bm, BN=bn, **launch
        )
    return per_head.sum(0) / heads


@triton.jit
def _column_maxima(
    q, k, log_sums, row_scale, best_out, row_out, q_head, q_row, k_head, k_row,
    n, length, before, first, count, group,
    D: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute the largest scaled weight on each of `count` tokens from `first` on, and the query that has it.

    One program: BN tokens and one head; it walks all queries, and keeps the best of every BM-th apart.
    """
    column, head = tl.program_id(0) * BN, tl.program_id(1)
    q += head.to(tl.int64) * q_head
    k += (head // group).to(tl.int64) * k_head
    log_sums += head * n
    places = column + tl.arange(0, BN)
    columns = first + places
    keys = load_rows(k, columns, k_row, length, D, DP)
    best = tl.full((BM, BN), -1.0, tl.float32)
    owner = tl.zeros((BM, BN), tl.int32)
    for start in range(0, n, BM):
        rows = start + tl.arange(0, BM)
        there = rows < n
        s = tile_product(load_rows(q, rows, q_row, n, D, DP), tl.trans(keys), DOT) * LOG2E
        new = tl.exp2(s - tl.load(log_sums + rows, mask=there, other=float("inf"))[:, None])
        new = new * tl.load(row_scale + rows, mask=there, other=0.0)[:, None]
        new = tl.where(columns[None, :] <= (before + rows)[:, None], new, 0.0)
        new = tl.where(there[:, None], new, -1.0)
        better = new > best
        best = tl.where(better, new, best)
        owner = tl.where(better, rows[:, None], owner)
    most = tl.max(best, 0)
    lowest = tl.min(tl.where(best == most[None, :], owner, n), 0)
    at = head.to(tl.int64) * count + places
    tl.store(best_out + at, most, mask=places < count)
    tl.store(row_out + at, lowest, mask=places < count)


def repeat_importance(
    q: Tensor, k: Tensor, first: int, count: int, row_scale: Tensor, column_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `reference.repeat_importance`: (kv_heads, count) float32, and the queries as int64."""
    (heads, n, d), (kv_heads, length, _) = q.shape, k.shape
    group = heads // kv_heads
    q, k, row_scale = strided(q), strided(k), row_scale.float().contiguous()
    strides = (*q.stride()[:2], *k.stride()[:2])
    narrow = k.element_size() == 2
    shape = {"D": d, "DP": tile_size(d), "DOT": product_type(q, k)}
    launch = {"num_warps": 4, "num_stages": 3 if narrow else 2}
    bm, bn = min(128 if narrow else 64, tile_size(n)), 64 if narrow else 32
    row_blocks = triton.cdiv(n, bm)
    splits, span = split_length(length, row_blocks * heads, bn, k.device)
    log_sums = torch.empty(splits, heads, n, dtype=torch.float32, device=k.device)
    best = torch.empty(heads, count, dtype=torch.float32, device=k.device)
    rows = torch.empty(heads, count, dtype=torch.int32, device=k.device)
    with on_device(k.device):
        _row_log_sums[(row_blocks, heads, splits)](
            q, k, log_sums, *strides, n, length, length - n, group, span, **shape, BM=bm, BN=bn, **launch
        )
        log_sum = log_sums[0] if splits == 1 else torch.logsumexp(log_sums * LN2, 0) / LN2
        bm, bn = min(64, tile_size(n)), 64 if narrow else 32
        _column_maxima[(triton.cdiv(count, bn), heads)](
            q, k, log_sum, row_scale, best, rows, *strides, n, length, length - n, first, count, group,
            **shape, BM=bm, BN=bn, **launch,
        )  # fmt: skip
    best = (best * column_scale).reshape(kv_heads, group, count)
    most = best.amax(1, keepdim=True)
    head = (best == most).int().argmax(1, keepdim=True)  # the first of equal ones
    query = rows.reshape(kv_heads, group, count).gather(1, head).long() + n * head
    return most[:, 0], query[:, 0]

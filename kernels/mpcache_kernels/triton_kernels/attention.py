"""Attend by flash decoding, in splits of the tokens that are joined at the end.

Over rows gathered by cluster (the sink, chosen clusters and the recent window), or over KV heads that hold
different numbers of tokens, with a bias for each.
"""

# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcache_kernels.reference import check_selection
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


@triton.jit
def _attend_part(
    q, k, v, chosen, tops, totals, sums, q_row, k_head, k_row, v_head, v_row,
    length, heads_per_choice, choices_per_kv, m, sink, recent, span,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, SIZE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Attend with one row of choices, its heads (RP >= heads_per_choice), to `span` of its tokens.

    The tokens are numbered sink, chosen clusters, recent; what a program finds in its range of them goes
    to tops, totals (heads, splits) and sums (heads, splits, D): the scores' maximum (times log2 e),
    the sum of exp2 below it, and the sum of v so weighted.
    """
    split, choice = tl.program_id(0), tl.program_id(1)
    kv = choice // choices_per_kv
    k += kv.to(tl.int64) * k_head
    v += kv.to(tl.int64) * v_head
    d, members = tl.arange(0, DP), tl.arange(0, RP)
    queries = load_rows(q + choice * heads_per_choice * q_row, members, q_row, heads_per_choice, D, DP)
    attended = sink + m * SIZE + recent
    stop = tl.minimum(split * span + span, attended)
    top = tl.full((RP,), LOWEST, tl.float32)
    total = tl.zeros((RP,), tl.float32)
    acc = tl.zeros((RP, DP), tl.float32)
    for start in range(split * span, stop, BT):
        place = start + tl.arange(0, BT)
        in_cluster = place - sink
        clustered = (in_cluster >= 0) & (in_cluster < m * SIZE)
        cluster = tl.load(chosen + choice * m + in_cluster // SIZE, mask=clustered, other=0).to(tl.int32)
        always = tl.where(in_cluster < 0, place, place - attended + length)
        token = tl.where(clustered, sink + cluster * SIZE + in_cluster % SIZE, always)
        there = (cluster >= 0) & (token < length - recent)
        valid = (place < stop) & (there | (clustered == 0))

        mask = valid[:, None] & (d < D)[None, :]
        keys = tl.load(k + token[:, None] * k_row + d[None, :], mask=mask, other=0)
        values = tl.load(v + token[:, None] * v_row + d[None, :], mask=mask, other=0)
        s = tl.where(valid[None, :], tile_product(queries, tl.trans(keys), DOT) * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(s - new_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tile_product(weights, values, DOT)
        top = new_top
    to = (choice * heads_per_choice + members) * tl.num_programs(0) + split
    real = members < heads_per_choice
    tl.store(tops + to, top, mask=real)
    tl.store(totals + to, total, mask=real)
    tl.store(sums + to[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _join_parts(tops, totals, sums, out, splits, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr):
    """Bring the splits (SP >= splits) of one head to one maximum, add them up, and divide."""
    head, split, d = tl.program_id(0), tl.arange(0, SP), tl.arange(0, DP)
    parts = head * splits + split
    top = tl.load(tops + parts, mask=split < splits, other=float("-inf"))
    scale = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(scale * tl.load(totals + parts, mask=split < splits, other=0), 0)
    acc = tl.sum(scale[:, None] * load_rows(sums + head * splits * D, split, D, splits, D, DP), 0)
    tl.store(out + head * D + d, acc / total, mask=d < D)


def select_and_attend(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, sink: int, recent: int
) -> Tensor:
    """Compute `reference.select_and_attend`: (heads, d), two of (kv_heads, T, d), (rows, m) -> (heads, d)."""
    check_selection(q, k, chosen, size, sink, recent)
    (heads, d), (kv_heads, length, _), (rows, m) = q.shape, k.shape, chosen.shape
    out = torch.empty(heads, d, dtype=q.dtype, device=q.device)
    q, k, v, chosen = strided(q), strided(k), strided(v), chosen.contiguous()
    bt = 64 if k.element_size() == 2 else 32
    splits, span = split_length(sink + m * size + recent, rows, bt, q.device)
    tops, totals = torch.empty(2, heads, splits, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads, splits, d, dtype=torch.float32, device=q.device)
    dp = tile_size(d)
    with on_device(q.device):
        _attend_part[(splits, rows)](
            q, k, v, chosen, tops, totals, sums, q.stride(0), *k.stride()[:2], *v.stride()[:2],
            length, heads // rows, rows // kv_heads, m, sink, recent, span,
            D=d, DP=dp, RP=tile_size(heads // rows), BT=bt, SIZE=size, DOT=product_type(q, k, v),
            # The compiler spends three of these on the indices; two tiles of K and V remain in flight.
            num_warps=4, num_stages=5,
        )  # fmt: skip
        _join_parts[(heads,)](
            tops, totals, sums, out, splits, D=d, DP=dp, SP=triton.next_power_of_2(splits), num_warps=4
        )
    return out


@triton.jit
def _attend_ragged_part(
    q, k, v, bias, starts, tops, totals, sums, q_head, q_row, k_row, v_row, rows, span,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attend with the rows of one KV head (RP >= rows) to `span` of its tokens, or to what is left of them.

    What a program finds goes where `_attend_part` writes it; of no token, a total of 0.
    """
    split, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(starts + head).to(tl.int64)
    length = (tl.load(starts + head + 1) - begin).to(tl.int32)
    k += begin * k_row
    v += begin * v_row
    bias += begin
    d, members = tl.arange(0, DP), tl.arange(0, RP)
    queries = load_rows(q + head.to(tl.int64) * q_head, members, q_row, rows, D, DP)
    stop = tl.minimum(split * span + span, length)
    top = tl.full((RP,), LOWEST, tl.float32)
    total = tl.zeros((RP,), tl.float32)
    acc = tl.zeros((RP, DP), tl.float32)
    for start in range(split * span, stop, BT):
        token = start + tl.arange(0, BT)
        added = tl.load(bias + token, mask=token < stop, other=float("-inf")).to(tl.float32)
        s = tile_product(queries, tl.trans(load_rows(k, token, k_row, stop, D, DP)), DOT)
        s = (s + added[None, :]) * LOG2E
        new_top = tl.maximum(top, tl.max(s, 1))
        decay = tl.exp2(top - new_top)
        weights = tl.exp2(s - new_top[:, None])
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None] + tile_product(weights, load_rows(v, token, v_row, stop, D, DP), DOT)
        top = new_top
    to = (head * rows + members) * tl.num_programs(0) + split
    real = members < rows
    tl.store(tops + to, top, mask=real)
    tl.store(totals + to, total, mask=real)
    tl.store(sums + to[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


def ragged_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Compute `reference.ragged_attend`: (kv_heads, rows, d), two of (tokens, d), (tokens,) -> like q."""
    kv_heads, rows, d = q.shape
    out = torch.empty(kv_heads, rows, d, dtype=q.dtype, device=q.device)
    q, k, v, bias, starts = strided(q), strided(k), strided(v), bias.contiguous(), starts.to(q.device)
    bt = 64 if k.element_size() == 2 else 32
    splits, span = split_length(longest, kv_heads, bt, q.device)
    tops, totals = torch.empty(2, kv_heads * rows, splits, dtype=torch.float32, device=q.device)
    sums = torch.empty(kv_heads * rows, splits, d, dtype=torch.float32, device=q.device)
    dp = tile_size(d)
    with on_device(q.device):
        _attend_ragged_part[(splits, kv_heads)](
            q, k, v, bias, starts, tops, totals, sums, *q.stride()[:2], k.stride(0), v.stride(0), rows, span,
            D=d, DP=dp, RP=tile_size(rows), BT=bt, DOT=product_type(q, k, v), num_warps=4, num_stages=3,
        )  # fmt: skip
        _join_parts[(kv_heads * rows,)](
            tops, totals, sums, out, splits, D=d, DP=dp, SP=triton.next_power_of_2(splits), num_warps=4
        )
    return out

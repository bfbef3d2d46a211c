"""Attend to the sink, chosen clusters and the recent window: flash decoding over rows gathered by cluster."""

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

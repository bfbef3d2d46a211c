"""The kernels in Triton, for NVIDIA GPUs; `mpcache_kernels.reference` says what each of them means.

Imported by `kernels.backend` only, and only for a GPU. Inputs are float32 or bfloat16 with heads and
tokens at any stride; sums and softmaxes are float32. Nothing here uses atomics: a result is the same,
bit for bit, each time. docs/kernels.md holds the bytes and operations that each kernel cannot avoid.

Names: D head size, DP the power of two that holds it; *_head and *_row strides in elements.
"""

# mypy: disable-error-code="no-untyped-def"
# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcache_kernels.reference import check_selection

LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E); the GPU has exp2 only
LOWEST = tl.constexpr(-1e30)  # below any score, and finite: a difference of two is no NaN


@triton.jit
def _rows(x, rows, x_row, stop, D: tl.constexpr, DP: tl.constexpr):
    """x[rows] as a tile (rows, DP); zero from row `stop` and from dimension D on."""
    d = tl.arange(0, DP)
    mask = (rows < stop)[:, None] & (d < D)[None, :]
    return tl.load(x + rows[:, None] * x_row + d[None, :], mask=mask, other=0)


@triton.jit
def _dot(a, b, DOT: tl.constexpr):
    """a @ b with float32 sums: one tensor-core product, for float32 three that keep its precision."""
    return tl.dot(a.to(DOT), b.to(DOT), input_precision="tf32x3")


# -- importance: softmax's denominators first, then the columns' sums; the w x T map never exists


@triton.jit
def _add_keys(
    top, total, q, k, k_row, begin, stop, positions, length,
    D: tl.constexpr, DP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Running maximum `top` and sum `total` of exp2(s - top) per query, over keys begin..stop-1."""
    for start in range(begin, stop, BN):
        columns = start + tl.arange(0, BN)
        s = _dot(q, tl.trans(_rows(k, columns, k_row, length, D, DP)), DOT) * LOG2E
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
    """out[split, head, i] = log2 of the sum of exp(q_i . k_t) over the visible tokens of the split.

    One program: BM queries of one head, and `span` tokens, a multiple of BN.
    """
    row, head, split = tl.program_id(0) * BM, tl.program_id(1), tl.program_id(2)
    q += head.to(tl.int64) * q_head
    k += (head // group).to(tl.int64) * k_head
    rows = row + tl.arange(0, BM)
    queries = _rows(q, rows, q_row, w, D, DP)
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
    """Adds the softmax weights of queries begin..stop-1 on the keys to `weights`, every BM-th in one row."""
    for start in range(begin, stop, BM):
        rows = start + tl.arange(0, BM)
        s = _dot(_rows(q, rows, q_row, w, D, DP), tl.trans(keys), DOT) * LOG2E
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
    """out[head, t] = sum over the head's queries of their softmax weight on token t.

    One program: BN tokens and one head; it meets the queries that see any of them. Weights are added
    up thread by thread (BM, BN), and over the threads once, at the end.
    """
    column, head = tl.program_id(0) * BN, tl.program_id(1)
    q += head.to(tl.int64) * q_head
    k += (head // group).to(tl.int64) * k_head
    log_sums += head * w
    columns = column + tl.arange(0, BN)
    keys = _rows(k, columns, k_row, length, D, DP)
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
    """`reference.window_importance`: (heads, w, d), (kv_heads, T, d) -> (T,) float32."""
    (heads, w, d), (kv_heads, length, _) = q_w.shape, k.shape
    if not w or not length:
        return torch.zeros(length, dtype=torch.float32, device=k.device)
    q_w, k = _strided(q_w), _strided(k)
    strides = (*q_w.stride()[:2], *k.stride()[:2])
    sizes = (w, length, first_position, heads // kv_heads)
    # Two programs fit on a Hopper multiprocessor. What stays in place (a program's queries, then its
    # keys) is the larger tile where there is room: each pass over the other is traffic.
    narrow = k.element_size() == 2
    shape = {"D": d, "DP": _power(d), "DOT": _dot_type(q_w, k)}
    launch = {"num_warps": 4, "num_stages": 3 if narrow else 2}
    bm, bn = min(128 if narrow else 64, _power(w)), 64 if narrow else 32
    row_blocks = triton.cdiv(w, bm)
    splits, span = _split(min(length, first_position + w), row_blocks * heads, bn, k.device)
    log_sums = torch.empty(splits, heads, w, dtype=torch.float32, device=k.device)
    per_head = torch.empty(heads, length, dtype=torch.float32, device=k.device)
    with _on(k.device):
        _row_log_sums[(row_blocks, heads, splits)](
            q_w, k, log_sums, *strides, *sizes, span, **shape, BM=bm, BN=bn, **launch
        )
        log_sum = log_sums[0] if splits == 1 else torch.logsumexp(log_sums * _LN2, 0) / _LN2
        bm, bn = min(64, _power(w)), 128 if narrow else 32
        _column_sums[(triton.cdiv(length, bn), heads)](
            q_w, k, log_sum, per_head, *strides, *sizes, **shape, BM=bm, BN=bn, **launch
        )
    return per_head.sum(0) / heads


# -- clusters: what stands for them, and their scores


@triton.jit
def _clusters(
    k, high_out, low_out, mean_out, blend_out, k_head, k_row, length, n, size, alpha,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Whichever outputs (kv_heads, n, D) are given: maximum, minimum, mean, blend of the extremes.

    One program: BC clusters of one head, and a thread keeps its dimensions of all their tokens, so
    that nothing is exchanged and each of K's values is read once.
    """
    clusters, head = tl.program_id(0) * BC + tl.arange(0, BC), tl.program_id(1)
    d = tl.arange(0, DP)
    k += head.to(tl.int64) * k_head
    high = tl.full((BC, DP), float("-inf"), tl.float32)
    low = tl.full((BC, DP), float("inf"), tl.float32)
    total = tl.zeros((BC, DP), tl.float32)
    for j in tl.range(0, size, loop_unroll_factor=8):
        tokens = clusters * size + j
        # In place of a token past the end stands the last one once more: it moves no extreme.
        here = tl.minimum(tokens, length - 1)
        x = tl.load(k + here[:, None] * k_row + d[None, :], mask=(d < D)[None, :], other=0).to(tl.float32)
        high = tl.maximum(high, x, propagate_nan=tl.PropagateNan.ALL)
        low = tl.minimum(low, x, propagate_nan=tl.PropagateNan.ALL)
        if mean_out is not None:
            total += tl.where((tokens < length)[:, None], x, 0.0)
    to = (head.to(tl.int64) * n + clusters)[:, None] * D + d[None, :]
    mask = (clusters < n)[:, None] & (d < D)[None, :]
    if high_out is not None:
        tl.store(high_out + to, high, mask=mask)
    if low_out is not None:
        tl.store(low_out + to, low, mask=mask)
    if mean_out is not None:
        members = tl.maximum(tl.minimum(size, length - clusters * size), 1).to(tl.float32)
        tl.store(mean_out + to, total / members[:, None], mask=mask)
    if blend_out is not None:
        tl.store(blend_out + to, alpha * high + (1 - alpha) * low, mask=mask)


def cluster_extremes(k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`reference.cluster_extremes`: (kv_heads, T, d) -> two of (kv_heads, ceil(T / size), d)."""
    high, low = _cluster_out(k, size), _cluster_out(k, size)
    _run_clusters(k, size, high=high, low=low)
    return high, low


def cluster_means(k: Tensor, size: int) -> Tensor:
    """`reference.cluster_means`: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d)."""
    mean = _cluster_out(k, size)
    _run_clusters(k, size, mean=mean)
    return mean


def cluster_representatives(k: Tensor, size: int, alpha: float) -> Tensor:
    """`reference.cluster_representatives`: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d)."""
    blend = _cluster_out(k, size)
    _run_clusters(k, size, alpha, blend=blend)
    return blend


def _cluster_out(k: Tensor, size: int) -> Tensor:
    if size < 1:
        raise ValueError(f"a cluster of {size} tokens")
    kv_heads, length, d = k.shape
    return torch.empty(kv_heads, triton.cdiv(length, size), d, dtype=k.dtype, device=k.device)


def _run_clusters(
    k: Tensor,
    size: int,
    alpha: float = 0.0,
    *,
    high: Tensor | None = None,
    low: Tensor | None = None,
    mean: Tensor | None = None,
    blend: Tensor | None = None,
) -> None:
    k = _strided(k)
    kv_heads, length, d = k.shape
    n = triton.cdiv(length, size)
    if not n:
        return
    dp = triton.next_power_of_2(d)
    bc = max(1, 1024 // dp)  # 16 bytes of each token per thread, for bfloat16
    with _on(k.device):
        _clusters[(triton.cdiv(n, bc), kv_heads)](
            k, high, low, mean, blend, *k.stride()[:2], length, n, size, float(alpha),
            D=d, DP=dp, BC=bc, num_warps=4,
        )  # fmt: skip


@triton.jit
def _scores(
    q, upper, lower, out, q_row, n, group,
    D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """out[h, c] = q_h . upper_c, or q_h+ . upper_c + q_h- . lower_c where there is a `lower`.

    One program: BN clusters of one KV head and all `group` query heads that read it (GP >= group).
    """
    columns, kv = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    members = tl.arange(0, GP)
    base = kv.to(tl.int64) * n * D
    high = tl.trans(_rows(upper + base, columns, D, n, D, DP))
    queries = _rows(q + kv * group * q_row, members, q_row, group, D, DP).to(tl.float32)
    if lower is None:
        s = _dot(queries, high, DOT)
    else:
        low = tl.trans(_rows(lower + base, columns, D, n, D, DP))
        s = _dot(tl.maximum(queries, 0.0), high, DOT) + _dot(tl.minimum(queries, 0.0), low, DOT)
    mask = (members < group)[:, None] & (columns < n)[None, :]
    tl.store(out + (kv * group + members)[:, None].to(tl.int64) * n + columns[None, :], s, mask=mask)


def cluster_scores(q: Tensor, representatives: Tensor) -> Tensor:
    """`reference.cluster_scores`: (heads, d), (kv_heads, n, d) -> (heads, n) float32."""
    return _run_scores(q, representatives, None)


def cluster_bounds(q: Tensor, r_max: Tensor, r_min: Tensor) -> Tensor:
    """`reference.cluster_bounds`: (heads, d), two of (kv_heads, n, d) -> (heads, n) float32."""
    return _run_scores(q, r_max, r_min.contiguous())


def _run_scores(q: Tensor, upper: Tensor, lower: Tensor | None) -> Tensor:
    q, upper = _strided(q), upper.contiguous()
    heads, (kv_heads, n, d) = q.shape[0], upper.shape
    out = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    if not n:
        return out
    group, bn = heads // kv_heads, 64 if upper.element_size() == 2 else 32
    with _on(q.device):
        _scores[(triton.cdiv(n, bn), kv_heads)](
            q, upper, lower, out, q.stride(0), n, group,
            D=d, DP=_power(d), GP=_power(group), BN=bn, DOT=_dot_type(q, upper), num_warps=4,
        )  # fmt: skip
    return out


# -- select and attend: flash decoding over rows gathered by cluster


@triton.jit
def _attend_part(
    q, k, v, chosen, tops, totals, sums, q_row, k_head, k_row, v_head, v_row,
    length, heads_per_choice, choices_per_kv, m, sink, recent, span,
    D: tl.constexpr, DP: tl.constexpr, RP: tl.constexpr, BT: tl.constexpr, SIZE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One row of choices, its heads (RP >= heads_per_choice), and `span` of the tokens it attends to.

    Those are numbered sink, chosen clusters, recent; what a program finds in its range of them goes
    to tops, totals (heads, splits) and sums (heads, splits, D): the scores' maximum (times log2 e),
    the sum of exp2 below it, and the sum of v so weighted.
    """
    split, choice = tl.program_id(0), tl.program_id(1)
    kv = choice // choices_per_kv
    k += kv.to(tl.int64) * k_head
    v += kv.to(tl.int64) * v_head
    d, members = tl.arange(0, DP), tl.arange(0, RP)
    queries = _rows(q + choice * heads_per_choice * q_row, members, q_row, heads_per_choice, D, DP)
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
        s = tl.where(valid[None, :], _dot(queries, tl.trans(keys), DOT) * LOG2E, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        truncate_local = tl.exp2(top - new_top)
        weights = tl.exp2(s - new_top[:, None])
        total = total * truncate_local + tl.sum(weights, 1)
        acc = acc * truncate_local[:, None] + _dot(weights, values, DOT)
        top = new_top
    to = (choice * heads_per_choice + members) * tl.num_programs(0) + split
    real = members < heads_per_choice
    tl.store(tops + to, top, mask=real)
    tl.store(totals + to, total, mask=real)
    tl.store(sums + to[:, None] * D + d[None, :], acc, mask=real[:, None] & (d < D)[None, :])


@triton.jit
def _attend_join(tops, totals, sums, out, splits, D: tl.constexpr, DP: tl.constexpr, SP: tl.constexpr):
    """One head: its splits (SP >= splits) brought to one maximum, added up, and divided."""
    head, split, d = tl.program_id(0), tl.arange(0, SP), tl.arange(0, DP)
    parts = head * splits + split
    top = tl.load(tops + parts, mask=split < splits, other=float("-inf"))
    scale = tl.exp2(top - tl.max(top, 0))
    total = tl.sum(scale * tl.load(totals + parts, mask=split < splits, other=0), 0)
    acc = tl.sum(scale[:, None] * _rows(sums + head * splits * D, split, D, splits, D, DP), 0)
    tl.store(out + head * D + d, acc / total, mask=d < D)


def select_and_attend(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, sink: int, recent: int
) -> Tensor:
    """`reference.select_and_attend`: (heads, d), two of (kv_heads, T, d), (rows, m) -> (heads, d)."""
    check_selection(q, k, chosen, size, sink, recent)
    (heads, d), (kv_heads, length, _), (rows, m) = q.shape, k.shape, chosen.shape
    out = torch.empty(heads, d, dtype=q.dtype, device=q.device)
    q, k, v, chosen = _strided(q), _strided(k), _strided(v), chosen.contiguous()
    bt = 64 if k.element_size() == 2 else 32
    splits, span = _split(sink + m * size + recent, rows, bt, q.device)
    tops, totals = torch.empty(2, heads, splits, dtype=torch.float32, device=q.device)
    sums = torch.empty(heads, splits, d, dtype=torch.float32, device=q.device)
    dp = _power(d)
    with _on(q.device):
        _attend_part[(splits, rows)](
            q, k, v, chosen, tops, totals, sums, q.stride(0), *k.stride()[:2], *v.stride()[:2],
            length, heads // rows, rows // kv_heads, m, sink, recent, span,
            D=d, DP=dp, RP=_power(heads // rows), BT=bt, SIZE=size, DOT=_dot_type(q, k, v),
            # The compiler spends three of these on the indices; two tiles of K and V remain in flight.
            num_warps=4, num_stages=5,
        )  # fmt: skip
        _attend_join[(heads,)](
            tops, totals, sums, out, splits, D=d, DP=dp, SP=triton.next_power_of_2(splits), num_warps=4
        )
    return out


# -- what the host decides

_LN2 = 0.6931471805599453


def _power(n: int) -> int:
    """The power of two that holds n and that tensor cores take: 16 or more."""
    return max(16, triton.next_power_of_2(n))


def _dot_type(*operands: Tensor) -> tl.dtype:
    """What is multiplied: bfloat16 when all operands are.

    Triton's interpreter multiplies the bit patterns of bfloat16 as integers, so it gets float32.
    """
    narrow = all(x.dtype == torch.bfloat16 for x in operands) and not triton.knobs.runtime.interpret
    return tl.bfloat16 if narrow else tl.float32


def _strided(x: Tensor) -> Tensor:
    """x (heads, T, d) or (heads, d) with dimensions side by side, and offsets in a head within 31 bits."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    if x.shape[-2] * x.stride(-2) >= 1 << 31:
        raise ValueError(f"{x.shape[-2]} rows of {x.stride(-2)} elements exceed 2^31 elements")
    return x


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the one that holds the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; in the interpreter a few, so that it meets splits as well."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _split(length: int, programs: int, block: int, device: torch.device) -> tuple[int, int]:
    """Into how many ranges a length is cut, and their span, a multiple of `block`.

    Enough for two programs on each multiprocessor, whose equal shares then end together.
    """
    wanted = max(1, min(2 * _processors(device) // programs, triton.cdiv(length, block)))
    span = triton.cdiv(triton.cdiv(max(length, 1), wanted), block) * block
    return triton.cdiv(max(length, 1), span), span

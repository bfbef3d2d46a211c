"""Reduce each cluster of tokens to what stands for it: extremes, mean, or a blend of the extremes."""

# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcache_kernels.triton_kernels.tiles import on_device, strided


@triton.jit
def _summarise(
    k, high_out, low_out, mean_out, blend_out, k_head, k_row, length, n, size, alpha,
    D: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Compute the outputs (kv_heads, n, D) that are given: maximum, minimum, mean, blend of the extremes.

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
    """Compute `reference.cluster_extremes`: (kv_heads, T, d) -> two of (kv_heads, ceil(T / size), d)."""
    high, low = _empty_summary(k, size), _empty_summary(k, size)
    _run_summarise(k, size, high=high, low=low)
    return high, low


def cluster_means(k: Tensor, size: int) -> Tensor:
    """Compute `reference.cluster_means`: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d)."""
    mean = _empty_summary(k, size)
    _run_summarise(k, size, mean=mean)
    return mean


def cluster_representatives(k: Tensor, size: int, alpha: float) -> Tensor:
    """Compute `reference.cluster_representatives`: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d)."""
    blend = _empty_summary(k, size)
    _run_summarise(k, size, alpha, blend=blend)
    return blend


def _empty_summary(k: Tensor, size: int) -> Tensor:
    if size < 1:
        raise ValueError(f"a cluster of {size} tokens")
    kv_heads, length, d = k.shape
    return torch.empty(kv_heads, triton.cdiv(length, size), d, dtype=k.dtype, device=k.device)


def _run_summarise(
    k: Tensor,
    size: int,
    alpha: float = 0.0,
    *,
    high: Tensor | None = None,
    low: Tensor | None = None,
    mean: Tensor | None = None,
    blend: Tensor | None = None,
) -> None:
    k = strided(k)
    kv_heads, length, d = k.shape
    n = triton.cdiv(length, size)
    if not n:
        return
    dp = triton.next_power_of_2(d)
    bc = max(1, 1024 // dp)  # 16 bytes of each token per thread, for bfloat16
    with on_device(k.device):
        _summarise[(triton.cdiv(n, bc), kv_heads)](
            k, high, low, mean, blend, *k.stride()[:2], length, n, size, float(alpha),
            D=d, DP=dp, BC=bc, num_warps=4,
        )  # fmt: skip

"""Score clusters by what stands for them: one product, or Quest's bound of two."""

# A kernel's parameters are pointers and numbers of Triton's own: they have no Python types.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpcache_kernels.triton_kernels.tiles import (
    load_rows,
    on_device,
    product_type,
    strided,
    tile_product,
    tile_size,
)


@triton.jit
def _score(
    q, upper, lower, out, q_row, n, group,
    D: tl.constexpr, DP: tl.constexpr, GP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Compute out[h, c] = q_h . upper_c, or q_h+ . upper_c + q_h- . lower_c where there is a `lower`.

    One program: BN clusters of one KV head and all `group` query heads that read it (GP >= group).
    """
    columns, kv = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    members = tl.arange(0, GP)
    base = kv.to(tl.int64) * n * D
    high = tl.trans(load_rows(upper + base, columns, D, n, D, DP))
    queries = load_rows(q + kv * group * q_row, members, q_row, group, D, DP).to(tl.float32)
    if lower is None:
        s = tile_product(queries, high, DOT)
    else:
        low = tl.trans(load_rows(lower + base, columns, D, n, D, DP))
        above, below = tl.maximum(queries, 0.0), tl.minimum(queries, 0.0)
        s = tile_product(above, high, DOT) + tile_product(below, low, DOT)
    mask = (members < group)[:, None] & (columns < n)[None, :]
    tl.store(out + (kv * group + members)[:, None].to(tl.int64) * n + columns[None, :], s, mask=mask)


def cluster_scores(q: Tensor, representatives: Tensor) -> Tensor:
    """Compute `reference.cluster_scores`: (heads, d), (kv_heads, n, d) -> (heads, n) float32."""
    return _run_score(q, representatives, None)


def cluster_bounds(q: Tensor, r_max: Tensor, r_min: Tensor) -> Tensor:
    """Compute `reference.cluster_bounds`: (heads, d), two of (kv_heads, n, d) -> (heads, n) float32."""
    return _run_score(q, r_max, r_min.contiguous())


def _run_score(q: Tensor, upper: Tensor, lower: Tensor | None) -> Tensor:
    q, upper = strided(q), upper.contiguous()
    heads, (kv_heads, n, d) = q.shape[0], upper.shape
    out = torch.empty(heads, n, dtype=torch.float32, device=q.device)
    if not n:
        return out
    group, bn = heads // kv_heads, 64 if upper.element_size() == 2 else 32
    with on_device(q.device):
        _score[(triton.cdiv(n, bn), kv_heads)](
            q, upper, lower, out, q.stride(0), n, group,
            D=d, DP=tile_size(d), GP=tile_size(group), BN=bn, DOT=product_type(q, upper), num_warps=4,
        )  # fmt: skip
    return out

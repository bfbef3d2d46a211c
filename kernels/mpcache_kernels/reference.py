"""Define what each kernel means, in plain torch: correct on any device, fast on none.

A kernel is written once more in Triton for GPUs; this file is what it is tested against. Shapes are
those of one layer and one context: `kv_heads` key heads, T tokens, head size d.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROWS = 128  # queries of a map of scores on a CPU


def window_importance(q_w: Tensor, k: Tensor, first_position: int) -> Tensor:
    """Compute how much the last w queries of a context look at each of its tokens: (T,) float32.

    q_w: (heads, w, d), scaled by 1/sqrt(d) already; its row i stands at position first_position + i.
    k: (kv_heads, T, d); head h reads key head h // (heads / kv_heads).

    A = softmax(q_w k^T) over the keys at or before the query, in float32;
    importance_t = 1/heads * sum over heads h and rows i of A[h, i, t], so it adds up to w.
    A token after the last query has importance 0.
    Source: MPCache's static eviction (arXiv 2501.06807), with the scale and the mask that its
    published code leaves out; the window and the sum are those of SnapKV (arXiv 2404.14469).
    """
    heads, w, _ = q_w.shape
    kv_heads, length, _ = k.shape
    group = heads // kv_heads
    rows = torch.arange(first_position, first_position + w, device=k.device)
    later = torch.arange(length, device=k.device) > rows[:, None]
    total = torch.zeros(length, dtype=torch.float32, device=k.device)
    for head in range(heads):  # one w x T map at a time
        scores = q_w[head].float() @ k[head // group].float().T
        total += scores.masked_fill(later, -torch.inf).softmax(-1).sum(0)
    return total / heads


def repeat_importance(
    q: Tensor, k: Tensor, first: int, count: int, row_scale: Tensor, column_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Find how much any query of a second reading looks at each token of what it reads: (kv_heads, count).

    q: (heads, n, d), scaled by 1/sqrt(d). k: (kv_heads, before + n, d); the last n keys are the queries' own,
    and a query sees none after its own. The tokens asked about are keys first .. first + count - 1.
    row_scale: (n,). column_scale: (heads, count). Neither is negative.

    A = softmax(q k^T) in float32; importance_t is the largest A[h, i, t] row_scale[i] column_scale[h, t] over
    the queries i and the heads h of a group. Also returned is which one it is, as int64: i + n times the head
    within its group; the lowest of equal ones.
    Source: KVzip (arXiv 2505.23416); the scales are those of its KVzip+ variant.
    """
    (heads, n, _), kv_heads = q.shape, k.shape[0]
    group, before = heads // kv_heads, k.shape[1] - n
    best = torch.full((heads, count), -torch.inf, device=k.device)
    query = torch.zeros(heads, count, dtype=torch.int64, device=k.device)
    rows = min(ROWS, n)
    later, log_scale = (
        torch.full((rows, rows), -torch.inf, device=k.device).triu_(1),
        row_scale.log()[:, None],
    )
    for head in range(heads):
        keys = k[head // group].float()
        for begin in range(0, n, ROWS):  # a map that fits into a processor's cache
            end = min(begin + ROWS, n)
            scores = q[head, begin:end].float() @ keys[: before + end].T
            scores[:, before + begin :] += later[: end - begin, : end - begin]
            # In logarithms, which is quicker than to write out an attention and to scale it.
            looks = scores.log_softmax(-1)[:, first : first + count].add_(log_scale[begin:end])
            most = looks.max(0)
            seen = most.values.shape[0]  # of the queries' own keys, those that this map has
            better = most.values > best[head, :seen]
            query[head, :seen] = torch.where(better, most.indices + begin, query[head, :seen])
            best[head, :seen] = torch.where(better, most.values, best[head, :seen])
    found = (best.exp() * column_scale).reshape(kv_heads, group, count).max(1)
    mine = query.reshape(kv_heads, group, count).gather(1, found.indices[:, None])[:, 0]
    return found.values, mine + n * found.indices


def cluster_extremes(k: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Find the largest and smallest value of each dimension in each cluster of `size` consecutive tokens.

    k: (kv_heads, T, d) -> r_max, r_min: (kv_heads, ceil(T / size), d). A last cluster that is not
    full is reduced over the tokens it has. Source: MPCache; Quest's pages (arXiv 2406.10774).
    """
    return _by_cluster(k, size, torch.amax), _by_cluster(k, size, torch.amin)


def cluster_means(k: Tensor, size: int) -> Tensor:
    """Compute the mean of each cluster of `size` consecutive tokens.

    k: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d). A last cluster that is not full is divided by
    the number of tokens it has. Under MPC this representative of secret tokens is free, where an extreme
    costs comparisons.
    """
    return _by_cluster(k, size, torch.mean)


def representatives(r_max: Tensor, r_min: Tensor, alpha: float) -> Tensor:
    """Compute alpha * r_max + (1 - alpha) * r_min, the linear score's representative.

    q . representative = alpha * (q . r_max) + (1 - alpha) * (q . r_min): one product in place of two.
    Source: MPCache, where alpha is 0.6.
    """
    return alpha * r_max + (1 - alpha) * r_min


def cluster_representatives(k: Tensor, size: int, alpha: float) -> Tensor:
    """Compute `representatives` of `cluster_extremes` where the extremes themselves are not wanted.

    k: (kv_heads, T, d) -> (kv_heads, ceil(T / size), d).
    """
    return representatives(*cluster_extremes(k, size), alpha)


def cluster_scores(q: Tensor, representatives: Tensor) -> Tensor:
    """Compute q . representative of each cluster, the linear score: (heads, n) float32.

    q: (heads, d). representatives: (kv_heads, n, d); head h reads head h // (heads / kv_heads).
    Means in place of representatives give the mean score. Source: MPCache.
    """
    return _by_group(q, representatives)


def cluster_bounds(q: Tensor, r_max: Tensor, r_min: Tensor) -> Tensor:
    """Compute q+ . r_max + q- . r_min with q+ = max(q, 0), q- = min(q, 0): (heads, n) float32.

    The least number that q . k exceeds for no key k of the cluster's box. Source: Quest
    (arXiv 2406.10774). q: (heads, d). r_max, r_min: (kv_heads, n, d).
    """
    return _by_group(q.clamp(min=0), r_max) + _by_group(q.clamp(max=0), r_min)


def select_and_attend(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, size: int, sink: int, recent: int
) -> Tensor:
    """Compute softmax(q k^T) v over the sink, the chosen clusters and the recent window.

    q: (heads, d), scaled by 1/sqrt(d) already; the result is alike. k, v: (kv_heads, T, d), standing as
    [sink | clusters | recent]: `sink` tokens, then clusters of `size`, of which the last may be
    ragged, then the last `recent` tokens.
    chosen: (rows, m) integers, the clusters of each query head (rows = heads) or of each KV head for
    its whole group (rows = kv_heads); an entry below 0 is no cluster, so rows may choose fewer than m.
    A cluster given twice counts twice; a head that attends to nothing gets NaN.
    Raises ValueError as `check_selection` does.
    """
    check_selection(q, k, chosen, size, sink, recent)
    (heads, _), (kv_heads, length, _), rows = q.shape, k.shape, chosen.shape[0]
    offsets = torch.arange(size, device=k.device)
    tokens = (sink + chosen[..., None].long() * size + offsets).flatten(1)
    valid = (chosen >= 0).repeat_interleave(size, 1) & (tokens < length - recent)
    always = torch.cat([torch.arange(sink), torch.arange(length - recent, length)]).to(k.device)
    tokens = torch.cat([always.expand(rows, -1), tokens.where(valid, 0)], 1)
    valid = torch.cat([valid.new_ones(rows, len(always)), valid], 1)

    source = torch.arange(rows, device=k.device)[:, None] // (rows // kv_heads)
    keys, values = k[source, tokens].float(), v[source, tokens].float()  # (rows, attended, d)
    values = values.where(valid[..., None], 0)
    scores = q.float().reshape(rows, heads // rows, -1) @ keys.transpose(1, 2)
    weights = scores.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
    attended: Tensor = weights @ values
    return attended.flatten(0, 1).to(q.dtype)


def ragged_attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, starts: Tensor, longest: int) -> Tensor:
    """Compute softmax(q k^T + bias) v of KV heads that hold different numbers of tokens.

    q: (kv_heads, rows, d), scaled by 1/sqrt(d) already; the result is alike. k, v: (tokens, d), the heads'
    one after another; bias: (tokens,). starts: (kv_heads + 1,) integers, from where on each head's are.
    longest: no fewer tokens than any head has. A head that has none gets NaN.
    Source: the cache of attention matching (arXiv 2602.16284), with counts per head.
    """
    bounds, out = starts.tolist(), torch.empty_like(q)
    for head, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        scores = q[head].float() @ k[begin:end].float().T + bias[begin:end].float()
        out[head] = (scores.softmax(-1) @ v[begin:end].float()).to(q.dtype) if end > begin else torch.nan
    return out


def check_selection(q: Tensor, k: Tensor, chosen: Tensor, size: int, sink: int, recent: int) -> None:
    """Raise ValueError where the arguments of `select_and_attend` do not fit together."""
    (heads, _), (kv_heads, length, _), rows = q.shape, k.shape, chosen.shape[0]
    if size < 1:
        raise ValueError(f"a cluster of {size} tokens")
    if min(sink, recent) < 0 or sink + recent > length:
        raise ValueError(f"a sink of {sink} and {recent} recent tokens, of {length}")
    if not rows or heads % rows or rows % kv_heads:
        raise ValueError(f"{rows} rows of choices for {heads} heads on {kv_heads} KV heads")


def _by_group(q: Tensor, keys: Tensor) -> Tensor:
    """Multiply (heads, d) . (kv_heads, n, d) -> (heads, n) float32, each head against its KV head's keys."""
    grouped = q.float().reshape(keys.shape[0], -1, q.shape[-1])
    products = grouped @ keys.float().transpose(1, 2)
    return products.flatten(0, 1)


def _by_cluster(x: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce tokens, the dimension before the last, cluster by cluster; no padding value exists."""
    if size < 1:
        raise ValueError(f"a cluster of {size} tokens")
    full = x.shape[-2] // size
    whole, ragged = x[..., : full * size, :], x[..., full * size :, :]
    clusters = [reduce(whole.reshape(*x.shape[:-2], full, size, x.shape[-1]), dim=-2)]
    if ragged.shape[-2]:
        clusters.append(reduce(ragged, dim=-2, keepdim=True))
    return torch.cat(clusters, dim=-2)

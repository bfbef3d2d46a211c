"""Fit what stays of a KV head to what all of it would have answered: the third part of `compact`.

A bias per kept key makes up for the attention that the dropped ones had, and new values for what they said
(attention matching, arXiv 2602.16284). Both are least squares over the queries of a second reading. Matched
are normalised outputs, with ridges towards no bias and the old values: values then stay within a few times
the old ones, which fixed point needs. Shapes are those of one KV head: n queries, T tokens, t kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpcache.model.reread import Reread

LARGEST_BIAS = 3.0  # |bias|, added to scores
BIAS_RIDGE, VALUE_RIDGE = 1e-3, 1e-2  # of the mean diagonal of the Gram matrix
STEPS, POWER_STEPS = 200, 12  # of the projected gradient, at most, and to find its step
STILL, LOOKS = 1e-4, 8  # it ends where no factor moves by as much, looked at every few steps
ALL_ROWS, RANDOM_ROWS = 2048, 512  # queries that are all taken; of more, each key's best and so many others


@dataclass(frozen=True, eq=False)
class Targets:
    """What queries see of all tokens. attention: (n, T), summing to 1.  log_sums: (n, 1).  out: (n, d)."""

    attention: Tensor
    log_sums: Tensor
    out: Tensor

    def rows(self, chosen: Tensor) -> Targets:
        """Take some of the queries."""
        return Targets(self.attention[chosen], self.log_sums[chosen], self.out[chosen])


def reference_queries(parts: Sequence[Reread], layer: int, head: int, kv_heads: int) -> Tensor:
    """Collect what a second reading asks a KV head: (n, d), the heads of its group one after another."""
    return torch.cat([part.q[layer].chunk(kv_heads)[head].flatten(0, 1) for part in parts])


def targets_of(q: Tensor, k: Tensor, v: Tensor) -> Targets:
    """Attend with q (n, d), scaled, to all of k, v (T, d), without a mask."""
    scores = q.float() @ k.float().T
    attention = scores.softmax(-1)
    # The largest of a row is no less than 1/T of it: its logarithm is one of a number that is not tiny.
    log_sums = scores.amax(-1, keepdim=True) - attention.amax(-1, keepdim=True).log()
    return Targets(attention, log_sums, attention @ v)


def chosen_targets(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, best: Tensor | None) -> Targets:
    """Attend with all queries; of many, with those that look most at a kept key, and others drawn in public.

    best: (T,), the query that looks most at each token, where that is known.
    """
    if len(q) <= ALL_ROWS:
        return targets_of(q, k, v)
    if best is not None:
        return targets_of(q[_with_drawn(best[kept], len(q))], k, v)
    targets = targets_of(q, k, v)
    return targets.rows(_with_drawn(targets.attention[:, kept].argmax(0), len(q)))


def _with_drawn(best: Tensor, n: int) -> Tensor:
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(n))[:RANDOM_ROWS]
    rows: Tensor = torch.unique(torch.cat([best, drawn.to(best.device)]))
    return rows


def fit(targets: Targets, kept: Tensor, v: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Fit biases and values of the tokens `kept` (t,): (t,) and (t, d).

    v: (T, d), the old values.  weights: (n, 1), what each query counts.
    """
    factors = fit_biases(targets, kept, weights)
    return factors.log(), fit_values(targets, kept, factors, v, weights)


def fit_biases(targets: Targets, kept: Tensor, weights: Tensor | None = None) -> Tensor:
    """Find factors B (t,) of the kept keys' attention that make it sum to 1, each e^-3 to e^3.

    The least |M B - 1|^2 + ridge |B - 1|^2 with M the attention to the kept keys, by an accelerated projected
    gradient (FISTA, Beck and Teboulle 2009) on the Gram matrix, from the clipped solution without bounds.
    """
    m = targets.attention[:, kept]
    if weights is not None:
        m = m * weights
    wanted = m.sum(0) if weights is None else (m * weights).sum(0)
    gram = (m.T @ m).double()
    ridge = BIAS_RIDGE * gram.diagonal().mean() + 1e-12
    gram = gram + ridge * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    right = wanted.double() + ridge
    low, high = math.exp(-LARGEST_BIAS), math.exp(LARGEST_BIAS)
    b = torch.cholesky_solve(right[:, None], torch.linalg.cholesky(gram))[:, 0].clamp(low, high)
    # The steps in float32: they read the matrix each time, and undo their own rounding.
    gram, right, b = gram.float(), right.float(), b.float()
    step = 1 / (1.02 * _largest_eigenvalue(gram))
    ahead, speed = b, 1.0
    for i in range(STEPS):
        new = (ahead - step * (gram @ ahead - right)).clamp(low, high)
        next_speed = (1 + math.sqrt(1 + 4 * speed * speed)) / 2
        moved = (new - b).abs().max()
        b, ahead, speed = new, new + (speed - 1) / next_speed * (new - b), next_speed
        if i % LOOKS == 0 and not b.is_meta and moved < STILL:
            break
    return b.to(m.dtype)


def _largest_eigenvalue(gram: Tensor) -> Tensor:
    """Estimate it by the power method; all entries are positive, so its vector is."""
    u = torch.ones(len(gram), dtype=gram.dtype, device=gram.device)
    for _ in range(POWER_STEPS):
        u = gram @ u
        u = u / u.norm()
    largest: Tensor = (gram @ u).norm()
    return largest


def fit_values(
    targets: Targets, kept: Tensor, factors: Tensor, v: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Find values C (t, d) by which the kept tokens answer as all did; near the old ones where free."""
    x = targets.attention[:, kept] * factors
    x = x / x.sum(-1, keepdim=True).clamp(min=1e-30)
    missed = targets.out - x @ v[kept]
    if weights is not None:
        x, missed = x * weights, missed * weights
    gram = (x.T @ x).double()
    ridge = VALUE_RIDGE * gram.diagonal().mean() + 1e-12
    gram = gram + ridge * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    change = torch.cholesky_solve((x.T @ missed).double(), torch.linalg.cholesky(gram))
    return v[kept] + change.to(v.dtype)

"""The highest of many secret numbers, found in groups: what evicting policies drop, and greedy decoding."""

from __future__ import annotations

import torch

from mpcache.ops import Ops, Value
from mpcache.protocols.ranges import LARGEST_LOGIT
from mpcache.runtime.program import Program

GROUP = 16  # numbers that are compared pair by pair


def greedy(ops: Ops, logits: Value) -> Program[Value]:
    """Find the place (1,) of the highest of (1, vocab) logits, or of one within 2^-16: nothing is opened."""
    marks = yield from argmax(ops, logits, 1, LARGEST_LOGIT)
    return (marks * torch.arange(logits.shape[-1])).sum(-1)


def argmax(ops: Ops, scores: Value, k: int, limit: int) -> Program[Value]:
    """Mark (A, n) the k highest of (A, n), ties to the lower index; |score| < limit.

    One token of many is found in groups of 16, of which the last one may overlap the one before, and
    then among the groups' best: three rounds a level in place of n^2 / 2 comparisons.
    """
    sets, n = scores.shape
    if k > 1 or n <= 2 * GROUP:
        selection, _ = yield from ops.topk(scores, k, [scores.reshape(sets, n, 1)], limit=limit)
        return selection.marks()
    starts = [*range(0, n - GROUP, GROUP), n - GROUP]
    groups = ops.cat([scores[:, s : s + GROUP].reshape(sets, 1, GROUP) for s in starts], 1)
    values = groups.reshape(sets, len(starts), GROUP, 1)
    within, (best,) = yield from ops.topk(groups, 1, [values], limit=limit)
    among = yield from argmax(ops, best.reshape(sets, len(starts)), 1, limit)
    marks = yield from within.scatter(among.reshape(sets, len(starts), 1, 1))
    marks = marks.reshape(sets, len(starts), GROUP)
    before, last = marks[:, :-1].reshape(sets, -1), marks[:, -1]
    twice = before.shape[-1] - (n - GROUP)  # tokens of the last two groups
    return ops.cat([before[:, : n - GROUP], before[:, n - GROUP :] + last[:, :twice], last[:, twice:]], -1)

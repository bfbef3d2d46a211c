"""Keep the rows of highest score, obliviously: shuffle, compare, open the order of the shuffled rows.

1. Shuffle twice: by a permutation that the server alone knows, then by one of the client's (Chase, Ghosh and
   Poburinnaya, ASIACRYPT 2020). Who does not know it opens its share of the rows masked, to the other alone;
   the dealer shares the mask, permuted. A round each. Nobody knows the whole permutation.
2. Compare all pairs of shuffled scores on one opening, as `topk` does, by digits in two levels. Scores are
   made unlike before that: a row's own number stands below its score. So no rank is tied, and the ranks are
   a permutation.
3. Open the ranks. They are a uniformly random permutation whatever the scores are: they tell nothing. Where
   scores were tied, ranks by shuffled place would tell how many.

More than LONG rows are sorted in place of 2 and 3 (`sorting.sorted_places`): their pairs are too many.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from mpcache.protocols.compare import Digits
from mpcache.protocols.fence import Fence
from mpcache.protocols.linear import masked
from mpcache.protocols.sorting import comparisons_of, sorted_places
from mpcache.protocols.topk import size_for
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import NO_WORK, Part, Program, Request, RequestKind, draw, open_masked
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side

SCORE_BITS = 17  # a score is below 2^SCORE_BITS
LONG = 384  # rows whose pairs, 74 thousand, are all compared; more are sorted: by the model as fast on `lan`


def compact(side: Side, scores: Share, k: int, values: Sequence[Share]) -> Program[list[Share]]:
    """Keep k rows of (*rows, n) by score, ties to the lower index, of each of values (*rows, n, c).

    They come by rank, which tells nobody where they were. Scores are integers, 0 <= score < 2^SCORE_BITS.
    Six rounds; of more than LONG rows two, and three for each layer of the network that sorts them.
    """
    n = scores.shape[-1]
    below = (n - 1).bit_length()
    unlike = (scores.data << below) + side.first(torch.arange(n - 1, -1, -1)).expand(scores.shape)
    width = SCORE_BITS + below + 2
    rows = [Share(unlike.unsqueeze(-1), 0, ring=width), *values]
    for knows in (Rank.SERVER, Rank.CLIENT):
        rows = yield from shuffle(side, rows, knows)
    order = sorted_places if n > LONG else ranked_places
    places = yield from order(side, replace(rows[0], data=rows[0].data.squeeze(-1)), width)
    return [_first(places, k, value) for value in rows[1:]]


def compared_rows(n: int) -> int:
    """Count the comparisons by which n rows are put in order."""
    return comparisons_of(n) if n > LONG else n * (n - 1) // 2


def shuffle(side: Side, rows: Sequence[Share], knows: Rank) -> Program[list[Share]]:
    """Permute the n rows of each (*b, n, c) alike, by a permutation that `knows` alone knows. One round."""
    *batch, n, _ = rows[0].shape
    shapes = [x.shape for x in rows]

    def derive(keys: torch.Tensor, *masks: torch.Tensor) -> Sequence[torch.Tensor]:
        order = keys.argsort(-1)
        return [_permuted(mask, order) for mask in masks]

    request = Request(
        RequestKind.SHUFFLE,
        (Part((*batch, n), owner=knows), *(Part(shape, owner=knows.peer) for shape in shapes)),
        tuple(Part(shape) for shape in shapes),
        derive,
        NO_WORK,
    )
    keys, *parts = yield from draw(request)
    masks, permuted = parts[: len(rows)], parts[len(rows) :]
    opened = yield from open_masked(
        *(
            masked(x.data - mask, x.ring, "rows to shuffle, masked", knows.peer)
            for x, mask in zip(rows, masks, strict=True)
        )
    )
    if side.rank is not knows or isinstance(keys, MetaTensor):
        return [replace(x, data=new, owner=None) for x, new in zip(rows, permuted, strict=True)]
    order = keys.argsort(-1)
    return [
        replace(x, data=_permuted(x.data + e, order) + new, owner=None)
        for x, e, new in zip(rows, opened, permuted, strict=True)
    ]


def ranked_places(side: Side, scores: Share, width: int) -> Program[Any]:
    """Open which of (*rows, n) shuffled scores has which rank (*rows, n), the highest first.

    0 <= score < 2^(width-2), no two equal. Four rounds. Only of scores that a permutation which nobody knows
    has shuffled.
    """
    *rows, n = scores.shape
    first, second = torch.triu_indices(n, n, 1)
    size = size_for(n)
    bit = torch.int8 if size <= 1 << 8 else torch.int16
    compared = Digits(math.prod(rows) * len(first), width, bit, levels=2)
    fence = Fence(width, 8, 64, 128)  # the raised scores are a quarter to a half of the ring

    def derive(r: torch.Tensor, *own: Any) -> Sequence[torch.Tensor]:
        difference = (r[..., first] - r[..., second]).reshape(-1)
        return *compared.derive(difference, *own), fence.tables(r)

    request = Request(
        compared.kind,
        (Part((*rows, n)), *compared.random),
        (*compared.derived, fence.part((*rows, n))),
        derive,
        compared.work,
    )
    r, *parts, tables = yield from draw(request)
    raised = scores.data + side.constant(1 << (width - 2), scores.data)
    (opened,) = yield from open_masked(masked(raised + r, width, "scores, masked"))
    fence.watch(side, tables, opened)
    points = (opened[..., first] - opened[..., second]).reshape(-1)
    loses = (yield from compared.sign(side, parts, points)).reshape(*rows, len(first))
    earlier = side.first(torch.arange(n)).expand(*rows, n)
    rank = earlier.index_add(-1, first, loses).index_add(-1, second, -loses)
    (opened,) = yield from open_masked(masked(rank, size.bit_length() - 1, "ranks of shuffled rows"))
    return opened if opened.is_meta else (opened & (size - 1)).argsort(-1)


def _permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    return x.gather(-2, order.unsqueeze(-1).expand(x.shape))


def _first(places: Any, k: int, value: Share) -> Share:
    """Take the rows (*b, k, c) of the k first ranks, by rank."""
    *batch, _, c = value.shape
    if places.is_meta:
        return replace(value, data=MetaTensor((*batch, k, c)))
    first = places[..., :k].unsqueeze(-1).expand(*batch, k, c)
    return replace(value, data=value.data.gather(-2, first))

"""Order many shuffled rows by a sorting network, whose outcomes are opened.

All pairs of n rows are n^2 / 2 comparisons in three rounds; Batcher's merge exchange takes n log^2 n / 4, one
layer after another. It compares the same places whatever is in them (Knuth, volume 3, 5.2.2, algorithm M), so
that the dealer knows them ahead. What comes out of a comparison is opened, and both parties move their shares
by it: the rows stand where a permutation that nobody knows has put them, and no two scores are equal, so the
outcomes follow from a uniformly random permutation, and from nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mpcache.protocols.compare import Digits
from mpcache.protocols.fence import truncation_fence
from mpcache.protocols.linear import masked, raised, truncation_room
from mpcache.runtime.program import Part, Program, Request, draw, open_masked
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side


def merge_exchange(n: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the layers of a sorting network of n places: pairs of places that are apart from each other."""
    places, largest = torch.arange(n), 1 << max(0, (n - 1).bit_length() - 1)
    near = largest if n > 1 else 0
    while near:
        far, distance, bit = largest, near, 0
        while True:
            first = places[: max(0, n - distance)]
            first = first[(first & near) == bit]
            yield first, first + distance
            if far == near:
                break
            far, distance, bit = far >> 1, far - near, near
        near >>= 1


def comparisons_of(n: int) -> int:
    """Count what the network of n places compares."""
    return sum(len(first) for first, _ in merge_exchange(n))


def sorted_places(side: Side, scores: Share, width: int) -> Program[Any]:
    """Open which of (*rows, n) shuffled scores has which rank (*rows, n), the highest first.

    0 <= score < 2^(width-2), no two equal. Three rounds for each layer of the network. Only of scores that a
    permutation nobody knows has shuffled.
    """
    data, places = scores.data, torch.arange(scores.shape[-1]).expand(scores.shape)
    for first, second in merge_exchange(scores.shape[-1]):
        lower = yield from _lower(side, data[..., first] - data[..., second], width)
        data, places = (_exchanged(x, first, second, lower) for x in (data, places))
    return places


def _exchanged(x: Any, first: torch.Tensor, second: torch.Tensor, lower: Any) -> Any:
    """Exchange the places of each pair whose first is lower."""
    step = lower * (x[..., second] - x[..., first])
    return x.index_add(-1, first, step).index_add(-1, second, -step)


def _lower(side: Side, x: torch.Tensor, width: int) -> Program[Any]:
    """Open [x < 0], for |x| < 2^(width-2). Three rounds."""
    n = math.prod(x.shape)
    compared, fence = Digits(n, width, torch.int8, levels=1), truncation_fence(width)

    def derive(r: torch.Tensor, *own: Any) -> Sequence[torch.Tensor]:
        return *compared.derive(r, *own), fence.tables(r)

    request = Request(
        compared.kind,
        (Part((n,)), *compared.random),
        (*compared.derived, fence.part((n,))),
        derive,
        compared.work,
    )
    r, *parts, tables = yield from draw(request)
    (c,) = yield from open_masked(raised(side, x.reshape(n), r, width, "scores, masked"))
    fence.watch(side, tables, c)
    outcome = yield from compared.sign(side, parts, c - truncation_room(width))
    (opened,) = yield from open_masked(masked(outcome, 1, "order of shuffled rows"))
    return (opened & 1).reshape(x.shape)

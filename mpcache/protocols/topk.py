"""Oblivious top-k with one-hot slots, and the gather inside it: two rounds (docs/protocols.md, section 7).

Round 1 opens every score masked; all differences are then public with known masks, so all pairs
are compared without another message, and rank_i = how many beat i arrives in shares. Round 2 opens
rank_i + rho_i modulo N; the dealer's one-hot of rho_i, rotated by that, is the slot matrix
H[j, i] = [rank_i = j]. What the dealer also rotates by rho_i comes along for free: the masks of the
values to gather, and the masks of the weights that will be scattered back. A third round between the two
takes a thirteenth of the offline bytes of the comparisons (`compare.Digits`); a fourth one, where there are
many of them, a third of what is left.

What comes along costs the dealer a mask for each item and place. Where these are more than `LARGEST_TABLE`,
the slots are opened under a mask of their own instead, and the values gathered by them: two more rounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.protocols.compare import Digits, Keys
from mpcache.protocols.fence import Fence
from mpcache.protocols.linear import masked
from mpcache.protocols.lookup import one_hot
from mpcache.protocols.ranges import SELECTION_RING
from mpcache.protocols.selection import SlotSelection, prepare_selection
from mpcache.runtime.correlations import dealt
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import Part, Program, Request, RequestKind, Work, draw, open_masked, products_of
from mpcache.runtime.shares import Share, cat
from mpcache.runtime.side import Side

LARGEST_TABLE = 1 << 19  # masks, of each item's columns at each place, that a dealer shares for a choice


def size_for(n: int) -> int:
    """Return the power of two that ranks of n items are opened modulo."""
    return 1 << max(1, (n - 1).bit_length())


def pairs_of(n: int, sizes_alone: bool = False) -> tuple[Any, Any]:
    """Return all pairs of n items, the lower index first; where nothing has values, their sizes alone."""
    if sizes_alone:
        return (MetaTensor((n * (n - 1) // 2,)),) * 2
    first, second = torch.triu_indices(n, n, 1)
    return first, second


@dataclass(frozen=True)
class HotSelection(SlotSelection):
    """hot: shares of H (*rows, k, n), integers.  opened: rank + rho modulo N (*rows, n), public.

    rotation: rho, at the dealer only.
    """

    side: Side
    hot: torch.Tensor
    opened: torch.Tensor
    size: int
    rotation: torch.Tensor | None

    def slots(self) -> Share:
        return Share(self.hot, 0)

    def gather(self, values: Share) -> Program[Share]:
        kept = yield from self.prepare()
        return (yield from kept.gather(values))

    def prepare(self) -> Program[SlotSelection]:
        return prepare_selection(self.side, self.slots())

    def scatter(self, weights: Share, ring: int = SELECTION_RING) -> Program[Share]:
        """Put weights back at their items' places. One round: only the weights are opened, modulo 2^ring.

        For each item i the dealer shares the weights' masks rotated by rho_i: item i's mask stands at the
        public place rank_i + rho_i.
        """
        *rows, k, c = weights.shape
        n, size = self.hot.shape[-1], self.size

        def derive(a: torch.Tensor) -> Sequence[torch.Tensor]:
            # P[i, u] = a[u - rho_i mod N], zero where that is no slot
            rho = dealt(self.rotation).unsqueeze(-1)
            slot = (torch.arange(size) - rho) & (size - 1)  # (*rows, n, N)
            padded = torch.cat([a, torch.zeros(*rows, size - k, c, dtype=torch.int64)], -2)
            flat = slot.reshape(*rows, n * size, 1).expand(*rows, n * size, c)
            return (padded.gather(-2, flat).reshape(*rows, n, size, c),)

        request = Request(
            RequestKind.SCATTER,
            (Part(weights.shape),),
            (Part((*rows, n, size, c), ring=ring),),
            derive,
            products_of(math.prod(weights.shape) * n),
        )
        a, spread = yield from draw(request)
        (e,) = yield from open_masked(masked(weights.data - a, ring, "weights, masked"))
        place = self.opened.reshape(*rows, n, 1, 1).expand(*rows, n, 1, c)
        return Share(
            torch.matmul(self.hot.transpose(-1, -2), e) + spread.gather(-2, place).squeeze(-2),
            weights.bits,
            ring=ring,
        )


def topk(
    side: Side,
    scores: Share,
    k: int,
    values: Sequence[Share],
    width: int,
    comparison: type[Keys] | type[Digits] = Keys,
) -> Program[tuple[SlotSelection, list[Share]]]:
    """Choose the k highest of (*rows, n), descending, ties to the lower index; gather values (*rows, n, c).

    Scores are compared in a ring of `width` bits: their differences must stay below 2^(width-1)
    raw. Values are gathered in their own ring. Two rounds, three or four where `Digits` compare; two
    more where `LARGEST_TABLE` would be exceeded.
    """
    together = cat(list(values), -1)
    if math.prod(together.shape) * size_for(together.shape[-2]) <= LARGEST_TABLE:
        chosen, gathered = yield from topk_by_tables(side, scores, k, together, width, comparison)
        return chosen, _apart(gathered, values)
    chosen, _ = yield from topk_by_tables(side, scores, k, together[..., :0], width, comparison)
    kept = yield from prepare_selection(side, chosen.slots())
    gathered = yield from kept.gather(together)
    return kept, _apart(gathered, values)


def _apart(gathered: Share, values: Sequence[Share]) -> list[Share]:
    """Take the values' columns apart again."""
    pieces, column = [], 0
    for value in values:
        pieces.append(gathered[..., column : column + value.shape[-1]])
        column += value.shape[-1]
    return pieces


def topk_by_tables(
    side: Side, scores: Share, k: int, together: Share, width: int, comparison: type[Keys] | type[Digits]
) -> Program[tuple[HotSelection, Share]]:
    """Do so with tables of masks, for values in one (*rows, n, c)."""
    *rows, n = scores.shape
    first, second = pairs_of(n, side.device == "meta")
    pairs = len(first)
    size = size_for(n)
    # Ranks are opened modulo `size`: that many bits of the comparisons' outcomes are enough.
    bit = torch.int8 if size <= 1 << 8 else torch.int16
    compared = yield from comparison.of(math.prod(rows) * pairs, width, bit)
    c = together.shape[-1]
    dtype = torch.int32 if together.ring <= 32 else torch.int64
    products = k * math.prod(together.shape)  # of slots with the values to gather
    fence = Fence(width, 8, 1, 127)  # all within half of the ring: so differences are below it

    def derive(r: torch.Tensor, rho: torch.Tensor, m: torch.Tensor, *own: Any) -> Sequence[torch.Tensor]:
        above, below = pairs_of(n)
        difference = (r[..., above] - r[..., below]).reshape(-1)
        hot = one_hot(rho, size)
        rotated = hot.unsqueeze(-1).to(dtype) * m.unsqueeze(-2)
        return *compared.derive(difference, *own), fence.tables(r), hot, rotated

    table = fence.part((*rows, n))
    request = Request(
        compared.kind,
        (Part((*rows, n)), Part((*rows, n)), Part((*rows, n, c), dtype), *compared.random),
        (*compared.derived, table, Part((*rows, n, size)), Part((*rows, n, size, c), dtype)),
        derive,
        compared.work + Work(multiplications=products, multiply_adds=2 * products),
        keep=True,
    )
    r, rho, m, *parts, tables, hot, masks, kept = yield from draw(request)
    opened, shown = yield from open_masked(
        masked(scores.data + r, width, "scores, masked"),
        masked(together.data + m, together.ring, "values to gather, masked"),
    )
    fence.watch(side, tables, opened + (1 << (width - 2)))
    # first < second loses only where it is strictly lower.
    points = (opened[..., first] - opened[..., second]).reshape(-1)
    loses = (yield from compared.sign(side, parts, points)).reshape(*rows, pairs)
    # An item is beaten by every earlier one, but for those that lose to it, and by a later one if it loses.
    earlier = side.first(torch.arange(n)).expand(*rows, n)
    rank = earlier.index_add(-1, first, loses).index_add(-1, second, -loses)

    (place,) = yield from open_masked(masked(rank + rho, size.bit_length() - 1, "ranks, rotated"))
    place = place & (size - 1)
    slots = side.public(range(k))
    where = (place.unsqueeze(-1) - slots) & (size - 1)  # (*rows, n, k)
    h = hot.gather(-1, where).transpose(-1, -2)  # (*rows, k, n)
    rotated = masks.gather(-2, where.unsqueeze(-1).expand(*where.shape, c)).sum(-3, dtype=torch.int64)
    gathered = Share(torch.matmul(h, shown) - rotated, together.bits, ring=together.ring)
    rotation = None if kept is None else kept[1]
    return HotSelection(side, h, place, size, rotation), gathered

"""The highest bucket of a row of scores by XOR one-hots and random sums: two rounds after their opening.

docs/protocols.md, section 8. Scores s are opened as c = s + r. The dealer shares by XOR the one-hot vector of
r's bucket; turned by c's it is that of s's, or of the one above. Its suffix sums u_t[b] = [score t lies in or
above b] are XORed over t under public coins, COINS of them at once: W_b. For a bucket that any score reaches
each coin of W_b is a fair bit; for the others W_b = 0. Whether it is is told by tables of the digits of its
mask (one-time truth tables; Ishai et al., TCC 2013) and by products of their entries' masks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpcache.protocols.lookup import TOGETHER, apart, words_for
from mpcache.protocols.ranges import BUCKET_STEP, BUCKETS, SCORE_BITS, SCORE_RING
from mpcache.rank import Rank
from mpcache.runtime import bit_loops, deal_loops, value_loops
from mpcache.runtime.program import Opening, Part, Program, Shape, Work, open_masked, tree_cipher
from mpcache.runtime.rng import KeyStream
from mpcache.runtime.side import Side

COINS = 40  # an occupied bucket looks empty once in 2^40, a row of 256 is wrong once in 2^32
_DIGIT = 8  # bits of a digit of their sum
_DIGITS = COINS // _DIGIT
_LOW = SCORE_BITS + BUCKET_STEP.bit_length() - 1  # bits of a score within its bucket


def public_coins(key: bytes, n: int) -> torch.Tensor:
    """Return the coins of n scores, the same at both parties and for all rows of a phase: (n,) int64.

    They rest on nothing secret: what is opened is uniform whatever they are, and scores do not follow them.
    """
    return KeyStream(key, "coins").tensor((n,)) & ((1 << COINS) - 1)


@dataclass(frozen=True)
class Highest:
    """The highest of the buckets of scores (*rows, n), narrow, in the ring SCORE_RING."""

    shape: Shape

    @property
    def _buckets(self) -> Shape:
        return (*self.shape[:-1], BUCKETS - 1)

    @property
    def random(self) -> tuple[Part, ...]:
        """Masks of the buckets' sums, and of the entries of their digits' tables."""
        return Part(self._buckets, xor=True), Part(words_for(self._buckets), xor=True)

    @property
    def derived(self) -> tuple[Part, ...]:
        """The one-hot vectors, what the masks have above them, tables, and products."""
        return (
            Part((*self.shape, BUCKETS // 8), torch.uint8, xor=True),
            Part(self.shape, torch.uint8, xor=True),
            Part((*self._buckets, _DIGITS, (1 << _DIGIT) // 8), torch.uint8, xor=True),
            Part((*self._buckets, (1 << _DIGITS) - 1), torch.int16),
        )

    @property
    def work(self) -> Work:
        """Coins for each bucket of each score, and products of masks."""
        scores, buckets = math.prod(self.shape), math.prod(self._buckets)
        return Work(
            comparisons=buckets, lookups=scores, multiply_adds=scores * BUCKETS + (buckets << _DIGITS)
        )

    def derive(self, r: torch.Tensor, sums: torch.Tensor, entries: torch.Tensor) -> Sequence[torch.Tensor]:
        """Derive at the dealer. r: the scores' masks."""
        buckets = math.prod(self._buckets)
        hot = np.zeros((*self.shape, BUCKETS // 8), np.uint8)
        deal_loops.one_hot_bits(r.numpy().reshape(-1), _LOW, 1, hot.reshape(-1, BUCKETS // 8))
        above = ((r >> (_LOW + BUCKETS.bit_length() - 1)) & 3).to(torch.uint8)
        tables = np.zeros((*self._buckets, _DIGITS, (1 << _DIGIT) // 8), np.uint8)
        deal_loops.one_hot_bits(sums.numpy().reshape(-1), 0, _DIGITS, tables.reshape(buckets * _DIGITS, -1))
        products = np.empty((*self._buckets, (1 << _DIGITS) - 1), np.int16)
        each = apart(entries, _DIGITS, BUCKETS - 1).contiguous().numpy()
        deal_loops.bit_products(each.reshape(-1), products.reshape(buckets, -1))
        return torch.from_numpy(hot), above, torch.from_numpy(tables), torch.from_numpy(products)

    def find(
        self, side: Side, drawn: Sequence[Any], c: Any, visible: torch.Tensor | None
    ) -> Program[torch.Tensor]:
        """Shares modulo 2^16 of the highest visible bucket's number, or one more: (*rows, 1). Two rounds.

        drawn: `random` and `derived`.  c: the scores as they were opened.
        """
        masks, entry_masks, hot, above, tables, products = drawn
        cipher = yield from tree_cipher()
        if c.is_meta:
            sums = torch.empty_like(masks)
        else:
            assert cipher is not None
            coins = public_coins(cipher.key, self.shape[-1])
            coins = coins.expand(self.shape) if visible is None else coins * visible
            sums = self._sums(side, hot, above, c, coins, visible)
        (o,) = yield from open_masked(
            Opening(sums ^ masks, "buckets, summed and masked", ring=COINS, xor=True)
        )
        why, ring = "buckets' digits, masked", _DIGITS * TOGETHER
        entries = entry_masks if o.is_meta else _entries(tables, o, entry_masks)
        (f,) = yield from open_masked(Opening(entries, why, ring=ring, xor=True))
        if f.is_meta:
            return torch.empty_like(masks[..., :1])
        empty = np.empty((*self.shape[:-1], 1), np.int64)
        of_masks = products.numpy().reshape(-1, *products.shape[-2:])
        value_loops.count_zero(_rows(f), side.rank is Rank.SERVER, of_masks, empty.reshape(-1))
        return side.plus(-torch.from_numpy(empty), BUCKETS - 1)

    def _sums(
        self,
        side: Side,
        hot: torch.Tensor,
        above: torch.Tensor,
        c: torch.Tensor,
        coins: torch.Tensor,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        """Sum the coins of each bucket, and let the guard see which scores lie in none."""
        rows, n = math.prod(self.shape[:-1]), self.shape[-1]
        place = (c >> _LOW) + BUCKETS // 2
        sums, borrows = np.empty((rows, BUCKETS), np.int64), np.empty((rows, n), np.uint8)
        low = (place & (BUCKETS - 1)).reshape(rows, n).contiguous()
        bit_loops.sum_above(
            hot.reshape(rows, n, -1).contiguous().numpy(), low.numpy(),
            coins.reshape(rows, n).contiguous().numpy(), sums, borrows,
        )  # fmt: skip
        # The bucket modulo 4 BUCKETS is place - r. Its two leading bits are 0 in range: they are those of
        # place, less those of r, less the borrow of what is below them; each is a sum of shared bits.
        borrow, high = torch.from_numpy(borrows).reshape(c.shape), place >> (BUCKETS.bit_length() - 1)
        one, two = (high & 1).to(torch.uint8), ((high >> 1) & 1).to(torch.uint8)
        checks = (above & 1) ^ borrow ^ side.first(one)
        checks |= ((above >> 1) & 1 ^ (above & 1 & (1 - one)) ^ side.first(two)) << 1
        side.watch_bits(checks if visible is None else checks * visible.to(torch.uint8))
        return torch.from_numpy(sums).reshape(*self.shape[:-1], BUCKETS)[..., 1:]


def _rows(x: torch.Tensor) -> Any:
    """Return (*rows, n) as what compiled loops take: (rows, n)."""
    return x.numpy().reshape(-1, x.shape[-1])


def _entries(tables: torch.Tensor, o: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """XOR shares of whether each digit of a sum is zero, masked, `TOGETHER` to a word: (*rows, words)."""
    out = np.empty(masks.shape, np.int64)
    each = tables.numpy().reshape(-1, *tables.shape[-3:])
    value_loops.digit_entries(each, _rows(o), _rows(masks), out.reshape(-1, masks.shape[-1]))
    return torch.from_numpy(out)


def bound_of(side: Side, number: torch.Tensor) -> torch.Tensor:
    """Return the bound above the highest bucket, by its number or one more, at SCORE_BITS.

    max < c <= max + 4: the bucket's upper edge, and one bucket where its number is one too high.
    """
    return side.plus(number, 1 - BUCKETS // 2) << _LOW


assert (1 << _DIGIT) == BUCKETS == 256, "`one_hot_bits` makes rows of so many bits"
assert _LOW + BUCKETS.bit_length() + 1 == SCORE_RING, "two bits of a score's ring lie above the buckets"

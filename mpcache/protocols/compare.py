"""Comparison of a value that is opened masked, with arithmetic shares of the outcome.

Source and costs: docs/protocols.md, section 6.
x is opened as c = x + r in a ring of `width` bits. msb(x) = msb(c) xor msb(r) xor t, where
t = [c mod 2^(width-1) < r mod 2^(width-1)] compares a public number with one that the dealer knows.
The dealer multiplies what tells t by 1 - 2 msb(r) and shares msb(r), so that u = msb(r) xor t arrives
additively, and msb(x) = m + u - 2 m u with the public m = msb(c).

Two ways to tell t trade offline bytes for a round:

* `Keys`: a key tree of function secret sharing; no further message.
* `Digits`: the mask's digits, each as a one-hot vector; one more round, or two for a third of the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch

from mpcache.protocols import dcf
from mpcache.protocols.dcf import KeyShape
from mpcache.protocols.digit_levels import DigitLayout, cheapest_layout, compared_digits
from mpcache.runtime.program import (
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    Work,
    draw,
    local,
    open_masked,
    tree_cipher,
)
from mpcache.runtime.rng import TreeCipher
from mpcache.runtime.side import Side

# Comparisons at once from which a further round costs less than the bytes it spares (docs/log.md).
MANY = 1 << 16


def key_parts(keys: KeyShape) -> tuple[Part, Part, Part]:
    """Seeds (each party's own), correction words and correction bits (the same at both)."""
    return (
        Part(keys.seeds, own=True),
        Part(keys.words, public=True),
        Part(keys.bits, dtype=torch.uint8, public=True),
    )


def _signed(side: Side, depth: int, opened: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Shares of [x < 0] from the opened c and shares of u."""
    m = (opened >> depth) & 1
    return side.first(m) + u - 2 * m * u


@dataclass(frozen=True)
class Keys:
    """n comparisons by key trees (Boyle et al., EUROCRYPT 2021), with outcomes in `dtype`'s ring.

    They take about 16 bytes per bit of the width, to both parties, and no further round.
    cipher: what the phase's trees grow by; None where there are only shapes.
    """

    n: int
    width: int
    dtype: torch.dtype = torch.int64
    cipher: TreeCipher | None = None

    kind = RequestKind.TOPK

    @classmethod
    def of(cls, n: int, width: int, dtype: torch.dtype = torch.int64) -> Program[Self]:
        """Make them for the phase that runs. No message."""
        return cls(n, width, dtype, (yield from tree_cipher()))

    @cached_property
    def shape(self) -> KeyShape:
        return KeyShape(self.n, self.width - 1, width=self.dtype.itemsize)

    @property
    def work(self) -> Work:
        """One evaluation of each key."""
        return self.shape.work()

    @property
    def random(self) -> tuple[Part, ...]:
        return key_parts(self.shape)[:1]

    @property
    def derived(self) -> tuple[Part, ...]:
        return Part((self.n,), self.dtype), *key_parts(self.shape)[1:]

    def derive(
        self, mask: torch.Tensor, seeds: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """Derive msb(r), words and bits for masks r (n,), at the dealer."""
        keys = self.shape
        top = (mask >> keys.depth) & 1
        words, bits = dcf.dcf_keygen(keys, self.cipher, seeds, mask & ((1 << keys.depth) - 1), 1 - 2 * top)
        return top.to(self.dtype), words, bits

    def points(self, side: Side, parts: Sequence[torch.Tensor], opened: torch.Tensor) -> torch.Tensor:
        """Shares of [x < 0] at opened values (n, points): one tree serves them all."""
        seeds, top, words, bits = parts
        keys = self.shape
        _, t = dcf.dcf_eval(
            keys, self.cipher, side.number, seeds, words, bits, opened & ((1 << keys.depth) - 1)
        )
        return _signed(side, keys.depth, opened, top.long().unsqueeze(-1) + t)

    def sign(self, side: Side, parts: Sequence[torch.Tensor], opened: torch.Tensor) -> Program[torch.Tensor]:
        """Shares of [x < 0] at opened values (n,)."""
        return local(self.points(side, parts, opened.unsqueeze(-1)).squeeze(-1))


def _holds(bits: int) -> torch.dtype:
    """Return the smallest type that holds so many bits."""
    return next(t for t in (torch.uint8, torch.int16, torch.int32, torch.int64) if bits <= 8 * t.itemsize)


def levels_for(n: int) -> int:
    """Return the levels in which a top-k makes n comparisons: a round more where it spares many bytes."""
    return 2 if n >= MANY else 1


def _bits_opened(bits: torch.Tensor, mask: torch.Tensor, count: int, why: str) -> Program[torch.Tensor]:
    """Open so many bits of each number, given by XOR, under those of its mask. One round."""
    share = bits if bits.is_meta else bits ^ mask.long()
    (seen,) = yield from open_masked(Opening(share, why, ring=count, xor=True))
    return seen if seen.is_meta else seen & ((1 << count) - 1)


@dataclass(frozen=True)
class Digits:
    """n comparisons of the mask's digits, with outcomes in `dtype`'s ring.

    They take one more round, and a thirteenth of the offline bytes of `Keys`, to the server alone; with two
    levels two more rounds, and a fortieth. docs/protocols.md, section 6.2.

    r has m digits d_j, the highest first. The dealer shares each as a one-hot vector, by XOR (one-time truth
    tables; Ishai et al., TCC 2013). c's digits v_j choose what a party adds up of it: l_j = [v_j < d_j] and
    e_j = [v_j = d_j]; and t = sum_j l_j prod_(i<j) e_i, of which one summand at most is 1. The bits are
    opened under one-bit masks, and the products of these masks, which the dealer shares in place of opened
    factors, make t from the public bits (multi-fan-in products; ABY2.0, USENIX Security 2021). With two
    levels they make t of each group of digits and whether all of a group are equal, in bits; these are
    opened in their turn, under masks of their own, and make t of all.
    """

    n: int
    width: int
    dtype: torch.dtype = torch.int64
    levels: int = 1

    kind = RequestKind.TOPK_DIGITS

    @classmethod
    def of(cls, n: int, width: int, dtype: torch.dtype = torch.int64) -> Program[Self]:
        """Make them as `Keys.of` does; they are of no phase."""
        return local(cls(n, width, dtype, levels_for(n)))

    @property
    def depth(self) -> int:
        return self.width - 1

    @cached_property
    def layout(self) -> DigitLayout:
        return cheapest_layout(self.depth, self.levels, self.dtype.itemsize)

    @property
    def work(self) -> Work:
        """Bits and products that are added up."""
        return Work(comparisons=self.n, multiply_adds=self.n * self.layout.summands)

    @property
    def random(self) -> tuple[Part, ...]:
        """Masks of the bits that are opened at each level: l_j at bit j, e_j at bit m + j."""
        return tuple(Part((self.n,), _holds(level.bits), xor=True) for level in self.layout.levels)

    @property
    def derived(self) -> tuple[Part, ...]:
        """One-hot vectors of the digits; products of the first of two levels' masks, as bits; numbers."""
        layout = self.layout
        hot = Part((self.n, layout.digits), _holds(1 << layout.base), xor=True)
        products = Part((self.n, 1 + len(layout.last.products)), self.dtype)
        if layout.first is None:
            return hot, products
        return hot, Part((self.n,), xor=True, ring=len(layout.first.products)), products

    def derive(self, mask: torch.Tensor, *masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Derive at the dealer, of r (n,). The numbers are msb(r), and 1 - 2 msb(r) times the products."""
        layout, top = self.layout, (mask >> self.depth) & 1
        hot = (torch.ones_like(mask).unsqueeze(-1) << self._split(mask)).to(_holds(1 << layout.base))
        within = [] if layout.first is None else [layout.first.multiplied(masks[0].long())]
        words, sign = masks[-1].long(), 1 - 2 * top
        products = [top, *(sign * ((words & one) == one) for one in layout.last.products)]
        return hot, *within, torch.stack(products, -1).to(self.dtype)

    def sign(self, side: Side, parts: Sequence[torch.Tensor], opened: torch.Tensor) -> Program[torch.Tensor]:
        """Shares of [x < 0] at opened values (n,). As many rounds as levels."""
        layout = self.layout
        *first, mask = parts[: self.levels]
        hot, *within, products = parts[self.levels :]
        digits, why = self._split(opened), "digits, compared and masked"
        bits = opened if opened.is_meta else compared_digits(hot, digits)
        if layout.first is not None:
            seen = yield from _bits_opened(bits, first[0], layout.first.bits, why)
            bits = seen if seen.is_meta else layout.first.sums(side, seen, first[0].long(), within[0])
            why = "groups of digits, masked"
        seen = yield from _bits_opened(bits, mask, layout.last.bits, why)
        if opened.is_meta:
            return torch.empty_like(opened)
        public, factors = (table[seen] for table in layout.last.factors)
        u = side.plus((factors * products).sum(-1), public.long())
        return _signed(side, self.depth, opened, u)

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Split x mod 2^depth (n,) into its digits, the highest first: (n, m)."""
        layout, low = self.layout, x & ((1 << self.depth) - 1)
        shifts = torch.arange(layout.digits - 1, -1, -1) * layout.base
        return (low.unsqueeze(-1) >> shifts) & ((1 << layout.base) - 1)


def less(
    side: Side,
    x: torch.Tensor,
    width: int,
    thresholds: Sequence[int] = (0,),
    dtype: torch.dtype = torch.int64,
) -> Program[torch.Tensor]:
    """Compute shares of [x < theta] for each public threshold: x (*s) -> (*s, thresholds), in `dtype`'s ring.

    x: shares modulo 2^width of values with |x - theta| < 2^(width-1). One round, one key tree per
    element whatever the number of thresholds: the same opening is evaluated at shifted points.
    """
    n = math.prod(x.shape)
    keys = yield from Keys.of(n, width, dtype)
    request = Request(RequestKind.COMPARE, (Part((n,)), *keys.random), keys.derived, keys.derive, keys.work)
    r, *parts = yield from draw(request)
    (opened,) = yield from open_masked(Opening(x.reshape(n) + r, "masked for comparison", ring=width))
    points = opened.unsqueeze(-1) - side.public(thresholds)
    return keys.points(side, parts, points).reshape(*x.shape, len(thresholds))

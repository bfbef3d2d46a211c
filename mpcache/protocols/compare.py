"""Comparison of a value that is opened masked, with arithmetic shares of the outcome.

Source and costs: docs/protocols.md, section 6.
x is opened as c = x + r in a ring of `width` bits. msb(x) = msb(c) xor msb(r) xor t, where
t = [c mod 2^(width-1) < r mod 2^(width-1)] compares a public number with one that the dealer knows.
The dealer multiplies what tells t by 1 - 2 msb(r) and shares msb(r), so that u = msb(r) xor t arrives
additively, and msb(x) = m + u - 2 m u with the public m = msb(c).

Two ways to tell t trade offline bytes for a round:

* `Keys`: a key tree of function secret sharing; no further message.
* `Digits`: the mask's digits, each as a one-time table of its comparisons; one more round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Self

import numpy as np
import torch

from mpcache.protocols import dcf
from mpcache.protocols.dcf import KeyShape
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


@cache
def _tables(base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each digit d of `base` bits the bits [v < d] and [v = d] of all v: two (2^base, 2^base / 8)."""
    v = np.arange(1 << base)
    less, same = (v < v[:, None]), (v == v[:, None])
    return tuple(torch.from_numpy(np.packbits(t, axis=1, bitorder="little")) for t in (less, same))  # type: ignore[return-value]


@dataclass(frozen=True)
class Digits:
    """n comparisons of the mask's digits, with outcomes in `dtype`'s ring.

    They take one more round of a byte, and a ninth of the offline bytes of `Keys`, to the server alone.
    r has m digits d_j, the highest first. The dealer shares, for each, the tables of [v < d_j] and
    [v = d_j] over all v, by XOR (one-time truth tables; Ishai et al., TCC 2013). c chooses an entry of each,
    locally: l_j and e_j; and t = sum_j l_j prod_(i<j) e_i, of which one summand at most is 1. The entries
    are opened under one-bit masks, and the products of these masks, which the dealer shares additively
    in place of opened factors (multi-fan-in products; ABY2.0, USENIX Security 2021), make t from the
    public bits in the same round.
    """

    n: int
    width: int
    dtype: torch.dtype = torch.int64

    kind = RequestKind.TOPK_DIGITS

    @classmethod
    def of(cls, n: int, width: int, dtype: torch.dtype = torch.int64) -> Program[Self]:
        """Make them as `Keys.of` does; they are of no phase."""
        return local(cls(n, width, dtype))

    @property
    def depth(self) -> int:
        return self.width - 1

    @property
    def digits(self) -> int:
        """m, so that a comparison takes the fewest bytes from the dealer."""

        def nbytes(m: int) -> int:
            tables = (2 * m - 1) * (1 << max(3, -(-self.depth // m))) // 8
            return tables + self.dtype.itemsize * (3 << (m - 1))

        return min((m for m in range(1, 9) if -(-self.depth // m) <= 8), key=nbytes)

    @property
    def base(self) -> int:
        """Bits of a digit; a table fills whole bytes."""
        return max(3, -(-self.depth // self.digits))

    @property
    def work(self) -> Work:
        """Entries of digits' tables, and products of their masks."""
        return Work(comparisons=self.n, multiply_adds=2 * self.n * (3 << (self.digits - 1)))

    @property
    def random(self) -> tuple[Part, ...]:
        """Masks of the entries: of l_j at bit j, of e_j at bit m + j."""
        return (Part((self.n,), torch.uint8 if self.digits <= 4 else torch.int16, xor=True),)

    @property
    def derived(self) -> tuple[Part, ...]:
        m = self.digits
        tables = Part((self.n, 2 * m - 1, (1 << self.base) // 8), torch.uint8, xor=True)
        return tables, Part((self.n, 3 << (m - 1)), self.dtype)

    def derive(self, mask: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Derive the tables and the products of masks, at the dealer.

        The products: msb(r), then with b = 1 - 2 msb(r) as a factor those of the masks of e_0, e_1, ... over
        all subsets, alone and times the mask of each l_j.
        """
        m, top = self.digits, (mask >> self.depth) & 1
        less, same = _tables(self.base)
        digit = self._split(mask)
        tables = torch.cat([less[digit], same[digit[:, :-1]]], 1)
        bit = [(masks.long() >> i) & 1 for i in range(2 * m - 1)]
        subsets = [1 - 2 * top]
        for j in range(m - 1):
            subsets += [product * bit[m + j] for product in subsets]
        products = [top, *subsets, *(bit[j] * p for j in range(m) for p in subsets[: 1 << j])]
        return tables, torch.stack(products, -1).to(self.dtype)

    def sign(self, side: Side, parts: Sequence[torch.Tensor], opened: torch.Tensor) -> Program[torch.Tensor]:
        """Shares of [x < 0] at opened values (n,). One round."""
        masks, tables, products = parts
        m = self.digits
        (entries,) = yield from open_masked(
            Opening(self._entries(masks, tables, opened), "digits, compared and masked",
                    ring=2 * m - 1, xor=True)
        )  # fmt: skip
        if opened.is_meta:
            return torch.empty_like(opened)
        bit = [((entries >> i) & 1).to(self.dtype) for i in range(2 * m - 1)]
        shares = list(products.unbind(-1))
        u, subsets, rest = shares[0], shares[1 : 1 + (1 << (m - 1))], shares[1 + (1 << (m - 1)) :]
        factors = [torch.ones_like(u)]  # of each subset: e of what is not in it, 1 - 2 e of what is
        for j in range(m):
            by_mask, rest = rest[: 1 << j], rest[1 << j :]
            for factor, alone, masked_ in zip(factors, subsets, by_mask, strict=False):
                u = u + factor * (bit[j] * alone + (1 - 2 * bit[j]) * masked_)
            if j < m - 1:
                e = bit[m + j]
                factors = [f * e for f in factors] + [f * (1 - 2 * e) for f in factors]
        return _signed(side, self.depth, opened, u.long())

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        """Split x mod 2^depth (n,) into its digits, the highest first: (n, m)."""
        low = x & ((1 << self.depth) - 1)
        shifts = torch.arange(self.digits - 1, -1, -1) * self.base
        return (low.unsqueeze(-1) >> shifts) & ((1 << self.base) - 1)

    def _entries(self, masks: torch.Tensor, tables: torch.Tensor, opened: torch.Tensor) -> torch.Tensor:
        """XOR shares of the entries that c chooses, masked, as bits of one number (n,); masks alone above."""
        if opened.is_meta:
            return torch.empty_like(opened)
        m, digit = self.digits, self._split(opened)
        place = torch.cat([digit, digit[:, :-1]], 1)
        byte = tables.gather(2, (place >> 3).unsqueeze(-1)).squeeze(-1).long()
        bits = ((byte >> (place & 7)) & 1) << torch.arange(2 * m - 1)
        return bits.sum(-1) ^ masks.long()


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

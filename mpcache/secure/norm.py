"""Reciprocals and reciprocal square roots over a wide range, and RMSNorm (PROTOCOLS 6).

A positive x is brought to u = x * 2^-j in [1, 2): thresholds at all powers of two, from one opening
and one key tree, give the exponent as a one-hot vector. A table over u's leading bits gives the
function there, and the one-hot vector weighs the exponents' own factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpcache.secure.compare import less
from mpcache.secure.correlations import Part, Request
from mpcache.secure.linear import product, truncate
from mpcache.secure.lookup import lookup
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.shares import Share, encode
from mpcache.secure.side import Side, drop

_MARGIN = 13  # bits below the lowest exponent that comparisons keep


@dataclass(frozen=True)
class Table:
    """mantissa: the function on [1, 2).  leading: bits of u that index it.  bits: of its entries."""

    mantissa: Callable[[torch.Tensor], torch.Tensor]
    leading: int
    bits: int

    def entries(self) -> torch.Tensor:
        """2^(leading + 1) integers: an index may be one below zero and one above the last cell."""
        size = 2 << self.leading
        cell = torch.arange(size, dtype=torch.float64)
        cell = torch.where(cell < size - 1, cell, -1.0)
        centre = 1 + (cell + 1) / (1 << self.leading)  # u lies in this cell or, by `drop`, in the next
        return encode(self.mantissa(centre), self.bits)


def by_exponent(
    side: Side,
    x: torch.Tensor,
    low: int,
    high: int,
    table: Table,
    factor: Callable[[int], int],
) -> Program[torch.Tensor]:
    """table(u) * factor(j) for x = u * 2^j, u in [1, 2): x (*s, 1) shares of integers in
    [2^low, 2^high) -> (*s, 1), with the factor's fraction bits and the table's. Four rounds.

    Relative error of the table's argument: 2^-leading, a cell on each side of its centre.
    """
    shift = max(0, low - _MARGIN)
    exponents = range(low, high)
    width = high - shift + 2
    below = yield from less(side, drop(x, shift), width, [1 << (j - shift) for j in exponents[1:]])
    # hot_j = [x < 2^(j+1)] - [x < 2^j]
    below = below.squeeze(-2)
    ends = side.constant(1, below[..., :1]), torch.zeros_like(below[..., :1])
    hot = torch.cat([below, ends[0]], -1) - torch.cat([ends[1], below], -1)
    up = (hot * side.public([1 << (high - 1 - j) for j in exponents])).sum(-1, keepdim=True)
    weight = (hot * side.public([factor(j) for j in exponents])).sum(-1, keepdim=True)
    u = yield from product(side, Share(x, 0), Share(up, 0))  # [2^(high-1), 2^high)
    index = drop(u.data - side.constant(1 << (high - 1), u.data), high - 1 - table.leading)
    value = yield from lookup(side, index, table.entries())
    y = yield from product(side, Share(value, table.bits), Share(weight, 0))
    return y.data


_RECIPROCAL = Table(lambda u: 1 / u, 12, 14)


def reciprocal(side: Side, x: Share, least: float, most: float, bits: int) -> Program[Share]:
    """1 / x for least <= x < most at `bits` fraction bits. Four rounds. Relative error 2.5e-4."""
    low = math.floor(math.log2(least)) + x.bits
    high = math.ceil(math.log2(most)) + x.bits
    scale = bits - _RECIPROCAL.bits + x.bits  # 1/x = 2^x.bits / x_raw = (1/u) * 2^(x.bits - j)
    if scale - high < 0:
        raise ValueError(f"reciprocal: {bits} fraction bits are too few for x up to {most}")
    y = yield from by_exponent(side, x.data, low, high, _RECIPROCAL, lambda j: 1 << (scale - j))
    return Share(y, bits)


VARIANCE_LOW, VARIANCE_HIGH = -20, 17  # mean squares from 9.5e-7 to 1.3e5
_ROOT = Table(torch.rsqrt, 14, 18)
ROOT_BITS = 38


def exponents(width: int, bits: int) -> tuple[int, int]:
    """Sums of `width` squares of values with `bits` fraction bits lie in [2^low, 2^high)."""
    spread = math.log2(width) + 2 * bits
    return math.floor(spread) + VARIANCE_LOW, min(61, math.ceil(spread) + VARIANCE_HIGH)


def rms_norm(side: Side, x: Share, eps: float, bits: int) -> Program[Share]:
    """(m, width) / sqrt(mean square + eps) at `bits` fraction bits. Seven rounds.

    Mean squares in [2^-20, 2^17); x is opened once, for the squares and for the last product.
    Relative error 4e-5. Source: PROTOCOLS 6; zhang2019rms for the norm itself.
    """
    m, width = x.shape

    def derive(a: torch.Tensor, b: torch.Tensor) -> Sequence[torch.Tensor]:
        return (a * a).sum(-1, keepdim=True), a * b

    request = Request("norm", (Part((m, width)), Part((m, 1))), (Part((m, 1)), Part((m, width))), derive)
    a, b, aa, ab = yield from draw(request)
    (e,) = yield from reveal(Opening(x.data - a, "activation, masked"))
    total = aa + 2 * (e * a).sum(-1, keepdim=True) + side.first((e * e).sum(-1, keepdim=True))
    total = total + side.constant(round(eps * width * 2.0 ** (2 * x.bits)), total)

    # rsqrt(total / width / 2^(2 bits)) = sqrt(width) 2^bits * rsqrt(u) * 2^(-j/2)
    low, high = exponents(width, x.bits)
    scale = ROOT_BITS - _ROOT.bits + (math.log2(width) + 2 * x.bits) / 2
    root = yield from by_exponent(side, total, low, high, _ROOT, lambda j: round(2.0 ** (scale - j / 2)))
    (d,) = yield from reveal(Opening(root - b, "factor, masked"))
    y = ab + e * b + a * d + side.first(e * d)
    return (yield from truncate(side, Share(y, x.bits + ROOT_BITS), bits))

"""Reciprocals and reciprocal square roots over a wide range, and RMSNorm (PROTOCOLS 6).

A positive x is brought to u = x * 2^-j in [1, 2): thresholds at all powers of two, from one opening
and one key tree, give the exponent as a one-hot vector. A table over u's leading bits gives the
function there, and the one-hot vector weighs the exponents' own factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from mpcache.secure.compare import less
from mpcache.secure.correlations import Part, Request
from mpcache.secure.linear import product, truncate
from mpcache.secure.lookup import lookup
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.shares import Share
from mpcache.secure.side import Side, drop

_MANTISSA = 12  # leading bits of u that index the table
_TABLE_BITS = 14  # fraction bits of its entries
_MARGIN = 13  # bits below the lowest exponent that comparisons keep


def by_exponent(
    side: Side,
    x: torch.Tensor,
    low: int,
    high: int,
    mantissa: Callable[[torch.Tensor], torch.Tensor],
    factor: Callable[[int], int],
) -> Program[torch.Tensor]:
    """mantissa(u) * factor(j) for x = u * 2^j, u in [1, 2): x (*s, 1) shares of integers in
    [2^low, 2^high) -> (*s, 1), with the factor's fraction bits and 14 more. Four rounds.

    Relative error 2.5e-4 of mantissa's argument: 12 leading bits, and one unit from `drop`.
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
    index = drop(u.data - side.constant(1 << (high - 1), u.data), high - 1 - _MANTISSA)
    size = 2 << _MANTISSA
    cell = torch.arange(size, dtype=torch.float64)
    cell = torch.where(cell < size - 1, cell, -1.0)  # `drop` may give -1
    centre = 1 + (cell + 1) / (1 << _MANTISSA)  # x lies in this cell or, by `drop`, in the next
    table = (mantissa(centre) * 2**_TABLE_BITS).round().to(torch.int64)
    value = yield from lookup(side, index, table)
    y = yield from product(side, Share(value, _TABLE_BITS), Share(weight, 0))
    return y.data


def reciprocal(side: Side, x: Share, least: float, most: float, bits: int) -> Program[Share]:
    """1 / x for least <= x < most at `bits` fraction bits. Four rounds. Relative error 2.5e-4."""
    low = math.floor(math.log2(least)) + x.bits
    high = math.ceil(math.log2(most)) + x.bits
    scale = bits - _TABLE_BITS + x.bits  # 1/x = 2^x.bits / x_raw = (1/u) * 2^(x.bits - j)
    if scale - high < 0:
        raise ValueError(f"reciprocal: {bits} fraction bits are too few for x up to {most}")
    y = yield from by_exponent(side, x.data, low, high, lambda u: 1 / u, lambda j: 1 << (scale - j))
    return Share(y, bits)


VARIANCE_LOW, VARIANCE_HIGH = -20, 17  # mean squares from 9.5e-7 to 1.3e5
_ROOT_BITS = 38


def rms_norm(side: Side, x: Share, eps: float, bits: int) -> Program[Share]:
    """(m, width) / sqrt(mean square + eps) at `bits` fraction bits. Seven rounds.

    Mean squares in [2^-20, 2^17); x is opened once, for the squares and for the last product.
    Relative error 1.5e-4. Source: PROTOCOLS 6; zhang2019rms for the norm itself.
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
    spread = math.log2(width) + 2 * x.bits
    low, high = math.floor(spread) + VARIANCE_LOW, min(61, math.ceil(spread) + VARIANCE_HIGH)
    scale = _ROOT_BITS - _TABLE_BITS + spread / 2
    root = yield from by_exponent(
        side, total, low, high, torch.rsqrt, lambda j: round(2.0 ** (scale - j / 2))
    )
    (d,) = yield from reveal(Opening(root - b, "factor, masked"))
    y = ab + e * b + a * d + side.first(e * d)
    return (yield from truncate(side, Share(y, x.bits + _ROOT_BITS), bits))

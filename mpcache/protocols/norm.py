"""Residual connection, RMSNorm and the linear layer after it, as one protocol of four rounds.

docs/protocols.md, section 9.1.

1. What the last sublayer adds is opened, to be truncated. The stream was opened before with a mask that
   the dealer knows, so the sum of squares of stream and addition comes out of this opening.
2. The new stream is opened, for the matrix; the sum is compared with all powers of four.
3. The product is opened, to be truncated; the inverse root is looked up.
4. The inverse root is opened, which multiplies what round 3 opened: the norm is applied after the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import torch

from mpcache.protocols.fence import truncation_fence
from mpcache.protocols.linear import (
    masks_of_product,
    raised,
    share_of_product,
    truncate_local,
    truncate_to_scale,
)
from mpcache.protocols.ranges import MEAN_SQUARE_HIGH, MEAN_SQUARE_LOW, NORM_PRODUCT_BITS, NORM_PRODUCT_RING
from mpcache.protocols.reciprocal import Curve, ExponentRange, power
from mpcache.rank import Rank
from mpcache.runtime import value_loops
from mpcache.runtime.correlations import dealt, mask_parts, mask_ring
from mpcache.runtime.program import (
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    at,
    draw,
    open_masked,
    products_of,
    together,
)
from mpcache.runtime.ring import elements_of
from mpcache.runtime.shares import KnownOperand, MaskedOperand, Share, zeros
from mpcache.runtime.side import Side


@cache
def root(width: int, bits: int) -> tuple[ExponentRange, Curve, int]:
    """Plan sqrt(width) 2^bits / sqrt(total), total the raw sum of `width` squares at `bits` fraction bits.

    Returns the range of the total, the curve, and the result's fraction bits. Relative error 3.2e-5.
    """
    spread = math.log2(width) + 2 * bits
    where = ExponentRange.of(spread + MEAN_SQUARE_LOW, spread + MEAN_SQUARE_HIGH, 2)
    scale = math.log2(width) / 2  # the part of sqrt(width) that is no power of two goes into the curve
    whole = math.floor(scale)
    curve = Curve(lambda u: torch.rsqrt(u) * 2 ** (scale - whole), 2, 7, 16, 10)
    return where, curve, curve.bits + where.steps(2) - 1 + where.low // 2 - bits - whole


def norm_linear(
    side: Side,
    stream: MaskedOperand | None,
    change: Share,
    eps: float,
    w: MaskedOperand | KnownOperand,
    turn: Callable[[Share], Share],
) -> Program[tuple[MaskedOperand, Share]]:
    """Compute x = stream + change (m, width), and turn(x @ w) / sqrt(mean square of x + eps).

    stream: (m, width) at the change's fraction bits, opened; None for zero.  change: |raw| < 2^(ring-2).
    turn: public and linear.  The mean squares lie in [2^-20, 2^17), |turn(x @ w)| below 2^14 (2^20 where
    w's ring has 64 bits), and divided by the root below 2^10. The result keeps its
    fraction bits; relative error 3.2e-5, and 2^-18 of the product. Four rounds.
    """
    x, total = yield from at("norm", _add(side, stream, change))
    width, bits = change.shape[-1], change.bits
    total = side.plus(total, round(eps * width * 2.0 ** (2 * bits)))
    where, curve, root_bits = root(width, bits)

    def multiplied() -> Program[tuple[MaskedOperand, Callable[[Share], Program[Share]]]]:
        opened, y = yield from _times(side, Share(x, bits), w)
        y = truncate_local(side, turn(y), NORM_PRODUCT_BITS)
        y = Share(y.data, y.bits, ring=min(y.ring, NORM_PRODUCT_RING))
        return opened, (yield from truncate_to_scale(side, y, tuple(total.shape)))

    def inverse() -> Program[Share]:
        y = yield from power(side, total.reshape(-1), where, curve)
        return Share(y.reshape(total.shape), root_bits)

    (opened, scaled), factor = yield from together(multiplied(), at("norm", inverse()))
    return opened, (yield from scaled(factor))


def _add(
    side: Side, stream: MaskedOperand | None, change: Share
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """Compute shares of x = stream + change (m, width), in the whole ring, and of its sums of squares (m, 1).

    One round.
    """
    m, width = change.shape
    each, row, fence = Part((m, width)), Part((m, 1)), truncation_fence(change.ring)

    def derive(r: torch.Tensor) -> Sequence[torch.Tensor]:
        # x = e + p + q rb + a, e and p public: a is what hides the stream and the change's low bits
        rc, rb = mask_parts(r, 0, change.ring)
        a = -rc if stream is None else dealt(stream.dealt) - rc
        return rc, rb, a * rb, (a * a).sum(-1, keepdim=True), fence.tables(r)

    # q, of 2^(ring-1) at least, multiplies rb and a rb
    rc_ring, rb_ring = mask_ring(0, change.ring)
    parts = (Part(each.shape, ring=ring) for ring in (rc_ring, rb_ring, rb_ring))
    derived = (*parts, row, fence.part(each.shape))
    request = Request(RequestKind.NORM, (each,), derived, derive, products_of(m * width))
    r, rc, rb, a_rb, aa, tables = yield from draw(request)
    (c,) = yield from open_masked(raised(side, change.data, r, change.ring, "masked for truncation"))
    fence.watch(side, tables, c)
    if c.is_meta:
        return c, aa
    x, total = np.empty((m, width), np.int64), aa.numpy().copy()
    nothing = zeros((m, width))
    known = (nothing, nothing) if stream is None else (stream.opened, stream.mask)
    value_loops.added_square(
        *elements_of(c), change.ring, *elements_of(rb, rc, a_rb, *known), side.rank is Rank.SERVER,
        x.reshape(-1), total.reshape(-1),
    )  # fmt: skip
    return torch.from_numpy(x), torch.from_numpy(total)


def _times(side: Side, x: Share, w: MaskedOperand | KnownOperand) -> Program[tuple[MaskedOperand, Share]]:
    """X opened under a fresh mask, and x @ w from the same opening. One round."""
    a, c, value = yield from masks_of_product(side, x.shape, w, keep=True, ring=w.ring)
    (e,) = yield from open_masked(Opening(x.data - a, "stream, masked"))
    opened = MaskedOperand(a, e, x.bits, value)
    return opened, Share((yield from share_of_product(side, e, a, c, w)), x.bits + w.bits, ring=w.ring)

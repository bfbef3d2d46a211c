"""Products and truncation: Beaver triples, resident operands, exact truncation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpcache.secure import correlations
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.ring import matmul
from mpcache.secure.shares import Resident, Share
from mpcache.secure.side import Side

_LOW63 = (1 << 63) - 1


def truncate(side: Side, x: Share, bits: int) -> Program[Share]:
    """To `bits` fraction bits: floor(x / 2^f) + {0, 1}, never off by a wrap, |x_raw| < 2^62. One round.

    Escudero et al., eprint 2020/338; PROTOCOLS 2. With fewer fraction bits than wanted it is a
    shift and costs nothing.
    """
    f = x.bits - bits
    if f <= 0:
        return Share(x.data << -f, bits, x.owner)
    r, rc, rb = yield from draw(correlations.truncation(x.shape, f))
    masked = x.data + side.constant(1 << 62, r) + r
    (c,) = yield from reveal(Opening(masked, "masked for truncation"))
    top, low = (c >> 63) & 1, (c & _LOW63) >> f
    carry = rb + side.first(top) - 2 * top * rb  # msb(r) xor msb(c): x + 2^62 + r passed 2^63
    return Share(side.first(low - (1 << (62 - f))) - rc + (carry << (63 - f)), bits)


def resident(x: Share) -> Program[Resident]:
    """Open x - B once, with a mask B that stays (PROTOCOLS 1). One round; one way if x has an owner."""
    mask, values = yield from draw(correlations.random_mask(x.shape, x.owner))
    (opened,) = yield from reveal(Opening(x.data - mask, "resident, masked", sender=x.owner))
    return Resident(mask, opened, x.bits, None if values is None else values[0])


def product_resident(side: Side, x: Share, w: Resident) -> Program[Share]:
    """(*b, m, k) @ resident (*b, k, n), all fraction bits kept. One round; only x is opened."""
    out = (*x.shape[:-1], w.shape[-1])
    a, c = yield from draw(correlations.resident_product(x.shape, w, out, x.owner))
    (e,) = yield from reveal(Opening(x.data - a, "activation, masked", sender=x.owner))
    y = c + matmul(e, w.mask) + matmul(a, w.opened) + side.first(matmul(e, w.opened))
    return Share(y, x.bits + w.bits)


def product(
    side: Side, x: Share, y: Share, op: Callable[..., torch.Tensor] = torch.mul
) -> Program[Share]:
    """op(x, y), bilinear, all fraction bits kept. One round (Beaver, CRYPTO 1991)."""
    shapes = (torch.empty(s, dtype=torch.int64, device="meta") for s in (x.shape, y.shape))
    out = tuple(op(*shapes).shape)
    a, b, c = yield from draw(correlations.triple(x.shape, y.shape, out, op, f"triple/{op.__name__}"))
    d, e = yield from reveal(
        Opening(x.data - a, "factor, masked"), Opening(y.data - b, "factor, masked")
    )
    return Share(c + op(d, b) + op(a, e) + side.first(op(d, e)), x.bits + y.bits)

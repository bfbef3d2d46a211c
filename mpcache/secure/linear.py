"""Products and truncation: Beaver triples, resident operands, exact truncation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mpcache.rank import Rank
from mpcache.secure import correlations
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.ring import matmul
from mpcache.secure.shares import Resident, Share
from mpcache.secure.side import Side, bytes_for


def room(ring: int) -> int:
    """What a truncation in a ring of so many bits is right for: |x_raw| below this."""
    return 1 << (ring - 2)


def masked(x: torch.Tensor, ring: int, why: str, sender: Rank | None = None) -> Opening:
    """An opening modulo 2^ring: so many bytes, and no more."""
    return Opening(x, why, sender=sender, width=bytes_for(ring))


def raised(side: Side, x: torch.Tensor, r: torch.Tensor, ring: int, why: str) -> Opening:
    """Open x + 2^(ring-2) + r modulo 2^ring: what a truncation of |x| < 2^(ring-2) starts from."""
    return masked(x + side.constant(room(ring), r) + r, ring, why)


def affine(c: torch.Tensor, f: int, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Public p and q of an opened `raised` value: x truncated by f bits is p + q rb - rc, with the
    parts rc and rb of its mask (`correlations.cut`). rb xor msb(c) tells whether 2^(ring-1) was passed."""
    top, low = (c >> (ring - 1)) & 1, (c & ((1 << (ring - 1)) - 1)) >> f
    passed = ring - 1 - f
    return low - (1 << (passed - 1)) + (top << passed), (1 - 2 * top) << passed


def truncate(side: Side, x: Share, bits: int) -> Program[Share]:
    """To `bits` fraction bits and the whole ring: floor(x / 2^f) + {0, 1}, never off by a wrap.

    For |x_raw| < 2^(ring-2). One round; with fewer fraction bits than wanted it is a shift and costs
    nothing. Escudero et al., eprint 2020/338; PROTOCOLS 2.
    """
    f = x.bits - bits
    if f <= 0 and x.ring == 64:
        return Share(x.data << -f, bits, x.owner)
    ring, f = x.ring, max(f, 0)
    data = x.data << max(0, bits - x.bits)
    r, rc, rb = yield from draw(correlations.truncation(x.shape, f, ring))
    (c,) = yield from reveal(raised(side, data, r, ring, "masked for truncation"))
    p, q = affine(c, f, ring)
    return Share(side.first(p) + q * rb - rc, bits)


def resident(x: Share, ring: int = 64) -> Program[Resident]:
    """Open x - B once, with a mask B that stays (PROTOCOLS 1). One round; one way if x has an owner."""
    mask, values = yield from draw(correlations.random_mask(x.shape, x.owner))
    (opened,) = yield from reveal(masked(x.data - mask, ring, "resident, masked", x.owner))
    return Resident(mask, opened, x.bits, None if values is None else values[0], ring)


def product_resident(side: Side, x: Share, w: Resident, ring: int = 64) -> Program[Share]:
    """(*b, m, k) @ resident (*b, k, n) modulo 2^ring, all fraction bits kept. One round; x is opened."""
    ring = min(ring, x.ring, w.ring)
    out = (*x.shape[:-1], w.shape[-1])
    a, c = yield from draw(correlations.resident_product(x.shape, w, out, x.owner))
    (e,) = yield from reveal(masked(x.data - a, ring, "activation, masked", x.owner))
    y = c + matmul(e, w.mask) + matmul(a, w.opened) + side.first(matmul(e, w.opened))
    return Share(y, x.bits + w.bits, ring=ring)


def product(
    side: Side,
    x: Share,
    y: Share,
    op: Callable[..., torch.Tensor] = torch.mul,
    ring: int = 64,
) -> Program[Share]:
    """op(x, y), bilinear, modulo 2^ring, all fraction bits kept. One round (Beaver, CRYPTO 1991)."""
    ring = min(ring, x.ring, y.ring)
    shapes = (torch.empty(s, dtype=torch.int64, device="meta") for s in (x.shape, y.shape))
    out = tuple(op(*shapes).shape)
    a, b, c = yield from draw(correlations.triple(x.shape, y.shape, out, op, f"triple/{op.__name__}"))
    d, e = yield from reveal(
        masked(x.data - a, ring, "factor, masked"), masked(y.data - b, ring, "factor, masked")
    )
    return Share(c + op(d, b) + op(a, e) + side.first(op(d, e)), x.bits + y.bits, ring=ring)

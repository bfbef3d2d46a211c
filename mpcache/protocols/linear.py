"""Products and truncation: Beaver triples, masked operands, exact truncation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from mpcache.errors import Reuse
from mpcache.protocols.fence import truncation_fence
from mpcache.rank import Rank
from mpcache.runtime import correlations, value_loops
from mpcache.runtime.correlations import mask_parts, mask_ring
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.program import (
    NO_WORK,
    Call,
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    Shape,
    Work,
    draw,
    open_masked,
    products_of,
)
from mpcache.runtime.ring import Matrix, RemoteMatrix, elements_of, matmul, narrow, wide
from mpcache.runtime.shares import Awaited, KnownOperand, MaskedOperand, Share, known_rows
from mpcache.runtime.side import Side, drop_low_bits

ONE_WAY = "share of an activation, masked"


def truncation_room(ring: int) -> int:
    """Return what |x_raw| has to stay below for a truncation in a ring of so many bits to be right."""
    return 1 << (ring - 2)


def masked(x: torch.Tensor, ring: int, why: str, sender: Rank | None = None) -> Opening:
    """Open modulo 2^ring: so many bytes, and no more."""
    return Opening(x, why, sender=sender, ring=ring)


def raised(side: Side, x: torch.Tensor, r: torch.Tensor, ring: int, why: str) -> Opening:
    """Open x + 2^(ring-2) + r modulo 2^ring: what a truncation of |x| < 2^(ring-2) starts from."""
    return masked(side.plus(x + r, truncation_room(ring)), ring, why)


@dataclass(frozen=True)
class Truncated:
    """A `raised` value as it comes out of its opening c, truncated: p + q rb - rc, with public p and q.

    rc and rb are shares of the parts of its mask (`correlations.mask_parts`). rb xor msb(c) tells whether
    2^(ring-1) was passed. Products of such values cost no further opening where the dealer shares the
    products of their parts.
    """

    c: torch.Tensor
    ring: int
    rb: torch.Tensor
    rc: torch.Tensor

    def share(self, side: Side, f: int = 0) -> torch.Tensor:
        """Shares of the value without its f lowest bits, which rc lacks, too."""
        if self.c.is_meta:
            return self.c
        c, rb, rc = elements_of(self.c, self.rb, self.rc)
        out = np.empty(self.c.shape, np.int64)
        value_loops.truncated(c, f, self.ring, rb, rc, side.rank is Rank.SERVER, out.reshape(-1))
        return torch.from_numpy(out)

    def times(self, side: Side, y: Truncated, crossed: Sequence[torch.Tensor]) -> torch.Tensor:
        """Shares of the product; crossed: shares of rb rb', rb rc', rc rb' and rc rc' (`cross`)."""
        if self.c.is_meta:
            return self.c
        words = elements_of(self.c, self.rb, self.rc, y.c, y.rb, y.rc, *crossed)
        out = np.empty(self.c.shape, np.int64)
        value_loops.truncated_product(self.ring, y.ring, *words, side.rank is Rank.SERVER, out.reshape(-1))
        return torch.from_numpy(out)


def cross(
    rb: torch.Tensor, rc: torch.Tensor, rb_: torch.Tensor, rc_: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Multiply two masks' parts, at the dealer: what `Truncated.times` needs."""
    return rb * rb_, rb * rc_, rc * rb_, rc * rc_


def crossed_rings(ring: int, other: int) -> tuple[int, ...]:
    """Return how many bits count of both masks' parts rc, rb, rc', rb' and of `cross`.

    rb comes times 2^(ring-1), rb rb' times both powers: its lowest bit at least is dealt.
    """
    (rc, rb), (rc_, rb_) = mask_ring(0, ring), mask_ring(0, other)
    return rc, rb, rc_, rb_, max(1, rb + rb_ - 64), rb, rb_, 64


def truncate_local(side: Side, x: Share, bits: int) -> Share:
    """Cut to `bits` fraction bits, each party alone, no message: within one unit of x / 2^f, unbiased.

    What is dropped below is lost above: the ring has so many bits less. That is what an opening should
    have sent anyway: a value below 2^14 with 16 fraction bits needs 32 bits, `truncate` brings it back.
    """
    f = x.bits - bits
    return x if f <= 0 else Share(side.plus(drop_low_bits(x.data, f), 1), bits, ring=x.ring - f)


def truncate(side: Side, x: Share, bits: int) -> Program[Share]:
    """Truncate to `bits` fraction bits and the whole ring: floor(x / 2^f) + {0, 1}, never off by a wrap.

    For |x_raw| < 2^(ring-2). One round; with fewer fraction bits than wanted it is a shift and costs
    nothing. Escudero et al., eprint 2020/338; docs/protocols.md, section 5.
    """
    f = x.bits - bits
    if f <= 0 and x.ring == 64:
        return Share(x.data << -f, bits, x.owner)
    ring, f = x.ring, max(f, 0)
    data = x.data << max(0, bits - x.bits)
    fence = truncation_fence(ring)

    def derive(r: torch.Tensor) -> Sequence[torch.Tensor]:
        return *mask_parts(r, f, ring), fence.tables(r)

    parts = (Part(x.shape, ring=bits_of) for bits_of in mask_ring(f, ring))
    request = Request(
        RequestKind.TRUNCATION, (Part(x.shape),), (*parts, fence.part(x.shape)), derive, NO_WORK
    )
    r, rc, rb, tables = yield from draw(request)
    (c,) = yield from open_masked(raised(side, data, r, ring, "masked for truncation"))
    fence.watch(side, tables, c)
    return Share(Truncated(c, ring, rb, rc).share(side, f), bits)


def truncate_times(side: Side, x: Share, y: Share) -> Program[Share]:
    """Multiply x, brought back to the whole ring, by y, which is there already: one round for both.

    |x_raw| < 2^(ring-2). The dealer shares y's mask times the parts of x's.
    """
    factor = Scaled.shape(x, y.shape)
    r, a, *parts, tables = yield from draw(factor)
    c, d = yield from open_masked(
        raised(side, x.data, r, x.ring, "masked for truncation"), masked(y.data - a, 64, "factor, masked")
    )
    truncation_fence(x.ring).watch(side, tables, c)
    return Scaled(side, x, a, c, parts).times(d, y.bits)


def truncate_to_scale(
    side: Side, x: Share, shape: tuple[int, ...]
) -> Program[Callable[[Share], Program[Share]]]:
    """Run `truncate_times` in two steps, for a factor of `shape` that comes later: a round now, one then.

    What is returned serves once, and raises Reuse the second time.
    """
    r, a, *parts, tables = yield from draw(Scaled.shape(x, shape))
    (c,) = yield from open_masked(raised(side, x.data, r, x.ring, "masked for truncation"))
    truncation_fence(x.ring).watch(side, tables, c)
    scaled = Scaled(side, x, a, c, parts)
    used = False

    def times(y: Share) -> Program[Share]:
        nonlocal used
        if used:
            raise Reuse("a factor's mask is used already; `truncate_to_scale` serves one factor")
        used = True
        (d,) = yield from open_masked(masked(y.data - a, 64, "factor, masked"))
        return scaled.times(d, y.bits)

    return times


@dataclass(frozen=True)
class Scaled:
    """x was opened as c, to be truncated and multiplied by a factor with the mask a."""

    side: Side
    x: Share
    a: torch.Tensor
    c: torch.Tensor
    parts: Sequence[torch.Tensor]

    @staticmethod
    def shape(x: Share, factor: tuple[int, ...]) -> Request:
        fence = truncation_fence(x.ring)

        def derive(r: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
            rc, rb = mask_parts(r, 0, x.ring)
            return rc, rb, a * rc, a * rb, fence.tables(r)

        rings = mask_ring(0, x.ring) * 2
        return Request(
            RequestKind.TRUNCATION_PRODUCT,
            (Part(x.shape), Part(factor)),
            (*(Part(x.shape, ring=ring) for ring in rings), fence.part(x.shape)),
            derive,
            products_of(math.prod(x.shape)),
        )

    def times(self, d: torch.Tensor, bits: int) -> Share:
        """By the factor opened as d, with so many fraction bits."""
        bits, shape = self.x.bits + bits, self.c.shape
        if d.is_meta:
            return Share(self.c, bits)
        c, rc, rb, arc, arb = elements_of(self.c, *self.parts)
        factor, mask = elements_of(d.expand(shape), self.a.expand(shape))
        out, first = np.empty(shape, np.int64), self.side.rank is Rank.SERVER
        value_loops.truncated_times(c, self.x.ring, rb, rc, arb, arc, factor, mask, first, out.reshape(-1))
        return Share(torch.from_numpy(out), bits)


def truncate_product(side: Side, x: Share, y: Share, wide: int = 0) -> Program[Share]:
    """Multiply x by y, both brought back to the whole ring by the same round; |raw| < 2^(ring-2).

    wide: bits of the ring that y's shares are right in before, where these are more than its ring's: the
    guard then sees a y of any size that this ring holds.
    """
    fences = truncation_fence(x.ring), truncation_fence(y.ring)

    def derive(r: torch.Tensor, r_: torch.Tensor) -> Sequence[torch.Tensor]:
        (rc, rb), (rc_, rb_) = mask_parts(r, 0, x.ring), mask_parts(r_, 0, y.ring)
        return fences[0].tables(r), fences[1].tables(r_), rc, rb, rc_, rb_, *cross(rb, rc, rb_, rc_)

    each = Part(x.shape)
    parts = (Part(x.shape, ring=ring) for ring in crossed_rings(x.ring, y.ring))
    derived = (*(fence.part(x.shape) for fence in fences), *parts)
    request = Request(
        RequestKind.TRUNCATIONS_PRODUCT, (each,) * 2, derived, derive, products_of(math.prod(x.shape))
    )
    r, r_, table, table_, rc, rb, rc_, rb_, *crossed = yield from draw(request)
    c, c_ = yield from open_masked(
        raised(side, x.data, r, x.ring, "masked for truncation"),
        raised(side, y.data, r_, y.ring, "masked for truncation"),
    )
    fences[0].watch(side, table, c)
    fences[1].watch(side, table_, c_)
    one, two = Truncated(c, x.ring, rb, rc), Truncated(c_, y.ring, rb_, rc_)
    if wide > y.ring:
        side.watch(two.share(side) - y.data, wide)
    return Share(one.times(side, two, crossed), x.bits + y.bits)


def blur(side: Side, x: Share, by: Rank, bits: int) -> Program[torch.Tensor]:
    """Draw a share of noise for each element of x, known to one party alone, who adds it. No message.

    The noise is about normal, with a standard deviation of 2^-bits, and at most 6 times as large.
    A sum of 12 uniform numbers. On values that are multiples of a secret step s it leaves sinc(2^-bits /
    s)^12 of the wave that would tell s: 8e-9 at most where s <= 2^-bits, 4e-3 at twice that.
    """
    wide = x.bits - bits  # bits of a uniform number, in units of x
    (words,) = yield from draw(
        Request(RequestKind.BLUR, (Part((*x.shape, 12), torch.int16, owner=by),), (), lambda r: (), NO_WORK)
    )
    if side.rank is not by or words.is_meta:
        return torch.zeros_like(x.data)
    noise: torch.Tensor = (words.long() & ((1 << wide) - 1)).sum(-1)
    return noise - 6 * ((1 << wide) - 1)


def mask_operand(x: Share, ring: int = 64) -> Program[MaskedOperand]:
    """Open x - B once, with a mask B that stays. One round; one way if x has an owner."""
    started = yield from start_mask_operand(x, ring)
    return (yield from finish_mask_operand(x, started, started))


def start_mask_operand(x: Share, ring: int = 64) -> Program[MaskedOperand]:
    """Draw the mask, for what draws with it: the first half of `mask_operand`. No message."""
    mask, values = yield from draw(correlations.random_mask(x.shape, x.owner))
    dealt = None if values is None else values[0]
    return MaskedOperand(mask, Awaited(), x.bits, dealt, ring, known_rows(x))


def finish_mask_operand(x: Share, started: MaskedOperand, joined: MaskedOperand) -> Program[MaskedOperand]:
    """Open: the second half, one round. joined: what was made of `started` meanwhile; it comes out opened.

    Raises Reuse the second time: two values under one mask would tell their difference.
    """
    if not started.mask.is_meta:
        started.opened.begin()
    why = "operand, masked"
    (opened,) = yield from open_masked(masked(x.data - started.mask, started.ring, why, x.owner))
    started.opened.bring(opened)
    return replace(joined, opened=joined.public)


def mask_matrix(side: Side, x: Share, ring: int = 64) -> Program[KnownOperand]:
    """Open x - B once for a matrix x (k, n) of its owner's, who keeps x in place of B. One round, one way.

    Raises ValueError for a matrix that nobody knows.
    """
    if x.owner is None:
        raise ValueError("a matrix that nobody knows is masked by `mask_operand`")
    mask, values = yield from draw(correlations.random_mask(x.shape, x.owner))
    whole = wide(x.data)
    (opened,) = yield from open_masked(masked(whole - mask, ring, "operand, masked", x.owner))
    held = narrow(whole) if side.rank is x.owner else narrow(opened, ring)
    return KnownOperand(held, x.owner, x.bits, ring, None if values is None else narrow(values[0], ring))


def matmul_masked_operand(
    side: Side, x: Share, w: MaskedOperand | KnownOperand, ring: int = 64
) -> Program[Share]:
    """Multiply (*b, m, k) by an operand (*b, k, n) modulo 2^ring, all fraction bits kept. One round.

    For an operand of one party's own: (m, k) by (k, n). What one party knows of the operand makes its part of
    the opening one message of the other's.
    """
    ring = min(ring, x.ring, w.ring)
    if isinstance(w, KnownOperand):
        return (yield from _known_product(side, x, w, ring))
    if w.known:
        return (yield from _partly_known_product(side, x, w, ring))
    a, c, _ = yield from masks_of_product(side, x.shape, w, x.owner, ring=ring)
    (e,) = yield from open_masked(masked(x.data - a, ring, "activation, masked", x.owner))
    return Share((yield from share_of_product(side, e, a, c, w)), x.bits + w.bits, ring=ring)


def masks_of_product(
    side: Side,
    x: Shape,
    w: MaskedOperand | KnownOperand,
    owner: Rank | None = None,
    keep: bool = False,
    ring: int = 64,
) -> Program[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Draw shares of the mask a of x, and of the c that `share_of_product` needs, and a at the dealer.

    ring: what the product is right in.  owner: who knows x.  keep: whether the dealer's program needs a.
    """
    out = (*x[:-1], w.shape[-1])
    if isinstance(w, MaskedOperand):
        request = correlations.masked_operand_product(x, w, out, owner, keep, ring)
        a, c, *kept = yield from draw(request)
        return a, c, kept[0][0] if keep and kept[0] is not None else None
    random = Part(x, owner=w.owner), Part(x, owner=w.owner.peer)
    request = _product_request(w, random, ring, keep)
    mine, theirs, c, *kept = yield from draw(request)
    a = mine if side.rank is w.owner else theirs
    return a, c, kept[0][0] + kept[0][1] if keep and kept[0] is not None else None


def _product_request(w: KnownOperand, random: tuple[Part, ...], ring: int, keep: bool = False) -> Request:
    *rows, k = random[-1].shape
    n = math.prod(rows) * k * w.shape[-1]
    derived = (Part((*rows, w.shape[-1]), ring=ring),)
    return Request(
        RequestKind.MASKED_OPERAND, random, derived, lambda *a: (matmul(a[-1], _dealt(w)),),
        Work(multiplications=n, multiply_adds=n), keep, w,
    )  # fmt: skip


def _known_product(side: Side, x: Share, w: KnownOperand, ring: int) -> Program[Share]:
    """Multiply by a matrix of one party's own: the other sends e = its share of x less a, one way.

    c = a @ B.  The owner has (its share + e) @ W, the other a @ V.
    """
    other = w.owner.peer
    a, c = yield from draw(_product_request(w, (Part(x.shape, owner=other),), ring))
    (e,) = yield from open_masked(masked(x.data - a, ring, ONE_WAY, other))
    mine = x.data if side.rank is w.owner else a
    return Share((yield from share_of_product(side, e, mine, c, w)), x.bits + w.bits, ring=ring)


def _partly_known_product(side: Side, x: Share, w: MaskedOperand, ring: int) -> Program[Share]:
    """Multiply by an operand whose first rows the server knows: their columns of x go one way."""
    k, out = w.known, (*x.shape[:-1], w.shape[-1])
    own, rest = x[..., :k], x[..., k:]

    def derive(a: torch.Tensor, b: torch.Tensor) -> Sequence[torch.Tensor]:
        masks = correlations.dealt(w.dealt)
        return (matmul(a, masks[..., :k, :]) + matmul(b, masks[..., k:, :]),)

    n = math.prod(out)
    work = Work(multiplications=n * k, multiply_adds=n * k) + products_of(n * rest.shape[-1])
    random = Part(own.shape, owner=Rank.CLIENT), Part(rest.shape)
    request = Request(RequestKind.MASKED_OPERAND, random, (Part(out, ring=ring),), derive, work)
    a, b, c = yield from draw(request)
    e, f = yield from open_masked(
        masked(own.data - a, ring, ONE_WAY, Rank.CLIENT), masked(rest.data - b, ring, "activation, masked")
    )
    masks, opened = (t[..., :k, :] for t in (w.mask, w.public))
    server = side.rank is Rank.SERVER
    c = c + (matmul(own.data + e, masks + opened) if server else matmul(a, opened))
    masks, opened = (t[..., k:, :] for t in (w.mask, w.public))
    grown = matmul(f, masks) + matmul(side.plus(b, f), opened)
    return Share(c + grown, x.bits + w.bits, ring=ring)


def _dealt(w: KnownOperand) -> Matrix | RemoteMatrix:
    if w.dealt is None:
        raise RuntimeError("only the dealer derives correlations")
    return w.dealt


def share_of_product(
    side: Side, e: torch.Tensor, a: torch.Tensor, c: torch.Tensor, w: MaskedOperand | KnownOperand
) -> Program[torch.Tensor]:
    """Compute shares of x @ w, with e = x - a opened and shares of the mask a; c: of `masks_of_product`.

    Where w has an owner, c = (the other's share of a) @ B: so the owner multiplies (x - that share) by W,
    the other that share by V.
    """
    if isinstance(w, KnownOperand):
        if side.rank is w.owner:
            return c + matmul(e + a, w.held)
        product = yield Call(lambda party, step: party.ahead and party.ahead.times(a, w))
        return c + (matmul(a, w.held) if product is None else product)
    return c + matmul(e, w.mask) + matmul(side.plus(a, e), w.public)


def product(
    side: Side,
    x: Share,
    y: Share,
    op: Callable[..., torch.Tensor] = torch.mul,
    ring: int = 64,
) -> Program[Share]:
    """Compute op(x, y), bilinear, modulo 2^ring, all fraction bits kept. One round (Beaver, CRYPTO 1991)."""
    ring = min(ring, x.ring, y.ring)
    out = tuple(op(MetaTensor(x.shape), MetaTensor(y.shape)).shape)
    a, b, c = yield from draw(correlations.triple(x.shape, y.shape, out, op, ring))
    d, e = yield from open_masked(
        masked(x.data - a, ring, "factor, masked"), masked(y.data - b, ring, "factor, masked")
    )
    return Share(c + op(d, b) + op(side.plus(a, d), e), x.bits + y.bits, ring=ring)

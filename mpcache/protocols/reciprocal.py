"""Reciprocals and reciprocal square roots over a wide range, in two rounds (docs/protocols.md, section 9.2).

Round 1: a positive x is opened once, masked. One key tree tells which of the thresholds
2^low, 2^(low + step), ... it passes; a second one, with the mask as its payload, gives x times the same
answers. So the exponent arrives as a one-hot vector and u = x * 2^-j as a share, without another message.
Round 2: u is opened masked; a line for each interval of u, chosen by a rotated one-hot vector, is the
function there. What the dealer shares of the vector - itself, times the parts of u's mask, and all
that times the mask of the exponent's own factor - makes line, slope and factor one round.

The factors are powers of two (steps of two for the square root), so they are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from mpcache.protocols import dcf
from mpcache.protocols.compare import key_parts
from mpcache.protocols.dcf import KeyShape
from mpcache.protocols.fence import Fence
from mpcache.protocols.linear import masked, raised
from mpcache.rank import Rank
from mpcache.runtime import deal_loops, value_loops
from mpcache.runtime.correlations import mask_ring
from mpcache.runtime.program import Part, Program, Request, RequestKind, Work, draw, open_masked, tree_cipher
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side, drop_low_bits

MARGIN = 16  # bits of x below its lowest exponent that are kept


@dataclass(frozen=True)
class Curve:
    """fn on [1, 2^step), by lines over 2^cells intervals to the unit; fn(x 2^step) = fn(x) / 2.

    grid: fraction bits of u.  slope: of the lines' slopes.
    """

    fn: Callable[[torch.Tensor], torch.Tensor]
    step: int
    cells: int
    grid: int
    slope: int

    @property
    def bits(self) -> int:
        return self.grid + self.slope

    @property
    def size(self) -> int:
        """Intervals, and room for one below zero and one above the last: a power of two."""
        return 1 << (self.cells + self.step)

    @cache  # noqa: B019 - a few curves, which are constants
    def lines(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Value at v = 0 and slope (size,), integers, with v = u - 1 on the grid.

        An interval's number may come out one too high (`drop_low_bits`, and the carry of two masked
        numbers): each line is the best for its interval and the one before.
        """
        number = torch.arange(self.size, dtype=torch.float64)
        number = torch.where(number < self.size - 1, number, -1.0)
        unit = 2.0**-self.cells
        start, mid, end = (self.fn((1 + (number + i) * unit).clamp(min=0.5)) for i in (-1, 0, 1))
        slope = torch.round((end - start) / (2 * unit) * 2**self.slope)
        value = torch.round(((start + end) / 4 + mid / 2) * 2**self.bits)
        width = 1 << (self.grid - self.cells)
        return (value - slope * number * width).to(torch.int64), slope.to(torch.int64)


@dataclass(frozen=True)
class ExponentRange:
    """Raw x in [2^low, 2^high), high - low a multiple of the curve's step."""

    low: int
    high: int

    @staticmethod
    def of(low: float, high: float, step: int) -> ExponentRange:
        """Cover [low, high), exponents; the whole range stays below 2^62."""
        first = math.floor(low) // step * step
        return ExponentRange(
            first, min(62 // step * step, first + -(-(math.ceil(high) - first) // step) * step)
        )

    def steps(self, step: int) -> int:
        """Exponents to tell apart."""
        return (self.high - self.low) // step


def power(side: Side, x: torch.Tensor, where: ExponentRange, curve: Curve) -> Program[torch.Tensor]:
    """Compute fn(x 2^-low) at `curve.bits` + steps - 1 fraction bits, x (*s) shares of integers. Two rounds.

    Relative error: that of the lines, and of u on its grid: see `RECIPROCAL`, `norm.root`.
    """
    u, ring, factor = yield from _exponent(side, x, where, curve)
    return (yield from _line(side, u, ring, factor, curve))


def _exponent(
    side: Side, x: torch.Tensor, where: ExponentRange, curve: Curve
) -> Program[tuple[torch.Tensor, int, torch.Tensor]]:
    """-> v = u - 1 on the curve's grid, within 2, modulo 2^ring; ring; and the factor, a power of two."""
    n, step, k = math.prod(x.shape), curve.step, where.steps(curve.step)
    shift = max(0, where.low - MARGIN)
    low, high, ring = where.low - shift, where.high - shift, 64 - shift
    x = drop_low_bits(x.reshape(n), shift)
    keys = KeyShape(2 * n, high + 1)  # first half: [x < theta], second half: x [x < theta]
    mask = (1 << keys.depth) - 1
    far = min(ring, high + 4)  # the trees see a ring of high + 2 bits, the fence one of so many
    fence = Fence(far, far - high + 2, 0, 4)
    seeds, words, bit_parts = key_parts(keys)
    cipher = yield from tree_cipher()

    def derive(r: torch.Tensor, s: tuple[torch.Tensor, torch.Tensor]) -> Sequence[torch.Tensor]:
        made = [np.empty(2 * n, np.int64) for _ in range(3)]
        deal_loops.carried_masks(r.numpy(), keys.depth, *made)
        alpha, beta, tops = map(torch.from_numpy, made)
        return fence.tables(r), tops, *dcf.dcf_keygen(keys, cipher, s, alpha, beta)

    derived = (fence.part((n,)), Part((2 * n,)), words, bit_parts)
    request = Request(RequestKind.COMPARE, (Part((n,)), seeds), derived, derive, keys.work())
    r, own, tables, tops, cw, cb = yield from draw(request)
    (c,) = yield from open_masked(masked(x + r, ring, "masked for comparison"))
    fence.watch(side, tables, c)
    # The first threshold lies below the range, by less than an interval of the curve: it may be one too high.
    thresholds = [(1 << low) - (1 << low >> 8), *(1 << (low + step * i) for i in range(1, k + 1))]
    points = c.unsqueeze(-1) - side.public(thresholds)
    _, t = dcf.dcf_eval(keys, cipher, side.number, own, cw, cb, (points & mask).repeat(2, 1))
    if c.is_meta:
        return c, ring - (high - step - curve.grid), c
    ends, both = (np.empty(2 * n, np.int64) for _ in range(2))
    value_loops.exponents(
        side.rank is Rank.SERVER, step, keys.depth,
        *(each.contiguous().numpy() for each in (c, x, r, points, tops, t)), ends, both,
    )  # fmt: skip
    first, last = torch.from_numpy(ends).chunk(2)
    side.watch(first)
    side.watch(side.plus(last, -1))
    high_u, factor = torch.from_numpy(both).chunk(2)
    excess = high - step - curve.grid
    return side.plus(drop_low_bits(high_u, excess), -(1 << curve.grid)), ring - excess, factor


def _line(
    side: Side, v: torch.Tensor, ring: int, factor: torch.Tensor, curve: Curve
) -> Program[torch.Tensor]:
    (n,), size = v.shape, curve.size
    ring = min(ring, curve.grid + curve.step + 2)
    fine = curve.grid - curve.cells

    def derive(r: torch.Tensor, b: torch.Tensor) -> Sequence[torch.Tensor]:
        out = np.zeros((6, n, size), np.int64)  # a vector, times rb and rc, and all that times b
        deal_loops.line_parts(r.numpy(), b.numpy(), fine, ring, out)
        return torch.from_numpy(out).unbind()

    # Three inner products with values and slopes, with and without the factor.
    work = Work(lookups=n, multiply_adds=8 * n * size)
    # rb comes times 2^(ring-1), alone and within the products.
    rc_ring, rb_ring = mask_ring(0, ring)
    parts_of = tuple(Part((n, size), ring=bits) for bits in (64, rb_ring, rc_ring)) * 2
    request = Request(RequestKind.LINE, (Part((n,)), Part((n,))), parts_of, derive, work)
    r, b, *parts = yield from draw(request)
    c, d = yield from open_masked(
        raised(side, v, r, ring, "index, rotated"), masked(factor - b, 64, "factor, masked")
    )
    if c.is_meta:
        return c
    # The offset of `raised` is a multiple of the table's size: number = (c - r) >> fine, or one more.
    # The dealer's vectors stay as they are: the lines are turned.
    out = np.empty(n, np.int64)
    known = (x.numpy() for x in (*curve.lines(), d, *parts))
    value_loops.line_values(c.numpy(), fine, ring, *known, out)
    return torch.from_numpy(out)


RECIPROCAL = Curve(lambda u: 1 / u, 1, 7, 14, 9)


def reciprocal_range(least: float, most: float, bits: int) -> tuple[ExponentRange, int]:
    """Return the range of raw x with `bits` fraction bits, and the fraction bits of 1 / x.

    They are 23 for the largest x, and one more for each factor of two below.
    """
    where = ExponentRange.of(math.log2(least) + bits, math.log2(most) + bits, 1)
    return where, RECIPROCAL.bits + where.steps(1) - 1 + where.low - bits


def reciprocal(side: Side, x: Share, least: float, most: float) -> Program[Share]:
    """1 / x for least <= x < most, (*s). Two rounds. Relative error 2e-4.

    Raises ValueError for a ring that does not hold x.
    """
    where, bits = reciprocal_range(least, most, x.bits)
    if x.ring < where.high + 4:
        raise ValueError(f"reciprocals below 2^{where.high} in a ring of {x.ring} bits")
    y = yield from power(side, x.data.reshape(-1), where, RECIPROCAL)
    return Share(y.reshape(x.shape), bits)

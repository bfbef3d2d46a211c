"""Activations x * step(x), where the step is a sum of sines: one opening truncates and activates.

The step (sigmoid, or the normal distribution's) is 1/2 + x / (2 half) + sum_k b_k sin(pi k x / half)
on |x| < half. The linear part makes both ends of the period meet, so that the coefficients fall
exponentially (PROTOCOLS 6). sin(k (c - r)) is public angles of the opened c = x + r times the
dealer's shares of sin(k r) and cos(k r); and because the truncated x is linear in the mask's parts,
the dealer's shares of their products with sin(k r) and cos(k r) give x * step(x) at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

from mpcache.secure.correlations import Part, Request, cut
from mpcache.secure.linear import affine, masked, raised
from mpcache.secure.program import Program, draw, reveal
from mpcache.secure.shares import Share, encode
from mpcache.secure.side import Side


@dataclass(frozen=True)
class Series:
    """half: a power of two.  b: the coefficients b_1, b_2, ..."""

    half: int
    b: tuple[float, ...]

    @staticmethod
    def of(step: Callable[[torch.Tensor], torch.Tensor], half: int, terms: int) -> Series:
        """The first `terms` coefficients for a step with step(x) + step(-x) = 1."""
        n = 1 << 14
        x = (torch.arange(n, dtype=torch.float64) / n - 0.5) * 2 * half
        odd = step(x) - 0.5 - x / (2 * half)
        k = torch.arange(1, terms + 1, dtype=torch.float64)
        b = 2 / n * (torch.sin(math.pi / half * x * k.unsqueeze(-1)) * odd).sum(-1)
        return Series(half, tuple(b.tolist()))


@cache
def series(kind: str) -> Series:
    """The step of an activation: |x| < 32 for silu, 16 for gelu. Largest error of the series: 6e-6."""
    match kind:
        case "silu":
            return Series.of(torch.sigmoid, 32, 40)
        case "gelu":
            return Series.of(lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)), 16, 36)
        case "gelu_tanh":
            return Series.of(lambda x: torch.sigmoid(1.5957691216 * (x + 0.044715 * x**3)), 16, 36)
    raise ValueError(f"unknown activation {kind}")


_SHARED_BITS, _PUBLIC_BITS = 13, 17  # fraction bits of the dealer's sines and of the public factors


def _waves(raw: torch.Tensor, bits: int, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """sin and cos of k times an angle (*s), a full turn at 2^bits: (*s, terms)."""
    turn = (raw & ((1 << bits) - 1)).double() * (2 * math.pi / 2**bits)
    angle = turn.unsqueeze(-1) * torch.arange(1, terms + 1)
    return torch.sin(angle), torch.cos(angle)


def activate(side: Side, x: Share, kind: str, bits: int) -> Program[Share]:
    """x * step(x) of x with more than `bits` fraction bits, at `bits` + 30 of them. One round.

    |x| < half (`series`), and below 2^(ring-2) raw. Absolute error below 1e-4 |x| + 2^-bits.
    """
    wave = series(kind)
    terms, ring, f = len(wave.b), x.ring, x.bits - bits
    period = x.bits + wave.half.bit_length()  # raw bits of a full turn: 2 half
    shape = (*x.shape, terms)

    def derive(r: torch.Tensor) -> Sequence[torch.Tensor]:
        rc, rb = cut(r, f, ring)
        sin, cos = (encode(w, _SHARED_BITS) for w in _waves(r, period, terms))
        rc_, rb_ = rc.unsqueeze(-1), rb.unsqueeze(-1)
        return rc, rb, rc * rc, rc * rb, sin, cos, rc_ * sin, rc_ * cos, rb_ * sin, rb_ * cos

    parts = (Part(x.shape),) * 4 + (Part(shape),) * 6
    request = Request("activation", (Part(x.shape),), parts, derive)
    r, rc, rb, rcrc, rcrb, *waves = yield from draw(request)
    (c,) = yield from reveal(raised(side, x.data, r, ring, "masked for activation"))
    out = bits + _SHARED_BITS + _PUBLIC_BITS
    if c.is_meta:
        return Share(torch.empty_like(x.data), out)
    p, q = affine(c, f, ring)
    y = side.first(p) + q * rb - rc
    square = side.first(p * p) + (q * q + 2 * p * q) * rb + rcrc - 2 * p * rc - 2 * q * rcrb
    sin_r, cos_r, rc_sin, rc_cos, rb_sin, rb_cos = waves
    y_sin = p.unsqueeze(-1) * sin_r + q.unsqueeze(-1) * rb_sin - rc_sin
    y_cos = p.unsqueeze(-1) * cos_r + q.unsqueeze(-1) * rb_cos - rc_cos
    b = torch.tensor(wave.b, dtype=torch.float64)
    sin_c, cos_c = (encode(b * w, _PUBLIC_BITS) for w in _waves(c - (1 << (ring - 2)), period, terms))
    total = (sin_c * y_cos - cos_c * y_sin).sum(-1)
    half, slope = out - bits - 1, out - 2 * bits - wave.half.bit_length()
    return Share(total + (y << half) + (square << slope), out)


def truncate_to_multiply(
    side: Side, x: Share, bits: int
) -> Program[tuple[Share, Callable[[Share], Program[Share]]]]:
    """x at `bits` fraction bits, and how to multiply it later by opening the other factor alone.

    One round now, one for the product: the dealer shares the second factor's mask times the parts of
    the truncation's (PROTOCOLS 2, fused).
    """
    ring, f = x.ring, x.bits - bits

    def derive(r: torch.Tensor, a: torch.Tensor) -> Sequence[torch.Tensor]:
        rc, rb = cut(r, f, ring)
        return rc, rb, a * rc, a * rb

    request = Request("truncation/product", (Part(x.shape),) * 2, (Part(x.shape),) * 4, derive)
    r, a, rc, rb, arc, arb = yield from draw(request)
    (c,) = yield from reveal(raised(side, x.data, r, ring, "masked for truncation"))
    p, q = affine(c, f, ring)
    y = side.first(p) + q * rb - rc
    ay = p * a + q * arb - arc

    def times(z: Share) -> Program[Share]:
        (d,) = yield from reveal(masked(z.data - a, 64, "factor, masked"))
        return Share(d * y + ay, bits + z.bits)

    return Share(y, bits), times

"""Activations x * step(x), where the step is a sum of sines: two rounds, for act(gate) * up too.

The step (sigmoid, or the normal distribution's) is 1/2 + x / (2 half) + sum_k b_k sin(pi k x / half)
on |x| < half, and somewhat beyond (`Series`). The linear part makes both ends of the period meet, so that
the coefficients fall exponentially (docs/protocols.md, section 9.4). sin(k (c - r)) is public angles of the
opened c = x + r times the dealer's shares of sin(k r) and cos(k r). The same opening truncates x, and with
that of `up` it gives x * up (`linear.Truncated`); the second round multiplies by the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt
import torch

from mpcache.protocols.fence import Fence, truncation_fence
from mpcache.protocols.linear import (
    Truncated,
    cross,
    crossed_rings,
    raised,
    truncate_local,
    truncate_product,
    truncate_times,
)
from mpcache.protocols.ranges import GATE_RING, STEP_BITS
from mpcache.runtime import loops
from mpcache.runtime.correlations import mask_parts, mask_ring
from mpcache.runtime.program import (
    NO_WORK,
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
from mpcache.runtime.shares import Share
from mpcache.runtime.side import Side

_OUT_BITS = 29  # fraction bits of a step as a sum of products, in a ring of 32
_LARGE, _SMALLER = 2.0**-8.7, 8  # coefficients below it come in a ring of so many bits less
_MOST_BITS = 14  # fraction bits of the dealer's sines, at most


@dataclass(frozen=True)
class Series:
    """half: of the period, a power of two.  b: the coefficients b_1, b_2, ...

    A real model's gates go beyond half a period (SmolLM2's reach 34). There the next period begins, whose
    sigmoid is still flat: 6e-6 at 13/8 of half, where the fence stops for sure; `reach` surely passes it.

    A term is a share with s fraction bits times a public factor with p, rounded: their errors are b 2^-s and
    2^-p. Terms of small coefficients need fewer bits of both, and so a smaller ring.
    """

    half: int
    b: tuple[float, ...]

    @property
    def reach(self) -> int:
        """What inputs stay below in size."""
        return 11 * self.half // 8

    @cached_property
    def large(self) -> int:
        """How many terms, the first, have large coefficients."""
        return next((k for k, b in enumerate(self.b) if abs(b) < _LARGE), len(self.b))

    @cached_property
    def shared_bits(self) -> list[int]:
        """Fraction bits of the dealer's sines and cosines, term by term: as many as balance both errors."""
        totals = (_OUT_BITS if k < self.large else _OUT_BITS - _SMALLER for k in range(len(self.b)))
        return [
            min(_MOST_BITS, max(1, round((total + math.log2(abs(b))) / 2)))
            for total, b in zip(totals, self.b, strict=True)
        ]

    @cached_property
    def units(self) -> npt.NDArray[np.float64]:
        """Coefficients with the public factors' fraction bits."""
        rest = [
            _OUT_BITS - bits - (0 if k < self.large else _SMALLER) for k, bits in enumerate(self.shared_bits)
        ]
        return np.array([b * 2.0**bits for b, bits in zip(self.b, rest, strict=True)])

    @staticmethod
    def of(step: Callable[[torch.Tensor], torch.Tensor], half: int, terms: int) -> Series:
        """Compute the first `terms` coefficients for a step with step(x) + step(-x) = 1."""
        n = 1 << 14
        x = (torch.arange(n, dtype=torch.float64) / n - 0.5) * 2 * half
        odd = step(x) - 0.5 - x / (2 * half)
        k = torch.arange(1, terms + 1, dtype=torch.float64)
        b = 2 / n * (torch.sin(math.pi / half * x * k.unsqueeze(-1)) * odd).sum(-1)
        return Series(half, tuple(b.tolist()))


@cache
def series(kind: str) -> Series:
    """Return the step of an activation: |x| < 44 for silu, 22 for gelu. Largest error of the series: 6e-6."""
    match kind:
        case "silu":
            return Series.of(torch.sigmoid, 32, 40)
        case "gelu":
            return Series.of(lambda x: 0.5 * (1 + torch.erf(x / 2**0.5)), 16, 36)
        case "gelu_tanh":
            return Series.of(lambda x: torch.sigmoid(1.5957691216 * (x + 0.044715 * x**3)), 16, 36)
    raise ValueError(f"unknown activation {kind}")


def _waves(raw: torch.Tensor, bits: int, wave: Series) -> list[torch.Tensor]:
    """Sines, then cosines of k times an angle (*s), a full turn at 2^bits: large terms, then the others."""
    less = np.array([_MOST_BITS - bits for bits in wave.shared_bits])
    terms = (wave.large, len(wave.b) - wave.large) * 2
    pieces = [np.empty((raw.numel(), count), np.int32) for count in terms]
    loops.waves(raw.reshape(-1).contiguous().numpy(), bits, 2.0**_MOST_BITS, less, *pieces)
    return [torch.from_numpy(piece).reshape(*raw.shape, -1) for piece in pieces]


def _wave_parts(shape: Shape, wave: Series) -> list[Part]:
    """Describe what `_waves` returns."""
    small = Part((*shape, len(wave.b) - wave.large), torch.int32, ring=32 - _SMALLER)
    return [Part((*shape, wave.large), torch.int32), small] * 2


def _summed(raw: torch.Tensor, bits: int, wave: Series, shares: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum b_k sin(k (raw - r)) over k, a full turn at 2^bits, from shares of `_waves` of r.

    Both parties multiply by the same integers, whatever their CPUs: sums and products of doubles make them.
    """
    out = np.empty(raw.numel(), np.int64)
    both = (torch.cat([shares[i], shares[i + 1] << _SMALLER], -1) for i in (0, 2))
    waves = (x.reshape(raw.numel(), len(wave.b)).contiguous().numpy() for x in both)
    loops.waves_less(raw.reshape(-1).contiguous().numpy(), bits, wave.units, *waves, out)
    return torch.from_numpy(out).reshape(raw.shape)


def series_fence(wave: Series, x: Share) -> Fence:
    """Return the fence of what a series takes: |x| < 11/8 half passes, none from 13/8 half to 2^10 less that.

    The step is right up to there, for both ends of its period are flat.
    """
    unit = x.bits + wave.half.bit_length() - 3  # a quarter of half
    ring = min(x.ring, x.bits + 10)
    return Fence(ring, ring - unit, 0, 11)


def activate(side: Side, kind: str, x: Share, up: Share | None) -> Program[Share]:
    """Return x * step(x), or that times up, at `STEP_BITS` more fraction bits. Two rounds.

    |x| < `Series.reach`, |x * up| < 2^14, and raw values below 2^(ring-2). Error below
    1.5e-4 |x| (|x up|), six standard deviations, and two units of x's fraction bits.
    """
    step, value = yield from _step(side, kind, x, up)
    if up is None:
        return (yield from truncate_times(side, step, value))
    value = truncate_local(side, value, x.bits)
    narrow = Share(value.data, x.bits, ring=GATE_RING)
    return (yield from truncate_product(side, step, narrow, value.ring))


def _step(side: Side, kind: str, x: Share, up: Share | None) -> Program[tuple[Share, Share]]:
    """step(x) in a small ring, and x, or x * up, in the whole ring. One round."""
    wave = series(kind)
    ring = x.ring
    period = x.bits + wave.half.bit_length()  # raw bits of a full turn: 2 half
    values = [x] if up is None else [x, up]
    fences = [series_fence(wave, x), *(truncation_fence(v.ring) for v in values[1:])]

    def derive(*masks: torch.Tensor) -> Sequence[torch.Tensor]:
        pieces = [mask_parts(r, 0, v.ring)[::-1] for r, v in zip(masks, values, strict=True)]
        waves = _waves(masks[0], period, wave)
        crossed = cross(*pieces[0], *pieces[1]) if up is not None else ()
        tables = (fence.tables(r) for fence, r in zip(fences, masks, strict=True))
        return *tables, *waves, *(part for piece in pieces for part in piece), *crossed

    each, n = Part(x.shape), math.prod(x.shape)
    tables = tuple(fence.part(x.shape) for fence in fences)
    waves = _wave_parts(x.shape, wave)
    if up is None:
        rings: tuple[int, ...] = mask_ring(0, ring)[::-1]
    else:
        of_rc, of_rb, of_rc_, of_rb_, *of_products = crossed_rings(ring, up.ring)
        rings = (of_rb, of_rc, of_rb_, of_rc_, *of_products)
    parts = (*tables, *waves, *(Part(x.shape, ring=bits) for bits in rings))
    work = Work(lookups=n, multiply_adds=2 * n * len(wave.b)) + (
        products_of(n) if up is not None else NO_WORK
    )
    drawn = yield from draw(Request(RequestKind.ACTIVATION, (each,) * len(values), parts, derive, work))
    count = len(values)
    masks, drawn_tables, rest = drawn[:count], drawn[count : 2 * count], drawn[2 * count :]
    shares, (rb, rc, *others) = rest[: len(waves)], rest[len(waves) :]
    c, *c_up = yield from open_masked(
        *(
            raised(side, v.data, r, v.ring, "masked for activation")
            for v, r in zip(values, masks, strict=True)
        )
    )
    fences[0].watch(side, drawn_tables[0], c - (1 << (ring - 2)) + (wave.reach << x.bits))
    for fence, table, opened in zip(fences[1:], drawn_tables[1:], c_up, strict=True):
        fence.watch(side, table, opened)
    mine = Truncated(c, ring, rb, rc)
    value = Share(mine.share(side), x.bits)
    out = _OUT_BITS
    if c.is_meta:
        step = torch.empty_like(x.data)
    else:
        total = _summed(c - (1 << (ring - 2)), period, wave, shares)
        slope = out - x.bits - wave.half.bit_length()
        step = side.plus(total + (value.data << slope), 1 << (out - 1))
    if up is not None:
        theirs = Truncated(c_up[0], up.ring, *others[:2])
        value = Share(mine.times(side, theirs, others[2:]), x.bits + up.bits)
    return truncate_local(side, Share(step, out, ring=32), STEP_BITS), value

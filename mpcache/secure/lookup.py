"""Table lookup by a rotated one-hot vector (PROTOCOLS 6), and functions as sums of sines.

The index is opened modulo the table's size N with a uniform rotation, never as a difference of
integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mpcache.secure.compare import bytes_for
from mpcache.secure.correlations import Part, Request
from mpcache.secure.program import Opening, Program, draw, reveal
from mpcache.secure.shares import Share, encode
from mpcache.secure.side import Side, drop


def one_hot(rotation: torch.Tensor, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """At the dealer: (*s) uniform words -> (*s, size), 1 at rotation mod size (a power of two)."""
    hot = torch.zeros(*rotation.shape, size, dtype=dtype)
    return hot.scatter_(-1, (rotation & (size - 1)).unsqueeze(-1), 1)


def rotated(side: Side, index: torch.Tensor, size: int, dtype: torch.dtype = torch.int64) -> Program[torch.Tensor]:
    """Shares of the one-hot vector of index mod size: (*s) -> (*s, size) in `dtype`'s ring. One round."""
    shape = tuple(index.shape)
    hot = Part((*shape, size), dtype=dtype)
    request = Request("one-hot", (Part(shape),), (hot,), lambda rho: (one_hot(rho, size, dtype),))
    rho, h = yield from draw(request)
    bits = size.bit_length() - 1
    (c,) = yield from reveal(Opening(index + rho, "index, rotated", width=bytes_for(bits)))
    # index = v exactly where rho = c - v.
    where = (c.unsqueeze(-1) - side.public(range(size))) & (size - 1)
    return h.gather(-1, where)


def lookup(side: Side, index: torch.Tensor, table: torch.Tensor) -> Program[torch.Tensor]:
    """Shares of table[index mod N]: (*s) -> (*s). table: (N,) public integers, N a power of two."""
    hot = yield from rotated(side, index, table.shape[0])
    return (hot * side.public(table)).sum(-1)


@dataclass(frozen=True)
class Series:
    """1/2 + x / (2 half) + sum_k b_k sin(pi k x / half): a step's smooth version on |x| < half.

    half: a power of two.  b: the coefficients.  The linear part makes both ends of the period meet,
    so that the coefficients fall exponentially (PROTOCOLS 6).
    """

    half: int
    b: tuple[float, ...]

    @staticmethod
    def of(step: Callable[[torch.Tensor], torch.Tensor], half: int, terms: int) -> Series:
        """The first `terms` coefficients for a function from 0 to 1 with step(x) + step(-x) = 1."""
        n = 1 << 14
        x = (torch.arange(n, dtype=torch.float64) / n - 0.5) * 2 * half
        odd = step(x) - 0.5 - x / (2 * half)
        k = torch.arange(1, terms + 1, dtype=torch.float64)
        b = 2 / n * (torch.sin(math.pi / half * x * k.unsqueeze(-1)) * odd).sum(-1)
        return Series(half, tuple(b.tolist()))


_GRID = 20  # bits of the grid on which an argument is opened
_SCALE = 16  # fraction bits of a sine, the dealer's and the public one


def sines(side: Side, x: Share, series: Series) -> Program[Share]:
    """The series at x, at 32 fraction bits; x at most 16 + log2(16 / half) of them. One round.

    x is opened modulo the period on a grid of 2^20 points; sin(k (x + t - t)) is public angles times
    the dealer's shares of the mask's sines and cosines: one opening for any number of terms.
    """
    period = series.half.bit_length()  # 2 half = 2^period
    shift = 2 * _SCALE - period - x.bits
    if shift < 0:
        raise ValueError(f"sines: at most {2 * _SCALE - period} fraction bits, not {x.bits}")
    terms = torch.arange(1, len(series.b) + 1)

    def waves(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        turns = (t.unsqueeze(-1) * terms) & ((1 << _GRID) - 1)
        angle = turns.double() * (2 * math.pi / (1 << _GRID))
        return torch.sin(angle), torch.cos(angle)

    shape = Part((*x.shape, len(series.b)))
    request = Request(
        "sines", (Part(x.shape),), (shape, shape), lambda t: [encode(w, _SCALE) for w in waves(t)]
    )
    t, sin_t, cos_t = yield from draw(request)
    on_grid = drop(x.data, x.bits + period - _GRID)
    (c,) = yield from reveal(Opening(on_grid + t, "masked for sines", width=bytes_for(_GRID)))
    straight = (x.data << shift) + side.constant(1 << (2 * _SCALE - 1), x.data)
    if c.is_meta:
        return Share(straight, 2 * _SCALE)
    b = torch.tensor(series.b, dtype=torch.float64)
    sin_c, cos_c = (encode(b * w, _SCALE) for w in waves(c))
    return Share(straight + (sin_c * cos_t - cos_c * sin_t).sum(-1), 2 * _SCALE)

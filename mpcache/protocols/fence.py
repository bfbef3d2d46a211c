"""A range check of a value that is opened masked, for a few bits from the dealer and no message.

c = x + r modulo 2^ring is public. The leading digit of c less that of r is x's leading digit, or one more:
the low bits may carry. The dealer, who knows r, shares a one-time table over all digits of c by XOR (Ishai
et al., TCC 2013): 0 where the difference is in range. The entry at c's digit is a bit in XOR shares, which
goes to the guard and nowhere else. An entry is uniform to each party, and no two are seen of one table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mpcache.runtime import deal_loops, value_loops
from mpcache.runtime.program import Part, Shape
from mpcache.runtime.ring import elements_of
from mpcache.runtime.side import Side


@cache
def _tables(lead: int, first: int, last: int) -> npt.NDArray[np.uint8]:
    """For each digit of r the bits of all digits of c, packed: (2^lead, 2^lead / 8)."""
    digit = np.arange(1 << lead)
    apart = (digit - digit[:, None]) & ((1 << lead) - 1)
    return np.packbits((apart < first) | (apart > last), axis=1, bitorder="little")


@dataclass(frozen=True)
class Fence:
    """Leading digits of `lead` bits, in a ring of `ring`, that are in range: first to last.

    x is surely told to be in range where its own leading digit is first to last - 1, and surely told to be
    out of it where that is below first - 1, or above last.
    """

    ring: int
    lead: int
    first: int
    last: int

    def part(self, shape: Shape) -> Part:
        """Return what the dealer shares for values of this shape."""
        return Part((*shape, max(1, (1 << self.lead) // 8)), torch.uint8, xor=True)

    def tables(self, r: torch.Tensor) -> torch.Tensor:
        """Derive the tables of masks r (*s), at the dealer."""
        table = _tables(self.lead, self.first, self.last)
        out = np.empty((*r.shape, table.shape[1]), np.uint8)
        x, rows = r.contiguous().numpy().reshape(-1), out.reshape(-1, table.shape[1])
        deal_loops.choose_rows(x, self.ring - self.lead, table, rows)
        return torch.from_numpy(out)

    def watch(self, side: Side, tables: Any, c: Any) -> None:
        """Let the guard know of opened values c (*s)."""
        if c.is_meta:
            return
        n, mask = math.prod(c.shape), (1 << self.lead) - 1
        bits = np.empty(n, np.uint8)
        (opened,), rows = elements_of(c), tables.numpy().reshape(n, -1)
        value_loops.table_bits(opened, self.ring - self.lead, mask, rows, bits)
        side.guard.note(bits)


def truncation_fence(ring: int) -> Fence:
    """Return the fence of a `raised` value: |x| < 2^(ring-2), as `linear.truncate` needs it.

    x is told to be in range wherever it is, and out of range wherever what comes out is wrong: a carry of
    the low bits that spoils the truncation shows in the digit. That holds up to |x| = 2.5 2^(ring-2); a
    value that wraps around the ring may come back into its range.
    """
    return Fence(ring, 3, 0, 4)

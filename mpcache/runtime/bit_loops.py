"""Compile the sums of XOR shares that torch has no operation for: random sums of one-hot rows.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import int64, uint8, void

from mpcache.runtime.loops import compile_loop


@compile_loop(void(uint8[:, :, ::1], int64[:, ::1], int64[:, ::1], int64[:, ::1], uint8[:, ::1]))
def sum_above(hot, place, coins, sums, borrows):
    """Add up coins by XOR, for each bucket those of the scores that lie in or above it.

    hot: bits [v = r] of each score, of (rows, n, size / 8) bytes.  place, coins: (rows, n); a score's bucket
    is place - r modulo size.  sums: (rows, size).  borrows: (rows, n), the bit [r > place].
    """
    rows, n, width = hot.shape
    size = 8 * width
    turned = np.empty(2 * size, np.int64)  # bucket j at size - 1 - j, and at 2 size - 1 - j
    for row in range(rows):
        turned[:] = 0
        for i in range(n):
            coin, p = coins[row, i], place[row, i]
            start, last, above = size - 1 - p, p >> 3, uint8(0)
            for k in range(width):
                byte = hot[row, i, k]
                for b in range(8):
                    turned[start + 8 * k + b] ^= coin & -((int64(byte) >> b) & 1)
                if k > last:
                    above ^= byte
            above ^= uint8(int64(hot[row, i, last]) >> ((p & 7) + 1))
            above ^= above >> 4
            above ^= above >> 2
            borrows[row, i] = (above ^ (above >> 1)) & 1
        total = int64(0)
        for j in range(size - 1, -1, -1):
            total ^= turned[size - 1 - j] ^ turned[2 * size - 1 - j]
            sums[row, j] = total

"""Compile sums of one-hot rows in one pass, where torch takes several, or has no operation for them.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import boolean, int16, int64, uint8, void

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


@compile_loop()
def _add_turned(counts, hot, start):
    total, size = int64(0), hot.shape[0]
    for v in range(start + 1):
        counts[v] += hot[start - v]
        total += v * hot[start - v]
    for v in range(start + 1, size):
        counts[v] += hot[start + size - v]
        total += v * hot[start + size - v]
    return total


@compile_loop(void(int16[:, :, ::1], int64[:, ::1], boolean[:, ::1], int16[:, ::1], int16[:, ::1]))
def count_turned(hot, by, seen, counts, numbers):
    """Add up the seen ones of one-hot rows that are turned as `loops.turn_rows` does, all modulo 2^16.

    hot: (rows, n, size), a power of two.  by, seen: (rows, n).  counts: (rows, size), zeros.
    numbers: (rows, n), the place of each row's 1, zero where it is not seen.
    """
    rows, n, size = hot.shape
    for row in range(rows):
        for i in range(n):
            numbers[row, i] = 0
            if seen[row, i]:
                numbers[row, i] = _add_turned(counts[row], hot[row, i], by[row, i] & (size - 1))

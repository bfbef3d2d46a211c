"""Compile sums of one-hot rows and of bits in one pass, where torch takes several or has none.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import boolean, int16, int64, uint8, uint16, uint32, uint64, void

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


@compile_loop()
def _parity(word):
    word ^= word >> uint64(32)
    word ^= word >> uint64(16)
    word ^= word >> uint64(8)
    word ^= word >> uint64(4)
    word ^= word >> uint64(2)
    return int64((word ^ (word >> uint64(1))) & uint64(1))


@compile_loop([void(w[:, ::1], int64[:, ::1], int64[::1]) for w in (uint8, uint16, uint32, uint64)])
def compare_digits(hot, digits, out):
    """Compare public digits v with those d whose bits [u = d] are given, of each number: l and e as bits.

    hot, digits: (n, m).  out: (n,), [v < d] of digit j at bit j, [v = d] at bit m + j, but for the last.
    """
    n, m = digits.shape
    for i in range(n):
        bits = int64(0)
        for j in range(m):
            word = uint64(hot[i, j]) >> uint64(digits[i, j])
            bits |= _parity(word >> uint64(1)) << j
            if j < m - 1:
                bits |= int64(word & uint64(1)) << (m + j)
        out[i] = bits


@compile_loop(void(int64[::1], int64[::1], int64, int64, int64, int64[::1], int64, int64[::1]))
def add_chosen(words, seen, low, high, size, chosen, bit, out):
    """Add up those bits of each word that a table chooses, and put the sum's parity at a bit of out (n,).

    words, seen: (n,). The table's entry is the number of seen's bits [low, low + size), and above them those
    of [high, high + size).
    """
    inner = (int64(1) << size) - 1
    for i in range(out.shape[0]):
        entry = ((seen[i] >> low) & inner) | (((seen[i] >> high) & inner) << size)
        out[i] |= _parity(uint64(words[i] & chosen[entry])) << bit


@compile_loop(void(int64[::1], int64[::1], int64[::1]))
def multiply_bits(words, sets, out):
    """Multiply, of each word (n,), the bits of each set: the products as bits of out (n,)."""
    for i in range(out.shape[0]):
        bits = int64(0)
        for k in range(sets.shape[0]):
            bits |= int64((words[i] & sets[k]) == sets[k]) << k
        out[i] = bits

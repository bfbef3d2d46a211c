"""Compile what follows an opening, where torch takes ten small operations: truncated values, fences, powers.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import boolean, int16, int64, uint8, void

from mpcache.runtime.loops import compile_loop

_WORDS, _ROWS = int64[::1], int64[:, ::1]


@compile_loop(void(uint8[:, ::1], _WORDS, boolean, _WORDS))
def open_words(theirs, mine, xor, out):
    """Add words (n,) to those whose low bytes come (n, width), or XOR them, modulo these bytes' ring."""
    width = theirs.shape[1]
    kept = (int64(1) << (8 * width)) - 1
    for i in range(out.shape[0]):
        word = int64(0)
        for j in range(width):
            word |= int64(theirs[i, j]) << (8 * j)
        out[i] = (mine[i] ^ word if xor else mine[i] + word) & kept


@compile_loop(void(_WORDS, int64, int64, _WORDS, _WORDS))
def affine_parts(c, f, ring, p, q):
    """Write the public p and q of opened values (n,), as `protocols.linear.affine` states them."""
    low, passed = (int64(1) << (ring - 1)) - 1, ring - 1 - f
    for i in range(c.shape[0]):
        top = (c[i] >> (ring - 1)) & 1
        p[i] = ((c[i] & low) >> f) - (int64(1) << (passed - 1)) + (top << passed)
        q[i] = (1 - 2 * top) << passed


@compile_loop(void(_WORDS, int64, int64, uint8[:, ::1], uint8[::1]))
def table_bits(c, shift, mask, tables, out):
    """Read the bit at (c >> shift) & mask of each row's table (n, bytes), the lowest first."""
    for i in range(c.shape[0]):
        digit = (c[i] >> shift) & mask
        out[i] = (tables[i, digit >> 3] >> (digit & 7)) & 1


@compile_loop(void(boolean, int64, int64, _WORDS, _WORDS, _WORDS, _ROWS, _WORDS, _ROWS, _WORDS, _WORDS))
def exponents(first, step, depth, c, x, r, points, tops, trees, ends, out):
    """Turn two trees' answers at each threshold into shares of x at the top of its word, and of a factor.

    As `protocols.reciprocal._exponent` says, for n values and k + 1 thresholds.  c, x, r: (n,).
    points: (n, k + 1), c less each threshold.  tops: (2 n,).  trees: (2 n, k + 1).
    ends: (2 n,), [x < the first threshold] and [x < the last one].
    out: (2 n,), x times 2^(step (k - 1 - i)) where it lies in interval i, and 2^(k - 1 - i).
    """
    n, k = points.shape[0], points.shape[1] - 1
    for i in range(n):
        value = factor = before = x_before = int64(0)
        for j in range(k + 1):
            m = (points[i, j] >> depth) & 1
            sign = 1 - 2 * m
            below = sign * (tops[i] + trees[i, j]) + (m if first else 0)
            if j == 0:
                ends[i] = below
            elif j == k:
                ends[n + i] = below
            else:
                x_below = c[i] * below - m * r[i] - sign * (tops[n + i] + trees[n + i, j])
                value += (x_below - x_before) << (step * (k - j))
                factor += (below - before) << (k - j)
                before, x_before = below, x_below
        out[i] = value + x[i] - x_before
        out[n + i] = factor + (1 if first else 0) - before


@compile_loop(void(_WORDS, int64, *[_WORDS] * 5, *[_ROWS] * 6, _WORDS))
def line_values(c, fine, values, slopes, p, q, factor, hot, top, low, f_hot, f_top, f_low, out):
    """Evaluate the lines at c >> fine less a shared place, and multiply by an opened factor's two parts.

    As `protocols.reciprocal._line` says, for n values and lines of `values` and `slopes` (size,), a power of
    two.  p, q: the public parts of c, truncated.  hot, top, low: shares (n, size) of one-hot vectors, and of
    the parts of c's mask times them.  f_hot, f_top, f_low: the same, times the factor's mask.  out: (n,).
    """
    n, size = hot.shape
    for i in range(n):
        place = c[i] >> fine
        own = masked = int64(0)
        for v in range(size):
            j = (place - v) & (size - 1)
            slope = slopes[j]
            line, turn = values[j] + p[i] * slope, q[i] * slope
            own += hot[i, v] * line + top[i, v] * turn - low[i, v] * slope
            masked += f_hot[i, v] * line + f_top[i, v] * turn - f_low[i, v] * slope
        out[i] = factor[i] * own + masked


@compile_loop(void(uint8[::1], boolean, int16[:, ::1], _WORDS))
def all_zero(opened, first, products, out):
    """Share modulo 2^16 whether all bits of (n,) numbers are zero, which are opened under a mask's bits.

    opened: bits [b xor not b's mask].  products: (n, 2^bits - 1), shares of the products of the mask's bits,
    in the order of the numbers whose bits name the factors.  out: (n,) int64, right modulo 2^16.
    """
    n, size = products.shape[0], products.shape[1] + 1
    part = np.empty(size, np.int64)
    for i in range(n):
        part[0] = 1 if first else 0
        for k in range(1, size):
            part[k] = products[i, k - 1]
        half, bits = size >> 1, opened[i]
        # o xor b = o + b (1 - 2 o) for each bit: the highest one is folded first.
        while half:
            one = (bits & half) != 0
            for k in range(half):
                part[k] = part[k] - part[k + half] if one else part[k + half]
            half >>= 1
        out[i] = part[0]

"""Compile what follows an opening, where torch takes ten small operations: truncated values, fences, powers.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import numpy as np
from numba import boolean, int16, int64, uint8, void

from mpcache.runtime.loops import MESSAGE, compile_loop

_WORDS, _ROWS = int64[::1], int64[:, ::1]


@compile_loop(void(MESSAGE, _WORDS, boolean, _WORDS))
def open_words(theirs, mine, xor, out):
    """Add words (n,) to those whose low bytes come (n, width), or XOR them, modulo these bytes' ring."""
    width = theirs.shape[1]
    kept = int64(-1) if width == 8 else (int64(1) << (8 * width)) - 1
    for i in range(out.shape[0]):
        word = int64(0)
        for j in range(width):
            word |= int64(theirs[i, j]) << (8 * j)
        out[i] = (mine[i] ^ word if xor else mine[i] + word) & kept


@compile_loop()
def _affine(c, f, ring):
    """Return public p and q of one opened value: it is p + q rb - rc, truncated by f bits."""
    low, passed = (int64(1) << (ring - 1)) - 1, ring - 1 - f
    top = (c >> (ring - 1)) & 1
    return ((c & low) >> f) - (int64(1) << (passed - 1)) + (top << passed), (1 - 2 * top) << passed


@compile_loop(void(_WORDS, int64, int64, _WORDS, _WORDS, boolean, _WORDS))
def truncated(c, f, ring, rb, rc, first, out):
    """Share opened values (n,), truncated (`linear.Truncated`). first: at the one who adds public parts."""
    for i in range(c.shape[0]):
        p, q = _affine(c[i], f, ring)
        out[i] = q * rb[i] - rc[i] + (p if first else 0)


@compile_loop(void(int64, int64, *[_WORDS] * 10, boolean, _WORDS))
def truncated_product(ring, ring_, c, rb, rc, c_, rb_, rc_, bb, bc, cb, cc, first, out):
    """Multiply two values (n,) as `truncated` has them, by shares of rb rb', rb rc', rc rb' and rc rc'."""
    for i in range(c.shape[0]):
        (p, q), (p_, q_) = _affine(c[i], 0, ring), _affine(c_[i], 0, ring_)
        mine = p_ * (q * rb[i] - rc[i]) + p * (q_ * rb_[i] - rc_[i]) + (p * p_ if first else 0)
        out[i] = mine + q * (q_ * bb[i] - bc[i]) - q_ * cb[i] + cc[i]


@compile_loop(void(_WORDS, int64, *[_WORDS] * 6, boolean, _WORDS))
def truncated_times(c, ring, rb, rc, a_rb, a_rc, d, a, first, out):
    """Multiply values (n,) as `truncated` has them by factors that are opened as d, under the mask a.

    a_rb, a_rc: shares of the mask times rb and rc.
    """
    for i in range(c.shape[0]):
        p, q = _affine(c[i], 0, ring)
        own = q * rb[i] - rc[i] + (p if first else 0)
        out[i] = d[i] * own + p * a[i] + q * a_rb[i] - a_rc[i]


@compile_loop(void(_WORDS, int64, *[_WORDS] * 5, boolean, _WORDS, _WORDS))
def added_square(c, ring, rb, rc, a_rb, stream, mask, first, out, total):
    """Add values (n,) as `truncated` has them to others, opened as `stream` under `mask`; add up the squares.

    As `protocols.norm._add` says, for rows of n / rows values.  a_rb: shares of (mask - rc) rb.
    out: (n,).  total: (rows,), with shares of the sums of (mask - rc)^2 in it.
    """
    width = c.shape[0] // total.shape[0]
    for row in range(total.shape[0]):
        for i in range(row * width, (row + 1) * width):
            p, q = _affine(c[i], 0, ring)
            e, a, q_rb = p + stream[i], mask[i] - rc[i], q * rb[i]
            # (e + q rb + a)^2 less a^2
            total[row] += 2 * (e * a + q * (e * rb[i] + a_rb[i])) + q * q_rb + (e * e if first else 0)
            out[i] = q_rb + a + (e if first else 0)


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


@compile_loop(void(_WORDS, int64, int64, *[_WORDS] * 3, *[_ROWS] * 6, _WORDS))
def line_values(c, fine, ring, values, slopes, factor, hot, top, low, f_hot, f_top, f_low, out):
    """Evaluate the lines at c >> fine less a shared place, and multiply by an opened factor's two parts.

    As `protocols.reciprocal._line` says, for n values and lines of `values` and `slopes` (size,), a power of
    two.  hot, top, low: shares (n, size) of one-hot vectors, and of
    the parts of c's mask times them.  f_hot, f_top, f_low: the same, times the factor's mask.  out: (n,).
    """
    n, size = hot.shape
    for i in range(n):
        place, (p, q) = c[i] >> fine, _affine(c[i], 0, ring)
        own = masked = int64(0)
        for v in range(size):
            j = (place - v) & (size - 1)
            slope = slopes[j]
            line, turn = values[j] + p * slope, q * slope
            own += hot[i, v] * line + top[i, v] * turn - low[i, v] * slope
            masked += f_hot[i, v] * line + f_top[i, v] * turn - f_low[i, v] * slope
        out[i] = factor[i] * own + masked


_TOGETHER = 8  # small numbers in a word, as in `protocols.lookup`


@compile_loop(void(uint8[:, :, :, ::1], _ROWS, _ROWS, _ROWS))
def digit_entries(tables, sums, masks, out):
    """Read the bit at each digit of a sum in the digit's table, and XOR them with masks.

    tables: (rows, n, digits, bytes), for digits of log2(8 bytes) bits, the lowest first.  sums: (rows, n).
    masks, out: (rows, words); a word has the bits of `_TOGETHER` sums, one after another.
    """
    rows, n, digits, size = tables.shape
    depth = 0
    while 1 << depth < 8 * size:
        depth += 1
    out[:] = masks
    for row in range(rows):
        for i in range(n):
            bits, left = int64(0), sums[row, i]
            for j in range(digits):
                digit = left & (8 * size - 1)
                bits |= int64((tables[row, i, j, digit >> 3] >> (digit & 7)) & 1) << j
                left >>= depth
            out[row, i // _TOGETHER] ^= bits << (digits * (i % _TOGETHER))


@compile_loop()
def _all_zero(bits, first, products, part):
    """Share whether all bits of one number are zero; part: room for as many products and one."""
    half = part.shape[0] >> 1
    part[0] = 1 if first else 0
    for k in range(1, part.shape[0]):
        part[k] = products[k - 1]
    # o xor b = o + b (1 - 2 o) for each bit: the highest one is folded first.
    while half:
        one = (bits & half) != 0
        for k in range(half):
            part[k] = part[k] - part[k + half] if one else part[k + half]
        half >>= 1
    return part[0]


@compile_loop(void(_ROWS, boolean, int16[:, :, ::1], _WORDS))
def count_zero(words, first, products, out):
    """Share modulo 2^16 how many of n numbers are zero in all bits, which are opened under a mask's bits.

    words: (rows, words), as `digit_entries` joins bits [b xor not b's mask].  products: (rows, n,
    2^bits - 1), shares of the products of the mask's bits, in the order of the numbers whose bits name the
    factors.  out: (rows,) int64, right modulo 2^16.
    """
    rows, n, size = products.shape[0], products.shape[1], products.shape[2] + 1
    width, part = 0, np.empty(size, np.int64)
    while 1 << width < size:
        width += 1
    for row in range(rows):
        out[row] = 0
        for i in range(n):
            out[row] += _all_zero(
                words[row, i // _TOGETHER] >> (width * (i % _TOGETHER)), first, products[row, i], part
            )


@compile_loop(void(_WORDS, uint8[::1], _WORDS, int64, int64, int64, _WORDS, int64, _WORDS))
def window_entries(windows, below, c, rest, compared, wide, masks, n, out):
    """Choose three bits of each number's tables, as `protocols.exp_digits` says, and XOR them with masks.

    windows: one-hot in bits.  below: [v < the next digit].  c: opened, of `rest` bits below the next digit of
    `compared` bits, below the window's number of `wide` bits.  n: numbers of a row.  masks, out: words.
    """
    words = (n + _TOGETHER - 1) // _TOGETHER
    out[:] = masks
    for i in range(c.shape[0]):
        window, digit = c[i] >> (rest + compared), (c[i] >> rest) & ((1 << compared) - 1)
        count = (1 << wide) - 1
        bits = (windows[i] >> (window & count)) & 1
        bits |= ((windows[i] >> ((window - 1) & count)) & 1) << 1
        bits |= ((int64(below[i]) >> max(digit - 1, 0)) & 1) << 2
        row, place = i // n, i % n
        out[row * words + place // _TOGETHER] ^= bits << (3 * (place % _TOGETHER))


@compile_loop(void(_WORDS, _WORDS, int64, int64, _ROWS, _WORDS, _WORDS, int64, _WORDS))
def exp_values(words, c, rest, compared, products, own, next_, n, out):
    """Multiply dealt e^r by public factors, as the bits of `window_entries` say, opened under one-bit masks.

    products: (size, 5), shares of e, and e times a, b, l, b l: the masks.  own, next_: where r's window is
    c's, and the one below.
    """
    width = (n + _TOGETHER - 1) // _TOGETHER
    for i in range(c.shape[0]):
        row, place = i // n, i % n
        seen = words[row * width + place // _TOGETHER] >> (3 * (place % _TOGETHER))
        same, other, low = seen & 1, (seen >> 1) & 1, (seen >> 2) & 1
        e, ea, eb, el, ebl = products[i, 0], products[i, 1], products[i, 2], products[i, 3], products[i, 4]
        if (c[i] >> rest) & ((1 << compared) - 1) == 0:  # not above any digit: the window decides alone
            low, el, ebl = 1, 0, 0
        here = ea + same * (e - 2 * ea)
        # (other xor b) (low xor l), times e
        without, with_b = el + low * (e - 2 * el), ebl + low * (eb - 2 * ebl)
        there = with_b + other * (without - 2 * with_b)
        out[i] = here * own[i] + there * next_[i]

"""Compile what the dealer derives of masks, where torch takes ten small operations.

As `mpcache.runtime.loops`: callers check shapes, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from numba import int16, int64, uint8, void

from mpcache.runtime.loops import compile_loop

_WORDS, _ROWS, _BYTES = int64[::1], int64[:, ::1], uint8[:, ::1]


@compile_loop(void(_WORDS, int64, int64, _WORDS, _WORDS))
def split_masks(r, bits, ring, rc, rb):
    """Write both parts of masks (n,), as `correlations.mask_parts` states them."""
    low = (int64(1) << (ring - 1)) - 1
    for i in range(r.shape[0]):
        rc[i] = (r[i] & low) >> bits
        rb[i] = (r[i] >> (ring - 1)) & 1


@compile_loop(void(_WORDS, int64, _BYTES, _BYTES))
def choose_rows(x, shift, table, out):
    """Write the table's row (x >> shift) modulo its rows, a power of two, for each of (n,): (n, bytes)."""
    mask, width = table.shape[0] - 1, table.shape[1]
    for i in range(x.shape[0]):
        row = (x[i] >> shift) & mask
        for j in range(width):
            out[i, j] = table[row, j]


@compile_loop(void(_WORDS, int64, _WORDS, _WORDS, _WORDS))
def carried_masks(r, depth, alpha, beta, tops):
    """Write what two key trees of each mask (n,) are made of, (2 n,) each, as `reciprocal._exponent` says."""
    n = r.shape[0]
    for i in range(2 * n):
        mask = r[i % n]
        top, carried = (mask >> depth) & 1, int64(1) if i < n else mask
        alpha[i] = mask & ((int64(1) << depth) - 1)
        beta[i] = carried * (1 - 2 * top)
        tops[i] = carried * top


@compile_loop(void(_WORDS, _WORDS, int64, int64, int64[:, :, ::1]))
def line_parts(r, b, fine, ring, out):
    """Write what `reciprocal._line` derives to zeros (6, n, size): each row's only entry."""
    size, low = out.shape[2], (int64(1) << (ring - 1)) - 1
    for i in range(r.shape[0]):
        place = (r[i] >> fine) & (size - 1)
        out[0, i, place], out[1, i, place], out[2, i, place] = 1, (r[i] >> (ring - 1)) & 1, r[i] & low
        for k in range(3):
            out[3 + k, i, place] = b[i] * out[k, i, place]


@compile_loop(void(_WORDS, int64, int64, _BYTES))
def one_hot_bits(x, shift, digits, out):
    """Write bit d of 256 for each digit d, of 8 bits from `shift` on, of (n,): to zeros (n * digits, 32)."""
    for i in range(x.shape[0]):
        for j in range(digits):
            digit = (x[i] >> (shift + 8 * j)) & 255
            out[digits * i + j, digit >> 3] = 1 << (digit & 7)


@compile_loop(void(_WORDS, int16[:, ::1]))
def bit_products(x, out):
    """Multiply the bits of numbers (n,), for each set of them but the empty one: (n, 2^bits - 1)."""
    for i in range(out.shape[0]):
        for k in range(out.shape[1]):
            out[i, k] = (x[i] & (k + 1)) == k + 1


@compile_loop(void(_WORDS, _WORDS, _WORDS, int64, int64, int64, int64, _WORDS, uint8[::1], _ROWS))
def exp_parts(r, entries, factors, window_shift, windows, digit_shift, digits, hot, below, products):
    """Write what `exp_digits.ExpDigits` derives of masks (n,): windows, and digits, are masks of bits."""
    for i in range(r.shape[0]):
        hot[i] = int64(1) << ((r[i] >> window_shift) & windows)
        below[i] = uint8((int64(1) << ((r[i] >> digit_shift) & digits)) - 1)
        a, b, last = entries[i] & 1, (entries[i] >> 1) & 1, (entries[i] >> 2) & 1
        e = factors[i]
        products[i, 0], products[i, 1], products[i, 2] = e, e * a, e * b
        products[i, 3], products[i, 4] = e * last, e * b * last

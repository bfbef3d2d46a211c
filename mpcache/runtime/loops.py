"""Compile what torch has no fast operation for: products modulo 2^64, bytes, waves, turned vectors.

The import compiles each loop once per machine, in a few seconds, and keeps it beside this file or in the
user's cache folder; where neither can be written each process compiles. Callers check shapes: nothing here
does, and arrays lie as the signatures say.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import boolean, float64, int8, int16, int32, int64, njit, types, uint8, uint16, uint32, void

_INT64 = int64[:, ::1]
MESSAGE = types.Array(uint8, 2, "C", readonly=True)  # bytes as they came: nobody writes to them
_COLUMNS = 1024  # of the result, which stay in the innermost cache while all rows of the matrix pass


def compile_loop(signature: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function: at once for a signature of numba's, else when arguments come."""

    def make(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder to keep it in
            return njit(signature, nogil=True)(function)

    return make


# Slices and one plain index: so LLVM sees that it may work on whole vectors.


@compile_loop()
def _add_one(out, row, a):
    for j in range(out.shape[0]):
        out[j] += a * row[j]


@compile_loop()
def _add_four(out, row, next_, third, last, a, b, c, d):
    for j in range(out.shape[0]):
        out[j] += a * row[j] + b * next_[j] + c * third[j] + d * last[j]


@compile_loop()
def _join(out, low, high, bits):
    for j in range(out.shape[0]):
        out[j] = np.int64(low[j]) | (np.int64(high[j]) << bits)


@compile_loop()
def _add_four_joined(out, l0, l1, l2, l3, h0, h1, h2, h3, a, b, c, d, bits):
    for j in range(out.shape[0]):
        out[j] += (
            a * (np.int64(l0[j]) | (np.int64(h0[j]) << bits))
            + b * (np.int64(l1[j]) | (np.int64(h1[j]) << bits))
            + c * (np.int64(l2[j]) | (np.int64(h2[j]) << bits))
            + d * (np.int64(l3[j]) | (np.int64(h3[j]) << bits))
        )


@compile_loop([void(_INT64, w[:, ::1], _INT64) for w in (int64, int32, int16)])
def add_product(x, w, out):
    """Add x (m, k) @ w (k, n) to out (m, n), all contiguous; w: int64, int32 or int16."""
    m, k = x.shape
    n = w.shape[1]
    for start in range(0, n, _COLUMNS):
        end = min(n, start + _COLUMNS)
        for i in range(0, k - 3, 4):
            for r in range(m):
                _add_four(
                    out[r, start:end],
                    w[i, start:end], w[i + 1, start:end], w[i + 2, start:end], w[i + 3, start:end],
                    x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3],
                )  # fmt: skip
        for i in range(k - k % 4, k):
            for r in range(m):
                _add_one(out[r, start:end], w[i, start:end], x[r, i])


@compile_loop(
    [void(_INT64, w[:, ::1], v[:, ::1], _INT64, int64) for w, v in ((uint32, int16), (uint16, int8))]
)
def add_joined_product(x, low, high, out, bits):
    """Add x (m, k) @ (low + 2^bits high) (k, n) to out (m, n), contiguous; low has so many bits, unsigned."""
    m, k = x.shape
    n = low.shape[1]
    joined = np.empty((4, _COLUMNS), np.int64)
    for start in range(0, n, _COLUMNS):
        end = min(n, start + _COLUMNS)
        for i in range(0, k - 3, 4):
            if m == 1:
                _add_four_joined(
                    out[0, start:end],
                    low[i, start:end], low[i + 1, start:end], low[i + 2, start:end], low[i + 3, start:end],
                    high[i, start:end], high[i + 1, start:end],
                    high[i + 2, start:end], high[i + 3, start:end],
                    x[0, i], x[0, i + 1], x[0, i + 2], x[0, i + 3], bits,
                )  # fmt: skip
                continue
            for j in range(4):
                _join(joined[j, : end - start], low[i + j, start:end], high[i + j, start:end], bits)
            for r in range(m):
                _add_four(
                    out[r, start:end],
                    joined[0, : end - start], joined[1, : end - start],
                    joined[2, : end - start], joined[3, : end - start],
                    x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3],
                )  # fmt: skip
        for i in range(k - k % 4, k):
            _join(joined[0, : end - start], low[i, start:end], high[i, start:end], bits)
            for r in range(m):
                _add_one(out[r, start:end], joined[0, : end - start], x[r, i])


@compile_loop()
def _low_bytes(value, other, xor, width, out):
    for i in range(value.shape[0]):
        word = value[i] ^ other[i] if xor else value[i] - other[i]
        for j in range(width):
            out[width * i + j] = uint8(word >> (8 * j))


# A width that LLVM knows makes whole vectors of it: a quarter of the time.


@compile_loop([void(w[::1], w[::1], boolean, int64, uint8[::1]) for w in (int64, int32, int16)])
def pack_differences(value, other, xor, width, out):
    """Write the low bytes of value - other, or of their XOR, (n,) to out (n * width,), the lowest first."""
    if width == 1:
        _low_bytes(value, other, xor, 1, out)
    elif width == 2:
        _low_bytes(value, other, xor, 2, out)
    elif width == 3:
        _low_bytes(value, other, xor, 3, out)
    elif width == 4:
        _low_bytes(value, other, xor, 4, out)
    elif width == 5:
        _low_bytes(value, other, xor, 5, out)
    elif width == 6:
        _low_bytes(value, other, xor, 6, out)
    else:
        _low_bytes(value, other, xor, width, out)


@compile_loop([void(int64[::1], uint8[:, ::1])])
def pack_words(x, out):
    """Write the low bytes of each word (n,) to out (n, width), the lowest first."""
    for i in range(x.shape[0]):
        word = x[i]
        for j in range(out.shape[1]):
            out[i, j] = uint8(word)
            word >>= 8


@compile_loop([void(MESSAGE, int64[::1])])
def unpack_words(data, out):
    """Read words (n,) from their low bytes (n, width)."""
    for i in range(out.shape[0]):
        word = int64(0)
        for j in range(data.shape[1]):
            word |= int64(data[i, j]) << (8 * j)
        out[i] = word


@compile_loop([void(w[:, ::1], int64[::1], w[:, ::1]) for w in (int8, int16, int32, int64)])
def turn_rows(x, by, out):
    """Write x[i, (by[i] - v) mod size] to out[i, v]; x: (n, size), a power of two."""
    size = x.shape[1]
    for i in range(x.shape[0]):
        start = by[i] & (size - 1)
        for v in range(start + 1):
            out[i, v] = x[i, start - v]
        for v in range(start + 1, size):
            out[i, v] = x[i, start + size - v]


# sin x / x and cos x of x^2 below (pi / 4)^2, as far as doubles see: 1/3!, 1/5!, ... and 1/2!, 1/4!, ...
_SINE = np.array([(-1.0) ** k / math.factorial(2 * k + 1) for k in range(10)])
_COSINE = np.array([(-1.0) ** k / math.factorial(2 * k) for k in range(10)])


@compile_loop()
def _wave(raw, bits):
    """Compute sine and cosine of a full turn / 2^bits times raw, from sums and products alone."""
    eighth = (raw >> (bits - 3)) & 7
    low = raw & ((1 << (bits - 3)) - 1)
    if eighth & 1:
        low = (1 << (bits - 3)) - low
    x = low * (2 * math.pi / 2.0**bits)
    square, s, c = x * x, 0.0, 0.0
    for k in range(9, -1, -1):
        s, c = s * square + _SINE[k], c * square + _COSINE[k]
    s *= x
    quarter = (eighth + 1) >> 1  # of a turn: the nearest
    if eighth & 1:
        s = -s
    if quarter & 1:
        s, c = c, -s
    if quarter & 2:
        s, c = -s, -c
    return s, c


@compile_loop(void(int64[::1], int64, float64, int64[::1], *[int32[:, ::1]] * 4))
def waves(raw, bits, unit, less, sines, more_sines, cosines, more_cosines):
    """Write sine and cosine of k raw / 2^bits turns, k = 1, 2, ..., in units of 2^less[k - 1] / unit.

    They are rounded to 1 / unit, and from there to the nearest. The first terms go to sines and cosines
    (n, large), the others to the other two (n, terms - large).
    """
    large, terms = sines.shape[1], less.shape[0]
    for i in range(raw.shape[0]):
        s, c = _wave(raw[i], bits)
        sk, ck = s, c
        for k in range(terms):
            half = (int64(1) << less[k]) >> 1
            sine, cosine = int64(np.rint(unit * sk)) + half, int64(np.rint(unit * ck)) + half
            if k < large:
                sines[i, k], cosines[i, k] = sine >> less[k], cosine >> less[k]
            else:
                more_sines[i, k - large], more_cosines[i, k - large] = sine >> less[k], cosine >> less[k]
            sk, ck = sk * c + ck * s, ck * c - sk * s


@compile_loop(void(int64[::1], int64, float64[::1], int32[:, ::1], int32[:, ::1], int64[::1]))
def waves_less(raw, bits, units, sines, cosines, out):
    """Write the sum over k of units[k] sin(k (raw - r)), given sin(k r) and cos(k r), to out (n,).

    units: rounded after the sine or cosine of k raw / 2^bits turns is multiplied.
    """
    for i in range(raw.shape[0]):
        s, c = _wave(raw[i], bits)
        sk, ck, total = s, c, int64(0)
        for k in range(sines.shape[1]):
            total += int64(np.rint(units[k] * sk)) * int64(cosines[i, k])
            total -= int64(np.rint(units[k] * ck)) * int64(sines[i, k])
            sk, ck = sk * c + ck * s, ck * c - sk * s
        out[i] = total

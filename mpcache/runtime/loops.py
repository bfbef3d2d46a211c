"""Compile the loops of products modulo 2^64: numba, where it is installed.

Each loop is compiled once and kept beside this file, or in the user's cache folder; where neither can be
written it is compiled in each process, in a second or two. The import does it, and set-up imports.
"""

# numba's functions have no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import int16, int32, int64, njit, uint32, void

_INT64 = int64[:, ::1]
_COLUMNS = 1024  # of the result, which stay in the innermost cache while all rows of the matrix pass


def compiled(signature: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function: at once for a signature of numba's, else when arguments come."""

    def make(function: Callable[..., Any]) -> Any:
        try:
            return njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder to keep it in
            return njit(signature, nogil=True)(function)

    return make


# Slices and one plain index: so LLVM sees that it may work on whole vectors.


@compiled()
def _add_one(out, row, a):
    for j in range(out.shape[0]):
        out[j] += a * row[j]


@compiled()
def _add_four(out, row, next_, third, last, a, b, c, d):
    for j in range(out.shape[0]):
        out[j] += a * row[j] + b * next_[j] + c * third[j] + d * last[j]


@compiled()
def _join(out, low, high):
    for j in range(out.shape[0]):
        out[j] = np.int64(low[j]) | (np.int64(high[j]) << 32)


@compiled()
def _add_four_joined(out, l0, l1, l2, l3, h0, h1, h2, h3, a, b, c, d):
    for j in range(out.shape[0]):
        out[j] += (
            a * (np.int64(l0[j]) | (np.int64(h0[j]) << 32))
            + b * (np.int64(l1[j]) | (np.int64(h1[j]) << 32))
            + c * (np.int64(l2[j]) | (np.int64(h2[j]) << 32))
            + d * (np.int64(l3[j]) | (np.int64(h3[j]) << 32))
        )


@compiled([void(_INT64, w, _INT64) for w in (_INT64, int32[:, ::1])])
def add_product(x, w, out):
    """Add x (m, k) @ w (k, n) to out (m, n), all contiguous; w: int64 or int32."""
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


@compiled(void(_INT64, uint32[:, ::1], int16[:, ::1], _INT64))
def add_joined_product(x, low, high, out):
    """Add x (m, k) @ (low + 2^32 high) (k, n) to out (m, n), all contiguous; uint32 and int16."""
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
                    x[0, i], x[0, i + 1], x[0, i + 2], x[0, i + 3],
                )  # fmt: skip
                continue
            for j in range(4):
                _join(joined[j, : end - start], low[i + j, start:end], high[i + j, start:end])
            for r in range(m):
                _add_four(
                    out[r, start:end],
                    joined[0, : end - start], joined[1, : end - start],
                    joined[2, : end - start], joined[3, : end - start],
                    x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3],
                )  # fmt: skip
        for i in range(k - k % 4, k):
            _join(joined[0, : end - start], low[i, start:end], high[i, start:end])
            for r in range(m):
                _add_one(out[r, start:end], joined[0, : end - start], x[r, i])

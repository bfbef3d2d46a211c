"""Rows of columns that belong to items: (*rows, n c) is n items of c columns each."""

from __future__ import annotations

from mpcache.ops import Value


def by_item(x: Value, n: int) -> Value:
    """Split columns by item: (*rows, n c) -> (*rows, n, c)."""
    return x.reshape(*x.shape[:-1], n, x.shape[-1] // n)


def flat(x: Value) -> Value:
    """Join the columns of all items: (*rows, n, c) -> (*rows, n c)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])

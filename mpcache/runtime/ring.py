"""Arithmetic in Z_2^64 that wastes neither the CPU nor memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

_INT32 = 1 << 31
_BLOCK = 1 << 17  # words that are widened at once, where no loops are compiled


@dataclass(frozen=True)
class Matrix:
    """Integers (k, n) that are multiplied from the left, in few bytes: `narrow` makes them.

    low: int64, or int32.  high: int16 or None; with it low holds the lower 32 bits of each number, whatever
    their sign, and high the rest.
    """

    low: Any  # torch.Tensor, or a MetaTensor where there are only shapes
    high: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.low.shape)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """Return rows start..end as int64."""
        low: torch.Tensor = self.low[start:end].long()
        return low if self.high is None else (low & 0xFFFFFFFF) | (self.high[start:end].long() << 32)


def narrow(x: Any, ring: int = 64) -> Matrix:
    """Hold x (k, n), int64, of which `ring` bits count: 4 bytes each if they fit, 6 up to a ring of 48."""
    if x.is_meta:
        return Matrix(x)
    loops()  # compiled now, before a token waits for it
    low, high = (int(v) for v in x.aminmax()) if x.numel() else (0, 0)
    if low >= -_INT32 and high < _INT32:
        return Matrix(x.to(torch.int32).contiguous())
    if ring > 48:
        return Matrix(x.contiguous())
    return Matrix(x.to(torch.int32).contiguous(), (x >> 32).to(torch.int16).contiguous())


def matmul(x: torch.Tensor, y: torch.Tensor | Matrix) -> torch.Tensor:
    """Multiply x @ y modulo 2^64, int64, with torch's broadcasting rules; meta tensors stay meta.

    With a `Matrix` of a smaller ring the product is right in that ring.
    """
    if not isinstance(y, Matrix):
        if y.is_meta or x.is_meta or y.dim() != 2 or not y.is_contiguous():
            return torch.matmul(x, y)
        y = Matrix(y)
    if x.is_meta or y.low.is_meta:
        return torch.matmul(x, y.low)
    left = x.reshape(-1, x.shape[-1]).contiguous()
    if left.shape[1] != y.shape[0]:
        raise RuntimeError(f"a product of {tuple(x.shape)} with {y.shape}")
    out = torch.zeros(left.shape[0], y.shape[1], dtype=torch.int64)
    _add(left, y, out)
    return out.reshape(*x.shape[:-1], y.shape[1])


def _add(x: torch.Tensor, y: Matrix, out: torch.Tensor) -> None:
    compiled = loops()
    if compiled is None:
        rows = max(1, _BLOCK // max(1, y.shape[1]))
        for i in range(0, y.shape[0], rows):
            out += torch.matmul(x[:, i : i + rows], y.rows(i, i + rows))
    elif y.high is None:
        compiled.add_product(x.numpy(), y.low.numpy(), out.numpy())
    else:
        compiled.add_joined_product(x.numpy(), y.low.numpy().view("u4"), y.high.numpy(), out.numpy())


@cache
def loops() -> ModuleType | None:
    """Return the compiled loops; None where numba is missing."""
    try:
        from mpcache.runtime import loops as compiled
    except ImportError:
        return None
    return compiled

"""Arithmetic in Z_2^64 that wastes neither the CPU nor memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpcache.runtime import loops

_INT32 = 1 << 31


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


def narrow(x: Any, ring: int = 64) -> Matrix:
    """Hold x (k, n), int64, of which `ring` bits count: 4 bytes each if they fit, 6 up to a ring of 48."""
    if x.is_meta:
        return Matrix(x)
    low, high = (int(v) for v in x.aminmax()) if x.numel() else (0, 0)
    if low >= -_INT32 and high < _INT32:
        return Matrix(x.to(torch.int32).contiguous())
    if ring > 48:
        return Matrix(x.contiguous())
    return Matrix(x.to(torch.int32).contiguous(), (x >> 32).to(torch.int16).contiguous())


def wide(x: torch.Tensor | Matrix) -> torch.Tensor:
    """Return the int64 that `narrow` holds, exactly if it fitted, else modulo the ring that it was given."""
    if not isinstance(x, Matrix):
        return x
    low: torch.Tensor = x.low.long()
    return low if x.high is None else (low & 0xFFFFFFFF) | (x.high.long() << 32)


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
    left = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    if left.shape[1] != y.shape[0]:
        raise RuntimeError(f"a product of {tuple(x.shape)} with {y.shape}")
    out = np.zeros((left.shape[0], y.shape[1]), np.int64)
    if y.high is None:
        loops.add_product(left.numpy(), y.low.numpy(), out)
    else:
        loops.add_joined_product(left.numpy(), y.low.numpy().view(np.uint32), y.high.numpy(), out)
    return torch.from_numpy(out).reshape(*x.shape[:-1], y.shape[1])


def pack(x: torch.Tensor, width: int) -> torch.Tensor:
    """Take the low `width` bytes of each int64: (*s) -> (*s, width) uint8."""
    out = np.empty((x.numel(), width), np.uint8)
    loops.pack_words(x.reshape(-1).contiguous().numpy(), out)
    return torch.from_numpy(out).reshape(*x.shape, width)


def unpack(x: torch.Tensor) -> torch.Tensor:
    """Put back what `pack` took, as numbers from 0 on: (*s, width) -> (*s)."""
    out = np.empty(math.prod(x.shape[:-1]), np.int64)
    loops.unpack_words(x.reshape(out.size, x.shape[-1]).contiguous().numpy(), out)
    return torch.from_numpy(out).reshape(x.shape[:-1])


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return x[*, (by - v) mod size] at each v; x: (*s, size), a power of two; by: (*s)."""
    flat = x.reshape(by.numel(), x.shape[-1]).contiguous()
    out = torch.empty_like(flat)
    loops.turn_rows(flat.numpy(), by.reshape(-1).contiguous().numpy(), out.numpy())
    return out.reshape(x.shape)

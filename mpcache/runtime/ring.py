"""Arithmetic in Z_2^64 that wastes neither the CPU nor memory."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mpcache.runtime import loops
from mpcache.runtime.meta import MetaTensor

_FETCHED = 1 << 22  # integers of a matrix elsewhere that are fetched at once
_BLOCK = 1 << 18  # integers of a matrix that are made at once, where it is made a few rows at a time
_LOWER = {torch.int16: np.uint16, torch.int32: np.uint32}  # what the lower bits are read as


@dataclass(frozen=True)
class Matrix:
    """Integers (k, n) that are multiplied from the left, in few bytes: `narrow` makes them.

    low: int64, int32 or int16.  high: None, or, with it, low holds the lower bits of each number, whatever
    their sign, and high the rest: int16 and int8 (3 bytes), int32 and int16 (6 bytes).
    """

    low: Any  # torch.Tensor, or a MetaTensor where there are only shapes
    high: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.low.shape)

    def __getitem__(self, rows: slice) -> Matrix:
        return Matrix(self.low[rows], None if self.high is None else self.high[rows])

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield the matrix with the rows that it is: one block."""
        yield slice(0, self.shape[0]), self


class RemoteMatrix(ABC):
    """A matrix (k, n) whose integers lie elsewhere, in parts: products go there and come back."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._fetched: tuple[int, torch.Tensor] = 0, torch.empty((0, shape[1]), dtype=torch.int64)

    @abstractmethod
    def times(self, left: torch.Tensor) -> torch.Tensor:
        """Multiply (m, k) by the matrix, int64, modulo 2^64."""

    @abstractmethod
    def largest(self) -> int:
        """Return the largest absolute value."""

    @abstractmethod
    def rows(self, rows: slice) -> torch.Tensor:
        """Fetch some rows (r, n), int64."""

    def __getitem__(self, rows: slice) -> Matrix:
        """Return some rows; who reads all of them in order fetches many at once."""
        first, held = self._fetched
        if not first <= rows.start <= rows.stop <= first + held.shape[0]:
            step = max(rows.stop - rows.start, _FETCHED // max(1, self.shape[1]))
            first, held = rows.start, self.rows(slice(rows.start, min(self.shape[0], rows.start + step)))
            self._fetched = first, held
        if rows.stop == self.shape[0]:  # the last ones
            self._fetched = 0, held[:0].clone()
        return Matrix(held[rows.start - first : rows.stop - first])

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield all rows, a few at a time."""
        for rows in rows_of(self.shape):
            yield rows, self[rows]


class Blocks(Protocol):
    """A matrix (k, n) whose rows come a few at a time: a `Matrix`, or what makes them when needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Public sizes."""

    def blocks(self) -> Iterator[tuple[slice, Matrix]]:
        """Yield some rows and where they stand, from the first to the last; each is gone with the next."""


def rows_of(shape: tuple[int, ...], block: int = _BLOCK) -> Iterator[slice]:
    """Yield the rows of a matrix (k, n) a few at a time, four at least: the loops take four at once."""
    step = max(4, block // max(1, shape[1]) // 4 * 4)
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def narrow(x: Any, ring: int = 64) -> Matrix:
    """Hold x (k, n), int64, of which `ring` bits count: in 2 to 4 bytes if they fit, 6 up to a ring of 48."""
    return Matrix(x) if x.is_meta else narrow_rows(tuple(x.shape), lambda rows: x[rows], ring)


def narrow_rows(shape: tuple[int, ...], rows: Callable[[slice], torch.Tensor], ring: int = 64) -> Matrix:
    """Do as `narrow` for a matrix (k, n) of which `rows` makes some, int64; it is asked for each twice."""
    low, high = 0, 0
    for part in rows_of(shape):
        if (block := rows(part)).numel():
            least, most = (int(v) for v in block.aminmax())
            low, high = min(low, least), max(high, most)
    held = _room(shape, max(high, ~low).bit_length() + 1, ring)
    for part in rows_of(shape):
        block, mine = rows(part), held[part]
        mine.low.copy_(block)
        if mine.high is not None:
            mine.high.copy_(block >> 8 * mine.low.itemsize)
    return held


def _room(shape: tuple[int, ...], bits: int, ring: int) -> Matrix:
    """Make room for signed integers of so many bits."""
    for fits, low, high in (
        (16, torch.int16, None), (24, torch.int16, torch.int8), (32, torch.int32, None),
        (0 if ring > 48 else 64, torch.int32, torch.int16),
    ):  # fmt: skip
        if bits <= fits:
            above = None if high is None else torch.empty(shape, dtype=high)
            return Matrix(torch.empty(shape, dtype=low), above)
    return Matrix(torch.empty(shape, dtype=torch.int64))


def largest_in(x: torch.Tensor | Matrix | RemoteMatrix) -> int:
    """Return the largest absolute value."""
    if isinstance(x, RemoteMatrix):
        return x.largest()
    most = 0
    for block in blocks_of(x):
        if block.numel():
            low, high = (int(v) for v in block.aminmax())
            most = max(most, -low, high)
    return most


def blocks_of(x: torch.Tensor | Matrix | RemoteMatrix) -> Iterator[torch.Tensor]:
    """Yield integers as int64, in order, a matrix in few bytes a few rows at a time."""
    if isinstance(x, Matrix | RemoteMatrix):
        yield from (wide(x[rows]) for rows in rows_of(x.shape))
    else:
        yield x


def wide(x: torch.Tensor | Blocks) -> torch.Tensor:
    """Return the int64 that `narrow` holds, exactly if it fitted, else modulo the ring that it was given."""
    if isinstance(x, torch.Tensor | MetaTensor):
        return x  # type: ignore[return-value]
    if not isinstance(x, Matrix):
        return torch.cat([wide(block).clone() for _, block in x.blocks()])  # the next takes its memory
    low: torch.Tensor = x.low.long()
    if x.high is None:
        return low
    bits = 8 * x.low.itemsize
    joined: torch.Tensor = (low & ((1 << bits) - 1)) | (x.high.long() << bits)
    return joined


def matmul(x: torch.Tensor, y: torch.Tensor | MetaTensor | Blocks) -> torch.Tensor:
    """Multiply x @ y modulo 2^64, int64, with torch's broadcasting rules; meta tensors stay meta.

    With a matrix of a smaller ring the product is right in that ring.
    """
    if isinstance(y, Matrix) and y.low.is_meta:
        y = y.low
    if isinstance(y, torch.Tensor | MetaTensor):
        if y.is_meta or x.is_meta or y.dim() != 2 or not y.is_contiguous():
            return torch.matmul(x, y)  # type: ignore[arg-type]
        y = Matrix(y)
    if x.is_meta:
        return torch.matmul(x, MetaTensor(y.shape))  # type: ignore[arg-type]
    left = x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).contiguous()
    if left.shape[1] != y.shape[0]:
        raise RuntimeError(f"a product of {tuple(x.shape)} with {tuple(y.shape)}")
    if isinstance(y, RemoteMatrix):
        return y.times(left).reshape(*x.shape[:-1], y.shape[1])
    out = np.zeros((left.shape[0], y.shape[1]), np.int64)
    for rows, block in y.blocks():
        _add_product(left[:, rows].contiguous().numpy(), block, out)
    return torch.from_numpy(out).reshape(*x.shape[:-1], y.shape[1])


def _add_product(x: Any, y: Matrix, out: Any) -> None:
    if y.high is None:
        loops.add_product(x, y.low.numpy(), out)
    else:
        low = y.low.numpy().view(_LOWER[y.low.dtype])
        loops.add_joined_product(x, low, y.high.numpy(), out, 8 * y.low.itemsize)


# numpy makes an array of another shape in a third of the time that torch takes, and a token makes thousands.


def elements_of(*tensors: torch.Tensor) -> list[npt.NDArray[Any]]:
    """Return tensors as what compiled loops take: their elements in order."""
    return [tensor.numpy().ravel() for tensor in tensors]


def pack(x: torch.Tensor, width: int) -> torch.Tensor:
    """Take the low `width` bytes of each int64: (*s) -> (*s, width) uint8."""
    out = np.empty((*x.shape, width), np.uint8)
    loops.pack_words(x.numpy().reshape(-1), out.reshape(-1, width))
    return torch.from_numpy(out)


def pack_difference(value: torch.Tensor, other: torch.Tensor, xor: bool, width: int) -> torch.Tensor:
    """Take the low `width` bytes of value - other, or of their XOR: two (*s) -> (*s, width) uint8."""
    out = np.empty((*value.shape, width), np.uint8)
    loops.pack_differences(value.numpy().reshape(-1), other.numpy().reshape(-1), xor, width, out.reshape(-1))
    return torch.from_numpy(out)


def unpack(x: torch.Tensor) -> torch.Tensor:
    """Put back what `pack` took, as numbers from 0 on: (*s, width) -> (*s)."""
    shape = x.shape
    out = np.empty(shape[:-1], np.int64)
    loops.unpack_words(x.numpy().reshape(-1, shape[-1]), out.reshape(-1))
    return torch.from_numpy(out)


def turned(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Return x[*, (by - v) mod size] at each v; x: (*s, size), a power of two; by: (*s)."""
    flat = x.reshape(by.numel(), x.shape[-1]).contiguous()
    out = torch.empty_like(flat)
    loops.turn_rows(flat.numpy(), by.reshape(-1).contiguous().numpy(), out.numpy())
    return out.reshape(x.shape)

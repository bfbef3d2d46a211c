"""Table lookup by a rotated one-hot vector (docs/protocols.md, section 7).

The index is opened modulo the table's size N with a uniform rotation, never as a difference of
integers.
"""

from __future__ import annotations

import math

import torch

from mpcache.runtime.program import (
    Opening,
    Part,
    Program,
    Request,
    RequestKind,
    Shape,
    Work,
    draw,
    open_masked,
)
from mpcache.runtime.ring import turned
from mpcache.runtime.side import Side


def one_hot(rotation: torch.Tensor, size: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Turn (*s) uniform words into (*s, size), 1 at rotation mod size (a power of two), at the dealer."""
    hot = torch.zeros(*rotation.shape, size, dtype=dtype)
    return hot.scatter_(-1, (rotation & (size - 1)).unsqueeze(-1), 1)


def one_hot_of(
    side: Side, index: torch.Tensor, size: int, dtype: torch.dtype = torch.int64
) -> Program[torch.Tensor]:
    """Compute the one-hot vector of index mod size: (*s) -> (*s, size) in `dtype`'s ring. One round."""
    h, c = yield from rotated_one_hot(side, index, size, dtype)
    return h if c.is_meta else turned(h, c)


def rotated_one_hot(
    side: Side, index: torch.Tensor, size: int, dtype: torch.dtype = torch.int64
) -> Program[tuple[torch.Tensor, torch.Tensor]]:
    """Compute h (*s, size) and public c (*s): `turned`, they are the vector of `one_hot_of`. One round."""
    shape = tuple(index.shape)
    hot = Part((*shape, size), dtype=dtype)
    work = Work(lookups=math.prod(shape), multiply_adds=math.prod(hot.shape))
    request = Request(
        RequestKind.ONE_HOT, (Part(shape),), (hot,), lambda rho: (one_hot(rho, size, dtype),), work
    )
    rho, h = yield from draw(request)
    bits = size.bit_length() - 1
    (c,) = yield from open_masked(Opening(index + rho, "index, rotated", ring=bits))
    return h, c  # index = v exactly where rho = c - v


TOGETHER = 8  # small numbers that are opened as one word


def apart(words: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """Split words of `TOGETHER` numbers of so many bits, the lowest first: (*s, words) -> (*s, n) int64."""
    split = words.to(torch.int64).unsqueeze(-1) >> (torch.arange(TOGETHER) * bits)
    return (split & ((1 << bits) - 1)).flatten(-2)[..., :n]


def words_for(shape: Shape) -> Shape:
    """Return the shape of the words that numbers of this one are joined to."""
    return (*shape[:-1], -(-shape[-1] // TOGETHER))


def lookup(side: Side, index: torch.Tensor, table: torch.Tensor) -> Program[torch.Tensor]:
    """Compute shares of table[index mod N]: (*s) -> (*s). table: (N,) public integers, N a power of two."""
    hot = yield from one_hot_of(side, index, table.shape[0])
    return (hot * side.public(table)).sum(-1)

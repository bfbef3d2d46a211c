"""Correlated randomness that several protocols use, described by public shapes.

A request lists random parts, expanded by each party from its own key stream, and derived parts,
which are functions of the random ones. The client's share of a derived part comes from its stream
too; the server's is sent by the dealer as a correction. Public parts (the correction words of key
trees) are sent to both. So only corrections travel (docs/design.md, section 9).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from mpcache.rank import Rank
from mpcache.runtime import deal_loops
from mpcache.runtime.program import NO_WORK, Part, Request, RequestKind, Shape, Work, products_of
from mpcache.runtime.ring import matmul
from mpcache.runtime.shares import MaskedOperand


def dealt(value: torch.Tensor | None) -> torch.Tensor:
    """Return a value that only the dealer has. Raises RuntimeError anywhere else."""
    if value is None:
        raise RuntimeError("only the dealer derives correlations")
    return value


def random_mask(shape: Shape, owner: Rank | None = None) -> Request:
    """Ask for shares of a uniform tensor, the mask of an operand."""
    return Request(RequestKind.MASK, (Part(shape, owner=owner),), (), lambda b: (), NO_WORK, keep=True)


def triple(a: Shape, b: Shape, out: Shape, op: Callable[..., torch.Tensor], ring: int = 64) -> Request:
    """Ask for a Beaver triple: a, b uniform and c = op(a, b) mod 2^ring, op torch.mul or a matrix product.

    Source: Beaver, CRYPTO 1991.
    """
    kind, depth = RequestKind.TRIPLE_MUL, 1
    if op.__name__ == "matmul":  # (*b, m, k) by (*b, k, n)
        kind, depth = RequestKind.TRIPLE_MATMUL, a[-1]
    work = products_of(math.prod(out) * depth)
    return Request(kind, (Part(a), Part(b)), (Part(out, ring=ring),), lambda x, y: (op(x, y),), work)


def square(shape: Shape) -> Request:
    """Ask for r uniform and r * r."""
    work = products_of(math.prod(shape))
    return Request(RequestKind.SQUARE, (Part(shape),), (Part(shape),), lambda r: (r * r,), work)


def binary_triple(a: Shape, b: Shape, out: Shape) -> Request:
    """Ask for XOR shares of a, b uniform and c = a & b."""
    random = Part(a, xor=True), Part(b, xor=True)
    return Request(RequestKind.AND, random, (Part(out, xor=True),), lambda x, y: (x & y,), NO_WORK)


def shared_bit(shape: Shape) -> Request:
    """Ask for a uniform bit in arithmetic shares and in XOR shares (of the lowest bit).

    CrypTen turns the sign bit of each comparison into arithmetic shares by it.
    """
    derived = Part(shape), Part(shape, xor=True)
    work = Work(comparisons=math.prod(shape))
    return Request(RequestKind.BIT, (Part(shape),), derived, lambda r: (r & 1, r & 1), work)


def masked_operand_product(
    x: Shape, w: MaskedOperand, out: Shape, owner: Rank | None = None, keep: bool = False, ring: int = 64
) -> Request:
    """Ask for a fresh mask a of x and c = a @ B modulo 2^ring, for an operand with the mask B."""
    return Request(
        RequestKind.MASKED_OPERAND,
        (Part(x, owner=owner),),
        (Part(out, ring=ring),),
        lambda a: (matmul(a, dealt(w.dealt)),),
        products_of(math.prod(out) * x[-1]),
        keep,
    )


def mask_parts(r: torch.Tensor, bits: int, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Split a truncation's mask r: rc = (r mod 2^(ring-1)) >> bits, and its top bit rb."""
    rc, rb = (np.empty(tuple(r.shape), np.int64) for _ in range(2))
    deal_loops.split_masks(r.contiguous().numpy().reshape(-1), bits, ring, rc.reshape(-1), rb.reshape(-1))
    return torch.from_numpy(rc), torch.from_numpy(rb)


def mask_ring(bits: int, ring: int) -> tuple[int, int]:
    """Return how many bits of `mask_parts` count in a result modulo 2^64: rc's, and rb's.

    rb comes times 2^(ring-1-bits).
    """
    return 64, 64 - (ring - 1 - bits)

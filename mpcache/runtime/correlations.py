"""Correlated randomness: what the dealer makes, described by public shapes (PROTOCOLS 7).

A request lists random parts, expanded by each party from its own key stream, and derived parts,
which are functions of the random ones. The client's share of a derived part comes from its stream
too; the server's is sent by the dealer as a correction. Public parts (the correction words of key
trees) are sent to both. So only corrections travel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mpcache.rank import Rank
from mpcache.runtime.ring import matmul
from mpcache.runtime.shares import MaskedOperand

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a correlation.

    dtype: int64 for Z_2^64, or a smaller signed type for a smaller ring.
    xor: its shares combine by XOR instead of addition.
    owner: known whole to this party, zero at the other (random parts only).
    own: each party has its own, unrelated value (random parts only; seeds).
    public: the same at both parties (derived parts only).
    """

    shape: Shape
    dtype: torch.dtype = torch.int64
    xor: bool = False
    owner: Rank | None = None
    own: bool = False
    public: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def spec(self) -> tuple[torch.dtype, Shape]:
        return self.dtype, self.shape

    def combine(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The value behind two shares; both values of an `own` part."""
        if self.own:
            return a, b
        return a ^ b if self.xor else a + b

    def correct(self, value: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """The share that makes `value` with the other party's share."""
        return value ^ other if self.xor else value - other


@dataclass(frozen=True)
class Request:
    """A correlation by public shapes; `derive` maps random values to derived ones at the dealer.

    keep: the dealer's program gets the random values too, to derive later correlations from them
    (a resident operand's mask, a selection's rotation).
    """

    kind: str
    random: tuple[Part, ...]
    derived: tuple[Part, ...]
    derive: Callable[..., Sequence[torch.Tensor]]
    keep: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.random + self.derived

    def sent_to(self, rank: Rank) -> list[Part]:
        """The derived parts that the dealer sends to one party."""
        return [p for p in self.derived if p.public or rank is Rank.SERVER]


def dealt(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise RuntimeError("only the dealer derives correlations")
    return value


def random_mask(shape: Shape, owner: Rank | None = None) -> Request:
    """Shares of a uniform tensor, for a resident operand."""
    return Request("mask", (Part(shape, owner=owner),), (), lambda b: (), keep=True)


def triple(a: Shape, b: Shape, out: Shape, op: Callable[..., torch.Tensor], kind: str) -> Request:
    """Beaver: a, b uniform and c = op(a, b)."""
    return Request(kind, (Part(a), Part(b)), (Part(out),), lambda x, y: (op(x, y),))


def square(shape: Shape) -> Request:
    """r uniform and r * r."""
    return Request("square", (Part(shape),), (Part(shape),), lambda r: (r * r,))


def binary_triple(a: Shape, b: Shape, out: Shape) -> Request:
    """XOR shares of a, b uniform and c = a & b."""
    return Request(
        "and",
        (Part(a, xor=True), Part(b, xor=True)),
        (Part(out, xor=True),),
        lambda x, y: (x & y,),
    )


def shared_bit(shape: Shape) -> Request:
    """A uniform bit in arithmetic shares and in XOR shares (of the lowest bit)."""
    return Request(
        "bit",
        (Part(shape),),
        (Part(shape), Part(shape, xor=True)),
        lambda r: (r & 1, r & 1),
    )


def masked_operand_product(
    x: Shape, w: MaskedOperand, out: Shape, owner: Rank | None = None, keep: bool = False
) -> Request:
    """A fresh mask a for x and c = a @ B for a resident operand with mask B (PROTOCOLS 1)."""
    return Request(
        "resident",
        (Part(x, owner=owner),),
        (Part(out),),
        lambda a: (matmul(a, dealt(w.dealt)),),
        keep,
    )


def mask_parts(r: torch.Tensor, bits: int, ring: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a truncation's mask r: rc = (r mod 2^(ring-1)) >> bits and its top bit rb (PROTOCOLS 2)."""
    return (r & ((1 << (ring - 1)) - 1)) >> bits, (r >> (ring - 1)) & 1


def truncation(shape: Shape, bits: int, ring: int = 64) -> Request:
    """r uniform, with rc and rb."""

    def derive(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mask_parts(r, bits, ring)

    return Request("truncation", (Part(shape),), (Part(shape), Part(shape)), derive)

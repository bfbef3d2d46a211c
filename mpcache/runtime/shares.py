"""What one party holds of a secret: shares, and masked operands.

A secret x in fixed point with `bits` fraction bits is x_raw = round(x * 2^bits) in Z_2^64, held as
additive shares x_raw = s0 + s1 (int64 tensors; wrapping is the ring's own arithmetic). A party
never sees more than its own share. At the dealer and in the cost reading the same objects hold
meta tensors: shapes without values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from mpcache.errors import Reuse
from mpcache.rank import Rank
from mpcache.runtime.meta import MetaTensor
from mpcache.runtime.ring import Matrix, RemoteMatrix


@dataclass(frozen=True)
class Share:
    """One party's share of a tensor. Local operations only; no truth value, no equality.

    data: int64, this party's share; of a matrix that is only prepared, its owner's `Matrix`.
    bits: fraction bits.
    owner: a party that knows the whole secret; its share is the secret and the other's is zero.
    ring: the shares add up to the secret modulo 2^ring only; what lies above is noise. Values that
    are known to be small are computed in a small ring, whose openings are shorter, and come back to
    2^64 with the next truncation.
    """

    data: Any  # torch.Tensor, or a MetaTensor where there are only shapes
    bits: int
    owner: Rank | None = None
    ring: int = 64

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def __bool__(self) -> NoReturn:
        raise TypeError("a share has no truth value: secrets never steer control flow")

    def _local(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> Share:
        return Share(fn(self.data), self.bits, self.owner, self.ring)

    def __add__(self, other: Share) -> Share:
        if self.bits != other.bits:
            raise ValueError(f"adding shares with {self.bits} and {other.bits} fraction bits")
        owner = self.owner if self.owner == other.owner else None
        return Share(self.data + other.data, self.bits, owner, min(self.ring, other.ring))

    def __neg__(self) -> Share:
        return self._local(torch.neg)

    def __sub__(self, other: Share) -> Share:
        return self + (-other)

    def __mul__(self, factor: int | torch.Tensor) -> Share:
        """Multiply by public integers."""
        if isinstance(factor, torch.Tensor):
            if factor.is_floating_point():
                raise TypeError("multiply a share by integers; fixed-point factors change `bits`")
            factor = factor if isinstance(self.data, MetaTensor) else factor.to(self.data.device)
        return self._local(lambda x: x * factor)

    def __getitem__(self, index: Any) -> Share:
        return self._local(lambda x: x[index])

    def reshape(self, *shape: int) -> Share:
        return self._local(lambda x: x.reshape(*shape))

    def transpose(self, a: int, b: int) -> Share:
        return self._local(lambda x: x.transpose(a, b))

    def sum(self, dim: int, keepdim: bool = False) -> Share:
        return self._local(lambda x: x.sum(dim, keepdim=keepdim))

    def expand(self, *shape: int) -> Share:
        return self._local(lambda x: x.expand(*shape))


def zeros(shape: Sequence[int]) -> torch.Tensor:
    """Return zeros that take no memory: a share of what the other party knows. Not to be written to."""
    return torch.zeros((), dtype=torch.int64).expand(tuple(shape))


def known_rows(x: Share) -> int:
    """Return how many rows of an operand made of x are the server's own (`MaskedOperand.known`)."""
    return x.shape[-2] if x.owner is Rank.SERVER and len(x.shape) > 1 else 0


def is_known_matrix(x: Share) -> bool:
    """Return whether x is prepared as a `KnownOperand`: a weight. What has more dimensions may grow."""
    return x.owner is not None and len(x.shape) == 2


def cat(parts: Sequence[Share], dim: int) -> Share:
    """Concatenate shares with equal fraction bits."""
    if len({p.bits for p in parts}) != 1:
        raise ValueError("concatenating shares with different fraction bits")
    return Share(torch.cat([p.data for p in parts], dim), parts[0].bits, ring=min(p.ring for p in parts))


@dataclass(frozen=True)
class MaskedOperand:
    """A secret tensor W that is used again and again: opened once as V = W - B.

    docs/protocols.md, section 4, says why the mask may stay.
    mask: this party's share of B.  opened: V, public to both computing parties; `Awaited` until the
    round that opens it is over.  dealt: B itself, at the dealer only. All three have W's shape.
    ring: V, and so every product with it, is known modulo 2^ring only.
    known: so many rows, the first of each matrix, are the server's own: B is its share of the mask, alone.
    """

    mask: torch.Tensor
    opened: Any  # torch.Tensor or Awaited
    bits: int
    dealt: torch.Tensor | None = None
    ring: int = 64
    known: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.mask.shape)

    @property
    def public(self) -> torch.Tensor:
        """The opened V, once it is there. Raises RuntimeError before."""
        value: torch.Tensor = self.opened.value if isinstance(self.opened, Awaited) else self.opened
        return value

    def _local(self, fn: Callable[[torch.Tensor], torch.Tensor]) -> MaskedOperand:
        dealt = None if self.dealt is None else fn(self.dealt)
        return MaskedOperand(fn(self.mask), awaiting(fn, self), self.bits, dealt, self.ring)

    def __getitem__(self, index: Any) -> MaskedOperand:
        return self._local(lambda x: x[index])

    def reshape(self, *shape: int) -> MaskedOperand:
        return self._local(lambda x: x.reshape(*shape))

    def transpose(self, a: int, b: int) -> MaskedOperand:
        return self._local(lambda x: x.transpose(a, b))

    def append(self, other: MaskedOperand, dim: int) -> MaskedOperand:
        """Concatenate: both keep the masks they were opened with."""
        if self.bits != other.bits:
            raise ValueError("appending operands with different fraction bits")
        dealt = None
        if self.dealt is not None and other.dealt is not None:
            dealt = torch.cat([self.dealt, other.dealt], dim)
        return MaskedOperand(
            torch.cat([self.mask, other.mask], dim),
            awaiting(lambda *parts: torch.cat(parts, dim), self, other),
            self.bits,
            dealt,
            min(self.ring, other.ring),
            self._known_with(other, dim),
        )

    def _known_with(self, other: MaskedOperand, dim: int) -> int:
        rows = len(self.shape) - 2
        if dim != rows:
            return 0
        return self.known + (other.known if self.known == self.shape[rows] else 0)


@dataclass(frozen=True)
class KnownOperand:
    """A matrix W of one party's own, opened once as V = W - B; each party holds a part of it.

    held: W itself at its owner (a `Matrix`), V at the other computing party; shapes alone at the dealer.
    dealt: B, at the dealer only.  ring: products with it are known modulo 2^ring only.
    name, number: of a standing matrix, whose masks outlive the session: its own among them all.
    """

    held: Any  # Matrix or `Blocks`: rows that are made when a product needs them
    owner: Rank
    bits: int
    ring: int = 64
    dealt: Matrix | RemoteMatrix | None = None
    name: str = ""
    number: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.held.shape)


class Awaited:
    """What an opening that is under way brings, or what is to be made of it."""

    def __init__(self, make: Callable[[], torch.Tensor] | None = None) -> None:
        self._make = make
        self._value: torch.Tensor | None = None
        self._begun = False

    @property
    def value(self) -> torch.Tensor:
        if self._value is None:
            if self._make is None:
                raise RuntimeError("an operand is used before the round that opens it is over")
            self._value = self._make()
        return self._value

    def begin(self) -> None:
        """Take note that the opening begins. Raises Reuse if it has before."""
        if self._begun:
            raise Reuse("an operand's mask is used already; each operand is opened once")
        self._begun = True

    def bring(self, value: torch.Tensor) -> None:
        self._value = value


def awaiting(fn: Callable[..., torch.Tensor], *operands: MaskedOperand) -> torch.Tensor | Awaited:
    """Apply fn to what operands open to; later, if one is not there yet."""
    if any(isinstance(w.opened, Awaited) for w in operands):
        return Awaited(lambda: fn(*(w.public for w in operands)))
    return fn(*(w.opened for w in operands))


def encode(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Turn real numbers into fixed point, rounded to nearest; integers exactly."""
    if not x.is_floating_point():
        return x.to(torch.int64) << bits
    return torch.round(x.double() * 2**bits).to(torch.int64)


def centred(raw: torch.Tensor, ring: int) -> torch.Tensor:
    """Take integers modulo 2^ring as the numbers nearest to zero."""
    above = 64 - ring
    return (raw << above) >> above


def decode(raw: torch.Tensor, bits: int) -> torch.Tensor:
    """Turn fixed point into real numbers (float64)."""
    real: torch.Tensor = raw.double() / 2**bits
    return real

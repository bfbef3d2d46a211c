"""Which side of the protocols this is: the one place where the two computing parties differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.rank import Rank
from mpcache.runtime.guard import Guard


@dataclass(frozen=True)
class Side:
    """One of the two computing parties.

    rank: server or client (either, where only shapes are read).  device: cpu, or meta where values are
    `MetaTensor`s.  guard: what this party saw of values in and out of their ranges.
    """

    rank: Rank
    device: str = "cpu"
    guard: Guard = field(default_factory=Guard, compare=False, repr=False)

    @property
    def number(self) -> int:
        """The party's number in key trees: 0 or 1."""
        return int(self.rank)

    def first(self, x: torch.Tensor) -> torch.Tensor:
        """Share a public summand: the server adds it, the client adds zero."""
        return x if self.rank is Rank.SERVER else torch.zeros_like(x)

    def public(self, values: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Make public integers a tensor that combines with this side's shares."""
        return torch.as_tensor(values, dtype=torch.int64)

    def constant(self, value: int, like: torch.Tensor) -> torch.Tensor:
        """Share one public integer everywhere."""
        return self.first(torch.full_like(like, value))

    def plus(self, x: torch.Tensor, public: int | torch.Tensor) -> torch.Tensor:
        """Add what both parties know, one integer or a tensor, to shares: the server adds it."""
        return x + public if self.rank is Rank.SERVER else x

    def watch(self, x: Any, ring: int = 64) -> None:
        """Note shares that add up to zero modulo 2^ring if a value was in range. No message."""
        if not x.is_meta:
            mine = x.numpy() if self.rank is Rank.SERVER else -x.numpy()
            self.guard.note(mine & ((1 << ring) - 1) if ring < 64 else mine)

    def watch_bits(self, x: Any) -> None:
        """Note XOR shares of bits that are zero if a value was in range. No message."""
        if not x.is_meta:
            self.guard.note(x.numpy())


def drop_low_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Divide by 2^bits into the ring of 2^(64-bits), each party alone, no message.

    floor(x / 2^bits) - {0, 1} modulo 2^(64-bits): without wrap errors as long as what follows uses
    no more than 64 - bits of the result's bits.
    """
    return x >> bits if bits > 0 else x << -bits


def bytes_for(bits: int) -> int:
    """Return the bytes that hold so many bits: what an opening modulo 2^bits sends per element."""
    return -(-bits // 8)

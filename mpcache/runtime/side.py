"""Which side of the protocols this is: the one place where the two computing parties differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mpcache.rank import Rank


@dataclass(frozen=True)
class Side:
    """One of the two computing parties.

    rank: server or client (either, where only shapes are read).  device: cpu, or meta where values are
    `MetaTensor`s.
    """

    rank: Rank
    device: str = "cpu"

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


def drop_low_bits(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Divide by 2^bits into the ring of 2^(64-bits), each party alone, no message.

    floor(x / 2^bits) - {0, 1} modulo 2^(64-bits): without wrap errors as long as what follows uses
    no more than 64 - bits of the result's bits.
    """
    return x >> bits if bits > 0 else x << -bits


def bytes_for(bits: int) -> int:
    """Return the bytes that hold so many bits: what an opening modulo 2^bits sends per element."""
    return -(-bits // 8)

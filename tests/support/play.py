"""Runs one program at both computing parties and the dealer, in three threads of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mpcache.engines.threads import Job, run_threads
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.runtime.shares import Share, centred, decode


@dataclass
class Played:
    """What the server, the client and the dealer returned, and their ledgers."""

    server: Any
    client: Any
    dealer: Any
    ledgers: dict[Rank, Ledger]

    def value(self) -> torch.Tensor:
        """The secret behind a returned Share (float64)."""
        return reconstruct(self.server, self.client)


def reconstruct(server: Share, client: Share) -> torch.Tensor:
    """What is behind two shares, as a number of their ring."""
    assert server.bits == client.bits and server.shape == client.shape
    return decode(centred(server.data + client.data, server.ring), server.bits)


def play(program: Job, protocol: str = "fast", bits: int = 16) -> Played:
    """`program(ops, party, rank)` runs at each of the three; the dealer's ops hold shapes only."""
    played = run_threads(program, protocol, bits)
    server, client, dealer = (played[rank][0] for rank in Rank)
    return Played(server, client, dealer, {rank: ledger for rank, (_, ledger) in played.items()})

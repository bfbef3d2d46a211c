"""Runs one program at both computing parties and the dealer, in three threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.cost import PROTOCOLS
from mpcache.ledger import Ledger
from mpcache.local_link import local_pair
from mpcache.ops import Ops
from mpcache.rank import Rank
from mpcache.secure.party import ComputingParty, DealerParty, Party
from mpcache.secure.rng import fresh_seed
from mpcache.secure.shares import Share


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
    assert server.bits == client.bits and server.shape == client.shape
    return (server.data + client.data).double() / 2**server.bits


def play(program: Callable[[Ops, Party, Rank], Any], protocol: str = "fast", bits: int = 16) -> Played:
    """`program(ops, party, rank)` runs at each of the three; the dealer's ops hold shapes only."""
    ledgers = {rank: Ledger() for rank in Rank}
    server_peer, client_peer = local_pair(ledgers[Rank.SERVER], ledgers[Rank.CLIENT])
    server_tape, dealer_server = local_pair(
        ledgers[Rank.SERVER], ledgers[Rank.DEALER], Rank.SERVER, Rank.DEALER
    )
    client_tape, dealer_client = local_pair(
        ledgers[Rank.CLIENT], ledgers[Rank.DEALER], Rank.CLIENT, Rank.DEALER
    )
    seeds = {Rank.SERVER: fresh_seed(), Rank.CLIENT: fresh_seed()}
    one, two = fresh_seed(), fresh_seed()
    parties: dict[Rank, Party] = {
        Rank.SERVER: ComputingParty(
            Rank.SERVER, server_peer, server_tape, seeds[Rank.SERVER],
            {"prev": one, "next": two}, fresh_seed(), ledgers[Rank.SERVER],
        ),
        Rank.CLIENT: ComputingParty(
            Rank.CLIENT, client_peer, client_tape, seeds[Rank.CLIENT],
            {"prev": two, "next": one}, fresh_seed(), ledgers[Rank.CLIENT],
        ),
        Rank.DEALER: DealerParty(
            {Rank.SERVER: dealer_server, Rank.CLIENT: dealer_client}, seeds, ledgers[Rank.DEALER]
        ),
    }  # fmt: skip
    results: dict[Rank, Any] = {}
    errors: list[BaseException] = []

    def body(rank: Rank) -> None:
        dealer = rank is Rank.DEALER
        cls = PROTOCOLS[protocol]
        ops = cls(Rank.SERVER if dealer else rank, bits, device="meta" if dealer else "cpu")
        try:
            results[rank] = program(ops, parties[rank], rank)
        except BaseException as error:
            errors.append(error)
            for link in (server_peer, client_peer, server_tape, client_tape, dealer_server, dealer_client):
                link.close(f"{rank.label}: {error!r}")

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in Rank]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Played(results[Rank.SERVER], results[Rank.CLIENT], results[Rank.DEALER], ledgers)

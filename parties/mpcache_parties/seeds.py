"""Deal, take and trade the seeds of a session, and time the waits for the dealer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, cast

import torch

from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty
from mpcache.runtime.rng import SEED_BYTES, fresh_seed
from mpcache.transport.link import Link, Links, bytes_of, tensor_of
from mpcache_parties.facts import Facts, tape_sizes
from mpcache_parties.operations.status import SessionStatus
from mpcache_parties.resources import SessionResources
from mpcache_parties.state.tapes import TapeLink

TAPE_SEED = "seeds/tape"  # the step's name


class TimedDealerLink:
    """A link to the dealer that adds up how long its reader waits, in ms."""

    def __init__(self, link: Link, status: SessionStatus) -> None:
        self._link, self._status, self.ms = link, status, 0.0
        self.tape = link if isinstance(link, TapeLink) else None

    def close(self) -> None:
        """End a tape; a dealer is told by its network."""
        if self.tape is not None:
            self.tape.close()

    def recv(self, *arguments: Any) -> list[torch.Tensor]:
        """Receive as the link does, and book the wait."""
        start = time.perf_counter()
        tensors = self._link.recv(*arguments)
        seconds = time.perf_counter() - start
        self.ms += 1000 * seconds
        self._status.waited(seconds)
        return tensors


def deal_seeds(links: Links, dealt: Mapping[Rank, bytes] | None = None) -> dict[Rank, bytes]:
    """Dealer: send each computing party the seed of its streams, and return them. dealt: else new ones."""
    seeds = dict(dealt) if dealt is not None else {rank: fresh_seed() for rank in links}
    for rank, seed in seeds.items():
        links[rank].send(TAPE_SEED, [tensor_of(seed)])
    return seeds


def receive_seed(dealer: Link) -> torch.Tensor:
    """Take the seed that the dealer sends, or that lies on a tape: (SEED_BYTES,) of bytes."""
    (seed,) = dealer.recv(TAPE_SEED, [(torch.uint8, (SEED_BYTES,))])
    return seed


def computing_party(
    me: Rank, resources: SessionResources, facts: Facts
) -> tuple[ComputingParty, TimedDealerLink]:
    """Take a seed from the dealer, or from a tape, and trade one with the peer: my `next` is its `prev`.

    The dealer's link is handed out, too: it knows how long this party has waited. Raises StateError where
    there is no tape that fits, or what a link raises.
    """
    links, peer = resources.links, resources.links[me.peer]
    dealer, name = links.get(Rank.DEALER), facts.session
    if resources.tapes is not None:
        public = resources.public
        dealer = resources.tapes.claim(links, tape_sizes(facts, public), facts.limit)
        name = dealer.batch  # what the dealer knew when it dealt
    assert dealer is not None
    tape = receive_seed(dealer)
    mine = fresh_seed()
    (theirs,) = peer.exchange("seeds/pair", [tensor_of(mine)])
    pair = {"next": mine, "prev": bytes_of(theirs)}
    wait = TimedDealerLink(dealer, resources.status)
    party = ComputingParty(
        me, peer, cast(Link, wait), name, bytes_of(tape), pair, fresh_seed(), resources.ledger,
        resources.status.at_step,
    )  # fmt: skip
    return party, wait

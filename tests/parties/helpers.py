"""What the tests of this folder share: addresses that are free now, and connected links."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from mpcache.config import Addresses, Settings, Timeouts
from mpcache.frames import FrameLink
from mpcache.ledger import Ledger
from mpcache.local_link import local_pair
from mpcache.rank import Rank
from parties.grpc_link import Network, connect_all


def free_settings(connect_s: float = 20, recv_s: float = 20, reconnect_s: float = 2) -> Settings:
    """Settings with two ports of this machine that nobody listens on."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        server, dealer = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    return Settings(
        addresses=Addresses(server=server, dealer=dealer),
        timeouts=Timeouts(connect_s=connect_s, recv_s=recv_s, reconnect_s=reconnect_s),
    )


@contextlib.contextmanager
def grpc_networks(settings: Settings, *ranks: Rank) -> Iterator[list[Network]]:
    """These parties, connected with each other, all in this process."""
    with ThreadPoolExecutor(len(ranks)) as pool:
        networks = list(pool.map(lambda rank: connect_all(rank, settings, Ledger(), peers=set(ranks)), ranks))
    try:
        yield networks
    finally:
        for network in networks:
            network.close("the test is over")


@contextlib.contextmanager
def linked(kind: str, a: Rank, b: Rank, recv_s: float = 20) -> Iterator[tuple[FrameLink, FrameLink]]:
    """The two ends of a link of this kind (local or grpc)."""
    if kind == "local":
        yield local_pair(Ledger(), Ledger(), a, b, recv_s)
        return
    with grpc_networks(free_settings(recv_s=recv_s), a, b) as (first, second):
        yield first[b], second[a]

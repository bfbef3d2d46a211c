"""What the tests of this folder share: addresses that are free now, and connected links."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

from mpcache.answer import plain_answer
from mpcache.config import Addresses, PublicConfig, Settings, Timeouts
from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.rank import Rank
from mpcache.sampling import Sampling
from mpcache.transport.frames import FrameLink
from mpcache.transport.local import local_pair
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network


def context_of(model: Model, n: int) -> list[int]:
    """A text of n tokens."""
    text = "and the number of the gate of the city is in the book " * 20
    return model.tokenizer.encode(text, bos=True)[:n]


def plain_ids(model: Model, public: PublicConfig, context: list[int], question: str) -> list[int]:
    """What the plain engine answers, greedily and to the full length."""
    asked = model.tokenizer.encode(question, bos=False)
    bound = bind_policy(model.shape, public, len(context), len(asked))
    return plain_answer(model, bound, context, asked, public.max_new_tokens, Sampling(), ()).ids


class Killed(Exception):
    """Stands for kill -9: nothing after it runs but what frees this process's threads."""


Job = Callable[[dict[Rank, FrameLink], Ledger], Any]


def together(jobs: Mapping[Rank, Job], timeout: float = 60) -> dict[Rank, Any]:
    """Parties as threads, linked with each other; what each ended with, be it a result, an error or
    Killed. One that fails closes its links, as a process does."""
    ledgers = {rank: Ledger() for rank in jobs}
    links: dict[Rank, dict[Rank, FrameLink]] = {rank: {} for rank in jobs}
    for a, b in combinations(sorted(jobs), 2):
        links[a][b], links[b][a] = local_pair(ledgers[a], ledgers[b], a, b, timeout=timeout)

    def body(rank: Rank) -> Any:
        reason = f"{rank.label} was killed"
        try:
            result = jobs[rank](links[rank], ledgers[rank])
            reason = ""
            return result
        except MpcacheError as error:
            reason = error.for_peers
            return error
        except Killed as error:
            return error
        finally:
            for link in links[rank].values():
                link.close(reason)

    with ThreadPoolExecutor(len(jobs)) as pool:
        return dict(zip(jobs, pool.map(body, jobs), strict=True))


def free_ports(n: int) -> list[int]:
    """Return n ports of this machine that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(n)]
        return [int(probe.getsockname()[1]) for probe in probes]


def free_settings(
    connect_s: float = 60, recv_s: float = 60, reconnect_s: float = 2, ports: Iterable[int] = ()
) -> Settings:
    """Settings with two ports that nobody listens on, the server's and the dealer's."""
    server, dealer = (f"127.0.0.1:{port}" for port in ports or free_ports(2))
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
        for end in (first[b], second[a]):
            end.widen()
        yield first[b], second[a]

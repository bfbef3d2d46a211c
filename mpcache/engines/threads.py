"""All three parties as threads of this process: the same programs and messages, over local links.

For tests, and for what a session between processes has no door for (`mpcache eval --secure` feeds the
right tokens and reads the logits). Nobody's secrets are kept from anybody here.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch

from mpcache.engines.registry import engine
from mpcache.ledger import Ledger
from mpcache.ops import AnyEngine
from mpcache.rank import Rank
from mpcache.runtime.party import ComputingParty, DealerParty, Party
from mpcache.runtime.rng import fresh_seed
from mpcache.transport.link import Link
from mpcache.transport.local import local_pair

Job = Callable[[AnyEngine, Party, Rank], Any]


def run_threads(job: Job, protocol: str = "fast", bits: int = 16) -> dict[Rank, tuple[Any, Ledger]]:
    """Run `job(ops, party, rank)` at each of the three: what each returned, and its ledger.

    The dealer's ops hold shapes only. Raises what the first one to fail raised; no thread outlives this call.
    """
    ledgers = {rank: Ledger() for rank in Rank}
    links: dict[Rank, dict[Rank, Link]] = {rank: {} for rank in Rank}
    for a, b in combinations(Rank, 2):
        links[a][b], links[b][a] = local_pair(ledgers[a], ledgers[b], a, b)
    tapes, pair = {rank: fresh_seed() for rank in (Rank.SERVER, Rank.CLIENT)}, (fresh_seed(), fresh_seed())
    name = secrets.token_hex(16)
    parties: dict[Rank, Party] = {
        Rank.DEALER: DealerParty(dict(links[Rank.DEALER]), name, tapes, ledgers[Rank.DEALER])
    }
    for rank, (one, two) in {Rank.SERVER: pair, Rank.CLIENT: pair[::-1]}.items():
        mine, seeds = links[rank], {"prev": one, "next": two}
        parties[rank] = ComputingParty(
            rank, mine[rank.peer], mine[Rank.DEALER], name, tapes[rank], seeds, fresh_seed(), ledgers[rank]
        )
    results: dict[Rank, Any] = {}
    errors: list[BaseException] = []

    def close(reason: str) -> None:
        for mine in links.values():
            for link in mine.values():
                link.close(reason)

    def body(rank: Rank) -> None:
        torch.set_num_threads(1)  # as each party does
        dealer = rank is Rank.DEALER
        ops = engine(protocol, Rank.SERVER if dealer else rank, bits, "meta" if dealer else "cpu")
        try:
            results[rank] = job(ops, parties[rank], rank)
        except BaseException as error:
            errors.append(error)
            close(f"{rank.label}: {error!r}")

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in Rank]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # told to stop
        close(str(error))
        for thread in threads:
            thread.join()
        raise
    if errors:
        raise errors[0]
    return {rank: (results[rank], ledgers[rank]) for rank in Rank}

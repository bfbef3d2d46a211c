"""A party as a process of its own, for test_grpc.py: it connects, does one thing, and says how it ended.

Usage: python -m tests.support.one_party RANK PEERS SERVER_ADDRESS DEALER_ADDRESS TASK
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from mpcache.config import Addresses, Settings, Timeouts
from mpcache.errors import MpcacheError
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import agree, confirm_facts
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network

ONE_PARTY = [sys.executable, "-m", "tests.support.one_party"]
STATUS = Path("/proc/self/status")  # of this process, on Linux
COMPUTE_S = 30.0
WORD = [(torch.int64, (1,))]


def hang(network: Network) -> None:
    """Wait for a word that never comes."""
    next(iter(network.links.values())).recv("hang", WORD)


def pass_round(network: Network) -> None:
    """Each link carries this party's rank there and the peer's back."""
    for peer, link in network.links.items():
        (theirs,) = link.exchange("round", [torch.tensor([int(network.rank)])])
        assert theirs.item() == int(peer)


def compute(network: Network) -> None:
    """Take nothing from the links, as one that computes, until a peer sends what is refused, or leaves."""
    limit = time.monotonic() + COMPUTE_S
    while network.failure is None and time.monotonic() < limit:
        if any(link.peer_left for link in network.links.values()):
            break
        time.sleep(0.02)
    hang(network)


def confirm_and_compute(network: Network) -> None:
    """Agree on the facts, of which there are none, and compute."""
    confirm_facts(network.links, network.rank, {})
    compute(network)


TASKS: dict[str, Callable[[Network], None]] = {
    "hang": hang, "compute": compute, "confirm": confirm_and_compute, "round": pass_round,
}  # fmt: skip


def main() -> int:
    rank, peers, server, dealer, task = sys.argv[1:]
    me = Rank(int(rank))
    timeouts = Timeouts(connect_s=30, recv_s=60, reconnect_s=2)
    settings = Settings(addresses=Addresses(server=server, dealer=dealer), timeouts=timeouts)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        others = {Rank(int(peer)) for peer in peers} - {me}
        if task == "vanish":
            connect_all(me, settings, Ledger(), say, peers=others)
            return 0  # without closing
        with connect_all(me, settings, Ledger(), say, peers=others) as network:
            agree(network.links, me, settings.public.flat())
            print("connected", flush=True)
            TASKS[task](network)
    except MpcacheError as error:
        say(str(error))
        if STATUS.exists():  # what rusage tells of a child can be its parent's size
            print(next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

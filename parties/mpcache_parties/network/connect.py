"""Connect a party with the others for one session, or tell them that it cannot take part.

The server and the dealer listen; the client dials both and the server dials the dealer, in any order
of start. The client names the session; a listener sorts what comes in by that name, so streams of
different sessions never meet.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from threading import Semaphore, Thread

import grpc

from mpcache.config import Settings
from mpcache.errors import Mismatch, MpcacheError
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import Greeting
from mpcache_parties.network.channels import CONNECT, DIAL_OPTIONS, caller_in, channel_options, dials
from mpcache_parties.network.grpc_server import start_server
from mpcache_parties.network.listener import Listener
from mpcache_parties.network.metadata import RANK_KEY, REASON_CHARACTERS, REASON_KEY, new_session
from mpcache_parties.network.session_network import Network
from mpcache_parties.network.tls import Trust
from mpcache_parties.say import Say, quiet

TELL_S = 3.0  # how long a party that cannot take part tries to reach the others


def connect_all(
    rank: Rank,
    settings: Settings,
    ledger: Ledger,
    say: Say = quiet,
    peers: Iterable[Rank] = Rank,
    trust: Trust | None = None,
    greeting: Greeting | None = None,
) -> Network:
    """Connect this party with the others (`peers`: both) for one session; they may come before or after.

    `say` gets a line about who is waited for, every few seconds. Without `trust` the connection
    is neither encrypted nor authenticated. Each peer that has come is greeted at once. Raises PortInUse,
    PeerTimeout (after `settings.timeouts.connect_s`), Mismatch, PeerLost or PeerFailed; everything is
    closed then.
    """
    network = open_network(rank, settings, ledger, say, peers, trust)
    try:
        network.wait(*([] if greeting is None else [greeting.look]))
    except BaseException as error:
        late = [peer for peer, link in network.links.items() if not link.connected.is_set()]
        network.__exit__(type(error), error, None)
        if isinstance(error, Mismatch):  # who has not come yet would wait for this party
            cannot_take_part(rank, settings, trust or Trust(), error.for_peers, late)
        raise
    return network


def open_network(
    rank: Rank,
    settings: Settings,
    ledger: Ledger,
    say: Say = quiet,
    peers: Iterable[Rank] = Rank,
    trust: Trust | None = None,
) -> Network:
    """Return a network for one session that listens already and has dialled nobody. Raises PortInUse."""
    network = Network(rank, settings, ledger, peers, trust, say=say)
    awaited = [peer for peer in network.links if not dials(rank, peer)]
    try:
        if awaited:
            listener = Listener(rank, settings, network, trust=trust, say=say)
            network.on_close.append(listener.close)
        if not awaited or (rank is Rank.SERVER and Rank.CLIENT not in awaited):
            network.session = new_session()
    except BaseException as error:
        network.__exit__(type(error), error, None)
        raise
    return network


def cannot_take_part(
    rank: Rank, settings: Settings, trust: Trust, reason: str, peers: Iterable[Rank] = Rank
) -> None:
    """Tell the parties that wait for this one, of these, as far as they can be reached within `TELL_S`."""
    reason, peers = reason[:REASON_CHARACTERS], list(peers)
    seconds = min(TELL_S, settings.timeouts.connect_s)
    to_come = {peer for peer in peers if dials(peer, rank)}
    came = Semaphore(0)

    def refuse(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        to_come.discard(caller_in(dict(context.invocation_metadata()), rank))
        came.release()
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"it cannot take part: {reason}")
        raise AssertionError  # abort raises

    def tell(peer: Rank) -> None:
        about = ((RANK_KEY, str(int(rank))), (REASON_KEY, reason.encode()))
        address = settings.addresses.of(peer)
        options = channel_options(rank, DIAL_OPTIONS)
        with suppress(grpc.RpcError), trust.open(peer, address, options) as channel:
            call = channel.stream_stream(CONNECT)
            next(call(iter(()), metadata=about, wait_for_ready=True, timeout=seconds), None)

    limit = time.monotonic() + seconds
    tellers = [Thread(target=tell, args=(peer,), daemon=True) for peer in peers if dials(rank, peer)]
    for teller in tellers:
        teller.start()
    with suppress(MpcacheError):
        server = start_server(rank, settings, refuse, 16, trust) if to_come else None
        while to_come and came.acquire(timeout=max(0.0, limit - time.monotonic())):
            pass
        if server is not None:
            server.stop(grace=0.5).wait(2.0)
    for teller in tellers:
        teller.join(max(0.0, limit - time.monotonic()))

"""Measure a round over GrpcLink beside a bare gRPC ping-pong, between two processes of this machine.

Four kinds of the same size take turns in one run, so that all meet the same noise:
  exchange   both send, both receive: one round, two one-way trips at once
  TLS        the same over mutual TLS
  there+back one sends, the other answers: two messages over the link, one after the other
  bare       the same as plain bytes through gRPC's own iterators, with no link around them
Each is timed in batches, in which every message waits for the one before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mpcache.certificates import Identity, make_identity
from mpcache.config import Addresses, Certificates, Settings
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.flow_control import largest_frame
from mpcache.transport.link import Link, Spec
from mpcache_parties.network.connect import connect_all
from mpcache_parties.network.session_network import Network
from mpcache_parties.network.tls import trust

import grpc  # isort: skip  # after the link, which quiets it

BATCH = 20
SIZES = {"8 B": 8, "4 kB": 4096, "64 kB": 65536, "1 MB": 1 << 20}
OPTIONS = [("grpc.max_receive_message_length", largest_frame(Rank.SERVER))]


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Answer every message with itself."""
    yield from requests


def settings_at(address: str, identities: Path | None) -> Settings:
    """Make the settings of a network at `address`; identities: the folder of both parties', for TLS."""
    pinned = (
        {}
        if identities is None
        else {rank.label: Identity.read(identities, rank).certificate.decode() for rank in Rank}
    )
    return Settings(addresses=Addresses(server=address), certificates=Certificates(**pinned))


def link_with(me: Rank, address: str, identities: Path | None) -> Network:
    """Connect party `me` to the other one, over TLS where there are identities."""
    settings = settings_at(address, identities)
    return connect_all(
        me, settings, Ledger(), peers=[me.peer], trust=trust(me, settings, identities, insecure=False)
    )


def other_side(address: str, tls_address: str, bare_address: str, identities: Path, rounds: int) -> None:
    """Serve: answer ping-pongs from a thread and take the server's part in every exchange."""
    bare = grpc.server(futures.ThreadPoolExecutor(1), options=OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    bare.add_insecure_port(bare_address)
    bare.start()
    with (
        link_with(Rank.SERVER, address, None) as plain,
        link_with(Rank.SERVER, tls_address, identities) as tls,
    ):
        for size in SIZES.values():
            for _ in range(rounds):
                take_turns(plain[Rank.CLIENT], tls[Rank.CLIENT], torch.zeros(size // 8, dtype=torch.int64))
        plain[Rank.CLIENT].recv("end", [])  # the bare pings go on a little longer
    bare.stop(0)


def take_turns(link: Link, tls: Link, tensor: torch.Tensor) -> None:
    """Take the server's part of one batch of each kind that uses a link."""
    specs = [(tensor.dtype, tuple(tensor.shape))]
    for each in (link, tls):
        for _ in range(BATCH + 1):
            each.exchange("exchange", [tensor])
    for _ in range(BATCH):
        link.send("back", link.recv("there", specs))


def milliseconds(call: Callable[[], object]) -> float:
    """Measure one call, on average over a batch."""
    begin = time.perf_counter()
    for _ in range(BATCH):
        call()
    return 1000 * (time.perf_counter() - begin) / BATCH


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="batches of each kind and size")
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(3)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        address, tls_address, bare_address = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for rank in Rank:
            make_identity(rank).write(folder)
        other = multiprocessing.get_context("spawn").Process(
            target=other_side, args=(address, tls_address, bare_address, folder, rounds), daemon=True
        )
        other.start()
        link = stack.enter_context(link_with(Rank.CLIENT, address, None))[Rank.SERVER]
        tls = stack.enter_context(link_with(Rank.CLIENT, tls_address, folder))[Rank.SERVER]
        with grpc.insecure_channel(bare_address, options=OPTIONS) as channel:
            pings: SimpleQueue[bytes | None] = SimpleQueue()
            pongs = channel.stream_stream("/bench/Echo")(iter(pings.get, None), wait_for_ready=True)

            def ping(data: bytes) -> None:
                pings.put(data)
                next(pongs)

            print(f"ms, median (10th..90th percentile) of {rounds} batches of {BATCH}; ratios to bare")
            heads = [f"{name:>21} {'ratio':>6}" for name in ("exchange", "TLS", "there+back")]
            print("  ".join([f"{'size':>6}", *heads, f"{'bare':>21}"]))
            for name, size in SIZES.items():
                data, tensor = os.urandom(size), torch.zeros(size // 8, dtype=torch.int64)
                specs = [(tensor.dtype, tuple(tensor.shape))]

                def exchange(tensor: torch.Tensor = tensor) -> None:
                    link.exchange("exchange", [tensor])

                def over_tls(tensor: torch.Tensor = tensor) -> None:
                    tls.exchange("exchange", [tensor])

                def there_and_back(tensor: torch.Tensor = tensor, specs: list[Spec] = specs) -> None:
                    link.send("there", [tensor])
                    link.recv("back", specs)

                calls: list[Callable[[], object]] = [exchange, over_tls, there_and_back, partial(ping, data)]
                times: list[list[float]] = [[], [], [], []]
                for _ in range(rounds):
                    for kind, call in zip(times, calls, strict=True):
                        if call in (exchange, over_tls):
                            call()  # both begin together
                        kind.append(milliseconds(call))
                *ours, bare = times
                middle = statistics.median(bare)
                cells = [f"{summary(kind)} {statistics.median(kind) / middle:6.2f}" for kind in ours]
                print("  ".join([f"{name:>6}", *cells, summary(bare)]))
            pings.put(None)
        link.send("end", [])
    other.join(10)


def summary(times: list[float]) -> str:
    """Return the median of times in ms, and their 10th and 90th percentile, as 21 characters."""
    low, *_, high = statistics.quantiles(times, n=10)
    return f"{statistics.median(times):.3f} ({low:.3f}..{high:.3f})".rjust(21)


if __name__ == "__main__":
    main()

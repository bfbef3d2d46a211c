"""What a round over GrpcLink costs beside a bare gRPC ping-pong, between two processes of this machine.

Three kinds of the same size take turns in one run, so that all meet the same noise:
  exchange   both send, both receive: one round, two one-way trips at once
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
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from functools import partial
from pathlib import Path
from queue import SimpleQueue

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from mpcache.config import Addresses, Settings
from mpcache.frames import FRAME_BYTES
from mpcache.ledger import Ledger
from mpcache.link import Link, Spec
from mpcache.rank import Rank
from parties.grpc_link import connect_all

import grpc  # isort: skip  # after the link, which quiets it

BATCH = 20
SIZES = {"8 B": 8, "4 kB": 4096, "64 kB": 65536, "1 MB": 1 << 20}
OPTIONS = [("grpc.max_receive_message_length", FRAME_BYTES), ("grpc.max_send_message_length", FRAME_BYTES)]


def echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    yield from requests


def other_side(address: str, bare_address: str, rounds: int) -> None:
    """The server: answers ping-pongs from a thread and takes its part in every exchange."""
    bare = grpc.server(futures.ThreadPoolExecutor(1), options=OPTIONS)
    handlers = {"Echo": grpc.stream_stream_rpc_method_handler(echo)}
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    bare.add_insecure_port(bare_address)
    bare.start()
    settings = Settings(addresses=Addresses(server=address))
    with connect_all(Rank.SERVER, settings, Ledger(), peers=[Rank.CLIENT]) as network:
        for size in SIZES.values():
            for _ in range(rounds):
                take_turns(network[Rank.CLIENT], torch.zeros(size // 8, dtype=torch.int64))
        network[Rank.CLIENT].recv("end", [])  # the bare pings go on a little longer
    bare.stop(0)


def take_turns(link: Link, tensor: torch.Tensor) -> None:
    """The server's part of one batch of each kind that uses the link."""
    specs = [(tensor.dtype, tuple(tensor.shape))]
    for _ in range(BATCH + 1):
        link.exchange("exchange", [tensor])
    for _ in range(BATCH):
        link.send("back", link.recv("there", specs))


def milliseconds(call: Callable[[], object]) -> float:
    """Of one call, on average over a batch."""
    begin = time.perf_counter()
    for _ in range(BATCH):
        call()
    return 1000 * (time.perf_counter() - begin) / BATCH


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="batches of each kind and size")
    rounds = parser.parse_args().rounds
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind(("127.0.0.1", 0))
        address, bare_address = (f"127.0.0.1:{probe.getsockname()[1]}" for probe in (one, two))
    other = multiprocessing.get_context("spawn").Process(
        target=other_side, args=(address, bare_address, rounds), daemon=True
    )
    other.start()
    settings = Settings(addresses=Addresses(server=address))
    with connect_all(Rank.CLIENT, settings, Ledger(), peers=[Rank.SERVER]) as network:
        link = network[Rank.SERVER]
        with grpc.insecure_channel(bare_address, options=OPTIONS) as channel:
            pings: SimpleQueue[bytes | None] = SimpleQueue()
            pongs = channel.stream_stream("/bench/Echo")(iter(pings.get, None), wait_for_ready=True)

            def ping(data: bytes) -> None:
                pings.put(data)
                next(pongs)

            print(f"ms, median (10th..90th percentile) of {rounds} batches of {BATCH}; ratios to bare")
            print(
                f"{'size':>6}  {'exchange':>21} {'ratio':>6}  {'there+back':>21} {'ratio':>6}  {'bare':>21}"
            )
            for name, size in SIZES.items():
                data, tensor = os.urandom(size), torch.zeros(size // 8, dtype=torch.int64)
                specs = [(tensor.dtype, tuple(tensor.shape))]

                def exchange(tensor: torch.Tensor = tensor) -> None:
                    link.exchange("exchange", [tensor])

                def there_and_back(tensor: torch.Tensor = tensor, specs: list[Spec] = specs) -> None:
                    link.send("there", [tensor])
                    link.recv("back", specs)

                calls: list[Callable[[], object]] = [exchange, there_and_back, partial(ping, data)]
                times: list[list[float]] = [[], [], []]
                for _ in range(rounds):
                    exchange()  # both begin together
                    for kind, call in zip(times, calls, strict=True):
                        kind.append(milliseconds(call))
                ours, back, bare = times
                middle = statistics.median(bare)
                ratios = [f"{statistics.median(kind) / middle:6.2f}" for kind in (ours, back)]
                print(f"{name:>6}  {summary(ours)} {ratios[0]}  {summary(back)} {ratios[1]}  {summary(bare)}")
            pings.put(None)
        link.send("end", [])
    other.join(10)


def summary(times: list[float]) -> str:
    low, *_, high = statistics.quantiles(times, n=10)
    return f"{statistics.median(times):.3f} ({low:.3f}..{high:.3f})".rjust(21)


if __name__ == "__main__":
    main()

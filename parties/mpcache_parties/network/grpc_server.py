"""Start gRPC's server at a party's address, and say why an address cannot be listened on."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from threading import Thread
from typing import Any

import grpc

from mpcache.config import Settings
from mpcache.errors import ConfigError, MpcacheError, PortInUse
from mpcache.rank import Rank
from mpcache.transport.address import HostPort
from mpcache_parties.network.channels import LISTEN_OPTIONS, SERVICE, channel_options
from mpcache_parties.network.tls import Trust

# From a caller's stream, frame by frame, to what it is sent.
Accept = Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]]


def start_server(
    rank: Rank,
    settings: Settings,
    accept: Accept,
    streams: int,
    trust: Trust,
) -> grpc.Server:
    """Listen at this rank's address for up to `streams` streams. Raises PortInUse or ConfigError."""
    address = settings.addresses.bound_by(rank)
    options = channel_options(rank, LISTEN_OPTIONS)
    server = grpc.server(_DaemonThreads(), options=options, maximum_concurrent_rpcs=streams)
    handler = grpc.stream_stream_rpc_method_handler(accept)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Connect": handler}),))
    try:
        trust.bind(server, address)
    except RuntimeError:
        raise bind_error(rank, address) or _in_use(rank, address) from None
    server.start()
    return server


def bind_error(rank: Rank, address: str) -> MpcacheError | None:
    """Say why this address cannot be listened on, as gRPC does not; None if it can."""
    place = HostPort.parse(address)
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _in_use(rank, address)
        what = f"{rank.label}: cannot listen on {address}: {error.strerror or error}"
        if error.errno == errno.EACCES:
            return ConfigError(f"{what}; give a port from 1024 with --listen HOST:PORT")
        if isinstance(error, socket.gaierror):
            return ConfigError(f"{what}; give an address of this machine with --listen HOST:PORT")
        everywhere = "[::]" if family is socket.AF_INET6 else "0.0.0.0"
        return ConfigError(
            f"{what}: it is no address of this machine; where others' calls to it are passed on to this one, "
            f"give --listen {everywhere}:{place.port}"
        )
    return None


def _in_use(rank: Rank, address: str) -> PortInUse:
    return PortInUse(
        f"{rank.label}: {address} is in use by another program, or by a {rank.label} that still runs; "
        f"end it, or change addresses.{rank.label} in every party's config (or --listen here)"
    )


class _DaemonThreads(futures.Executor):
    """A daemon thread per call: the standard pool's threads would be waited for at exit."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> futures.Future[Any]:
        future: futures.Future[Any] = futures.Future()

        def run() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        Thread(target=run, daemon=True).start()
        return future

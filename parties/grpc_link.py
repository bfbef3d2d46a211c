"""Links between processes: one bidirectional gRPC stream per pair of parties.

The server and the dealer listen; the client dials both and the server dials the dealer, in any order
of start. Per link one thread reads, so that the peer's end is noticed while this party computes, and
gRPC's own thread sends: an exchange overlaps both directions, and `send` never waits. A peer that dies
breaks its stream at once; one that stalls stops answering HTTP/2 pings. Either way every link of
this party fails, so that no one waits for a party that waits for the lost one.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before grpc is imported; errors are ours to tell

import atexit
import errno
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from types import TracebackType
from typing import Any

import grpc

from mpcache.config import Settings
from mpcache.errors import (
    ConfigError,
    LinkError,
    Mismatch,
    MpcacheError,
    PeerFailed,
    PeerLost,
    PeerTimeout,
    PortInUse,
)
from mpcache.frames import FRAME_BYTES, FrameLink
from mpcache.ledger import Ledger
from mpcache.network import shaper
from mpcache.rank import Rank
from parties.identity import Trust
from protos import party_pb2

logging.getLogger("grpc").addHandler(logging.NullHandler())
logging.getLogger("grpc").propagate = False

SERVICE = party_pb2.DESCRIPTOR.services_by_name["Party"].full_name
RANK_KEY = "mpcache-rank"  # metadata: who is at this end
SAY_EVERY_S = 5.0
LOOK_EVERY_S = 1.0
STRANGER = "it shows no pinned certificate over TLS, or does not take this one's; its own output says which"
ABORT_LINGER_S = 1.0  # for the reason to reach the peer
PING_EVERY_S = 5.0
PING_TIMEOUT_S = 15.0

OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", FRAME_BYTES),
    ("grpc.max_send_message_length", FRAME_BYTES),
    ("grpc.keepalive_time_ms", int(PING_EVERY_S * 1000)),
    ("grpc.keepalive_timeout_ms", int(PING_TIMEOUT_S * 1000)),
    ("grpc.http2.ping_timeout_ms", int(PING_TIMEOUT_S * 1000)),  # a minute by default, whatever is above
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_http_proxy", 0),  # a proxy between parties must be a decision, not an environment variable
]
DIAL_OPTIONS = [
    *OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),
]
LISTEN_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0)]  # else two parties could share a port unnoticed


class GrpcLink(FrameLink):
    """One end of a stream. `fail_all` tells the party's other links what happened to this one."""

    def __init__(
        self, me: Rank, peer: Rank, ledger: Ledger, timeout_s: float, fail_all: Callable[[LinkError], None]
    ) -> None:
        super().__init__(me, peer, ledger, timeout_s)
        self.connected = Event()
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()  # None ends the stream
        self._ended = Event()  # the reader has stopped
        self._fail_all = fail_all
        self.cancel: Callable[[], object] = lambda: None

    def _post(self, data: bytes) -> None:
        self._outbox.put(data)

    def outgoing(self) -> Iterator[bytes]:
        """What gRPC's sending thread takes from."""
        return iter(self._outbox.get, None)

    def attach(
        self, frames: Iterator[bytes], cancel: Callable[[], object], greet: Callable[[], None] = lambda: None
    ) -> None:
        """Start reading; `greet` runs first, on the reader's thread."""
        self.cancel = cancel
        Thread(target=self._read, args=(frames, greet), name=f"from-{self.peer.label}", daemon=True).start()

    def _read(self, frames: Iterator[bytes], greet: Callable[[], None]) -> None:
        error: LinkError | None
        try:
            greet()
            self.connected.set()
            error = self._lost() if all(map(self.arrived, frames)) else self._failure
        except Exception as broken:  # gRPC's server side raises bare exceptions
            error = self._translate(broken)
        if error is not None and not self._closed:
            self._fail_all(error)
        self._outbox.put(None)  # both directions end together
        self._ended.set()

    def _lost(self) -> PeerLost:
        peer = self.peer.label
        return PeerLost(f"lost {peer}: its process or the connection ended; see its own output")

    def _translate(self, broken: Exception) -> LinkError:
        code = broken.code() if isinstance(broken, grpc.RpcError) and hasattr(broken, "code") else None
        if code is grpc.StatusCode.FAILED_PRECONDITION:
            return PeerFailed(f"{self.peer.label} refused: {broken.details()}")  # type: ignore[attr-defined]
        if code is grpc.StatusCode.UNIMPLEMENTED:
            where = f"the address of {self.peer.label}"
            return Mismatch(f"Mismatch: what listens at {where} is not an mpcache party; check `addresses`")
        return self._lost()

    def close(self, reason: str = "") -> None:
        """Also waits for the peer to have taken everything: a short time when there is a reason."""
        if not self._closed:
            self.say_end(reason)
            self.finish(time.monotonic() + (ABORT_LINGER_S if reason else self.timeout_s))

    def say_end(self, reason: str) -> None:
        """First half of `close`: what was queued need not arrive before a reason."""
        if reason and not self._closed:
            try:
                while True:
                    self._outbox.get_nowait()
            except Empty:
                pass
        super().close(reason)

    def finish(self, deadline: float) -> None:
        """Second half of `close`: wait for the peer to end its side, until a monotonic time."""
        if self.connected.is_set():
            self._ended.wait(max(0.0, deadline - time.monotonic()))
        self._outbox.put(None)
        if not self._ended.is_set():
            self.cancel()


class Network:
    """A party's links, and what they stand on. As a context manager it closes with the error's text."""

    def __init__(
        self,
        rank: Rank,
        settings: Settings,
        ledger: Ledger,
        peers: Iterable[Rank] = Rank,
        trust: Trust | None = None,
    ) -> None:
        self.rank = rank
        self.settings = settings
        self.trust = trust or Trust()
        self.failure: LinkError | None = None
        self.links: dict[Rank, GrpcLink] = {
            peer: GrpcLink(rank, peer, ledger, settings.timeouts.recv_s, self._fail_all)
            for peer in peers
            if peer is not rank
        }
        for link in self.links.values():
            link.shaper = shaper(settings.public.network)
        self._server: grpc.Server | None = None
        self._channels: list[grpc.Channel] = []
        self._awaited = {peer for peer in self.links if not _dials(rank, peer)}
        self._lock = Lock()
        atexit.register(self.close, f"{rank.label} exited")

    def __getitem__(self, peer: Rank) -> GrpcLink:
        return self.links[peer]

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, MpcacheError):
            self.close(error.for_peers)
        else:  # a foreign error's text might hold anything: only its name leaves this party
            self.close(f"{self.rank.label} failed ({kind.__name__})" if kind else "")

    def close(self, reason: str = "") -> None:
        """End every link, then the server and the channels; bounded, and harmless to repeat."""
        atexit.unregister(self.close)
        for link in self.links.values():
            link.say_end(reason)
        deadline = time.monotonic() + (ABORT_LINGER_S if reason else self.settings.timeouts.recv_s)
        for link in self.links.values():
            link.finish(deadline)
        if self._server is not None:
            self._server.stop(grace=0.5).wait(2.0)
        for channel in self._channels:
            channel.close()

    def _fail_all(self, error: LinkError) -> None:
        if self.failure is None:
            self.failure = error
        for link in self.links.values():
            link.fail(error)

    def listen(self) -> None:
        """Accept the peers that dial this party. Raises PortInUse or ConfigError."""
        address = self.settings.addresses.of(self.rank)
        self._server = grpc.server(_Threads(), options=LISTEN_OPTIONS, maximum_concurrent_rpcs=16)
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        self._server.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler(SERVICE, {"Connect": handler}),)
        )
        try:
            self.trust.bind(self._server, address)
        except RuntimeError:
            raise _why_not(self.rank, address) from None
        self._server.start()

    def _accept(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        rank = dict(context.invocation_metadata()).get(RANK_KEY)
        with self._lock:
            peer = next((peer for peer in self._awaited if str(int(peer)) == rank), None)
            self._awaited.discard(peer)
        if peer is None:
            known = rank in {str(int(r)) for r in Rank}
            who = Rank(int(rank)).label if known and rank else "a caller without a rank"
            why = f"{self.rank.label} has one already, or needs none; does another session run there?"
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"{who} is not awaited: {why}")
        assert peer is not None  # abort raises
        if (refusal := self.trust.refusal(peer, context)) is not None:
            self._fail_all(Mismatch(f"Mismatch: refused {peer.label}: {refusal}"))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        context.send_initial_metadata(((RANK_KEY, str(int(self.rank))),))
        self.links[peer].attach(frames, context.cancel)
        return self.links[peer].outgoing()

    def dial(self, peer: Rank) -> None:
        """Start connecting to a peer that listens; it may come up later."""
        address = self.settings.addresses.of(peer)
        channel = self.trust.open(peer, address, DIAL_OPTIONS)
        self._channels.append(channel)
        link = self.links[peer]
        call = channel.stream_stream(f"/{SERVICE}/Connect")(
            link.outgoing(), metadata=((RANK_KEY, str(int(self.rank))),), wait_for_ready=True
        )

        def greet() -> None:
            rank = dict(call.initial_metadata() or ()).get(RANK_KEY)  # waits for the connection
            if rank is not None and rank != str(int(peer)):
                found = f"rank {rank} listens at {address}, where {self.rank.label} expects {peer.label}"
                self._fail_all(Mismatch(f"Mismatch: {found}; check `addresses` in the config"))
            if rank is None:  # refused or lost: let the stream say why
                next(call)

        link.attach(call, call.cancel, greet)

    def wait(self, say: Callable[[str], None]) -> None:
        """Until every peer is connected. Raises PeerTimeout, or what a link failed with."""
        start = time.monotonic()
        limit = self.settings.timeouts.connect_s
        next_word = 0.5  # a peer that comes at once is not worth a message
        next_look, stranger = 0.5, ""
        while True:
            missing = [link for link in self.links.values() if not link.connected.is_set()]
            if self.failure is not None:
                raise type(self.failure)(f"{self.rank.label}, connecting: {self.failure}")
            if not missing:
                return
            waited = time.monotonic() - start
            whom = " and ".join(f"{link.peer.label} {self._place(link.peer)}" for link in missing)
            if not stranger and self.trust.strangers():
                stranger = f"refused a caller at {self.settings.addresses.of(self.rank)}: {STRANGER}"
                say(f"{self.rank.label}: {stranger}")
            if waited >= limit:
                heard = f" ({stranger})" if stranger else ""
                raise PeerTimeout(
                    f"{self.rank.label}: gave up waiting for {whom} after {limit:g} s; start it, "
                    f"check `addresses` in the config, or raise timeouts.connect_s{heard}"
                )
            if waited >= next_look:
                self._look([link.peer for link in missing if _dials(self.rank, link.peer)])
                next_look = waited + LOOK_EVERY_S
            if waited >= next_word:
                say(f"{self.rank.label}: waiting for {whom} ...")
                next_word = waited + SAY_EVERY_S
            missing[0].connected.wait(min(0.05, limit - waited))

    def _look(self, peers: Iterable[Rank]) -> None:
        """At identities, where a connection does not come about. Raises Mismatch."""
        for peer in peers:
            if (why := self.trust.look(peer, self.settings.addresses.of(peer))) is not None:
                raise Mismatch(f"{self.rank.label}, connecting: Mismatch: {why}")

    def _place(self, peer: Rank) -> str:
        if _dials(self.rank, peer):
            return f"at {self.settings.addresses.of(peer)}"
        return f"to connect to {self.settings.addresses.of(self.rank)}"


def connect_all(
    rank: Rank,
    settings: Settings,
    ledger: Ledger,
    say: Callable[[str], None] = lambda text: None,
    peers: Iterable[Rank] = Rank,
    trust: Trust | None = None,
) -> Network:
    """Connect this party with the others (`peers`: both), which may come before or after it.

    `say` gets a line about who is waited for, every few seconds. Without `trust` the connection
    is neither encrypted nor authenticated. Raises PortInUse, PeerTimeout (after
    `settings.timeouts.connect_s`), Mismatch, PeerLost or PeerFailed; everything is closed then.
    """
    network = Network(rank, settings, ledger, peers, trust)
    try:
        if any(not _dials(rank, peer) for peer in network.links):
            network.listen()
        for peer in network.links:
            if _dials(rank, peer):
                network.dial(peer)
        network.wait(say)
    except BaseException as error:
        network.__exit__(type(error), error, None)
        raise
    return network


def _dials(rank: Rank, peer: Rank) -> bool:
    """Whether `rank` is the one that connects: the client to both, the server to the dealer."""
    return peer is Rank.DEALER or rank is Rank.CLIENT


def _why_not(rank: Rank, address: str) -> MpcacheError:
    """Why this address cannot be listened on: gRPC does not say, so ask the system."""
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(target)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            return ConfigError(f"{rank.label}: cannot listen on {address}: {error.strerror or error}")
    return PortInUse(
        f"{rank.label}: {address} is in use by another program, or by a {rank.label} that still runs; "
        f"end it, or change addresses.{rank.label} in every party's config"
    )


class _Threads(futures.Executor):
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

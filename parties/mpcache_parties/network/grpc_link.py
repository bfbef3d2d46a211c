"""The links of a session between processes: one gRPC stream per pair of parties.

The server and the dealer listen; the client dials both and the server dials the dealer, in any order
of start. The client names the session; a listener sorts what comes in by that name, so streams of
different sessions never meet. What a link does is in `mpcache_parties.network.stream`.
"""

from __future__ import annotations

import atexit
import errno
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Lock, Semaphore, Thread
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
    PeerTimeout,
    PortInUse,
)
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.flow_control import READ_AHEAD_BYTES, largest
from mpcache.transport.network import shaper
from mpcache_parties.network.liveness import Beacon, beacon_at
from mpcache_parties.network.stream import (
    ABORT_LINGER_S,
    RANK_KEY,
    RECEIVED_KEY,
    GrpcLink,
    Metadata,
    count_of,
)
from mpcache_parties.network.tls import Trust
from mpcache_protos import party_pb2

SERVICE = party_pb2.DESCRIPTOR.services_by_name["Party"].full_name
SESSION_KEY = "mpcache-session"  # metadata: which session a stream belongs to
REASON_KEY = "mpcache-reason-bin"  # metadata instead of a session: why this party cannot take part
REASON_CHARACTERS = 1000  # gRPC takes 8 KiB of metadata
BEACON_KEY = "mpcache-beacon"  # metadata: the port that tells that the caller's process lives
SESSION_BYTES = 16
SAY_EVERY_S = 5.0
LOOK_EVERY_S = 1.0
STRANGER = "it shows no pinned certificate over TLS, or does not take this one's; its own output says which"
PROBE_AFTER_S = 2.0  # of no connection: does something else listen there?
PROBE_S = 2.0
PING_EVERY_S = 5.0
PING_TIMEOUT_S = 15.0

Options = list[tuple[str, Any]]

OPTIONS: Options = [
    ("grpc.http2.bdp_probe", 0),  # else gRPC reads ahead as far as it likes, past every room
    ("grpc.http2.lookahead_bytes", READ_AHEAD_BYTES),
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


def options(me: Rank, channel: Options) -> Options:
    """These and what gRPC is to refuse before this party sees it."""
    return [*channel, ("grpc.max_receive_message_length", largest(me))]


Say = Callable[[str], None]


def new_session() -> str:
    """A session's name: 128 bits of the system's entropy, in hex. Who knows it may continue a link."""
    return secrets.token_hex(SESSION_BYTES)


class Network:
    """A party's links in one session. As a context manager it closes with the error's text.

    session: its name; None as long as the peer that names it has not come.
    """

    def __init__(
        self,
        rank: Rank,
        settings: Settings,
        ledger: Ledger,
        peers: Iterable[Rank] = Rank,
        trust: Trust | None = None,
        session: str | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self.rank = rank
        self.settings = settings
        self.trust = trust or Trust()
        self.session = session
        self.ledger = ledger
        self.failure: LinkError | None = None
        self.say = say
        self.links: dict[Rank, GrpcLink] = {
            peer: GrpcLink(rank, peer, ledger, settings.timeouts, self._fail_all, self._say)
            for peer in peers
            if peer is not rank
        }
        for link in self.links.values():
            link.shaper = shaper(settings.public.network)
        self.on_close: list[Callable[[], None]] = []
        self._channels: list[grpc.Channel] = []
        self._probed: set[Rank] = set()
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
        """End every link and what it stands on; bounded, and harmless to repeat."""
        atexit.unregister(self.close)
        for link in self.links.values():
            link.say_end(reason)
        deadline = time.monotonic() + (ABORT_LINGER_S if reason else self.settings.timeouts.recv_s)
        for link in self.links.values():
            link.finish(deadline)
        for channel in self._channels:
            channel.close()
        while self.on_close:
            self.on_close.pop()()

    def fail(self, error: LinkError) -> None:
        """From now on every call on every link raises this error. The first one wins."""
        self._fail_all(error)

    def _fail_all(self, error: LinkError) -> None:
        if self.failure is None:
            self.failure = error
        for link in self.links.values():
            link.fail(error)

    def _say(self, text: str) -> None:
        self.say(text)

    def dial(self, peer: Rank) -> None:
        """Start connecting to a peer that listens; it may come up later."""
        assert self.session is not None
        address = self.settings.addresses.of(peer)
        channel = self.trust.open(peer, address, options(self.rank, DIAL_OPTIONS))
        self._channels.append(channel)
        connect = channel.stream_stream(f"/{SERVICE}/Connect")
        about: Metadata = ((RANK_KEY, str(int(self.rank))), (SESSION_KEY, self.session))
        with suppress(OSError):  # without one the peer waits longer for a process that is gone
            beacon = Beacon(address)
            self.on_close.append(beacon.close)
            about = (*about, (BEACON_KEY, str(beacon.port)))

        def open_stream(frames: Iterator[bytes], metadata: Metadata) -> Any:
            # Who dials again wants to know each failure: the peer's process may be gone.
            return connect(frames, metadata=(*about, *metadata), wait_for_ready=not metadata)

        self.links[peer].dial(open_stream, address)

    def wait(self) -> None:
        """Dial, and wait until every peer is connected. Raises PeerTimeout, or what a link failed with."""
        start = time.monotonic()
        limit = self.settings.timeouts.connect_s
        next_word = 0.5  # a peer that comes at once is not worth a message
        next_look, stranger = 0.5, ""
        to_dial = [peer for peer in self.links if _dials(self.rank, peer)]
        while True:
            if self.session is not None:
                while to_dial:
                    self.dial(to_dial.pop())
            missing = [link for link in self.links.values() if not link.connected.is_set()]
            if self.failure is not None:
                raise type(self.failure)(f"{self.rank.label}, connecting: {self.failure}")
            if not missing:
                return
            waited = time.monotonic() - start
            whom = " and ".join(f"{link.peer.label} {self._place(link.peer)}" for link in missing)
            if not stranger and self.trust.strangers():
                stranger = f"refused a caller at {self.settings.addresses.of(self.rank)}: {STRANGER}"
                self.say(f"{self.rank.label}: {stranger}")
            if waited >= limit:
                heard = f" ({stranger})" if stranger else ""
                raise PeerTimeout(
                    f"{self.rank.label}: gave up waiting for {whom} after {limit:g} s; start it, "
                    f"check `addresses` in the config, or raise timeouts.connect_s{heard}"
                )
            if waited >= next_look:
                self._look([link.peer for link in missing if self._dialled(link.peer)])
                next_look = waited + LOOK_EVERY_S
            if waited >= next_word:
                self.say(f"{self.rank.label}: waiting for {whom} ...")
                next_word = waited + SAY_EVERY_S
            if waited >= PROBE_AFTER_S and not self.trust.tls:
                self._probe(link.peer for link in missing if self._dialled(link.peer))
            missing[0].connected.wait(min(0.05, limit - waited))

    def _dialled(self, peer: Rank) -> bool:
        return self.session is not None and _dials(self.rank, peer)

    def _look(self, peers: Iterable[Rank]) -> None:
        """At identities, where a connection does not come about. Raises Mismatch."""
        for peer in peers:
            if (why := self.trust.look(peer, self.settings.addresses.of(peer))) is not None:
                raise Mismatch(f"{self.rank.label}, connecting: Mismatch: {why}")

    def _probe(self, peers: Iterable[Rank]) -> None:
        """Once per peer: fail with a Mismatch if another kind of program listens at its address."""

        def probe(peer: Rank) -> None:
            address = self.settings.addresses.of(peer)
            if not self.links[peer].connected.is_set() and (what := _stranger_at(address)):
                who = f"what listens at {address} is not the {peer.label}: {what}"
                remedy = f"end it, or change addresses.{peer.label} in every party's config"
                if not self.links[peer].connected.is_set():
                    self._fail_all(Mismatch(f"Mismatch: {who}; {remedy}"))

        for peer in set(peers) - self._probed:
            self._probed.add(peer)
            Thread(target=probe, args=(peer,), daemon=True).start()

    def _place(self, peer: Rank) -> str:
        if _dials(self.rank, peer):
            return f"at {self.settings.addresses.of(peer)}"
        return f"to connect to {self.settings.addresses.of(self.rank)}"


class Listener:
    """Takes the streams of the peers that dial this party, and sorts them by session.

    first: the only network there will be, which the first stream names; without one, networks are made
    as sessions come, `limit` at once.
    """

    def __init__(
        self,
        rank: Rank,
        settings: Settings,
        first: Network | None = None,
        limit: int = 1,
        trust: Trust | None = None,
        say: Say = lambda text: None,
    ) -> None:
        """Raises PortInUse or ConfigError."""
        self.rank, self.settings, self.limit = rank, settings, limit
        self._trust, self._say = trust or Trust(), say
        self._first = first
        self._sessions: dict[str, Network] = {}
        self._new: SimpleQueue[Network] = SimpleQueue()
        self._lock = Lock()
        self._closed = False
        streams = 16 + 8 * limit  # two per session, new ones in place of broken ones, refusals
        self._server = _listen(rank, settings, self._accept, streams, self._trust)

    def next(self, seconds: float) -> Network | None:
        """The next session that has come; None after so long. Close it: its place is taken until then."""
        try:
            return self._new.get(timeout=seconds)
        except Empty:
            return None

    def refuse(self) -> None:
        """Take no new sessions from now on."""
        with self._lock:
            self._closed = True

    def close(self, reason: str = "") -> None:
        """Refuse what comes from now on, end the sessions that there are, and free the port."""
        self.refuse()
        with self._lock:
            networks = list(self._sessions.values())
        for link in (link for network in networks for link in network.links.values()):
            link.say_end(reason)  # all at once: `close` waits for each
        for network in networks:
            network.close(reason)
        self._server.stop(grace=0.5).wait(2.0)

    def _accept(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        about = dict(context.invocation_metadata())
        try:
            link = self._link_of(about, context)
            beacon = beacon_at(context.peer(), about.get(BEACON_KEY))
            return link.accept(frames, context, count_of(about.get(RECEIVED_KEY)), beacon)
        except LinkError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise AssertionError from None  # abort raises

    def _link_of(self, about: dict[str, Any], context: grpc.ServicerContext) -> GrpcLink:
        """The link that a stream with this metadata belongs to. Raises LinkError to refuse it."""
        me = self.rank.label
        peer = next((r for r in Rank if str(int(r)) == about.get(RANK_KEY) and _dials(r, self.rank)), None)
        who = peer.label if peer is not None else "a caller without a rank that dials here"
        if peer is not None and (refusal := self._trust.refusal(peer, context)) is not None:
            if self._first is not None:
                self._first.fail(Mismatch(f"Mismatch: refused {who}: {refusal}"))
            else:
                self._say(f"{me}: refused {who}: {refusal}")
            raise Mismatch(refusal)
        if peer is not None and self._first is not None and REASON_KEY in about:
            reason = about[REASON_KEY].decode(errors="replace")[:REASON_CHARACTERS]
            self._first.fail(PeerFailed(f"{who} cannot take part: {reason}"))
        session = about.get(SESSION_KEY)
        if not isinstance(session, str) or not re.fullmatch(r"[0-9a-f]{32}", session, re.ASCII):
            raise LinkError(f"{who} names no session; is it the same version?")
        received = count_of(about.get(RECEIVED_KEY))
        with self._lock:
            network = self._sessions.get(session)
            if network is None and received:
                why = f"it ended, or {me} was restarted"
                raise LinkError(f"{me} does not know the session {session[:8]}: {why}")
            if network is None and not self._closed and peer is not None:
                network = self._admit(session)
            link = network.links.get(peer) if network is not None and peer is not None else None
            if link is None or (link.connected.is_set() and RECEIVED_KEY not in about):
                why = f"{me} has one already, or needs none; does another session run there?"
                raise LinkError(f"{who} is not awaited: {why}")
            return link

    def _admit(self, session: str) -> Network | None:
        """A place for a new session; None if there was to be one only. Raises LinkError when it is full."""
        if self._first is not None:
            if self._sessions:
                return None
            network, network.session = self._first, session
        else:
            if len(self._sessions) >= self.limit:
                raise LinkError(
                    f"{self.rank.label} serves {self.limit} session{'s' * (self.limit > 1)} at once, and not "
                    "one more (--sessions there); try again later"
                )
            network = Network(self.rank, self.settings, Ledger(), trust=self._trust, session=session)
            network.on_close.append(lambda: self._forget(session))
            self._new.put(network)
        self._sessions[session] = network
        return network

    def _forget(self, session: str) -> None:
        with self._lock:
            self._sessions.pop(session, None)


def connect_all(
    rank: Rank,
    settings: Settings,
    ledger: Ledger,
    say: Say = lambda text: None,
    peers: Iterable[Rank] = Rank,
    trust: Trust | None = None,
) -> Network:
    """Connect this party with the others (`peers`: both) for one session; they may come before or after.

    `say` gets a line about who is waited for, every few seconds. Without `trust` the connection
    is neither encrypted nor authenticated. Raises PortInUse, PeerTimeout (after
    `settings.timeouts.connect_s`), Mismatch, PeerLost or PeerFailed; everything is closed then.
    """
    network = open_network(rank, settings, ledger, say, peers, trust)
    try:
        network.wait()
    except BaseException as error:
        network.__exit__(type(error), error, None)
        raise
    return network


def open_network(
    rank: Rank,
    settings: Settings,
    ledger: Ledger,
    say: Say = lambda text: None,
    peers: Iterable[Rank] = Rank,
    trust: Trust | None = None,
) -> Network:
    """A network for one session that listens already and has dialled nobody. Raises PortInUse."""
    network = Network(rank, settings, ledger, peers, trust, say=say)
    awaited = [peer for peer in network.links if not _dials(rank, peer)]
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


def cannot_take_part(rank: Rank, settings: Settings, trust: Trust, reason: str, seconds: float) -> None:
    """Tell the parties that wait for this one, as far as they can be reached within so many seconds."""
    reason = reason[:REASON_CHARACTERS]
    to_come = {peer for peer in Rank if _dials(peer, rank)}
    came = Semaphore(0)

    def refuse(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        who = dict(context.invocation_metadata()).get(RANK_KEY)
        peer = next((peer for peer in to_come if str(int(peer)) == who), None)
        to_come.discard(peer)  # type: ignore[arg-type]
        came.release()
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"it cannot take part: {reason}")
        raise AssertionError  # abort raises

    def tell(peer: Rank) -> None:
        about = ((RANK_KEY, str(int(rank))), (REASON_KEY, reason.encode()))
        address = settings.addresses.of(peer)
        with suppress(grpc.RpcError), trust.open(peer, address, options(rank, DIAL_OPTIONS)) as channel:
            call = channel.stream_stream(f"/{SERVICE}/Connect")
            next(call(iter(()), metadata=about, wait_for_ready=True, timeout=seconds), None)

    limit = time.monotonic() + seconds
    tellers = [Thread(target=tell, args=(peer,), daemon=True) for peer in Rank if _dials(rank, peer)]
    for teller in tellers:
        teller.start()
    with suppress(MpcacheError):
        server = _listen(rank, settings, refuse, 16, trust) if to_come else None
        while to_come and came.acquire(timeout=max(0.0, limit - time.monotonic())):
            pass
        if server is not None:
            server.stop(grace=0.5).wait(2.0)
    for teller in tellers:
        teller.join(max(0.0, limit - time.monotonic()))


def _listen(
    rank: Rank,
    settings: Settings,
    accept: Callable[[Iterator[bytes], grpc.ServicerContext], Iterator[bytes]],
    streams: int,
    trust: Trust,
) -> grpc.Server:
    """Listen at this rank's address for up to so many streams. Raises PortInUse or ConfigError."""
    address = settings.addresses.of(rank)
    server = grpc.server(_Threads(), options=options(rank, LISTEN_OPTIONS), maximum_concurrent_rpcs=streams)
    handler = grpc.stream_stream_rpc_method_handler(accept)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Connect": handler}),))
    try:
        trust.bind(server, address)
    except RuntimeError:
        raise _why_not(rank, address) from None
    server.start()
    return server


def _dials(rank: Rank, peer: Rank) -> bool:
    """Whether `rank` is the one that connects: the client to both, the server to the dealer."""
    return rank is not peer and (peer is Rank.DEALER or rank is Rank.CLIENT)


def _stranger_at(address: str) -> str | None:
    """What is wrong with the program that listens there; None if it speaks HTTP/2, or nobody listens."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), PROBE_S) as probe:
            probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            frame = probe.recv(9)
    except TimeoutError:
        return "it does not answer"
    except OSError:
        return None
    if not frame or frame[3:4] == b"\x04" or frame[:1] == b"\x15":  # SETTINGS, or an alert of TLS
        return None
    return "it does not speak gRPC"


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

"""Hold a party's links in one session: one gRPC stream per pair of parties.

What a link does is in `mpcache_parties.network.grpc_link`, who connects in which order in
`mpcache_parties.network.connect`.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Any

import grpc

from mpcache.config import Settings
from mpcache.errors import LinkError, Mismatch, MpcacheError, PeerTimeout
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.network import shaper
from mpcache_parties.network.channels import CONNECT, DIAL_OPTIONS, channel_options, dials
from mpcache_parties.network.grpc_link import ABORT_LINGER_S, GrpcLink
from mpcache_parties.network.liveness import Beacon
from mpcache_parties.network.metadata import BEACON_KEY, RANK_KEY, SESSION_KEY, Metadata
from mpcache_parties.network.probe import foreign_program_at
from mpcache_parties.network.tls import Trust
from mpcache_parties.say import Say, quiet

SAY_EVERY_S = 5.0
LOOK_EVERY_S = 1.0
STRANGER = "it shows no pinned certificate over TLS, or does not take this one's; its own output says which"
PROBE_AFTER_S = 2.0  # of no connection: does something else listen there?


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
        say: Say = quiet,
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
        channel = self.trust.open(peer, address, channel_options(self.rank, DIAL_OPTIONS))
        self._channels.append(channel)
        connect = channel.stream_stream(CONNECT)
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
        to_dial = [peer for peer in self.links if dials(self.rank, peer)]
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
        return self.session is not None and dials(self.rank, peer)

    def _look(self, peers: Iterable[Rank]) -> None:
        """Look at identities, where a connection does not come about. Raises Mismatch."""
        for peer in peers:
            if (why := self.trust.look(peer, self.settings.addresses.of(peer))) is not None:
                raise Mismatch(f"{self.rank.label}, connecting: Mismatch: {why}")

    def _probe(self, peers: Iterable[Rank]) -> None:
        """Once per peer: fail with a Mismatch if another kind of program listens at its address."""

        def probe(peer: Rank) -> None:
            address = self.settings.addresses.of(peer)
            if not self.links[peer].connected.is_set() and (what := foreign_program_at(address)):
                who = f"what listens at {address} is not the {peer.label}: {what}"
                remedy = f"end it, or change addresses.{peer.label} in every party's config"
                if not self.links[peer].connected.is_set():
                    self._fail_all(Mismatch(f"Mismatch: {who}; {remedy}"))

        for peer in set(peers) - self._probed:
            self._probed.add(peer)
            Thread(target=probe, args=(peer,), daemon=True).start()

    def _place(self, peer: Rank) -> str:
        if dials(self.rank, peer):
            return f"at {self.settings.addresses.of(peer)}"
        return f"to connect to {self.settings.addresses.of(self.rank)}"

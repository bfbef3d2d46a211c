"""Hold a party's links in one session: one gRPC stream per pair of parties.

What a link does is in `mpcache_parties.network.grpc_link`, who connects in which order in
`mpcache_parties.network.connect`.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from threading import Thread
from types import TracebackType
from typing import Any

import grpc

from mpcache.config import Settings
from mpcache.errors import LinkError, Mismatch, MpcacheError, PeerTimeout
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.link import Links
from mpcache.transport.network import shaper
from mpcache_parties.network.channels import CONNECT, DIAL_OPTIONS, channel_options, dials
from mpcache_parties.network.grpc_link import ABORT_LINGER_S, GrpcLink
from mpcache_parties.network.liveness import Beacon
from mpcache_parties.network.metadata import BEACON_KEY, RANK_KEY, SESSION_KEY, Metadata
from mpcache_parties.network.probe import foreign_program_at
from mpcache_parties.network.tls import Trust
from mpcache_parties.say import Say, quiet

GAVE_UP = "gave up waiting for"
NOT_YET = "no answer yet: its name is looked up, or a firewall is silent"
SAY_EVERY_S = 5.0
FIRST_LOOK_S, LOOK_EVERY_S = 0.3, 1.0
STRANGER = "it shows no pinned certificate over TLS, or does not take this one's; its own output says which"
PROBE_AFTER_S = 2.0  # of no connection: does something else listen there?


def _nothing(links: Links) -> None:
    """Do nothing with links that are there."""


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
            link.ahead = self._ahead
        self.on_close: list[Callable[[], None]] = []
        self._channels: list[grpc.Channel] = []
        self._probed: set[Rank] = set()
        self._reasons: dict[Rank, str] = {}  # why a peer that was dialled is not connected
        self._closed = False
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

    def _ahead(self) -> bool:
        """Tell whether a peer has much to take before it waits; a dealer sends to both at the same pace."""
        return any(link.sent.half_full for link in self.links.values())

    @property
    def ending(self) -> bool:
        """Whether it closes, or a peer has said its last word."""
        return self._closed or any(link.peer_left for link in self.links.values())

    def close(self, reason: str = "") -> None:
        """End every link and what it stands on; bounded, and harmless to repeat."""
        atexit.unregister(self.close)
        self._closed = True
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
        self._reasons[peer] = NOT_YET
        Thread(target=self._look, args=(peer, address), name=f"look-at-{peer.label}", daemon=True).start()

    def wait(self, look: Callable[[Links], None] = _nothing) -> None:
        """Dial, and wait until every peer is connected. Raises PeerTimeout, or what a link failed with.

        look: called again and again with the links that are there by now; may raise, too.
        """
        start = time.monotonic()
        limit = self.settings.timeouts.connect_s
        next_word = 0.5  # a peer that comes at once is not worth a message
        stranger = ""
        to_dial = [peer for peer in self.links if dials(self.rank, peer)]
        while True:
            if self.session is not None:
                while to_dial:
                    self.dial(to_dial.pop())
            missing = [peer for peer, link in self.links.items() if not link.connected.is_set()]
            if self.failure is not None:
                raise self._failed(self.failure, missing)
            look({peer: link for peer, link in self.links.items() if peer not in missing})
            if not missing:
                return
            waited = time.monotonic() - start
            if not stranger and self.trust.strangers():
                where = self.settings.addresses.bound_by(self.rank)
                stranger = f"refused a caller at {where}: {STRANGER}"
                self.say(f"{self.rank.label}: {stranger}")
            if waited >= limit:
                heard = f" ({stranger})" if stranger else ""
                raise PeerTimeout(
                    f"{self.rank.label}: {GAVE_UP} {self._whom(missing)} after {limit:g} s; start it, "
                    f"check `addresses` in the config, or raise timeouts.connect_s{heard}"
                )
            if waited >= next_word:
                self.say(f"{self.rank.label}: waiting for {self._whom(missing)} ...")
                next_word = waited + SAY_EVERY_S
            if waited >= PROBE_AFTER_S and not self.trust.tls:
                self._probe(peer for peer in missing if peer in self._reasons)
            self.links[missing[0]].connected.wait(min(0.05, limit - waited))

    def _whom(self, missing: Sequence[Rank]) -> str:
        """Say who is waited for, and why each that was dialled is not there.

        A peer that is dialled later, or dials later, is healthy as far as anyone knows.
        """
        first = [peer for peer in missing if peer in self._reasons or not dials(self.rank, peer)]
        if self.rank is Rank.DEALER and Rank.CLIENT in first:
            first = [Rank.CLIENT]  # the server dials once the client has reached it
        if self.rank is Rank.DEALER and first == [Rank.SERVER] and Rank.CLIENT in self.links:
            return f"server {self._place(Rank.SERVER)} (it does when the client has reached it)"
        return " and ".join(f"{peer.label} {self._place(peer)}" for peer in first)

    def _failed(self, failure: LinkError, missing: Sequence[Rank]) -> LinkError:
        """Return the failure of a link; another's wait that was in vain stands behind a link missing here."""
        own = [peer for peer in missing if peer in self._reasons]
        if GAVE_UP in str(failure) and own:
            return PeerTimeout(f"{self.rank.label}: no connection to {self._whom(own)}; {failure}")
        return type(failure)(f"{self.rank.label}, connecting: {failure}")

    def _look(self, peer: Rank, address: str) -> None:
        """Learn why a connection does not come about, until it does. Fails with a Mismatch of identities."""
        link, pause = self.links[peer], FIRST_LOOK_S
        while not link.connected.wait(pause) and not self._closed and self.failure is None:
            pause = LOOK_EVERY_S
            found = self.trust.look(peer, address)
            if link.connected.is_set() or self._closed:
                return
            self._reasons[peer] = found.reason or self._reasons[peer]
            if found.mismatch is not None:
                self._fail_all(Mismatch(f"Mismatch: {found.mismatch}"))

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
        addresses = self.settings.addresses
        if dials(self.rank, peer):
            return f"at {addresses.of(peer)} ({self._reasons.get(peer, NOT_YET)})"
        own, bound = addresses.of(self.rank), addresses.bound_by(self.rank)
        return f"to connect to {own}" + (f" (listening at {bound})" if bound != own else "")

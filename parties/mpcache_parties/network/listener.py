"""Listen for the peers that dial this party, and sort their streams by session."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from threading import Condition
from typing import Any

import grpc

from mpcache.config import Settings
from mpcache.errors import LinkError, Mismatch, PeerFailed
from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache_parties.handshake import PROTOCOL_VERSION
from mpcache_parties.network.channels import caller_in
from mpcache_parties.network.grpc_link import GrpcLink
from mpcache_parties.network.grpc_server import start_server
from mpcache_parties.network.liveness import beacon_at
from mpcache_parties.network.metadata import (
    BEACON_KEY,
    CHECK_KEY,
    RANK_KEY,
    REASON_CHARACTERS,
    REASON_KEY,
    RECEIVED_KEY,
    SESSION_KEY,
    count_of,
)
from mpcache_parties.network.session_network import STRANGER, Network
from mpcache_parties.network.tls import Trust
from mpcache_parties.say import Say, quiet

PLACE_S = 6.0  # that a new session waits for the place of one that ends: its links may linger
QUIET_S = 1.0  # after a line about a refused caller
STRANGERS_EVERY_S = 10.0  # a line about callers without a pinned certificate


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
        say: Say = quiet,
        on_refused: Callable[[int], None] = lambda connections: None,
    ) -> None:
        """Listen at this rank's address. Raises PortInUse or ConfigError."""
        self.rank, self.settings, self.limit = rank, settings, limit
        self._trust, self._say = trust or Trust(), say
        self._first, self._on_refused = first, on_refused
        self._sessions: dict[str, Network] = {}
        self._new: SimpleQueue[Network] = SimpleQueue()
        self._lock = Condition()
        self._closed = False
        self._quiet_until, self._unsaid, self._look_at = 0.0, 0, 0.0
        streams = 16 + 8 * limit  # two per session, new ones in place of broken ones, refusals
        self._server = start_server(rank, settings, self._accept, streams, self._trust)

    def next(self, seconds: float) -> Network | None:
        """Return the next session that has come; None if none comes within `seconds`.

        Close it: its place is taken until then.
        """
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
        if CHECK_KEY in about:
            return self._answer_check(about, context)
        try:
            link = self._link_of(about, context)
            beacon = beacon_at(context.peer(), about.get(BEACON_KEY))
            return link.accept(frames, context, count_of(about.get(RECEIVED_KEY)), beacon)
        except LinkError as error:
            self._say_refused(context, str(error))
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
            raise AssertionError from None  # abort raises

    def _answer_check(self, about: dict[str, Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Tell a caller that only asks whether it would be taken; no session ends or begins."""
        peer = caller_in(about, self.rank)
        refusal = "it does not dial here" if peer is None else self._trust.refusal(peer, context)
        if refusal is not None:
            self._say_refused(context, refusal)
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        context.send_initial_metadata(((RANK_KEY, str(int(self.rank))), (CHECK_KEY, str(PROTOCOL_VERSION))))
        return iter(())

    def _say_refused(self, context: grpc.ServicerContext, why: str) -> None:
        """Tell whom a party that serves refused; one that waits for a single session ends with it."""
        self._on_refused(1)
        if self._first is not None:
            return
        now = time.monotonic()
        if now < self._quiet_until:  # a caller that comes again and again must not fill the log
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more since the last line)" if self._unsaid else ""
        self._quiet_until, self._unsaid = now + QUIET_S, 0
        self._say(f"{self.rank.label}: refused {self._trust.described(context)}: {why}{more}")

    def say_strangers(self) -> None:
        """Tell that callers were refused before they could say who they are."""
        now = time.monotonic()
        if now >= self._look_at and (n := self._trust.strangers()):
            self._look_at = now + STRANGERS_EVERY_S
            self._on_refused(n)
            where = self.settings.addresses.bound_by(self.rank)
            self._say(f"{self.rank.label}: refused {n} connections at {where}: {STRANGER}")

    def _link_of(self, about: dict[str, Any], context: grpc.ServicerContext) -> GrpcLink:
        """Return the link that a stream with this metadata belongs to. Raises LinkError to refuse it."""
        me = self.rank.label
        peer = caller_in(about, self.rank)
        who = peer.label if peer is not None else "a caller without a rank that dials here"
        if peer is not None and (refusal := self._trust.refusal(peer, context)) is not None:
            if self._first is not None:
                self._first.fail(Mismatch(f"Mismatch: refused {who}: {refusal}"))
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
        if self._first is None and RECEIVED_KEY not in about:
            self._say(f"{me}: session {session[:8]}: {who} is {self._trust.described(context)}")
        return link

    def _admit(self, session: str) -> Network | None:
        """Make a place for a new session; None if there was to be one only.

        Raises LinkError where as many sessions run as may.
        """
        if self._first is not None:
            if self._sessions:
                return None
            network, network.session = self._first, session
        else:
            if self._full() and any(network.ending for network in self._sessions.values()):
                self._lock.wait_for(lambda: not self._full(), PLACE_S)
            if self._full():
                raise LinkError(
                    f"{self.rank.label} serves {self.limit} session{'s' * (self.limit > 1)} at once, and not "
                    "one more (--sessions there); try again later"
                )
            network = Network(self.rank, self.settings, Ledger(), trust=self._trust, session=session)
            network.on_close.append(lambda: self._forget(session))
            self._new.put(network)
        self._sessions[session] = network
        return network

    def _full(self) -> bool:
        return len(self._sessions) >= self.limit

    def _forget(self, session: str) -> None:
        with self._lock:
            self._sessions.pop(session, None)
            self._lock.notify_all()

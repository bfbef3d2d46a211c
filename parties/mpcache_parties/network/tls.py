"""Authenticate parties by mutual TLS: each shows its certificate and takes the pinned ones and no other.

gRPC's TLS knows the pinned certificates as its only roots. Which of them belongs to which rank is
checked once more: the listener compares a caller's certificate with those of the rank that it claims,
and a dialer takes one rank's alone, under that rank's name. gRPC does not say why a handshake failed,
so a dialer whose connection does not come about looks for itself (`look`), and a listener counts the
connections that never became calls.
"""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from mpcache.certificates import (
    LAST_DAY,
    Identity,
    certificates_in,
    dates_refuse,
    fingerprint,
    host_of,
    rank_of,
    shared_name,
    short_fingerprint,
)
from mpcache.config import Settings
from mpcache.errors import ConfigError
from mpcache.rank import Rank
from mpcache.transport.address import HostPort
from mpcache_parties.network.metadata import caller_address
from mpcache_parties.network.probe import Unreached, reach

LOOK_TIMEOUT_S = 2.0
STRANGER_AFTER_S = 1.0  # between a connection and its first call
REMEDY = "set the clock, or make a new one (mpcache-party keygen) and pin it with --replace everywhere"
STRANGER_TRIES = 2  # a single connection without a call may have been a look
CALLERS = 4096  # connections that are remembered to have made a call
SLOW = "it takes connections, and does not answer"


@dataclass(frozen=True)
class Credentials:
    """A party's identity, where its files lie, and whom it takes for whom."""

    own: Identity
    folder: Path
    pinned: dict[Rank, list[x509.Certificate]]

    def dial(self, peer: Rank) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_pem(self.pinned[peer]), self.own.key, self.own.certificate)


@dataclass(frozen=True)
class Look:
    """What a look at a connection that does not come about has found.

    reason: why there is none now; it may yet come. mismatch: why there never will be.
    """

    reason: str = ""
    mismatch: str | None = None


class Trust:
    """What a network asks about identities. Without credentials: neither encrypted nor authenticated."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._channels: dict[Rank, grpc.Channel] = {}
        self._connections, self._calls, self._latest = 0, 0, 0.0
        self._callers: dict[str, None] = {}  # the latest that made a call, as gRPC names them
        self._seen: set[Rank] = set()  # peers that a look has found something wrong with

    def warnings(self) -> list[str]:
        """Return what will be refused although it is pinned: peers' certificates of other dates."""
        pinned = self._credentials.pinned if self._credentials is not None else {}
        return [
            f"{rank.label}'s pinned certificate {short_fingerprint(each)} {dates}; {REMEDY}"
            for rank, some in pinned.items()
            for each in some
            if (dates := dates_refuse(each)) is not None
        ]

    @property
    def tls(self) -> bool:
        """Whether the links use TLS."""
        return self._credentials is not None

    def open(self, peer: Rank, address: str, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
        """Return a channel to a peer that listens; nothing is sent to anyone else."""
        if self._credentials is None:
            channel = grpc.insecure_channel(address, options=options)
        else:
            name = ("grpc.ssl_target_name_override", host_of(peer))
            channel = grpc.secure_channel(address, self._credentials.dial(peer), options=[*options, name])

        self._channels[peer] = channel
        return channel

    def bind(self, server: grpc.Server, address: str) -> None:
        """Let the server listen there. Raises RuntimeError as gRPC does."""
        if self._credentials is None:
            server.add_insecure_port(address)
            return
        own, pinned = self._credentials.own, self._credentials.pinned
        roots = _pem([each for rank, some in pinned.items() if rank is not own.rank for each in some])
        pair = grpc.ssl_server_certificate_configuration([(own.key, own.certificate)], roots)

        def connected() -> None:  # gRPC asks for a newer certificate at each connection: there is none
            self._connections += 1
            self._latest = time.monotonic()

        server.add_secure_port(address, grpc.dynamic_ssl_server_credentials(pair, connected, True))

    def refusal(self, claimed: Rank, context: grpc.ServicerContext) -> str | None:
        """Say why this caller is not who it claims to be; None if it is, or if there is no TLS."""
        if (caller := context.peer()) not in self._callers:  # a connection has a call for each stream
            self._callers[caller] = None
            self._calls += 1
            while len(self._callers) > CALLERS:
                del self._callers[next(iter(self._callers))]
        if self._credentials is None:
            return None
        shown = _shown_by(context)
        if shown is None:
            return f"the caller shows no certificate, {claimed.label} has to"
        return self._difference(claimed, shown)

    def described(self, context: grpc.ServicerContext) -> str:
        """Say from where a caller comes, and with which certificate."""
        shown = _shown_by(context) if self.tls else None
        how = f"certificate sha256:{fingerprint(shown)}" if shown is not None else "no TLS"
        return f"{caller_address(context.peer())} with {how}"

    def strangers(self) -> int:
        """Return how often someone tried to connect who has no pinned certificate, or wants another of us.

        Once asked, these are not counted again.
        """
        tried = self._connections - self._calls
        if tried < STRANGER_TRIES or time.monotonic() - self._latest < STRANGER_AFTER_S:
            return 0
        self._connections -= tried
        return tried

    def look(self, peer: Rank, address: str) -> Look:
        """Say why the connection to a listening peer does not come about.

        Blocks for a few seconds, longer where a name server is silent, and connects only if gRPC does not.
        Tells of a mismatch the second time: one that has just begun to listen needs as many
        connections to see us.
        """
        state = _state_of(self._channels[peer])
        if state is _State.ANSWERS:
            return Look()
        try:
            raw = reach(address, LOOK_TIMEOUT_S)
        except Unreached as why_not:
            return Look(str(why_not))
        with raw:
            if state is _State.SILENT:
                return Look(SLOW)
            try:
                why = self._look_within(peer, address, raw)
            except OSError:
                return Look("it ends connections at once")
        first = peer not in self._seen
        if why is not None:
            self._seen.add(peer)
        return Look(why or "", None if first else why)

    def _look_within(self, peer: Rank, address: str, raw: socket.socket) -> str | None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # to look, not to trust
        context.set_alpn_protocols(["h2"])
        if self._credentials is not None:
            key, certificate = Identity.files(self._credentials.folder, self._credentials.own.rank)
            context.load_cert_chain(certificate, key)
        try:
            with context.wrap_socket(raw, server_hostname=host_of(peer)) as tls:
                if self._credentials is None:
                    return f"{peer.label} at {address} takes TLS alone; start this party with --identity DIR"
                shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
                if (difference := self._difference(peer, shown)) is not None:
                    return f"at {address} {difference}"
                if (dates := dates_refuse(shown)) is not None:
                    which = f"{peer.label}'s certificate {short_fingerprint(shown)}"
                    return f"at {address} {which} {dates}; {REMEDY}"
                if _answers(tls):
                    return None
        except ssl.SSLError:
            if self._credentials is None:
                return None
            return f"what listens at {address} does not speak TLS; start {peer.label} with --identity DIR"
        mine = self._credentials.own.shown
        own = self._credentials.own.rank.label
        what = f"refuses {own}'s certificate {short_fingerprint(mine)}; pin it there, for {own}"
        if (ends := mine.not_valid_after_utc) < LAST_DAY:
            what += f", and see that its clock stands between {mine.not_valid_before_utc:%F} and {ends:%F}"
        return f"{peer.label} at {address} {what}"

    def _difference(self, claimed: Rank, shown: x509.Certificate) -> str | None:
        assert self._credentials is not None
        pinned = self._credentials.pinned[claimed]
        if shown in pinned:
            return None
        owner = next((rank for rank, some in self._credentials.pinned.items() if shown in some), None)
        named = rank_of(shown)
        whose = "an unknown certificate"
        if owner is not None:
            whose = f"the {owner.label}'s certificate"
        elif named is not None:
            whose = f"a certificate for {named.label} that is not pinned"
        prints = " or ".join(short_fingerprint(each) for each in pinned)
        found = f"{whose} is shown ({short_fingerprint(shown)})"
        return f"{found}, not the {claimed.label}'s ({prints}); check --identity and `certificates`"


class _State(Enum):
    """What gRPC makes of a connection."""

    ANSWERS = auto()  # or is closed: nothing is wrong
    FAILS = auto()
    SILENT = auto()


def _state_of(channel: grpc.Channel) -> _State:
    """Ask for a method that nobody has: the error tells."""
    states = {
        grpc.StatusCode.UNAVAILABLE: _State.FAILS,
        grpc.StatusCode.DEADLINE_EXCEEDED: _State.SILENT,
    }
    try:
        channel.unary_unary("/mpcache/look")(b"", timeout=LOOK_TIMEOUT_S)
    except grpc.RpcError as error:
        return states.get(error.code(), _State.ANSWERS)
    except ValueError:  # the channel was closed
        return _State.ANSWERS
    return _State.ANSWERS


def _shown_by(context: grpc.ServicerContext) -> x509.Certificate | None:
    (pem,) = context.auth_context().get("x509_pem_cert", [b""])
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        return None


def _answers(tls: ssl.SSLSocket) -> bool:
    """Whether the listener goes on after it has seen our certificate."""
    try:
        return bool(tls.recv(1))
    except TimeoutError:
        return True
    except OSError:
        return False


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def pins_of(settings: Settings) -> dict[Rank, list[x509.Certificate]]:
    """Return the certificates that the config pins, by rank."""
    return {rank: certificates_in(settings.certificates.of(rank)) for rank in Rank}


def trust(me: Rank, settings: Settings, folder: Path | None, insecure: bool) -> Trust:
    """Read a party's trust from its identity folder and the config's pins.

    Raises ConfigError: pins without an identity or the reverse, a certificate that is pinned for
    another rank, that this machine's clock does not take, or that TLS cannot tell from another, or an
    address of another host without TLS unless `insecure`.
    """
    pins = pins_of(settings)
    if folder is None:
        if any(pins.values()) and not insecure:
            raise ConfigError("the config pins certificates; give --identity DIR, the folder of this party's")
        if not insecure:
            _check_loopback(settings)
        return Trust()
    if insecure:
        raise ConfigError("--identity asks for TLS, --insecure for none; give one of them")
    own = Identity.read(folder, me)
    if missing := [rank.label for rank in Rank if not pins[rank]]:
        what = "mpcache-party pin --config FILE CERTIFICATE..."
        raise ConfigError(f"no certificate is pinned for {' and '.join(missing)}; run {what}")
    mine = own.shown
    if mine not in pins[me]:
        found = short_fingerprint(mine)
        raise ConfigError(
            f"{Identity.files(folder, me)[1]}: is {found}, the config pins another for {me.label}; "
            "use the pinned identity, or pin this one in every party's config"
        )
    if (dates := dates_refuse(mine)) is not None:
        raise ConfigError(f"{Identity.files(folder, me)[1]}: {dates}; {REMEDY}")
    for rank, some in pins.items():
        if (alike := shared_name(some)) is not None:
            raise ConfigError(f"certificates.{rank.label}: {alike}")
    return Trust(Credentials(own, folder, pins))


def _check_loopback(settings: Settings) -> None:
    server, dealer, bind = settings.addresses.server, settings.addresses.dealer, settings.addresses.bind
    opened = {
        f"addresses.server {server} is not on this machine": server,
        f"addresses.dealer {dealer} is not on this machine": dealer,
        f"--listen {bind} is open to other hosts": bind,
    }
    for what, address in opened.items():
        if address is not None and not HostPort.parse(address).is_loopback:
            raise ConfigError(
                f"{what}, and the links have no TLS; "
                "give --identity DIR (mpcache-party keygen, pin), or --insecure for a network you trust"
            )

"""Authenticate parties by mutual TLS: each shows its certificate and takes the pinned ones and no other.

gRPC's TLS knows the pinned certificates as its only roots. Which of them belongs to which rank is
checked once more: the listener compares a caller's certificate with those of the rank that it claims,
and a dialer takes one rank's alone, under that rank's name. gRPC does not say why a handshake failed,
so a dialer whose connection does not come about looks for itself (`look`), and a listener counts the
connections that never became calls.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
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

LOOK_TIMEOUT_S = 2.0
STRANGER_AFTER_S = 1.0  # between a connection and its first call
REMEDY = "set the clock, or make a new one (mpcache-party keygen) and pin it with --replace everywhere"
STRANGER_TRIES = 2  # a single connection without a call may have been a look


@dataclass(frozen=True)
class Credentials:
    """A party's identity, where its files lie, and whom it takes for whom."""

    own: Identity
    folder: Path
    pinned: dict[Rank, list[x509.Certificate]]

    def dial(self, peer: Rank) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_pem(self.pinned[peer]), self.own.key, self.own.certificate)


class Trust:
    """What a network asks about identities. Without credentials: neither encrypted nor authenticated."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        self._credentials = credentials
        self._channels: dict[Rank, grpc.Channel] = {}
        self._connections, self._calls, self._latest = 0, 0, 0.0
        self._seen: set[Rank] = set()  # peers that a look has found something wrong with

    def warnings(self) -> list[str]:
        """Return what will be refused although it is pinned: peers' certificates of other dates."""
        pinned = self._credentials.pinned if self._credentials is not None else {}
        return [
            f"{rank.label}'s pinned certificate {short_fingerprint(fingerprint(each))} {dates}; {REMEDY}"
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
        self._calls += 1
        if self._credentials is None:
            return None
        (pem,) = context.auth_context().get("x509_pem_cert", [b""])
        try:
            shown = x509.load_pem_x509_certificate(pem)
        except ValueError:
            return f"the caller shows no certificate, {claimed.label} has to"
        return self._difference(claimed, shown)

    def strangers(self) -> bool:
        """Return whether someone tried to connect who has no pinned certificate, or wants another of us."""
        tried = self._connections - self._calls >= STRANGER_TRIES
        return tried and time.monotonic() - self._latest >= STRANGER_AFTER_S

    def look(self, peer: Rank, address: str) -> str | None:
        """Say why the connection to a listening peer does not come about; None while it may yet come.

        Blocks for a few seconds at most, and connects only if gRPC has just failed to. Tells what it
        found the second time: one that has just begun to listen needs as many connections to see us.
        """
        if not _fails(self._channels[peer]):
            return None
        host, _, port = address.rpartition(":")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # to look, not to trust
        context.set_alpn_protocols(["h2"])
        if self._credentials is not None:
            key, certificate = Identity.files(self._credentials.folder, self._credentials.own.rank)
            context.load_cert_chain(certificate, key)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), LOOK_TIMEOUT_S) as raw:
                why = self._look(peer, address, context, raw)
        except OSError:
            return None  # nobody listens yet
        first = peer not in self._seen
        if why is not None:
            self._seen.add(peer)
        return None if first else why

    def _look(self, peer: Rank, address: str, context: ssl.SSLContext, raw: socket.socket) -> str | None:
        try:
            with context.wrap_socket(raw, server_hostname=host_of(peer)) as tls:
                if self._credentials is None:
                    return f"{peer.label} at {address} takes TLS alone; start this party with --identity DIR"
                shown = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True) or b"")
                if (difference := self._difference(peer, shown)) is not None:
                    return f"at {address} {difference}"
                if (dates := dates_refuse(shown)) is not None:
                    print_ = short_fingerprint(fingerprint(shown))
                    return f"at {address} {peer.label}'s certificate {print_} {dates}; {REMEDY}"
                if _answers(tls):
                    return None
        except ssl.SSLError:
            if self._credentials is None:
                return None
            return f"what listens at {address} does not speak TLS; start {peer.label} with --identity DIR"
        mine = x509.load_pem_x509_certificate(self._credentials.own.certificate)
        own = self._credentials.own.rank.label
        what = f"refuses {own}'s certificate {short_fingerprint(fingerprint(mine))}; pin it there, for {own}"
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
        prints = " or ".join(short_fingerprint(fingerprint(each)) for each in pinned)
        found = f"{whose} is shown ({short_fingerprint(fingerprint(shown))})"
        return f"{found}, not the {claimed.label}'s ({prints}); check --identity and `certificates`"


def _fails(channel: grpc.Channel) -> bool:
    """Whether gRPC has just failed to connect: a method that nobody has tells."""
    try:
        channel.unary_unary("/mpcache/look")(b"", timeout=LOOK_TIMEOUT_S)
    except grpc.RpcError as error:
        return bool(error.code() is grpc.StatusCode.UNAVAILABLE)
    except ValueError:  # the channel was closed
        return False
    return False


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
        _check_loopback(settings, insecure)
        return Trust()
    if insecure:
        raise ConfigError("--identity asks for TLS, --insecure for none; give one of them")
    own = Identity.read(folder, me)
    if missing := [rank.label for rank in Rank if not pins[rank]]:
        what = "mpcache-party pin --config FILE CERTIFICATE..."
        raise ConfigError(f"no certificate is pinned for {' and '.join(missing)}; run {what}")
    mine = x509.load_pem_x509_certificate(own.certificate)
    if mine not in pins[me]:
        found = short_fingerprint(fingerprint(mine))
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


def _check_loopback(settings: Settings, insecure: bool) -> None:
    for rank in (Rank.SERVER, Rank.DEALER):
        address = settings.addresses.of(rank)
        if not insecure and not _is_loopback(address.rpartition(":")[0].strip("[]")):
            raise ConfigError(
                f"addresses.{rank.label} {address} is not on this machine, and the links have no TLS; "
                "give --identity DIR (mpcache-party keygen, pin), or --insecure for a network you trust"
            )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Try every link and certificate of a config from this machine, before a run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import grpc

from mpcache.certificates import Identity, fingerprint
from mpcache.config import Settings
from mpcache.errors import BadInput, ConfigError, PortInUse, one_line
from mpcache.rank import Rank
from mpcache_parties.handshake import PROTOCOL_VERSION
from mpcache_parties.network.channels import CONNECT, DIAL_OPTIONS, channel_options, dials
from mpcache_parties.network.grpc_server import bind_error
from mpcache_parties.network.metadata import CHECK_KEY, RANK_KEY
from mpcache_parties.network.probe import Unreached, reach
from mpcache_parties.network.tls import Trust, trust

ANSWER_S = 5.0  # for a peer to answer


@dataclass(frozen=True)
class LinkFinding:
    """What was found of one link, port or identity. ok: None where only another machine can tell."""

    what: str
    where: str
    found: str
    ok: bool | None


def rank_in(identity: Path | None, rank: int | None) -> Rank:
    """Return whose links are tried: the given rank's, the one of the only key in the folder, or the client's.

    Raises BadInput where a folder has several.
    """
    if rank is not None:
        return Rank(rank)
    if identity is None:
        return Rank.CLIENT
    found = [each for each in Rank if Identity.files(identity, each)[0].exists()]
    if len(found) > 1:
        raise BadInput(
            f"{identity}: holds {len(found)} identities; give --rank 0 (server), 1 (client) or 2 (dealer)"
        )
    return found[0] if found else Rank.CLIENT


def check_links(me: Rank, settings: Settings, identity: Path | None, insecure: bool) -> list[LinkFinding]:
    """Try what this rank needs: its identity, its port, and each peer that it dials."""
    rows, trusted = _identity_rows(me, settings, identity, insecure)
    if me is not Rank.CLIENT:
        rows.append(_port(me, settings))
    for peer in Rank:
        if dials(me, peer):
            rows.append(_link(me, peer, settings, trusted))
        elif dials(peer, me):
            where = settings.addresses.of(me)
            rows.append(
                LinkFinding(f"link from {peer.label}", where, f"{peer.label} dials it; check there", None)
            )
    return rows


def _identity_rows(
    me: Rank, settings: Settings, identity: Path | None, insecure: bool
) -> tuple[list[LinkFinding], Trust | None]:
    where = str(identity) if identity is not None else "none"
    try:
        trusted = trust(me, settings, identity, insecure)
    except ConfigError as error:
        return [LinkFinding("identity", where, str(error), False)], None
    if identity is None:
        how = "--insecure: no TLS" if insecure else "no TLS: every address is on this machine"
        return [LinkFinding("identity", where, how, True)], trusted
    own = Identity.read(identity, me).shown
    rows = [LinkFinding("identity", where, f"{me.label}, pinned as sha256:{fingerprint(own)}", True)]
    rows += [LinkFinding("certificates", "config", warning, False) for warning in trusted.warnings()]
    return rows, trusted


def _port(me: Rank, settings: Settings) -> LinkFinding:
    bound = settings.addresses.bound_by(me)
    error = bind_error(me, bound)
    if error is None:
        return LinkFinding("port", bound, "can be bound", True)
    return LinkFinding("port", bound, str(error), None if isinstance(error, PortInUse) else False)


def _link(me: Rank, peer: Rank, settings: Settings, trusted: Trust | None) -> LinkFinding:
    address = settings.addresses.of(peer)
    name = f"link to {peer.label}"
    if trusted is None:
        try:
            reach(address, ANSWER_S).close()
        except Unreached as why:
            return LinkFinding(name, address, str(why), False)
        return LinkFinding(name, address, "takes connections; not tried further without the identity", None)
    with trusted.open(peer, address, channel_options(me, DIAL_OPTIONS)) as channel:
        begin = time.monotonic()
        stream = channel.stream_stream(CONNECT)(
            iter(()), metadata=((RANK_KEY, str(int(me))), (CHECK_KEY, "")), timeout=ANSWER_S
        )
        try:
            about = dict(stream.initial_metadata() or ())
            ms = (time.monotonic() - begin) * 1e3
            next(stream, None)
        except grpc.RpcError as error:
            return LinkFinding(name, address, _reason(error, peer, address, trusted), False)
    return LinkFinding(name, address, *_answer(peer, about, ms, trusted.tls))


def _reason(error: grpc.RpcError, peer: Rank, address: str, trusted: Trust) -> str:
    """Say why there was no answer."""
    match error.code():
        case grpc.StatusCode.FAILED_PRECONDITION:
            details = error.details() or ""
            if "names no session" in details:
                return f"{peer.label} answers, and is of another version of mpcache"
            return one_line(f"{peer.label} refuses: {details}")
        case grpc.StatusCode.UNIMPLEMENTED:
            return "what listens there is not an mpcache party"
    return trusted.look(peer, address).reason or one_line(f"no answer: {error.details()}")


def _answer(peer: Rank, about: dict[str, str], ms: float, tls: bool) -> tuple[str, bool]:
    """Say what a party has answered, and whether it is the right one."""
    if about.get(RANK_KEY) != str(int(peer)):
        return f"rank {about.get(RANK_KEY)} listens there, not {peer.label}; check `addresses`", False
    if about.get(CHECK_KEY) != str(PROTOCOL_VERSION):
        version = about.get(CHECK_KEY)
        return f"{peer.label} speaks version {version} of the protocol, this is {PROTOCOL_VERSION}", False
    how = "TLS, both certificates are pinned" if tls else "no TLS"
    return f"{peer.label} answers in {ms:.0f} ms; {how}", True

"""Try a peer's address, to say why no connection comes about, or what listens there that is no party."""

from __future__ import annotations

import errno
import socket

from mpcache.transport.address import HostPort

PROBE_S = 2.0
SILENCE_S = 15.0  # a party on a busy machine takes seconds to say its first word
_WORDS = {
    errno.ECONNREFUSED: "refused: its host answers, and nobody listens there",
    errno.EHOSTUNREACH: "no route to its host",
    errno.ENETUNREACH: "no route to its network",
    errno.ETIMEDOUT: "timed out: its host, or a firewall, is silent",
}


class Unreached(OSError):
    """No connection came about; the text says why."""


def reach(address: str, seconds: float) -> socket.socket:
    """Connect to HOST:PORT within `seconds` for each of the host's addresses. Raises Unreached."""
    place = HostPort.parse(address)
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if getattr(error, "errno", None) == socket.EAI_AGAIN:
            raise Unreached("its name cannot be looked up: no name server answers") from None
        raise Unreached("its name is not known") from None
    why = "its name has no address"
    for family, kind, protocol, _, target in found:
        trial = socket.socket(family, kind, protocol)
        trial.settimeout(seconds)
        try:
            trial.connect(target)
            return trial
        except OSError as error:
            trial.close()
            code = errno.ETIMEDOUT if isinstance(error, TimeoutError) else error.errno
            why = _WORDS.get(code or 0, error.strerror or str(error))
    raise Unreached(why)


def foreign_program_at(address: str) -> str | None:
    """Return what is wrong with the program that listens there.

    None if it speaks HTTP/2 or TLS, or if nobody listens. Blocks for PROBE_S at most for each address,
    and for SILENCE_S where a connection is taken.
    """
    try:
        with reach(address, PROBE_S) as probe:
            probe.settimeout(SILENCE_S)
            probe.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            frame = probe.recv(9)
    except TimeoutError:
        return "it does not answer"
    except OSError:
        return None
    if not frame or frame[3:4] == b"\x04" or frame[:1] == b"\x15":  # SETTINGS, or an alert of TLS
        return None
    return "it does not speak gRPC"

"""Tell whether a peer's process is gone or its network is cut: its host knows.

A host refuses connections to a port where nobody listens. A network that is cut does not: it is silent,
or closes what it takes. So a peer whose host refuses is dead and nobody waits for it; all else is waited
for. A peer that listens is asked at its own address. One that dials holds a port for this alone, a
`Beacon`, and says which; it counts only if it could be reached while the peer was known to live, so an
address translator or a firewall between the two costs the knowledge and never ends a session.
"""

from __future__ import annotations

import re
import socket
import time
from urllib.parse import unquote

from mpcache.transport.address import HostPort

# Without a break, until the peer is given up. No party closes its port and opens it again in a session;
# the time is for what may stand before one: a port forward, or a host's network, that is set up anew.
GONE_S = 3.0
ASK_EVERY_S = 0.5
ANSWER_S = 0.5  # a refusal is one round trip; a later one is taken for silence


class Beacon:
    """A port that tells that this process lives.

    Nothing is accepted there, read or sent: the operating system's own answer is all, and it ends with the
    process.
    """

    def __init__(self, address: str) -> None:
        """Open the port for the peer at `address`, HOST:PORT; no other interface of this host answers.

        Raises OSError when there is none.
        """
        host, port = _parts(address)
        family, *_, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # sends nothing: it asks for the route
            own = probe.getsockname()[0]
        self._socket = socket.create_server((own, 0), family=family)
        self.port: int = self._socket.getsockname()[1]

    def close(self) -> None:
        self._socket.close()


def beacon_at(caller: str, port: str | None) -> str | None:
    """Return HOST:PORT of a beacon, from gRPC's name of the caller; None without a host or a port.

    The host is the caller's own, whatever it says: nobody is sent to ask somewhere else.
    """
    host = re.fullmatch(r"ipv[46]:(.+):\d+", unquote(caller))
    number = re.fullmatch(r"[1-9]\d{0,4}", port or "", re.ASCII)
    return f"{host[1]}:{port}" if host and number and int(number[0]) < 1 << 16 else None


def listens(address: str) -> bool | None:
    """Return whether someone listens at HOST:PORT; None if that cannot be told within ANSWER_S."""
    try:
        socket.create_connection(_parts(address), ANSWER_S, all_errors=True).close()
    except OSError:  # the name of the host cannot be resolved
        return None
    except ExceptionGroup as errors:  # one for each address of the host
        return False if errors.split(ConnectionRefusedError)[1] is None else None
    return True


class Refusals:
    """Asks whether the process behind HOST:PORT is gone; without an address it is never known."""

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._since: float | None = None  # monotonic
        self._next = 0.0

    def gone(self) -> bool:
        """Return whether connections have been refused all the time for GONE_S.

        Asks at most every ASK_EVERY_S, and blocks for ANSWER_S at most for each address of the host.
        """
        now = time.monotonic()
        if self.address is None or now < self._next:
            return False
        self._next = now + ASK_EVERY_S
        if listens(self.address) is not False:
            self._since = None
            return False
        if self._since is None:
            self._since = now
        return now - self._since >= GONE_S


def _parts(address: str) -> tuple[str, int]:
    found = HostPort.parse(address)
    return found.host, found.port

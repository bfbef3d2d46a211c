"""Read the address of a port that a party opens for its operator."""

from __future__ import annotations

from mpcache.errors import BadInput

HERE = "127.0.0.1"


def host_and_port(flag: str, place: str) -> tuple[str, int]:
    """Return [HOST:]PORT in parts; this machine where there is no host. Raises BadInput."""
    host, _, port = place.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 1 <= int(port) <= 65535:
        raise BadInput(f"{flag} is {place!r}; give PORT or HOST:PORT with a port from 1 to 65535")
    return host or HERE, int(port)

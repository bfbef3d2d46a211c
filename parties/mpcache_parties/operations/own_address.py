"""Read the address of a port that a party opens for its operator."""

from __future__ import annotations

from mpcache.errors import BadInput
from mpcache.transport.address import HostPort

HERE = "127.0.0.1"


def own_address(flag: str, place: str) -> HostPort:
    """Return [HOST:]PORT in parts; this machine where there is no host. Raises BadInput."""
    try:
        return HostPort.parse(place, HERE)
    except ValueError as wrong:
        raise BadInput(f"{flag} is {place!r}: {wrong}") from None

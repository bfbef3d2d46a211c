"""Run `mpcache-party health`: ask a party whether it is ready, as a container's health check does."""

from __future__ import annotations

from typing import Annotated

import typer

from mpcache.errors import PeerLost
from mpcache_parties.operations.health import is_serving
from mpcache_parties.operations.own_address import own_address

ASK_S = 5.0


def health(
    place: Annotated[str, typer.Argument(metavar="[HOST:]PORT", help="As the party's own --health.")],
) -> None:
    """Ask a party's health service: exit code 0 where it is SERVING, 3 where it is not, or is silent."""
    address = str(own_address("health", place))
    if (serving := is_serving(address, ASK_S)) is not True:
        found = "it is NOT_SERVING: it starts, or ends" if serving is False else "nobody answers"
        raise PeerLost(f"health: {address}: {found}")
    print(f"{address}: SERVING")

"""Show a party's status at the ports that its operator asks for, as long as the party runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from mpcache_parties.operations.health import show_health
from mpcache_parties.operations.metrics import show_metrics
from mpcache_parties.operations.status import PartyStatus


@contextmanager
def exposed(status: PartyStatus, metrics: str | None, health: str | None) -> Iterator[PartyStatus]:
    """Show the status at [HOST:]PORT where asked for; it is not ready any more when the party ends.

    Raises BadInput or PortInUse.
    """
    with ExitStack() as stack:
        if metrics is not None:
            stack.callback(show_metrics(status, metrics))
        if health is not None:
            stack.callback(show_health(status, health))
        try:
            yield status
        finally:
            status.be_ready(False)

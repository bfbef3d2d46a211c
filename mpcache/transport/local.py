"""Link two threads of one process: the same frames and checks, without a wire."""

from __future__ import annotations

from mpcache.ledger import Ledger
from mpcache.rank import Rank
from mpcache.transport.frames import FrameLink


class LocalLink(FrameLink):
    """One end; `local_pair` makes both."""

    other: LocalLink

    def _carry(self, data: bytes) -> None:
        self.other.arrived(data)


def local_pair(
    ledger_a: Ledger,
    ledger_b: Ledger,
    rank_a: Rank = Rank.SERVER,
    rank_b: Rank = Rank.CLIENT,
    timeout: float = 120.0,
) -> tuple[LocalLink, LocalLink]:
    """Return the two ends of one link, each with its party's ledger; `timeout` in seconds."""
    a = LocalLink(rank_a, rank_b, ledger_a, timeout)
    b = LocalLink(rank_b, rank_a, ledger_b, timeout)
    a.other, b.other = b, a
    for end in (a, b):
        end.widen()  # threads of one process have nothing to agree on
    return a, b

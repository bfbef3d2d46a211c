"""Place parties that share a machine on its cores.

A party is one interpreter: its program and gRPC's threads take turns at it, some fifty times a round. A
turn that wakes another core costs several times as much as one on the same core, so server and client have
a part of the cores each. The dealer runs ahead wherever there is time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from mpcache.rank import Rank


def cores_of(rank: Rank, cores: Sequence[int]) -> list[int]:
    """Return which of a machine's cores a party runs on: the server the first half, the client the others."""
    half = (len(cores) + 1) // 2
    apart = {Rank.SERVER: cores[:half], Rank.CLIENT: cores[half:]} if len(cores) > 1 else {}
    return list(apart.get(rank, cores))


@contextmanager
def on_cores_of(rank: Rank) -> Iterator[None]:
    """Give what this thread starts meanwhile the cores of a party, where the system lets one choose."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    mine = os.sched_getaffinity(0)  # of this thread, which a process that it starts inherits
    with suppress(OSError):  # a sandbox that forbids it: the parties run anyway
        os.sched_setaffinity(0, cores_of(rank, sorted(mine)))
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, mine)

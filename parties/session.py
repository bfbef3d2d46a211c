"""How a session opens: the parties introduce themselves and compare what they must agree on."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from mpcache.errors import Mismatch
from mpcache.link import Hello, Link
from mpcache.rank import Rank

PROTOCOL_VERSION = 1


def agree(links: Mapping[Rank, Link], me: Rank, public: Mapping[str, str]) -> dict[Rank, Hello]:
    """Exchange Hello on every link; return what each peer said.

    `public` is `PublicConfig.flat()`. Raises Mismatch with the first differing field and both sides'
    values, on both sides (whichever is slower may get it as the PeerFailed of the other).
    """
    mine = Hello(PROTOCOL_VERSION, me, secrets.token_hex(16), public)
    for link in links.values():
        link.send_hello(mine)
    theirs = {}
    for peer, link in links.items():
        theirs[peer] = link.recv_hello()
        compare(mine, theirs[peer], peer)
    return theirs


def compare(mine: Hello, theirs: Hello, expected: Rank) -> None:
    """Raise Mismatch unless `theirs` comes from `expected` and agrees with `mine`."""
    if theirs.rank is not expected:
        raise Mismatch(
            f"Mismatch: {mine.rank.label} expects {expected.label} (rank {int(expected)}), but rank "
            f"{int(theirs.rank)} is there; check --rank and `addresses` in the config"
        )
    if theirs.version != mine.version:
        versions = str(mine.version), str(theirs.version)
        raise _mismatch("protocol version", mine, theirs, *versions, "release of mpcache")
    for name in sorted({*mine.public, *theirs.public}):
        ours, other = mine.public.get(name), theirs.public.get(name)
        if ours != other:
            raise _mismatch(name, mine, theirs, ours or "not set", other or "not set", "--config")


def _mismatch(name: str, mine: Hello, theirs: Hello, ours: str, other: str, remedy: str) -> Mismatch:
    sides = sorted([(mine.rank, ours), (theirs.rank, other)])
    values = ", ".join(f"{value} at {rank.label}" for rank, value in sides)
    return Mismatch(f"Mismatch: {name} is {values}; start both with the same {remedy}")

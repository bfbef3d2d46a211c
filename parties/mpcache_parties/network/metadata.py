"""Name the metadata of a stream between parties: its keys, and the values that need a check."""

from __future__ import annotations

import secrets
from urllib.parse import unquote

from mpcache.errors import Desync

RANK_KEY = "mpcache-rank"  # who is at this end
SESSION_KEY = "mpcache-session"  # which session a stream belongs to
RECEIVED_KEY = "mpcache-received"  # frames that this end has got over earlier streams
BEACON_KEY = "mpcache-beacon"  # the port that tells that the caller's process lives
REASON_KEY = "mpcache-reason-bin"  # instead of a session: why this party cannot take part
CHECK_KEY = "mpcache-check"  # instead of a session: asks whether one would be taken; answered by a version
REASON_CHARACTERS = 1000  # gRPC takes 8 KiB of metadata
SESSION_BYTES = 16

Metadata = tuple[tuple[str, str], ...]


def new_session() -> str:
    """Return a session's name: 128 bits of the system's entropy, in hex.

    A peer that knows the name may continue a link of that session.
    """
    return secrets.token_hex(SESSION_BYTES)


def caller_address(peer: str) -> str:
    """Return HOST:PORT from gRPC's name of a caller."""
    return unquote(peer).partition(":")[2]


def count_of(text: str | None) -> int:
    """Return a count in metadata; 0 without one. Raises Desync."""
    if text is None:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Desync(f"Desync: the peer has received {text[:40]!r} frames, which is not a count")
    return int(text)

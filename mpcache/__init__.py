"""mpcache: a private answer to a private question, from somebody else's private language model.

A server holds the weights and a document, a client holds the question, a dealer holds nothing and hands out
randomness. The document's KV cache is evicted in plaintext by its owner; decoding runs on secret shares.

One program, mpcache/decode.py, makes a token. It is written over the operations of mpcache/ops.py and read
four ways: in plaintext, on shares, by the dealer, and by the cost engine. Each room has one job, and imports
point down: `cli`, `audit` and `evaluate` ask; `session` runs the program phase by phase; `policy` says what a
token attends to; `engines` give the operations their meanings; `protocols` compute them on shares; `runtime`
reads programs; `transport` moves frames; `model` reads weights. The processes are parties/mpcache_parties.

Read decode.py first, then ops.py, then protocols/linear.py. docs/architecture.md is the whole map.
"""

from typing import TYPE_CHECKING, Any

from mpcache.errors import BadInput, MpcacheError

if TYPE_CHECKING:
    from mpcache_parties.chat import Chat, Turn, connect
    from mpcache_parties.local_parties import local_chat as local

__all__ = ["BadInput", "Chat", "MpcacheError", "Turn", "connect", "local"]


def __getattr__(name: str) -> Any:
    """Import what talks with parties when it is asked for: it stands above everything else here."""
    if name in __all__:
        from mpcache_parties import chat, local_parties

        return local_parties.local_chat if name == "local" else getattr(chat, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

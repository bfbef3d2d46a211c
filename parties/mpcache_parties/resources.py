"""Hold what one session stands on at a party, whatever its role: links, account, output and state."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mpcache.config import PublicConfig
from mpcache.ledger import Ledger
from mpcache.transport.link import Links
from mpcache_parties.handshake import NO_NAME
from mpcache_parties.operations.status import SessionStatus
from mpcache_parties.say import Say, quiet
from mpcache_parties.sharding import Shards
from mpcache_parties.state.checkpoint import Checkpointer
from mpcache_parties.state.setups import Setups
from mpcache_parties.state.tapes import TapeStore

OnToken = Callable[[int, str], None]  # a token's id (-1: held-back text at the end) and the text it settles


def show_no_token(token: int, text: str) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class SessionResources:
    """What `serve`, `ask`, `deal` and `prepare` work with.

    links: to the parties that take part, connected.  ledger: books their traffic.  public: what all agree on.
    say: told in words how far the session is.  on_token: at the client, gets the answer.
    status: what an operator sees.  checkpointer: keeps the session, or does not.
    tapes: what the dealer dealt before, in place of a link to it.  idle_s: longest pause between turns.
    setups: what this party keeps of models and documents for later sessions; None: nothing beyond this one.
    shards: where this party's matrices lie, if not in this process.
    document: the public name of the session's, or that there is none, or that it is not told.
    """

    links: Links
    ledger: Ledger
    public: PublicConfig
    say: Say = quiet
    on_token: OnToken = show_no_token
    status: SessionStatus = field(default_factory=SessionStatus)
    checkpointer: Checkpointer = field(default_factory=Checkpointer)
    tapes: TapeStore | None = None
    idle_s: float = 1800.0
    setups: Setups = None
    document: str = NO_NAME
    shards: Shards | None = None
    began: float = field(default_factory=time.perf_counter)  # s, of that clock

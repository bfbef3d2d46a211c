"""`--prepare`: the dealer's part of a session, dealt before there is one, and stored by the others.

All three read the program of a whole session by shapes. Only public sizes are needed: the server's model
and document and the client's question give no more than their lengths and shape.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpcache.config import PublicConfig
from mpcache.engines.registry import engine
from mpcache.errors import PolicyError
from mpcache.rank import Rank
from mpcache.report.units import size
from mpcache.runtime.party import DealerParty
from mpcache.runtime.rng import SEED_BYTES, fresh_seed
from mpcache.session import Session
from mpcache.transport.link import Link
from mpcache_parties.roles import Document, Facts, Question, agreed_facts, sizes_of, tensor_of
from mpcache_parties.state.tapes import TapeStore, TapeWriter

Links = Mapping[Rank, Link]
Say = Callable[[str], None]


def prepare(
    me: Rank,
    links: Links,
    public: PublicConfig,
    own: Document | Question | None,
    store: TapeStore | None,
    say: Say,
) -> None:
    """One batch of tapes, for a session of `public.max_new_tokens` tokens. store: at server and client.

    Raises StateError (a full disk), PolicyError (a plan that the document decides) or what a link raises.
    """
    _, facts = agreed_facts(me, links, own, public)
    if not facts.policy.policy.plan_is_public:
        raise PolicyError(f"policy {public.policy}: the document decides its plan; no tape can be prepared")
    if store is None:
        _deal(links, public, facts, say)
    else:
        _store(me, links[Rank.DEALER], public, facts, store, say)


def _deal(links: Links, public: PublicConfig, facts: Facts, say: Say) -> None:
    batch = secrets.token_hex(16)
    seeds = {rank: fresh_seed() for rank in links}
    for rank, link in links.items():
        link.send_facts("tapes/batch", {"batch": batch})
        link.send("seeds/tape", [tensor_of(seeds[rank])])

    def stored(phase: str) -> None:
        for link in links.values():
            link.recv_facts(f"stored/{phase}")

    ledger = links[Rank.SERVER].ledger
    _read(facts, public, DealerParty(dict(links), seeds, ledger), stored)
    n = ledger.total().offline_sent
    say(f"dealer: dealt {size(n)} for {public.max_new_tokens} tokens, batch {batch}")


def _store(me: Rank, dealer: Link, public: PublicConfig, facts: Facts, store: TapeStore, say: Say) -> None:
    batch = str(dealer.recv_facts("tapes/batch").get("batch"))
    (seed,) = dealer.recv("seeds/tape", [(torch.uint8, (SEED_BYTES,))])
    writer = TapeWriter(me, dealer, store, batch)
    try:
        _read(facts, public, writer, lambda phase: writer.flush())
        writer.finish(seed, sizes_of(facts, public), public.max_new_tokens)
    except BaseException:
        writer.discard()
        raise
    say(f"{me.label}: stored {size(writer.bytes)} in {store.folder} for {public.max_new_tokens} tokens")


def _read(facts: Facts, public: PublicConfig, party: Any, done: Callable[[str], None]) -> None:
    """A whole session by shapes; `done` after each phase."""
    ops = engine(facts.protocol, Rank.SERVER, public.fraction_bits, "meta")
    session = Session(ops, party, facts.shape, facts.policy, public.reveal)
    session.setup(None)
    done("setup")
    session.context(None, None)
    done("context")
    for step in range(public.max_new_tokens):
        session.chunk(None, 1 if step else facts.question)
        done(f"decode{step}" if step else "question")

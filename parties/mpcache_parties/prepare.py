"""Prepare (`--prepare`) the dealer's part of a session: dealt before there is one, stored by the others.

All three read the program of a whole session by shapes. Only public sizes are needed: the server's model
and document and the client's question give no more than their lengths and shape.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.cost.tally import Cost, sum_tallies
from mpcache.engines.registry import engine
from mpcache.errors import PolicyError
from mpcache.phases import EVICTION, private_phase
from mpcache.rank import Rank
from mpcache.report.units import duration, size
from mpcache.runtime.party import DealerParty
from mpcache.session import Session
from mpcache_parties.facts import Facts, agreed_facts, filled, tape_sizes
from mpcache_parties.farm import BatchOrder, Farm, Message
from mpcache_parties.private_inputs import PrivateInput
from mpcache_parties.resources import SessionResources
from mpcache_parties.seeds import deal_seeds, receive_seed
from mpcache_parties.state.tapes import TapeStore, TapeWriter
from mpcache_parties.turns import PreparedTurns

WHOLE = "batch"  # in place of a phase: all of them


def prepare(
    me: Rank, resources: SessionResources, own: PrivateInput, batches: int = 1, farm: Farm | None = None
) -> None:
    """Deal, or store, batches of tapes, each for a session of `public.max_new_tokens` tokens.

    batches: how many, at the dealer; the others hear of it.  farm: who deals them, if not this process.

    Of a conversation: for the turns that the client declares, each with an answer of that length. Server and
    client store it in their store of tapes. Raises StateError (a full disk), PolicyError (a plan that the
    document decides) or what a link or a farm raises.
    """
    public, store = resources.public, resources.tapes
    _, facts = agreed_facts(me, resources.links, own, public, document=resources.document)
    if not facts.policy.plan_is_public:
        raise PolicyError(f"policy {public.policy}: the document decides its plan; no tape can be prepared")
    cost = price_batch(facts, public)
    resources.say(f"{me.label}: {_foretold(me, facts, cost)}")
    if store is None:
        _deal_batches(resources, facts, cost, batches, farm)
        return
    while _store_batch(me, resources, facts, store):
        pass


def price_batch(facts: Facts, public: PublicConfig) -> Cost:
    """Price what a batch is dealt for: a session, with its set-up."""
    (question, chunks), *rest = _turns(facts)
    return price(
        facts.shape, facts.policy, facts.context, question, facts.protocol, chunks,
        bits=public.fraction_bits, reveal=public.reveal, standing=False, grid=public.length_grid,
        later=[tokens for tokens, _ in rest], reading=facts.reading,
    )  # fmt: skip


def _foretold(me: Rank, facts: Facts, cost: Cost) -> str:
    """Say how much is to be dealt and stored, and what it serves."""
    total = sum_tallies((phase, cost.total(phase)) for phase in cost.phases)
    serves = f"one answer of up to {facts.limit} tokens to a question of {facts.question}"
    if facts.turns:
        serves = f"one conversation of {PreparedTurns(facts.turns, facts.limit)}"
    if me is Rank.DEALER:
        return f"dealing {size(total.offline)} for {serves} ..."
    mine = total.server_offline if me is Rank.SERVER else total.client_offline
    return f"{size(mine)} to store, for {serves} ..."


def _deal_batches(
    resources: SessionResources, facts: Facts, cost: Cost, count: int, farm: Farm | None
) -> None:
    """Deal batches one after another, here or by a farm, which is ahead."""
    public, start = resources.public, time.perf_counter()
    ledger = resources.links[Rank.SERVER].ledger
    if farm is not None:
        dealt = farm.batches(count, facts, public, read_by_shapes, cost)
        for number, (order, phases) in enumerate(dealt, 1):
            _hand_on(resources, number, count, order, phases)
    else:
        for number in range(1, count + 1):
            _deal_batch(resources, facts, number, count)
    n, ms = ledger.total().offline_sent, 1000 * (time.perf_counter() - start)
    many = f"{count} batches, {duration(ms / count)} each, " if count > 1 else ""
    resources.say(f"dealer: dealt {many}{size(n)} for {facts.limit} tokens{' each' if many else ''}")


def _announce(resources: SessionResources, name: str, number: int, count: int) -> None:
    """Say which batch comes now. Both parties have stored the one before it."""
    for link in resources.links.values():
        link.send_facts("tapes/batch", {"batch": name, "number": number, "of": count})
    resources.say(f"dealer: batch {name}, {number} of {count}")


def _stored(resources: SessionResources, phase: str) -> None:
    """Wait until both parties have stored a phase."""
    for link in resources.links.values():
        link.recv_facts(f"stored/{phase}")


def _deal_batch(resources: SessionResources, facts: Facts, number: int, count: int) -> None:
    links, batch = resources.links, secrets.token_hex(16)
    _announce(resources, batch, number, count)
    dealer = DealerParty(dict(links), batch, deal_seeds(links), links[Rank.SERVER].ledger)
    for phase in read_by_shapes(facts, resources.public, dealer):
        _stored(resources, phase)
    _stored(resources, WHOLE)


def _hand_on(
    resources: SessionResources, number: int, count: int, order: BatchOrder,
    phases: Iterator[tuple[str, list[Message]]],
) -> None:  # fmt: skip
    """Send what a worker has dealt, in its order."""
    _announce(resources, order.name, number, count)
    deal_seeds(resources.links, order.seeds)
    for phase, messages in phases:
        for message in messages:
            resources.links[message["to"]].send(message["step"], message["tensors"])
        _stored(resources, phase)
    _stored(resources, WHOLE)


def _store_batch(me: Rank, resources: SessionResources, facts: Facts, store: TapeStore) -> bool:
    """Store a batch; return whether another one comes."""
    dealer, public = resources.links[Rank.DEALER], resources.public
    tokens = facts.limit
    about = dealer.recv_facts("tapes/batch")
    batch = str(about.get("batch"))
    seed = receive_seed(dealer)
    writer = TapeWriter(me, dealer, store, batch)
    try:
        for _ in read_by_shapes(facts, public, writer):
            writer.flush()
        writer.finish(seed, tape_sizes(facts, public), tokens, facts.turns)
    except BaseException:
        writer.discard()
        raise
    resources.say(f"{me.label}: stored {size(writer.bytes)} in {store.folder} for {tokens} tokens")
    dealer.order.begin_again()
    dealer.send_facts(f"stored/{WHOLE}", {"stored": True})
    return about.get("number") != about.get("of")


def read_by_shapes(facts: Facts, public: PublicConfig, party: Any) -> Iterator[str]:
    """Go through a whole session by shapes; yields each phase when it has ended. To be heard to the end."""
    ops = engine(facts.protocol, Rank.SERVER, public.fraction_bits, "meta")
    session = Session(ops, party, facts.shape, facts.policy, public.reveal, public.length_grid)
    session.setup(None)
    yield "setup"
    session.context(None, None)
    yield "context"
    phases = [private_phase(i + 1) for i in range(len(facts.reading.chunks))]
    phases += [EVICTION] * (facts.reading.eviction is not None)
    for phase, _ in zip(phases, session.read_document(facts.reading, None), strict=True):
        yield phase
    for question, chunks in _turns(facts):
        for step in range(chunks):
            phase = session.place.phase
            session.chunk(None, 1 if step else question)
            yield phase
        session.next_turn()


def _turns(facts: Facts) -> list[tuple[int, int]]:
    """Return of each turn its question, in tokens, and how many chunks it has."""
    if not facts.turns:
        return [(facts.question, facts.limit)]
    return [(question, filled(facts.limit)) for question in facts.turns]

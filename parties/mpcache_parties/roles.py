"""Run each party from connected links to the end of a session: one function per rank.

    facts -> seeds -> SETUP -> CONTEXT, and the client's document -> (QUESTION -> DECODE ...) for each turn

A resumed session takes facts, CONTEXT and the chunks it had from what each party kept on its disk
(`mpcache_parties.state.checkpoint`), and goes on from there. The three functions stand side by side:
what one sends, another receives, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mpcache.answer import TimedSession
from mpcache.cache import Cache
from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.console.signals import between_tokens, stopping, token_by_token
from mpcache.engines.registry import engine
from mpcache.limits import check_document, check_fitted
from mpcache.phases import DOCUMENT, ChunkPlace
from mpcache.policy.layer_view import OwnersContext
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration
from mpcache.runtime.party import DealerParty
from mpcache.runtime.side import Side
from mpcache_parties.answer_pace import Foretold, LayerPace
from mpcache_parties.asking import Asking
from mpcache_parties.client_pace import ClientPace, NoMoreTapes, hear_more
from mpcache_parties.facts import (
    Facts,
    agreed_facts,
    announce_counts,
    counts_of,
    receive_counts,
)
from mpcache_parties.kernel_choice import choose_kernels, timed_kernels
from mpcache_parties.private_inputs import Conversation, Document, Question, private_digest
from mpcache_parties.private_reading import read_private
from mpcache_parties.public_texts import framing_of
from mpcache_parties.resources import SessionResources
from mpcache_parties.seeds import computing_party, deal_seeds
from mpcache_parties.set_up import ClientSetUp, DealerSetUp, ServerSetUp, set_up_bytes, stands
from mpcache_parties.state.checkpoint import Checkpoint
from mpcache_parties.state.snapshot import copied, join_guard
from mpcache_parties.state.tapes import TapeLink
from mpcache_parties.turns import PreparedTurns, TurnsHeard, TurnSizes, skip_undone, tell_dealt

AHEAD = 2  # decode steps that the dealer may be ahead of the client: it bounds the tapes that wait


def serve(resources: SessionResources, own: Document) -> Report:
    """Rank 0: open the masked weights, read the document, evict, and compute blindly."""
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    identity = public.flat() | {"model": own.model.digest, "document": own.digest}
    earlier = checkpointer.meet(links, identity)
    told, facts = agreed_facts(Rank.SERVER, links, own, public, earlier, resources.document)

    party, wait = computing_party(Rank.SERVER, resources, facts)
    session = _session(Rank.SERVER, party, facts, resources)
    set_up = ServerSetUp(resources, session, facts)
    if earlier is None:
        facts, prefill_ms = _open_document(resources, session, own, facts, set_up)
        _begin(resources, identity, told, facts, session, {"prefill_ms": prefill_ms})
    else:
        prefill_ms = earlier.own["prefill_ms"]
        if earlier.operands is None:
            set_up.weights(own)
        _go_on(session, earlier)
        resources.say(f"server: resumed after {earlier.place.reached}")
    read_private(Rank.SERVER, resources, session, facts)
    kept_turns = None if earlier is None else earlier.own
    prepared = _prepared(resources, facts, wait.tape)
    turns = TurnsHeard(links[Rank.CLIENT], facts, session, resources.idle_s, kept_turns, prepared)
    del earlier

    for turn in turns:
        with token_by_token():
            for step in range(session.place.step, turn.limit):
                if step:
                    if not hear_more(links[Rank.CLIENT], session.place):
                        break
                    between_tokens(step)
                session.chunk(None, 1 if step else turn.question)
                checkpointer.token(session, resources.ledger, turns.kept())
        if facts.conversation and prepared is None:
            skip_undone(links[Rank.DEALER], session.place.turn)
        checkpointer.turn_ended(session)
    report = _report(Rank.SERVER, facts, session, resources)
    checkpointer.end(links)
    wait.close()
    return replace(report, prefill_ms=prefill_ms, kernels=facts.kernels, dealer_wait_ms=wait.ms)


def _open_document(
    resources: SessionResources, session: TimedSession, own: Document, facts: Facts, set_up: ServerSetUp
) -> tuple[Facts, float]:
    """Server: go through SETUP and CONTEXT.

    Returns the facts with what the document decides, and the time of prefill and eviction in ms.
    """
    say = resources.say
    kernels, kernel_ms = timed_kernels(choose_kernels(resources.public.kernels, own.device))
    set_up.weights(own)
    if own.note:
        say(f"server: {own.note}")
    say(f"server: set-up done in {duration(session.ms['setup'])}")
    start = time.perf_counter()
    known: OwnersContext = own.packed or set_up.prefilled(own)
    if facts.protocol != ProtocolName.STOCK:
        check_document(known, facts.policy, facts.shape, facts.room)
    prefill_ms = 1000 * (time.perf_counter() - start)
    if facts.picked:
        say(f"server: {facts.picked}")
    facts = announce_counts(resources.links, facts, known, kernels)
    start, in_kernels = time.perf_counter(), sum(kernel_ms)
    if facts.protocol != ProtocolName.STOCK:
        check_fitted(known, facts.policy, kernels, facts.room)
    prefill_ms += 1000 * (time.perf_counter() - start) - (sum(kernel_ms) - in_kernels)
    session.policy = facts.policy
    set_up.context(own, known, kernels)
    prefill_ms += sum(kernel_ms)
    how = "opened as it was packed" if own.packed is not None else "prefill and eviction"
    say(
        f"server: context of {facts.context} tokens, {_kept(facts)} kept: "
        f"{how} {duration(prefill_ms)} (kernels: {facts.kernels})"
    )
    for line in facts.policy.plan.lines():
        say(f"server: {line}")
    return facts, prefill_ms


def ask(resources: SessionResources, own: Question | Conversation) -> Report:
    """Rank 1: learn the logits, choose the tokens, and show each with the text that it settles.

    A resumed answer is told from its beginning, and no token of it is chosen twice.
    """
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    say = resources.say
    identity = public.flat() | _identity(own, public)
    earlier = checkpointer.meet(links, identity)
    told, facts = agreed_facts(Rank.CLIENT, links, own, public, earlier, resources.document)

    party, wait = computing_party(Rank.CLIENT, resources, facts)
    session = _session(Rank.CLIENT, party, facts, resources)
    framing, set_up = framing_of(told, facts.shape, public), ClientSetUp(resources, session, facts)
    if isinstance(pace := resources.status.on_layer, LayerPace):
        pace.layers = facts.shape.layers
    document = [] if own.document is None else framing.frame_private(own.document)
    if earlier is None:
        foretold = Foretold(facts, public) if facts.policy.plan_is_public else None
        set_up.weights()
        say(f"client: set-up done in {duration(session.ms['setup'])}")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        set_up.context()
        asking = Asking(
            resources, facts, session, framing, own.document,
            prepared=_prepared(resources, facts, wait.tape),
        )  # fmt: skip
        _begin(resources, identity, told, facts, session, asking.kept())
        read_private(Rank.CLIENT, resources, session, facts, document)
        say(f"client: {_asking(facts, (foretold or Foretold(facts, public)).told())}")
    else:
        if earlier.operands is None:
            set_up.weights()
        _go_on(session, earlier)
        asking = Asking(resources, facts, session, framing, own.document, earlier.own)
        whole = "" if facts.conversation else "; the answer from its beginning:"
        say(f"client: resumed after {earlier.place.reached}{whole}")
        read_private(Rank.CLIENT, resources, session, facts, document)
    del earlier

    wait.ms = 0.0
    if isinstance(own, Conversation):
        asking.converse(own)
    else:
        asking.ask_once(own)
    report = _report(Rank.CLIENT, facts, session, resources)
    checkpointer.end(links)
    wait.close()
    return replace(
        report, dealer_wait_ms=wait.ms, token_ids=asking.ids, text=asking.text, turns=asking.turns,
        in_range=session.in_range,
    )  # fmt: skip


def _prepared(resources: SessionResources, facts: Facts, tape: TapeLink | None) -> PreparedTurns | None:
    """Return the turns that a conversation has tapes for, and say so; None where a dealer is there."""
    if tape is None or not facts.conversation:
        return None
    prepared = PreparedTurns(tuple(tape.turns), tape.tokens)
    resources.say(f"{tape.me.label}: prepared: {prepared}")
    return prepared


def _identity(own: Question | Conversation, public: PublicConfig) -> dict[str, str]:
    """Return what a resumed session of the client must have in common with the first run."""
    document = {} if own.document is None else {"document": private_digest(own.document)}
    if isinstance(own, Conversation):
        return {"kind of session": "a conversation", **document}
    own.sampling.check(public.reveal)
    return {
        "kind of session": "one answer",
        "question": private_digest(own.text), "sampling": str(own.sampling),
        "stop_at_eos": str(own.stop_at_eos), "stop": private_digest(own.stop_texts), **document,
    }  # fmt: skip


def _asking(facts: Facts, foretold: str) -> str:
    kept = f"{facts.context}, of which {_kept(facts)} are kept"
    if facts.private:
        kept += f", and {facts.reading.kept} of the client's {facts.private}"
    estimate = foretold and f"; {foretold}"
    if facts.conversation:
        return f"a context of {kept}; room for {facts.room} tokens of questions and answers{estimate}"
    return f"asking {facts.question} tokens about {kept}{estimate} ..."


def deal(resources: SessionResources) -> Report:
    """Rank 2: read the same program by shapes alone and send the correlated randomness ahead."""
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    ledger = resources.ledger
    earlier = checkpointer.meet(links, public.flat())
    told, facts = agreed_facts(Rank.DEALER, links, None, public, earlier, resources.document)

    party = DealerParty(dict(links), facts.session, deal_seeds(links), ledger)
    session = _session(Rank.SERVER, party, facts, resources, "meta")
    set_up = DealerSetUp(resources, session, facts)
    if earlier is None:
        set_up.weights()
        resources.say("dealer: set-up done; from now on a little ahead of the client")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        set_up.context()
        _begin(resources, public.flat(), told, facts, session, {})
    else:
        if earlier.operands is None:
            set_up.weights()
        _go_on(session, earlier)
        resources.say(f"dealer: resumed after {earlier.place.reached}")
    read_private(Rank.DEALER, resources, session, facts)
    kept_turns = None if earlier is None else earlier.own
    turns = TurnsHeard(links[Rank.CLIENT], facts, session, resources.idle_s, kept_turns)
    del earlier

    for turn in turns:
        with token_by_token():
            _deal_turn(session, resources, turn, turns)
        if facts.conversation:
            tell_dealt(links, session.place.turn)
        checkpointer.turn_ended(session)
    report = _report(Rank.DEALER, facts, session, resources)
    checkpointer.end(links)
    return report


def _deal_turn(
    session: TimedSession, resources: SessionResources, turn: TurnSizes, turns: TurnsHeard
) -> None:
    """Deal until the client says that the answer ends, at most AHEAD steps ahead of it.

    A tape that is being dealt then is left where it is: the others leave it, too. Where there may be further
    turns the session goes back to where the others are.
    """
    goes_on, checkpointer = turns.go_on, resources.checkpointer
    begun = max(0, session.place.step - 1)
    pace, start, chunks = (
        ClientPace(resources.links, session.place.turn, begun),
        session.place,
        session.chunks,
    )
    caches: dict[int, Cache] = {}  # before each step that the client may not come to
    for step in range(start.step, turn.limit):
        while step and (pace.begun < step - AHEAD or stopping()):
            if not pace.goes_on():
                break
            if pace.begun == step:  # only a stop lets the client get so far: all that was dealt is used
                between_tokens(step)
        if pace.ended:
            break
        if goes_on:
            caches = {later: cache for later, cache in caches.items() if later > pace.begun}
            caches[step] = copied(session.cache)
        try:
            with pace.watched(step):
                session.chunk(None, 1 if step else turn.question)
        except NoMoreTapes:
            break
        checkpointer.token(session, resources.ledger, turns.kept())
    while pace.begun < turn.limit - 1 and not pace.ended:
        pace.goes_on()
    if goes_on and pace.begun in caches and pace.ended:
        place = ChunkPlace(start.turn, pace.begun)
        session.rewind(caches[pace.begun], chunks + pace.begun - start.step, place)
        checkpointer.forget_after(session.chunks)


def _session(
    me: Rank, party: Any, facts: Facts, resources: SessionResources, device: str = "cpu"
) -> TimedSession:
    public = resources.public
    ops = engine(facts.protocol, me, public.fraction_bits, device)
    status, reveal, grid = resources.status, public.reveal, public.length_grid
    return TimedSession(ops, party, facts.shape, facts.policy, status, reveal, grid)


def _begin(
    resources: SessionResources, identity: Mapping[str, str], told: Mapping[str, Any], facts: Facts,
    session: TimedSession, own: Mapping[str, Any],
) -> None:  # fmt: skip
    """Keep a session whose context has been read: without the weights, where their masks outlive it.

    The client's document comes next, where there is one.
    """
    if facts.private:
        session.place = DOCUMENT
    operands = None if stands(facts, resources) else session.operands
    kept = {**told, **counts_of(facts)}
    resources.checkpointer.begin(identity, kept, session, resources.ledger, own, operands)


def _go_on(session: TimedSession, earlier: Checkpoint) -> None:
    """Take up what an earlier run of the session kept."""
    if isinstance(side := getattr(session.ops, "side", None), Side):
        join_guard(earlier.cache, side.guard)
    operands = session.operands if earlier.operands is None else earlier.operands
    session.restore(operands, earlier.cache, earlier.step, earlier.place)


def _kept(facts: Facts) -> int:
    """Return how many tokens stay: in the layer that keeps most, or of heads that differ in the mean."""
    return facts.policy.plan.tokens_kept(facts.shape.kv_heads)


def _report(me: Rank, facts: Facts, session: TimedSession, resources: SessionResources) -> Report:
    checkpointer, ledger = resources.checkpointer, resources.ledger
    return Report(
        rank=int(me),
        protocol=facts.protocol,
        context_tokens=facts.context,
        private_tokens=facts.private,
        private_kept=facts.reading.kept,
        private_chunk=max(facts.reading.chunks, default=0),
        question_tokens=facts.question,
        kept_tokens=[layer.kept for layer in facts.policy.plan.layers],
        plan=facts.policy.plan.to_dict(),
        phases=checkpointer.phases(ledger, session),
        wire_bytes=checkpointer.wire_bytes(ledger),
        seconds=time.perf_counter() - resources.began,
        setup_bytes=set_up_bytes(ledger),
        checkpoint_ms=checkpointer.ms,
        checkpoint_bytes=checkpointer.bytes,
    )

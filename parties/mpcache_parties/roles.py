"""Run each party from connected links to the end of a session: one function per rank.

    facts -> seeds -> SETUP -> CONTEXT, and the client's document -> (QUESTION -> DECODE ...) for each turn

A resumed session takes facts, SETUP, CONTEXT and the chunks it had from what each party kept on its
disk (`mpcache_parties.state.checkpoint`), and goes on from there. The three functions stand side by side:
what one sends, another receives, in the same order.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Any

from mpcache.answer import TimedSession
from mpcache.cache import Cache
from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.console.signals import between_tokens, stopping, token_by_token
from mpcache.engines.registry import engine
from mpcache.limits import check_document, check_fitted, largest_score_held
from mpcache.model.prefill import Prefill, prefill
from mpcache.phases import ChunkPlace
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration
from mpcache.runtime.party import DealerParty
from mpcache.runtime.side import Side
from mpcache_parties.asking import Asking
from mpcache_parties.client_pace import ClientPace, NoMoreTapes, hear_more
from mpcache_parties.facts import (
    Facts,
    agreed_facts,
    announce_counts,
    counts_of,
    framing_of,
    receive_counts,
)
from mpcache_parties.kernel_choice import choose_kernels, timed_kernels
from mpcache_parties.private_inputs import Conversation, Document, Question
from mpcache_parties.private_reading import read_private
from mpcache_parties.resources import SessionResources
from mpcache_parties.seeds import computing_party, deal_seeds
from mpcache_parties.set_up import ClientSetUp, DealerSetUp, ServerSetUp, set_up_bytes
from mpcache_parties.state.checkpoint import Checkpoint
from mpcache_parties.state.snapshot import copied, join_guard
from mpcache_parties.turns import TurnSizes, skip_undone, tell_dealt, turns_heard

AHEAD = 2  # decode steps that the dealer may be ahead of the client: it bounds the tapes that wait


def serve(resources: SessionResources, own: Document) -> Report:
    """Rank 0: open the masked weights, read the document, evict, and compute blindly."""
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    identity = public.flat() | {"model": own.model.digest, "document": _digest(own.tokens)}
    earlier = checkpointer.meet(links, identity)
    told, facts = agreed_facts(Rank.SERVER, links, own, public, earlier)

    party, wait = computing_party(Rank.SERVER, resources, facts)
    session = _session(Rank.SERVER, party, facts, resources)
    if earlier is None:
        facts, prefill_ms = _open_document(resources, session, own, facts)
        read_private(Rank.SERVER, resources, session, facts)
        kept = {"prefill_ms": prefill_ms}
        checkpointer.begin(identity, told | counts_of(facts), session, resources.ledger, kept)
    else:
        prefill_ms = earlier.own["prefill_ms"]
        _go_on(session, earlier)
        resources.say(f"server: resumed after {_reached(earlier.step)}")
    del earlier

    for turn in turns_heard(links[Rank.CLIENT], facts, session, resources.idle_s):
        with token_by_token():
            for step in range(session.place.step, turn.limit):
                if step:
                    if not hear_more(links[Rank.CLIENT], session.place):
                        break
                    between_tokens(step)
                session.chunk(None, 1 if step else turn.question)
                checkpointer.token(session, resources.ledger, {})
        if facts.conversation:
            skip_undone(links[Rank.DEALER], session.place.turn)
    report = _report(Rank.SERVER, facts, session, resources)
    checkpointer.end(links)
    wait.close()
    return replace(report, prefill_ms=prefill_ms, kernels=facts.kernels, dealer_wait_ms=wait.ms)


def _open_document(
    resources: SessionResources, session: TimedSession, own: Document, facts: Facts
) -> tuple[Facts, float]:
    """Server: go through SETUP and CONTEXT.

    Returns the facts with what the document decides, and the time of prefill and eviction in ms.
    """
    say = resources.say
    kernels, kernel_ms = timed_kernels(choose_kernels(resources.public.kernels, own.device))
    set_up = ServerSetUp(resources, session, facts)
    set_up.weights(own)
    if own.note:
        say(f"server: {own.note}")
    say(f"server: set-up: weights masked in {duration(session.ms['setup'])}")
    start = time.perf_counter()
    window = facts.policy.window
    held = largest_score_held(facts.policy, facts.shape)

    def read() -> Prefill:
        return prefill(own.model, own.tokens, own.device, window=window, exact_from=held)

    prefilled = set_up.prefilled(own, read, window, held)
    if facts.protocol != ProtocolName.STOCK:
        check_document(prefilled, facts.policy, facts.shape, facts.room)
    prefill_ms = 1000 * (time.perf_counter() - start)
    if facts.picked:
        say(f"server: {facts.picked}")
    facts = announce_counts(resources.links, facts, prefilled, kernels)
    start, in_kernels = time.perf_counter(), sum(kernel_ms)
    if facts.protocol != ProtocolName.STOCK:
        check_fitted(prefilled, facts.policy, kernels, facts.room)
    prefill_ms += 1000 * (time.perf_counter() - start) - (sum(kernel_ms) - in_kernels)
    session.policy = facts.policy
    set_up.context(own, prefilled, kernels)
    prefill_ms += sum(kernel_ms)
    say(
        f"server: context of {facts.context} tokens, {_kept(facts)} kept: "
        f"prefill and eviction {duration(prefill_ms)} (kernels: {facts.kernels})"
    )
    for line in facts.policy.plan.lines():
        say(f"server: {line}")
    return facts, prefill_ms


def ask(resources: SessionResources, own: Question | Conversation) -> Report:
    """Rank 1: learn the logits, choose the tokens, and show each with the text that it settles.

    A resumed answer is told from its beginning, and no token of it is chosen twice.
    """
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    say, ledger = resources.say, resources.ledger
    identity = public.flat() | _identity(own, public)
    earlier = checkpointer.meet(links, identity)
    told, facts = agreed_facts(Rank.CLIENT, links, own, public, earlier)

    party, wait = computing_party(Rank.CLIENT, resources, facts)
    session = _session(Rank.CLIENT, party, facts, resources)
    framing = framing_of(told, facts.shape, public)
    document = [] if own.document is None else framing.frame_private(own.document)
    if earlier is None:
        set_up = ClientSetUp(resources, session, facts)
        set_up.weights()
        say(f"client: set-up done in {duration(session.ms['setup'])}")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        set_up.context()
        read_private(Rank.CLIENT, resources, session, facts, document)
        asking = Asking(resources, facts, session, framing, own.document)
        say(f"client: {_asking(facts)}")
        checkpointer.begin(identity, told | counts_of(facts), session, ledger, asking.kept())
    else:
        _go_on(session, earlier)
        asking = Asking(resources, facts, session, framing, own.document, earlier.own)
        say(f"client: resumed after {_reached(earlier.step)}; the answer from its beginning:")
    del earlier

    wait.ms = 0.0
    if isinstance(own, Conversation):
        asking.converse(own)
    else:
        asking.answer(own, asking.framed(own.text), facts.limit)
    report = _report(Rank.CLIENT, facts, session, resources)
    checkpointer.end(links)
    wait.close()
    return replace(
        report, dealer_wait_ms=wait.ms, token_ids=asking.ids, text=asking.text, turns=asking.turns,
        in_range=session.in_range,
    )  # fmt: skip


def _identity(own: Question | Conversation, public: PublicConfig) -> dict[str, str]:
    """Return what a resumed session of the client must have in common with the first run."""
    if isinstance(own, Conversation):
        return {}
    document = {} if own.document is None else {"document": _digest(own.document)}
    own.sampling.check(public.reveal)
    return {
        "question": _digest(own.text), "sampling": str(own.sampling), "stop_at_eos": str(own.stop_at_eos),
        "stop": _digest(own.stop_texts), **document,
    }  # fmt: skip


def _asking(facts: Facts) -> str:
    kept = f"{facts.context}, of which {_kept(facts)} are kept"
    if facts.private:
        kept += f", and {facts.reading.kept} of the client's {facts.private}"
    if facts.conversation:
        return f"a context of {kept}; room for {facts.room} tokens of questions and answers"
    return f"asking {facts.question} tokens about {kept} ..."


def deal(resources: SessionResources) -> Report:
    """Rank 2: read the same program by shapes alone and send the correlated randomness ahead."""
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    ledger = resources.ledger
    earlier = checkpointer.meet(links, public.flat())
    told, facts = agreed_facts(Rank.DEALER, links, None, public, earlier)

    party = DealerParty(dict(links), facts.session, deal_seeds(links), ledger)
    session = _session(Rank.SERVER, party, facts, resources, "meta")
    if earlier is None:
        set_up = DealerSetUp(resources, session, facts)
        set_up.weights()
        resources.say("dealer: set-up done; from now on a little ahead of the client")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        set_up.context()
        read_private(Rank.DEALER, resources, session, facts)
        checkpointer.begin(public.flat(), told | counts_of(facts), session, ledger, {})
    else:
        _go_on(session, earlier)
        resources.say(f"dealer: resumed after {_reached(earlier.step)}")
    del earlier

    for turn in turns_heard(links[Rank.CLIENT], facts, session, resources.idle_s):
        with token_by_token():
            _deal_turn(session, resources, turn, facts.conversation)
        if facts.conversation:
            tell_dealt(links, session.place.turn)
    report = _report(Rank.DEALER, facts, session, resources)
    checkpointer.end(links)
    return report


def _deal_turn(session: TimedSession, resources: SessionResources, turn: TurnSizes, goes_on: bool) -> None:
    """Deal until the client says that the answer ends, at most AHEAD steps ahead of it.

    A tape that is being dealt then is left where it is: the others leave it, too. goes_on: there may be
    further turns, before which the session goes back to where the others are.
    """
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
        resources.checkpointer.token(session, resources.ledger, {})
    while pace.begun < turn.limit - 1 and not pace.ended:
        pace.goes_on()
    if goes_on and pace.begun in caches and pace.ended:
        place = ChunkPlace(start.turn, pace.begun)
        session.rewind(caches[pace.begun], chunks + pace.begun - start.step, place)


def _session(
    me: Rank, party: Any, facts: Facts, resources: SessionResources, device: str = "cpu"
) -> TimedSession:
    public = resources.public
    ops = engine(facts.protocol, me, public.fraction_bits, device)
    return TimedSession(ops, party, facts.shape, facts.policy, resources.status, public.reveal)


def _go_on(session: TimedSession, earlier: Checkpoint) -> None:
    """Take up what an earlier run of the session kept."""
    if isinstance(side := getattr(session.ops, "side", None), Side):
        join_guard(earlier.cache, side.guard)
    session.restore(earlier.operands, earlier.cache, earlier.step, ChunkPlace(1, earlier.step))


def _digest(secret: object) -> str:
    """Return a digest of a party's own input, for its own file, to compare on resuming."""
    return hashlib.sha256(repr(secret).encode("utf-8", "surrogatepass")).hexdigest()


def _kept(facts: Facts) -> int:
    """Return how many tokens stay: in the layer that keeps most, or of heads that differ in the mean."""
    return facts.policy.plan.tokens_kept(facts.shape.kv_heads)


def _reached(step: int) -> str:
    """Return how far a session was, in words."""
    return f"{step} token{'s' * (step != 1)}" if step else "the context"


def _report(me: Rank, facts: Facts, session: TimedSession, resources: SessionResources) -> Report:
    checkpointer, ledger = resources.checkpointer, resources.ledger
    return Report(
        rank=int(me),
        protocol=facts.protocol,
        context_tokens=facts.context,
        private_tokens=facts.private,
        private_kept=facts.reading.kept,
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

"""Run each party from connected links to the end of a session: one function per rank.

    facts -> seeds -> SETUP -> CONTEXT -> QUESTION -> DECODE ... -> the account of it

A resumed session takes facts, SETUP, CONTEXT and the chunks it had from what each party kept on its
disk (`mpcache_parties.state.checkpoint`), and goes on from there. The three functions stand side by side:
what one sends, another receives, in the same order.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

from mpcache.answer import TimedSession, answer
from mpcache.choices import ProtocolName
from mpcache.console.signals import between_tokens, stopping, token_by_token
from mpcache.engines.registry import engine
from mpcache.errors import LinkError
from mpcache.limits import check_document, check_fitted, largest_score_held
from mpcache.model.prefill import prefill
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration
from mpcache.runtime.party import DealerParty
from mpcache.transport.link import Links
from mpcache_parties.client_pace import ClientPace, NoMoreTapes, hear_more, more_step
from mpcache_parties.facts import (
    Facts,
    agreed_facts,
    announce_counts,
    counts_of,
    read_tokenizer,
    receive_counts,
)
from mpcache_parties.kernel_choice import choose_kernels, timed_kernels
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.seeds import computing_party, deal_seeds

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
        kept = {"prefill_ms": prefill_ms}
        checkpointer.begin(identity, told | counts_of(facts), session, resources.ledger, kept)
    else:
        prefill_ms = earlier.own["prefill_ms"]
        session.restore(earlier.operands, earlier.cache, earlier.step)
        resources.say(f"server: resumed after {_reached(earlier.step)}")
    del earlier

    with token_by_token():
        for step in range(session.chunks, public.max_new_tokens):
            if step:
                if not hear_more(links[Rank.CLIENT], step):
                    break
                between_tokens(step)
            session.chunk(None, 1 if step else facts.question)
            checkpointer.token(session, resources.ledger, {})
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
    session.setup(own.model.weights)
    say(f"server: set-up: weights masked and opened in {duration(session.ms['setup'])}")
    start = time.perf_counter()
    window = facts.policy.window
    held = largest_score_held(facts.policy, facts.shape)
    prefilled = prefill(own.model, own.tokens, own.device, window=window, exact_from=held)
    if facts.protocol != ProtocolName.STOCK:
        tokens = resources.public.max_new_tokens
        check_document(prefilled, facts.policy, facts.shape, facts.question, tokens)
    prefill_ms = 1000 * (time.perf_counter() - start)
    if facts.picked:
        say(f"server: {facts.picked}")
    facts = announce_counts(resources.links, facts, prefilled, kernels)
    start, in_kernels = time.perf_counter(), sum(kernel_ms)
    if facts.protocol != ProtocolName.STOCK:
        check_fitted(prefilled, facts.policy, kernels, facts.question, resources.public.max_new_tokens)
    prefill_ms += 1000 * (time.perf_counter() - start) - (sum(kernel_ms) - in_kernels)
    session.policy = facts.policy
    session.context(prefilled, kernels)
    prefill_ms += sum(kernel_ms)
    say(
        f"server: context of {facts.context} tokens, {_kept(facts)} kept: "
        f"prefill and eviction {duration(prefill_ms)} (kernels: {facts.kernels})"
    )
    for line in facts.policy.plan.lines():
        say(f"server: {line}")
    return facts, prefill_ms


def ask(resources: SessionResources, own: Question) -> Report:
    """Rank 1: learn the logits, choose the tokens, and show each with the text that it settles.

    A resumed answer is told from its beginning, and no token of it is chosen twice.
    """
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    say, on_token, ledger = resources.say, resources.on_token, resources.ledger
    own.sampling.check(public.reveal)
    identity = public.flat() | {
        "question": _digest(own.text), "sampling": str(own.sampling), "stop_at_eos": str(own.stop_at_eos)
    }  # fmt: skip
    earlier = checkpointer.meet(links, identity)
    told, facts = agreed_facts(Rank.CLIENT, links, own, public, earlier)

    party, wait = computing_party(Rank.CLIENT, resources, facts)
    session = _session(Rank.CLIENT, party, facts, resources)
    tokenizer = read_tokenizer(told["tokenizer"], facts.shape)
    question, stream = tokenizer.encode(own.text, bos=False), tokenizer.stream()
    choose = own.sampling.chooser(public.reveal)
    ids: list[int] = []

    def kept() -> dict[str, Any]:
        return {"ids": ids, "draws": choose.state}

    if earlier is None:
        session.setup(None)
        say(f"client: set-up: masked weights received in {duration(session.ms['setup'])}")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        session.context(None, None)
        n = _kept(facts)
        say(f"client: asking {facts.question} tokens about {facts.context}, of which {n} are kept ...")
        checkpointer.begin(identity, told | counts_of(facts), session, ledger, kept())
    else:
        ids, choose.state = earlier.own["ids"], earlier.own["draws"]
        session.restore(earlier.operands, earlier.cache, earlier.step)
        say(f"client: resumed after {_reached(earlier.step)}; the answer from its beginning:")
        for token in ids:
            on_token(token, stream.push(token))
    del earlier

    def announce(step: int, more: bool) -> None:
        for link in links.values():
            with nullcontext() if more else suppress(LinkError):  # an answer that is there needs nobody
                link.send_facts(more_step(step), {"more": more})

    stops = set(facts.shape.eos_ids) if own.stop_at_eos else set()
    wait.ms = 0.0
    with token_by_token():
        for token in answer(session, question, public.max_new_tokens, choose, stops, announce, tuple(ids)):
            if new := session.chunks > len(ids):
                ids.append(token)
            checkpointer.token(session, ledger, kept())  # a token that was shown is never lost
            if new:
                on_token(token, stream.push(token))
            between_tokens(session.chunks)
    if rest := stream.end():
        on_token(-1, rest)
    report = _report(Rank.CLIENT, facts, session, resources)
    checkpointer.end(links)
    wait.close()
    return replace(report, dealer_wait_ms=wait.ms, token_ids=ids, text=tokenizer.decode(ids))


def deal(resources: SessionResources) -> Report:
    """Rank 2: read the same program by shapes alone and send the correlated randomness ahead."""
    links, public, checkpointer = resources.links, resources.public, resources.checkpointer
    ledger = resources.ledger
    earlier = checkpointer.meet(links, public.flat())
    told, facts = agreed_facts(Rank.DEALER, links, None, public, earlier)

    party = DealerParty(dict(links), facts.session, deal_seeds(links), ledger)
    session = _session(Rank.SERVER, party, facts, resources, "meta")
    if earlier is None:
        session.setup(None)
        resources.say("dealer: set-up dealt; from now on a little ahead of the client")
        facts = receive_counts(links[Rank.SERVER], facts)
        session.policy = facts.policy
        session.context(None, None)
        checkpointer.begin(public.flat(), told | counts_of(facts), session, ledger, {})
    else:
        session.restore(earlier.operands, earlier.cache, earlier.step)
        resources.say(f"dealer: resumed after {_reached(earlier.step)}")
    del earlier

    def keep() -> None:
        checkpointer.token(session, ledger, {})

    with token_by_token():
        _deal_tokens(session, links, public.max_new_tokens, facts.question, keep)
    report = _report(Rank.DEALER, facts, session, resources)
    checkpointer.end(links)
    return report


def _deal_tokens(
    session: TimedSession, links: Links, limit: int, question: int, keep: Callable[[], None]
) -> None:
    """Deal until the client says that there is no more, at most AHEAD steps ahead of it.

    A tape that is being dealt then is left where it is: the others leave it, too.
    """
    pace = ClientPace(links, begun=max(0, session.chunks - 1))
    for step in range(session.chunks, limit):
        while step and (pace.begun < step - AHEAD or stopping()):
            if not pace.goes_on():
                return
            if pace.begun == step:  # only a stop lets the client get so far: all that was dealt is used
                between_tokens(step)
        try:
            with pace.watched(step):
                session.chunk(None, 1 if step else question)
        except NoMoreTapes:
            return
        keep()
    while pace.begun < limit - 1:
        if not pace.goes_on():
            return


def _session(
    me: Rank, party: Any, facts: Facts, resources: SessionResources, device: str = "cpu"
) -> TimedSession:
    public = resources.public
    ops = engine(facts.protocol, me, public.fraction_bits, device)
    return TimedSession(ops, party, facts.shape, facts.policy, resources.status, public.reveal)


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
        question_tokens=facts.question,
        kept_tokens=[layer.kept for layer in facts.policy.plan.layers],
        plan=facts.policy.plan.to_dict(),
        phases=checkpointer.phases(ledger, session),
        wire_bytes=checkpointer.wire_bytes(ledger),
        checkpoint_ms=checkpointer.ms,
        checkpoint_bytes=checkpointer.bytes,
    )

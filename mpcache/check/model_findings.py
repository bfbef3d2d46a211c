"""What a model takes before it runs: is it supported, what does it cost, do its values stay in range."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from mpcache.answer import answer, bind_to_document
from mpcache.choices import POLICY_AUTO, ChatForm, ProtocolName
from mpcache.config import PublicConfig, Settings
from mpcache.console.inputs import read_question, read_text
from mpcache.console.terminal import Say
from mpcache.cost.choose import AUTO, pick
from mpcache.cost.planner import choose_policy
from mpcache.cost.pricing import price
from mpcache.cost.rates import RATES, modelled, offline_ms, pace_ms
from mpcache.engines.checked import CheckedOps, Range, Ranges
from mpcache.errors import MpcacheError, OutOfRange
from mpcache.limits import bind_policy, check_document, largest_score_held, with_default_policy
from mpcache.model import Model, ModelShape, demo_model_dir, find_model, load_model
from mpcache.model.chat_template import Unframed
from mpcache.model.framing import Framing, RawFraming, make_framing
from mpcache.model.loading import StoredModel, open_model
from mpcache.model.prefill import prefill
from mpcache.model.tokenizer import Tokenizer
from mpcache.policy import BoundPolicy
from mpcache.report.units import duration, size
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache.transport.network import NO_NETWORK, parse_network
from mpcache_kernels import backend
from mpcache_parties.link_check import LinkFinding

CHECKED_TOKENS = 4  # answered by the debug engine, at most
CONTEXT_TOKENS = 256  # priced where no document is given


def check_model(
    name: str,
    context: Path | None,
    question: str | None,
    question_file: Path | None,
    settings: Settings,
    say: Say,
) -> list[LinkFinding]:
    """Find out all about a model and a document, up to the first thing that is in the way.

    name: as --model has it, or `demo`. Raises BadInput: a text or a setting that cannot be used.
    """
    asked = read_question(question, question_file)
    text = None if context is None else read_text(context)
    found: list[LinkFinding] = []
    try:
        for each in _findings(name, text, asked, settings, say):
            found.append(each)
    except MpcacheError as error:
        found.append(LinkFinding("model", name, str(error), False))
    return found


def _findings(name: str, text: str | None, asked: str, settings: Settings, say: Say) -> Iterator[LinkFinding]:
    path = demo_model_dir() if name == "demo" else find_model(name)
    where, public = path.name, settings.public
    opened = open_model(path)
    shape = opened.shape
    yield LinkFinding("architecture", where, _architecture(opened), True)
    tokenizer = opened.tokenizer()
    yield LinkFinding("tokenizer", where, _tokenizer(tokenizer), True)
    ends = [f"{tokenizer.token(i)} ({i})" for i in shape.eos_ids]
    no_end = "none: each answer goes on to --max-new-tokens"
    yield LinkFinding("end tokens", where, ", ".join(ends) or no_end, True if ends else None)
    try:
        framing = make_framing(
            tokenizer, shape, public.chat is ChatForm.RAW, public.document_as, has_document=True
        )
    except Unframed as error:
        yield LinkFinding("chat template", where, str(error), False)
        return
    yield LinkFinding("chat template", where, _framed(framing, tokenizer), True)

    question = framing.frame_turn(asked, True)
    document = None if text is None else framing.frame_document(text)
    room = shape.max_positions - len(question) - public.max_new_tokens
    length = min(CONTEXT_TOKENS, max(1, room)) if document is None else len(document)
    public = with_default_policy(settings, path).public
    if public.policy == POLICY_AUTO:
        choice = choose_policy(load_model(path), public, length, len(question))
        public = public.model_copy(update={"policy": choice.spec})
        yield LinkFinding("policy", where, choice.why, True)
    say("pricing it ...")
    bound = bind_policy(shape, public, length, len(question))
    yield from _price(shape, bound, public, length, len(question))

    say("reading the weights ...")
    start = time.perf_counter()
    model = load_model(path)
    took = duration(1000 * (time.perf_counter() - start))
    numbers = sum(tensor.numel() for _, tensor in model.weights.items())
    read = f"{numbers / 1e6:.4g} million numbers, read in {took}; sha256 {model.digest[:16]}..."
    yield LinkFinding("weights", where, read, True)
    if document is None:
        yield LinkFinding("ranges", "no document", "not checked: give --context FILE", None)
        return
    say(f"answering {CHECKED_TOKENS} tokens on the debug engine ...")
    yield _ranges(model, bound, document, question, public)


def _architecture(opened: StoredModel) -> str:
    s = opened.shape
    return (
        f"{opened.about}: {s.layers} layers of width {s.width}, {s.heads} heads on {s.kv_heads} KV heads of "
        f"{s.head_dim}, MLP {s.ffn}, {s.vocab} tokens, up to {s.max_positions} positions"
    )


def _tokenizer(tokenizer: Tokenizer) -> str:
    bos = tokenizer.token(tokenizer.bos_id)
    begins = f"a text begins with {bos}" if tokenizer.adds_bos else "nothing is put before a text"
    return f"{begins}; sha256 {tokenizer.digest[:16]}..."


def _framed(framing: Framing, tokenizer: Tokenizer) -> str:
    """Say what stands around document and questions."""
    if isinstance(framing, RawFraming):
        return "no" if tokenizer.chat_template is None else "yes, and left out (--raw)"
    return "; ".join(filter(None, ("yes", framing.note, framing.single)))


def _price(
    shape: ModelShape, bound: BoundPolicy, public: PublicConfig, context: int, question: int
) -> Iterator[LinkFinding]:
    """Say what a session takes, by the cost engine."""
    network = parse_network(public.network) or NO_NETWORK
    bits, reveal, tokens = public.fraction_bits, public.reveal, public.max_new_tokens
    protocol: str = public.protocol
    if protocol == AUTO:
        protocol = pick(shape, bound, context, question, tokens, network, bits, reveal).protocol
    cost = price(shape, bound, context, question, protocol, min(2, tokens), bits, reveal)
    where = f"{bound.spec}, {protocol}, network {network.name}, {context} + {question} tokens"
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    yield LinkFinding(
        "memory", where, f"{size(cost.peak)} at each party; this machine has {size(there)}", cost.peak < there
    )
    first = offline_ms(cost, network, "question") + sum(modelled(cost, network, RATES, "question").values())
    pace = f"; then {duration(pace_ms(cost, network))} a token" if tokens > 1 else ""
    told = f"first token about {duration(first)} after the question{pace}, on one core of a common server"
    yield LinkFinding("time", where, told, True)


def _ranges(
    model: Model, bound: BoundPolicy, document: list[int], question: list[int], public: PublicConfig
) -> LinkFinding:
    """Answer on the debug engine, and say which value came nearest to its bound, or left it."""
    where = f"{bound.spec}, {len(document)} + {len(question)} tokens"
    if public.protocol == ProtocolName.STOCK:
        return LinkFinding("ranges", where, "not checked: protocol stock has ranges of its own", None)
    held, kernels = largest_score_held(bound, model.shape), backend("cpu")
    filled = prefill(model, document, window=bound.window, exact_from=held)
    policy, _ = bind_to_document(bound, model.shape, filled, kernels)
    try:
        check_document(filled, policy, model.shape, len(question) + public.max_new_tokens)
    except OutOfRange as error:
        return LinkFinding("ranges", where, str(error), False)
    ranges = Ranges(strict=False)
    session = Session(CheckedOps(public.fraction_bits), ranges, model.shape, policy)
    session.setup(model.weights)
    session.context(filled, kernels)
    limit = min(CHECKED_TOKENS, public.max_new_tokens)
    with torch.no_grad():
        answered = list(answer(session, question, limit, Sampling().chooser(), model.shape.eos_ids))
    tightest = next(iter(ranges))
    outside = [each for each in ranges if not _within(each)]
    if outside:
        return LinkFinding(
            "ranges", where, f"protocol fast would give a wrong answer: {_said(outside[0])}", False
        )
    told = f"every value of {len(answered)} tokens is within; the nearest: {_said(tightest)}"
    return LinkFinding("ranges", where, told, True)


def _within(seen: Range) -> bool:
    return seen.largest < seen.high and (seen.low is None or seen.smallest >= seen.low)


def _said(seen: Range) -> str:
    bound = f"below {seen.high:.4g}" if seen.low is None else f"{seen.low:.4g} to {seen.high:.4g}"
    values = f"{seen.largest:.4g}" if seen.low is None else f"{seen.smallest:.4g} to {seen.largest:.4g}"
    return f"{seen.operation} at {seen.step}: {values}, the range is {bound}"

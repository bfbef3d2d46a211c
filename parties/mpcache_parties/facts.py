"""Agree on what is public about a session, before anything secret moves.

The owners tell what is public about model, document and question; each party makes of it the shape, the
plan and the protocol by itself; what they have made of it is compared. In some policies the model decides
part of the plan: these counts are told with the facts. In others the document does: those are announced
later, before CONTEXT.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from mpcache.answer import bind_to_document
from mpcache.choices import POLICY_AUTO
from mpcache.config import PublicConfig
from mpcache.cost.choose import AUTO, pick
from mpcache.cost.planner import REVEALED, choose_policy
from mpcache.cost.reading import reading_plan
from mpcache.errors import BadInput, Desync, ModelError, PolicyError
from mpcache.limits import bind_conversation, bind_policy
from mpcache.model.shape import ModelShape
from mpcache.model.weights import Weights
from mpcache.padding import padded_length
from mpcache.policy import NO_DOCUMENT, BoundPolicy, LeakClass, ReadingPlan, parse_policy
from mpcache.policy.layer_view import OwnersContext
from mpcache.rank import Rank
from mpcache.transport.link import Link, Links, tensor_of
from mpcache.transport.network import parse_network
from mpcache_kernels import Backend
from mpcache_parties.handshake import NO_NAME, PROTOCOL_VERSION, confirm_facts
from mpcache_parties.kernel_choice import choose_kernels
from mpcache_parties.private_inputs import Conversation, DeclaredTurns, Document, PrivateInput, Question
from mpcache_parties.public_texts import (
    count_in,
    framing_of,
    receive_template,
    receive_tokenizer,
    text_digest,
)
from mpcache_parties.state.checkpoint import Checkpoint

MASKED_BYTES = 16  # that each party holds for a value of a weight or of the cache
FACT_CHARACTERS = 80  # of a text that the server tells
POLICY_CHARACTERS, WHY_CHARACTERS = 400, 400  # of a policy that the server picks, and of its reason
TYPICAL_QUESTION = 32  # tokens, where `auto` has to know before anything is asked


@dataclass(frozen=True)
class Facts:
    """What is public about a session, known to all before anything secret moves.

    context, private, question: the server's document, the client's, and its question, in tokens; no question
    where the session is a conversation, whose turns come later.
    reading: how the client's document is read, and what stays of it.
    limit: tokens of an answer, at most.  room: tokens that all questions and answers may take.
    turns: where tapes are prepared for a conversation, its questions in tokens.
    """

    shape: ModelShape
    context: int
    question: int
    limit: int
    room: int
    kernels: str
    policy: BoundPolicy
    digests: Mapping[str, str]  # of the weights, the tokenizer and the chat template
    protocol: str  # the config's, or what `auto` picked
    picked: str = ""  # in words, what was picked of policy and protocol, and why
    session: str = ""  # its name, drawn by the server
    turns: tuple[int, ...] = ()
    document: str = NO_NAME  # its public name, as it was said at HELLO
    reading: ReadingPlan = NO_DOCUMENT

    @property
    def private(self) -> int:
        return self.reading.tokens

    @property
    def conversation(self) -> bool:
        """Whether the client asks as often as it likes, and says each time how long its question is."""
        return self.question == 0

    def flat(self) -> dict[str, str]:
        """Return what all parties have to agree on, by field, as text."""
        fields: dict[str, object] = {f"shape.{name}": value for name, value in self.shape.to_dict().items()}
        fields |= {"context_tokens": self.context, "question_tokens": self.question, "kernels": self.kernels}
        fields |= {"new_tokens": self.limit, "room": self.room, "turns": list(self.turns)}
        fields |= {"private_tokens": self.private, "document_chunks": self.reading.chunks}
        if self.reading.eviction is not None:
            fields |= {f"eviction.{name}": value for name, value in asdict(self.reading.eviction).items()}
        fields |= self.digests
        fields |= {"protocol": self.protocol, "session": self.session, "policy": self.policy.spec}
        fields |= {"document_name": self.document}
        for index, layer in enumerate(self.policy.plan.layers):
            fields |= {f"plan.layer{index}.{name}": value for name, value in asdict(layer).items()}
        return {name: str(value) for name, value in fields.items()}


def tape_sizes(facts: Facts, public: PublicConfig) -> dict[str, Any]:
    """Return all that tapes depend on, but for the number of tokens."""
    return {
        "version": PROTOCOL_VERSION,  # another one draws other tensors, or in another order
        "shape": facts.shape.to_dict(), "context": facts.context, "question": facts.question,
        "reading": asdict(facts.reading),
        "policy": facts.policy.spec, "plan": facts.policy.plan.to_dict(),
        "protocol": facts.protocol, "fraction_bits": public.fraction_bits, "reveal": public.reveal,
        "length_grid": public.length_grid,
    }  # fmt: skip


# ------------------------------------------------------------------------------ told and compared


def agreed_facts(
    me: Rank,
    links: Links,
    own: PrivateInput,
    public: PublicConfig,
    earlier: Checkpoint | None = None,
    document: str = NO_NAME,
) -> tuple[dict[str, Any], Facts]:
    """Exchange the facts, or take those of the session's first run, and compare what each makes of them.

    document: the public name that this party has heard. Returns the facts as they were told and what this
    party makes of them. Raises BadInput, Desync or
    Mismatch.
    """
    told = _exchange_facts(me, links, own, public) if earlier is None else earlier.facts
    facts = replace(facts_of(told, public), document=document)
    confirm_facts(links, me, facts.flat())
    return told, facts


def _exchange_facts(me: Rank, links: Links, own: PrivateInput, public: PublicConfig) -> dict[str, Any]:
    """Exchange what `facts_of` starts from.

    That is what is public about `model` and `question`, told by their owners; at the client also the bytes of
    the `tokenizer`, and of the chat `template` where there is one.
    """
    match own:
        case Document():
            model = _send_model(links, own, public)
            return {"model": model, "question": links[Rank.CLIENT].recv_facts("facts/question")}
        case Question() | Conversation() | DeclaredTurns():
            model = links[Rank.SERVER].recv_facts("facts/model")
            vocabulary = receive_tokenizer(links[Rank.SERVER], model)
            shape = _shape(model)
            template = receive_template(links[Rank.SERVER], model)
            public_texts = {"tokenizer": vocabulary} | ({} if template is None else {"template": template})
            framing = framing_of({"model": model} | public_texts, shape, public)
            question: dict[str, Any] = {"question_tokens": 0, "new_tokens": public.max_new_tokens}
            document = [] if own.document is None else framing.frame_private(own.document)
            if isinstance(own, Question):
                length = padded_length(
                    len(framing.frame_turn(own.text, True, own.document)), public.length_grid
                )
                question = {"question_tokens": length, "new_tokens": own.limit(public.max_new_tokens)}
            if isinstance(own, DeclaredTurns):
                question["turns"] = [padded_length(n, public.length_grid) for n in own.questions]
            question["private_tokens"] = padded_length(len(document), public.length_grid)
            for link in links.values():
                link.send_facts("facts/question", question)
            model |= {"tokenizer_digest": framing.tokenizer.digest, "template_digest": text_digest(template)}
            return {"model": model, "question": question} | public_texts
        case _:
            model = links[Rank.SERVER].recv_facts("facts/model")
            return {"model": model, "question": links[Rank.CLIENT].recv_facts("facts/question")}


def _send_model(links: Links, own: Document, public: PublicConfig) -> dict[str, Any]:
    """Tell all what is public about the server's model and document; send the client what frames texts."""
    template = None if own.template is None else tensor_of(own.template.to_bytes())
    facts = facts_of_model(own, public) | {"session": secrets.token_hex(16)}
    for link in links.values():
        link.send_facts("facts/model", facts)
    links[Rank.CLIENT].send("facts/tokenizer", [tensor_of(own.model.tokenizer.content)])
    if template is not None:
        links[Rank.CLIENT].send("facts/template", [template])
    return facts


def facts_of_model(own: Document, public: PublicConfig) -> dict[str, Any]:
    """Return what is public about the server's model and document. Raises PolicyError or ConfigError."""
    model, template = own.model, None if own.template is None else tensor_of(own.template.to_bytes())
    facts: dict[str, Any] = {
        "shape": model.shape.to_dict(),
        "model_digest": model.digest,
        "tokenizer_bytes": len(model.tokenizer.content),
        "tokenizer_digest": model.tokenizer.digest,
        "template_bytes": 0 if template is None else len(template),
        "template_digest": text_digest(template),
        "document": own.written,
        "context_tokens": own.length,
        "kernels": choose_kernels(public.kernels, own.device).name,
    }
    if public.policy == POLICY_AUTO:
        packed = "" if own.packed is None else own.packed.spec
        choice = choose_policy(model, public, own.length, TYPICAL_QUESTION, packed)
        facts |= {"policy": choice.spec, "policy_picked": choice.why}
        public = public.model_copy(update={"policy": choice.spec})
    if counts := own.counts_of_model(parse_policy(public.policy)):
        facts["head_counts"] = counts
    return facts


# ------------------------------------------------------------------------------- made of the facts


def facts_of(told: Mapping[str, Any], public: PublicConfig) -> Facts:
    """Return everything public, checked alike by all three.

    told: as `agreed_facts` returns it; of a resumed session also the `counts` that were announced.
    Raises BadInput, or Desync on facts that are none.
    """
    model, question = told["model"], told["question"]
    shape = _shape(model)
    context, asked = count_in(model, "context_tokens"), count_in(question, "question_tokens")
    private = count_in(question, "private_tokens")
    _check_memory(shape, context + private)
    public = _with_policy(public, model)
    names = ("kernels", "session", "model_digest", "tokenizer_digest", "template_digest", "document")
    said = {name: str(model.get(name, ""))[:FACT_CHARACTERS] for name in names}
    limit = _limit(question, public)
    for what, tokens in (("question", asked), ("document", private)):
        if tokens % public.length_grid:
            raise Desync(f"Desync: the client's {what} has {tokens} tokens, not a multiple of --pad")
    if asked:
        policy = bind_policy(shape, public, context, asked, limit, private)
        room = asked + limit
    else:
        policy, room = bind_conversation(shape, public, context, private)
    if "head_counts" in model:
        policy = _counted(policy, shape, model["head_counts"])
    protocol: str = public.protocol
    picked = str(model.get("policy_picked", ""))[:WHY_CHARACTERS]
    if protocol == AUTO:
        choice = pick(
            shape, policy, context, asked or TYPICAL_QUESTION, limit, parse_network(public.network),
            public.fraction_bits, public.reveal, public.length_grid, private,
        )  # fmt: skip
        protocol = choice.protocol
        picked = f"{picked}; {choice}" if picked else str(choice)
    kernels, session = said.pop("kernels"), said.pop("session")
    reading = reading_plan(shape, public, context, private, protocol)
    turns = _turns(question.get("turns", []), limit, room)
    facts = Facts(shape, context, asked, limit, room, kernels, policy, said, protocol, picked, session, turns)
    facts = replace(facts, reading=reading)
    return _with_counts(facts, told["counts"]) if "counts" in told else facts


def _with_policy(public: PublicConfig, model: Mapping[str, Any]) -> PublicConfig:
    """Take the policy that the server has picked, where it was to pick one. Raises Desync.

    It may reveal no more than `auto` may at all, whatever the server says.
    """
    if public.policy != POLICY_AUTO:
        return public
    spec = model.get("policy")
    try:
        if not isinstance(spec, str) or len(spec) > POLICY_CHARACTERS:
            raise PolicyError(f"{spec!r:.60} is no policy")
        policy = parse_policy(spec)
        if policy.in_the_clear or policy.leak not in REVEALED:
            raise PolicyError(f"policy {policy.spec} reveals more than auto may: {policy.leak}")
    except PolicyError as error:
        raise Desync(f"Desync: the policy that the server picked for auto: {error}") from None
    return public.model_copy(update={"policy": spec})


def _check_memory(shape: ModelShape, context: int) -> None:
    """Refuse a shape that this machine cannot hold. Raises ModelError.

    Every party holds masks of all weights and of the cache: a shape that is only claimed must not take a
    machine's memory.
    """
    weights = sum(tensor.numel() for _, tensor in Weights.meta(shape).items())
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * min(context, shape.max_positions)
    needed = MASKED_BYTES * (weights + cache)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        gib = 1 << 30
        raise ModelError(
            f"the server's model takes {needed / gib:.3g} GiB of memory at each party; this machine has "
            f"{there / gib:.3g} GiB",
            private=False,
        )


def _shape(facts: Mapping[str, Any]) -> ModelShape:
    shape = facts.get("shape")
    if not isinstance(shape, dict):
        raise Desync("Desync: the server's facts hold no model shape; is it the same version?")
    try:
        return ModelShape.from_dict(shape)
    except ModelError as error:
        raise ModelError(f"the server's facts: {error}", private=False) from None


def filled(answer: int) -> int:
    """Return how many chunks a turn of prepared tapes has: its question, and each token of its answer.

    All are taken in, whatever the answer is: the next turn's tapes were dealt for a cache of that length.
    """
    return answer + 1


def _turns(turns: Any, limit: int, room: int) -> tuple[int, ...]:
    """Return the turns that tapes are prepared for. Raises Desync; BadInput where there is no room."""
    if not isinstance(turns, list) or any(type(tokens) is not int or tokens < 1 for tokens in turns):
        raise Desync(f"Desync: the fact turns is {turns!r:.60}, not a list of lengths")
    if (needed := sum(turns) + len(turns) * (filled(limit) - 1)) > room:
        raise BadInput(
            f"--turns: {len(turns)} turns with answers of {limit} tokens take {needed}; a conversation has "
            f"room for {room} (public.conversation_tokens)"
        )
    return tuple(turns)


def _limit(question: Mapping[str, Any], public: PublicConfig) -> int:
    """Return how many new tokens the client asks for. Raises Desync on more than were agreed."""
    limit = count_in(question, "new_tokens")
    if not 1 <= limit <= public.max_new_tokens:
        raise Desync(
            f"Desync: the client asks for {limit} new tokens; 1 to {public.max_new_tokens} are agreed"
        )
    return limit


# ---------------------------------------------------------------- what the document decides later


def announce_counts(links: Links, facts: Facts, known: OwnersContext, kernels: Backend) -> Facts:
    """Server: make public what the document decides about the plan, before the context phase."""
    policy, counts = bind_to_document(facts.policy, facts.shape, known, kernels)
    if not facts.policy.plan_is_public:
        for link in links.values():
            link.send_facts("facts/counts", {"counts": counts})
    return replace(facts, policy=policy)


def receive_counts(server: Link, facts: Facts) -> Facts:
    """Take what `announce_counts` sends. Raises Desync on counts that no such plan can have."""
    if facts.policy.plan_is_public:
        return facts
    return _with_counts(facts, server.recv_facts("facts/counts").get("counts"))


def counts_of(facts: Facts) -> dict[str, list[int]]:
    """Return what `facts_of` needs beside the told facts when the session is resumed."""
    return {"counts": list(facts.policy.policy.counts_given)}


def _with_counts(facts: Facts, counts: Any) -> Facts:
    if facts.policy.plan_is_public:
        return facts
    return replace(facts, policy=_counted(facts.policy, facts.shape, counts))


def _counted(policy: BoundPolicy, shape: ModelShape, counts: Any) -> BoundPolicy:
    """Bind a policy to counts that the server tells. Raises Desync."""
    if not isinstance(counts, list) or any(type(n) is not int for n in counts):
        raise Desync(f"Desync: the server announces counts {counts!r:.60}, not a list of whole numbers")
    if policy.plan_is_public or policy.leak == LeakClass.NONE:
        raise Desync(f"Desync: the server announces counts, which policy {policy.spec} has none of")
    try:
        return policy.with_counts(counts, shape)
    except PolicyError as error:
        raise Desync(f"Desync: the server announces counts that do not fit: {error}") from None

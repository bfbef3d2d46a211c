"""What each party does from connected links to the end of a session: one function per rank.

    facts -> seeds -> SETUP -> CONTEXT -> QUESTION -> DECODE ... -> the account of it

A resumed session takes facts, SETUP, CONTEXT and the chunks it had from what each party kept on its
disk (parties/checkpoint.py), and goes on from there. The three functions stand side by side: what one
sends, another receives, in the same order.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any, cast

import torch

from mpcache.answer import TimedSession, answer, bind_to_document
from mpcache.config import PublicConfig
from mpcache.console.signals import between_tokens, stopping, token_by_token
from mpcache.cost.choose import AUTO, pick
from mpcache.engines.registry import engine
from mpcache.errors import ConfigError, Desync, ModelError, PolicyError
from mpcache.ledger import Ledger
from mpcache.limits import bind_policy
from mpcache.model import Model, ModelShape, Weights
from mpcache.model.prefill import Prefill, prefill
from mpcache.model.tokenizer import LibraryError, Tokenizer, parse_tokenizer
from mpcache.policy import BoundPolicy
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.report.units import duration
from mpcache.runtime.party import ComputingParty, DealerParty
from mpcache.runtime.rng import SEED_BYTES, fresh_seed
from mpcache.sampling import Sampling
from mpcache.transport.link import Link
from mpcache.transport.network import parse_network
from mpcache_kernels import REFERENCE, Backend, backend
from mpcache_parties.handshake import confirm
from mpcache_parties.operations.status import SessionStatus
from mpcache_parties.state.checkpoint import Checkpointer, Snapshot
from mpcache_parties.state.tapes import TapeLink, TapeStore

AHEAD = 2  # decode steps that the dealer may be ahead of the client: it bounds the tapes that wait
TOKENIZER_BYTES = 64 << 20  # the largest tokenizer.json that a client takes

Links = Mapping[Rank, Link]
Say = Callable[[str], None]


def quiet(text: str) -> None:
    """No words."""


@dataclass(frozen=True)
class Document:
    """What the server brings. tokens: of the document, with BOS.  device: where it is read."""

    model: Model
    tokens: list[int]
    device: str = "cpu"


@dataclass(frozen=True)
class Question:
    """What the client brings. Without `stop_at_eos` the answer's length tells nothing about it."""

    text: str
    sampling: Sampling = Sampling()
    stop_at_eos: bool = True


@dataclass(frozen=True)
class Facts:
    """What is public about a session, known to all before anything secret moves."""

    shape: ModelShape
    context: int  # tokens
    question: int  # tokens
    kernels: str
    policy: BoundPolicy
    digests: Mapping[str, str]  # of the weights and the tokenizer
    protocol: str  # the config's, or what `auto` picked, and why
    picked: str = ""

    def flat(self) -> dict[str, str]:
        """What all parties have to agree on, by field, as text."""
        fields: dict[str, object] = {f"shape.{name}": value for name, value in self.shape.to_dict().items()}
        fields |= {"context_tokens": self.context, "question_tokens": self.question, "kernels": self.kernels}
        fields |= self.digests
        fields["protocol"] = self.protocol
        for index, layer in enumerate(self.policy.plan.layers):
            fields |= {f"plan.layer{index}.{name}": value for name, value in asdict(layer).items()}
        return {name: str(value) for name, value in fields.items()}


def serve(
    links: Links,
    ledger: Ledger,
    public: PublicConfig,
    own: Document,
    say: Say = quiet,
    watch: SessionStatus | None = None,
    keeper: Checkpointer | None = None,
    tapes: TapeStore | None = None,
) -> Report:
    """Rank 0: opens its masked weights, reads the document, evicts, and computes blindly.

    tapes: what the dealer dealt before, in place of a link to it.
    """
    client, watch, keeper = links[Rank.CLIENT], watch or SessionStatus(), keeper or Checkpointer()
    identity = public.flat() | {"model": own.model.digest, "document": _digest(own.tokens)}
    earlier = keeper.meet(links, identity)
    stored, facts = agreed_facts(Rank.SERVER, links, own, public, earlier)

    party, wait = _computing_party(Rank.SERVER, links, ledger, watch, _tape(links, tapes, facts, public))
    session = _session(Rank.SERVER, party, facts, public, watch)
    if earlier is None:
        facts, prefill_ms = _open(links, session, own, facts, public, say)
        keeper.begin(identity, stored | _counts(facts), session, ledger, {"prefill_ms": prefill_ms})
    else:
        prefill_ms = earlier.own["prefill_ms"]
        session.restore(earlier.operands, earlier.cache, earlier.step)
        say(f"server: resumed after {_chunks(earlier.step)}")
    del earlier

    with token_by_token():
        for step in range(session.chunks, public.max_new_tokens):
            if step:
                if not _more(client, step):
                    break
                between_tokens(step)
            session.chunk(None, 1 if step else facts.question)
            keeper.token(session, ledger, {})
    report = _report(Rank.SERVER, facts, ledger, session, keeper)
    keeper.end(links)
    wait.close()
    return replace(report, prefill_ms=prefill_ms, kernels=facts.kernels, dealer_wait_ms=wait.ms)


def _session(
    me: Rank, party: Any, facts: Facts, public: PublicConfig, watch: SessionStatus, device: str = "cpu"
) -> TimedSession:
    ops = engine(facts.protocol, me, public.fraction_bits, device)
    return TimedSession(ops, party, facts.shape, facts.policy, watch, public.reveal)


def _open(
    links: Links, session: TimedSession, own: Document, facts: Facts, public: PublicConfig, say: Say
) -> tuple[Facts, float]:
    """Server: SETUP and CONTEXT; the facts with what the document decides, and the time of prefill and
    eviction in ms."""
    kernels, kernel_ms = _timed(_kernels(public.kernels, own.device))
    session.setup(own.model.weights)
    say(f"server: set-up: weights masked and opened in {duration(session.ms['setup'])}")
    start = time.perf_counter()
    window = facts.policy.policy.window(facts.context)
    prefilled = prefill(own.model, own.tokens, own.device, window=window)
    prefill_ms = 1000 * (time.perf_counter() - start)
    if facts.picked:
        say(f"server: {facts.picked}")
    session.policy = (facts := _announce(links, facts, prefilled, kernels)).policy
    session.context(prefilled, kernels)
    prefill_ms += sum(kernel_ms)
    say(
        f"server: context of {facts.context} tokens, {facts.policy.plan.kept} kept: "
        f"prefill and eviction {duration(prefill_ms)} (kernels: {facts.kernels})"
    )
    for line in facts.policy.plan.lines():
        say(f"server: {line}")
    return facts, prefill_ms


def ask(
    links: Links,
    ledger: Ledger,
    public: PublicConfig,
    own: Question,
    say: Say = quiet,
    on_token: Callable[[int, str], None] = lambda token, text: None,
    watch: SessionStatus | None = None,
    keeper: Checkpointer | None = None,
    tapes: TapeStore | None = None,
) -> Report:
    """Rank 1: learns the logits, chooses the tokens; `on_token` gets each with the text it settles.

    A resumed answer is told from its beginning, and no token of it is chosen twice.
    """
    own.sampling.check(public.reveal)
    server, watch, keeper = links[Rank.SERVER], watch or SessionStatus(), keeper or Checkpointer()
    identity = public.flat() | {
        "question": _digest(own.text), "sampling": str(own.sampling), "stop_at_eos": str(own.stop_at_eos)
    }  # fmt: skip
    earlier = keeper.meet(links, identity)
    stored, facts = agreed_facts(Rank.CLIENT, links, own, public, earlier)

    party, wait = _computing_party(Rank.CLIENT, links, ledger, watch, _tape(links, tapes, facts, public))
    session = _session(Rank.CLIENT, party, facts, public, watch)
    tokenizer = _tokenizer(stored["tokenizer"], facts.shape)
    question, stream = tokenizer.encode(own.text, bos=False), tokenizer.stream()
    choose = own.sampling.chooser(public.reveal)
    ids: list[int] = []

    def kept() -> dict[str, Any]:
        return {"ids": ids, "draws": choose.state}

    if earlier is None:
        session.setup(None)
        say(f"client: set-up: masked weights received in {duration(session.ms['setup'])}")
        session.policy = (facts := _announced(server, facts)).policy
        session.context(None, None)
        n = facts.policy.plan.kept
        say(f"client: asking {facts.question} tokens about {facts.context}, of which {n} are kept ...")
        keeper.begin(identity, stored | _counts(facts), session, ledger, kept())
    else:
        ids, choose.state = earlier.own["ids"], earlier.own["draws"]
        session.restore(earlier.operands, earlier.cache, earlier.step)
        say(f"client: resumed after {_chunks(earlier.step)}; the answer from its beginning:")
        for token in ids:
            on_token(token, stream.push(token))
    del earlier

    def announce(step: int, more: bool) -> None:
        for link in links.values():
            link.send_facts(_step_name(step), {"more": more})

    stops = set(facts.shape.eos_ids) if own.stop_at_eos else set()
    wait.ms = 0.0
    with token_by_token():
        for token in answer(session, question, public.max_new_tokens, choose, stops, announce, tuple(ids)):
            if new := session.chunks > len(ids):
                ids.append(token)
            keeper.token(session, ledger, kept())  # a token that was shown is never lost
            if new:
                on_token(token, stream.push(token))
            between_tokens(session.chunks)
    if rest := stream.end():
        on_token(-1, rest)
    report = _report(Rank.CLIENT, facts, ledger, session, keeper)
    keeper.end(links)
    wait.close()
    return replace(report, dealer_wait_ms=wait.ms, token_ids=ids, text=tokenizer.decode(ids))


def deal(
    links: Links,
    ledger: Ledger,
    public: PublicConfig,
    say: Say = quiet,
    watch: SessionStatus | None = None,
    keeper: Checkpointer | None = None,
) -> Report:
    """Rank 2: reads the same program by shapes alone and sends the correlated randomness ahead."""
    server, client = links[Rank.SERVER], links[Rank.CLIENT]
    watch, keeper = watch or SessionStatus(), keeper or Checkpointer()
    earlier = keeper.meet(links, public.flat())
    stored, facts = agreed_facts(Rank.DEALER, links, None, public, earlier)

    seeds = {rank: fresh_seed() for rank in (Rank.SERVER, Rank.CLIENT)}
    for rank, seed in seeds.items():
        links[rank].send("seeds/tape", [tensor_of(seed)])
    party = DealerParty(dict(links), seeds, ledger)
    session = _session(Rank.SERVER, party, facts, public, watch, "meta")
    if earlier is None:
        session.setup(None)
        say("dealer: set-up dealt; from now on a little ahead of the client")
        session.policy = (facts := _announced(server, facts)).policy
        session.context(None, None)
        keeper.begin(public.flat(), stored | _counts(facts), session, ledger, {})
    else:
        session.restore(earlier.operands, earlier.cache, earlier.step)
        say(f"dealer: resumed after {_chunks(earlier.step)}")
    del earlier

    with token_by_token():
        _deal_tokens(
            session, client, public.max_new_tokens, facts.question, lambda: keeper.token(session, ledger, {})
        )
    report = _report(Rank.DEALER, facts, ledger, session, keeper)
    keeper.end(links)
    return report


def _deal_tokens(
    session: TimedSession, client: Link, limit: int, question: int, keep: Callable[[], None]
) -> None:
    """Tapes until the client says that there is no more, at most AHEAD steps ahead of it."""
    begun = max(0, session.chunks - 1)  # steps that the client is known to have begun; the question is 0
    for step in range(session.chunks, limit):
        while step and (begun < step - AHEAD or stopping()):
            begun += 1
            if not _more(client, begun):
                return
            if begun == step:  # only a stop lets the client get so far: all that was dealt is used
                between_tokens(step)
        session.chunk(None, 1 if step else question)
        keep()
    while begun < limit - 1:
        begun += 1
        if not _more(client, begun):
            return


def _digest(secret: object) -> str:
    """Of a party's own input, for its own file: is it the same on resuming?"""
    return hashlib.sha256(repr(secret).encode("utf-8", "surrogatepass")).hexdigest()


def _chunks(step: int) -> str:
    """How far a session was."""
    return f"{step} token{'s' * (step != 1)}" if step else "the context"


# ------------------------------------------------------------------------------------------ seeds


class TimedDealerLink:
    """A link to the dealer that adds up how long its reader waits, in ms."""

    def __init__(self, link: Link, watch: SessionStatus) -> None:
        self._link, self._watch, self.ms = link, watch, 0.0

    def close(self) -> None:
        """A tape has come to its end; a dealer is told by its network."""
        if isinstance(self._link, TapeLink):
            self._link.close()

    def recv(self, *arguments: Any) -> list[torch.Tensor]:
        start = time.perf_counter()
        tensors = self._link.recv(*arguments)
        seconds = time.perf_counter() - start
        self.ms += 1000 * seconds
        self._watch.waited(seconds)
        return tensors


def sizes_of(facts: Facts, public: PublicConfig) -> dict[str, Any]:
    """All that tapes depend on, but for the number of tokens."""
    return {
        "shape": facts.shape.to_dict(), "context": facts.context, "question": facts.question,
        "policy": facts.policy.policy.spec, "plan": facts.policy.plan.to_dict(),
        "protocol": facts.protocol, "fraction_bits": public.fraction_bits, "reveal": public.reveal,
    }  # fmt: skip


def _tape(links: Links, tapes: TapeStore | None, facts: Facts, public: PublicConfig) -> Link:
    """Where the dealer's part comes from: the dealer, or what it dealt before."""
    if tapes is None:
        return links[Rank.DEALER]
    return tapes.claim(links, sizes_of(facts, public), public.max_new_tokens)


def _computing_party(
    me: Rank, links: Links, ledger: Ledger, watch: SessionStatus, dealer: Link
) -> tuple[ComputingParty, TimedDealerLink]:
    """Takes a seed from the dealer and trades one with the peer: my `next` is its `prev`."""
    peer = links[me.peer]
    seed_spec = [(torch.uint8, (SEED_BYTES,))]
    (tape,) = dealer.recv("seeds/tape", seed_spec)
    mine = fresh_seed()
    (theirs,) = peer.exchange("seeds/pair", [tensor_of(mine)])
    pair = {"next": mine, "prev": _bytes(theirs)}
    wait = TimedDealerLink(dealer, watch)
    party = ComputingParty(me, peer, cast(Link, wait), _bytes(tape), pair, fresh_seed(), ledger)
    return party, wait


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


# ------------------------------------------------------------------------------------------ facts


def agreed_facts(
    me: Rank,
    links: Links,
    own: Document | Question | None,
    public: PublicConfig,
    earlier: Snapshot | None = None,
) -> tuple[dict[str, Any], Facts]:
    """Everything public: as it was told, now or in the session's first run, and what each party makes of
    it, which is compared before anything secret moves. Raises BadInput, Desync or Mismatch."""
    stored = _exchange_facts(me, links, own, public) if earlier is None else earlier.facts
    facts = facts_of(stored, public)
    confirm(links, me, facts.flat())
    return stored, facts


def _exchange_facts(
    me: Rank, links: Links, own: Document | Question | None, public: PublicConfig
) -> dict[str, Any]:
    """What is public about `model` and `question`, told by their owners; at the client also the bytes of
    the `tokenizer`: what `facts_of` starts from."""
    match own:
        case Document():
            model = _send_model(links, own, public)
            return {"model": model, "question": links[Rank.CLIENT].recv_facts("facts/question")}
        case Question():
            model = links[Rank.SERVER].recv_facts("facts/model")
            vocabulary = _recv_tokenizer(links[Rank.SERVER], model)
            tokenizer = _tokenizer(vocabulary, _shape(model))
            question = {"question_tokens": len(tokenizer.encode(own.text, bos=False))}
            for link in links.values():
                link.send_facts("facts/question", question)
            model |= {"tokenizer_digest": tokenizer.digest}
            return {"model": model, "question": question, "tokenizer": vocabulary}
        case _:
            model = links[Rank.SERVER].recv_facts("facts/model")
            return {"model": model, "question": links[Rank.CLIENT].recv_facts("facts/question")}


def _send_model(links: Links, own: Document, public: PublicConfig) -> dict[str, Any]:
    """Server: what is public about its model and document, to all; the tokenizer, to the client."""
    model = own.model
    try:
        vocabulary = (model.folder / "tokenizer.json").read_bytes()
    except OSError as error:
        raise ModelError(f"{model.folder}/tokenizer.json: cannot be read: {error.strerror}") from None
    facts = {
        "shape": model.shape.to_dict(),
        "model_digest": model.digest,
        "tokenizer_bytes": len(vocabulary),
        "tokenizer_digest": hashlib.sha256(vocabulary).hexdigest(),
        "context_tokens": len(own.tokens),
        "kernels": _kernels(public.kernels, own.device).name,
        "session": secrets.token_hex(16),
    }
    for link in links.values():
        link.send_facts("facts/model", facts)
    links[Rank.CLIENT].send("facts/tokenizer", [tensor_of(vocabulary)])
    return facts


def facts_of(stored: Mapping[str, Any], public: PublicConfig) -> Facts:
    """Everything public, checked alike by all three. Raises BadInput, or Desync on facts that are none.

    stored: as `_exchange_facts` has it; of a resumed session also the `counts` that were announced.
    """
    model, question = stored["model"], stored["question"]
    shape = _shape(model)
    context, asked = _count(model, "context_tokens"), _count(question, "question_tokens")
    _check_room(shape, context)
    said = {name: str(model.get(name, ""))[:80] for name in ("kernels", "model_digest", "tokenizer_digest")}
    policy = bind_policy(shape, public, context, asked)
    protocol: str = public.protocol
    picked = ""
    if protocol == AUTO:
        choice = pick(
            shape, policy, context, asked, public.max_new_tokens, parse_network(public.network),
            public.fraction_bits, public.reveal,
        )  # fmt: skip
        protocol, picked = choice.protocol, str(choice)
    facts = Facts(shape, context, asked, said.pop("kernels"), policy, said, protocol, picked)
    return _given(facts, stored["counts"]) if "counts" in stored else facts


def _counts(facts: Facts) -> dict[str, list[int]]:
    """For `facts_of` a resumed session."""
    return {"counts": [layer.kept for layer in facts.policy.plan.layers]}


def _check_room(shape: ModelShape, context: int) -> None:
    """Every party holds masks of all weights and of the cache, 16 bytes a value: a shape that is only
    claimed must not take a machine's memory. Raises ModelError."""
    weights = sum(tensor.numel() for _, tensor in Weights.meta(shape).items())
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * min(context, shape.max_positions)
    needed = 16 * (weights + cache)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        gib = 1 << 30
        raise ModelError(
            f"the server's model takes {needed / gib:.3g} GiB of memory at each party; this machine has "
            f"{there / gib:.3g} GiB",
            private=False,
        )


def _announce(links: Links, facts: Facts, prefilled: Prefill, kernels: Backend) -> Facts:
    """What the document decides about the plan becomes public, before the context phase."""
    policy, counts = bind_to_document(facts.policy, facts.shape, prefilled, kernels)
    if not facts.policy.policy.plan_is_public:
        for link in links.values():
            link.send_facts("facts/counts", {"counts": counts})
    return replace(facts, policy=policy)


def _announced(server: Link, facts: Facts) -> Facts:
    """The other end of `_announce`. Raises Desync on counts that no such plan can have."""
    if facts.policy.policy.plan_is_public:
        return facts
    return _given(facts, server.recv_facts("facts/counts").get("counts"))


def _given(facts: Facts, counts: Any) -> Facts:
    policy = facts.policy.policy
    if policy.plan_is_public:
        return facts
    if not isinstance(counts, list) or any(type(n) is not int for n in counts):
        raise Desync(f"Desync: the server announces counts {counts!r:.60}, not a list of whole numbers")
    try:
        return replace(facts, policy=policy.with_counts(counts).bind(facts.context, facts.shape))
    except PolicyError as error:
        raise Desync(f"Desync: the server announces counts that do not fit: {error}") from None


def _shape(facts: Mapping[str, Any]) -> ModelShape:
    shape = facts.get("shape")
    if not isinstance(shape, dict):
        raise Desync("Desync: the server's facts hold no model shape; is it the same version?")
    try:
        return ModelShape.from_dict(shape)
    except ModelError as error:
        raise ModelError(f"the server's facts: {error}", private=False) from None


def _count(facts: Mapping[str, Any], name: str) -> int:
    value = facts.get(name)
    if type(value) is not int or value < 0:
        raise Desync(f"Desync: the fact {name} is {value!r:.60}, not a count; is it the same version?")
    return value


def _recv_tokenizer(server: Link, facts: Mapping[str, Any]) -> torch.Tensor:
    """The bytes of the model's tokenizer, which is public: the client needs no model folder."""
    length = _count(facts, "tokenizer_bytes")
    if not 0 < length <= TOKENIZER_BYTES:
        raise Desync(
            f"Desync: the server's tokenizer has {length} bytes; at most {TOKENIZER_BYTES} are taken"
        )
    (data,) = server.recv("facts/tokenizer", [(torch.uint8, (length,))])
    return data


# The client reads it for the question's length, and again, facts told, for the question itself.
_parse_once = lru_cache(maxsize=1)(parse_tokenizer)


def _tokenizer(vocabulary: torch.Tensor, shape: ModelShape) -> Tokenizer:
    content = _bytes(vocabulary)
    try:
        inner = _parse_once(content)
    except LibraryError as error:
        raise ModelError(
            "the server's tokenizer.json cannot be read; is its model folder complete?", private=False
        ) from error
    return Tokenizer(inner, shape.vocab, shape.bos_id, hashlib.sha256(content).hexdigest())


def _step_name(step: int) -> str:
    """Outside the step's own name: what the decode program costs is booked apart from this."""
    return f"more/decode{step}"


def _more(client: Link, step: int) -> bool:
    """Whether the client goes on to this decode step. The answer's length is public."""
    more = client.recv_facts(_step_name(step)).get("more")
    if not isinstance(more, bool):
        raise Desync(f"Desync: the client says {more!r:.60} at {_step_name(step)}, not true or false")
    return more


# ---------------------------------------------------------------------------------------- account


def _report(me: Rank, facts: Facts, ledger: Ledger, session: TimedSession, keeper: Checkpointer) -> Report:
    return Report(
        rank=int(me),
        protocol=facts.protocol,
        context_tokens=facts.context,
        question_tokens=facts.question,
        kept_tokens=[layer.kept for layer in facts.policy.plan.layers],
        plan=facts.policy.plan.to_dict(),
        phases=keeper.phases(ledger, session),
        wire_bytes=keeper.wire_bytes(ledger),
        checkpoint_ms=keeper.ms,
        checkpoint_bytes=keeper.bytes,
    )


def _kernels(choice: str, device: str) -> Backend:
    found = REFERENCE if choice == "reference" else backend(device)
    if choice == "triton" and found.name != choice:
        raise ConfigError("public.kernels is triton: the server has no GPU, or Triton is not installed")
    return found


def _timed(kernels: Backend) -> tuple[Backend, list[float]]:
    """Kernels that also add how long each call took, in ms, to a list."""
    took: list[float] = []

    def timed(fn: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = fn(*arguments)
            took.append(1000 * (time.perf_counter() - start))
            return result

        return call

    names = [f.name for f in fields(kernels) if f.name != "name"]
    kernels = replace(kernels, **{name: timed(getattr(kernels, name)) for name in names})  # type: ignore[arg-type]
    return kernels, took

"""The client's own document: read on shares before the first question, and answered as in plaintext."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mpcache.answer import plain_answer
from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.cost.reading import reading_plan
from mpcache.errors import BadInput, LinkError, MpcacheError, OutOfRange
from mpcache.limits import bind_policy
from mpcache.model import Model
from mpcache.phases import is_private
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.sampling import Sampling
from mpcache_parties.operations.status import SessionStatus
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.links import Killed, context_of, together
from tests.support.session import QUESTION, run_session

S, C, D = Rank
DOCUMENT = "the gate of the city was shut and the number is in the book of the guard"
TOKENS = 3
CHUNK = 8


def public_config(policy: str = "full", **more: Any) -> PublicConfig:
    fast = ProtocolName.FAST
    return PublicConfig(policy=policy, protocol=fast, max_new_tokens=TOKENS, document_chunk=CHUNK, **more)


def own_tokens(model: Model) -> list[int]:
    return model.tokenizer.encode(DOCUMENT, bos=False)


def reports_of(
    public: PublicConfig, model: Model, tokens: list[int], question: Question
) -> dict[Rank, Report]:
    ends = run_session(public, model, tokens, question)
    assert all(isinstance(end, Report) for end in ends.values()), ends
    return {rank: end for rank, end in ends.items() if isinstance(end, Report)}


# What attends to all, what drops tokens on the way, and what chooses and forms clusters on the way; then
# what evicts on shares.
@pytest.mark.parametrize(
    ("policy", "context", "private"),
    [
        ("full", 1, "full"),
        ("h2o:heavy=8,recent=8", 24, "full"),
        ("mpcache:coarse=4,fine=2,recent=4", 1, "full"),
        ("full", 24, "snapkv:cap=0.5,queries=6,pool=3"),
        ("mpcache:coarse=4,fine=2,recent=4", 24, "mpcache:n_keep=0.5,sink=2,recent=3"),
        ("full", 1, "h2o:heavy=5,recent=4"),
    ],
)
def test_an_answer_about_it_is_the_plain_one(policy: str, context: int, private: str, model: Model) -> None:
    public, tokens, own = (
        public_config(policy, private_policy=private), context_of(model, context), own_tokens(model)
    )  # fmt: skip
    reports = reports_of(public, model, tokens, Question(QUESTION, stop_at_eos=False, document=DOCUMENT))
    question = model.tokenizer.encode(QUESTION, bos=False)
    bound = bind_policy(model.shape, public, len(tokens), len(question), private=len(own))
    reading = reading_plan(model.shape, public, len(tokens), len(own), "fast")
    plain = plain_answer(model, bound, tokens, question, TOKENS, Sampling(), (), private=own, reading=reading)
    assert reports[C].token_ids == plain.ids
    assert len(reading.chunks) > 1 and (private == "full" or reading.kept < len(own))
    names = [f"private{i + 1}" for i in range(len(reading.chunks))] + ["eviction"] * (private != "full")
    for report in reports.values():
        assert list(report.phases) == ["setup", "context", *names, "question", "decode1", "decode2"]
        assert (report.private_tokens, report.question_tokens) == (len(own), len(question))
    # The cost reading says the same, to the byte.
    cost = price(model.shape, bound, question=len(question), new_tokens=TOKENS, reading=reading)
    for name in (*names, "question", "decode1"):
        told, tally = [reports[rank].phases[name] for rank in Rank], cost.total(name)
        assert [told[0].sent, told[1].sent] == [tally.server_sent, tally.client_sent]
        assert told[2].offline_sent == tally.offline
        assert told[0].rounds == tally.rounds > 0


def test_a_document_without_the_servers_is_framed_before_the_question(model: Model) -> None:
    """Two documents of one length: what all but the client hear of a session is the same."""
    one, two = (
        reports_of(public_config(), model, context_of(model, 1), Question("the gate", document=text))
        for text in ("the book of the gate", "the gate of the book")
    )
    for rank in (S, D):
        ours, theirs = ({k: v.sent for k, v in told[rank].phases.items()} for told in (one, two))
        assert {k: v for k, v in ours.items() if is_private(k)} == {
            k: v for k, v in theirs.items() if is_private(k)
        }


@pytest.mark.slow
@pytest.mark.parametrize("private", ["full", "mpcache:n_keep=18,sink=2,recent=4"])
def test_of_a_padded_document_the_step_of_the_grid_alone_is_public(private: str, model: Model) -> None:
    """Two lengths of one step: answered as without padding, with the same bytes and rounds, as priced."""
    public, seen = public_config(private_policy=private, length_grid=16), []
    lengths = set()
    for text in (DOCUMENT, f"{DOCUMENT} of the city"):
        own, context = model.tokenizer.encode(text, bos=False), context_of(model, 4)
        lengths.add(len(own))
        reports = reports_of(public, model, context, Question(QUESTION, stop_at_eos=False, document=text))
        question, padded = model.tokenizer.encode(QUESTION, bos=False), reports[C].private_tokens
        bound = bind_policy(model.shape, public, len(context), 16, private=padded)
        reading = reading_plan(model.shape, public, len(context), padded, "fast")
        plain = plain_answer(
            model, bound, context, question, TOKENS, Sampling(), (), grid=16, private=own, reading=reading
        )
        assert reports[C].token_ids == plain.ids
        if private == "full":
            whole = replace(reading, chunks=(len(own),))
            assert (
                plain_answer(
                    model, bound, context, question, TOKENS, Sampling(), (), private=own, reading=whole
                ).ids
                == plain.ids
            )
        cost = price(model.shape, bound, question=len(question), new_tokens=TOKENS, reading=reading, grid=16)
        for name, phase in reports[S].phases.items():
            if is_private(name) or name in ("question", "decode1"):
                assert (phase.sent, phase.rounds) == (cost.total(name).server_sent, cost.total(name).rounds)
        seen.append({rank: {name: (phase.sent, phase.received, phase.offline_sent, phase.rounds)
                            for name, phase in report.phases.items()}
                     for rank, report in reports.items()})  # fmt: skip
        assert padded == 48
    assert len(lengths) == 2 and seen[0] == seen[1]


def test_a_document_that_leaves_its_range_is_not_answered_about(model: Model) -> None:
    layer = model.weights.layers[0]
    assert layer.w_gate is not None
    loud = replace(layer, w_gate=layer.w_gate * 60)
    weights = replace(model.weights, layers=(loud, *model.weights.layers[1:]))
    question = Question(QUESTION, document=DOCUMENT)
    ends = run_session(public_config(), replace(model, weights=weights), context_of(model, 4), question)
    assert isinstance(ends[C], OutOfRange)
    assert "a value left its range in chunk 1 of the client's document" in str(ends[C])


def refusals(public: PublicConfig, model: Model, context: int, document: str) -> Sequence[str]:
    ends = run_session(public, model, context_of(model, context), Question(QUESTION, document=document))
    assert isinstance(ends[C], BadInput)
    return [str(end) for end in ends.values()]


def test_a_document_that_does_not_fit_is_one_line(model: Model) -> None:
    long = "the gate of the city " * 2000
    assert "the client's document has more than" in refusals(public_config(), model, 4, long)[C]
    room = model.shape.max_positions
    nearly = model.tokenizer.decode(model.tokenizer.encode(long, bos=False)[: room - 10])
    for line in refusals(public_config(), model, 24, nearly):
        assert "the client's document (" in line and "the model allows" in line


@pytest.mark.parametrize(
    ("policy", "private", "says"),
    [
        ("full", "quest", "policy quest: cannot evict a document on shares: it chooses at every step"),
        ("full", "compact", "cannot evict a document on shares: its scores and fits need"),
        ("full", "mpcache:threshold=0.1", "threshold=0.1 is out of range; allowed: none on shares"),
        ("full", "snapkv:cap=1000", "cap=1000 is out of range"),
        ("h2o:heavy=4,recent=4", "snapkv", "policy h2o:heavy=4,recent=4: drops tokens at every step"),
    ],
)
def test_a_policy_that_cannot_evict_it_on_shares_says_why(
    policy: str, private: str, says: str, model: Model
) -> None:
    public = public_config(policy, private_policy=private)
    ends = run_session(public, model, context_of(model, 24), Question(QUESTION, document=DOCUMENT))
    for end in ends.values():
        assert isinstance(end, MpcacheError) and says in str(end) and "\n" not in str(end)


class Dies(SessionStatus):
    """Kills its party as the second chunk of the client's document begins."""

    def began(self, name: str) -> None:
        if name == "private2":
            raise Killed("in the middle of the document")
        super().began(name)


@pytest.mark.parametrize("victim", Rank)
def test_a_party_that_dies_in_the_middle_of_it_ends_all(victim: Rank, model: Model) -> None:
    tokens, question = context_of(model, 4), Question(QUESTION, document=DOCUMENT)

    def resources(rank: Rank, links: Any, ledger: Any) -> SessionResources:
        found = SessionResources(links, ledger, public_config())
        return replace(found, status=Dies(ledger)) if rank is victim else found

    ends = together(
        {
            S: lambda links, ledger: serve(resources(S, links, ledger), Document(model, tokens)),
            C: lambda links, ledger: ask(resources(C, links, ledger), question),
            D: lambda links, ledger: deal(resources(D, links, ledger)),
        }
    )
    assert isinstance(ends[victim], Killed)
    for rank in {*Rank} - {victim}:
        assert isinstance(ends[rank], LinkError) and "\n" not in str(ends[rank]), ends

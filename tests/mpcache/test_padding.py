"""Padded questions: the answer of the unpadded one, and nothing but the next multiple is public."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.errors import BadInput, Desync, PolicyError
from mpcache.ledger import Ledger
from mpcache.limits import bind_conversation, bind_policy
from mpcache.model import Model
from mpcache.padding import padded_length
from mpcache.rank import Rank
from mpcache.report.account import Report
from mpcache.sampling import Sampling
from mpcache_parties.facts import facts_of
from mpcache_parties.private_inputs import Document, Question
from mpcache_parties.resources import SessionResources
from mpcache_parties.roles import ask, deal, serve
from tests.support.links import context_of, plain_ids, together
from tests.support.tiny_policies import shape as tiny_shape

S, C, D = Rank
GRID, TOKENS = 8, 3
SPECS = ("full", "snapkv:cap=12,queries=4,pool=3", "compact:keep=0.5,counts=equal")
SHORT, LONG = "the gate of", "the gate of the city is"


def public_of(spec: str, grid: int) -> PublicConfig:
    return PublicConfig(policy=spec, max_new_tokens=TOKENS, length_grid=grid)


def private(model: Model, tokens: list[int], spec: str, question: str) -> tuple[Report, dict[Rank, Ledger]]:
    """The client's report, and everybody's ledger."""
    public, ledgers = public_of(spec, GRID), dict[Rank, Ledger]()

    def resources(rank: Rank, links: Any, ledger: Ledger) -> SessionResources:
        ledgers[rank] = ledger
        return SessionResources(links, ledger, public)

    ends = together(
        {
            S: lambda links, ledger: serve(resources(S, links, ledger), Document(model, tokens)),
            C: lambda links, ledger: ask(resources(C, links, ledger), Question(question, stop_at_eos=False)),
            D: lambda links, ledger: deal(resources(D, links, ledger)),
        }
    )
    assert all(isinstance(end, Report) for end in ends.values()), ends
    return ends[C], ledgers


@pytest.mark.parametrize("spec", SPECS)
def test_every_turn_is_answered_as_without_padding(spec: str, model: Model) -> None:
    tokens, answers = context_of(model, 30), list[list[int]]()
    for grid in (1, GRID):
        bound, _ = bind_conversation(model.shape, public_of(spec, grid), len(tokens))
        plain, pending = PlainConversation(model, bound, tokens, grid=grid), list[int]()
        for question in (SHORT, LONG, SHORT):
            asked = pending + model.tokenizer.encode(question, bos=False)
            answers.append(list(plain.ask(asked, TOKENS, Sampling(), ())))
            pending = answers[-1][-1:]
    assert answers[:3] == answers[3:]


def test_padding_moves_no_logit(model: Model) -> None:
    tokens, asked = context_of(model, 30), model.tokenizer.encode(SHORT, bos=False)
    found = []
    for grid in (1, GRID):
        bound = bind_policy(
            model.shape, public_of("full", grid), len(tokens), padded_length(len(asked), grid)
        )
        session = PlainConversation(model, bound, tokens, grid=grid)._session
        found.append([session.chunk(asked, padded_length(len(asked), grid)), session.chunk([5], 1)])
    for without, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, without, atol=1e-3, rtol=1e-3)


def test_two_lengths_of_one_cell_cannot_be_told_apart(model: Model) -> None:
    """Private answers are those of the unpadded questions, in plaintext; every step's cost is the same, in
    the same order, at every party, and it is the price."""
    tokens, ledgers, rest = context_of(model, 30), list[dict[Rank, Any]](), []
    for question in (SHORT, LONG):
        report, seen = private(model, tokens, "full", question)
        assert report.token_ids == plain_ids(model, public_of("full", 1), tokens, question)
        ledgers.append({rank: list(ledger.steps.items()) for rank, ledger in seen.items()})
        rest.append(
            replace(report, token_ids=[], text="", phases={}, seconds=0, dealer_wait_ms=0, wire_bytes=0)
        )
    lengths = [len(model.tokenizer.encode(question, bos=False)) for question in (SHORT, LONG)]
    assert lengths[0] < lengths[1] <= GRID
    for rank in (S, C):
        assert ledgers[0][rank] == ledgers[1][rank]
    assert dict(ledgers[0][D]) == dict(ledgers[1][D])  # when it looks for a word depends on its pace
    assert rest[0] == rest[1] and rest[0].question_tokens == GRID
    priced = price(model.shape, "full", len(tokens), lengths[0], new_tokens=TOKENS, grid=GRID)
    assert priced.question == GRID
    for phase in ("question", "decode1", "decode2"):
        spent, told = sum_of(ledgers[0][S], phase), priced.total(phase)
        assert (spent.rounds, spent.sent, spent.offline_received) == (
            told.rounds,
            told.server_sent,
            told.server_offline,
        )


@pytest.mark.slow
@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "full"])
def test_private_answers_are_those_of_the_unpadded_question(spec: str, model: Model) -> None:
    tokens = context_of(model, 30)
    for question in (SHORT, LONG):
        report, _ = private(model, tokens, spec, question)
        assert report.token_ids == plain_ids(model, public_of(spec, 1), tokens, question)


def sum_of(steps: list[tuple[str, Any]], phase: str) -> Any:
    ledger = Ledger()
    ledger.steps.update(steps)
    return ledger.total(f"{phase}/")


@pytest.mark.parametrize(
    "spec",
    ["h2o", "tova", "streaming", "quest", "mpcache", "snapkv:cap=12|quest", "tidal", "cascade", "pod"],
)
def test_a_policy_whose_choice_padding_would_change_is_refused(spec: str) -> None:
    with pytest.raises(PolicyError, match="padding would change what it drops or chooses"):
        bind_policy(tiny_shape(), public_of(spec, 4), 24, 4)


def test_learned_positions_are_refused() -> None:
    with pytest.raises(BadInput, match="--pad needs rotary positions, and those of this model are learned"):
        bind_policy(replace(tiny_shape(), positions="learned"), public_of("full", 4), 24, 4)


def test_a_question_that_is_no_multiple_is_found(model: Model) -> None:
    facts = {"shape": model.shape.to_dict(), "context_tokens": 24}
    asked = {"question_tokens": 5, "new_tokens": 2, "private_tokens": 0}
    with pytest.raises(Desync, match="the client's question has 5 tokens, not a multiple of --pad"):
        facts_of({"model": facts, "question": asked}, public_of("full", 4))

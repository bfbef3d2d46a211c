"""Long questions, which go through the model in parts."""

from __future__ import annotations

import pytest
import torch

from mpcache import session
from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.limits import bind_conversation
from mpcache.model import Model
from mpcache.rank import Rank
from tests.support import tiny_policies as tiny
from tests.support.links import context_of

CONTEXT, QUESTION = 24, 11
SHAPE = tiny.shape()
SPECS = ["full", "mpcache", "h2o", "quest", "snapkv", "streaming"]


@pytest.fixture
def _short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_LONGEST_PART", 4)


def test_parts_are_even_and_none_is_longer_than_allowed() -> None:
    assert session.parts_of(1) == [1] and session.parts_of(64) == [64] and session.parts_of(65) == [32, 33]
    for m in range(1, 400):
        parts = session.parts_of(m)
        assert sum(parts) == m and max(parts) <= 64 and max(parts) - min(parts) <= 1


def test_parts_give_the_logits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    context, asked = tiny.tokens(CONTEXT), tiny.chunks(QUESTION, 1, 1)
    whole, _ = tiny.plain("full", SHAPE, context, asked)
    monkeypatch.setattr(session, "_LONGEST_PART", 4)
    for mine, theirs in zip(tiny.plain("full", SHAPE, context, asked)[0], whole, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("_short_parts")
@pytest.mark.parametrize("spec", SPECS)
def test_private_parts_equal_plain_ones_and_cost_what_is_told(spec: str) -> None:
    context, asked = tiny.tokens(CONTEXT), tiny.chunks(QUESTION, 1)
    plain, _ = tiny.plain(spec, SHAPE, context, asked)
    logits, ledgers = tiny.secure(spec, SHAPE, context, asked)
    for mine, theirs in zip(logits, plain, strict=True):
        assert (mine - theirs).abs().max() < 0.05
    told = price(SHAPE, spec, CONTEXT, QUESTION, "fast", new_tokens=2, standing=False).total("question")
    spent = ledgers[Rank.SERVER].phase_total("question")
    assert (spent.rounds, spent.sent, spent.offline_received) == (
        told.rounds,
        told.server_sent,
        told.server_offline,
    )


@pytest.mark.usefixtures("_short_parts")
def test_padding_may_fill_a_whole_part(model: Model) -> None:
    tokens = context_of(model, 30)
    found = []
    for grid, asked in ((1, 3), (12, 12)):
        bound, _ = bind_conversation(model.shape, PublicConfig(policy="full", length_grid=grid), len(tokens))
        answers = PlainConversation(model, bound, tokens, grid=grid)._session
        found.append([answers.chunk(tokens[:3], asked), answers.chunk([5], 1)])
    for without, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, without, atol=1e-3, rtol=1e-3)

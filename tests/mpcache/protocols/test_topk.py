"""A choice whose masks would fill a large table: its slots are opened under a mask of their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mpcache.cost import pricing
from mpcache.cost.pricing import price
from mpcache.ledger import Ledger
from mpcache.protocols import topk
from mpcache.rank import Rank
from tests.support import tiny_policies as tiny

CONTEXT, QUESTION = 64, 3
SPECS = ["mpcache", "mpcache:score=bound,share=none", "quest", "tokenselect", "h2o", "tidal"]


@pytest.fixture(autouse=True)
def _priced_anew() -> Iterator[None]:
    """What was priced with one table's size is not told of another."""
    pricing._memoized.cache_clear()
    yield
    pricing._memoized.cache_clear()


def answered(spec: str, protocol: str) -> Ledger:
    """Compare a private answer with the plain one; return the server's ledger."""
    context, asked = tiny.tokens(CONTEXT), tiny.chunks(QUESTION, 1, 1)
    shape = tiny.shape(layers=4)
    plain, _ = tiny.plain(spec, shape, context, asked)
    logits, ledgers = tiny.secure(spec, shape, context, asked, protocol)
    for mine, theirs in zip(logits, plain, strict=True):
        assert (mine - theirs).abs().max() < 0.05
    return ledgers[Rank.SERVER]


@pytest.mark.parametrize("spec", SPECS)
def test_the_answer_stays_and_costs_what_is_told(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "LARGEST_TABLE", 0)
    spent = answered(spec, "fast-bits").phase_total("decode1")
    shape = tiny.shape(layers=4)
    priced = price(shape, spec, CONTEXT, QUESTION, "fast-bits", new_tokens=3, standing=False)
    told = priced.phases["decode1"].values()
    assert spent.rounds == sum(one.rounds for one in told)
    assert spent.sent == sum(one.server_sent for one in told)
    assert spent.offline_received == sum(one.server_offline for one in told)


def test_it_takes_two_rounds_more_and_fewer_of_the_dealer_s_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for largest in (1 << 30, 0):
        monkeypatch.setattr(topk, "LARGEST_TABLE", largest)
        pricing._memoized.cache_clear()
        found.append(price(tiny.shape(layers=1), "quest:full=0", 2048, QUESTION).total("decode"))
    table, opened = found
    assert opened.rounds == table.rounds + 2
    assert opened.server_offline < 0.5 * table.server_offline

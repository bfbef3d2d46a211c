"""How long an answer takes: by the cost engine before it begins, and by its layers on the way."""

from __future__ import annotations

import pytest

from mpcache.choices import ProtocolName
from mpcache.config import PublicConfig
from mpcache.cost.pricing import price
from mpcache.cost.rates import modelled, pace_ms
from mpcache.model import Model
from mpcache.report.units import duration
from mpcache.transport.network import NO_NETWORK
from mpcache_parties.answer_pace import Foretold, LayerPace, answer_said, in_words
from mpcache_parties.facts import Facts, facts_of


def facts(model: Model, public: PublicConfig, question: int) -> Facts:
    told = {"shape": model.shape.to_dict(), "context_tokens": 24}
    return facts_of(
        {"model": told, "question": {"question_tokens": question, "new_tokens": 2, "private_tokens": 0}},
        public,
    )


@pytest.mark.parametrize(("question", "priced", "of"), [(5, 5, ""), (0, 32, " of a question of 32 tokens")])
def test_the_estimate_is_the_cost_engines(model: Model, question: int, priced: int, of: str) -> None:
    """Of a conversation, whose questions come later, for one of usual length."""
    public = PublicConfig(policy="full", protocol=ProtocolName.FAST, max_new_tokens=2)
    cost = price(model.shape, "full", 24, priced)
    first = duration(sum(modelled(cost, NO_NETWORK, phase="question").values()))
    each = duration(pace_ms(cost, NO_NETWORK))
    told = Foretold(facts(model, public, question), public).told()
    assert told == f"on idle cores about {first} to the first token{of}, then {each} each"


def test_what_has_no_price_has_no_estimate(model: Model) -> None:
    public = PublicConfig(policy="mpcache:threshold=0.1", max_new_tokens=2)
    assert Foretold(facts(model, public, 5), public).told() == ""
    stock = PublicConfig(policy="full", protocol=ProtocolName.STOCK, max_new_tokens=2)
    assert Foretold(facts(model, stock, 5), stock).told() == ""


def test_a_chunk_tells_its_layers_and_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = LayerPace(lambda *told: said.append(in_words(*told)))
    pace.layers = 30
    for at, phase, layer, part in (
        (100.0, "question", 0, 1), (103.0, "question", 10, 1), (110.0, "turn2-decode4", 0, 1),
        (111.0, "turn3-question", 0, 1), (115.0, "turn3-question", 10, 2),
    ):  # fmt: skip
        now[0] = at
        pace(phase, layer, part, 2 if phase.startswith("turn3") else 1)
    assert said == [
        "question: layer 1 of 30",
        "question: layer 11 of 30, about 6 s left",
        "token 5: layer 1 of 30",
        "question: layer 1 of 60",
        "question: layer 41 of 60, about 2 s left",
    ]


def test_a_long_question_and_slow_tokens_are_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a token also what the rest takes at most: two more tokens and a half, of 8 s each."""
    now, said = [100.0], list[str]()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    tell = answer_said(said.append, 5)
    heard = [
        (101.0, "question", 1), (103.0, "question", 10), (104.0, "question", 15), (105.5, "question", 20),
        (107.0, "decode1", 0), (111.0, "decode1", 15), (115.0, "decode2", 0), (119.0, "decode2", 15),
        (123.0, "decode3", 0),
    ]  # fmt: skip
    for at, phase, layer in heard:
        now[0] = at
        tell(phase, layer, 30, 500.0)
    assert said == [
        "client: question: layer 11 of 30, about 500 ms left",
        "client: question: layer 21 of 30, about 500 ms left",
        "client: token 3: layer 16 of 30, about 500 ms left; at most 20 s to the answer's end",
    ]

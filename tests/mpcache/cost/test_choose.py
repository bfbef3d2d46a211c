"""The model's choice between the ways to compare, from public sizes alone."""

import pytest

from mpcache.cost.choose import pick
from mpcache.cost.pricing import price
from mpcache.cost.rates import answer_ms, modelled, offline_ms
from mpcache.model import demo_model_dir, load_shape
from mpcache.policy import parse_policy
from mpcache.transport.network import NO_NETWORK, Profile, parse_network

SHAPE = load_shape(demo_model_dir())
CONTEXT, QUESTION, TOKENS = 880, 5, 6


def picked(spec: str, network: Profile | None) -> str:
    bound = parse_policy(spec).bind(CONTEXT, SHAPE)
    return pick(SHAPE, bound, CONTEXT, QUESTION, TOKENS, network).protocol


def test_digits_take_a_few_rounds_more_and_far_fewer_of_the_dealer_s_bytes() -> None:
    keys, digits = (
        price(SHAPE, "quest", CONTEXT, QUESTION, p).total("decode") for p in ("fast", "fast-bits")
    )
    selecting, layers = 4, 6  # the others attend to everything
    assert digits.rounds == keys.rounds + selecting + 2 * layers
    assert digits.comparisons == keys.comparisons
    # Bytes for each pair in a top-k and for each bucket and score of softmax, and nothing else.
    more = digits.server_sent - keys.server_sent
    assert 0 < more < 2 * keys.comparisons
    assert digits.offline < 0.5 * keys.offline
    assert digits.client_offline < 0.1 * keys.client_offline


def test_a_slow_line_takes_fewer_bytes_and_a_fast_one_far_away_fewer_rounds() -> None:
    assert picked("mpcache:score=bound,share=none", parse_network("1:20")) == "fast-bits"
    assert picked("mpcache:score=bound,share=none", parse_network("200:10000")) == "fast"


def test_softmax_alone_is_worth_the_choice() -> None:
    assert [picked("full", parse_network(n)) for n in ("1:20", "200:10000")] == ["fast-bits", "fast"]


def test_where_the_document_decides_what_stays_the_choice_is_that_of_all_of_it() -> None:
    for network in ("1:20", "200:10000"):
        assert picked("mpcache:threshold=0.1", parse_network(network)) == picked(
            "full", parse_network(network)
        )


def test_the_reading_of_a_private_document_is_weighed_too() -> None:
    """By rounds alone key trees win, by the bytes of many scores digits do."""
    bound, far = parse_policy("full").bind(24, SHAPE), parse_network("100:1000")
    chosen = [pick(SHAPE, bound, 24, QUESTION, 2, far, private=n) for n in (0, 600)]
    assert [one.protocol for one in chosen] == ["fast", "fast-bits"]
    assert all(chosen[1].ms[name] > chosen[0].ms[name] for name in chosen[0].ms)


def test_an_answer_waits_for_the_dealer_where_that_takes_longer() -> None:
    one = price(SHAPE, "quest", CONTEXT, QUESTION)
    slow = Profile("slow", 0, 1)
    assert offline_ms(one, slow) > sum(modelled(one, slow).values())
    more = answer_ms(one, slow, 3) - answer_ms(one, slow, 2)
    assert more == pytest.approx(offline_ms(one, slow))
    more = answer_ms(one, NO_NETWORK, 3) - answer_ms(one, NO_NETWORK, 2)
    assert more == pytest.approx(sum(modelled(one, NO_NETWORK).values()))


def test_the_choice_says_what_it_weighed() -> None:
    bound = parse_policy("quest").bind(CONTEXT, SHAPE)
    said = str(pick(SHAPE, bound, CONTEXT, QUESTION, TOKENS, parse_network("wan")))
    assert said.startswith("picked fast-bits for network wan: ") and "with fast" in said

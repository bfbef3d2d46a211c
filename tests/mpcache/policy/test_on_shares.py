"""Eviction on shares keeps the tokens that the same rule keeps in plaintext."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mpcache.engines.plain import PlainOps
from mpcache.errors import PolicyError
from mpcache.model.prefill import prefill
from mpcache.ops import AnyEngine
from mpcache.policy import POLICIES, ReadingPlan, parse_policy
from mpcache.policy.on_shares import ReadingPolicy
from mpcache.policy.plan import SharedEviction
from mpcache.rank import Rank
from mpcache.runtime.party import Party
from mpcache.runtime.shares import MaskedOperand
from mpcache.session import Session
from tests.support.play import play
from tests.support.tiny_policies import KERNELS, model, prefilled, shape, tokens

SHAPE = shape(layers=3, heads=4, kv_heads=2)
CONTEXT, OWN, CHUNKS = 3, 26, (10, 10, 6)
RULES = {
    "snapkv": "snapkv:cap=11,queries=4,pool=3",
    "mpcache, shared": "mpcache:n_keep=10,sink=2,recent=3,share=1-2",
    "h2o": "h2o:heavy=6,recent=4",
    "its last ones alone": "snapkv:cap=4,queries=4",
}


def rule_of(spec: str) -> SharedEviction:
    found = parse_policy(spec).on_shares(OWN, SHAPE)
    assert found is not None
    return found


def read(ops: AnyEngine, party: Party | None, rank: Rank, eviction: SharedEviction | None) -> Session:
    policy, server = parse_policy("full"), rank is Rank.SERVER
    session = Session(ops, party, SHAPE, policy.bind(CONTEXT, SHAPE))
    mine = server or party is None
    session.setup(model(SHAPE).weights if mine else None)
    session.context(prefilled(policy, SHAPE, tokens(CONTEXT)) if mine else None, KERNELS if mine else None)
    own = tokens(OWN, 5) if rank is Rank.CLIENT or party is None else None
    with torch.no_grad():
        for _ in session.read_document(ReadingPlan(CHUNKS, eviction), own):
            pass
    return session


def plain_cache(eviction: SharedEviction | None) -> list[tuple[Any, Any]]:
    session = read(PlainOps(), None, Rank.SERVER, eviction)
    layers = [session.cache.whole(i) for i in range(SHAPE.layers)]
    assert session.cache.context == CONTEXT + OWN and session.cache.length == 0
    return [(layer.k, layer.v) for layer in layers]


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in RULES.items()])
@pytest.mark.parametrize("protocol", ["fast", "fast-bits"])
def test_the_same_rows_stay_as_in_plaintext(spec: str, protocol: str) -> None:
    """In the same order, with the server's before them; their keys have the positions that they had."""
    rule = rule_of(spec)

    def program(ops: AnyEngine, party: Party, rank: Rank) -> Any:
        session = read(ops, party, rank, rule)
        assert session.in_range is (True if rank is Rank.CLIENT else None)
        layers = [session.cache.whole(i) for i in range(SHAPE.layers)]
        return [(layer.k, layer.v) for layer in layers]

    if protocol == "fast-bits" and not spec.startswith("snapkv:cap=11"):
        pytest.skip("what the two differ in is seen in one rule")
    played, plain = play(program, protocol), plain_cache(rule)
    for i, (server, client, want) in enumerate(zip(played.server, played.client, plain, strict=True)):
        for ours, theirs, rows in zip(server, client, want, strict=True):
            assert isinstance(ours, MaskedOperand) and rows.shape[1] == CONTEXT + rule.kept[i]
            raw = ours.public + ours.mask + theirs.mask
            got = ((raw << (64 - ours.ring)) >> (64 - ours.ring)).double() / 2**ours.bits
            assert (got - rows).abs().max() < 0.01


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in RULES.items()])
def test_those_stay_that_the_last_queries_look_at(spec: str) -> None:
    """By the rule's own words, on one pass over both documents together."""
    rule, whole = rule_of(spec), plain_cache(None)
    known = prefill(model(SHAPE), tokens(CONTEXT) + tokens(OWN, 5), window=rule.judges)
    for i, (k, _) in enumerate(plain_cache(rule)):
        leader = rule.leaders[i]
        q, keys = known.q_window[leader], known.k[leader]
        heads = [KERNELS.window_importance(*pair, known.first_position)
                 for pair in zip(q.chunk(2), keys.chunk(2), strict=True)]  # fmt: skip
        paid = torch.stack(heads)[:, CONTEXT:]
        if not rule.by_head:
            paid = paid.mean(0, keepdim=True).expand(2, -1)
        for head in range(2):
            middle = paid[head, rule.first : OWN - rule.last].tolist()
            near = rule.pool // 2
            score = [sum(middle[max(0, j - near) : j + near + 1]) for j in range(len(middle))]
            best = sorted(range(len(score)), key=lambda j: -score[j])[: rule.chosen(i)]
            stay = [*range(rule.first), *range(OWN - rule.last, OWN), *(rule.first + j for j in best)]
            want = whole[i][0][head, [*range(CONTEXT), *(CONTEXT + j for j in stay)]]
            assert torch.equal(k[head], want)


@pytest.mark.parametrize(
    "name", [name for name in POLICIES if name not in ("full", "snapkv", "mpcache", "h2o")]
)
def test_every_other_policy_says_why_it_cannot(name: str) -> None:
    with pytest.raises(PolicyError, match=f"policy {name}.*: cannot evict a document on shares: "):
        parse_policy(name).on_shares(OWN, SHAPE)


def test_policies_that_keep_an_account_of_each_token_read_none() -> None:
    for spec in ("tova:cap=2", "streaming:sink=1,recent=1"):
        with pytest.raises(PolicyError, match="give another --policy, or --private-policy full"):
            ReadingPolicy.of(parse_policy(spec).bind(CONTEXT, SHAPE), rule_of(RULES["h2o"]))

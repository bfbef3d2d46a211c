"""Eviction on shares keeps the tokens that the same rule keeps in plaintext."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from mpcache.engines.plain import PlainOps
from mpcache.errors import PolicyError
from mpcache.model.prefill import prefill
from mpcache.ops import AnyEngine, as_tensor
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


def read(
    ops: AnyEngine, party: Party | None, rank: Rank, eviction: SharedEviction | None, padding: int = 0,
    spec: str = "full",
) -> Session:  # fmt: skip
    policy, server = parse_policy(spec), rank is Rank.SERVER
    session = Session(ops, party, SHAPE, policy.bind(CONTEXT, SHAPE), grid=OWN if padding else 1)
    mine = server or party is None
    session.setup(model(SHAPE).weights if mine else None)
    session.context(prefilled(policy, SHAPE, tokens(CONTEXT)) if mine else None, KERNELS if mine else None)
    own = tokens(OWN, 5)[padding:] if rank is Rank.CLIENT or party is None else None
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
            assert (value_of(ours, theirs) - rows).abs().max() < 0.01


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
            stay = [*range(rule.first), *(rule.first + j for j in best), *range(OWN - rule.last, OWN)]
            want = whole[i][0][head, [*range(CONTEXT), *(CONTEXT + j for j in stay)]]
            assert torch.equal(k[head], want)


# ------------------------------------------------------------------------------------------ padded

PADDING = 11  # more than the first chunk


def rows_of(session: Session) -> list[list[torch.Tensor]]:
    """Of each layer and head the rows that are attended to, in an order of their own."""
    found = []
    for i in range(SHAPE.layers):
        layer = session.cache.whole(i)
        both = torch.cat([as_tensor(layer.k), as_tensor(layer.v)], -1)
        marks = torch.ones(both.shape[:2])
        if layer.seen is not None:
            marks[:, CONTEXT:] = as_tensor(layer.seen)[:, 0]
        heads = [head[mark == 1] for head, mark in zip(both, marks, strict=True)]
        found.append([head[head[:, 0].argsort()] for head in heads])
    return found


@pytest.mark.parametrize("spec", [pytest.param(spec, id=name) for name, spec in RULES.items()])
def test_of_a_padded_document_the_same_tokens_stay_as_without_padding(spec: str) -> None:
    """Padding takes no token's place, though it stands where the first tokens would."""
    padded = read(PlainOps(), None, Rank.SERVER, rule_of(spec), PADDING)
    policy = parse_policy("full")
    session = Session(PlainOps(), None, SHAPE, policy.bind(CONTEXT, SHAPE))
    session.setup(model(SHAPE).weights)
    session.context(prefilled(policy, SHAPE, tokens(CONTEXT)), KERNELS)
    left = OWN - PADDING
    rule = replace(rule_of(spec), tokens=left)
    with torch.no_grad():
        for _ in session.read_document(ReadingPlan((left,), rule), tokens(OWN, 5)[PADDING:]):
            pass
    assert padded.cache.padding == PADDING
    for with_it, without in zip(rows_of(padded), rows_of(session), strict=True):
        for ours, theirs in zip(with_it, without, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_where_more_stays_than_there_is_padding_stays_unseen() -> None:
    session = read(PlainOps(), None, Rank.SERVER, rule_of("mpcache:n_keep=10,sink=2,recent=3"), OWN - 7)
    for heads in rows_of(session):
        assert [len(head) for head in heads] == [CONTEXT + 7] * SHAPE.kv_heads


@pytest.mark.parametrize("name", ["snapkv", "mpcache, shared"])
def test_a_padded_document_is_evicted_on_shares_as_in_plaintext(name: str) -> None:
    def program(ops: AnyEngine, party: Party, rank: Rank) -> Any:
        session = read(ops, party, rank, rule_of(RULES[name]), PADDING)
        layers = [session.cache.whole(i) for i in range(SHAPE.layers)]
        return [(layer.k, layer.seen) for layer in layers]

    played, plain = play(program), read(PlainOps(), None, Rank.SERVER, rule_of(RULES[name]), PADDING)
    for i, (server, client) in enumerate(zip(played.server, played.client, strict=True)):
        (ours, mine), (theirs, yours) = server, client
        layer = plain.cache.whole(i)
        assert layer.seen is not None
        assert torch.equal(mine.data + yours.data, as_tensor(layer.seen).long())
        assert (value_of(ours, theirs) - as_tensor(layer.k)).abs().max() < 0.01


# ----------------------------------------------------------------------------------- clusters behind it


def test_clusters_are_of_neighbours_among_what_stays() -> None:
    """By position, formed at once: the first question chooses among them."""
    rule, spec = rule_of("h2o:heavy=12,recent=4"), "mpcache:coarse=4,fine=2,sink=0,recent=3,score=mean"
    played = play(lambda ops, party, rank: keys_and_means(read(ops, party, rank, rule, spec=spec)))
    whole = plain_cache(None)
    for i, (server, client) in enumerate(zip(played.server, played.client, strict=True)):
        (k, coarse, fine, clusters), (k1, coarse1, fine1, _) = server, client
        keys, coarse, fine = value_of(k, k1), value_of(coarse, coarse1), value_of(fine, fine1)
        assert clusters == 4  # of 19 rows, 3 of them recent
        for head in range(SHAPE.kv_heads):
            apart = torch.cdist(keys[head], whole[i][0][head].double())
            assert apart.amin(-1).max() < 0.01 and (apart.argmin(-1).diff() > 0).all()
            assert (coarse[head] - keys[head, :16].reshape(4, 4, -1).mean(1)).abs().max() < 0.01
            assert (fine[head] - keys[head, :16].reshape(8, 2, -1).mean(1)).abs().max() < 0.01


def keys_and_means(session: Session) -> list[Any]:
    layers = [session.cache.whole(i) for i in range(SHAPE.layers)]
    return [(layer.k, *layer.memory.floors, layer.memory.clusters) for layer in layers]


def value_of(ours: MaskedOperand, theirs: MaskedOperand) -> torch.Tensor:
    raw = ours.public + ours.mask + theirs.mask
    value: torch.Tensor = ((raw << (64 - ours.ring)) >> (64 - ours.ring)).double() / 2**ours.bits
    return value


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


@pytest.mark.slow
def test_torch_loads_no_compiler_for_it() -> None:
    """That takes seconds, in which the others wait: of meta tensors, and of shapes that are broadcast."""
    program = (
        "import sys; from tests.mpcache.policy.test_on_shares import *; "
        "play(lambda *who: bool(read(*who, rule_of(RULES['snapkv'])))); "
        "sys.exit(', '.join({'sympy', 'torch._dynamo'} & {*sys.modules}) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

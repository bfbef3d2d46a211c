"""`at_budget`: every policy can be set to a number of attended tokens, and keeps to it."""

from __future__ import annotations

from typing import Any

import pytest

from mpcache.answer import bind_to_document
from mpcache.config import PublicConfig
from mpcache.errors import PolicyError
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.choosing import ItemPlan
from mpcache.policy.clusters import ClusterPlan
from tests.support.policy_specs import by_name
from tests.support.tiny_policies import KERNELS, Counting, plain, prefilled, shape, tokens

SPECS = [
    *by_name(name for name in POLICIES if name not in ("full", "compact", "sepllm", "pod")),
    "compact:counts=equal",
    pytest.param("sepllm:ids=2/5", marks=pytest.mark.slow),
    pytest.param("snapkv|pod", marks=pytest.mark.slow),
    PublicConfig().policy,
    "mpcache:dynamic=false",
    "snapkv:cap=0.5|quest",
    "snapkv:cap=0.5|mpcache",
    "streaming|mpcache:score=bound,share=none",
]


def granule(plan: Any) -> int:
    """Tokens that come and go together."""
    sizes = [p.sizes[-1] for p in plan.layers if isinstance(p, ClusterPlan) and p.sizes]
    return max([1, *sizes, *(p.size for p in plan.layers if isinstance(p, ItemPlan))])


@pytest.mark.parametrize("context", [601, 880, 1000, 2048])
@pytest.mark.parametrize("spec", SPECS)
def test_a_budget_is_met_to_a_cluster(spec: str, context: int) -> None:
    s = shape(layers=6)
    for percent in (5, 7, 10, 20, 40, 63, 90, 99):
        budget = context * percent // 100
        if "|mpcache" in spec and budget < 40:  # what fills no cluster is attended to, too
            continue
        policy = parse_policy(spec).at_budget(budget, context, s)
        plan = policy.plan(context, s)
        for layer in plan.layers:
            assert budget - granule(plan) < layer.attended <= budget
        assert parse_policy(policy.spec) == policy  # a row's `spec` can be run again


def test_options_that_are_no_budget_stay() -> None:
    policy: Any = parse_policy("mpcache:score=bound,share=none,sink=2,n_keep=0.5").at_budget(
        100, 880, shape()
    )
    assert (policy.score, policy.share, policy.sink) == ("bound", "none", 2)
    assert 440 - 16 < policy.n_keep <= 440


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_attended_to_is_what_the_plan_says(spec: str) -> None:
    """Counted in a run, for one token after a context of 120."""
    s, ops = shape(layers=2), Counting()
    policy = parse_policy(spec).at_budget(48, 120, s)
    planned = policy.plan(120, s).layers
    plain(policy.spec, s, tokens(120), [[3]], ops=ops)
    assert [seen for _, seen in ops.seen] == [layer.attended + 1 for layer in planned]
    assert all(layer.attended <= 48 for layer in planned)


@pytest.mark.parametrize(
    ("spec", "budget", "least"),
    [("full", 99, 100), ("streaming", 4, 5), ("h2o", 1, 2), ("quest", 19, 20), ("mpcache", 27, 28)],
)
def test_a_budget_that_cannot_be_met(spec: str, budget: int, least: int) -> None:
    said = f"cannot attend to {budget} tokens or fewer; it needs {least} or more"
    with pytest.raises(PolicyError, match=said):
        parse_policy(spec).at_budget(budget, 100, shape())
    assert parse_policy(spec).at_budget(least, 100, shape()).plan(100, shape()).attended <= least


@pytest.mark.parametrize("share", ["default", "none"])
def test_a_second_part_chooses_and_the_first_evicts(share: str) -> None:
    """The first's own budget stays where it leaves more than the second attends to."""
    policy: Any = parse_policy(f"snapkv:cap=0.5|mpcache:share={share}").at_budget(88, 880, shape(layers=6))
    assert policy.first == parse_policy("snapkv:cap=0.5")
    assert (policy.then.n_keep, policy.then.dynamic, policy.then.share) == (0.75, True, share)
    plan = policy.plan(880, shape(layers=6))
    assert plan.kept == 440 and 88 - 8 < plan.attended <= 88
    wide = (
        parse_policy("snapkv:cap=40|mpcache").at_budget(88, 880, shape(layers=6)).plan(880, shape(layers=6))
    )
    assert wide.kept == wide.attended == 88


def test_a_second_part_that_cannot_choose_so_few() -> None:
    with pytest.raises(PolicyError, match="policy mpcache: cannot attend to 20 tokens .* 40 or more"):
        parse_policy("snapkv:cap=0.5|mpcache").at_budget(20, 128, shape())


@pytest.mark.parametrize(("percent", "tokens"), [(5, 44), (12.5, 110), (0.01, 1), (99, 871)])
def test_a_percent_is_rounded_down(percent: float, tokens: int) -> None:
    policy: Any = parse_policy("snapkv").at_percent(percent, 880, shape())
    assert policy.cap == tokens
    assert parse_policy("snapkv").at_percent(100, 880, shape()) == parse_policy("snapkv")


def test_what_a_document_decides_has_no_budget() -> None:
    with pytest.raises(PolicyError, match="the document decides what stays"):
        parse_policy("mpcache:threshold=0.1|quest").at_budget(20, 100, shape())


def test_a_mean_budget_is_met_by_heads_that_differ() -> None:
    """Counts of the document add up to the budget, and are what a query attends to."""
    s = shape(layers=2)
    policy = parse_policy("compact:counts=joint,refit=none").at_budget(24, 120, s)
    assert not policy.plan_is_public and policy.plan(120, s).attended == 120  # the most it can be
    known = prefilled(policy, s, tokens(120))
    bound, counts = bind_to_document(policy.bind(120, s), s, known, KERNELS)
    assert sum(counts) == 24 * s.layers * s.kv_heads and len(set(counts)) > 1
    assert bound.plan.tokens_attended(s.kv_heads) == 24 and bound.plan.attended == max(counts)
    ops = Counting()
    plain(bound.spec, s, tokens(120), [[3]], ops=ops)
    layers = [counts[i : i + s.kv_heads] for i in range(0, len(counts), s.kv_heads)]
    assert [most - 1 for _, most in ops.seen] == [n for layer in layers for n in dict.fromkeys(layer)]


def test_layers_of_their_own_budgets_have_no_common_one() -> None:
    with pytest.raises(PolicyError, match="n_keep=30/20 .* one number"):
        parse_policy("mpcache:n_keep=30/20").at_budget(20, 100, shape())

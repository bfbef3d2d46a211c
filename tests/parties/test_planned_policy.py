"""Policy `auto` in a session: the server picks, the others check what it may say, and all compare it."""

from __future__ import annotations

from typing import Any

import pytest

from mpcache.choices import POLICY_AUTO, ProtocolName
from mpcache.config import PublicConfig
from mpcache.errors import Desync
from mpcache.model import demo_model_dir, load_shape
from mpcache_parties.facts import POLICY_CHARACTERS, Facts, facts_of

AUTO = PublicConfig(policy=POLICY_AUTO, protocol=ProtocolName.FAST)


def facts(public: PublicConfig = AUTO, **told: Any) -> Facts:
    model = {"shape": load_shape(demo_model_dir()).to_dict(), "context_tokens": 100, "kernels": "reference"}
    asked = {"question_tokens": 5, "new_tokens": 4, "private_tokens": 0}
    return facts_of({"model": model | told, "question": asked}, public)


def test_all_take_what_the_server_picked_and_compare_it() -> None:
    found = facts(policy="snapkv:cap=20", policy_picked="picked policy snapkv:cap=20 of 9 settings")
    assert found.policy.spec == found.flat()["policy"] == "snapkv:cap=20"
    assert found.policy.plan.kept == 20
    assert found.picked == "picked policy snapkv:cap=20 of 9 settings"
    assert facts(policy="snapkv:cap=21").flat() != found.flat()


def test_counts_of_the_model_come_with_a_policy_that_needs_them() -> None:
    shape = load_shape(demo_model_dir())
    counts = [20] * (shape.layers * shape.kv_heads)
    found = facts(policy="compact:keep=20", head_counts=counts)
    assert found.policy.plan.kept == 20 and found.policy.leak == "model-count"


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (None, "None is no policy"),
        (7, "7 is no policy"),
        ("x" * (POLICY_CHARACTERS + 1), "is no policy"),
        ("nonsense", "unknown policy"),
        ("auto", "picked for a model"),
        ("oracle", "reveals more than auto may"),
        ("compact:counts=joint", "reveals more than auto may: count"),
        ("mpcache:threshold=0.1", "reveals more than auto may: count"),
    ],
)
def test_what_the_server_may_not_pick_ends_the_session(spec: Any, why: str) -> None:
    with pytest.raises(Desync, match=f"the policy that the server picked for auto: .*{why}"):
        facts(policy=spec)


def test_a_policy_that_was_named_is_not_the_servers_to_pick() -> None:
    assert facts(PublicConfig(policy="snapkv:cap=30"), policy="full").policy.spec == "snapkv:cap=30"

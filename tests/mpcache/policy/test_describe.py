"""What a policy says of itself is whole, and is what users are told."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mpcache.errors import PolicyError
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.describe import describe
from tests.support.paths import ROOT
from tests.support.processes import Run


@pytest.mark.parametrize("name", POLICIES)
def test_all_of_a_policy_is_said(name: str) -> None:
    facts = describe(POLICIES[name])
    assert facts.mechanism[0].startswith(f"{name}: ") or name in ("random", "oracle")
    assert all((facts.source, facts.needs, facts.leaks, facts.example))
    assert type(parse_policy(facts.example)) is POLICIES[name]
    for option in facts.options:
        assert option.meaning and option.allowed, option.name
        if option.default != "0" or (name, option.name) not in (("compact", "heads"), ("sepllm", "ids")):
            assert parse_policy(f"{name}:{option.name}={option.default}") == POLICIES[name]()


@pytest.mark.parametrize("name", ["shadowkv", "nosa"])
def test_what_cannot_be_set_is_no_option(name: str) -> None:
    told = {option.name for option in describe(POLICIES[name]).options}
    assert "gqa" in told and not told & {"score", "alpha", "blocks"}
    with pytest.raises(PolicyError, match="no option 'score'.*options: gqa"):
        parse_policy(f"{name}:score=bound")


def test_one_policy_is_told_to_people_and_to_programs(run_here: Run) -> None:
    code, out, _ = run_here("policies", "snapkv", "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(asdict(describe(POLICIES["snapkv"]))))
    code, out, _ = run_here("policies", "snapkv")
    assert code == 0 and all(word in out for word in ("reveals  none", "queries", "1 or more", "pool", "odd"))
    code, out, noise = run_here("policies", "snapvk")
    assert (code, out) == (2, "") and "did you mean snapkv?" in noise


def test_the_page_has_a_section_for_each_policy() -> None:
    page = (Path(ROOT) / "docs" / "policies.md").read_text()
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")][1:-1] == list(POLICIES)

"""The notation of policies: one reader for configs, commands and sweeps."""

from __future__ import annotations

import pytest

from mpcache.config import load_settings
from mpcache.errors import ConfigError, PolicyError
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.grammar import PolicyPart, parse_parts, write_parts
from mpcache.policy.registry import option_names


def test_parts() -> None:
    assert parse_parts("full") == (PolicyPart("full"),)
    one, two = parse_parts("snapkv:cap=256,pool=3|quest")
    assert (one.name, one.options, one.keys) == ("snapkv", (("cap", "256"), ("pool", "3")), ("cap", "pool"))
    assert two == PolicyPart("quest")
    assert str(two.with_options([("page", "8")])) == "quest:page=8"


@pytest.mark.parametrize("spec", ["full", "a:b=c", "a:b=c,d=1/2|e:f=0.5", "a:b=c=d"])
def test_what_is_written_is_what_was_read(spec: str) -> None:
    assert write_parts(parse_parts(spec)) == spec


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", "has no name"),
        (":cap=1", "has no name"),
        ("snapkv|", "has no name"),
        ("snapkv:cap", "option cap needs a value, as in cap=VALUE"),
        ("snapkv:cap=", "option cap needs a value"),
        ("snapkv:=3", "'=3' is no option"),
        ("snapkv:cap=1,,pool=3", "'' is no option"),
        ("snapkv:cap=1,cap=2", "option cap is given twice"),
        ("a|b|c", "more than two parts"),
    ],
)
def test_a_config_and_a_command_refuse_the_same(spec: str, words: str) -> None:
    with pytest.raises(PolicyError, match=words):
        parse_policy(spec)
    with pytest.raises(ConfigError, match="must be NAME or NAME:key=value"):
        load_settings(None, {"public.policy": spec})


def test_options_of_a_policy() -> None:
    assert "n_keep" in option_names(PolicyPart("mpcache"))
    assert all(isinstance(option_names(PolicyPart(name)), tuple) for name in POLICIES)
    with pytest.raises(PolicyError, match="did you mean mpcache"):
        option_names(PolicyPart("mpcahe"))

"""The policies by name, and how a policy as text becomes one with its options."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from mpcache.choices import POLICY_AUTO
from mpcache.errors import PolicyError
from mpcache.policy.base import Policy
from mpcache.policy.calibration import Oracle, Random
from mpcache.policy.cascade import Cascade
from mpcache.policy.combined import Combined
from mpcache.policy.compact import Compact
from mpcache.policy.delta import Delta
from mpcache.policy.full import Full
from mpcache.policy.grammar import PolicyPart, parse_parts
from mpcache.policy.h2o import H2O
from mpcache.policy.hip import HiP
from mpcache.policy.keyformer import Keyformer
from mpcache.policy.mpcache import MPCache
from mpcache.policy.nosa import NOSA
from mpcache.policy.pact import Pact
from mpcache.policy.pod import PoD
from mpcache.policy.promptdistill import PromptDistill
from mpcache.policy.quest import Quest
from mpcache.policy.recycled import Recycled
from mpcache.policy.sepllm import SepLLM
from mpcache.policy.shadowkv import ShadowKV
from mpcache.policy.snapkv import SnapKV
from mpcache.policy.streaming import Streaming
from mpcache.policy.tidal import Tidal
from mpcache.policy.tokenselect import TokenSelect
from mpcache.policy.topv import TopV
from mpcache.policy.tova import Tova
from mpcache.policy.windowkv import WindowKV

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        Full, Streaming, SnapKV, H2O, Tova, Quest, MPCache, Compact,
        Tidal, Delta, Recycled, TokenSelect, HiP,
        WindowKV,
        SepLLM,
        PromptDistill,
        TopV,
        PoD,
        ShadowKV,
        NOSA,
        Keyformer,
        Pact,
        Cascade,
        Random, Oracle,
    )
}  # fmt: skip


def parse_policy(spec: str) -> Policy:
    """Read `mpcache:n_keep=128,alpha=0.5`, or `snapkv:cap=256|quest`, as a policy.

    Raises PolicyError, one line: the policy, the option, what is wrong and what is allowed.
    """
    if spec == POLICY_AUTO:
        raise PolicyError(
            "policy auto is picked for a model, a document and a network: by a session, or by "
            "`mpcache audit --tune`; name a policy here"
        )
    parsed = [_policy(part) for part in parse_parts(spec)]
    return _combine(*parsed) if len(parsed) == 2 else parsed[0]


def option_names(part: PolicyPart) -> tuple[str, ...]:
    """Return the names of the options that a policy has. Raises PolicyError on an unknown policy."""
    return tuple(policy_class(part.name).options())


def policy_class(name: str) -> type[Policy]:
    """Return the policy of a name. Raises PolicyError on an unknown one."""
    if name not in POLICIES:
        hint = _hint(name, POLICIES)
        raise PolicyError(f"unknown policy {name!r}{hint}; known: {', '.join(POLICIES)}")
    return POLICIES[name]


def _policy(part: PolicyPart) -> Policy:
    cls = policy_class(part.name)
    known = cls.options()
    options: dict[str, Any] = {}
    for key, text in part.options:
        if key not in known:
            allowed = ", ".join(known) or "none"
            hint = _hint(key, known)
            raise PolicyError(f"policy {part.name}: no option {key!r}{hint}; options: {allowed}")
        options[key] = _value(part.name, key, text, str(known[key].type))
    return cls(**options)


def _combine(first: Policy, then: Policy) -> Policy:
    if not first.evicts:
        able = ", ".join(name for name, cls in POLICIES.items() if cls.evicts)
        raise PolicyError(f"policy {first.name} evicts no context; on the left of | may stand {able}")
    if not then.selects:
        able = ", ".join(name for name, cls in POLICIES.items() if cls.selects)
        raise PolicyError(f"policy {then.name} selects nothing; on the right of | may stand {able}")
    then.as_selector()
    return Combined(first, then)


def _value(policy: str, key: str, text: str, kind: str) -> Any:
    """Text to the option's type. A Budget is a count, or a ratio written with a point."""
    try:
        match kind:
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "bool":
                return {"true": True, "false": False, "yes": True, "no": False}[text.lower()]
            case "Budget":
                return _budget(text)
            case "Budgets":
                return tuple(map(_budget, text.split("/"))) if "/" in text else _budget(text)
            case _:
                return text
    except (ValueError, KeyError):
        wanted = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "Budget": "a count of 1 or more, or a ratio above 0.0 and up to 1.0",
            "Budgets": "a count of 1 or more or a ratio up to 1.0, or one for each layer: 512/256/0.5",
        }[kind]
        raise PolicyError(f"policy {policy}: {key}={text!r} is not allowed; give {wanted}") from None


def _budget(text: str) -> int | float:
    value: int | float = float(text) if "." in text else int(text)
    if value <= 0 or (isinstance(value, float) and not value <= 1):
        raise ValueError
    return value


def _hint(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""

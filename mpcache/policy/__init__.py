"""KV-cache policies: the registry, and the `NAME[:key=value,...]` notation.

`STATIC|DYNAMIC` combines two: the first evicts the context, the second selects at every step.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any

from mpcache.errors import PolicyError
from mpcache.policy.base import BoundPolicy, LayerView, Policy
from mpcache.policy.calibration import Oracle, Random
from mpcache.policy.combined import Combined
from mpcache.policy.full import Full
from mpcache.policy.h2o import H2O
from mpcache.policy.mpcache import MPCache
from mpcache.policy.plan import LeakClass, Plan
from mpcache.policy.quest import Quest
from mpcache.policy.snapkv import SnapKV
from mpcache.policy.streaming import Streaming
from mpcache.policy.tova import Tova

POLICIES: dict[str, type[Policy]] = {
    cls.name: cls for cls in (Full, Streaming, SnapKV, H2O, Tova, Quest, MPCache, Random, Oracle)
}


def parse(spec: str) -> Policy:
    """`mpcache:n_keep=128,alpha=0.5`, or `snapkv:cap=256|quest`, -> a policy. Raises PolicyError."""
    first, bar, then = spec.partition("|")
    if "|" in then:
        raise PolicyError(f"policy {spec}: more than two parts; write STATIC|DYNAMIC")
    if bar:
        return _combine(parse(first), parse(then))
    name, _, rest = spec.partition(":")
    if name not in POLICIES:
        raise PolicyError(f"unknown policy {name!r}{_hint(name, POLICIES)}; known: {', '.join(POLICIES)}")
    cls = POLICIES[name]
    known = {f.name: f for f in fields(cls)}
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, eq, text = item.partition("=")
        if key not in known:
            allowed = ", ".join(known) or "none"
            raise PolicyError(f"policy {name}: no option {key!r}{_hint(key, known)}; options: {allowed}")
        if not eq:
            raise PolicyError(f"policy {name}: option {key} needs a value, as in {key}={known[key].default}")
        if key in options:
            raise PolicyError(f"policy {name}: option {key} is given twice")
        options[key] = _value(name, key, text, str(known[key].type))
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


def _hint(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""


__all__ = ["LeakClass", "POLICIES", "BoundPolicy", "Plan", "Policy", "LayerView", "parse"]

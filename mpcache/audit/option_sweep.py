"""The policies of an audit: all that run on shares, and those that `--sweep key=v1,v2` makes of some."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import product

from mpcache.config import PublicConfig
from mpcache.console.inputs import listed
from mpcache.errors import BadInput
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.grammar import PolicyPart, parse_parts, write_parts
from mpcache.policy.registry import option_names

MOST_TOLD = 30  # options that one line lists
OptionPairs = Sequence[tuple[str, str]]  # keys and values


def secure_policies() -> list[str]:
    """Return the names of all policies that can run on shares, and the default of models without a curve."""
    names = [name for name, cls in POLICIES.items() if not cls.plain_only]
    return [*names, PublicConfig().policy]


def sweep_options(policies: Sequence[str], sweeps: Sequence[str]) -> list[str]:
    """Put every combination of swept options into each policy that has them.

    policies: as text.  sweeps: `key=v1,v2` each.  Raises BadInput, or PolicyError for a policy that is none.
    """
    values = _values(sweeps)
    grid: list[str] = []
    used: set[str] = set()
    for spec in policies:
        parse_policy(spec)
        parts = parse_parts(spec)
        for key in values:
            if any(key in part.keys for part in parts):
                raise BadInput(f"--sweep {key} contradicts --policy {spec}, which sets it; leave one out")
        has = [key for key in values if any(key in option_names(part) for part in parts)]
        used |= set(has)
        for options in _combinations(values, has):
            grid.append(write_parts(_with(part, options) for part in parts))
    unknown = [key for key in values if key not in used]
    if unknown:
        known = {name for spec in policies for part in parse_parts(spec) for name in option_names(part)}
        options_known = ", ".join(sorted(known)) or "none"
        if len(known) > MOST_TOLD:
            near = get_close_matches(unknown[0], sorted(known), 3)
            options_known = (
                f"{', '.join(near)}, ... (`mpcache policies NAME`)" if near else "see `mpcache policies`"
            )
        raise BadInput(f"--sweep {unknown[0]}: none of these policies has it; options: {options_known}")
    for spec in grid:
        parse_policy(spec)
    return grid


def _values(sweeps: Sequence[str]) -> dict[str, list[str]]:
    """Read the values of each swept option."""
    values: dict[str, list[str]] = {}
    for text in sweeps:
        key, _, given = text.partition("=")
        if not key or not given:
            raise BadInput(f"--sweep {text!r} is not key=value,value; as in n_keep=128,256")
        if key in values:
            raise BadInput(f"--sweep {key} is given twice; list all its values in one")
        values[key] = listed(f"--sweep {key}:", given)
    return values


def _combinations(values: Mapping[str, Sequence[str]], keys: Sequence[str]) -> Iterator[OptionPairs]:
    for chosen in product(*(values[key] for key in keys)):
        yield list(zip(keys, chosen, strict=True))


def _with(part: PolicyPart, options: OptionPairs) -> PolicyPart:
    known = option_names(part)
    return part.with_options(pair for pair in options if pair[0] in known)

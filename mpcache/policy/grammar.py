"""The notation of policies as text: NAME[:key=value,...], alone or as STATIC|DYNAMIC.

This module knows no policy: `mpcache.policy.registry` turns parts into policies. A config, which is read
before any policy is needed, checks the notation by this module alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mpcache.errors import PolicyError

NOTATION = "NAME or NAME:key=value,... with each key once, or two with a | between"


@dataclass(frozen=True)
class PolicyPart:
    """One policy as text. options: keys and values in the order in which they are written."""

    name: str
    options: tuple[tuple[str, str], ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(key for key, _ in self.options)

    def with_options(self, more: Iterable[tuple[str, str]]) -> PolicyPart:
        """Return this part with more options behind its own."""
        return replace(self, options=(*self.options, *more))

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name


def parse_parts(spec: str) -> tuple[PolicyPart, ...]:
    """Read one part, or two with | between: what evicts, and what selects. Raises PolicyError."""
    parts = spec.split("|")
    if len(parts) > 2:
        raise PolicyError(f"policy {spec}: more than two parts; write STATIC|DYNAMIC")
    return tuple(map(_part, parts))


def write_parts(parts: Iterable[PolicyPart]) -> str:
    """Write parts as `parse_parts` reads them."""
    return "|".join(map(str, parts))


def _part(text: str) -> PolicyPart:
    name, _, rest = text.partition(":")
    if not name:
        raise PolicyError(f"policy {text!r} has no name; write {NOTATION} (`mpcache policies` lists them)")
    options: dict[str, str] = {}
    for item in rest.split(",") if rest else ():
        key, _, value = item.partition("=")
        if not key:
            raise PolicyError(f"policy {name}: {item!r} is no option; write {NOTATION}")
        if not value:
            raise PolicyError(f"policy {name}: option {key} needs a value, as in {key}=VALUE")
        if key in options:
            raise PolicyError(f"policy {name}: option {key} is given twice")
        options[key] = value
    return PolicyPart(name, tuple(options.items()))

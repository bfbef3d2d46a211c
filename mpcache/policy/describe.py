"""What a policy says of itself: one source for `mpcache policies NAME` and docs/policies.md."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass

from mpcache.policy.base import Policy
from mpcache.policy.plan import written


@dataclass(frozen=True)
class OptionFacts:
    """One option. default: as a user would write it."""

    name: str
    meaning: str
    allowed: str
    default: str


@dataclass(frozen=True)
class PolicyFacts:
    """One policy. mechanism: paragraphs, of which those that differ from the paper say so."""

    name: str
    mechanism: tuple[str, ...]
    source: str
    needs: str
    leaks: str
    may_leak: str
    private: bool
    evicts: bool
    selects: bool
    options: tuple[OptionFacts, ...]
    example: str


def describe(cls: type[Policy]) -> PolicyFacts:
    """Collect what a policy's class and module say."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    paragraphs = tuple(" ".join(part.split()) for part in text.split("\n\n"))
    return PolicyFacts(
        cls.name, paragraphs, cls.source, cls.needs, str(cls.leaks), cls.may_leak,
        not cls.plain_only, cls.evicts, cls.selects, tuple(_options(cls)), cls.example,
    )  # fmt: skip


def _options(cls: type[Policy]) -> list[OptionFacts]:
    """Describe each option; one with a default of its own means what its parent says."""
    above = [vars(base).get("__dataclass_fields__", {}) for base in cls.__mro__]
    found = []
    for name, f in cls.options().items():
        said = [known[name].metadata for known in above if name in known]
        meant = next(metadata for metadata in said if "meaning" in metadata)
        found.append(OptionFacts(name, meant["meaning"], meant["allowed"], written(f.default)))
    return found

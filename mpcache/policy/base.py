"""What a KV-cache policy is: a plan from public sizes, and how it evicts and selects.

A policy is a frozen dataclass of options. `plan` turns them into public integers for one context
length, once; everything after that uses the integers. The server evicts in plaintext (`evict`,
`represent`); the decode program selects through `weigh`, on values that may be shares.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from kernels import Backend
from mpcache.cache import Cache
from mpcache.errors import PolicyError
from mpcache.ops import Ops, Value
from mpcache.prefill import Prefill
from mpcache.secure.program import Program, at

LEAKS = ("none", "count", "static-index", "step-index", "step-bit", "token-class")

Budget = int | float  # tokens, or a ratio written with a point: 0.25


def tokens_of(budget: Budget, whole: int, at_least: int = 1) -> int:
    """A budget as a whole number: ratios are rounded up, once, here."""
    n = math.ceil(budget * whole - 1e-9) if isinstance(budget, float) else budget
    return max(at_least, n)


@dataclass(frozen=True)
class Plan:
    """Public integers of one policy for one context length.

    context: tokens of the document.  kept: tokens of it that stay in the cache (every layer).
    representatives: keys per layer that q is scored against beside the kept tokens.
    attended: most context tokens that one query attends to.  budgets: the policy's own integers.
    """

    context: int
    kept: int
    representatives: int
    attended: int
    budgets: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Policy(ABC):
    """One eviction policy with its options."""

    name: ClassVar[str]
    leaks: ClassVar[str] = "none"
    source: ClassVar[str] = ""

    @abstractmethod
    def plan(self, context: int) -> Plan:
        """The integers for a context of so many tokens. Raises PolicyError."""

    def window(self, context: int) -> int:
        """How many of the context's last queries `evict` looks at."""
        return 0

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        """Server, plaintext: positions (kept,) that stay, ascending."""
        return torch.arange(plan.context)

    def represent(self, k: torch.Tensor, plan: Plan, kernels: Backend) -> torch.Tensor | None:
        """Server, plaintext: representatives (KV, r, d) of the kept keys (KV, kept, d)."""
        return None

    def weigh(
        self, ops: Ops, plan: Plan, scores: Value, visible: torch.Tensor | None
    ) -> Program[tuple[Value, Value]]:
        """Scores (KV, rows, n + r) of n cached tokens and r representatives -> exp weights
        (KV, rows, n), zero where not attended, and their sum (KV, rows, 1).

        visible: causal mask (rows, recent) over the last tokens, or None.
        """
        return (yield from at("softmax", ops.softmax(scores, pad_visible(visible, scores.shape[-1]))))

    @property
    def spec(self) -> str:
        """The policy as the user would write it, options that differ from the default only."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (":" + ",".join(changed) if changed else "")

    def fail(self, option: str, allowed: str) -> PolicyError:
        value = getattr(self, option)
        return PolicyError(f"policy {self.name}: {option}={value} is out of range; allowed: {allowed}")


def pad_visible(visible: torch.Tensor | None, n: int) -> torch.Tensor | None:
    """Extend a mask over the recent tokens to n columns; what stands before them is visible."""
    if visible is None:
        return None
    rows, recent = visible.shape
    return torch.cat([torch.ones(rows, n - recent, dtype=visible.dtype), visible], 1)


@dataclass(frozen=True)
class Bound:
    """A policy with its plan, as the decode program calls it."""

    policy: Policy
    plan: Plan

    def weigh(
        self, ops: Ops, scores: Value, cache: Cache, layer: int, visible: torch.Tensor | None
    ) -> Program[tuple[Value, Value]]:
        return (yield from self.policy.weigh(ops, self.plan, scores, visible))

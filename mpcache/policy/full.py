"""full: every token, every step. What the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass

from mpcache.policy.base import Plan, Policy


@dataclass(frozen=True)
class Full(Policy):
    name = "full"
    source = "no eviction"

    def plan(self, context: int) -> Plan:
        return Plan(context, kept=context, representatives=0, attended=context, budgets={})

"""KV-cache policies: what each one keeps of the context, and what a query attends to.

`base` says what a policy is, `grammar` how one is written, and `registry` which ones there are; each
policy is a file of its own.
"""

from __future__ import annotations

from mpcache.policy.base import BoundPolicy, Policy
from mpcache.policy.layer_view import LayerView
from mpcache.policy.on_shares import NO_DOCUMENT, ReadingPlan, ReadingPolicy
from mpcache.policy.plan import LeakClass, Plan
from mpcache.policy.registry import POLICIES, parse_policy

__all__ = [
    "NO_DOCUMENT",
    "POLICIES",
    "BoundPolicy",
    "LayerView",
    "LeakClass",
    "Plan",
    "Policy",
    "ReadingPlan",
    "ReadingPolicy",
    "parse_policy",
]

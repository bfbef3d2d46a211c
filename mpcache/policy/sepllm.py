"""sepllm: first tokens, separators and their last neighbours (SepLLM).

A separator stands for the segment before it: . , ? ! ; : white space. The initial tokens, the last
`separators` of them and the last `recent` tokens stay.

Differs from the paper: where a document has fewer separators than that, the tokens before the recent ones
fill up, so that the number of tokens that stay does not tell how many separators there are, and which ones
stay is nobody's but the owner's: nothing is revealed, where a cache whose holes can be seen shows where a
text's sentences end. Tokens of questions and answers stay, all of them: whether one is a separator is
secret.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.policy.base import Policy
from mpcache.policy.plan import Budget, Budgets, LayerPlan, Plan, setting
from mpcache_kernels import Backend

SEPARATORS = frozenset(".,?!;: \t\n")


@dataclass(frozen=True)
class SepLLM(Policy):
    """Options of sepllm."""

    name = "sepllm"
    source = "SepLLM, arXiv 2412.12094"
    needs = "the document's tokens"
    evicts = True
    example = "sepllm:separators=64,recent=128"

    initial: int = setting(3, "first tokens that stay", "0 or more")
    separators: Budget = setting(0.1, "last separators that stay", "1 to the context, or a ratio up to 1.0")
    recent: Budget = setting(0.1, "last tokens that stay", "1 to the context, or a ratio up to 1.0")
    ids: Budgets = setting(
        0, "token ids that separate, as in 11/13; if not given, those whose text is a separator", "token ids"
    )

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.initial < 0:
            raise self.fail("initial", "0 or more")
        parts = [self.count(name, context, "the context") for name in ("separators", "recent")]
        kept = min(context, self.initial + sum(parts))
        return Plan(context, (LayerPlan(kept, kept, 0),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> SepLLM:
        """Half of what the initial tokens leave are separators."""
        if tokens < self.initial + 2:
            raise self.too_few(tokens, self.initial + 2, "initial tokens, a separator and a recent one")
        rest = tokens - self.initial
        return replace(self, separators=rest // 2, recent=rest - rest // 2)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        kept = plan.layers[layer].kept
        recent = min(kept, self.count("recent", plan.context, "the context"))
        worth = torch.arange(plan.context)  # the later, the better
        worth[self._separating(prefill)] += plan.context
        worth[: self.initial] = 3 * plan.context
        worth[plan.context - recent :] = 3 * plan.context
        return torch.sort(worth, descending=True, stable=True).indices[:kept].sort().values

    def _separating(self, prefill: Prefill) -> torch.Tensor:
        """Mark the document's separators (T,). Raises PolicyError."""
        ids = prefill.token_ids
        if self.ids != 0:
            known = set(map(int, self.ids if isinstance(self.ids, tuple) else (self.ids,)))
            return torch.tensor([i in known for i in ids])
        if prefill.model is None or getattr(prefill.model, "tokenizer", None) is None:
            raise PolicyError(f"policy {self.spec}: no tokenizer tells which tokens separate; give ids=...")
        decode = prefill.model.tokenizer.decode
        said = {i: decode([i]) for i in set(ids)}
        return torch.tensor([bool(said[i]) and set(said[i]) <= SEPARATORS for i in ids])

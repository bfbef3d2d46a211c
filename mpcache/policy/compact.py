"""compact: the document's cache made small once, before any question, by its owner in plaintext.

Three parts that are chosen independently: what a token is worth (`mpcache.policy.scores`), how many tokens
each KV head keeps (`mpcache.policy.counts`, `mpcache.policy.curve`), and how what stays is fitted to what all
of it would have answered (`mpcache.policy.refit`). Heads of one layer keep different numbers: they attend
part by part, in the same rounds, and bytes go with the sum. The bias of a kept key is a secret of the server,
which adds it to its own share of the scores: no byte, no round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpcache.errors import PolicyError
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import Prefill
from mpcache.model.reread import reread
from mpcache.policy import counts as rules
from mpcache.policy.base import Policy
from mpcache.policy.curve import curve_of
from mpcache.policy.layer_view import Kept, take
from mpcache.policy.plan import Budget, Budgets, LayerPlan, LeakClass, Plan, SplitPlan, setting
from mpcache.policy.refit import LARGEST_BIAS, chosen_targets, fit, reference_queries
from mpcache.policy.scores import REPEATED, SCORES, best_queries, score_tokens
from mpcache_kernels import Backend

COUNTS = {
    "curve": LeakClass.MODEL_COUNT,
    "joint": LeakClass.COUNT,
    "adakv": LeakClass.COUNT,
    "equal": LeakClass.NONE,
}
REFITS = ("both", "bias", "none")
WHOLE = 32  # tokens: a context of so few is worth no eviction
FITTED_BELOW = 0.7  # of a head's tokens: one that keeps more keeps its values


@dataclass(frozen=True)
class Compact(Policy):
    """Options of compact."""

    name = "compact"
    source = "KVzip, arXiv 2505.23416; attention matching, arXiv 2602.16284; counts by a curve of the model"
    no_shares = "its scores and fits need the document in plaintext"
    needs = "a second reading of the document; the model's curve"
    leaks = LeakClass.MODEL_COUNT
    may_leak = "count with counts=joint or adakv, none with counts=equal"
    evicts = True

    example = "compact:keep=0.1"

    keep: Budget = setting(
        0.2, "context tokens that stay, the mean over all KV heads; a ratio keeps no fewer than 32",
        "1 to the context, or a ratio up to 1.0",
    )  # fmt: skip
    score: str = setting(
        "kvzip+",
        "what a token is worth; kvzip+, kvzip and rms read the document a second time",
        ", ".join(SCORES),
    )
    counts: str = setting(
        "curve",
        "who keeps how many: curve, the model's own (`mpcache calibrate`); joint, the best of all heads of "
        "this document; adakv, the best of each layer's; or equal",
        ", ".join(COUNTS),
    )
    refit: str = setting(
        "both", "what is fitted to the whole: a bias per kept key, new values", ", ".join(REFITS)
    )
    heads: Budgets = setting(
        0, "tokens of each KV head, in place of keep and counts, as in 12/200/31/8",
        "counts for the heads of one layer or of all",
    )  # fmt: skip

    # --------------------------------------------------------------------------------------- public

    @property
    def leak(self) -> str:
        return COUNTS.get(self.counts, LeakClass.NONE)

    @property
    def plan_is_public(self) -> bool:
        return self.counts == "equal" or self.heads != 0

    @property
    def largest_bias(self) -> float:
        return 0.0 if self.refit == "none" else LARGEST_BIAS

    def plan(self, context: int, shape: ModelShape) -> Plan:
        for option, allowed in (("score", tuple(SCORES)), ("counts", tuple(COUNTS)), ("refit", REFITS)):
            if getattr(self, option) not in allowed:
                raise self.fail(option, ", ".join(allowed))
        budget = self._budget(context)
        if self.heads != 0:
            return Plan(context, tuple(map(split, self._heads(context, shape))))
        most = budget if self.plan_is_public else context
        return Plan(context, (LayerPlan(budget, most, 0),) * shape.layers)

    def priced(self, context: int, shape: ModelShape) -> Plan:
        """Plan for heads that keep the same number: others cost a few percent less, in the same rounds."""
        return (self if self.plan_is_public else replace(self, counts="equal")).plan(context, shape)

    def _budget(self, context: int) -> int:
        """Read `keep`: a number of tokens. Of a short context a ratio keeps `WHOLE` tokens, or all of it."""
        budget = self.count("keep", context, "the context")
        return max(budget, min(context, WHOLE)) if isinstance(self.keep, float) else budget

    def mean_kept(self, context: int) -> int:
        return self._budget(context)

    def _heads(self, context: int, shape: ModelShape) -> list[list[int]]:
        """Read `heads`: a count for each KV head of each layer."""
        given = self.heads if isinstance(self.heads, tuple) else (self.heads,)
        whole = shape.layers * shape.kv_heads
        if whole % len(given) or len(given) not in (1, shape.kv_heads, whole):
            allowed = f"one number, {shape.kv_heads}, or {whole}: for each KV head of a layer, or of all"
            raise self.fail("heads", allowed)
        each = [self.count("heads", context, "the context", n) for n in given] * (whole // len(given))
        return [each[i : i + shape.kv_heads] for i in range(0, whole, shape.kv_heads)]

    def with_counts(self, counts: Sequence[int]) -> Compact:
        return replace(self, heads=tuple(counts))

    @property
    def counts_given(self) -> tuple[int, ...]:
        return tuple(map(int, self.heads)) if isinstance(self.heads, tuple) else ()

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Compact:
        """Keep that many in the mean over all heads."""
        if self.heads != 0:
            raise self.fail("heads", "none, to be set to a budget")
        return replace(self, keep=tokens)

    # ------------------------------------------------------------------- the document's owner, in plaintext

    @property
    def rereads(self) -> bool:
        return self.refit != "none" or self.score in (*REPEATED, "rms")

    def window(self, context: int) -> int:
        return SCORES[self.score].queries(context) if self.score in SCORES else 0

    def count_from_model(self, model: Model, context: int) -> list[int]:
        if self.plan_is_public or self.counts != "curve":
            return []
        curve = curve_of(model)
        if curve is None:
            raise PolicyError(
                f"policy {self.spec}: this model has no curve; make one with `mpcache calibrate`, or take "
                "counts=joint, which reveals how many tokens each head keeps of this document"
            )
        counts = curve.counts(self._budget(context), context)
        return [int(n) for n in counts.flatten()]

    def count_from_document(self, prefill: Prefill, kernels: Backend) -> list[int]:
        """Count each head's tokens, one layer after another."""
        context = prefill.k[0].shape[1]
        budget = self._budget(context)
        layers = range(len(prefill.k))
        scores = torch.stack([score_tokens(self.score, prefill, i, kernels, budget) for i in layers])
        found = rules.joint(scores, budget) if self.counts == "joint" else rules.adakv(scores, budget)
        return [int(n) for n in found.flatten()]

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> Tensor:
        """Choose the positions of a layer whose heads keep the same number: (KV, kept)."""
        (kept,) = self.retain(prefill, layer, plan, kernels)
        return kept.rows

    def retain(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        if (self, layer) not in prefill.notes:  # once, for who checks it and for who fills the cache
            prefill.notes[self, layer] = self._retained(prefill, layer, plan, kernels)
        found: list[Kept] = prefill.notes[self, layer]
        return found

    def _retained(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> list[Kept]:
        mine, kv_heads = plan.layers[layer], len(prefill.k[layer])
        counts = mine.by_head("kept") if isinstance(mine, SplitPlan) else [mine.kept] * kv_heads
        groups = mine.heads if isinstance(mine, SplitPlan) else (tuple(range(kv_heads)),)
        budget = self._budget(plan.context)
        scores = score_tokens(self.score, prefill, layer, kernels, budget)
        order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
        rows = [best[:n].sort().values for best, n in zip(order, counts, strict=True)]
        kept = [self._fitted(prefill, layer, head, mine) for head, mine in enumerate(rows)]
        return [
            Kept(
                torch.stack([rows[head] for head in heads]),
                take(prefill.k[layer][list(heads)], torch.stack([rows[head] for head in heads])),
                torch.stack([kept[head][1] for head in heads]),
                torch.stack([kept[head][0] for head in heads]) if self.largest_bias else None,
            )
            for heads in groups
        ]

    def _fitted(self, prefill: Prefill, layer: int, head: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return biases (t,) and values (t, d) of a head's kept tokens."""
        k, v = prefill.k[layer], prefill.v[layer][head]
        if self.refit == "none" or len(rows) >= FITTED_BELOW * len(v):
            return torch.zeros(len(rows), device=v.device), v[rows]
        q = reference_queries(reread(prefill), layer, head, len(k))
        best = best_queries(prefill, layer, self.score)
        targets = chosen_targets(q, k[head], v, rows, None if best is None else best[head])
        bias, values = fit(targets, rows, v)
        return bias, values if self.refit == "both" else v[rows]


def split(counts: Sequence[int]) -> LayerPlan:
    """Plan a layer whose KV heads keep so many tokens each."""
    heads: defaultdict[int, list[int]] = defaultdict(list)
    for head, n in enumerate(counts):
        heads[n].append(head)
    parts = [LayerPlan(n, n, 0) for n in heads]
    return parts[0] if len(parts) == 1 else SplitPlan.of(list(heads.values()), parts)

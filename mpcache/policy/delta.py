"""delta: a few layers rank pages by their attention, and the layers behind them attend to these (DELTA).

Layers 0 and 1 attend to everything. So do the layers that choose. A token's score is the largest attention
weight that any head pays it, a page's score the sum over its 16 tokens; the last pages always attend, the
best of the others are chosen, one set for all heads, and the layers that follow attend to it.

Differs from the paper: the layers that choose are given by their depth, not placed where neighbouring
layers' attention differs most. `vote=sum` adds the heads' weights in place of their largest, which saves H
- 1 comparisons for each token. At a budget of tokens no layer may attend to everything (`dense=false`): a
layer that chooses attends to its choice, and layers 0 and 1 choose for themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.ops import Value
from mpcache.policy.choosing import Choosing, followers
from mpcache.policy.layer_lists import LAYERS_ALLOWED, listed_layers
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import Budget, Plan, setting
from mpcache.policy.representatives import largest
from mpcache.runtime.program import Program, local

DEPTHS = (14 / 28, 22 / 28)  # of the layers that choose, beside the first, as published for 28 layers
VOTES = ("max", "sum")


@dataclass(frozen=True)
class Delta(Choosing):
    """Options of delta."""

    name = "delta"
    source = "DELTA, github.com/hoenza/DELTA"
    needs = (
        "the whole cache; the attention of a few layers; an oblivious top-k of pages for all heads of each"
    )
    example = "delta:pages=0.1,choose=2-4"
    scope = "layer"
    by_attention = True

    page: int = setting(16, "tokens per page", "1 or more")
    pages: Budget = setting(0.2, "pages that are chosen", "1 to the context's pages, or a ratio up to 1.0")
    recent: int = setting(2, "last pages, which always attend", "0 or more")
    full: int = setting(2, "layers, from 0, that attend to everything", "0 or more")
    choose: str = setting(
        "auto", "layers that choose; auto: the first behind the full ones, and at 1/2 and 11/14 of the depth",
        LAYERS_ALLOWED,
    )  # fmt: skip
    vote: str = setting("max", "how heads' weights become a token's score", "max, sum")
    dense: bool = setting(True, "layers that choose attend to everything, as published", "true, false")

    def limit(self, shape: ModelShape) -> int:
        return 1 << shape.heads.bit_length()  # a page's tokens share at most one weight of each head

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.page < 1:
            raise self.fail("page", "1 or more tokens")
        if self.vote not in VOTES:
            raise self.fail("vote", ", ".join(VOTES))
        if self.full < 0:
            raise self.fail("full", "0 or more")
        if self.recent < 0:
            raise self.fail("recent", "0 or more")
        auto = {self.full, *(round(depth * shape.layers) for depth in DEPTHS)}
        choosers = listed_layers(self, "choose", auto, self.full, shape.layers)
        recent = self.recent * self.page
        total = self.items_of(context - recent, self.page, 1)
        keep = self.count("pages", total, "the context's pages") if total else 1
        leaders = followers(shape.layers, choosers, self.full, self.dense)
        return self.item_plan(context, leaders, self.page, 0, recent, keep, self.dense)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Delta:
        """Let the last pages take half of the budget, at most."""
        rest = context % self.page
        least = min(context, rest + self.page)
        if tokens < least:
            raise self.too_few(tokens, least, "a page and the last page, which is not full")
        recent = min(self.recent, (tokens - rest) // self.page // 2)
        pages = (tokens - rest) // self.page - recent
        return replace(self, recent=recent, pages=pages, dense=False)

    def rank(self, view: LayerView, looked: Value) -> Program[Value]:
        if self.vote == "sum":
            return local(looked.sum(-1))
        m, pages, _ = looked.shape
        by_head = looked.reshape(m, pages * self.page, view.shape.heads).transpose(1, 2)
        return self._by_largest(view, by_head)

    def _by_largest(self, view: LayerView, by_head: Value) -> Program[Value]:
        """Rank pages by the sums of their tokens' largest votes, of (m, heads, tokens)."""
        best = yield from largest(view.ops, by_head)
        return best.reshape(best.shape[0], -1, self.page).sum(-1)

"""quest: pages of 16 tokens, ranked for each query by an exact bound of their scores (arXiv 2406.10774).

Every token stays in the cache. Layers 0 and 1 attend to everything; in the others the pages chosen,
and the last page that is not full, are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.clusters import Clustered
from mpcache.policy.plan import Budget, Plan


@dataclass(frozen=True)
class Quest(Clustered):
    """page: tokens per page.  pages: how many are attended to.  full: layers, from 0, that select nothing."""

    name = "quest"
    source = "Quest, arXiv 2406.10774"
    no_shares = "it chooses at every step and evicts nothing"
    needs = "the whole cache; page bounds; an oblivious top-k per head, layer and step"
    selects = True

    score: str = "bound"
    page: int = 16
    pages: Budget = 0.2
    full: int = 2

    def plan(self, context: int, shape: ModelShape) -> Plan:
        self.check_options()
        if self.page < 1:
            raise self.fail("page", "1 or more tokens")
        if not 0 <= self.full <= shape.layers:
            raise self.fail("full", f"0 to {shape.layers} layers")
        (total,) = self.clusters_of(context, 0, 0, (self.page,))
        keep = self.count("pages", total, "the context's pages") if total else 1
        leaders = self.leaders(shape.layers)
        layers = []
        for i, leader in enumerate(leaders):
            if leader < self.full and leader != i:
                raise self.fail("share", f"layers from {self.full} on: those before select nothing")
            sizes = (self.page,) if i >= self.full else ()
            layers.append(self.layer_plan(i, leader, context, 0, 0, sizes, [keep]))
        return Plan(context, tuple(layers))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Quest:
        """Layers 0 and 1 select, too: else they attend to everything, whatever the budget."""
        (total,) = self.clusters_of(context, 0, 0, (self.page,))
        tail = context - total * self.page
        least = min(context, tail + self.page)
        if tokens < least:
            raise self.too_few(tokens, least, "a page and the last page, which is not full")
        return replace(self, full=0, pages=max(1, (tokens - tail) // self.page))

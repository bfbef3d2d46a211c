"""quest: pages of 16 tokens, ranked for each query by an exact bound of their scores (arXiv 2406.10774).

Every token stays in the cache. Layers 0 and 1 attend to everything; in the others the pages chosen,
and the last page that is not full, are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.clusters import Clustered
from mpcache.policy.plan import Budget, Plan, setting


@dataclass(frozen=True)
class Quest(Clustered):
    """Options of quest."""

    name = "quest"
    source = "Quest, arXiv 2406.10774"
    needs = "the whole cache; page bounds; an oblivious top-k per head, layer and step"
    selects = True

    example = "quest:page=16,pages=0.1"

    score: str = "bound"
    page: int = setting(16, "tokens per page", "1 or more")
    pages: Budget = setting(
        0.2, "pages that are attended to", "1 to the context's pages, or a ratio up to 1.0"
    )
    full: int = setting(2, "layers, from 0, that select nothing and attend to everything", "0 to all layers")

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

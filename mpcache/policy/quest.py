"""quest: pages of tokens, ranked for each query by an exact bound of their scores (arXiv 2406.10774).

Every token stays in the cache. Layers 0 and 1 attend to everything; in the others the pages chosen,
and the last page that is not full, are attended to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mpcache.model import ModelShape
from mpcache.policy.clusters import Clustered, cluster_size
from mpcache.policy.plan import Budget, Plan, setting


@dataclass(frozen=True)
class Quest(Clustered):
    """Options of quest."""

    name = "quest"
    source = "Quest, arXiv 2406.10774"
    no_shares = "it chooses at every step and evicts nothing"
    needs = "the whole cache; page bounds; an oblivious top-k per head, layer and step"
    selects = True

    example = "quest:page=16,pages=0.1"

    score: str = "bound"
    page: int = setting(
        0,
        "tokens per page; 0: 16, as published, and the square root of the context's for long ones",
        "0 or more",
    )
    pages: Budget = setting(
        0.2, "pages that are attended to", "1 to the context's pages, or a ratio up to 1.0"
    )
    full: int = setting(2, "layers, from 0, that select nothing and attend to everything", "0 to all layers")

    def size(self, context: int) -> int:
        """Return the tokens per page, for a context of so many."""
        return self.page or cluster_size(context)

    def plan(self, context: int, shape: ModelShape) -> Plan:
        self.check_options()
        if self.page < 0:
            raise self.fail("page", "1 or more tokens, or 0 for the default")
        page = self.size(context)
        if not 0 <= self.full <= shape.layers:
            raise self.fail("full", f"0 to {shape.layers} layers")
        (total,) = self.clusters_of(context, 0, 0, (page,))
        keep = self.count("pages", total, "the context's pages") if total else 1
        leaders = self.leaders(shape.layers)
        layers = []
        for i, leader in enumerate(leaders):
            if leader < self.full and leader != i:
                raise self.fail("share", f"layers from {self.full} on: those before select nothing")
            sizes = (page,) if i >= self.full else ()
            layers.append(self.layer_plan(i, leader, context, 0, 0, sizes, [keep]))
        return Plan(context, tuple(layers))

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Quest:
        """Layers 0 and 1 select, too: else they attend to everything, whatever the budget."""
        page = self.size(context)
        (total,) = self.clusters_of(context, 0, 0, (page,))
        tail = context - total * page
        least = min(context, tail + page)
        if tokens < least:
            raise self.too_few(tokens, least, "a page and the last page, which is not full")
        return replace(self, full=0, pages=max(1, (tokens - tail) // page))

    def selector_at_share(self, share: float) -> Quest:
        return replace(self, full=0, pages=share)

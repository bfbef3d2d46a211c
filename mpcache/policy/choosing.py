"""Selection of tokens, or of pages of them, by the scores or the attention that they get.

A layer's tokens stand as [sink | items | tail], an item being `size` neighbouring tokens. Sink and tail
always attend. A layer that chooses is `dense` where it attends to everything itself: then its choice is
made beside the rest of the layer, and adds no round; the layers that follow it, and the steps until the
next refresh, attend to what it chose. A layer that is not dense waits for its choice and attends to that.

Scores are moved to the chosen slots and weights back to their tokens, never rows of K or V
(docs/protocols.md, section 8). To rank n tokens one by one takes n^2 / 2 comparisons in each row that
chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from mpcache.model import ModelShape
from mpcache.ops import Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.clusters import Choice
from mpcache.policy.columns import by_item
from mpcache.policy.heads import fold, unfold
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import LayerPlan, Plan
from mpcache.runtime.program import Program, at, local

Leaders = Sequence[int | None]  # for each layer the one whose choice it uses; None: it attends to everything


@dataclass(frozen=True)
class ItemPlan(LayerPlan):
    """Public integers of a layer that attends to chosen items.

    size: tokens per item; 0: the layer attends to everything.  sink, recent: first tokens, and last ones
    before a step's own, that always attend.  keep: items that are chosen.  leader: the layer whose choice is
    used.  dense: whether a layer that chooses attends to everything.
    """

    size: int
    sink: int
    recent: int
    keep: int
    leader: int
    dense: bool


@dataclass
class Chosen:
    """A layer's choice, and its age in steps. seen: this step's scores and attention, to choose by."""

    choice: Choice | None = None
    age: int = 0
    seen: Any = None


@dataclass(frozen=True)
class Choosing(Policy):
    """A policy that attends to chosen items."""

    scope: ClassVar[str] = "head"  # who chooses: each head, a group, or a layer's heads together
    by_attention: ClassVar[bool] = False  # ranks attention weights, else scores
    selects = True
    skips_padding = False  # it would stand among the tokens that are counted

    # ------------------------------------------------------------------------------------- public, anybody

    @property
    def steps(self) -> int:
        """How many steps use one choice."""
        return 1

    def items_of(self, tokens: int, size: int, keep: int) -> int:
        """Return how many items so many tokens make."""
        return max(0, tokens) // size

    def item_plan(
        self, context: int, leaders: Leaders, size: int, sink: int, recent: int, keep: int, dense: bool
    ) -> Plan:
        """Plan layers of which each follows a leader."""
        sink = min(sink, context)
        items = self.items_of(context - sink - recent, size, keep)
        fewer = context - max(0, items - keep) * size
        layers = []
        for i, leader in enumerate(leaders):
            if leader is None:
                layers.append(ItemPlan(context, context, 0, 0, sink, recent, keep, i, dense))
            else:
                seen = context if dense and leader == i else fewer
                layers.append(ItemPlan(context, seen, 0, size, sink, recent, keep, leader, dense))
        return Plan(context, tuple(layers))

    # ------------------------------------------------------------------------------ all parties, on shares

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Chosen]:
        return local(Chosen())

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, plan, mine = view.ops, item_plan(view), view.layer.memory
        if not plan.size:
            return (yield from super().attend(view, q))
        fresh = plan.leader == view.index and self._due(view, plan, mine)
        choice = None if fresh else view.cache.whole(plan.leader).memory.choice
        if not fresh and choice is None:  # no more items than are attended to
            return (yield from super().attend(view, q))
        scores = view.biased((yield from at("scores", ops.scores(q, view.layer.k))))
        if choice is None and plan.dense:
            e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
            out, inverse = yield from average(view, local(e), total)
            mine.seen = scores, e, inverse
            return out
        if choice is None:
            seen = yield from self._attention(view, scores)
            mine.choice = choice = yield from self._choose(view, plan, scores, *seen)
            mine.age = 0 if view.m == 1 else self.steps  # a choice has rows for each token of a chunk
        return (yield from self._attend_to(view, plan, choice, scores))

    def observe(self, view: LayerView) -> Program[None]:
        """Choose what a dense layer is followed in."""
        plan, mine = item_plan(view), view.layer.memory
        mine.age += 1
        if mine.seen is None:
            return
        (scores, e, inverse), mine.seen = mine.seen, None
        mine.age = 1 if view.m == 1 else self.steps
        if view.m > 1 and not self._followed(view):  # only later steps use it: by the last token alone
            view = replace(view, positions=view.positions[-1:])
            scores, e, inverse = (x[:, x.shape[1] - view.shape.group :] for x in (scores, e, inverse))
            mine.age = 1
        mine.choice = yield from self._choose(view, plan, scores, e, inverse)

    def _followed(self, view: LayerView) -> bool:
        others = [plan for i, plan in enumerate(view.plan.layers) if i != view.index]
        return any(getattr(plan, "leader", None) == view.index for plan in others)

    def _due(self, view: LayerView, plan: ItemPlan, mine: Chosen) -> bool:
        """Whether this step chooses: public, by counting."""
        if self._items(view, plan) <= plan.keep:
            mine.choice = None
            return False
        return mine.choice is None or view.m > 1 or mine.age >= self.steps

    def _items(self, view: LayerView, plan: ItemPlan) -> int:
        return self.items_of(view.tokens - view.m - plan.recent - plan.sink, plan.size, plan.keep)

    def _attention(self, view: LayerView, scores: Value) -> Program[tuple[Value | None, Value | None]]:
        """Return softmax's weights and the reciprocal of their sum, where tokens are ranked by them."""
        if not self.by_attention:
            return None, None
        ops = view.ops
        e, total = yield from at("vote/softmax", ops.softmax(scores, view.visible(view.tokens)))
        return e, (yield from at("vote/reciprocal", ops.reciprocal(total)))

    def _choose(
        self, view: LayerView, plan: ItemPlan, scores: Value, e: Value | None, inverse: Value | None
    ) -> Program[Choice]:
        ops, items = view.ops, self._items(view, plan)
        region = slice(plan.sink, plan.sink + items * plan.size)
        looked = scores[..., region]
        if self.by_attention:
            assert e is not None and inverse is not None
            paid = yield from at("vote", ops.mul(e[..., region], inverse))
            looked = yield from at("vote", ops.rescale(paid))
        return (yield from self.pick(view, plan, fold(view, looked, items, self.scope)))

    def pick(self, view: LayerView, plan: ItemPlan, looked: Value) -> Program[Choice]:
        """Choose by scores or attention (*rows, items, size heads), all that concerns an item together."""
        ops, items = view.ops, looked.shape[-2]
        ranks = yield from at("vote", self.rank(view, looked))
        selection, _ = yield from at(
            "select", ops.topk(ranks, plan.keep, [by_item(ranks, items)], self.limit(view.shape))
        )
        made = yield from at("select/prepare", selection.prepare())
        return Choice(made, plan.keep, items, items)

    def rank(self, view: LayerView, looked: Value) -> Program[Value]:
        """Rank items (*rows, items) by what concerns them (*rows, items, size heads): by its sum."""
        return local(looked.sum(-1))

    def limit(self, shape: ModelShape) -> int:
        """Return what ranks stay below in size, a power of two."""
        return 512

    def _attend_to(self, view: LayerView, plan: ItemPlan, choice: Choice, scores: Value) -> Program[Value]:
        """Attend to sink, chosen items and tail."""
        ops, sink = view.ops, plan.sink
        end = sink + choice.items * plan.size
        there = fold(view, scores[..., sink:end], choice.items, self.scope)
        tokens = unfold(view, (yield from at("gather", choice.selection.gather(there))), self.scope)
        n = tokens.shape[-1]
        attended = ops.cat([tokens, scores[..., :sink], scores[..., end:]], -1)
        e, total = yield from at("softmax", ops.softmax(attended, view.visible(attended.shape[-1])))

        def spread() -> Program[Value]:
            """Put the weights back at their tokens' places."""
            w = fold(view, e[..., :n], choice.slots, self.scope)
            w = unfold(view, (yield from at("scatter", choice.selection.scatter(w))), self.scope)
            return ops.cat([e[..., n : n + sink], w, e[..., n + sink :]], -1)

        out, _ = yield from average(view, spread(), total)
        return out


def item_plan(view: LayerView) -> ItemPlan:
    """Return a layer's plan."""
    plan = view.plan.layers[view.index]
    assert isinstance(plan, ItemPlan)
    return plan


def followers(layers: int, choosers: Sequence[int], full: int, dense: bool) -> list[int | None]:
    """Let each layer follow the last one that chooses before it.

    The first `full` attend to everything; where nothing is dense each of them chooses for itself.
    """
    found: list[int | None] = []
    for i in range(layers):
        before = [chooser for chooser in choosers if chooser <= i]
        if before and i >= full:
            found.append(before[-1])
        else:
            found.append(None if dense else i)
    return found

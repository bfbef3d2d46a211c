"""pod: tokens far away are scored once for a block of layers, near ones by each layer (PoD).

The first tokens and the recent ones are proximal, and each layer attends to them by itself. The others are
distant: similar layers form a block, and a block's lowest layer lends the others its keys of distant tokens
(`lend=keys`), its scores of them (`scores`), or its attention to them (`weights`). Values stay each layer's
own. An output is the softmax over both kinds together: g o_P + (1 - g) o_D.

Differs from the paper: its models are trained further with it, and this is not trained; blocks are pairs
unless `share` names them, not found from a model's attention; the distant part is never left out where g is
large, because that would reveal a bit in each step. With `weights` g is the lowest layer's, and no
exponential of a distant token is computed twice, which is what the method saves on shares. Nothing is
dropped: at a budget of tokens another policy evicts first, as in snapkv|pod.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mpcache.model import ModelShape
from mpcache.ops import Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.choosing import Chosen
from mpcache.policy.layer_lists import SHARE_ALLOWED, SHARE_MEANING, shared_layers
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache.runtime.program import Program, at, local

LENDS = ("keys", "scores", "weights")


@dataclass(frozen=True)
class BlockPlan(LayerPlan):
    """sink, recent: proximal tokens, first and last ones.  leader: the lowest layer of the block."""

    sink: int
    recent: int
    leader: int


@dataclass(frozen=True)
class PoD(Policy):
    """Options of pod."""

    name = "pod"
    source = "PoD, arXiv 2412.02252"
    needs = "the whole cache, and blocks of layers"
    selects = True
    skips_padding = False  # it would stand among the recent tokens
    attends_to_all = True
    example = "pod:lend=weights,share=2-3-4"

    sink: int = setting(16, "first tokens, which are proximal", "0 or more")
    recent: Budget = setting(0.1, "last tokens, which are proximal", "1 to the context, or a ratio up to 1.0")
    share: str = setting("default", SHARE_MEANING, SHARE_ALLOWED)
    lend: str = setting("scores", "what a block's lowest layer lends the others", "keys, scores, weights")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.lend not in LENDS:
            raise self.fail("lend", ", ".join(LENDS))
        if self.sink < 0:
            raise self.fail("sink", "0 or more")
        recent = self.count("recent", context, "the context")
        leaders = shared_layers(self, shape.layers)
        sink = min(self.sink, context)
        return Plan(
            context, tuple(BlockPlan(context, context, 0, sink, recent, leader) for leader in leaders)
        )

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> PoD:
        if tokens < context:
            raise self.too_few(
                tokens, context, "it drops nothing; put another policy before it, as in snapkv|pod"
            )
        return self

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Chosen]:
        return local(Chosen())

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, plan = view.ops, view.plan.layers[view.index]
        assert isinstance(plan, BlockPlan)
        end = view.tokens - view.m - plan.recent
        if end <= plan.sink:
            return (yield from super().attend(view, q))
        far = slice(plan.sink, end)
        if plan.leader == view.index:
            return (yield from self._lead(view, q, far))
        leader, mine = view.cache.whole(plan.leader), view.layer.k
        if self.lend == "keys":
            keys = ops.cat_operands([mine[:, : far.start], leader.k[:, far], mine[:, end:]], 1)
            scores = view.biased((yield from at("scores", ops.scores(q, keys))))
            return (yield from self._attend(view, scores))
        near = ops.cat_operands([mine[:, : far.start], mine[:, end:]], 1)
        scores = yield from at("scores", ops.scores(q, near))
        lent: Any = leader.memory.seen
        if self.lend == "scores":
            return (yield from self._attend(view, _between(ops, scores, lent[0], far.start)))
        paid, mass = lent
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(scores.shape[-1])))
        inverse = yield from at("attend/reciprocal", ops.reciprocal(total))
        own = yield from self._rescaled(view, e, inverse)
        own = yield from self._rescaled(view, own, mass)
        return (yield from at("attend", ops.weighted_sum(_between(ops, own, paid, far.start), view.layer.v)))

    def _attend(self, view: LayerView, scores: Value) -> Program[Value]:
        e, total = yield from at("softmax", view.ops.softmax(scores, view.visible(view.tokens)))
        out, _ = yield from average(view, local(e), total)
        return out

    def _lead(self, view: LayerView, q: Value, far: slice) -> Program[Value]:
        """Attend by all keys, and note what the block's other layers borrow."""
        ops = view.ops
        scores = view.biased((yield from at("scores", ops.scores(q, view.layer.k))))
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
        out, inverse = yield from average(view, local(e), total)
        if self.lend == "scores":
            view.layer.memory.seen = [scores[..., far]]
        elif self.lend == "weights":
            view.layer.memory.seen = [e, inverse]
        return out

    def observe(self, view: LayerView) -> Program[None]:
        """Compute the attention that a block's lowest layer lends, and the mass of its proximal tokens."""
        plan, mine = view.plan.layers[view.index], view.layer.memory
        assert isinstance(plan, BlockPlan)
        if self.lend != "weights" or plan.leader != view.index or mine.seen is None:
            return
        end = view.tokens - view.m - plan.recent
        paid = yield from self._rescaled(view, *mine.seen)
        far = slice(plan.sink, end)
        near = paid[..., : plan.sink].sum(-1, True) + paid[..., end:].sum(-1, True)
        mine.seen = [paid[..., far], near]

    def _rescaled(self, view: LayerView, x: Value, y: Value) -> Program[Value]:
        """Multiply, at the usual fraction bits."""
        product = yield from at("lend", view.ops.mul(x, y))
        return (yield from at("lend", view.ops.rescale(product)))


def _between(ops: Ops, near: Value, far: Value, sink: int) -> Value:
    """Put what concerns distant tokens behind that of the first `sink` ones."""
    return ops.cat([near[..., :sink], far, near[..., sink:]], -1)

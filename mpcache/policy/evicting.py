"""What policies that drop a token at every step have in common: h2o and tova.

Which token goes is secret. No row of K or V is moved for it: replacing a secret slot by the new token
would mask and open every row again, 2 d words per slot and step, where scoring a token once more
costs a few. Instead each token has a secret mark, 1 while it lives; a dead one's score is hidden far
below the others, which is free; the weakest is found by an oblivious argmin among groups of 16 and
its mark subtracted, beside the rest of the layer, so that no round is added. The number of living
tokens is public and fixed; the tokens that are scored grow with the answer: under MPC a mask saves
quality experiments, not work, and the audit shows it.

A question's tokens come in at once, see what lives then, and are followed by as many evictions.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from mpcache.argmax import argmax
from mpcache.model import ModelShape
from mpcache.ops import Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import LayerPlan, Plan
from mpcache.protocols.ranges import MASKED_SCORE
from mpcache.runtime.program import Program, at, local, together


@dataclass(frozen=True)
class LivingPlan(LayerPlan):
    """living: tokens that live after a step, at most.  recent: last tokens that are never dropped."""

    living: int
    recent: int


@dataclass
class ValidMask:
    """Which tokens of a layer still live, and what they are worth.

    importance: secret (A, n), for A sets of heads that evict together.  alive: marks (A, n), None
    while nobody died.  living: how many live.  weights, inverse: this step's attention.
    """

    importance: Value | None
    living: int
    alive: Value | None = None
    weights: Value | None = None
    inverse: Value | None = None


@dataclass(frozen=True)
class Evicting(Policy):
    """A policy that drops tokens while it decodes: how many live is public, which ones is not."""

    skips_padding = False  # it would take the place of tokens

    def living_plan(self, context: int, shape: ModelShape, living: int, recent: int) -> Plan:
        kept = min(context, living)
        return Plan(context, (LivingPlan(kept, kept, 0, living, recent),) * shape.layers)

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[ValidMask]:
        return local(
            ValidMask(self.initial_importance(ops, shape, plan, index, known), plan.layers[index].kept)
        )

    def initial_importance(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Value | None:
        """Return the kept tokens' importance after the context (A, kept); None: none is carried."""
        return None

    @abstractmethod
    def importance(self, view: LayerView, attention: Value, before: Value | None) -> tuple[Value, int]:
        """Turn attention (KV, rows, n) into importance (A, n), and a public limit of its size."""

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, mine = view.ops, view.layer.memory
        scores = yield from at("scores", ops.scores(q, view.layer.k))
        if mine.alive is not None:
            mine.alive = ops.cat([mine.alive, ops.ones((mine.alive.shape[0], view.m))], -1)
        scores = self._hidden(view, scores)
        attended = self._attended(view, scores)
        judged = self.judged(view, q, lambda other: self._hidden(view, other))
        found, other = yield from together(attended, judged)
        out: Value = found[0]
        mine.weights, mine.inverse = found[1:] if other is None else other
        mine.living += view.m
        return out

    def _attended(self, view: LayerView, scores: Value) -> Program[tuple[Value, Value, Value]]:
        """Attend by scores: what comes out, softmax's weights, and the reciprocal of their sum."""
        e, total = yield from at("softmax", view.ops.softmax(scores, view.visible(view.tokens)))
        out, inverse = yield from average(view, local(e), total)
        return out, e, inverse

    def judged(
        self, view: LayerView, q: Value, hidden: Callable[[Value], Value]
    ) -> Program[tuple[Value, Value] | None]:
        """Return the weights and reciprocal by which tokens are judged; None: those of the attention itself.

        hidden: hides the scores of dead tokens.
        """
        return local(None)

    def _hidden(self, view: LayerView, scores: Value) -> Value:
        """Put dead tokens' scores far below the others. No cost."""
        alive = view.layer.memory.alive
        if alive is None:
            return scores
        marks = alive.reshape(alive.shape[0], 1, view.tokens).expand(*scores.shape)
        return view.ops.mask_scores(scores, marks, MASKED_SCORE)

    def observe(self, view: LayerView) -> Program[None]:
        ops, mine, n = view.ops, view.layer.memory, view.tokens
        plan = view.plan.layers[view.index]
        assert isinstance(plan, LivingPlan)
        attention = yield from at("attention", ops.mul(mine.weights, mine.inverse))
        attention = yield from at("attention", ops.rescale(attention))
        mine.importance, limit = self.importance(view, attention, mine.importance)
        gone = mine.living - plan.living
        if gone < 1:
            return
        old = n - plan.recent
        candidates = -mine.importance[..., :old]
        if mine.alive is None:
            mine.alive = ops.ones((candidates.shape[0], n))
        else:
            # The living lie in (-limit, 0], the dead in (-2 limit, -limit].
            candidates = ops.mask_scores(candidates, mine.alive[..., :old], limit)
        dead = yield from at("evict", argmax(ops, candidates, gone, 2 * limit))
        mine.alive = ops.cat([mine.alive[..., :old] - dead, mine.alive[..., old:]], -1)
        mine.living -= gone

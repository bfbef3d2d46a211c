"""streaming: attention sinks and a recent window, by position alone (StreamingLLM, arXiv 2309.17453).

Which tokens go is public, so they are dropped for nothing. Positions are renumbered as in the paper:
a key's place in the cache counts, not its place in the text. Keys here are rotated when they come in
and stay as they are; within the window and to the query all distances are the same in both
numberings, and only the sinks come nearer. So it is the query that is turned once more, for the
sinks alone: one round, and one more opening of q. A model with learned positions has them in its
keys for good, and keeps the original ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from mpcache.model import ModelShape
from mpcache.model.prefill import Prefill
from mpcache.model.rope import rope_tables
from mpcache.ops import Value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import Budget, LayerPlan, Plan, setting
from mpcache.runtime.program import Program, at, local, together
from mpcache_kernels import Backend


@dataclass(frozen=True)
class WindowPlan(LayerPlan):
    """sink: first tokens.  recent: tokens before each one that it sees."""

    sink: int
    recent: int


@dataclass(frozen=True)
class Streaming(Policy):
    """Options of streaming."""

    name = "streaming"
    source = "StreamingLLM, arXiv 2309.17453"
    no_shares = "give full for the client's document, or a policy that ranks its tokens"
    needs = "positions alone"
    evicts = True
    example = "streaming:sink=4,recent=256"
    skips_padding = False  # it would take the place of recent tokens

    sink: int = setting(4, "first tokens that stay", "0 or more")
    recent: Budget = setting(0.2, "last tokens that stay", "1 to the context, or a ratio up to 1.0")
    renumber: bool = setting(True, "count positions in the cache, not in the text", "true, false")

    def plan(self, context: int, shape: ModelShape) -> Plan:
        if self.sink < 0:
            raise self.fail("sink", "0 or more tokens")
        recent = self.count("recent", context, "the context")
        kept = min(context, self.sink + recent)
        return Plan(context, (WindowPlan(kept, kept, 0, self.sink, recent),) * shape.layers)

    def at_budget(self, tokens: int, context: int, shape: ModelShape) -> Streaming:
        if tokens <= self.sink:
            raise self.too_few(tokens, self.sink + 1, "the sinks and a recent one")
        return replace(self, recent=tokens - self.sink)

    def evict(self, prefill: Prefill, layer: int, plan: Plan, kernels: Backend) -> torch.Tensor:
        mine = plan.layers[layer]
        first = min(self.sink, mine.kept)
        return torch.cat([torch.arange(first), torch.arange(plan.context - mine.kept + first, plan.context)])

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, (sink, recent), n = view.ops, _sizes(view), view.tokens
        rows = view.positions.repeat_interleave(view.shape.group)
        shift = (rows.clamp(max=sink + recent) - rows)[:: view.shape.group]
        keys = view.layer.k
        if self.renumber and view.shape.positions == "rope" and sink and bool(shift.any()):

            def to_sinks() -> Program[Value]:
                turned = yield from at("renumber", turn(view, q, shift))
                return (yield from at("scores", ops.scores(turned, keys[:, :sink])))

            rest, sinks = yield from together(at("scores", ops.scores(q, keys[:, sink:])), to_sinks())
            scores = ops.cat([sinks, rest], -1)
        else:
            scores = yield from at("scores", ops.scores(q, keys))
        visible = view.visible(n)
        if visible is not None:  # each token of a chunk has a window of its own
            place = torch.arange(n)
            place[sink:] += int(view.positions[-1]) + 1 - n
            visible = visible * ((place < sink) | (rows[:, None] - place <= recent))
        e, total = yield from at("softmax", ops.softmax(scores, visible))
        out, _ = yield from average(view, local(e), total)
        return out

    def observe(self, view: LayerView) -> Program[None]:
        (sink, recent), layer, n = _sizes(view), view.layer, view.tokens
        if n > sink + recent:
            layer.k = view.ops.cat_operands([layer.k[:, :sink], layer.k[:, n - recent :]], 1)
            layer.v = view.ops.cat_operands([layer.v[:, :sink], layer.v[:, n - recent :]], 1)
        return local(None)


def _sizes(view: LayerView) -> tuple[int, int]:
    plan = view.plan.layers[view.index]
    assert isinstance(plan, WindowPlan)
    return plan.sink, plan.recent


def turn(view: LayerView, q: Value, shift: torch.Tensor) -> Program[Value]:
    """Q (KV, m g, d) rotated by `shift` (m,) more positions."""
    m, kv, g, d = view.m, view.shape.kv_heads, view.shape.group, view.shape.head_dim
    rows = q.reshape(kv, m, g, d).transpose(0, 1).reshape(m, kv * g, d)
    rows = yield from view.ops.rotate(rows, *rope_tables(view.shape, shift))
    return rows.reshape(m, kv, g, d).transpose(0, 1).reshape(kv, m * g, d)

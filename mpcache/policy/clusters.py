"""Selection by clusters, in score space: what `mpcache` and `quest` are made of.

A layer's tokens stand as [sink | clusters | tail]. Sink and tail always attend and are never scored
for selection, so no token is gathered twice. What does not fill a coarse cluster belongs to the
tail: there are no ragged clusters and no padding. When generated tokens make the tail longer than
`recent` by a coarse cluster, its oldest tokens become one, with representatives computed once; so
what is attended to stays bounded however long the answer is.

q is scored against tokens and representatives alike; selecting moves scores and softmax weights,
never rows of K or V (docs/protocols.md, section 8). A choice is one slot matrix; layers that share it, and
steps until the next refresh, only gather and scatter by it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.model import ModelShape
from mpcache.ops import Operand, Ops, Selection, Value, as_tensor, as_value
from mpcache.policy.averages import average
from mpcache.policy.base import Policy
from mpcache.policy.columns import by_item, flat
from mpcache.policy.layer_lists import SHARE_ALLOWED, SHARE_MEANING, shared_layers
from mpcache.policy.layer_view import LayerView, PlaintextContext
from mpcache.policy.plan import LayerPlan, Plan, setting
from mpcache.policy.representatives import in_plaintext, on_shares
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, together
from mpcache_kernels import Backend

SMALLEST = 16  # tokens of a cluster, where nobody names a size
MOST_ITEMS = 256  # chunks of a context, about, where a policy names a least size of its own
LEVELS = ("coarse", "fine")
BLOCKS = {"linear": ("auto", "mean", "extremes"), "mean": ("auto", "mean"), "bound": ("auto", "extremes")}


def cluster_size(context: int) -> int:
    """Return how many tokens make a cluster by default: about the square root of the context's.

    The power of two at or below it, 16 at least. So many clusters are compared in pairs: with sizes that do
    not grow, a choice of 32k tokens costs many times what attending to all of them does.
    """
    return max(SMALLEST, 1 << (math.isqrt(context).bit_length() - 1))


def item_size(named: int, least: int, context: int) -> int:
    """Return how many tokens make a chunk: as named; 0: `least`, or as many as leave about MOST_ITEMS."""
    return named or max(least, context // MOST_ITEMS)


@dataclass(frozen=True)
class ClusterPlan(LayerPlan):
    """Public integers of a layer that chooses clusters.

    sizes: tokens per cluster, coarse to fine; none: the layer attends to everything.
    counts: clusters of the kept context.  keeps: how many are attended to, per level.
    leader: the layer whose choice is used, this one itself or an earlier one.
    """

    sink: int
    recent: int
    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    keeps: tuple[int, ...]
    leader: int


@dataclass(frozen=True)
class Choice:
    """A kept selection of `slots` of `items` clusters, made when there were `clusters` coarse ones.

    selection: with kernels, the chosen clusters themselves (*rows, slots).
    """

    selection: Any
    slots: int
    items: int
    clusters: int


@dataclass
class Clusters:
    """A layer's clusters now.

    clusters: coarse ones.  floors: representatives per level (KV, n, d).
    spans: for `bound`, r_max - r_min per level, the floors being r_min.  age: steps since the choice.
    """

    clusters: int
    floors: list[Operand | None]
    spans: list[Operand | None]
    choice: Choice | None = None
    age: int = 0


@dataclass(frozen=True)
class Clustered(Policy):
    """Options of the policies that choose clusters."""

    skips_padding = False  # it would stand in clusters, and move tokens to others

    score: str = setting(
        "linear",
        "what q is scored against: linear, q.(alpha r_max + (1 - alpha) r_min); mean, q.mean; or bound, "
        "q+.r_max + q-.r_min",
        "linear, mean, bound",
    )
    alpha: float = setting(0.6, "weight of r_max in the score linear", "0 to 1")
    gqa: str = setting("head", "who chooses: each head, or a group's heads by their scores' sum", "head, sum")
    share: str = setting("none", SHARE_MEANING, SHARE_ALLOWED)
    refresh: int = setting(1, "steps that use one choice", "1 or more")
    blocks: str = setting(
        "auto",
        "representatives of generated tokens: mean needs no comparison, extremes three per two tokens and "
        "dimension; auto: extremes for bound alone",
        "auto, mean, extremes",
    )

    # ---------------------------------------------------------------------------------------- plan

    def check_options(self) -> None:
        for option, allowed in (("score", tuple(BLOCKS)), ("gqa", ("head", "sum"))):
            if getattr(self, option) not in allowed:
                raise self.fail(option, ", ".join(allowed))
        if self.blocks not in BLOCKS[self.score]:
            raise self.fail("blocks", f"{', '.join(BLOCKS[self.score])} with score={self.score}")
        if not 0 <= self.alpha <= 1:
            raise self.fail("alpha", "0 to 1")
        if self.refresh < 1:
            raise self.fail("refresh", "1 or more steps")

    def heads_summed(self, shape: ModelShape) -> int:
        return shape.group if self.gqa == "sum" else 1

    def leaders(self, layers: int) -> list[int]:
        """For each layer the one whose choice it uses."""
        return shared_layers(self, layers)

    def clusters_of(self, kept: int, sink: int, recent: int, sizes: Sequence[int]) -> tuple[int, ...]:
        """How many clusters of each size `kept` tokens fill."""
        coarse = max(0, kept - sink - recent) // sizes[0]
        return tuple(coarse * sizes[0] // size for size in sizes)

    def layer_plan(
        self, index: int, leader: int, kept: int, sink: int, recent: int,
        sizes: Sequence[int], keeps: Sequence[int],
    ) -> ClusterPlan:  # fmt: skip
        if not sizes:
            return ClusterPlan(kept, kept, 0, sink, recent, (), (), (), leader)
        counts = self.clusters_of(kept, sink, recent, sizes)
        cut = [keeps[0]]  # no more than the children of what the level above keeps
        for above, size, keep in zip(sizes, sizes[1:], keeps[1:], strict=False):
            cut.append(min(keep, cut[-1] * (above // size)))
        left_out = max(0, counts[-1] - cut[-1]) * sizes[-1]
        kinds = 2 if self.score == "bound" else 1
        return ClusterPlan(
            kept, kept - left_out, kinds * sum(counts) if leader == index else 0,
            sink, recent, tuple(sizes), counts, tuple(cut), leader,
        )  # fmt: skip

    def budget(self, view: LayerView) -> ClusterPlan:
        plan = view.plan.layers[view.index]
        assert isinstance(plan, ClusterPlan)
        return plan

    # ----------------------------------------------------------------------------- representatives

    def remember(
        self, ops: Ops, shape: ModelShape, plan: Plan, index: int, known: PlaintextContext | None
    ) -> Program[Clusters | None]:
        """Prepare the owner's representatives of the kept context as operands."""
        mine = plan.layers[index]
        assert isinstance(mine, ClusterPlan)
        if not mine.sizes or mine.leader != index:
            return None
        parts: list[Program[Operand | None]] = []
        for size, n in zip(mine.sizes, mine.counts, strict=True):
            pair: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
            if known is not None and n:
                pair = in_plaintext(
                    known, known.k[:, mine.sink : mine.sink + n * size], size, self.score, self.alpha
                )
            for part, wanted in zip(pair, (n > 0, n > 0 and self.score == "bound"), strict=True):
                like = (shape.kv_heads, n, shape.head_dim)
                parts.append(ops.prepare(ops.secret(part, like, Rank.SERVER)) if wanted else local(None))
        kept = yield from together(*parts)
        return Clusters(mine.counts[0], kept[0::2], kept[1::2])

    def observe(self, view: LayerView) -> Program[None]:
        """Form clusters of the oldest tokens of a tail that is a coarse cluster longer than `recent`."""
        plan, mine, ops = self.budget(view), view.layer.memory, view.ops
        if mine is None:
            return
        mine.age += 1
        coarse = plan.sizes[0]
        first = plan.sink + mine.clusters * coarse
        n = (view.tokens - first - plan.recent) // coarse
        if n < 1:
            return
        k = ops.value(view.layer.k[:, first : first + n * coarse])
        floors, spans = yield from at(
            "block", on_shares(ops, k, plan.sizes, self.score, self.alpha, self.blocks == "extremes")
        )
        mine.floors = [_append(ops, *pair) for pair in zip(mine.floors, floors, strict=True)]
        mine.spans = [_append(ops, *pair) for pair in zip(mine.spans, spans, strict=True)]
        mine.clusters += n

    # ----------------------------------------------------------------------------------- attention

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        plan, mine, ops = self.budget(view), view.layer.memory, view.ops
        if not plan.sizes:
            return (yield from super().attend(view, q))
        leader: Clusters = view.cache.whole(plan.leader).memory
        due = mine is leader and self._due(view, plan, mine)
        choice = None if due else leader.choice
        if not due and choice is None:  # no more clusters than are attended to
            return (yield from super().attend(view, q))
        if ops.kernels is not None and view.m == 1 and view.layer.bias is None:
            return (yield from self._with_kernels(view, ops.kernels, choice, q))

        made: Program[Choice | None]
        picks: list[Pick] = []
        clusters = leader.clusters if choice is None else choice.clusters
        end = plan.sink + clusters * plan.sizes[0]
        if choice is None:
            scores, levels = yield from at("scores", self._scores(view, mine, q))
            tokens = self._fold(view, scores[..., plan.sink : end])
            tokens, picks = yield from self._pick(ops, plan, levels, tokens)
            # A slot matrix that is used once puts the weights back for less than it costs to keep.
            made = at("select/prepare", join_picks(picks, clusters)) if self._reused(view) else local(None)
        else:
            scores = view.biased((yield from at("scores", ops.scores(q, view.layer.k))))
            tokens = self._fold(view, scores[..., plan.sink : end])
            tokens = flat((yield from at("gather", choice.selection.gather(by_item(tokens, choice.items)))))
            made = local(choice)

        tokens = self._unfold(view, tokens)
        n = tokens.shape[-1]
        attended = ops.cat([tokens, scores[..., : plan.sink], scores[..., end:]], -1)
        soft = at("softmax", ops.softmax(attended, view.visible(attended.shape[-1])))
        (e, total), choice = yield from together(soft, made)
        if due:  # what a chunk chose has rows for each of its tokens: the next step chooses anew
            mine.choice, mine.age = choice, 0 if view.m == 1 else self.refresh

        def spread() -> Program[Value]:
            """Put the weights back at their tokens' places, where the masked V waits for them."""
            w = self._fold(view, e[..., :n])
            if choice is None:
                w = yield from at("scatter", _put_back(picks, w))
            else:
                w = flat((yield from at("scatter", choice.selection.scatter(by_item(w, choice.slots)))))
            w = self._unfold(view, w)
            return ops.cat([e[..., n : n + plan.sink], w, e[..., n + plan.sink :]], -1)

        out, _ = yield from average(view, spread(), total)
        return out

    def _with_kernels(
        self, view: LayerView, kernels: Backend, choice: Choice | None, q: Value
    ) -> Program[Value]:
        """Attend likewise in the clear, for one token: tokens that are not chosen are not touched."""
        plan, mine, queries = self.budget(view), view.layer.memory, as_tensor(q)
        heads = queries.flatten(0, 1)
        if choice is None:
            levels: list[Value] = []
            for floor, span in zip(mine.floors, mine.spans, strict=True):
                if span is None:
                    level = kernels.cluster_scores(heads, floor)
                else:
                    level = kernels.cluster_bounds(heads, floor + span, floor)
                scores = as_value(level.reshape(*queries.shape[:2], -1))
                levels.append(self._folded(view, scores).sum(-1) if self.gqa == "sum" else scores)
            n = levels[-1].shape[-1]
            numbers = torch.arange(n, device=queries.device).expand(levels[-1].shape)
            chosen, _ = yield from self._pick(view.ops, plan, levels, as_value(numbers))
            choice = Choice(as_tensor(chosen), chosen.shape[-1], n, mine.clusters)
            mine.choice, mine.age = choice, 0
        size = plan.sizes[0] * choice.clusters // choice.items
        recent = view.tokens - plan.sink - size * choice.items
        k, v, rows = as_tensor(view.layer.k), as_tensor(view.layer.v), choice.selection.flatten(0, 1)
        out = kernels.select_and_attend(heads, k, v, rows, size, plan.sink, recent)
        return as_value(out.reshape(*queries.shape[:2], *out.shape[1:]))

    def _reused(self, view: LayerView) -> bool:
        """Whether another layer, or this one in a later step, will use this layer's choice."""
        followers = [plan for i, plan in enumerate(view.plan.layers) if i != view.index]
        return self.refresh > 1 or any(getattr(plan, "leader", None) == view.index for plan in followers)

    def _due(self, view: LayerView, plan: ClusterPlan, mine: Clusters) -> bool:
        """Whether this step chooses: public, by counting."""
        numbers = [mine.clusters * (plan.sizes[0] // size) for size in plan.sizes]
        if all(keep >= n for keep, n in zip(plan.keeps, numbers, strict=True)):
            mine.choice = None
            return False
        return mine.choice is None or view.m > 1 or mine.age >= self.refresh

    def _scores(self, view: LayerView, mine: Clusters, q: Value) -> Program[tuple[Value, list[Value]]]:
        """(KV, rows, n) of the tokens; and per level (*rows, clusters) by which they are chosen."""
        ops, k = view.ops, view.layer.k
        every = ops.scores(q, ops.cat_operands([k, *_all(mine.floors)], 1))
        if self.score == "bound":

            def above() -> Program[Value]:
                return (
                    yield from ops.scores((yield from ops.relu(q)), ops.cat_operands(_all(mine.spans), 1))
                )

            scores, over = yield from together(every, above())
        else:
            scores, over = (yield from every), None
        n = view.tokens
        scores, ranks = (
            view.biased(scores[..., :n]),
            scores[..., n:] if over is None else scores[..., n:] + over,
        )
        levels, first = [], 0
        for floor in mine.floors:
            assert floor is not None
            level = ranks[..., first : first + floor.shape[1]]
            levels.append(self._folded(view, level).sum(-1) if self.gqa == "sum" else level)
            first += floor.shape[1]
        return scores, levels

    def _pick(
        self, ops: Ops, plan: ClusterPlan, levels: list[Value], tokens: Value
    ) -> Program[tuple[Value, list[Pick]]]:
        """Level by level; the scores of all that lies below come along. -> chosen tokens, and the picks."""
        carried, picks = [*levels, tokens], []
        names = LEVELS[-len(plan.sizes) :]
        for name, keep in zip(names, plan.keeps, strict=True):
            rank, *carried = carried
            n = rank.shape[-1]
            if keep < n:
                below = [by_item(x, n) for x in carried]
                selection, below = yield from at(f"select/{name}", ops.topk(rank, keep, below))
                carried = [flat(x) for x in below]
                picks.append(Pick(selection, keep, n))
        return carried[0], picks

    # -------------------------------------------------------------------------- heads of one group

    def _folded(self, view: LayerView, x: Value) -> Value:
        """(KV, m g, n) -> (KV, m, n, g)."""
        kv, rows, n = x.shape
        return x.reshape(kv, view.m, rows // view.m, n).transpose(2, 3)

    def _fold(self, view: LayerView, x: Value) -> Value:
        """(KV, m g, n) to the rows that choose: as it is, or (KV, m, n g)."""
        return flat(self._folded(view, x)) if self.gqa == "sum" else x

    def _unfold(self, view: LayerView, x: Value) -> Value:
        if self.gqa == "head":
            return x
        kv, m, columns = x.shape
        g = view.shape.group
        return x.reshape(kv, m, columns // g, g).transpose(2, 3).reshape(kv, m * g, columns // g)


@dataclass(frozen=True)
class Pick:
    """One level's selection of `slots` of `items`."""

    selection: Selection
    slots: int
    items: int


def _put_back(picks: Sequence[Pick], w: Value) -> Program[Value]:
    """Put the chosen tokens' weights (*rows, tokens) at all tokens' places, from the finest level up."""
    for pick in reversed(picks):
        w = flat((yield from pick.selection.scatter(by_item(w, pick.slots))))
    return w


def join_picks(picks: Sequence[Pick], clusters: int) -> Program[Choice]:
    """Join the levels' picks to one choice."""
    first, *rest = picks
    if not rest:
        return Choice((yield from first.selection.prepare()), first.slots, first.items, clusters)
    selection, slots, items = first.selection, first.slots, first.items
    for finer in rest:
        children = finer.items // slots
        selection = yield from selection.refine(finer.selection, children)
        slots, items = finer.slots, items * children
    return Choice(selection, slots, items, clusters)


def _all(parts: Sequence[Operand | None]) -> list[Operand]:
    return [part for part in parts if part is not None]


def _append(ops: Ops, old: Operand | None, new: Operand | None) -> Operand | None:
    return new if old is None else old if new is None else ops.cat_operands([old, new], 1)

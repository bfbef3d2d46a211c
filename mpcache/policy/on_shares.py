"""Evict the client's document, which nobody may see, once and on shares, after it has been read.

While the document is read chunk by chunk, each layer adds up what the last queries pay to each token: their
attention weights, which the layer has anyway, times 1 / total. Only these queries' weights are kept, and only
for a moment. Then the rows that stay are taken out of the cache by `Ops.compact`, which reveals nothing; how
many they are is public (`SharedEviction`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mpcache.cache import Cache, LayerCache
from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.ops import Operand, Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import BoundPolicy
from mpcache.policy.evicting import Evicting
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import SharedEviction, SplitPlan
from mpcache.policy.streaming import Streaming
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.runtime.program import Program, at, local, together

PAIRS_AT_ONCE = 1 << 20  # of scores that are compared in one round: it bounds the memory


@dataclass(frozen=True)
class ReadingPlan:
    """How the client's document is read. chunks: tokens that are read at once.  eviction: None: all stays."""

    chunks: tuple[int, ...] = ()
    eviction: SharedEviction | None = None

    @property
    def tokens(self) -> int:
        return sum(self.chunks)

    @property
    def kept(self) -> int:
        """Tokens that stay in the layer that keeps most."""
        return self.tokens if self.eviction is None else max(self.eviction.kept)


NO_DOCUMENT = ReadingPlan()


@dataclass(frozen=True)
class ReadingPolicy(BoundPolicy):
    """Reads the client's document: attends to all, and adds up importance. `paid`: by layer, (A, tokens)."""

    eviction: SharedEviction | None = None
    paid: dict[int, Value] = field(default_factory=dict)
    seen: dict[int, tuple[Value, Value]] = field(default_factory=dict)

    @staticmethod
    def of(bound: BoundPolicy, eviction: SharedEviction) -> ReadingPolicy:
        """Read a document beside what `bound` keeps of the server's. Raises PolicyError where they clash."""
        if isinstance(bound.policy, Evicting | Streaming):
            raise PolicyError(
                f"policy {bound.spec}: drops tokens at every step, by an account that a document evicted on "
                "shares has no part in; give another --policy, or --private-policy full"
            )
        if any(isinstance(layer, SplitPlan) for layer in bound.plan.layers):
            raise PolicyError(
                f"policy {bound.spec}: keeps different numbers of tokens by head; give another --policy, or "
                "--private-policy full"
            )
        return ReadingPolicy(bound.policy, bound.plan, bound.for_price, eviction)

    @property
    def _rule(self) -> SharedEviction:
        assert self.eviction is not None, "made by `of`"
        return self.eviction

    def _begins(self, view: LayerView) -> int:
        """Return the place in the document of this chunk's first token."""
        return int(view.positions[0]) - self.plan.context

    def attend(self, view: LayerView, q: Value) -> Program[Value]:
        ops, rule = view.ops, self._rule
        scores = view.biased((yield from at("scores", ops.scores(q, view.layer.k))))
        e, total = yield from at("softmax", ops.softmax(scores, view.visible(view.tokens)))
        out, inverse = yield from average(view, local(e), total)
        first = max(0, rule.tokens - rule.judges - self._begins(view))
        if first < view.m and rule.leaders[view.index] == view.index:
            rows = first * view.shape.group
            self.seen[view.index] = e[:, rows:], inverse[:, rows:]
        return out

    def observe(self, view: LayerView) -> Program[None]:
        """Add what this chunk's judges have paid to each token of the document so far."""
        pair = self.seen.pop(view.index, None)
        if pair is None:
            return
        ops = view.ops
        paid = (yield from at("importance", ops.mul(*pair))).sum(1)
        if not self._rule.by_head:
            paid = paid.sum(0, keepdim=True)
        paid = paid[:, view.tokens - self._begins(view) - view.m :]
        paid = yield from at("importance", ops.rescale(paid))
        before = self.paid.get(view.index)
        if before is not None:
            n = before.shape[-1]
            paid = ops.cat([before + paid[:, :n], paid[:, n:]], -1)
        self.paid[view.index] = paid

    def evict(self, ops: Ops, shape: ModelShape, cache: Cache) -> Program[None]:
        """Take what does not stay out of all layers."""
        for families in self._at_once(shape):
            yield from together(
                *(
                    at(f"layer{family[0]}", _evict(ops, shape, cache, self._rule, family, self.paid))
                    for family in families
                )
            )
        self.paid.clear()

    def _at_once(self, shape: ModelShape) -> Iterator[list[list[int]]]:
        """Group layers: each with those that take its ranking, and so many as one round compares."""
        rule = self._rule
        families: dict[int, list[int]] = {}
        for layer, leader in enumerate(rule.leaders):
            families.setdefault(leader, []).append(layer)
        n = rule.tokens - rule.first - rule.last
        pairs = max(1, n * (n - 1) // 2 * (shape.kv_heads if rule.by_head else 1))
        many, all_of_them = max(1, PAIRS_AT_ONCE // pairs), list(families.values())
        for begin in range(0, len(all_of_them), many):
            yield all_of_them[begin : begin + many]


def _evict(
    ops: Ops, shape: ModelShape, cache: Cache, rule: SharedEviction, family: Sequence[int],
    paid: dict[int, Value],
) -> Program[None]:  # fmt: skip
    """Evict in a layer and in those that take its ranking, which keep the same tokens."""
    n, k = rule.tokens - rule.first - rule.last, rule.chosen(family[0])
    layers = [cache.whole(i) for i in family]
    if k >= n:
        return
    before = layers[0].k.shape[1] - rule.tokens + rule.first  # rows that stay: the server's, and the first
    chosen: list[Value] = []
    if k:
        scores = _pooled(ops, paid[family[0]][:, rule.first : rule.tokens - rule.last], rule.pool)
        rows = [
            _by_row(ops.value(operand[:, before : before + n]), rule.by_head)
            for layer in layers
            for operand in (layer.k, layer.v)
        ]
        limit = rule.largest(shape.group, shape.heads)
        chosen = yield from at("compact", ops.compact(scores, k, rows, limit))
    yield from together(*(_keep(ops, shape, layer, before, n, chosen[2 * i : 2 * i + 2])
                          for i, layer in enumerate(layers)))  # fmt: skip


def _keep(
    ops: Ops, shape: ModelShape, layer: LayerCache, before: int, n: int, chosen: Sequence[Value]
) -> Program[None]:
    """Put the chosen rows, masked anew, behind the rows that stay anyway."""

    def parts(x: Operand) -> list[Operand]:
        return [x[:, :before], x[:, before + n :]]

    new: Sequence[Operand] = ()
    if chosen:
        k, v = (_by_kv_head(x, shape.kv_heads) for x in chosen)
        new = yield from at("compact/mask", together(ops.prepare(k), ops.prepare(v, WEIGHTED_SUM_RING)))
    layer.k = ops.cat_operands([*parts(layer.k), *new[:1]], 1)
    layer.v = ops.cat_operands([*parts(layer.v), *new[1:]], 1)


def _by_row(x: Value, by_head: bool) -> Value:
    """(KV, n, d) as rows of those who rank: as they are, or of all heads together, (1, n, KV d)."""
    kv, n, d = x.shape
    return x if by_head else x.transpose(0, 1).reshape(1, n, kv * d)


def _by_kv_head(x: Value, kv_heads: int) -> Value:
    """Undo `_by_row`: (A, k, c) -> (KV, k, d)."""
    sets, k, c = x.shape
    return x if sets == kv_heads else x.reshape(k, kv_heads, c // kv_heads).transpose(0, 1)


def _pooled(ops: Ops, x: Value, pool: int) -> Value:
    """Add the scores (A, n) of `pool` neighbours to each, where they are. No cost."""
    n, found = x.shape[-1], x
    for away in range(1, min(pool // 2, n - 1) + 1):
        found = ops.cat([found[:, : n - away] + x[:, away:], found[:, n - away :]], -1)
        found = ops.cat([found[:, :away], found[:, away:] + x[:, : n - away]], -1)
    return found

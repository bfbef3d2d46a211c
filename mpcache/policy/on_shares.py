"""Evict the client's document, which nobody may see, once and on shares, after it has been read.

While the document is read chunk by chunk, each layer adds up what the last queries pay to each token: their
attention weights, which the layer has anyway, times 1 / total. Only these queries' weights are kept, and only
for a moment. Then the rows that stay are taken out of the cache by `Ops.compact`, which reveals nothing; how
many they are is public (`SharedEviction`).

They come by score. Where the session's policy forms clusters of neighbours they are put by position again:
that is another compaction, by position, of those that stay.

Of a document whose length is padded (`mpcache.padding`) the first tokens are padding, and how many is the
client's secret. Its marks go with its rows: padding ranks below all tokens, so none of it takes a place that
a token could have, and nothing attends to what stays of it. Tokens that stay as the document's first ones
do so by rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mpcache.cache import Cache, LayerCache
from mpcache.errors import PolicyError
from mpcache.model import ModelShape
from mpcache.ops import Operand, Ops, Value
from mpcache.policy.averages import average
from mpcache.policy.base import BoundPolicy
from mpcache.policy.clusters import Clustered
from mpcache.policy.evicting import Evicting
from mpcache.policy.layer_view import LayerView
from mpcache.policy.plan import SharedEviction, SplitPlan
from mpcache.policy.streaming import Streaming
from mpcache.protocols.compaction import compared_rows
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, local, together

WEIGHTS = 31  # that are added up before they are truncated: all may go to one token, and 2^5 is out of range
COMPARED_AT_ONCE = 1 << 20  # pairs of scores, in one step: it bounds the memory


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
    """Reads the client's document: attends to all, and adds up importance (`LayerCache.paid`)."""

    eviction: SharedEviction | None = None
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
        begin = view.tokens - self._begins(view) - view.m
        weights = (yield from at("importance", ops.mul(*pair)))[..., begin:]
        lots = [weights[:, i : i + WEIGHTS].sum(1, keepdim=True) for i in range(0, weights.shape[1], WEIGHTS)]
        paid = (yield from at("importance", ops.rescale(ops.cat(lots, 1)))).sum(1)
        if not self._rule.by_head:
            paid = paid.sum(0, keepdim=True)
        before = view.layer.paid
        if before is not None:
            n = before.shape[-1]
            paid = ops.cat([before + paid[:, :n], paid[:, n:]], -1)
        view.layer.paid = paid

    def evict(self, ops: Ops, shape: ModelShape, cache: Cache) -> Program[None]:
        """Take what does not stay out of all layers; where clusters are formed, form them of what stays."""
        clustered = isinstance(self.policy, Clustered)
        for families in self._at_once(shape):
            yield from together(
                *(
                    at(f"layer{family[0]}", _Eviction(ops, shape, cache, self._rule, clustered).of(family))
                    for family in families
                )
            )
        for i in range(shape.layers):
            cache.whole(i).paid = None
        cache.seen = None  # the marks are the layers' now
        if clustered:
            nothing = torch.arange(0)
            views = (self.view(ops, shape, cache, i, nothing) for i in range(shape.layers))
            yield from together(*(at(f"layer{view.index}", self.policy.observe(view)) for view in views))

    def _at_once(self, shape: ModelShape) -> Iterator[list[list[int]]]:
        """Group layers: each with those that take its ranking, and so many as one round compares."""
        rule = self._rule
        families: dict[int, list[int]] = {}
        for layer, leader in enumerate(rule.leaders):
            families.setdefault(leader, []).append(layer)
        n = rule.tokens - rule.first - rule.last
        compared = max(1, compared_rows(max(0, n)) * (shape.kv_heads if rule.by_head else 1))
        many, all_of_them = max(1, COMPARED_AT_ONCE // compared), list(families.values())
        for begin in range(0, len(all_of_them), many):
            yield all_of_them[begin : begin + many]


@dataclass(frozen=True)
class _Eviction:
    """What layers are evicted by. by_position: what stays for its score comes by position."""

    ops: Ops
    shape: ModelShape
    cache: Cache
    rule: SharedEviction
    by_position: bool

    def of(self, family: Sequence[int]) -> Program[None]:
        """Evict in a layer and in those that take its ranking, which keep the same tokens."""
        rule, marks = self.rule, self.cache.seen
        layers = [self.cache.whole(i) for i in family]
        first = rule.first if marks is None else 0  # of a padded document nobody but the client knows them
        n, k = rule.tokens - first - rule.last, rule.kept[family[0]] - first - rule.last
        if k >= n:
            for layer in layers:
                layer.seen = None if marks is None else self._by_kv_head(marks)
            return
        before = layers[0].k.shape[1] - rule.tokens + first  # rows that stay: the server's, and the first
        chosen: list[Value] = []
        if k > 0:
            rows = [
                _by_row(self.ops.value(operand[:, before : before + n]), rule.by_head)
                for layer in layers
                for operand in (layer.k, layer.v)
            ]
            chosen = yield from at("compact", self._chosen(layers[0], first, n, k, rows))
        yield from together(*(self._keep(layer, before, n, chosen[2 * i : 2 * i + 2])
                              for i, layer in enumerate(layers)))  # fmt: skip
        if marks is not None:
            kept = [*(_by_kv_head(x, self.shape.kv_heads).transpose(1, 2) for x in chosen[2 * len(layers) :])]
            for layer in layers:
                layer.seen = self.ops.cat([*kept, self._by_kv_head(marks[n:])], -1)

    def _chosen(
        self, leader: LayerCache, first: int, n: int, k: int, rows: Sequence[Value]
    ) -> Program[list[Value]]:
        """Take k of the n rows (A, n, c) by the leader's account; the marks of a padded document, too."""
        ops, rule, marks = self.ops, self.rule, self.cache.seen
        assert leader.paid is not None, "its queries have judged"
        scores = _pooled(ops, leader.paid[:, first : first + n], rule.pool)
        sets, limit = scores.shape[0], rule.largest(self.shape.group, self.shape.heads)
        rows = list(rows)
        if marks is not None:
            scores, limit = self._ranked(scores, marks[:n], limit)
            rows.append(marks[:n].reshape(1, n, 1).expand(sets, n, 1))
        if not self.by_position:
            return (yield from ops.compact(scores, k, rows, limit))
        from_the_end = torch.arange(n - 1, -1, -1).expand(sets, n)
        places = ops.secret(from_the_end, (sets, n), Rank.SERVER).reshape(sets, n, 1)
        *rows, places = yield from ops.compact(scores, k, [*rows, places], limit)
        return (yield from at("order", ops.compact(places.reshape(sets, k), k, rows, n)))

    def _ranked(self, scores: Value, marks: Value, limit: int) -> tuple[Value, int]:
        """Put padding below all tokens, and the first tokens above all; return the new limit. No cost."""
        ops, first = self.ops, self.rule.first
        far, n = limit + 1, marks.shape[0]
        rank = marks + ops.ones((n,))
        if first:
            earlier = ops.cat([marks[:first] - marks[:first], marks[: n - first]], 0)[:n]
            rank = rank + marks - earlier
        return ops.mask_scores(scores, rank.expand(*scores.shape), far), (3 if first else 2) * far

    def _keep(self, layer: LayerCache, before: int, n: int, chosen: Sequence[Value]) -> Program[None]:
        """Put the chosen rows, masked anew, between those that stay anyway."""
        ops = self.ops
        new: Sequence[Operand] = ()
        if chosen:
            k, v = (_by_kv_head(x, self.shape.kv_heads) for x in chosen)
            new = yield from at("compact/mask", together(ops.prepare(k), ops.prepare(v, WEIGHTED_SUM_RING)))
        layer.k = ops.cat_operands([layer.k[:, :before], *new[:1], layer.k[:, before + n :]], 1)
        layer.v = ops.cat_operands([layer.v[:, :before], *new[1:], layer.v[:, before + n :]], 1)

    def _by_kv_head(self, marks: Value) -> Value:
        """Repeat marks (n,) as `LayerCache.seen` has them."""
        return marks.expand(self.shape.kv_heads, 1, marks.shape[0])


def _by_row(x: Value, by_head: bool) -> Value:
    """(KV, n, d) as rows of those who rank: as they are, or of all heads together, (1, n, KV d)."""
    kv, n, d = x.shape
    return x if by_head else x.transpose(0, 1).reshape(1, n, kv * d)


def _by_kv_head(x: Value, kv_heads: int) -> Value:
    """Undo `_by_row`: (A, k, c) -> (KV, k, d)."""
    sets, k, c = x.shape
    if sets == kv_heads:
        return x
    return x.expand(kv_heads, k, 1) if c == 1 else x.reshape(k, kv_heads, c // kv_heads).transpose(0, 1)


def _pooled(ops: Ops, x: Value, pool: int) -> Value:
    """Add the scores (A, n) of `pool` neighbours to each, where they are. No cost."""
    n, found = x.shape[-1], x
    for away in range(1, min(pool // 2, n - 1) + 1):
        found = ops.cat([found[:, : n - away] + x[:, away:], found[:, n - away :]], -1)
        found = ops.cat([found[:, :away], found[:, away:] + x[:, : n - away]], -1)
    return found

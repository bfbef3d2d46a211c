"""MPCache and Quest read literally: loops over lists of floats, no tensors, nothing shared with the code.

Written from the description of the algorithm. A token is a pair (position, keys by KV head), tokens
stand in position order, and what comes out is the set of positions that each query attends to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def importance(queries: list[list[Vector]], keys: list[list[Vector]], first: int, group: int) -> list[float]:
    """queries[head][i] stands at position first + i; keys[kv][t]. Mean over heads of the summed attention."""
    total = [0.0] * len(keys[0])
    for head, rows in enumerate(queries):
        for i, q in enumerate(rows):
            scores = [dot(q, k) for k in keys[head // group][: first + i + 1]]
            e = [math.exp(s - max(scores)) for s in scores]
            for t, x in enumerate(e):
                total[t] += x / sum(e) / len(queries)
    return total


def keep(scores: list[float], n: int, sink: int, recent: int) -> list[int]:
    """The n positions with the highest scores, sink and recent first; ascending."""
    forced = [math.inf if t < sink or t >= len(scores) - recent else s for t, s in enumerate(scores)]
    best = sorted(range(len(scores)), key=lambda t: (-forced[t], t))
    return sorted(best[:n])


@dataclass
class Options:
    sizes: list[int]  # coarse to fine, or one
    keeps: list[int]
    sink: int
    recent: int
    score: str
    alpha: float
    gqa: str
    blocks: str
    refresh: int


@dataclass
class Cluster:
    """Consecutive tokens [first, first + size) of the list, and their representatives by KV head."""

    first: int
    size: int
    r_max: list[Vector]
    r_min: list[Vector]
    mean: list[Vector]
    by_mean: bool  # scored by its mean, whatever the others are scored by

    def score(self, q: Vector, kv: int, o: Options) -> float:
        if self.by_mean:
            return dot(q, self.mean[kv])
        if o.score == "linear":
            pairs = zip(self.r_max[kv], self.r_min[kv], strict=True)
            return dot(q, [o.alpha * a + (1 - o.alpha) * b for a, b in pairs])
        bound = 0.0
        for x, a, b in zip(q, self.r_max[kv], self.r_min[kv], strict=True):
            bound += x * a if x > 0 else x * b
        return bound


@dataclass
class Layer:
    """tokens: (position, keys by KV head)."""

    o: Options
    tokens: list[tuple[int, list[Vector]]]
    levels: list[list[Cluster]] = field(default_factory=list)
    chosen: list[list[set[int]]] | None = (
        None  # per KV head and query row: indices of tokens; None: all clusters
    )
    covered: int = 0  # tokens that were clustered when the choice was made
    age: int = 0

    def __post_init__(self) -> None:
        self.levels = [[] for _ in self.o.sizes]
        coarse = self.o.sizes[0]
        n = max(0, len(self.tokens) - self.o.sink - self.o.recent) // coarse
        self._cluster(self.o.sink, n * coarse, self.o.score == "mean")

    def _cluster(self, first: int, length: int, by_mean: bool) -> None:
        for clusters, size in zip(self.levels, self.o.sizes, strict=True):
            for start in range(first, first + length, size):
                members = [k for _, k in self.tokens[start : start + size]]
                heads = range(len(members[0]))
                columns = [list(zip(*(m[h] for m in members), strict=True)) for h in heads]
                clusters.append(
                    Cluster(
                        start, size,
                        [[max(c) for c in head] for head in columns],
                        [[min(c) for c in head] for head in columns],
                        [[sum(c) / size for c in head] for head in columns],
                        by_mean,
                    )
                )  # fmt: skip

    def step(self, new: list[tuple[int, list[Vector]]], queries: list[list[Vector]]) -> None:
        """queries[kv][row]: a row for each new token and head of the group, a token's heads together."""
        self.tokens += new
        o = self.o
        if all(n >= len(c) for n, c in zip(o.keeps, self.levels, strict=True)):
            self.chosen = None
        elif self.chosen is None or len(new) > 1 or self.age >= o.refresh:
            self.chosen = [self._choose(kv, rows, len(new)) for kv, rows in enumerate(queries)]
            self.covered = sum(c.size for c in self.levels[0])
            self.age = o.refresh if len(new) > 1 else 0

    def _choose(self, kv: int, rows: list[Vector], m: int) -> list[set[int]]:
        group, sink = len(rows) // m, set(range(self.o.sink))
        chosen = []
        for i in range(len(rows)):
            together = rows[i // group * group :][:group] if self.o.gqa == "sum" else [rows[i]]
            order = list(range(len(self.tokens)))  # tokens that are left, in the order that settles ties
            for clusters, n in zip(self.levels, self.o.keeps, strict=True):
                scored = []
                for c in clusters:
                    if c.first in order:
                        score = sum(c.score(q, kv, self.o) for q in together)
                        scored.append((-score, order.index(c.first), c))
                if n < len(scored):
                    scored.sort(key=lambda s: s[:2])
                    order = [t for _, _, c in scored[:n] for t in range(c.first, c.first + c.size)]
            chosen.append({t for t in order if t < self.levels[0][-1].first + self.o.sizes[0]} - sink)
        return chosen

    def after(self) -> None:
        """Blocks that generated tokens have filled become clusters."""
        self.age += 1
        o, coarse = self.o, self.o.sizes[0]
        first = o.sink + sum(c.size for c in self.levels[0])
        by_mean = o.score == "mean" or (o.score == "linear" and o.blocks != "extremes")
        while len(self.tokens) - first >= o.recent + coarse:
            self._cluster(first, coarse, by_mean)
            first += coarse


def attended(layer: Layer, leader: Layer, m: int, kv: int, row: int, group: int) -> set[int]:
    """Positions that a query row sees: sink, the leader's choice, and what is not clustered; no future."""
    tokens = layer.tokens
    last = len(tokens) - m + row // group
    if leader.chosen is None:
        seen = set(range(len(tokens)))
    else:
        seen = set(leader.chosen[kv][row]) | set(range(layer.o.sink))
        seen |= set(range(layer.o.sink + leader.covered, len(tokens)))
    return {tokens[t][0] for t in seen if t <= last}

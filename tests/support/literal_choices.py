"""Policies that choose tokens or pages, read literally: loops over one decision at a time.

Written from the papers' descriptions; nothing is shared with the code. A decision is a set of places in the
cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def best(values: list[float], keep: int) -> set[int]:
    """The places of the highest values; of equal ones the earlier."""
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:keep])


def attention(q: Tensor, keys: Tensor, seen: int) -> list[float]:
    """What a query pays to each of all n tokens, of which it sees the first `seen`."""
    paid = torch.softmax(keys[:seen] @ q, 0).tolist()
    return paid + [0.0] * (len(keys) - seen)


@dataclass
class Literal:
    """One policy over a few layers. p: its options. choices: per layer, by row: places, or none."""

    kind: str
    p: Any
    group: int
    choices: dict[int, dict[tuple[int, int], set[int]]] = field(default_factory=dict)
    covered: dict[int, int] = field(default_factory=dict)
    ages: dict[int, int] = field(default_factory=dict)

    # ------------------------------------------------------------------------------- who chooses what

    def leader(self, layer: int) -> int | None:
        if self.kind in ("tidal", "delta"):
            choosers = [int(c) for c in self.p.choose.split("-") if int(c) <= layer]
            return choosers[-1] if layer >= self.p.full and choosers else None if self.p.dense else layer
        return None if self.kind == "hip" and layer < self.p.full else layer

    def sizes(self) -> tuple[int, int, int]:
        """Sink, recent tokens, tokens of an item."""
        size = {"delta": "page", "hip": "block"}.get(self.kind)
        s = getattr(self.p, size) if size else 1
        return (
            getattr(self.p, "sink", 0),
            getattr(self.p, "recent", 0) * (s if self.kind == "delta" else 1),
            s,
        )

    def items(self, before: int, keep: int) -> int:
        sink, recent, size = self.sizes()
        n = max(0, before - sink - recent) // size
        if self.kind == "hip":
            half = 1
            while half * 2 <= n // keep:
                half *= 2
            n = n // half * half
        return n

    def keep(self, context: int) -> int:
        if self.kind == "delta":
            return int(self.p.pages)
        return int(self.p.k) // self.sizes()[2] or 1

    # -------------------------------------------------------------------------------------- one decision

    def decide(
        self, keys: Tensor, rows: Tensor, kv: int, row: int, m: int, items: int, keep: int
    ) -> set[int]:
        """keys: (KV, n, d).  rows: (KV, m g, d).  Which items this row's heads choose."""
        sink, _, size = self.sizes()
        n, g, t = keys.shape[1], self.group, row // self.group
        seen = n - m + t + 1
        mine = (keys[kv] @ rows[kv, row]).tolist()
        if self.kind == "tidal":
            return best(mine[sink : sink + items], keep)
        if self.kind == "hip":
            return self.halved(mine, sink, size, items, keep)
        heads = [(kv, t * g + h) for h in range(g)]
        if self.kind != "recycled":
            heads = [(k, t * g + h) for k in range(len(keys)) for h in range(g)]
        if getattr(self.p, "vote", "") == "linear":
            votes = [(keys[k] @ rows[k, r]).tolist() for k, r in heads]
        else:
            votes = [attention(rows[k, r], keys[k], seen) for k, r in heads]
        largest = self.kind == "delta" and self.p.vote == "max"
        token = [max(v) if largest else sum(v) for v in zip(*votes, strict=True)]
        return best([sum(token[sink + i * size : sink + (i + 1) * size]) for i in range(items)], keep)

    def halved(self, scores: list[float], sink: int, size: int, items: int, keep: int) -> set[int]:
        half = 1
        while half * 2 <= items // keep:
            half *= 2
        chunks = [list(range(i, i + half)) for i in range(0, items, half)]
        while True:
            if len(chunks) > keep:
                chunks.sort(key=lambda c: -scores[sink + c[0] * size + len(c) * size // 2])
                chunks = chunks[:keep]
            if len(chunks[0]) == 1:
                return {c[0] for c in chunks}
            chunks = [half for c in chunks for half in (c[: len(c) // 2], c[len(c) // 2 :])]

    # -------------------------------------------------------------------------------------------- a step

    def step(self, layer: int, keys: Tensor, rows: Tensor, m: int, context: int) -> list[list[set[int]]]:
        """What each row attends to: [kv][row] -> places."""
        n, kv_heads, count = keys.shape[1], len(keys), rows.shape[1]
        sink, _, size = self.sizes()
        leader, keep = self.leader(layer), self.keep(context)
        dense = getattr(self.p, "dense", False)
        everything = [
            [set(range(n - m + r // self.group + 1)) for r in range(count)] for _ in range(kv_heads)
        ]
        if leader is None:
            return everything
        if leader == layer:
            items = self.items(n - m, keep)
            self.ages[layer] = self.ages.get(layer, 0) + 1
            made = False
            if items <= keep:
                self.choices.pop(layer, None)
            elif layer not in self.choices or m > 1 or self.ages[layer] > getattr(self.p, "refresh", 1):
                last = dense and m > 1 and self.kind == "recycled"  # later steps go by the last token alone
                items = self.items(n - 1, keep) if last else items
                chosen = [(k, r) for k in range(kv_heads) for r in range(count)]
                self.choices[layer] = {
                    (k, r): self.decide(keys, rows, k, r, m, items, keep) for k, r in chosen
                }
                if last:
                    for k, r in chosen:
                        self.choices[layer][k, r % self.group] = self.choices[layer][
                            k, count - self.group + r % self.group
                        ]
                self.covered[layer] = sink + items * size
                self.ages[layer] = 1 if m == 1 or last else 10**6
                made = True
            if dense and (made or layer not in self.choices):
                return everything
        if leader not in self.choices:
            return everything
        end = self.covered[leader]
        found: list[list[set[int]]] = []
        for k in range(kv_heads):
            found.append([])
            for r in range(count):
                tokens = {sink + i * size + j for i in self.choices[leader][k, r] for j in range(size)}
                tokens |= set(range(min(sink, n))) | set(range(end, n))
                found[-1].append({t for t in tokens if t <= n - m + r // self.group})
        return found

"""The KV cache as the decode program sees it.

Per layer the tokens stand in this order: [kept context, by position | question and generated
tokens]. Lengths are public, contents are not. What a policy keeps beside them is its own `memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.ops import Operand, Ops, Value
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.runtime.program import Program, together


@dataclass
class LayerCache:
    """One layer. k, v: operands (KV, n, d), each row masked once, when it came in.

    bias: (KV, 1, kept), added to the scores of the kept context; None: nothing is.
    seen: marks (KV, 1, kept) of what stays of the client's document, 0 for padding; None: see `Cache.seen`.
    paid: while that document is read, what its tokens are worth, (A, tokens) (`policy.on_shares`).
    """

    k: Operand
    v: Operand
    memory: Any = None
    bias: Value | None = None
    seen: Value | None = None
    paid: Value | None = None

    def append(self, ops: Ops, k: Value, v: Value) -> Program[None]:
        """Add k, v (KV, m, d), as `Cache.append` says."""
        new_k = yield from ops.start_prepare(k)
        new_v = yield from ops.start_prepare(v, WEIGHTED_SUM_RING)
        self.k, self.v = ops.cat_operands([self.k, new_k], 1), ops.cat_operands([self.v, new_v], 1)
        self.k, self.v = yield from together(
            ops.finish_prepare(k, new_k, self.k), ops.finish_prepare(v, new_v, self.v)
        )


@dataclass
class SplitLayer:
    """A layer whose heads keep different numbers of tokens.

    heads: the KV heads of each part, which keep the same number.  parts: what they keep.
    """

    heads: tuple[tuple[int, ...], ...]
    parts: tuple[LayerCache, ...]


@dataclass
class Cache:
    """All layers, and the position of the next token. context: tokens before eviction and the first turn.

    seen: marks (tokens,) of those after the kept context, 0 for padding; None where questions are not padded.
    padding: how many these are, where that is known; 0 elsewhere.
    """

    layers: list[LayerCache | SplitLayer]
    context: int
    length: int = field(default=0)  # tokens after the context
    seen: Value | None = None
    padding: int = 0

    def whole(self, i: int) -> LayerCache:
        """Return layer i, whose heads all keep the same number. Raises TypeError for another one."""
        layer = self.layers[i]
        if isinstance(layer, SplitLayer):
            raise TypeError(f"layer {i} is split: each part is a cache of its own")
        return layer

    def advance(self, m: int) -> torch.Tensor:
        """Positions (m,) of the next m tokens."""
        first = self.context + self.length
        self.length += m
        return torch.arange(first, first + m)

    def begin_turns(self) -> None:
        """Count what was taken in so far to the context."""
        self.context, self.length = self.context + self.length, 0

    def mark(self, ops: Ops, seen: Value) -> None:
        """Note which of the next tokens (m,) are no padding."""
        self.seen = seen if self.seen is None else ops.cat([self.seen, seen], 0)

    def append(self, ops: Ops, i: int, k: Value, v: Value) -> Program[None]:
        """Add k, v (m, KV, d), rescaled, to layer i.

        What reads the layer may run beside this program (`together`, this one first): it meets the new rows
        from its first round on, which is this program's, too.
        """
        layer = self.layers[i]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        if isinstance(layer, LayerCache):
            yield from layer.append(ops, k, v)
            return
        added = (
            part.append(ops, take_heads(ops, k, heads), take_heads(ops, v, heads))
            for heads, part in zip(layer.heads, layer.parts, strict=True)
        )
        yield from together(*added)


def take_heads(ops: Ops, x: Value, heads: Sequence[int]) -> Value:
    """Take x (KV, ...) at these KV heads: (heads, ...). No cost."""
    return ops.cat([x[head : head + 1] for head in heads], 0)


def join_heads(ops: Ops, parts: Sequence[Value], heads: Sequence[Sequence[int]]) -> Value:
    """Put what `take_heads` took apart together again: (KV, ...). No cost."""
    places = {
        head: part[i : i + 1] for part, some in zip(parts, heads, strict=True) for i, head in enumerate(some)
    }
    return ops.cat([places[head] for head in sorted(places)], 0)

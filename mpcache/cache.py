"""The KV cache as the decode program sees it: kept context, representatives, generated tokens.

Per layer the tokens stand in this order: [kept context, in position order | question and generated
tokens]. Lengths are public, contents are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from mpcache.ops import Operand, Ops, Value
from mpcache.secure.program import Program, together


@dataclass
class LayerCache:
    """One layer. k, v: operands (KV, n, d). reps: representatives (KV, r, d), or None."""

    k: Operand | None
    v: Operand | None
    reps: Operand | None
    kept: int  # context tokens in k and v
    recent: int = 0  # tokens after them


@dataclass
class Cache:
    """All layers, and the position of the next token. context: tokens before eviction."""

    layers: list[LayerCache]
    context: int
    length: int = field(default=0)  # tokens after the context

    def advance(self, m: int) -> torch.Tensor:
        """Positions (m,) of the next m tokens."""
        first = self.context + self.length
        self.length += m
        return torch.arange(first, first + m)

    def append(self, ops: Ops, i: int, k: Value, v: Value) -> Program[None]:
        """Add k, v (m, KV, d) to layer i: each row is masked once, here."""
        layer = self.layers[i]
        new_k, new_v = yield from together(ops.keep(k.transpose(0, 1)), ops.keep(v.transpose(0, 1)))
        layer.k = new_k if layer.k is None else ops.join([layer.k, new_k], 1)
        layer.v = new_v if layer.v is None else ops.join([layer.v, new_v], 1)
        layer.recent += k.shape[0]

    def keys(self, ops: Ops, i: int) -> Operand:
        """What q is scored against: tokens, then representatives."""
        layer = self.layers[i]
        return layer.k if layer.reps is None else ops.join([layer.k, layer.reps], 1)

    def values(self, i: int) -> Operand:
        return self.layers[i].v

    def visible(self, m: int, group: int) -> torch.Tensor | None:
        """Causal mask of a chunk over the recent tokens: (m * group, recent), 1 where attended.

        None for one token, which sees all.
        """
        if m == 1:
            return None
        earlier = torch.ones(m, self.length - m, dtype=torch.int64)
        chunk = torch.tril(torch.ones(m, m, dtype=torch.int64))
        return torch.cat([earlier, chunk], 1).repeat_interleave(group, 0)

"""The KV cache as the decode program sees it.

Per layer the tokens stand in this order: [kept context, by position | question and generated
tokens]. Lengths are public, contents are not. What a policy keeps beside them is its own `memory`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.ops import Operand, Ops, Value
from mpcache.protocols.ranges import WEIGHTED_SUM_RING
from mpcache.runtime.program import Program, together


@dataclass
class LayerCache:
    """One layer. k, v: operands (KV, n, d), each row masked once, when it came in."""

    k: Operand
    v: Operand
    memory: Any = None


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
        """Add k, v (m, KV, d), rescaled, to layer i.

        What reads the layer may run beside this program (`together`, this one first): it meets the new rows
        from its first round on, which is this program's, too.
        """
        layer = self.layers[i]
        k, v = k.transpose(0, 1), v.transpose(0, 1)
        new_k = yield from ops.start_prepare(k)
        new_v = yield from ops.start_prepare(v, WEIGHTED_SUM_RING)
        layer.k, layer.v = ops.cat_operands([layer.k, new_k], 1), ops.cat_operands([layer.v, new_v], 1)
        layer.k, layer.v = yield from together(
            ops.finish_prepare(k, new_k, layer.k), ops.finish_prepare(v, new_v, layer.v)
        )

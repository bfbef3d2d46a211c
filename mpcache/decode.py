"""The decode program: one text, read plain, on shares, by the dealer and by the cost engine.

`step` takes a chunk of m tokens (the question at once, or one generated token) through the model
and returns the logits after its last token. Shapes: H heads of d on KV key-value heads, g = H / KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpcache.cache import Cache
from mpcache.model import ModelShape
from mpcache.ops import Operand, Ops, Value
from mpcache.rank import Rank
from mpcache.rope import rope_tables
from mpcache.secure.program import Program, at, together

if TYPE_CHECKING:
    from mpcache.policy import Bound, View


@dataclass(frozen=True)
class Layer:
    """One layer's operands (inputs, outputs) and biases (outputs,), norms' gains folded in.

    qkv: (width, (H + 2 KV) d).  o: (H d, width).  up: (width, 2 ffn), gate first, or (width, ffn).
    down: (ffn, width).
    """

    qkv: Operand
    qkv_bias: Value | None
    o: Operand
    o_bias: Value | None
    up: Operand
    up_bias: Value | None
    down: Operand
    down_bias: Value | None


@dataclass(frozen=True)
class Operands:
    """The model as the program uses it. embed: (vocab, width); lm_head: (width, vocab)."""

    shape: ModelShape
    embed: Operand
    positions: Value | None
    layers: tuple[Layer, ...]
    lm_head: Operand
    lm_bias: Value | None


def step(
    ops: Ops, model: Operands, cache: Cache, policy: Bound, one_hots: Value
) -> Program[torch.Tensor | None]:
    """(m, vocab) one-hot tokens of the client -> (vocab,) next-token logits, at the client only."""
    positions = cache.advance(one_hots.shape[0])
    x = yield from at("embed", embed(ops, model, one_hots, positions))
    for i, layer in enumerate(model.layers):
        x = yield from at(f"layer{i}", block(ops, model.shape, layer, cache, i, policy, x, positions))
    h = yield from at("norm", ops.norm(x[-1:], model.shape.norm_eps))
    logits = yield from at("lm_head", ops.linear(h, model.lm_head, model.lm_bias))
    return (yield from at("logits", ops.reveal(logits[0], Rank.CLIENT, "logits for the client")))


def embed(ops: Ops, model: Operands, one_hots: Value, positions: torch.Tensor) -> Program[Value]:
    """(m, vocab) -> (m, width)."""
    x = yield from ops.linear(one_hots, model.embed)
    if model.positions is not None:
        x = yield from ops.add(x, model.positions[positions])
    return x


def block(
    ops: Ops,
    shape: ModelShape,
    w: Layer,
    cache: Cache,
    i: int,
    policy: Bound,
    x: Value,
    positions: torch.Tensor,
) -> Program[Value]:
    """One layer, (m, width) -> (m, width): norm, qkv, select and attend, o, norm, mlp."""
    h = yield from at("norm1", ops.norm(x, shape.norm_eps))
    q, k, v = yield from at("qkv", qkv(ops, shape, w, h, positions))
    yield from at("append", cache.append(ops, i, k, v))
    view = policy.view(ops, shape, cache, i, positions)
    a = yield from attend(view, policy, q)

    def rest() -> Program[Value]:
        o = yield from at("o", ops.linear(a, w.o, w.o_bias))
        y = yield from at("residual1", ops.add(x, o))
        h = yield from at("norm2", ops.norm(y, shape.norm_eps))
        h = yield from at("mlp", mlp(ops, shape, w, h))
        return (yield from at("residual2", ops.add(y, h)))

    # What the policy does with what it saw shares its rounds with the rest of the layer.
    y, _ = yield from together(rest(), at("observe", policy.policy.observe(view)))
    return y


def qkv(ops: Ops, shape: ModelShape, w: Layer, h: Value, positions: torch.Tensor) -> Program[list[Value]]:
    """(m, width) -> q (m, H, d), scaled by 1/sqrt d; k, v (m, KV, d); q and k rotated."""
    y = yield from ops.linear(h, w.qkv, w.qkv_bias)
    y = y.reshape(-1, shape.heads + 2 * shape.kv_heads, shape.head_dim)
    q, k, v = y[:, : shape.heads], y[:, shape.heads : -shape.kv_heads], y[:, -shape.kv_heads :]
    if shape.positions != "rope":
        return (yield from together(ops.settle(q), ops.settle(k), ops.settle(v)))
    tables = rope_tables(shape, positions)
    return (yield from together(ops.rotate(q, *tables), ops.rotate(k, *tables), ops.settle(v)))


def attend(view: View, policy: Bound, q: Value) -> Program[Value]:
    """q (m, H, d) over one layer's cache -> (m, H d), as the policy attends."""
    m, kv, g, d = view.m, view.shape.kv_heads, view.shape.group, view.shape.head_dim
    rows = q.reshape(m, kv, g, d).transpose(0, 1).reshape(kv, m * g, d)
    out = yield from policy.policy.attend(view, rows)
    return out.reshape(kv, m, g, d).transpose(0, 1).reshape(m, kv * g * d)


def mlp(ops: Ops, shape: ModelShape, w: Layer, h: Value) -> Program[Value]:
    """(m, width) -> (m, width): down(act(gate) * up), or down(act(up)) without a gate."""
    y = yield from ops.linear(h, w.up, w.up_bias)
    gate, up = (y[:, : shape.ffn], y[:, shape.ffn :]) if shape.gated else (y, None)
    hidden = yield from at("gate", ops.gate(shape.activation, gate, up))
    return (yield from ops.linear(hidden, w.down, w.down_bias))

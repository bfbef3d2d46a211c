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
    from mpcache.policy import Bound


@dataclass(frozen=True)
class Layer:
    """One layer's operands (inputs, outputs) and biases (outputs,), norms' gains folded in."""

    wq: Operand
    bq: Value | None
    wk: Operand
    bk: Value | None
    wv: Operand
    bv: Value | None
    wo: Operand
    bo: Value | None
    w_gate: Operand | None
    b_gate: Value | None
    w_up: Operand
    b_up: Value | None
    w_down: Operand
    b_down: Value | None


@dataclass(frozen=True)
class Operands:
    """The model as the program uses it. embed: (vocab, width); lm_head: (width, vocab)."""

    shape: ModelShape
    embed: Operand
    positions: Value | None
    layers: tuple[Layer, ...]
    lm_head: Operand
    lm_bias: Value | None


def step(ops: Ops, model: Operands, cache: Cache, policy: Bound, one_hots: Value) -> Program[torch.Tensor | None]:
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
    ops: Ops, shape: ModelShape, w: Layer, cache: Cache, i: int, policy: Bound, x: Value, positions: torch.Tensor
) -> Program[Value]:
    """One layer, (m, width) -> (m, width): norm, qkv, select and attend, o, norm, mlp."""
    h = yield from at("norm1", ops.norm(x, shape.norm_eps))
    q, k, v = yield from at("qkv", qkv(ops, shape, w, h, positions))
    yield from at("append", cache.append(ops, i, k, v))
    a = yield from attend(ops, shape, cache, i, policy, q)
    o = yield from at("o", ops.linear(a, w.wo, w.bo))
    x = yield from at("residual1", ops.add(x, o))
    h = yield from at("norm2", ops.norm(x, shape.norm_eps))
    h = yield from at("mlp", mlp(ops, shape, w, h))
    return (yield from at("residual2", ops.add(x, h)))


def qkv(ops: Ops, shape: ModelShape, w: Layer, h: Value, positions: torch.Tensor) -> Program[list[Value]]:
    """(m, width) -> q (m, H, d), scaled by 1/sqrt d; k, v (m, KV, d); q and k rotated."""

    def project(weight: Operand, bias: Value | None, heads: int, turn: bool) -> Program[Value]:
        y = yield from ops.linear(h, weight, bias)
        y = y.reshape(-1, heads, shape.head_dim)
        if turn and shape.positions == "rope":
            y = yield from ops.rotate(y, *rope_tables(shape, positions))
        return y

    return (
        yield from together(
            project(w.wq, w.bq, shape.heads, True),
            project(w.wk, w.bk, shape.kv_heads, True),
            project(w.wv, w.bv, shape.kv_heads, False),
        )
    )


def attend(ops: Ops, shape: ModelShape, cache: Cache, i: int, policy: Bound, q: Value) -> Program[Value]:
    """q (m, H, d) over layer i's cache -> (m, H d). Rows: one per token and head of a group."""
    m, kv, g, d = q.shape[0], shape.kv_heads, shape.group, shape.head_dim
    rows = q.reshape(m, kv, g, d).transpose(0, 1).reshape(kv, m * g, d)
    # Keys and representatives together: one opening of q scores everything (PROTOCOLS 5).
    scores = yield from at("scores", ops.linear(rows, cache.keys(ops, i).transpose(1, 2)))
    weights, total = yield from policy.weigh(ops, scores, cache, i, cache.visible(m, g))
    out = yield from at("attend", ops.average(weights, total, cache.values(i)))
    return out.reshape(kv, m, g, d).transpose(0, 1).reshape(m, kv * g * d)


def mlp(ops: Ops, shape: ModelShape, w: Layer, h: Value) -> Program[Value]:
    """(m, width) -> (m, width): down(act(gate) * up), or down(act(up)) without a gate."""
    if w.w_gate is None:
        gate, up = (yield from ops.linear(h, w.w_up, w.b_up)), None
    else:
        gate, up = yield from together(
            ops.linear(h, w.w_gate, w.b_gate), ops.linear(h, w.w_up, w.b_up)
        )
    hidden = yield from at("gate", ops.gate(shape.activation, gate, up))
    return (yield from ops.linear(hidden, w.w_down, w.b_down))

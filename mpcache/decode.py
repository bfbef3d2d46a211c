"""The decode program: one text, read plain, on shares, by the dealer and by the cost engine.

`step` takes a chunk of m tokens (the question at once, or one generated token) through the model
and returns the logits after its last token. Shapes: H heads of d on KV key-value heads, g = H / KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mpcache.argmax import greedy
from mpcache.cache import Cache
from mpcache.model import ModelShape
from mpcache.model.rope import Rotation, rope_tables
from mpcache.ops import Operand, Ops, Value
from mpcache.padding import PaddedChunk
from mpcache.protocols.ranges import NORM_ROUNDS
from mpcache.rank import Rank
from mpcache.runtime.program import Program, at, together

if TYPE_CHECKING:
    from mpcache.policy import BoundPolicy, LayerView


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


@dataclass(frozen=True)
class Stream:
    """The residual stream (m, width).

    opened: the sum that the last norm met.  pending: what the sublayer after it adds, which the next norm
    takes in.
    """

    opened: Operand | None
    pending: Value

    def last(self) -> Stream:
        """Take the last token's row."""
        return Stream(None if self.opened is None else self.opened[-1:], self.pending[-1:])


def step(
    ops: Ops,
    model: Operands,
    cache: Cache,
    policy: BoundPolicy,
    chunk: Value | PaddedChunk,
    reveal: str = "logits",
) -> Program[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Turn (m, vocab) one-hot tokens of the client, the chunk, into (vocab,) next-token logits.

    The client alone learns these.

    With reveal "token" it learns the number (1,) of the likeliest token instead. It also learns whether all
    values of the step were in their ranges (1,): None where an engine does not look.
    """
    stream, positions, turns = yield from take_in(ops, model, cache, chunk)
    for i, layer in enumerate(model.layers):
        program = block(ops, model.shape, layer, cache, i, policy, stream, positions, turns)
        stream = yield from at(f"layer{i}", program)
    last = stream.last()
    head = ops.norm_linear(last.opened, last.pending, model.shape.norm_eps, model.lm_head, model.lm_bias)
    if reveal == "token":
        _, logits = yield from at("lm_head", head)
        token, started = yield from together(
            at("token", greedy(ops, ops.in_small_ring(logits))), at("guard", ops.start_verdict(1))
        )
        learned = at("token", ops.reveal(token, Rank.CLIENT, "token for the client"))
    else:
        (_, logits), started = yield from together(
            at("lm_head", head), at("guard", ops.start_verdict(NORM_ROUNDS - 1))
        )
        learned = at("logits", ops.reveal(logits[0], Rank.CLIENT, "logits for the client"))
    answer, in_range = yield from together(learned, at("guard", ops.finish_verdict(started)))
    return answer, in_range


def read(
    ops: Ops, model: Operands, cache: Cache, policy: BoundPolicy, chunk: Value | PaddedChunk
) -> Program[None]:
    """Take (m, vocab) one-hot tokens of the client into the cache, and reveal nothing of them.

    Of the last layer only what the cache and the policy need is computed. Whether all values were in their
    ranges the next `range_verdict` tells, or that of the next `step`.
    """
    stream, positions, turns = yield from take_in(ops, model, cache, chunk)
    *inner, top = enumerate(model.layers)
    for i, layer in inner:
        program = block(ops, model.shape, layer, cache, i, policy, stream, positions, turns)
        stream = yield from at(f"layer{i}", program)
    i, layer = top
    yield from at(f"layer{i}", fill(ops, model.shape, layer, cache, i, policy, stream, positions, turns))


def take_in(
    ops: Ops, model: Operands, cache: Cache, chunk: Value | PaddedChunk
) -> Program[tuple[Stream, torch.Tensor, Operand | None]]:
    """Look up a chunk's tokens. Returns their stream, their places (m,), and their turns, if it is padded."""
    one_hots = chunk.one_hots if isinstance(chunk, PaddedChunk) else chunk
    positions = cache.advance(one_hots.shape[0])
    embedding = at("embed", embed(ops, model, one_hots, positions))
    if not isinstance(chunk, PaddedChunk):
        return Stream(None, (yield from embedding)), positions, None
    cache.mark(ops, chunk.seen)
    embedded, turns = yield from together(embedding, at("turn", ops.prepare(chunk.turns)))
    return Stream(None, embedded), positions, turns


def range_verdict(ops: Ops) -> Program[torch.Tensor | None]:
    """Tell the client alone whether all values since the last verdict were in their ranges (1,)."""
    return (yield from ops.finish_verdict((yield from ops.start_verdict(0))))


def embed(ops: Ops, model: Operands, one_hots: Value, positions: torch.Tensor) -> Program[Value]:
    """Look up tokens: (m, vocab) -> (m, width)."""
    x = yield from ops.linear(one_hots, model.embed)
    return x if model.positions is None else x + model.positions[positions]


def block(
    ops: Ops, shape: ModelShape, w: Layer, cache: Cache, i: int, policy: BoundPolicy, stream: Stream,
    positions: torch.Tensor, turns: Operand | None = None,
) -> Program[Stream]:  # fmt: skip
    """Run one layer: norm, qkv, select and attend, o, norm, mlp."""
    opened, q, k, v = yield from at("qkv", qkv(ops, shape, w, stream, positions, turns))
    view = policy.view(ops, shape, cache, i, positions)
    _, a = yield from together(at("append", cache.append(ops, i, k, v)), attend(view, policy, q))

    def rest() -> Program[Stream]:
        added = yield from at("o", ops.linear(a, w.o, w.o_bias))
        return (yield from mlp(ops, shape, w, Stream(opened, added)))

    # What the policy does with what it saw shares its rounds with the rest of the layer.
    stream, _ = yield from together(rest(), at("observe", policy.observe(view)))
    return stream


def fill(
    ops: Ops, shape: ModelShape, w: Layer, cache: Cache, i: int, policy: BoundPolicy, stream: Stream,
    positions: torch.Tensor, turns: Operand | None,
) -> Program[None]:  # fmt: skip
    """Run what of a layer its cache and the policy need, and nothing after that."""
    _, q, k, v = yield from at("qkv", qkv(ops, shape, w, stream, positions, turns))
    view = policy.view(ops, shape, cache, i, positions)
    yield from together(at("append", cache.append(ops, i, k, v)), attend(view, policy, q))
    yield from at("observe", policy.observe(view))


def qkv(
    ops: Ops, shape: ModelShape, w: Layer, stream: Stream, positions: torch.Tensor, turns: Operand | None
) -> Program[tuple[Operand, Value, Value, Value]]:
    """Return the opened stream (m, width), q (m, H, d), and k, v (m, KV, d).

    q is scaled by 1/sqrt d; q and k are rotated, where positions are secret by turns (m, d, d).
    """
    turned = shape.heads + shape.kv_heads
    turn = None
    if shape.positions == "rope" and turns is None:
        turn = Rotation(turned, *rope_tables(shape, positions))
    opened, y = yield from ops.norm_linear(
        stream.opened, stream.pending, shape.norm_eps, w.qkv, w.qkv_bias, turn
    )
    y = yield from ops.rescale(y)
    y = y.reshape(-1, turned + shape.kv_heads, shape.head_dim)
    qk, v = y[:, :turned], y[:, turned:]
    if turns is not None:
        qk = yield from at("turn", ops.linear(qk, turns))
        qk = yield from at("turn", ops.rescale(qk))
    return opened, qk[:, : shape.heads], qk[:, shape.heads :], v


def attend(view: LayerView, policy: BoundPolicy, q: Value) -> Program[Value]:
    """Attend with q (m, H, d) over one layer's cache as the policy does -> (m, H d)."""
    m, kv, g, d = view.m, view.shape.kv_heads, view.shape.group, view.shape.head_dim
    rows = q.reshape(m, kv, g, d).transpose(0, 1).reshape(kv, m * g, d)
    out = yield from policy.attend(view, rows)
    return out.reshape(kv, m, g, d).transpose(0, 1).reshape(m, kv * g * d)


def mlp(ops: Ops, shape: ModelShape, w: Layer, stream: Stream) -> Program[Stream]:
    """Add down(act(gate) * up), or down(act(up)) without a gate, of the stream's norm (m, width)."""
    norm = ops.norm_linear(stream.opened, stream.pending, shape.norm_eps, w.up, w.up_bias)
    opened, y = yield from at("up", norm)
    gate, up = (y[:, : shape.ffn], y[:, shape.ffn :]) if shape.gated else (y, None)
    hidden = yield from at("gate", ops.gate(shape.activation, gate, up))
    return Stream(opened, (yield from at("down", ops.linear(hidden, w.down, w.down_bias))))

"""Run the model over a context in plaintext: one pass over the owner's document, on CPU or GPU.

Float32 throughout. The decode program computes `normalise`, `apply_activation` and `feed_forward` too;
it is tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpcache.errors import BadInput
from mpcache.model.loading import Model
from mpcache.model.rope import rope_tables, rotate
from mpcache.model.shape import ModelShape
from mpcache.model.weights import LayerWeights

SCORED_ROWS = 256  # queries whose scores are computed at once


@dataclass(frozen=True, eq=False)
class Prefill:
    """What a context of T tokens leaves behind. Tensors are float32 on the device that was asked for.

    k, v: per layer (kv_heads, T, head_dim), keys rotated to their positions 0..T-1;
    q_window: per layer (heads, w, head_dim), the last w queries, rotated, with 1/sqrt(head_dim) in
    them; first_position: the position T - w of the first of them;
    largest_scores: per layer, no less than any attention score in size, and exact from `exact_from` on;
    logits: (vocab,) after the last token, (T, vocab) after all, or (0,), as was asked for;
    model, token_ids: what was read, for who reads it again (`mpcache.model.reread`);
    notes: what was found out about this context, for who needs it at another budget.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    q_window: tuple[Tensor, ...]
    first_position: int
    logits: Tensor
    largest_scores: tuple[float, ...] = ()
    model: Model | None = None
    token_ids: tuple[int, ...] = ()
    notes: dict[Any, Any] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Return T."""
        return self.k[0].shape[1]

    @property
    def largest_values(self) -> tuple[float, ...]:
        """The largest size of a value, per layer."""
        return tuple(float(v.abs().max()) for v in self.v)

    def last_queries(self, window: int) -> Prefill:
        """Return the same context as seen by its last `window` queries.

        Raises ValueError on more queries than there are here.
        """
        there = self.q_window[0].shape[1]
        if not 0 <= window <= there:
            raise ValueError(f"a window of {window} queries of {there}")
        queries = tuple(q[:, there - window :] for q in self.q_window)
        return replace(self, q_window=queries, first_position=self.first_position + there - window)


def normalise(x: Tensor, eps: float) -> Tensor:
    """Compute RMSNorm, x / sqrt(mean(x^2) + eps), over the last dimension; its gain is folded elsewhere.

    LayerNorm as well: `mpcache.model.folding` makes the mean of x zero where a model has one.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def apply_activation(kind: str, x: Tensor) -> Tensor:
    """Compute x / (1 + e^-x) for "silu", x * Phi(x) for "gelu", its tanh approximation for "gelu_tanh"."""
    return _ACTIVATIONS[kind](x)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def apply_linear(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """Compute x (..., inputs) @ w (inputs, outputs) + b (outputs,)."""
    return x @ w if b is None else torch.addmm(b, x, w)


def feed_forward(x: Tensor, layer: LayerWeights, shape: ModelShape) -> Tensor:
    """Compute down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate; x and result (T, width)."""
    hidden = apply_linear(x, layer.w_up, layer.b_up)
    if layer.w_gate is None:
        hidden = apply_activation(shape.activation, hidden)
    else:
        gate = apply_linear(x, layer.w_gate, layer.b_gate)
        hidden = hidden * apply_activation(shape.activation, gate)
    return apply_linear(hidden, layer.w_down, layer.b_down)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally. q: (heads, T, d), scaled; k, v: (kv_heads, T, d) -> (T, heads * d)."""
    group = q.shape[0] // k.shape[0]
    # Repeated here rather than by enable_gqa, which costs SDPA its memory-efficient float32 kernel.
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=1.0)[0]
    return out.transpose(0, 1).flatten(1)


def largest_score(q: Tensor, k: Tensor, exact_from: float) -> float:
    """Bound the size of all scores of q: (heads, T, d), scaled, with k: (kv_heads, T, d), causally.

    The lengths of queries and keys bound it at no cost; from `exact_from` on it is computed.
    """
    parts = q.reshape(k.shape[0], -1, *q.shape[1:])  # (kv_heads, group, T, d)
    longest_q, longest_k = (x.square().sum(-1).flatten(1).amax(1).sqrt() for x in (parts, k))
    most = float((longest_q * longest_k).max())
    if most < exact_from:
        return most
    most = 0.0
    for first in range(0, k.shape[1], SCORED_ROWS):
        last = min(first + SCORED_ROWS, k.shape[1])
        scores = torch.matmul(parts[:, :, first:last], k[:, None, :last].transpose(-1, -2))
        most = max(most, float(scores.tril_(first).abs().max()))
    return most


@torch.no_grad()
def prefill(
    model: Model,
    token_ids: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    window: int = 0,
    all_logits: bool = False,
    logits: bool = True,
    exact_from: float = math.inf,
) -> Prefill:
    """Run the model over a context of T tokens.

    Parameters
    ----------
    model
        The owner's model, its weights anywhere.
    token_ids
        The context.
    device
        Where the pass runs; the weights of one layer at a time are taken there.
    window
        How many of the last queries to keep, 0..T (public).
    all_logits
        Whether to return the logits after every token, not after the last alone.
    logits
        Whether to return any.
    exact_from
        From which size on `largest_scores` are computed, not bounded.

    Raises
    ------
    BadInput
        When the context is empty, longer than the model allows, or holds an id outside the vocabulary.
    ValueError
        When there are fewer than `window` queries.

    """
    shape, weights = model.shape, model.weights
    length = len(token_ids)
    _check_context(token_ids, shape)
    if not 0 <= window <= length:
        raise ValueError(f"a window of {window} queries of {length}")
    # Rows are picked where the tables live: they may be larger than what the device should hold.
    ids = torch.tensor(token_ids)
    x = weights.embed[ids].to(device)
    if weights.positions is not None:
        x = x + weights.positions[:length].to(device)
    positions = torch.arange(length, device=device)
    tables = rope_tables(shape, positions) if shape.positions == "rope" else None

    keys, values, queries, scores = [], [], [], []
    for stored in weights.layers:
        layer = stored.to(device)
        q, k, v = project_heads(normalise(x, shape.norm_eps), layer, shape, tables)
        x = x + apply_linear(causal_attention(q, k, v), layer.wo, layer.bo)
        x = x + feed_forward(normalise(x, shape.norm_eps), layer, shape)
        keys.append(k)
        values.append(v)
        scores.append(largest_score(q, k, exact_from))
        queries.append(q[:, length - window :].clone())  # a view would keep all T queries alive

    found = _logits(model, x if all_logits else x[-1:], device) if logits else torch.empty(0)
    found = found if all_logits or not logits else found[0]
    return Prefill(
        tuple(keys), tuple(values), tuple(queries), length - window, found, tuple(scores),
        model, tuple(token_ids),
    )  # fmt: skip


def _logits(model: Model, x: Tensor, device: torch.device | str) -> Tensor:
    """Return the logits (m, vocab) after each row of the residual stream x (m, width)."""
    bias = model.weights.lm_bias
    last = normalise(x, model.shape.norm_eps)
    return apply_linear(last, model.weights.lm_head.to(device), None if bias is None else bias.to(device))


def project_heads(
    h: Tensor, layer: LayerWeights, shape: ModelShape, tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Project a normed stream h (m, width) to q (heads, m, d) and k, v (kv_heads, m, d).

    tables: cos and sin by which q and k are rotated; None: they are not.
    """
    q = _by_head(apply_linear(h, layer.wq, layer.bq), shape.heads)
    k = _by_head(apply_linear(h, layer.wk, layer.bk), shape.kv_heads)
    v = _by_head(apply_linear(h, layer.wv, layer.bv), shape.kv_heads)
    if tables is not None:
        q, k = rotate(q, *tables), rotate(k, *tables)
    q, k, v = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    return q, k, v


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Cut x (T, heads * d) into (T, heads, d)."""
    return x.reshape(len(x), heads, -1)


def _check_context(token_ids: Sequence[int], shape: ModelShape) -> None:
    if not token_ids:
        raise BadInput("the context is empty; it needs at least one token")
    if len(token_ids) > shape.max_positions:
        allowed = shape.max_positions
        raise BadInput(f"the context has {len(token_ids)} tokens, the model allows {allowed}; shorten it")
    if not 0 <= min(token_ids) <= max(token_ids) < shape.vocab:
        raise BadInput(f"the context holds token ids outside the model's vocabulary of {shape.vocab}")

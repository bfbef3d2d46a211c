"""Read a context once more for its residual stream: as it enters a layer, or for some of its tokens alone.

A token whose hidden state stops at a layer is in no key or value of the layers behind it, and no token there
attends to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcache.model.loading import Model
from mpcache.model.prefill import (
    Prefill,
    apply_linear,
    causal_attention,
    feed_forward,
    normalise,
    project_heads,
)
from mpcache.model.rope import rope_tables


def _model(known: Prefill) -> Model:
    if known.model is None:
        raise ValueError("a context that was not read by a model cannot be read again")
    return known.model


@torch.no_grad()
def stream_sizes(known: Prefill) -> tuple[Tensor, ...]:
    """Measure the stream's length at each token, per layer as it enters it: (T,) each. Once per context."""
    if "stream sizes" not in known.notes:
        sizes: list[Tensor] = []
        stream_at(known, len(known.k), sizes)
        known.notes["stream sizes"] = tuple(sizes)
    found: tuple[Tensor, ...] = known.notes["stream sizes"]
    return found


@torch.no_grad()
def stream_at(known: Prefill, layer: int, sizes: list[Tensor] | None = None) -> Tensor:
    """Return the residual stream (T, width) as it enters a layer. sizes: takes its lengths on the way."""
    model, device = _model(known), known.k[0].device
    length = len(known.token_ids)
    x = model.weights.embed[torch.tensor(known.token_ids)].to(device)
    if model.weights.positions is not None:
        x = x + model.weights.positions[:length].to(device)
    rows = torch.arange(length, device=device)
    x, _, _ = _read(model, x, rows, 0, layer, sizes)
    return x


@torch.no_grad()
def read_on(known: Prefill, x: Tensor, rows: Tensor, layer: int) -> tuple[list[Tensor], list[Tensor]]:
    """Let the tokens at `rows`, ascending, with their stream x alone go on from a layer: k, v per layer."""
    _, keys, values = _read(_model(known), x, rows, layer, len(known.k), None)
    return keys, values


def _read(
    model: Model, x: Tensor, rows: Tensor, first: int, last: int, sizes: list[Tensor] | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Run layers `first` to `last` on the stream x of tokens at `rows`."""
    shape = model.shape
    tables = rope_tables(shape, rows) if shape.positions == "rope" else None
    keys, values = [], []
    for stored in model.weights.layers[first:last]:
        layer = stored.to(x.device)
        if sizes is not None:
            sizes.append(x.norm(dim=-1))
        q, k, v = project_heads(normalise(x, shape.norm_eps), layer, shape, tables)
        x = x + apply_linear(causal_attention(q, k, v), layer.wo, layer.bo)
        x = x + feed_forward(normalise(x, shape.norm_eps), layer, shape)
        keys.append(k)
        values.append(v)
    return x, keys, values

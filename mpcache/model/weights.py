"""Hold a model's weights as the decode program uses them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpcache.model.shape import ModelShape


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer's matrices (inputs, outputs) and biases (outputs,): y = x @ W + b. None: no such term.

    wq: (width, heads * head_dim), scaled by 1/sqrt(head_dim); wk, wv: (width, kv_heads * head_dim);
    wo: (heads * head_dim, width); w_gate (only when gated), w_up: (width, ffn); w_down: (ffn, width).
    """

    wq: Tensor
    bq: Tensor | None
    wk: Tensor
    bk: Tensor | None
    wv: Tensor
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_up: Tensor
    b_up: Tensor | None
    w_down: Tensor
    b_down: Tensor | None

    def to(self, device: torch.device | str) -> LayerWeights:
        """Return the same weights on `device`."""
        fields = dataclasses.fields(self)
        return LayerWeights(*(_to(getattr(self, field.name), device) for field in fields))


@dataclass(frozen=True, eq=False)
class Weights:
    """Float32 weights with norms, scales and means folded in (`mpcache.model.folding`).

    embed: (vocab, width); positions: (max_positions, width), or None with rotary positions;
    lm_head: (width, vocab), its own matrix even where the checkpoint ties it to embed;
    lm_bias: (vocab,) or None.
    """

    embed: Tensor
    positions: Tensor | None
    layers: Sequence[LayerWeights]
    lm_head: Tensor
    lm_bias: Tensor | None

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor that is there with its name ("embed", "layer3/wq", ...), in program order."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                yield field.name, value
            elif isinstance(value, Sequence):
                for number, layer in enumerate(value):
                    for part in dataclasses.fields(layer):
                        tensor = getattr(layer, part.name)
                        if tensor is not None:
                            yield f"layer{number}/{part.name}", tensor

    @staticmethod
    def meta(shape: ModelShape) -> Weights:
        """Make tensors that have sizes and no values, for readings of the program that need no weights."""
        # Each layer gets tensors of its own: the one who keeps masks tells operands apart by identity.
        return Weights(
            embed=_empty(shape.vocab, shape.width),
            positions=_empty(shape.max_positions, shape.width, there=shape.positions == "learned"),
            layers=tuple(_meta_layer(shape) for _ in range(shape.layers)),
            lm_head=_empty(shape.width, shape.vocab),
            lm_bias=_empty(shape.vocab, there=shape.lm_bias),
        )


def _meta_layer(s: ModelShape) -> LayerWeights:
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    return LayerWeights(
        wq=_empty(s.width, q), bq=_empty(q, there=s.qkv_bias),
        wk=_empty(s.width, kv), bk=_empty(kv, there=s.qkv_bias),
        wv=_empty(s.width, kv), bv=_empty(kv, there=s.qkv_bias),
        wo=_empty(q, s.width), bo=_empty(s.width, there=s.o_bias),
        w_gate=_empty(s.width, s.ffn, there=s.gated),
        b_gate=_empty(s.ffn, there=s.gated and s.mlp_bias),
        w_up=_empty(s.width, s.ffn), b_up=_empty(s.ffn, there=s.mlp_bias),
        w_down=_empty(s.ffn, s.width), b_down=_empty(s.width, there=s.mlp_bias),
    )  # fmt: skip


# Any, because whether a tensor is there is known only where the field is.
def _empty(*size: int, there: bool = True) -> Any:
    return torch.empty(size, device="meta") if there else None


def _to(tensor: Tensor | None, device: torch.device | str) -> Any:
    return None if tensor is None else tensor.to(device)

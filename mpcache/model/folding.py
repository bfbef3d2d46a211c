"""Fold norms, scales and means into a checkpoint's matrices.

Weights come out as the decode program uses them, with all that can be folded into a matrix folded in,
here, in plaintext, by the party that owns them:

* a norm's gain g and bias b go into the matrices that read the norm, (x*g + b) @ W =
  x @ (g*W) + b @ W, so a norm has no weights of its own;
* 1/sqrt(head_dim) goes into the query projection, so attention scores come out scaled;
* where the norm is LayerNorm, everything that writes to the residual stream is centred. Only norms
  read that stream and they ignore its mean, so it can be zero from the start; then LayerNorm *is*
  RMSNorm, and every family runs one norm: x / sqrt(mean(x^2) + eps).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpcache.model.families import Family
from mpcache.model.shape import ModelShape
from mpcache.model.tensor_files import Tensors
from mpcache.model.weights import LayerWeights, Weights

_Pair = tuple[Tensor, Tensor | None]  # a matrix and its bias, or a norm's gain and its bias


def read_folded(tensors: Tensors, family: Family, shape: ModelShape, tied: bool) -> Weights:
    """Read all weights of a checkpoint and fold them. Raises ModelError.

    tied: head and embedding are one matrix, if no more than one is stored; two that are stored stay two.
    A checkpoint's digest depends on the order of the reads.
    """
    reader = _FoldingReader(tensors, family, shape)
    embedding, output = f"{family.embed}.weight", f"{family.head}.weight"
    if tied and embedding not in tensors and output in tensors:
        embedding = output
    embed = tensors.read(embedding, shape.vocab, shape.width)
    positions = None
    if family.positions:
        positions = tensors.read(f"{family.positions}.weight", shape.max_positions, shape.width)
    layers = tuple(reader.layer(number) for number in range(shape.layers))
    alone = embedding == output or (tied and output not in tensors)
    head = embed if alone else tensors.read(output, shape.vocab, shape.width)
    lm_head, lm_bias = _fold((head.T, None), reader.norm(family.norms[2]))
    return Weights(
        reader.centre(embed),
        None if positions is None else reader.centre(positions),
        layers,
        lm_head,
        lm_bias,
    )


class _FoldingReader:
    def __init__(self, tensors: Tensors, family: Family, shape: ModelShape) -> None:
        self._tensors, self._family, self._shape = tensors, family, shape
        self._layer_norm = shape.norm == "layer"

    def norm(self, name: str) -> _Pair:
        """Read a norm's gain and bias, each (width,)."""
        width = self._shape.width
        gain = self._tensors.read(f"{name}.weight", width)
        return gain, self._tensors.read(f"{name}.bias", width) if self._layer_norm else None

    def centre(self, x: Tensor) -> Tensor:
        """Take the mean off what writes to the residual stream, where the model's norm ignores it."""
        return x - x.mean(-1, keepdim=True) if self._layer_norm else x

    def layer(self, number: int) -> LayerWeights:
        """Read and fold one layer."""
        s = self._shape
        q_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim

        def get(key: str, inputs: int, outputs: int, bias: bool) -> _Pair:
            return self._linear(key, number, inputs, outputs, bias)

        before_attention, before_mlp = (self.norm(name.format(number)) for name in self._family.norms[:2])
        wq, bq = _fold(get("q", s.width, q_width, s.qkv_bias), before_attention)
        wk, bk = _fold(get("k", s.width, kv_width, s.qkv_bias), before_attention)
        wv, bv = _fold(get("v", s.width, kv_width, s.qkv_bias), before_attention)
        wo, bo = get("o", q_width, s.width, s.o_bias)
        w_gate, b_gate = None, None
        if s.gated:
            w_gate, b_gate = _fold(get("gate", s.width, s.ffn, s.mlp_bias), before_mlp)
        w_up, b_up = _fold(get("up", s.width, s.ffn, s.mlp_bias), before_mlp)
        w_down, b_down = get("down", s.ffn, s.width, s.mlp_bias)
        scale, centre = s.head_dim**-0.5, self.centre
        return LayerWeights(
            wq=wq * scale, bq=None if bq is None else bq * scale,
            wk=wk, bk=bk, wv=wv, bv=bv,
            wo=centre(wo), bo=None if bo is None else centre(bo),
            w_gate=w_gate, b_gate=b_gate, w_up=w_up, b_up=b_up,
            w_down=centre(w_down), b_down=None if b_down is None else centre(b_down),
        )  # fmt: skip

    def _linear(self, key: str, number: int, inputs: int, outputs: int, bias: bool) -> _Pair:
        place = self._family.linears[key]
        name, total = place.name.format(number), outputs * place.of
        if self._family.inputs_first:
            w = self._tensors.read(f"{name}.weight", inputs, total)
        else:
            w = self._tensors.read(f"{name}.weight", total, inputs).T
        b = self._tensors.read(f"{name}.bias", total) if bias else None
        mine: slice | Tensor = slice(place.index * outputs, (place.index + 1) * outputs)
        if self._family.pairs and key in "qk":
            mine = _halves_of_pairs(outputs, self._shape.head_dim)
        return w[:, mine].contiguous(), None if b is None else b[mine].contiguous()


def _halves_of_pairs(outputs: int, head_dim: int) -> Tensor:
    """Return where each output stands: dimensions 2i and 2i + 1 of a head become i and i + head_dim/2."""
    return torch.arange(outputs).view(-1, head_dim // 2, 2).transpose(1, 2).flatten()


def _fold(read: _Pair, gains: _Pair) -> _Pair:
    (w, b), (gain, shift) = read, gains
    if shift is not None:
        b = shift @ w if b is None else b + shift @ w
    return (gain[:, None] * w).contiguous(), b

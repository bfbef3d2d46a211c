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

from collections.abc import Sequence
from typing import overload

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
    reader = _FoldingReader(tensors, family, shape, tied)
    embed, positions = reader.embedding(), reader.positions()
    layers = tuple(reader.layer(number) for number in range(shape.layers))
    lm_head, lm_bias = reader.head(embed)
    return Weights(reader.centre(embed), positions, layers, lm_head, lm_bias)


def read_and_drop(tensors: Tensors, family: Family, shape: ModelShape, tied: bool) -> None:
    """Read and fold all that `read_folded` does, in its order, and keep nothing. Raises ModelError."""
    reader = _FoldingReader(tensors, family, shape, tied)
    embed, _ = reader.embedding(), reader.positions()
    for number in range(shape.layers):
        reader.layer(number)
    reader.head(embed)


class StoredWeights(Weights):
    """Weights that stay in their file: each is read, and folded, whenever it is asked for.

    So a pass over the layers takes the memory of one. Raises ModelError where a file has changed.
    """

    def __init__(self, tensors: Tensors, family: Family, shape: ModelShape, tied: bool) -> None:
        self._reader = _FoldingReader(tensors, family, shape, tied)
        self._layers = _StoredLayers(self._reader, shape.layers)

    @property
    def embed(self) -> Tensor:
        return self._reader.centre(self._reader.embedding())

    @property
    def positions(self) -> Tensor | None:
        return self._reader.positions()

    @property
    def layers(self) -> Sequence[LayerWeights]:
        return self._layers

    @property
    def lm_head(self) -> Tensor:
        return self._reader.head()[0]

    @property
    def lm_bias(self) -> Tensor | None:
        return self._reader.head()[1] if self._reader.layer_norm else None


class _StoredLayers(Sequence[LayerWeights]):
    def __init__(self, reader: _FoldingReader, count: int) -> None:
        self._reader, self._count = reader, count

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, at: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        numbers = range(self._count)[at]
        return self._reader.layer(numbers) if isinstance(numbers, int) else [self[i] for i in numbers]


class _FoldingReader:
    def __init__(self, tensors: Tensors, family: Family, shape: ModelShape, tied: bool) -> None:
        self._tensors, self._family, self._shape = tensors, family, shape
        self.layer_norm = shape.norm == "layer"
        self._embedding, self._output = f"{family.embed}.weight", f"{family.head}.weight"
        if tied and self._embedding not in tensors and self._output in tensors:
            self._embedding = self._output
        self._one = self._embedding == self._output or (tied and self._output not in tensors)

    def embedding(self) -> Tensor:
        """Read the embedding (vocab, width), not centred."""
        return self._tensors.read(self._embedding, self._shape.vocab, self._shape.width)

    def positions(self) -> Tensor | None:
        """Read learned positions (max_positions, width)."""
        if not self._family.positions:
            return None
        name, shape = f"{self._family.positions}.weight", self._shape
        return self.centre(self._tensors.read(name, shape.max_positions, shape.width))

    def head(self, embed: Tensor | None = None) -> _Pair:
        """Read and fold the output matrix (width, vocab) and its bias; embed: as it was read, if it was."""
        if not self._one:
            embed = self._tensors.read(self._output, self._shape.vocab, self._shape.width)
        elif embed is None:
            embed = self.embedding()
        return _fold((embed.T, None), self.norm(self._family.norms[2]))

    def norm(self, name: str) -> _Pair:
        """Read a norm's gain and bias, each (width,)."""
        width = self._shape.width
        gain = self._tensors.read(f"{name}.weight", width)
        return gain, self._tensors.read(f"{name}.bias", width) if self.layer_norm else None

    def centre(self, x: Tensor) -> Tensor:
        """Take the mean off what writes to the residual stream, where the model's norm ignores it."""
        return x - x.mean(-1, keepdim=True) if self.layer_norm else x

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
    folded = torch.empty(w.shape)  # laid out by rows at once, whatever w is
    return torch.mul(gain[:, None], w, out=folded), b

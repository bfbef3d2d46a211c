"""Read what a GGUF file says of its model: the shape, and how its tensors are named.

A row of ARCHITECTURES is to general.architecture what a row of FAMILIES in families.py is to a config.json.
Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, each below the architecture's name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpcache.errors import ModelError
from mpcache.model.checks import first_words, shorten
from mpcache.model.families import ConfigValues, Family, StoredLinear
from mpcache.model.gguf_header import GgufHeader, read_gguf_header
from mpcache.model.gguf_tensors import GgufTensors
from mpcache.model.gguf_tokenizer import build_tokenizer, end_tokens, special_token, vocabulary_of
from mpcache.model.rope import frequencies
from mpcache.model.shape import ModelShape, RopeScaling
from mpcache.model.tokenizer import Tokenizer

_ROPE_FACTORS = "rope_freqs.weight"  # how many times slower each pair turns: (head_dim / 2,)
_LLAMA3 = (1.0, 4.0, 8192)  # low, high, original: of all models that were published with such factors


class GgufModel:
    """A .gguf file: what is public about it at once, its tensors when they are asked for."""

    def __init__(self, file: Path) -> None:
        """Read the header. Raises ModelError."""
        self._header = read_gguf_header(file)
        self._values = ConfigValues(self._header.metadata, str(file))
        self.family = _family_of(self._values)
        kinds = sorted({each.kind.name for each in self._header.tensors.values()})
        self.about = f"{self.family.model_type}, GGUF of {', '.join(kinds)}"
        _check_keys(self._values, self.family.model_type)
        try:
            self.shape = _with_tensors(self.family.read(self._values), self._header)
        except ValueError as error:
            raise ModelError(f"{file}: {first_words(error)}") from error
        self.tied = self.family.tied

    @property
    def digested(self) -> bytes:
        """What the model's digest begins with."""
        return json.dumps({"gguf": self.family.model_type, **self.shape.to_dict()}).encode()

    def tokenizer(self) -> Tokenizer:
        """Make the tokenizer of the metadata. Raises ModelError."""
        return build_tokenizer(self._values, self.shape)

    def tensors(self, digest: Callable[[Any], None]) -> GgufTensors:
        """Open the weights. Raises ModelError."""
        return GgufTensors(self._header, digest, read_before=(_ROPE_FACTORS,))


def _family_of(values: ConfigValues) -> Family:
    name = values.need("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelError(
            f"{values.source}: architecture {shorten(name)} is not supported; supported as .gguf: {known}"
        )
    return ARCHITECTURES[name]


# Keys below the architecture's name that are read, and those that change nothing that is computed here.
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.sliding_window",
    "attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base",
    "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear",
    "rope.scaling.original_context_length", "rope.scaling.finetuned", "vocab_size", "tensor_data_layout",
    "attention.causal", "expert_count", "expert_used_count", "use_parallel_residual",
}  # fmt: skip
# The one value that a key may have, where another would change what is computed.
_FIXED = {"attention.causal": True, "expert_count": 0, "use_parallel_residual": True}


def _check_keys(values: ConfigValues, architecture: str) -> None:
    """Refuse what would compute something else. Raises ModelError."""
    prefix = f"{architecture}."
    for key, value in values.values.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        if name not in _READ:
            raise ModelError(f"{values.source}: {shorten(key)} is not supported")
        if name in _FIXED and value != _FIXED[name]:
            raise ModelError(f"{values.source}: {key} {shorten(value)} is not supported")


# ------------------------------------------------------------------------------------- readers


def _read_llama(values: ConfigValues) -> ModelShape:
    """Read a Llama relative, but for its biases and what a tensor says of its positions."""
    a = values.need("general.architecture")
    width, heads = values.whole(f"{a}.embedding_length"), values.whole(f"{a}.attention.head_count")
    if values.get(f"{a}.attention.key_length") is None and width % heads:
        raise ModelError(f"{values.source}: {heads} heads must divide {a}.embedding_length {width}")
    head_dim = values.whole(f"{a}.attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if values.whole(f"{a}.{key}", head_dim) != head_dim:
            raise ModelError(f"{values.source}: {a}.{key} other than the head's {head_dim} is not supported")
    context = values.whole(f"{a}.context_length")
    vocab = len(vocabulary_of(values))
    return ModelShape(
        layers=values.whole(f"{a}.block_count"),
        width=width,
        heads=heads,
        kv_heads=values.whole(f"{a}.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=values.whole(f"{a}.feed_forward_length"),
        vocab=vocab,
        max_positions=min(context, values.whole(f"{a}.attention.sliding_window", context)),
        norm="rms",
        norm_eps=values.number(f"{a}.attention.layer_norm_rms_epsilon"),
        activation="silu",
        gated=True,
        positions="rope",
        rope_theta=values.number(f"{a}.rope.freq_base", 10000.0),
        rope_scaling=_read_scaling(values, a),
        bos_id=special_token(values, "bos"),
        eos_ids=end_tokens(values),
    )


def _read_scaling(values: ConfigValues, a: str) -> RopeScaling | None:
    key = f"{a}.rope.scaling.type"
    kind, factor = values.get(key, "linear"), f"{a}.rope.scaling.factor"
    if kind not in ("none", "linear"):
        raise ModelError(f"{values.source}: {key} {shorten(kind)} is not supported; supported: none, linear")
    factor = factor if values.get(factor) is not None else f"{a}.rope.scale_linear"
    if kind == "none" or values.get(factor, 0) in (0, 1):
        return None
    return RopeScaling("linear", values.number(factor))


def _read_gpt2(values: ConfigValues) -> ModelShape:
    width, heads = values.whole("gpt2.embedding_length"), values.whole("gpt2.attention.head_count")
    if width % heads:
        raise ModelError(f"{values.source}: {heads} heads do not divide gpt2.embedding_length {width}")
    return ModelShape(
        layers=values.whole("gpt2.block_count"),
        width=width,
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        ffn=values.whole("gpt2.feed_forward_length"),
        vocab=len(vocabulary_of(values)),
        max_positions=values.whole("gpt2.context_length"),
        norm="layer",
        norm_eps=values.number("gpt2.attention.layer_norm_epsilon"),
        activation="gelu_tanh",
        gated=False,
        positions="learned",
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        lm_bias=True,
        bos_id=special_token(values, "bos"),
        eos_ids=end_tokens(values),
    )


def _with_tensors(shape: ModelShape, header: GgufHeader) -> ModelShape:
    """Add what only the tensors say: which linears have biases, how positions are stretched."""
    if shape.positions == "learned":
        return shape
    qkv_bias, o_bias, mlp_bias = (
        f"blk.0.{name}.bias" in header.tensors for name in ("attn_q", "attn_output", "ffn_up")
    )
    shape = dataclasses.replace(shape, qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias)
    if _ROPE_FACTORS not in header.tensors:
        return shape
    factors = GgufTensors(header, lambda data: None).read(_ROPE_FACTORS, shape.head_dim // 2)
    if (factors == 1).all():
        return shape
    scaled = dataclasses.replace(shape, rope_scaling=RopeScaling("llama3", float(factors.max()), *_LLAMA3))
    want = frequencies(shape) / frequencies(scaled)
    if shape.rope_scaling is not None or not torch.allclose(factors.double(), want, rtol=1e-3):
        raise ModelError(
            f"{header.file}: {_ROPE_FACTORS} scales positions in a way that is not supported; supported: "
            "that of Llama 3.1 and 3.2"
        )
    return scaled


# ----------------------------------------------------------------------------------- the table


_LLAMA = Family(
    model_type="llama",
    read=_read_llama,
    prefix="",
    inputs_first=False,
    tied=True,
    embed="token_embd",
    head="output",
    norms=("blk.{}.attn_norm", "blk.{}.ffn_norm", "output_norm"),
    linears={
        "q": StoredLinear("blk.{}.attn_q"),
        "k": StoredLinear("blk.{}.attn_k"),
        "v": StoredLinear("blk.{}.attn_v"),
        "o": StoredLinear("blk.{}.attn_output"),
        "gate": StoredLinear("blk.{}.ffn_gate"),
        "up": StoredLinear("blk.{}.ffn_up"),
        "down": StoredLinear("blk.{}.ffn_down"),
    },
    pairs=True,
)
ARCHITECTURES: Mapping[str, Family] = {
    "llama": _LLAMA,  # Mistral and SmolLM2, too
    "qwen2": dataclasses.replace(_LLAMA, model_type="qwen2", pairs=False),
    "gpt2": dataclasses.replace(
        _LLAMA,
        model_type="gpt2",
        read=_read_gpt2,
        linears={
            "q": StoredLinear("blk.{}.attn_qkv", 0, 3),
            "k": StoredLinear("blk.{}.attn_qkv", 1, 3),
            "v": StoredLinear("blk.{}.attn_qkv", 2, 3),
            "o": StoredLinear("blk.{}.attn_output"),
            "up": StoredLinear("blk.{}.ffn_up"),
            "down": StoredLinear("blk.{}.ffn_down"),
        },
        positions="position_embd",
        pairs=False,
    ),
}

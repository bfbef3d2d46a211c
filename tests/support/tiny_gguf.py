"""Small random models as .gguf files, written by the `gguf` package as llama.cpp's converter does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import tokenizers
import torch
from gguf.quants import dequantize, quantize
from transformers import PreTrainedModel

from tests.support.tiny_models import tokenizer

Type = gguf.GGMLQuantizationType
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6
K_QUANTS = (Type.Q4_K, Type.Q5_K, Type.Q6_K)
_SCALES = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}  # where a block's float16 numbers lie
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}


def write_gguf(
    model: PreTrainedModel,
    file: Path,
    kind: gguf.GGMLQuantizationType = Type.F32,
    changed: Mapping[str, Any] | None = None,
    **more: Any,
) -> Path:
    """Write the model, its matrices as `kind`, and make its own weights what the file says of them.

    changed, more: metadata in place of the model's own, or beside it; __ in a name stands for a point.
    """
    config: Any = model.config
    name = _ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, name)
    _describe(writer, config, name)
    add_vocabulary(writer, tokenizer(), config.vocab_size)
    writer.add_token_types([CONTROL if i in (1, 2) else NORMAL for i in range(config.vocab_size)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    given = {key.replace("__", "."): value for key, value in more.items()} | dict(changed or {})
    for key, value in given.items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, _kind_of(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name.upper()], config.num_hidden_layers)
    for stored, parameter in _tensors(model).items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": _kv_heads(config)}
        turned = next((n for part, n in heads.items() if part in stored and name == "llama"), 0)
        transposed = name == "gpt2" and stored.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))
        values = parameter.detach().T if transposed else parameter.detach()
        if turned:
            values = as_pairs(values, turned)
        raw = _stored(values, kind if values.dim() == 2 and "wpe" not in stored else Type.F32)
        label = names.get_name(stored, try_suffixes=(".weight", ".bias"))
        assert label is not None, stored
        writer.add_tensor(label, raw[0], raw_dtype=raw[1])
        back = torch.from_numpy(np.array(dequantize(raw[0], raw[1]))).reshape(values.shape)
        back = as_halves(back, turned) if turned else back
        with torch.no_grad():
            parameter.copy_(back.T if transposed else back)
    if getattr(config, "rope_parameters", {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_factors(config))
    save(writer)
    return file


def save(writer: gguf.GGUFWriter) -> None:
    """Write all that was added, and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_pairs(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Put the two dimensions of a head that turn together side by side."""
    return x.reshape(heads, 2, -1, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def as_halves(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Invert `as_pairs`."""
    return x.reshape(heads, -1, 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


def add_vocabulary(writer: gguf.GGUFWriter, inner: tokenizers.Tokenizer, size: int) -> None:
    """Add a byte-level BPE tokenizer, its vocabulary filled up to `size`."""
    model = json.loads(inner.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda pair: pair[1])]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])


def rope_factors(config: Any) -> np.ndarray[Any, Any]:
    """Compute how many times slower each pair turns with Llama 3.1's scaling, as its paper's code does."""
    given: Mapping[str, float] = config.rope_parameters
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    factors = []
    for i in range(0, d, 2):
        length = 2 * np.pi * given["rope_theta"] ** (i / d)
        turns = given["original_max_position_embeddings"] / length
        low, high = given["low_freq_factor"], given["high_freq_factor"]
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / (smooth + (1 - smooth) / given["factor"]))
    return np.array(factors, np.float32)


def _describe(writer: gguf.GGUFWriter, config: Any, name: str) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if name == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "head_dim", None) is not None:
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if getattr(config, "sliding_window", None) is not None:
        writer.add_sliding_window(config.sliding_window)


def _kv_heads(config: Any) -> int:
    return int(getattr(config, "num_key_value_heads", config.num_attention_heads))


def _tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return the parameters by name, each once: a tied head is the embedding."""
    return dict(model.named_parameters())


def _stored(values: torch.Tensor, kind: gguf.GGMLQuantizationType) -> tuple[np.ndarray[Any, Any], Any]:
    """Return a tensor's bytes, and what they are; random ones of a kind that nobody here can make."""
    floats = np.ascontiguousarray(values.numpy(), np.float32)
    if kind not in K_QUANTS:
        return quantize(floats, kind), kind
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(floats.size).integers(
        0, 256, (floats.size // block, block_bytes), dtype=np.uint8
    )
    for place in _SCALES[kind]:
        blocks[:, place : place + 2] = np.full(len(blocks), 2e-4, np.float16).view(np.uint8).reshape(-1, 2)
    return blocks.reshape(*floats.shape[:-1], -1), kind


def _kind_of(value: Any) -> gguf.GGUFValueType:
    if isinstance(value, int) and value >= 1 << 31:
        return gguf.GGUFValueType.UINT64
    if isinstance(value, Sequence) and not isinstance(value, str):
        return gguf.GGUFValueType.ARRAY
    return gguf.GGUFValueType.get_type(value)

"""Damaged .gguf files: their bytes, and their metadata with values replaced."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig, LlamaForCausalLM

from mpcache.model import load_model
from mpcache.model.gguf_header import read_gguf_header
from mpcache.model.gguf_tokenizer import CUTTINGS
from tests.support.tiny_gguf import write_gguf

TOKENS = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopq", "ab", "abc", "\u2581", "\u2581a", "<0x41>"]


def gguf_files(folder: Path, bytes_of: Any, json_of: Any) -> None:
    """Add the targets; a whole model is read in each case. folder: theirs to write to."""
    place = folder / "gguf"
    place.mkdir()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS), hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        )
    )  # fmt: skip
    vocabulary = {
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * (len(TOKENS) - 4), 6],
        "tokenizer.ggml.scores": [-float(i) for i in range(len(TOKENS))],
        "tokenizer.ggml.merges": ["a b", "ab c"],
        "tokenizer.chat_template": "{{ messages }}",
    }
    whole = write_gguf(model, place / "whole.gguf", changed=vocabulary).read_bytes()
    file = place / "damaged.gguf"

    def read(data: bytes) -> None:
        file.write_bytes(data)
        speak(load_model(file).tokenizer)

    bytes_of("gguf", 5, read, [whole])

    header = read_gguf_header(place / "whole.gguf")
    first = min(each.start for each in header.tensors.values())
    tensors = b"".join(
        _text(each.name)
        + struct.pack(f"<I{len(each.size)}Q", len(each.size), *each.size[::-1])
        + struct.pack("<IQ", each.kind, each.start - first)
        for each in header.tensors.values()
    )
    metadata = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in header.metadata.items()}
    other = metadata | {"tokenizer.ggml.model": "llama"}
    cut = [metadata | {"tokenizer.ggml.pre": pre} for pre in CUTTINGS]

    def described(data: bytes) -> None:
        try:
            values = json.loads(data)
        except (ValueError, RecursionError):
            return  # the case itself is none
        pairs = values.items() if isinstance(values, dict) else ()
        keys = b"".join(_text(key) + _value(value) for key, value in pairs)
        start = b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), len(pairs)) + keys + tensors
        read(start + bytes(-len(start) % 32) + whole[first:])

    json_of("gguf metadata", 5, described, [metadata, other, *cut])


def speak(tokenizer: Any) -> None:
    """Do what a party does with a tokenizer."""
    ids = tokenizer.encode("abc <s> ab 漢 A", bos=True)
    tokenizer.decode([*ids, 0, 5])


def _text(words: str) -> bytes:
    data = words.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """Encode a JSON value as the type that fits; what fits none is an array of arrays."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    if isinstance(value, int) and 0 <= value < 1 << 64:
        return struct.pack("<IQ", 10, value)
    if isinstance(value, int) and -(1 << 63) <= value < 0:
        return struct.pack("<Iq", 11, value)
    if isinstance(value, int | float):
        return struct.pack("<Id", 12, float(value))
    items = value if isinstance(value, list) else []
    if items and all(isinstance(item, str) for item in items):
        return struct.pack("<IIQ", 9, 8, len(items)) + b"".join(map(_text, items))
    if items and all(type(item) is int and abs(item) < 1 << 31 for item in items):
        return struct.pack("<IIQ", 9, 5, len(items)) + np.array(items, "<i4").tobytes()
    if items and all(isinstance(item, int | float) for item in items):
        return struct.pack("<IIQ", 9, 6, len(items)) + np.array(items, "<f4").tobytes()
    return struct.pack("<IIQ", 9, 9, 0)

"""Small random models in Hugging Face folders, made by `transformers`, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 300

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, {}),
    "llama-one-kv-head": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 1, "rope_theta": 5e5}),
    "llama-head-dim": (LlamaForCausalLM, LlamaConfig, {"head_dim": 24, "num_key_value_heads": 4}),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama-llama3": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": _LLAMA3}),
    "llama-linear": (LlamaForCausalLM, LlamaConfig, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}}),
    "llama-biases": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-gelu": (LlamaForCausalLM, LlamaConfig, {"hidden_act": "gelu"}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 50}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 60, "n_head": 4, "n_layer": 3, "n_positions": 128, "n_inner": 100},
    ),
    "gpt2-gelu": (
        GPT2LMHeadModel,
        GPT2Config,
        {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 64, "activation_function": "gelu"},
    ),
}


def make(kind: str) -> PreTrainedModel:
    """A model of this kind, every parameter random, gains and biases too, and far from zero."""
    torch.manual_seed(sum(map(ord, kind)))
    model_class, config_class, changes = KINDS[kind]
    sizes = (
        {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2} if config_class is GPT2Config else _SIZES
    )
    model: PreTrainedModel = model_class(config_class(**(sizes | changes))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def save(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """Saves the model and a byte-level tokenizer.json into `folder`."""
    model.save_pretrained(folder, **options)
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def tokenizer() -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of at most VOCAB tokens that can spell any text, and begins it with BOS."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the gate of the city", "and the number of the gate is"], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made

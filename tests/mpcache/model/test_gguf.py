"""A .gguf file means what `transformers` makes of the same weights, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mpcache.model import load_model
from mpcache.model.prefill import prefill
from tests.support.tiny_gguf import K_QUANTS, Type, write_gguf
from tests.support.tiny_models import make

IDS = [1, *range(5, 64)]


def same(model: PreTrainedModel, file: Path) -> None:
    with torch.no_grad():
        hf: Any = model
        want = hf(torch.tensor([IDS]), return_dict=True).logits[0]
    got = prefill(load_model(file), IDS, all_logits=True).logits
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    "kind",
    ["llama-gqa", "llama-one-kv-head", "llama-head-dim", "llama-tied", "llama-linear", "llama-biases",
     "mistral", "qwen2", "gpt2"],
)  # fmt: skip
def test_every_architecture_gives_the_logits_of_transformers(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    same(model, write_gguf(model, tmp_path / "model.gguf"))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1])
def test_every_type_that_can_be_made_here_gives_the_logits_of_its_numbers(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    config: Any = make("llama-gqa").config
    config.intermediate_size = 96  # rows of whole blocks
    torch.manual_seed(int(kind))
    model = LlamaForCausalLM(config)
    same(model, write_gguf(model, tmp_path / "model.gguf", kind))


@pytest.mark.parametrize("kind", K_QUANTS)
def test_blocks_of_256_give_the_logits_of_their_numbers(
    kind: gguf.GGMLQuantizationType, tmp_path: Path
) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4
        )
    )
    same(model, write_gguf(model, tmp_path / "model.gguf", kind))

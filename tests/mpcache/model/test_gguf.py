"""A .gguf file means what `transformers` makes of the same weights, or is refused in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from mpcache.errors import ModelError
from mpcache.model import RopeScaling, load_model, load_shape, load_tokenizer
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


# ------------------------------------------------------------------------------------- metadata


def scaled(changes: dict[str, Any]) -> PreTrainedModel:
    """A Llama of long heads, whose rotary positions are stretched as Llama 3.1's are."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192} | changes
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=16384, rope_parameters=rope | {"rope_theta": 5e5},
        )
    )  # fmt: skip


def test_positions_are_stretched_as_llama_3_does_or_refused(tmp_path: Path) -> None:
    model = scaled({})
    file = write_gguf(model, tmp_path / "model.gguf")
    assert load_shape(file).rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    same(model, file)
    with pytest.raises(ModelError, match=r"rope_freqs.weight scales positions in a way .* Llama 3.1 and 3.2"):
        load_shape(write_gguf(scaled({"high_freq_factor": 2.0}), tmp_path / "other.gguf"))


def test_a_sliding_window_limits_the_context(tmp_path: Path) -> None:
    assert load_shape(write_gguf(make("mistral-window"), tmp_path / "model.gguf")).max_positions == 50


def test_every_end_token_ends_an_answer(tmp_path: Path) -> None:
    file = write_gguf(make("llama-gqa"), tmp_path / "model.gguf", tokenizer__ggml__eot_token_id=7)
    assert load_shape(file).eos_ids == (2, 7)


def test_the_chat_template_comes_along(tmp_path: Path) -> None:
    model, template = make("llama-gqa"), "{% for message in messages %}{{ message.content }}{% endfor %}"
    file = write_gguf(model, tmp_path / "model.gguf", tokenizer__chat_template=template)
    found = load_tokenizer(file).chat_template
    assert found is not None and found.source == template
    assert load_tokenizer(write_gguf(model, tmp_path / "none.gguf")).chat_template is None


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    model: Any = make("llama-gqa")
    first = load_model(write_gguf(model, tmp_path / "a.gguf", general__description="one")).digest
    assert load_model(write_gguf(model, tmp_path / "b.gguf")).digest == first
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    assert load_model(write_gguf(model, tmp_path / "c.gguf")).digest != first


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama.logit_scale": 0.5}, "'llama.logit_scale' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not supported; supported: none, linear"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count other than the head's 16"),
        ({"llama.block_count": 0}, "llama.block_count must be a whole number above zero, not 0"),
        ({"llama.block_count": 2}, "holds tensor 'blk.2.attn_k.weight', which a model of this architecture"),
        ({"llama.block_count": 4}, "tensor blk.3.attn_norm.weight is missing"),
        ({"llama.embedding_length": 32}, "is (300, 64), its metadata make it (300, 32)"),
        ({"llama.context_length": 1 << 40}, "max_positions is 1099511627776; at most"),
        (
            {"general.architecture": "qwen3"},
            "'qwen3' is not supported; supported as .gguf: llama, qwen2, gpt2",
        ),
        (
            {"tokenizer.ggml.model": "t5"},
            "tokenizer.ggml.model 't5' is not supported; supported: gpt2, llama",
        ),
        ({"tokenizer.ggml.pre": "falcon"}, "tokenizer.ggml.pre 'falcon' is not supported; supported: gpt-2"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "holds 'a b c', not two parts of a token"),
        ({"tokenizer.ggml.merges": ["qq zz"]}, "no tokenizer can be made of its metadata"),
        ({"tokenizer.ggml.tokens": ["a"] * 300}, "holds a token twice"),
        ({"tokenizer.ggml.tokens": 7}, "must be a list of texts, not 7"),
        ({"tokenizer.ggml.token_type": [3]}, "must hold a number for each of 300 tokens"),
        ({"tokenizer.ggml.bos_token_id": "one"}, "tokenizer.ggml.bos_token_id must be one token id"),
    ],
)
def test_what_is_not_supported_is_named_in_one_line(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    file = write_gguf(make("llama-gqa"), tmp_path / "model.gguf", changed=changes)
    with pytest.raises(ModelError) as error:
        load_model(file)
    text = str(error.value)
    assert str(file) in text and says in text and "\n" not in text and len(text) < 600


def test_a_type_that_is_not_read_is_named_with_those_that_are(tmp_path: Path) -> None:
    file = write_gguf(make("llama-gqa"), tmp_path / "model.gguf")
    data = bytearray(file.read_bytes())
    place = data.index(b"blk.0.attn_norm.weight") + len("blk.0.attn_norm.weight") + 4 + 8
    data[place : place + 4] = int(Type.I32).to_bytes(4, "little")
    file.write_bytes(data)
    with pytest.raises(ModelError, match="tensor blk.0.attn_norm.weight is I32; supported: F32, F16, BF16"):
        load_model(file)


# ---------------------------------------------------------------------------------- hostile files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(make("llama-one-kv-head"), tmp_path_factory.mktemp("whole") / "model.gguf").read_bytes()


def u64(value: int) -> bytes:
    return value.to_bytes(8, "little")


def text(words: str) -> bytes:
    return u64(len(words)) + words.encode()


HEAD = b"GGUF" + (3).to_bytes(4, "little")
NAMED = text("a.b") + (8).to_bytes(4, "little")  # the key of a text
LISTED = text("a.b") + (9).to_bytes(4, "little")  # the key of an array


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read|is no GGUF file"),
        (b"GGML" + bytes(60), "is no GGUF file"),
        (b"GGUF", "header ends"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9 is not supported; supported: 2 and 3"),
        (HEAD + u64(1 << 60) + u64(1), "counts 1152921504606846976 tensors"),
        (HEAD + u64(0) + u64(1 << 60), "counts 1152921504606846976 keys"),
        (HEAD + u64(0) + u64(1) + u64(1 << 60) + b"key", "ends within a value of 1152921504606846976 bytes"),
        (HEAD + u64(0) + u64(1) + NAMED + u64(1 << 60), "ends within a value of 1152921504606846976 bytes"),
        (HEAD + u64(0) + u64(1) + LISTED + (8).to_bytes(4, "little") + u64(1 << 60), "items of an array"),
        (HEAD + u64(0) + u64(1) + LISTED + (10).to_bytes(4, "little") + u64(1 << 22), "ends within a value"),
        (HEAD + u64(0) + u64(1) + LISTED + (9).to_bytes(4, "little") + u64(1), "an array of arrays"),
        (HEAD + u64(0) + u64(1) + text("a") + (77).to_bytes(4, "little"), "of type 77, which is none"),
        (HEAD + u64(0) + u64(2) + (NAMED + text("x")) * 2, "key 'a.b' is there twice"),
        (HEAD + u64(0) + u64(1) + NAMED + u64(2) + b"\xff\xfe", "is not UTF-8"),
        (HEAD + u64(1) + u64(0) + text("t") + (9).to_bytes(4, "little"), "tensor 't' has 9 dimensions"),
    ],
)
def test_a_hostile_header_is_one_line_and_costs_nothing(content: bytes, says: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=says) as error:
        load_model(file)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "change", "says"),
    [
        (0, u64(1 << 40), "has size .*, which F32 cannot have|beyond the end of the file"),
        (0, u64(0), "has size"),
        (8, (99).to_bytes(4, "little"), "is of type 99, which is none"),
        (12, u64(1 << 60), "lies beyond the end of the file"),
        (12, u64(7), "lies beyond the end of the file"),
    ],
)
def test_a_hostile_tensor_is_one_line(
    whole: bytes, place: int, change: bytes, says: str, tmp_path: Path
) -> None:
    """Its length, type and offset stand behind its name and its number of dimensions."""
    data, name = bytearray(whole), b"output_norm.weight"
    start = data.index(name) + len(name) + 4 + place
    data[start : start + len(change)] = change
    (tmp_path / "model.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=says):
        load_model(tmp_path / "model.gguf")


def test_a_file_that_ends_early_is_one_line(whole: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    for end in (10, 100, len(whole) // 3, len(whole) - 64):
        file.write_bytes(whole[:end])
        with pytest.raises(ModelError, match="damaged"):
            load_model(file)


def test_a_number_that_is_none_is_refused(whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(whole[:-32] + b"\xff" * 32)
    with pytest.raises(ModelError, match="holds NaN or infinity"):
        load_model(tmp_path / "model.gguf")

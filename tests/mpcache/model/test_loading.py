from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpcache.errors import ModelError
from mpcache.model import (
    ModelShape,
    RopeScaling,
    Weights,
    demo_model_dir,
    load_model,
    load_shape,
    load_tokenizer,
    loading,
)
from mpcache.model.families import shape_from_config
from tests.support.paths import STORIES
from tests.support.tiny_models import KINDS, VOCAB, make, save

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "hidden_act": "silu",
}
LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 32}

QWEN2_WINDOW: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "sliding_window": 50, "use_sliding_window": True
}  # fmt: skip


def one_line(error: pytest.ExceptionInfo[ModelError], *parts: str) -> None:
    text = str(error.value)
    assert "\n" not in text and len(text) < 600
    for part in parts:
        assert part in text


# ---------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("kind", KINDS)
def test_shape_survives_json_and_matches_the_weights(kind: str, tmp_path: Path) -> None:
    model = load_model(save(make(kind), tmp_path))
    assert model.shape == load_shape(tmp_path) == load_shape(tmp_path / "config.json")
    assert ModelShape.from_dict(json.loads(json.dumps(model.shape.to_dict()))) == model.shape
    assert load_tokenizer(tmp_path).digest == model.tokenizer.digest != ""
    planned = {name: tuple(tensor.shape) for name, tensor in Weights.meta(model.shape).items()}
    assert {name: tuple(tensor.shape) for name, tensor in model.weights.items()} == planned
    for name, tensor in model.weights.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_stay_in_their_file_are_the_same_to_the_bit(kind: str, tmp_path: Path) -> None:
    kept = load_model(save(make(kind), tmp_path))
    stored = load_model(tmp_path, keep=False)
    assert stored.digest == kept.digest
    assert len(stored.weights.layers) == kept.shape.layers
    for (name, a), (other, b) in zip(kept.weights.items(), stored.weights.items(), strict=True):
        assert name == other and torch.equal(a, b) and b.is_contiguous(), name


def test_defaults_of_a_short_config() -> None:
    shape = shape_from_config(LLAMA)
    assert (shape.kv_heads, shape.head_dim, shape.group) == (4, 16, 1)
    assert (shape.rope_theta, shape.rope_scaling, shape.norm_eps) == (10000.0, None, 1e-6)
    assert (shape.bos_id, shape.eos_ids) == (None, ())
    assert not (shape.qkv_bias or shape.o_bias or shape.mlp_bias or shape.lm_bias)


@pytest.mark.parametrize(
    ("given", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5, None),
        (
            {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2}},
            7.0,
            RopeScaling("linear", 2.0),
        ),
        (
            {"rope_theta": 7.0, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            7.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 9.0}},
            9.0,
            RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        ),
    ],
)
def test_rope_settings_old_and_new(given: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    shape = shape_from_config(LLAMA | given)
    assert (shape.rope_theta, shape.rope_scaling) == (theta, scaling)


def test_token_ids_one_many_and_impossible() -> None:
    shape = shape_from_config(LLAMA | {"bos_token_id": 100, "eos_token_id": [2, 7, 128001]})
    assert (shape.bos_id, shape.eos_ids) == (None, (2, 7))


@pytest.mark.parametrize(
    ("given", "positions"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 50}, 50),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 500}, 128),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 128),
        ({"architectures": ["MistralForCausalLM"], "max_position_embeddings": 9000}, 4096),
        (QWEN2_WINDOW | {"max_window_layers": 0}, 50),
        (QWEN2_WINDOW | {"max_window_layers": 2}, 50),
        (QWEN2_WINDOW, 128),
        (QWEN2_WINDOW | {"max_window_layers": 0, "use_sliding_window": False}, 128),
    ],
)
def test_a_sliding_window_limits_the_context(given: dict[str, Any], positions: int) -> None:
    config = LLAMA | {"num_key_value_heads": 4} | given
    assert shape_from_config(config).max_positions == positions


def test_kv_heads_that_config_json_does_not_name() -> None:
    mistral = LLAMA | {"architectures": ["MistralForCausalLM"], "num_attention_heads": 16, "head_dim": 4}
    assert shape_from_config(mistral).kv_heads == 8
    assert shape_from_config(mistral | {"num_key_value_heads": None}).kv_heads == 16


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architectures": None}, "architectures is missing"),
        ({"architectures": ["BertModel"]}, "'BertModel' is not supported; supported: LlamaForCausalLM, Mist"),
        ({"architectures": "LlamaForCausalLM"}, "one name in a list"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size must be a whole number above zero, not 'wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be"),
        ({"num_attention_heads": 5}, "without head_dim, 5 heads must divide"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3 KV heads"),
        ({"head_dim": 25}, "even head_dim"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
        ({"hidden_act": ["silu"]}, "is not supported"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be"),
        ({"attention_bias": "yes"}, "attention_bias must be true or false"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope type 'yarn' is not supported; supported: d",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": LLAMA3 | {"type": "llama3", "high_freq_factor": 1}}, "high > low"),
        ({"rope_scaling": [2]}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ from layer to layer"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"bos_token_id": "1"}, "bos_token_id must be one token id"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"model_type": "mistral"}, "model_type 'mistral' is not that of LlamaForCausalLM, llama"),
        ({"is_causal": False}, "is_causal False is not supported"),
        ({"hidden_size": "x" * 100_000}, "hidden_size must be"),
    ],
)
def test_a_config_that_cannot_be_used(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError) as error:
        shape_from_config(LLAMA | change, "some/config.json")
    one_line(error, "some/config.json", says)


def test_gpt2_variants_that_are_not_there() -> None:
    config = {"architectures": ["GPT2LMHeadModel"], "n_embd": 64, "n_head": 2, "n_layer": 2, "vocab_size": 9}
    config |= {"n_positions": 64, "activation_function": "gelu_new"}
    assert shape_from_config(config).activation == "gelu_tanh"
    with pytest.raises(ModelError, match="scale_attn_by_inverse_layer_idx true is not supported"):
        shape_from_config(config | {"scale_attn_by_inverse_layer_idx": True})


@pytest.mark.parametrize(
    "change", [{"layers": -1}, {"norm": "batch"}, {"colour": 1}, {"eos_ids": [100]}, {"eos_ids": 3}]
)
def test_a_shape_from_json_is_checked(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError) as error:
        ModelShape.from_dict(shape_from_config(LLAMA).to_dict() | change)
    one_line(error, "model shape:")
    with pytest.raises(ModelError):
        ModelShape.from_dict({"layers": 3})


# ---------------------------------------------------------------------------------------- files


def test_the_digest_follows_the_content(tmp_path: Path) -> None:
    hf = make("llama-gqa")
    whole = load_model(save(hf, tmp_path / "whole"))
    shards = load_model(save(hf, tmp_path / "shards", max_shard_size="60KB"))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert whole.digest == shards.digest
    for (name, a), (_, b) in zip(whole.weights.items(), shards.weights.items(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        hf.model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    assert load_model(save(hf, tmp_path / "changed")).digest != whole.digest


def test_names_without_the_prefix(tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path)
    before = load_model(folder)
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)  # a mask that old checkpoints carry along
    save_file(tensors, file)
    assert load_model(folder).digest == before.digest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("llama-gqa"), tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def fails(folder: Path, *parts: str) -> None:
    with pytest.raises(ModelError) as error:
        load_model(folder)
    one_line(error, str(folder), *parts)


def test_missing_files(folder: Path) -> None:
    fails(folder / "nowhere", "no such model folder")
    (folder / "tokenizer.json").rename(folder / "away.json")
    fails(folder, "no tokenizer.json")
    (folder / "away.json").rename(folder / "tokenizer.json")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(folder, "no model.safetensors", "not supported")
    (folder / "config.json").unlink()
    fails(folder, "no config.json")


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"a": "\udcff"}'])
def test_config_that_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    fails(folder, "config.json")


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "Nonesuch"}}'])
def test_tokenizer_that_is_none(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    fails(folder, "tokenizer.json", "cannot be read as a tokenizer")


def _header(text: str, tail: bytes = b"") -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + tail


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 64,
        _header("not json"),
        _header('{"a\\n\\nb": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        _header('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4000000000000]}}', b"1234"),
        _header(
            '{"a": {"dtype": "F32", "shape": [18446744073709551615, 2], "data_offsets": [0, 4]}}', b"1234"
        ),
        _header("{" * 50_000),
    ],
)
def test_safetensors_that_are_none(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    fails(folder, "model.safetensors", "cannot be read as safetensors")


def _rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in (load_file(file) | changes).items() if v is not None}
    save_file(tensors, file)


def test_tensors_that_do_not_fit(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    good = load_file(folder / "model.safetensors")[name]
    _rewrite(folder, **{name: None})
    fails(folder, "tensor layers.1.self_attn.k_proj.weight is missing")
    _rewrite(folder, **{name: good[:-1].clone()})
    fails(folder, name, "is (31, 64), config.json makes it (32, 64)")
    _rewrite(folder, **{name: good.to(torch.int8)})
    fails(folder, name, "is int8; supported: float32")
    bad = good.clone()
    bad[3, 4] = float("nan")
    _rewrite(folder, **{name: bad})
    fails(folder, name, "NaN")
    _rewrite(folder, **{name: good, "lm_head.weight": None})
    fails(folder, "tensor lm_head.weight is missing")


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": "absent.safetensors"}}', "absent.safetensors"),
        ('{"weight_map": {"a": "../pristine/model.safetensors"}}', "is not there"),
        ('{"weight_map": {"a": 7}}', "'7'"),
    ],
)
def test_a_broken_index(folder: Path, index: str, says: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    fails(folder, says)


def test_the_demo_model_is_there_or_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loading, "DEMO", tmp_path / "demo")
    with pytest.raises(ModelError, match="the demo model is not there"):
        demo_model_dir()
    (tmp_path / "demo" / "model").mkdir(parents=True)
    (tmp_path / "demo" / "model" / "config.json").write_text("{}")
    assert demo_model_dir() == tmp_path / "demo" / "model"


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K folder is not beside this checkout")
def test_stories_shape() -> None:
    shape = load_shape(STORIES)
    assert (shape.layers, shape.width, shape.heads, shape.kv_heads, shape.head_dim) == (5, 64, 8, 4, 8)
    assert (shape.vocab, shape.max_positions, shape.bos_id, shape.eos_ids) == (512, 512, 1, (2,))
    assert shape.vocab != VOCAB

"""A model folder means what `transformers` makes of it, or is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mpcache.answer import plain_answer
from mpcache.errors import BadInput, ModelError
from mpcache.model import load_model, load_tokenizer
from mpcache.model.prefill import prefill
from mpcache.policy import parse_policy
from mpcache.sampling import Sampling
from tests.support.tiny_models import make, save

IDS = [1, *range(5, 64)]
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def truth(folder: Path) -> torch.Tensor | None:
    """Compute the logits of `transformers`; None where it cannot, or would make weights up."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        with torch.no_grad():
            logits: torch.Tensor = model.eval()(torch.tensor([IDS]), return_dict=True).logits[0]
    except Exception:
        return None
    return None if info["missing_keys"] or info["mismatched_keys"] else logits


def ours(folder: Path) -> torch.Tensor | str:
    """Compute our logits, or tell why they are refused."""
    try:
        return prefill(load_model(folder), IDS, all_logits=True).logits
    except (ModelError, BadInput) as error:
        return str(error)


def same(folder: Path) -> None:
    want, got = truth(folder), ours(folder)
    assert want is not None and not isinstance(got, str), got
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-3)


def rewrite(folder: Path, drop: tuple[str, ...] = (), **more: Any) -> None:
    file = folder / "config.json"
    values = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps(values | more))


# ------------------------------------------------------------------------------------------- files


def test_the_one_file_goes_before_shards(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path / "both", max_shard_size="60KB")
    newer = save(make("llama-biases"), tmp_path / "newer")
    tensors = load_file(newer / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    same(folder)


def test_other_weight_files_are_no_model(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    assert truth(folder) is None
    assert "no model.safetensors in it" in str(ours(folder))


def test_an_adapter_is_not_passed_over(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    assert "holds an adapter" in str(ours(folder))


def test_a_tensor_that_is_there_twice(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"norm.weight": tensors["model.norm.weight"] + 1}, file)
    assert "is there twice" in str(ours(folder))


def test_names_of_a_compiled_module(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    file = folder / "model.safetensors"
    tensors = {"_orig_mod." + name: tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert truth(folder) is None  # it would make all weights up
    assert "without the _orig_mod. of torch.compile" in str(ours(folder))


@pytest.mark.parametrize("kind", ["llama-gqa", "qwen2", "gpt2"])
def test_head_and_embedding_are_one_if_one_is_stored(kind: str, tmp_path: Path) -> None:
    hf: Any = make(kind)
    folder = save(hf, tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    stored = tensors.pop(name)
    rewrite(folder, tie_word_embeddings=True)
    for change in (
        {name: stored},
        {name: stored, "lm_head.weight": stored.flip(0).contiguous()},
        {"lm_head.weight": stored},
    ):
        tensors.pop("lm_head.weight", None)
        save_file(tensors | change, file, metadata={"format": "pt"})
        same(folder)


# ----------------------------------------------------------------------------------------- config.json


@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 128}])
def test_the_original_context_beside_the_rope_table(inside: dict[str, int], tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    rewrite(
        folder, ("rope_parameters",), rope_theta=500.0, original_max_position_embeddings=16,
        rope_scaling=LLAMA3 | inside,
    )  # fmt: skip
    same(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_window_layers": 3}, ""),
        ({"max_window_layers": 2}, "the model allows 32"),
        ({"layer_types": ["full_attention"] * 3, "max_window_layers": 0}, ""),
        ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "allows 32"),
        ({"layer_types": ["full_attention"]}, "layer_types must list"),
        ({"layer_types": ["sliding_attention"] * 3, "use_sliding_window": False}, "no window is switched on"),
    ],
)
def test_only_layers_with_a_window_limit_the_context(
    change: dict[str, Any], says: str, tmp_path: Path
) -> None:
    folder = save(make("qwen2"), tmp_path)
    rewrite(folder, ("layer_types",), **({"use_sliding_window": True, "sliding_window": 32} | change))
    if says:
        assert says in str(ours(folder))
    else:
        same(folder)


def test_gpt2_goes_by_other_families_names_too(tmp_path: Path) -> None:
    folder = save(make("gpt2"), tmp_path)
    own = ("n_embd", "n_layer", "n_head", "n_positions")
    others = dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
                      (60, 3, 4, 128), strict=True))  # fmt: skip
    rewrite(folder, own, **others)
    same(folder)
    rewrite(folder, n_head=2)
    assert "num_attention_heads and n_head differ" in str(ours(folder))


# --------------------------------------------------------------- how a text begins, where an answer ends


def generated(folder: Path, text: str) -> list[int]:
    load: Any = PreTrainedTokenizerFast
    tokenizer = load(tokenizer_file=str(folder / "tokenizer.json"))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer(text, return_tensors="pt").input_ids
    made: list[int] = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    return made


def answered(folder: Path, text: str) -> list[int]:
    model = load_model(folder)
    *context, last = model.tokenizer.encode(text, bos=True)
    bound = parse_policy("full").bind(len(context), model.shape)
    return plain_answer(model, bound, context, [last], 12, Sampling(), model.shape.eos_ids, "cpu").ids


def test_an_answer_is_that_of_generate(tmp_path: Path) -> None:
    folder, text = save(make("llama-gqa"), tmp_path), "the gate of the city"
    file = folder / "generation_config.json"
    file.write_text("{}")
    free = answered(folder, text)
    assert len(free) == 12 and free == generated(folder, text)
    for ends in ([2, free[5]], free[3], None):
        file.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": ends}))
        assert answered(folder, text) == generated(folder, text)
        assert (len(answered(folder, text)) < 12) == (ends is not None)
    file.unlink()
    rewrite(folder, eos_token_id=free[4])
    assert answered(folder, text) == generated(folder, text)
    bare = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(bare))
    assert answered(folder, text) == generated(folder, text)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eos_token_id": "end"}, "generation_config.json: eos_token_id must be one token id"),
        ({"stop_strings": ["."]}, "generation_config.json: stop_strings is not supported"),
        ({"min_new_tokens": 5}, "min_new_tokens is not supported"),
    ],
)
def test_a_generation_config_that_cannot_be_used(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(change))
    assert says in str(ours(folder))


# What stands in for a value when its kind alone does not say what else it could be.
OTHERS: dict[str, list[Any]] = {
    "architectures": [["MistralForCausalLM"], ["LlamaForCausalLM"], ["GPT2LMHeadModel"], []],
    "model_type": ["llama", "mistral", "qwen2", "gpt2"],
    "hidden_act": ["gelu", "gelu_new", "relu", "swish", "quick_gelu", "gelu_pytorch_tanh"],
    "activation_function": ["gelu", "gelu_fast", "silu", "gelu_pytorch_tanh", "relu"],
    "rope_parameters": [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0},
        {"type": "linear", "factor": 3.0},
        LLAMA3 | {"original_max_position_embeddings": 32},
        LLAMA3,
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_theta": 100.0},
        {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    ],
    "rope_scaling": [{"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 3.0}],
    "rope_theta": [7.0],
    "original_max_position_embeddings": [16],
    "partial_rotary_factor": [0.5],
    "layer_types": [["sliding_attention"] * 3, ["full_attention"] * 3, ["full_attention"] * 2],
    "sliding_window": [5, 32, 500, None],
    "max_window_layers": [0, 1, 3],
    "head_dim": [8, 32],
    "n_inner": [240, 64],
    "is_causal": [False],
    "dtype": ["float16", "bfloat16", "float32"],
    "attn_implementation": ["eager"],
    "quantization_config": [{"quant_method": "bitsandbytes", "load_in_8bit": True}],
    "problem_type": ["regression"],
    "pruned_heads": [{"0": [1]}],
    "per_layer_config": [{"0": {"num_key_value_heads": 1}}],
    "transformers_weights": ["other.safetensors"],
}


def alternatives(key: str, value: Any) -> Iterator[Any]:
    """Yield other values of a key: by its name, else by the kind of its value."""
    if key in OTHERS:
        yield from (other for other in OTHERS[key] if other != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, max(1, value // 2), 2 * value, 0)
    elif isinstance(value, float):
        yield from (value + 0.25, value / 2, 0.0)
    elif value is None:
        yield from (1, True, "other")
    elif isinstance(value, str):
        yield value + "x"
    yield None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama-gqa", {}),
        ("llama-biases", {}),
        ("mistral", {}),
        ("mistral-window", {"sliding_window": 64}),
        ("qwen2", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}),
        ("gpt2", {}),
    ],
)
def test_every_key_with_another_value(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    """Each key of the config class, one at a time: equal logits, or a refusal."""
    folder = save(make(kind), tmp_path)
    rewrite(folder, ("layer_types",) if change else (), **change)
    made = AutoModelForCausalLM.from_pretrained(folder).config.to_dict()
    config = made | json.loads((folder / "config.json").read_text())
    del config["transformers_version"]
    wrong, equal = [], 0
    cases = [(key, True, None) for key in config]
    cases += [
        (key, False, other) for key in {*config, *OTHERS} for other in alternatives(key, config.get(key))
    ]
    for key, dropped, other in cases:
        values = {k: v for k, v in config.items() if k != key} | ({} if dropped else {key: other})
        (folder / "config.json").write_text(json.dumps(values))
        got = ours(folder)
        if isinstance(got, str):
            continue
        want = truth(folder)
        if want is None:
            continue  # nothing to be wrong about
        equal += 1
        off = float((got - want).abs().max())
        if not math.isfinite(off) or off > 1e-3:
            wrong.append(f"{key} {'left out' if dropped else other}: off by {off:.2g}")
    assert not wrong, "\n".join(wrong)
    assert equal > len(config)  # most keys change nothing


# ------------------------------------------------------------------------------- chat templates


def source_of(folder: Path) -> str:
    template = load_tokenizer(folder).chat_template
    assert template is not None
    return template.source


def test_the_chat_template_of_a_folder(tmp_path: Path) -> None:
    folder = save(make("llama-gqa"), tmp_path)
    assert load_tokenizer(folder).chat_template is None
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert source_of(folder) == "one"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "two"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert source_of(folder) == "two"
    (folder / "chat_template.jinja").write_text("three")
    assert source_of(folder) == "three"
    (folder / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": 7}))
    with pytest.raises(ModelError, match="tokenizer_config.json: chat_template must be a text"):
        load_tokenizer(folder)


def test_a_config_without_architectures_is_known_by_its_model_type(tmp_path: Path) -> None:
    folder = save(make("qwen2"), tmp_path)
    rewrite(folder, architectures=None)
    same(folder)
    rewrite(folder, model_type="bert")
    assert "architectures is missing, and model_type 'bert' not supported; supported: Llama" in str(
        ours(folder)
    )

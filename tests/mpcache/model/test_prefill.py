from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mpcache.errors import BadInput
from mpcache.model import Model, load_model
from mpcache.model.prefill import normalise, prefill
from mpcache_kernels import backend
from tests.support.paths import STORIES
from tests.support.tiny_models import KINDS, VOCAB, make, save


def ids_of(length: int, seed: int = 3) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, tmp_path: Path) -> None:
    hf = make(kind)
    model = load_model(save(hf, tmp_path))
    ids = ids_of(min(60, model.shape.max_positions))
    with torch.no_grad():
        want = hf(torch.tensor([ids])).logits[0]
    got = prefill(model, ids, all_logits=True).logits
    assert want.abs().max() > 1  # else the tolerance would prove nothing
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(prefill(model, ids).logits, got[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama-gqa", "gpt2"])
def test_half_precision_checkpoints_run_in_float32(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf: Any = make(kind)
    model = load_model(save(hf.to(dtype), tmp_path))
    # Read again, in float32: converting a live model also rounds its rotary frequencies.
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = ids_of(30)
    with torch.no_grad():
        want = hf(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(prefill(model, ids, all_logits=True).logits, want, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(save(make("llama-gqa"), tmp_path_factory.mktemp("llama")))


def test_keys_and_values_are_those_of_transformers(model: Model) -> None:
    ids = ids_of(40)
    hf = AutoModelForCausalLM.from_pretrained(model.path)
    with torch.no_grad():
        layers = hf(torch.tensor([ids]), use_cache=True).past_key_values.layers
    got = prefill(model, ids)
    for layer, k, v in zip(layers, got.k, got.v, strict=True):
        assert k.shape == (model.shape.kv_heads, 40, model.shape.head_dim)
        torch.testing.assert_close(k, layer.keys[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(v, layer.values[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 1, 9, 40])
def test_the_window_gives_attention_as_transformers_computes_it(model: Model, window: int) -> None:
    ids = ids_of(40)
    got = prefill(model, ids, window=window)
    assert got.first_position == 40 - window
    assert {q.shape for q in got.q_window} == {(model.shape.heads, window, model.shape.head_dim)}
    hf = AutoModelForCausalLM.from_pretrained(model.path, attn_implementation="eager")
    with torch.no_grad():
        attentions = hf(torch.tensor([ids]), output_attentions=True).attentions
    for q, k, attention in zip(got.q_window, got.k, attentions, strict=True):
        importance = backend("cpu").window_importance(q, k, got.first_position)
        want = attention[0][:, 40 - window :].sum(1).mean(0)
        torch.testing.assert_close(importance, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "gpt2-gelu"])
def test_layer_norm_is_rms_norm_on_a_centred_stream(kind: str, tmp_path: Path) -> None:
    model = load_model(save(make(kind), tmp_path))
    weights = model.weights
    assert weights.positions is not None
    for tensor in (weights.embed, weights.positions, *(m for w in weights.layers for m in (w.wo, w.w_down))):
        assert tensor.mean(-1).abs().max() < 1e-6
    x = weights.embed[5:9] + weights.positions[:4]
    want = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=model.shape.norm_eps)
    torch.testing.assert_close(normalise(x, model.shape.norm_eps), want)


@pytest.mark.skipif(not STORIES.is_dir(), reason="the stories260K folder is not beside this checkout")
def test_stories_greedy_equals_transformers() -> None:
    model = load_model(STORIES)
    hf: Any = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    ids = hf.generate(torch.tensor([[1]]), do_sample=False, max_new_tokens=200, eos_token_id=-1)[0].tolist()
    assert len(ids) == 201
    # Token by token the same choice after the same tokens, so greedy decoding walks the same path.
    logits = prefill(model, ids, all_logits=True).logits
    assert logits.argmax(-1).tolist()[:-1] == ids[1:]
    for length in (1, 2, 77, 200):
        assert int(prefill(model, ids[:length]).logits.argmax()) == ids[length]
    text = model.tokenizer.decode(ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([], "empty"),
        ([5] * 129, "129 tokens, the model allows 128"),
        ([VOCAB], "vocabulary"),
        ([-1], "vocabulary"),
    ],
)
def test_contexts_that_cannot_be_used(model: Model, ids: list[int], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        prefill(model, ids)


def test_the_longest_and_the_shortest_context(model: Model) -> None:
    assert prefill(model, [5] * 128).k[0].shape[1] == 128
    assert prefill(model, [5]).logits.shape == (VOCAB,)
    with pytest.raises(ValueError, match="window"):
        prefill(model, [5], window=2)

"""A real model as a .gguf file: the tokens that `transformers` answers and cuts, one by one.

The file is that of `make chat`; `transformers` reads its weights, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mpcache.answer import plain_answer
from mpcache.choices import DocumentAs
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.demo import DEMO
from mpcache.engines.checked import CheckedOps, Ranges
from mpcache.limits import bind_conversation
from mpcache.model import load_model
from mpcache.model.framing import make_framing
from mpcache.model.prefill import prefill
from mpcache.policy import parse_policy
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_kernels import backend
from tests.support.real_model import real_model
from tests.support.tiny_gguf import as_halves
from tests.support.varied_texts import varied_texts

pytestmark = pytest.mark.slow

DOCUMENT = (
    "The museum of Harbour Street was founded in 1921 by Ada Lindqvist, a ship's doctor. It shows maps, "
    "instruments and 312 letters."
)
ANSWERED = 48  # tokens


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The .gguf file, fetched once."""
    return real_model()


def stored_in(file: Path) -> Any:
    """The model of `transformers` with the file's weights, read by the `gguf` package."""
    reader = gguf.GGUFReader(file)
    value = {name.removeprefix("llama."): field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = value["attention.head_count"], value["attention.head_count_kv"]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=value["vocab_size"], hidden_size=value["embedding_length"],
            intermediate_size=value["feed_forward_length"], num_hidden_layers=value["block_count"],
            num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=True,
            rms_norm_eps=value["attention.layer_norm_rms_epsilon"],
            rope_parameters={"rope_type": "default", "rope_theta": value["rope.freq_base"]},
        )
    )  # fmt: skip
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, value["block_count"])
    stored = {each.name: each for each in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            each = stored[str(names.get_name(name, try_suffixes=(".weight",)))]
            found = torch.from_numpy(np.array(dequantize(each.data, each.tensor_type)))
            turned = heads if "q_proj" in name else kv_heads if "k_proj" in name else 0
            parameter.copy_(as_halves(found, turned) if turned else found)
    return model


def test_tokens_are_those_of_transformers(smollm2: Path) -> None:
    """But for the cut, which `transformers` takes to be GPT-2's in every .gguf file; here each digit is
    parted before it, as the file's tokenizer.ggml.pre says."""
    reference: Any = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    reference.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made = load_model(smollm2).tokenizer
    for text in [*varied_texts(2000), "<|im_start|>user\nhi<|im_end|>\n", "<file_sep>a<|endoftext|>"]:
        ids = made.encode(text, bos=False)
        assert ids == reference(text, add_special_tokens=False)["input_ids"], text
        assert made.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_a_greedy_answer_is_that_of_transformers(smollm2: Path) -> None:
    model = load_model(smollm2)
    context = model.tokenizer.encode(DOCUMENT, bos=True)
    question = model.tokenizer.encode(" The founder of the museum was", bos=False)
    policy = parse_policy("full").bind(len(context), model.shape)
    ours = plain_answer(model, policy, context, question, ANSWERED, Sampling(), ()).ids
    reference = stored_in(smollm2)
    ids = [*context, *question]
    with torch.no_grad():
        for _ in range(ANSWERED):
            ids.append(int(reference(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ours == ids[-ANSWERED:]


@pytest.mark.parametrize("rule", ["mpcache:n_keep=0.25", "snapkv:cap=0.25"])
def test_a_clients_document_stays_in_range_while_it_is_read_and_evicted(rule: str, smollm2: Path) -> None:
    """Nearly all queries of a real model pay most of their attention to one token, and it adds up."""
    model = load_model(smollm2)
    framing = make_framing(model.tokenizer, model.shape, False, DocumentAs.SYSTEM, False)
    context, own = framing.frame_document(None), framing.frame_private((DEMO / "clinic.txt").read_text())
    public = PublicConfig(policy="full", private_policy=rule, conversation_tokens=64)
    policy, _ = bind_conversation(model.shape, public, len(context), len(own))
    session = Session(CheckedOps(public.fraction_bits), found := Ranges(strict=False), model.shape, policy)
    kernels = backend("cpu")
    session.setup(model.weights)
    session.context(prefill(model, context, window=policy.window), kernels)
    with torch.no_grad():
        for _ in session.read_document(
            reading_plan(model.shape, public, len(context), len(own), "fast"), own
        ):
            pass
    assert any("importance" in each.step for each in found)
    assert [each for each in found if each.spare_bits < 0] == []

"""Chat templates in the forms that well-known models have, and tokenizers to go with them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mpcache.model.chat_template import ChatTemplate
from mpcache.model.shape import ModelShape
from mpcache.model.tokenizer import Tokenizer
from tests.support.priced_shapes import LLAMA
from tests.support.tiny_models import tokenizer as byte_level

_TURNS = """\
{% for m in messages %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
_DEFAULT = """\
{% if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
"""
_LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
{% set head = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}
{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}
{% for m in rest %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('user and assistant must take turns') }}
{% endif %}
{% set text = head + m['content'] if loop.first else m['content'] %}
{% if m['role'] == 'user' %}
{{- bos_token + '[INST] ' + text.strip() + ' [/INST]' }}
{%- else %}
{{- ' ' + text.strip() + ' ' + eos_token }}
{%- endif %}
{% endfor %}
"""
_LLAMA3 = """\
{% for m in messages %}
{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim %}
{{- (bos_token if loop.first else '') + text + '<|eot_id|>' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""
_MISTRAL = """\
{{ bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant') }}
{%- endif %}
{{- '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}
{%- endfor %}
"""
_MOVING = """\
{%- if messages[0].role == 'system' %}{% set first = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for m in rest %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (first + '\\n\\n' if loop.last and first is defined else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}
"""
_ZEPHYR = """\
{% for m in messages %}
{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""
_GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""
_PHI3 = """\
{% for m in messages %}
{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}
"""


@dataclass(frozen=True)
class Kind:
    """A template and its control tokens; rstrip: these eat the white space behind them."""

    source: str
    control: tuple[str, ...] = ()
    sentencepiece: bool = False
    rstrip: bool = False


CHAT_ML = ("<|im_start|>", "<|im_end|>")
KINDS = {
    "chatml": Kind(_TURNS, CHAT_ML),
    "chatml-default": Kind(_DEFAULT + _TURNS, CHAT_ML),
    "llama2": Kind(_LLAMA2, (), sentencepiece=True),
    "llama3": Kind(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Kind(_MISTRAL, (), sentencepiece=True),
    "mistral-moving": Kind(_MOVING, ("[INST]", "[/INST]"), sentencepiece=True),
    "zephyr": Kind(_ZEPHYR, (), sentencepiece=True),
    "gemma": Kind(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "phi3": Kind(
        _PHI3, ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), sentencepiece=True, rstrip=True
    ),
}
_NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


@lru_cache(maxsize=2)
def _plain(sentencepiece: bool) -> str:
    """A tokenizer.json: byte-level, or with a sign in place of spaces, and byte fallback."""
    if not sentencepiece:
        return str(byte_level().to_str())
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        ["the gate of the city", "and the number of the gate is", "who what INST SYS user assistant"],
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    model: dict[str, Any] = json.loads(trained.to_str())["model"]
    words = model["vocab"] | {f"<0x{i:02X}>": len(model["vocab"]) + i for i in range(256)}
    merges = [tuple(pair) for pair in model["merges"]]
    made = tokenizers.Tokenizer(
        models.BPE(vocab=words, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return str(made.to_str())


def inner_tokenizer(kind: Kind) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(_plain(kind.sentencepiece))
    added = [
        tokenizers.AddedToken(token, rstrip=kind.rstrip, normalized=False, special=True)
        for token in kind.control
    ]
    made.add_special_tokens(added)
    made.add_tokens([tokenizers.AddedToken("<think>", normalized=False), "  ", "<table>"])
    return made


def template_and_tokenizer(kind: Kind) -> tuple[ChatTemplate, Tokenizer, ModelShape]:
    inner = inner_tokenizer(kind)
    vocab = inner.get_vocab_size()
    shape = replace(LLAMA, vocab=vocab, max_positions=4096, bos_id=1, eos_ids=(2,))
    return ChatTemplate(kind.source, _NAMES), Tokenizer(inner, vocab, 1), shape


def reference(kind: Kind) -> Any:
    """The same for `transformers`."""
    made: Any = PreTrainedTokenizerFast(tokenizer_object=inner_tokenizer(kind), **_NAMES)  # type: ignore[no-untyped-call]
    made.chat_template = kind.source
    return made

"""Make a tokenizer from the metadata of a GGUF file, over the `tokenizers` library.

The file holds a vocabulary and names the way in which texts are cut before it is used; how each name cuts
is known to who reads it. tokenizer.ggml.model is `gpt2` for byte-level BPE, `llama` for SentencePiece's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from mpcache.errors import ModelError
from mpcache.model.chat_template import ChatTemplate
from mpcache.model.checks import shorten
from mpcache.model.families import ConfigValues
from mpcache.model.shape import ModelShape
from mpcache.model.tokenizer import LibraryError, Tokenizer, in_library

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # of tokenizer.ggml.token_type
_SPACE = "\u2581"  # stands for a space in SentencePiece's vocabularies
_LONGEST = 128  # characters of a token that merges make; those that are trained have 16
_GGML = "tokenizer.ggml"

# Control tokens that end a turn or a text wherever they are known: a file names one, its model uses several.
_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
    "<EOT>",
)  # fmt: skip


def vocabulary_of(values: ConfigValues) -> list[str]:
    """Return the vocabulary, by id. Raises ModelError."""
    tokens = values.need(f"{_GGML}.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ModelError(f"{values.source}: {_GGML}.tokens must be a list of texts, not {shorten(tokens)}")
    return tokens


def special_token(values: ConfigValues, name: str) -> int | None:
    """Return the id of the token that is `bos`, `eos`, `eot` ..., or None."""
    found = values.tokens(f"{_GGML}.{name}_token_id", len(vocabulary_of(values)))
    return found[0] if found else None


def end_tokens(values: ConfigValues) -> tuple[int, ...]:
    """Return every id that ends an answer: those that are named, and control tokens known to."""
    named = [special_token(values, name) for name in ("eos", "eot", "eom")]
    kinds, tokens = _kinds(values), vocabulary_of(values)
    known = [i for i in np.flatnonzero(kinds == _CONTROL).tolist() if tokens[i] in _ENDS]
    return tuple(dict.fromkeys(i for i in (*named, *known) if i is not None))


def _kinds(values: ConfigValues) -> np.ndarray[Any, Any]:
    """Return the type of each token: (vocab,) integers. Raises ModelError."""
    tokens, kinds = vocabulary_of(values), values.get(f"{_GGML}.token_type")
    if kinds is None:
        return np.ones(len(tokens), np.int32)
    return _numbers(values, "token_type", "iu", len(tokens))


def _numbers(values: ConfigValues, name: str, kinds: str, length: int) -> np.ndarray[Any, Any]:
    found = values.need(f"{_GGML}.{name}")
    if not isinstance(found, np.ndarray) or found.dtype.kind not in kinds or len(found) != length:
        raise ModelError(f"{values.source}: {_GGML}.{name} must hold a number for each of {length} tokens")
    return found


def build_tokenizer(values: ConfigValues, shape: ModelShape) -> Tokenizer:
    """Build the tokenizer. Raises ModelError."""
    kind, tokens = values.need(f"{_GGML}.model"), vocabulary_of(values)
    ids = {token: i for i, token in enumerate(tokens)}
    if len(ids) != len(tokens):
        raise ModelError(f"{values.source}: {_GGML}.tokens holds a token twice; it is no vocabulary")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if not isinstance(kind, str) or kind not in builders:
        known = ", ".join(builders)
        raise ModelError(
            f"{values.source}: {_GGML}.model {shorten(kind)} is not supported; supported: {known}"
        )
    try:
        with in_library():
            inner, begins = builders[kind](values, ids)
            _add_special(values, inner, tokens)
            _begin_with_bos(values, inner, tokens, begins)
            content = inner.to_str().encode()
    except LibraryError as error:
        raise ModelError(f"{values.source}: no tokenizer can be made of its metadata: {error}") from error
    return Tokenizer(inner, shape.vocab, shape.bos_id, content, _chat_template(values, tokens))


def _chat_template(values: ConfigValues, tokens: Sequence[str]) -> ChatTemplate | None:
    source = values.get("tokenizer.chat_template")
    if not isinstance(source, str) or not source:
        return None
    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {f"{name}_token": special_token(values, there) for name, there in named.items()}
    return ChatTemplate(source, {name: tokens[i] for name, i in ids.items() if i is not None})


def _add_special(values: ConfigValues, inner: tokenizers.Tokenizer, tokens: Sequence[str]) -> None:
    """Find control tokens, and those that users defined, in texts before anything else is."""
    kinds = _kinds(values)
    special = {_CONTROL: True, _UNKNOWN: True, _USER_DEFINED: False}
    for i in np.flatnonzero(np.isin(kinds, list(special))).tolist():
        token = AddedToken(tokens[i], special=special[int(kinds[i])], normalized=False)
        (inner.add_special_tokens if token.special else inner.add_tokens)([token])


def _begin_with_bos(
    values: ConfigValues, inner: tokenizers.Tokenizer, tokens: Sequence[str], usual: bool
) -> None:
    """Begin each text with the BOS token where the file says so, or does not say and it is usual."""
    bos = special_token(values, "bos")
    if values.flag(f"{_GGML}.add_bos_token", usual) and bos is not None:
        inner.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )


# -------------------------------------------------------------------------------- byte-level BPE


@dataclass(frozen=True)
class _Cutting:
    """How a text is cut before merges.

    pattern: one piece, as a regular expression; None: GPT-2's.  digits: each stands alone.
    """

    pattern: str | None = None
    digits: bool = False
    compose: bool = False  # to Unicode's form C
    whole_tokens: bool = False  # a piece that is a token is not merged
    begins: bool = False  # with BOS, where the file does not say


def _words(digits: str) -> str:
    """Return the pattern of the GPT-4 family, with runs of digits as `digits` has them."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_LLAMA3 = _Cutting(_words(r"\p{N}{1,3}"), whole_tokens=True, begins=True)
_QWEN2 = _Cutting(_words(r"\p{N}"), compose=True)
CUTTINGS: Mapping[str, _Cutting] = {
    "gpt-2": _Cutting(),
    "smollm": _Cutting(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def _byte_level(values: ConfigValues, ids: Mapping[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    pre = values.get(f"{_GGML}.pre", "gpt-2")
    if not isinstance(pre, str) or pre not in CUTTINGS:
        raise ModelError(
            f"{values.source}: {_GGML}.pre {shorten(pre)} is not supported; supported: {', '.join(CUTTINGS)}"
        )
    merges = values.need(f"{_GGML}.merges")
    if not isinstance(merges, list):
        raise ModelError(f"{values.source}: {_GGML}.merges must be a list of texts, not {shorten(merges)}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if odd := next((merge for merge, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None):
        raise ModelError(f"{values.source}: {_GGML}.merges holds {shorten(odd)}, not two parts of a token")
    cutting = CUTTINGS[pre]
    model = models.BPE(vocab=dict(ids), merges=pairs, ignore_merges=cutting.whole_tokens)
    inner = tokenizers.Tokenizer(model)
    cuts: list[Any] = []
    if cutting.digits:
        cuts.append(pre_tokenizers.Digits(individual_digits=True))
    if cutting.pattern is not None:
        cuts.append(pre_tokenizers.Split(tokenizers.Regex(cutting.pattern), "isolated"))
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cutting.pattern is None))
    if cutting.compose:
        inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    inner.decoder = decoders.ByteLevel()
    return inner, cutting.begins


# -------------------------------------------------------------------------------- SentencePiece


def _sentencepiece(values: ConfigValues, ids: Mapping[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """Build SentencePiece's BPE, which merges the pair whose token has the highest score."""
    scores = _numbers(values, "scores", "f", len(ids))
    unknown = special_token(values, "unknown")
    tokens = list(ids)
    model = models.BPE(
        vocab=dict(ids),
        merges=_merges(tokens, ids, scores),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=bool((_kinds(values) == _BYTE).any()),
    )
    inner = tokenizers.Tokenizer(model)
    prefix = values.flag(f"{_GGML}.add_space_prefix", True)
    spaces = normalizers.Replace(" ", _SPACE)
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    after: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*after, decoders.Strip(" ", 1, 0)] if prefix else after)
    return inner, True


def _merges(
    tokens: Sequence[str], ids: Mapping[str, int], scores: np.ndarray[Any, Any]
) -> list[tuple[str, str]]:
    """Return every way to put a token together from two others, the highest score first."""
    found: list[tuple[float, int, int, str, str]] = []
    for token, score in zip(tokens, scores.tolist(), strict=True):
        for cut in range(1, len(token) if len(token) <= _LONGEST else 0):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, ids[left], ids[right], left, right))
    found.sort(key=lambda merge: merge[:3])
    return [merge[3:] for merge in found]

"""A tokenizer made of a GGUF file's metadata cuts texts as the one that the file was made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from mpcache.errors import ModelError
from mpcache.model import demo_model_dir, load_shape
from mpcache.model.families import ConfigValues
from mpcache.model.gguf_tokenizer import build_tokenizer
from mpcache.model.tokenizer import Tokenizer
from tests.support.tiny_gguf import BYTE, CONTROL, NORMAL, UNKNOWN
from tests.support.varied_texts import PIECES, varied_texts

CORPUS = [
    " ".join(PIECES),
    "the number of the gate is 4831. It's 12 12 123 years, we'll see the city",
    "  \n\n ",
]


def read(**metadata: Any) -> Tokenizer:
    values = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    shape = dataclasses.replace(
        load_shape(demo_model_dir()), vocab=len(metadata["tokens"]), bos_id=1, eos_ids=()
    )
    return build_tokenizer(ConfigValues(values, "model.gguf"), shape)


def trained() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary whose pieces go across spaces, digits and lines, so that each cut shows."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", "<|x|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS * 3, trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


VOCAB, MERGES = trained()


def byte_level(pre: str, **more: Any) -> Tokenizer:
    tokens = sorted(VOCAB, key=VOCAB.__getitem__)
    kinds = np.array([CONTROL if i in range(1, 4) else NORMAL for i in range(len(tokens))], np.int32)
    merges = [" ".join(merge) for merge in MERGES]
    return read(model="gpt2", pre=pre, tokens=tokens, token_type=kinds, merges=merges, bos_token_id=1, **more)


def gpt2() -> Any:
    made: Any = GPT2Tokenizer
    return made(vocab=VOCAB, merges=MERGES, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def smollm() -> Any:
    """GPT-2's, after each digit has been parted, as SmolLM2's tokenizer.json has it."""
    made = gpt2()
    inner = made.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    inner.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return made


def qwen2() -> Any:
    made: Any = Qwen2Tokenizer
    return made(vocab=VOCAB, merges=MERGES, unk_token="<unk>", eos_token="</s>", pad_token="<unk>")


def llama3() -> Any:
    inner = tokenizers.Tokenizer(models.BPE(vocab=VOCAB, merges=MERGES, ignore_merges=True))
    converter: Any = TikTokenConverter
    pattern = tokenizers.Regex(converter().pattern)
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    made: Any = PreTrainedTokenizerFast
    return made(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize(
    ("pre", "reference"), [("gpt-2", gpt2), ("smollm", smollm), ("qwen2", qwen2), ("llama-bpe", llama3)]
)
def test_a_text_is_cut_as_transformers_cuts_it(pre: str, reference: Callable[[], Any]) -> None:
    made, theirs = byte_level(pre), reference()
    theirs.add_special_tokens({"additional_special_tokens": ["<s>", "</s>", "<|x|>"]})
    for text in varied_texts(150):
        ids = made.encode(text, bos=False)
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        assert made.decode(ids) == theirs.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )


def test_each_cut_is_another_one() -> None:
    """Else the test above could not fail."""
    made = [byte_level(pre) for pre in ("gpt-2", "smollm", "qwen2", "llama-bpe")]
    found = [[each.encode(text, bos=False) for text in varied_texts(150)] for each in made]
    assert len({str(ids) for ids in found}) == 4


def test_a_text_begins_as_the_file_says_or_as_is_usual() -> None:
    assert not byte_level("qwen2").adds_bos and byte_level("llama-bpe").adds_bos
    assert byte_level("qwen2", add_bos_token=True).encode("the", bos=True)[0] == 1
    assert not byte_level("llama-bpe", add_bos_token=False).adds_bos


# -------------------------------------------------------------------------------- SentencePiece


def sentencepiece() -> dict[str, Any]:
    """Pieces of the corpus with spaces shown, bytes for the rest; a later piece has a lower score."""
    made = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=150, show_progress=False, limit_alphabet=60)
    made.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    learned = json.loads(made.to_str())["model"]
    merged = ["".join(merge) for merge in learned["merges"]]
    letters = [token for token in learned["vocab"] if len(token) == 1]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens = list(dict.fromkeys([*tokens, *merged, *letters]))
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256]
    kinds += [NORMAL] * (len(tokens) - len(kinds))
    scores = np.array([0.0 if kind != NORMAL else -i for i, kind in enumerate(kinds)], np.float32)
    return {
        "model": "llama", "tokens": tokens, "scores": scores, "token_type": np.array(kinds, np.int32),
        "bos_token_id": 1, "unknown_token_id": 0,
    }  # fmt: skip


def merged_by_score(text: str, tokens: Sequence[str], scores: Sequence[float]) -> list[int]:
    """SentencePiece's rule, word for word: the neighbours whose union has the highest score are joined."""
    ids = {token: i for i, token in enumerate(tokens)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False))
                  if a + b in ids]  # fmt: skip
        if not joined:
            break
        i = -max(joined)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    found: list[int] = []
    for part in parts:
        found += [ids[part]] if part in ids else [ids[f"<0x{byte:02X}>"] for byte in part.encode()]
    return found


def test_sentencepiece_merges_by_score() -> None:
    given = sentencepiece()
    made = read(**given)
    for text in (text for text in varied_texts(150) if text and "<" not in text):
        ids = made.encode(text, bos=False)
        assert ids == merged_by_score(text, given["tokens"], given["scores"].tolist()), text
        assert made.decode(ids) == text
    assert made.encode("the gate", bos=True)[0] == 1
    assert made.encode("<s>the", bos=False)[0] == 1
    assert not read(**given, add_bos_token=False).adds_bos


def test_a_space_is_put_before_a_text_unless_the_file_says_no() -> None:
    given = sentencepiece()
    assert read(**given).decode(read(**given).encode("the", bos=False)) == "the"
    bare = read(**given, add_space_prefix=False)
    assert bare.encode("the", bos=False) != read(**given).encode("the", bos=False)
    assert bare.decode(bare.encode(" the", bos=False)) == " the"


def test_a_vocabulary_of_very_long_tokens_costs_no_time() -> None:
    given = sentencepiece()
    given["tokens"][-1] = "x" * 200_000
    assert read(**given).encode("the", bos=False)


def test_scores_that_are_missing_are_named() -> None:
    given = sentencepiece()
    with pytest.raises(ModelError, match=r"model.gguf: tokenizer.ggml.scores is missing"):
        read(**{key: value for key, value in given.items() if key != "scores"})
    with pytest.raises(ModelError, match=r"tokenizer.ggml.scores must hold a number for each of \d+ tokens"):
        read(**given | {"scores": np.zeros(3, np.float32)})

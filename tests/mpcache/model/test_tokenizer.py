from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import normalizers, processors

from mpcache.console.signals import Stopped
from mpcache.errors import BadInput, ModelError
from mpcache.model import load_shape
from mpcache.model.tokenizer import Tokenizer
from tests.support.paths import STORIES
from tests.support.tiny_models import VOCAB, tokenizer

TEXTS = [
    "",
    " ",
    "the gate",
    "  two  spaces ",
    "a é€😀\nb  c",
    "日本語 and 🏳️‍🌈!",
    "a real \ufffd in it \ufffd",
    "tab\t\n\n",
]


@pytest.fixture(scope="module", params=["byte-level", "byte-fallback"])
def made(request: pytest.FixtureRequest) -> Tokenizer:
    if request.param == "byte-level":
        return Tokenizer(tokenizer(), VOCAB, 1)
    if not STORIES.is_dir():
        pytest.skip("the stories260K folder is not beside this checkout")
    return Tokenizer.load(STORIES, 512, 1)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(made: Tokenizer, text: str) -> None:
    assert made.decode(made.encode(text, bos=False)) == text
    assert made.decode(made.encode(text, bos=True)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_joins_up_to_the_whole(made: Tokenizer, text: str) -> None:
    ids = made.encode(text, bos=True)
    stream = made.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) + stream.end() == text
    assert stream.end() == ""


def test_a_stream_of_any_tokens_joins_up(made: Tokenizer) -> None:
    rng = random.Random(1)
    for _ in range(300):
        # Byte tokens more often than not: most of these are no UTF-8.
        ids = [rng.randrange(made.vocab if rng.random() < 0.3 else 259) for _ in range(rng.randrange(12))]
        stream = made.stream()
        assert "".join(map(stream.push, ids)) + stream.end() == made.decode(ids)


def test_a_stream_shows_words_at_once_and_characters_when_whole(made: Tokenizer) -> None:
    stream = made.stream()
    assert "".join(stream.push(token) for token in made.encode("the gate", bos=False)) == "the gate"
    stream = made.stream()
    assert not any("\ufffd" in stream.push(token) for token in made.encode("😀 x", bos=False))


def test_bos_exactly_once(made: Tokenizer) -> None:
    plain = made.encode("the gate", bos=False)
    assert plain[0] != 1
    assert made.encode("the gate", bos=True) == [1, *plain]
    assert made.encode("<s>the gate", bos=True).count(1) == 1
    assert made.encode("", bos=True) == [1]


def test_a_text_begins_as_the_post_processor_says() -> None:
    inner = tokenizer()
    made = Tokenizer(inner, VOCAB, 1)
    alone = made.encode("the", bos=False)
    assert made.adds_bos and alone.count(1) == 0
    for template, first in (("<s> $A", [1]), ("$A", []), ("<s> </s> $A", [1, 2]), ("<s> $A </s>", [1])):
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        assert made.adds_bos == (first[:1] == [1])
        assert made.encode("the", bos=True) == first + alone


def test_truncation_and_padding_in_the_file_are_ignored(tmp_path: Path) -> None:
    inner = tokenizer()
    inner.enable_truncation(3)
    inner.enable_padding(length=50)
    inner.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["truncation"]
    made = Tokenizer.load(tmp_path, VOCAB, 1)
    assert 3 < len(made.encode("xyzwv", bos=False)) < 50


def test_errors_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer.json in it"):
        Tokenizer.load(tmp_path, VOCAB, 1)
    (tmp_path / "tokenizer.json").write_text("{\n\n}")
    with pytest.raises(ModelError) as error:
        Tokenizer.load(tmp_path, VOCAB, 1)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="beyond the model's 40"):
        Tokenizer(tokenizer(), 40, 1).encode("the gate", bos=False)
    with pytest.raises(ModelError, match="cannot be tokenized"):
        Tokenizer(tokenizer(), VOCAB, 1).encode("a \ud800 surrogate", bos=False)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    inner: tokenizers.Tokenizer = tokenizer()
    inner.save(str(tmp_path / "tokenizer.json"))
    first = Tokenizer.load(tmp_path, VOCAB, 1).digest
    inner.add_tokens(["new"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert len(first) == 64 and Tokenizer.load(tmp_path, VOCAB, 1).digest != first


def test_a_stop_signal_is_not_the_texts_fault(made: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exception comes up wherever the program is; it is not an error of the tokenizer's library."""

    class Interrupted:
        def encode(self, *given: object, **options: object) -> None:
            raise Stopped("mpcache: stopped by SIGINT", 2)

    monkeypatch.setattr(made, "_inner", Interrupted())
    with pytest.raises(Stopped):
        made.encode("a text", bos=False)


def test_a_text_that_cannot_fit_is_refused_by_its_beginning(
    made: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []
    encode = Tokenizer.encode

    def counted(self: Tokenizer, text: str, bos: bool) -> list[int]:
        tried.append(len(text))
        return encode(self, text, bos)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    with pytest.raises(BadInput, match="the context has more than 50 tokens, the model allows 50; shorten"):
        made.encode_within("the gate of 日本 " * 100_000, True, 50, "the context")
    assert sum(tried) < 10_000
    fits = made.encode("the gate " * 9, True)
    assert made.encode_within("the gate " * 9, True, len(fits), "the text") == fits
    with pytest.raises(BadInput, match=f"the text has {len(fits)} tokens, the model allows {len(fits) - 1};"):
        made.encode_within("the gate " * 9, True, len(fits) - 1, "the text")


def test_a_text_of_few_long_tokens_is_read_to_its_end() -> None:
    inner = tokenizer()
    inner.normalizer = normalizers.Replace("-", "")
    made, text = Tokenizer(inner, VOCAB, 1), "-" * 5000 + "the gate"
    assert made.encode_within(text, True, 20, "the text") == made.encode("the gate", True)


def test_a_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    for content, says in ((b"GGUF" + b"x" * 99, "a GGUF file"), (b"{\0" * 99, "a binary file")):
        (tmp_path / "tokenizer.json").write_bytes(content)
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ModelError, match=f"tokenizer: it is {says}"):
            Tokenizer.load(tmp_path, VOCAB, 1)
        for named in (tmp_path, tmp_path / "config.json"):
            with pytest.raises(ModelError, match=f"JSON: it is {says}"):
                load_shape(named)
    with (tmp_path / "config.json").open("wb") as file:
        file.write(b"{" + b" " * 300)
        file.truncate(5 << 30)
    with pytest.raises(ModelError, match="it has 5120 MiB; such a file has at most 64"):
        load_shape(tmp_path)

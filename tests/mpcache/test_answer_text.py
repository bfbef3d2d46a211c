from __future__ import annotations

from mpcache.answer import AnswerText
from mpcache.model.tokenizer import Tokenizer
from tests.support.tiny_models import VOCAB, tokenizer


def shown(text: str, *stops: str) -> tuple[str, str, bool]:
    """What streams of a text's tokens, what is its text then, and whether it was stopped."""
    made = Tokenizer(tokenizer(), VOCAB, 1)
    seen = AnswerText(made, stops)
    stream = "".join(seen.push(token) for token in made.encode(text, bos=False)) + seen.end()
    return stream, seen.text, seen.stopped


def test_an_answer_is_cut_before_the_text_that_ends_it() -> None:
    assert shown("one\nQuestion: two", "\nQuestion") == ("one", "one", True)
    assert shown("abab END ab", "END", "b E") == ("aba", "aba", True)
    assert shown("日本の gate", "の") == ("日本", "日本", True)


def test_what_only_begins_like_the_end_is_shown_later() -> None:
    assert shown("one\nQuest", "\nQuestion") == ("one\nQuest", "one\nQuest", False)
    assert shown("aaab", "aac") == ("aaab", "aaab", False)
    assert shown("the gate") == ("the gate", "the gate", False)


def test_nothing_of_the_end_streams_before_it_is_whole() -> None:
    made = Tokenizer(tokenizer(), VOCAB, 1)
    seen = AnswerText(made, ("xyz",))
    assert "".join(seen.push(token) for token in made.encode("axy", bos=False)) == "a"
    assert seen.end() == "xy"

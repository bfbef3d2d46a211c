from __future__ import annotations

from typing import Any

import pytest

from mpcache.errors import BadInput
from mpcache.model.messages import read_messages


def said(*pairs: tuple[str, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def test_messages_are_questions_and_answers() -> None:
    assert read_messages(said(("user", "a"))) == ["a"]
    assert read_messages(said(("user", "a"), ("assistant", "b"), ("user", "c"))) == ["a", "b", "c"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_messages(said(("user", parts))) == ["ab"]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_clients_system_message_heads_its_first_question(role: str) -> None:
    assert read_messages(said((role, "Be brief.\n"), ("user", "a"))) == ["Be brief.\n\na"]


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "give a list of at least one message"),
        ("a text", "give a list"),
        (["a"], r"messages\[0\]: must be an object with role and content"),
        (said(("user", " ")), r"messages\[0\]: content is empty"),
        (said(("user", None)), "content must be text, not None"),
        (said(("user", [{"type": "image_url"}])), "content of type 'image_url' is not supported"),
        (said(("tool", "a")), "role 'tool' is not supported"),
        (said(("user", "a"), ("user", "b")), r"messages\[1\]: is the user's, where the assistant's belongs"),
        (said(("assistant", "a")), "where the user's belongs"),
        (said(("user", "a"), ("system", "b")), "a system message may only be the first"),
        (said(("user", "a"), ("assistant", "b")), "the last one must be the user's"),
        (said(("system", "a")), "the last one must be the user's"),
        (said(("user", "a")) * 10_001, "at most 10000"),
    ],
)
def test_other_messages_are_refused_in_a_line(messages: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        read_messages(messages)

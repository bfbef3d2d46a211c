"""Read a list of messages, as programs that speak to a chat model send it, as questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mpcache.errors import BadInput
from mpcache.model.checks import shorten

MOST_MESSAGES = 10_000
_SYSTEM = ("system", "developer")
_BETWEEN = "\n\n"  # a client's system message and its first question


def read_messages(messages: object) -> list[str]:
    """Return the texts of question, answer, question, ...; the last is a question.

    messages: {"role": ..., "content": ...} each; a content is a text, or a list of text parts. The model's
    own system message is the server's, so a system message of the client's, which may only come first, goes
    at the head of the client's first question.  Raises BadInput: the message's place, and what is wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise BadInput("messages: give a list of at least one message")
    if len(messages) > MOST_MESSAGES:
        raise BadInput(f"messages: has {len(messages)}, at most {MOST_MESSAGES} are taken")
    texts: list[str] = []
    system = ""
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise BadInput(f"{where}: must be an object with role and content, not {shorten(message)}")
        role = message.get("role")
        text = _content(message.get("content"), where)
        expected = "assistant" if len(texts) % 2 else "user"
        if role in _SYSTEM and i == 0:
            system = text.strip() + _BETWEEN
        elif role in _SYSTEM:
            raise BadInput(f"{where}: a {role} message may only be the first")
        elif role not in ("user", "assistant"):
            raise BadInput(f"{where}: role {shorten(role)} is not supported; give system, user or assistant")
        elif role != expected:
            raise BadInput(f"{where}: is the {role}'s, where the {expected}'s belongs: they take turns")
        else:
            texts.append(text)
    if len(texts) % 2 == 0:
        raise BadInput("messages: the last one must be the user's")
    return [system + texts[0], *texts[1:]]


def _content(content: object, where: str) -> str:
    """Return the text of a message that is not empty. Raises BadInput."""
    if isinstance(content, list):
        parts = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadInput(f"{where}: content of type {shorten(kind)} is not supported; give text alone")
            parts.append(part["text"])
        content = "".join(parts)
    if not isinstance(content, str):
        raise BadInput(f"{where}: content must be text, not {shorten(content)}")
    if not content.strip():
        raise BadInput(f"{where}: content is empty")
    return content

"""Read and write OpenAI's chat completions: a request's body becomes a question, an answer its objects.

What is not chat's alone is in bodies.py; the older completions are in text_completions.py.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field

from mpcache_parties.chat import Account, Turn
from mpcache_parties.endpoint.bodies import NEUTRAL, Body, Neutral, Strict, read_object, validated, without
from mpcache_parties.endpoint.refusals import Refusal

_NEUTRAL: Neutral = {
    **NEUTRAL,
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
_MESSAGE_NEUTRAL: Neutral = {
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}


class Role(StrEnum):
    """Who says something."""

    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Said:
    """One message of a conversation."""

    role: Role
    text: str


@dataclass(frozen=True)
class AnswerEnd:
    """What an answer ended with. finish: "stop" or "length".  room: tokens the session can still take."""

    finish: str
    prompt_tokens: int
    completion_tokens: int
    room: int
    account: Account

    def usage(self) -> dict[str, int]:
        """Return the tokens of this turn alone: earlier ones are in the session already."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }

    def cost(self) -> dict[str, Any]:
        return {"account": asdict(self.account), "room": self.room}


@dataclass(frozen=True)
class CompletionRequest:
    """What a request asks for, and how its answer is written.

    messages: they begin and end with the user's, in turn. turn: all but its text.
    """

    ID: ClassVar[str] = "chatcmpl"
    OBJECT: ClassVar[str] = "chat.completion"
    CHUNK: ClassVar[str] = "chat.completion.chunk"
    RAW: ClassVar[bool] = False  # it needs a session that puts nothing around its text

    model: str
    messages: tuple[Said, ...]
    turn: Turn
    stream: bool = False
    include_usage: bool = False
    secret: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        return f"{self.ID}-{self.secret}"

    def chunk(
        self, piece: str, begins: bool, finish: str | None = None, mpcache: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return one object of a stream. begins: it is the first.  mpcache: what is not OpenAI's."""
        choice = self._part(piece, begins) | {"index": 0, "finish_reason": finish}
        more = {"usage": None} if self.include_usage else {}
        return self._object(self.CHUNK, [choice]) | more | ({} if mpcache is None else {"mpcache": mpcache})

    def usage_chunk(self, end: AnswerEnd) -> dict[str, Any]:
        """Return the last object of a stream that tells its usage."""
        return self._object(self.CHUNK, []) | {"usage": end.usage()}

    def whole(self, text: str, end: AnswerEnd, mpcache: Mapping[str, Any]) -> dict[str, Any]:
        """Return a whole answer."""
        choice = self._all(text) | {"index": 0, "finish_reason": end.finish, "logprobs": None}
        return self._object(self.OBJECT, [choice]) | {"usage": end.usage(), "mpcache": mpcache}

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return head | {"choices": choices}

    def _part(self, piece: str, begins: bool) -> dict[str, Any]:
        first = {"role": Role.ASSISTANT, "content": ""} if begins else {}
        return {"delta": first | ({"content": piece} if piece else {})}

    def _all(self, text: str) -> dict[str, Any]:
        return {"message": {"role": Role.ASSISTANT, "content": text, "refusal": None}}


# ---------------------------------------------------------------------------------------- requests


class _Part(Strict):
    type: Literal["text"]
    text: str


class _Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class _Body(Body):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)


def read_request(data: bytes, models: Collection[str]) -> CompletionRequest:
    """Read a body. models: that are served. Raises Refusal with the field that is wrong."""
    object_ = read_object(data, _NEUTRAL)
    messages = object_.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            without(message, _MESSAGE_NEUTRAL, f"messages.{number}.")
            if message.get("role") in ("tool", "function"):
                raise Refusal(400, "tools are not supported here", f"messages.{number}.role")
    body = validated(_Body, object_)
    body.check(models)
    said = _in_turn(body.messages)
    return CompletionRequest(
        body.model, said, body.turn(_longest(body)), bool(body.stream), body.include_usage
    )


def _longest(body: _Body) -> int | None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise Refusal(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")
    return body.max_completion_tokens or body.max_tokens


def _in_turn(messages: Sequence[_Message]) -> tuple[Said, ...]:
    """Check that user and assistant take turns; put the system's messages before the user's first.

    The system message of the session is the server's document, which a caller cannot change.
    """
    told, said = list[str](), list[Said]()
    for number, message in enumerate(messages):
        where, text = f"messages.{number}", message.text()
        if message.role in ("system", "developer"):
            if said:
                raise Refusal(400, f"{where}: a {message.role} message stands before all others", where)
            told.append(text)
            continue
        role = Role(message.role)
        wanted = (Role.USER, Role.ASSISTANT)[len(said) % 2]
        if role is not wanted:
            raise Refusal(400, f"{where}: user and assistant take turns, and the user begins", where)
        if role is Role.USER and not text.strip():
            raise Refusal(400, f"{where}.content: is empty", f"{where}.content")
        said.append(Said(role, "\n\n".join([*filter(str.strip, told), text]) if not said else text))
    if len(said) % 2 == 0:
        raise Refusal(400, "messages: the last one must be the user's", "messages")
    return tuple(said)


def question_of(messages: Sequence[Said]) -> str:
    """Write what a session has not taken in yet as one question.

    One message stands as it is. Earlier ones that the session does not know stand before it, as a text:
    what an assistant has said cannot be put into its mouth in a session of another conversation.
    """
    *earlier, last = messages
    if not earlier:
        return last.text
    told = "\n\n".join(f"{said.role.capitalize()}: {said.text}" for said in earlier)
    return f"{told}\n\n{Role.USER.capitalize()}: {last.text}"

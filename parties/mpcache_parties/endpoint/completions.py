"""Read and write OpenAI's chat completions: a request's body becomes a question, an answer its objects.

What this endpoint cannot do is refused by the field's name, never left out in silence.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from mpcache_parties.chat import Account, Turn
from mpcache_parties.endpoint.refusals import Refusal

LARGEST_SEED = 2**63 - 1
STOPS = 4  # strings

# Fields of the API that are refused, but for the values that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
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
# Fields that change no answer. What they say goes no further.
_UNUSED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
_MESSAGE_NEUTRAL: dict[str, tuple[object, ...]] = {
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
class CompletionRequest:
    """What a request asks for.

    model: its public name.  messages: they begin and end with the user's, in turn. turn: all but its text.
    """

    model: str
    messages: tuple[Said, ...]
    turn: Turn
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))


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


# ---------------------------------------------------------------------------------------- requests


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Part(_Strict):
    type: Literal["text"]
    text: str


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class _StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # asked for or not: an answer's length is public between the parties


class _Body(_Strict):
    model: str
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[Annotated[str, StringConstraints(min_length=1)]] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None


def read_request(data: bytes, models: Collection[str]) -> CompletionRequest:
    """Read a body. models: that are served. Raises Refusal with the field that is wrong."""
    body = _checked(data)
    check_model(body.model, models)
    if body.stream_options is not None and not body.stream:
        raise Refusal(400, "stream_options: needs stream: true", "stream_options")
    temperature = body.temperature or 0.0
    seed = secrets.randbelow(LARGEST_SEED) if body.seed is None and temperature else body.seed
    return CompletionRequest(
        model=body.model,
        messages=_in_turn(body.messages),
        turn=Turn(
            "",
            max_new_tokens=_longest(body),
            stop=_stops(body.stop),
            temperature=temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
        ),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
    )


def check_model(name: str, models: Collection[str]) -> None:
    """Raise Refusal where a model of this name is not served."""
    if name not in models:
        there = " or ".join(map(repr, models))
        raise Refusal(
            404, f"the model {name!r:.80} is not served here; ask for {there}", "model", "model_not_found"
        )


def _checked(data: bytes) -> _Body:
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    for name in _UNUSED:
        body.pop(name, None)
    _without(body, _NEUTRAL, "")
    messages = body.get("messages")
    for number, message in enumerate(messages if isinstance(messages, list) else ()):
        if isinstance(message, dict):
            _without(message, _MESSAGE_NEUTRAL, f"messages.{number}.")
            if message.get("role") in ("tool", "function"):
                raise Refusal(400, "tools are not supported here", f"messages.{number}.role")
    try:
        return _Body.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None


def _without(body: dict[str, Any], neutral: dict[str, tuple[object, ...]], where: str) -> None:
    """Take out the fields that ask for nothing. Raises Refusal on those that ask for what there is not."""
    for name, values in neutral.items():
        value = body.pop(name, None)
        if value is not None and value not in values:
            raise Refusal(400, f"{where}{name}: is not supported here", where + name, "unsupported_parameter")


def _named(error: ValidationError) -> Refusal:
    """Tell the first fault by its field."""
    # A content that is neither a text nor parts fails as both: the deeper place is the one that was meant.
    first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
    place = [str(part) for part in first["loc"] if str(part) not in ("str", "list[_Part]")]
    param = ".".join(part for part in place if not part.startswith("list["))
    if first["type"] == "extra_forbidden":
        return Refusal(400, f"{param}: is not known here", param, "unknown_parameter")
    if place[-1:] == ["type"] and "content" in place:
        return Refusal(400, f"{param}: only text is read here", param, "unsupported_content")
    return Refusal(400, f"{param}: {first['msg'][0].lower()}{first['msg'][1:]}", param)


def _longest(body: _Body) -> int | None:
    if body.max_tokens and body.max_completion_tokens and body.max_tokens != body.max_completion_tokens:
        raise Refusal(400, "max_tokens and max_completion_tokens: give one of them", "max_tokens")
    return body.max_completion_tokens or body.max_tokens


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = tuple([stop] if isinstance(stop, str) else stop or ())
    if len(stops) > STOPS or not all(stops):
        raise Refusal(400, f"stop: up to {STOPS} texts that are not empty", "stop")
    return stops


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


# ----------------------------------------------------------------------------------------- answers


def chunk(
    of: CompletionRequest,
    delta: dict[str, str] | None,
    finish: str | None = None,
    usage: dict[str, int] | None = None,
    mpcache: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one object of a stream. delta: None in the one that has usage alone."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    head = {"id": of.id, "object": "chat.completion.chunk", "created": of.created, "model": of.model}
    more: dict[str, Any] = {"usage": usage} if of.include_usage else {}
    return head | {"choices": choices} | more | ({} if mpcache is None else {"mpcache": mpcache})


def completion(of: CompletionRequest, text: str, end: AnswerEnd, mpcache: dict[str, Any]) -> dict[str, Any]:
    """Return a whole answer."""
    message = {"role": Role.ASSISTANT, "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": end.finish, "logprobs": None}
    return {
        "id": of.id,
        "object": "chat.completion",
        "created": of.created,
        "model": of.model,
        "choices": [choice],
        "usage": end.usage(),
        "mpcache": mpcache,
    }

"""Bodies of requests: what is read, what is refused by its field's name, and what nobody would send."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from mpcache_parties.chat import Turn
from mpcache_parties.endpoint.completions import (
    CompletionRequest,
    Role,
    Said,
    question_of,
    read_request,
)
from mpcache_parties.endpoint.refusals import Refusal
from mpcache_parties.endpoint.text_completions import read_text_request
from tests.fuzz.mutate import damaged, replaced

USER: dict[str, Any] = {"role": "user", "content": "hello"}
ASSISTANT: dict[str, Any] = {"role": "assistant", "content": "hi"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be brief."}


def read(**fields: Any) -> CompletionRequest:
    return read_request(json.dumps({"model": "demo", "messages": [USER], **fields}).encode(), ["demo"])


def test_a_plain_body_asks_greedily_for_all_there_may_be() -> None:
    request = read()
    assert request.messages == (Said(Role.USER, "hello"),)
    assert request.turn == Turn("") and not request.stream


def test_fields_that_ask_for_nothing_are_taken() -> None:
    neutral = {
        "n": 1, "tools": [], "tool_choice": "none", "logprobs": False, "logit_bias": {},
        "presence_penalty": 0.0, "response_format": {"type": "text"}, "user": "me",
        "metadata": {"a": "b"}, "stop": None,
        "max_tokens": None, "temperature": None, "stream": None, "top_logprobs": None, "store": False,
    }  # fmt: skip
    assert read(**neutral).turn == Turn("")


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 2.5}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop.1"),
        ({"stop": list("abcde")}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_token": 5}, "max_token"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [ASSISTANT]}, "messages.0"),
        ({"messages": [USER, USER]}, "messages.1"),
        ({"messages": [USER, ASSISTANT]}, "messages"),
        ({"messages": [SYSTEM]}, "messages"),
        ({"messages": [USER, SYSTEM]}, "messages.1"),
        ({"messages": [{"role": "user", "content": "  "}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [{}]}, USER]}, "messages.1.tool_calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages.0.content.0.type",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        read(**fields)
    assert (refused.value.status, refused.value.param) == (400, param)
    assert refused.value.to_dict()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [5, 6]}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"logprobs": 0}, "logprobs"),
        ({"suffix": "."}, "suffix"),
        ({"messages": [USER]}, "messages"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_what_cannot_be_done_for_a_text_is_refused_by_its_field(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as refused:
        read_text_request(json.dumps({"model": "demo", "prompt": "hello", **fields}).encode(), "demo")
    assert (refused.value.status, refused.value.param) == (400, param)


def test_parts_of_text_and_system_messages_become_one_question() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    developer = {"role": "developer", "content": "In English."}
    request = read(messages=[SYSTEM, developer, {"role": "user", "content": parts}])
    assert request.messages == (Said(Role.USER, "Be brief.\n\nIn English.\n\none\ntwo"),)


def test_an_answer_that_was_empty_may_be_sent_back() -> None:
    assert read(messages=[USER, {**ASSISTANT, "content": ""}, USER]).messages[1].text == ""


def test_earlier_turns_stand_before_the_question() -> None:
    said = [Said(Role.USER, "a"), Said(Role.ASSISTANT, "b"), Said(Role.USER, "c")]
    assert question_of(said[2:]) == "c"
    assert question_of(said) == "User: a\n\nAssistant: b\n\nUser: c"
    assert question_of(said[1:]) == "Assistant: b\n\nUser: c"


BODIES = [
    {"model": "demo", "messages": [SYSTEM, USER, ASSISTANT, USER], "stream": True, "stop": ["x"], "seed": 5},
    {"model": "demo", "messages": [{"role": "user", "content": [{"type": "text", "text": "\u2028"}]}]},
]


TEXTS = [{"model": "demo", "prompt": ["x"], "echo": False, "stream": True, "stop": ["x"], "seed": 5}]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "read_body, bodies", [(read_request, BODIES), (read_text_request, TEXTS)], ids=["messages", "a text"]
)
def test_any_body_is_read_or_refused(
    read_body: Callable[[bytes, str], CompletionRequest], bodies: list[Any], seed: int
) -> None:
    """Bytes that differ from a body's, and values of every kind in every place of one."""
    draw, seeds = random.Random(seed), [json.dumps(body).encode() for body in bodies]
    for number in range(500):
        if number % 2:
            data = damaged(draw, draw.choice(seeds), seeds)
        else:
            data = json.dumps(replaced(draw, draw.choice(bodies))).encode()
        try:
            request = read_body(data, "demo")
        except Refusal as refused:
            assert refused.status in (400, 404)
            json.dumps(refused.to_dict(), allow_nan=False).encode()
        else:
            assert question_of(request.messages).encode()  # no half of a character


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"null", b"\xff", b'{"a":' * 5000, b"[" * 100_000, b'{"model": NaN}', b'"\\ud800"']
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(Refusal) as refused:
        read_request(data, "demo")
    assert refused.value.status == 400

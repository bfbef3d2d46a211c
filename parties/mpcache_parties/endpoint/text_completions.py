"""Read and write OpenAI's older completions: a text that is continued, without a chat template."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from mpcache_parties.endpoint.bodies import NEUTRAL, Body, Neutral, read_object, validated
from mpcache_parties.endpoint.completions import CompletionRequest, Role, Said
from mpcache_parties.endpoint.refusals import Refusal

LONGEST = 16  # tokens of an answer, unless told otherwise: OpenAI's own default

_NEUTRAL: Neutral = {
    **NEUTRAL,
    "echo": (False,),
    "best_of": (1,),
    "logprobs": (),
    "suffix": ("",),
}


@dataclass(frozen=True)
class TextRequest(CompletionRequest):
    """What such a request asks for: its prompt is the one message."""

    ID: ClassVar[str] = "cmpl"
    OBJECT: ClassVar[str] = "text_completion"
    CHUNK: ClassVar[str] = "text_completion"
    RAW: ClassVar[bool] = True

    def _part(self, piece: str, begins: bool) -> dict[str, Any]:
        return {"text": piece, "logprobs": None}

    def _all(self, text: str) -> dict[str, Any]:
        return {"text": text}


class _Body(Body):
    prompt: Any = None


def read_text_request(data: bytes, models: Collection[str]) -> TextRequest:
    """Read a body. models: that are served. Raises Refusal with the field that is wrong."""
    body = validated(_Body, read_object(data, _NEUTRAL))
    body.check(models)
    turn = body.turn(body.max_tokens or LONGEST)
    return TextRequest(
        body.model, (Said(Role.USER, _prompt(body.prompt)),), turn, bool(body.stream), body.include_usage
    )


def _prompt(given: Any) -> str:
    text = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(text, str):
        raise Refusal(400, "prompt: one text, or a list of one; token ids are not read here", "prompt")
    if not text.strip():
        raise Refusal(400, "prompt: is empty", "prompt")
    return text

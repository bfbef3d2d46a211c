"""Read what the bodies of all of OpenAI's completions share: bounds, draws, stops, and how faults are told.

What this endpoint cannot do is refused by the field's name, never left out in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import from_json

from mpcache_parties.chat import Turn
from mpcache_parties.endpoint.refusals import Refusal

LARGEST_SEED = 2**63 - 1
STOPS = 4  # strings

Neutral = Mapping[str, tuple[object, ...]]

# Fields of the API that are refused, but for the values that ask for nothing.
NEUTRAL: Neutral = {
    "n": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
# Fields that change no answer. What they say goes no further.
_UNUSED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")


class Strict(BaseModel):
    """A JSON object without unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # asked for or not: an answer's length is public between the parties


class Body(Strict):
    """What the bodies of all completions have."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    stop: str | list[Annotated[str, StringConstraints(min_length=1)]] | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, le=LARGEST_SEED)
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self, models: Collection[str]) -> None:
        """Raise Refusal where the model is none of those that are served, or options have no stream."""
        check_served(self.model, models)
        if self.stream_options is not None and not self.stream:
            raise Refusal(400, "stream_options: needs stream: true", "stream_options")

    def turn(self, longest: int | None) -> Turn:
        """Return all that is asked for but the text. longest: tokens of the answer. Raises Refusal."""
        temperature = self.temperature or 0.0
        return Turn(
            "",
            max_new_tokens=longest,
            stop=self._stops(),
            temperature=temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=secrets.randbelow(LARGEST_SEED) if self.seed is None and temperature else self.seed,
        )

    def _stops(self) -> tuple[str, ...]:
        stops = tuple([self.stop] if isinstance(self.stop, str) else self.stop or ())
        if len(stops) > STOPS or not all(stops):
            raise Refusal(400, f"stop: up to {STOPS} texts that are not empty", "stop")
        return stops


SomeBody = TypeVar("SomeBody", bound=Body)


def check_served(name: str, models: Collection[str]) -> None:
    """Raise Refusal where a model of this name is not served."""
    if name not in models:
        there = " or ".join(map(repr, models))
        raise Refusal(
            404, f"the model {name!r:.80} is not served here; ask for {there}", "model", "model_not_found"
        )


def read_object(data: bytes, neutral: Neutral) -> dict[str, Any]:
    """Read a JSON object, without the fields that ask for nothing. Raises Refusal."""
    try:
        body = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise Refusal(400, "the body is not a JSON object")
    for name in _UNUSED:
        body.pop(name, None)
    without(body, neutral)
    return body


def without(body: dict[str, Any], neutral: Neutral, where: str = "") -> None:
    """Take out the fields that ask for nothing. Raises Refusal on those that ask for what there is not."""
    for name, values in neutral.items():
        value = body.pop(name, None)
        if value is not None and value not in values:
            raise Refusal(400, f"{where}{name}: is not supported here", where + name, "unsupported_parameter")


def validated(kind: type[SomeBody], body: Mapping[str, Any]) -> SomeBody:
    """Check a body against its model. Raises Refusal with the field that is wrong."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _named(error) from None


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

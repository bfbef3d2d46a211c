"""Read a model's chat template as what it puts around messages: literal text between slots.

The template is rendered with placeholders for the messages, and never sees a message itself. What it makes of
a message is therefore the same for all of them: nothing about a text can show in the number of tokens around
it, and what somebody types cannot steer the template. A template that treats texts differently by what they
say, beyond taking the white space off their ends, is refused.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path

from mpcache.errors import ModelError
from mpcache.model import render_templates
from mpcache.model.checks import first_words, read_small_file
from mpcache.model.tensor_files import read_json_object

WALL_S = 30.0  # that a rendering may take, on a busy machine
LARGEST_TEMPLATE = 1 << 20  # characters
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

_LEFT, _RIGHT = " \n\t", "\t \n"  # put around a placeholder, to see what the template takes off
_WORDS = (  # two sets of placeholders: what is between them must not depend on them
    ("Quorvax", "Blimtern", "Zondaly", "Fexworth", "Grindole", "Mubrask"),
    ("Tolpince", "Vashmire", "Jorquell", "Wydrant", "Kelbosk", "Pinvault"),
)
_ROLES = ("user", "assistant", "user", "assistant", "user")


class Unframed(ModelError):
    """A template that cannot be used as it is asked for."""


@dataclass(frozen=True)
class Skeleton:
    """A rendered conversation without its messages, up to and with the prompt for an answer.

    literals: what is before, between and after the messages, one more than there are messages.
    trimmed: of each message, whether the template takes the white space off its start and its end.
    """

    literals: tuple[str, ...]
    trimmed: tuple[tuple[bool, bool], ...]


@dataclass(frozen=True)
class Dialogue:
    """What a template puts around the messages of a conversation of any length.

    first: up to the first answer; the system message is among its slots, or is not.
    answered: from the end of an answer that is there to the user's next message.
    prompt: from the end of that message to the next answer.
    headers: in place of the prompt where the answer is there, too: of the first answer, and of the others.
    answer_trimmed, later_trimmed: as `Skeleton.trimmed`, of an answer that is there, and of later questions.
    single: why there is no second turn, if there is none.
    """

    first: Skeleton
    answered: str = ""
    prompt: str = ""
    headers: tuple[str, str] = ("", "")
    answer_trimmed: tuple[bool, bool] = (False, False)
    later_trimmed: tuple[bool, bool] = (False, False)
    single: str = ""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat template.

    source: in Jinja.  tokens: what it calls `bos_token`, `eos_token`, ..., as text.
    """

    source: str
    tokens: Mapping[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return it as the parties send and compare it."""
        return json.dumps({"source": self.source, "tokens": dict(self.tokens)}, sort_keys=True).encode()

    @staticmethod
    def from_bytes(data: bytes) -> ChatTemplate:
        """Read what `to_bytes` makes. Raises ModelError."""
        try:
            tree = json.loads(data)
            source, tokens = tree["source"], tree["tokens"]
            texts = [source, *tokens, *tokens.values()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ModelError("the chat template cannot be read", private=False) from None
        if not all(isinstance(text, str) for text in texts):
            raise ModelError("the chat template is no text", private=False)
        return ChatTemplate(source, tokens)

    @property
    def digest(self) -> str:
        """Its sha256, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def render(self, conversations: Sequence[tuple[Sequence[Mapping[str, str]], bool]]) -> list[list[str]]:
        """Render conversations, each with or without the prompt for an answer.

        Returns [text, ""] or ["", why there is none] for each. Raises Unframed for a template that is none,
        or takes too long.
        """
        if len(self.source) > LARGEST_TEMPLATE:
            raise Unframed(f"the chat template has {len(self.source)} characters, beyond {LARGEST_TEMPLATE}")
        request = {"source": self.source, "tokens": dict(self.tokens), "conversations": conversations}
        try:
            done = subprocess.run(
                [sys.executable, "-P", render_templates.__file__],
                input=json.dumps(request).encode(), capture_output=True, timeout=WALL_S, check=False,
            )  # fmt: skip
            answer = json.loads(done.stdout) if done.stdout else None
        except (subprocess.TimeoutExpired, ValueError):
            answer = None
        if answer is None:
            limit = f"{render_templates.CPU_S} s or {render_templates.MEMORY >> 20} MiB"
            raise Unframed(f"the chat template takes more than {limit}")
        if "error" in answer:
            raise Unframed(f"the chat template cannot be used: {first_words(answer['error'])}")
        texts: list[list[str]] = answer["texts"]
        return texts

    @property
    def with_system(self) -> Dialogue:
        """How it frames a conversation with a system message. Raises Unframed."""
        return _there(self._read[0])

    @property
    def without_system(self) -> Dialogue:
        """How it frames a conversation without one. Raises Unframed."""
        return _there(self._read[1])

    @cached_property
    def _read(self) -> tuple[Dialogue | Unframed, ...]:
        """Render all that has to be known, in one process."""
        shapes = [(*head, *_ROLES[:n]) for head in (("system",), ()) for n in (1, 3, 5)]
        try:
            texts = self.render([each for roles in shapes for each in _probes(roles)])
        except Unframed as why:  # kept: one that takes too long is not tried again
            return why, why
        every = len(texts) // len(shapes)
        rendered = [texts[i : i + every] for i in range(0, len(texts), every)]
        found: list[Dialogue | Unframed] = []
        for turns, before in ((rendered[:3], 2), (rendered[3:], 1)):
            try:
                found.append(_conversation(turns, before))
            except Unframed as why:
                found.append(why)
        return tuple(found)


def fitted(message: str, trimmed: tuple[bool, bool]) -> str:
    """Return a message as the template puts it into its slot; trimmed: at its start, at its end."""
    message = message.lstrip() if trimmed[0] else message
    return message.rstrip() if trimmed[1] else message


def _there(found: Dialogue | Unframed) -> Dialogue:
    if isinstance(found, Unframed):
        raise found
    return found


def _probes(roles: Sequence[str]) -> list[tuple[list[dict[str, str]], bool]]:
    """Return placeholders in these roles, and whether an answer is prompted for, for `_skeleton`."""

    def said(words: Sequence[str], left: str, right: str) -> list[dict[str, str]]:
        return [{"role": r, "content": left + w + right} for r, w in zip(roles, words, strict=False)]

    one, other = _WORDS
    return [
        (said(one, "", ""), True), (said(other, "", ""), True),
        (said(one, _LEFT, _RIGHT), True), (said(one, "", ""), False),
    ]  # fmt: skip


def _skeleton(texts: Sequence[Sequence[str]], messages: int) -> Skeleton:
    """Cut the placeholders of so many messages out of what was rendered of `_probes`. Raises Unframed."""
    for _, why in texts[:3]:
        if why:
            raise Unframed(f"the chat template refuses: {first_words(why)}")
    words = [each[:messages] for each in (*_WORDS, _WORDS[0])]
    one, other, padded = (_cut(text, each) for (text, _), each in zip(texts[:3], words, strict=True))
    if one != other:
        raise Unframed("the chat template writes something else around other texts")
    return Skeleton(one, _trimmed(one, padded))


def _cut(text: str, words: Sequence[str]) -> tuple[str, ...]:
    """Return what is around these words, each of which is there once, in this order. Raises Unframed."""
    if any(text.count(word) != 1 for word in words):
        raise Unframed("the chat template leaves a message out, changes it or repeats it")
    literals = []
    for word in words:
        literal, found, text = text.partition(word)
        if not found:
            raise Unframed("the chat template puts the messages in another order")
        literals.append(literal)
    return (*literals, text)


def _trimmed(plain: Sequence[str], padded: Sequence[str]) -> tuple[tuple[bool, bool], ...]:
    """Tell what is taken off each message, from literals around placeholders with and without white space."""
    starts, ends = [], []
    last = len(plain) - 1
    for i, (literal, wide) in enumerate(zip(plain, padded, strict=True)):
        for right, left in product((_RIGHT, "") if i else ("",), (_LEFT, "") if i < last else ("",)):
            if wide == right + literal + left:
                break
        else:
            raise Unframed("the chat template changes the messages, beyond the white space at their ends")
        ends.append(not right)
        starts.append(not left)
    return tuple(zip(starts[:-1], ends[1:], strict=True))


def _conversation(turns: Sequence[Sequence[Sequence[str]]], before: int) -> Dialogue:
    """Put together what stays the same in conversations of one, two and three turns. Raises Unframed.

    before: the messages before the first answer, 1 or 2.
    """
    first = _skeleton(turns[0], before)
    refusals = [why for texts in turns[1:] for _, why in texts if why]
    if refusals:
        return Dialogue(first, single=first_words(refusals[0]))
    second, third = (_skeleton(texts, before + n) for texts, n in ((turns[1], 2), (turns[2], 4)))
    header, answered, next_header, again, prompt = third.literals[before:]
    if turns[0][0] == turns[0][3] and header.rstrip() != first.literals[-1].rstrip():
        raise Unframed("the chat template has no prompt for an answer (add_generation_prompt)")
    if not (
        first.literals[:before] == second.literals[:before] == third.literals[:before]
        and second.literals[before + 1] == again == answered
        and second.literals[-1] == prompt
        and third.trimmed == first.trimmed + 2 * second.trimmed[before:]
    ):
        raise Unframed("the chat template writes the beginning of a conversation anew as it goes on")
    answer_trimmed, later_trimmed = second.trimmed[before:]
    return Dialogue(first, answered, prompt, (header, next_header), answer_trimmed, later_trimmed)


def template_of_folder(folder: Path | str) -> ChatTemplate | None:
    """Read a model folder's chat template, or None where it has none. Raises ModelError.

    It is in chat_template.jinja, or in tokenizer_config.json: as a text, or as a list of named ones, of which
    `default` is taken.
    """
    folder = Path(folder)
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    values = read_json_object(config) if config.is_file() else {}
    source = values.get("chat_template")
    if file.is_file():
        try:
            source = read_small_file(file).decode()
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: cannot be read as a chat template: {error}") from None
    if isinstance(source, list):
        source = _named(source, f"{config}: chat_template")
    if source is None or source == "":
        return None
    if not isinstance(source, str):
        raise ModelError(f"{config}: chat_template must be a text, or a list of named ones")
    tokens = {}
    for name in SPECIAL_TOKENS:
        value = values.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(source, tokens)


def _named(templates: Sequence[object], where: str) -> object:
    """Return the template that is called `default`, or the only one there is. Raises ModelError."""
    named = {each.get("name"): each.get("template") for each in templates if isinstance(each, dict)}
    if "default" in named:
        return named["default"]
    if len(named) == 1:
        return next(iter(named.values()))
    raise ModelError(f"{where} has none that is named default, of {len(named)}; name one so")

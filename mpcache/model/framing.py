"""Frame a document and questions as token ids: each party its own text, without the other's words.

The document's tokens come first, then the first question's, the answer's, the next question's, and so on.
Laid side by side they are the tokens of the whole conversation, rendered and tokenized at once. Where the
document's part ends is found by trying: it is the last token that is the same whatever the question may be.
Each party checks this with its own text, and refuses a text whose first or last characters the tokenizer
would join to what stands beside it.

Only a template's own text is searched for special tokens. A document or a question that spells one is text:
its author cannot end a message, nor begin one in another's name.
"""

from __future__ import annotations

import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import takewhile

from mpcache.choices import DocumentAs
from mpcache.errors import BadInput
from mpcache.model.chat_template import ChatTemplate, Dialogue, Unframed, fitted
from mpcache.model.shape import ModelShape
from mpcache.model.tokenizer import Tokenizer

Piece = tuple[str, bool]  # a text, and whether it is the template's own

PRIVATE = "the client's document"
_BETWEEN = "\n\n"  # the document and the first question, where both are one message
# Texts that stand for the other party's. Questions begin, and documents end, in many ways; answers end in
# letters: what a tokenizer would join to their end was generated before.
_QUESTIONS = (
    "Alpha", "the", "What", "a b", "7 x", "\nx", "\n\n\nx", "  y", "(z", "é", "好", "\tx", "..", "--", "'s",
)  # fmt: skip
_DOCUMENTS = ("Alpha.", "42 is", "((好")
_ANSWERS = ("Alpha", "it is 42", "好")


class Framing(ABC):
    """What is put around a document, questions and answers.

    end_tokens: token ids that end an answer.  note: what a user should know of the framing, or "".
    single: why there is no second turn, or "".
    """

    note = ""
    single = ""

    def __init__(self, tokenizer: Tokenizer, shape: ModelShape) -> None:
        self.tokenizer, self.most = tokenizer, shape.max_positions
        self.end_tokens = frozenset(shape.eos_ids)

    @abstractmethod
    def frame_document(self, text: str | None) -> list[int]:
        """Return all tokens before the first question's; text: None where there is no document.

        Raises BadInput where they are none or too many, or cannot be told from the question's.
        """

    @abstractmethod
    def frame_dialogue(self, texts: Sequence[str]) -> list[int]:
        """Return all tokens after the document's, of question, answer, question, ...; the last is a question.

        Raises BadInput or ModelError.
        """

    @abstractmethod
    def frame_private(self, document: str) -> list[int]:
        """Return the tokens of the client's own document, which stands before its first question.

        They follow the tokens of `frame_document`, and are the same whatever the question is.
        Raises BadInput.
        """

    @abstractmethod
    def _first_turn(self, document: str, text: str) -> list[int]:
        """Return the tokens of the client's document and its first question."""

    @abstractmethod
    def _later_turn(self, text: str) -> list[int]: ...

    @abstractmethod
    def between(self, ended: bool) -> list[int]:
        """Return the tokens from an answer's last word to the next question's first.

        ended: the token that ended the answer is there already.
        """

    def frame_turn(self, text: str, first: bool, private: str | None = None) -> list[int]:
        """Return a question's tokens, up to and with the prompt for an answer.

        A later one begins with what stands between an answer's last word and it. private: the client's
        document, whose tokens (`frame_private`) come before the first one's. Raises as `frame_dialogue`.
        """
        if not first:
            return self._later_turn(text)
        if private is None:
            return self.frame_dialogue([text])
        document, both = self.frame_private(private), self._first_turn(private, text)
        if both[: len(document)] != document:
            raise BadInput(
                "the tokenizer joins the question's first characters to the document before them; begin it "
                "with a letter, or use --raw"
            )
        return both[len(document) :]

    def next_turn(self, answer: Sequence[int], text: str, ended: bool) -> list[int]:
        """Return the tokens to take in after an answer, all but whose last token was taken in.

        answer: the ids as they were chosen.  ended: it is known to all that the last of these ended the
        answer. That token is left out: the template has its own. Where it is not known, a token that happens
        to be an end token stays: the number of tokens must not tell.
        """
        return [*([] if ended else answer[-1:]), *self.frame_turn(text, False)]


class RawFraming(Framing):
    """No template: the document and the questions as they are, one after the other."""

    def frame_document(self, text: str | None) -> list[int]:
        if text is not None:
            return self.tokenizer.encode_within(text, True, self.most, "the context")
        if self.tokenizer.bos_id is None:
            raise BadInput("the model has no token that begins a text; give it a --context")
        return [self.tokenizer.bos_id]

    def frame_dialogue(self, texts: Sequence[str]) -> list[int]:
        if len(texts) == 1:
            return self.tokenizer.encode_within(texts[0], False, self.most, "the question")
        return [token for text in texts for token in self.frame_dialogue([text])]

    def frame_private(self, document: str) -> list[int]:
        return self.tokenizer.encode_within(document, False, self.most, PRIVATE)

    def _first_turn(self, document: str, text: str) -> list[int]:
        return [*self.frame_private(document), *self.frame_dialogue([text])]

    def _later_turn(self, text: str) -> list[int]:
        return self.frame_dialogue([text])

    def between(self, ended: bool) -> list[int]:
        return []


class ChatFraming(Framing):
    """A model's chat template around all of them.

    document_as: where the template finds the document; has_document: whether there is one.
    Raises ModelError for a template that cannot frame a conversation so.
    """

    def __init__(
        self, template: ChatTemplate, tokenizer: Tokenizer, shape: ModelShape,
        document_as: DocumentAs = DocumentAs.SYSTEM, has_document: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, shape)
        self._as = document_as if has_document else None
        self._around = self._dialogue_of(template)
        if self._around.single:
            self.single = f"the model takes one question in a session: {self._around.single}"
        if (end := self._control.match(self._around.answered.lstrip())) is not None:
            self.end_tokens |= {tokenizer.added[end[0]][0]}

    def _dialogue_of(self, template: ChatTemplate) -> Dialogue:
        """Return what the template puts around a document where it is asked for, else at the user's."""
        if self._as is DocumentAs.SYSTEM:
            try:
                return template.with_system
            except Unframed as why:
                self._as = DocumentAs.USER
                self.note = f"the document stands before the first question (--document-as user): {why}"
        try:
            return template.without_system
        except Unframed as why:
            raise Unframed(f"{str(why).rstrip('.')}; use --raw, which uses no template") from None

    # -------------------------------------------------------------------------------- tokens of pieces

    @cached_property
    def _names(self) -> dict[str, str]:
        """New spellings, which nobody can guess, of the tokens that steer the model.

        These are the special ones, and what else the template itself writes: <think>, say.
        """
        around = self._around
        own = "\0".join((*around.first.literals, around.answered, around.prompt, *around.headers))
        steering = [
            token
            for token, (_, special) in self.tokenizer.added.items()
            if token and (special or (token in own and not token.isspace()))
        ]
        secret = secrets.token_hex(8)
        return {token: f"<|{secret}.{i}|>" for i, token in enumerate(steering)}

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self._names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _respelled(self) -> Tokenizer:
        return self.tokenizer.respelled(self._names)

    def _encode(self, pieces: Iterable[Piece]) -> list[int]:
        """Tokenize pieces as one text, in which only the template's own may spell control tokens."""
        return self._respelled.encode(self._joined(pieces), bos=False)

    def _joined(self, pieces: Iterable[Piece]) -> str:
        return "".join(
            self._control.sub(lambda found: self._names[found[0]], text) if own else text
            for text, own in pieces
        )

    # ------------------------------------------------------------------------------------- the pieces

    def _opening(self, document: str | None) -> list[Piece]:
        """Return all that stands before the first question."""
        literals = self._around.first.literals
        match self._as:
            case DocumentAs.SYSTEM:
                text = fitted(document or "", self._around.first.trimmed[0])
                return [(literals[0], True), (text, False), (literals[1], True)]
            case DocumentAs.USER:
                return [(literals[0], True), ((document or "").strip() + _BETWEEN, False)]
            case _:
                return [(literals[0], True)]

    def _first(self, text: str) -> str:
        """Return the first question as it stands behind `_opening`."""
        both = (True, True)
        return fitted(text, both if self._as is DocumentAs.USER else self._around.first.trimmed[-1])

    def _dialogue(self, texts: Sequence[str], open_end: bool = False) -> list[Piece]:
        """Return question, answer, question, ...; open_end: an answer is last, and nothing follows it."""
        around = self._around
        pieces: list[Piece] = [(self._first(texts[0]), False)]
        for i, text in enumerate(texts[1:]):
            if i % 2 == 0:  # an answer
                text = fitted(text, around.answer_trimmed)
                pieces += [(around.headers[min(i, 1)], True), (text, False)]
            else:
                pieces += [(around.answered, True), (fitted(text, around.later_trimmed), False)]
        if open_end:
            return pieces
        return [*pieces, (around.prompt if len(texts) > 1 else around.first.literals[-1], True)]

    @property
    def _documents(self) -> Sequence[str | None]:
        return (None,) if self._as is None else _DOCUMENTS

    # --------------------------------------------------------------------------------------- the parts

    def _head(self, document: str | None) -> list[int]:
        """Return the tokens that are there whatever the question is."""
        opening = self._opening(document)
        wholes = [self._joined([*opening, *self._dialogue([text])]) for text in _QUESTIONS]
        most = self._respelled.count_within(wholes[0], len(self._joined(opening)))
        return _common([self._respelled.encode(whole, bos=False) for whole in wholes])[:most]

    @cached_property
    def _heads(self) -> list[list[int]]:
        return [self._head(document) for document in self._documents]

    def _rest(self, pieces: Sequence[Piece]) -> list[int]:
        """Return what follows the document's tokens, whatever the document is. Raises BadInput."""
        rests = []
        for document, head in zip(self._documents, self._heads, strict=True):
            whole = self._encode([*self._opening(document), *pieces])
            rests.append(whole[len(head) :] if whole[: len(head)] == head else None)
        if rests[0] is None or any(rest != rests[0] for rest in rests):
            raise BadInput(
                "the tokenizer joins the question's first characters to what stands before them; begin it "
                "with a letter, or use --raw"
            )
        return rests[0]

    def frame_document(self, text: str | None) -> list[int]:
        if (text is None) != (self._as is None):
            raise ValueError("a framing is made for a document, or for none")
        if text is not None:
            if not text.strip():
                raise BadInput("the context is empty; it needs at least one token")
            self.tokenizer.encode_within(text, False, self.most, "the context")
        head = self._head(text)
        if not head:
            raise BadInput("the chat template begins with the question; give a --context, or use --raw")
        probe = self._dialogue(_QUESTIONS[:1])
        if self._encode([*self._opening(text), *probe]) != head + self._rest(probe):
            raise BadInput(
                "the tokenizer joins the document's last characters to what stands after them; end it with a "
                "full stop, or use --raw"
            )
        return self._within(head, "the context")

    def frame_dialogue(self, texts: Sequence[str]) -> list[int]:
        for text in texts:
            self._check(text)
        if len(texts) > 1:
            self._check_later()
        return self._within(self._rest(self._dialogue(texts)), "the question")

    def frame_private(self, document: str) -> list[int]:
        if not document.strip():
            raise BadInput(f"{PRIVATE} is empty; it needs at least one token")
        self.tokenizer.encode_within(document, False, self.most, PRIVATE)
        before = self._joined([*self._opening(self._documents[0]), (_together(document, ""), False)])
        whole = [self._rest(self._dialogue([_together(document, text)])) for text in _QUESTIONS]
        most = self._respelled.count_within(before + _QUESTIONS[0], len(before)) - len(self._heads[0])
        return self._within(_common(whole)[: max(0, most)], PRIVATE)

    def _first_turn(self, document: str, text: str) -> list[int]:
        self._check(text)
        return self._within(self._rest(self._dialogue([_together(document, text)])), "the question")

    def _later_turn(self, text: str) -> list[int]:
        self._check(text)
        self._check_later()
        rests = []
        for document, answer in zip(_DOCUMENTS, _ANSWERS, strict=True):
            opening = self._opening(None if self._as is None else document)
            before = self._encode([*opening, *self._dialogue(["Alpha", answer], open_end=True)])
            whole = self._encode([*opening, *self._dialogue(["Alpha", answer, text])])
            rests.append(whole[len(before) :] if whole[: len(before)] == before else None)
        if rests[0] is None or any(rest != rests[0] for rest in rests):
            raise BadInput("the tokenizer joins an answer's end to what follows it; ask in a new session")
        return self._within(rests[0], "the question")

    def between(self, ended: bool) -> list[int]:
        tokens = _common([self._later_turn(text) for text in _QUESTIONS])
        ends = [i for i, token in enumerate(tokens) if token in self.end_tokens]
        return tokens[ends[0] + 1 :] if ended and ends else tokens

    def _check(self, text: str) -> None:
        if not text.strip():
            raise BadInput("the question is empty")
        self.tokenizer.encode_within(text, False, self.most, "the question")

    def _check_later(self) -> None:
        if self.single:
            raise BadInput(self.single)

    def _within(self, ids: list[int], what: str) -> list[int]:
        if len(ids) > self.most:
            raise BadInput(f"{what} has {len(ids)} tokens, the model allows {self.most}; shorten it")
        return ids


def _together(document: str, question: str) -> str:
    """Put the client's document before its first question: both are one message."""
    return document.strip() + _BETWEEN + question.strip()


def _common(lists: Sequence[list[int]]) -> list[int]:
    """Return what all of these begin with."""
    together = takewhile(lambda tokens: len(set(tokens)) == 1, zip(*lists, strict=False))
    return [tokens[0] for tokens in together]


def make_framing(
    tokenizer: Tokenizer, shape: ModelShape, raw: bool, document_as: DocumentAs, has_document: bool
) -> Framing:
    """Frame by the tokenizer's chat template, or by none: where it has none, or `raw`. Raises ModelError."""
    if raw or tokenizer.chat_template is None:
        return RawFraming(tokenizer, shape)
    return ChatFraming(tokenizer.chat_template, tokenizer, shape, document_as, has_document)

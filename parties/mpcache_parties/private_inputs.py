"""Hold what a party brings in private: the server its model and document, the client its questions."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mpcache.choices import ChatForm
from mpcache.config import PublicConfig
from mpcache.console.inputs import read_context
from mpcache.errors import BadInput, Mismatch
from mpcache.model import Model, demo_model_dir, find_model, load_model, load_shape, load_tokenizer
from mpcache.model.chat_template import ChatTemplate
from mpcache.model.framing import make_framing
from mpcache.policy import LeakClass, Policy
from mpcache.policy.layer_view import PackedContext
from mpcache.report.account import TurnReport
from mpcache.sampling import Sampling
from mpcache_parties.handshake import NO_NAME


@dataclass(frozen=True)
class Document:
    """What the server brings.

    tokens: of the document and what is around it, up to the first question; none of one that was packed.
    device: where it is read.  template: what is around, and of the question, too; None: nothing.
    written: there is a document.  note: what a user should know of this.
    packed: what stays of it, where that was found out before.  name: its public name.
    """

    model: Model
    tokens: list[int]
    device: str = "cpu"
    template: ChatTemplate | None = None
    written: bool = True
    note: str = ""
    packed: PackedContext | None = None
    name: str = ""

    @property
    def length(self) -> int:
        """Its tokens, with what is around it, before eviction."""
        return len(self.tokens) if self.packed is None else self.packed.length

    @property
    def digest(self) -> str:
        """A digest of what the session's cache follows from; for its owner alone."""
        return private_digest(self.tokens) if self.packed is None else self.packed.digest

    def counts_of_model(self, policy: Policy) -> list[int]:
        """Return what the model and the length decide of a policy's plan. Raises PolicyError."""
        if self.packed is None:
            return policy.count_from_model(self.model, len(self.tokens))
        told = LeakClass.MODEL_COUNT in policy.leak.split(" and ")
        return list(self.packed.counts) if told else []


def private_digest(secret: object) -> str:
    """Return a digest of a party's own input, for its own use: to tell whether it is the same again."""
    return hashlib.sha256(repr(secret).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Documents:
    """What a server brings that holds several documents, of which a client names one."""

    named: Mapping[str, Document]  # by public name

    def of(self, name: str, hidden: bool = False) -> Document:
        """Return the one that a client has named. hidden: no error says a name. Raises Mismatch."""
        if name not in self.named:
            if hidden:
                raise Mismatch(
                    "Mismatch: the document that the client names, or does not, is none of the server's; "
                    "start the client with --document NAME"
                )
            asked = "is not named" if name == NO_NAME else f"is {name!r:.80}"
            raise Mismatch(
                f"Mismatch: the document {asked} at client; the server has {', '.join(sorted(self.named))}: "
                "start the client with --document NAME"
            )
        return self.named[name]


@dataclass(frozen=True)
class Question:
    """What the client brings. Without `stop_at_eos` the answer's length tells nothing about it.

    stop_texts: the answer is cut before these.  document: the client's own.
    new_tokens: of the answer, at most; None: as many as were agreed.
    """

    text: str
    sampling: Sampling = Sampling()
    stop_at_eos: bool = True
    stop_texts: tuple[str, ...] = ()
    new_tokens: int | None = None
    document: str | None = None

    def limit(self, agreed: int) -> int:
        """Return how many tokens the answer may have, where `agreed` is the most."""
        return agreed if self.new_tokens is None else min(agreed, self.new_tokens)


@dataclass
class TurnRecord:
    """A question that was asked, and what there is of its answer.

    asked: the token ids that are taken in for it.  limit: tokens of the answer, at most.
    chunks: what is taken in, at most: `asked`, and then single tokens, beyond the answer's to fill up.
    ids: the answer's so far.  draws: where the draws of its tokens stand.  report: once it is complete.
    """

    question: Question
    asked: list[int]
    limit: int
    chunks: int
    ids: list[int] = field(default_factory=list)
    draws: Any = None
    report: TurnReport | None = None


@dataclass(frozen=True)
class DeclaredTurns:
    """What the client declares of a conversation that tapes are prepared for: its questions, in tokens."""

    questions: tuple[int, ...]
    document: str | None = None  # the client's own


class Conversation(ABC):
    """Questions that come while the session runs, and what becomes of each.

    document: the client's own, which they are about.
    """

    document: str | None = None

    @abstractmethod
    def opened(self, room: int, earlier: Sequence[TurnRecord], raw: bool) -> None:
        """Take note that questions may come, which with their answers may take `room` tokens.

        raw: no chat template stands around them.
        earlier: the turns of a session that goes on; the last one's answer may be in the middle, and is told
        from its beginning.
        """

    @abstractmethod
    def questions(self, look: Callable[[], None]) -> Iterator[Question]:
        """Yield questions as they come, until there are no more.

        look: called now and then while none comes; raises what has happened to the session.
        """

    @abstractmethod
    def stopped(self) -> bool:
        """Return whether the answer that runs is to end after its present token."""

    def over(self) -> bool:
        """Return whether no more questions will come."""
        return False

    @abstractmethod
    def answered(self, report: TurnReport) -> None:
        """Take note of an answer that is complete."""

    @abstractmethod
    def refused(self, why: BadInput) -> None:
        """Take note of a question that was not asked; the session goes on."""


# None: the dealer's
PrivateInput = Document | Documents | Question | Conversation | DeclaredTurns | None


def read_document(model: str | None, context: Path | None, public: PublicConfig) -> Document:
    """Load the server's model and read its document.

    Without a model: the demo's, and its document. A model of one's own needs no document.
    Raises BadInput: a model or a text that cannot be used, or more tokens than the model allows.
    """
    text = read_context(model, context)
    path = demo_model_dir() if model is None else find_model(model)
    # The text is looked at before the weights are: they take minutes where a model is large.
    tokenizer, shape = load_tokenizer(path), load_shape(path)
    raw, written = public.chat is ChatForm.RAW, text is not None
    framing = make_framing(tokenizer, shape, raw, public.document_as, written)
    tokens = framing.frame_document(text)
    template = None if raw else tokenizer.chat_template
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_read = load_model(path, keep=False)  # set-up and prefill take one layer after another
    return Document(model_read, tokens, device, template, written, framing.note)

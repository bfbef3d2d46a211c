"""A conversation whose questions a test gives, and what the plain engine answers to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from mpcache.answer import PlainConversation
from mpcache.config import PublicConfig
from mpcache.errors import BadInput
from mpcache.limits import bind_conversation
from mpcache.model import Model
from mpcache.report.account import TurnReport
from mpcache.sampling import Sampling
from mpcache_parties.private_inputs import Conversation, Question, TurnRecord

QUESTIONS = ["the book of", " and the number", " is in"]
NEAR = 0.02  # logits of the tiny model: two that are nearer than their errors may change places


@dataclass
class Scripted(Conversation):
    """Asks what a list says, and of a session that goes on what it was not asked yet.

    stop_after: tokens of the first answer after which it has heard enough.  earlier: turns that are kept.
    """

    script: Sequence[Question]
    stop_after: int = 1000
    room: int = 0
    turns: list[TurnReport] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    earlier: int = 0
    ids: list[int] = field(default_factory=list)  # that were shown

    def opened(self, room: int, earlier: Sequence[TurnRecord], raw: bool) -> None:
        self.room, self.earlier = room, len(earlier)
        self.turns += [record.report for record in earlier if record.report is not None]

    def questions(self, look: Callable[[], None]) -> Iterator[Question]:
        for question in self.script[self.earlier :]:
            look()
            yield question

    def stopped(self) -> bool:
        return not self.turns and len(self.ids) >= self.stop_after

    def answered(self, report: TurnReport) -> None:
        self.turns.append(report)

    def refused(self, why: BadInput) -> None:
        self.refusals.append(str(why))

    def token(self, token: int, text: str) -> None:
        if token >= 0:
            self.ids.append(token)


def asked(*texts: str, **more: Any) -> list[Question]:
    return [Question(text, stop_at_eos=False, **more) for text in texts]


class Follows:
    """Sampling that chooses what was chosen in private, and notes how far that is from the likeliest."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.gaps = list(ids), list[float]()

    def chooser(self) -> Callable[[torch.Tensor], int]:
        def choose(logits: torch.Tensor) -> int:
            token = self.ids[len(self.gaps)]
            self.gaps.append(float(logits.max() - logits[token]))
            return token

        return choose


def check_turns(
    model: Model, public: PublicConfig, tokens: list[int], own: Scripted, limits: list[int],
    texts: Sequence[str] = QUESTIONS,
) -> None:  # fmt: skip
    """Each answer has so many tokens, and each token is the plain engine's, or as likely but for the blur."""
    bound, _ = bind_conversation(model.shape, public, len(tokens))
    plain, pending = PlainConversation(model, bound, tokens), list[int]()
    assert [len(turn.token_ids) for turn in own.turns] == limits
    for text, turn in zip(texts, own.turns, strict=False):
        follows, ids = Follows(turn.token_ids), turn.token_ids
        asked = pending + model.tokenizer.encode(text, bos=False)
        assert list(plain.ask(asked, len(ids), cast(Sampling, follows), ())) == ids
        assert max(follows.gaps) < NEAR
        pending = ids[-1:]  # chosen, and not taken in yet

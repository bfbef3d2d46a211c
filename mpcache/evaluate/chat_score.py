"""Score conversations after a document against their right answers: all in one pass, or step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from mpcache.cache import Cache
from mpcache.decode import Stream, block
from mpcache.errors import BadInput, OutOfRange
from mpcache.evaluate.score import EvalModel, Read
from mpcache.evaluate.tasks import TaskTurn
from mpcache.model import ModelShape
from mpcache.model.framing import Framing
from mpcache.model.tokenizer import Tokenizer
from mpcache.ops import Ops, as_tensor, as_value
from mpcache.policy import BoundPolicy, LayerView
from mpcache.policy.base import Policy
from mpcache.policy.combined import Combined
from mpcache.runtime.program import run
from mpcache.session import Nobody, Session


@dataclass(frozen=True)
class Talk:
    """One conversation as token ids, right answers included.

    spans: first and last position, the last exclusive, of each answer.  parts: what each is counted under.
    first: tokens of the first question and its prompt.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]
    parts: tuple[str, ...]
    first: int = 1

    def moved(self, context: Sequence[int]) -> tuple[list[int], Talk]:
        """Move the first question, all of its prompt but the last token, to the end of the context."""
        # The first words of the answer are given, and stay: they are asked with.
        n = self.first - 1
        spans = tuple((begin - n, end - n) for begin, end in self.spans)
        return [*context, *self.ids[:n]], Talk(self.ids[n:], spans, self.parts)

    @property
    def places(self) -> list[int]:
        """Return the places of all answers' tokens."""
        return [place for begin, end in self.spans for place in range(begin, end)]

    @property
    def chunks(self) -> list[int]:
        """Return the lengths of what `greedy_tokens` takes in: public."""
        return [place - before for before, place in pairwise([0, *self.places])]

    @property
    def judged(self) -> list[list[int]]:
        """Return the places whose logits each answer is judged by."""
        return [list(range(begin - 1, end - 1)) for begin, end in self.spans]


def make_talk(framing: Framing, turns: Sequence[TaskTurn]) -> Talk:
    """Frame a conversation of questions and right answers. Raises BadInput."""
    ids: list[int] = []
    spans, first = [], 0
    for i, turn in enumerate(turns):
        ids += framing.frame_turn(turn.question, i == 0)
        first = first or len(ids)
        lead, answer = _answer(framing.tokenizer, turn)
        spans.append((len(ids) + len(lead), len(ids) + len(lead) + len(answer)))
        ids += lead + answer
    return Talk(tuple(ids), tuple(spans), tuple(turn.part for turn in turns), first)


def _answer(tokenizer: Tokenizer, turn: TaskTurn) -> tuple[list[int], list[int]]:
    """Encode what is given of an answer, and the rest of it."""
    lead = tokenizer.encode(turn.lead, bos=False)
    both = tokenizer.encode(turn.lead + turn.answer, bos=False)
    if both[: len(lead)] != lead or len(both) == len(lead):
        raise BadInput("the model's tokenizer joins what is given of an answer to the rest of it")
    return lead, both[len(lead) :]


@torch.no_grad()
def score_talks(engine: EvalModel, bound: BoundPolicy, read: Read, talks: Sequence[Talk]) -> list[list[bool]]:
    """Tell of each answer of each conversation whether greedy decoding gives all of it. Raises PolicyError.

    Each conversation is the first one after the document. A policy that does nothing between two steps gets
    all of them in one pass, in which none sees another; any other one gets them token by token.
    """
    if not acts_between_steps(bound.policy):
        return _side_by_side(engine.session(bound, read), talks)
    return [_step_by_step(engine.session(bound, read), talk) for talk in talks]


@torch.no_grad()
def greedy_tokens(session: Session, talk: Talk) -> list[list[int]]:
    """Return what greedy decoding says in place of each answer's tokens, the right ones before it given.

    Raises OutOfRange.
    """
    said, taken = {}, 0
    for place in talk.places:
        logits = session.chunk(talk.ids[taken:place], place - taken)
        assert logits is not None, "the one who asks learns the logits"
        if session.in_range is False:
            raise OutOfRange("a value left its range in this conversation: its score would be wrong")
        said[place], taken = int(logits.argmax()), place
    return [[said[place] for place in range(begin, end)] for begin, end in talk.spans]


def acts_between_steps(policy: Policy) -> bool:
    """Tell whether a policy evicts or forms clusters while it decodes."""
    last = policy.then if isinstance(policy, Combined) else policy
    return type(last).observe is not Policy.observe


def _step_by_step(session: Session, talk: Talk) -> list[bool]:
    found, taken = [], 0
    for begin, end in talk.spans:
        right = True
        for i in range(begin, end):
            logits = session.chunk(talk.ids[taken:i], i - taken)
            assert logits is not None, "the one who asks learns the logits"
            taken = i
            right = right and int(logits.argmax()) == talk.ids[i]
            if not right and end == talk.spans[-1][1]:
                break  # nothing that follows can change the score
        found.append(right)
    return found


# ------------------------------------------------------------------------------ all at once


@dataclass(frozen=True)
class _TalksView(LayerView):
    """A layer in a step of several conversations. seen: (m, m), 1 where a token sees another."""

    seen: Tensor = field(default_factory=lambda: torch.ones(1, 1))

    def visible(self, n: int) -> Tensor | None:
        mask = torch.ones(self.m, n, dtype=torch.int64)
        mask[:, n - self.m :] = self.seen
        return mask.repeat_interleave(self.shape.group, 0)


@dataclass(frozen=True)
class _TalksPolicy(BoundPolicy):
    """A policy for several conversations at once."""

    seen: Tensor = field(default_factory=lambda: torch.ones(1, 1))

    def view(self, ops: Ops, shape: ModelShape, cache: Cache, index: int, positions: Tensor) -> LayerView:
        return _TalksView(ops, shape, self.plan, cache, index, positions, self.seen)


def _side_by_side(session: Session, talks: Sequence[Talk]) -> list[list[bool]]:
    """Take all conversations in as one chunk, each at the positions that follow the document."""
    shape, model, ops = session.shape, session.operands, session.ops
    device = as_tensor(model.embed).device
    ids = torch.tensor([token for talk in talks for token in talk.ids])
    positions = torch.cat([torch.arange(len(talk.ids)) for talk in talks]) + session.cache.context
    whose = torch.repeat_interleave(torch.tensor([len(talk.ids) for talk in talks]))
    seen = (whose == whose[:, None]).long().tril()
    policy = _TalksPolicy(session.policy.policy, session.policy.plan, session.policy.for_price, seen)
    x = as_tensor(model.embed)[ids.to(device)]
    if model.positions is not None:
        x = x + as_tensor(model.positions)[positions.to(device)]
    stream = Stream(None, as_value(x))
    for i, layer in enumerate(model.layers):
        stream = run(block(ops, shape, layer, session.cache, i, policy, stream, positions, None), Nobody())
    rows, first = [], 0
    for talk in talks:
        rows += [first + place for places in talk.judged for place in places]
        first += len(talk.ids)
    opened = None if stream.opened is None else stream.opened[rows]
    _, logits = run(
        ops.norm_linear(opened, stream.pending[rows], shape.norm_eps, model.lm_head, model.lm_bias), Nobody()
    )
    right = as_tensor(logits).argmax(-1).cpu() == ids[torch.tensor(rows) + 1]
    found, first = [], 0
    for talk in talks:
        answers = []
        for places in talk.judged:
            answers.append(bool(right[first : first + len(places)].all()))
            first += len(places)
        found.append(answers)
    return found

"""One session on the plain engine: questions asked, tokens compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mpcache.answer import bind_to_document
from mpcache.decode import Operands
from mpcache.engines.plain import PlainOps
from mpcache.errors import OutOfRange
from mpcache.evaluate.tasks import Sample, Task
from mpcache.model import Model
from mpcache.model.prefill import Prefill, prefill
from mpcache.policy import BoundPolicy
from mpcache.policy.full import Full
from mpcache.session import Session
from mpcache_kernels import Backend, backend


@dataclass(frozen=True)
class Tokens:
    """A sample as token ids. turns: question, answer, and the answer's bytes as text."""

    context: list[int]
    turns: tuple[tuple[list[int], list[int], int], ...]

    @property
    def length(self) -> int:
        """All of the session."""
        return len(self.context) + sum(len(question) + len(answer) for question, answer, _ in self.turns)

    def chunks(self) -> list[int]:
        """Return the lengths of what `score` takes in, where each answer is fed to its end: public."""
        found, before = [], 0
        for question, answer, _ in self.turns:
            found += [before + len(question), *[1] * (len(answer) - 1)]
            before = 1  # the answer's last token comes with the next question
        return found


@dataclass(frozen=True)
class Score:
    """Of one turn. right of asked; nats that `bytes` of text took."""

    part: str
    right: int
    asked: int
    nats: float
    bytes: int


@dataclass(frozen=True)
class Read:
    """A context that the model has read, and kernels that remember what they computed of it."""

    known: Prefill
    kernels: Backend


class EvalModel:
    """A model, ready to be asked under any policy.

    The weights are laid out once, and each context is read once, however many policies answer.
    """

    def __init__(self, model: Model, device: str = "cpu") -> None:
        self.model, self.device = model, device
        self.kernels = backend(device)
        self.ops = PlainOps(self.kernels, device)

    @cached_property
    def operands(self) -> Operands:
        session = Session(self.ops, None, self.model.shape, Full().bind(1, self.model.shape))
        session.setup(self.model.weights)
        return session.operands

    def tokens(self, sample: Sample) -> Tokens:
        """Encode context, questions and answers as the parties would, each by itself."""
        encode, turns = self.model.tokenizer.encode, []
        for turn in sample.turns:
            question = encode(turn.question, bos=False)
            both = encode(turn.question + turn.answer, bos=False)
            # An answer is what comes after the question, in the tokenizer's own view of the two.
            joined = both[: len(question)] == question
            answer = both[len(question) :] if joined else encode(turn.answer, bos=False)
            turns.append((question, answer, len(turn.answer.encode())))
        return Tokens(encode(sample.context, bos=True), tuple(turns))

    def read(self, context: Sequence[int], window: int) -> Read:
        """Read a context, and keep its last `window` queries."""
        known = prefill(self.model, context, self.device, window=window)
        return Read(known, replace(self.kernels, window_importance=_once(self.kernels.window_importance)))

    def bind(self, policy: BoundPolicy, read: Read) -> BoundPolicy:
        """Bind a policy to the counts that the model or the document decides. Raises PolicyError."""
        known = read.known.last_queries(policy.window)
        return bind_to_document(policy, self.model.shape, known, read.kernels)[0]

    def session(self, policy: BoundPolicy, read: Read) -> Session:
        """Begin a session after a context, which may be read with more queries than the policy needs."""
        policy = self.bind(policy, read)
        known = read.known.last_queries(policy.window)
        session = Session(self.ops, None, self.model.shape, policy)
        session.operands = self.operands
        session.context(known, read.kernels)
        return session


def _once(importance: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Compute the kernel once for each layer, window and head of a context that stays in memory.

    At another budget a policy asks for the same again, and for all queries that takes a second.
    """
    known: dict[tuple[object, ...], Tensor] = {}

    def remembered(q: Tensor, k: Tensor, first_position: int) -> Tensor:
        key = (q.data_ptr(), q.shape, k.data_ptr(), k.shape, first_position)
        if key not in known:
            known[key] = importance(q, k, first_position)
        return known[key].clone()  # policies write into it

    return remembered


@torch.no_grad()
def score(task: Task, session: Session, sample: Sample, tokens: Tokens) -> list[Score]:
    """Score each turn of a sample.

    The right answer's tokens go in one at a time, and each is judged by what the model would have said: an
    answer is all right here where greedy decoding gets it all right, and a wrong answer harms no later one.
    """
    found = []
    chunk: list[int] = []
    for i, (turn, (question, answer, size)) in enumerate(zip(sample.turns, tokens.turns, strict=True)):
        last = i == len(sample.turns) - 1
        chunk, right, nats = chunk + question, 0, 0.0
        for token in answer:
            logits = session.chunk(chunk, len(chunk))
            assert logits is not None, "the one who asks learns the logits"
            if session.in_range is False:
                raise OutOfRange("a value left its range in this sample: its score would be wrong")
            right += int(logits.argmax()) == token
            nats -= float(torch.log_softmax(logits.double(), -1)[token])
            chunk = [token]
            if last and not task.by_token and int(logits.argmax()) != token:
                break  # nothing that follows can change the score
        if task.by_token:
            found.append(Score(turn.part, right, len(answer), nats, size))
        else:
            found.append(Score(turn.part, int(right == len(answer)), 1, 0.0, 0))
    return found

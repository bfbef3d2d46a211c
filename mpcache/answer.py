"""Answer a question token by token: what a private and a plaintext answer share, and the plaintext one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.engines.plain import PlainOps
from mpcache.errors import OutOfRange
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import prefill
from mpcache.model.tokenizer import Tokenizer
from mpcache.padding import padded_length
from mpcache.policy import NO_DOCUMENT, BoundPolicy, ReadingPlan
from mpcache.policy.layer_view import OwnersContext, PackedContext
from mpcache.runtime.program import Program
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_kernels import Backend, backend


def bind_to_document(
    policy: BoundPolicy, shape: ModelShape, known: OwnersContext, kernels: Backend
) -> tuple[BoundPolicy, list[int]]:
    """Bind the policy to the counts that the model or the document decides, at their owner.

    Returns the policy and the counts, a number for each layer; the same policy and no counts where the
    plan is public. Raises PolicyError.
    """
    if policy.plan_is_public:
        return policy, []
    if isinstance(known, PackedContext):
        counts = list(known.counts)
    else:
        counts = policy.count_from_model(known.model) if known.model is not None else []
        counts = counts or policy.count_from_document(known, kernels)
    return policy.with_counts(counts, shape), counts


class Observer:
    """Takes note of how far a session is. This one takes none."""

    def began(self, phase: str) -> None:
        """Note that a phase begins: setup, context, question, decode1, ..."""

    def ended(self, phase: str, ms: float) -> None:
        """Note that it has ended, after `ms` milliseconds."""


class TimedSession(Session):
    """A session that knows how long each of its phases took: setup, context, question, decode1, ...

    ms: by phase, on the clock.  cpu_ms: by phase, of this process's computation, on all its threads.
    """

    def __init__(
        self, ops: Any, party: Any, shape: ModelShape, policy: BoundPolicy, observer: Observer | None = None,
        reveal: str = "logits", grid: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(ops, party, shape, policy, reveal, grid)
        self.ms: dict[str, float] = {}
        self.cpu_ms: dict[str, float] = {}
        self._observer = observer or Observer()

    def _run(self, phase: str, program: Program[Any]) -> Any:
        self._observer.began(phase)
        start, worked = time.perf_counter(), time.process_time()
        result = super()._run(phase, program)
        self.ms[phase] = 1000 * (time.perf_counter() - start)
        self.cpu_ms[phase] = 1000 * (time.process_time() - worked)
        self._observer.ended(phase, self.ms[phase])
        return result


def answer(
    session: Session,
    question: Sequence[int],
    limit: int,
    choose: Callable[[torch.Tensor], int],
    stops: Collection[int],
    announce: Callable[[bool], None] = lambda more: None,
    known: Sequence[int] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield token ids as they come: at most `limit`, and none after one of `stops`.

    A chunk whose values left their ranges yields no token, and ends the answer: `session.in_range` is false.

    Parameters
    ----------
    session
        At the one who asks; it has taken in the context and the turns before this one, and the chunks of
        an answer that goes on.
    question
        Token ids. In a later turn the last token of the answer before is the first: it was not taken in.
    limit
        The most tokens to yield, those of an answer that goes on among them.
    choose
        Makes a token id of what the client learns of a step.
    stops
        Token ids that end an answer; the one that does is yielded, too.
    announce
        Called as announce(more) before each chunk but the question, and once when there is none although
        the limit would allow it; `session.place` is that chunk's.
    known
        Tokens of this answer chosen before the session was interrupted. The session goes on after the
        chunks that it has taken in; a token that is known is not chosen again.
    stopped
        Asked before each chunk but the question whether the one who asks has heard enough.

    """
    ids = list(known)
    for step in range(session.place.step, limit):
        if step:
            more = ids[step - 1] not in stops and not stopped()
            announce(more)
            if not more:
                return
        chunk = [ids[step - 1]] if step else list(question)
        learned = session.chunk(chunk, len(chunk) if step else padded_length(len(chunk), session.grid))
        assert learned is not None, "the one who asks learns the answer"
        if session.in_range is False:
            if step + 1 < limit:
                announce(False)
            return
        if step == len(ids):
            ids.append(choose(learned))
        yield ids[step]


class AnswerText:
    """The text of an answer whose tokens come one at a time, cut before the first of the texts that end it.

    stopped: one of these has come.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._stream, self._stops = tokenizer.stream(), tuple(stops)
        self._settled, self._shown = "", 0
        self.stopped = False

    @property
    def text(self) -> str:
        """What was given out."""
        return self._settled[: self._shown]

    def push(self, token: int) -> str:
        """Take a token; return the text that it settles, but what may begin a text that ends the answer."""
        return self._give(self._stream.push(token), last=False)

    def end(self) -> str:
        """Return the text that was held back."""
        return self._give(self._stream.end(), last=True)

    def _give(self, more: str, last: bool) -> str:
        if self.stopped:
            return ""
        self._settled += more
        found = [at for stop in self._stops if (at := self._settled.find(stop, self._shown)) >= 0]
        until = len(self._settled)
        if found:
            self.stopped, until = True, min(found)
        elif not last:
            until -= max((_overlap(self._settled, stop) for stop in self._stops), default=0)
        given, self._shown = self._settled[self._shown : until], until
        return given


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def left_range(tokens: int) -> OutOfRange:
    """Say that an answer ended after so many tokens because a value left its range."""
    return OutOfRange(
        f"client: a value left its range on the way to token {tokens + 1}, which would be wrong and is not "
        "shown; ask otherwise, or use another model or policy (docs/ranges.md)"
    )


@dataclass
class PlainAnswer:
    """The answer without privacy, and what it took. Units: ms."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    prefill_ms: float = 0.0  # the pass over the context, and its eviction
    ms: dict[str, float] = field(default_factory=dict)  # by phase, as in TimedSession
    kernels: str = ""  # which ones it took


class PlainConversation:
    """The same program on plain tensors, turn by turn: same policy, same sampling.

    result: the last answer, and what all of them took.
    """

    def __init__(
        self, model: Model, policy: BoundPolicy, context: Sequence[int] | PackedContext, device: str = "cpu",
        grid: int = 1, private: Sequence[int] = (), reading: ReadingPlan = NO_DOCUMENT,
    ) -> None:  # fmt: skip
        """Read the context (token ids) on a device, or take it as it was packed.

        policy: as `mpcache.limits` binds it.  grid: as `Session` has it.
        private: the client's document, which is read as `reading` says.
        """
        kernels: Backend = backend(device)
        ops = PlainOps(kernels, device)
        self._session = session = TimedSession(ops, None, model.shape, policy, grid=grid)
        session.setup(model.weights)
        start = time.perf_counter()
        known: OwnersContext
        if isinstance(context, PackedContext):
            known = context.to(device)
        else:
            known = prefill(model, context, device, window=policy.window)
        session.policy, _ = bind_to_document(policy, model.shape, known, kernels)
        session.context(known, kernels)
        with torch.no_grad():
            for _ in session.read_document(reading, private):
                pass
        ms = 1000 * (time.perf_counter() - start)
        self.result = PlainAnswer(prefill_ms=ms, ms=session.ms, kernels=kernels.name)
        self._tokenizer = model.tokenizer

    def ask(
        self, question: Sequence[int], limit: int, sampling: Sampling, stops: Collection[int],
        stop_texts: Sequence[str] = (),
    ) -> Iterator[int]:  # fmt: skip
        """Yield an answer's token ids, as `answer` does; `result` has them, and their text.

        question: token ids; of a later turn, as `Framing.next_turn` returns them.  stop_texts: texts that end
        the answer, which is cut before them.
        """
        self.result.ids, shown = [], AnswerText(self._tokenizer, stop_texts)
        choose = sampling.chooser()
        with torch.no_grad():
            for token in answer(self._session, question, limit, choose, stops, stopped=lambda: shown.stopped):
                self.result.ids.append(token)
                shown.push(token)
                yield token
        shown.end()
        self.result.text = shown.text
        self._session.next_turn()


def plain_answer(
    model: Model,
    policy: BoundPolicy,
    context: Sequence[int] | PackedContext,
    question: Sequence[int],
    limit: int,
    sampling: Sampling,
    stops: Collection[int],
    device: str = "cpu",
    stop_texts: Sequence[str] = (),
    grid: int = 1,
    private: Sequence[int] = (),
    reading: ReadingPlan = NO_DOCUMENT,
) -> PlainAnswer:
    """Answer one question (token ids) in plaintext: see `PlainConversation`, and `answer` for the rest."""
    conversation = PlainConversation(model, policy, context, device, grid, private, reading)
    for _ in conversation.ask(question, limit, sampling, stops, stop_texts):
        pass
    return conversation.result

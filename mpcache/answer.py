"""Answer a question token by token: what a private and a plaintext answer share, and the plaintext one."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.engines.plain import PlainOps
from mpcache.model import Model, ModelShape
from mpcache.model.prefill import Prefill, prefill
from mpcache.policy import BoundPolicy
from mpcache.runtime.program import Program
from mpcache.sampling import Sampling
from mpcache.session import Session
from mpcache_kernels import Backend, backend


def bind_to_document(
    policy: BoundPolicy, shape: ModelShape, prefilled: Prefill, kernels: Backend
) -> tuple[BoundPolicy, list[int]]:
    """Bind the policy to the counts that the model or the document decides, at their owner.

    Returns the policy and the counts, a number for each layer; the same policy and no counts where the
    plan is public. Raises PolicyError.
    """
    if policy.plan_is_public:
        return policy, []
    model = prefilled.model
    counts = policy.count_from_model(model) if model is not None else []
    counts = counts or policy.count_from_document(prefilled, kernels)
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
        reveal: str = "logits",
    ) -> None:  # fmt: skip
        super().__init__(ops, party, shape, policy, reveal)
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
    announce: Callable[[int, bool], None] = lambda step, more: None,
    known: Sequence[int] = (),
) -> Iterator[int]:
    """Yield token ids as they come: at most `limit`, and none after one of `stops`.

    Parameters
    ----------
    session
        At the one who asks; it has taken in the context, and the chunks of an answer that goes on.
    question
        Token ids.
    limit
        The most tokens to yield, those of an answer that goes on among them.
    choose
        Makes a token id of what the client learns of a step.
    stops
        Token ids that end an answer; the one that does is yielded, too.
    announce
        Called as announce(i, more) before decode step i (1, 2, ...), and once when there is none
        although the limit would allow it.
    known
        Tokens chosen before the session was interrupted. The session goes on after the chunks that it
        has taken in; a token that is known is not chosen again.

    """
    ids = list(known)
    for step in range(session.chunks, limit):
        if step:
            more = ids[step - 1] not in stops
            announce(step, more)
            if not more:
                return
        chunk = [ids[step - 1]] if step else list(question)
        learned = session.chunk(chunk, len(chunk))
        assert learned is not None, "the one who asks learns the answer"
        if step == len(ids):
            ids.append(choose(learned))
        yield ids[step]


@dataclass
class PlainAnswer:
    """The answer without privacy, and what it took. Units: ms."""

    ids: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0  # the pass over the context, and its eviction
    ms: dict[str, float] = field(default_factory=dict)  # by phase, as in TimedSession
    kernels: str = ""  # which ones it took


def plain_answer(
    model: Model,
    policy: BoundPolicy,
    context: Sequence[int],
    question: Sequence[int],
    limit: int,
    sampling: Sampling,
    stops: Collection[int],
    device: str = "cpu",
) -> PlainAnswer:
    """Run the same program on plain tensors: same policy, same sampling.

    Parameters
    ----------
    model
        With its weights.
    policy
        As `mpcache.limits.bind_policy` returns it.
    context, question
        Token ids.
    limit
        The most tokens of the answer.
    sampling
        How each is chosen.
    stops
        Token ids that end an answer.
    device
        Where the plain tensors are.

    """
    kernels: Backend = backend(device)
    session = TimedSession(PlainOps(kernels, device), None, model.shape, policy)
    session.setup(model.weights)
    start = time.perf_counter()
    prefilled = prefill(model, context, device, window=policy.window)
    session.policy, _ = bind_to_document(policy, model.shape, prefilled, kernels)
    session.context(prefilled, kernels)
    result = PlainAnswer(prefill_ms=1000 * (time.perf_counter() - start), kernels=kernels.name)
    with torch.no_grad():
        result.ids = list(answer(session, question, limit, sampling.chooser(), stops))
    result.ms = session.ms
    return result

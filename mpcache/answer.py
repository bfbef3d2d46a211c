"""What a private and a plaintext answer share: their limits, how a token is chosen, the loop over tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mpcache.config import PublicConfig
from mpcache.engines.plain import PlainOps
from mpcache.errors import BadInput, PolicyError
from mpcache.model.loading import Model, ModelShape
from mpcache.model.prefill import Prefill, prefill
from mpcache.policy import BoundPolicy, parse_policy
from mpcache.protocols.ranges import LONGEST_ATTENDED
from mpcache.runtime.program import Program
from mpcache.session import Session
from mpcache_kernels import Backend, backend


@dataclass(frozen=True)
class Sampling:
    """How a token follows from its logits: greedy at temperature 0, else drawn with a seed from the
    fewest tokens that hold `top_p` of the probability. Raises BadInput on a value out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise BadInput(f"--temperature is {self.temperature:g}; give 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise BadInput(f"--top-p is {self.top_p:g}; give a number above 0 and up to 1")
        if not 0 <= self.seed < 2**63:
            raise BadInput(f"--seed is {self.seed}; give a whole number from 0 to 2^63 - 1")

    def check(self, reveal: str) -> None:
        """Raises BadInput where the client would have to draw from logits that it does not learn."""
        if reveal == "token" and self.temperature > 0:
            raise BadInput(
                f"--temperature is {self.temperature:g}, but with reveal: token the client learns the "
                "likeliest token alone; leave the temperature at 0, or set reveal: logits"
            )

    def chooser(self, reveal: str = "logits") -> Chooser:
        """A function from what the client learns to a token id: logits (vocab,), or the id itself. Each
        one starts from the seed."""
        return Chooser(self, reveal)


class Chooser:
    """Chooses tokens one after the other."""

    def __init__(self, sampling: Sampling, reveal: str) -> None:
        self.sampling, self.reveal = sampling, reveal
        self._generator = torch.Generator().manual_seed(sampling.seed)

    @property
    def state(self) -> torch.Tensor:
        """Where the draws are (bytes): a chooser that is put there makes the same ones."""
        return self._generator.get_state()

    @state.setter
    def state(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def __call__(self, logits: torch.Tensor) -> int:
        if self.reveal == "token":
            return int(logits)
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        scaled = torch.softmax(logits.double() / self.sampling.temperature, -1)
        probabilities, tokens = scaled.sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        allowed = probabilities * (before < self.sampling.top_p)
        return int(tokens[torch.multinomial(allowed, 1, generator=self._generator)])


def bind(shape: ModelShape, public: PublicConfig, context: int, question: int) -> BoundPolicy:
    """The policy with its plan, after the checks that every party makes on public facts alone.

    context, question: lengths in tokens. Raises BadInput or PolicyError.
    """
    if context < 1:
        raise BadInput("the context is empty; it needs at least one token")
    if question < 1:
        raise BadInput("the question is empty; it needs at least one token")
    total = context + question + public.max_new_tokens
    if total > shape.max_positions:
        raise BadInput(
            f"context ({context} tokens), question ({question}) and answer (up to {public.max_new_tokens}) "
            f"make {total} tokens, the model allows {shape.max_positions}; shorten the context or lower "
            "--max-new-tokens"
        )
    policy = parse_policy(public.policy)
    if policy.plan_is_public and policy.leak == "count":
        raise PolicyError(f"policy {policy.name}: the document decides n_keep with threshold; leave one out")
    bound = policy.bind(context, shape)
    bound.check(public.protocol)
    attended = bound.plan.attended + question + public.max_new_tokens
    if public.protocol != "stock" and attended > LONGEST_ATTENDED:
        raise PolicyError(
            f"policy {policy.spec}: a query may attend to {attended} tokens of context, question and answer; "
            f"protocol {public.protocol} holds {LONGEST_ATTENDED}: give it smaller "
            "budgets, or shorten the context"
        )
    return bound


def decide(
    policy: BoundPolicy, shape: ModelShape, prefilled: Prefill, kernels: Backend
) -> tuple[BoundPolicy, list[int]]:
    """At the document's owner: the policy with what the document decides, and that. Raises PolicyError."""
    if policy.policy.plan_is_public:
        return policy, []
    counts = policy.policy.count_from_document(prefilled, kernels)
    return policy.policy.with_counts(counts).bind(policy.plan.context, shape), counts


class Observer:
    """Is told how far a session is. This one takes no note."""

    def began(self, phase: str) -> None:
        """A phase begins: setup, context, question, decode1, ..."""

    def ended(self, phase: str, ms: float) -> None:
        """And has ended, after so long."""


class TimedSession(Session):
    """A session that knows how long each of its phases took: setup, context, question, decode1, ...

    ms: on the clock.  cpu_ms: of this process's computation in it, on all its threads.
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
    """Token ids, as they come: at most `limit`, and none after one of `stops`.

    announce(i, more): called before decode step i (1, 2, ...), and once when there is none although
    the limit would allow it.
    known: tokens chosen before the session was interrupted. It goes on after the chunks it has taken in;
    what follows from a chunk and is known is not chosen again.
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
    """The same program on plain tensors: same policy, same sampling."""
    kernels: Backend = backend(device)
    session = TimedSession(PlainOps(kernels, device), None, model.shape, policy)
    session.setup(model.weights)
    start = time.perf_counter()
    prefilled = prefill(model, context, device, window=policy.policy.window(len(context)))
    session.policy, _ = decide(policy, model.shape, prefilled, kernels)
    session.context(prefilled, kernels)
    result = PlainAnswer(prefill_ms=1000 * (time.perf_counter() - start), kernels=kernels.name)
    with torch.no_grad():
        result.ids = list(answer(session, question, limit, sampling.chooser(), stops))
    result.ms = session.ms
    return result

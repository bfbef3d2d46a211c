"""What is public of a document of the client's own, and every opening of its eviction, in words."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict

from mpcache.audit.explain import Line, Step, TraceParty, told_step
from mpcache.audit.private_rows import CONTEXT
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.cost.tally import split_step
from mpcache.engines.registry import engine
from mpcache.limits import bind_policy
from mpcache.model import ModelShape
from mpcache.phases import EVICTION
from mpcache.policy import parse_policy
from mpcache.policy.plan import runs
from mpcache.rank import Rank
from mpcache.session import Session


def explain_document(
    shape: ModelShape, spec: str, tokens: int, question: int, protocol: str
) -> Iterator[str]:
    """Yield lines about a document of so many tokens, evicted as `spec` says. Raises PolicyError."""
    public = PublicConfig(policy="full", private_policy=spec)
    bound = bind_policy(shape, public, CONTEXT, question, 2, tokens)
    plan, policy = reading_plan(shape, public, CONTEXT, tokens, protocol), parse_policy(spec)
    yield f"{policy.spec}: {policy.source}"
    yield ""
    yield f"Public of the client's document, besides its length of {tokens} tokens:"
    yield f"  read by {plan.chunks[0]} tokens at once, in {len(plan.chunks)} chunks"
    if plan.eviction is None:
        yield "  all of it stays. Reading it opens what a question opens, but for the logits."
        return
    for name, value in asdict(plan.eviction).items():
        by_layer = ", ".join(f"{n} in {which}" for which, n in runs(value)) if name == "kept" else str(value)
        if name != "leaders":
            yield f"  {name}: {by_layer.lower()}"
    followers = [i for i, leader in enumerate(plan.eviction.leaders) if leader != i]
    if followers:
        those = ", ".join(map(str, followers))
        yield f"  layers that take an earlier one's ranking, and keep the same tokens: {those}"
    yield ""
    yield "Reading it opens what a question opens, but for the logits, and each layer's importance. What the"
    yield "eviction opens is masked by randomness that is used once, but for ranks of rows that nobody can"
    yield "place, and the client's bit, whether all values were in range. Bytes are those of each sender."
    witness = TraceParty()
    session = Session(engine(protocol, Rank.SERVER, device="meta"), witness, shape, bound)
    session.setup(None)
    session.context(None, None)
    for _ in session.read_document(plan, None):
        pass
    steps: dict[int | None, dict[str, Step]] = defaultdict(dict)
    for name, said in witness.said.items():
        phase, _, rest = name.partition("/")
        if phase == EVICTION:
            number, op = split_step(rest)
            lines = tuple(Line(one.why, one.to, 1, None, one.size) for one in said.opened)
            dealt = sum(one.bytes for one in said.dealt)
            steps[number][op] = Step(op, tuple(said.kinds), said.rounds, (), lines, None, dealt)
    alike: dict[tuple[Step, ...], list[int]] = defaultdict(list)
    for number in sorted(number for number in steps if number is not None):
        alike[tuple(steps[number].values())].append(number)
    for ops, numbers in alike.items():
        yield f"layer{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}:"
        for step in ops:
            yield from told_step(step)
    yield "then:"
    for step in steps[None].values():
        yield from told_step(step)

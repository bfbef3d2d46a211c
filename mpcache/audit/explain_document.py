"""What is public of a document of the client's own, and every opening of its eviction: in words, as data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from mpcache.audit.explain import Line, Step, TensorTrace, TraceParty
from mpcache.audit.explain_text import Group, group_steps, step_as_data, told_steps
from mpcache.audit.private_rows import CONTEXT
from mpcache.config import PublicConfig
from mpcache.cost.reading import reading_plan
from mpcache.cost.tally import split_step
from mpcache.engines.registry import engine
from mpcache.limits import bind_policy
from mpcache.model import ModelShape
from mpcache.phases import EVICTION
from mpcache.policy import ReadingPlan, parse_policy
from mpcache.policy.plan import alike, layers_told
from mpcache.rank import Rank
from mpcache.session import Session

OFTEN = 8  # openings of one kind in a step; more are told as one


def explain_document(
    shape: ModelShape, spec: str, tokens: int, question: int, protocol: str
) -> Iterator[str]:
    """Yield lines about a document of so many tokens, evicted as `spec` says. Raises PolicyError."""
    plan, within, last = _read(shape, spec, tokens, question, protocol)
    policy = parse_policy(spec)
    yield f"{policy.spec}: {policy.source}"
    yield ""
    yield f"Public of the client's document, besides its length of {tokens} tokens:"
    yield f"  read by {plan.chunks[0]} tokens at once, in {len(plan.chunks)} chunks"
    if plan.eviction is None:
        yield "  all of it stays. Reading it opens what a question opens, but for the logits."
        return
    for name, value in asdict(plan.eviction).items():
        by_layer = ", ".join(f"{n} in {which}" for which, n in alike(value)) if name == "kept" else str(value)
        if name != "leaders":
            yield f"  {name}: {by_layer.lower()}"
    followers = [i for i, leader in enumerate(plan.eviction.leaders) if leader != i]
    if followers:
        yield f"  take an earlier one's ranking, and keep the same tokens: {layers_told(followers)}"
    yield ""
    yield "Reading it opens what a question opens, but for the logits, and each layer's importance. What the"
    yield "eviction opens is masked by randomness that is used once, but for ranks of rows that nobody can"
    yield "place, and the client's bit, whether all values were in range. Bytes are those of each sender."
    leaders = {number for numbers, _ in within for number in numbers or ()}
    yield from told_steps([], within, last, len(leaders))


def explained_document(
    shape: ModelShape, spec: str, tokens: int, question: int, protocol: str
) -> dict[str, Any]:
    """Return the same as data. Raises PolicyError."""
    plan, within, last = _read(shape, spec, tokens, question, protocol)
    policy = parse_policy(spec)
    return {
        "policy": policy.spec,
        "source": policy.source,
        "protocol": protocol,
        "private_tokens": tokens,
        "model": shape.to_dict(),
        "chunks": list(plan.chunks),
        "plan": None if plan.eviction is None else asdict(plan.eviction),
        "steps": [step_as_data(*group) for group in (*within, *last)],
    }


def _read(
    shape: ModelShape, spec: str, tokens: int, question: int, protocol: str
) -> tuple[ReadingPlan, list[Group], list[Group]]:
    """Read the document's eviction: its plan, and what its steps open within the layers and behind them."""
    public = PublicConfig(policy="full", private_policy=spec)
    bound = bind_policy(shape, public, CONTEXT, question, 2, tokens)
    plan = reading_plan(shape, public, CONTEXT, tokens, protocol)
    if plan.eviction is None:
        return plan, [], []
    layers: dict[int, dict[str, Step]] = defaultdict(dict)
    last: list[Group] = []
    witness = TraceParty()
    session = Session(engine(protocol, Rank.SERVER, device="meta"), witness, shape, bound)
    session.setup(None)
    session.context(None, None)
    for _ in session.read_document(plan, None):
        pass
    for name, said in witness.said.items():
        phase, _, rest = name.partition("/")
        if phase == EVICTION:
            number, op = split_step(rest)
            lines = tuple(_lines(said.opened))
            dealt = sum(one.bytes for one in said.dealt)
            step = Step(op, tuple(said.kinds), said.rounds, (), lines, None, dealt)
            if number is None:
                last.append((None, step))
            else:
                layers[number][op] = step
    return plan, group_steps(layers), last


def _lines(opened: Sequence[TensorTrace]) -> Iterator[Line]:
    """Tell each opening; those that come again and again in a step, as where rows are sorted, all at once."""
    alike: dict[tuple[str, str, int], list[TensorTrace]] = defaultdict(list)
    for one in opened:
        alike[one.why, one.to, one.size[-1]].append(one)
    for (why, to, width), ones in alike.items():
        if len(ones) > OFTEN:
            yield Line(why, to, 1, None, (sum(one.bytes for one in ones) // width, width))
        else:
            yield from (Line(why, to, 1, None, one.size) for one in ones)

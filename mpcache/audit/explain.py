"""A policy's plan in words: what is public, and every opening of a decode step, from the program itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpcache.cost import PROTOCOLS, CostParty, split
from mpcache.model import ModelShape
from mpcache.policy import parse
from mpcache.policy.base import runs
from mpcache.rank import Rank
from mpcache.secure.correlations import Request
from mpcache.secure.program import Opening
from mpcache.session import Session

# What each kind of correlated randomness is for (PROTOCOLS), by the name of its request.
KINDS = {
    "mask": "a permanent mask: opened once as W - B, used again and again",
    "resident": "product with a resident operand: only the activation is opened (PROTOCOLS 1)",
    "truncation": "exact truncation (Escudero et al., eprint 2020/338)",
    "truncation/product": "exact truncation fused with a product",
    "truncations/product": "product of two values that the same opening truncates",
    "compare": "comparison by a key tree (Boyle et al., EUROCRYPT 2021)",
    "top": "oblivious top-k with one-hot slots: all pairs by key trees, then rotated ranks (PROTOCOLS 4)",
    "scatter": "weights put back through the selection",
    "one-hot": "table lookup by a rotated one-hot vector",
    "exp": "exponential by one key tree per element",
    "line": "reciprocal or inverse root: a line for each interval, by a rotated one-hot vector",
    "activation": "activation as a sum of sines, with its truncation",
    "norm": "the residual connection's sum and its squares, from one opening",
    "square": "squares",
    "triple/mul": "elementwise products (Beaver, CRYPTO 1991)",
    "triple/matmul": "matrix product (Beaver, CRYPTO 1991)",
    "and": "bitwise products of XOR shares",
    "bit": "a shared bit from XOR to arithmetic shares",
}


@dataclass
class Said:
    """What one step of one layer opens and draws. opened: (why, to whom, shape, bytes per element)."""

    opened: list[tuple[str, str, tuple[int, ...], int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    rounds: int = 0
    offline: int = 0


class Witness(CostParty):
    """Reads every step of the decode program in full, and writes down what is opened to whom."""

    def __init__(self) -> None:
        super().__init__()
        self.said: dict[str, Said] = defaultdict(Said)

    def open(self, items: Sequence[Opening], step: str) -> list[Any]:
        self.said[step].rounds += 1
        for item in items:
            to = "both" if item.to is None else item.to.label
            who = "" if item.sender is None else f", from the {item.sender.label}"
            said = self.said[item.step or step]
            said.opened.append((item.why, to + who, tuple(item.share.shape), item.width))
        return super().open(items, step)

    def draw(self, request: Request, step: str) -> list[Any]:
        said = self.said[step]
        if request.kind not in said.kinds:
            said.kinds.append(request.kind)
        said.offline += sum(p.nbytes for rank in (Rank.SERVER, Rank.CLIENT) for p in request.sent_to(rank))
        return super().draw(request, step)


def explain(shape: ModelShape, spec: str, context: int, question: int, protocol: str) -> Iterator[str]:
    """Lines of text, for the first decode step after the question."""
    policy = parse(spec)
    bound = policy.bind(context, shape).priced()
    yield f"{policy.spec}: {policy.source}" if getattr(policy, "source", "") else policy.spec
    yield ""
    yield f"Public, besides the model's shape (context {context} tokens, question {question} tokens):"
    yield from (f"  {line}" for line in bound.plan.lines())
    yield f"Leaks beyond that: {policy.leak}."
    yield ""

    session = Session(PROTOCOLS[protocol](Rank.SERVER, device="meta"), Witness(), shape, bound)
    session.setup(None)
    session.context(None, None)
    session.chunk(None, question)
    session.party = witness = Witness()
    session.chunk(None, 1)

    yield "One decode step. A round is one message, or one each way at once. What is opened is masked by"
    yield "randomness that is used once, but for the logits, which are the client's answer."
    steps: dict[Any, dict[str, Said]] = defaultdict(dict)
    for name, said in witness.said.items():
        number, op = split(name.partition("/")[2])
        steps["first" if op == "embed" else "last" if number is None else number][op] = said
    for op, said in steps["first"].items():
        yield from _step(op, said)
    for layers, ops in runs([steps[i] for i in range(shape.layers)]):
        yield f"{layers}:"
        for op, said in ops.items():
            yield from _step(op, said)
    yield "then:"
    for op, said in steps["last"].items():
        yield from _step(op, said)


def _step(op: str, said: Said) -> Iterator[str]:
    rounds = f"{said.rounds} round{'' if said.rounds == 1 else 's'}" if said.rounds else "beside another step"
    yield f"  {op}: {rounds}, {_kinds(said.kinds)}"
    for (why, to, shape, width), times in _counted(said.opened):
        n = " x ".join(map(str, shape)) or "1"
        repeated = f" x {times} times" if times > 1 else ""
        yield f"    to {to}: {why}: {n} x {width} B{repeated} = {math.prod(shape) * width * times:,} B"
    if said.offline:
        yield f"    from the dealer, ahead: {said.offline:,} B"


def _kinds(kinds: Sequence[str]) -> str:
    return "; ".join(KINDS.get(kind, kind) for kind in kinds) or "nothing from the dealer"


def _counted(items: Sequence[Any]) -> list[tuple[Any, int]]:
    counts: dict[Any, int] = defaultdict(int)
    for item in items:
        counts[item] += 1
    return list(counts.items())

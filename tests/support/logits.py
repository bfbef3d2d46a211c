"""How far the private logits are from the plain engine's, over many tokens and for every policy.

    python -m tests.support.logits [--documents 2] [--tokens 6] [--context 256] [POLICY ...]

Demo model, unseen documents; both readings are given the plain run's greedy tokens. Where a near tie lets
the private run choose another cluster than the plain one, what follows is about other tokens: so each
session is compared twice, with the plain run as it is, and with one that makes the private run's choices.
All three parties run in this process; their arithmetic is that of a real run.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpcache.answer import bind_to_document
from mpcache.demo.documents import make_document
from mpcache.engines.plain import PlainOps, PlainSelection
from mpcache.model import Model, demo_model_dir, load_model
from mpcache.model.prefill import Prefill, prefill
from mpcache.ops import AnyEngine
from mpcache.policy import POLICIES, parse_policy
from mpcache.policy.base import BoundPolicy
from mpcache.rank import Rank
from mpcache.session import Session
from tests.support.agreement import KERNELS, record
from tests.support.play import play


class Replaying(PlainOps):
    """The plain reading with given choices (*rows, k), one for each time that something is chosen."""

    def __init__(self, choices: Sequence[torch.Tensor]) -> None:
        super().__init__()
        self.choices = iter(choices)

    def topk(self, scores: torch.Tensor, k: int, values: Sequence[torch.Tensor], limit: int = 512) -> Any:
        chosen = PlainSelection(next(self.choices).reshape(*scores.shape[:-1], k), scores.shape[-1])
        return chosen, [chosen.pick(v) for v in values]
        yield


@dataclass
class Errors:
    """Of all logits of all steps, absolute: against the plain run, and against its choices replayed."""

    free: torch.Tensor
    same: torch.Tensor
    changed: int  # steps with another choice somewhere up to them
    steps: int


def read(
    ops: AnyEngine, party: Any, model: Model, bound: BoundPolicy, filled: Prefill,
    chunks: Sequence[Sequence[int]], rank: Rank | None = None,
) -> list[torch.Tensor | None]:  # fmt: skip
    session = Session(ops, party, model.shape, bound)
    server, client = rank in (None, Rank.SERVER), rank in (None, Rank.CLIENT)
    session.setup(model.weights if server else None)
    session.context(*((filled, KERNELS) if server else (None, None)))
    with torch.no_grad():
        return [session.chunk(chunk if client else None, len(chunk)) for chunk in chunks]


def greedy(model: Model, context: Sequence[int], question: Sequence[int], n: int) -> list[list[int]]:
    """The question, and n - 1 tokens of the plain answer, by the policy that attends to everything."""
    chunks = [list(question)]
    bound = parse_policy("full").bind(len(context), model.shape)
    filled = prefill(model, context)
    for _ in range(n - 1):
        last = read(PlainOps(), None, model, bound, filled, chunks)[-1]
        assert last is not None
        chunks.append([int(last.argmax())])
    return chunks


def errors(model: Model, context: Sequence[int], chunks: Sequence[Sequence[int]], spec: str) -> Errors:
    bound = parse_policy(spec).bind(len(context), model.shape)
    filled = prefill(model, context, window=bound.window)
    bound, _ = bind_to_document(bound, model.shape, filled, KERNELS)

    def program(ops: Any, party: Any, rank: Rank) -> Any:
        seen = record(ops)
        return seen, read(ops, party, model, bound, filled, chunks, rank)

    played = play(program)
    (server, _), (client, private) = played.server, played.client
    pairs = zip(server, client, strict=True)
    choices = [(one.hot + two.hot).argmax(-1) for (_, one), (_, two) in pairs]
    plain_ops = PlainOps()
    seen = record(plain_ops)
    free = read(plain_ops, None, model, bound, filled, chunks)
    same = read(Replaying(choices), None, model, bound, filled, chunks)
    differs = [
        not torch.equal(mine.sort(-1).values.reshape(-1), its.index.sort(-1).values.reshape(-1))
        for mine, (_, its) in zip(choices, seen, strict=True)
    ]
    first = differs.index(True) * len(chunks) // len(differs) if any(differs) else len(chunks)

    def apart(plain: Sequence[Any]) -> torch.Tensor:
        pairs = zip(plain, private, strict=True)
        return torch.cat([(a.double() - b.double()).abs().reshape(-1) for a, b in pairs])

    return Errors(apart(free), apart(same), len(chunks) - first, len(chunks))


def unseen(model: Model, seed: int, context: int) -> tuple[list[int], list[int]]:
    def count(text: str) -> int:
        return len(model.tokenizer.encode(text, bos=False))

    document, questions = make_document(random.Random(seed), count, context, 8)
    return model.tokenizer.encode(document, bos=True), model.tokenizer.encode(questions[0][0], bos=False)


def private() -> list[str]:
    return [name for name, policy in POLICIES.items() if not getattr(policy, "plain_only", False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("policies", nargs="*", default=[*private(), "mpcache:score=bound,share=none"])
    given = parser.parse_args()
    model = load_model(demo_model_dir())
    print("| policy | tokens | given the same choices: p50 | p99 | max | plain's own: max | steps changed |")
    print("|---|---|---|---|---|---|---|")
    for spec in given.policies:
        found = []
        for seed in range(given.documents):
            context, question = unseen(model, seed, given.context)
            found.append(errors(model, context, greedy(model, context, question, given.tokens), spec))
        same, free = (torch.cat([getattr(e, name) for e in found]) for name in ("same", "free"))
        p50, p99 = (float(same.quantile(q)) for q in (0.5, 0.99))
        changed, steps = sum(e.changed for e in found), sum(e.steps for e in found)
        print(
            f"| {spec} | {steps} | {p50:.1e} | {p99:.1e} | {float(same.max()):.1e} | {float(free.max()):.1e} "
            f"| {changed} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
